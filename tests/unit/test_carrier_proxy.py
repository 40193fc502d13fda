"""What a hub leads to the registry, and what it does not."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.client import _RequestContextManager
from scope_dataplane import carrier_proxy
from yarl import URL

from scope.model import GatewayOrigin
from scope.registry.http import PinnedKey
from tests.unit.carrier_fixture import Machine, certificate, machine, serving, until

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Ask = Callable[..., _RequestContextManager]


@pytest.fixture
def one() -> Iterator[Machine]:
    with machine() as made:
        yield made


@contextlib.asynccontextmanager
async def gateway(handler: Handler, *, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A registry's gateway that answers everything with `handler`; its origin."""
    runner = web.ServerRunner(web.Server(handler, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    host, port = runner.addresses[0]
    try:
        yield f"{'http' if context is None else 'https'}://{host}:{port}"
    finally:
        await runner.cleanup()


async def echo(request: web.BaseRequest) -> web.Response:
    """What came, as JSON."""
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "target": request.raw_path,
            "headers": dict(request.headers),
            "body": body.decode(),
        },
        status=209,
        headers={"Scope-Registry": "r-1"},
    )


@contextlib.asynccontextmanager
async def asking(one: Machine, url: str | None, *, pin: bytes | None = None) -> AsyncIterator[Ask]:
    """A hub that leads to `url`; what is given asks it."""
    upstream = None if url is None else GatewayOrigin(url, pin)
    pinned = PinnedKey(certificate()[2])
    async with serving(one.hub(upstream=upstream)), aiohttp.ClientSession() as session:

        def ask(method: str = "GET", target: str = "/", **more: Any) -> _RequestContextManager:
            at = URL(f"https://127.0.0.1:{one.port}{target}", encoded=True)
            return session.request(method, at, ssl=pinned, **more)

        yield ask


def test_a_request_arrives_as_it_was_sent_and_its_answer_too(one: Machine) -> None:
    target = "/apis/scope.ltgc.cc/v1alpha1/scopepeers/a%2Fb?view=agent&x=%20+"

    async def body() -> None:
        async with gateway(echo) as url, asking(one, url) as ask:
            headers = {"Authorization": "Bearer signed", "Connection": "keep-alive, X-Mine", "X-Mine": "1"}
            async with ask("PUT", target, data=b"{}", headers=headers) as answer:
                assert answer.status == 209
                assert answer.headers["Scope-Registry"] == "r-1"
                came = await answer.json()
            assert (came["method"], came["target"], came["body"]) == ("PUT", target, "{}")
            assert came["headers"]["Authorization"] == "Bearer signed"
            assert came["headers"]["Host"] == url.removeprefix("http://")
            assert "X-Mine" not in came["headers"]

    asyncio.run(body())


def test_an_event_stream_flows_while_it_lasts(one: Machine) -> None:
    told = asyncio.Event()

    async def events(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one\n")
        await told.wait()
        await response.write(b"two\n")
        return response

    async def body() -> None:
        async with gateway(events) as url, asking(one, url) as ask, ask("GET", "/v1/events") as answer:
            assert await answer.content.readline() == b"one\n"
            told.set()
            assert await answer.content.readline() == b"two\n"
            assert await answer.content.read() == b""

    asyncio.run(body())


def test_an_answer_that_breaks_off_does_not_look_whole(one: Machine) -> None:
    async def breaks(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def body() -> None:
        async with gateway(breaks) as url, asking(one, url) as ask:
            with pytest.raises(aiohttp.ClientError):
                async with ask("GET", "/") as answer:
                    await answer.read()

    asyncio.run(body())


def test_the_registry_is_known_by_its_pin(one: Machine, tmp_path: Path) -> None:
    text, key, pin = certificate(2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    async def body(expected: bytes) -> int:
        async with (
            gateway(echo, context=context) as url,
            asking(one, url, pin=expected) as ask,
            ask("GET", "/") as answer,
        ):
            return answer.status

    both = tmp_path / "both.pem"
    both.write_bytes(text.encode() + key.raw)
    context.load_cert_chain(both)
    assert asyncio.run(body(pin)) == 209
    assert asyncio.run(body(bytes(32))) == 503


@pytest.mark.parametrize(
    "request_line",
    ["GET http://192.0.2.1/ HTTP/1.1", "CONNECT 192.0.2.1:443 HTTP/1.1", "OPTIONS * HTTP/1.1"],
)
def test_nobody_is_led_elsewhere(one: Machine, request_line: str) -> None:
    asked = []

    async def note(request: web.BaseRequest) -> web.Response:
        asked.append(request.raw_path)
        return web.Response()

    async def body() -> bytes:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        async with gateway(note) as url, asking(one, url):
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port, ssl=context)
            writer.write(f"{request_line}\r\nHost: 192.0.2.1\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
            return answer

    answer = asyncio.run(body())
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")) and asked == []


@pytest.mark.parametrize("target", ["//192.0.2.1/x", "/@192.0.2.1"])
def test_a_path_that_looks_like_a_host_is_a_path(one: Machine, target: str) -> None:
    async def body() -> None:
        async with gateway(echo) as url, asking(one, url) as ask, ask("GET", target) as answer:
            assert (await answer.json())["target"] == target

    asyncio.run(body())


def test_a_hub_that_leads_nowhere_says_so(one: Machine) -> None:
    async def body() -> None:
        async with asking(one, None) as ask, ask("GET", "/") as answer:
            assert answer.status == 503
            assert "leads to no registry" in (await answer.json())["message"]

    asyncio.run(body())


def test_a_registry_that_is_away_is_told_as_such(one: Machine) -> None:
    async def body() -> None:
        async with asking(one, "http://127.0.0.1:9") as ask, ask("GET", "/") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
            assert "does not reach its registry" in (await answer.json())["message"]

    asyncio.run(body())


def test_a_long_request_is_refused(one: Machine) -> None:
    async def body() -> None:
        async with (
            gateway(echo) as url,
            asking(one, url) as ask,
            ask("POST", "/", data=bytes(carrier_proxy.MAX_BODY + 1)) as answer,
        ):
            assert answer.status == 413

    asyncio.run(body())


def test_too_many_requests_at_once_are_put_off(one: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_proxy, "MAX_REQUESTS", 1)
    told, waiting = asyncio.Event(), []

    async def slow(request: web.BaseRequest) -> web.Response:
        waiting.append(request)
        await told.wait()
        return web.Response(text="done")

    async def body() -> None:
        async with gateway(slow) as url, asking(one, url) as ask:
            first = asyncio.ensure_future(ask("GET", "/"))
            await until(lambda: bool(waiting), "the first is under way")
            async with ask("GET", "/") as second:
                assert second.status == 503
            told.set()
            async with await first as answer:
                assert await answer.text() == "done"

    asyncio.run(body())


def test_hubs_that_lead_to_each_other_end_it(one: Machine) -> None:
    async def body() -> None:
        itself = f"https://127.0.0.1:{one.port}"
        async with asking(one, itself, pin=certificate()[2]) as ask, ask("GET", "/") as answer:
            assert answer.status == 508

    asyncio.run(body())
