"""Following a registry: lists, watches, lists again, and waits as long as it should between attempts."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

from scope.model import Kind, Revision
from scope.registry.follow import FIRST_BACKOFF, MAX_BACKOFF, backoff, delay_after, follow
from scope.registry.memory import Change, MemoryRegistry
from scope.registry.port import (
    Disconnected,
    Fact,
    Gone,
    Listed,
    Put,
    RegistryError,
    Unavailable,
)
from tests.unit.registry_conformance import bare


class Faulty(MemoryRegistry):
    """A memory registry whose next lists and watches fail as they are told."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        super().__init__(
            "memory",
            wall=lambda: 0.0,
            now=lambda: 0.0,
            new_uid=lambda: f"uid-{next(numbers)}",
            new_signal=asyncio.Event,
        )
        self.lists: list[RegistryError] = []
        self.watches: list[RegistryError] = []
        self.is_cut = False

    async def list(self, kind: Kind) -> Listed:
        if self.lists:
            raise self.lists.pop(0)
        return await super().list(kind)

    async def watch(self, kind: Kind, since: Revision) -> AsyncIterator[Change]:
        if self.watches:
            raise self.watches.pop(0)
        async for change in super().watch(kind, since):
            yield change
            if self.is_cut:
                self.is_cut = False
                raise Unavailable("cut")

    def cut(self) -> None:
        """Lose the watch that is open."""
        self.is_cut = True


def followed(registry: Faulty, *, count: int) -> tuple[list[Fact], list[float]]:
    """The first facts, and the waits between."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> list[Fact]:
        facts: list[Fact] = []
        following = follow(registry, Kind.PEER, sleep=sleep, uniform=lambda _, high: high)
        async with asyncio.timeout(60):
            async for fact in following:
                facts.append(fact)
                if len(facts) == count:
                    break
        await following.aclose()
        return facts

    return asyncio.run(run()), waits


def test_a_broken_watch_is_followed_by_a_list_that_has_what_was_missed() -> None:
    registry = Faulty()
    registry.watches = [Gone("too old"), Unavailable("cut")]
    asyncio.run(registry.create(bare(1)))
    facts, waits = followed(registry, count=5)
    kinds = [type(fact) for fact in facts]
    assert kinds == [Listed, Disconnected, Listed, Disconnected, Listed]
    assert waits == [FIRST_BACKOFF, 2 * FIRST_BACKOFF]


def test_a_change_makes_the_next_failure_the_first() -> None:
    registry = Faulty()
    registry.lists = [Unavailable("down"), Unavailable("down")]
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> list[type[Fact]]:
        kinds: list[type[Fact]] = []
        following = follow(registry, Kind.PEER, sleep=sleep, uniform=lambda _, high: high)
        async with asyncio.timeout(60):
            async for fact in following:
                kinds.append(type(fact))
                if isinstance(fact, Listed) and len(kinds) == 3:
                    await registry.create(bare(1))
                elif isinstance(fact, Put):
                    registry.cut()
                elif isinstance(fact, Listed):
                    break
        await following.aclose()
        return kinds

    assert asyncio.run(run()) == [Disconnected, Disconnected, Listed, Put, Disconnected, Listed]
    assert waits == [FIRST_BACKOFF, 2 * FIRST_BACKOFF, FIRST_BACKOFF]


def test_a_registry_that_closes_is_followed_no_longer() -> None:
    registry = Faulty()
    registry.close_watches()
    facts, waits = followed(registry, count=9)
    assert [type(fact) for fact in facts] == [Listed]
    assert waits == []


def test_a_registry_is_left_alone_for_as_long_as_it_asks() -> None:
    def high(_: float, longest: float) -> float:
        return longest

    assert delay_after(Unavailable("busy", retry_after=20.0), 1, uniform=high) == 20.0
    assert delay_after(Unavailable("busy", retry_after=0.1), 1, uniform=high) == FIRST_BACKOFF
    assert delay_after(Gone("too old"), 1, uniform=high) == FIRST_BACKOFF


def test_backoff_doubles_to_a_bound_and_is_jittered() -> None:
    longest = [backoff(failures, uniform=lambda low, high: high) for failures in range(1, 30)]
    assert longest[:3] == [FIRST_BACKOFF, 2 * FIRST_BACKOFF, 4 * FIRST_BACKOFF]
    assert longest[-1] == MAX_BACKOFF
    assert backoff(1, uniform=lambda low, high: low) == FIRST_BACKOFF / 2
