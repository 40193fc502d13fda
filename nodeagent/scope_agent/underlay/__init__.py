"""The underlay: the machine's own interfaces, which carry what WireGuard sends."""
