"""A process of the dataplane as the agent sees it: a file that programs it, and a lock that it holds.

It outlives the agent. A service manager may have started it (it waits for the file); otherwise the agent
does. It runs when it holds the lock beside the file, whoever started it; it writes into the locked file once
it has read the other, and ends when that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path

from scope_agent.files import replace_file
from scope_agent.wireguard.device import ApplyError

# The first restart is immediate. One that ends at once is given ever more time: a port taken or a right too
# few is in its log, not in its end.
STABLE_AFTER = 5.0
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
_POLL_INTERVAL = 0.005


class DataplaneProcess:
    """The program `scope-NAME`, whose module is `scope_dataplane.NAME`, for one file."""

    def __init__(self, name: str, file: Path, *arguments: str) -> None:
        self.file = file
        self.lock = file.with_suffix(".lock")
        self.log = file.with_suffix(".log")
        self.socket = file.with_suffix(".sock")
        self._program = f"scope-{name}"
        self._command = [sys.executable, "-m", f"scope_dataplane.{name}", *arguments]
        self._child: int | None = None  # the pid of the one that we started
        self._started = self._start_after = self._backoff = 0.0

    def write(self, text: str) -> None:
        """Replace the file, which a running process reads again by itself. Raises ApplyError."""
        try:
            self._make_directory()
            replace_file(self.file, [text], durable=False)
        except OSError as error:
            raise ApplyError(f"Writing {self.file}: {error.strerror}") from None

    def ensure_running(self) -> None:
        """Start it if nobody holds the lock; one that ends at once, ever more rarely. Raises ApplyError."""
        if is_locked(self.lock) or self._is_starting():
            return
        now = time.monotonic()
        if now < self._start_after:
            return
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        try:
            self._make_directory()
            # A session, and no pipe and no terminal of ours: it lives on when we are gone.
            self._child = os.posix_spawn(
                self._command[0],
                self._command,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(self.log), append, 0o600),
                ],
                setsid=True,
            )
        except OSError as error:
            raise ApplyError(f"Starting {self._program}: {error.strerror}") from None
        self._started = now

    def is_running(self) -> bool:
        """Whether it serves: it holds its lock, and has the file."""
        try:
            return is_locked(self.lock) and self.lock.stat().st_size > 0
        except FileNotFoundError:
            return False

    def ask(self, timeout: float, *, most: int) -> str:
        """What it says on the socket beside the file, about `most` bytes. Raises OSError, ValueError."""
        answer = bytearray()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(self.socket))
            while len(answer) < most and (chunk := connection.recv(1 << 16)):
                answer += chunk
        return answer.decode()

    def end(self, timeout: float, *, terminate: bool) -> None:
        """Remove the file, and wait until nobody serves it any more. Raises ApplyError.

        One of ours that never saw the file would wait for the next: `terminate` ends it by signal. Not for a
        process that is to end others before itself.
        """
        self.file.unlink(missing_ok=True)
        if terminate and self._is_starting() and self._child is not None:
            os.kill(self._child, signal.SIGTERM)
        deadline = time.monotonic() + timeout
        while self.is_running() or (terminate and self._is_starting()):
            if time.monotonic() > deadline:
                raise ApplyError(f"{self._program} for {self.file} does not end; see {self.log}")
            time.sleep(_POLL_INTERVAL)
        self._is_starting()  # it has ended: reap it
        self._start_after = self._backoff = 0.0

    def forget(self) -> None:
        """Remove what it left behind; not the lock that one of a service manager holds."""
        if not is_locked(self.lock):
            self.lock.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)

    def _is_starting(self) -> bool:
        """Whether one of ours lives, and so is about to take the lock; a dead one is reaped."""
        if self._child is None:
            return False
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(self._child, os.WNOHANG) == (0, 0):
                return True
        self._child = None
        now = time.monotonic()
        if now - self._started > STABLE_AFTER:
            self._backoff = 0.0
        self._start_after = now + self._backoff
        self._backoff = min(max(FIRST_BACKOFF, 2 * self._backoff), LAST_BACKOFF)
        return False

    def _make_directory(self) -> None:
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def is_locked(path: Path) -> bool:
    """Whether a process holds that file locked."""
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
