"""Every candidate towards one peer, with what came of it: for whoever wonders at a path.

Candidates are what the peer publishes, what its user wrote, where others saw it, where it spoke from, and
what hubs granted. Each is a route that was asked, or was refused before a datagram was sent to it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from scope.model import CandidateKind, Endpoint, Family, Peer
from scope_agent.paths.candidates import claims
from scope_agent.paths.route import NEVER, RECENT, Route

HEARD = "Heard"  # it spoke from there, and nobody claims the endpoint


class Result(enum.StrEnum):
    """What came of a candidate."""

    IN_USE = "InUse"
    ANSWERS = "Answers"  # its last ping was answered
    SILENT = "Silent"  # it answered before, and its last ping was not
    NO_ANSWER = "NoAnswer"  # no ping was ever answered
    DATA_LOST = "DataLost"  # pings were answered, and WireGuard's packets were lost
    NOT_ASKED = "NotAsked"
    REFUSED = "Refused"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One candidate. Ages are seconds; None: never."""

    endpoint: Endpoint
    kind: str  # a CandidateKind, or HEARD
    result: Result
    why: str = ""  # it was refused
    pings: int = 0  # of the latest search
    rtt: float | None = None
    asked: float | None = None  # age of the last ping
    echoed: float | None = None  # of the last answer
    heard: float | None = None  # of the last ping from there
    hub: str = ""  # name of the ScopePeer whose port it is


def explain(
    peer: Peer,
    *,
    observed: Collection[Endpoint],
    routes: Iterable[Route],
    in_use: Endpoint | None,
    refusal: Callable[[Endpoint], str | None],
    families: Collection[Family],
    now: float,
) -> tuple[Attempt, ...]:
    """The candidates, the best first; `families` are those that this machine has."""
    kinds = _kinds(peer, observed)
    tried = {route.endpoint: route for route in routes}
    known = [
        _attempt(route, kind=_kind_of(route, kinds), in_use=in_use, now=now)
        for route in sorted(tried.values(), key=lambda route: (route.rank, str(route.endpoint)))
    ]
    refused = [
        Attempt(endpoint, kinds[endpoint], Result.REFUSED, why)
        for endpoint in sorted(kinds.keys() - tried.keys(), key=str)
        if (why := refusal(endpoint) or _lacking(endpoint, families)) is not None
    ]
    return (*known, *refused)


def _kinds(peer: Peer, observed: Collection[Endpoint]) -> dict[Endpoint, str]:
    """How each claimed endpoint is known; what the peer's user wrote counts most."""
    published = peer.report.endpoints if peer.report is not None else ()
    kinds: dict[Endpoint, str] = dict.fromkeys(observed, CandidateKind.OBSERVED)
    kinds |= {candidate.endpoint: candidate.kind for candidate in published}
    return kinds | dict.fromkeys(claims(peer) - kinds.keys(), CandidateKind.STATIC)


def _kind_of(route: Route, kinds: Mapping[Endpoint, str]) -> str:
    return CandidateKind.RELAY if route.relay is not None else kinds.get(route.endpoint, HEARD)


def _lacking(endpoint: Endpoint, families: Collection[Family]) -> str | None:
    if families and endpoint.family not in families:
        return f"no {endpoint.family} address here"
    return None


def _attempt(route: Route, *, kind: str, in_use: Endpoint | None, now: float) -> Attempt:
    return Attempt(
        route.endpoint,
        kind,
        Result.IN_USE if route.endpoint == in_use else _result(route, now),
        pings=route.attempt,
        rtt=route.rtt,
        asked=_age(route.asked, now),
        echoed=_age(route.echoed, now),
        heard=_age(route.heard, now),
        hub=route.relay.hub if route.relay is not None else "",
    )


def _result(route: Route, now: float) -> Result:
    if route.is_data_dead(now):
        return Result.DATA_LOST
    if route.asked == NEVER:
        return Result.NOT_ASKED
    if route.echoed == NEVER:
        return Result.NO_ANSWER
    is_answered = route.echoed >= route.asked or now - route.asked < RECENT
    return Result.ANSWERS if is_answered else Result.SILENT


def _age(at: float, now: float) -> float | None:
    return None if at == NEVER else now - at
