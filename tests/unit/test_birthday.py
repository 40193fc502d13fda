"""Guessing ports: who is asked, who refuses, how much is sent, and when it is tried again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from random import Random

import pytest
from scope_agent.paths.birthday import (
    ASKS,
    DAY,
    FIRST_PORT,
    GAP,
    LAST_PORT,
    LINGER,
    MAX_KEPT,
    PORTS,
    RETRY_RULES,
    START_AFTER,
    Ask,
    Birthday,
    Out,
    Tried,
)
from scope_agent.paths.guesses import AT_ONCE, GUESSES, MAX_PER_PEER, RATE, TRY, Say, Standing
from scope_agent.wireguard.port_rules import Opening, PortRules

from scope.model import Endpoint, Mapping, PathKind, PublicKey
from scope.wire import Guess, Guesses, Guessing, Ping

KEY, OTHER = PublicKey(bytes([1]) * 32), PublicKey(bytes([2]) * 32)
OURS = Endpoint(IPv4Address("198.51.100.1"), 31000)
THEIRS = Endpoint(IPv4Address("198.51.100.2"), 22000)
RELAY = Endpoint(IPv4Address("192.0.2.1"), 26007)
PORT = 21000


def relayed(mapping: Mapping, *endpoints: Endpoint) -> Standing:
    return Standing(PathKind.RELAYED, since=0.0, endpoint=RELAY, mapping=mapping, endpoints=endpoints)


@dataclass
class Loop:
    """A machine that does at once what is wanted, and notes what was said."""

    own: Mapping
    here: Endpoint
    pairs: dict[PublicKey, Standing]
    now: float = 0.0
    error: str = ""
    rules: PortRules = field(default_factory=PortRules)
    said: list[tuple[float, Out]] = field(default_factory=list)
    transaction: int = 0

    def __post_init__(self) -> None:
        self.core = Birthday(random=Random(1).random)
        self.core.configure(allowed=True)
        self.core.set_port(PORT)
        self.core.set_own(self.own, (self.here,))

    def next(self) -> int:
        self.transaction += 1
        return self.transaction

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            self.apply()
            at = self.core.get_timer()
            if at is None or at > end:
                break
            assert at >= self.now or at < 0.0
            self.now = max(at, self.now)
            due = self.core.handle_timer(
                self.now, keys=self.pairs, stands=self.pairs.get, transactions=self.next
            )
            self.said += [(self.now, out) for out in due]
        self.now = end

    def apply(self) -> None:
        rules = self.core.take_rules(self.now)
        if rules is not None:
            if not self.error:
                self.rules = rules
            self.core.applied(self.error, self.now)

    def says(self, kind: type[Guess] | type[Ping]) -> list[Say]:
        return [out for _, out in self.said if isinstance(out, Say) and isinstance(out.message, kind)]


def symmetric(**changes: float) -> Loop:
    standing = relayed(Mapping.ENDPOINT_INDEPENDENT, THEIRS)
    return Loop(Mapping.ENDPOINT_DEPENDENT, OURS, {KEY: replace(standing, **changes)})  # type: ignore[arg-type]


def guesser() -> Loop:
    return Loop(Mapping.ENDPOINT_INDEPENDENT, THEIRS, {KEY: relayed(Mapping.ENDPOINT_DEPENDENT, OURS)})


def agreed() -> Loop:
    """The other side has just agreed to guess."""
    loop = symmetric()
    loop.run(START_AFTER + 2.0)
    loop.core.answered(KEY, Guessing(1, Guesses.YES), loop.now)
    return loop


def ask(
    loop: Loop, attempt: int = 1, *, key: PublicKey = KEY, at: Endpoint = THEIRS, here: Endpoint = OURS
) -> Guesses:
    return loop.core.asked(key, Guess(attempt, at=at, here=here), loop.pairs.get(key), loop.now).answer


def test_the_other_side_is_asked_over_the_relay_once_the_pair_was_relayed_for_a_while() -> None:
    loop = symmetric()
    loop.run(START_AFTER - 0.1)
    assert not loop.said
    loop.run(2.5)
    asked = loop.says(Guess)
    assert asked and asked[0] == Say(KEY, Guess(1, at=THEIRS, here=OURS), RELAY)
    search = loop.rules.search
    assert search is not None and search.endpoint == THEIRS and search.last - search.first == PORTS - 1
    assert search.first >= FIRST_PORT and search.last <= LAST_PORT


@pytest.mark.parametrize(
    "standing",
    [
        replace(relayed(Mapping.ENDPOINT_INDEPENDENT, THEIRS), path=PathKind.DIRECT),
        replace(relayed(Mapping.ENDPOINT_INDEPENDENT, THEIRS), path=PathKind.NONE),
        relayed(Mapping.ENDPOINT_DEPENDENT, THEIRS),
        relayed(Mapping.UNKNOWN, THEIRS),
        relayed(Mapping.ENDPOINT_INDEPENDENT),
    ],
    ids=["direct", "no relay", "symmetric too", "unknown", "no endpoint"],
)
def test_nobody_else_is_asked(standing: Standing) -> None:
    loop = Loop(Mapping.ENDPOINT_DEPENDENT, OURS, {KEY: standing})
    loop.run(60.0)
    assert not loop.said and loop.rules.is_empty


@pytest.mark.parametrize("own", [Mapping.ENDPOINT_INDEPENDENT, Mapping.UNKNOWN, Mapping.NONE])
def test_who_is_not_symmetric_asks_nobody(own: Mapping) -> None:
    loop = Loop(own, OURS, {KEY: relayed(Mapping.ENDPOINT_INDEPENDENT, THEIRS)})
    loop.run(60.0)
    assert not loop.said


def test_one_who_does_not_answer_is_asked_a_few_times_and_no_port_is_opened() -> None:
    loop = symmetric()
    loop.run(60.0)
    assert len(loop.says(Guess)) == ASKS and not loop.says(Ping) and loop.rules.is_empty
    assert loop.core.explain(KEY) == "the other side does not answer whether it guesses its ports"


def test_ports_are_opened_short_of_the_other_side_first_and_in_full_after() -> None:
    loop = agreed()
    loop.run(TRY + 1.0)
    pings = loop.says(Ping)
    assert len(pings) == 2 * PORTS and all(ping.endpoint == THEIRS for ping in pings)
    short, full = pings[:PORTS], pings[PORTS:]
    assert {ping.ttl for ping in short} == {2} and {ping.ttl for ping in full} == {None}
    assert len({ping.port for ping in short}) == len({ping.port for ping in full}) == PORTS
    assert loop.rules.is_empty


def test_a_try_that_misses_is_repeated_after_a_day() -> None:
    loop = agreed()
    loop.run(TRY + 1.0)
    assert loop.core.explain(KEY) == "none of its ports was guessed, next try in a day"
    asked = len(loop.says(Guess))
    loop.run(DAY - 60.0)
    assert len(loop.says(Guess)) == asked
    loop.run(120.0)
    assert len(loop.says(Guess)) > asked


@pytest.mark.parametrize(
    ("passed", "is_due"), [(60.0, False), (DAY - 60.0, False), (DAY, True), (-9 * DAY, False)]
)
def test_the_day_goes_on_when_the_agent_starts_anew_and_is_no_longer_by_a_clock_that_was_moved_back(
    passed: float, is_due: bool
) -> None:
    before = agreed()
    before.run(TRY + 1.0)
    (kept,) = before.core.kept_tries(offset=1_800_000_000.0)
    assert (kept.peer, kept.here, kept.at, kept.misses, kept.hits) == (KEY, OURS.address, THEIRS, 1, 0)
    again = symmetric()
    again.core.restore_tries([kept], 0.0, wall=kept.tried + passed)
    assert again.core.explain(KEY) == "none of its ports was guessed, next try in a day"
    again.run(START_AFTER + 2.0)
    assert bool(again.says(Guess)) is is_due
    again.run(DAY)
    assert again.says(Guess)


def test_what_is_kept_of_tries_is_bounded_and_the_latest() -> None:
    loop = symmetric()
    tries = [
        Tried(PublicKey(n.to_bytes(32, "big")), OURS.address, THEIRS, float(n), misses=1, hits=0)
        for n in range(MAX_KEPT + 9)
    ]
    loop.core.restore_tries(tries, 0.0, wall=1000.0)
    assert loop.core.kept_tries(offset=1000.0) == tuple(reversed(tries[9:]))


@pytest.mark.parametrize("change", ["ours", "theirs", "interfaces"])
def test_a_network_that_changed_is_tried_again_at_once(change: str) -> None:
    loop = agreed()
    loop.run(TRY + 1.0)
    asked = len(loop.says(Guess))
    match change:
        case "ours":
            loop.core.set_own(
                Mapping.ENDPOINT_DEPENDENT, (replace(OURS, address=IPv4Address("203.0.113.5")),)
            )
        case "theirs":
            loop.pairs[KEY] = relayed(Mapping.ENDPOINT_INDEPENDENT, replace(THEIRS, port=22001))
        case _:
            loop.core.network_changed(loop.now)
    loop.run(GAP + 3.0)
    assert len(loop.says(Guess)) > asked


def test_the_port_that_was_hit_is_wireguards_from_then_on_and_the_endpoint_is_asked() -> None:
    loop = agreed()
    loop.run(0.5)
    search = loop.rules.search
    assert search is not None
    loop.core.hit(KEY, THEIRS, search.first + 7, loop.now)
    loop.core.hit(KEY, THEIRS, search.first + 8, loop.now)  # too late
    loop.run(0.5)
    assert loop.rules == PortRules(PORT, (Opening(THEIRS, search.first + 7),))
    assert [out for _, out in loop.said if isinstance(out, Ask)] == [Ask(KEY, THEIRS)]
    loop.pairs[KEY] = replace(loop.pairs[KEY], path=PathKind.DIRECT, endpoint=THEIRS)
    loop.run(600.0)
    assert loop.rules.openings and loop.core.holds(THEIRS)
    assert (loop.core.spent.hits, loop.core.spent.seconds) == (1, 0.5)


@pytest.mark.parametrize(
    ("key", "source", "port"),
    [(OTHER, THEIRS, 0), (KEY, replace(THEIRS, port=22001), 0), (KEY, THEIRS, -1), (KEY, THEIRS, PORTS)],
    ids=["another peer", "from elsewhere", "below", "above"],
)
def test_what_no_guess_can_be_opens_nothing(key: PublicKey, source: Endpoint, port: int) -> None:
    loop = agreed()
    loop.run(0.5)
    search = loop.rules.search
    assert search is not None
    loop.core.hit(key, source, search.first + port, loop.now)
    loop.run(0.5)
    assert not loop.rules.openings


def test_a_port_whose_path_does_not_come_about_is_given_back() -> None:
    loop = agreed()
    loop.run(0.5)
    search = loop.rules.search
    assert search is not None
    loop.core.hit(KEY, THEIRS, search.first, loop.now)
    loop.run(30.0)
    assert loop.rules.is_empty and (loop.core.spent.hits, loop.core.spent.misses) == (0, 1)


def test_rules_of_an_earlier_agent_stay_while_their_path_is_in_use_and_linger_no_longer() -> None:
    loop = symmetric()
    loop.core.restore([Opening(THEIRS, 27001)], 0.0)
    loop.pairs[KEY] = replace(loop.pairs[KEY], path=PathKind.DIRECT, endpoint=THEIRS)
    loop.run(100.0)
    assert loop.rules == PortRules(PORT, (Opening(THEIRS, 27001),))
    loop.pairs[KEY] = replace(loop.pairs[KEY], path=PathKind.RELAYED, endpoint=RELAY, since=loop.now)
    loop.run(LINGER - 3.0)
    assert not loop.rules.is_empty
    loop.run(6.0)
    assert loop.core.holds(THEIRS) is False


def test_a_mesh_that_does_not_allow_it_any_more_takes_all_away() -> None:
    loop = symmetric()
    loop.core.restore([Opening(THEIRS, 27001)], 0.0)
    loop.apply()
    loop.core.configure(allowed=False)
    loop.apply()
    assert loop.rules.is_empty
    loop.run(60.0)
    assert not loop.said


def test_without_a_packet_filter_nothing_is_tried_until_there_is_one() -> None:
    loop = symmetric()
    loop.error = "nftables takes no rules here"
    loop.run(RETRY_RULES)
    assert not loop.said
    assert loop.core.explain(KEY) == "its ports cannot be guessed: nftables takes no rules here"
    loop.error = ""
    loop.run(2 * RETRY_RULES)
    assert loop.says(Guess)


def test_who_is_asked_guesses_at_a_bounded_rate_and_no_port_twice() -> None:
    loop = guesser()
    assert ask(loop) is Guesses.YES
    loop.run(1.0)
    assert 0.9 * RATE < len(loop.says(Ping)) < 1.1 * RATE
    loop.run(10.0)
    ports = [ping.endpoint.port for ping in loop.says(Ping)]
    assert len(ports) == len(set(ports)) == GUESSES and min(ports) >= 1024
    assert {ping.endpoint.address for ping in loop.says(Ping)} == {OURS.address}


def test_an_agent_that_was_held_up_does_not_make_up_for_it() -> None:
    loop = guesser()
    ask(loop)
    due = loop.core.handle_timer(3.0, keys=loop.pairs, stands=loop.pairs.get, transactions=loop.next)
    assert len(due) <= AT_ONCE


def test_a_slow_agent_stops_guessing_when_nobody_waits_for_it_any_more() -> None:
    loop = guesser()
    ask(loop)
    for _ in range(4):
        loop.now += TRY / 3
        loop.core.handle_timer(loop.now, keys=loop.pairs, stands=loop.pairs.get, transactions=loop.next)
    assert loop.core.get_timer() is None and loop.core.spent.guesses <= 3 * AT_ONCE


def test_a_question_that_comes_twice_is_one_try() -> None:
    loop = guesser()
    assert ask(loop) is ask(loop) is Guesses.YES
    assert ask(loop, 2) is Guesses.BUSY


def test_guessing_ends_when_the_other_side_is_heard_from_there() -> None:
    loop = guesser()
    ask(loop)
    loop.run(0.5)
    guessed = len(loop.says(Ping))
    loop.core.heard(KEY, RELAY)
    loop.run(0.1)
    assert len(loop.says(Ping)) > guessed
    loop.core.heard(KEY, replace(OURS, port=5))
    guessed = len(loop.says(Ping))
    loop.run(10.0)
    assert len(loop.says(Ping)) == guessed


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"at": replace(THEIRS, port=1)}, Guesses.ELSEWHERE),
        ({"here": replace(OURS, address=IPv4Address("203.0.113.9"))}, Guesses.ELSEWHERE),
        ({"here": replace(OURS, port=1)}, Guesses.YES),
        ({"key": OTHER}, Guesses.ELSEWHERE),
    ],
    ids=["not our endpoint", "a stranger's address", "another port", "nobody's"],
)
def test_nobody_has_us_guess_at_an_address_that_is_not_his(
    change: dict[str, Endpoint], answer: Guesses
) -> None:
    assert ask(guesser(), **change) is answer  # type: ignore[arg-type]


def test_no_peer_has_us_guess_all_day() -> None:
    loop = guesser()
    answers = []
    for attempt in range(1, 30):
        answers.append(ask(loop, attempt))
        loop.run(GAP)
    assert answers.count(Guesses.YES) == MAX_PER_PEER and answers[-1] is Guesses.TOO_OFTEN
    loop.run(3600.0)
    assert ask(loop, 30) is Guesses.YES


def test_where_the_mesh_does_not_allow_it_nobody_guesses() -> None:
    loop = guesser()
    loop.core.configure(allowed=False)
    assert ask(loop) is Guesses.OFF
    loop.run(10.0)
    assert not loop.said


@pytest.mark.parametrize("answer", [Guesses.OFF, Guesses.BUSY, Guesses.TOO_OFTEN, Guesses.ELSEWHERE])
def test_a_refusal_opens_no_port_and_is_told(answer: Guesses) -> None:
    loop = symmetric()
    loop.run(START_AFTER + 2.0)
    loop.core.answered(KEY, Guessing(1, answer), loop.now)
    loop.run(5.0)
    assert not loop.says(Ping) and loop.rules.is_empty
    assert "the other side" in loop.core.explain(KEY)
