"""Agreeing on one route: the nomination that stands, and how its endpoint is settled in the device.

WireGuard moves a peer's endpoint to the source of every packet, so two sides that set their endpoints
crosswise chase each other. Therefore one side names the route, in numbered nominations, and both set it
several times.

That is enough where little flows; `changeover` is for where data does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scope.model import Endpoint

SETTLE_TIMES = 5  # settings of an endpoint after a nomination: measured to end the chase within 50 ms
SETTLE_MIN_STEP = 0.02  # on one LAN the RTT is too short to space settings by


@dataclass(slots=True)
class Nomination:
    """The nomination that stands between the two sides."""

    sequence: int = 0
    is_acknowledged: bool = True
    here: Endpoint | None = None  # the endpoint we named as ours, where we nominate
    awaited: tuple[int, Endpoint] | None = None  # one we are to follow once its route has echoed to us

    def name(self, here: Endpoint | None) -> None:
        """Nominate anew: the peer is to send to `here`."""
        self.sequence += 1
        self.is_acknowledged = False
        self.here = here

    def acknowledge(self, sequence: int) -> None:
        """The peer follows nomination `sequence`."""
        self.is_acknowledged = self.is_acknowledged or sequence == self.sequence

    def follow(self, sequence: int) -> None:
        """Follow the peer's nomination."""
        self.sequence, self.awaited = sequence, None


@dataclass(slots=True)
class Settling:
    """Setting one endpoint again and again."""

    next: float | None = None
    is_due: bool = False  # until the endpoint was handed to the device
    _left: int = 0

    def start(self, now: float, *, times: int = SETTLE_TIMES) -> None:
        """Set the endpoint so many times, from now on."""
        self.next, self._left = now, times

    def step(self, now: float, *, rtt: float | None, random: Callable[[], float]) -> None:
        """Set it once; the next time comes an RTT later, stretched by a draw from [0, 1)."""
        self.is_due = True
        self._left -= 1
        step = max(rtt or 0.0, SETTLE_MIN_STEP)
        # Not in step with the traffic: packets that come at a beat would undo every setting alike.
        self.next = now + step * (1.0 + 0.5 * random()) if self._left > 0 else None
