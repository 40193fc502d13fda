"""What runs in the pods of `make e2e`: it answers, calls, or keeps a stream going. It needs Python alone.

Handed to `python3 -c`, so that the image that is tried is all that Nodes need. `answer` echoes datagrams and
takes uploads, and says in each answer whom it sees. `call` reads what to do from its argument and leaves what
it found as the container's termination message, which any cluster shows in the pod's status. `stream` does so
when it is asked to end.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORT = 7000
# Of a datagram of an upload: number and count, so that the other side knows when it is whole.
_HEADER = struct.Struct("!II")
# What a datagram holds when many follow each other: below any MTU of a mesh.
_SMALL = 1200
# How many datagrams may be under way: far below what the buffers of a socket hold.
_WINDOW = 48
# The way's MTU is learned from the first datagram that was too large; those after it are fragmented.
_AGAIN_S, _TRIES = 1.0, 60
_TIMEOUT_S = 120.0
_RESULT = "/dev/termination-log"
# What a kubelet keeps of it.
_RESULT_BYTES = 4096
_STREAM_EVERY_S = 0.05
# What is on the way when a stream ends is waited for.
_LATE_S = 5.0


def main(mode: str, *arguments: str) -> None:
    """Do what the first argument says."""
    # As the first process of a container it is not ended by that signal unless it says so.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if mode == "answer":
        _answer()
    elif mode == "call":
        _call(json.loads(arguments[0]))
    else:
        _stream(json.loads(arguments[0]))


# Answering.


def _answer() -> None:
    server = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with server, datagrams:
        datagrams.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        datagrams.bind(("::", PORT))
        threading.Thread(target=_echo, args=(datagrams,), daemon=True).start()
        print("answering", flush=True)
        while True:
            connection, peer = server.accept()
            threading.Thread(target=_take, args=(connection, peer[0]), daemon=True).start()


def _echo(datagrams: socket.socket) -> None:
    """Send back each datagram's header, its length and whom it came from."""
    while True:
        data, peer = datagrams.recvfrom(65535)
        said = {"bytes": len(data), "seen": _plain(peer[0]), "pod": os.environ.get("POD", "")}
        datagrams.sendto(data[: _HEADER.size] + json.dumps(said).encode(), peer)


def _take(connection: socket.socket, peer: str) -> None:
    """Take uploads, each with its length in front, and say of each how much there was, and from whom."""
    with connection, connection.makefile("rb") as stream:
        connection.settimeout(_TIMEOUT_S)
        try:
            while head := stream.read(8):
                (length,) = struct.unpack("!Q", head)
                left = length
                while left and (part := stream.read(min(left, 1 << 16))):
                    left -= len(part)
                said = {"bytes": length - left, "seen": _plain(peer), "pod": os.environ.get("POD", "")}
                connection.sendall(json.dumps(said).encode() + b"\n")
        except OSError as error:
            print(f"{peer}: {error}", flush=True)


# Calling.


def _call(plan: dict[str, Any]) -> None:
    """`plan`: `targets`, `sizes`, `protocols`, and `rate` of datagrams in bytes a second (or null).

    A target is an address, or a name with the family behind it: `web-east.shop.svc/6`.
    """
    calls: dict[str, Callable[[str, int, float | None], dict[str, Any]]] = {
        "tcp": _call_tcp,
        "udp": _call_udp,
    }
    failures: list[str] = []
    done, again = 0, 0
    seen: set[str] = set()
    pods: set[str] = set()
    mbits: dict[str, float] = {}
    for target in plan["targets"]:
        for protocol in plan["protocols"]:
            for size in plan["sizes"]:
                began = time.monotonic()
                try:
                    said = calls[protocol](target, size, plan["rate"])
                except (OSError, ValueError) as error:
                    failures.append(f"{protocol} {target} {size} B: {error}")
                    continue
                if said["bytes"] != size:
                    failures.append(f"{protocol} {target} {size} B: {said['bytes']} arrived")
                    continue
                done += 1
                again += said.get("again", 0)
                seen.add(f"{said['mine']}={said['seen']}")
                pods.add(said["pod"])
                if size == max(plan["sizes"]):
                    rate = size * 8e-6 / (time.monotonic() - began)
                    mbits[protocol] = round(min(rate, mbits.get(protocol, rate)), 1)
    found = {"done": done, "again": again, "seen": sorted(seen), "pods": sorted(pods), "mbits": mbits}
    failed = {"failures": len(failures), "first": failures[:5]}
    _leave({**found, **failed})


def _call_tcp(target: str, size: int, _rate: float | None) -> dict[str, Any]:
    family, kind, protocol, _, address = _looked_up(target, socket.SOCK_STREAM)
    with socket.socket(family, kind, protocol) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(address)
        connection.sendall(struct.pack("!Q", size))
        part = bytes(1 << 16)
        left = size
        while left:
            left -= connection.send(part[:left])
        with connection.makefile("rb") as stream:
            said: dict[str, Any] = json.loads(stream.readline())
        return {**said, "mine": _plain(connection.getsockname()[0])}


def _call_udp(target: str, size: int, rate: float | None) -> dict[str, Any]:
    """Up to 64 KiB are at most two datagrams, of which the network makes fragments; more are small ones."""
    largest = 32768 if size <= 65536 else _SMALL
    count = -(-size // largest)
    lengths = [largest] * (count - 1) + [size - largest * (count - 1)]
    family, kind, protocol, _, address = _looked_up(target, socket.SOCK_DGRAM)
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.connect(address)
        if size == 1:
            return _ask_one_byte(sock)
        return _upload(sock, lengths, rate=rate)


def _looked_up(target: str, kind: socket.SocketKind) -> Any:
    name, _, version = target.partition("/")
    family = {"": socket.AF_UNSPEC, "4": socket.AF_INET, "6": socket.AF_INET6}[version]
    return socket.getaddrinfo(name, PORT, family=family, type=kind)[0]


def _ask_one_byte(sock: socket.socket) -> dict[str, Any]:
    for again in range(_TRIES):
        sock.settimeout(_AGAIN_S)
        try:
            sock.send(b"x")
            said: dict[str, Any] = json.loads(sock.recv(2048)[1:])
        except TimeoutError:
            continue
        return {**said, "mine": _plain(sock.getsockname()[0]), "again": again}
    raise TimeoutError(f"no answer to {_TRIES} datagrams")


def _upload(sock: socket.socket, lengths: list[int], *, rate: float | None) -> dict[str, Any]:
    """Send each datagram until it is answered, some at a time; with `rate` no faster than that."""
    began = time.monotonic()
    under_way: dict[int, tuple[float, int]] = {}
    following, answered, again, sent = 0, 0, 0, 0
    said: dict[str, Any] = {}
    while answered < len(lengths):
        now = time.monotonic()
        if rate is not None and sent > rate * (now - began):
            time.sleep(min(0.01, sent / rate - (now - began)))
        for number, (since, tries) in list(under_way.items()):
            if now - since < _AGAIN_S:
                break
            if tries == _TRIES:
                raise TimeoutError(f"no answer to {_TRIES} datagrams of {lengths[number]} B")
            again += 1
            del under_way[number]
            _send(sock, number, lengths)
            under_way[number] = (now, tries + 1)
        while following < len(lengths) and len(under_way) < _WINDOW:
            if rate is not None and sent > rate * (time.monotonic() - began):
                break
            _send(sock, following, lengths)
            under_way[following] = (time.monotonic(), 1)
            sent += lengths[following]
            following += 1
        sock.settimeout(0.05)
        try:
            data = sock.recv(2048)
        except TimeoutError:
            continue
        except OSError as error:
            # What a router says of a datagram that was sent: the next attempt is made of fragments.
            if error.errno != errno.EMSGSIZE:
                raise
            continue
        number, _ = _HEADER.unpack_from(data)
        if under_way.pop(number, None) is not None:
            said = json.loads(data[_HEADER.size :])
            if said["bytes"] != lengths[number]:
                raise ValueError(f"of {lengths[number]} B of a datagram {said['bytes']} arrived")
            answered += 1
    return {**said, "bytes": sum(lengths), "mine": _plain(sock.getsockname()[0]), "again": again}


def _send(sock: socket.socket, number: int, lengths: list[int]) -> None:
    datagram = _HEADER.pack(number, len(lengths)).ljust(lengths[number], b"\0")[: lengths[number]]
    try:
        sock.send(datagram)
    except OSError as error:
        # Larger than what the way was just found to carry, or no room: it is sent again, then in fragments.
        if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
            raise


# A stream, for whoever does something to the network meanwhile.


def _stream(plan: dict[str, Any]) -> None:
    """Send small datagrams to every one of `targets` until SIGTERM, and count what came back."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    found: dict[str, Any] = {}
    threads = [threading.Thread(target=_stream_to, args=(target, ended, found)) for target in plan["targets"]]
    for thread in threads:
        thread.start()
    print("streaming", flush=True)
    for thread in threads:
        thread.join()
    _leave(found)


def _stream_to(target: str, ended: threading.Event, found: dict[str, Any]) -> None:
    family = socket.AF_INET6 if ipaddress.ip_address(target).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.connect((target, PORT))
        sock.settimeout(_STREAM_EVERY_S)
        sent, longest, last = 0, 0.0, time.monotonic()
        back: set[int] = set()
        until: float | None = None
        following = last
        while until is None or (time.monotonic() < until and len(back) < sent):
            if ended.is_set() and until is None:
                until = time.monotonic() + _LATE_S
            if until is None and time.monotonic() >= following:
                sent += 1
                following = max(following + _STREAM_EVERY_S, time.monotonic())
                # What cannot even be sent is lost, and is missed below.
                with contextlib.suppress(OSError):
                    sock.send(_HEADER.pack(sent, 0))
            try:
                data = sock.recv(2048)
            except OSError:
                continue
            back.add(_HEADER.unpack_from(data)[0])
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        found[target] = {"sent": sent, "lost": sent - len(back), "gap": round(longest, 2)}


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def _leave(found: dict[str, Any]) -> None:
    text = json.dumps(found)
    print(text, flush=True)
    Path(_RESULT).write_text(text[:_RESULT_BYTES])


if __name__ == "__main__":
    main(*sys.argv[1:])
