"""The registry side: plans addresses, roles and conditions, stores the mesh and serves the gateway."""
