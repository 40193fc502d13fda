"""What the rest of the agent may know of one pair."""

from __future__ import annotations

from dataclasses import dataclass

from scope.model import Endpoint, PathKind
from scope_agent.wireguard.device import HoldEndpoint


@dataclass(frozen=True, slots=True)
class PairView:
    """What the rest of the agent needs to know of a pair."""

    endpoint: Endpoint | None  # to program; None: leave what the device has
    ready: bool  # the peer may have endpoint, keepalive and allowed IPs
    settling: bool  # set the endpoint again whatever the device says
    hold: HoldEndpoint | None  # to be set, once
    verified: frozenset[Endpoint]
    path: PathKind
    rtt: float | None
    observed: Endpoint | None  # where the peer was last seen to send from
    declared: bool  # the ladder's last bound has passed without a direct path
    reason: str  # why not direct; "" when direct
    since: float  # of the present `path`
    hub: str = ""  # name of the ScopePeer that relays
    user_space: bool = False  # a process on the hub relays, not its kernel
    birthday: bool = False  # the direct path goes by a port that was guessed
    carried: bool = False  # over TCP between the hub and one of the two
    is_in_doubt: bool = False  # the path is being asked whether it still works
