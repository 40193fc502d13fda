"""One end of a TCP transfer, as a program of its own.

    python -m bench.transfer send|receive ADDRESS PORT WARM SECONDS

The receiver prints the bytes a second that arrived in SECONDS, after WARM seconds that do not count.
"""

from __future__ import annotations

import socket
import sys
import time

CHUNK = 1 << 20
CONNECT_S = 10.0


def main() -> None:
    """Be that end."""
    role, address, port, warm, seconds = sys.argv[1:]
    if role == "send":
        _send(address, int(port), float(warm) + float(seconds))
    else:
        print(_receive(int(port), float(warm), float(seconds)))


def _send(address: str, port: int, seconds: float) -> None:
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_S)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    data = bytes(CHUNK)
    until = time.monotonic() + seconds + 1.0
    with connection:
        while time.monotonic() < until:
            try:
                connection.sendall(data)
            except ConnectionError:  # the receiver has measured enough
                return


def _receive(port: int, warm: float, seconds: float) -> float:
    with socket.create_server(("", port)) as server:
        server.settimeout(CONNECT_S)
        connection, _ = server.accept()
    buffer = bytearray(CHUNK)
    with connection:
        _read(connection, buffer, warm)
        began = time.monotonic()
        count = _read(connection, buffer, seconds)
        return count / (time.monotonic() - began)


def _read(connection: socket.socket, buffer: bytearray, seconds: float) -> int:
    count = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until and (size := connection.recv_into(buffer)):
        count += size
    return count


if __name__ == "__main__":
    main()
