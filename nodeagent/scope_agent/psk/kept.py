"""What one side of a pair has and writes down: its record, where it stands, what its device was seen with.

The lowest of five layers that make a `Pair`, each of which knows those below it: `kept`, `acquainted`,
`proved`, `agreed`, `pair`. Here a record is replaced, on disk first where something is to follow from it, and
a failure is put on the schedule. Where something else manages the device, its key is the way back.
"""

from __future__ import annotations

from collections.abc import Callable

from scope.model import PostQuantum, PostQuantumMode, PskFailure, PublicKey, Secret
from scope_agent.psk.exchange import Offered, control, manager_keys
from scope_agent.psk.messages import NO_ID, Control, PskMessage, What, encode
from scope_agent.psk.pair_values import (
    ATTEMPT,
    FOREIGN_MAX,
    SESSION_VALID,
    Failure,
    PairOutput,
    Reading,
    Repeat,
    Say,
    Tools,
)
from scope_agent.psk.schedule import Schedule
from scope_agent.psk.slots import Keys, Record, find
from scope_agent.psk.states import Move, Standing, State
from scope_agent.wireguard.device import NO_PSK


class Kept:
    """One side of a pair: what it has, keeps and says."""

    def __init__(self, *, own: PublicKey, peer: PublicKey, tools: Tools, record: Record, now: float) -> None:
        self._own, self._peer, self._tools = own, peer, tools
        self.is_decapsulator = own.raw > peer.raw
        self._record = record
        self._standing = Standing(record, is_decapsulator=self.is_decapsulator)
        self._writing: Record | None = None  # in flight
        self._pending: tuple[Record, Callable[[float], None] | None] | None = None
        self._write_at = now
        self._policy = PostQuantum()
        self._is_reached = False
        self._reading: Reading | None = None
        self._unsessioned_since: float | None = None
        self._out: list[PairOutput] = []
        self._failure: Failure | None = None  # the last one, until a key is proved
        current = record.current
        self._schedule = Schedule(
            now,
            random=tools.random,
            proved=record.confirmed - tools.offset if current is not None else None,
            resumes=current is None or record.counter > current.epoch,
        )
        self._offered: Offered | None = None
        self._offered_base: Keys | None = None
        self._deadline = now + ATTEMPT
        self._repeat = Repeat(now)
        # where something else manages the device
        self._foreign: list[float] = []
        self._is_told_to_leave = False
        self._is_abandoned = False  # on our side alone
        self._returned: Keys | None = None  # the way back, once it was gone

    @property
    def _state(self) -> State:
        return self._standing.state

    @property
    def _is_active(self) -> bool:
        return self._standing.is_active

    @property
    def _is_off(self) -> bool:
        return self._policy.mode is PostQuantumMode.OFF

    @property
    def _is_withheld(self) -> bool:
        return self._policy.mode is PostQuantumMode.REQUIRED and self._record.current is None

    @property
    def _is_left(self) -> bool:
        """Whether the device still has the first key ever, which was reverted."""
        record, reading = self._record, self._reading
        return (
            record.current is None
            and record.next is not None
            and not self._is_active
            and reading is not None
            and reading.psk == record.next.psk
        )

    def _age(self, now: float) -> float | None:
        """Of the session; None without one."""
        if self._reading is None or self._reading.since is None:
            return None
        return now - self._reading.since if now < self._reading.since + SESSION_VALID else None

    def _psk(self) -> Secret | None:
        """What the device is to hold; None until it was read, and where we have no say."""
        record, reading = self._record, self._reading
        if reading is None:
            return None
        if self._is_abandoned:
            return record.manager
        if self._is_active and record.next is not None:
            return record.next.psk
        if record.current is not None:
            return record.current.psk
        return record.manager or NO_PSK if self._is_left else None

    @property
    def _is_leaving(self) -> bool:
        """Whether the pair is to go back: we leave, or the manager insists on its key."""
        insists = self._tools.is_managed and len(self._foreign) > FOREIGN_MAX
        return self._is_told_to_leave or insists

    @property
    def _knows_no_manager(self) -> bool:
        return self._tools.is_managed and self._record.manager is None

    @property
    def _may_note(self) -> bool:
        """Whether nothing is being written that decides what comes next."""
        return self._pending is None or self._pending[1] is None

    def _first_base(self) -> Keys | None:
        manager = self._record.manager
        return manager_keys(manager, None) if manager is not None else None

    def _find_base(self, id_: bytes) -> Keys | None:
        if id_ == NO_ID:
            return None
        first = self._first_base()
        return first if first is not None and first.id == id_ else find(self._record, id_)

    def _way_back(self) -> Keys | None:
        record = self._record
        if record.manager is None or record.current is None:
            return None
        return manager_keys(record.manager, record.current)

    def _is_way_back(self, keys: Keys | None) -> bool:
        back = self._way_back()
        return keys is not None and back is not None and keys.id == back.id

    def _find_way_back(self, word: Control) -> Keys | None:
        """What a word that no slot knows may be about: the other side wants to go back, or we have."""
        if self._returned is not None and word.id == self._returned.id:
            return self._returned
        back = self._way_back()
        if back is None or word.id != back.id or word.what not in (What.COMMIT, What.READY):
            return None
        return back

    def _say(self, message: PskMessage) -> None:
        self._out.append(Say(encode(message)))

    def _say_of(self, what: What, keys: Keys) -> None:
        self._say(control(what, keys, by_decapsulator=self.is_decapsulator))

    def _say_current(self) -> None:
        proved = self._record.current or self._returned
        if proved is not None:
            self._say_of(What.CONFIRM, proved)

    def _write(self, record: Record, then: Callable[[float], None]) -> None:
        """Write down first: nothing holds before the disk has it."""
        self._pending = (record, then)

    def _note(self, record: Record) -> None:
        """What is so already: the disk hears of it as soon as it can."""
        self._record = record
        self._pending = (record, None)

    def _enter(self, move: Move, now: float, *, within: float) -> None:
        self._standing.go(move)
        self._deadline, self._repeat = now + within, Repeat(now)

    def _fail(self, kind: PskFailure, why: str, now: float) -> None:
        self._failure = Failure(kind, why)
        self._give_up(now + self._schedule.fail())

    def _give_up(self, again: float) -> None:
        if self._standing.allows(Move.GIVE_UP) and (self.is_decapsulator or self._record.next is None):
            self._standing.go(Move.GIVE_UP)
        self._offered = self._offered_base = None
        self._schedule.at = again
