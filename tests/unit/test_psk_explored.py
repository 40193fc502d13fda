"""Every state that a rotation passes through, with whatever may go wrong there, and again where that leads.

A state is where both records and both devices stand; the decisions are the agents' own, not a model's. In
each state that is found, each fault is tried at the output that is due: a message is lost, or the agent is
killed before it, or the machine loses power; what follows is explored the same way, up to the bound. Or
nothing is heard any more, or the agent or its device is away, for long. Each run then goes on undisturbed: no
session may run out, and the pair must agree, on the key before or on the new one, and when it is asked again
on one more.
"""

from __future__ import annotations

import enum
import functools
from collections import deque
from typing import assert_never

from scope_agent.psk.core import PskOutput, SayPart

from tests.unit.psk_duo import Duo, Side

FAULTS_AT_MOST = 2  # of the short ones; a long one is the first and the last
LONG = 180.0  # a session's life: whoever is alone goes back


class Fault(enum.Enum):
    """What becomes of an output."""

    LOST = enum.auto()
    KILLED = enum.auto()
    POWER_LOST = enum.auto()
    UNHEARD = enum.auto()  # nor is anything else that either side says, for three minutes
    AWAY = enum.auto()  # killed, and started again three minutes later
    DEVICE_AWAY = enum.auto()  # from the agent's sight, for two seconds


LONG_ONES = {Fault.UNHEARD, Fault.AWAY, Fault.DEVICE_AWAY}
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
        match fault:
            case Fault.LOST:
                pass
            case Fault.KILLED | Fault.AWAY:
                side.crash()
                self.at(self.now + (3.0 if fault is Fault.KILLED else LONG), side.start_again)
            case Fault.POWER_LOST:
                side.reboot()
                self.at(self.now + 3.0, side.start_again)
            case Fault.UNHEARD:
                self.mute = set(self.sides)
                self.at(self.now + LONG, self.mute.clear)
                return False
            case Fault.DEVICE_AWAY:
                side.later(0.06, side.lose_device)
                return False
            case _:
                assert_never(fault)
        return True

    @property
    def is_whole(self) -> bool:
        return (
            self.session is not None and not self.mute and all(side.room is not None for side in self.sides)
        )

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
    duo.until(lambda: duo.is_agreed(epoch) and duo.is_whole, within=1500.0)
    duo.count = None
    epoch = duo.d.view.epoch
    duo.d.rotate()
    duo.until(functools.partial(duo.is_agreed, epoch + 1), within=900.0)
    # Whose agent is away for as long as a session lives cannot revert in time.
    assert duo.deaths == [] or Fault.AWAY in duo.schedule.values(), schedule
    return duo.states


def test_no_state_of_a_rotation_is_one_from_which_the_pair_cannot_recover() -> None:
    tried: set[tuple[State, Fault]] = set()
    waiting: deque[Schedule] = deque([()])
    runs = 0
    while waiting:
        schedule = waiting.popleft()
        runs += 1
        found = _run(schedule)
        for number, state in [] if LONG_ONES & {fault for _, fault in schedule} else found:
            for fault in Fault:
                if fault is Fault.LOST and not state[0]:
                    continue  # what is written down is answered, if with an error
                most = 1 if fault in LONG_ONES else FAULTS_AT_MOST
                if len(schedule) < most and (state, fault) not in tried:
                    tried.add((state, fault))
                    waiting.append((*schedule, (number, fault)))
    assert runs == len(tried) + 1
    assert len({state for state, _ in tried}) >= 20, len(tried)
