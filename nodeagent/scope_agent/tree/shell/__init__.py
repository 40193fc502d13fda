"""The tree room's shell: what a hub's kernel forwards."""
