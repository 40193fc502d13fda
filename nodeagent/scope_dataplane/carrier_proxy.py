"""Leads requests to the registry's gateway, unread: a peer with one TCP port open to a hub can join by it.

One upstream, named by the hub's file; nobody who asks has a say in where a request goes. What it says goes
on as it is, credentials included, since requests are signed over what was sent; answers flow as they come, so
the event stream does too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from scope.admission import Refusal
from scope.model import GatewayOrigin
from scope.registry.http import CONNECT_SECONDS, STREAM_IDLE_SECONDS, PinnedKey
from scope_dataplane.carrier_link import marked_socket

MAX_BODY = 64 * 1024  # what the gateway takes
BODY_SECONDS = 10.0  # 64 KiB over a 64 kbit/s uplink
STALL_SECONDS = 30.0  # whoever takes nothing of an answer for so long is cut
MAX_REQUESTS = 2048  # at once, event streams included: two of each carried peer's, and those who join
CLOSING_SECONDS = 2.0
RETRY_SECONDS = 2.0
# A hub whose own registry is another hub's carrier leads on; hubs that lead in a circle stop here.
MAX_HUBS = 3

_VIA = "scope-carrier"
# RFC 9110, section 7.6.1, and what is said of the connection in other ways; the length is set anew.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})


class Proxy:
    """The way to one gateway, or to none. `mark`: of the packets to it, 0 for none."""

    def __init__(self, *, mark: int) -> None:
        self._mark = mark
        self._upstream: GatewayOrigin | None = None
        self._session: aiohttp.ClientSession | None = None
        self._old: set[asyncio.Task[None]] = set()  # sessions that end
        self._requests = 0

    def follow(self, upstream: GatewayOrigin | None) -> None:
        """Lead there from now on; what is under way to another one ends."""
        if upstream == self._upstream:
            return
        self._upstream = upstream
        session, self._session = self._session, None
        if session is not None:
            task = asyncio.ensure_future(session.close())
            self._old.add(task)
            task.add_done_callback(self._old.discard)

    async def close(self) -> None:
        """End what is under way."""
        self.follow(None)
        if self._old:
            await asyncio.wait(self._old, timeout=CLOSING_SECONDS)

    async def lead(self, request: web.Request) -> web.StreamResponse:
        """Ask the gateway the same, and answer what it answers."""
        if self._requests >= MAX_REQUESTS:
            return _refused(_busy("this hub leads too many to the registry: try again"))
        self._requests += 1
        try:
            return await self._lead(request)
        except Refusal as refusal:
            return _refused(refusal)
        finally:
            self._requests -= 1

    async def _lead(self, request: web.Request) -> web.StreamResponse:
        upstream = self._upstream
        if upstream is None:
            raise _busy("this hub leads to no registry")
        target = request.raw_path
        if not target.startswith("/") or request.method not in _METHODS:
            raise Refusal(405, "MethodNotAllowed", "a hub leads to its registry, and nowhere else")
        via = request.headers.get("Via", "")
        if via.count(_VIA) >= MAX_HUBS:
            raise Refusal(508, "LoopDetected", "hubs lead to each other: give one of them the registry's URL")
        body = await _body(request)
        headers = _end_to_end(request.headers)
        headers["Via"] = ", ".join(filter(None, (via, f"1.1 {_VIA}")))
        try:
            answer = await self._opened(upstream).request(
                request.method,
                URL(upstream.url.rstrip("/") + target, encoded=True),
                headers=headers,
                data=body or None,
                allow_redirects=False,
            )
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            raise _busy(f"this hub does not reach its registry: {error or type(error).__name__}") from None
        async with answer:
            return await _pass_on(request, answer)

    def _opened(self, upstream: GatewayOrigin) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=True if upstream.pin is None else PinnedKey(upstream.pin),
                    limit=0,
                    socket_factory=lambda address: marked_socket(address, mark=self._mark),
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_SECONDS, sock_read=STREAM_IDLE_SECONDS
                ),
                trust_env=False,
            )
        return self._session


async def _body(request: web.Request) -> bytes:
    """All of it. Raises Refusal."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_any():
                read += chunk
                if len(read) > MAX_BODY:
                    raise Refusal(413, "RequestEntityTooLarge", f"a request has {MAX_BODY >> 10} KiB at most")
    except TimeoutError:
        raise Refusal(408, "Timeout", "the request did not arrive in time: try again") from None
    return bytes(read)


async def _pass_on(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, reason=answer.reason, headers=_end_to_end(answer.headers)
    )
    if answer.content_length is not None:
        response.content_length = answer.content_length
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            async with asyncio.timeout(STALL_SECONDS):
                await response.write(chunk)
        async with asyncio.timeout(STALL_SECONDS):
            await response.write_eof()
    except (OSError, aiohttp.ClientError, TimeoutError):
        # Half an answer must not look like a whole one.
        if request.transport is not None:
            request.transport.abort()
    return response


def _end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """All but what is said of one connection alone."""
    named = {name.strip().lower() for name in ",".join(headers.getall("Connection", [])).split(",")}
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if name.lower() not in _HOP_BY_HOP and name.lower() not in named
    )


def _busy(message: str) -> Refusal:
    return Refusal(503, "ServiceUnavailable", message, retry_after=RETRY_SECONDS)


def _refused(refusal: Refusal) -> web.Response:
    document: Mapping[str, object] = refusal.status()
    return web.Response(
        status=refusal.code,
        headers=refusal.headers(),
        body=json.dumps(document).encode(),
        content_type="application/json",
    )
