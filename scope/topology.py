"""Which prefixes belong to which peer, and by which peer they are reached: in a full mesh, and in a tree.

Every other peer of a full mesh is one WireGuard peer. It is believed to hold its assigned addresses, where
they lie in the mesh's address space, and the routes it offers, where they do not. Two peers that claim
overlapping prefixes would take each other's traffic, so claims are settled in the order in which the peers
were created (then by uid): the incumbent keeps what it has, and a later peer's overlapping claim is refused,
whether wider or narrower. Everyone who sees the same peers settles alike, and adding a peer never takes a
prefix away from an older one. A claim that touches what the viewer itself holds is refused too: nobody is
routed off its own network.

Prefixes of pods are settled along with the rest where the mesh's pod networking asks for them; those that
Nodes of the viewer's cluster claim are theirs for the viewer, whoever was first: its own cluster's network
leads there, or the mesh where it is asked for `All` and that network does not. Which of them lead into the
mesh (`Topology.pods`) is another question than whose they are. What is translated
is claimed as others see it; what pods really have counts in their own cluster only.

In a tree what was settled is reached by others than those who hold it. A hub reaches an edge that is attached
to another hub by that hub (`rehomed`), an edge reaches everything by the hub that it is attached to
(`by_hub`).
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from scope.model import Addressing, IPNetwork, Peer, PeerSpec, PodNetworking, PublicKey, Snapshot


class RefusalReason(enum.StrEnum):
    """Why a claim is not believed."""

    TAKEN = "Taken"  # an older peer holds an overlapping prefix
    OURS = "Ours"  # the viewer holds it itself
    MESH = "Mesh"  # a route into the mesh's own address space
    OUTSIDE = "Outside"  # an address outside the mesh's address space


@dataclass(frozen=True, slots=True)
class RefusedClaim:
    """A prefix that a peer claims and does not get; `holder` is the name of the peer that has it."""

    peer: str
    prefix: IPNetwork
    reason: RefusalReason
    holder: str = ""


class _Claim(NamedTuple):
    """A prefix with its first and last address as integers. A plain tuple: a mesh makes tens of thousands."""

    prefix: IPNetwork
    first: int
    last: int
    is_route: bool  # beyond addresses
    is_pods: bool = False


@dataclass(frozen=True, slots=True)
class Topology:
    """Allowed IPs by WireGuard key, for every peer that the device is to know (perhaps none).

    `routes` are the prefixes beyond addresses that are reached through the mesh, whoever leads there now, and
    `pods` those of pods; of these `beside` are the ones of the viewer's own cluster.
    """

    allowed_ips: Mapping[PublicKey, frozenset[IPNetwork]]
    refused: tuple[RefusedClaim, ...] = ()
    routes: frozenset[IPNetwork] = frozenset()
    pods: frozenset[IPNetwork] = frozenset()
    beside: frozenset[IPNetwork] = frozenset()


def peers_for(snapshot: Snapshot) -> Topology:
    """What the viewer of `snapshot` believes of every other peer: nothing before the mesh is known."""
    if snapshot.mesh is None:
        return Topology(dict.fromkeys(snapshot.peers, frozenset()))
    spec = snapshot.mesh.spec
    return settle(spec.addressing, snapshot.peers, viewer=snapshot.own, pods=spec.pod_networking)


def offered(spec: PeerSpec, pods: PodNetworking) -> tuple[IPNetwork, ...]:
    """What a peer offers beyond its addresses, in a mesh with that pod networking."""
    return (*spec.routes, *offered_pods(spec, pods))


def offered_pods(spec: PeerSpec, pods: PodNetworking) -> tuple[IPNetwork, ...]:
    """Where its pods are, as others see them, as far as that is for others."""
    if pods is PodNetworking.OFF:
        return ()
    return tuple(each.prefix if each.seen_as is None else each.seen_as for each in spec.pod_prefixes)


def hidden_pods(spec: PeerSpec, pods: PodNetworking) -> tuple[IPNetwork, ...]:
    """What its pods have in its own cluster, where others see them as something else."""
    if pods is PodNetworking.OFF:
        return ()
    return tuple(each.prefix for each in spec.pod_prefixes if each.seen_as is not None)


def settle(
    addressing: Addressing,
    peers: Mapping[PublicKey, Peer],
    *,
    viewer: Peer | None = None,
    pods: PodNetworking = PodNetworking.OFF,
) -> Topology:
    """Settle the claims of `peers` among each other and, where there is one, against those of the viewer."""
    space: dict[int, tuple[int, int]] = {
        prefix.version: _bounds(prefix) for prefix in (addressing.ipv4, addressing.ipv6) if prefix
    }
    held = _Held()
    in_order = sorted(peers, key=lambda key: (peers[key].meta.created, peers[key].meta.uid, key))
    if viewer is not None:
        held.reserve(viewer, (*_claims(viewer, pods), *_hidden(viewer, pods)), space)
        for beside in (peers[key] for key in in_order if _are_of_one_cluster(peers[key], viewer)):
            claims = (claim for claim in _claims(beside, pods) if claim.is_pods)
            held.reserve(beside, (*claims, *_hidden(beside, pods)), space)
    allowed: dict[PublicKey, frozenset[IPNetwork]] = {}
    refused: list[RefusedClaim] = []
    routes: set[IPNetwork] = set()
    far: set[IPNetwork] = set()
    near: set[IPNetwork] = set()
    for key in in_order:
        peer = peers[key]
        is_beside = viewer is not None and _are_of_one_cluster(peer, viewer)
        taken: list[IPNetwork] = []
        inside = _hidden(peer, pods) if is_beside and pods is PodNetworking.ALL else ()
        for claim in (*_claims(peer, pods), *inside):
            refusal = _misplaced(claim, peer, space.get(claim.prefix.version)) or held.take(
                claim, peer, viewer
            )
            if refusal is not None:
                refused.append(refusal)
                continue
            taken.append(claim.prefix)
            if claim.is_pods and not is_beside:
                far.add(claim.prefix)
            elif claim.is_pods:
                near.update(_as_in_its_cluster(peer, claim.prefix))
            elif claim.is_route:
                routes.add(claim.prefix)
        allowed[key] = frozenset(taken)
    ours = frozenset(near) if pods is PodNetworking.ALL else frozenset()
    return Topology(allowed, tuple(refused), frozenset(routes), ours.union(far), ours)


def _are_of_one_cluster(one: Peer, other: Peer) -> bool:
    return one.spec.cluster == other.spec.cluster != ""


def rehomed(
    topology: Topology,
    settled: Topology,
    moves: Mapping[PublicKey, tuple[PublicKey | None, PublicKey | None]],
) -> Topology:
    """What a hub sees once edges have moved: each from the hub that it was reached by to the next one.

    None is the edge itself. `settled` says what is whose; to move one edge costs the same in a large mesh,
    but for a copy of the table.
    """
    allowed = dict(topology.allowed_ips)
    lost: dict[PublicKey, list[frozenset[IPNetwork]]] = {}
    gained: dict[PublicKey, list[frozenset[IPNetwork]]] = {}
    for edge, (before, after) in moves.items():
        held = settled.allowed_ips.get(edge)
        if held is None:
            continue
        lost.setdefault(edge if before is None else before, []).append(held)
        gained.setdefault(edge if after is None else after, []).append(held)
    for key in lost.keys() | gained.keys():
        if key in allowed:
            left = allowed[key].difference(*lost.get(key, ()))
            allowed[key] = left.union(*gained.get(key, ()))
    return replace(topology, allowed_ips=allowed)


def by_hub(
    settled: Topology,
    addressing: Addressing,
    *,
    hubs: AbstractSet[PublicKey],
    home: PublicKey | None,
    beside: bool = False,
) -> Topology:
    """What an edge sees: the hub `home` leads to the whole mesh, every other hub to nothing.

    `beside`: other edges are reached straight where that works, as they take from the hub what is theirs: its
    prefixes are the wider ones.
    """
    allowed: dict[PublicKey, frozenset[IPNetwork]] = {}
    if beside:
        allowed |= settled.allowed_ips
    allowed |= dict.fromkeys(settled.allowed_ips.keys() & hubs, frozenset())
    if home in allowed:
        space = frozenset(prefix for prefix in (addressing.ipv4, addressing.ipv6) if prefix is not None)
        routes = settled.routes | settled.pods
        held = (allowed[edge] for edge in allowed.keys() - hubs)
        allowed[home] = space | (frozenset(map(_wider, routes)).difference(*held) if beside else routes)
    return replace(settled, allowed_ips=allowed)


def _wider(route: IPNetwork) -> IPNetwork:
    """Twice the prefix. Nobody holds just that one but, beside the prefix, the same peer."""
    return route.supernet() if route.prefixlen else route


def _claims(peer: Peer, pods: PodNetworking) -> Iterable[_Claim]:
    """The peer's addresses, then its routes and pods, a wider one before those it contains."""
    for interface in peer.assignment.addresses:
        number = int(interface)
        yield _Claim(_host(number, interface.version), number, number, is_route=False)
    routes = [_Claim(route, *_bounds(route), is_route=True) for route in peer.spec.routes]
    if peer.spec.pod_prefixes:
        routes += [
            _Claim(prefix, *_bounds(prefix), is_route=True, is_pods=True)
            for prefix in offered_pods(peer.spec, pods)
        ]
    yield from sorted(routes, key=lambda claim: (claim.prefix.version, claim.first, -claim.last))


def _as_in_its_cluster(peer: Peer, claimed: IPNetwork) -> tuple[IPNetwork, ...]:
    """Nothing for what only other clusters know: those of its own reach it by what it really has."""
    return () if any(each.seen_as == claimed for each in peer.spec.pod_prefixes) else (claimed,)


def _hidden(peer: Peer, pods: PodNetworking) -> Iterable[_Claim]:
    """What nobody else may have for those of the peer's own cluster, as pods have it there."""
    for prefix in hidden_pods(peer.spec, pods):
        yield _Claim(prefix, *_bounds(prefix), is_route=True, is_pods=True)


def _misplaced(claim: _Claim, peer: Peer, space: tuple[int, int] | None) -> RefusedClaim | None:
    """Addresses belong inside the mesh's address space of their family, routes outside."""
    if claim.is_route:
        if space is not None and claim.first <= space[1] and space[0] <= claim.last:
            return RefusedClaim(peer.meta.name, claim.prefix, RefusalReason.MESH)
        return None
    if space is None or not space[0] <= claim.first <= space[1]:
        return RefusedClaim(peer.meta.name, claim.prefix, RefusalReason.OUTSIDE)
    return None


class _Held:
    """Who holds what, as disjoint ranges of integers per IP version, in order."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        self._holders: dict[int, list[tuple[int, Peer]]] = {4: [], 6: []}  # last of the range, holder

    def reserve(self, peer: Peer, claims: Iterable[_Claim], space: Mapping[int, tuple[int, int]]) -> None:
        """What is reserved is nobody else's."""
        for claim in claims:
            if _misplaced(claim, peer, space.get(claim.prefix.version)) is None:
                self.take(claim, peer, None)

    def take(self, claim: _Claim, peer: Peer, viewer: Peer | None) -> RefusedClaim | None:
        """Give the prefix to the peer, or say why not. What it holds as part of a wider one stays its own."""
        starts, holders = self._starts[claim.prefix.version], self._holders[claim.prefix.version]
        after = bisect_right(starts, claim.last)
        if after == 0 or holders[after - 1][0] < claim.first:
            starts.insert(after, claim.first)
            holders.insert(after, (claim.last, peer))
            return None
        holder = holders[after - 1][1]
        if holder is peer:
            return None
        reason = RefusalReason.OURS if holder is viewer else RefusalReason.TAKEN
        return RefusedClaim(peer.meta.name, claim.prefix, reason, holder.meta.name)


# Plans start from the whole snapshot each time; the prefixes of a mesh of 10,000 peers are made once.
@lru_cache(maxsize=65536)
def _host(number: int, version: int) -> IPNetwork:
    return IPv4Network((number, 32)) if version == 4 else IPv6Network((number, 128))


def _bounds(prefix: IPNetwork) -> tuple[int, int]:
    return int(prefix.network_address), int(prefix.broadcast_address)
