"""A hub's relay in virtual time: what rules in a kernel do, and a forwarder beside them. No agent is needed.

A knock teaches, per address family, where a side of a grant is. What comes from where a side last knocked, to
the port where it did, and looks like WireGuard's or like a probe, leaves the other side's port towards where
that one last knocked. Rules serve one family; the forwarder serves what goes from one family to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scope.model import Endpoint, Family, Forwarding, PublicKey
from scope.relay import KNOCK_BYTES, KNOCK_MAGIC, MAPPING_VALID, Grant, Grants, Side
from scope.wire import RefusedBecause, is_datagram

FIRST_PORT, LAST_PORT = 26000, 26255


@dataclass(slots=True)
class Relay:
    """One hub's. `send(port, to, payload)` puts a datagram on the wire from one of its ports."""

    now: Callable[[], float]
    send: Callable[[int, Endpoint, object], None]
    forwarding: Forwarding = Forwarding.KERNEL  # what its agent finds
    refuses: RefusedBecause | None = None  # what its agent says to everyone, whatever it could do
    passed: int = 0
    knocked: Callable[[PublicKey], None] = lambda peer: None  # a side was taught
    _is_set_up: bool = False
    _by_token: dict[bytes, tuple[Grant, Side]] = field(default_factory=dict)
    _side: dict[tuple[Endpoint, int], tuple[bytes, float]] = field(default_factory=dict)
    _seen: dict[tuple[bytes, Family], tuple[Endpoint, float]] = field(default_factory=dict)

    def apply(self, grants: Grants | None) -> bool:
        """Relay these grants and nothing else; what was learned for those that stay is kept.

        True where these are the first ones since the machine booted: it knows where nobody is.
        """
        forgot = grants is not None and not self._is_set_up
        self._is_set_up = grants is not None
        self._by_token = {
            side.token: (grant, side) for grant in (grants.grants if grants else ()) for side in grant.sides
        }
        return forgot

    def forget(self) -> None:
        """A reboot: grants are on the disk, what was learned is not."""
        self._is_set_up = False
        self._by_token.clear()
        self._side.clear()
        self._seen.clear()

    def arrived(self, source: Endpoint, port: int, payload: object) -> None:
        """A datagram for one of the ports."""
        now = self.now()
        if isinstance(payload, bytes) and payload[:4] == KNOCK_MAGIC:
            token = payload[4:]
            if len(payload) == KNOCK_BYTES and token in self._by_token:
                side = self._by_token[token][1]
                if side.port == port:
                    self._side[(source, port)] = token, now
                    self._seen[(token, source.family)] = source, now
                    self.knocked(side.peer)
            return
        if self.forwarding is Forwarding.NONE or (isinstance(payload, bytes) and not is_datagram(payload)):
            return
        token, at = self._side.get((source, port), (b"", 0.0))
        if token not in self._by_token or now - at > MAPPING_VALID:
            return
        grant, side = self._by_token[token]
        other = grant.sides[1] if side is grant.sides[0] else grant.sides[0]
        for family in (source.family, *Family):
            where, at = self._seen.get((other.token, family), (None, 0.0))
            if where is not None and now - at <= MAPPING_VALID:
                self.passed += 1
                self.send(other.port, where, payload)
                return
