"""Whose route counts when two peers claim overlapping prefixes: what agents settle, told to people.

`scope.topology` decides; a peer whose claim is refused there gets a condition that says whose it is, and what
to do with which prefix that nobody has. Pods of two clusters with one prefix can keep their addresses, each
cluster seen by the others by another prefix; one that is translated does not help where the other is not, as
its pods' own network has that prefix, too, so the other one is told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from scope.model import IPNetwork, Mesh, Peer, PodPrefix, Translation
from scope.resources import prefixes_of
from scope.topology import RefusalReason, hidden_pods, offered, offered_pods, settle
from scope.translation import translations_of
from scope_operator.plan.conditions import Remedy, RouteConflict
from scope_operator.plan.free_prefixes import FreePrefixes

ROOM: Final = 8  # bits by which a cluster's prefix is shorter than a Node's: what Kubernetes usually has
_SHORTEST: Final = {4: 8, 6: 16}  # lengths of a prefix that may be offered


def route_conflicts(mesh: Mesh, peers: Iterable[Peer]) -> dict[str, RouteConflict]:
    """The first conflict of each peer that has one, by name. `peers` are the members with routes."""
    members = {peer.report.keys.wireguard: peer for peer in peers if peer.report is not None}
    by_name = {peer.meta.name: peer for peer in members.values()}
    pods = mesh.spec.pod_networking
    routes = {peer.meta.name: frozenset(offered(peer.spec, pods)) for peer in members.values()}
    refused = [
        claim
        for claim in settle(mesh.spec.addressing, members, pods=pods).refused
        if claim.prefix in routes[claim.peer]
    ]
    hidden = _Hidden(by_name, {name: hidden_pods(peer.spec, pods) for name, peer in by_name.items()})
    shadowed = [
        (name, prefix, other)
        for name, peer in (by_name.items() if hidden else ())
        for prefix in offered_pods(peer.spec, pods)
        if (other := hidden.elsewhere(prefix, _network_of(peer)))
    ]
    if not refused and not shadowed:
        return {}
    remedies = _Remedies(mesh, routes, hidden.prefixes)
    conflicts: dict[str, RouteConflict] = {}
    for claim in refused:
        if claim.peer in conflicts:
            continue
        by_mesh = claim.reason is RefusalReason.MESH
        holder = f"ScopeMesh {mesh.meta.name}" if by_mesh else f"ScopePeer {claim.holder}"
        found = [remedies.of(by_name[claim.peer], claim.prefix)]
        if not by_mesh and found[0].are_pods:
            theirs = by_name[claim.holder]
            shared = [each for each in offered_pods(theirs.spec, pods) if each.overlaps(claim.prefix)]
            found += [remedies.of(theirs, each) for each in shared[:1]]
        conflicts[claim.peer] = RouteConflict(claim.prefix, holder, tuple(found))
    for name, prefix, other in shadowed:
        if name not in conflicts:
            remedy = remedies.of(by_name[name], prefix)
            conflicts[name] = RouteConflict(prefix, f"ScopePeer {other}", (remedy,), is_shadowed=True)
    return conflicts


def _network_of(peer: Peer) -> str:
    """Whose pods' network it is in: its cluster's, or its own."""
    return f"cluster {peer.spec.cluster}" if peer.spec.cluster else f"peer {peer.meta.name}"


class _Hidden:
    """What pods have in their own clusters where others see them as something else."""

    def __init__(self, peers: Mapping[str, Peer], prefixes: Mapping[str, tuple[IPNetwork, ...]]) -> None:
        self.prefixes = frozenset(prefix for each in prefixes.values() for prefix in each)
        # Who has it: of each of two networks one peer, as one of another network is all that is asked for.
        self._holders: dict[IPNetwork, dict[str, str]] = {}
        for name, hidden in prefixes.items():
            for prefix in hidden:
                holders = self._holders.setdefault(prefix, {})
                if len(holders) < 2:
                    holders.setdefault(_network_of(peers[name]), name)
        self._lengths = {
            version: sorted({p.prefixlen for p in self.prefixes if p.version == version})
            for version in (4, 6)
        }
        self._ordered: dict[int, list[IPNetwork]] = {
            4: sorted(each for each in self.prefixes if isinstance(each, IPv4Network)),
            6: sorted(each for each in self.prefixes if isinstance(each, IPv6Network)),
        }

    def __bool__(self) -> bool:
        return bool(self.prefixes)

    def elsewhere(self, prefix: IPNetwork, network: str) -> str:
        """The name of a peer of another network whose pods have some of the prefix there; "": none."""
        for around in (
            prefix.supernet(new_prefix=n) for n in self._lengths[prefix.version] if n <= prefix.prefixlen
        ):
            if found := self._other(around, network):
                return found
        ordered = self._ordered[prefix.version]
        first, last = int(prefix.network_address), int(prefix.broadcast_address)
        at = bisect_left(ordered, first, key=lambda each: int(each.network_address))
        while at < len(ordered) and int(ordered[at].network_address) <= last:
            if found := self._other(ordered[at], network):
                return found
            at += 1
        return ""

    def _other(self, prefix: IPNetwork, network: str) -> str:
        holders = self._holders.get(prefix, {})
        return next((name for each, name in holders.items() if each != network), "")


class _Remedies:
    """What is proposed to whom: the same to all Nodes of a cluster."""

    def __init__(
        self, mesh: Mesh, routes: Mapping[str, frozenset[IPNetwork]], hidden: frozenset[IPNetwork]
    ) -> None:
        given = (each.outside for cluster in mesh.spec.clusters for each in cluster.translate)
        known = (prefix for each in routes.values() for prefix in each)
        self._mesh = mesh
        self._free = FreePrefixes(
            (*prefixes_of(mesh.spec.addressing), *known, *hidden, *given), mesh_uid=mesh.meta.uid
        )
        self._proposed: dict[tuple[str, IPNetwork], Remedy] = {}

    def of(self, peer: Peer, route: IPNetwork) -> Remedy:
        """What to do about a route of the peer, as others see it."""
        pods = next((each for each in peer.spec.pod_prefixes if route in (each.seen_as, each.prefix)), None)
        if pods is None or route in peer.spec.routes:
            return Remedy(route, self._free.propose(route), whose="", are_pods=False)
        cluster = peer.spec.cluster
        wide = _wide(pods, translations_of(self._mesh, cluster)) if cluster else pods.prefix
        key = (cluster or peer.meta.name, wide)
        if key not in self._proposed:
            whose = f"cluster {cluster}" if cluster else f"ScopePeer {peer.meta.name}"
            self._proposed[key] = Remedy(wide, self._free.propose(wide), whose=whose, are_pods=True)
        return self._proposed[key]


def _wide(pods: PodPrefix, translations: Iterable[Translation]) -> IPNetwork:
    """The cluster's prefix that a Node's is a part of: as it is translated, else with room for others."""
    prefix = pods.prefix
    for each in translations:
        if each.inside.version == prefix.version and prefix.network_address in each.inside:
            return each.inside
    length = max(_SHORTEST[prefix.version], prefix.prefixlen - ROOM)
    return prefix.supernet(new_prefix=min(length, prefix.prefixlen))
