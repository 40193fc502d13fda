"""The agent's inbox: order, what is too old, and what there is no room for."""

from __future__ import annotations

from ipaddress import IPv4Address

from scope_agent.inbox import MAX_WAITING, STALE, Inbox
from scope_agent.inputs import DatagramArrived, Input, Socket, TrafficMoved

from scope.model import Endpoint

LEG = Socket(Endpoint(IPv4Address("198.51.100.7"), 25000))


def _datagram(number: int) -> DatagramArrived:
    return DatagramArrived(number.to_bytes(4, "big"), LEG)


def test_inputs_are_taken_in_the_order_in_which_they_came() -> None:
    waiting = Inbox()
    events: list[Input] = [_datagram(1), TrafficMoved(), _datagram(2)]
    for event in events:
        waiting.put(event, 5.0)
    assert [waiting.take(5.5) for _ in events] == events
    assert waiting.take(5.5) is None
    assert not waiting and waiting.dropped == 0


def test_after_a_stall_the_newest_datagrams_are_answered_and_the_old_ones_are_not() -> None:
    waiting = Inbox()
    for number in range(10):
        waiting.put(_datagram(number), 5.0 + number)
    assert waiting.take(5.0 + 8 + STALE) == _datagram(8)
    assert waiting.take(5.0 + 8 + STALE) == _datagram(9)
    assert waiting.dropped == 8


def test_only_datagrams_grow_old() -> None:
    waiting = Inbox()
    waiting.put(_datagram(1), 5.0)
    waiting.put(TrafficMoved(), 5.0)
    assert waiting.take(500.0) == TrafficMoved()


def test_a_flood_of_datagrams_is_bounded_and_hides_nothing_else() -> None:
    waiting = Inbox()
    for number in range(MAX_WAITING + 3):
        waiting.put(_datagram(number), 5.0)
    waiting.put(TrafficMoved(), 5.0)
    assert not waiting.has_room
    assert waiting.dropped == 3
    taken = [waiting.take(5.0) for _ in range(MAX_WAITING + 1)]
    assert taken[0] == _datagram(0) and taken[-1] == TrafficMoved()
    assert waiting.has_room
