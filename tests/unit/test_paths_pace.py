"""What keeps agents that fall behind from asking ever more: the pace of searches, and pings in answer."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address

from scope_agent.paths.due import SendTo
from scope_agent.paths.pace import LATE, PACE_PER_SECOND, SLOWEST, Pace
from scope_agent.paths.pair import PING_BACK_PAUSE, Pair
from scope_agent.paths.schedule import PUNCH

from scope.model import Endpoint, Family, Mapping, PublicKey, Timers
from scope.wire import Ping

THEIRS = Endpoint(IPv4Address("198.51.100.7"), 25000)


def _searches(pace: Pace, start: float, *, seconds: float, late: float) -> float:
    """Pings in a second that searches get, with a timer that comes every ten milliseconds."""
    sent = 0
    for tick in range(round(seconds * 100)):
        pace.earn(start + tick / 100, late=late)
        while pace.may_search:
            pace.spend()
            sent += 1
    return sent / seconds


def test_a_machine_that_keeps_up_searches_at_the_full_pace() -> None:
    pace = Pace()
    _searches(pace, 100.0, seconds=1.0, late=LATE / 2)
    assert abs(_searches(pace, 101.0, seconds=2.0, late=LATE / 2) - PACE_PER_SECOND) <= 5.0


def test_an_agent_whose_timers_come_late_asks_less_and_then_by_and_by_more() -> None:
    pace = Pace()
    _searches(pace, 100.0, seconds=5.0, late=2 * LATE)
    assert abs(_searches(pace, 105.0, seconds=4.0, late=2 * LATE) - SLOWEST) <= 1.0
    soon = _searches(pace, 109.0, seconds=2.0, late=0.0)
    assert SLOWEST < soon < PACE_PER_SECOND / 10
    _searches(pace, 111.0, seconds=12.0, late=0.0)
    assert _searches(pace, 123.0, seconds=2.0, late=0.0) > PACE_PER_SECOND * 0.9


def test_a_peer_that_asks_and_asks_and_never_answers_is_not_asked_at_its_rate() -> None:
    pair = Pair(
        key=PublicKey(bytes(32)), lower=True, random=lambda: 0.0, timers=Timers(), prefer=Family.IPV4, now=0.0
    )
    pair.set_candidates(frozenset({THEIRS}), Mapping.NONE, 0.0)
    pair.search(0.0, call=False)
    numbers = itertools.count(1)
    sent = 0
    for tick in range(1000):  # ten pings a second, for ten seconds, whose answers are under way
        now = tick / 100
        due = pair.take(now, lambda: next(numbers), can_call=False)
        sent += sum(isinstance(each, SendTo) and isinstance(each.message, Ping) for each in due)
        if tick % 10 == 5:
            pair.receive(Ping(tick, has_session=False, received=0), THEIRS, now)
    by_itself = len(PUNCH) + PING_BACK_PAUSE / Timers().probe_interval
    assert sent <= by_itself + 1
