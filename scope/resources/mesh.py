"""A ScopeMesh: its spec, and its status but for the clusters in it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from scope.model import (
    Addressing,
    Family,
    GatewayOrigin,
    Hubs,
    IPNetwork,
    Kind,
    Mesh,
    MeshCounts,
    MeshSpec,
    MeshStatus,
    PodNetworking,
    PostQuantum,
    PostQuantumMode,
    Reflector,
    Timers,
    TopologyMode,
)
from scope.resources.addresses import read_endpoint, read_mesh_ipv4, read_mesh_ipv6
from scope.resources.cluster import cluster_to_dict, read_cluster
from scope.resources.fields import Fields, each_once, unless_empty
from scope.resources.hubs import hub_choice_dict, hubs_dict, read_hub_choice, read_hubs
from scope.resources.keys import (
    key_counts_dict,
    post_quantum_dict,
    read_key_counts,
    read_post_quantum,
)
from scope.resources.limits import (
    MAX_CANDIDATES,
    MAX_CLUSTERS,
    MAX_EXPIRY,
    MAX_HUBS,
    MAX_PROBE,
    MAX_REFLECTORS,
    MAX_TIMER,
    MIN_EXPIRY,
    MIN_PROBE,
)
from scope.resources.meta import conditions_dict, read_conditions, read_meta
from scope.resources.pods import mesh_cluster_dict, read_mesh_cluster
from scope.resources.problems import Problem
from scope.resources.selector import read_selector, selector_dict
from scope.resources.times import format_duration
from scope.resources.values import (
    NO_KEY,
    read_base64,
    read_boolean,
    read_choice,
    read_count,
    read_device_name,
    read_duration,
    read_integer,
    read_key,
    read_mtu,
    read_origin,
)


def parse_mesh(document: object, *, ignore_unknown: bool = False) -> Mesh:
    """Read a ScopeMesh. Raises InvalidResource."""
    root = Fields.of(document, ignore_unknown=ignore_unknown)
    meta = read_meta(root, Kind.MESH)
    spec = _read_mesh_spec(root.sub("spec", required=True))
    status = read_mesh_status(root.sub("status"))
    root.done()
    return Mesh(meta, spec, status)


def overlapping(mesh: Mesh, others: Sequence[Mesh]) -> tuple[Problem, ...]:
    """The prefixes of `mesh` that another mesh uses too: a peer of both could not route."""
    return tuple(
        Problem(
            f"spec.addressing.ipv{ours.version}",
            f"{ours} overlaps {theirs} of ScopeMesh {other.meta.name}",
            "a prefix that no other mesh uses",
        )
        for other in others
        if other.meta.name != mesh.meta.name
        for ours in prefixes_of(mesh.spec.addressing)
        for theirs in prefixes_of(other.spec.addressing)
        if ours.version == theirs.version and ours.overlaps(theirs)
    )


def prefixes_of(addressing: Addressing) -> tuple[IPNetwork, ...]:
    """The one or two prefixes of a mesh."""
    return tuple(prefix for prefix in (addressing.ipv4, addressing.ipv6) if prefix is not None)


_USUAL_EXPIRY = MeshSpec(Addressing()).peer_expiry


def _read_mesh_spec(fields: Fields) -> MeshSpec:
    interface = fields.optional("existingInterface", read_device_name, "")
    addressing = fields.sub("addressing", required="existingInterface" not in fields.present())
    ipv4 = addressing.optional("ipv4", read_mesh_ipv4, None)
    ipv6 = addressing.optional("ipv6", read_mesh_ipv6, None)
    if fields.is_mapping("addressing") and not addressing.present() & {"ipv4", "ipv6"}:
        addressing.refuse("no prefix", "ipv4, ipv6 or both", 'for example ipv6: "fd5c:0be1:7a30::/64"')
    spec = MeshSpec(
        addressing=Addressing(ipv4, ipv6),
        topology=fields.optional(
            "topology", lambda value: read_choice(TopologyMode, value), TopologyMode.FULL
        ),
        prefer=fields.optional("prefer", lambda value: read_choice(Family, value), Family.IPV6),
        timers=_read_timers(fields.sub("timers")),
        listen_port=fields.optional("listenPort", lambda value: read_integer(value, 0, 65535), 0),
        mtu=fields.optional("mtu", read_mtu, None),
        peer_expiry=fields.optional(
            "peerExpiry", lambda value: read_duration(value, MIN_EXPIRY, MAX_EXPIRY), _USUAL_EXPIRY
        ),
        node_selector=read_selector(fields.sub("nodeSelector")),
        birthday=fields.optional("birthday", read_boolean, False),
        pod_networking=fields.optional(
            "podNetworking", lambda value: read_choice(PodNetworking, value), PodNetworking.OFF
        ),
        post_quantum=read_post_quantum(fields.sub("postQuantum")),
        existing_interface=interface,
        clusters=each_once(
            fields,
            "clusters",
            fields.parts("clusters", read_mesh_cluster, limit=MAX_CLUSTERS),
            key=lambda cluster: cluster.name,
        ),
    )
    if "existingInterface" in fields.present():
        _refuse_what_needs_a_device(fields, spec)
    # Who asks for no hubs may have WireGuard listen where hubs usually are reached.
    hubs = fields.sub_if_any("hubs")
    return replace(spec, hubs=read_hubs(hubs, listen_port=spec.listen_port)) if hubs else spec


def _refuse_what_needs_a_device(fields: Fields, spec: MeshSpec) -> None:
    """Beside `existingInterface`: what only the device of a mesh's own can be asked for."""
    for name, is_asked in (
        ("addressing", "addressing" in fields.present()),
        ("topology", spec.topology is not TopologyMode.FULL),
        ("prefer", spec.prefer is not Family.IPV6),
        ("listenPort", spec.listen_port != 0),
        ("mtu", spec.mtu is not None),
        ("birthday", spec.birthday),
        ("podNetworking", spec.pod_networking is not PodNetworking.OFF),
        ("clusters", "clusters" in fields.present()),
        ("hubs", "hubs" in fields.present()),
    ):
        if is_asked and not fields.refused(name):
            fields.refuse("not with existingInterface", "left out: its own manager sees to that", at=name)
    if spec.post_quantum.mode is not PostQuantumMode.PREFERRED and not fields.refused("postQuantum.mode"):
        fields.refuse(
            f"mode {spec.post_quantum.mode} with existingInterface",
            "mode: Preferred: keys are all that such a mesh gives, and traffic is not its to hold back",
            at="postQuantum",
        )


def _read_timers(fields: Fields) -> Timers:
    usual = Timers()

    def timer(name: str, default: float) -> float:
        return fields.optional(name, lambda value: read_duration(value, MIN_PROBE, MAX_TIMER), default)

    steps = {
        "probeInterval": fields.optional(
            "probeInterval", lambda value: read_duration(value, MIN_PROBE, MAX_PROBE), usual.probe_interval
        ),
        "addressFallback": timer("addressFallback", usual.address_fallback),
        "report": timer("report", usual.report),
        "connectBack": timer("connectBack", usual.connect_back),
        "hubFallback": timer("hubFallback", usual.hub_fallback),
    }
    for earlier, later in pairwise(steps):
        if steps[later] < steps[earlier] and not fields.refused(earlier, later):
            fields.refuse(
                f"{format_duration(steps[later])} is before {earlier} ({format_duration(steps[earlier])})",
                f"{format_duration(steps[earlier])} or later",
                at=later,
            )
    return Timers(*steps.values())


def read_mesh_status(fields: Fields) -> MeshStatus:
    """Read the status of a mesh."""
    return MeshStatus(
        signing_key=fields.optional("signingKey", read_key, None),
        reflectors=fields.parts("reflectors", _read_reflector, limit=MAX_REFLECTORS),
        gateway=_read_gateway(gateway) if (gateway := fields.sub_if_any("gateway")) else None,
        counts=_read_counts(fields.sub("counts")),
        conditions=read_conditions(fields),
        observed_generation=fields.optional(
            "observedGeneration", lambda value: read_integer(value, 0, 2**63 - 1), 0
        ),
        clusters=each_once(
            fields,
            "clusters",
            fields.parts("clusters", read_cluster, limit=MAX_CLUSTERS),
            key=lambda cluster: cluster.name,
        ),
        hubs=fields.parts("hubs", read_hub_choice, limit=MAX_HUBS),
    )


_COUNTS = ("peers", "online", "direct", "relayed", "unreachable")


def _read_counts(fields: Fields) -> MeshCounts:
    peers, online, direct, relayed, unreachable = (fields.optional(name, read_count, 0) for name in _COUNTS)
    keys = fields.sub_if_any("postQuantum")
    return MeshCounts(
        peers,
        online,
        direct=direct,
        relayed=relayed,
        unreachable=unreachable,
        post_quantum=read_key_counts(keys) if keys is not None else None,
    )


def _read_reflector(fields: Fields) -> Reflector:
    return Reflector(
        probe_key=fields.required("probeKey", read_key, NO_KEY),
        endpoints=fields.items("endpoints", read_endpoint, limit=MAX_CANDIDATES),
    )


def _read_gateway(fields: Fields) -> GatewayOrigin:
    return GatewayOrigin(
        url=fields.required("url", read_origin, ""),
        pin=fields.optional("pin", lambda value: read_base64(value, size=32), None),
    )


def mesh_spec_dict(spec: MeshSpec) -> dict[str, object]:
    """The document of a mesh's spec."""
    timers = spec.timers
    return {
        **({"addressing": addressing} if (addressing := _addressing_dict(spec.addressing)) else {}),
        **({"existingInterface": spec.existing_interface} if spec.existing_interface else {}),
        "topology": str(spec.topology),
        "prefer": str(spec.prefer),
        "timers": {
            "probeInterval": format_duration(timers.probe_interval),
            "addressFallback": format_duration(timers.address_fallback),
            "report": format_duration(timers.report),
            "connectBack": format_duration(timers.connect_back),
            "hubFallback": format_duration(timers.hub_fallback),
        },
        "listenPort": spec.listen_port,
        "mtu": "Auto" if spec.mtu is None else spec.mtu,
        "peerExpiry": format_duration(spec.peer_expiry),
        "birthday": spec.birthday,
        "podNetworking": str(spec.pod_networking),
        **({"nodeSelector": selector} if (selector := selector_dict(spec.node_selector)) else {}),
        **({"hubs": hubs_dict(spec.hubs)} if spec.hubs != Hubs() else {}),
        **({"clusters": [*map(mesh_cluster_dict, spec.clusters)]} if spec.clusters else {}),
        **(
            {"postQuantum": post_quantum_dict(spec.post_quantum)}
            if spec.post_quantum != PostQuantum()
            else {}
        ),
    }


def _addressing_dict(addressing: Addressing) -> dict[str, str]:
    return {f"ipv{prefix.version}": str(prefix) for prefix in prefixes_of(addressing)}


def mesh_status_dict(status: MeshStatus) -> dict[str, object]:
    """The document of a mesh's status."""
    # A zero is written out: kubectl shows what is not there as a blank, which could mean anything.
    counts: dict[str, object] = {}
    if status != MeshStatus():
        counts = {name: getattr(status.counts, name) for name in _COUNTS}
    if status.counts.post_quantum is not None:
        counts["postQuantum"] = key_counts_dict(status.counts.post_quantum)
    reflectors = [
        {"probeKey": str(reflector.probe_key), **unless_empty("endpoints", reflector.endpoints)}
        for reflector in status.reflectors
    ]
    return {
        **({"signingKey": str(status.signing_key)} if status.signing_key else {}),
        **({"reflectors": reflectors} if reflectors else {}),
        **({"gateway": _gateway_dict(status.gateway)} if status.gateway else {}),
        **({"counts": counts} if counts else {}),
        **conditions_dict(status.conditions),
        **({"observedGeneration": status.observed_generation} if status.observed_generation else {}),
        **({"clusters": [cluster_to_dict(each) for each in status.clusters]} if status.clusters else {}),
        **({"hubs": [hub_choice_dict(each) for each in status.hubs]} if status.hubs else {}),
    }


def _gateway_dict(gateway: GatewayOrigin) -> dict[str, object]:
    pin = {} if gateway.pin is None else {"pin": base64.b64encode(gateway.pin).decode()}
    return {"url": gateway.url, **pin}
