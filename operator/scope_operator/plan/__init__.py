"""What the registry side decides of meshes and peers: addresses, roles, conditions. Pure."""
