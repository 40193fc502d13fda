"""Datagrams that arrive and leave many at a time: what Linux says of them, and which may pass. Pure.

With UDP_GRO the kernel hands over datagrams of one sender as one *batch*: equal *segments* one after the
other, of which the last may be shorter. With UDP_SEGMENT it takes such a batch and sends datagrams. A knock
is shorter than what it follows, so it arrives as the tail of a batch as often as alone.

A batch is given as `buffer[start:stop]` with the size of a segment, in bytes, so that nothing is copied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

from scope.relay import KNOCK_BYTES, KNOCK_MAGIC, MIN_WIREGUARD, WIREGUARD_TYPES
from scope.wire import MAGIC as PROBE_MAGIC
from scope.wire import MIN_DATAGRAM as MIN_PROBE

Control: TypeAlias = tuple[int, int, bytes]  # level, type, data: a control message of a socket

# Linux's numbers, which the module `socket` does not have.
SOL_IP: Final = 0
SOL_UDP: Final = 17
SOL_IPV6: Final = 41
IP_PKTINFO: Final = 8
IPV6_PKTINFO: Final = 50
UDP_SEGMENT: Final = 103
UDP_GRO: Final = 104

MAX_DATAGRAM: Final = 65507  # bytes of payload that fit into one packet of either family
MAX_SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS of the kernels that take the fewest
CONTROL_BYTES: Final = 128  # room for all control messages that the forwarder asks for

_PKTINFO = struct.Struct("=i4s4s")  # interface, own address, the header's destination
_PKTINFO6 = struct.Struct("=16si")  # own address, interface
_GRO = struct.Struct("=i")
_SEGMENT = struct.Struct("=H")
_WORD = struct.Struct("<I")

_FIRST_BYTES = bytes(WIREGUARD_TYPES)
_WORDS = frozenset(WIREGUARD_TYPES)
_PROBE_WORD = _WORD.unpack(PROBE_MAGIC)[0]


def segment_size(control: Sequence[Control], size: int) -> int:
    """The size of a segment, 1 at least, of a batch of `size` bytes that came with these control messages."""
    for level, type_, data in control:
        if level == SOL_UDP and type_ == UDP_GRO and len(data) >= _GRO.size:
            told: int = _GRO.unpack_from(data)[0]
            return told if 0 < told < size else size or 1
    return size or 1


def answer_from(control: Sequence[Control]) -> Control | None:
    """The control message that makes a datagram leave from the address at which this one arrived.

    None where the kernel did not say at which. The interface is named only where the address does not say it.
    """
    for level, type_, data in control:
        if level == SOL_IP and type_ == IP_PKTINFO and len(data) >= _PKTINFO.size:
            own = _PKTINFO.unpack_from(data)[1]
            return SOL_IP, IP_PKTINFO, _PKTINFO.pack(0, own, bytes(4))
        if level == SOL_IPV6 and type_ == IPV6_PKTINFO and len(data) >= _PKTINFO6.size:
            own, interface = _PKTINFO6.unpack_from(data)
            is_link_local = own[0] == 0xFE and own[1] & 0xC0 == 0x80
            return SOL_IPV6, IPV6_PKTINFO, _PKTINFO6.pack(own, interface if is_link_local else 0)
    return None


def in_segments(segment: int) -> Control:
    """The control message that makes a batch leave as datagrams of that size."""
    return SOL_UDP, UDP_SEGMENT, _SEGMENT.pack(segment)


def count(start: int, stop: int, segment: int) -> int:
    """How many datagrams a batch is."""
    return -(-(stop - start) // segment)


def segments(start: int, stop: int, segment: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each datagram of a batch."""
    return ((at, min(at + segment, stop)) for at in range(start, stop, segment))


def sendable(start: int, stop: int, segment: int) -> Iterator[tuple[int, int]]:
    """Cut a batch into batches that one call may send."""
    most = max(1, min(MAX_SEGMENTS, MAX_DATAGRAM // segment)) * segment
    return ((at, min(at + most, stop)) for at in range(start, stop, most))


def token_of(buffer: bytearray, start: int, stop: int) -> bytes | None:
    """The token of a knock; None where the datagram is none."""
    if stop - start != KNOCK_BYTES or not buffer.startswith(KNOCK_MAGIC, start, stop):
        return None
    return bytes(buffer[start + len(KNOCK_MAGIC) : stop])


def may_pass(buffer: bytearray, start: int, stop: int) -> bool:
    """Whether one datagram looks like WireGuard's, or like a probe between two peers."""
    size = stop - start
    if size < MIN_WIREGUARD:
        return False
    word = _WORD.unpack_from(buffer, start)[0]
    return word in _WORDS or (word == _PROBE_WORD and size >= MIN_PROBE)


def all_wireguard(buffer: bytes | bytearray, start: int, stop: int, segment: int) -> bool:
    """Whether every datagram of a batch looks like WireGuard's: a few slices for as many as there are."""
    if stop - start <= segment:
        return stop - start >= MIN_WIREGUARD and _WORD.unpack_from(buffer, start)[0] in _WORDS
    last = (stop - start) % segment or segment
    if last < MIN_WIREGUARD or segment < MIN_WIREGUARD:
        return False
    return not (
        buffer[start:stop:segment].strip(_FIRST_BYTES)
        or buffer[start + 1 : stop : segment].strip(b"\0")
        or buffer[start + 2 : stop : segment].strip(b"\0")
        or buffer[start + 3 : stop : segment].strip(b"\0")
    )


def passing(buffer: bytearray, start: int, stop: int, segment: int) -> list[tuple[int, int]]:
    """The parts of a batch that may pass, each a batch of the same segment size."""
    if all_wireguard(buffer, start, stop, segment):
        return [(start, stop)]
    parts: list[tuple[int, int]] = []
    for first, last in segments(start, stop, segment):
        if not may_pass(buffer, first, last):
            continue
        if parts and parts[-1][1] == first:
            parts[-1] = parts[-1][0], last
        else:
            parts.append((first, last))
    return parts
