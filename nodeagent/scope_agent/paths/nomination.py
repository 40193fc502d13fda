"""Agreeing on one route: the nomination that stands, and how its endpoint is settled in the device.

WireGuard moves a peer's endpoint to the source of every packet, so two sides that set their endpoints
crosswise chase each other. Therefore one side names the route, in numbered nominations, and both set it
several times.

That is enough where little flows. While data flows both ways, packets under way on the old route keep leading
both ends back, for as long as the data flows. Then each end holds its endpoint for a while against what
arrives from the other route, and the ends change one after the other: the nominator *offers* the new route
and stays on the old one, whatever arrives from the new; the peer changes, and answers; the nominator changes.
So each endpoint changes once, however the packets of the two routes mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scope.model import Endpoint

SETTLE_TIMES = 5  # settings of an endpoint after a nomination: measured to end the chase within 50 ms
SETTLE_MIN_STEP = 0.02  # on one LAN the RTT is too short to space settings by
OFFERS = 8  # unanswered offers of a living route before it is let be: one second, and a third may be lost
OFFER_MIN_STEP = 0.1  # the peer sets its hold before it answers; the packet filter's program needs its time
HOLD_PATIENCE = 1.0  # what waits for a hold to be set is said without it then: the device may not answer
# An end that changed gets what the other sent before it changed, too: one RTT after an answer that arrived,
# two after one that was lost. Then two machines' time to set a hold, and jitter.
HOLD_RTTS, HOLD_MARGIN = 2.0, 0.2
HOLD_MAX = 2.0  # a hold also keeps WireGuard from following the peer: no longer than a satellite's RTTs need


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


def hold_for(rtts: Iterable[float | None]) -> float:
    """Seconds for which to hold an endpoint while a pair changes between routes of these RTTs (seconds)."""
    slowest = max((rtt for rtt in rtts if rtt is not None), default=0.0)
    return min(HOLD_RTTS * slowest + HOLD_MARGIN, HOLD_MAX)


@dataclass(slots=True)
class Offer:
    """A route that was named while another one still carries data: taken once the peer has taken it."""

    route: Endpoint
    next: float  # when it is to be said
    left: int = OFFERS

    def step(self, now: float, *, rtt: float | None, random: Callable[[], float]) -> None:
        """Say it; the next time comes an RTT later, stretched by a draw from [0, 1)."""
        self.left -= 1
        self.next = now + max(rtt or 0.0, OFFER_MIN_STEP) * (1.0 + 0.5 * random())


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
