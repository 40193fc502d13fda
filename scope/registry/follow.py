"""Following a kind of any registry: list, watch, and list again whenever the watch breaks.

The one loop for whoever keeps a view: each list is complete or says that it is not, so the reader compares it
with what it has and finds what was missed. Between attempts it waits longer each time, jittered, and never
less than the registry asked for. Sleeping and randomness are arguments.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

from scope.model import Kind
from scope.registry.port import Disconnected, Fact, Registry, RegistryError, Unavailable

FIRST_BACKOFF = 0.5  # seconds
MAX_BACKOFF = 8.0  # seconds: whoever waits is in step again within ten seconds of an outage's end


def backoff(failures: int, *, uniform: Callable[[float, float], float]) -> float:
    """Seconds to wait after the `failures`-th failure in a row, from 1 on: doubled each time, jittered."""
    longest = min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures - 1, 16))
    return uniform(longest / 2, longest)


def delay_after(error: RegistryError, failures: int, *, uniform: Callable[[float, float], float]) -> float:
    """`backoff`, or what the registry asked for where that is longer."""
    asked = error.retry_after if isinstance(error, Unavailable) else None
    return max(backoff(failures, uniform=uniform), asked or 0.0)


async def follow(
    registry: Registry,
    kind: Kind,
    *,
    sleep: Callable[[float], Awaitable[None]],
    uniform: Callable[[float, float], float],
) -> AsyncGenerator[Fact, None]:
    """The facts of a kind; after a Disconnected comes a Listed. Ends when the registry closes."""
    failures = 0
    while True:
        try:
            listed = await registry.list(kind)
            yield listed
            changes = registry.watch(kind, listed.revision)
            async for fact in changes:
                failures = 0
                yield fact
        except RegistryError as error:
            failures += 1
            yield Disconnected(str(error))
            await sleep(delay_after(error, failures, uniform=uniform))
        else:
            return
