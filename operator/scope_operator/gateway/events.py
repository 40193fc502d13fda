"""What happened, as CloudEvents: every change of a mesh or peer is exactly one event.

The type says what a reader wants to know of it: a peer that is new is a peerJoin, one whose published
endpoints changed a peerMove, one that was removed (its tombstone, then its deletion) a peerLeave, any other
change of a peer a peerConn, any change of a mesh a meshUpdate, any of an exported Service a serviceUpdate. A
sealed datagram that passes the courier travels as an event too, and belongs to no history. So does a
bookmark: it tells a stream from which changes were left out, since its reader does not act on them, up to
which revision it is.

Extensions of CloudEvents: `scoperevision`, the registry's number of the change (a string, as CloudEvents'
integers have 32 bits), and `scopedeleted`, true when the resource is gone and `data` is its last state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from scope.credentials import base64url
from scope.model import Kind, Mesh, Peer, PublicKey, Resource, Service, kind_of
from scope.projection import is_told, projected
from scope.registry.http import BOOKMARK, COURIER
from scope.registry.port import Deleted, Put
from scope.resources import to_dict

PEER_JOIN = "cc.ltgc.scope:peerJoin"
PEER_CONN = "cc.ltgc.scope:peerConn"
PEER_MOVE = "cc.ltgc.scope:peerMove"
PEER_LEAVE = "cc.ltgc.scope:peerLeave"
MESH_UPDATE = "cc.ltgc.scope:meshUpdate"
SERVICE_UPDATE = "cc.ltgc.scope:serviceUpdate"


@dataclass(frozen=True, slots=True)
class Event:
    """One change, rendered once for all its readers."""

    revision: int
    kind: Kind
    name: str
    uid: str
    mesh: str
    cluster: str  # whose Node the peer is; "" for an external one, and for what is no peer
    line: bytes  # the CloudEvent, ending with a line feed
    agent_line: bytes | None  # what agents of others are told; None: nothing that they act on
    removes: bool = False  # the peer has no business here any more


def type_of(change: Put | Deleted, before: Mesh | Peer | None) -> str:
    """The type of the event for `change` of a resource that was `before` (None: it was not there)."""
    match change:
        case Deleted(Service()) | Put(Service()):
            return SERVICE_UPDATE
        case Deleted(last):
            return MESH_UPDATE if isinstance(last, Mesh) else PEER_LEAVE
        case Put(Peer() as peer):
            if not isinstance(before, Peer) or before.meta.uid != peer.meta.uid:
                return PEER_LEAVE if peer.assignment.tombstone else PEER_JOIN
            if peer.assignment.tombstone != before.assignment.tombstone:
                return PEER_LEAVE
            endpoints = before.report.endpoints if before.report else ()
            if (peer.report.endpoints if peer.report else ()) != endpoints:
                return PEER_MOVE
            return PEER_CONN
        case Put():
            return MESH_UPDATE


def event_of(change: Put | Deleted, before: Mesh | Peer | None, *, time: str) -> Event:
    """The event for `change`; `time` is RFC 3339."""
    resource = change.last if isinstance(change, Deleted) else change.resource
    if not isinstance(resource, Mesh | Peer | Service):
        raise TypeError(f"a {kind_of(resource)} is never served")
    deleted = isinstance(change, Deleted)
    fields: dict[str, object] = {
        "specversion": "1.0",
        "id": str(change.revision.number),
        "source": f"/registries/{change.revision.registry}",
        "type": type_of(change, before),
        "subject": resource.meta.name,
        "time": time,
        "datacontenttype": "application/json",
        "scoperevision": str(change.revision.number),
    }
    if deleted:
        fields["scopedeleted"] = True
    line = _line(fields, resource)
    agent_line = None
    if not isinstance(resource, Service) and (deleted or is_told(before, resource)):
        less = projected(resource)
        agent_line = line if less == resource else _line(fields, less)
    return Event(
        revision=change.revision.number,
        kind=kind_of(resource),
        name=resource.meta.name,
        uid=resource.meta.uid,
        mesh=resource.meta.name if isinstance(resource, Mesh) else resource.spec.mesh,
        cluster=resource.spec.cluster if isinstance(resource, Peer) else "",
        line=line,
        agent_line=agent_line,
        removes=isinstance(resource, Peer) and (deleted or resource.assignment.tombstone is not None),
    )


def courier_line(registry: str, sender: PublicKey, datagram: bytes, *, number: int, time: str) -> bytes:
    """The event that brings a sealed datagram to its receiver's stream, ending with a line feed."""
    fields = {
        "specversion": "1.0",
        "id": f"courier-{number}",
        "source": f"/registries/{registry}",
        "type": COURIER,
        "time": time,
        "datacontenttype": "application/json",
        "data": {"sender": base64url(sender.raw), "datagram": base64url(datagram)},
    }
    return _line(fields)


def bookmark_line(registry: str, revision: int, *, time: str) -> bytes:
    """The event that says up to which revision its stream is, ending with a line feed."""
    fields = {
        "specversion": "1.0",
        "id": f"bookmark-{revision}",
        "source": f"/registries/{registry}",
        "type": BOOKMARK,
        "time": time,
        "scoperevision": str(revision),
    }
    return _line(fields)


def _line(fields: Mapping[str, object], resource: Resource | None = None) -> bytes:
    whole = fields if resource is None else {**fields, "data": to_dict(resource)}
    return json.dumps(whole, separators=(",", ":")).encode() + b"\n"
