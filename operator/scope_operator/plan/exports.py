"""Which record of an exported Service should stand in the registry: pure.

A cluster's operator looks at one Service of its own at a time, with the EndpointSlices that its control plane
keeps for it, and compares what the other clusters should know of them with the record that stands in each
mesh that the cluster is in. Only records of the own cluster are ever written.

The pods' addresses stand in a record as their own cluster knows them. Whoever imports them translates them,
so a change of the translation needs nobody's new record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from scope.model import (
    Backend,
    EndpointState,
    Family,
    Meta,
    Service,
    ServiceEndpoint,
    ServicePort,
    ServiceSpec,
)
from scope.names import imported_name, service_name
from scope.resources import MAX_BACKENDS, MAX_LABEL, MAX_SERVICE_ENDPOINTS, MAX_SERVICE_PORTS

EXPORT = "scope.ltgc.cc/export"  # the annotation that asks for it
YES, NO = ("", "true"), "false"
# What a record has room for is given to the pods that serve first.
_BY_USE = (EndpointState.READY, EndpointState.DRAINING, EndpointState.NOT_READY)


@dataclass(frozen=True, slots=True)
class LocalService:
    """A Service of this cluster. `export` is its annotation; None: it has none."""

    namespace: str
    name: str
    uid: str
    export: str | None
    is_import: bool  # it stands for another cluster's Service
    is_external: bool  # of type ExternalName: nothing but a name
    headless: bool
    families: tuple[Family, ...]
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class Complaint:
    """Why a Service is not there as asked, or not all of it: `reason` is one word, as Events have it."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class CreateRecord:
    """A record that is missing."""

    service: Service


@dataclass(frozen=True, slots=True)
class UpdateRecord:
    """A record that says something else."""

    service: Service


@dataclass(frozen=True, slots=True)
class DeleteRecord:
    """A record of what is no longer exported."""

    service: Service


RecordAction: TypeAlias = CreateRecord | UpdateRecord | DeleteRecord


def plan_export(
    service: LocalService | None,
    backends: Iterable[Backend],
    *,
    cluster: str,
    stored: Mapping[str, Service | None],
) -> tuple[tuple[RecordAction, ...], Complaint | None]:
    """What to write for a Service that is as given (None: it is gone), and what stands against it.

    `backends` are its EndpointSlices; `stored` has, for each mesh that this cluster is in, the record that
    stands there.
    """
    spec, complaint = (None, None) if service is None else _wanted(service, backends, cluster=cluster)
    actions: list[RecordAction] = []
    for mesh, record in sorted(stored.items()):
        if spec is None:
            if record is not None:
                actions.append(DeleteRecord(record))
            continue
        wanted = replace(spec, mesh=mesh)
        if record is None:
            name = service_name(mesh, cluster, wanted.namespace, wanted.service)
            actions.append(CreateRecord(Service(Meta(name), wanted)))
        elif record.spec != wanted:
            actions.append(UpdateRecord(replace(record, spec=wanted)))
    return tuple(actions), complaint


def _wanted(
    service: LocalService, backends: Iterable[Backend], *, cluster: str
) -> tuple[ServiceSpec | None, Complaint | None]:
    """The record, for a mesh that is filled in later, and what it lacks."""
    if service.export is None or service.export == NO:
        return None, None
    if refusal := _refusal(service, cluster):
        return None, Complaint("NotExported", refusal)
    grouped = _grouped(backends)
    kept = _bounded(grouped)
    total, left = (sum(len(each.endpoints) for each in some) for some in (grouped, kept))
    complaint = None
    if left < total:
        complaint = Complaint(
            "EndpointsLeftOut",
            f"the other clusters know {left} of {total} endpoints, those that are ready first: a Service may "
            f"have {MAX_SERVICE_ENDPOINTS} in {MAX_BACKENDS} kinds of ports",
        )
    spec = ServiceSpec(
        mesh="",
        cluster=cluster,
        namespace=service.namespace,
        service=service.name,
        headless=service.headless,
        families=service.families,
        ports=tuple(sorted(service.ports, key=_port_order)),
        backends=kept,
    )
    return spec, complaint


def _refusal(service: LocalService, cluster: str) -> str:
    """Why a Service that asks for it cannot be exported; "" where it can."""
    if service.export not in YES:
        return f'the annotation {EXPORT} is "true" or "false", not {service.export!r}: change it'
    if service.is_import:
        return "it stands for a Service of another cluster: export it there"
    if service.is_external:
        return "it is of type ExternalName, which has no endpoints: make one of that type in each cluster"
    name = imported_name(service.name, cluster)
    if len(name) > MAX_LABEL:
        return (
            f"elsewhere it would be called {name}, and the name of a Service has at most {MAX_LABEL} "
            f"characters: give it one of at most {MAX_LABEL - len(cluster) - 1}"
        )
    if not service.ports and not service.headless:
        return "it has no ports: give it one"
    if len(service.ports) > MAX_SERVICE_PORTS:
        return f"it has {len(service.ports)} ports, and may have {MAX_SERVICE_PORTS}: split it"
    return ""


def _grouped(backends: Iterable[Backend]) -> tuple[Backend, ...]:
    """The endpoints by their ports, each once, whatever slices they came in, in an order of their own.

    An address that two slices name while it moves from one to the other is as good as the better of the two.
    """
    groups: dict[tuple[ServicePort, ...], dict[str, ServiceEndpoint]] = {}
    for backend in backends:
        group = groups.setdefault(tuple(sorted(backend.ports, key=_port_order)), {})
        for endpoint in backend.endpoints:
            other = group.get(str(endpoint.address), endpoint)
            group[str(endpoint.address)] = min(endpoint, other, key=lambda each: _BY_USE.index(each.state))
    return tuple(
        Backend(ports, tuple(sorted(group.values(), key=_endpoint_order)))
        for ports, group in sorted(groups.items(), key=lambda item: tuple(map(_port_order, item[0])))
        if group and len(ports) <= MAX_SERVICE_PORTS
    )


def _bounded(backends: tuple[Backend, ...]) -> tuple[Backend, ...]:
    """As many of these as a record has room for."""
    kept = sorted(backends, key=lambda each: -len(each.endpoints))[:MAX_BACKENDS]
    every = [
        (_BY_USE.index(end.state), str(end.address), i) for i, b in enumerate(kept) for end in b.endpoints
    ]
    if len(kept) == len(backends) and len(every) <= MAX_SERVICE_ENDPOINTS:
        return backends
    chosen = {(i, address) for _, address, i in sorted(every)[:MAX_SERVICE_ENDPOINTS]}
    fitted = (
        Backend(each.ports, tuple(end for end in each.endpoints if (i, str(end.address)) in chosen))
        for i, each in enumerate(kept)
    )
    return tuple(each for each in fitted if each.endpoints)


def _port_order(port: ServicePort) -> tuple[str, str, int, str]:
    return port.name, port.protocol, port.port, port.app_protocol


def _endpoint_order(endpoint: ServiceEndpoint) -> tuple[int, int]:
    return endpoint.address.version, int(endpoint.address)
