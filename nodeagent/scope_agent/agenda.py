"""When each of many pairs is to be looked at again, and which of a few times comes first. Pure.

Each key has one appointment at most. One that is moved leaves its old entry in the heap until that comes to
the top, or until such entries are most of the heap: so moving one costs no search.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


def earliest(*times: float | None) -> float | None:
    """The earliest of the times, in seconds of one clock; None where there is none.

    Asked of every room after every input, so it makes no iterator.
    """
    first = None
    for at in times:
        if at is not None and (first is None or at < first):
            first = at
    return first


# The heap is rebuilt when it holds more entries than so many for each appointment, and a few: moving one then
# costs the same on average, however often that happens.
_ENTRIES_EACH, _ENTRIES_SPARE = 4, 64


class Agenda(Generic[K]):
    """Appointments in seconds of the caller's clock. Those of one time come in the order they were made."""

    def __init__(self) -> None:
        self._at: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._made = 0

    def put(self, key: K, at: float | None) -> None:
        """Have `key` come at `at`, in place of any other time; None: not at all."""
        if at is None:
            self._at.pop(key, None)
        elif self._at.get(key) != at:
            self._at[key] = at
            self._made += 1
            heapq.heappush(self._heap, (at, self._made, key))
        if len(self._heap) > _ENTRIES_EACH * len(self._at) + _ENTRIES_SPARE:
            self._heap = [entry for entry in self._heap if self._holds(entry)]
            heapq.heapify(self._heap)

    def next(self) -> float | None:
        """The time of the earliest appointment."""
        while self._heap and not self._holds(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> K | None:
        """The key that has been due for longest, whose appointment is over with this; None: nobody is due."""
        at = self.next()
        if at is None or at > now:
            return None
        key = heapq.heappop(self._heap)[2]
        del self._at[key]
        return key

    def _holds(self, entry: tuple[float, int, K]) -> bool:
        return self._at.get(entry[2]) == entry[0]
