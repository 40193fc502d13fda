"""Serves HTTP to strangers: sockets, TLS, and who may come in at all.

Each connection passes the door before aiohttp sees it: too many in total or of one source are told so and
closed, and one that asks for nothing within its time is dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections import defaultdict
from collections.abc import Iterable

from aiohttp import web

from scope.admission import Doors, Refusal, source_of

log = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0  # TLS over a slow uplink
CLOSING_SECONDS = 2.0  # for a stream's last line, and TLS's good-bye
KEEPALIVE_SECONDS = 75.0
BACKLOG = 1024  # connections that wait to be accepted when a thousand agents start at once


class Server:
    """Serves `app` to whom the door lets in; `context` None is plain HTTP."""

    def __init__(self, app: web.Application, *, limits: Doors, context: ssl.SSLContext | None) -> None:
        self._limits = limits
        self._context = context
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=KEEPALIVE_SECONDS,
            shutdown_timeout=CLOSING_SECONDS,
            max_line_size=limits.line,
            max_field_size=limits.line,
            max_headers=limits.headers,
            auto_decompress=False,  # a signature covers what was sent, and nothing small may become large
        )
        self._listeners: list[asyncio.Server] = []
        self._of_source: defaultdict[str, set[asyncio.Transport]] = defaultdict(set)
        self._silent: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}
        app.on_response_prepare.append(self._answered)

    async def start(self, listeners: Iterable[socket.socket]) -> None:
        """Accept connections on all of `listeners`, which then are the server's."""
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        for sock in listeners:
            encrypted = self._context is not None
            listener = await loop.create_server(
                lambda: _Door(self),
                sock=sock,
                backlog=BACKLOG,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_SECONDS if encrypted else None,
                ssl_shutdown_timeout=CLOSING_SECONDS if encrypted else None,
            )
            self._listeners.append(listener)

    async def stop(self) -> None:
        """Take no new connection, let requests finish for CLOSING_SECONDS, close all."""
        for listener in self._listeners:
            listener.close()
        for handle in self._silent.values():
            handle.cancel()
        await self._runner.cleanup()

    def admit(self, transport: asyncio.Transport) -> asyncio.Protocol | None:
        """The protocol that serves a new connection; None: there are too many."""
        server = self._runner.server
        peername = transport.get_extra_info("peername")
        of_source = self._of_source[source_of(peername[0] if peername else None)]
        for closed in [other for other in of_source if other.is_closing()]:
            of_source.discard(closed)
        if server is None or len(server.connections) >= self._limits.connections:
            return None
        if len(of_source) >= self._limits.connections_per_source:
            return None
        of_source.add(transport)
        self._forget_idle_sources()
        loop = asyncio.get_running_loop()
        self._silent[transport] = loop.call_later(
            self._limits.first_request_seconds, self._drop_silent, transport
        )
        return server()

    def _forget_idle_sources(self) -> None:
        if len(self._of_source) <= 2 * self._limits.connections:
            return
        for source in [s for s, others in self._of_source.items() if all(o.is_closing() for o in others)]:
            del self._of_source[source]

    def _drop_silent(self, transport: asyncio.Transport) -> None:
        self._silent.pop(transport, None)
        transport.abort()

    async def _answered(self, request: web.Request, response: web.StreamResponse) -> None:
        """A connection with an answer on its way has spoken; aiohttp's keep-alive time holds from here."""
        del response
        if request.transport is not None:
            handle = self._silent.pop(request.transport, None)
            if handle is not None:
                handle.cancel()


class _Door(asyncio.Protocol):
    """Stands in until the connection is made, then hands it to aiohttp or refuses it."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a listening TCP socket makes transports that read and write")
        protocol = self._server.admit(transport)
        if protocol is None:
            log.warning("connection.refused peer=%s", transport.get_extra_info("peername"))
            transport.write(_FULL)
            transport.close()
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)


def listening_socket(address: str, port: int) -> socket.socket:
    """A listening TCP socket of one family. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _refusal_bytes(refusal: Refusal) -> bytes:
    body = json.dumps(refusal.status()).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **refusal.headers(),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {refusal.code} Service Unavailable\r\n{lines}\r\n".encode() + body


_FULL = _refusal_bytes(
    Refusal(503, "ServiceUnavailable", "too many connections are open: close some, or wait", retry_after=10.0)
)
