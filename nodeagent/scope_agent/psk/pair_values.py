"""What a pair is told and what it asks for, and the times that several of its layers go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from scope.model import PskFailure, Secret
from scope_agent.psk.identity import KeyMaker
from scope_agent.psk.slots import Record

SESSION_VALID = 180.0  # WireGuard's REJECT_AFTER_TIME
SAY_FIRST, SAY_LONGEST = 1.0, 16.0  # what is not answered is said again
ACTIVATE_EVERY, REMIND_EVERY = 1.0, 5.0
ATTEMPT = 60.0  # an exchange without an answer for so long has failed
AT_ONCE = 1.0  # after a refusal that says what to do better
ANSWER_EVERY = 1.0  # an answer costs two milliseconds of a processor: one peer gets so much of it
DISK_AGAIN = 30.0
FOREIGN_MAX, FOREIGN_WINDOW = 3, 3600.0  # a key that another program replaced is put back so often


@dataclass(slots=True)
class Tools:
    """What all pairs of an agent share. `may_begin` gives the time from which an exchange may start."""

    random: Callable[[], float]
    may_begin: Callable[[float], float]
    offset: float  # wall clock less monotonic clock
    is_managed: bool = False  # something else manages the device
    maker: KeyMaker | None = None  # until it is there a pair keeps the keys that it has, and makes none


@dataclass(frozen=True, slots=True)
class Reading:
    """What the device says of the peer. `stamp` only compares; `since` is when the session began, ours."""

    psk: Secret | None
    stamp: float
    since: float | None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no key, or no newer one."""

    kind: PskFailure
    why: str


CONFLICT = Failure(PskFailure.CONFLICT, "another program replaces it: find out which, and stop it")


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the peer."""

    message: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Write:
    """Replace the pair's record on disk; answered by `written`."""

    record: Record


@dataclass(frozen=True, slots=True)
class Nudge:
    """Send an empty packet through the tunnel: WireGuard rekeys when it sends."""


PairOutput: TypeAlias = Say | Write | Nudge


@dataclass(slots=True)
class Repeat:
    """When something is said again, ever more rarely."""

    at: float
    delay: float = SAY_FIRST

    def due(self, now: float) -> bool:
        """Whether it is time, and if so, when the next time is."""
        if now < self.at:
            return False
        self.at = now + self.delay
        self.delay = min(2 * self.delay, SAY_LONGEST)
        return True
