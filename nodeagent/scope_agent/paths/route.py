"""One route: an endpoint that may lead to the peer, the pings it was asked, and what its echoes prove.

A route proves itself by echoes alone: that the peer was heard from there, or that somebody claims the
endpoint, is a reason to ping it and nothing more. What was proven fades, and each use of it has its own
patience.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scope.carrier import is_carried
from scope.model import Endpoint
from scope.wire import Pong

NEVER = float("-inf")
RECENT = 1.0  # an echo so lately answers the question before it is asked again
FRESH = 3.0  # an echo proves a route for so long: a nomination may follow
VERIFIED = 30.0  # WireGuard may roam among routes that echoed so lately
PROBATION = 1.0  # an endpoint that WireGuard found by itself may stay for so long until its echo
DATA_DEAD_FOR = 60.0  # a route that swallows WireGuard's packets is not tried again for so long
IN_FLIGHT = 0.05  # a ping asked so lately need not be asked again
OPENED_FOR = 20.0  # a NAT forgets a flow without an answer after 30 s at the earliest; less the call's way
MAX_PENDING = 16  # unanswered pings remembered per route
RTT_GAIN = 0.8  # a route of equal rank must be this much quicker, and RTT_MARGIN, to be switched to
RTT_MARGIN = 0.01
# Ranks behind everything direct: over a hub, over TCP on the way, over a hub that does not grant it any more.
RELAYED, CARRIED, WITHDRAWN = (2, 0), (3, 0), (4, 0)


@dataclass(frozen=True, slots=True)
class Relay:
    """What makes an endpoint a relay's: a grant of the hub with ScopePeer name `hub`, or that it carries us.

    A hub that carries us is found at an endpoint of our own carrier, and we at one of the hub's.
    """

    hub: str
    user_space: bool  # the hub says that a process forwards, not its kernel


@dataclass(slots=True)
class Route:
    """An endpoint of the peer. Times are monotonic seconds, NEVER for what has not happened."""

    endpoint: Endpoint
    rank: tuple[int, int]  # lower is better
    listed: bool = False  # somebody published it; else the peer only spoke from it
    opener: bool = False  # nobody said that the other side's NAT knows us: pings stay short of it
    punched: float = 0.0  # when its punch began
    attempt: int = 0  # pings since then
    asked: float = NEVER  # when the last one left
    next: float | None = None  # when its next ping is due
    pending: dict[int, float] = field(default_factory=dict)  # transaction -> when it was asked
    rtt: float | None = None
    echoed: float = NEVER
    heard: float = NEVER  # the peer pinged us from there
    here: Endpoint | None = None  # our own endpoint, as the peer sees it on this route
    probation: float = NEVER  # WireGuard moved here by itself at this time
    data_dead: float = NEVER  # echoes came, WireGuard's packets did not
    lost: float = NEVER  # given up at this time: only a later echo proves it
    guessed: bool = False  # the peer says that it leaves by a port which we guessed
    relay: Relay | None = None  # the hub's port where it is relayed; None: it leads straight to the peer

    # --- asking --------------------------------------------------------------------------------------------

    def punch(self, at: float) -> None:
        """Begin a series of pings at `at`."""
        self.punched, self.attempt, self.next = at, 0, at

    def ask(self, transaction: int, now: float) -> None:
        """Note a ping; the oldest of too many unanswered ones is forgotten."""
        self.attempt += 1
        self.asked = now
        if len(self.pending) >= MAX_PENDING:
            del self.pending[next(iter(self.pending))]
        self.pending[transaction] = now

    def take_echo(self, pong: Pong, source: Endpoint, now: float) -> bool:
        """Take an echo, which settles older pings too; False when it answers none of this route's.

        A hub answers from where we last knocked: of two ways to it, only the one that also leads back is one.
        """
        sent = self.pending.pop(pong.transaction, None)
        if sent is None or (self.relay is not None and source != self.endpoint):
            return False
        sample = now - sent
        known = self.rtt
        self.rtt = sample if known is None or sample < known else 0.75 * known + 0.25 * sample
        self.echoed, self.here = now, pong.observed
        if self.relay is not None and self.rank != WITHDRAWN:
            self.rank = CARRIED if self.is_carried else RELAYED
        self.pending = {transaction: at for transaction, at in self.pending.items() if at > sent}
        return True

    def is_opened(self, now: float) -> bool:
        """Whether our own NAT lets in what comes from there."""
        return any(now - at < OPENED_FOR for at in self.pending.values()) or self.silence(now) < OPENED_FOR

    def is_asked(self, now: float) -> bool:
        """Whether a ping is on its way."""
        return any(now - at < IN_FLIGHT for at in self.pending.values())

    @property
    def is_public(self) -> bool:
        """Whether it leads straight to the peer, and perhaps through its NAT."""
        return self.relay is None and self.rank[0] > 0

    @property
    def is_carried(self) -> bool:
        """Whether a carrier of ours leads there, or one of the other side's, which so sees us at its own."""
        return is_carried(self.endpoint) or (self.here is not None and is_carried(self.here))

    @property
    def crosses_families(self) -> bool:
        """Whether a relay receives in one address family and sends in the other: no kernel's rules do."""
        return (
            self.relay is not None and self.here is not None and self.here.family is not self.endpoint.family
        )

    # --- what is proven ------------------------------------------------------------------------------------

    def silence(self, now: float) -> float:
        """Seconds since the last echo; infinite without one."""
        return now - self.echoed

    @property
    def last_seen(self) -> float:
        """When the peer was last seen there."""
        return max(self.echoed, self.heard)

    def is_data_dead(self, now: float) -> bool:
        """Whether WireGuard's packets got lost there, though echoes came back."""
        return now - self.data_dead < DATA_DEAD_FOR

    def is_usable(self, now: float) -> bool:
        """Whether it may be nominated."""
        is_fresh = self.silence(now) < FRESH and self.echoed > self.lost
        return is_fresh and not self.is_data_dead(now)

    def is_verified(self, now: float) -> bool:
        """Whether WireGuard may stay there after it moved there by itself."""
        return self.silence(now) < VERIFIED or now - self.probation < PROBATION

    def beats(self, other: Route) -> bool:
        """Whether it is better than `other` by enough to be worth a switch."""
        if self.rank != other.rank:
            return self.rank < other.rank
        if self.rtt is None or other.rtt is None:
            return False
        return self.rtt < RTT_GAIN * other.rtt and self.rtt < other.rtt - RTT_MARGIN
