"""The hub's side between the mesh and the machine: nobody is told of a grant before it stands."""

from __future__ import annotations

import random
from dataclasses import replace

from scope_agent.relay.counting import Counted, Sent
from scope_agent.relay.granting import LIFETIME, Telling
from scope_agent.relay.serving import Apply, Serving

from scope.model import Forwarding, Hubs, PublicKey, RelayLimits
from scope.relay import Grants
from scope.wire import AskRelay, Granted, Refused, RefusedBecause

NOW, WALL = 50.0, 1_700_000_000.0
A, B, C = (PublicKey(bytes([number]) * 32) for number in (1, 2, 3))
MEMBERS = {key: PublicKey(bytes([key.raw[0] + 16]) * 32) for key in (A, B, C)}


def serving(*, earlier: Grants | None = None) -> Serving:
    return Serving(random=random.Random(1).random, earlier=earlier, now=NOW, wall=WALL)


def configure(served: Serving, *, is_hub: bool = True, hubs: Hubs | None = None) -> None:
    served.configure(hubs or Hubs(), is_hub=is_hub, listen_port=0, members=MEMBERS, now=NOW)


def hub() -> Serving:
    """One whose machine relays."""
    made = serving()
    configure(made)
    assert made.take_apply() is not None
    answer(made)
    assert made.take_tellings() == []
    return made


def answer(served: Serving, by: Forwarding = Forwarding.KERNEL, *, forgot: bool = False) -> None:
    served.relaying(by, "", forgot=forgot, answers=True, now=NOW)


def granted_to(served: Serving) -> set[PublicKey]:
    return {telling.to for telling in served.take_tellings() if isinstance(telling.message, Granted)}


def test_who_is_no_hub_and_was_none_touches_nothing() -> None:
    made = serving()
    assert made.take_apply() is None
    configure(made, is_hub=False)
    assert made.take_apply() is None
    made.ask(A, AskRelay(B), NOW)
    assert made.take_apply() is None
    assert made.take_tellings() == [Telling(MEMBERS[A], Refused(B, RefusedBecause.NO_HUB))]


def test_a_new_hub_tries_its_machine_before_anybody_asks() -> None:
    made = serving()
    configure(made)
    assert made.take_apply() == Apply(Grants(26000, 26255, RelayLimits(), ()))
    assert made.take_apply() is None  # one at a time
    made.ask(A, AskRelay(B), NOW)
    assert made.take_tellings() == []  # it does not know yet whether it can
    assert made.report(NOW) is None
    answer(made)
    assert made.report(NOW) is not None


def test_sides_are_told_once_their_grant_stands_and_not_before() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    applied = made.take_apply()
    assert applied is not None and applied.grants is not None and len(applied.grants.grants) == 1
    assert made.take_tellings() == []
    answer(made)
    assert granted_to(made) == {MEMBERS[A], MEMBERS[B]}


def test_who_asks_while_the_machine_is_busy_is_told_with_the_next_application() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.take_apply()
    made.ask(A, AskRelay(C), NOW)
    made.ask(B, AskRelay(C), NOW)
    answer(made)
    assert granted_to(made) == {MEMBERS[A], MEMBERS[B]}
    applied = made.take_apply()
    assert applied is not None and applied.grants is not None and len(applied.grants.grants) == 3
    answer(made)
    assert granted_to(made) == set(MEMBERS.values())


def test_all_sides_are_told_when_the_machine_forgot_where_they_are() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.take_apply()
    answer(made)
    made.take_tellings()
    made.relaying(Forwarding.KERNEL, "", forgot=True, answers=False, now=NOW)
    assert granted_to(made) == {MEMBERS[A], MEMBERS[B]}


def test_news_from_the_machine_does_not_end_what_is_in_flight() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.take_apply()
    made.relaying(Forwarding.KERNEL, "", forgot=False, answers=False, now=NOW)
    assert made.take_tellings() == []
    assert made.take_apply() is None


def test_nobody_is_told_the_same_twice_at_once() -> None:
    made = hub()
    for _ in range(3):
        made.ask(A, AskRelay(B), NOW)
    made.take_apply()
    answer(made, forgot=True)
    assert len(made.take_tellings()) == 2


def test_a_grant_ends_by_our_own_clock_wherever_the_wall_clock_jumps() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    made.take_apply()
    answer(made)
    assert made.get_timer() == NOW + LIFETIME
    made.handle_timer(NOW + LIFETIME)
    applied = made.take_apply()
    assert applied is not None and applied.grants is not None and applied.grants.grants == ()


def test_a_restarted_hub_goes_on_with_what_it_granted() -> None:
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    applied = made.take_apply()
    assert applied is not None and applied.grants is not None
    again = serving(earlier=applied.grants)
    assert again.take_apply() is None  # not before the mesh says that we are a hub
    configure(again)
    assert again.take_apply() == applied


def test_who_was_a_hub_before_its_restart_and_is_none_now_takes_all_away() -> None:
    again = serving(earlier=Grants(26000, 26255, RelayLimits(), ()))
    configure(again, is_hub=False)
    assert again.take_apply() == Apply(None)
    answer(again, Forwarding.NONE)
    assert again.take_apply() is None


def test_who_becomes_a_hub_again_tries_its_machine_again() -> None:
    made = hub()
    configure(made, is_hub=False)
    assert made.take_apply() == Apply(None)
    answer(made, Forwarding.NONE)
    configure(made)
    assert made.report(NOW) is None
    assert made.take_apply() == Apply(Grants(26000, 26255, RelayLimits(), ()))


def test_what_is_relayed_is_told_by_who_is_a_hub_and_says_when_it_is_not_counted() -> None:
    assert serving().relayed(None) is None
    made = hub()
    made.ask(A, AskRelay(B), NOW)
    applied = made.take_apply()
    assert applied is not None and applied.grants is not None
    (side, _) = applied.grants.grants[0].sides
    found = made.relayed(Counted({side.id: Sent(2, 200)}, {}))
    assert found is not None and (found.pairs, found.sent, found.error) == (1, Sent(2, 200), "")
    found = made.relayed(None)
    assert found is not None and (found.pairs, found.error) == (1, "not counted yet: ask again")


def test_other_limits_are_applied() -> None:
    made = hub()
    limits = RelayLimits(pair=1000)
    configure(made, hubs=replace(Hubs(), limits=limits))
    assert made.take_apply() == Apply(Grants(26000, 26255, limits, ()))


def test_sides_whose_port_another_program_holds_hear_of_another_once_that_stands() -> None:
    served = hub()
    served.ask(A, AskRelay(B), NOW)
    apply = served.take_apply()
    assert apply is not None and apply.grants is not None
    answer(served)
    assert granted_to(served) == {MEMBERS[A], MEMBERS[B]}
    (port, _) = (side.port for side in apply.grants.grants[0].sides)
    served.relaying(Forwarding.KERNEL, "", forgot=False, answers=False, now=NOW, taken={port})
    assert granted_to(served) == set()
    again = served.take_apply()
    assert again is not None and again.grants is not None
    assert port not in {side.port for side in again.grants.grants[0].sides}
    answer(served)
    assert granted_to(served) == {MEMBERS[A], MEMBERS[B]}
