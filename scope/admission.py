"""Who may come in where HTTP is served, how often, and how a refusal looks. Pure.

Nothing here reads a clock: `now` is monotonic seconds.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Doors:
    """How many connections are let in, and what they may bring before anything knows who they are."""

    line: int = 4 * 1024  # a signed request's header is 500 bytes
    headers: int = 64
    first_request_seconds: float = 15.0  # a connection that says nothing is dropped
    connections: int = 8192  # half of a common descriptor limit's worth is left to the rest
    connections_per_source: int = 1024


@dataclass(frozen=True, slots=True)
class Rate:
    """A token bucket's shape: `per_second` in the long run, `burst` at once."""

    per_second: float
    burst: float


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


class Refusal(Exception):
    """An answer that is not what was asked for, as a Kubernetes Status object.

    Its sentence says what to do. `retry_after`: seconds, where waiting helps.
    """

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        retry_after: float | None = None,
        details: dict[str, str | float] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.details = details or {}

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, and the scheme that a 401 has to name (RFC 9110, 11.6.1)."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.code == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="scope"'
        return headers

    def status(self) -> dict[str, object]:
        """The body."""
        body: dict[str, object] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            body["details"] = dict(self.details)
        return body
