"""When a route wants its next ping.

Three situations: the peer is being searched, the route is the path in use, or it lies beside the path in use.
Each function returns a monotonic time, or None while no ping is needed. `interval` is the mesh's probe
interval; an active path is one that data leaves by.
"""

from __future__ import annotations

from scope.model import Family
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
BETTER_INTERVAL = 20.0  # a better route than the one in use is asked so often: both firewalls are open then


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


def while_searching(
    route: Route, now: float, *, interval: float, lost_at: float | None, given_up: bool
) -> float | None:
    """For a route while there is no path.

    `lost_at`: when it was lost, for the last good route; `given_up`: the ladder's last bound has passed.
    """
    if route.attempt < len(PUNCH):
        return max(route.punched + PUNCH[route.attempt], now + STEP_MIN)
    if lost_at is not None and now - lost_at < LAST_GOOD_FOR:
        return now + min(LAST_GOOD_INTERVAL, interval)
    return None if given_up else now + interval


def on_path(now: float, *, interval: float, since: float, is_active: bool) -> float | None:
    """For the path in use since `since`: an idle one is left to WireGuard's keepalive."""
    return now + interval if now - since < YOUNG or is_active else None


def beside_path(
    route: Route, now: float, *, interval: float, search_until: float, is_active: bool
) -> float | None:
    """For a better route than the one in use: eagerly until `search_until`, then now and again."""
    if route.attempt < len(PUNCH):
        return route.punched + PUNCH[route.attempt]
    if now < search_until:
        return now + interval
    is_foreign = route.rank[0] == 0 and route.echoed == NEVER  # a private address of another site
    return now + BETTER_INTERVAL if is_active and not is_foreign else None
