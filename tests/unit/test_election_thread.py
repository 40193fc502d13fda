"""The election beside the loop that works: renewed while that is busy, handed back after its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any, cast

import pytest
from scope_operator.kube import election_thread, lease
from scope_operator.kube.election_thread import lead_apart
from scope_operator.kube.lease import Election, LeaseLost

from scope.registry.kube.client import KubeClient
from tests.unit.test_operator_lease import ApiServer

PATIENCE = 20.0  # seconds


class CountingApiServer(ApiServer):
    """Says when its Lease was renewed five times."""

    def __init__(self) -> None:
        super().__init__()
        self.renewed = threading.Event()
        self.closed = False
        self._renewals = 0

    async def __aenter__(self) -> CountingApiServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.closed = True

    async def ask(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, **_: object
    ) -> dict[str, Any]:
        answer = await super().ask(method, path, body=body)
        self._renewals += method == "PUT"
        if self._renewals == 5:
            self.renewed.set()
        return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> CountingApiServer:
    """An API server whose Lease is renewed every hundredth of a second."""
    monkeypatch.setattr(lease, "RENEW", 0.01)
    return CountingApiServer()


def leading(
    server: CountingApiServer, work: lease.Work, looks: list[int] | None = None
) -> asyncio.Task[None]:
    ticks = iter(range(10**9))
    client = cast(KubeClient, server)
    election = Election(
        client,
        namespace="scope-system",
        name="scope-operator",
        identity="a",
        now=asyncio.get_running_loop().time,
        wall=lambda: float(next(ticks)),
    )
    seen = looks if looks is not None else []
    return asyncio.create_task(lead_apart(election, client, work, look=lambda: seen.append(1)))


def test_a_lease_is_renewed_while_the_loop_that_works_is_busy(server: CountingApiServer) -> None:
    async def body() -> None:
        async def work() -> None:
            assert server.renewed.wait(PATIENCE), "nobody renewed it"

        async with asyncio.timeout(2 * PATIENCE):
            await leading(server, work)
        assert server.holder == ""
        assert server.closed

    asyncio.run(body())


def test_a_lease_is_handed_back_only_when_the_work_has_ended(server: CountingApiServer) -> None:
    holders: list[str] = []

    async def body() -> None:
        began = asyncio.Event()

        async def work() -> None:
            began.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0.05)  # as long as five renewals take
                holders.append(server.holder)

        task = leading(server, work)
        await began.wait()
        task.cancel()
        await asyncio.wait((task,))
        assert task.cancelled()
        holders.append(server.holder)

    asyncio.run(body())
    assert holders == ["a", ""]


def test_work_ends_where_the_lease_is_lost_and_the_loss_is_told(server: CountingApiServer) -> None:
    async def body() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                assert server.stored is not None
                server.stored = None
                await asyncio.Event().wait()
            finally:
                ended.set()

        with pytest.raises(LeaseLost, match="was deleted"):
            await leading(server, work)
        assert ended.is_set()

    asyncio.run(body())


def test_what_the_work_raises_is_raised(server: CountingApiServer) -> None:
    async def body() -> None:
        async def work() -> None:
            raise LookupError("a bug")

        with pytest.raises(LookupError, match="a bug"):
            await leading(server, work)
        assert server.holder == ""

    asyncio.run(body())


def test_an_election_that_is_cancelled_at_once_leaves_no_lease(server: CountingApiServer) -> None:
    async def body() -> None:
        async def work() -> None:
            await asyncio.Event().wait()

        task = leading(server, work)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        assert server.holder == ""

    asyncio.run(body())


def test_a_process_whose_loop_is_stuck_ends(
    server: CountingApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    statuses: list[int] = []

    class Exited(BaseException):
        """In the place of the process' end."""

    def leave(status: int) -> None:
        statuses.append(status)
        ended.set()
        raise Exited

    monkeypatch.setattr(election_thread, "STUCK", 0.05)
    monkeypatch.setattr("os._exit", leave)

    async def body() -> None:
        looks: list[int] = []

        async def work() -> None:
            # A machine that lets this wait long enough makes the loop stuck before it is meant to be.
            while len(looks) < 3 and not ended.is_set():  # noqa: ASYNC110 - a list has no event
                await asyncio.sleep(0)
            assert ended.wait(PATIENCE), "nobody noticed"

        task = leading(server, work, looks)
        await asyncio.wait((task,))

    asyncio.run(body())
    assert statuses == [1]
