"""Whose turn it is."""

from __future__ import annotations

from scope_agent.agenda import Agenda, earliest


def taken(agenda: Agenda[str], now: float) -> list[str]:
    found = []
    while (key := agenda.take(now)) is not None:
        found.append(key)
    return found


def test_who_is_due_comes_in_order_of_time_and_then_of_appointment() -> None:
    agenda: Agenda[str] = Agenda()
    for key, at in (("late", 9.0), ("second", 2.0), ("third", 2.0), ("first", 1.0)):
        agenda.put(key, at)
    assert agenda.next() == 1.0
    assert taken(agenda, 2.0) == ["first", "second", "third"]
    assert agenda.next() == 9.0
    assert taken(agenda, 8.9) == []


def test_a_moved_appointment_comes_once_at_its_new_time() -> None:
    agenda: Agenda[str] = Agenda()
    agenda.put("a", 1.0)
    agenda.put("a", 5.0)
    assert agenda.next() == 5.0
    assert taken(agenda, 4.0) == []
    agenda.put("a", 3.0)
    assert taken(agenda, 9.0) == ["a"]


def test_an_appointment_put_back_where_it_was_comes_once() -> None:
    agenda: Agenda[str] = Agenda()
    for at in (1.0, 5.0, 1.0):
        agenda.put("a", at)
    assert taken(agenda, 9.0) == ["a"]
    assert agenda.next() is None


def test_a_cancelled_appointment_does_not_come() -> None:
    agenda: Agenda[str] = Agenda()
    agenda.put("a", 1.0)
    agenda.put("b", 2.0)
    agenda.put("a", None)
    agenda.put("stranger", None)
    assert agenda.next() == 2.0
    assert taken(agenda, 9.0) == ["b"]


def test_appointments_that_are_always_moved_take_bounded_room() -> None:
    agenda: Agenda[int] = Agenda()
    for step in range(10_000):
        agenda.put(step % 10, 1e6 - step)
    assert len(agenda._heap) <= 4 * 10 + 64
    assert agenda.next() == 1e6 - 9999


def test_the_earliest_of_a_few_times_passes_over_those_that_never_come() -> None:
    assert earliest(None, 3.0, 0.0, None, 2.0) == 0.0
    assert earliest(None, None) is None
    assert earliest() is None
