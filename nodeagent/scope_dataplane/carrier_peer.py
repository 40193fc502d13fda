"""The carrier at a peer: one connection to each hub of its file, made again for as long as the file names it.

All addresses of a hub are tried, the best first and the next when it is slow; the one that answered is first
the next time. A connection is made anew at once when the way to the hub leaves from another address of ours:
the network has changed, and TCP would take long to see it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Sequence

import aiohttp

from scope.carrier import (
    CARRIER_PATH,
    MAX_FRAME,
    REFUSED_HEADER,
    CarryingHub,
    FrameError,
    HubReport,
    Passage,
    PeerPart,
)
from scope.model import Endpoint
from scope.registry.http import PinnedKey
from scope_dataplane.carrier_link import (
    HEARTBEAT,
    Link,
    Loopback,
    Resolved,
    WebSocket,
    in_background,
    marked_socket,
    tune,
)
from scope_dataplane.carrier_queue import Room

CONNECT_SECONDS = 5.0  # TCP with two SYN retransmissions, TLS and the request
STAGGER = 0.4  # a longer way than most takes less; then the next address is tried beside it
# A hub's carrier that was started again is found within a second. A member that is refused was removed, or
# shows a ticket that ended: a new one is tried at once.
FIRST_BACKOFF, LAST_BACKOFF, REFUSED_BACKOFF = 0.05, 1.0, 10.0
STABLE_AFTER = 5.0  # a connection that ends sooner is no success
LOOK_INTERVAL = 1.0  # how soon a changed network is seen
CLOSE_SECONDS = 1.0  # for the other side's good-bye
REFUSAL_LENGTH = 200  # characters of a refusal that are told on

_UNREACHED = (OSError, aiohttp.ClientError, TimeoutError)


class Refused(Exception):
    """The hub answered, and does not carry us; the message says why, in its words."""


class PeerCarrier:
    """All hubs that a peer is carried by. `mark`: of the packets to them, 0 for none."""

    def __init__(self, *, mark: int) -> None:
        self._mark = mark
        self._hubs: dict[bytes, _Hub] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def follow(self, part: PeerPart | None) -> None:
        """Be carried by these hubs from now on, and by no others."""
        wanted = {} if part is None else {each.hub.raw: each for each in part.hubs}
        for key in self._hubs.keys() - wanted.keys():
            self._end(self._hubs.pop(key))
        for key, each in wanted.items():
            hub = self._hubs.get(key)
            if hub is None:
                hub = self._hubs[key] = _Hub(each, mark=self._mark)
            hub.follow(each, part.wireguard_port if part is not None else 0)

    def look(self) -> None:
        """Once a LOOK_INTERVAL: what files do not tell."""
        for hub in self._hubs.values():
            hub.look()

    async def close(self) -> None:
        """End all connections."""
        self.follow(None)
        if self._ending:
            await asyncio.wait(self._ending)

    def _end(self, hub: _Hub) -> None:
        task = hub.end()
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def report(self) -> tuple[HubReport, ...]:
        """How it is with each hub."""
        return tuple(hub.report() for hub in self._hubs.values())


class _Hub:
    """One hub."""

    def __init__(self, way: CarryingHub, *, mark: int) -> None:
        self._way = way
        self._mark = mark
        self._wireguard_port = 0
        self._link = Link(Room())  # of a few hubs' queues all may be full
        self._passages: dict[Passage, Loopback] = {}
        self._by_port: dict[int, Loopback] = {}
        self._taken: dict[Passage, str] = {}  # why it could not be bound
        self._address: Endpoint | None = None  # where we are connected, or were last
        self._reason = "not connected yet"
        self._again = asyncio.Event()  # what could not be may be now
        self._task = asyncio.create_task(self._stay_connected())

    def follow(self, way: CarryingHub, wireguard_port: int) -> None:
        """Go on with another ticket, other addresses, other passages."""
        before, self._way, self._wireguard_port = self._way, way, wireguard_port
        for passage in self._passages.keys() - set(way.passages):
            self._passages.pop(passage).close()
        self._bind()
        if way.ticket != before.ticket or way.addresses != before.addresses or way.pin != before.pin:
            self._again.set()
        connection = self._link.socket
        if connection is None:
            return
        if way.pin != before.pin:
            _close_soon(connection)
        elif way.ticket != before.ticket and isinstance(connection, aiohttp.ClientWebSocketResponse):
            in_background(_tell(connection, way.ticket))

    def look(self) -> None:
        """Bind what could not be bound, and see whether our network is another one."""
        if self._taken:
            self._bind()
        connection, address = self._link.socket, self._address
        if connection is None or address is None:
            return
        own = connection.get_extra_info("sockname")
        now = _leaves_from(address, mark=self._mark)
        if own is not None and now is not None and now != own[0]:
            self._reason = "our network has changed"
            _close_soon(connection)

    def report(self) -> HubReport:
        """For the agent."""
        address = self._address if self._link.socket is not None else None
        reasons = [] if address is not None else [self._reason]
        reasons += [f"{passage.endpoint}: {why}" for passage, why in self._taken.items()]
        return HubReport(self._way.hub, address, "; ".join(reasons), self._link.seen())

    def end(self) -> asyncio.Task[None]:
        """Close all; what is left to wait for."""
        self._task.cancel()
        for loopback in self._passages.values():
            loopback.close()
        self._passages.clear()
        return self._task

    def _bind(self) -> None:
        self._taken = {}
        for passage in self._way.passages:
            if passage in self._passages:
                continue
            try:
                self._passages[passage] = self._loopback(passage)
            except OSError as error:
                self._taken[passage] = error.strerror or str(error)
        self._by_port = {passage.port: loopback for passage, loopback in self._passages.items()}

    def _loopback(self, passage: Passage) -> Loopback:
        def arrived(_: int, segment: int, batch: memoryview, packets: int) -> None:
            self._link.put(passage.port, segment, batch, packets)

        return Loopback(passage.endpoint, hears=lambda port: port == self._wireguard_port, arrived=arrived)

    def _arrived(self, port: int, segment: int, frame: bytes, packets: int) -> int:
        """What came from a port of the hub goes to WireGuard, from the endpoint that stands for that port."""
        loopback = self._by_port.get(port)
        return packets if loopback is None else loopback.send(self._wireguard_port, segment, frame)

    async def _stay_connected(self) -> None:
        backoff = 0.0
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=self._socket, force_close=True, limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        ) as session:
            while True:
                self._again.clear()
                most = LAST_BACKOFF
                try:
                    if await self._be_carried(session) > STABLE_AFTER:
                        backoff = 0.0
                    self._reason = "the connection ended"
                except Refused as error:
                    self._reason, most = str(error), REFUSED_BACKOFF
                except FrameError as error:
                    self._reason, most = f"the hub speaks something else: {error}", REFUSED_BACKOFF
                except aiohttp.ServerFingerprintMismatch:
                    self._reason = "another certificate than the hub published"
                except _UNREACHED as error:
                    self._reason = str(error) or type(error).__name__
                backoff = min(max(FIRST_BACKOFF, 2 * backoff), most)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(backoff * random.uniform(0.5, 1.0)):  # noqa: S311 - no secret
                        await self._again.wait()

    async def _be_carried(self, session: aiohttp.ClientSession) -> float:
        """Until the connection ends; for how many seconds. Raises as `_connect`, and FrameError."""
        now = asyncio.get_running_loop().time
        connection = await self._connect(session)
        began = now()
        try:
            await self._link.carry(connection, arrived=self._arrived, told=lambda _: True)
        finally:
            await connection.close()
        return now() - began

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        """The first address that answers. Raises Refused, OSError, aiohttp.ClientError, TimeoutError."""
        addresses = _first(self._way.addresses, self._address)
        if not addresses:
            raise Refused("the hub has no address")
        attempts: dict[asyncio.Task[aiohttp.ClientWebSocketResponse], Endpoint] = {}
        failed: BaseException | None = None
        try:
            for number, address in enumerate(addresses, start=1):
                attempts[asyncio.create_task(self._open(session, address))] = address
                is_last = number == len(addresses)
                while attempts:
                    done, _ = await asyncio.wait(
                        attempts,
                        timeout=None if is_last else STAGGER,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    for task in done:
                        tried = attempts.pop(task)
                        error = task.exception()
                        if error is None:
                            self._address = tried
                            return task.result()
                        # Whoever answered tells more than whoever did not.
                        failed = failed if isinstance(failed, Refused) else error
                    if not is_last:
                        break
        finally:
            for task in attempts:
                task.add_done_callback(_close_late)
                task.cancel()
        raise failed or Refused("no address answered")

    async def _open(
        self, session: aiohttp.ClientSession, address: Endpoint
    ) -> aiohttp.ClientWebSocketResponse:
        way = self._way
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await session.ws_connect(
                    f"https://{address}{CARRIER_PATH}",
                    ssl=PinnedKey(way.pin),
                    headers={"Authorization": f"Bearer {way.ticket}"},
                    heartbeat=HEARTBEAT,
                    max_msg_size=MAX_FRAME,
                    compress=0,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                )
        except aiohttp.WSServerHandshakeError as error:
            raise Refused(f"the hub refuses: {error.status} {_said(error)}") from None
        except TimeoutError:
            raise TimeoutError(f"no answer from {address}") from None

    def _socket(self, address: Resolved) -> socket.socket:
        made = marked_socket(address, mark=self._mark)
        tune(made)
        return made


def _first(addresses: Sequence[Endpoint], good: Endpoint | None) -> list[Endpoint]:
    return sorted(addresses, key=lambda address: address != good)


def _leaves_from(address: Endpoint, *, mark: int) -> str | None:
    """Our address from which packets to there leave now; None where there is no way."""
    family = socket.AF_INET if address.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        try:
            if mark:
                asking.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            asking.connect((str(address.address), address.port))
            return str(asking.getsockname()[0])
        except OSError:
            return None


def _said(error: aiohttp.WSServerHandshakeError) -> str:
    """Why, where the hub said it (in a header: the body of a refused upgrade is not read)."""
    said = "" if error.headers is None else error.headers.get(REFUSED_HEADER, "")
    return said[:REFUSAL_LENGTH] or error.message


async def _tell(connection: aiohttp.ClientWebSocketResponse, ticket: str) -> None:
    with contextlib.suppress(OSError, aiohttp.ClientError):
        await connection.send_str(ticket)


def _close_late(task: asyncio.Task[aiohttp.ClientWebSocketResponse]) -> None:
    """A connection that came to be when another one was first already."""
    if not task.cancelled() and task.exception() is None:
        _close_soon(task.result())


def _close_soon(connection: WebSocket) -> None:
    in_background(connection.close())
