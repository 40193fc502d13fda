"""`scope-forwarder --grants FILE [--mark N]`: relays in user space what the kernel's rules cannot, or all.

It relays between IPv4 and IPv6, and where a hub has no nftables or may not forward packets. It listens at the
granted ports. Datagrams for which the kernel's rules have both ends never get here; everybody's knocks do.

- It waits for the file of grants (`scope.relay`), so a service manager may start it before the agent, and
  follows its replacement. What it learned for grants that stay, stays. A file that cannot be read changes
  nothing.
- When the file is removed it ends with status 0, as it does when it is asked to end. The agent's end is not
  its own.
- It holds a lock beside the file for as long as it runs: one forwarder a file. The locked file is empty while
  it waits, and says `running` once it serves.
- Whoever connects to the Unix socket beside the file reads one JSON document: what was relayed, and what was
  not.
- A datagram that may not pass is dropped without an answer. Tokens go from the file into memory and nowhere
  else.

What arrives in one batch (UDP_GRO), or one after the other from the same sender, leaves in one (UDP_SEGMENT),
where kernel and way take it. Nothing is ever held back to wait for more.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import json
import os
import select
import signal
import socket
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from scope.core_dumps import forbid_core_dumps
from scope.relay import Grants, GrantsFileError, decode_grants
from scope_dataplane.batches import (
    CONTROL_BYTES,
    IP_PKTINFO,
    MAX_DATAGRAM,
    MAX_SEGMENTS,
    SOL_IP,
    SOL_UDP,
    UDP_GRO,
    Control,
    all_wireguard,
    answer_from,
    count,
    in_segments,
    passing,
    segment_size,
    segments,
    sendable,
    token_of,
)
from scope_dataplane.pairs import Address, End, Pairs, Place
from scope_dataplane.process import (
    can_mark,
    enlarge_buffers,
    listen_at,
    log,
    parse_mark,
    raise_descriptors,
    take_lock,
)

LOOK_INTERVAL = 0.25  # how soon a grant's end is seen, and the file's where the kernel does not tell
READ_SHARE = 4.0  # after a read that took t seconds the next one waits so many t: grants may come by hundreds
WAIT_INTERVAL = 0.05  # how soon the file's appearance is
BIND_INTERVAL = 5.0  # how often a port that another program held is tried again

# What the lock file says once we serve; it is empty before.
RUNNING = b"running"

READS = 64  # of one socket before the next has its turn
LISTENERS = 4  # connections to the Unix socket at once; a fifth ends the first

_ROOM = 65536  # that one read may fill
# A few reads in a row without moving what is not sent yet; small enough for the processor's cache.
_BUFFER_BYTES = 4 * _ROOM

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT = 10, 23, 0
_IN_CHANGES = 0x8 | 0x40 | 0x80 | 0x200  # inotify: written and closed, moved from, moved to, deleted

# What the kernel says where a way takes no batches: segments longer than its MTU, a device without checksums,
# and kernels that know nothing of it.
_NO_BATCHES = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT})


def main(arguments: list[str] | None = None) -> int:
    """Relay until the file of grants is removed. Exit status 0 then, 1 for what a person must mend."""
    parser = argparse.ArgumentParser(
        prog="scope-forwarder", description="Relay datagrams of granted pairs of peers in user space."
    )
    parser.add_argument(
        "--grants", required=True, metavar="FILE", help="the file of grants that the agent writes"
    )
    parser.add_argument(
        "--mark", type=parse_mark, default=0, metavar="N", help="the mark of packets sent; 0 (default): none"
    )
    options = parser.parse_args(arguments)
    forbid_core_dumps()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        return _run(os.path.abspath(options.grants), mark=options.mark)
    except OSError as error:
        return _complain(str(error))


def _run(grants: str, *, mark: int) -> int:
    stem = os.path.splitext(grants)[0]
    lock = take_lock(stem + ".lock")
    if lock is None:
        return _complain(f"another scope-forwarder runs for {grants}")
    os.ftruncate(lock, 0)
    if not can_mark(mark):
        return _complain("packets cannot be marked: run it as root, with CAP_NET_ADMIN, or without --mark")
    raise_descriptors()  # two sockets a port, and a range may be wider than the usual number
    while not os.path.exists(grants):
        time.sleep(WAIT_INTERVAL)
    forwarder = Forwarder(grants, counters=stem + ".sock", mark=mark)
    try:
        forwarder.look(time.monotonic())
        os.pwrite(lock, RUNNING, 0)
        _log(f"relays for the pairs in {grants}")
        forwarder.run()
        _log("the file of grants is gone: ending")
    finally:
        forwarder.close()
    return 0


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


@dataclass(slots=True, eq=False)
class _Port:
    """A socket at one granted port, for one version of IP."""

    socket: socket.socket
    port: int
    version: int


class Forwarder:
    """The sockets, and the one loop that reads them."""

    def __init__(self, grants: str, *, counters: str, mark: int) -> None:
        """Listen at the Unix socket `counters`; ports are bound as the file says. Raises OSError."""
        self._grants = grants
        self._mark = mark
        self._pairs = Pairs()
        self._seen: tuple[int, ...] | None = None  # the file as it was last read
        self._refused = ""  # why the last one could not be
        self._ports: dict[tuple[int, int], _Port] = {}  # by port and version of IP
        self._by_descriptor: dict[int, _Port] = {}
        self._numbers: frozenset[int] = frozenset()  # of all ports held
        self._taken: dict[tuple[int, int], str] = {}  # by port and version of IP: why it could not be bound
        self._bind_again = 0.0
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        # What was dropped, beside what `Pairs` counts: packets.
        self._drops = {"shape": 0, "unknown": 0, "rate": 0, "unbound": 0, "unsent": 0}
        self._sent = {"batches": 0, "segments": 0, "singles": 0}
        self._poll = select.epoll()
        self._counters_path = counters
        self._counters = listen_at(counters, LISTENERS)
        self._readers: dict[int, tuple[socket.socket, memoryview]] = {}  # with what is left for each
        self._watch = _watch(os.path.dirname(grants))
        self._poll.register(self._counters, select.EPOLLIN)
        if self._watch is not None:
            self._poll.register(self._watch, select.EPOLLIN)

    def look(self, now: float) -> bool:
        """Follow the file and the clock. Whether the file is still there."""
        try:
            found = os.stat(self._grants)
            seen = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
            grants = None if seen == self._seen else read_grants(self._grants)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._refuse(error)  # and look again: it is the machine's trouble, not the file's
            grants = None
        except GrantsFileError as error:
            self._refuse(error)
            grants, self._seen = None, seen
        wall = time.time()
        if grants is not None:
            self._seen, self._refused = seen, ""
            self._pairs.replace(grants, now=now, wall=wall)
            gc.collect()
            self._bind(now)
        self._pairs.expire(wall)
        if now >= self._bind_again:
            self._bind(now)
        return True

    def run(self) -> None:
        """Relay until the file is gone."""
        # Nothing on a datagram's way makes cycles, and a collection of many pairs would hold datagrams up.
        gc.disable()
        look_at = rested_at = 0.0
        while True:
            now = time.monotonic()
            if now >= look_at:
                if not self.look(now):
                    return
                ended = time.monotonic()
                look_at = ended + LOOK_INTERVAL
                rested_at = ended + READ_SHARE * (ended - now)
            for descriptor, events in self._poll.poll(max(0.0, look_at - now)):
                port = self._by_descriptor.get(descriptor)
                if port is not None:
                    self._drain(port, time.monotonic())
                elif descriptor == self._counters.fileno():
                    self._accept()
                elif descriptor in self._readers:
                    self._answer(descriptor, events)
                elif descriptor == self._watch:
                    _drain_watch(descriptor)
                    look_at = min(look_at, rested_at)

    def close(self) -> None:
        """Give everything back."""
        for port in self._ports.values():
            port.socket.close()
        for reader, _ in self._readers.values():
            reader.close()
        if self._watch is not None:
            os.close(self._watch)
        self._counters.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._counters_path)
        self._poll.close()

    def _refuse(self, error: Exception) -> None:
        """Say once that a file changes nothing."""
        if str(error) != self._refused:
            self._refused = str(error)
            _log(f"{self._grants} changes nothing, it cannot be read: {error}")

    def _bind(self, now: float) -> None:
        """Hold a socket of each family at every port in use, and no other."""
        wanted = {(port, version) for port in self._pairs.ports() for version in (4, 6)}
        for key in self._ports.keys() - wanted:
            port = self._ports.pop(key)
            del self._by_descriptor[port.socket.fileno()]
            port.socket.close()
        taken: dict[tuple[int, int], str] = {}
        for key in sorted(wanted - self._ports.keys()):
            number, version = key
            try:
                opened = _open(number, version, mark=self._mark)
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:  # the machine has none of that family
                    continue
                taken[key] = error.strerror or str(error)
                if self._taken.get(key) != taken[key]:
                    _log(f"port {number}, IPv{version}: {taken[key]}; going on without it")
                continue
            self._ports[key] = self._by_descriptor[opened.fileno()] = _Port(opened, number, version)
            self._poll.register(opened, select.EPOLLIN)
        self._numbers = frozenset(number for number, _ in self._ports)
        self._taken = taken
        self._bind_again = now + BIND_INTERVAL if taken else float("inf")

    def _drain(self, port: _Port, now: float) -> None:
        """Read what waits at a port, and pass on what may pass.

        What comes one after the other from one side, in one size, lies in the buffer as one batch.
        """
        buffer, view, receive = self._buffer, self._view, port.socket.recvmsg_into
        side: End | None = None
        start = stop = segment = 0  # the batch of that side that waits to be sent
        came: End | None = None
        heard: Address | None = None  # where `came` is: the next datagram is likely from there too
        for _ in range(READS):
            if stop > _BUFFER_BYTES - _ROOM:
                self._pass(side, start, stop, segment, port.version, now)
                side, start, stop = None, 0, 0
            try:
                size, control, _, address = receive([view[stop : stop + _ROOM]], CONTROL_BYTES)
            except BlockingIOError:
                break
            except OSError:  # an ICMP error for something sent before: the next read tells what waits
                continue
            if address != heard:
                came, heard = self._pairs.source(port.port, address, now), address
            came_segment, end = segment_size(control, size), stop + size
            if came is None or not all_wireguard(buffer, stop, end, came_segment):
                self._pass(side, start, stop, segment, port.version, now)
                self._sort(port, stop, end, came_segment, control, address, now)
                side, start, stop, heard = None, 0, 0, None
            elif (
                came is side
                and came_segment <= segment
                and (stop - start) % segment == 0
                and (came_segment == segment or size == came_segment)
                and end - start <= MAX_DATAGRAM
                and (end - start) <= MAX_SEGMENTS * segment
            ):
                stop = end
            else:
                self._pass(side, start, stop, segment, port.version, now)
                side, start, stop, segment = came, stop, end, came_segment
        self._pass(side, start, stop, segment, port.version, now)

    def _sort(
        self,
        port: _Port,
        start: int,
        stop: int,
        segment: int,
        control: list[Control],
        address: Address,
        now: float,
    ) -> None:
        """Take the knocks out of a batch, and pass on the rest of it that may pass."""
        buffer = self._buffer
        knocks = 0
        for first, last in segments(start, stop, segment):
            token = token_of(buffer, first, last)
            if token is None:
                continue
            knocks += 1
            own = answer_from(control)
            if own is None or (address[1] in self._numbers and _is_own(address, port.version)):
                self._pairs.wrong_knocks += 1
                continue
            self._pairs.knock(
                token, port=port.port, version=port.version, address=address, answer_from=own, now=now
            )
        packets = max(1, count(start, stop, segment)) - knocks
        if packets == 0:
            return
        side = self._pairs.source(port.port, address, now)
        if side is None:
            self._pairs.strange_packets += packets
            return
        for first, last in passing(buffer, start, stop, segment):
            packets -= count(first, last, segment)
            self._pass(side, first, last, segment, port.version, now)
        self._drops["shape"] += packets
        side.dropped_packets += packets

    def _pass(self, side: End | None, start: int, stop: int, segment: int, version: int, now: float) -> None:
        """Send a batch that came from a side to the other one, or count why not."""
        if side is None or start == stop:
            return
        packets = count(start, stop, segment)
        place = self._pairs.destination(side, version, now)
        if place is None:
            self._drop(side, "unknown", packets)
            return
        port = self._ports.get((side.other.side.port, place.version))
        if port is None:
            self._drop(side, "unbound", packets)
            return
        if not self._pairs.admit(side, stop - start, now):
            self._drop(side, "rate", packets)
            return
        lost = 0
        for first, last in sendable(start, stop, segment):
            lost += self._send(port.socket, place, first, last, segment)
        if lost:
            self._drop(side, "unsent", lost)
        side.passed_packets += packets - lost
        side.passed_bytes += stop - start - min(lost * segment, stop - start)

    def _send(self, out: socket.socket, place: Place, start: int, stop: int, segment: int) -> int:
        """Send as many datagrams as one call may; how many did not leave."""
        view, packets = self._view, count(start, stop, segment)
        if packets > 1 and place.batches:
            try:
                out.sendmsg([view[start:stop]], [place.answer_from, in_segments(segment)], 0, place.address)
            except OSError as error:
                if error.errno not in _NO_BATCHES:
                    return packets
                place.batches = False  # until the next knock: its network may be another by then
            else:
                self._sent["batches"] += 1
                self._sent["segments"] += packets
                return 0
        lost = 0
        for first, last in segments(start, stop, segment):
            try:
                out.sendmsg([view[first:last]], [place.answer_from], 0, place.address)
            except OSError:  # full, unreachable, refused by a firewall: as on any other hop
                lost += 1
        self._sent["singles"] += packets - lost
        return lost

    def _drop(self, side: End, reason: str, packets: int) -> None:
        self._drops[reason] += packets
        side.dropped_packets += packets

    def _accept(self) -> None:
        try:
            reader, _ = self._counters.accept()
        except OSError:
            return
        reader.setblocking(False)
        if len(self._readers) >= LISTENERS:
            self._hang_up(next(iter(self._readers)))
        document = json.dumps(self._report()).encode() + b"\n"
        self._readers[reader.fileno()] = (reader, memoryview(document))
        self._poll.register(reader, select.EPOLLOUT)

    def _answer(self, descriptor: int, events: int) -> None:
        reader, left = self._readers[descriptor]
        try:
            sent = 0 if events & (select.EPOLLHUP | select.EPOLLERR) else reader.send(left)
        except BlockingIOError:
            return
        except OSError:
            sent = 0
        if 0 < sent < len(left):
            self._readers[descriptor] = (reader, left[sent:])
        else:
            self._hang_up(descriptor)

    def _hang_up(self, descriptor: int) -> None:
        reader, _ = self._readers.pop(descriptor)
        self._poll.unregister(descriptor)
        reader.close()

    def _report(self) -> dict[str, Any]:
        return {
            "version": 1,
            "pairs": self._pairs.report(time.monotonic()),
            "taken": [
                {"port": port, "family": version, "reason": reason}
                for (port, version), reason in self._taken.items()
            ],
            "drops": {
                "knock": self._pairs.wrong_knocks,
                "stranger": self._pairs.strange_packets,
                **self._drops,
            },
            "sent": self._sent,
        }


def read_grants(path: str) -> Grants:
    """Read the file, and see that its ports are such. Raises OSError, GrantsFileError."""
    with open(path, encoding="utf-8") as file:
        try:
            grants = decode_grants(file.read())
        except UnicodeDecodeError:
            raise GrantsFileError("not a file of grants: it is not text") from None
    if not 0 < grants.first_port <= grants.last_port < 1 << 16:
        raise GrantsFileError(f"ports {grants.first_port} to {grants.last_port} are no range of UDP ports")
    for grant in grants.grants:
        for side in grant.sides:
            if not grants.first_port <= side.port <= grants.last_port:
                raise GrantsFileError(f"port {side.port} of side {side.id} is outside of the range")
    return grants


def _open(port: int, version: int, *, mark: int) -> socket.socket:
    """A socket that says at which address a datagram came, and takes and gives batches. Raises OSError."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if version == 4:
            opened.setsockopt(SOL_IP, IP_PKTINFO, 1)
            # As WireGuard's own datagrams: what is too long for the way is cut up, not refused.
            opened.setsockopt(SOL_IP, _IP_MTU_DISCOVER, _PMTUDISC_DONT)
        else:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DONT)
        with contextlib.suppress(OSError):  # a kernel before 5.0: single datagrams then
            opened.setsockopt(SOL_UDP, UDP_GRO, 1)
        enlarge_buffers(opened)
        if mark:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        opened.bind(("", port))
    except OSError:
        opened.close()
        raise
    return opened


def _is_own(address: Address, version: int) -> bool:
    """Whether this machine has that address. A side at a port of ours would be relayed to us, for ever."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
    return True


def _watch(directory: str) -> int | None:
    """A descriptor to be read when something changes in a directory; None where the kernel gives none."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor < 0:
        return None
    if libc.inotify_add_watch(descriptor, os.fsencode(directory), _IN_CHANGES) < 0:
        os.close(descriptor)
        return None
    return descriptor


def _drain_watch(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 1 << 16):
            pass


def _log(event: str) -> None:
    log("scope-forwarder", event)


def _complain(sentence: str) -> int:
    _log(sentence)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
