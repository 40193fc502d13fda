"""What the registry side writes: each peer's assignment, each mesh's status, and which peers are to go.

Each function looks at one resource and an index of the others, so that a change of one peer among ten
thousand costs as much as among ten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from scope.model import (
    Assignment,
    Cluster,
    Condition,
    GatewayOrigin,
    HubChoice,
    IPAddress,
    IPInterface,
    KeyCounts,
    Mesh,
    MeshCounts,
    MeshStatus,
    Peer,
    PublicKey,
    Reflector,
    Role,
)
from scope_operator.plan.addresses import Assigned, assign_addresses, is_released, removed_at
from scope_operator.plan.conditions import AddressConflict, RouteConflict, peer_conditions

ALIVE = 180.0  # seconds that a heartbeat counts for: three of the agents', sent every 60 s


def plan_assignment(
    peer: Peer,
    *,
    mesh: Mesh | None,
    taken: Mapping[IPAddress, str],
    conflict: RouteConflict | None,
    role: Role,
    online: bool,
    wall: float,
    displaced: str = "",
) -> Assignment:
    """The registry side's part of a peer's status, equal to the present one when nothing is to be written.

    `displaced` is the Node that lacks a peer because this one has its name.
    """
    now = peer.assignment
    if now.tombstone is not None:
        gone = replace(now, online=False, last_seen=wall) if now.online else now
        return replace(gone, addresses=()) if is_released(peer, wall=wall) else gone
    # A mesh that is away may come back: its peers keep what they have.
    assigned = assign_addresses(mesh, peer, taken=taken) if mesh else Assigned(now.addresses)
    return Assignment(
        addresses=assigned.addresses,
        role=role,
        online=online,
        last_seen=wall if online != now.online else now.last_seen,
        conditions=peer_conditions(
            peer,
            mesh=mesh,
            lacks_address=bool(assigned.exhausted),
            conflict=conflict,
            online=online,
            wall=wall,
            displaced=displaced,
            role=role,
            moved=_moved(now.addresses, assigned.addresses, taken=taken, name=peer.meta.name),
        ),
    )


def _moved(
    had: tuple[IPInterface, ...],
    has: tuple[IPInterface, ...],
    *,
    taken: Mapping[IPAddress, str],
    name: str,
) -> AddressConflict | None:
    """The first address that the peer had and that is another's."""
    for address in (interface.ip for interface in had):
        holder = taken.get(address, name)
        if holder != name and address not in (interface.ip for interface in has):
            return AddressConflict(address, holder=f"ScopePeer {holder}")
    return None


def is_expired(peer: Peer, *, mesh: Mesh, wall: float) -> bool:
    """Whether a peer is to be deleted: offline, or removed, for longer than its mesh's `peerExpiry`."""
    removal = removed_at(peer)
    if removal is not None:
        return wall >= removal + mesh.spec.peer_expiry
    last_alive = max(peer.assignment.last_seen, peer.meta.created)
    return not peer.assignment.online and wall >= last_alive + mesh.spec.peer_expiry


def plan_mesh_status(
    mesh: Mesh,
    *,
    peers: Iterable[Peer],
    conditions: tuple[Condition, ...],
    signing_key: PublicKey | None,
    reflectors: tuple[Reflector, ...],
    gateway: GatewayOrigin | None = None,
    cluster: Cluster | None = None,
    hubs: tuple[HubChoice, ...] = (),
) -> MeshStatus:
    """The status of a mesh with these peers; `cluster` is the one whose Nodes are peers of it.

    A cluster's name is kept for the UID with which it first came.
    """
    clusters = mesh.status.clusters
    if cluster is not None and all(each.name != cluster.name for each in clusters):
        clusters = (*clusters, cluster)
    return MeshStatus(
        signing_key=signing_key,
        reflectors=reflectors,
        gateway=gateway,
        counts=count(peers),
        conditions=conditions,
        observed_generation=mesh.meta.generation,
        clusters=clusters,
        hubs=hubs,
    )


def count(peers: Iterable[Peer]) -> MeshCounts:
    """Totals over a mesh. Both ends of a link report it, so links are halved; half a link counts as one."""
    members = online = direct = relayed = unreachable = keyed = unkeyed = failed = 0
    are_keyed = False
    for peer in peers:
        if peer.assignment.tombstone is not None:
            continue
        members += 1
        online += peer.assignment.online
        if peer.report is not None and peer.assignment.online:
            direct += peer.report.direct
            relayed += peer.report.relayed
            unreachable += peer.report.unreachable
            if (keys := peer.report.post_quantum) is not None:
                are_keyed = True
                keyed, unkeyed, failed = keyed + keys.keyed, unkeyed + keys.unkeyed, failed + keys.failed
    keys = KeyCounts(*(-(-halves // 2) for halves in (keyed, unkeyed, failed)))
    return MeshCounts(
        members,
        online,
        direct=-(-direct // 2),
        relayed=-(-relayed // 2),
        unreachable=-(-unreachable // 2),
        post_quantum=keys if are_keyed else None,
    )
