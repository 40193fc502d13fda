"""Whose route counts when two peers claim overlapping prefixes: what agents settle, told to people.

`scope.topology` decides; a peer whose claim is refused there gets a condition that says whose it is, and
which prefix nobody has.
"""

from __future__ import annotations

from collections.abc import Iterable

from scope.model import Mesh, Peer
from scope.resources import prefixes_of
from scope.topology import RefusalReason, offered, settle
from scope_operator.plan.conditions import RouteConflict
from scope_operator.plan.free_prefixes import FreePrefixes


def route_conflicts(mesh: Mesh, peers: Iterable[Peer]) -> dict[str, RouteConflict]:
    """The first conflict of each peer that has one, by name. `peers` are the members with routes."""
    members = {peer.report.keys.wireguard: peer for peer in peers if peer.report is not None}
    pods = mesh.spec.pod_networking
    routes = {peer.meta.name: frozenset(offered(peer.spec, pods)) for peer in members.values()}
    refused = [
        claim
        for claim in settle(mesh.spec.addressing, members, pods=pods).refused
        if claim.prefix in routes[claim.peer]
    ]
    if not refused:
        return {}
    known = (*prefixes_of(mesh.spec.addressing), *(prefix for each in routes.values() for prefix in each))
    free = FreePrefixes(known, mesh_uid=mesh.meta.uid)
    conflicts: dict[str, RouteConflict] = {}
    for claim in refused:
        if claim.peer not in conflicts:
            by_mesh = claim.reason is RefusalReason.MESH
            holder = f"ScopeMesh {mesh.meta.name}" if by_mesh else f"ScopePeer {claim.holder}"
            conflicts[claim.peer] = RouteConflict(claim.prefix, holder, free.propose(claim.prefix))
    return conflicts
