"""Whose route counts when two peers claim overlapping prefixes: the elder's, and the younger is told.

Claims are judged in the order of the peers' creation, after the mesh's own address space, which no peer may
claim. Whoever loses a prefix loses that one alone, and nothing is blackholed: a lost route is not used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from scope.model import IPNetwork, Mesh, Peer
from scope_operator.plan.conditions import RouteConflict


def route_conflicts(mesh: Mesh, peers: Iterable[Peer]) -> dict[str, RouteConflict]:
    """The first conflict of each peer that has one, by name. `peers` are the members with routes."""
    claims = {4: _Claims(), 6: _Claims()}
    for prefix in (mesh.spec.addressing.ipv4, mesh.spec.addressing.ipv6):
        if prefix is not None:
            claims[prefix.version].claim(prefix, f"ScopeMesh {mesh.meta.name}")
    conflicts: dict[str, RouteConflict] = {}
    for peer in sorted(peers, key=lambda each: (each.meta.created, each.meta.uid)):
        for route in peer.spec.routes:
            lost = claims[route.version].claim(route, f"ScopePeer {peer.meta.name}")
            if lost is not None:
                conflicts.setdefault(
                    peer.meta.name, RouteConflict(route, holder=lost.holder, held=lost.prefix)
                )
    return conflicts


@dataclass(frozen=True, slots=True)
class _Claim:
    prefix: IPNetwork
    holder: str


@dataclass(slots=True)
class _Claims:
    """Disjoint prefixes of one IP version, in order."""

    starts: list[int] = field(default_factory=list)
    claims: list[_Claim] = field(default_factory=list)

    def claim(self, prefix: IPNetwork, holder: str) -> _Claim | None:
        """Take the prefix, or give another's claim that it overlaps."""
        first, last = int(prefix.network_address), int(prefix.broadcast_address)
        low = bisect_left(self.starts, first)
        if low and int(self.claims[low - 1].prefix.broadcast_address) >= first:
            low -= 1
        high = low
        while high < len(self.starts) and self.starts[high] <= last:
            high += 1
        met = self.claims[low:high]
        foreign = next((claim for claim in met if claim.holder != holder), None)
        if foreign is not None:
            return foreign
        # Prefixes nest or are disjoint: what is met is one that holds this one, or all that this one holds.
        if not met or met[0].prefix.prefixlen > prefix.prefixlen:
            self.starts[low:high] = [first]
            self.claims[low:high] = [_Claim(prefix, holder)]
        return None
