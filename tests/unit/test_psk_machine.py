"""Rotations and what hypothesis thinks of: words lost, doubled, late, out of order, agents killed anywhere.

While the wire carries the tunnel and nobody is away for long, both sides have the same key in time or go back
to the one before: no session runs out. From the first proved key on none is made without a key of the pair.
"""

from __future__ import annotations

import enum
from collections import deque

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scope_agent.psk.states import State

from scope.model import PostQuantumMode, Secret
from scope.wire import KeyPart
from tests.unit.psk_duo import Duo, Side

LATE = 7.0  # a word that others overtake
MOST_FATES = 12
MODES = [PostQuantumMode.PREFERRED, PostQuantumMode.REQUIRED]
SIDES = ["d", "e"]


class Fate(enum.Enum):
    """What becomes of a part of a word."""

    ARRIVES = enum.auto()
    LOST = enum.auto()
    TWICE = enum.auto()
    LATE = enum.auto()
    TWICE_AND_LATE = enum.auto()


class _Fated(Duo):
    """Parts have their fates in order, then arrive. Notes which keys sessions are made with."""

    def __init__(self, seed: int, *, mode: PostQuantumMode) -> None:
        super().__init__(seed, mode=mode, interval=3600.0)
        self.fates: deque[Fate] = deque()
        self.quiet: set[Side] = set()  # of whom nothing is heard once so many parts were said, for so long
        self.words_left = 0
        self.quiet_for = 0.0
        self.known: set[Secret] = set()
        self.is_keyed = False  # from the first proved key on
        self.strangers = 0

    def carry(self, sender: Side, part: KeyPart) -> None:
        fate = self.fates.popleft() if self.fates else Fate.ARRIVES
        other = sender.other
        self.words_left -= 1
        if self.words_left == 0:
            self.at(self.now + self.quiet_for, self.quiet.clear)
        if self.words_left <= 0 and sender in self.quiet:
            return
        delays = {
            Fate.ARRIVES: (0.04,),
            Fate.LOST: (),
            Fate.TWICE: (0.04, 0.05),
            Fate.LATE: (LATE,),
            Fate.TWICE_AND_LATE: (0.04, LATE),
        }
        for delay in delays[fate]:
            self.at(self.now + delay, lambda: other.receive(part))

    def finish(self) -> None:
        before = self.session
        super().finish()
        slots = [keys for side in self.sides for keys in (side.disk.current, side.disk.next)]
        self.known |= {keys.psk for keys in slots if keys is not None}
        if self.session != before and self.is_keyed:
            self.strangers += self.d.device_psk not in self.known
        self.is_keyed |= any(side.disk.current is not None for side in self.sides)


class Rotations(RuleBasedStateMachine):
    """One pair; each rule is something that happens to it."""

    @initialize(seed=st.integers(0, 2**16), mode=st.sampled_from(MODES))
    def start(self, seed: int, mode: PostQuantumMode) -> None:
        self.duo = _Fated(seed, mode=mode)
        self.duo.start()
        self.duo.until(self.duo.is_agreed, within=200.0)
        self.duo.is_keyed = True

    @rule(side=st.sampled_from(SIDES))
    def ask(self, side: str) -> None:
        of: Side = getattr(self.duo, side)
        if of.room is not None:
            of.rotate()

    @rule(fates=st.lists(st.sampled_from(Fate), min_size=1, max_size=MOST_FATES))
    def disturb(self, fates: list[Fate]) -> None:
        self.duo.fates.extend(fates)

    @rule(
        sides=st.sets(st.sampled_from(SIDES), min_size=1),
        after=st.integers(1, 20),
        seconds=st.sampled_from([5.0, 170.0]),
    )
    def silence(self, sides: set[str], after: int, seconds: float) -> None:
        """In the midst of a rotation. Their tunnel goes on: what they say of keys is lost."""
        duo = self.duo
        if not duo.quiet and duo.d.room is not None:
            duo.d.rotate()
            duo.quiet = {getattr(duo, side) for side in sorted(sides)}
            duo.words_left, duo.quiet_for = after, seconds

    @rule(side=st.sampled_from(SIDES), after=st.integers(0, 12))
    def kill(self, side: str, after: int) -> None:
        """Before one of its next outputs; what starts again looks at its device and its disk alone."""
        getattr(self.duo, side).crash_after = after

    @rule(seconds=st.sampled_from([0.1, 1.0, 40.0, 130.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.duo.run(seconds)

    @invariant()
    def a_session_never_runs_out_and_none_is_made_without_a_key_of_the_pair(self) -> None:
        if hasattr(self, "duo"):
            assert self.duo.deaths == [], self.duo.describe()
            assert self.duo.strangers == 0, self.duo.describe()

    def teardown(self) -> None:
        """Undisturbed again, the two agree, and on one more when they are asked."""
        if not hasattr(self, "duo"):
            return
        duo = self.duo
        duo.fates.clear()
        duo.quiet.clear()
        for side in duo.sides:
            side.crash_after = None
            side.start_again()
        duo.until(lambda: duo.is_agreed() and all(_is_at_rest(side) for side in duo.sides), within=900.0)
        epoch = duo.d.view.epoch
        duo.d.rotate()
        duo.until(lambda: duo.is_agreed(epoch + 1), within=900.0)
        self.a_session_never_runs_out_and_none_is_made_without_a_key_of_the_pair()


def _is_at_rest(side: Side) -> bool:
    assert side.room is not None
    pair = side.room._pairs[side.other.key]
    return pair._state in (State.IDLE, State.AGREED)


TestRotations = Rotations.TestCase
TestRotations.settings = settings(
    max_examples=120,
    stateful_step_count=15,
    derandomize=True,
    deadline=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],  # a machine may be as slow as it likes
)
