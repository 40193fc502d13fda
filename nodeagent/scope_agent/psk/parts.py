"""Messages longer than a datagram: cut into parts, and put together again in bounded memory.

A message is sent again under the same number until it is answered, so what was lost of it the first time is
filled in by the second.
"""

from __future__ import annotations

from scope.wire import MAX_KEY_PART, MAX_KEY_PARTS, KeyPart, WireError

MAX_OPEN = 4  # messages of one sender at once: an identity and an exchange's, with room


def cut(number: int, message: bytes) -> list[KeyPart]:
    """A message as parts, under a number that its sender uses for no other one."""
    pieces = [message[at : at + MAX_KEY_PART] for at in range(0, len(message), MAX_KEY_PART)]
    if len(pieces) > MAX_KEY_PARTS:
        raise ValueError(f"a message of {len(message)} bytes is more than {MAX_KEY_PARTS} parts")
    return [KeyPart(number, index, len(pieces), piece) for index, piece in enumerate(pieces)]


class Joining:
    """What has arrived of one sender's messages: at most MAX_OPEN of them, the oldest gives way."""

    def __init__(self) -> None:
        self._open: dict[int, dict[int, bytes]] = {}
        self._counts: dict[int, int] = {}

    def add(self, part: KeyPart) -> bytes | None:
        """The message that the part completes. Raises WireError where it contradicts an earlier one."""
        if part.count == 1:
            return part.data
        if self._counts.setdefault(part.number, part.count) != part.count:
            raise WireError("two parts of one message count its parts differently")
        pieces = self._open.setdefault(part.number, {})
        pieces[part.index] = part.data
        if len(pieces) == part.count:
            self._forget(part.number)
            return b"".join(pieces[index] for index in range(part.count))
        if len(self._open) > MAX_OPEN:
            self._forget(next(iter(self._open)))
        return None

    def _forget(self, number: int) -> None:
        del self._open[number], self._counts[number]
