"""A ScopePeer: its spec, the two parts of its status, and the tombstone that ends it."""

from __future__ import annotations

import base64

from scope import model
from scope.model import (
    Assignment,
    Candidate,
    CandidateKind,
    DeviceKind,
    Forwarding,
    HubCarrier,
    Kind,
    Link,
    Mesh,
    PathKind,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    RelayReport,
    Resource,
    Role,
    Service,
    Tombstone,
)
from scope.resources.addresses import (
    NO_ENDPOINT,
    read_address,
    read_endpoint,
    read_interface,
    read_route,
    read_static_endpoint,
)
from scope.resources.fields import Fields, unless_empty
from scope.resources.keys import (
    key_counts_dict,
    link_psk_dict,
    read_fingerprint,
    read_key_counts,
    read_link_psk,
)
from scope.resources.limits import MAX_ADDRESSES, MAX_CANDIDATES, MAX_LINKS, MAX_REASON, MAX_ROUTES
from scope.resources.meta import conditions_dict, read_conditions, read_meta
from scope.resources.pods import pod_prefix_dict, read_pod_prefix
from scope.resources.problems import Problem, show
from scope.resources.service import changed_identity
from scope.resources.times import format_time
from scope.resources.values import (
    NO_KEY,
    read_base64,
    read_boolean,
    read_choice,
    read_cluster_name,
    read_count,
    read_integer,
    read_key,
    read_label,
    read_latency,
    read_object_uid,
    read_subdomain,
    read_text,
    read_time,
    read_uid,
)


def parse_peer(document: object, *, ignore_unknown: bool = False) -> Peer:
    """Read a ScopePeer. Raises InvalidResource."""
    root = Fields.of(document, ignore_unknown=ignore_unknown)
    meta = read_meta(root, Kind.PEER)
    spec = _read_peer_spec(root.sub("spec", required=True))
    status = root.sub("status")
    report = read_report(status) if REPORT_FIELDS & status.present() else None
    assignment = read_assignment(status)
    if report is None:
        status.expected |= REPORT_FIELDS
    root.done()
    return Peer(meta, spec, report, assignment)


def parse_tombstone(document: object) -> Tombstone:
    """Read a tombstone that stands alone (on an agent's disk). Raises InvalidResource."""
    fields = Fields.of(document, path="tombstone", ignore_unknown=True)
    tombstone = _read_tombstone(fields)
    fields.done()
    return tombstone


def tombstone_to_dict(tombstone: Tombstone) -> dict[str, object]:
    """The document of a tombstone."""
    return {
        "meshUID": tombstone.mesh_uid,
        "peerUID": tombstone.peer_uid,
        "key": str(tombstone.key),
        "signer": str(tombstone.signer),
        "signature": base64.b64encode(tombstone.signature).decode(),
    }


def forbidden_changes(stored: Resource, asked: Resource) -> tuple[Problem, ...]:
    """What `asked` changes in the spec of `stored` that never changes.

    Who a peer is, and of which mesh; on which interface a mesh is; of which Service a record is.
    """
    if isinstance(stored, Service) and isinstance(asked, Service):
        return changed_identity(stored, asked)
    if isinstance(stored, Mesh) and isinstance(asked, Mesh):
        return _forbidden_of_mesh(stored, asked)
    if not isinstance(stored, Peer) or not isinstance(asked, Peer):
        return ()
    had, wanted = peer_spec_dict(stored.spec), peer_spec_dict(asked.spec)
    return tuple(
        Problem(
            f"spec.{name}",
            f"{show(wanted.get(name, ''))} is another than {show(had.get(name, ''))}",
            "no change: another mesh or Node is another peer",
            "delete this ScopePeer and create another",
        )
        for name in ("mesh", "cluster", "nodeName", "nodeUID")
        if had.get(name) != wanted.get(name)
    )


def _forbidden_of_mesh(stored: Mesh, asked: Mesh) -> tuple[Problem, ...]:
    had, wanted = stored.spec.existing_interface, asked.spec.existing_interface
    if had == wanted:
        return ()
    return (
        Problem(
            "spec.existingInterface",
            f"{show(wanted)} is another than {show(had)}",
            "no change: its peers are known by the keys of their devices",
            "make another ScopeMesh",
        ),
    )


REPORT_FIELDS = frozenset(
    {
        *("keys", "endpoints", "mapping", "device", "links", "direct", "relayed", "unreachable"),
        *("heldAddresses", "protocol", "relay", "hub", "identity", "postQuantum", "left"),
        "podsTrouble",
    }
)


def _read_peer_spec(fields: Fields) -> PeerSpec:
    node = _NODE_FIELDS & fields.present()
    if node and node != _NODE_FIELDS:
        fields.refuse(
            f"{', '.join(sorted(node))} without {', '.join(sorted(_NODE_FIELDS - node))}",
            "all three for the peer of a Kubernetes Node, none for an external peer",
        )
    if "leaving" in fields.present() and not node:
        fields.refuse("leaving without nodeName", "no leaving: run scope-agent leave on that machine")
    return PeerSpec(
        mesh=fields.required("mesh", read_label, ""),
        role=fields.optional("role", lambda value: read_choice(Role, value), Role.AUTO),
        routes=fields.items("routes", read_route, limit=MAX_ROUTES),
        pod_prefixes=fields.parts("podPrefixes", read_pod_prefix, limit=MAX_ROUTES),
        endpoints=fields.items("endpoints", read_static_endpoint, limit=MAX_CANDIDATES),
        cluster=fields.optional("cluster", read_cluster_name, ""),
        node_name=fields.optional("nodeName", read_subdomain, ""),
        node_uid=fields.optional("nodeUID", read_object_uid, ""),
        leaving=fields.optional("leaving", read_boolean, False),
    )


_NODE_FIELDS = frozenset({"cluster", "nodeName", "nodeUID"})


def read_report(fields: Fields) -> PeerReport:
    """Read the agent's part of a status."""
    keys = fields.sub("keys", required=True)
    return PeerReport(
        keys=PeerKeys(
            wireguard=keys.required("wireGuard", read_key, NO_KEY),
            probe=keys.required("probe", read_key, NO_KEY),
            signing=keys.required("signing", read_key, NO_KEY),
        ),
        endpoints=fields.parts("endpoints", _read_candidate, limit=MAX_CANDIDATES),
        mapping=fields.optional(
            "mapping", lambda value: read_choice(model.Mapping, value), model.Mapping.UNKNOWN
        ),
        device=fields.optional("device", lambda value: read_choice(DeviceKind, value), None),
        links=fields.parts("links", _read_link, limit=MAX_LINKS),
        direct=fields.optional("direct", read_count, 0),
        relayed=fields.optional("relayed", read_count, 0),
        unreachable=fields.optional("unreachable", read_count, 0),
        held_addresses=fields.items("heldAddresses", read_address, limit=MAX_ADDRESSES),
        protocol=fields.optional("protocol", lambda value: read_integer(value, 1, 255), 1),
        relay=_read_relay(relay) if (relay := fields.sub_if_any("relay")) else None,
        hub=fields.optional("hub", read_subdomain, ""),
        identity=fields.optional("identity", read_fingerprint, None),
        post_quantum=read_key_counts(counts) if (counts := fields.sub_if_any("postQuantum")) else None,
        left=fields.optional("left", read_boolean, False),
        pods_trouble=fields.optional("podsTrouble", lambda value: read_text(value, MAX_REASON), ""),
    )


def _read_relay(fields: Fields) -> RelayReport:
    return RelayReport(
        forwarding=fields.required(
            "forwarding", lambda value: read_choice(Forwarding, value), Forwarding.NONE
        ),
        pairs=fields.optional("pairs", read_count, 0),
        refused=fields.optional("refused", read_count, 0),
        reason=fields.optional("reason", lambda value: read_text(value, MAX_REASON), ""),
        unrouted=fields.optional("unrouted", lambda value: read_text(value, MAX_REASON), ""),
        carrier=_read_carrier(carrier) if (carrier := fields.sub_if_any("carrier")) else None,
    )


def _read_carrier(fields: Fields) -> HubCarrier:
    return HubCarrier(
        port=fields.required("port", lambda value: read_integer(value, 1, 65535), 1),
        pin=fields.required("pin", lambda value: read_base64(value, size=32), b""),
        reason=fields.optional("reason", lambda value: read_text(value, MAX_REASON), ""),
    )


def _read_candidate(fields: Fields) -> Candidate:
    return Candidate(
        endpoint=fields.required("endpoint", read_endpoint, NO_ENDPOINT),
        kind=fields.required("kind", lambda value: read_choice(CandidateKind, value), CandidateKind.HOST),
    )


def _read_link(fields: Fields) -> Link:
    return Link(
        peer=fields.required("peer", read_subdomain, ""),
        path=fields.required("path", lambda value: read_choice(PathKind, value), PathKind.NONE),
        endpoint=fields.optional("endpoint", read_endpoint, None),
        observed=fields.optional("observed", read_endpoint, None),
        latency=fields.optional("latencyMs", read_latency, None),
        reason=fields.optional("reason", lambda value: read_text(value, MAX_REASON), ""),
        hub=fields.optional("hub", read_subdomain, ""),
        user_space=fields.optional("userSpace", read_boolean, False),
        birthday=fields.optional("birthday", read_boolean, False),
        carried=fields.optional("carried", read_boolean, False),
        psk=read_link_psk(psk) if (psk := fields.sub_if_any("psk")) else None,
    )


def read_assignment(fields: Fields) -> Assignment:
    """Read the registry's part of a status."""
    return Assignment(
        addresses=fields.items("addresses", read_interface, limit=MAX_ADDRESSES),
        role=fields.optional("role", lambda value: read_choice(Role, value), Role.EDGE),
        online=fields.optional("online", read_boolean, False),
        last_seen=fields.optional("lastSeen", read_time, 0.0),
        conditions=read_conditions(fields),
        tombstone=_read_tombstone(fields.sub("tombstone")) if "tombstone" in fields.present() else None,
    )


def _read_tombstone(fields: Fields) -> Tombstone:
    return Tombstone(
        mesh_uid=fields.required("meshUID", read_uid, ""),
        peer_uid=fields.required("peerUID", read_uid, ""),
        key=fields.required("key", read_key, NO_KEY),
        signer=fields.required("signer", read_key, NO_KEY),
        signature=fields.required("signature", lambda value: read_base64(value, size=64), b""),
    )


def peer_spec_dict(spec: PeerSpec) -> dict[str, object]:
    """The document of a peer's spec."""
    return {
        "mesh": spec.mesh,
        "role": str(spec.role),
        **unless_empty("routes", spec.routes),
        **({"podPrefixes": prefixes} if (prefixes := [*map(pod_prefix_dict, spec.pod_prefixes)]) else {}),
        **unless_empty("endpoints", spec.endpoints),
        **({"cluster": spec.cluster} if spec.cluster else {}),
        **({"nodeName": spec.node_name} if spec.node_name else {}),
        **({"nodeUID": spec.node_uid} if spec.node_uid else {}),
        **({"leaving": True} if spec.leaving else {}),
    }


def report_dict(report: PeerReport) -> dict[str, object]:
    """The document of the agent's part of a status."""
    keys = report.keys
    return {
        "keys": {"wireGuard": str(keys.wireguard), "probe": str(keys.probe), "signing": str(keys.signing)},
        **(
            {"endpoints": [{"endpoint": str(c.endpoint), "kind": str(c.kind)} for c in report.endpoints]}
            if report.endpoints
            else {}
        ),
        "mapping": str(report.mapping),
        **({"device": str(report.device)} if report.device else {}),
        **({"links": [_link_dict(link) for link in report.links]} if report.links else {}),
        "direct": report.direct,
        "relayed": report.relayed,
        "unreachable": report.unreachable,
        **unless_empty("heldAddresses", report.held_addresses),
        "protocol": report.protocol,
        **({"relay": _relay_dict(report.relay)} if report.relay else {}),
        **({"hub": report.hub} if report.hub else {}),
        **({"identity": str(report.identity)} if report.identity is not None else {}),
        **({"postQuantum": key_counts_dict(report.post_quantum)} if report.post_quantum is not None else {}),
        **({"left": True} if report.left else {}),
        **({"podsTrouble": report.pods_trouble} if report.pods_trouble else {}),
    }


def _relay_dict(relay: RelayReport) -> dict[str, object]:
    return {
        "forwarding": str(relay.forwarding),
        "pairs": relay.pairs,
        "refused": relay.refused,
        **({"reason": relay.reason} if relay.reason else {}),
        **({"unrouted": relay.unrouted} if relay.unrouted else {}),
        **({"carrier": _carrier_dict(relay.carrier)} if relay.carrier else {}),
    }


def _carrier_dict(carrier: HubCarrier) -> dict[str, object]:
    return {
        "port": carrier.port,
        "pin": base64.b64encode(carrier.pin).decode(),
        **({"reason": carrier.reason} if carrier.reason else {}),
    }


def _link_dict(link: Link) -> dict[str, object]:
    latency = None if link.latency is None else round(link.latency * 1_000_000) / 1000
    return {
        "peer": link.peer,
        "path": str(link.path),
        **({"endpoint": str(link.endpoint)} if link.endpoint else {}),
        **({"observed": str(link.observed)} if link.observed else {}),
        **({"latencyMs": latency} if latency is not None else {}),
        **({"reason": link.reason} if link.reason else {}),
        **({"hub": link.hub} if link.hub else {}),
        **({"userSpace": True} if link.user_space else {}),
        **({"birthday": True} if link.birthday else {}),
        **({"carried": True} if link.carried else {}),
        **({"psk": link_psk_dict(link.psk)} if link.psk is not None else {}),
    }


def assignment_dict(assignment: Assignment) -> dict[str, object]:
    """The document of the registry's part of a status."""
    tombstone = assignment.tombstone
    document: dict[str, object] = {
        **unless_empty("addresses", assignment.addresses),
        "role": str(assignment.role),
        "online": assignment.online,
        **({"lastSeen": format_time(assignment.last_seen)} if assignment.last_seen else {}),
        **conditions_dict(assignment.conditions),
    }
    if tombstone is not None:
        document["tombstone"] = tombstone_to_dict(tombstone)
    return document
