"""What the forwarder passes on, to where, and how much, without a socket; and the file that it reads."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from scope_agent.relay.shell.forwarder import parse_counters
from scope_dataplane import forwarder
from scope_dataplane.batches import (
    IP_PKTINFO,
    IPV6_PKTINFO,
    MAX_DATAGRAM,
    MAX_SEGMENTS,
    SOL_IP,
    SOL_IPV6,
    SOL_UDP,
    UDP_GRO,
    UDP_SEGMENT,
    Control,
    all_wireguard,
    answer_from,
    count,
    in_segments,
    may_pass,
    passing,
    segment_size,
    segments,
    sendable,
    token_of,
)
from scope_dataplane.pairs import BURST_S, CAPPED, LEFT, PLACES, Address, End, Pairs

from scope.model import PublicKey, RelayLimits
from scope.relay import MAPPING_VALID, Grant, Grants, GrantsFileError, Side, encode_grants, knock
from scope.wire import MIN_DATAGRAM

DAY = 86400.0
WALL = 1.8e9
NOW = 1000.0
HERE: Control = (SOL_IP, IP_PKTINFO, b"192.0.2.1")
THERE: Control = (SOL_IP, IP_PKTINFO, b"192.0.2.2")
HERE6: Control = (SOL_IPV6, IPV6_PKTINFO, b"2001:db8::1")
ALICE: Address = ("203.0.113.1", 1000)
BOB: Address = ("203.0.113.2", 2000)
BOB6: Address = ("2001:db8::2", 2000, 0, 0)
STRANGER: Address = ("203.0.113.9", 9)


def token(number: int) -> bytes:
    return number.to_bytes(8, "big")


def side(number: int, *, port: int = 26000) -> Side:
    return Side(number, PublicKey(bytes([number]) * 32), token(number), port)


def grant(number: int, *, port: int = 26000, expires: float = WALL + DAY) -> Grant:
    return Grant((side(number, port=port), side(number + 1, port=port)), expires)


def grants(*granted: Grant, limits: RelayLimits = RelayLimits()) -> Grants:  # noqa: B008
    return Grants(26000, 26255, limits, granted)


def pairs_of(*granted: Grant, limits: RelayLimits = RelayLimits()) -> Pairs:  # noqa: B008
    pairs = Pairs()
    pairs.replace(grants(*granted, limits=limits), now=NOW, wall=WALL)
    return pairs


def knock_at(
    pairs: Pairs,
    number: int,
    address: Address,
    *,
    now: float = NOW,
    port: int = 26000,
    own: Control = HERE,
) -> bool:
    version = 6 if len(address) == 4 else 4
    return pairs.knock(token(number), port=port, version=version, address=address, answer_from=own, now=now)


def found(
    pairs: Pairs, address: Address, *, now: float = NOW, port: int = 26000, by: int = 4
) -> Address | None:
    """Where the datagrams from there go, in two steps as the forwarder takes them."""
    end = pairs.source(port, address, now)
    place = None if end is None else pairs.destination(end, by, now)
    return None if place is None else place.address


def source(pairs: Pairs, address: Address, now: float = NOW) -> End:
    end = pairs.source(26000, address, now)
    assert end is not None
    return end


# --- control messages ---------------------------------------------------------------------------------------


def test_a_batch_has_segments_of_the_size_that_the_kernel_says() -> None:
    told = [HERE, (SOL_UDP, UDP_GRO, struct.pack("=i", 1452))]
    assert segment_size(told, 1452 * 3 + 10) == 1452


@pytest.mark.parametrize(
    "control",
    [
        [],
        [(SOL_UDP, UDP_GRO, b"\1")],
        [(SOL_UDP, UDP_GRO, struct.pack("=i", 0))],
        [(SOL_UDP, UDP_GRO, struct.pack("=i", -5))],
        [(SOL_UDP, UDP_GRO, struct.pack("=i", 101))],
        [(SOL_IP, UDP_GRO, struct.pack("=i", 50))],
    ],
)
def test_without_a_size_that_makes_sense_a_batch_is_one_datagram(control: Sequence[Control]) -> None:
    assert segment_size(control, 100) == 100


def test_an_empty_datagram_is_no_endless_batch() -> None:
    assert segment_size([], 0) == 1
    assert list(segments(0, 0, 1)) == []


def test_an_answer_leaves_from_the_address_that_was_knocked_at_and_no_interface_of_ours() -> None:
    own, destination = socket.inet_aton("192.0.2.1"), socket.inet_aton("192.0.2.255")
    came = (SOL_IP, IP_PKTINFO, struct.pack("=i4s4s", 7, own, destination))
    assert answer_from([came]) == (SOL_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, own, bytes(4)))


@pytest.mark.parametrize(("address", "interface"), [("2001:db8::1", 0), ("fd00::1", 0), ("fe80::1", 7)])
def test_only_a_link_local_address_needs_its_interface(address: str, interface: int) -> None:
    own = socket.inet_pton(socket.AF_INET6, address)
    came = (SOL_IPV6, IPV6_PKTINFO, struct.pack("=16si", own, 7))
    assert answer_from([came]) == (SOL_IPV6, IPV6_PKTINFO, struct.pack("=16si", own, interface))


def test_no_answer_is_possible_where_the_kernel_did_not_say_our_address() -> None:
    assert answer_from([]) is None
    assert answer_from([(SOL_IP, IP_PKTINFO, b"short"), (SOL_UDP, UDP_GRO, bytes(4))]) is None


# --- batches ------------------------------------------------------------------------------------------------


def wireguard(type_: int = 4, size: int = 100) -> bytes:
    return struct.pack("<I", type_) + b"\xff" * (size - 4)


def test_a_last_segment_may_be_shorter() -> None:
    assert list(segments(10, 260, 100)) == [(10, 110), (110, 210), (210, 260)]
    assert count(10, 260, 100) == 3
    assert count(10, 210, 100) == 2
    assert count(10, 10, 100) == 0


def test_a_batch_is_cut_where_one_call_cannot_send_it() -> None:
    many = list(sendable(0, 100 * (MAX_SEGMENTS + 1), 100))
    assert many == [(0, 100 * MAX_SEGMENTS), (100 * MAX_SEGMENTS, 100 * (MAX_SEGMENTS + 1))]
    for first, last in sendable(5, 5 + 65520, 1452):
        assert 0 < last - first <= MAX_DATAGRAM and ((last - first) % 1452 == 0 or last == 5 + 65520)
    assert list(sendable(0, 65520, 65520)) == [(0, 65520)]
    assert in_segments(1452) == (SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1452))


@pytest.mark.parametrize("type_", [1, 2, 3, 4])
def test_wireguards_datagrams_pass(type_: int) -> None:
    data = bytearray(b"x" + wireguard(type_, 32))
    assert may_pass(data, 1, 33)
    assert all_wireguard(data, 1, 33, 32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\4\0\0",
        wireguard(4, 31),
        wireguard(0),
        wireguard(5),
        wireguard(4 | 1 << 8),
        wireguard(4 | 1 << 31),
        b"SCoh" + bytes(60),
        b"SCok" + bytes(60),
        b"SCop" + bytes(MIN_DATAGRAM - 5),
        bytes(100),
        b"\0\1\0\0!\x12\xa4B" + bytes(40),
    ],
)
def test_nothing_else_passes(data: bytes) -> None:
    assert not may_pass(bytearray(data), 0, len(data))
    assert not all_wireguard(bytearray(data), 0, len(data), len(data) or 1)


def test_a_probe_between_two_peers_passes() -> None:
    assert may_pass(bytearray(b"SCop" + bytes(MIN_DATAGRAM - 4)), 0, MIN_DATAGRAM)


@pytest.mark.parametrize("where", range(5))
@pytest.mark.parametrize("at", range(4))
def test_a_batch_with_one_bad_segment_passes_without_it(where: int, at: int) -> None:
    data = bytearray(wireguard() * 4 + wireguard(1, 40))
    assert passing(data, 0, len(data), 100) == [(0, 440)]
    data[100 * where + at] = 0x80
    assert not all_wireguard(data, 0, len(data), 100)
    left = [(0, 100 * where), (100 * (where + 1), 440)]
    assert passing(data, 0, len(data), 100) == [(first, last) for first, last in left if first < last]


def test_probes_and_wireguard_pass_in_one_batch() -> None:
    data = bytearray(wireguard() + b"SCop" + bytes(96) + wireguard())
    assert passing(data, 0, 300, 100) == [(0, 300)]


def test_a_knock_is_read_out_of_the_tail_of_a_batch_and_does_not_pass() -> None:
    data = bytearray(wireguard() * 2 + knock(token(7)))
    assert [token_of(data, first, last) for first, last in segments(0, 212, 100)] == [None, None, token(7)]
    assert passing(data, 0, 212, 100) == [(0, 200)]


@pytest.mark.parametrize("data", [knock(token(7))[:-1], knock(token(7)) + b"\0", b"SCop" + token(7), b"SCok"])
def test_what_is_longer_or_shorter_than_a_knock_is_none(data: bytes) -> None:
    assert token_of(bytearray(data + bytes(20)), 0, len(data)) is None


# --- learning -----------------------------------------------------------------------------------------------


def test_each_side_finds_the_other_where_it_knocked() -> None:
    pairs = pairs_of(grant(1))
    assert knock_at(pairs, 1, ALICE)
    assert found(pairs, ALICE) is None
    assert knock_at(pairs, 2, BOB, own=THERE)
    assert (found(pairs, ALICE), found(pairs, BOB)) == (BOB, ALICE)
    place = pairs.destination(source(pairs, ALICE), 4, NOW)
    assert place is not None and place.answer_from == THERE


def test_pairs_do_not_hear_each_other() -> None:
    pairs = pairs_of(grant(1), grant(3))
    for number, address in ((1, ALICE), (2, BOB), (3, STRANGER)):
        knock_at(pairs, number, address)
    assert found(pairs, STRANGER) is None
    assert found(pairs, ALICE) == BOB


def test_one_peer_is_in_many_pairs_by_its_ports() -> None:
    pairs = pairs_of(grant(1, port=26000), grant(3, port=26001))
    carol: Address = ("203.0.113.3", 3000)
    for number, address, port in ((1, ALICE, 26000), (2, BOB, 26000), (3, ALICE, 26001), (4, carol, 26001)):
        assert knock_at(pairs, number, address, port=port)
    assert found(pairs, ALICE, port=26000) == BOB
    assert found(pairs, ALICE, port=26001) == carol


def test_a_wrong_token_teaches_nothing_and_is_counted() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    assert not knock_at(pairs, 9, STRANGER)
    assert not knock_at(pairs, 1, STRANGER, port=26001)
    assert pairs.source(26000, STRANGER, NOW) is None
    assert found(pairs, BOB) == ALICE
    assert pairs.wrong_knocks == 2


def test_a_changed_mapping_is_followed_and_the_old_one_is_not_heard_any_more() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    moved: Address = ("203.0.113.1", 1001)
    knock_at(pairs, 1, moved, now=NOW + 1)
    assert found(pairs, BOB, now=NOW + 1) == moved
    assert found(pairs, moved, now=NOW + 1) == BOB
    assert pairs.source(26000, ALICE, NOW + 1) is None


def test_a_side_is_heard_at_each_of_the_hubs_addresses_that_it_knocks_at() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 2, BOB)
    other_mapping: Address = ("203.0.113.1", 1001)
    knock_at(pairs, 1, ALICE, own=HERE)
    knock_at(pairs, 1, other_mapping, own=THERE)
    assert found(pairs, ALICE) == found(pairs, other_mapping) == BOB
    assert found(pairs, BOB) == other_mapping
    # Without a NAT both mappings are one: who leaves one of our addresses is still heard at the other.
    knock_at(pairs, 1, ALICE, own=THERE)
    knock_at(pairs, 1, other_mapping, own=HERE)
    assert found(pairs, ALICE) == found(pairs, other_mapping) == BOB


def test_a_side_is_heard_at_so_many_places_and_no_more() -> None:
    pairs = pairs_of(grant(1))
    for number in range(PLACES + 3):
        own: Control = (SOL_IP, IP_PKTINFO, bytes([number]))
        knock_at(pairs, 1, ("203.0.113.1", 1000 + number), own=own)
    heard = [pairs.source(26000, ("203.0.113.1", 1000 + number), NOW) for number in range(PLACES + 3)]
    assert [end is not None for end in heard] == [False] * 3 + [True] * PLACES


def test_a_mapping_is_believed_for_six_knocks() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB, now=NOW + 10)
    assert found(pairs, BOB, now=NOW + MAPPING_VALID) == ALICE
    assert found(pairs, BOB, now=NOW + MAPPING_VALID + 0.1) is None
    assert pairs.source(26000, ALICE, NOW + MAPPING_VALID + 0.1) is None
    knock_at(pairs, 1, ALICE, now=NOW + MAPPING_VALID + 1)
    assert found(pairs, BOB, now=NOW + MAPPING_VALID + 1) == ALICE


def test_who_knocked_last_from_an_address_is_heard_there() -> None:
    pairs = pairs_of(grant(1), grant(3))
    carol: Address = ("203.0.113.3", 3000)
    knock_at(pairs, 2, BOB)
    knock_at(pairs, 4, carol)
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 3, ALICE)
    assert found(pairs, ALICE) == carol
    knock_at(pairs, 1, STRANGER)  # the first has another mapping now, which takes nothing from the second
    assert found(pairs, ALICE) == carol
    assert found(pairs, STRANGER) == BOB


# --- families -----------------------------------------------------------------------------------------------


def test_a_side_with_the_other_family_alone_is_found_over_that() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB6, own=HERE6)
    assert found(pairs, ALICE, by=4) == BOB6
    assert found(pairs, BOB6, by=6) == ALICE


def test_what_comes_over_one_family_goes_on_over_the_same_where_it_can() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    knock_at(pairs, 2, BOB6, own=HERE6, now=NOW + 1)
    assert found(pairs, ALICE, by=4, now=NOW + 1) == BOB


def test_a_family_that_a_side_has_no_longer_is_left_before_its_mapping_ends() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    for later in (LEFT, LEFT + 0.1):
        knock_at(pairs, 2, BOB6, own=HERE6, now=NOW + later)
        assert found(pairs, ALICE, by=4, now=NOW + later) == (BOB if later == LEFT else BOB6)


# --- grants -------------------------------------------------------------------------------------------------


def test_a_new_file_keeps_what_was_learned_for_grants_that_stay() -> None:
    pairs = pairs_of(grant(1), grant(3))
    for number, address in ((1, ALICE), (2, BOB)):
        knock_at(pairs, number, address)
    source(pairs, ALICE).passed_bytes = 5
    pairs.replace(grants(grant(1, expires=WALL + 2 * DAY), grant(5)), now=NOW + 1, wall=WALL + 1)
    assert found(pairs, ALICE, now=NOW + 1) == BOB
    assert pairs.report(NOW + 1)[0]["sides"][0]["bytes"] == 5
    assert not knock_at(pairs, 3, STRANGER)
    assert knock_at(pairs, 5, STRANGER)
    pairs.expire(WALL + DAY)
    assert found(pairs, ALICE, now=NOW + 1) == BOB


def test_a_grant_that_is_taken_back_is_forgotten_at_once() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    pairs.replace(grants(), now=NOW, wall=WALL)
    assert pairs.source(26000, ALICE, NOW) is None
    assert not knock_at(pairs, 1, ALICE)
    assert pairs.ports() == frozenset()
    pairs.replace(grants(grant(1)), now=NOW, wall=WALL)
    assert pairs.source(26000, ALICE, NOW) is None


def test_a_grant_ends_by_itself() -> None:
    pairs = pairs_of(grant(1, expires=WALL + 10), grant(3, port=26001))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    pairs.expire(WALL + 9.9)
    assert found(pairs, ALICE) == BOB
    pairs.expire(WALL + 10)
    assert found(pairs, ALICE) is None
    assert pairs.ports() == {26001}
    pairs.replace(grants(grant(1, expires=WALL + 10)), now=NOW, wall=WALL + 11)
    assert not knock_at(pairs, 1, ALICE)


def test_a_side_with_another_port_has_to_knock_there() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 2, BOB)
    pairs.replace(grants(Grant((side(1, port=26005), side(2)), WALL + DAY)), now=NOW, wall=WALL)
    assert pairs.source(26000, ALICE, NOW) is None
    assert found(pairs, BOB) is None
    knock_at(pairs, 1, ALICE, port=26005)
    assert found(pairs, BOB) == ALICE


def test_nothing_is_kept_of_strangers() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    for number in range(1000):
        knock_at(pairs, 100, ("203.0.113.9", number))
        assert pairs.source(26000, ("203.0.113.9", number), NOW) is None
    assert len(pairs._sources) == 1
    assert found(pairs, ALICE) is None


# --- limits -------------------------------------------------------------------------------------------------


def passed(pairs: Pairs, address: Address, *, seconds: float, step: float = 0.01, size: int = 1000) -> int:
    """Bytes that pass when a side sends without a pause."""
    end, total, now = source(pairs, address), 0, NOW
    while now < NOW + seconds:
        while pairs.admit(end, size, now):
            total += size
            assert total < 10**9
        now += step
    return total


def test_a_pair_gets_its_rate_and_a_burst_both_ways_together() -> None:
    pairs = pairs_of(grant(1), grant(3), limits=RelayLimits(pair=100_000))
    for number, address in ((1, ALICE), (2, BOB), (3, STRANGER)):
        knock_at(pairs, number, address)
    got = passed(pairs, ALICE, seconds=10.0)
    assert got == pytest.approx(100_000 * (10.0 + BURST_S), rel=0.02)
    assert not pairs.admit(source(pairs, BOB), 1, NOW + 9.99)
    assert pairs.admit(source(pairs, STRANGER), 1, NOW + 9.99)


def test_a_side_is_told_as_over_its_limit_for_a_minute() -> None:
    pairs = pairs_of(grant(1), limits=RelayLimits(pair=1000))
    knock_at(pairs, 1, ALICE)
    assert pairs.admit(source(pairs, ALICE), 1000, NOW)
    for after, told in ((0.0, False), (CAPPED, True), (CAPPED + 0.1, False)):
        sides = pairs.report(NOW + after)[0]["sides"]
        assert [side["capped"] for side in sides] == [told, False]
        assert after or not pairs.admit(source(pairs, ALICE), 1, NOW)


def test_all_pairs_share_the_total() -> None:
    pairs = pairs_of(grant(1), grant(3), limits=RelayLimits(total=100_000))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 3, STRANGER)
    assert passed(pairs, ALICE, seconds=1.0) == pytest.approx(100_000 * (1.0 + BURST_S), rel=0.02)
    assert not pairs.admit(source(pairs, STRANGER), 1, NOW + 0.99)


def test_a_batch_that_is_longer_than_a_burst_passes_and_is_waited_out() -> None:
    pairs = pairs_of(grant(1), limits=RelayLimits(pair=10_000))
    knock_at(pairs, 1, ALICE)
    end = source(pairs, ALICE)
    assert pairs.admit(end, 60_000, NOW)
    assert not pairs.admit(end, 1, NOW + 5.7)
    assert pairs.admit(end, 1, NOW + 5.8)


def test_what_the_total_refuses_costs_the_pair_nothing() -> None:
    pairs = pairs_of(grant(1), grant(3), limits=RelayLimits(pair=1000, total=1000))
    knock_at(pairs, 1, ALICE)
    knock_at(pairs, 3, STRANGER)
    assert pairs.admit(source(pairs, STRANGER), 1000, NOW)
    assert not pairs.admit(source(pairs, ALICE), 1000, NOW)
    assert source(pairs, ALICE).pair.bucket.level == 1000 * BURST_S


def test_without_limits_everything_passes_and_new_limits_hold_for_old_pairs() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    end = source(pairs, ALICE)
    assert all(pairs.admit(end, 10**9, NOW) for _ in range(10))
    pairs.replace(grants(grant(1), limits=RelayLimits(pair=1000)), now=NOW, wall=WALL)
    assert pairs.admit(end, 10**6, NOW)
    assert not pairs.admit(end, 1, NOW + 1)


# --- secrets, and the file ----------------------------------------------------------------------------------


def test_no_token_is_printed_or_reported() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 1, ALICE)
    end = source(pairs, ALICE)
    shown = f"{end!r} {end.pair!r} {pairs!r} {pairs.report(NOW)}"
    assert token(1).hex() not in shown and repr(token(1)) not in shown
    assert "End(side=Side(id=1" in shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2}',
        encode_grants(grants(grant(1, port=25999))),
        encode_grants(Grants(0, 70000, RelayLimits(), ())),
        encode_grants(Grants(300, 200, RelayLimits(), ())),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_as_a_whole(text: str, tmp_path: Path) -> None:
    path = tmp_path / "grants.json"
    path.write_text(text)
    with pytest.raises(GrantsFileError):
        forwarder.read_grants(str(path))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grants.json"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(GrantsFileError, match="not text"):
        forwarder.read_grants(str(path))


def test_a_file_that_is_right_is_read(tmp_path: Path) -> None:
    path = tmp_path / "grants.json"
    path.write_text(encode_grants(grants(grant(1))))
    assert forwarder.read_grants(str(path)) == grants(grant(1))


# --- as the agent has it ------------------------------------------------------------------------------------


def test_counters_are_read_as_they_are_told() -> None:
    pairs = pairs_of(grant(1))
    knock_at(pairs, 2, BOB6, own=HERE6)
    reported = pairs.report(NOW)
    told = {
        "version": 1,
        "pairs": reported,
        "taken": [{"port": 26001, "family": 6, "reason": "Address already in use"}],
        "drops": {"rate": 3},
        "sent": {"batches": 2},
    }
    counters = parse_counters(json.dumps(told))
    ((first, second),) = counters.pairs
    assert (first.id, first.families, second.id, second.families) == (1, (), 2, (6,))
    assert [(taken.port, taken.version) for taken in counters.taken] == [(26001, 6)]
    assert not (first.is_capped or second.is_capped)
    del reported[0]["sides"][0]["capped"]  # as of a process that an earlier release started
    assert parse_counters(json.dumps(told)).pairs == counters.pairs
    assert (counters.drops, counters.sent) == ({"rate": 3}, {"batches": 2})


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "pairs": [{"sides": []}]}'])
def test_what_is_no_list_of_counters_is_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        parse_counters(text)
