"""A resource of any kind, and one writer's part of a status of any kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from scope.model import (
    Assignment,
    JoinToken,
    Kind,
    Mesh,
    MeshStatus,
    Peer,
    PeerReport,
    Resource,
    Service,
    StatusPart,
    kind_of,
)
from scope.resources.fields import Fields
from scope.resources.limits import MAX_LINKS, MAX_STATUS_BYTES
from scope.resources.mesh import mesh_spec_dict, mesh_status_dict, parse_mesh, read_mesh_status
from scope.resources.meta import API_VERSION, meta_dict
from scope.resources.peer import (
    REPORT_FIELDS,
    assignment_dict,
    parse_peer,
    peer_spec_dict,
    read_assignment,
    read_report,
    report_dict,
)
from scope.resources.problems import InvalidResource, Problem
from scope.resources.service import parse_service, service_spec_dict
from scope.resources.token import parse_token, token_spec_dict
from scope.resources.values import read_choice


def parse(document: object, *, ignore_unknown: bool = False) -> Resource:
    """Read a resource of any kind. Raises InvalidResource with every problem of the document."""
    kind = document.get("kind") if isinstance(document, Mapping) else None
    match kind:
        case Kind.PEER:
            return parse_peer(document, ignore_unknown=ignore_unknown)
        case Kind.SERVICE:
            return parse_service(document, ignore_unknown=ignore_unknown)
        case Kind.TOKEN:
            return parse_token(document, ignore_unknown=ignore_unknown)
        case Kind.MESH:
            return parse_mesh(document, ignore_unknown=ignore_unknown)
    root = Fields.of(document, ignore_unknown=True)
    root.required("kind", lambda value: read_choice(Kind, value), Kind.MESH)
    root.done()
    raise AssertionError("an unknown kind is a problem")


def parse_status(kind: Kind, document: object, *, ignore_unknown: bool = False) -> StatusPart:
    """Read one writer's part of a status. Of a peer's, one with any of the agent's fields is a PeerReport.

    Paths in the refusals start at `status`. Raises InvalidResource.
    """
    fields = Fields.of(document, path="status", ignore_unknown=ignore_unknown)
    part: StatusPart
    match kind:
        case Kind.MESH:
            part = read_mesh_status(fields)
        case Kind.PEER:
            part = read_report(fields) if REPORT_FIELDS & fields.present() else read_assignment(fields)
        case Kind.SERVICE | Kind.TOKEN:
            raise InvalidResource([Problem("kind", f"{kind} has no status", "ScopeMesh, ScopePeer")])
        case _:
            assert_never(kind)
    fields.done()
    return part


def to_dict(resource: Resource) -> dict[str, object]:
    """The resource as a dictionary of JSON values; `parse` reads it back to an equal value."""
    spec: dict[str, object]
    status: dict[str, object] = {}
    match resource:
        case Mesh():
            spec, status = mesh_spec_dict(resource.spec), status_to_dict(resource.status)
        case Peer():
            spec, status = peer_spec_dict(resource.spec), status_to_dict(resource.assignment)
            if resource.report is not None:
                status = status_to_dict(resource.report) | status
        case Service():
            spec = service_spec_dict(resource.spec)
        case JoinToken():
            spec = token_spec_dict(resource.spec)
        case _:
            assert_never(resource)
    document: dict[str, object] = {
        "apiVersion": API_VERSION,
        "kind": str(kind_of(resource)),
        "metadata": meta_dict(resource.meta),
        "spec": spec,
    }
    if status:
        document["status"] = status
    return document


def status_to_dict(part: StatusPart) -> dict[str, object]:
    """One writer's part of a status as a dictionary; `parse_status` reads it back to an equal value."""
    match part:
        case MeshStatus():
            return mesh_status_dict(part)
        case PeerReport():
            return report_dict(part)
        case Assignment():
            return assignment_dict(part)
        case _:
            assert_never(part)


def fit_report(report: PeerReport, limit: int = MAX_STATUS_BYTES) -> PeerReport:
    """The report with as many of its first links as `limit` bytes of compact JSON hold; counts stay whole.

    One that has no room for any says less of its pods, a hub of why it relays as it does.
    """
    fitted = replace(report, links=report.links[:MAX_LINKS])
    while fitted.links and status_bytes(fitted) > limit:
        fitted = replace(fitted, links=fitted.links[:-1])
    while fitted.pods_trouble and status_bytes(fitted) > limit:
        fitted = replace(fitted, pods_trouble=fitted.pods_trouble[:-1])
    while fitted.relay and fitted.relay.reason and status_bytes(fitted) > limit:
        fitted = replace(fitted, relay=replace(fitted.relay, reason=fitted.relay.reason[:-1]))
    while fitted.relay and len(fitted.relay.unrouted) > 1 and status_bytes(fitted) > limit:
        # One character at least: an empty reason would say that it forwards.
        fitted = replace(fitted, relay=replace(fitted.relay, unrouted=fitted.relay.unrouted[:-1]))
    while fitted.relay and (carrier := fitted.relay.carrier) and status_bytes(fitted) > limit:
        if len(carrier.reason) < 2:  # an empty one would say that it listens
            break
        shorter = replace(carrier, reason=carrier.reason[:-1])
        fitted = replace(fitted, relay=replace(fitted.relay, carrier=shorter))
    return fitted


def status_bytes(part: StatusPart) -> int:
    """The size of a part of a status as compact JSON."""
    return len(json.dumps(status_to_dict(part), separators=(",", ":"), ensure_ascii=False).encode())
