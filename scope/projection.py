"""What an agent acts on, of a mesh and of the peers that it is not: the rest is for people.

A mesh of N agents hears of every change N times over, so what no agent acts on is neither sent nor read
there: how a peer reaches the others (but for where it saw them, which is one more endpoint to try), its
counts, why an address was refused, when it was last seen, what it relays (but for where it carries peers over
TCP), by which hub it is reached, what its pods lack, and a mesh's totals, clusters and choice of hubs (the
role of a peer says it all). Fields are taken away by name, so what is new to a resource reaches agents unless
this file says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from scope.model import Forwarding, Link, Mesh, MeshCounts, Peer, PeerReport, RelayReport


def projected(resource: Mesh | Peer) -> Mesh | Peer:
    """The resource as agents other than its own are told of it."""
    if isinstance(resource, Mesh):
        status = replace(
            resource.status, counts=MeshCounts(), conditions=(), observed_generation=0, clusters=(), hubs=()
        )
        return replace(resource, status=status)
    report = resource.report
    return replace(
        resource,
        report=_projected_report(report) if report is not None else None,
        assignment=replace(resource.assignment, conditions=(), last_seen=0.0),
    )


def _projected_report(report: PeerReport) -> PeerReport:
    # In the order of names: the slowest first, as reported, would change with every latency.
    seen = sorted(
        (Link(link.peer, link.path, observed=link.observed) for link in report.links if link.observed),
        key=lambda link: link.peer,
    )
    carrier = report.relay.carrier if report.relay is not None else None
    listens = carrier is not None and not carrier.reason
    return replace(
        report,
        links=tuple(seen),
        direct=0,
        relayed=0,
        unreachable=0,
        held_addresses=(),
        relay=RelayReport(Forwarding.NONE, carrier=carrier) if listens else None,
        hub="",
        post_quantum=None,
        pods_trouble="",
    )


def is_told(before: Mesh | Peer | None, after: Mesh | Peer) -> bool:
    """Whether other agents hear of the change: what they are told differs in more than its revision."""
    if before is None or before.meta.uid != after.meta.uid:
        return True
    meta = replace(before.meta, revision=after.meta.revision)
    return projected(replace(before, meta=meta)) != projected(after)
