"""`scopectl explain`: why a link is as it is, from this machine's agent or from what two peers reported.

The agent knows every candidate that it tried; the registry knows what both sides say of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from scope.ctl.local import PeerView, number, objects, string
from scope.ctl.render import NOTHING, path_text, peer_state, short_duration, table
from scope.model import Link, Mesh, PathKind, Peer, Role, TopologyMode

RESULTS = {
    "InUse": "in use",
    "Answers": "answers",
    "Silent": "silent",
    "NoAnswer": "no answer",
    "DataLost": "answers, but loses WireGuard's packets",
    "NotAsked": "not asked yet",
    "Refused": "not tried",
}


@dataclass(frozen=True, slots=True)
class CandidateView:
    """One candidate as the agent tells of it; times are seconds ago, None for never."""

    endpoint: str
    kind: str
    result: str
    why: str = ""
    pings: int = 0
    rtt: float | None = None  # milliseconds
    pinged: float | None = None
    answered: float | None = None
    heard: float | None = None
    hub: str = ""


def parse_candidates(answer: Mapping[str, object]) -> tuple[CandidateView, ...]:
    """Read the candidates of an agent's answer."""
    return tuple(
        CandidateView(
            endpoint=string(each, "endpoint"),
            kind=string(each, "kind"),
            result=string(each, "result"),
            why=string(each, "why"),
            pings=int(number(each, "pings") or 0),
            rtt=number(each, "rttMs"),
            pinged=number(each, "pingedSeconds"),
            answered=number(each, "answeredSeconds"),
            heard=number(each, "heardSeconds"),
            hub=string(each, "hub"),
        )
        for each in objects(answer, "candidates")
    )


def peer_text(peer: PeerView, candidates: tuple[CandidateView, ...], *, color: bool) -> str:
    """How this machine reaches the peer, and a line for every candidate."""
    first = f"{peer.name}: {path_text(peer)}\n"
    if peer.path == "Routed":
        return f"{first}edges of a tree have no links with each other: see `scopectl explain {peer.hub}`\n"
    if not candidates:
        return f"{first}no candidate: nothing was tried\n"
    rows = [
        (
            each.endpoint,
            f"{each.kind} ({each.hub})" if each.hub else each.kind,
            _result(each),
            NOTHING if each.rtt is None else f"{each.rtt:.1f} ms",
            str(each.pings),
            _ago(each.pinged),
            _ago(each.answered),
            _ago(each.heard),
        )
        for each in candidates
    ]
    header = ("CANDIDATE", "KIND", "RESULT", "RTT", "PINGS", "PINGED", "ANSWERED", "HEARD FROM")
    return f"{first}\n{table(header, rows, color=color)}"


def pair_text(one: Peer, other: Peer, mesh: Mesh, *, wall: float, color: bool) -> str:
    """What two peers report of each other, and of themselves."""
    rows = [
        (
            peer.meta.name,
            str(peer.assignment.role),
            peer_state(peer, wall),
            str(peer.report.mapping) if peer.report else NOTHING,
            *_link_cells(peer, towards),
        )
        for peer, towards in ((one, other), (other, one))
    ]
    header = ("PEER", "ROLE", "STATE", "NAT", "PATH", "ENDPOINT", "RTT", "SEEN AT", "WHY NOT DIRECT")
    said = "".join(f"{line}\n" for line in _verdict(one, other, mesh, wall))
    candidates = [
        (peer.meta.name, str(candidate.endpoint), str(candidate.kind))
        for peer in (one, other)
        for candidate in (peer.report.endpoints if peer.report else ())
    ]
    text = f"{said}\n{table(header, rows, color=color)}"
    return f"{text}\n{table(('PEER', 'CANDIDATE', 'KIND'), candidates, color=color)}" if candidates else text


def _link_cells(peer: Peer, towards: Peer) -> tuple[str, ...]:
    link = _link(peer, towards)
    if link is None:
        return (NOTHING,) * 5
    how = f" via {link.hub}" if link.hub else " (birthday)" if link.birthday else ""
    return (
        f"{link.path}{how}",
        str(link.endpoint or NOTHING),
        NOTHING if link.latency is None else f"{link.latency * 1000:.1f} ms",
        str(link.observed or NOTHING),
        link.reason,
    )


def _verdict(one: Peer, other: Peer, mesh: Mesh, wall: float) -> Iterator[str]:
    """The pair in a sentence or two."""
    pair = f"{one.meta.name} and {other.meta.name}"
    away = [peer for peer in (one, other) if not peer.assignment.online]
    for peer in away:
        yield f"{peer.meta.name} is not online ({peer_state(peer, wall).lower()}): what is said of it is old"
    edges = [peer for peer in (one, other) if peer.assignment.role is not Role.HUB]
    if mesh.spec.topology is TopologyMode.TREE and len(edges) == 2:
        hubs = [peer.report.hub if peer.report else "" for peer in (one, other)]
        if all(hubs):
            way = hubs[0] if hubs[0] == hubs[1] else f"{hubs[0]} and {hubs[1]}"
            yield f"{pair} are edges of a tree: {way} routes what they send each other"
        else:
            lost = ", ".join(peer.meta.name for peer, hub in zip((one, other), hubs, strict=True) if not hub)
            yield f"{pair} are edges of a tree, and no hub reaches {lost}: `scopectl status` there says why"
        return
    links = [link for link in (_link(one, other), _link(other, one)) if link is not None]
    if not links:
        yield (
            f"neither of {pair} names the other among the links that it publishes (16 at most, what is not "
            "direct first): the path is direct, or was never tried"
        )
        return
    worst = max(links, key=lambda link: list(_WORSE).index(link.path))
    by = f" by {worst.hub}" if worst.hub else ""
    why = f": {worst.reason}" if worst.reason else ""
    yield f"{pair} {_WORSE[worst.path]}{by}{why}"


_WORSE = {
    PathKind.DIRECT: "reach each other directly",
    PathKind.RELAYED: "are relayed",
    PathKind.NONE: "have no path",
}


def _link(peer: Peer, towards: Peer) -> Link | None:
    links = peer.report.links if peer.report is not None else ()
    return next((link for link in links if link.peer == towards.meta.name), None)


def _result(candidate: CandidateView) -> str:
    said = RESULTS.get(candidate.result, candidate.result)
    return f"{said}: {candidate.why}" if candidate.why else said


def _ago(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{short_duration(seconds)} ago"
