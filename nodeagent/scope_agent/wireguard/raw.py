"""What a raw socket on WireGuard's port needs, as bytes: the filter, datagrams out, datagrams in. Pure.

The kernel hands a raw socket a copy of every UDP datagram that the firewall let in. A classic BPF program
keeps those for our port that start with the probe magic; WireGuard gets its copy too and drops it, since no
message type of its own starts so. What is sent with WireGuard's port as its source shares WireGuard's
conntrack entry, and so its NAT mapping.

An IPv4 raw socket reads from the IP header on, an IPv6 one from the UDP header on.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

MAGIC = b"SCop"
UDP_HEADER = 8
NO_PORTS = range(0)
MAX_PAYLOAD = 65535 - 20 - UDP_HEADER  # what an IPv4 packet without options can carry

_LOAD_HALF, _LOAD_WORD = 0x28, 0x20  # from a fixed offset
_LOAD_HALF_AFTER, _LOAD_WORD_AFTER = 0x48, 0x40  # from an offset after the index register
_INDEX_IP_HEADER = 0xB1  # index register = length of the IPv4 header at an offset
_JUMP_EQUAL, _JUMP_ABOVE, _JUMP_FROM, _RETURN = 0x15, 0x25, 0x35, 0x06
_WHOLE = 0x40000  # more than any datagram


def drop_all() -> bytes:
    """The program that keeps nothing, as the kernel takes it: 8 bytes an instruction."""
    return _assemble([(_RETURN, 0, 0, 0)])


def keep_probes_v4(port: int, *, also: range = NO_PORTS) -> bytes:
    """The program for an IPv4 raw socket: UDP to `port`, or to one of `also`, starting with the magic."""
    others = [(_JUMP_FROM, 0, 4, also[0]), (_JUMP_ABOVE, 3, 0, also[-1])] if also else []
    return _assemble(
        [
            (_INDEX_IP_HEADER, 0, 0, 0),
            (_LOAD_HALF_AFTER, 0, 0, 2),
            (_JUMP_EQUAL, len(others), 0 if others else 3, port),
            *others,
            (_LOAD_WORD_AFTER, 0, 0, UDP_HEADER),
            (_JUMP_EQUAL, 0, 1, int.from_bytes(MAGIC)),
            (_RETURN, 0, 0, _WHOLE),
            (_RETURN, 0, 0, 0),
        ]
    )


def keep_probes_v6(port: int) -> bytes:
    """The program for an IPv6 raw socket: UDP to `port`, starting with the magic."""
    return _assemble(
        [
            (_LOAD_HALF, 0, 0, 2),
            (_JUMP_EQUAL, 0, 3, port),
            (_LOAD_WORD, 0, 0, UDP_HEADER),
            (_JUMP_EQUAL, 0, 1, int.from_bytes(MAGIC)),
            (_RETURN, 0, 0, _WHOLE),
            (_RETURN, 0, 0, 0),
        ]
    )


def datagram_v4(
    source: IPv4Address, destination: IPv4Address, *, source_port: int, port: int, payload: bytes
) -> bytes:
    """A UDP datagram with its checksum, to be sent over IPv4 from `source`."""
    length = UDP_HEADER + len(payload)
    addresses = struct.pack("!4s4sxBH", source.packed, destination.packed, 17, length)
    unsummed = struct.pack("!HHHH", source_port, port, length, 0) + payload
    value = _checksum(addresses + unsummed) or 0xFFFF  # RFC 768: zero would say "no checksum"
    return struct.pack("!HHHH", source_port, port, length, value) + payload


def datagram_v6(*, source_port: int, port: int, payload: bytes) -> bytes:
    """A UDP datagram whose checksum, at offset 6, the kernel fills in."""
    return struct.pack("!HHHH", source_port, port, UDP_HEADER + len(payload), 0) + payload


def udp_part(packet: bytes) -> bytes:
    """What follows an IPv4 packet's own header; empty where it is cut off."""
    return packet[(packet[0] & 0xF) * 4 :] if len(packet) >= 20 else b""


def open_datagram(data: bytes, port: int, *, also: range = NO_PORTS) -> tuple[int, int, bytes] | None:
    """Source port, our port and payload of a UDP datagram.

    None where it is no probe to `port` or to one of `also`, or is cut off. The filter looked already, but a
    datagram may have been queued before the ports changed.
    """
    if len(data) < UDP_HEADER:
        return None
    source_port, to_port, length, _ = struct.unpack_from("!HHHH", data)
    if to_port != port and to_port not in also:
        return None
    if source_port == 0 or not UDP_HEADER <= length <= len(data):
        return None
    payload = data[UDP_HEADER:length]
    return (source_port, to_port, payload) if payload.startswith(MAGIC) else None


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _assemble(program: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
