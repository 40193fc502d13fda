"""A ScopeService: what a cluster tells the others of a Service that it exports, and of the pods behind it."""

from __future__ import annotations

from ipaddress import ip_address

from scope.model import (
    Backend,
    EndpointState,
    Family,
    Kind,
    Protocol,
    Service,
    ServiceEndpoint,
    ServicePort,
    ServiceSpec,
)
from scope.resources.addresses import read_unicast_address
from scope.resources.fields import Fields
from scope.resources.limits import (
    MAX_BACKENDS,
    MAX_SERVICE_ENDPOINTS,
    MAX_SERVICE_PORTS,
)
from scope.resources.meta import read_meta
from scope.resources.problems import Problem, show
from scope.resources.values import (
    read_boolean,
    read_choice,
    read_cluster_name,
    read_integer,
    read_label,
    read_label_key,
)

NOWHERE = ip_address("0.0.0.0")  # noqa: S104 - a stand-in, which never leaves this package


def parse_service(document: object, *, ignore_unknown: bool = False) -> Service:
    """Read a ScopeService. Raises InvalidResource."""
    root = Fields.of(document, ignore_unknown=ignore_unknown)
    meta = read_meta(root, Kind.SERVICE)
    fields = root.sub("spec", required=True)
    spec = ServiceSpec(
        mesh=fields.required("mesh", read_label, ""),
        cluster=fields.required("cluster", read_cluster_name, ""),
        namespace=fields.required("namespace", read_label, ""),
        service=fields.required("service", read_label, ""),
        headless=fields.optional("headless", read_boolean, False),
        families=fields.items("families", lambda value: read_choice(Family, value), limit=len(Family)),
        ports=fields.parts("ports", _read_port, limit=MAX_SERVICE_PORTS),
        backends=fields.parts("backends", _read_backend, limit=MAX_BACKENDS),
    )
    if (total := sum(len(backend.endpoints) for backend in spec.backends)) > MAX_SERVICE_ENDPOINTS:
        fields.refuse(f"{total} endpoints", f"at most {MAX_SERVICE_ENDPOINTS} in all", at="backends")
    root.done()
    return Service(meta, spec)


def _read_port(fields: Fields) -> ServicePort:
    return ServicePort(
        port=fields.required("port", lambda value: read_integer(value, 1, 65535), 1),
        protocol=fields.optional("protocol", lambda value: read_choice(Protocol, value), Protocol.TCP),
        name=fields.optional("name", read_label, ""),
        app_protocol=fields.optional("appProtocol", read_label_key, ""),
    )


def _read_backend(fields: Fields) -> Backend:
    return Backend(
        ports=fields.parts("ports", _read_port, limit=MAX_SERVICE_PORTS),
        endpoints=fields.parts("endpoints", _read_endpoint, limit=MAX_SERVICE_ENDPOINTS),
    )


def _read_endpoint(fields: Fields) -> ServiceEndpoint:
    return ServiceEndpoint(
        address=fields.required("address", read_unicast_address, NOWHERE),
        state=fields.optional("state", lambda value: read_choice(EndpointState, value), EndpointState.READY),
        hostname=fields.optional("hostname", read_label, ""),
    )


def changed_identity(stored: Service, asked: Service) -> tuple[Problem, ...]:
    """What `asked` changes of whose record it is, which never changes."""
    had, wanted = service_spec_dict(stored.spec), service_spec_dict(asked.spec)
    return tuple(
        Problem(
            f"spec.{name}",
            f"{show(wanted[name])} is another than {show(had[name])}",
            "no change: another Service has a record of its own",
            "delete this ScopeService and create another",
        )
        for name in ("mesh", "cluster", "namespace", "service")
        if had[name] != wanted[name]
    )


def service_spec_dict(spec: ServiceSpec) -> dict[str, object]:
    """The document of a record's spec. What is as most are is left out: a record has many endpoints."""
    return {
        "mesh": spec.mesh,
        "cluster": spec.cluster,
        "namespace": spec.namespace,
        "service": spec.service,
        **({"headless": True} if spec.headless else {}),
        **({"families": [str(family) for family in spec.families]} if spec.families else {}),
        **_ports_dict(spec.ports),
        **({"backends": [_backend_dict(each) for each in spec.backends]} if spec.backends else {}),
    }


def _ports_dict(ports: tuple[ServicePort, ...]) -> dict[str, object]:
    if not ports:
        return {}
    return {
        "ports": [
            {
                "port": each.port,
                "protocol": str(each.protocol),
                **({"name": each.name} if each.name else {}),
                **({"appProtocol": each.app_protocol} if each.app_protocol else {}),
            }
            for each in ports
        ]
    }


def _backend_dict(backend: Backend) -> dict[str, object]:
    endpoints = [
        {
            "address": str(each.address),
            **({"state": str(each.state)} if each.state is not EndpointState.READY else {}),
            **({"hostname": each.hostname} if each.hostname else {}),
        }
        for each in backend.endpoints
    ]
    return {**_ports_dict(backend.ports), **({"endpoints": endpoints} if endpoints else {})}
