"""What a hub grants: to whom, with which ports and ids, for how long, and who is told."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from scope_agent.relay.granting import ASK_BURST, LEAVING, LIFETIME, Granting, Telling
from scope_agent.relay.rules import MAX_ID

from scope.model import Forwarding, PublicKey, RelayLimits
from scope.relay import MAPPING_VALID, decode_grants, encode_grants
from scope.wire import TOKEN_BYTES, AskRelay, Granted, Refused, RefusedBecause

NOW = 1_700_000_000.0
PORTS = (26000, 26015)
UNLIMITED = RelayLimits()


def key(number: int) -> PublicKey:
    return PublicKey(number.to_bytes(32, "big"))


def probe(number: int) -> PublicKey:
    return PublicKey(b"\1" + number.to_bytes(31, "big"))


A, B, C, D = (key(number) for number in range(1, 5))
ALL = {key(number): probe(number) for number in range(1, 21)}


def tokens() -> Iterator[bytes]:
    return (number.to_bytes(TOKEN_BYTES, "big") for number in itertools.count(1))


def hub(*, members: dict[PublicKey, PublicKey] = ALL, ports: tuple[int, int] = PORTS) -> Granting:
    source = tokens()
    made = Granting(random=lambda count: next(source)[:count])
    set_up(made, members=members, ports=ports)
    made.forwards(Forwarding.KERNEL, "", NOW)
    return made


def set_up(
    granting: Granting,
    *,
    members: dict[PublicKey, PublicKey] = ALL,
    ports: tuple[int, int] = PORTS,
    limits: RelayLimits = UNLIMITED,
    is_hub: bool = True,
    listen_port: int = 0,
    wall: float = NOW,
) -> list[Telling]:
    return granting.configure(
        is_hub=is_hub, ports=ports, limits=limits, listen_port=listen_port, members=members, wall=wall
    )


def granted(telling: Telling) -> Granted:
    assert isinstance(telling.message, Granted)
    return telling.message


def test_both_sides_are_told_each_its_own_token_and_port_and_the_other_ones_key() -> None:
    made = hub()
    tellings = made.ask(A, AskRelay(B), NOW)
    said = {telling.to: granted(telling) for telling in tellings}
    assert said.keys() == {probe(1), probe(2)}
    assert (said[probe(1)].peer, said[probe(2)].peer) == (B, A)
    (grant,) = made.grants().grants
    for side, each in zip(grant.sides, (probe(1), probe(2)), strict=True):
        assert (said[each].token, said[each].port) == (side.token, side.port)
        assert (said[each].lifetime, said[each].user_space) == (LIFETIME, False)
    assert grant.sides[0].token != grant.sides[1].token
    assert [side.peer for side in grant.sides] == [A, B]


@pytest.mark.parametrize(("asker", "peer"), [(A, B), (B, A)])
def test_whoever_asks_again_renews_the_one_grant_of_the_pair_and_both_hear_it(
    asker: PublicKey, peer: PublicKey
) -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    (before,) = made.grants().grants
    tellings = made.ask(asker, AskRelay(peer), NOW + 3600)
    (after,) = made.grants().grants
    assert after == replace(before, expires=NOW + 3600 + LIFETIME)
    assert {telling.to for telling in tellings} == {probe(1), probe(2)}
    assert {granted(telling).lifetime for telling in tellings} == {LIFETIME}


def test_a_grant_that_nobody_renews_ends() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    assert made.get_timer() == NOW + LIFETIME
    made.handle_timer(NOW + LIFETIME - 1)
    assert made.grants().grants
    made.handle_timer(NOW + LIFETIME)
    assert made.grants().grants == ()
    assert made.get_timer() is None


def test_no_peer_has_a_port_twice_and_no_id_is_given_twice() -> None:
    made = hub()
    for first, second in itertools.combinations(list(ALL)[:12], 2):
        made.ask(first, AskRelay(second), NOW)
    sides = [side for grant in made.grants().grants for side in grant.sides]
    assert len(sides) == 2 * 66
    assert len({(side.peer, side.port) for side in sides}) == len(sides)
    assert len({side.id for side in sides}) == len(sides)
    assert all(PORTS[0] <= side.port <= PORTS[1] and 1 <= side.id <= MAX_ID for side in sides)
    assert all(grant.sides[0].id ^ grant.sides[1].id == 1 for grant in made.grants().grants)


def test_the_two_sides_of_a_grant_may_have_different_ports() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.ask(A, AskRelay(C), NOW)
    (_, second) = made.grants().grants
    assert [side.port for side in second.sides] == [PORTS[0] + 1, PORTS[0]]


def test_a_peer_with_a_grant_at_every_port_is_refused_and_the_pair_is_counted_for_an_hour() -> None:
    made = hub()
    others = [each for each in ALL if each != A]
    for each in others[:16]:
        made.ask(A, AskRelay(each), NOW)
    for asker, peer in ((A, others[16]), (others[16], A), (A, others[17])):
        assert made.ask(asker, AskRelay(peer), NOW) == [
            Telling(ALL[asker], Refused(peer, RefusedBecause.NO_PORT_LEFT))
        ]
    report = made.report(NOW)
    assert report is not None
    assert (report.pairs, report.refused) == (16, 2)
    assert made.ask(others[16], AskRelay(others[17]), NOW) != []
    made.handle_timer(NOW + 3600)
    assert (later := made.report(NOW + 3600)) is not None and later.refused == 0


def test_a_pair_that_gets_its_port_at_last_is_counted_no_more() -> None:
    made = hub()
    others = [each for each in ALL if each != A]
    for each in others[:17]:
        made.ask(A, AskRelay(each), NOW)
    assert (report := made.report(NOW)) is not None and report.refused == 1
    set_up(made, members={each: ALL[each] for each in ALL if each != others[0]})
    made.ask(A, AskRelay(others[16]), NOW)
    assert (report := made.report(NOW)) is not None and report.refused == 0


def test_when_all_ids_are_used_up_the_next_pair_is_refused() -> None:
    members = {key(number): probe(number) for number in range(1, 150)}
    made = hub(members=members, ports=(20000, 20999))
    pairs = list(itertools.combinations(members, 2))
    count = MAX_ID // 2
    for number, (first, second) in enumerate(pairs[: count + 1]):
        tellings = made.ask(first, AskRelay(second), NOW + number)
        assert isinstance(tellings[0].message, Granted if number < count else Refused)
    assert max(side.id for grant in made.grants().grants for side in grant.sides) == MAX_ID


def test_an_id_is_not_given_again_while_the_kernel_may_remember_where_its_side_was() -> None:
    made = hub()
    given: set[int] = set()
    for _ in range(MAX_ID // 2):
        made.ask(A, AskRelay(B), NOW)
        assert not ids(made) & given
        given |= ids(made)
        set_up(made, members={})
        set_up(made)
    assert made.ask(A, AskRelay(B), NOW + MAPPING_VALID) == [
        Telling(probe(1), Refused(B, RefusedBecause.NO_PORT_LEFT))
    ]
    assert len(made.ask(A, AskRelay(B), NOW + 2 * MAPPING_VALID)) == 2


def ids(granting: Granting) -> set[int]:
    return {side.id for grant in granting.grants().grants for side in grant.sides}


def test_a_removed_peers_grants_go_at_once_and_others_stay() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.ask(C, AskRelay(D), NOW)
    assert set_up(made, members={each: ALL[each] for each in ALL if each != B}) == []
    (left,) = made.grants().grants
    assert {side.peer for side in left.sides} == {C, D}


def test_a_stranger_and_a_removed_peer_get_no_answer() -> None:
    made = hub()
    assert made.ask(key(99), AskRelay(A), NOW) == []
    assert made.dropped == 1


@pytest.mark.parametrize("peer", [key(99), A])
def test_nobody_is_relayed_to_a_stranger_or_to_itself(peer: PublicKey) -> None:
    made = hub()
    assert made.ask(A, AskRelay(peer), NOW) == [Telling(probe(1), Refused(peer, RefusedBecause.UNKNOWN_PEER))]
    assert made.grants().grants == ()


def test_who_is_no_hub_refuses() -> None:
    made = hub()
    set_up(made, is_hub=False)
    assert made.ask(A, AskRelay(B), NOW) == [Telling(probe(1), Refused(B, RefusedBecause.NO_HUB))]
    assert made.report(NOW) is None


def test_who_is_a_hub_no_more_says_so_and_goes_on_until_all_have_moved() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    tellings = set_up(made, is_hub=False)
    assert set(tellings) == {
        Telling(probe(1), Refused(B, RefusedBecause.NO_HUB)),
        Telling(probe(2), Refused(A, RefusedBecause.NO_HUB)),
    }
    assert set_up(made, is_hub=False) == []
    made.handle_timer(NOW + LEAVING - 1)
    assert made.grants().grants
    made.handle_timer(NOW + LEAVING)
    assert made.grants().grants == ()


def test_a_hub_that_cannot_forward_refuses() -> None:
    made = hub()
    made.forwards(Forwarding.NONE, "no forwarding here", NOW)
    assert made.ask(A, AskRelay(B), NOW) == [Telling(probe(1), Refused(B, RefusedBecause.NO_FORWARDING))]
    assert (report := made.report(NOW)) is not None
    assert (report.forwarding, report.reason) == (Forwarding.NONE, "no forwarding here")


def test_sides_are_told_when_a_process_takes_over_from_the_kernel() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    tellings = made.forwards(Forwarding.USER_SPACE, "a foreign chain drops it", NOW + 10)
    assert {telling.to for telling in tellings} == {probe(1), probe(2)}
    assert {(granted(t).user_space, granted(t).lifetime) for t in tellings} == {(True, LIFETIME - 10)}
    assert made.forwards(Forwarding.USER_SPACE, "another reason", NOW + 11) == []
    assert (report := made.report(NOW)) is not None and report.reason == "another reason"


def test_one_asker_is_answered_so_often_and_no_oftener() -> None:
    made = hub()
    answered = sum(bool(made.ask(A, AskRelay(B), NOW)) for _ in range(int(ASK_BURST) + 50))
    assert (answered, made.dropped) == (ASK_BURST, 50)
    assert made.ask(B, AskRelay(A), NOW)
    assert made.ask(A, AskRelay(B), NOW + 1)


def test_another_range_of_ports_gives_what_is_outside_anew_and_tells_it() -> None:
    made = hub()
    for each in (B, C, D):
        made.ask(A, AskRelay(each), NOW)
    before = {frozenset(s.peer for s in g.sides): g for g in made.grants().grants}
    tellings = set_up(made, ports=(26001, 26016), wall=NOW + 100)
    after = {frozenset(s.peer for s in g.sides): g for g in made.grants().grants}
    assert before.keys() == after.keys()
    for pair, grant in after.items():
        was = before[pair]
        if all(side.port >= 26001 for side in was.sides):
            assert grant == was
        else:
            assert grant.expires == was.expires
            assert not {side.token for side in grant.sides} & {side.token for side in was.sides}
            assert not {side.id for side in grant.sides} & {side.id for side in was.sides}
        assert all(26001 <= side.port <= 26016 for side in grant.sides)
    changed = {pair for pair in after if after[pair] != before[pair]}
    assert {telling.to for telling in tellings} == {ALL[peer] for pair in changed for peer in pair}
    assert (made.grants().first_port, made.grants().last_port) == (26001, 26016)


def test_the_port_of_the_hubs_own_wireguard_is_granted_to_nobody() -> None:
    granting = hub()
    granting.ask(A, AskRelay(B), NOW)
    (before,) = granting.grants().grants
    told = set_up(granting, listen_port=before.sides[0].port)
    (after,) = granting.grants().grants
    assert before.sides[0].port not in {side.port for side in after.sides}
    assert {granted(each).port for each in told} == {side.port for side in after.sides}


def test_a_port_that_another_program_holds_is_granted_to_nobody_and_the_status_says_so() -> None:
    granting = hub()
    for asker, peer in ((A, B), (C, D), (A, C)):
        granting.ask(asker, AskRelay(peer), NOW)
    before = granting.grants().grants
    taken = PORTS[0]
    kept = [grant for grant in before if all(side.port != taken for side in grant.sides)]
    assert len(kept) == 1
    moved = granting.avoid({taken, PORTS[1] + 1}, NOW)
    assert {telling.to for telling in moved} == {probe(number) for number in range(1, 5)}
    after = granting.grants().grants
    assert len(after) == 3 and kept[0] in after
    assert all(side.port != taken for grant in after for side in grant.sides)
    assert granting.avoid({taken}, NOW) == []
    report = granting.report(NOW)
    assert report is not None
    assert report.reason == (
        f"UDP port {taken} is held by another program (`ss -ulpn` names it), so pairs get others of "
        "spec.hubs.ports"
    )


def test_where_other_programs_hold_the_whole_range_pairs_are_refused_until_there_is_another() -> None:
    granting = hub()
    granting.avoid(range(PORTS[0], PORTS[1] + 1), NOW)
    (refused,) = granting.ask(A, AskRelay(B), NOW)
    assert refused.message == Refused(B, RefusedBecause.NO_PORT_LEFT)
    report = granting.report(NOW)
    assert report is not None and report.refused == 1
    assert "and 15 more are held by another program" in report.reason
    set_up(granting, ports=(27000, 27015))
    assert all(granted(telling).port >= 27000 for telling in granting.ask(A, AskRelay(B), NOW))
    report = granting.report(NOW)
    assert report is not None and (report.refused, report.reason) == (0, "")


def test_other_limits_are_part_of_the_grants_and_disturb_nobody() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    before = made.grants()
    assert set_up(made, limits=RelayLimits(pair=5, total=7)) == []
    assert made.grants() == replace(before, limits=RelayLimits(pair=5, total=7))


def test_grants_outlive_a_restart_and_the_file() -> None:
    made = hub()
    for each in (B, C):
        made.ask(A, AskRelay(each), NOW)
    again = hub(members={})
    again.restore(decode_grants(encode_grants(made.grants())), NOW + 50)
    set_up(again)
    assert again.grants() == made.grants()
    tellings = again.ask(A, AskRelay(D), NOW + 60)
    assert len(tellings) == 2
    assert len(ids(again)) == 6
    sides = [side for grant in again.grants().grants for side in grant.sides if side.peer == A]
    assert len({side.port for side in sides}) == 3


def test_of_a_damaged_file_only_what_can_be_is_taken() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.ask(C, AskRelay(D), NOW)
    first, second = made.grants().grants
    odd = replace(first, sides=(replace(first.sides[0], id=77), first.sides[1]))
    twice = replace(second, sides=(replace(second.sides[0], peer=A), second.sides[1]))
    eternal = replace(second, expires=NOW + 1e9)
    expired = replace(first, expires=NOW - 1)
    again = hub(members={})
    again.restore(replace(made.grants(), grants=(odd, eternal, twice, expired)), NOW)
    set_up(again)
    assert again.grants().grants == (replace(second, expires=NOW + LIFETIME),)


def test_restored_grants_of_who_is_a_hub_no_more_end_soon() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    again = Granting(random=bytes)
    again.restore(made.grants(), NOW)
    assert len(set_up(again, is_hub=False)) == 2
    assert again.get_timer() == NOW + LEAVING


def test_all_are_told_again_when_the_kernel_forgot() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.ask(A, AskRelay(C), NOW)
    assert sorted(telling.to for telling in made.tell_all(NOW)) == [probe(1), probe(1), probe(2), probe(3)]


def test_what_is_granted_is_one_value_until_something_changes() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    before = made.grants()
    made.ask(A, AskRelay(key(99)), NOW)
    made.handle_timer(NOW + 1)
    set_up(made)
    assert made.grants() is before
