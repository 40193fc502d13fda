"""Where one side of a pair stands with a key that is not proved yet, and what may come next, as a table.

`pair` moves by this table and by nothing else; docs/post-quantum.md shows it. A side starts where its record
says: AGREED with a key that waits, LAID with one that its device has or was about to get, else IDLE.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from scope_agent.psk.slots import Record


class State(enum.Enum):
    """What is true of one side."""

    IDLE = "no key is under way"
    OFFERED = "its number is on disk, the offer is said"
    AGREED = "the key is on disk"
    READY = "the other side has it on disk, too: it waits for a young session"
    LAID = "it is written down as the device's"
    SET = "the device has it: it waits for its proof"


class Move(enum.Enum):
    """What leads from one state to another."""

    OFFER = "a number is written down for an offer"
    AGREE = "the key is written down"
    HEAR_READY = "the other side has it on disk"
    LAY = "it is written down as the device's"
    SET = "the device is seen with it"
    LOSE = "the device is away"
    PROVE = "a handshake, or the other side's word of one"
    REVERT = "no proof in time, or the other side reverted"
    GIVE_UP = "no answer in time, a refusal, or no use for it any more"


class IllegalMove(Exception):
    """A move that the table does not have: nothing has changed. It is a bug of ours, whatever a peer said."""


Moves: TypeAlias = Mapping[State, Mapping[Move, State]]

# A key that D gave up or reverted stays in its slot: E may have laid it in or even proved it, so from IDLE it
# may be laid in or proved, too. In E's slot it is AGREED on until another one takes its place.
_OF_D: dict[State, dict[Move, State]] = {
    State.IDLE: {
        Move.OFFER: State.OFFERED,
        Move.AGREE: State.AGREED,  # the way back, on which there is nothing to offer
        Move.LAY: State.LAID,
        Move.PROVE: State.IDLE,
    },
    State.OFFERED: {
        Move.AGREE: State.AGREED,
        Move.LAY: State.LAID,
        Move.PROVE: State.IDLE,
        Move.GIVE_UP: State.IDLE,
    },
    State.AGREED: {
        Move.HEAR_READY: State.READY,
        Move.LAY: State.LAID,
        Move.PROVE: State.IDLE,
        Move.GIVE_UP: State.IDLE,
    },
    State.READY: {Move.LAY: State.LAID, Move.PROVE: State.IDLE, Move.GIVE_UP: State.IDLE},
    State.LAID: {Move.SET: State.SET, Move.PROVE: State.IDLE, Move.REVERT: State.IDLE},
    State.SET: {Move.LOSE: State.LAID, Move.PROVE: State.IDLE, Move.REVERT: State.IDLE},
}
_OF_E: dict[State, dict[Move, State]] = {
    State.IDLE: {Move.AGREE: State.AGREED},
    State.AGREED: {
        Move.AGREE: State.AGREED,
        Move.LAY: State.LAID,
        Move.PROVE: State.IDLE,
        Move.GIVE_UP: State.IDLE,
    },
    State.LAID: {Move.SET: State.SET, Move.PROVE: State.IDLE, Move.REVERT: State.AGREED},
    State.SET: {Move.LOSE: State.LAID, Move.PROVE: State.IDLE, Move.REVERT: State.AGREED},
}
OF_D: Moves = MappingProxyType(_OF_D)
OF_E: Moves = MappingProxyType(_OF_E)


class Standing:
    """Where one side stands."""

    def __init__(self, record: Record, *, is_decapsulator: bool) -> None:
        self._moves = OF_D if is_decapsulator else OF_E
        self.state = State.IDLE
        if record.next is not None:
            self.state = State.LAID if record.active else State.AGREED

    @property
    def is_active(self) -> bool:
        """Whether the device has the key, or may have it."""
        return self.state in (State.LAID, State.SET)

    def allows(self, move: Move) -> bool:
        """Whether the table has this move from here."""
        return move in self._moves[self.state]

    def go(self, move: Move) -> None:
        """Make a move. Raises IllegalMove."""
        if not self.allows(move):
            raise IllegalMove(f"{move.name} from {self.state.name}")
        self.state = self._moves[self.state][move]
