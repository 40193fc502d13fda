"""The agent: makes a machine a peer of its mesh by probing, choosing paths and programming WireGuard."""
