"""What both ends of a carrier do alike: loopback sockets on one side, a WebSocket on the other.

A datagram that comes to a loopback socket leaves in a frame, and a frame that comes leaves as datagrams from
a loopback socket. What comes in one batch (UDP_GRO), or one after the other from the same sender in one size,
travels in one frame and leaves in one call (UDP_SEGMENT). Nothing is held back to wait for more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import aiohttp

from scope.carrier import HEADER_BYTES, MAX_BATCH, MAX_SEGMENTS, Carried, decode_frame, encode_frame
from scope.model import Endpoint
from scope_dataplane.batches import (
    CONTROL_BYTES,
    SOL_UDP,
    UDP_GRO,
    all_wireguard,
    count,
    in_segments,
    segment_size,
    segments,
    sendable,
)
from scope_dataplane.carrier_queue import FrameQueue, Room
from scope_dataplane.process import enlarge_buffers

# As aiohttp hands it to whoever makes a socket.
Resolved: TypeAlias = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[Any, ...]]

LOCALHOST = "127.0.0.1"  # from where, and at which, the programs of this machine are heard
READS = 64  # of one socket before the others have their turn

# An answer is asked for where nothing came for so long, and awaited for half of it. NATs and proxies forget
# a connection that is silent for a minute.
HEARTBEAT = 8.0
# What was sent and not acknowledged for so long was lost with its network, not late.
UNACKNOWLEDGED_MS = 10_000
# What the kernel may hold unsent: more would wait where the oldest cannot be dropped.
UNSENT_BYTES = 128 << 10

_ROOM = 65536  # that one read may fill
_BUFFER_BYTES = 4 * _ROOM
_TCP_USER_TIMEOUT, _TCP_NOTSENT_LOWAT = 18, 25
# Of all sockets in turn: nothing stays in it beyond one call.
_BUFFER = memoryview(bytearray(_BUFFER_BYTES))
_NO_BATCHES = frozenset({errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT})


class WebSocket(Protocol):
    """What aiohttp's client and server have in common."""

    async def send_bytes(self, data: bytes) -> None: ...
    async def receive(self) -> aiohttp.WSMessage: ...
    async def close(self, *, code: int = ..., message: bytes = ...) -> Any: ...
    def get_extra_info(self, name: str, default: Any = ...) -> Any: ...


@dataclass(slots=True)
class Counts:
    """What `Carried` is made of, but for what waits."""

    sent_packets: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    received_bytes: int = 0
    dropped: int = 0  # beside those that went for newer ones


class Loopback:
    """A UDP socket at an endpoint of `scope.carrier.LOOPBACKS`.

    `arrived(port, segment, batch, packets)` is called with what came from `port` of this machine, where
    `hears` says that it may; `batch` holds until it returns.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        hears: Callable[[int], bool],
        arrived: Callable[[int, int, memoryview, int], None],
    ) -> None:
        """Raises OSError."""
        self.endpoint = endpoint
        self._hears = hears
        self._arrived = arrived
        self._takes_batches = True
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(OSError):  # a kernel before 5.0: single datagrams then
                self._socket.setsockopt(SOL_UDP, UDP_GRO, 1)
            enlarge_buffers(self._socket)
            self._socket.bind((str(endpoint.address), endpoint.port))
        except OSError:
            self._socket.close()
            raise
        asyncio.get_running_loop().add_reader(self._socket, self._drain)

    def close(self) -> None:
        """Give the endpoint back."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def send(self, port: int, segment: int, frame: bytes) -> int:
        """Send a frame's batch to that port of this machine; how many of its datagrams were not taken."""
        view, start, stop = memoryview(frame), HEADER_BYTES, len(frame)
        # A raw socket, as an agent has one beside WireGuard's, is given a batch whole: only what is for
        # WireGuard alone may be one.
        together = self._takes_batches and all_wireguard(frame, start, stop, segment)
        lost = 0
        for first, last in sendable(start, stop, segment):
            if together and last - first > segment and self._send_batch(port, segment, view[first:last]):
                continue
            for begin, end in segments(first, last, segment):
                try:
                    self._socket.sendto(view[begin:end], (LOCALHOST, port))
                except OSError:  # full: as on any other hop
                    lost += 1
        return lost

    def _send_batch(self, port: int, segment: int, batch: memoryview) -> bool:
        try:
            self._socket.sendmsg([batch], [in_segments(segment)], 0, (LOCALHOST, port))
        except OSError as error:
            if error.errno in _NO_BATCHES:
                self._takes_batches = False
            return False
        return True

    def _drain(self) -> None:
        buffer = _BUFFER
        port = segment = start = stop = 0  # the batch that waits to be handed over
        for _ in range(READS):
            if stop > _BUFFER_BYTES - _ROOM:
                self._hand_over(port, segment, buffer[start:stop])
                start = stop = 0
            try:
                size, control, _, address = self._socket.recvmsg_into(
                    [buffer[stop : stop + _ROOM]], CONTROL_BYTES
                )
            except BlockingIOError:
                break
            except OSError:  # an ICMP error for something sent before: the next read tells what waits
                continue
            if size == 0 or address[0] != LOCALHOST or not self._hears(address[1]):
                continue
            came, end = segment_size(control, size), stop + size
            if (
                stop > start
                and port == address[1]
                and (stop - start) % segment == 0
                and came <= segment
                and (came == segment or size == came)
                and end - start <= min(MAX_BATCH, MAX_SEGMENTS * segment)
            ):
                stop = end
            else:
                self._hand_over(port, segment, buffer[start:stop])
                port, segment, start, stop = address[1], came, stop, end
        self._hand_over(port, segment, buffer[start:stop])

    def _hand_over(self, port: int, segment: int, batch: memoryview) -> None:
        for first, last in sendable(0, len(batch), segment or 1):
            self._arrived(port, segment, batch[first:last], count(first, last, segment))


class Link:
    """Frames over whichever WebSocket there is now, or none; `counts` go on from one to the next.

    `room`: what it shares with other links of its process.
    """

    def __init__(self, room: Room) -> None:
        self.counts = Counts()
        self.socket: WebSocket | None = None
        self._queue = FrameQueue(room)
        self._waiting = asyncio.Event()

    def put(self, port: int, segment: int, batch: memoryview, packets: int) -> None:
        """Send a batch as soon as the connection takes it; without one it is lost."""
        if self.socket is None:
            self.counts.dropped += packets
            return
        self._queue.put(encode_frame(port, segment, batch), packets)
        self._waiting.set()

    def seen(self) -> Carried:
        """What it carried so far."""
        counts = self.counts
        return Carried(
            counts.sent_packets,
            counts.sent_bytes,
            counts.received_packets,
            counts.received_bytes,
            counts.dropped + self._queue.dropped,
        )

    async def carry(
        self,
        connection: WebSocket,
        *,
        arrived: Callable[[int, int, bytes, int], int],
        told: Callable[[str], bool],
    ) -> None:
        """Be this connection's until it ends, or another one takes its place. Raises FrameError.

        `arrived(port, segment, frame, packets)` says how many datagrams were not taken; `told(text)` whether
        a text message may stand.
        """
        self.socket = connection
        sending = asyncio.create_task(self._send(connection))
        try:
            while True:
                message = await connection.receive()
                if message.type is aiohttp.WSMsgType.BINARY:
                    self._take(message.data, arrived)
                elif message.type is not aiohttp.WSMsgType.TEXT or not told(message.data):
                    return
        finally:
            if self.socket is connection:
                self.socket = None
                self._queue.clear()  # for the next connection it would be old
            sending.cancel()
            await asyncio.wait([sending])

    def _take(self, frame: bytes, arrived: Callable[[int, int, bytes, int], int]) -> None:
        port, segment = decode_frame(frame)
        packets = count(HEADER_BYTES, len(frame), segment)
        lost = arrived(port, segment, frame, packets)
        self.counts.dropped += lost
        if lost < packets:
            self.counts.received_packets += packets - lost
            self.counts.received_bytes += len(frame) - HEADER_BYTES - lost * segment

    async def _send(self, connection: WebSocket) -> None:
        """Send what waits, for as long as the connection is ours."""
        while self.socket is connection:
            taken = self._queue.take()
            if taken is None:
                self._waiting.clear()
                await self._waiting.wait()
                continue
            frame, packets = taken
            try:
                await connection.send_bytes(frame)
            except (OSError, aiohttp.ClientError):  # it ended: whoever reads it learns that too
                self.counts.dropped += packets
                return
            self.counts.sent_packets += packets
            self.counts.sent_bytes += len(frame) - HEADER_BYTES


def marked_socket(address: Resolved, *, mark: int) -> socket.socket:
    """A TCP socket for aiohttp whose packets have that mark, 0 for none. Raises OSError."""
    made = socket.socket(*address[:3])
    made.setblocking(False)
    if mark:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return made


def in_background(work: Coroutine[Any, Any, object]) -> None:
    """Let it end when it does; what it raises is asyncio's to tell."""
    task = asyncio.ensure_future(work)
    _background.add(task)
    task.add_done_callback(_background.discard)


_background: set[asyncio.Task[object]] = set()


def tune(connection: socket.socket) -> None:
    """Have a TCP connection find out soon that it leads nowhere, and hold little of what is not sent."""
    connection.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
