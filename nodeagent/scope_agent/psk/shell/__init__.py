"""The shell of the keys' room: the packet that has WireGuard rekey, and the libraries that make keys."""
