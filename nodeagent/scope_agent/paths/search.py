"""The ladder of one search: how long a peer without a path is looked for, and with what effort.

A search calls the peer at once and twice more, connects back at the first bound, and gives up at the second:
the peer is declared unreachable, and tried again ever more rarely. Both bounds are counted from the start of
the search and come from the mesh's timers.

Where both sides have called that they opened and still do not hear each other, a packet that came too early
may have moved a port in one of the NATs, and each further packet keeps it moved. Then the search *rests*:
both sides are silent for longer than a NAT remembers an unanswered flow, and begin anew with openers. They
must rest in step, and the calls before it are what both know of: so there is a second rest, after the calls
that end the first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

from scope.model import Timers
from scope_agent.agenda import earliest
from scope_agent.paths.schedule import FAMILY_DELAY, PUNCH

# Call-me-maybe of one punch: the first may come before the other family's openers have left, be lost, or find
# no session.
CALLS = (0.0, 0.3, 1.0, 3.0)
REPLIES = 3  # calls in answer to calls, for each search of our own: two that know nothing of each other end
MEETING = PUNCH[-1] + FAMILY_DELAY  # of a punch: by then the two sides' pings have met, if they ever do
JUST_NOW = 0.02  # a call that left so lately is not worth another one
RESTS = 2
REST = 33.0  # nf_conntrack_udp_timeout is 30 s; the rest is for two sides that begin some seconds apart
RETRY_FIRST, RETRY_MAX = 60.0, 600.0  # a call and a few pings each: cheap enough never to stop


class Step(enum.Enum):
    """What the ladder asks for."""

    CONNECT_BACK = enum.auto()  # punch again: by now others may have seen the peer elsewhere
    DECLARE = enum.auto()  # say that there is no path
    REST = enum.auto()  # be silent, should a NAT have to forget what it saw
    WAKE = enum.auto()  # begin anew after a rest
    RETRY = enum.auto()  # punch again


class Search:
    """The ladder's state. `random` draws from [0, 1)."""

    def __init__(self, *, timers: Timers, random: Callable[[], float], now: float) -> None:
        self.timers = timers
        self.declared = False  # the last bound has passed without a path
        self.is_met = False  # the peer said in a call that it has opened towards us
        self._random = random
        self._started = now
        self._connected_back = self._had_path = False
        self._rests = 0
        self._woke = now
        self._rest_until: float | None = None
        self._retry_at: float | None = None
        self._retry_after = RETRY_FIRST
        self._punched = now
        self._calls = 0
        self._next_call: float | None = None
        self._replies = 0

    def start(self, now: float, *, had_path: bool) -> None:
        """Climb the ladder from its foot; `had_path`: the pair had one, which may heal at any moment."""
        self._started = now
        self.declared = self._connected_back = self.is_met = False
        self._had_path, self._rests, self._rest_until = had_path, 0, None
        self._retry_at, self._retry_after = None, RETRY_FIRST

    def succeed(self) -> None:
        """There is a path: nothing more is asked for."""
        self.declared = False
        self._retry_at = self._next_call = self._rest_until = None

    def called(self, now: float) -> None:
        """The peer punches now, and so do we: a retry; should it be in vain, the next one waits its time."""
        if self.declared:
            self._schedule_retry(now)
        if self._rest_until is not None and self._rest_until - now > REST / 2:
            self.rest(now + MEETING)  # the peer is to begin its rest

    # --- punches and calls ---------------------------------------------------------------------------------

    def punch(self, now: float, *, call: bool) -> None:
        """Note a punch; `call`: the peer is to be called, so that it punches too."""
        self._punched = now
        if call:
            self._calls, self._next_call = 0, now
            self._replies = 0

    def is_punching(self, now: float) -> bool:
        """Whether the last punch is so young that the two sides' pings are still to meet."""
        return now - self._punched < MEETING

    @property
    def is_calling(self) -> bool:
        """Whether another call is to come."""
        return self._next_call is not None

    def call_again(self, now: float) -> None:
        """There is news for the peer: worth a call, unless one left just now."""
        if not self.declared and now - self._punched > JUST_NOW:
            self._next_call = now

    def reply(self, now: float) -> None:
        """The peer's call shows that it does not know where to open towards: tell it once we have opened."""
        if self._replies < REPLIES:
            self._replies += 1
            self._next_call = now

    def take_call(self, now: float, *, searching: bool) -> bool:
        """Whether a call is due; asked again, it is not. A pair that has a path calls nobody."""
        if self._next_call is None or now < self._next_call:
            return False
        self._calls += 1
        more = self._calls < len(CALLS) and searching
        self._next_call = self._punched + CALLS[self._calls] if more else None
        if self._next_call is not None and self._next_call <= now:
            self._next_call = now + CALLS[1]
        return searching

    def rest(self, now: float) -> None:
        """Be silent from now on, calls and answers aside."""
        self._rest_until = now + REST
        self._next_call = None
        if self._retry_at is not None:
            self._retry_at = max(self._retry_at, self._rest_until + RETRY_FIRST)

    @property
    def is_resting(self) -> bool:
        """Whether nothing is to be sent but in answer."""
        return self._rest_until is not None

    # --- the bounds ----------------------------------------------------------------------------------------

    @property
    def eager_until(self) -> float:
        """Until when a better route than the one that answered is searched eagerly."""
        return self._started + self.timers.address_fallback

    def get_timer(self, *, searching: bool) -> float | None:
        """When `climb` or `take_call` wants to run next."""
        return earliest(self._next_call, self._retry_at, self._next_bound() if searching else None)

    def _next_bound(self) -> float | None:
        rests = self._rest_until
        if rests is None and self._rests < RESTS:
            rests = self._rest_due()
        if self.declared:
            return rests
        timers = self.timers
        bound = timers.hub_fallback if self._connected_back else timers.connect_back
        return earliest(rests, self._started + bound)

    def _rest_due(self) -> float:
        # What had a path is asked for it without a pause at first: most paths that break heal by themselves.
        timers = self.timers
        met = CALLS[-1] + MEETING
        if self._rests:
            return self._woke + met
        return self._started + (timers.hub_fallback if self._had_path else timers.connect_back + met)

    def climb(self, now: float) -> list[Step]:
        """What the bounds that have passed ask for, each once."""
        steps = []
        if not self._connected_back and now >= self._started + self.timers.connect_back:
            self._connected_back = True
            steps.append(Step.CONNECT_BACK)
        if self._rest_until is not None and now >= self._rest_until:
            self._rest_until, self._woke = None, now
            steps.append(Step.WAKE)
        if self._rests < RESTS and self._rest_until is None and now >= self._rest_due():
            self._rests = self._rests + 1 if self.is_met else RESTS
            steps.append(Step.REST)
        if not self.declared and now >= self._started + self.timers.hub_fallback:
            self.declared = True
            self._schedule_retry(now)
            steps.append(Step.DECLARE)
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_after = min(2 * self._retry_after, RETRY_MAX)
            self._schedule_retry(now)
            steps.append(Step.RETRY)
        return steps

    def _schedule_retry(self, now: float) -> None:
        # Not in step: a thousand pairs may have lost their paths in the same moment.
        self._retry_at = now + self._retry_after * (0.9 + 0.2 * self._random())
