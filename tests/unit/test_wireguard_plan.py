"""The planner: tables for its order, and the property that a performed plan leaves nothing to plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from typing import assert_never

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scope_agent.wireguard.device import (
    NO_PSK,
    Action,
    AddAddress,
    AddAllowedIps,
    AddGuard,
    AddPeer,
    AddRoute,
    CreateDevice,
    DesiredDevice,
    DesiredPeer,
    HoldEndpoint,
    ObservedDevice,
    ObservedPeer,
    RemoveAddress,
    RemoveGuard,
    RemovePeer,
    RemoveRoute,
    SetAllowedIps,
    SetEndpoint,
    SetFwmark,
    SetKeepalive,
    SetListenPort,
    SetMtu,
    SetPrivateKey,
    SetPsk,
    SetUp,
)
from scope_agent.wireguard.plan import count_drift, plan_device, plan_holds, plan_peers

from scope.model import Endpoint, IPNetwork, PublicKey, Secret

ONE, TWO, THREE = (PublicKey(bytes([number]) * 32) for number in (1, 2, 3))
HERE, THERE, ELSEWHERE = (Endpoint.parse(f"192.0.2.{number}:7000") for number in (1, 2, 3))
X, Y, Z = (ip_network(f"10.9.0.{number}/32") for number in (1, 2, 3))
MESH = ip_network("10.9.0.0/16")


def public_half(private: Secret) -> PublicKey:
    """Stands for the curve: all that matters here is that each private key has one public key."""
    return PublicKey(bytes(reversed(private.raw)))


def device(*peers: DesiredPeer, key: bytes = bytes(range(32))) -> DesiredDevice:
    private = Secret(key)
    return DesiredDevice(
        name="scope0",
        private_key=private,
        public_key=public_half(private),
        listen_port=7000,
        mtu=1420,
        addresses=frozenset({ip_interface("10.9.0.9/16")}),
        routes=frozenset({MESH}),
        guarded=frozenset({MESH}),
        peers={peer.key: peer for peer in peers},
    )


def perform(actions: tuple[Action, ...], observed: ObservedDevice) -> ObservedDevice:
    """What WireGuard and the kernel make of a plan."""
    for action in actions:
        observed = perform_one(action, observed)
    return observed


def perform_one(action: Action, device: ObservedDevice) -> ObservedDevice:
    match action:
        case CreateDevice():
            return replace(device, exists=True)
        case SetPrivateKey(private_key):
            return replace(device, public_key=public_half(private_key))
        case SetListenPort(port):
            return replace(device, listen_port=port)
        case SetFwmark(mark):
            return replace(device, fwmark=mark)
        case SetMtu(mtu):
            return replace(device, mtu=mtu)
        case SetUp():
            return replace(device, up=True)
        case AddAddress(address):
            return replace(device, addresses=device.addresses | {address})
        case RemoveAddress(address):
            return replace(device, addresses=device.addresses - {address})
        case AddRoute(prefix):
            return replace(device, routes=device.routes | {prefix})
        case RemoveRoute(prefix):
            return replace(device, routes=device.routes - {prefix})
        case AddGuard(prefix):
            return replace(device, guarded=device.guarded | {prefix})
        case RemoveGuard(prefix):
            return replace(device, guarded=device.guarded - {prefix})
        case RemovePeer(key):
            return replace(device, peers={k: peer for k, peer in device.peers.items() if k != key})
        case AddPeer(key, endpoint, allowed_ips, keepalive, psk):
            added = ObservedPeer(key, endpoint=endpoint, keepalive=keepalive, psk=psk)
            device = replace(device, peers={**device.peers, key: added})
            return give(device, key, allowed_ips)
        case SetEndpoint(key, endpoint):
            return change(device, key, lambda peer: replace(peer, endpoint=endpoint))
        case SetPsk(key, psk):
            return change(device, key, lambda peer: replace(peer, psk=None if psk == NO_PSK else psk))
        case SetKeepalive(key, keepalive):
            return change(device, key, lambda peer: replace(peer, keepalive=keepalive))
        case AddAllowedIps(key, allowed_ips):
            return give(device, key, allowed_ips)
        case SetAllowedIps(key, allowed_ips):
            device = change(device, key, lambda peer: replace(peer, allowed_ips=frozenset()))
            return give(device, key, allowed_ips)
        case _:
            assert_never(action)


def change(
    device: ObservedDevice, key: PublicKey, how: Callable[[ObservedPeer], ObservedPeer]
) -> ObservedDevice:
    return replace(device, peers={k: how(peer) if k == key else peer for k, peer in device.peers.items()})


def give(device: ObservedDevice, key: PublicKey, prefixes: frozenset[IPNetwork]) -> ObservedDevice:
    """A prefix belongs to one peer: who gets it takes it from who had it."""
    return replace(
        device,
        peers={
            k: replace(
                peer, allowed_ips=peer.allowed_ips | prefixes if k == key else peer.allowed_ips - prefixes
            )
            for k, peer in device.peers.items()
        },
    )


def settled(desired: DesiredDevice) -> ObservedDevice:
    return perform(plan_device(desired, ObservedDevice(desired.name)), ObservedDevice(desired.name))


def facts(action: Action) -> str:
    return type(action).__name__


def test_a_missing_device_is_guarded_before_it_is_made_and_made_before_its_peers() -> None:
    plan = plan_device(device(DesiredPeer(ONE, HERE)), ObservedDevice("scope0"))
    assert [facts(action) for action in plan] == [
        "AddGuard",
        "CreateDevice",
        "SetPrivateKey",
        "SetListenPort",
        "SetMtu",
        "SetUp",
        "AddAddress",
        "AddRoute",
        "AddPeer",
    ]


def test_endpoints_come_first_then_removals() -> None:
    before = settled(device(DesiredPeer(ONE, HERE), DesiredPeer(TWO, HERE)))
    after = replace(device(DesiredPeer(ONE, THERE), DesiredPeer(THREE)), mtu=1300)
    assert plan_device(after, before) == (
        SetEndpoint(ONE, THERE),
        RemovePeer(TWO),
        SetMtu(1300),
        AddPeer(THREE),
    )


def test_an_endpoint_that_is_not_desired_is_never_cleared() -> None:
    before = settled(device(DesiredPeer(ONE, HERE)))
    assert plan_device(device(DesiredPeer(ONE, None)), before) == ()


def test_an_endpoint_that_moved_to_a_verified_one_is_left_alone() -> None:
    desired = device(DesiredPeer(ONE, HERE, verified=frozenset({THERE})))
    moved = change(settled(desired), ONE, lambda peer: replace(peer, endpoint=THERE))
    assert plan_device(desired, moved) == ()
    assert count_drift(desired, moved) == 0


def test_an_endpoint_that_moved_elsewhere_is_put_back_and_counted() -> None:
    desired = device(DesiredPeer(ONE, HERE, verified=frozenset({THERE})))
    moved = change(settled(desired), ONE, lambda peer: replace(peer, endpoint=ELSEWHERE))
    assert plan_device(desired, moved) == (SetEndpoint(ONE, HERE),)
    assert count_drift(desired, moved) == 1


@pytest.mark.parametrize("observed", [HERE, THERE])
def test_a_settling_endpoint_is_set_whatever_is_observed_and_is_no_drift(observed: Endpoint) -> None:
    desired = device(DesiredPeer(ONE, HERE, verified=frozenset({THERE}), settling=True))
    moved = change(settled(desired), ONE, lambda peer: replace(peer, endpoint=observed))
    assert plan_device(desired, moved) == (SetEndpoint(ONE, HERE),)
    assert count_drift(desired, moved) == 0


def test_an_allowed_ip_moves_in_one_step_and_its_loser_needs_none() -> None:
    before = settled(device(DesiredPeer(ONE, allowed_ips=frozenset({X, Y})), DesiredPeer(TWO)))
    after = device(DesiredPeer(ONE, allowed_ips=frozenset({X})), DesiredPeer(TWO, allowed_ips=frozenset({Y})))
    assert plan_device(after, before) == (AddAllowedIps(TWO, frozenset({Y})),)


def test_allowed_ips_are_replaced_only_where_one_goes_to_nobody() -> None:
    before = settled(device(DesiredPeer(ONE, allowed_ips=frozenset({X, Y})), DesiredPeer(TWO)))
    after = device(DesiredPeer(ONE, allowed_ips=frozenset({X})), DesiredPeer(TWO, allowed_ips=frozenset({Z})))
    assert plan_device(after, before) == (
        AddAllowedIps(TWO, frozenset({Z})),
        SetAllowedIps(ONE, frozenset({X})),
    )


def test_a_prefix_that_two_peers_claim_goes_to_the_lower_key_and_stays_there() -> None:
    desired = device(
        DesiredPeer(TWO, allowed_ips=frozenset({X})), DesiredPeer(ONE, allowed_ips=frozenset({X}))
    )
    observed = settled(desired)
    assert observed.peers[ONE].allowed_ips == {X}
    assert observed.peers[TWO].allowed_ips == frozenset()
    assert plan_device(desired, observed) == ()


def test_a_psk_is_never_cleared_by_saying_nothing_of_it() -> None:
    before = settled(device(DesiredPeer(ONE, psk=Secret(b"p" * 32))))
    assert plan_device(device(DesiredPeer(ONE)), before) == ()
    assert plan_device(device(DesiredPeer(ONE, psk=NO_PSK)), before) == (SetPsk(ONE, NO_PSK),)


def test_listen_port_zero_leaves_the_port_to_wireguard() -> None:
    before = replace(settled(device()), listen_port=40123)
    assert plan_device(replace(device(), listen_port=0), before) == ()


def test_drift_counts_every_fact_that_somebody_else_changed() -> None:
    desired = device(DesiredPeer(ONE, HERE), DesiredPeer(TWO, THERE))
    observed = perform_one(RemovePeer(TWO), replace(settled(desired), mtu=1280, routes=frozenset()))
    assert count_drift(desired, observed) == 3


def test_no_action_shows_a_secret() -> None:
    secret = b"\x11\x22\x33\x44" * 8
    desired = device(DesiredPeer(ONE, psk=Secret(secret)), key=secret)
    text = repr((desired, plan_device(desired, ObservedDevice("scope0")), SetPsk(ONE, Secret(secret))))
    for form in (secret.hex(), repr(secret)[2:-1], "11223344", "ESIzRBEi"):
        assert form not in text


keys = st.sampled_from([ONE, TWO, THREE])
endpoints = st.sampled_from([HERE, THERE, ELSEWHERE, Endpoint.parse("[2001:db8::1]:9")])
prefixes = st.frozensets(st.sampled_from([X, Y, Z, MESH, ip_network("fd09::/64")]))
psks = st.sampled_from([Secret(b"p" * 32), Secret(b"q" * 32)])
addresses = st.frozensets(st.sampled_from([ip_interface("10.9.0.9/16"), ip_interface("fd09::9/64")]))
desired_peers = st.builds(
    DesiredPeer,
    key=keys,
    endpoint=st.none() | endpoints,
    allowed_ips=prefixes,
    keepalive=st.sampled_from([0, 20]),
    psk=st.none() | psks | st.just(NO_PSK),
    verified=st.frozensets(endpoints, max_size=2),
)
desired_devices = st.builds(
    replace,
    st.builds(lambda peers: device(*peers), st.lists(desired_peers, max_size=3)),
    listen_port=st.sampled_from([0, 7000, 7001]),
    mtu=st.sampled_from([1280, 1420]),
    fwmark=st.sampled_from([0, 7]),
    addresses=addresses,
    routes=prefixes,
    guarded=prefixes,
)
observed_peers = st.builds(
    ObservedPeer,
    key=keys,
    endpoint=st.none() | endpoints,
    allowed_ips=st.just(frozenset[IPNetwork]()),
    keepalive=st.sampled_from([0, 20, 25]),
    psk=st.none() | psks,
)


@st.composite
def observed_devices(draw: st.DrawFn) -> ObservedDevice:
    """Any state that a kernel can be in: each prefix belongs to one peer at most."""
    if not draw(st.booleans()):
        return ObservedDevice("scope0", guarded=draw(prefixes))
    found = ObservedDevice(
        "scope0",
        exists=True,
        up=draw(st.booleans()),
        public_key=draw(st.none() | st.just(public_half(Secret(bytes(range(32))))) | keys),
        listen_port=draw(st.sampled_from([7000, 7001, 7002])),
        mtu=1420,
        addresses=draw(addresses),
        routes=draw(prefixes),
        guarded=draw(prefixes),
        peers={peer.key: peer for peer in draw(st.lists(observed_peers, max_size=3))},
    )
    for key in found.peers:
        found = give(found, key, draw(prefixes))
    return found


@given(desired_devices, observed_devices())
def test_a_performed_plan_leaves_nothing_to_plan(desired: DesiredDevice, observed: ObservedDevice) -> None:
    after = perform(plan_device(desired, observed), observed)
    assert plan_device(desired, after) == ()
    assert after.peers.keys() == desired.peers.keys()
    assert after.guarded == desired.guarded


@given(desired_devices, observed_devices(), st.integers(min_value=0, max_value=8))
def test_a_plan_cut_short_and_planned_again_ends_the_same(
    desired: DesiredDevice, observed: ObservedDevice, cut: int
) -> None:
    whole = perform(plan_device(desired, observed), observed)
    partial = perform(plan_device(desired, observed)[:cut], observed)
    assert perform(plan_device(desired, partial), partial) == whole


@given(desired_devices, observed_devices())
def test_an_allowed_ip_that_stays_or_moves_is_never_without_a_peer(
    desired: DesiredDevice, observed: ObservedDevice
) -> None:
    """But for a removed peer's, which is cut off at once, and a replaced table's, which is one step."""
    kept = {key for key in observed.peers if key in desired.peers}
    had = {prefix for key in kept for prefix in observed.peers[key].allowed_ips}
    wanted = {prefix for peer in desired.peers.values() for prefix in peer.allowed_ips}
    for action in plan_device(desired, observed):
        observed = perform_one(action, observed)
        held = {prefix for peer in observed.peers.values() for prefix in peer.allowed_ips}
        assert had & wanted <= held


@given(desired_devices, observed_devices())
def test_on_a_device_that_is_else_as_it_should_be_the_plan_is_that_of_its_peers(
    desired: DesiredDevice, observed: ObservedDevice
) -> None:
    as_it_should_be = replace(perform(plan_device(desired, observed), observed), peers=observed.peers)
    assert plan_peers(desired.peers, observed.peers) == plan_device(desired, as_it_should_be)


@given(desired_devices, observed_devices())
def test_a_plan_does_not_depend_on_how_its_sets_were_built(
    desired: DesiredDevice, observed: ObservedDevice
) -> None:
    turned = replace(desired, peers=dict(reversed(desired.peers.items())))
    assert plan_device(turned, observed) == plan_device(desired, observed)


def test_a_hold_is_planned_once_for_each_peer_that_wants_one() -> None:
    hold = HoldEndpoint(ONE, HERE, frozenset({THERE}), 0.3)
    desired = device(DesiredPeer(ONE, HERE, hold=hold), DesiredPeer(TWO, HERE))
    assert plan_holds(desired.peers) == (hold,)
