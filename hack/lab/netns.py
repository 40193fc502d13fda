"""Network namespaces: making, entering, configuring and removing them.

A namespace is named under `/run/netns`, as `ip netns` names it. Code runs inside one by way of a
thread that enters it and ends (`call_in`): the network namespace belongs to the thread, so the rest
of the process stays where it is, sockets made inside stay inside, and programs started inside
inherit it without a further process in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

NETNS = Path("/run/netns")
# Program -> the Debian package that brings it.
_TOOLS = {
    "ip": "iproute2",
    "nft": "nftables",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
}

T = TypeVar("T")

_CLONE_NEWNET = 0x4000_0000
_NETLINK_NETFILTER = 12
# nfnetlink_conntrack.h: subsystem CTNETLINK (1), message IPCTNL_MSG_CT_DELETE (2); without a tuple it
# deletes every entry, as `conntrack -F` does, so the lab does not need that program.
_CT_DELETE = 1 << 8 | 2
_NLM_F_REQUEST_ACK = 1 | 4
# Generous: one invocation does milliseconds of work, but the machine may be busy.
_TOOL_TIMEOUT_S = 60.0


class LabError(Exception):
    """The lab could not do what was asked; the message says what to change."""


def require_tools() -> None:
    """LabError unless this process is root on a machine that has what the lab runs."""
    if os.geteuid() != 0:
        raise LabError("the lab makes network namespaces: run it as root, or with sudo")
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise LabError(f"programs are missing: install {' '.join(missing)}")


def call_in(name: str, act: Callable[[], T]) -> T:
    """What `act` returns or raises when run inside the namespace `name`."""

    def body() -> T:
        _enter(name)
        return act()

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(body).result()


def ip_batch(lines: Sequence[str], *, inside: str | None = None) -> None:
    """Run `ip` commands (without the word `ip`) in one process; LabError names the one that failed."""
    if not lines:
        return
    _feed(["ip", "-batch", "-"], "\n".join(lines) + "\n", inside=inside)


def load_nft(script: str, *, inside: str) -> None:
    """Load an nftables script as one transaction."""
    _feed(["nft", "-f", "-"], script, inside=inside)


def write_sysctls(name: str, values: dict[str, str]) -> None:
    """Set sysctls of a namespace: keys are paths below /proc/sys, values are written as they are."""

    def act() -> None:
        for key, value in values.items():
            Path("/proc/sys", key).write_text(value)

    call_in(name, act)


def flush_conntrack(name: str) -> None:
    """Forget every tracked connection of a namespace."""

    def act() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as kernel:
            body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
            header = struct.pack("=IHHII", 16 + len(body), _CT_DELETE, _NLM_F_REQUEST_ACK, 1, 0)
            kernel.sendto(header + body, (0, 0))
            (error,) = struct.unpack_from("=i", kernel.recv(4096), 16)
        if error:
            raise LabError(f"the kernel did not flush the connections of {name}: {os.strerror(-error)}")

    call_in(name, act)


def names_with(prefix: str) -> list[str]:
    """The namespaces whose name begins so."""
    if not NETNS.is_dir():
        return []
    return sorted(entry.name for entry in NETNS.iterdir() if entry.name.startswith(prefix))


def processes_in(names: Iterable[str]) -> list[int]:
    """The processes that live in one of these network namespaces."""
    inodes = _inodes(names)
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _namespace_of(entry) in inodes]


def kill_inside(names: Sequence[str], *, within_s: float = 30.0) -> None:
    """Kill what lives in these namespaces, and what it starts meanwhile, until nothing does.

    LabError when something is still there after `within_s`: even what is killed ends no sooner than the
    scheduler lets each of its threads run.
    """
    deadline = time.monotonic() + within_s
    inodes = _inodes(names)
    while left := processes_in(names):
        if time.monotonic() > deadline:
            raise LabError(f"processes {left} in namespaces of the lab do not die: look at them with ps")
        with contextlib.ExitStack() as handles:
            killed = [handle for pid in left if (handle := _killed(pid, inodes, handles)) is not None]
            for handle in killed:
                # A dying process leaves its namespaces before it has ended; the handle is ready at its end.
                ended = select.poll()
                ended.register(handle, select.POLLIN)
                ended.poll(max(0.0, deadline - time.monotonic()) * 1e3)


def remove(names: Sequence[str]) -> None:
    """Remove namespaces. One that is gone already is none of our business."""
    present = [name for name in names if (NETNS / name).exists()]
    ip_batch([f"netns del {name}" for name in present])


def _enter(name: str) -> None:
    try:
        descriptor = os.open(NETNS / name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LabError(f"there is no namespace {name}: its lab is closed, or was cleaned away") from None
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")
    finally:
        os.close(descriptor)


def _feed(argv: Sequence[str], text: str, *, inside: str | None) -> None:
    def act() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, input=text, text=True, capture_output=True, timeout=_TOOL_TIMEOUT_S, check=False
        )

    done = call_in(inside, act) if inside else act()
    if done.returncode == 0:
        return
    numbered = "\n".join(f"{number:4} {line}" for number, line in enumerate(text.splitlines(), 1))
    raise LabError(f"{' '.join(argv)} in {inside or 'the host'}: {done.stderr.strip()}\n{numbered}")


def _inodes(names: Iterable[str]) -> set[tuple[int, int]]:
    inodes: set[tuple[int, int]] = set()
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(NETNS / name)
            inodes.add((status.st_dev, status.st_ino))
    return inodes


def _namespace_of(pid: str | int) -> tuple[int, int] | None:
    try:
        status = os.stat(f"/proc/{pid}/ns/net")
    except OSError:  # it ended, or is a zombie
        return None
    return status.st_dev, status.st_ino


def _killed(pid: int, inodes: set[tuple[int, int]], handles: contextlib.ExitStack) -> int | None:
    """A handle on a process that was inside and is dying now, to be closed with `handles`."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        handles.callback(os.close, handle)
        # Looked at again through a handle on it: the number may have gone to another process.
        if _namespace_of(pid) in inodes:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            return handle
    return None
