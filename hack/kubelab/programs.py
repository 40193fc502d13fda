"""The programs of a control plane: where they are, and one process that may be started many times."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket as sockets
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

ROOT = Path(__file__).parents[2]
# hack/setup.sh points it to what it has built.
BUILT = ROOT / "build" / "kube"
_HELM = ROOT / "build" / "helm"
_NODE = ROOT / "build" / "node"
_DNS = ROOT / "build" / "dns"
_POLL_S = 0.02  # how often a start or an end is looked at: far below what either takes
_LOG_TAIL = 15  # lines of a program's log in an error


class KubeLabError(Exception):
    """The control plane could not do what was asked; the message says what to change."""


class Where(Protocol):
    """Where programs run: a host of the lab, or this machine."""

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[str] | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[str] | IO[bytes] | None = None,
        stderr: int | IO[str] | IO[bytes] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program as leader of its own session. Pipes are text."""
        ...

    def socket(self, family: int = sockets.AF_INET, kind: int = sockets.SOCK_STREAM, /) -> sockets.socket:
        """A socket of that place's network, for use in this very process."""
        ...


class ThisMachine:
    """No namespace at all: this process's own network."""

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[str] | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[str] | IO[bytes] | None = None,
        stderr: int | IO[str] | IO[bytes] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program as leader of its own session. Pipes are text."""
        return subprocess.Popen(
            argv, env=env, stdin=stdin, stdout=stdout, stderr=stderr, text=True, start_new_session=True
        )

    def socket(self, family: int = sockets.AF_INET, kind: int = sockets.SOCK_STREAM, /) -> sockets.socket:
        """A socket of this process's own network."""
        return sockets.socket(family, kind)


def kubernetes_program(name: str) -> str:
    """The path of a program that hack/setup.sh builds; KubeLabError where it is not built."""
    return _built((_HELM if name == "helm" else BUILT) / name, purpose="test")


def node_program(name: str) -> str:
    """The path of a program of Nodes that hack/setup.sh builds; KubeLabError where it is not built."""
    return _built((_DNS if name == "coredns" else _NODE) / name, purpose="e2e")


def _built(path: Path, *, purpose: str) -> str:
    if not path.is_file():
        raise KubeLabError(f"{path} is missing: run `hack/setup.sh {purpose}`, which builds it once")
    return str(path)


def system_program(name: str) -> str:
    """The path of a program that hack/setup.sh installs; KubeLabError where it is missing."""
    found = shutil.which(name)
    if found is None:
        raise KubeLabError(f"{name} is missing: run `hack/setup.sh test`, which installs it")
    return found


def tail(log: Path) -> str:
    """The last lines of a log."""
    if not log.exists():
        return "(no log)"
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])


class Program:
    """One process: started, ended in every way, started again.

    It ends with the thread that started it, unless it `outlives` that and is ended with its host of the lab.
    `is_ready` is asked until it says yes, after each start. The log holds all of its starts.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        where: Where,
        log: Path,
        is_ready: Callable[[], Awaitable[bool]],
        env: Mapping[str, str] | None = None,
        outlives: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._argv = argv
        self._where = where
        self._is_ready = is_ready
        self._env = env
        self._outlives = outlives
        self._child: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """The process as it runs now; KubeLabError when it does not."""
        return self._running().pid

    @property
    def is_running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    async def start(self, *, within_s: float = 60.0) -> float:
        """Start it and wait until it is ready: the seconds that took.

        KubeLabError with the log's end when it ends or is not ready in time.
        """
        if self.is_running:
            raise KubeLabError(f"{self.name} runs already")
        started = time.monotonic()
        with self.log.open("a") as log:
            # Should this process be killed, its programs go with it.
            bound = [] if self._outlives else ["setpriv", "--pdeathsig", "KILL", "--"]
            argv = [*bound, *self._argv]
            self._child = self._where.popen(argv, env=self._env, stdout=log, stderr=log)
        while not await self._is_ready():
            if (code := self._child.poll()) is not None:
                raise KubeLabError(f"{self.name} ended with {code}:\n{tail(self.log)}")
            if time.monotonic() - started > within_s:
                raise KubeLabError(f"{self.name} was not ready within {within_s:g} s:\n{tail(self.log)}")
            await asyncio.sleep(_POLL_S)
        return time.monotonic() - started

    async def stop(self, *, grace_s: float = 20.0) -> None:
        """End it in an orderly way; KubeLabError when it has not ended after `grace_s`."""
        child = self._running()
        child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while child.poll() is None:
            if time.monotonic() > deadline:
                raise KubeLabError(f"{self.name} did not end within {grace_s:g} s:\n{tail(self.log)}")
            await asyncio.sleep(_POLL_S)

    def kill(self) -> None:
        """End it as a crash would. What has ended already is left alone."""
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGKILL)
        self._child.wait()

    def freeze(self) -> None:
        """Let it do nothing at all; its connections stay open."""
        self._running().send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        self._running().send_signal(signal.SIGCONT)

    def resident_bytes(self) -> int:
        """The memory it has now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """The processor time it has taken since its start."""
        # The command may hold spaces and brackets; user and system time are fields 14 and 15.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            raise KubeLabError(f"{self.name} does not run:\n{tail(self.log)}")
        return self._child
