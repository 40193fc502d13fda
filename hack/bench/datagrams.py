"""One end of a flood of datagrams that look like WireGuard's, as a program of its own.

    python -m bench.datagrams send ADDRESS PORT SECONDS BATCH [TOKEN]
    python -m bench.datagrams receive ADDRESS PORT WARM SECONDS [TOKEN]

Both ends knock with their token, if they have one, at ADDRESS and PORT, where a hub relays; without one the
sender sends to ADDRESS and the receiver listens at PORT. The sender makes BATCH datagrams with one call
(UDP_SEGMENT), as WireGuard does where it can. The receiver prints the bytes a second of payload that arrived
in SECONDS, after WARM seconds that do not count.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time

from scope.relay import knock

PAYLOAD = 1452  # of a full packet in a mesh with an MTU of 1420
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_BUFFER = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_KNOCK_S = 0.2


def main() -> None:
    """Be that end."""
    role, address, port, *rest = sys.argv[1:]
    if role == "send":
        seconds, batch, *token = rest
        _send(address, int(port), float(seconds), int(batch), *token)
    else:
        warm, seconds, *token = rest
        print(_receive(address, int(port), float(warm), float(seconds), *token))


def _send(address: str, port: int, seconds: float, batch: int, token: str = "") -> None:
    out = _socket(address, _SO_SNDBUFFORCE)
    if batch > 1:
        out.setsockopt(_SOL_UDP, _UDP_SEGMENT, PAYLOAD)
    out.connect((address, port))
    data = (struct.pack("<I", 4) + bytes(PAYLOAD - 4)) * batch
    until = time.monotonic() + seconds
    knock_at = 0.0
    while (now := time.monotonic()) < until:
        if token and now >= knock_at:
            out.sendmsg([knock(bytes.fromhex(token))])
            knock_at = now + _KNOCK_S
        for _ in range(16):
            with contextlib.suppress(ConnectionError):  # nobody listens there yet
                out.send(data)


def _receive(address: str, port: int, warm: float, seconds: float, token: str = "") -> float:
    into = _socket(address, _SO_RCVBUFFORCE)
    into.setsockopt(_SOL_UDP, _UDP_GRO, 1)
    into.settimeout(_KNOCK_S)
    into.bind(("", 0 if token else port))
    buffer = bytearray(1 << 16)
    began = time.monotonic()
    knock_at, count, counted_from = 0.0, 0, 0.0
    while (now := time.monotonic()) < began + warm + seconds:
        if token and now >= knock_at:
            into.sendto(knock(bytes.fromhex(token)), (address, port))
            knock_at = now + _KNOCK_S
        if not counted_from and now >= began + warm:
            count, counted_from = 0, now
        for _ in range(16):
            try:
                count += into.recv_into(buffer)
            except TimeoutError:
                break
    return count / (time.monotonic() - counted_from)


def _socket(address: str, force: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    opened.setsockopt(socket.SOL_SOCKET, force, _BUFFER)
    return opened


if __name__ == "__main__":
    main()
