"""One replica writes at a time: who waits, who takes, and who must stop."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
from scope_operator.kube.lease import (
    AGAIN,
    ASK,
    GIVE_UP,
    LASTS,
    LOOK,
    RENEW,
    RENEWAL,
    Election,
    LeaseLost,
    Record,
    Seen,
    Take,
    Wait,
    decide,
    is_lost,
    see,
)

from scope.registry.kube.client import KubeClient
from scope.registry.port import AlreadyExists, Conflict, NotFound, Unavailable

HELD = Record("other", "10:00:00", LASTS, 7)


def test_a_lease_that_does_not_exist_is_created() -> None:
    assert decide(None, now=0.0) == Take(None)


def test_a_lease_that_was_handed_back_is_taken_at_once() -> None:
    free = replace(HELD, holder="")
    assert decide(Seen(free, since=0.0), now=0.0) == Take(free)


def test_a_held_lease_is_taken_when_it_stood_still_for_as_long_as_it_lasts() -> None:
    assert decide(Seen(HELD, since=5.0), now=5.0) == Wait(LOOK)
    assert decide(Seen(HELD, since=5.0), now=4.5 + LASTS) == Wait(0.5)
    assert decide(Seen(HELD, since=5.0), now=5.0 + LASTS) == Take(HELD)


def test_a_renewal_starts_the_wait_anew_and_a_mere_look_does_not() -> None:
    seen = see(HELD, None, now=1.0)
    assert see(replace(HELD, revision=8), seen, now=4.0).since == 1.0
    assert see(replace(HELD, renewed="10:00:02"), seen, now=4.0).since == 4.0
    assert see(replace(HELD, holder="third"), seen, now=4.0).since == 4.0
    assert see(replace(HELD, renewed="09:59:50", revision=3), seen, now=4.0).since == 1.0  # restored
    assert see(replace(HELD, renewed="09:59:50", revision=8), seen, now=4.0).since == 4.0  # its clock was set


def test_a_holder_stops_well_before_another_may_take_over() -> None:
    assert not is_lost(renewed_at=0.0, now=GIVE_UP - 0.1)
    assert is_lost(renewed_at=0.0, now=GIVE_UP)
    # The last request before giving up, and the drain of the writes under way, end before LASTS is over.
    assert GIVE_UP + ASK < LASTS
    assert RENEW + RENEWAL + AGAIN < GIVE_UP  # one that is never answered leaves time for another


class ApiServer:
    """One Lease, with the API server's rules; `failing` requests are not answered."""

    def __init__(self) -> None:
        self.stored: dict[str, Any] | None = None
        self.failing = False
        self._revisions = itertools.count(1)

    async def ask(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, **_: object
    ) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.failing:
            raise Unavailable("no answer")
        if method == "GET":
            if self.stored is None:
                raise NotFound("no Lease")
            return self.stored
        assert body is not None
        if method == "POST" and self.stored is not None:
            raise AlreadyExists("a Lease is there")
        if method == "PUT":
            if self.stored is None:
                raise NotFound("no Lease")
            if body["metadata"]["resourceVersion"] != self.stored["metadata"]["resourceVersion"]:
                raise Conflict("changed")
        metadata = {**body["metadata"], "resourceVersion": str(next(self._revisions))}
        self.stored = {**body, "metadata": metadata}
        return self.stored

    @property
    def holder(self) -> str:
        return str(self.stored["spec"]["holderIdentity"]) if self.stored else ""


class Hurried(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        self._ahead = 0.0
        super().__init__(_Impatient(self))

    def time(self) -> float:
        return self._ahead

    def pass_by(self, seconds: float) -> None:
        self._ahead += seconds


class _Impatient(selectors.DefaultSelector):
    def __init__(self, loop: Hurried) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is not None and timeout > 0:
            self._loop.pass_by(timeout)
        return ready


def hurried(body: Coroutine[Any, Any, None]) -> None:
    """Run it in virtual time."""
    with asyncio.Runner(loop_factory=Hurried) as runner:
        runner.run(body)


def replica(
    server: ApiServer,
    identity: str,
    *,
    newest: Callable[[], int] = lambda: 0,
    restored: Callable[[int, int], None] = lambda _revision, _newest: None,
) -> Election:
    ticks = itertools.count(1)
    loop = asyncio.get_running_loop()
    client = cast(KubeClient, server)
    return Election(
        client,
        namespace="scope-system",
        name="scope-operator",
        identity=identity,
        now=loop.time,
        wall=lambda: float(next(ticks)),
        newest=newest,
        restored=restored,
    )


def forever(began: list[str], identity: str) -> Callable[[], Any]:
    async def work() -> None:
        began.append(identity)
        try:
            await asyncio.Event().wait()
        finally:
            began.append(f"{identity} ended")

    return work


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if holds():
                return
            await asyncio.sleep(0.1)


def test_of_two_replicas_one_works_and_the_other_follows_when_it_stops() -> None:
    async def body() -> None:
        server, began = ApiServer(), list[str]()
        tasks = [asyncio.create_task(replica(server, name).lead(forever(began, name))) for name in ("a", "b")]
        await until(lambda: bool(began))
        await asyncio.sleep(LASTS * 2)
        (first,) = began
        tasks["ab".index(first)].cancel()
        await until(lambda: len(began) == 3)
        second = "b" if first == "a" else "a"
        assert began == [first, f"{first} ended", second]
        assert server.holder == second
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert server.holder == ""

    hurried(body())


def test_a_holder_that_cannot_renew_stops_its_work_and_says_so() -> None:
    async def body() -> None:
        server, began = ApiServer(), list[str]()
        task = asyncio.create_task(replica(server, "a").lead(forever(began, "a")))
        await until(lambda: bool(began))
        server.failing = True
        with pytest.raises(LeaseLost, match="could not be renewed"):
            await asyncio.wait_for(task, 60)
        assert began == ["a", "a ended"]

    hurried(body())


class LateApiServer(ApiServer):
    """Answers one renewal after so many seconds, and the next at once."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._late = itertools.cycle((seconds, 0.0))

    async def ask(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, **_: object
    ) -> dict[str, Any]:
        if method == "PUT":
            await asyncio.sleep(next(self._late))
        return await super().ask(method, path, body=body)


@pytest.mark.parametrize("seconds", [RENEWAL - 0.1, 60.0], ids=["late", "never"])
def test_a_holder_stays_one_where_every_other_renewal_is_answered_late_or_never(seconds: float) -> None:
    async def body() -> None:
        server, began = LateApiServer(seconds), list[str]()
        task = asyncio.create_task(replica(server, "a").lead(forever(began, "a")))
        await until(lambda: bool(began))
        await asyncio.sleep(GIVE_UP * 10)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    hurried(body())


def test_a_holder_whose_lease_was_taken_stops() -> None:
    async def body() -> None:
        server, began = ApiServer(), list[str]()
        task = asyncio.create_task(replica(server, "a").lead(forever(began, "a")))
        await until(lambda: bool(began))
        assert server.stored is not None
        spec = {**server.stored["spec"], "holderIdentity": "b"}
        await server.ask("PUT", "", body={**server.stored, "spec": spec})
        with pytest.raises(LeaseLost, match="another replica holds"):
            await asyncio.wait_for(task, 60)
        assert server.holder == "b"  # what is another's is not handed back

    hurried(body())


def test_a_lease_written_by_us_whose_answer_was_lost_is_still_ours() -> None:
    async def body() -> None:
        server, began = ApiServer(), list[str]()
        task = asyncio.create_task(replica(server, "a").lead(forever(began, "a")))
        await until(lambda: bool(began))
        assert server.stored is not None
        await server.ask("PUT", "", body=server.stored)
        await asyncio.sleep(GIVE_UP * 2)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    hurried(body())


class Overtaking(ApiServer):
    """While it answers one write, it is seen to answer many others."""

    newest = 0

    async def ask(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, **_: object
    ) -> dict[str, Any]:
        answer = await super().ask(method, path, body=body)
        self.newest = int(answer["metadata"]["resourceVersion"])
        await asyncio.sleep(0)
        if method != "GET":
            for _number in range(5):
                self.newest = next(self._revisions)
        return answer


def test_an_answer_that_later_writes_overtook_is_no_sign_of_a_restored_cluster() -> None:
    async def body() -> None:
        server, began, signs = Overtaking(), list[str](), list[tuple[int, int]]()
        election = replica(
            server, "a", newest=lambda: server.newest, restored=lambda *sign: signs.append(sign)
        )
        task = asyncio.create_task(election.lead(forever(began, "a")))
        await until(lambda: bool(began))
        await asyncio.sleep(LASTS)
        assert signs == []
        task.cancel()
        await asyncio.wait((task,))

    hurried(body())


def test_a_revision_older_than_one_that_was_known_before_is_a_sign_of_a_restored_cluster() -> None:
    async def body() -> None:
        server, began, signs = ApiServer(), list[str](), list[tuple[int, int]]()
        election = replica(server, "a", newest=lambda: 1_000, restored=lambda *sign: signs.append(sign))
        task = asyncio.create_task(election.lead(forever(began, "a")))
        await until(lambda: bool(signs))
        revision, newest = signs[0]
        assert revision < newest == 1_000
        task.cancel()
        await asyncio.wait((task,))

    hurried(body())
