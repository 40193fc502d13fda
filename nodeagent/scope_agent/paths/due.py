"""What one pair asks the rest of the agent to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from scope.model import Endpoint
from scope.wire import Message


@dataclass(frozen=True, slots=True)
class SendTo:
    """A message due to an endpoint of the peer."""

    message: Message
    endpoint: Endpoint
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class CallPeer:
    """A call-me-maybe is due, over whatever carries it."""


@dataclass(frozen=True, slots=True)
class CheckMapping:
    """A path is in doubt: perhaps it is our own mapping that moved."""


Due: TypeAlias = SendTo | CallPeer | CheckMapping
