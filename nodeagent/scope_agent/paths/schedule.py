"""When a route wants its next ping.

Three situations: the peer is being searched, the route is the path in use, or it lies beside the path in use.
While a relay is in use the last two hold for relays' routes and the first one for all others.
Times are monotonic seconds, None while no ping is needed. `interval` is the mesh's probe interval; an active
path is one that data leaves by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, assert_never

from scope.model import Endpoint, Family
from scope_agent.paths.route import NEVER, Route

PUNCH = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # both sides' pings meet within the life of any NAT entry
FAMILY_DELAY = 0.25  # how long the less preferred family waits (RFC 8305, section 5)
OPENER_TTL = 2  # leaves our router, dies at the next hop
OPENERS = 2  # first pings of a punch, where nothing but time can tell that the other side has opened too
# Where the peer can be called it says that it has opened, and until then all pings are openers. Should its
# word not come through, these pings of a punch (at 5.6, 7.6 and 9.6 s) go in full: few, because each may be
# the one that takes the port.
BLIND = range(7, 10)
STEP_MIN = 0.01  # pings of a punch that were held up do not leave all at once
LAST_GOOD_INTERVAL = 1.5  # what worked is the likeliest to work again
LAST_GOOD_FOR = 600.0  # by then a rebooting router is back
YOUNG = 10.0  # a new path is pinged every probe interval for so long
RELAY_INTERVAL = 20.0  # how long the way over another hub is, is asked so often while data flows
BETTER_INTERVAL = 20.0  # a better route than the one in use is asked so often: both firewalls are open then


@dataclass(frozen=True, slots=True)
class Searching:
    """There is no path."""

    interval: float
    last_good: Endpoint | None  # what worked last
    lost_at: float  # when it was lost
    is_resting: bool  # nothing is to be sent but in answer
    given_up: bool  # the ladder's last bound has passed


@dataclass(frozen=True, slots=True)
class Connected:
    """There is a path."""

    interval: float
    in_use: Route
    since: float  # when both sides took it
    is_in_doubt: bool  # its pings are paced by the doubt
    is_active: bool
    watch: float | None  # how often it is to be asked, idle or not
    search_until: float  # until when a better route is looked for eagerly


@dataclass(frozen=True, slots=True)
class Relayed:
    """There is a path over a hub, and the search for a direct one goes on."""

    search: Searching
    path: Connected


Situation: TypeAlias = Searching | Connected | Relayed


def next_ping(route: Route, now: float, situation: Situation) -> float | None:
    """When a route wants its next ping."""
    match situation:
        case Searching():
            return _while_searching(route, now, situation)
        case Connected(in_use=in_use) if route is in_use:
            return _on_path(now, situation)
        case Relayed(search, path):
            if route.relay is None:
                at = _while_searching(route, now, search)
                return now + LAST_GOOD_INTERVAL if at is None and _is_missed(route, search, path) else at
            return _on_path(now, path) if route is path.in_use else _other_relay(route, now, path)
        case Connected(in_use=in_use):
            is_better = route.rank < in_use.rank and not route.is_data_dead(now)
            return _beside_path(route, now, situation) if is_better else None
        case _:
            assert_never(situation)


def ttl(route: Route, *, can_call: bool) -> int | None:
    """The hop limit of the next ping of a search: an opener's, or None for the usual one.

    `can_call`: something carries our calls, so the peer can tell us that it has opened. Nothing moves ports
    in IPv6.
    """
    if not route.opener:
        return None
    if can_call and route.endpoint.family is Family.IPV4:
        return None if route.attempt in BLIND else OPENER_TTL
    return OPENER_TTL if route.attempt < OPENERS else None


def _while_searching(route: Route, now: float, situation: Searching) -> float | None:
    if route.attempt < len(PUNCH):
        return max(route.punched + PUNCH[route.attempt], now + STEP_MIN)
    if situation.is_resting and route.relay is None:
        return None
    if route.endpoint == situation.last_good and now - situation.lost_at < LAST_GOOD_FOR:
        return now + min(LAST_GOOD_INTERVAL, situation.interval)
    return None if situation.given_up else now + situation.interval


def _is_missed(route: Route, search: Searching, path: Connected) -> bool:
    """Whether what flows through the hub used to flow there."""
    return path.is_active and not search.is_resting and route.endpoint == search.last_good


def _other_relay(route: Route, now: float, situation: Connected) -> float | None:
    """Until it has echoed, then now and again: it may have become the shorter way."""
    if route.attempt < len(PUNCH) and route.echoed < route.punched:
        return max(route.punched + PUNCH[route.attempt], now + STEP_MIN)
    return now + RELAY_INTERVAL if situation.is_active else None


def _on_path(now: float, situation: Connected) -> float | None:
    """An idle path is left to WireGuard's keepalive, unless it is watched."""
    if situation.is_in_doubt:
        return None
    is_young = now - situation.since < YOUNG
    usual = situation.interval if is_young or situation.is_active else None
    intervals = [each for each in (usual, situation.watch) if each is not None]
    return now + min(intervals) if intervals else None


def _beside_path(route: Route, now: float, situation: Connected) -> float | None:
    """Eagerly while the search is young, then now and again."""
    if route.attempt < len(PUNCH):
        return route.punched + PUNCH[route.attempt]
    if now < situation.search_until:
        return now + situation.interval
    is_foreign = route.rank[0] == 0 and route.echoed == NEVER  # a private address of another site
    return now + BETTER_INTERVAL if situation.is_active and not is_foreign else None
