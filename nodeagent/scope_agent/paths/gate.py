"""When WireGuard may be given the peer, so that only one side starts the handshake.

Two initiations that cross each other undo one another and cost seconds. The side without a session starts,
else the one with the lower key; the other side holds its device back until that handshake is seen, or a
second has passed: then the first side may be unable to start.
"""

from __future__ import annotations

GATE = 1.0  # the side that does not initiate waits so long for the other's handshake


class Gate:
    """Before the first path it is shut; once open it stays open."""

    def __init__(self, *, lower: bool) -> None:
        self.session = False  # our WireGuard holds a live session with the peer
        self.peer_session = False  # so does the peer's
        self.is_given = False  # the device may have the peer, at the latest when the wait is over
        self._lower = lower
        self._until: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the device may have the peer now."""
        return self.is_given and self._until is None

    @property
    def until(self) -> float | None:
        """When the wait for the peer's handshake is over; None while there is none."""
        return self._until

    def force(self) -> None:
        """The device has the peer already, or nobody is there to wait for."""
        self.is_given = True

    def start(self, now: float) -> None:
        """The first path was found: open for the side that initiates, wait on the other."""
        if not self.is_given:
            self.is_given = True
            self._until = None if self._initiates() else now + GATE

    def _initiates(self) -> bool:
        if self.session == self.peer_session:
            return self._lower
        return not self.session

    def handshake_seen(self, now: float) -> None:
        """The handshake has come: the wait is over."""
        if self._until is not None:
            self._until = now

    def take(self, now: float) -> None:
        """End a wait that is over."""
        if self._until is not None and now >= self._until:
            self._until = None
