"""The registry side of Scope: plans addresses, roles and conditions, stores the mesh and serves the gateway."""
