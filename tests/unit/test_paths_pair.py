"""One pair in virtual time: when it pings, whom it believes, what it agrees on, when it gives a path up."""

from __future__ import annotations

import itertools

import pytest
from scope_agent.paths.changeover import OFFERS
from scope_agent.paths.due import CallPeer, CheckMapping, Due, SendTo
from scope_agent.paths.pair import Pair
from scope_agent.paths.route import Relay
from scope_agent.paths.view import PairView

from scope.model import Endpoint, Family, Mapping, PathKind, PublicKey, Timers
from scope.wire import Nominate, Nominated, Ping, Pong

V6 = Endpoint.parse("[2001:db8::2]:41641")
V4 = Endpoint.parse("198.51.100.2:41641")
OTHER = Endpoint.parse("198.51.100.3:41641")
HERE = Endpoint.parse("203.0.113.1:41641")
HUB1, HUB2 = Endpoint.parse("192.0.2.10:26000"), Endpoint.parse("192.0.2.20:26000")
RELAYS = {HUB1: Relay("hub1", user_space=False), HUB2: Relay("hub2", user_space=False)}
RTT = 0.03
PUNCH = [0.0, 0.1, 0.2, 0.4, 0.8, 1.6]


class _Loop:
    """Drives one pair whose peer echoes at the endpoints in `rtt`, after so many seconds.

    The peer follows nominations while `follows`. `received` is what it says to have received of our data.
    """

    def __init__(self, *listed: Endpoint, lower: bool = True, mapping: Mapping = Mapping.NONE) -> None:
        self.now = 0.0
        self.rtt: dict[Endpoint, float] = {}
        self.follows = True
        self.can_call = False
        self.received = 0
        self.log: list[tuple[float, Due]] = []
        self.settled: list[float] = []  # when an endpoint was handed to the device
        self._arriving: list[tuple[float, Pong | Nominated, Endpoint]] = []
        self._numbers = itertools.count(1)
        self._tx = self._rx = 0
        self.pair = Pair(
            key=PublicKey(bytes([2] * 32)),
            lower=lower,
            random=lambda: 0.5,
            timers=Timers(),
            prefer=Family.IPV6,
            now=0.0,
        )
        self.pair.set_candidates(frozenset(listed), mapping, 0.0)
        self.pair.search(0.0)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = min((at for at, _, _ in self._arriving), default=None)
            times = [t for t in (self.pair.get_timer(), due) if t is not None]
            if not times or min(times) > end:
                break
            self.now = max(self.now, min(times))
            arrived = [entry for entry in self._arriving if entry[0] <= self.now]
            self._arriving = [entry for entry in self._arriving if entry[0] > self.now]
            for _, message, source in arrived:
                self._note(self.pair.receive(message, source, self.now))
            self._note(self.pair.take(self.now, lambda: next(self._numbers), can_call=self.can_call))
            if self.view().settling:
                self.settled.append(self.now)
                self.pair.settled()
        self.now = end

    def hear(self, message: Ping | Nominate, source: Endpoint) -> list[Due]:
        said = self.pair.receive(message, source, self.now)
        self._note(said)
        return said

    def hear_ping(self, source: Endpoint, *, has_session: bool = False) -> list[Due]:
        return self.hear(Ping(9, has_session=has_session, received=0), source)

    def device(
        self, *, sent: int = 0, got: int = 0, handshake: bool = False, endpoint: Endpoint | None = None
    ) -> None:
        """The device sent and got so many bytes since the last reading."""
        self._tx, self._rx = self._tx + sent, self._rx + got
        session = handshake or self._rx > 0
        self.pair.observe(
            tx=self._tx, rx=self._rx, endpoint=endpoint, handshake=handshake, session=session, now=self.now
        )

    def _note(self, said: list[Due]) -> None:
        for due in said:
            self.log.append((self.now, due))
            if not isinstance(due, SendTo) or due.ttl is not None or due.endpoint not in self.rtt:
                continue
            back = self.now + self.rtt[due.endpoint]
            match due.message:
                case Ping(transaction):
                    echo = Pong(transaction, HERE, has_session=False, received=self.received)
                    self._arriving.append((back, echo, due.endpoint))
                case Nominate(sequence) if self.follows:
                    self._arriving.append((back, Nominated(sequence), due.endpoint))
                case _:
                    pass

    def view(self) -> PairView:
        return self.pair.view(self.now)

    def is_direct(self) -> bool:
        return self.view().path is PathKind.DIRECT

    def pings(self, endpoint: Endpoint) -> list[tuple[float, int | None]]:
        """When the endpoint was pinged, and with which hop limit."""
        return [
            (round(at, 3), due.ttl)
            for at, due in self.log
            if isinstance(due, SendTo) and isinstance(due.message, Ping) and due.endpoint == endpoint
        ]

    def times(self, endpoint: Endpoint) -> list[float]:
        return [at for at, _ in self.pings(endpoint)]

    def nominations(self) -> list[Nominate]:
        messages = (due.message for _, due in self.log if isinstance(due, SendTo))
        return [message for message in messages if isinstance(message, Nominate)]


def _connected(*, lower: bool = True, rtt: float = RTT) -> _Loop:
    """A pair that has a path over `V4` and a session, and is no longer young."""
    loop = _Loop(V4, lower=lower)
    loop.rtt[V4] = rtt
    loop.run(0.5)
    if not lower:
        loop.hear(Nominate(1, there=HERE, here=V4), V4)
    loop.device(got=92, handshake=True)
    loop.run(30.0)
    assert loop.is_direct()
    loop.log.clear()
    loop.settled.clear()
    return loop


# --- searching ---------------------------------------------------------------------------------------------


def test_a_search_pings_in_a_burst_and_then_every_probe_interval() -> None:
    loop = _Loop(V6)
    loop.run(7.9)
    assert loop.times(V6) == [*PUNCH, 3.6, 5.6, 7.6]


def test_the_less_preferred_family_waits_a_quarter_of_a_second_where_the_other_exists() -> None:
    both, alone = _Loop(V6, V4), _Loop(V4)
    both.run(0.3)
    alone.run(0.3)
    assert both.times(V6)[0] == 0.0
    assert both.times(V4)[0] == 0.25
    assert alone.times(V4)[0] == 0.0


def test_a_peer_that_can_be_called_gets_openers_until_it_says_that_it_opened() -> None:
    loop = _Loop(V4, mapping=Mapping.ENDPOINT_INDEPENDENT)
    loop.can_call = True
    loop.run(1.0)
    assert {ttl for _, ttl in loop.pings(V4)} == {2}
    loop.pair.called(frozenset({V4}), opened=frozenset({Family.IPV4}), reply=False, now=loop.now)
    loop.run(0.01)
    assert loop.pings(V4)[-1] == (1.0, None)


def test_a_peer_whose_word_does_not_come_through_gets_three_full_pings() -> None:
    loop = _Loop(V4, mapping=Mapping.ENDPOINT_INDEPENDENT)
    loop.can_call = True
    loop.run(19.0)
    assert [at for at, ttl in loop.pings(V4) if ttl is None] == [5.6, 7.6, 9.6]


def test_two_openers_go_before_the_first_full_ping_towards_a_nat_and_none_without_one() -> None:
    behind, without = _Loop(V4, mapping=Mapping.ENDPOINT_INDEPENDENT), _Loop(V4)
    behind.run(0.5)
    without.run(0.5)
    assert behind.pings(V4) == [(0.0, 2), (0.1, 2), (0.2, None), (0.4, None)]
    assert [ttl for _, ttl in without.pings(V4)] == [None] * 4


def test_a_ping_from_behind_a_nat_shows_that_it_is_open_so_no_more_openers_go() -> None:
    loop = _Loop(V4, mapping=Mapping.ENDPOINT_INDEPENDENT)
    loop.run(0.06)
    loop.hear_ping(V4)
    loop.run(0.01)
    assert loop.pings(V4) == [(0.0, 2), (0.06, None)]


def test_a_ping_from_an_unknown_source_is_echoed_and_asked_back_at_once() -> None:
    loop = _Loop(V6)
    loop.run(1.0)
    (answer,) = loop.hear_ping(OTHER)
    assert answer == SendTo(Pong(9, OTHER, has_session=False, received=0), OTHER)
    loop.run(0.01)
    assert loop.times(OTHER) == [1.0]
    assert loop.view().observed == OTHER


def test_a_search_calls_the_peer_four_times_and_again_when_it_connects_back() -> None:
    loop = _Loop(V6)
    loop.run(30.0)
    calls = [at for at, due in loop.log if isinstance(due, CallPeer)]
    assert calls == [0.0, 0.3, 1.0, 3.0, 20.0, 20.3, 21.0, 23.0]


def test_who_calls_without_knowing_us_is_told_at_most_three_times() -> None:
    loop = _Loop(V4, mapping=Mapping.ENDPOINT_INDEPENDENT)
    loop.can_call = True
    loop.run(5.0)
    loop.log.clear()
    for _ in range(6):
        loop.pair.called(frozenset({V4}), opened=frozenset(), reply=True, now=loop.now)
        loop.run(0.1)
    calls = [index for index, (_, due) in enumerate(loop.log) if isinstance(due, CallPeer)]
    assert len(calls) == 3
    assert isinstance(loop.log[0][1], SendTo)  # an opener leaves before the call that speaks of it
    assert loop.pair.opened(loop.now) == (V4,)


def test_a_peer_is_declared_at_the_last_bound_and_retried_ever_more_rarely() -> None:
    loop = _Loop(V6)
    loop.run(59.9)
    assert not loop.view().declared
    loop.run(0.2)
    assert loop.view().declared
    assert loop.view().since == 60.0
    loop.run(2.0)
    loop.log.clear()
    loop.run(2500.0)
    calls = [at for at, due in loop.log if isinstance(due, CallPeer)]
    assert calls[::4] == [120.0, 240.0, 480.0, 960.0, 1560.0, 2160.0]
    assert len(loop.times(V6)) == 6 * len(PUNCH)


# --- agreeing ----------------------------------------------------------------------------------------------


def test_the_lower_key_waits_one_round_trip_for_a_better_echo() -> None:
    loop = _Loop(V4, V6)
    loop.rtt = {V4: 0.1, V6: 0.4}  # the worse one echoes at 0.35 s, the better one at 0.4 s
    loop.run(0.44)
    assert not loop.is_direct()
    loop.run(0.02)
    assert (loop.is_direct(), loop.view().endpoint) == (True, V6)
    assert [n.there for n in loop.nominations()] == [V6]


def test_a_better_route_that_echoes_late_is_nominated_over_the_one_in_use() -> None:
    loop = _Loop(V4, V6)
    loop.rtt = {V4: 0.01, V6: 0.5}
    loop.run(0.3)
    assert loop.view().endpoint == V4
    loop.run(1.0)
    assert [n.there for n in loop.nominations()] == [V4, V6]
    assert loop.view().endpoint == V6


def test_a_nominated_endpoint_is_set_five_times_about_a_round_trip_apart() -> None:
    loop = _Loop(V4)
    loop.rtt[V4] = 0.1
    loop.run(5.0)
    assert loop.settled == pytest.approx([0.2 + step * 0.125 for step in range(5)])
    assert loop.nominations()[0] == Nominate(1, there=V4, here=HERE)


def test_a_nomination_is_repeated_until_it_is_acknowledged() -> None:
    heard, unheard = _Loop(V4), _Loop(V4)
    heard.rtt[V4] = unheard.rtt[V4] = 0.1
    unheard.follows = False
    heard.run(10.0)
    unheard.run(10.0)
    assert len(heard.nominations()) == 1
    assert len(unheard.nominations()) == 5 + 4  # and once more with each echo of a young path
    assert {n.sequence for n in unheard.nominations()} == {1}


def test_the_higher_key_nominates_nothing_and_follows_once_the_route_has_echoed_to_it() -> None:
    loop = _Loop(V4, lower=False)
    loop.run(1.0)
    assert loop.hear(Nominate(1, there=HERE, here=V4), V4) == []
    assert not loop.is_direct()
    loop.rtt[V4] = RTT
    loop.run(1.0)
    assert (loop.is_direct(), loop.view().endpoint) == (True, V4)
    assert loop.nominations() == []


def test_a_nomination_that_came_late_moves_nothing() -> None:
    loop = _connected(lower=False)
    loop.rtt[OTHER] = RTT
    loop.hear_ping(OTHER)
    loop.run(0.5)
    assert loop.hear(Nominate(2, there=HERE, here=OTHER), OTHER) == [SendTo(Nominated(2), OTHER)]
    assert loop.hear(Nominate(1, there=HERE, here=V4), OTHER) == []
    assert loop.view().endpoint == OTHER


def test_the_side_that_does_not_initiate_holds_the_device_back_for_the_handshake() -> None:
    lower, higher = _Loop(V4), _Loop(V4, lower=False)
    for loop in (lower, higher):
        loop.rtt[V4] = RTT
        loop.run(0.5)
    higher.hear(Nominate(1, there=HERE, here=V4), V4)
    assert lower.view().ready
    assert higher.is_direct()
    assert not higher.view().ready
    higher.run(0.2)
    higher.device(handshake=True)
    higher.run(0.0)
    assert higher.view().ready


def test_a_handshake_that_never_comes_is_waited_for_one_second() -> None:
    loop = _Loop(V4, lower=False)
    loop.rtt[V4] = RTT
    loop.run(0.5)
    loop.hear(Nominate(1, there=HERE, here=V4), V4)
    loop.run(0.99)
    assert not loop.view().ready
    loop.run(0.02)
    assert loop.view().ready


def test_a_peer_whose_handshake_came_before_its_nomination_may_be_sent_to_once_it_echoes() -> None:
    loop = _Loop(V4, lower=False)
    loop.device(got=148, handshake=True, endpoint=V4)
    loop.rtt[V4] = RTT
    loop.run(2.0)
    assert (loop.is_direct(), loop.view().endpoint, loop.view().ready) == (True, V4, True)


def test_a_side_without_a_session_initiates_whatever_its_key() -> None:
    loop = _Loop(V4, lower=False)
    loop.rtt[V4] = RTT
    loop.run(0.5)
    loop.hear_ping(V4, has_session=True)
    loop.hear(Nominate(1, there=HERE, here=V4), V4)
    assert loop.view().ready


def test_a_route_of_equal_rank_must_be_clearly_quicker_to_be_switched_to() -> None:
    slightly, clearly = _connected(rtt=0.1), _connected(rtt=0.1)
    slightly.rtt[OTHER], clearly.rtt[OTHER] = 0.09, 0.05
    for loop in (slightly, clearly):
        loop.hear_ping(OTHER)
        loop.run(1.0)
    assert slightly.view().endpoint == V4
    assert clearly.view().endpoint == OTHER


def test_among_living_routes_of_one_rank_a_switch_is_followed_by_five_seconds_without() -> None:
    third = Endpoint.parse("198.51.100.4:41641")
    loop = _connected(rtt=0.1)
    loop.rtt |= {OTHER: 0.05, third: 0.01}
    loop.hear_ping(OTHER)
    loop.run(1.0)
    loop.hear_ping(third)
    loop.run(3.0)
    assert loop.view().endpoint == OTHER
    loop.run(2.0)
    loop.hear_ping(third)
    loop.run(1.0)
    assert loop.view().endpoint == third


# --- judging -----------------------------------------------------------------------------------------------


def test_data_out_and_unanswered_for_three_tenths_of_a_second_is_asked_three_times_and_then_dead() -> None:
    loop = _connected()
    loop.rtt.clear()
    sent_at = loop.now
    loop.device(sent=1000)
    loop.run(0.64)
    assert loop.is_direct()
    assert [at - sent_at for at in loop.times(V4)] == pytest.approx([0.3, 0.4, 0.5])
    assert any(isinstance(due, CheckMapping) for _, due in loop.log)
    loop.run(0.02)
    assert not loop.is_direct()
    assert loop.view().reason == f"no answer from {V4}"


def test_an_echo_ends_the_doubt() -> None:
    loop = _connected()
    loop.device(sent=1000)
    loop.run(2.0)
    assert loop.is_direct()
    assert loop.times(V4)[0] == pytest.approx(loop.now - 1.7)


def test_an_answer_or_mere_keepalives_leave_no_doubt() -> None:
    loop = _connected()
    loop.rtt.clear()
    loop.device(sent=1000)
    loop.device(got=1000)
    loop.device(sent=32)
    loop.run(1.9)
    assert loop.is_direct()
    assert loop.times(V4) == []


def test_a_slow_path_has_two_round_trips_for_its_last_answer() -> None:
    loop = _connected(rtt=0.4)
    loop.rtt.clear()
    loop.device(sent=1000)
    loop.run(0.3 + 0.2 + 0.79)
    assert loop.is_direct()
    loop.run(0.02)
    assert not loop.is_direct()


def test_an_idle_path_is_left_to_keepalives() -> None:
    loop = _connected()
    loop.run(3600.0)
    assert loop.log == []


def test_the_last_good_endpoint_is_asked_every_second_and_a_half_for_ten_minutes() -> None:
    loop = _connected()
    loop.rtt.clear()
    loop.device(sent=1000)
    loop.run(5.0)
    assert not loop.is_direct()
    lost_at = loop.view().since
    loop.run(700.0)
    gaps = [b - a for a, b in itertools.pairwise(loop.times(V4)) if 5.0 < a - lost_at < 18.0]
    assert gaps == pytest.approx([1.5] * len(gaps))
    assert len(gaps) > 5
    apart = [b - a for a, b in itertools.pairwise(loop.times(V4)) if lost_at + 60.0 < a < lost_at + 599.0]
    assert max(apart) < 1.6
    late = [at for at in loop.times(V4) if at > lost_at + 602.0]
    assert len(late) <= len(PUNCH)  # a retry, at most


def test_a_peer_declared_unreachable_that_calls_in_vain_is_still_tried_again() -> None:
    loop = _Loop(V4)
    loop.run(70.0)
    assert loop.view().declared
    loop.pair.called(frozenset({V4}), opened=frozenset({Family.IPV4}), reply=False, now=loop.now)
    loop.run(3.0)
    quiet_from = loop.now
    loop.run(3600.0)
    assert [at for at in loop.times(V4) if at > quiet_from + 10.0]


def test_a_path_that_swallows_data_while_its_echoes_pass_is_left_and_not_offered_again() -> None:
    loop = _connected()
    loop.device(sent=10_000, got=100)
    loop.received = 5_000
    for _ in range(8):
        loop.device(sent=10_000, got=100)
        loop.run(1.0)
    assert not loop.is_direct()
    assert loop.view().reason == f"probes to {V4} pass but WireGuard's packets do not"
    assert loop.hear_ping(V4) == []
    loop.run(30.0)
    assert not loop.is_direct()


def test_a_restored_endpoint_is_programmed_after_a_second_without_an_echo() -> None:
    loop = _Loop(mapping=Mapping.ENDPOINT_INDEPENDENT)
    loop.pair.restore(V4, 0.0)
    loop.run(0.99)
    assert loop.view().endpoint is None
    assert all(ttl is None for _, ttl in loop.pings(V4))
    loop.run(0.02)
    assert (loop.view().endpoint, loop.view().ready, loop.is_direct()) == (V4, True, False)


# --- changing while data flows ------------------------------------------------------------------------------


def _offering() -> _Loop:
    """A pair that carries data over `V4`, and of which `V6` has just answered."""
    loop = _connected()
    loop.rtt[V6] = RTT
    loop.device(sent=5000, got=5000, endpoint=V4)
    loop.pair.set_candidates(frozenset({V4, V6}), Mapping.NONE, loop.now)
    return loop


def test_a_path_that_carries_data_is_left_only_once_the_peer_has_left_it() -> None:
    loop = _offering()
    loop.follows = False
    loop.run(2 * RTT + 0.01)
    hold = loop.view().hold
    assert hold is not None
    assert (hold.endpoint, set(hold.against)) == (V4, {V6})
    assert loop.view().endpoint == V4
    assert loop.nominations() == []
    loop.pair.settled()
    loop.pair.held(loop.now)
    loop.run(0.01)
    (offer,) = loop.nominations()
    assert (offer.there, loop.view().endpoint) == (V6, V4)
    loop.pair.receive(Nominated(offer.sequence), V6, loop.now)
    view = loop.view()
    assert view.endpoint == V6
    assert view.hold is not None
    assert (view.hold.endpoint, set(view.hold.against)) == (V6, {V4})


def test_a_path_that_carries_nothing_is_left_at_once() -> None:
    loop = _connected()
    loop.rtt[V6] = RTT
    loop.pair.set_candidates(frozenset({V4, V6}), Mapping.NONE, loop.now)
    loop.run(2 * RTT + 0.01)
    assert loop.view().endpoint == V6
    assert loop.view().hold is None


def test_an_offer_that_is_never_answered_is_taken_back() -> None:
    loop = _offering()
    loop.follows = False
    loop.run(5.0)
    offers = [n for n in loop.nominations() if n.there == V6]
    assert len(offers) == OFFERS  # and no more for some seconds
    assert loop.nominations()[-1].there == V4  # the peer may have followed unheard
    assert loop.view().endpoint == V4


def test_a_path_that_dies_while_another_is_offered_is_left_at_once() -> None:
    loop = _offering()
    loop.follows = False
    loop.run(2 * RTT + 0.01)
    loop.pair.held(loop.now)
    loop.run(0.05)
    assert loop.view().endpoint == V4
    assert loop.nominations()
    loop.pair.network_changed(loop.now, lost=True)
    loop.run(2 * RTT)
    assert loop.view().endpoint == V6


def test_the_peer_holds_its_endpoint_too_and_again_where_its_answer_was_lost() -> None:
    loop = _connected(lower=False)
    loop.rtt[V6] = RTT
    loop.device(sent=5000, got=5000, endpoint=V4)
    loop.pair.set_candidates(frozenset({V4, V6}), Mapping.NONE, loop.now)
    loop.run(2 * RTT)
    nominate, answer = Nominate(2, there=HERE, here=V6), SendTo(Nominated(2), V6)
    for is_repeated in (False, True):
        said = loop.hear(nominate, V6)
        assert said == ([answer] if is_repeated else [])
        hold = loop.view().hold
        assert hold is not None
        assert (hold.endpoint, set(hold.against)) == (V6, {V4})
        assert loop.hear(nominate, V6) == said
        loop.pair.settled()
        loop.pair.held(loop.now)
        loop.run(0.0)
        assert answer in [due for _, due in loop.log]
    assert loop.view().endpoint == V6


def test_a_hold_that_is_never_set_keeps_nobody_waiting_for_long() -> None:
    loop = _offering()
    loop.run(2.0)
    assert loop.view().endpoint == V6


# --- relays ------------------------------------------------------------------------------------------------


def _relayed(*, lower: bool = True, mapping: Mapping = Mapping.NONE) -> _Loop:
    """A pair whose direct endpoint is silent and that two hubs relay, the first one being nearer."""
    loop = _Loop(V4, lower=lower, mapping=mapping)
    loop.pair.set_relays(RELAYS, 0.0)
    loop.rtt |= {HUB1: 0.04, HUB2: 0.08}
    loop.run(0.5)
    if not lower:
        loop.hear(Nominate(1, there=HERE, here=HUB1), HUB1)
    loop.device(got=92, handshake=True)
    return loop


@pytest.mark.parametrize("lower", [True, False])
def test_a_hub_is_used_at_once_where_nothing_else_answers_and_the_reason_stands(lower: bool) -> None:
    loop = _relayed(lower=lower)
    loop.pair.explain("symmetric NAT on both sides")
    view = loop.view()
    assert (view.path, view.endpoint, view.hub) == (PathKind.RELAYED, HUB1, "hub1")
    assert view.reason == "symmetric NAT on both sides" and not view.user_space and not view.declared
    loop.run(61.0)
    assert loop.view().declared and loop.view().path is PathKind.RELAYED


def test_a_direct_path_is_preferred_to_a_hub_however_much_longer_it_takes() -> None:
    loop = _relayed()
    loop.rtt[V4] = 0.3
    loop.run(4.0)
    view = loop.view()
    assert (view.path, view.endpoint, view.hub, view.reason) == (PathKind.DIRECT, V4, "", "")
    assert not view.declared


def test_while_a_hub_relays_the_search_goes_on_as_without_a_path() -> None:
    relayed, alone = _relayed(), _Loop(V4)
    for loop in (relayed, alone):
        loop.can_call = True
        loop.run(400.0)
    assert len(relayed.times(V4)) == len(alone.times(V4))
    calls = [sum(isinstance(due, CallPeer) for _, due in loop.log) for loop in (relayed, alone)]
    assert calls[0] == calls[1]


def test_an_idle_relayed_path_is_left_to_keepalives() -> None:
    loop = _relayed()
    loop.run(30.0)
    loop.log.clear()
    loop.run(600.0)
    assert not loop.times(HUB1) and not loop.times(HUB2)


def test_a_dead_hub_is_left_for_the_other_one_within_a_second_of_the_verdict() -> None:
    loop = _relayed()
    loop.run(60.0)
    del loop.rtt[HUB1]
    loop.device(sent=1000)
    loop.run(1.5)
    assert (loop.view().path, loop.view().hub) == (PathKind.RELAYED, "hub2")


def test_a_dead_direct_path_is_replaced_by_a_hub_and_asked_for_every_second_and_a_half() -> None:
    loop = _connected()
    loop.pair.set_relays(RELAYS, loop.now)
    assert not loop.times(HUB1)  # while the direct path lives nothing is wanted of hubs
    loop.rtt = {HUB1: 0.04}
    loop.device(sent=1000)
    loop.run(1.5)
    assert loop.view().path is PathKind.RELAYED
    assert loop.pair.last_good == V4
    loop.run(10.0)
    gaps = {round(b - a, 3) for a, b in itertools.pairwise(loop.times(V4)[-4:])}
    assert gaps == {1.5}
    loop.rtt[V4] = RTT
    loop.run(2.0)
    assert loop.is_direct()


def test_a_direct_path_that_dies_is_not_forgotten_when_the_relay_in_its_place_dies_too() -> None:
    loop = _connected()
    loop.pair.set_relays(RELAYS, loop.now)
    loop.rtt = {HUB1: 0.04}
    loop.device(sent=1000)
    loop.run(2.0)
    loop.rtt = {}
    loop.device(sent=1000)
    loop.run(2.0)
    assert loop.view().path is PathKind.NONE
    assert loop.pair.last_good == V4


def test_hubs_get_no_openers_and_are_not_told_of_as_endpoints_of_the_peer() -> None:
    loop = _relayed(mapping=Mapping.ENDPOINT_DEPENDENT)
    loop.hear_ping(HUB1)
    loop.run(30.0)
    assert {ttl for _, ttl in loop.pings(HUB1) + loop.pings(HUB2)} == {None}
    assert not {HUB1, HUB2} & set(loop.pair.opened(loop.now))
    assert loop.pair.tried == {V4}
    assert loop.view().observed is None


def test_an_echo_that_comes_back_another_way_proves_no_hub() -> None:
    loop = _Loop(V4)
    loop.pair.set_relays(RELAYS, 0.0)
    loop.run(0.0)
    (asked,) = (
        due.message
        for _, due in loop.log
        if isinstance(due, SendTo) and isinstance(due.message, Ping) and due.endpoint == HUB1
    )
    echo = Pong(asked.transaction, HERE, has_session=False, received=0)
    loop.pair.receive(echo, HUB2, 0.01)
    loop.run(0.5)
    assert loop.view().path is PathKind.NONE


def test_a_hub_is_left_for_a_clearly_nearer_one_and_one_that_grants_no_more_for_any() -> None:
    loop = _relayed()
    loop.run(10.0)
    loop.rtt |= {HUB2: 0.01}
    for _ in range(60):  # while data flows the other one is asked now and again
        loop.device(sent=1000, got=1000)
        loop.run(1.0)
    assert loop.view().hub == "hub2"
    loop.pair.set_relays({HUB1: RELAYS[HUB1]}, loop.now)
    loop.run(2.0)
    assert loop.view().hub == "hub1"
    assert not loop.pair.knows(HUB2)


def test_a_knock_brings_one_ping_while_there_is_no_path() -> None:
    loop = _Loop(V4)
    loop.pair.set_relays(RELAYS, 0.0)
    loop.run(100.0)
    loop.log.clear()
    loop.pair.knocked(loop.now)
    loop.run(15.0)
    assert len(loop.times(HUB1)) == len(loop.times(HUB2)) == 1


def test_a_hub_that_turns_one_family_into_the_other_does_so_in_user_space() -> None:
    loop = _relayed()
    loop.pair.set_relays({HUB1: Relay("hub1", user_space=True)}, loop.now)
    assert loop.view().user_space
    six = Endpoint.parse("[2001:db8::10]:26000")
    other = _Loop()
    other.pair.set_relays({six: Relay("hub1", user_space=False)}, 0.0)
    other.rtt[six] = RTT  # the peer sees us at an IPv4 endpoint
    other.run(1.0)
    assert other.view().hub == "hub1" and other.view().user_space
