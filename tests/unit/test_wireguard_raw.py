"""Datagrams of the raw probe socket, and its filter run instruction by instruction."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scope_agent.wireguard import raw

HERE, THERE = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
PROBE = raw.MAGIC + b"and the rest"


def run_filter(program: bytes, packet: bytes) -> int:
    """Classic BPF, as far as the filters use it. A load beyond the packet drops it."""
    accumulator = index = 0
    position = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, position * 8)
        position += 1
        at = value + (index if code in {0x48, 0x40} else 0)
        match code:
            case 0x28 | 0x48 | 0x20 | 0x40:
                width = 2 if code in {0x28, 0x48} else 4
                if at + width > len(packet):
                    return 0
                accumulator = int.from_bytes(packet[at : at + width])
            case 0xB1:
                index = (packet[value] & 0xF) * 4
            case 0x15:
                position += if_true if accumulator == value else if_false
            case 0x25:
                position += if_true if accumulator > value else if_false
            case 0x35:
                position += if_true if accumulator >= value else if_false
            case 0x06:
                return value
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


def ip_header(words: int = 5) -> bytes:
    return bytes([0x40 | words]) + bytes(words * 4 - 1)


def udp(port: int, payload: bytes) -> bytes:
    return raw.datagram_v6(source_port=7000, port=port, payload=payload)


@pytest.mark.parametrize("words", [5, 6, 15])
def test_the_filter_keeps_probes_to_our_port_whatever_the_ip_options(words: int) -> None:
    header = ip_header(words)
    assert run_filter(raw.keep_probes_v4(7001), header + udp(7001, PROBE)) > 65535
    assert run_filter(raw.keep_probes_v4(7001), header + udp(7002, PROBE)) == 0
    assert run_filter(raw.keep_probes_v4(7001), header + udp(7001, b"\4\0\0\0data")) == 0
    assert run_filter(raw.keep_probes_v4(7001), header + udp(7001, b"SC")) == 0


@pytest.mark.parametrize("words", [5, 15])
def test_the_filter_also_keeps_probes_to_the_ports_of_a_search(words: int) -> None:
    program, header = raw.keep_probes_v4(7001, also=range(26300, 26556)), ip_header(words)
    for port, kept in (
        *((7001, True), (26300, True), (26400, True), (26555, True)),
        *((7000, False), (7002, False), (26299, False), (26556, False), (65535, False)),
    ):
        assert (run_filter(program, header + udp(port, PROBE)) > 65535) is kept
    assert run_filter(program, header + udp(26300, b"\4\0\0\0data")) == 0
    assert run_filter(program, header + udp(26300, b"SC")) == 0


def test_a_probe_says_to_which_of_our_ports_it_came() -> None:
    also = range(26300, 26556)
    assert raw.open_datagram(udp(26301, PROBE), 7001, also=also) == (7000, 26301, PROBE)
    assert raw.open_datagram(udp(7001, PROBE), 7001, also=also) == (7000, 7001, PROBE)
    assert raw.open_datagram(udp(26299, PROBE), 7001, also=also) is None


def test_the_filter_for_ipv6_starts_at_the_udp_header() -> None:
    assert run_filter(raw.keep_probes_v6(7001), udp(7001, PROBE)) > 65535
    assert run_filter(raw.keep_probes_v6(7001), udp(7002, PROBE)) == 0
    assert run_filter(raw.keep_probes_v6(7001), udp(7001, b"\1\0\0\0")) == 0
    assert run_filter(raw.drop_all(), udp(7001, PROBE)) == 0


def test_the_magic_is_neither_wireguard_nor_stun() -> None:
    assert int.from_bytes(raw.MAGIC, "little") not in {1, 2, 3, 4}
    assert raw.MAGIC[0] & 0xC0 != 0  # RFC 8489: STUN's first two bits are zero


@given(st.binary(max_size=40))
def test_a_datagram_is_opened_as_it_was_made_and_its_checksum_holds(rest: bytes) -> None:
    payload = raw.MAGIC + rest
    datagram = raw.datagram_v4(HERE, THERE, source_port=7000, port=7001, payload=payload)
    assert raw.open_datagram(datagram, 7001) == (7000, 7001, payload)
    pseudo = HERE.packed + THERE.packed + struct.pack("!BBH", 0, 17, len(datagram))
    summed = pseudo + datagram + bytes(len(datagram) % 2)
    total = sum(struct.unpack(f"!{len(summed) // 2}H", summed))
    assert total % 0xFFFF == 0


def test_padding_after_the_datagram_is_cut_off() -> None:
    assert raw.open_datagram(udp(7001, PROBE) + b"padding", 7001) == (7000, 7001, PROBE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        udp(7001, PROBE)[:-1],
        udp(7002, PROBE),
        udp(7001, b"other"),
        raw.datagram_v6(source_port=0, port=7001, payload=PROBE),
        struct.pack("!HHHH", 7000, 7001, 7, 0) + PROBE,
    ],
)
def test_what_is_cut_off_or_for_another_port_is_no_probe(data: bytes) -> None:
    assert raw.open_datagram(data, 7001) is None


@given(st.binary(max_size=80))
def test_junk_is_no_probe_and_breaks_nothing(data: bytes) -> None:
    raw.open_datagram(raw.udp_part(data), 7001)
