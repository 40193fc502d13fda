"""What processes of the dataplane do alike: a lock, a bounded log, a socket that tells, sockets for data."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import stat
import sys
import time

LOCK_TIMEOUT = 1.0  # somebody may hold it for an instant, to see whether it is free
LOG_BYTES = 256 << 10  # beyond this the log starts afresh

# Of a socket, both ways: what comes while a thousand grants are read (10 ms) at 1 Gbit/s. The kernel counts
# its own bookkeeping too, which for batches is little and for single datagrams the larger part.
SOCKET_BYTES = 4 << 20

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33


def take_lock(path: str) -> int | None:
    """Lock the file until this process ends; None where another one holds it."""
    descriptor = _open_lock(path)
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


def await_lock(path: str) -> int:
    """Lock the file until this process ends, once whoever holds it has ended."""
    descriptor = _open_lock(path)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _open_lock(path: str) -> int:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


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


def listen_at(path: str, backlog: int) -> socket.socket:
    """A Unix socket for root alone. Whoever held the lock before may have left one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)
    try:
        listening.bind(path)
        listening.listen(backlog)
    except OSError as error:
        listening.close()
        reason = error.strerror or f"{error}: put the file beside it at a shorter path"
        raise OSError(f"{path}: {reason}") from None
    finally:
        os.umask(before)
    return listening


def parse_mark(text: str) -> int:
    """An argument in the notations that `ip` takes, as 51820 or 0xca6c."""
    value = int(text, 0)
    if not 0 <= value < 1 << 32:
        raise ValueError
    return value


def can_mark(mark: int) -> bool:
    """Whether we may mark packets."""
    if mark == 0:
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        except PermissionError:
            return False
    return True


def enlarge_buffers(opened: socket.socket) -> None:
    """Room for SOCKET_BYTES both ways; without the right to it as much as the system allows."""
    for force, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            opened.setsockopt(socket.SOL_SOCKET, force, SOCKET_BYTES)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, plain, SOCKET_BYTES)


def raise_descriptors() -> None:
    """As many open descriptors as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
