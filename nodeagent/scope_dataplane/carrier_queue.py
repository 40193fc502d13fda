"""Frames that wait for a connection: bounded, the oldest go first. Pure.

What carries datagrams must not become a buffer of its own: TCP inside judges the way by what is lost, and a
datagram that is late is worth less than the one behind it.
"""

from __future__ import annotations

from collections import deque
from typing import Final

# Eight of the longest frames: 0.4 s of a way of 10 Mbit/s, and what comes at 1 Gbit/s while the process does
# something else for 4 ms.
QUEUE_BYTES: Final = 512 << 10


class FrameQueue:
    """What waits to be sent over one connection."""

    def __init__(self) -> None:
        self._frames: deque[tuple[bytes, int]] = deque()
        self._bytes = 0

    def put(self, frame: bytes, packets: int) -> int:
        """Wait with a frame of so many datagrams; how many older ones had to go for it."""
        self._frames.append((frame, packets))
        self._bytes += len(frame)
        gone = 0
        while self._bytes > QUEUE_BYTES:
            oldest, count = self._frames.popleft()
            self._bytes -= len(oldest)
            gone += count
        return gone

    def take(self) -> tuple[bytes, int] | None:
        """The frame that waited for longest, and how many datagrams it is."""
        if not self._frames:
            return None
        frame, packets = self._frames.popleft()
        self._bytes -= len(frame)
        return frame, packets

    def clear(self) -> int:
        """Forget all: how many datagrams."""
        gone = sum(packets for _, packets in self._frames)
        self._frames.clear()
        self._bytes = 0
        return gone
