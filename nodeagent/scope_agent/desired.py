"""Views become what should be: the one place where rooms are joined. Pure.

`desired_device` says what WireGuard should look like, `report` what our ScopePeer should say, and `is_news`
whether saying it is worth a write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from types import MappingProxyType

from scope.carrier import is_carried
from scope.model import (
    DeviceKind,
    Endpoint,
    Fingerprint,
    IPNetwork,
    KeyCounts,
    Link,
    LinkPsk,
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
from scope_agent.psk.view import PskPair
from scope_agent.wireguard.device import DesiredDevice, DesiredPeer

KEEPALIVE = 20  # seconds; AWS security groups forget one-way UDP after 30 s
WIREGUARD_OVERHEAD = 80  # IPv6 (40), UDP (8) and WireGuard's header and tag (32)
_UNKEYED = PskPair()
NOBODY_KEYED: Mapping[PublicKey, PskPair] = MappingProxyType({})
LATENCY_STEP = 1.5  # a latency is worth a write when it changed by this factor,
LATENCY_FLOOR = 0.005  # and by this many seconds


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer's keys: the private halves have no printable form.

    `wireguard` is None where something else manages the device, and knows its private key.
    """

    wireguard: Secret | None
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
    snapshot: Snapshot,
    topology: Topology,
    paths: PathsView,
    *,
    identity: Identity,
    settings: DeviceSettings,
    keyed: Callable[[PublicKey], PskPair] = lambda _: PskPair(),
) -> DesiredDevice | None:
    """The device as it should be; None until the mesh and our own address are known, or if it is not ours."""
    mesh, own = snapshot.mesh, snapshot.own
    if mesh is None or own is None or identity.wireguard is None:
        return None
    prefixes = frozenset(p for p in (mesh.spec.addressing.ipv4, mesh.spec.addressing.ipv6) if p is not None)
    allowed = topology.allowed_ips
    peers = {
        key: desired_peer(key, prefixes_of, paths.pairs.get(key), keyed(key))
        for key, prefixes_of in allowed.items()
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


def desired_peer(
    key: PublicKey, allowed: frozenset[IPNetwork], pair: PairView | None, keyed: PskPair
) -> DesiredPeer:
    """Until a path is chosen a peer is only known: it may handshake with us, we send it nothing.

    So it is, too, where the mesh requires a post-quantum key, until the device has one; and there is no
    traffic before a handshake has proved it. That one is started by the side that was given the key last,
    whoever would start it otherwise.
    """
    is_ready = pair is not None and (pair.ready or (keyed.starts and pair.endpoint is not None))
    if pair is None or not is_ready or keyed.is_silent:
        return DesiredPeer(key, psk=keyed.psk)
    return DesiredPeer(
        key,
        endpoint=pair.endpoint,
        allowed_ips=frozenset() if keyed.is_withheld else allowed,
        psk=keyed.psk,
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
    fingerprint: Fingerprint | None = None,
    keyed: Mapping[PublicKey, PskPair] = NOBODY_KEYED,
    pods_trouble: str = "",
) -> PeerReport:
    """Our part of our own ScopePeer's status. `keyed`: how each pair is, by its post-quantum key."""
    linked = (_link(snapshot, key, pair, keyed.get(key, _UNKEYED)) for key, pair in paths.pairs.items())
    links = sorted((link for link in linked if link is not None), key=_link_order)
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
        identity=fingerprint,
        post_quantum=_key_counts(snapshot, paths, keyed) if fingerprint is not None else None,
        pods_trouble=pods_trouble,
    )
    return fit_report(whole)


def _key_counts(snapshot: Snapshot, paths: PathsView, keyed: Mapping[PublicKey, PskPair]) -> KeyCounts:
    known = {key: keyed.get(key, _UNKEYED) for key in snapshot.peers}
    reached = {key for key, pair in paths.pairs.items() if pair.path is not PathKind.NONE}
    return KeyCounts(
        keyed=sum(1 for pair in known.values() if pair.epoch),
        unkeyed=sum(1 for key, pair in known.items() if key in reached and not pair.epoch),
        failed=sum(1 for pair in known.values() if pair.failed is not None),
    )


def _link(snapshot: Snapshot, key: PublicKey, pair: PairView, keyed: PskPair) -> Link | None:
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
        psk=_link_psk(keyed),
    )


def _link_psk(keyed: PskPair) -> LinkPsk | None:
    if not keyed.epoch and keyed.failed is None:
        return None
    since = round(keyed.confirmed) if keyed.epoch else 0
    return LinkPsk(keyed.epoch, since, suite=keyed.suite, trust=keyed.trust, failure=keyed.failed)


def is_loopback(endpoint: Endpoint | None) -> bool:
    """Whether an endpoint is of our own carrier, and so means nothing to anybody else."""
    return endpoint is not None and is_carried(endpoint)


def _link_order(link: Link) -> tuple[int, int, int, float, str]:
    """Not direct first, then in trouble with a key, then seen where the peer does not publish, then slow."""
    return (
        0 if link.path is PathKind.NONE else 1 if link.path is PathKind.RELAYED else 2,
        0 if link.psk is not None and link.psk.failure is not None else 1,
        0 if link.observed is not None else 1,
        -(link.latency or 0.0),
        link.peer,
    )


def is_news(wanted: PeerReport, written: PeerReport | None) -> bool:
    """Whether a report says more than the written one, latencies that wobble aside."""
    if written is None:
        return True
    if _but_links(wanted) != _but_links(written):
        return True
    before = {link.peer: link for link in written.links}
    if before.keys() != {link.peer for link in wanted.links}:
        return True
    return any(_link_changed(link, before[link.peer]) for link in wanted.links)


_but_links: Callable[[PeerReport], tuple[object, ...]] = attrgetter(
    *(each.name for each in fields(PeerReport) if each.name != "links")
)
_but_latency: Callable[[Link], tuple[object, ...]] = attrgetter(
    *(each.name for each in fields(Link) if each.name != "latency")
)


def _link_changed(now: Link, before: Link) -> bool:
    if _but_latency(now) != _but_latency(before):
        return True
    if now.latency is None or before.latency is None:
        return now.latency != before.latency
    low, high = sorted((now.latency, before.latency))
    return high > low * LATENCY_STEP and high - low > LATENCY_FLOOR
