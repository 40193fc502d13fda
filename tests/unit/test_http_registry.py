"""The HTTP adapter passes the conformance suite through a gateway, and raises what the port says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from scope_operator.gateway.limits import Limits

from scope.model import ConfigError, Kind, Mesh, Revision
from scope.registry.http import HttpRegistry
from scope.registry.port import Gone, Put, Registry, Unavailable
from tests.unit.gateway_fixture import ADMIN, credential_of, enrolled, gateway
from tests.unit.registry_conformance import RegistryConformance


class TestHttpRegistry(RegistryConformance):
    kinds = (Kind.MESH, Kind.PEER)

    @asynccontextmanager
    async def opened(self, *, backlog: int) -> AsyncIterator[Registry]:
        async with gateway(backlog=backlog) as running, running.admin as registry:
            yield registry


def test_a_silent_stream_is_lost() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), gateway(limits=Limits(heartbeat=1000.0)) as running:
            peer = await enrolled(running.registry, 1)
            async with HttpRegistry(
                running.url, pin=None, credential=credential_of(peer), stream_idle=0.1
            ) as client:
                since = (await client.list(Kind.PEER)).revision
                with pytest.raises(Unavailable, match="in time"):
                    await anext(client.watch(Kind.PEER, since))

    asyncio.run(run())


def test_two_kinds_share_one_stream() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), gateway() as running:
            peer = await enrolled(running.registry, 1)
            async with running.as_peer(peer) as client:
                meshes, peers = await client.list(Kind.MESH), await client.list(Kind.PEER)
                of_mesh = asyncio.ensure_future(anext(client.watch(Kind.MESH, meshes.revision)))
                of_peer = asyncio.ensure_future(anext(client.watch(Kind.PEER, peers.revision)))
                while running.feed.counts() != (1, 0):  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.001)
                (mesh,) = meshes.resources
                assert isinstance(mesh, Mesh)
                status = replace(mesh.status, observed_generation=1)
                changed = await running.registry.update_status(Kind.MESH, "home", status, uid=mesh.meta.uid)
                other = await enrolled(running.registry, 2)
                facts = await asyncio.gather(of_mesh, of_peer)
                assert [fact.resource for fact in facts if isinstance(fact, Put)] == [changed, other]

    asyncio.run(run())


def test_a_later_watch_from_an_earlier_revision_misses_nothing() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), gateway() as running, running.admin as client:
            start = (await client.list(Kind.MESH)).revision
            peer = await enrolled(running.registry, 1)
            first = client.watch(Kind.PEER, start)
            assert (await anext(first)).revision.number == peer.meta.revision
            fact = await anext(client.watch(Kind.MESH, start))
            assert fact.revision.number < peer.meta.revision
            other = await enrolled(running.registry, 2)
            fact = await anext(first)
            assert isinstance(fact, Put)
            assert fact.resource == other

    asyncio.run(run())


def test_a_watch_of_another_registry_beside_an_open_one_is_told_to_list_again() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), gateway() as running, running.admin as client:
            here = (await client.list(Kind.MESH)).revision
            await enrolled(running.registry, 1)
            facts = client.watch(Kind.PEER, here)
            await anext(facts)
            with pytest.raises(Gone):
                await anext(client.watch(Kind.MESH, Revision("another", here.number)))
            other = await enrolled(running.registry, 2)
            fact = await anext(facts)
            assert isinstance(fact, Put)
            assert fact.resource == other

    asyncio.run(run())


def test_an_answer_that_cannot_be_read_is_unavailable() -> None:
    async def run() -> None:
        async def strange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n[1]\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(strange, "127.0.0.1", 0)
        async with asyncio.timeout(60), server:
            host, port = server.sockets[0].getsockname()
            async with HttpRegistry(f"http://{host}:{port}", pin=None, credential=ADMIN) as client:
                with pytest.raises(Unavailable, match="cannot read"):
                    await client.list(Kind.PEER)
                with pytest.raises(Unavailable, match="cannot read"):
                    await anext(client.watch(Kind.PEER, Revision("x", 0)))

    asyncio.run(run())


@pytest.mark.parametrize("url", ["ftp://registry.example", "registry.example:7443", ""])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="https://"):
        HttpRegistry(url, pin=None, credential=None)


def test_a_pin_is_not_given_up_for_plain_http() -> None:
    with pytest.raises(ConfigError, match="only https"):
        HttpRegistry("http://127.0.0.1:1", pin=bytes(32), credential=None)
