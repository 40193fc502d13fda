"""A proxy in front of an API server that does to its clients what networks, load and old servers do.

    async with FaultProxy(plane) as proxy:
        kubeconfig = plane.kubeconfig(token=token, url=proxy.url)
        proxy.delay_s = 2.0
        proxy.answer(429, share=0.5)
        proxy.freeze_watches()
        proxy.heal()

It ends TLS with a certificate of the control plane's own authority, so clients come with a token: no client
certificate passes. A fault concerns the requests whose path contains `affects`, everything by default. It
runs in the event loop that made it, wherever its control plane runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket as sockets
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

from kubelab.control_plane import ControlPlane

# What belongs to one connection and not to the request (RFC 9110, section 7.6.1), and what aiohttp sets anew.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "host", "content-length"}
)
# An answer is looked into, and so must not be compressed.
_DROPPED = _HOP_BY_HOP | {"accept-encoding", "content-encoding"}
_MAX_LIST = 256 * 1024 * 1024  # bytes of a list: of ten thousand objects, with room


@dataclass(slots=True, eq=False)
class _Watch:
    """One watch that passes through."""

    is_frozen: bool = False
    ending: asyncio.Future[bytes | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def end(self, last: bytes | None) -> None:
        """End it with a last line, or, with None, by cutting the connection."""
        if not self.ending.done():
            self.ending.set_result(last)


class FaultProxy:
    """Passes everything on until told otherwise. Attributes and methods act on requests from then on."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.affects = ""
        self.delay_s = 0.0  # before each request is passed on
        self.requests = 0  # that came in so far and are concerned, watches included
        self.truncated = 0  # lists that lost something so far
        self.url = ""
        self._watches: set[_Watch] = set()
        self._status: int | None = None
        self._share = 0.0
        self._due = 0.0
        self._retry_after_s: int | None = None
        self._freezes_new = False
        self._dropped_items = 0
        self._loses_pages = False
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None
        certificate, key = plane.authority.issue("fault-proxy", user="fault-proxy", names=(plane.address,))
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_MAX_LIST)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._session = self.plane.session(as_admin=False)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        listening = self.plane.socket(sockets.AF_INET, sockets.SOCK_STREAM)
        listening.bind((self.plane.address, 0))
        await web.SockSite(self._runner, listening, ssl_context=self._tls).start()
        self.url = f"https://{self.plane.address}:{listening.getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.cut_watches()
        assert self._runner is not None
        assert self._session is not None
        await self._runner.cleanup()
        await self._session.close()

    @property
    def open_watches(self) -> int:
        """How many watches pass through now, frozen ones included."""
        return len(self._watches)

    def answer(self, status: int, *, share: float = 1.0, retry_after_s: int | None = None) -> None:
        """Answer this share of requests, evenly spread, with this status instead of passing them on."""
        self._status, self._share, self._due = status, share, 0.0
        self._retry_after_s = retry_after_s

    def cut_watches(self) -> None:
        """End every open watch as a lost connection does: in the middle, with no word."""
        self._end_watches(None)

    def expire_watches(self) -> None:
        """Tell every open watch that its resourceVersion is too old (410), and end it."""
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": "too old resource version: 1 (2)",
            "reason": "Expired",
            "code": 410,
        }
        self._end_watches(json.dumps({"type": "ERROR", "object": status}).encode() + b"\n")

    def freeze_watches(self, *, new_ones: bool = True) -> None:
        """From now on nothing comes on any open watch, nor on `new_ones`; the connections stay.

        What would have come is lost: a frozen watch stays so also after `heal`, until its client gives it up.
        """
        self._freezes_new = new_ones
        for watch in self._watches:
            watch.is_frozen = True

    def truncate_lists(self, *, drop: int = 0, lose_pages: bool = False) -> None:
        """Leave the last `drop` items out of each list, or every page but the first, as if that were all."""
        self._dropped_items, self._loses_pages = drop, lose_pages

    def heal(self) -> None:
        """Pass everything on again, but what was frozen stays frozen."""
        self.delay_s = 0.0
        self._status, self._freezes_new = None, False
        self._dropped_items, self._loses_pages = 0, False

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        concerned = self.affects in request.path
        self.requests += concerned
        if concerned and self.delay_s:
            await asyncio.sleep(self.delay_s)
        if concerned and (status := self._error_due()) is not None:
            return self._error(status)
        is_watch = request.query.get("watch", "") in ("1", "true")
        try:
            async with self._passed_on(request) as response:
                if is_watch and response.ok:
                    return await self._pass_watch(request, response, is_concerned=concerned)
                body = await response.read()
                if concerned and request.method == "GET":
                    body = self._truncated(body)
                return web.Response(status=response.status, headers=_kept(response.headers), body=body)
        except aiohttp.ClientError:
            # The API server is away: so is whoever stands in front of it.
            _abort(request)
            return web.Response(status=502)

    @contextlib.asynccontextmanager
    async def _passed_on(self, request: web.Request) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _DROPPED}
        async with self._session.request(
            request.method,
            self.plane.url + request.raw_path,
            data=await request.read() or None,
            # Compressed answers would have to be compressed again once they are changed.
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
            allow_redirects=False,
        ) as response:
            yield response

    async def _pass_watch(
        self, request: web.Request, response: aiohttp.ClientResponse, *, is_concerned: bool
    ) -> web.StreamResponse:
        watch = _Watch(is_frozen=is_concerned and self._freezes_new)
        answer = web.StreamResponse(status=response.status, headers=_kept(response.headers))
        await answer.prepare(request)
        if is_concerned:
            self._watches.add(watch)
        try:
            await self._pump(watch, response, answer)
        finally:
            self._watches.discard(watch)
        if not watch.ending.done():
            await answer.write_eof()
        elif (last := watch.ending.result()) is not None:
            await answer.write(last)
            await answer.write_eof()
        else:
            _abort(request)
        return answer

    async def _pump(
        self, watch: _Watch, response: aiohttp.ClientResponse, answer: web.StreamResponse
    ) -> None:
        """Pass lines on until the watch ends, here or at the API server; a frozen one only ends here."""
        held = b""
        while True:
            reading = asyncio.ensure_future(response.content.readany())
            waited: set[asyncio.Future[Any]] = {reading, watch.ending}
            try:
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if watch.ending.done() or not reading.done():
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
            if watch.ending.done():
                return
            try:
                chunk = reading.result()
            except aiohttp.ClientError:
                chunk = b""
                if not watch.is_frozen:
                    watch.end(None)
            if not chunk:
                if watch.is_frozen:
                    await watch.ending
                return
            # Whole lines, so that a last one of ours never lands in the middle of another.
            lines, newline, held = (held + chunk).rpartition(b"\n")
            if newline and not watch.is_frozen:
                await answer.write(lines + newline)

    def _end_watches(self, last: bytes | None) -> None:
        for watch in self._watches:
            watch.end(last)

    def _error_due(self) -> int | None:
        if self._status is None:
            return None
        self._due += self._share
        if self._due < 1.0:
            return None
        self._due -= 1.0
        return self._status

    def _error(self, status: int) -> web.Response:
        reasons = {429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
        document = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": f"the fault proxy answers {status}",
            "reason": reasons.get(status, "Unknown"),
            "code": status,
        }
        headers = {} if self._retry_after_s is None else {"Retry-After": str(self._retry_after_s)}
        return web.json_response(document, status=status, headers=headers)

    def _truncated(self, body: bytes) -> bytes:
        if not self._dropped_items and not self._loses_pages:
            return body
        document: Any = json.loads(body)
        if not isinstance(document, dict) or not isinstance(document.get("items"), list):
            return body
        items, metadata = document["items"], document.setdefault("metadata", {})
        if self._loses_pages and metadata.pop("continue", ""):
            metadata.pop("remainingItemCount", None)
            self.truncated += 1
        if self._dropped_items and items and not metadata.get("continue"):
            del items[-self._dropped_items :]
            self.truncated += 1
        return json.dumps(document).encode()


def _kept(headers: Any) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() not in _DROPPED}


def _abort(request: web.Request) -> None:
    """Cut the client's connection in the middle of whatever it is waiting for."""
    if request.transport is not None:
        request.transport.abort()
