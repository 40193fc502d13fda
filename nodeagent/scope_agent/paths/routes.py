"""All routes towards one peer: which are kept, and which one is the best.

A peer can claim endpoints, and speak from endpoints, without end, so the table is bounded. A claimed route is
never pushed out by one that the peer only spoke from, and the route in use is never dropped.

Relays' routes come from grants alone, which are few. They rank last, and among themselves by their RTT, which
is the sum of both ways to the hub. What is carried over TCP on the way ranks behind all of them. One that is
no longer granted ranks last until it is out of use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from scope.model import Endpoint, Family
from scope_agent.paths.candidates import rank
from scope_agent.paths.route import CARRIED, NEVER, RELAYED, VERIFIED, WITHDRAWN, Relay, Route
from scope_agent.paths.schedule import FAMILY_DELAY

MAX_ROUTES = 32  # twice what a peer may publish: the rest are sources it spoke from


class Routes:
    """The routes of one pair, by endpoint."""

    def __init__(self, prefer: Family) -> None:
        self._prefer = prefer
        self._by_endpoint: dict[Endpoint, Route] = {}
        self._expected: tuple[Endpoint, Relay] | None = None

    def __iter__(self) -> Iterator[Route]:
        return iter(self._by_endpoint.values())

    def __len__(self) -> int:
        return len(self._by_endpoint)

    def __contains__(self, endpoint: Endpoint) -> bool:
        return endpoint in self._by_endpoint or self._is_expected(endpoint)

    def _is_expected(self, endpoint: Endpoint) -> bool:
        return self._expected is not None and self._expected[0] == endpoint

    def expect(self, endpoint: Endpoint, relay: Relay) -> None:
        """Our own carrier has the peer speak from there, should it come."""
        self._expected = endpoint, relay

    def get(self, endpoint: Endpoint | None) -> Route | None:
        """The route to an endpoint, where there is one."""
        return self._by_endpoint.get(endpoint) if endpoint is not None else None

    def open(self, endpoint: Endpoint, *, in_use: Endpoint | None) -> Route | None:
        """The route to an endpoint; a new one only while there is room or a stale one to give up."""
        route = self._by_endpoint.get(endpoint)
        if route is not None:
            return route
        if self._expected is not None and self._expected[0] == endpoint:
            route = self._by_endpoint[endpoint] = Route(endpoint, CARRIED, relay=self._expected[1])
            return route
        if sum(route.relay is None for route in self) >= MAX_ROUTES:
            spare = [r for r in self if not r.listed and r.relay is None and r.endpoint != in_use]
            if not spare:
                return None
            del self._by_endpoint[min(spare, key=lambda r: r.last_seen).endpoint]
        route = Route(endpoint, rank(endpoint, self._prefer))
        self._by_endpoint[endpoint] = route
        return route

    def unlist_others(self, listed: frozenset[Endpoint], *, in_use: Endpoint | None, now: float) -> None:
        """Nobody publishes the others any more: they stay only while they are in use or lately seen."""
        for endpoint, route in list(self._by_endpoint.items()):
            if endpoint not in listed and route.relay is None:
                route.listed = False
                if endpoint != in_use and now - route.last_seen > VERIFIED:
                    del self._by_endpoint[endpoint]

    def grant(self, relays: Mapping[Endpoint, Relay], *, in_use: Endpoint | None) -> list[Route]:
        """Take the relays' endpoints that hold now: the routes that are new."""
        for route in self:
            if (
                route.relay is not None
                and route.endpoint not in relays
                and not self._is_expected(route.endpoint)
            ):
                route.rank, route.listed = WITHDRAWN, False
        self.drop_withdrawn(in_use=in_use)
        news = []
        for endpoint, relay in relays.items():
            known = self._by_endpoint.get(endpoint)
            if known is None or known.relay is None:
                known = self._by_endpoint[endpoint] = Route(endpoint, RELAYED)
                news.append(known)
            known.listed, known.opener, known.relay = True, False, relay
            known.rank = CARRIED if known.is_carried else RELAYED
        return news

    def drop_withdrawn(self, *, in_use: Endpoint | None) -> None:
        """Forget the relays' routes that are not granted any more and out of use."""
        for endpoint, route in list(self._by_endpoint.items()):
            if route.rank == WITHDRAWN and endpoint != in_use:
                del self._by_endpoint[endpoint]

    def prefer(self, family: Family) -> None:
        """Rank all routes anew."""
        self._prefer = family
        for route in self:
            if route.relay is None:
                route.rank = rank(route.endpoint, family)

    def order(self, endpoint: Endpoint) -> tuple[tuple[int, int], str]:
        """A sort key: the better endpoint first."""
        return rank(endpoint, self._prefer), str(endpoint)

    def punch(self, route: Route, now: float) -> None:
        """Begin a route's pings: at once, or a little later where a preferred family may win."""
        if route.relay is not None:
            route.punch(now)
            return
        is_second = route.endpoint.family is not self._prefer and route.echoed == NEVER
        waits = is_second and any(r.endpoint.family is self._prefer and r.relay is None for r in self)
        route.punch(now + (FAMILY_DELAY if waits else 0.0))

    def best(self, now: float) -> Route | None:
        """The best usable route."""
        usable = (route for route in self if route.is_usable(now))
        return min(usable, key=lambda r: (r.rank, r.rtt or 0.0), default=None)

    def verified(self, now: float) -> frozenset[Endpoint]:
        """Endpoints that WireGuard may find by itself and stay at."""
        return frozenset([e for e, route in self._by_endpoint.items() if route.is_verified(now)])

    def last_heard(self) -> Endpoint | None:
        """Where the peer was last seen to send from, relays aside."""
        latest, endpoint = NEVER, None
        for route in self._by_endpoint.values():
            if route.relay is None and route.heard > latest:
                latest, endpoint = route.heard, route.endpoint
        return endpoint
