"""The carrier at a hub: members come in by TLS and WebSocket, and everybody else is led to the registry.

Whoever connects is a stranger until it shows a member's ticket. A member has one connection, and the newest
counts: it is the one that lost the last one. Its datagrams leave from its own loopback endpoint, and only to
WireGuard and the relays of this hub.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import time
from dataclasses import dataclass

from aiohttp import web

from scope.admission import Buckets, Doors, Rate, source_of
from scope.carrier import (
    CARRIER_PATH,
    HEADER_BYTES,
    MAX_FRAME,
    REFUSED_HEADER,
    FrameError,
    HubPart,
    Member,
    MemberReport,
    Ticket,
    TicketError,
    verify_ticket,
)
from scope.model import PublicKey
from scope.serving import Server, listening_socket
from scope_dataplane.carrier_link import HEARTBEAT, Link, Loopback, in_background, tune
from scope_dataplane.carrier_proxy import Proxy
from scope_dataplane.carrier_queue import Room
from scope_dataplane.pairs import BURST_S, Bucket

BIND_INTERVAL = 5.0  # how often a port that another program held is tried again
CLOSE_SECONDS = 1.0  # for a member's good-bye
# Requests to be carried from one address: a hundred members behind one NAT come back at once when a hub's
# carrier was started again. Checking a signature costs a hub 0.1 ms.
ATTEMPTS = Rate(20, 200)
DOORS = Doors()


@dataclass(slots=True, eq=False)
class _Carried:
    """One member that was carried since we started."""

    member: Member
    bucket: Bucket
    link: Link
    connection: web.WebSocketResponse | None = None
    loopback: Loopback | None = None
    expires: float = 0.0  # of the ticket that it showed last


class HubCarrier:
    """All that a hub's carrier does."""

    def __init__(self, *, mark: int) -> None:
        self.refused = 0  # requests to be carried by whom may not
        self.reason = ""  # why it does not listen
        self._part: HubPart | None = None
        self._signing: dict[PublicKey, PublicKey] = {}
        self._members: dict[PublicKey, Member] = {}
        self._carried: dict[PublicKey, _Carried] = {}
        self._total = Bucket(0, 0.0, 0.0)
        self._attempts: Buckets[str] = Buckets(ATTEMPTS)
        self._room = Room()
        self._proxy = Proxy(mark=mark)
        self._server: Server | None = None
        self._context: ssl.SSLContext | None = None
        self._port: int | None = None  # where we listen, or should
        self._shown: tuple[str, bytes] | None = None  # the certificate and its key that the context has
        self._bind_again = 0.0

    @property
    def is_listening(self) -> bool:
        """Whether anybody can come in."""
        return self._server is not None

    async def follow(self, part: HubPart | None) -> None:
        """Carry these members from now on, and no others."""
        self._part = part
        members = () if part is None else part.members
        self._members = {member.peer: member for member in members}
        self._signing = {member.peer: member.signing for member in members}
        for peer in [peer for peer, carried in self._carried.items() if self._is_another(peer, carried)]:
            self._let_go(self._carried.pop(peer), "no member of this mesh any more")
        if part is not None:
            self._total.change(part.limits.total)
            for carried in self._carried.values():
                carried.bucket.change(part.limits.pair)
        self._proxy.follow(None if part is None else part.upstream)
        await self._serve()

    async def look(self) -> None:
        """Now and then: what the clock brings."""
        wall = time.time()
        for carried in list(self._carried.values()):
            if carried.connection is not None and carried.expires <= wall:
                self._let_go(carried, "the ticket has expired")
        if self._server is None and asyncio.get_running_loop().time() >= self._bind_again:
            await self._serve()

    def report(self) -> tuple[MemberReport, ...]:
        """Every member that was carried."""
        return tuple(
            MemberReport(peer, carried.link.socket is not None, carried.link.seen())
            for peer, carried in self._carried.items()
        )

    async def close(self) -> None:
        """End all connections."""
        await self.follow(None)
        await self._proxy.close()

    # --- listening ----------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        part = self._part
        port = None if part is None else part.port
        if port != self._port and self._server is not None:
            server, self._server = self._server, None
            await server.stop()
        self._port = port
        if part is None:
            self.reason = ""
            return
        try:
            context = self._show(part)
        except (ssl.SSLError, OSError) as error:
            self.reason = f"certificate and key make no TLS server: {error}"
            return
        if self._server is None:
            await self._listen(part, context)

    def _show(self, part: HubPart) -> ssl.SSLContext:
        """A renewed certificate is shown from the next connection on. Raises ssl.SSLError, OSError."""
        if self._context is None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._context.set_alpn_protocols(["http/1.1"])
        shown = part.certificate, part.key.raw
        if shown != self._shown:
            _load(self._context, part)
            self._shown = shown
        return self._context

    async def _listen(self, part: HubPart, context: ssl.SSLContext) -> None:
        self._bind_again = asyncio.get_running_loop().time() + BIND_INTERVAL
        listeners, failed = [], ""
        for address in ("::", "0.0.0.0"):  # noqa: S104 - a hub is there for everybody
            try:
                listeners.append(listening_socket(address, part.port))
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:  # the machine has none of that family
                    failed = failed or f"TCP port {part.port}: {error.strerror}"
        self.reason = failed
        if not listeners:
            return
        for listener in listeners:
            tune(listener)  # connections take after it
        app = web.Application(client_max_size=0)
        app.router.add_get(CARRIER_PATH, self._come)
        app.router.add_route("*", "/{path:.*}", self._proxy.lead)
        self._server = Server(app, limits=DOORS, context=context)
        await self._server.start(listeners)

    # --- members ------------------------------------------------------------------------------------------

    async def _come(self, request: web.Request) -> web.StreamResponse:
        """Somebody wants to be carried."""
        part, now = self._part, asyncio.get_running_loop().time()
        wait = self._attempts.take(source_of(request.remote), now)
        if wait > 0:
            return self._refuse(429, "too many attempts from this address", retry_after=wait)
        if part is None:
            return self._refuse(503, "this hub carries nobody now")
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        try:
            if scheme != "Bearer":
                raise TicketError("no ticket")  # noqa: TRY301 - as any other that opens nothing
            ticket = self._believe(part, text)
        except TicketError as error:
            return self._refuse(403, str(error))
        connection = web.WebSocketResponse(
            timeout=CLOSE_SECONDS, heartbeat=HEARTBEAT, max_msg_size=MAX_FRAME, compress=False
        )
        if not connection.can_prepare(request).ok:
            return self._refuse(426, "this path is for WebSockets")
        carried = self._carried.get(ticket.peer)
        if carried is None:
            bucket = Bucket(part.limits.pair, part.limits.pair * BURST_S, now)
            carried = self._carried[ticket.peer] = _Carried(
                self._members[ticket.peer], bucket, Link(self._room)
            )
        try:
            self._bind(carried)
        except OSError as error:
            return self._refuse(503, f"{carried.member.endpoint} at the hub: {error.strerror}")
        await connection.prepare(request)
        if self._carried.get(ticket.peer) is carried:  # and was not removed meanwhile
            await self._carry(carried, connection, ticket)
        await connection.close()
        return connection

    async def _carry(self, carried: _Carried, connection: web.WebSocketResponse, ticket: Ticket) -> None:
        before, carried.connection, carried.expires = carried.connection, connection, ticket.expires
        if before is not None:
            in_background(before.close(message=b"connected again"))
        try:
            self._bind(carried)  # the last connection may have ended meanwhile
            await carried.link.carry(
                connection,
                arrived=lambda port, segment, frame, packets: self._arrived(
                    carried, port, segment, frame, packets
                ),
                told=lambda text: self._renew(carried, text),
            )
        except FrameError as error:
            await connection.close(code=1002, message=str(error).encode())
        except OSError as error:
            why = f"{carried.member.endpoint} at the hub: {error.strerror}"
            await connection.close(code=1011, message=why.encode())
        finally:
            if carried.connection is connection:
                carried.connection = None
                _unbind(carried)

    def _believe(self, part: HubPart, text: str) -> Ticket:
        return verify_ticket(
            text, mesh_uid=part.mesh_uid, hub=part.hub, signing=self._signing, wall=time.time()
        )

    def _renew(self, carried: _Carried, text: str) -> bool:
        """Whether a ticket that came later is as good as the first."""
        part = self._part
        try:
            ticket = None if part is None else self._believe(part, text)
        except TicketError:
            ticket = None
        if ticket is None or ticket.peer != carried.member.peer:
            self.refused += 1
            return False
        carried.expires = ticket.expires
        return True

    def _arrived(self, carried: _Carried, port: int, segment: int, frame: bytes, packets: int) -> int:
        part, loopback = self._part, carried.loopback
        if part is None or loopback is None or not part.carries_to(port):
            return packets
        if not self._admit(carried, len(frame) - HEADER_BYTES):
            return packets
        return loopback.send(port, segment, frame)

    def _admit(self, carried: _Carried, size: int) -> bool:
        now = asyncio.get_running_loop().time()
        if not (carried.bucket.has_room(now) and self._total.has_room(now)):
            return False
        carried.bucket.take(size)
        self._total.take(size)
        return True

    def _bind(self, carried: _Carried) -> None:
        """Raises OSError."""
        if carried.loopback is None:
            carried.loopback = self._loopback(carried)

    def _loopback(self, carried: _Carried) -> Loopback:
        def arrived(port: int, segment: int, batch: memoryview, packets: int) -> None:
            if self._admit(carried, len(batch)):
                carried.link.put(port, segment, batch, packets)
            else:
                carried.link.counts.dropped += packets

        def hears(port: int) -> bool:
            return self._part is not None and self._part.carries_to(port)

        return Loopback(carried.member.endpoint, hears=hears, arrived=arrived)

    def _is_another(self, peer: PublicKey, carried: _Carried) -> bool:
        return self._members.get(peer) != carried.member

    def _let_go(self, carried: _Carried, why: str) -> None:
        """Nothing passes any more, however long the good-bye takes."""
        _unbind(carried)
        if carried.connection is not None:
            in_background(carried.connection.close(message=why.encode()))

    def _refuse(self, code: int, why: str, *, retry_after: float | None = None) -> web.Response:
        self.refused += 1
        headers = {REFUSED_HEADER: why}
        if retry_after is not None:
            headers["Retry-After"] = str(max(1, round(retry_after)))
        return web.Response(status=code, text=why + "\n", headers=headers)


def _unbind(carried: _Carried) -> None:
    if carried.loopback is not None:
        carried.loopback.close()
        carried.loopback = None


def _load(context: ssl.SSLContext, part: HubPart) -> None:
    """OpenSSL reads certificates from files alone: from one in memory. Raises ssl.SSLError, OSError."""
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(part.certificate.encode() + b"\n" + part.key.raw)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
