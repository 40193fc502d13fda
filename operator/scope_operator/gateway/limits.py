"""How much one caller may ask: every bound of the gateway with its reason, and the buckets that hold it.

Nothing here reads a clock: `now` is monotonic seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket's shape: `per_second` in the long run, `burst` at once."""

    per_second: float
    burst: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gateway lets through."""

    body: int = 64 * 1024  # a report of 2 KB, a mesh of a few: far above both
    line: int = 4 * 1024  # a signed request's header is 500 bytes
    headers: int = 64
    body_seconds: float = 10.0  # 64 KiB over a 64 kbit/s uplink
    first_request_seconds: float = 15.0  # a connection that says nothing is dropped
    source: Rate = Rate(100, 600)  # a hundred agents behind one NAT start at once with six requests each
    stranger: Rate = Rate(20, 200)  # requests without a credential: joins, health checks, guesses at tokens
    peer: Rate = Rate(10, 60)  # a report each second and a re-list, with room
    cluster: Rate = Rate(50, 500)  # a cluster of a thousand Nodes that joins has its peers within 20 s
    courier: Rate = Rate(20, 100)  # a call-me-maybe to each of a hundred peers at once
    connections: int = 8192  # half of a common descriptor limit's worth is left to the rest
    connections_per_source: int = 1024
    streams: int = 4096
    admin_streams: int = 16
    joins_waiting: int = 256  # joins that wait for their address at once
    join_wait: float = 5.0  # seconds that a join waits for its address
    stall: float = 30.0  # a stream that takes nothing for so long is cut
    heartbeat: float = 15.0  # seconds between heartbeat lines: under the usual 30 s of idle middle boxes
    backlog: int = 8192  # events that a stream can resume from: minutes of a busy mesh of a thousand
    replays_per_peer: int = (
        1024  # jti of one peer within MAX_LIFETIME: 60 s at the peer's rate, and its burst
    )
    replays_per_cluster: int = 4096  # the same at a cluster's rate


class Buckets(Generic[K]):
    """One token bucket per key; the least recently used of more than `capacity` keys is forgotten.

    Forgetting refills a bucket, which costs an attacker `capacity` other keys: no gain over using those.
    """

    def __init__(self, rate: Rate, *, capacity: int = 65536) -> None:
        self._rate = rate
        self._capacity = capacity
        self._levels: OrderedDict[K, tuple[float, float]] = OrderedDict()

    def take(self, key: K, now: float, *, cost: float = 1.0) -> float:
        """Take `cost` tokens: 0.0 when there were enough, else the seconds until there are (none taken)."""
        level, at = self._levels.pop(key, (self._rate.burst, now))
        level = min(self._rate.burst, level + (now - at) * self._rate.per_second)
        short = cost - level
        self._levels[key] = (level if short > 0 else level - cost, now)
        if len(self._levels) > self._capacity:
            self._levels.popitem(last=False)
        return max(0.0, short / self._rate.per_second)


def source_of(remote: str | None) -> str:
    """The key under which an address is limited: IPv4 as it is, IPv6 by the /64 that one site owns."""
    try:
        address = ip_address((remote or "").partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return address.packed[:8].hex()
    return str(address)
