"""Delays, jitters and loses frames between pairs of interfaces, for kernels without netem.

A program of its own, run inside the namespace that holds the interfaces, one for all links of a lab.
It reads commands from standard input, one a line, and answers each with `ok` or `error ...`:

    link NAME INTERFACE INTERFACE     join two interfaces, with no delay and no loss
    set NAME DELAY_S JITTER_S LOSS    delay each way, plus or minus up to the jitter; loss from 0 to 1
    detach                            live on when standard input ends; otherwise its end is the shim's

Frames travel with the kernel's virtio header (PACKET_VNET_HDR): without it, frames whose checksum or
segmentation is still to be done arrive broken. PACKET_IGNORE_OUTGOING keeps a link from hearing itself.
It imports nothing but the standard library's basics, so that it starts in a few milliseconds.
"""

from __future__ import annotations

import heapq
import os
import random
import select
import socket
import sys
import time

SOL_PACKET = 263
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
ETH_P_ALL = 3
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33

# A burst of a fast TCP flow while this process waits for its turn on the processor.
BUFFER_BYTES = 8 << 20
# What may be on its way at once: 1 Gbit/s for half a second. Beyond it frames are lost, as on a full link.
MAX_QUEUED_BYTES = 64 << 20
# Frames taken from one interface before the others and the clock have their turn.
BATCH = 128
# A segmentation-offloaded frame is at most 64 KiB with its headers; plus the virtio header.
FRAME_BYTES = 70_000


class Link:
    """Two interfaces, and what happens to frames between them."""

    def __init__(self, left: socket.socket, right: socket.socket) -> None:
        self.left, self.right = left, right
        self.delay_s = 0.0
        self.jitter_s = 0.0
        self.loss = 0.0


class Shim:
    """The event loop over all links."""

    def __init__(self, seed: int) -> None:
        self._links: dict[str, Link] = {}
        self._ways: dict[int, tuple[Link, socket.socket, socket.socket]] = {}
        self._queue: list[tuple[float, int, socket.socket, bytes]] = []
        self._queued_bytes = 0
        self._sequence = 0
        self._dice = random.Random(seed)
        self._frame = memoryview(bytearray(FRAME_BYTES))
        self._commands = b""
        self._detached = False
        self._epoll = select.epoll()
        self._epoll.register(0, select.EPOLLIN)

    def run(self) -> None:
        """Until standard input ends, unless told to detach."""
        waiting = [self._epoll.fileno()]
        while True:
            timeout = max(0.0, self._queue[0][0] - time.monotonic()) if self._queue else None
            # epoll alone rounds up to milliseconds; select on it waits to the microsecond.
            select.select(waiting, [], [], timeout)
            self._deliver(time.monotonic())
            for descriptor, _ in self._epoll.poll(0):
                if descriptor != 0:
                    self._take(*self._ways[descriptor])
                elif not self._listen():
                    return

    def _deliver(self, now: float) -> None:
        queue = self._queue
        while queue and queue[0][0] <= now:
            _, _, out, frame = heapq.heappop(queue)
            self._queued_bytes -= len(frame)
            try:
                out.send(frame)
            except OSError:  # the interface is down or full: the frame is lost, as on a real one
                continue

    def _take(self, link: Link, source: socket.socket, out: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                size = source.recv_into(self._frame)
            except BlockingIOError:
                return
            except OSError as error:  # the interface went down (heard once), or a frame has no virtio form
                print(f"shim: a frame could not be read: {error}", file=sys.stderr, flush=True)
                return
            if self._dice.random() < link.loss or self._queued_bytes + size > MAX_QUEUED_BYTES:
                continue
            due = time.monotonic() + link.delay_s
            if link.jitter_s:
                due += self._dice.uniform(-link.jitter_s, link.jitter_s)
            self._sequence += 1
            self._queued_bytes += size
            heapq.heappush(self._queue, (due, self._sequence, out, bytes(self._frame[:size])))

    def _listen(self) -> bool:
        read = os.read(0, 65536)
        if not read:
            self._epoll.unregister(0)
            return self._detached
        *lines, self._commands = (self._commands + read).split(b"\n")
        for line in lines:
            try:
                self._obey(line.decode().split())
                answer = "ok"
            except (OSError, KeyError, ValueError) as error:
                answer = f"error {error!r}"
            os.write(1, f"{answer}\n".encode())
        return True

    def _obey(self, words: list[str]) -> None:
        match words:
            case ["link", name, left, right]:
                link = Link(_open(left), _open(right))
                self._links[name] = link
                for source, out in ((link.left, link.right), (link.right, link.left)):
                    self._ways[source.fileno()] = (link, source, out)
                    self._epoll.register(source, select.EPOLLIN)
            case ["set", name, delay_s, jitter_s, loss]:
                link = self._links[name]
                link.delay_s, link.jitter_s, link.loss = float(delay_s), float(jitter_s), float(loss)
            case ["detach"]:
                self._detached = True
            case _:
                raise ValueError(f"unknown command {words}")


def _open(interface: str) -> socket.socket:
    # Protocol 0 hears nothing until bind names interface and protocol at once: nothing foreign slips in.
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    packets.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    packets.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    packets.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
    packets.setblocking(False)
    packets.bind((interface, ETH_P_ALL))
    return packets


if __name__ == "__main__":
    Shim(int(sys.argv[1])).run()
