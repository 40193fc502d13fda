"""How a sealed message leaves: straight to an endpoint, in a datagram that another passes on, or by courier.

A call-me-maybe goes to peers that no endpoint of ours reaches yet. It travels over up to a few carriers
(peers and reflectors that answer), else over the gateway. We carry for others in turn: to peers of the mesh,
one hop, at a bounded rate for each asker. Nothing here sends: what is to be sent comes back.
"""

from __future__ import annotations

from collections.abc import Set
from typing import assert_never

from scope.channel import Channel, Confirmed, Hello, NotACorrespondent, Received
from scope.model import PublicKey
from scope.wire import Forward, Forwarded, Message, WireError
from scope_agent.inputs import Courier, Leg, Send, Socket, Via
from scope_agent.membership import Membership
from scope_agent.paths.core import Call, Paths

FORWARD_PER_SECOND = 50.0  # datagrams passed on for one asker: call-me-maybe for a large mesh
FORWARD_BURST = 100.0


class Carrying:
    """Seals, opens, and finds the way. `dropped` counts datagrams that led nowhere."""

    def __init__(self, channel: Channel, *, paths: Paths, membership: Membership) -> None:
        self._channel = channel
        self._paths = paths
        self._membership = membership
        self._allowance: dict[PublicKey, tuple[float, float]] = {}  # asker -> (tokens, when)
        self.dropped = 0

    def open(self, data: bytes) -> Hello | Confirmed | Received | None:
        """What a datagram says; None when nobody that we know can have sent it."""
        try:
            return self._channel.open(data)
        except WireError:
            self.dropped += 1
            return None

    def seal(self, to: PublicKey, message: Message, leg: Leg, now: float) -> list[Send]:
        """Say something to the holder of a probe key."""
        try:
            data = self._channel.seal(to, message)
        except (NotACorrespondent, ValueError):
            self.dropped += 1
            return []
        return self.send(data, leg, now)

    def send(self, data: bytes, leg: Leg, now: float) -> list[Send]:
        """Send a datagram that is sealed already."""
        match leg:
            case Socket():
                return [Send(leg, data)]
            case Courier():
                return [Send(leg, data)] if self._membership.registration().connected else []
            case Via(carrier, to):
                endpoint = self._paths.endpoint_of(carrier, now)
                if endpoint is None:
                    return []
                return self.seal(carrier, Forward(to, data), Socket(endpoint), now)
            case _:
                assert_never(leg)

    def call(self, call: Call, now: float) -> list[Send]:
        """By a hub that relays to the peer, and over carriers that answer, else over the gateway."""
        relayed = self._paths.endpoint_of(call.to, now)
        legs: list[Leg] = [Socket(relayed)] if relayed is not None else []
        carriers = self._paths.carriers(call.to, now)
        legs += [Via(carrier, call.to) for carrier in carriers]
        legs = legs or [Courier(call.to)]
        return [send for leg in legs for send in self.seal(call.to, call.message, leg, now)]

    def forward(self, asker: PublicKey, request: Forward, *, peers: Set[PublicKey], now: float) -> list[Send]:
        """Pass a datagram on for `asker`, to one of `peers`, by probe keys."""
        tokens, at = self._allowance.get(asker, (FORWARD_BURST, now))
        tokens = min(FORWARD_BURST, tokens + (now - at) * FORWARD_PER_SECOND)
        endpoint = self._paths.endpoint_of(request.to, now)
        if tokens < 1.0 or endpoint is None or request.to not in peers:
            self.dropped += 1
            return []
        self._allowance[asker] = (tokens - 1.0, now)
        return self.seal(request.to, Forwarded(asker, request.datagram), Socket(endpoint), now)


def back(leg: Leg, sender: PublicKey) -> Leg:
    """The way back to who sent over `leg`."""
    match leg:
        case Socket(endpoint, port=port):
            return Socket(endpoint, port=port)
        case Via(carrier):
            return Via(carrier, sender)
        case Courier():
            return Courier(sender)
        case _:
            assert_never(leg)
