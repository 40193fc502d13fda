"""Frames that wait for a connection: bounded, the oldest go first. Pure.

What carries datagrams must not become a buffer of its own: TCP inside judges the way by what is lost, and a
datagram that is late is worth less than the one behind it. And what waits for all connections together is
bounded, too: a hub's members may be thousands, and all of them slow at once.
"""

from __future__ import annotations

from collections import deque
from typing import Final

# Eight of the longest frames: 0.4 s of a way of 10 Mbit/s, and what comes at 1 Gbit/s while the process does
# something else for 4 ms.
QUEUE_BYTES: Final = 512 << 10
# A hundred and twenty-eight queues that are full: a machine of 512 MB has that to spare.
ROOM_BYTES: Final = 64 << 20


class Room:
    """What queues share. Where it is full, the longest of them loses the older half of what waits there.

    So the longest is looked for once in a while, and not for each frame, however many queues there are.
    """

    def __init__(self, limit: int = ROOM_BYTES) -> None:
        self._limit = limit
        self._bytes = 0
        self._queues: set[FrameQueue] = set()  # in which something waits

    @property
    def bytes(self) -> int:
        """What waits in all."""
        return self._bytes

    def changed(self, queue: FrameQueue, by: int) -> None:
        """A queue holds so many bytes more, or less."""
        self._bytes += by
        if queue.bytes:
            self._queues.add(queue)
        else:
            self._queues.discard(queue)
        while by > 0 and self._bytes > self._limit:
            longest = max(self._queues, key=lambda each: each.bytes)
            half = longest.bytes // 2
            while longest.bytes > half:
                longest.drop_oldest()


class FrameQueue:
    """What waits to be sent over one connection. `dropped`: datagrams that went for newer ones, ever."""

    def __init__(self, room: Room) -> None:
        self.bytes = 0
        self.dropped = 0
        self._room = room
        self._frames: deque[tuple[bytes, int]] = deque()

    def put(self, frame: bytes, packets: int) -> None:
        """Wait with a frame of so many datagrams; older ones may have to go for it."""
        self._frames.append((frame, packets))
        self._changed(len(frame))
        while self.bytes > QUEUE_BYTES:
            self.drop_oldest()

    def drop_oldest(self) -> None:
        """The frame that waited for longest goes."""
        oldest, packets = self._frames.popleft()
        self.dropped += packets
        self._changed(-len(oldest))

    def take(self) -> tuple[bytes, int] | None:
        """The frame that waited for longest, and how many datagrams it is."""
        if not self._frames:
            return None
        frame, packets = self._frames.popleft()
        self._changed(-len(frame))
        return frame, packets

    def clear(self) -> None:
        """All go."""
        while self._frames:
            self.drop_oldest()

    def _changed(self, by: int) -> None:
        self.bytes += by
        self._room.changed(self, by)
