"""Which Service and EndpointSlices should stand in this cluster for another cluster's Service: pure.

A Service called NAME of cluster CLUSTER is `NAME-CLUSTER` here, in the namespace of the same name: without a
selector, its endpoints written by us. What is ours is known by a label and by the annotation that names the
record it was made from; a Service without them is somebody else's, and nothing of it is changed.

Two records may ask for one name (`a-b` of `c`, `a` of `b-c`). The one that has it keeps it.

Each pod stays in the slice that its address leads to, so that one pod that comes or goes changes one slice,
and kube-proxy on every Node reads a hundred endpoints and not a thousand.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from scope.model import Family, IPAddress, Mesh, Service, ServiceEndpoint, ServicePort
from scope.names import imported_name
from scope.translation import seen_address, translations_of
from scope_operator.plan.exports import Complaint

IMPORTED = "scope.ltgc.cc/imported-from"  # label: the cluster
MESH = "scope.ltgc.cc/mesh"  # annotation: the mesh by which it came
SOURCE = "scope.ltgc.cc/source"  # annotation: the ScopeService that it was made from
SLICE_SIZE = 100  # endpoints on average, as Kubernetes' own controller has it
DIGEST_LETTERS = 10  # of a slice's name, which tells its ports, family and share


def as_seen_here(address: IPAddress, *, exporter: str, mesh: Mesh | None) -> IPAddress:
    """A pod's address of cluster `exporter` as this cluster reaches it by the mesh."""
    return address if mesh is None else seen_address(address, translations_of(mesh, exporter))


@dataclass(frozen=True, slots=True)
class HeldService:
    """A Service of the wanted name that is there. `source` "": somebody else's."""

    uid: str
    source: str
    headless: bool
    families: tuple[Family, ...]
    dual: bool  # it may have an address of each family
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """An EndpointSlice as it should be, or is."""

    name: str
    family: Family
    ports: tuple[ServicePort, ...]
    endpoints: tuple[ServiceEndpoint, ...]


@dataclass(frozen=True, slots=True)
class HeldSlice:
    """An EndpointSlice of ours that is there; `owner` is the UID of the Service that it goes with."""

    slice: Slice
    uid: str
    revision: str
    owner: str


@dataclass(frozen=True, slots=True)
class CreateService:
    """Make the Service for a record."""

    record: Service


@dataclass(frozen=True, slots=True)
class ChangePorts:
    """Give our Service the record's ports."""

    uid: str
    ports: tuple[ServicePort, ...]


@dataclass(frozen=True, slots=True)
class DeleteService:
    """Our Service goes."""

    uid: str


@dataclass(frozen=True, slots=True)
class CreateSlice:
    """Make a slice of the Service with UID `owner`."""

    slice: Slice
    owner: str


@dataclass(frozen=True, slots=True)
class ChangeSlice:
    """Give a slice of ours other endpoints; its ports and family never change."""

    held: HeldSlice
    endpoints: tuple[ServiceEndpoint, ...]


@dataclass(frozen=True, slots=True)
class DeleteSlice:
    """A slice of ours goes."""

    held: HeldSlice


ImportAction: TypeAlias = (
    CreateService | ChangePorts | DeleteService | CreateSlice | ChangeSlice | DeleteSlice
)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What to do now. After a `CreateService` or `DeleteService` it is planned again: slices follow it."""

    actions: tuple[ImportAction, ...] = ()
    complaint: Complaint | None = None


def plan_import(
    offers: Sequence[Service],
    held: HeldService | None,
    slices: Sequence[HeldSlice],
    *,
    meshes: Mapping[str, Mesh],
) -> ImportPlan:
    """What to do about one name in one namespace, for which `offers` ask; their `meshes` by name."""
    gone = tuple(DeleteSlice(each) for each in slices)
    if held is not None and not held.source:
        return ImportPlan(gone, _taken(offers[0]) if offers else None)
    chosen = _chosen(offers, held)
    if chosen is None:
        return ImportPlan((*gone, *((DeleteService(held.uid),) if held is not None else ())))
    others = [each for each in offers if each is not chosen]
    complaint = _contested(chosen, others[0]) if others else None
    if held is None:
        return ImportPlan((*gone, CreateService(chosen)), complaint)
    if held.source != chosen.meta.name or not _fits(held, chosen):
        # What a Service cannot change: it is made anew, with another address.
        return ImportPlan((*gone, DeleteService(held.uid)), complaint)
    actions: list[ImportAction] = []
    if set(held.ports) != set(chosen.spec.ports):
        actions.append(ChangePorts(held.uid, chosen.spec.ports))
    actions.extend(_slice_actions(_slices(chosen, meshes.get(chosen.spec.mesh)), slices, owner=held.uid))
    return ImportPlan(tuple(actions), complaint)


def _taken(offer: Service) -> Complaint:
    spec = offer.spec
    return Complaint(
        "NameTaken",
        f"Service {spec.service} of cluster {spec.cluster} cannot be offered here: a Service "
        f"{imported_name(spec.service, spec.cluster)} that is not Scope's is in its place: rename that one",
    )


def _contested(chosen: Service, other: Service) -> Complaint:
    mine, theirs = chosen.spec, other.spec
    return Complaint(
        "NameTaken",
        f"Service {theirs.service} of cluster {theirs.cluster} cannot be offered here, since "
        f"{mine.service} of cluster {mine.cluster} has the same name: rename one of them",
    )


def _chosen(offers: Sequence[Service], held: HeldService | None) -> Service | None:
    """Whose the name is: the incumbent's, else the first one's."""
    ordered = sorted(offers, key=lambda each: each.meta.name)
    kept = [each for each in ordered if held is not None and each.meta.name == held.source]
    return next(iter(kept or ordered), None)


def _fits(held: HeldService, record: Service) -> bool:
    """Whether a Service is of the kind that the record asks for, which is for life."""
    families = record.spec.families
    if held.headless != record.spec.headless or held.dual != (len(families) > 1):
        return False
    return len(families) != 1 or held.families == families


def _slices(record: Service, mesh: Mesh | None) -> tuple[Slice, ...]:
    """The slices that a record asks for."""
    spec = record.spec
    name = imported_name(spec.service, spec.cluster)
    found: list[Slice] = []
    for backend in spec.backends:
        seen = [
            ServiceEndpoint(
                as_seen_here(each.address, exporter=spec.cluster, mesh=mesh), each.state, each.hostname
            )
            for each in backend.endpoints
        ]
        for version, family in ((4, Family.IPV4), (6, Family.IPV6)):
            of_family = [each for each in seen if each.address.version == version]
            found.extend(_shared_out(name, family, backend.ports, of_family))
    return tuple(found)


def _shared_out(
    service: str, family: Family, ports: tuple[ServicePort, ...], endpoints: Sequence[ServiceEndpoint]
) -> list[Slice]:
    shares = 1
    while len(endpoints) > shares * SLICE_SIZE:
        shares *= 2
    parts: dict[int, list[ServiceEndpoint]] = {}
    for endpoint in endpoints:
        parts.setdefault(zlib.crc32(endpoint.address.packed) % shares, []).append(endpoint)
    return [
        Slice(_slice_name(service, family, ports, f"{part}/{shares}"), family, ports, tuple(inside))
        for part, inside in sorted(parts.items())
    ]


def _slice_name(service: str, family: Family, ports: tuple[ServicePort, ...], share: str) -> str:
    ports_text = ",".join(f"{each.name}/{each.protocol}/{each.port}/{each.app_protocol}" for each in ports)
    digest = hashlib.sha256(f"{family} {share} {ports_text}".encode()).hexdigest()[:DIGEST_LETTERS]
    return f"{service}-{digest}"


def _slice_actions(
    wanted: Sequence[Slice], held: Sequence[HeldSlice], *, owner: str
) -> tuple[ImportAction, ...]:
    """Endpoints come before others go, so that one which moves is never missing."""
    own = {each.slice.name: each for each in held if each.owner == owner}
    # Of an earlier Service of that name: their names are needed.
    actions: list[ImportAction] = [DeleteSlice(each) for each in held if each.owner != owner]
    for each in wanted:
        there = own.pop(each.name, None)
        if there is None:
            actions.append(CreateSlice(each, owner))
        elif (there.slice.family, there.slice.ports) != (each.family, each.ports):
            actions.append(DeleteSlice(there))  # changed by another hand; it is made again
        elif there.slice.endpoints != each.endpoints:
            actions.append(ChangeSlice(there, each.endpoints))
    return (*actions, *map(DeleteSlice, own.values()))
