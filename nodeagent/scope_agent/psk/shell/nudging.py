"""The one packet that keys need: an empty datagram into the tunnel, which has WireGuard rekey."""

from __future__ import annotations

import socket

from scope.model import IPAddress

DISCARD = 9  # RFC 863: whoever listens there throws it away


def nudge(device: str, address: IPAddress) -> None:
    """Send an empty UDP datagram to a peer's mesh address by `device` and no other way. Raises OSError."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        sender.sendto(b"", (str(address), DISCARD))
