"""Changing from one path to another while data flows: the offer, the hold, and the answer that waits for it.

While data flows both ways, packets under way on the old route keep leading both ends back, for as long as the
data flows. Therefore each end holds its endpoint for a while against what arrives from the other route, and
the ends change one after the other: the nominator *offers* the new route and stays on the old one, whatever
arrives from the new; the peer changes, and answers; the nominator changes. So each endpoint changes once,
however the packets of the two routes mix.

What is said to the other side counts on our own hold, and so waits until the device has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scope.model import Endpoint, PublicKey
from scope_agent.agenda import earliest
from scope_agent.paths.due import SendTo
from scope_agent.paths.route import NEVER
from scope_agent.wireguard.device import HoldEndpoint

OFFERS = 8  # unanswered offers of a living route before it is let be: one second, and a third may be lost
OFFER_MIN_STEP = 0.1  # the peer sets its hold before it answers; the packet filter's program needs its time
OFFER_PAUSE = 5.0  # an offer that nobody answers is not repeated without pause
HOLD_PATIENCE = 1.0  # what waits for a hold to be set is said without it then: the device may not answer
# An end that changed gets what the other sent before it changed, too: one RTT after an answer that arrived,
# two after one that was lost. Then two machines' time to set a hold, and jitter.
HOLD_RTTS, HOLD_MARGIN = 2.0, 0.2
HOLD_MAX = 2.0  # a hold also keeps WireGuard from following the peer: no longer than a satellite's RTTs need


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


class Changeover:
    """What one pair offers, holds and is about to answer. `key` is the peer's in the device."""

    def __init__(self, key: PublicKey) -> None:
        self._key = key
        self._offer: Offer | None = None
        self._offer_after = NEVER
        self._answer: tuple[float, SendTo] | None = None  # once our endpoint is held, at the latest then
        self._hold: HoldEndpoint | None = None  # until it was handed to the device
        self._held: tuple[HoldEndpoint, float] | None = None  # the last one, and when it ends

    def drop(self) -> None:
        """The path was lost: there is nothing to change from."""
        self._offer = self._answer = None

    # --- holding -------------------------------------------------------------------------------------------

    @property
    def hold(self) -> HoldEndpoint | None:
        """What is to be handed to the device."""
        return self._hold

    def hold_at(
        self, endpoint: Endpoint, against: set[Endpoint], *, rtts: Iterable[float | None], now: float
    ) -> None:
        """Hold the device's endpoint against what arrives from others; `rtts` are those of all of them."""
        self._set(HoldEndpoint(self._key, endpoint, frozenset(against), hold_for(rtts)), now)

    def _set(self, hold: HoldEndpoint, now: float) -> None:
        self._hold, self._held = hold, (hold, now + hold.seconds)

    def settled(self) -> None:
        """The hold was handed to the device."""
        self._hold = None

    def held(self, now: float) -> None:
        """The device's endpoint is held now: what waited for it may be said."""
        if self._offer is not None and self._offer.left == OFFERS:
            self._offer.next = now
        if self._answer is not None:
            self._answer = (now, self._answer[1])

    # --- offering ------------------------------------------------------------------------------------------

    @property
    def is_offering(self) -> bool:
        """Whether an offer stands."""
        return self._offer is not None

    def may_offer(self, now: float) -> bool:
        """Whether no offer was given up lately."""
        return now >= self._offer_after

    def offer(self, route: Endpoint, now: float) -> None:
        """Offer a route, once our endpoint is held."""
        self._offer = Offer(route, next=now + HOLD_PATIENCE)

    def withdraw(self) -> Endpoint | None:
        """End the offer, whatever came of it: the route that it named."""
        offer, self._offer = self._offer, None
        return offer.route if offer is not None else None

    def give_up(self, now: float) -> None:
        """Nobody answers: offer nothing for a while."""
        self._offer_after = now + OFFER_PAUSE

    def due_offer(self, now: float) -> Offer | None:
        """The offer that is to be said, or given up, now."""
        return self._offer if self._offer is not None and now >= self._offer.next else None

    # --- answering -----------------------------------------------------------------------------------------

    def answer(self, answer: SendTo, now: float) -> list[SendTo]:
        """What to say at once of an answer; it waits where our endpoint is to be held first."""
        if self._hold is None:
            return [answer]
        self._answer = (now + HOLD_PATIENCE, answer)
        return []

    def answer_again(self, answer: SendTo, now: float) -> list[SendTo]:
        """The answer was lost, unless it still waits: the peer is still to change, so hold on."""
        if self._answer is not None:
            return []
        if self._held is not None and now < self._held[1]:
            self._set(self._held[0], now)
        return [answer]

    def take_answer(self, now: float) -> list[SendTo]:
        """The answer that is due, once."""
        if self._answer is None or now < self._answer[0]:
            return []
        answer, self._answer = self._answer[1], None
        return [answer]

    def get_timer(self) -> float | None:
        """When `due_offer` or `take_answer` wants to be asked next."""
        return earliest(
            self._offer.next if self._offer is not None else None,
            self._answer[0] if self._answer is not None else None,
        )
