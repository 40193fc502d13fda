"""A pair's key: agreed, laid in, proved, rotated, and never lost between the two sides."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from scope_agent.psk.core import WriteRecord
from scope_agent.psk.exchange import make_offer
from scope_agent.psk.messages import Offer, PskMessage, Refusal, RefusedFor, StrangeOffer, decode, encode
from scope_agent.psk.parts import MAX_OPEN, Joining, cut
from scope_agent.psk.provider import SUITES

from scope.model import PostQuantum, PostQuantumMode, Secret
from scope.wire import KeyPart, WireError
from tests.unit.psk_duo import Duo, Side


def _agreed(seed: int = 1, **kwargs: object) -> Duo:
    duo = Duo(seed, **kwargs)  # type: ignore[arg-type]
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    return duo


def test_two_agents_agree_on_a_key_and_a_handshake_proves_it() -> None:
    duo = _agreed()
    assert duo.d.view.epoch == duo.e.view.epoch == 1
    assert duo.deaths == [] and duo.d.view.failure == duo.e.view.failure == ""


def test_required_proves_a_key_before_anything_else_and_at_once() -> None:
    duo = Duo(3, mode=PostQuantumMode.REQUIRED)
    duo.start()
    assert duo.d.view.is_withheld and duo.d.view.is_silent
    took = duo.until(duo.is_agreed, within=60.0)
    assert took < 30.0  # the model sends every 20 s only
    assert [side.view.is_withheld for side in duo.sides] == [False, False]


def test_of_a_first_required_key_the_side_that_has_it_last_starts_the_handshake() -> None:
    duo = Duo(3, mode=PostQuantumMode.REQUIRED)
    duo.start()
    duo.until(lambda: duo.e.view.laid == 1, within=10.0)
    assert duo.e.view.is_silent and not duo.e.view.starts
    duo.until(lambda: duo.d.view.laid == 1, within=10.0)
    assert duo.d.view.starts and duo.e.view.is_silent
    assert duo.until(duo.is_agreed, within=60.0) < 1.0


def test_where_that_side_starts_none_the_other_does_after_three_seconds() -> None:
    duo = Duo(3, mode=PostQuantumMode.REQUIRED)
    duo.start()
    duo.until(lambda: duo.e.view.laid == 1, within=10.0)
    duo.d.crash()
    assert 2.9 < duo.until(lambda: duo.e.view.starts, within=10.0) < 3.1


def test_who_waits_for_a_peers_identity_asks_again_as_soon_as_that_peer_can_make_keys() -> None:
    duo = Duo(4)
    duo.e.start()
    duo.run(3.0)  # E asked what D cannot answer, and now asks ever more rarely
    duo.d.start()
    assert duo.until(lambda: duo.e.disk.next is not None, within=60.0) < 1.0


def test_a_key_is_rotated_by_the_interval_without_a_session_lost() -> None:
    duo = _agreed(interval=600.0)
    duo.until(lambda: duo.is_agreed(5), within=5 * 900.0)
    assert duo.deaths == []


@pytest.mark.parametrize("keepalive", [(True, True), (True, False), (False, True)])
def test_keepalive_on_either_side_is_enough(keepalive: tuple[bool, bool]) -> None:
    duo = _agreed(4, keepalive=keepalive)
    duo.d.rotate()
    duo.until(lambda: duo.is_agreed(2), within=200.0)
    assert duo.deaths == []


def test_an_idle_link_is_nudged_and_not_reverted() -> None:
    """No keepalive at all: only the nudge makes the initiator rekey."""
    duo = _agreed(5)
    duo.keepalive = (False, False)
    duo.d.rotate()
    duo.until(lambda: duo.is_agreed(2), within=200.0)
    assert duo.deaths == [] and duo.d.nudges > 0


def test_the_encapsulator_may_ask_for_a_rotation() -> None:
    duo = _agreed(6)
    duo.e.rotate()
    duo.until(lambda: duo.is_agreed(2), within=200.0)


def test_where_one_side_dies_after_the_key_is_laid_in_the_other_reverts_in_time() -> None:
    duo = _agreed(8)
    duo.d.rotate()
    old = duo.d.device_psk
    duo.until(lambda: duo.e.device_psk != old, within=100.0)
    duo.d.crash()  # its device keeps the old key
    duo.until(lambda: duo.e.device_psk == old, within=160.0)
    assert duo.session is not None and duo.now - duo.session < 150.0
    duo.run(60.0)
    assert duo.deaths == []
    duo.d.start()
    duo.until(lambda: duo.is_agreed(2), within=900.0)
    assert duo.deaths == []


def test_a_key_that_another_program_replaced_is_put_back_three_times_an_hour() -> None:
    duo = _agreed(9)
    for _ in range(3):
        duo.d.psk = Secret(bytes([7] * 32))
        duo.until(duo.is_agreed, within=20.0)
        assert not duo.d.view.conflict
    duo.d.psk = Secret(bytes([7] * 32))
    duo.until(lambda: duo.d.view.conflict, within=20.0)
    duo.run(100.0)
    assert duo.d.device_psk == Secret(bytes([7] * 32))
    duo.until(lambda: not duo.d.view.conflict and duo.is_agreed(1), within=3700.0)


def test_a_full_disk_keeps_the_old_key_and_is_said() -> None:
    duo = _agreed(10)
    duo.e.disk_fails = True
    duo.d.rotate()
    old = duo.d.device_psk
    duo.until(lambda: "no space left" in duo.e.view.failure, within=100.0)
    duo.run(400.0)
    assert duo.d.device_psk == duo.e.device_psk == old and duo.deaths == []
    duo.e.disk_fails = False
    duo.until(lambda: duo.is_agreed(2), within=900.0)


def test_a_side_that_lost_its_keys_is_given_a_new_one() -> None:
    duo = _agreed(11)
    duo.e.reboot()
    duo.e.lose_disk()
    duo.e.start()
    duo.until(lambda: duo.is_agreed(2), within=300.0)


def test_both_sides_reboot_at_once() -> None:
    duo = _agreed(12)
    duo.d.reboot()
    duo.e.reboot()
    duo.e.start()
    duo.d.start()
    duo.until(lambda: duo.is_agreed(1) and duo.session is not None, within=60.0)


def test_an_old_disk_is_noticed_and_healed() -> None:
    duo = _agreed(13)
    old = duo.e.disk
    duo.d.rotate()
    duo.until(lambda: duo.is_agreed(2), within=200.0)
    duo.e.reboot()
    duo.e.disk = old
    duo.e.start()
    duo.until(lambda: duo.is_agreed(3), within=400.0)


@pytest.mark.parametrize("mode", [PostQuantumMode.PREFERRED, PostQuantumMode.REQUIRED])
def test_an_agents_restart_rotates_no_key_before_its_time(mode: PostQuantumMode) -> None:
    duo = _agreed(18, mode=mode)
    for _ in range(3):
        duo.run(300.0)
        for side in duo.sides:
            side.crash()
        duo.run(5.0)
        for side in duo.sides:
            side.start()
    duo.run(3600.0 * 0.9 - 1000.0)
    assert [side.disk.counter for side in duo.sides] == [1, 1] and duo.deaths == []
    duo.until(lambda: duo.is_agreed(2), within=0.2 * 3600.0 + 400.0)


def test_a_key_that_fell_due_while_the_agent_was_away_is_rotated_within_minutes() -> None:
    duo = _agreed(19)
    duo.d.crash()
    duo.run(4000.0)
    duo.d.start()
    duo.until(lambda: duo.is_agreed(2), within=600.0 + 200.0)


def test_a_rotation_that_the_agents_end_cut_off_is_taken_up_by_the_next() -> None:
    duo = _agreed(20)
    duo.mute = {duo.e}
    duo.d.rotate()
    duo.until(lambda: duo.d.disk.counter == 2, within=5.0)
    duo.d.crash()
    duo.mute = set()
    duo.d.start()
    duo.until(lambda: duo.is_agreed(3), within=300.0)


def test_off_makes_no_keys_and_leaves_those_that_are_there() -> None:
    duo = _agreed(14)
    duo.policy = PostQuantum(PostQuantumMode.OFF, 600.0)
    for side in duo.sides:
        side.configure()
    duo.run(4000.0)
    assert duo.is_agreed(1) and duo.d.view.epoch == 1 and duo.deaths == []


def test_a_changed_identity_gets_no_new_key_and_the_old_one_stays() -> None:
    duo = _agreed(15)
    e = duo.e
    fresh = Duo(99).e.identity
    e.crash()
    e.identity = fresh
    e.start()
    duo.d.configure()
    duo.until(lambda: "another one than before" in duo.d.view.failure, within=5.0)
    duo.run(600.0)
    assert duo.d.device_psk == e.device_psk and duo.deaths == []


@pytest.mark.parametrize("set_otherwise", ["d", "e"])
def test_sides_that_are_set_to_different_suites_make_no_key_and_neither_gives_in(set_otherwise: str) -> None:
    duo = Duo(6)
    getattr(duo, set_otherwise).suite = SUITES[2]
    duo.start()
    duo.run(1200.0)
    assert [side.view.epoch for side in duo.sides] == [0, 0]
    assert duo.d.view.failure == "the peer is set to another suite of post-quantum keys"
    offers = {message.header.suite for sender, message in _said(duo) if isinstance(message, Offer)}
    assert offers == {duo.d.suite.number}


def test_the_second_suite_makes_and_rotates_keys_and_a_pair_may_move_to_it() -> None:
    duo = _agreed(7, interval=600.0)
    assert {side.view.suite for side in duo.sides} == {1}
    for side in duo.sides:
        side.suite = SUITES[2]
        side.crash()
        side.start()
    duo.until(lambda: duo.is_agreed(3), within=3000.0)
    assert {side.view.suite for side in duo.sides} == {2} and duo.deaths == []


def test_an_offer_of_a_suite_of_the_future_is_refused_by_name() -> None:
    duo = _agreed(8)
    duo.d.rotate()
    duo.run(3.0)
    offer = next(message for _, message in reversed(_said(duo)) if isinstance(message, Offer))
    strange = StrangeOffer(replace(offer.header, suite=3, epoch=99), b"whatever it may hold")
    before = len(duo.heard)
    for part in cut(7, encode(strange)):
        duo.e.receive(part)
    answers = [message for sender, message in _said(duo, since=before) if sender is duo.e]
    assert answers == [Refusal(RefusedFor.SUITE, duo.e.disk.counter)]


def _said(duo: Duo, *, since: int = 0) -> list[tuple[Side, PskMessage]]:
    """All messages that were said, put together again."""
    joining = {id(side): Joining() for side in duo.sides}
    said = []
    for sender, part in duo.heard[since:]:
        whole = joining[id(sender)].add(part)
        if whole is not None:
            said.append((sender, decode(whole)))
    return said


def test_a_clock_moved_by_a_year_changes_nothing() -> None:
    duo = _agreed(16)
    duo.e.crash()
    duo.e.clock_offset = 365 * 86400.0
    duo.e.start()
    duo.d.rotate()
    duo.until(lambda: duo.is_agreed(2), within=200.0)
    assert duo.deaths == []


def test_records_of_those_who_are_gone_are_removed() -> None:
    duo = _agreed(17)
    assert duo.d.room is not None
    duo.d.room.configure(duo.policy, mesh_uid="mesh-uid", members=set(), is_complete=True, now=duo.now)
    duo.d.generation += 1  # nobody is left to be looked at
    outputs = duo.d.room.outputs()
    assert outputs == [WriteRecord(duo.e.key, None)]


def _disturb(duo: Duo) -> None:
    random = duo.random
    side = random.choice(duo.sides)
    match random.randrange(8):
        case 0 | 1:
            side.crash_after = random.randrange(0, 12)
        case 2:
            side.crash()
            duo.at(duo.now + random.choice((0.1, 2.0, 60.0)), side.start_again)
        case 3:
            duo.is_cut = True
            duo.at(duo.now + random.choice((1.0, 8.0, 30.0)), lambda: setattr(duo, "is_cut", False))
        case 4:
            duo.loss = random.choice((0.0, 0.05, 0.2, 0.5))
        case 5:
            side.disk_fails = True
            duo.at(duo.now + random.choice((1.0, 50.0)), lambda: setattr(side, "disk_fails", False))
        case 6:
            if side.room is not None:
                side.rotate()
        case 7:
            duo.duplication = random.choice((0.0, 0.3))


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_the_two_sides_agree_in_the_end(seed: int) -> None:
    duo = Duo(seed, interval=400.0)
    duo.start()
    duo.run(duo.random.choice((0.0, 0.5, 5.0, 130.0)))
    for _ in range(12):
        _disturb(duo)
        duo.run(duo.random.choice((0.0, 0.1, 1.0, 10.0, 60.0, 100.0)))
    duo.loss = duo.duplication = 0.0
    for side in duo.sides:
        side.crash_after = None
    duo.run(100.0)
    epoch = max(side.disk.counter for side in duo.sides)
    duo.until(lambda: duo.is_agreed(epoch + 1) and duo.session is not None, within=3000.0)


@pytest.mark.parametrize("side", ["d", "e"])
def test_a_crash_at_any_output_of_a_rotation_ends_in_agreement_and_kills_no_session(side: str) -> None:
    for after in range(24):
        duo = _agreed(100 + after)
        assert duo.d.room is not None
        duo.d.room.rotate(duo.e.key, duo.now)
        getattr(duo, side).crash_after = after
        duo.d.perform()
        duo.run(400.0)
        getattr(duo, side).crash_after = None
        if duo.d.disk.counter == 1:
            duo.d.rotate()  # it was killed before it had written down that it was asked
        duo.until(functools.partial(duo.is_agreed, 2), within=900.0)
        assert duo.deaths == [], after


def test_a_recorded_offer_is_answered_once() -> None:
    duo = Duo(20)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    parts = [part for sender, part in duo.heard if sender is duo.d and part.count > 2]
    before = duo.e.disk
    duo.run(5.0)
    duo.heard.clear()
    for part in parts:
        duo.e.receive(part)
    assert [part.count for sender, part in duo.heard if sender is duo.e] == [1]  # a refusal
    duo.run(60.0)
    assert duo.e.disk == before and duo.is_agreed(1)


def test_a_thousand_exchanges_that_a_peer_leaves_half_open_hold_one_and_cost_an_answer_a_second() -> None:
    duo = _agreed(21)
    assert duo.d.room is not None and duo.e.room is not None
    pair, kept = duo.d.room._pairs[duo.e.key], duo.e.disk
    parties, maker = pair._parties, duo.d.room.maker
    assert parties is not None and maker is not None
    duo.heard.clear()
    began, numbers = duo.now, range(10_000, 11_000)
    for number in numbers:
        offered = make_offer(parties, maker, epoch=number, base=kept.current)
        for part in cut(number, encode(offered.offer)):
            duo.e.receive(part)
        duo.run(0.1)
    answers = [part for sender, part in duo.heard if sender is duo.e and part.count > 2 and part.index == 0]
    assert 90 <= len(answers) <= duo.now - began + 2.0
    theirs = duo.e.room._pairs[duo.d.key]
    assert theirs._answered is not None and theirs._record.next is None
    assert len(duo.e.room._joining[duo.d.key]._open) <= MAX_OPEN
    assert duo.e.disk == kept and duo.is_agreed(1)
    duo.d.rotate()
    duo.until(lambda: duo.is_agreed(2), within=300.0)


def test_parts_of_a_thousand_messages_hold_a_bounded_memory() -> None:
    joining = Joining()
    for number in range(1000):
        assert joining.add(KeyPart(number, 0, 8, bytes(1100))) is None
    assert len(joining._open) == len(joining._counts) <= MAX_OPEN
    whole = bytes(range(256)) * 20
    parts = cut(5000, whole)
    joined = [joining.add(part) for part in reversed(parts)]
    assert joined[-1] == whole and set(joined[:-1]) == {None}


def test_parts_that_contradict_each_other_are_refused() -> None:
    joining = Joining()
    joining.add(KeyPart(1, 0, 3, b"a"))
    with pytest.raises(WireError, match="differently"):
        joining.add(KeyPart(1, 1, 2, b"b"))
