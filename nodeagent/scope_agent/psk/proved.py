"""From a key that both sides have on disk to its proof, or back: laid in, seen there, proved, or reverted.

The manager's key, on the way back to it, needs no handshake as proof: each side had it before, and the words
about it show that it is the same. It is over when both devices have it: D, whose device gets it last, is
bound from then on, and says so until E has answered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scope.model import PskFailure, PublicKey
from scope_agent.psk.acquainted import Acquainted
from scope_agent.psk.messages import What
from scope_agent.psk.pair_values import REMIND_EVERY, Nudge, Reading, Repeat, Tools
from scope_agent.psk.slots import Record
from scope_agent.psk.states import Move, State

YOUNGEST = 1.0  # the age of a session from which on a key is laid in
NUDGE_FROM, NUDGE_EVERY = 120.0, 1.0  # WireGuard rekeys at 120 s when it sends: four tries before the revert
REVERT_AT = 145.0  # at 180 s the session ends; the rekey with the old key takes its time, too
HOLD_BACK = 3.0  # E's first word to a device without the key is one that WireGuard repeats only 5 s later
EXPECT_PROOF = 6.0  # so long a first key is looked after closely: one repeated handshake is in it
IN_FLIGHT = 5.0  # a handshake that began before the key was laid in may end so much later
QUIET = 10.0  # without a session for so long: no handshake is under way that a new key would spoil
BEGIN_EVERY, BEGIN_FOR = 6.0, 60.0  # a handshake that is lost is begun again, while anybody may answer it


@dataclass(frozen=True, slots=True)
class Window:
    """Up to which age of a session a key is laid in, followed by the other side, and seen in the device."""

    oldest: float
    latest: float
    unset: float


ROTATION = Window(60.0, 75.0, 90.0)
WAY_BACK = Window(100.0, 115.0, NUDGE_FROM)  # it waits for no rekey


class Proved(Acquainted):
    """A side that lays a key in, and proves or reverts it."""

    def __init__(self, *, own: PublicKey, peer: PublicKey, tools: Tools, record: Record, now: float) -> None:
        super().__init__(own=own, peer=peer, tools=tools, record=record, now=now)
        self._set_at: float | None = None  # since when the device has `next`
        self._is_speaking = False  # the first key: whether our device may start a handshake with it
        self._is_assured = False  # the other side is back at the manager's key, and will not leave it
        self._base_stamp = 0.0
        self._is_fresh = False  # there was no handshake before the key: the first one is its proof
        self._nudge_at = now
        self._builds_on_none = False  # D's next offer
        self._confirm: Repeat | None = None
        self._confirm_tries = 0

    def _take_manager(self, reading: Reading, now: float) -> None:
        """Before there is a key of ours, what the device has is its manager's."""
        record = self._record
        if not self._tools.is_managed or self._is_active or not self._may_note:
            return
        psk = reading.psk
        if self._is_abandoned and psk == record.manager:
            self._note(replace(record, current=None, next=None, active=False, confirmed=0.0))
            self._give_up(now)
            self._schedule.forget(now)
            self._failure = None
        elif record.current is None and not self._is_left and psk != record.manager:
            self._note(replace(record, manager=psk))

    def _may_activate(self, now: float) -> bool:
        if self._reading is None:
            return False
        age = self._age(now)
        if age is not None:
            return YOUNGEST <= age <= self._window.oldest
        if self._is_withheld:
            return True  # nobody tries a handshake before there is a key
        return self._unsessioned_since is not None and now - self._unsessioned_since >= QUIET

    def _is_young_enough(self, now: float) -> bool:
        age = self._age(now)
        return self._reading is not None and (age is None or age <= self._window.latest)

    @property
    def _is_going_back(self) -> bool:
        """Whether the key that is under way is the manager's."""
        return self._is_way_back(self._record.next)

    @property
    def _window(self) -> Window:
        return WAY_BACK if self._is_going_back else ROTATION

    @property
    def _is_bound(self) -> bool:
        """Whether both devices have had the manager's key: E may be done with it, so D stays with it."""
        return self.is_decapsulator and self._state is State.SET and self._is_going_back

    def _lay_in(self, now: float) -> None:
        self._is_fresh = self._is_withheld and self._age(now) is None
        self._base_stamp = self._reading.stamp if self._reading is not None else 0.0

        def laid(_: float) -> None:
            self._standing.go(Move.LAY)
            self._offered = self._offered_base = None

        self._write(replace(self._record, active=True), laid)

    def _prove(self, now: float) -> None:
        """The key is in the device, or on its way there: wait for a handshake, or revert in time."""
        keys, reading = self._record.next, self._reading
        if keys is None or reading is None:
            return
        # A session's age is compared as its timer is computed, or rounding would make them disagree.
        since = reading.since if self._age(now) is not None else None
        if self._set_at is None:
            if reading.psk == keys.psk:
                self._standing.go(Move.SET)
                self._set_at = self._nudge_at = now
                self._repeat = Repeat(now if self._is_bound else now + REMIND_EVERY)
                if not self.is_decapsulator:
                    self._say_of(What.ACTIVE, keys)
                if not self._is_fresh:
                    self._base_stamp = reading.stamp
                self._speak(now)
                if self._is_assured:
                    self._promote(now)
            elif since is not None and now >= since + self._window.unset and not self._is_assured:
                self._revert("the key did not get into the device in time", now, tell=True)
            return
        self._speak(now)
        if now < self._set_at + IN_FLIGHT and not self._is_fresh:
            self._base_stamp = reading.stamp
        elif reading.stamp not in (0.0, self._base_stamp):
            self._promote(now)
            return
        if since is not None and now >= since + REVERT_AT and not self._is_bound:
            self._revert("no handshake proved the key in time", now, tell=True)
            return
        if since is not None and now >= max(self._nudge_at, since + NUDGE_FROM):
            self._nudge_at = now + NUDGE_EVERY
            self._out.append(Nudge())
        begins_at = self._begin_proof_at if since is None else None
        if begins_at is not None and now >= begins_at:
            self._nudge_at = now + BEGIN_EVERY
            self._out.append(Nudge())
        if self._is_bound:
            if self._is_reached and self._repeat.due(now):
                self._say_of(What.CONFIRM, keys)
        elif since is None and self.is_decapsulator and self._is_reached and now >= self._repeat.at:
            self._repeat.at = now + REMIND_EVERY
            self._say_of(What.ACTIVATE, keys)

    @property
    def _begin_proof_at(self) -> float | None:
        """When to have WireGuard begin a handshake where there is no session, and nobody may send for long.

        On the way back: one that proves the key that is in its way, or the manager's where E does not answer.
        """
        if self._set_at is None or not (self._is_leaving or self._is_bound):
            return None
        at = max(self._nudge_at, self._set_at + IN_FLIGHT + 1.0)
        until = max(self._set_at, self._unsessioned_since or 0.0) + BEGIN_FOR
        return at if self._is_leaving or at < until else None

    def _speak(self, now: float) -> None:
        """Let our device start the first handshake, once the other one has the key, too.

        D's gets it second, so D's begins. A handshake that fails for want of the key keeps both devices from
        the next one for 5 s; so E's only answers, unless D's does not come.
        """
        if self._is_withheld and self._set_at is not None:
            self._is_speaking |= self.is_decapsulator or now >= self._set_at + HOLD_BACK

    def _promote(self, now: float) -> None:
        """`next` is proved. The device has it already, or gets it now."""
        record = self._record
        self._returned = record.next if self._is_way_back(record.next) else None
        current = record.next if self._returned is None else None
        self._note(
            replace(record, current=current, next=None, active=False, confirmed=now + self._tools.offset)
        )
        self._set_at, self._is_fresh, self._is_assured = None, False, False
        self._failure, self._builds_on_none = None, False
        self._standing.go(Move.PROVE)
        self._offered = self._offered_base = None
        if current is None or self._is_leaving:
            self._schedule.forget(now)
        else:
            self._schedule.proved(self._policy.rotation_interval, now)
        if self._is_stale:
            self._schedule.at = now
        self._confirm, self._confirm_tries = Repeat(now), 0

    def _revert(self, why: str, now: float, *, tell: bool) -> None:
        """Put the old key back; `next` is kept, in case the other side has the proof."""
        keys = self._record.next
        self._take_back()
        self._fail(PskFailure.UNCONFIRMED, why, now)
        if tell and keys is not None:
            self._say_of(What.ABORT if self.is_decapsulator else What.REVERTED, keys)

    def _take_back(self) -> None:
        self._note(replace(self._record, active=False))
        self._set_at, self._is_fresh, self._is_speaking, self._is_assured = None, False, False, False
        if self._is_active:
            self._standing.go(Move.REVERT)

    def expects_proof(self, now: float) -> bool:
        """Whether a first key is about to be proved, and traffic waits for that."""
        return self._is_withheld and self._set_at is not None and now < self._set_at + EXPECT_PROOF

    def _prove_times(self, now: float) -> list[float]:
        since = self._reading.since if self._reading is not None else None
        is_alone = since is None or self._age(now) is None
        if self._set_at is None:
            if since is None or is_alone or self._is_assured:
                return []
            return [since + self._window.unset]
        times = [self._set_at + HOLD_BACK] if self._is_withheld and not self._is_speaking else []
        if self._is_reached and self.is_decapsulator and (is_alone or self._is_bound):
            times.append(self._repeat.at)
        if since is not None and not is_alone:
            times.append(max(self._nudge_at, since + NUDGE_FROM))
            if not self._is_bound:
                times.append(since + REVERT_AT)
        elif (begins_at := self._begin_proof_at) is not None:
            times.append(begins_at)
        return times
