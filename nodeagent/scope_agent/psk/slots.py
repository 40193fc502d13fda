"""What of a pair's keys outlives the agent: two slots, written before they are used.

`next` is a key that both sides have agreed on; `active` says that the device has it, or is about to.
`current` is one that a handshake has proved. There is no third: once a key is proved, the one before
it is of use to nobody but a thief. Beside the slots, where something else manages the device: the pre-shared
key that it had given the pair, which is where the pair goes back to.
"""

from __future__ import annotations

from dataclasses import dataclass

from scope.model import Fingerprint, Secret


@dataclass(frozen=True, slots=True)
class Keys:
    """What one exchange gives: a pre-shared key, and what the two holders need to speak of it."""

    epoch: int
    id: bytes  # names the key, and says nothing of it
    psk: Secret
    chain: Secret  # goes into the next exchange
    confirm_d: Secret
    confirm_e: Secret
    suite: int = 1  # by which it was made


@dataclass(frozen=True, slots=True)
class Record:
    """One pair's keys. `active` only where there is a `next`."""

    pinned: Fingerprint | None = None  # of the peer's identity, from the first agreed key on, or as told
    former: Fingerprint | None = None  # the one that it followed, by what that signed
    is_told: bool = False  # the operator told this agent `pinned`, or one that it followed
    counter: int = 0  # the highest epoch that was ever offered or taken
    current: Keys | None = None
    next: Keys | None = None
    active: bool = False
    confirmed: float = 0.0  # wall clock of `current`'s proof: for people, and the first rotation of a run
    manager: Secret | None = None  # what the device had before us, NO_PSK for none; None where it is ours


def find(record: Record, id_: bytes) -> Keys | None:
    """The slot with this id."""
    for keys in (record.current, record.next):
        if keys is not None and keys.id == id_:
            return keys
    return None
