"""Services and EndpointSlices as the API server has them, to and from the values of plans. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeAlias
from urllib.parse import quote

from scope.model import (
    Backend,
    EndpointState,
    Family,
    Protocol,
    Service,
    ServiceEndpoint,
    ServicePort,
)
from scope.names import imported_name
from scope.registry.kube.client import Object
from scope_operator.plan.exports import EXPORT, LocalService
from scope_operator.plan.imports import IMPORTED, MESH, SOURCE, HeldService, HeldSlice, Slice

SERVICES = "/api/v1/services"
OWNER_LABEL = "kubernetes.io/service-name"  # of a slice: its Service
MANAGER_LABEL = "endpointslice.kubernetes.io/managed-by"
MANAGER = "scope.ltgc.cc"
_STATES = {  # ready, serving, terminating
    EndpointState.READY: (True, True, False),
    EndpointState.DRAINING: (False, True, True),
    EndpointState.NOT_READY: (False, False, False),
}


@dataclass(frozen=True, slots=True)
class ServiceHeard:
    """A Service changed, or went."""

    namespace: str
    name: str
    exported: bool
    imported: bool


@dataclass(frozen=True, slots=True)
class SliceHeard:
    """An EndpointSlice of the Service `name` changed, or went."""

    namespace: str
    name: str
    ours: bool


@dataclass(frozen=True, slots=True)
class NamespaceHeard:
    """A namespace changed, or went."""

    name: str


ServiceNews: TypeAlias = ServiceHeard | SliceHeard | NamespaceHeard


def service_news(document: Mapping[str, Any]) -> ServiceNews | None:
    """What a watch tells of a Service, an EndpointSlice or a namespace; None where it concerns no Service."""
    metadata = document.get("metadata") or {}
    name, namespace = str(metadata.get("name", "")), str(metadata.get("namespace", ""))
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    match document.get("kind"):
        case "Service":
            return ServiceHeard(namespace, name, EXPORT in annotations, IMPORTED in labels)
        case "EndpointSlice" if OWNER_LABEL in labels:
            return SliceHeard(namespace, str(labels[OWNER_LABEL]), labels.get(MANAGER_LABEL) == MANAGER)
        case "Namespace":
            return NamespaceHeard(name)
    return None


# --- paths --------------------------------------------------------------------------------------------------


def services_path(namespace: str) -> str:
    """The path of all Services of a namespace."""
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/services"


def service_path(namespace: str, name: str) -> str:
    """The path of one Service."""
    return f"{services_path(namespace)}/{quote(name, safe='')}"


def slices_path(namespace: str) -> str:
    """The path of all EndpointSlices of a namespace."""
    return f"/apis/discovery.k8s.io/v1/namespaces/{quote(namespace, safe='')}/endpointslices"


def slice_path(namespace: str, name: str) -> str:
    """The path of one EndpointSlice."""
    return f"{slices_path(namespace)}/{quote(name, safe='')}"


# --- reading ------------------------------------------------------------------------------------------------


def read_local(document: Mapping[str, Any]) -> LocalService:
    """A Service of this cluster, as one that may be exported."""
    metadata, spec = document["metadata"], document.get("spec") or {}
    return LocalService(
        namespace=str(metadata["namespace"]),
        name=str(metadata["name"]),
        uid=str(metadata["uid"]),
        export=(metadata.get("annotations") or {}).get(EXPORT),
        is_import=IMPORTED in (metadata.get("labels") or {}),
        is_external=spec.get("type") == "ExternalName",
        headless=spec.get("clusterIP") == "None",
        families=tuple(Family(each) for each in spec.get("ipFamilies") or ()),
        ports=read_ports(spec.get("ports") or ()),
    )


def read_backends(slices: Iterable[Mapping[str, Any]]) -> list[Backend]:
    """The pods behind a Service, slice by slice."""
    return [
        Backend(read_ports(each.get("ports") or ()), _endpoints(each))
        for each in slices
        if each.get("addressType") in set(Family)
    ]


def read_held(document: Mapping[str, Any]) -> HeldService:
    """A Service of this cluster that has the name of an import."""
    metadata, spec = document["metadata"], document.get("spec") or {}
    annotations = metadata.get("annotations") or {}
    ours = IMPORTED in (metadata.get("labels") or {}) and bool(annotations.get(MESH))
    return HeldService(
        uid=str(metadata["uid"]),
        source=str(annotations.get(SOURCE, "")) if ours else "",
        headless=spec.get("clusterIP") == "None",
        families=tuple(Family(each) for each in spec.get("ipFamilies") or ()),
        dual=spec.get("ipFamilyPolicy") in ("PreferDualStack", "RequireDualStack"),
        ports=read_ports(spec.get("ports") or ()),
    )


def read_held_slices(slices: Iterable[Mapping[str, Any]]) -> list[HeldSlice]:
    """Those of a Service's EndpointSlices that are ours."""
    return [
        _held_slice(each)
        for each in slices
        if (each["metadata"].get("labels") or {}).get(MANAGER_LABEL) == MANAGER
    ]


def _held_slice(document: Mapping[str, Any]) -> HeldSlice:
    metadata = document["metadata"]
    owners = [owner for owner in metadata.get("ownerReferences") or () if owner.get("kind") == "Service"]
    return HeldSlice(
        Slice(
            str(metadata["name"]),
            Family(document["addressType"]),
            read_ports(document.get("ports") or ()),
            _endpoints(document),
        ),
        uid=str(metadata["uid"]),
        revision=str(metadata["resourceVersion"]),
        owner=str(owners[0].get("uid", "")) if owners else "",
    )


def read_ports(ports: Iterable[Mapping[str, Any]]) -> tuple[ServicePort, ...]:
    """The ports of a Service or slice; one without a number, which stands for all, is left out."""
    return tuple(
        ServicePort(
            port=int(each["port"]),
            protocol=Protocol(each.get("protocol") or "TCP"),
            name=str(each.get("name") or ""),
            app_protocol=str(each.get("appProtocol") or ""),
        )
        for each in ports
        if each.get("port") is not None
    )


def _endpoints(document: Mapping[str, Any]) -> tuple[ServiceEndpoint, ...]:
    """The endpoints of a slice, each with its first address: what others mean nobody defines."""
    return tuple(
        ServiceEndpoint(
            ip_address(each["addresses"][0]), _state(each.get("conditions") or {}), each.get("hostname") or ""
        )
        for each in document.get("endpoints") or ()
        if each.get("addresses")
    )


def _state(conditions: Mapping[str, Any]) -> EndpointState:
    """Unknown is to be read as ready, and as serving, says the API."""
    if conditions.get("ready") is not False:
        return EndpointState.READY
    serves = conditions.get("serving") is not False and bool(conditions.get("terminating"))
    return EndpointState.DRAINING if serves else EndpointState.NOT_READY


# --- writing ------------------------------------------------------------------------------------------------


def service_document(record: Service) -> Object:
    """The Service of this cluster that stands for a record."""
    spec = record.spec
    families: Object = {}
    if len(spec.families) > 1:  # as far as this cluster has both
        families = {"ipFamilyPolicy": "PreferDualStack"}
    elif spec.families:
        families = {"ipFamilyPolicy": "SingleStack", "ipFamilies": [str(spec.families[0])]}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": imported_name(spec.service, spec.cluster),
            "namespace": spec.namespace,
            "labels": {IMPORTED: spec.cluster},
            "annotations": {MESH: spec.mesh, SOURCE: record.meta.name},
        },
        "spec": {
            **({"clusterIP": "None"} if spec.headless else {}),
            **families,
            "ports": ports_list(spec.ports),
        },
    }


def ports_list(ports: Iterable[ServicePort]) -> list[Object]:
    """Ports as a Service or slice has them."""
    return [
        {
            "name": each.name,
            "protocol": str(each.protocol),
            "port": each.port,
            **({"appProtocol": each.app_protocol} if each.app_protocol else {}),
        }
        for each in ports
    ]


def slice_document(wanted: Slice, *, service: str, owner: str) -> Object:
    """An EndpointSlice of the Service of this cluster with that name and UID."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": wanted.name,
            "labels": {OWNER_LABEL: service, MANAGER_LABEL: MANAGER},
            "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": service, "uid": owner}],
        },
        "addressType": str(wanted.family),
        "ports": ports_list(wanted.ports),
        "endpoints": endpoints_list(wanted.endpoints),
    }


def endpoints_list(endpoints: Iterable[ServiceEndpoint]) -> list[Object]:
    """Endpoints as a slice has them."""
    return [
        {
            "addresses": [str(each.address)],
            "conditions": dict(zip(("ready", "serving", "terminating"), _STATES[each.state], strict=True)),
            **({"hostname": each.hostname} if each.hostname else {}),
        }
        for each in endpoints
    ]
