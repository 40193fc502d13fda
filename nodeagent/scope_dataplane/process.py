"""What every process of the dataplane does alike: hold its lock, and speak into a log that is bounded."""

from __future__ import annotations

import fcntl
import os
import stat
import sys
import time

LOCK_TIMEOUT = 1.0  # somebody may hold it for an instant, to see whether it is free
LOG_BYTES = 256 << 10  # beyond this the log starts afresh


def take_lock(path: str) -> int | None:
    """Lock the file until this process ends; None where another one holds it."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        else:
            return descriptor


def log(program: str, event: str) -> None:
    """One line to standard error, which the agent points at a file beside the one that it writes."""
    try:
        found = os.fstat(2)
        if stat.S_ISREG(found.st_mode) and found.st_size > LOG_BYTES:
            os.ftruncate(2, 0)
        sys.stderr.write(f"{program}: {event}\n")
        sys.stderr.flush()
    except OSError:
        pass  # a full disk or a closed terminal ends no tunnel and no relaying
