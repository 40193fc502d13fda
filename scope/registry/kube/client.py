"""Requests to an API server as plain JSON, watches as lines, and its refusals as errors of the port.

What is lost is raised; to ask again, and when, is the caller's move. `Unavailable` says how long the server
asked to be left alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from scope.registry.kube.access import Access
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    Gone,
    NotFound,
    Refused,
    RegistryError,
    Unavailable,
)

CONNECT_SECONDS = 5.0  # three SYN retransmissions
REQUEST_SECONDS = 30.0  # an API server that takes longer than its own 34 s for writes does not answer at all
# The server ends a watch after so many seconds, jittered, so that the watches of a thousand agents do not end
# at once; where one ends a new one resumes, and finds a server that was added meanwhile.
WATCH_SECONDS = 270, 330
# Bookmarks come every minute or so, on a watch of a kind that ever changed. A watch that is silent for longer
# is opened anew: silently frozen ones are indistinguishable from quiet ones.
SILENCE_SECONDS = 90.0
# A machine that roamed, or a NAT that restarted, hears nothing more: the kernel asks after so many silent
# seconds, at this interval, and so often before it gives the connection up.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 4, 2, 3  # as on the gateway's streams
MAX_ANSWER = 64 * 1024 * 1024  # a page of 500 objects is 1.5 MB
MAX_LINE = 8 * 1024 * 1024  # one watch event: etcd takes objects of 1.5 MB, and JSON may escape every byte
DENIED = "denied request: "  # what stands before an admission policy's own sentence

JSON = "application/json"
APPLY = "application/apply-patch+yaml"  # server-side apply; JSON is YAML
MERGE = "application/merge-patch+json"  # what is named is replaced, all else stays

Object = dict[str, Any]


class Silent(Exception):
    """A watch brought nothing, not even a bookmark, for SILENCE_SECONDS."""


class KubeClient:
    """One API server. Use it from one event loop; `close` it, or use `async with`."""

    def __init__(self, access: Access, *, silence: float = SILENCE_SECONDS) -> None:
        self._access = access
        self._silence = silence
        self._session: aiohttp.ClientSession | None = None
        self._answers: set[aiohttp.ClientResponse] = set()  # that are being read
        self._closed = False

    async def __aenter__(self) -> KubeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def url(self) -> str:
        """Of the API server."""
        return self._access.url

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be asked any more."""
        return self._closed

    async def close(self) -> None:
        """End every connection; a watch that is open is lost."""
        self._closed = True
        await self.reconnect()

    async def reconnect(self) -> None:
        """End every connection and make new ones from now on: our network, or an authority, has changed."""
        session, self._session = self._session, None
        for answer in self._answers:  # aiohttp forgets who reads what it aborts: he would wait for ever
            answer.content.set_exception(aiohttp.ClientConnectionError("it is connected to anew"))
        if session is not None:
            await session.close()
            await asyncio.sleep(0)  # what was aborted is closed in the loop's next round

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, object] | None = None,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> Object:
        """One request and the object of its answer. Raises RegistryError."""
        data = json.dumps(body, separators=(",", ":")).encode() if body is not None else None
        headers = {"Accept": accept, **({"Content-Type": content_type} if data is not None else {})}
        limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS)
        async with self._request(method, path, query, data=data, headers=headers, limits=limits) as response:
            return await self._document(response)

    async def watch(self, path: str, *, query: Mapping[str, str], since: int) -> AsyncGenerator[Object, None]:
        """Watch events after revision `since`, bookmarks included, until the server ends the watch in time.

        Raises Gone, Unavailable (the connection was cut), Silent.
        """
        seconds = random.randint(*WATCH_SECONDS)  # noqa: S311 - jitter
        asked = {
            **query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": str(since),
            "timeoutSeconds": str(seconds),
        }
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=self._silence)
        async with self._request("GET", path, asked, limits=limits, is_watch=True) as response:
            if response.status >= 400:
                raise self._error(response, await self._read(response))
            _keep_alive(response)
            try:
                async for line in _lines(response):
                    event = _parsed(line)
                    if event.get("type") == "ERROR":
                        status = event.get("object")
                        raise error_of(status if isinstance(status, dict) else {}, url=self.url)
                    yield event
            finally:
                if (transport := _transport(response)) is not None:
                    transport.abort()  # a farewell by TLS would wait for whoever froze

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        *,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        limits: aiohttp.ClientTimeout,
        is_watch: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A request; what the connection raises, also while it is read, becomes the port's error."""
        authorization = await self._access.authorization()
        shown = {"Accept": JSON, **(headers or {})}
        if authorization is not None:
            shown["Authorization"] = authorization
        url = URL(self.url + path + (f"?{urlencode(query)}" if query else ""), encoded=True)
        try:
            async with self._opened().request(
                method,
                url,
                data=data,
                headers=shown,
                timeout=limits,
                allow_redirects=False,
                server_hostname=self._access.server_name,
            ) as response:
                self._answers.add(response)
                try:
                    yield response
                finally:
                    self._answers.discard(response)
        except aiohttp.SocketTimeoutError as error:
            if is_watch and not isinstance(error, aiohttp.ConnectionTimeoutError):
                raise Silent from None
            raise Unavailable(f"{self.url} did not answer in time") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._lost(error) from error

    def _opened(self) -> aiohttp.ClientSession:
        if self._closed:
            raise Unavailable("this connection to the API server was closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._access.tls() or True, limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _document(self, response: aiohttp.ClientResponse) -> Object:
        raw = await self._read(response)
        if response.status >= 400:
            raise self._error(response, raw)
        return _parsed(raw)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        raw = bytearray()
        async for chunk in response.content.iter_any():
            raw += chunk
            if len(raw) > MAX_ANSWER:
                raise Unavailable(f"{self.url} answered more than {MAX_ANSWER} bytes")
        return bytes(raw)

    def _error(self, response: aiohttp.ClientResponse, raw: bytes) -> RegistryError:
        try:
            status = _parsed(raw)
        except Unavailable:
            status = {}
        seconds = response.headers.get("Retry-After", "")
        return error_of(
            {**status, "code": response.status},
            url=self.url,
            retry_after=float(seconds) if seconds.isdigit() else None,
        )

    def _lost(self, error: Exception) -> RegistryError:
        match error:
            case aiohttp.ClientConnectorCertificateError():
                return Unavailable(
                    f"{self.url} shows a certificate that its cluster's authority did not sign: someone is "
                    "in between, or the authority was replaced"
                )
            case TimeoutError():
                return Unavailable(f"{self.url} did not answer in time")
            case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError():
                return Unavailable(f"the API server {self.url} was cut off in the middle of an answer")
            case aiohttp.ClientConnectorError():
                reason = error.os_error.strerror or str(error.os_error)
                return Unavailable(f"cannot reach the API server {self.url}: {reason}")
            case _:
                return Unavailable(f"lost the API server {self.url}: {error or type(error).__name__}")


def error_of(status: Mapping[str, object], *, url: str, retry_after: float | None = None) -> RegistryError:
    """The port's error for a Status of the API server."""
    code, reason = status.get("code"), status.get("reason")
    code = code if isinstance(code, int) else 500
    message = str(status.get("message") or f"{url} answered HTTP {code}")
    match code:
        case 401:
            return Unavailable(
                f"{url} does not take our token (401): it expired, its pod or Node is gone, or it is another "
                "cluster's"
            )
        case 404:
            return NotFound(message)
        case 409:
            return AlreadyExists(message) if reason == "AlreadyExists" else Conflict(message)
        case 410:
            return Gone(message)
        case 408 | 425 | 429:
            return Unavailable(message, retry_after=_asked_delay(status, retry_after))
        case _ if code >= 500:
            return Unavailable(message, retry_after=_asked_delay(status, retry_after))
        case _:
            _, policy, sentence = message.partition(DENIED)
            return Refused(sentence if policy else message)


def _asked_delay(status: Mapping[str, object], header: float | None) -> float | None:
    details = status.get("details")
    seconds = details.get("retryAfterSeconds") if isinstance(details, Mapping) else None
    return float(seconds) if isinstance(seconds, int) and header is None else header


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Whole lines of any length up to MAX_LINE: an event may be longer than a reader's buffer."""
    held = bytearray()
    async for chunk in response.content.iter_any():
        held += chunk
        if b"\n" in chunk:
            *lines, rest = held.split(b"\n")
            held = rest
            for line in lines:
                if line:
                    yield bytes(line)
        if len(held) > MAX_LINE:
            raise Unavailable(f"the API server sent a line of more than {MAX_LINE} bytes")


def _parsed(raw: bytes) -> Object:
    try:
        document = json.loads(raw)
    except ValueError:
        raise Unavailable("the API server answered what is not JSON, or only a part of it") from None
    if not isinstance(document, dict):
        raise Unavailable("the API server answered what is not an object")
    return document


def _transport(response: aiohttp.ClientResponse) -> asyncio.Transport | None:
    """What the answer still comes by; None once it has come."""
    return response.connection.transport if response.connection is not None else None


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Let the kernel find out soon when the connection of a watch leads nowhere any more."""
    transport = _transport(response)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)
