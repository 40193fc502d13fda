"""Which routes are pinged short of the other side's NAT, because nobody said that it knows us.

An *opener* opens our own NAT and dies before it reaches the other one, where it would be unsolicited. A route
needs them while the peer is behind a NAT and has not said that it has opened; what worked last needs none.
"""

from __future__ import annotations

from scope.model import Endpoint, Family, Mapping
from scope_agent.paths.route import Route
from scope_agent.paths.routes import Routes


class Openers:
    """The openers of one pair's routes."""

    def __init__(self) -> None:
        self.mapping = Mapping.UNKNOWN  # the peer's

    def list(self, route: Route, *, last_good: Endpoint | None) -> None:
        """A route was published."""
        route.opener = self._are_wanted(route, last_good)

    def called(self, routes: Routes, opened: frozenset[Family], *, last_good: Endpoint | None) -> None:
        """The peer has opened towards us in these families."""
        for route in routes:
            route.opener = route.endpoint.family not in opened and self._are_wanted(route, last_good)

    def wake(self, routes: Routes) -> None:
        """Both NATs have forgotten the pair."""
        for route in routes:
            route.opener = self._is_behind_nat(route)

    def _are_wanted(self, route: Route, last_good: Endpoint | None) -> bool:
        return self._is_behind_nat(route) and route.endpoint != last_good

    def _is_behind_nat(self, route: Route) -> bool:
        return self.mapping is not Mapping.NONE and route.is_public
