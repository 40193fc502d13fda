"""The path towards the peer: the endpoint in use, since when it lives, why it does not, and what worked last.

An endpoint is in use from when WireGuard is to send there, and alive once an echo proves it. It is the peer's
own, or a relay's; what worked last is always the peer's own. That
is programmed without a proof where none comes: a WireGuard session may outlive the agent at either end.
"""

from __future__ import annotations

from ipaddress import IPv4Address

from scope.model import Endpoint
from scope_agent.paths.route import NEVER

NOWHERE = Endpoint(IPv4Address("127.0.0.1"), 9)  # discard (RFC 863): WireGuard cannot be told to be silent
RESTORE_AFTER = 1.0  # an echo is better, but a session that still lives needs no search


class Path:
    """The path of one pair. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.endpoint: Endpoint | None = None  # in use, alive or not
        self.is_alive = False  # believed to work
        self.is_relayed = False  # `endpoint` is a hub's
        self.since = now  # of `is_alive` and `is_relayed`, or of when the peer was declared unreachable
        self.taken_at = NEVER  # when the two sides agreed on it
        self.last_good: Endpoint | None = None  # straight to the peer
        self.lost_at = NEVER
        self.reason = ""  # why there is no direct one
        self._restore_at: float | None = None

    def restore(self, endpoint: Endpoint, now: float) -> None:
        """Take what worked before a restart: in use after a second without an echo."""
        self.last_good, self.lost_at = endpoint, now
        self._restore_at = now + RESTORE_AFTER

    @property
    def is_direct(self) -> bool:
        """Whether it works, and leads straight to the peer."""
        return self.is_alive and not self.is_relayed

    def adopt(self, endpoint: Endpoint, now: float, *, relayed: bool) -> None:
        """Take what the device has: it is in use already."""
        self.move(endpoint, now, relayed=relayed)
        self._restore_at = None

    def take(self, endpoint: Endpoint, now: float, *, relayed: bool) -> None:
        """Take what the two sides agreed on."""
        self.adopt(endpoint, now, relayed=relayed)
        self.taken_at = now

    def move(self, endpoint: Endpoint, now: float, *, relayed: bool) -> None:
        """The device moved there by itself, and is right."""
        if self.is_alive and relayed != self.is_relayed:
            self.since = now
            self.lost_at = now if relayed else self.lost_at
        self.endpoint, self.is_relayed = endpoint, relayed
        if not relayed:
            self.last_good = endpoint

    def live(self, now: float) -> None:
        """It works."""
        if not self.is_alive:
            self.is_alive, self.since = True, now

    def lose(self, reason: str, now: float) -> None:
        """It works no more."""
        self.is_alive, self.reason, self.since = False, reason, now
        if not self.is_relayed:
            self.last_good, self.lost_at = self.endpoint, now

    def rest(self) -> None:
        """Let WireGuard send nowhere, where it sends to the peer in vain."""
        if self.endpoint is not None and not self.is_alive:
            self.endpoint, self.is_relayed = NOWHERE, False

    def wake(self, restore_at: float) -> None:
        """The rest is over; what worked last is in use again at `restore_at`, unless an echo comes before."""
        if self.endpoint == NOWHERE:
            self.endpoint, self._restore_at = None, restore_at

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return self._restore_at

    def handle_timer(self, now: float) -> bool:
        """Whether what worked last came into use just now."""
        if self._restore_at is None or now < self._restore_at:
            return False
        self._restore_at = None
        if self.is_alive or self.endpoint is not None or self.last_good is None:
            return False
        self.endpoint, self.is_relayed = self.last_good, False
        return True
