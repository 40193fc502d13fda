"""What `scopectl status` shows of an agent, as plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping as MappingOf
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from scope.model import DeviceKind, Mapping, PathKind, Peer, PublicKey, Snapshot
from scope_agent.membership import Registration
from scope_agent.paths.birthday import Spent
from scope_agent.paths.core import PathsView
from scope_agent.paths.explaining import Attempt
from scope_agent.psk.view import PskPair
from scope_agent.relay.counting import Relayed
from scope_agent.wireguard.device import ObservedDevice

if TYPE_CHECKING:
    from scope_agent.psk.identity import KeyMaker

ROUTED = "Routed"  # by the hub of a tree that we are attached to: there is no link


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """The device as the agent sees it."""

    name: str
    kind: DeviceKind | None
    listen_port: int
    drift: int  # changes that somebody else made
    observed: ObservedDevice | None
    sessions: MappingOf[PublicKey, tuple[float, float]]  # key -> (last handshake, since when, ours)


def status(
    snapshot: Snapshot,
    paths: PathsView,
    *,
    mesh: str,
    device: DeviceStatus,
    registration: Registration,
    errors: MappingOf[str, str],
    keyed: MappingOf[PublicKey, PskPair],
    dropped: int,
    home: str,
    birthday: Spent | None = None,
    relayed: Relayed | None = None,
    now: float,
    wall: float,
) -> dict[str, object]:
    """All that is known, by the name of `mesh`.

    `errors`: what stands against each part, "" for nothing. `home`: the hub that we are attached to, if any.
    """
    own = snapshot.own
    return {
        "mesh": mesh,
        "peer": own.meta.name if own is not None else None,
        "addresses": [str(a.ip) for a in own.assignment.addresses] if own is not None else [],
        "device": {
            "name": device.name,
            "kind": device.kind,
            "listenPort": device.listen_port,
            "drift": device.drift,
        },
        "registry": {
            "connected": registration.connected,
            "since": round(now - registration.since, 1),
            "reason": registration.reason,
        },
        "hub": home or None,
        "mapping": paths.mapping,
        "endpoints": [{"endpoint": str(c.endpoint), "kind": c.kind} for c in paths.candidates],
        "reflector": _reflector_text(paths, now),
        "peers": [
            _peer_status(key, peer, paths=paths, device=device, home=home, now=now)
            | {"psk": psk_status(keyed.get(key), wall)}
            for key, peer in sorted(snapshot.peers.items(), key=lambda item: item[1].meta.name)
        ],
        "dropped": dropped,
        "birthday": asdict(birthday) if birthday is not None else None,
        "relayed": _relayed_status(relayed, snapshot) if relayed is not None else None,
        "conditions": [{"type": kind, "message": message} for kind, message in errors.items() if message],
    }


def candidates(attempts: Iterable[Attempt]) -> list[dict[str, object]]:
    """What `scopectl explain` shows of one peer: every candidate, and what came of it."""
    return [
        {
            "endpoint": str(attempt.endpoint),
            "kind": attempt.kind,
            "result": attempt.result,
            "why": attempt.why,
            "pings": attempt.pings,
            "rttMs": round(attempt.rtt * 1000, 1) if attempt.rtt is not None else None,
            "pingedSeconds": _rounded(attempt.asked),
            "answeredSeconds": _rounded(attempt.echoed),
            "heardSeconds": _rounded(attempt.heard),
            "hub": attempt.hub or None,
        }
        for attempt in attempts
    ]


def identities(
    snapshot: Snapshot, maker: KeyMaker, keyed: MappingOf[PublicKey, PskPair]
) -> dict[str, object]:
    """What `scopectl identity show` shows: fingerprints, and by what each is believed, or why not."""
    return {
        "peer": snapshot.own.meta.name if snapshot.own is not None else None,
        "fingerprint": str(maker.identity.public.fingerprint()),
        "trust": maker.trust.mode,
        "ca": str(maker.trust.ca.fingerprint()) if maker.trust.ca is not None else None,
        "certified": bool(maker.identity.certificate),
        "peers": [
            {
                "name": peer.meta.name,
                "named": str(view.named) if view.named is not None else None,
                "pinned": str(view.pinned) if view.pinned is not None else None,
                "trust": view.trust,
                "reason": view.failure,
            }
            for key, peer in sorted(snapshot.peers.items(), key=lambda item: item[1].meta.name)
            if (view := keyed.get(key, PskPair()))
        ],
    }


def _relayed_status(relayed: Relayed, snapshot: Snapshot) -> dict[str, object]:
    """What a hub relays for whom. Of members alone: whoever left has no grant any more."""
    return {
        "pairs": relayed.pairs,
        **asdict(relayed.sent),
        "error": relayed.error,
        "busiest": [
            {
                "peers": [_name(key, snapshot) for key in pair.peers],
                "sent": [asdict(sent) for sent in pair.sent],
                "by": list(pair.by),
                "capped": pair.is_capped,
            }
            for pair in relayed.busiest
        ],
    }


def _name(key: PublicKey, snapshot: Snapshot) -> str:
    peer = snapshot.peers.get(key)
    return peer.meta.name if peer is not None else str(key)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _reflector_text(paths: PathsView, now: float) -> str:
    if not paths.reflectors_known:
        return "none known yet"
    if paths.reflectors_silent_since is None:
        return "answering"
    return f"no reflector answers for {now - paths.reflectors_silent_since:.0f} s"


def psk_status(keyed: PskPair | None, wall: float) -> dict[str, object]:
    """Which post-quantum key is proved, and for how long; never the key."""
    keyed = keyed or PskPair()
    return {
        "epoch": keyed.epoch or None,
        "suite": keyed.suite or None,
        "ageSeconds": round(max(wall - keyed.confirmed, 0.0)) if keyed.epoch else None,
        "trust": keyed.trust,
        "laidEpoch": keyed.laid or None,
        "withheld": keyed.is_withheld,
        "conflict": keyed.conflict,
        "reason": keyed.failed,
        "failure": keyed.failure,
    }


def _peer_status(
    key: PublicKey, peer: Peer, *, paths: PathsView, device: DeviceStatus, home: str, now: float
) -> dict[str, object]:
    pair = paths.pairs.get(key)
    unlinked = (ROUTED, "") if home else (PathKind.NONE, "attached to no hub yet")
    path, reason = (pair.path, pair.reason) if pair is not None else unlinked
    seen = device.observed.peers.get(key) if device.observed is not None else None
    session = device.sessions.get(key)
    endpoint = pair.endpoint if pair is not None and pair.path is not PathKind.NONE else None
    return {
        "name": peer.meta.name,
        "addresses": [str(a.ip) for a in peer.assignment.addresses],
        "path": path,
        "endpoint": str(endpoint) if endpoint is not None else None,
        "family": endpoint.family if endpoint is not None else None,
        "rttMs": round(pair.rtt * 1000, 1) if pair is not None and pair.rtt is not None else None,
        "lastHandshakeSeconds": (
            round(now - session[1], 1) if session is not None and session[0] > 0.0 else None
        ),
        "rx": seen.rx if seen is not None else 0,
        "tx": seen.tx if seen is not None else 0,
        "online": peer.assignment.online,
        "mapping": peer.report.mapping if peer.report is not None else Mapping.UNKNOWN,
        "sinceSeconds": round(now - pair.since, 3) if pair is not None else None,
        "hub": (pair.hub if pair is not None else home) or None,
        "userSpace": pair.user_space if pair is not None else False,
        "birthday": pair.birthday if pair is not None else False,
        "carried": pair.carried if pair is not None else False,
        "reason": reason,
    }
