"""The WireGuard room: what the device should be, what it is, the steps between; shells take them."""
