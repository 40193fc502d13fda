"""What another cluster offers of a Service, as text: by which name it is reached, and what answers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches

from scope.ctl.errors import CommandError
from scope.model import EndpointState, Service, ServicePort
from scope.names import imported_name

SHOWN = 20  # endpoints; whoever wants all of a thousand asks for JSON


def choose(services: Sequence[Service], wanted: str, *, cluster: str) -> list[Service]:
    """The records of the Service NAME.NAMESPACE of a cluster, one of each mesh. Raises CommandError."""
    name, dot, namespace = wanted.partition(".")
    if not (name and dot and namespace) or "." in namespace:
        raise CommandError(f"{wanted} is no NAME.NAMESPACE, as web.shop")
    of_cluster = [each for each in services if each.spec.cluster == cluster]
    found = [each for each in of_cluster if (each.spec.service, each.spec.namespace) == (name, namespace)]
    if found:
        return sorted(found, key=lambda each: each.meta.name)
    if not of_cluster:
        others = ", ".join(sorted({each.spec.cluster for each in services})) or "none"
        raise CommandError(f"cluster {cluster} exports no Service; clusters that do: {others}")
    there = [f"{each.spec.service}.{each.spec.namespace}" for each in of_cluster]
    close = get_close_matches(wanted, there, n=3)
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    raise CommandError(
        f"cluster {cluster} does not export {wanted}{meant}: there, `kubectl annotate service {name} "
        f"--namespace {namespace} scope.ltgc.cc/export=true` does"
    )


def service_text(service: Service) -> str:
    """How a Service is reached from the other clusters of its mesh."""
    spec = service.spec
    states = Counter(end.state for backend in spec.backends for end in backend.endpoints)
    total = sum(states.values())
    lines = [
        f"{spec.service}.{spec.namespace} of cluster {spec.cluster}, elsewhere in mesh {spec.mesh}:",
        f"  name       {imported_name(spec.service, spec.cluster)}.{spec.namespace}.svc"
        + (" (headless: its pods' own addresses)" if spec.headless else ""),
        f"  families   {', '.join(spec.families) or 'as the cluster has them'}",
        f"  ports      {', '.join(map(_port, spec.ports)) or 'any'}",
        f"  endpoints  {_ready(states[EndpointState.READY], total)}",
    ]
    ends = [(backend.ports, end) for backend in spec.backends for end in backend.endpoints]
    for ports, end in ends[:SHOWN]:
        name = f"  {end.hostname}" if end.hostname else ""
        on = ", ".join(map(_port, ports)) or "any port"
        lines.append(f"    {end.address}{name}  {end.state}  {on}")
    if total > SHOWN:
        lines.append(f"    and {total - SHOWN} more")
    return "\n".join(lines) + "\n"


def _ready(ready: int, total: int) -> str:
    if not total:
        return "none: it has no pods, or nobody wrote down where they are"
    if not ready:
        return f"0 of {total} ready: nothing answers"
    return f"{ready} of {total} ready"


def _port(port: ServicePort) -> str:
    return f"{port.name} {port.port}/{port.protocol}" if port.name else f"{port.port}/{port.protocol}"
