"""When a peer has itself carried, and by which hubs. Pure.

A peer that has had no answer over UDP for PATIENCE, of whomever it asked, is carried by two hubs that listen:
the nearest as far as that is known, else those that a hash of both keys names, so that a thousand peers
behind one firewall spread over all hubs. A hub to which no connection comes about does not keep the next one
from being tried. Besides come hubs that granted a relay to a pair that has no path: its other side may be
carried by these alone.

UDP is tried on meanwhile, which is the business of paths. When somebody has answered over it for LET_GO, and
no path in use is a carrier's any more, the peer is carried no longer.

Hubs are named by their WireGuard keys. Time is monotonic seconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass

from scope.model import Endpoint, PublicKey

PATIENCE = 3.0  # two rounds of questions to reflectors and hubs, and the slowest answer
HUBS = 2  # one that dies is left for the other
MAX_HUBS = 8  # connections at once: each costs the peer and a hub a socket
CONNECTS_WITHIN = 5.0  # TCP, TLS and a lost packet or two; then another hub is tried besides
LET_GO = 60.0  # a network that lets some UDP through for a moment is not to be changed for


@dataclass(frozen=True, slots=True)
class ListeningHub:
    """A hub that carries, as its ScopePeer says. `addresses`: where it listens (TCP), the likeliest first."""

    addresses: tuple[Endpoint, ...]
    pin: bytes
    wireguard_port: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What being carried depends on, besides the hubs themselves."""

    silent_since: float | None  # since when nobody answers over UDP
    is_used: bool  # some path in use leads to our carrier
    distances: Mapping[PublicKey, float]  # of hubs that are reached: RTT in seconds
    wanted: Set[PublicKey]  # hubs that relay to us now, or granted to a pair without a path


class Boarding:
    """By which hubs we are carried. `is_carried`: the last run of the agent was."""

    def __init__(self, *, own: PublicKey, is_carried: bool) -> None:
        self._own = own
        self._is_carried = is_carried
        self._hubs: dict[PublicKey, ListeningHub] = {}
        self._announced: Set[PublicKey] = frozenset()  # those of them that say so now
        self._answered_since: float | None = None  # over UDP, while we are carried
        self._chosen: tuple[PublicKey, ...] = ()
        self._connected: Set[PublicKey] = frozenset()
        self._without: dict[PublicKey, float] = {}  # chosen hubs -> since when there is no connection
        self._due: float | None = None

    @property
    def chosen(self) -> tuple[PublicKey, ...]:
        """The hubs to be carried by, the best first; none while UDP does."""
        return self._chosen

    def find(self, hub: PublicKey) -> ListeningHub | None:
        """A hub, if it listens."""
        return self._hubs.get(hub)

    def set_hubs(self, hubs: Mapping[PublicKey, ListeningHub], *, members: Set[PublicKey]) -> None:
        """Take the hubs that say that they listen.

        One that says so no more, as one whose agent just started, is kept for as long as it carries us.
        """
        kept = {hub: at for hub, at in self._hubs.items() if hub in self._chosen and hub in members}
        self._hubs = kept | dict(hubs)
        self._announced = hubs.keys()

    def connected(self, hubs: Set[PublicKey], now: float) -> None:
        """Take to which hubs our carrier is connected."""
        self._connected = hubs
        for hub in self._chosen:
            if hub in hubs:
                self._without.pop(hub, None)
            else:
                self._without.setdefault(hub, now)

    def get_timer(self) -> float | None:
        """When `observe` is to be asked again, whatever happens."""
        return self._due

    @property
    def is_carried(self) -> bool:
        """Whether hubs are to carry us, if there are any that listen."""
        return self._is_carried

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing carries us, and `observe` only waits for nobody to answer over UDP."""
        return not self._is_carried and self._due is None

    def observe(self, around: Surroundings, now: float) -> None:
        """Decide anew."""
        self._due = None
        since = around.silent_since
        if since is not None and now >= since + PATIENCE:
            self._answered_since = None
            self._is_carried = True
        elif self._is_carried:
            self._answered_since = now if self._answered_since is None else self._answered_since
            if not around.is_used:
                self._let_go(self._answered_since, now)
        elif since is not None and self._hubs:
            self._wake_by(since + PATIENCE)
        self._choose(around, now)

    def _let_go(self, answered_since: float, now: float) -> None:
        if now < answered_since + LET_GO:
            self._wake_by(answered_since + LET_GO)
            return
        self._is_carried, self._answered_since = False, None

    def _choose(self, around: Surroundings, now: float) -> None:
        if not self._is_carried:
            self._chosen = ()
            self._without.clear()
            return
        ranking = sorted(
            (hub for hub in self._hubs if hub in self._announced or hub not in self._without),
            key=lambda hub: (
                hub not in self._chosen,
                around.distances.get(hub, float("inf")),
                self._draw(hub),
            ),
        )
        silent = [hub for hub in ranking if self._is_silent(hub, now)]
        able = [hub for hub in ranking if hub not in silent]
        needed = [hub for hub in ranking if hub in around.wanted]
        self._chosen = tuple(dict.fromkeys((*able[:HUBS], *needed, *silent)))[:MAX_HUBS]
        for hub in self._without.keys() - set(self._chosen):
            del self._without[hub]
        for hub in set(self._chosen) - self._connected:
            since = self._without.setdefault(hub, now)
            if now < since + CONNECTS_WITHIN:
                self._wake_by(since + CONNECTS_WITHIN)

    def _is_silent(self, hub: PublicKey, now: float) -> bool:
        return now >= self._without.get(hub, now) + CONNECTS_WITHIN

    def _draw(self, hub: PublicKey) -> bytes:
        return hashlib.sha256(self._own.raw + hub.raw).digest()

    def _wake_by(self, at: float) -> None:
        self._due = at if self._due is None else min(self._due, at)
