"""`scope-carrier --file FILE [--mark N]`: carries datagrams over TCP for a peer without UDP, and at its hub.

`scope.carrier` says what it speaks and what the file tells it to be: a peer's carrier, a hub's, or both.

- It waits for its file, so a service manager may start it before the agent, and follows its replacement.
  Connections that stay in the file stay. A file that cannot be read changes nothing.
- When the file is removed it ends with status 0, as it does when it is asked to end. The agent's end is not
  its own.
- It holds a lock beside the file for as long as it runs: one carrier a file. The locked file is empty while
  it waits, and says `running` once it carries.
- Whoever connects to the Unix socket beside the file reads one JSON document: whom it carries, how much, and
  why not.
- Tickets and keys go from the file into memory and nowhere else.

A connection that ends is made again by the peer, soon; until then its datagrams are lost, as on any network.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import time

from scope.carrier import Carrier, CarrierFileError, CarrierReport, decode_carrier, encode_report
from scope.core_dumps import forbid_core_dumps
from scope_dataplane.carrier_hub import HubCarrier
from scope_dataplane.carrier_peer import LOOK_INTERVAL, PeerCarrier
from scope_dataplane.process import can_mark, listen_at, log, parse_mark, raise_descriptors, take_lock

READ_INTERVAL = 0.1  # how soon a change of the file is seen
READ_SHARE = 4.0  # after a read that took t seconds the next one waits so many t: members come by hundreds
WAIT_INTERVAL = 0.05  # how soon its appearance is
LISTENERS = 4  # connections to the Unix socket that wait at once
ANSWER_SECONDS = 10.0  # whoever asks and does not read is left

# What the lock file says once we carry; it is empty before.
RUNNING = b"running"


def main(arguments: list[str] | None = None) -> int:
    """Carry until the file is removed. Exit status 0 then, 1 for what a person must mend."""
    parser = argparse.ArgumentParser(
        prog="scope-carrier", description="Carry datagrams over TCP where a network lets no UDP out."
    )
    parser.add_argument("--file", required=True, metavar="FILE", help="the file that the agent writes")
    parser.add_argument(
        "--mark", type=parse_mark, default=0, metavar="N", help="the mark of packets sent; 0 (default): none"
    )
    options = parser.parse_args(arguments)
    forbid_core_dumps()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end())
    try:
        return _run(os.path.abspath(options.file), mark=options.mark)
    except OSError as error:
        return _complain(str(error))


def _end() -> None:
    raise SystemExit(0)


def _run(file: str, *, mark: int) -> int:
    stem = os.path.splitext(file)[0]
    lock = take_lock(stem + ".lock")
    if lock is None:
        return _complain(f"another scope-carrier runs for {file}")
    os.ftruncate(lock, 0)
    if not can_mark(mark):
        return _complain("packets cannot be marked: run it as root, with CAP_NET_ADMIN, or without --mark")
    raise_descriptors()  # two for each member that is carried
    while not os.path.exists(file):
        time.sleep(WAIT_INTERVAL)
    listening = listen_at(stem + ".sock", LISTENERS)
    try:
        asyncio.run(_carry(file, mark=mark, lock=lock, listening=listening))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(stem + ".sock")
    return 0


async def _carry(file: str, *, mark: int, lock: int, listening: socket.socket) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    running = Running(file, mark=mark)
    server = await asyncio.start_unix_server(running.answer, sock=listening)
    try:
        await running.look()
        os.pwrite(lock, RUNNING, 0)
        _log(f"carries as {file} says")
        await running.follow_file(ended)
    finally:
        server.close()
        await running.close()


class Running:
    """Both roles of one file."""

    def __init__(self, file: str, *, mark: int) -> None:
        self._file = file
        self._peer = PeerCarrier(mark=mark)
        self._hub = HubCarrier(mark=mark)
        self._seen: tuple[int, ...] | None = None  # the file as it was last read
        self._read_again = 0.0
        self._digest = ""  # of the one that is in effect
        self._refused = ""  # why the last one could not be
        self._reason = ""  # why the hub did not listen when we last looked

    async def look(self) -> bool:
        """Follow the file. Whether it is still there."""
        try:
            found = os.stat(self._file)
            seen = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
            began = time.monotonic()
            if seen == self._seen or began < self._read_again:
                return True
            # In a thread: ten thousand members take a while, and datagrams are not to wait so long.
            carrier, digest = await asyncio.to_thread(_read, self._file)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._refuse(error)  # and look again: it is the machine's trouble, not the file's
            return True
        except CarrierFileError as error:
            self._refuse(error)
            self._seen = seen
            return True
        self._seen, self._refused = seen, ""
        ended = time.monotonic()
        self._read_again = ended + READ_SHARE * (ended - began)
        await self._follow(carrier)
        self._digest = digest
        return True

    async def follow_file(self, ended: asyncio.Event) -> None:
        """Carry until the file is gone, or somebody asks us to end."""
        now = asyncio.get_running_loop().time
        look_at = 0.0
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READ_INTERVAL):
                    await ended.wait()
            if not await self.look():
                _log("the file is gone: ending")
                return
            if now() >= look_at:
                self._peer.look()
                await self._hub.look()
                self._tell()
                look_at = now() + LOOK_INTERVAL

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One who asks at the Unix socket."""
        del reader
        report = CarrierReport(
            hubs=self._peer.report(),
            members=self._hub.report(),
            listening=self._hub.is_listening,
            reason=self._hub.reason,
            refused=self._hub.refused,
            file=self._digest,
        )
        writer.write(encode_report(report).encode() + b"\n")
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError):
            writer.transport.abort()

    async def close(self) -> None:
        """End all connections."""
        await self._peer.close()
        await self._hub.close()

    async def _follow(self, carrier: Carrier) -> None:
        self._peer.follow(carrier.peer)
        await self._hub.follow(carrier.hub)
        self._tell()

    def _tell(self) -> None:
        if self._hub.reason and self._hub.reason != self._reason:
            _log(f"does not listen: {self._hub.reason}")
        self._reason = self._hub.reason

    def _refuse(self, error: Exception) -> None:
        if str(error) != self._refused:
            self._refused = str(error)
            _log(f"{self._file}: {error}; going on as before")


def _read(path: str) -> tuple[Carrier, str]:
    """The file, and the digest of its text. Raises OSError, CarrierFileError."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    return decode_carrier(text), hashlib.sha256(text.encode()).hexdigest()


def _log(event: str) -> None:
    log("scope-carrier", event)


def _complain(sentence: str) -> int:
    _log(sentence)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
