"""Every state that a rotation passes through, with whatever may go wrong there, and again where that leads.

A state is where both records and both devices stand; the decisions are the agents' own, not a model's. In
each state that is found, each fault is tried at the output that is due: a message is lost, or the agent is
killed before it, or the machine loses power. What follows is explored the same way, up to the bound. Each
run then goes on undisturbed: no session may run out, and the pair must agree, on the key before or on the
new one, and when it is asked again on one more.
"""

from __future__ import annotations

import enum
import functools
from collections import deque

from scope_agent.psk.core import PskOutput, SayPart

from tests.unit.psk_duo import Duo, Side

FAULTS_AT_MOST = 2


class Fault(enum.Enum):
    """What becomes of an output."""

    LOST = enum.auto()
    KILLED = enum.auto()
    POWER_LOST = enum.auto()


Schedule = tuple[tuple[int, Fault], ...]  # number of an output since the rotation was asked for
State = tuple[object, ...]


class _Explored(Duo):
    """A rotation with the faults of a schedule; notes the state before each output after the last of them."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(1)
        self.schedule = dict(schedule)
        self.last = max(self.schedule, default=-1)
        self.count: int | None = None
        self.states: list[tuple[int, State]] = []

    def spoils(self, side: Side, output: PskOutput) -> bool:
        if self.count is None:
            return False
        number, self.count = self.count, self.count + 1
        if number > self.last:
            self.states.append((number, (isinstance(output, SayPart), *self._state(side))))
        fault = self.schedule.get(number)
        if fault is None:
            return False
        if fault is not Fault.LOST:
            side.crash() if fault is Fault.KILLED else side.reboot()
            self.at(self.now + 3.0, side.start_again)
        return True

    def _state(self, side: Side) -> State:
        return (side is self.d, *(self._of(each) for each in self.sides), self.session is None)

    def _of(self, side: Side) -> State:
        disk = side.disk
        holds = [keys is not None and keys.psk == side.psk for keys in (disk.current, disk.next)]
        laid = side.view.laid > 0
        return (side.room is None, disk.current is None, disk.next is None, disk.active, laid, *holds)


def _run(schedule: Schedule) -> list[tuple[int, State]]:
    duo = _Explored(schedule)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    epoch = duo.d.view.epoch
    duo.count = 0
    duo.d.rotate()
    duo.run(200.0)
    duo.until(lambda: duo.is_agreed(epoch) and duo.session is not None, within=1500.0)
    duo.count = None
    epoch = duo.d.view.epoch
    duo.d.rotate()
    duo.until(functools.partial(duo.is_agreed, epoch + 1), within=900.0)
    assert duo.deaths == [], schedule
    return duo.states


def test_no_state_of_a_rotation_is_one_from_which_the_pair_cannot_recover() -> None:
    tried: set[tuple[State, Fault]] = set()
    waiting: deque[Schedule] = deque([()])
    runs = 0
    while waiting:
        schedule = waiting.popleft()
        runs += 1
        for number, state in _run(schedule):
            for fault in Fault:
                if fault is Fault.LOST and not state[0]:
                    continue  # what is written down is answered, if with an error
                if len(schedule) < FAULTS_AT_MOST and (state, fault) not in tried:
                    tried.add((state, fault))
                    waiting.append((*schedule, (number, fault)))
    assert runs == len(tried) + 1
    assert len({state for state, _ in tried}) >= 20, len(tried)
