"""Addresses: sticky, never given twice, kept back after a removal, and honest about there being none left."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scope_operator.plan.addresses import HOLD, assign_addresses, is_released

from scope.model import (
    Addressing,
    Assignment,
    Condition,
    Family,
    IPAddress,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Tombstone,
)
from tests.unit.registry_conformance import keys


def mesh_of(ipv4: str | None = None, ipv6: str | None = None, *, name: str = "home", uid: str = "m") -> Mesh:
    addressing = Addressing(
        IPv4Network(ipv4) if ipv4 is not None else None, IPv6Network(ipv6) if ipv6 is not None else None
    )
    return Mesh(Meta(name, uid=uid), MeshSpec(addressing))


def peer_named(name: str, *, has: tuple[str, ...] = (), holds: tuple[str, ...] = ()) -> Peer:
    return Peer(
        Meta(name, uid=f"uid-{name}"),
        PeerSpec("home"),
        report=PeerReport(keys(1), held_addresses=tuple(map(ip_address, holds))),
        assignment=Assignment(addresses=tuple(map(ip_interface, has))),
    )


def fill(mesh: Mesh, count: int) -> dict[IPAddress, str]:
    """Assign `count` peers, one after the other."""
    taken: dict[IPAddress, str] = {}
    for number in range(count):
        name = f"p{number}"
        for interface in assign_addresses(mesh, peer_named(name), taken=taken).addresses:
            assert interface.ip not in taken
            taken[interface.ip] = name
    return taken


@given(st.integers(16, 30), st.integers(1, 40))
def test_no_address_is_given_twice_and_none_that_a_peer_may_not_have(length: int, peers: int) -> None:
    prefix = IPv4Network((0x64400000, length))
    taken = fill(mesh_of(str(prefix)), peers)
    assert set(taken) <= set(prefix.hosts()) if length > 20 else all(each in prefix for each in taken)
    assert len(taken) == min(peers, prefix.num_addresses - 2)


def test_every_address_of_a_prefix_is_used_before_it_is_exhausted() -> None:
    mesh = mesh_of("100.64.0.0/28", "fd00:5c0::/124")
    taken = fill(mesh, 14)
    assert {each for each in taken if each.version == 4} == set(IPv4Network("100.64.0.0/28").hosts())
    late = assign_addresses(mesh, peer_named("late"), taken=taken)
    assert late.exhausted == (Family.IPV4,)
    assert [interface.version for interface in late.addresses] == [6]
    taken[late.addresses[0].ip] = "late"
    later = assign_addresses(mesh, peer_named("later"), taken=taken)
    assert later.exhausted == (Family.IPV4, Family.IPV6)
    assert ip_address("fd00:5c0::") not in taken
    assert ip_address("fd00:5c0::f") in taken


@pytest.mark.parametrize("ipv6", ["fd00:5c0::/32", "fd00:5c0::/48", "fd00:5c0::/64", "fd00:5c0::/120"])
def test_an_ipv6_prefix_of_any_length_serves(ipv6: str) -> None:
    (interface,) = assign_addresses(mesh_of(ipv6=ipv6), peer_named("a"), taken={}).addresses
    assert interface.network == IPv6Network(ipv6)
    assert interface.ip != IPv6Network(ipv6).network_address


def test_a_peer_keeps_its_address_whatever_joins_or_leaves() -> None:
    mesh = mesh_of("100.64.0.0/24")
    taken = fill(mesh, 100)
    for address, name in taken.items():
        peer = peer_named(name, has=(f"{address}/24",))
        (interface,) = assign_addresses(mesh, peer, taken=taken).addresses
        assert interface.ip == address


def test_a_registry_rebuilt_from_nothing_gives_the_same_addresses_under_another_uid() -> None:
    peer = peer_named("home.external.a")
    assert (
        assign_addresses(mesh_of("100.64.0.0/16", uid="old"), peer, taken={}).addresses
        == assign_addresses(mesh_of("100.64.0.0/16", uid="new"), peer, taken={}).addresses
    )


def test_an_address_that_the_agent_holds_is_honoured_only_if_free_and_inside() -> None:
    mesh = mesh_of("100.64.0.0/16", "fd00:5c0::/64")
    held = peer_named("a", holds=("100.64.7.7", "fd00:5c0::77"))
    assert [str(each) for each in assign_addresses(mesh, held, taken={}).addresses] == [
        "100.64.7.7/16",
        "fd00:5c0::77/64",
    ]
    taken: dict[IPAddress, str] = {ip_address("100.64.7.7"): "b"}
    assert assign_addresses(mesh, held, taken=taken).addresses[0].ip != ip_address("100.64.7.7")
    for foreign in ("10.0.0.1", "100.64.0.0", "100.64.255.255", "fd00:5c0::"):
        given_ = assign_addresses(mesh, peer_named("a", holds=(foreign,)), taken={})
        assert ip_address(foreign) not in {each.ip for each in given_.addresses}


def test_an_assigned_address_goes_before_a_held_one() -> None:
    peer = peer_named("a", has=("100.64.1.1/16",), holds=("100.64.7.7",))
    (interface,) = assign_addresses(mesh_of("100.64.0.0/16"), peer, taken={}).addresses
    assert str(interface) == "100.64.1.1/16"


def test_a_widened_prefix_keeps_addresses_and_another_one_gives_new_ones() -> None:
    peer = peer_named("a", has=("100.64.1.1/24",))
    (wider,) = assign_addresses(mesh_of("100.64.0.0/16"), peer, taken={}).addresses
    assert str(wider) == "100.64.1.1/16"
    (moved,) = assign_addresses(mesh_of("10.9.0.0/16"), peer, taken={}).addresses
    assert moved.network == IPv4Network("10.9.0.0/16")


def test_an_address_that_two_claim_stays_with_the_one_it_is_registered_to() -> None:
    taken: dict[IPAddress, str] = {ip_address("100.64.1.1"): "elder"}
    mesh = mesh_of("100.64.0.0/16")
    (kept,) = assign_addresses(mesh, peer_named("elder", has=("100.64.1.1/16",)), taken=taken).addresses
    (other,) = assign_addresses(mesh, peer_named("younger", has=("100.64.1.1/16",)), taken=taken).addresses
    assert str(kept) == "100.64.1.1/16"
    assert other.ip != kept.ip


def test_a_removed_peers_address_is_kept_back_for_a_day() -> None:
    key = PublicKey(bytes(32))
    removed = replace(
        peer_named("a", has=("100.64.1.1/16",)),
        assignment=Assignment(
            conditions=(Condition("Removed", "True", "Left", "", 1000.0),),
            tombstone=Tombstone("m", "uid-a", key, key, bytes(64)),
        ),
    )
    assert not is_released(removed, wall=1000.0 + HOLD - 1)
    assert is_released(removed, wall=1000.0 + HOLD)
    assert not is_released(peer_named("b"), wall=1e12)


def test_ten_thousand_peers_cost_few_steps_each() -> None:
    class Counting(dict[IPAddress, str]):
        looks = 0

        def get(self, key: IPAddress, default: str) -> str:  # type: ignore[override]
            self.looks += 1
            return super().get(key, default)

    taken = Counting()
    mesh = mesh_of("100.64.0.0/16")
    for number in range(10_000):
        (interface,) = assign_addresses(mesh, peer_named(f"p{number}"), taken=taken).addresses
        taken[interface.ip] = f"p{number}"
    assert taken.looks < 20_000
