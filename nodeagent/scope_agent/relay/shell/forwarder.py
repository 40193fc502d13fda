"""The forwarder as the agent sees it: a file that programs it, a lock that it holds, a socket that tells.

The process is `scope-forwarder`, which outlives the agent. A service manager may have started it (it waits
for the file); otherwise the agent does. It runs when it holds the lock beside the file, whoever started it,
and ends when the file is gone. Everything here takes milliseconds, but `stop`, which waits for that end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scope.relay import Grants, encode_grants
from scope_agent.wireguard.device import ApplyError

STOP_TIMEOUT = 5.0  # it looks four times a second, on a loaded machine less often
ANSWER_TIMEOUT = 10.0  # it answers between two batches; a machine may be busy
# One that ends at once is given ever more time: a port taken or a right too few is in its log, not in its
# end.
STABLE_AFTER = 5.0
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
_POLL_INTERVAL = 0.01
_ANSWER_BYTES = 64 << 20  # 10,000 pairs are 2 MB; a process gone wrong must not fill our memory


@dataclass(frozen=True, slots=True)
class SideCounters:
    """What came from one side since its grant was made, or the forwarder started."""

    id: int
    families: tuple[int, ...]  # versions of IP over which it is found now
    bytes: int  # of payload, passed on
    packets: int  # datagrams, passed on
    dropped: int  # datagrams, for whatever reason


@dataclass(frozen=True, slots=True)
class TakenPort:
    """A granted port at which the forwarder cannot listen."""

    port: int
    version: int  # of IP
    reason: str


@dataclass(frozen=True, slots=True)
class ForwarderCounters:
    """All that a forwarder tells. Counts start anew with its process."""

    pairs: tuple[tuple[SideCounters, SideCounters], ...]
    taken: tuple[TakenPort, ...]
    # Datagrams by why they were dropped: `knock` (no such token there), `stranger` (from where nobody
    # knocked), `shape` (neither WireGuard's nor a probe), `unknown` (the other side is nowhere), `rate` (over
    # the limit), `unbound` (the other side's port is taken), `unsent` (the machine did not take it).
    drops: Mapping[str, int]
    sent: Mapping[str, int]  # `batches` of as many `segments` in all, and `singles`


class ForwarderProcess:
    """The forwarder of one file of grants. `mark`: of the packets that it sends, 0 for none."""

    def __init__(self, grants_file: Path, *, mark: int = 0) -> None:
        self._file = grants_file
        self._lock = grants_file.with_suffix(".lock")
        self._socket = grants_file.with_suffix(".sock")
        self._log = grants_file.with_suffix(".log")
        self._mark = mark
        self._written: str | None = None
        self._child: int | None = None  # the pid of the one that we started
        self._started = self._start_after = self._backoff = 0.0

    def program(self, grants: Grants) -> None:
        """Relay these grants and no others, and see that somebody does. Raises ApplyError."""
        text = encode_grants(grants)
        if text != self._written or not self._file.exists():
            self._write(text)
            self._written = text
        self.ensure_running()

    def ensure_running(self) -> None:
        """Start it if it does not run; one that ended at once, after a while. Raises ApplyError."""
        if _is_locked(self._lock) or self._is_starting():
            return
        now = time.monotonic()
        if now < self._start_after:
            return
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        command = [sys.executable, "-m", "scope_dataplane.forwarder", "--grants", str(self._file)]
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A session, and no pipe and no terminal of ours: it lives on when we are gone.
            self._child = os.posix_spawn(
                sys.executable,
                [*command, "--mark", str(self._mark)],
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(self._log), append, 0o600),
                ],
                setsid=True,
            )
        except OSError as error:
            raise ApplyError(f"Starting scope-forwarder: {error.strerror}") from None
        self._started = now

    def is_running(self) -> bool:
        """Whether it serves: it holds its lock, and has the file."""
        try:
            return _is_locked(self._lock) and self._lock.stat().st_size > 0
        except FileNotFoundError:
            return False

    def counters(self) -> ForwarderCounters | None:
        """What it relayed and dropped; None where none serves. Raises ApplyError."""
        answer = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            try:
                connection.connect(str(self._socket))
                while len(answer) < _ANSWER_BYTES and (chunk := connection.recv(1 << 16)):
                    answer += chunk
            except (FileNotFoundError, ConnectionError):
                return None
            except OSError as error:
                raise ApplyError(f"Asking {self._socket}: {error}") from None
        try:
            return parse_counters(answer.decode())
        except (ValueError, KeyError, TypeError) as error:
            raise ApplyError(f"{self._socket} answers what is no list of counters: {error!r}") from None

    def stop(self) -> None:
        """Remove the file, and wait until nobody serves it any more. Raises ApplyError."""
        self._written = None
        self._file.unlink(missing_ok=True)
        if self._is_starting() and self._child is not None:
            os.kill(
                self._child, signal.SIGTERM
            )  # it may not have seen the file yet, and would wait for the next
        deadline = time.monotonic() + STOP_TIMEOUT
        while self._is_starting() or self.is_running():
            if time.monotonic() > deadline:
                raise ApplyError(f"scope-forwarder for {self._file} does not end; see {self._log}")
            time.sleep(_POLL_INTERVAL)
        self._start_after = self._backoff = 0.0
        if not _is_locked(self._lock):  # else one of a service manager waits for the next file
            self._lock.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)

    def _is_starting(self) -> bool:
        """Whether one of ours lives, and so is about to take the lock; a dead one is reaped."""
        if self._child is None:
            return False
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self._child, os.WNOHANG) == (0, 0):
                return True
        self._child = None
        now = time.monotonic()
        stable = now - self._started > STABLE_AFTER
        self._backoff = 0.0 if stable else min(max(FIRST_BACKOFF, 2 * self._backoff), LAST_BACKOFF)
        self._start_after = now + self._backoff
        return False

    def _write(self, text: str) -> None:
        """Replace the file in one step: a reader sees the old or the new one, nobody else sees either."""
        temporary = self._file.with_suffix(".new")
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            temporary.replace(self._file)
        except OSError as error:
            raise ApplyError(f"Writing {self._file}: {error.strerror}") from None


def parse_counters(text: str) -> ForwarderCounters:
    """Read what the forwarder's socket says. Raises ValueError, KeyError, TypeError."""
    document = json.loads(text)
    if document["version"] != 1:
        raise ValueError(f"version {document['version']}, where this release reads 1")
    pairs = []
    for pair in document["pairs"]:
        first, second = (
            SideCounters(
                id=int(side["id"]),
                families=tuple(map(int, side["families"])),
                bytes=int(side["bytes"]),
                packets=int(side["packets"]),
                dropped=int(side["dropped"]),
            )
            for side in pair["sides"]
        )
        pairs.append((first, second))
    taken = tuple(
        TakenPort(int(each["port"]), int(each["family"]), str(each["reason"])) for each in document["taken"]
    )
    return ForwarderCounters(
        tuple(pairs),
        taken,
        drops={str(name): int(number) for name, number in document["drops"].items()},
        sent={str(name): int(number) for name, number in document["sent"].items()},
    )


def grants_path(run_dir: Path, device: str) -> Path:
    """Where the forwarder's file of a mesh's grants lies; the unit `scope-forwarder@` says the same."""
    return run_dir / "relay" / f"{device}.json"


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
