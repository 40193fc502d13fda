"""Views become what should be: the one place where rooms are joined. Pure.

`desired_device` says what WireGuard should look like, `report` what our ScopePeer should say, and `is_news`
whether saying it is worth a write.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scope.carrier import is_carried
from scope.model import (
    DeviceKind,
    Endpoint,
    IPNetwork,
    Link,
    PathKind,
    PeerKeys,
    PeerReport,
    PublicKey,
    RelayReport,
    Secret,
    Snapshot,
)
from scope.resources import fit_report
from scope.topology import Topology
from scope_agent.paths.core import PathsView
from scope_agent.paths.view import PairView
from scope_agent.wireguard.device import DesiredDevice, DesiredPeer

KEEPALIVE = 20  # seconds; AWS security groups forget one-way UDP after 30 s
WIREGUARD_OVERHEAD = 80  # IPv6 (40), UDP (8) and WireGuard's header and tag (32)
LATENCY_STEP = 1.5  # a latency is worth a write when it changed by this factor,
LATENCY_FLOOR = 0.005  # and by this many seconds


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer's keys: the private halves have no printable form."""

    wireguard: Secret
    probe: Secret
    signing: Secret
    public: PeerKeys


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """What the device needs besides peers."""

    name: str
    listen_port: int
    underlay_mtu: int = 1500
    fwmark: int = 0


def desired_device(
    snapshot: Snapshot, topology: Topology, paths: PathsView, *, identity: Identity, settings: DeviceSettings
) -> DesiredDevice | None:
    """The device as it should be; None until the mesh and our own address are known."""
    mesh, own = snapshot.mesh, snapshot.own
    if mesh is None or own is None:
        return None
    prefixes = frozenset(p for p in (mesh.spec.addressing.ipv4, mesh.spec.addressing.ipv6) if p is not None)
    allowed = topology.allowed_ips
    peers = {
        key: desired_peer(key, prefixes_of, paths.pairs.get(key)) for key, prefixes_of in allowed.items()
    }
    return DesiredDevice(
        name=settings.name,
        private_key=identity.wireguard,
        public_key=identity.public.wireguard,
        listen_port=settings.listen_port,
        mtu=mesh.spec.mtu or settings.underlay_mtu - WIREGUARD_OVERHEAD,
        fwmark=settings.fwmark,
        addresses=frozenset(own.assignment.addresses),
        routes=prefixes | topology.routes,
        guarded=prefixes,
        peers=peers,
    )


def desired_peer(key: PublicKey, allowed: frozenset[IPNetwork], pair: PairView | None) -> DesiredPeer:
    """Until a path is chosen a peer is only known: it may handshake with us, we send it nothing."""
    if pair is None or not pair.ready:
        return DesiredPeer(key)
    return DesiredPeer(
        key,
        endpoint=pair.endpoint,
        allowed_ips=allowed,
        keepalive=KEEPALIVE,
        verified=pair.verified,
        settling=pair.settling,
        hold=pair.hold,
    )


def report(
    snapshot: Snapshot,
    paths: PathsView,
    *,
    identity: Identity,
    device: DeviceKind | None,
    relay: RelayReport | None = None,
    hub: str = "",
) -> PeerReport:
    """Our part of our own ScopePeer's status."""
    links = sorted(
        (link for key, pair in paths.pairs.items() if (link := _link(snapshot, key, pair)) is not None),
        key=_link_order,
    )
    kinds = [link.path for link in links]
    own = snapshot.own
    whole = PeerReport(
        keys=identity.public,
        endpoints=paths.candidates,
        mapping=paths.mapping,
        device=device,
        links=tuple(links),
        direct=kinds.count(PathKind.DIRECT),
        relayed=kinds.count(PathKind.RELAYED),
        unreachable=sum(
            1 for key, pair in paths.pairs.items() if pair.path is PathKind.NONE and pair.declared
        ),
        held_addresses=tuple(interface.ip for interface in own.assignment.addresses)
        if own is not None
        else (),
        relay=relay,
        hub=hub,
    )
    return fit_report(whole)


def _link(snapshot: Snapshot, key: PublicKey, pair: PairView) -> Link | None:
    peer = snapshot.peers.get(key)
    if peer is None or peer.report is None:
        return None
    published = {candidate.endpoint for candidate in peer.report.endpoints}
    observed = pair.observed if pair.observed not in published else None
    return Link(
        peer=peer.meta.name,
        path=pair.path,
        endpoint=pair.endpoint if pair.path is not PathKind.NONE and not is_loopback(pair.endpoint) else None,
        observed=observed,
        latency=round(pair.rtt, 3) if pair.rtt is not None and pair.path is not PathKind.NONE else None,
        reason=pair.reason,
        hub=pair.hub,
        user_space=pair.user_space,
        birthday=pair.birthday,
        carried=pair.carried,
    )


def is_loopback(endpoint: Endpoint | None) -> bool:
    """Whether an endpoint is of our own carrier, and so means nothing to anybody else."""
    return endpoint is not None and is_carried(endpoint)


def _link_order(link: Link) -> tuple[int, int, float, str]:
    """Not direct first, then those whose observation the peer does not publish, then the slowest."""
    return (
        0 if link.path is PathKind.NONE else 1 if link.path is PathKind.RELAYED else 2,
        0 if link.observed is not None else 1,
        -(link.latency or 0.0),
        link.peer,
    )


def is_news(wanted: PeerReport, written: PeerReport | None) -> bool:
    """Whether a report says more than the written one, latencies that wobble aside."""
    if written is None:
        return True
    if _without_links(wanted) != _without_links(written):
        return True
    before = {link.peer: link for link in written.links}
    if before.keys() != {link.peer for link in wanted.links}:
        return True
    return any(_link_changed(link, before[link.peer]) for link in wanted.links)


def _without_links(value: PeerReport) -> PeerReport:
    return replace(value, links=())


def _link_changed(now: Link, before: Link) -> bool:
    if replace(now, latency=None) != replace(before, latency=None):
        return True
    if now.latency is None or before.latency is None:
        return now.latency != before.latency
    low, high = sorted((now.latency, before.latency))
    return high > low * LATENCY_STEP and high - low > LATENCY_FLOOR
