"""A way to a server that counts bytes as they are on the wire, in both directions.

It is a process of its own, so that whoever is measured does not wait for whoever measures.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import Any, Self

START_S = 30.0  # of a Python on a busy machine
CHUNK = 65536
LOCAL = "127.0.0.1"


class Meter:
    """Relays what comes to `url` on to `to` (https://HOST:PORT), unread; use it with `with`."""

    def __init__(self, to: str) -> None:
        host, _, port = to.removeprefix("https://").rpartition(":")
        # A fork would take this process's event loop, connections and threads along.
        context = multiprocessing.get_context("spawn")
        self._bytes: Synchronized[int] = context.Value("Q", 0)
        self._heard, telling = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_relay, args=((host, int(port)), self._bytes, telling), daemon=True
        )
        self.url = ""

    @property
    def total(self) -> int:
        """Bytes so far, both ways."""
        return self._bytes.value

    def __enter__(self) -> Self:
        self._process.start()
        if not self._heard.poll(START_S):
            self._process.kill()
            raise TimeoutError(f"a relay did not start within {START_S:.0f} s")
        self.url = f"https://{LOCAL}:{self._heard.recv()}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()


def _relay(to: tuple[str, int], count: Synchronized[int], telling: Connection[int, Any]) -> None:
    asyncio.run(_serve(to, count, telling))


async def _serve(to: tuple[str, int], count: Synchronized[int], telling: Connection[int, Any]) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        beyond_reader, beyond_writer = await asyncio.open_connection(*to)
        ways = [
            asyncio.ensure_future(_copy(reader, beyond_writer, count)),
            asyncio.ensure_future(_copy(beyond_reader, writer, count)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for each in (writer, beyond_writer):
            each.transport.abort()

    server = await asyncio.start_server(connected, LOCAL, 0)
    telling.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Synchronized[int]) -> None:
    try:
        while data := await reader.read(CHUNK):
            count.value += len(data)  # nobody else writes it
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        return
