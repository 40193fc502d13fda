"""From a desired and an observed WireGuard device to the actions between: pure, and empty once they agree.

The order is chosen so that every prefix of the plan is worth having (a caller may take the first few and plan
again) and nothing is lost on the way:

1. endpoints of peers that the device knows: what carries traffic is put right first;
2. peers to remove: a removed peer loses its data path at once;
3. guards, then the device, its key, mark, port and MTU, then up, addresses and routes: a guard before the
   first address, so that nothing leaves in plaintext;
4. pre-shared keys, then peers to add, then allowed IPs that a peer gains (one that another peer holds moves
   in one step), then those that a peer loses to nobody, then keepalives, which may start a handshake;
5. what is no longer wanted of routes, addresses and guards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import TypeVar

from scope.model import IPInterface, IPNetwork, PublicKey, Secret
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


def plan_device(desired: DesiredDevice, observed: ObservedDevice) -> tuple[Action, ...]:
    """The actions that make `observed` into `desired`, in order; empty when nothing is to be done.

    Peers, addresses, routes and guards that are not desired are removed. A settling peer's SetEndpoint is
    emitted each time; everything else differs before it is emitted.
    """
    urgent, others = _plan_peers(desired.peers, observed.peers)
    return (
        *urgent,
        *(AddGuard(prefix) for prefix in _sorted(desired.guarded - observed.guarded)),
        *_correct_device(desired, observed),
        *(AddAddress(address) for address in _sorted(desired.addresses - observed.addresses)),
        *(AddRoute(prefix) for prefix in _sorted(desired.routes - observed.routes)),
        *others,
        *(RemoveRoute(prefix) for prefix in _sorted(observed.routes - desired.routes)),
        *(RemoveAddress(address) for address in _sorted(observed.addresses - desired.addresses)),
        *(RemoveGuard(prefix) for prefix in _sorted(observed.guarded - desired.guarded)),
    )


def plan_peers(
    desired: Mapping[PublicKey, DesiredPeer], observed: Mapping[PublicKey, ObservedPeer]
) -> tuple[Action, ...]:
    """What of `plan_device` concerns these peers alone, on a device that is else as it should be."""
    urgent, others = _plan_peers(desired, observed)
    return (*urgent, *others)


def _plan_peers(
    desired: Mapping[PublicKey, DesiredPeer], observed: Mapping[PublicKey, ObservedPeer]
) -> tuple[list[Action], list[Action]]:
    """What goes before all other actions, and what goes after those that make the device."""
    owners = _owners(desired)
    pairs = [(desired[key], observed[key]) for key in sorted(desired.keys() & observed.keys())]
    urgent: list[Action] = [
        *_correct_endpoints(pairs),
        *(RemovePeer(key) for key in sorted(observed.keys() - desired.keys())),
    ]
    others: list[Action] = [
        *(
            SetPsk(want.key, want.psk)
            for want, have in pairs
            if want.psk is not None and _differ(want.psk, have.psk)
        ),
        *_add_peers(desired, observed, owners),
        *_correct_allowed_ips(pairs, owners),
        *(SetKeepalive(want.key, want.keepalive) for want, have in pairs if want.keepalive != have.keepalive),
    ]
    return urgent, others


def plan_holds(desired: Mapping[PublicKey, DesiredPeer]) -> tuple[HoldEndpoint, ...]:
    """The holds to be set, before the endpoints that they hold."""
    held = {key: peer.hold for key, peer in desired.items() if peer.hold is not None}
    return tuple(held[key] for key in sorted(held))


def count_drift(agreed: DesiredDevice, observed: ObservedDevice) -> int:
    """How many facts somebody else changed, given the desired device that the observed one last agreed with.

    `agreed` is the desired device of the last empty plan (settling aside). An endpoint that moved to another
    verified one is not counted.
    """
    peers = {key: replace(peer, settling=False) for key, peer in agreed.peers.items()}
    return len(plan_device(replace(agreed, peers=peers), observed))


def _correct_endpoints(pairs: Iterable[tuple[DesiredPeer, ObservedPeer]]) -> Iterator[SetEndpoint]:
    for want, have in pairs:
        if want.endpoint is None:
            continue
        agrees = have.endpoint == want.endpoint or have.endpoint in want.verified
        if want.settling or not agrees:
            yield SetEndpoint(want.key, want.endpoint)


def _correct_device(desired: DesiredDevice, observed: ObservedDevice) -> Iterator[Action]:
    if not observed.exists:
        yield CreateDevice()
    if observed.public_key != desired.public_key:
        yield SetPrivateKey(desired.private_key)
    if observed.fwmark != desired.fwmark:
        yield SetFwmark(desired.fwmark)
    if desired.listen_port not in (0, observed.listen_port):
        yield SetListenPort(desired.listen_port)
    if observed.mtu != desired.mtu:
        yield SetMtu(desired.mtu)
    if not observed.up:
        yield SetUp()


def _add_peers(
    desired: Mapping[PublicKey, DesiredPeer],
    observed: Mapping[PublicKey, ObservedPeer],
    owners: dict[IPNetwork, PublicKey],
) -> Iterator[AddPeer]:
    for key in sorted(desired.keys() - observed.keys()):
        want = desired[key]
        yield AddPeer(
            key,
            endpoint=want.endpoint,
            allowed_ips=_owned(want, owners),
            keepalive=want.keepalive,
            psk=None if want.psk == NO_PSK else want.psk,
        )


def _correct_allowed_ips(
    pairs: Iterable[tuple[DesiredPeer, ObservedPeer]], owners: dict[IPNetwork, PublicKey]
) -> Iterator[Action]:
    """Gains before losses: what one peer loses to another has then moved already."""
    replaced: list[Action] = []
    for want, have in pairs:
        owned = _owned(want, owners)
        if gained := owned - have.allowed_ips:
            yield AddAllowedIps(want.key, gained)
        if any(prefix not in owners for prefix in have.allowed_ips - owned):
            replaced.append(SetAllowedIps(want.key, owned))
    yield from replaced


def _owners(desired: Mapping[PublicKey, DesiredPeer]) -> dict[IPNetwork, PublicKey]:
    """Which peer each allowed IP belongs to: WireGuard gives a prefix to one peer, here to the lower key."""
    return {prefix: key for key in sorted(desired, reverse=True) for prefix in desired[key].allowed_ips}


def _owned(peer: DesiredPeer, owners: dict[IPNetwork, PublicKey]) -> frozenset[IPNetwork]:
    return frozenset(prefix for prefix in peer.allowed_ips if owners[prefix] == peer.key)


def _differ(want: Secret, have: Secret | None) -> bool:
    return want != (NO_PSK if have is None else have)


_Prefix = TypeVar("_Prefix", IPInterface, IPNetwork)


def _sorted(prefixes: Iterable[_Prefix]) -> list[_Prefix]:
    """IPv4 first, then by address: a plan is the same however its sets were built."""
    by_family: Callable[[IPInterface | IPNetwork], tuple[int, int, int]] = _order
    return sorted(prefixes, key=by_family)


def _order(prefix: IPInterface | IPNetwork) -> tuple[int, int, int]:
    match prefix:
        case IPv4Interface() | IPv6Interface():
            return prefix.version, int(prefix.ip), prefix.network.prefixlen
        case IPv4Network() | IPv6Network():
            return prefix.version, int(prefix.network_address), prefix.prefixlen
