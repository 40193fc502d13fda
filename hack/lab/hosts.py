"""A host of the lab: a network namespace with processes, sockets and directories of its own.

Besides its network namespace a host has one mount namespace, in which each directory that programs
share machine-wide (`/var/run/wireguard`: control sockets by interface name) is an empty tmpfs. A
sleeping process holds it open, and every process of the host joins it, so that a user-space WireGuard
started by one is found by another, while two hosts may both have a `scope0`.

Processes are started in a session of their own. Ending a host ends exactly those, and what they left
behind in the host's network namespace.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket as sockets
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import IO

from lab.netns import NETNS, LabError, call_in

PRIVATE_DIRECTORIES = ("/var/run/wireguard",)

Redirection = int | IO[str] | IO[bytes] | None


class Host:
    """A machine or a server: run programs in it, open sockets in it, ask for its addresses.

    `directory` is a fresh directory for whatever the host's programs keep; it goes with the lab.
    """

    def __init__(self, name: str, *, namespace: str, directory: Path, private: Sequence[str]) -> None:
        self.name = name
        self.namespace = namespace
        self.directory = directory
        self.ipv4: IPv4Address | None = None
        self.ipv6: IPv6Address | None = None
        self._children: list[subprocess.Popen[str]] = []
        directory.mkdir(mode=0o700, parents=True)
        self._holder = call_in(namespace, lambda: _hold_mounts(private))

    def addresses(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """The host's addresses, IPv6 first; link-local ones are not among them."""
        return tuple(address for address in (self.ipv6, self.ipv4) if address is not None)

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: Redirection = subprocess.DEVNULL,
        stdout: Redirection = None,
        stderr: Redirection = None,
    ) -> subprocess.Popen[str]:
        """Start a program in the host, as leader of its own session; the lab's end is its end.

        `env` replaces this process's environment, `cwd` its working directory. Pipes are text.
        """
        child = subprocess.Popen(
            [*enter_argv(self.namespace, self.holder_pid, cwd=cwd or Path.cwd()), *argv],
            env=env,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        self._children = [known for known in self._children if known.returncode is None]
        self._children.append(child)
        return child

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 120.0,  # of what hangs: a start of Python takes long where many wait for a processor
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the host to its end, with its output captured as text.

        LabError with its output when it fails and `check` is set; subprocess.TimeoutExpired after
        `timeout` seconds, with the program and its children killed.
        """
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        pipe = subprocess.PIPE
        child = self.popen(argv, env=env, cwd=cwd, stdin=stdin, stdout=pipe, stderr=pipe)
        try:
            out, err = child.communicate(input, timeout=timeout)
        except BaseException:
            signal_group(child, signal.SIGKILL)
            child.communicate()
            raise
        if check and child.returncode != 0:
            raise LabError(f"{' '.join(argv)} in {self.name} ended with {child.returncode}:\n{out}{err}")
        return subprocess.CompletedProcess(list(argv), child.returncode, out, err)

    def socket(self, family: int = sockets.AF_INET, kind: int = sockets.SOCK_DGRAM) -> sockets.socket:
        """A socket that lives in the host's network, for use in this very process."""
        return call_in(self.namespace, lambda: sockets.socket(family, kind))

    @property
    def holder_pid(self) -> int:
        """The process that holds the host's mount namespace open."""
        return self._holder.pid

    def wait_ready(self) -> None:
        """Return when the private directories are there; LabError when they cannot be made."""
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise LabError(f"{self.name} got no private directories: is mounting allowed here?")
        self._holder.stdout.close()

    def children(self) -> list[subprocess.Popen[str]]:
        """Every process that the lab started in this host and has not seen the end of; the holder last."""
        return [*(child for child in self._children if child.returncode is None), self._holder]


def enter_argv(namespace: str, holder: int, *, cwd: str | Path) -> list[str]:
    """The words before a command that make it run in a host's namespaces, in directory `cwd`.

    Joining a mount namespace resets the working directory, hence `env`.
    """
    into = [f"--net={NETNS / namespace}", f"--mount=/proc/{holder}/ns/mnt"]
    return ["nsenter", *into, "--", "env", f"--chdir={cwd}"]


def end(children: Iterable[subprocess.Popen[str]], *, grace_s: float = 1.0) -> None:
    """End processes and their groups: asked first, killed once `grace_s` is over, reaped in any case."""
    alive = [child for child in children if child.poll() is None]
    for child in alive:
        signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for child in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in alive:
        signal_group(child, signal.SIGKILL)
        child.wait()


def signal_group(child: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a child's process group, as long as the child is not reaped and its number is its own."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def _hold_mounts(private: Sequence[str]) -> subprocess.Popen[str]:
    for directory in private:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    mounts = " && ".join(
        f"mount -t tmpfs -o mode=0700 lab {os.path.realpath(directory)}" for directory in private
    )
    script = f"{mounts or ':'} && echo ready && exec sleep infinity >/dev/null"
    # Slave: namespaces that the lab makes later still appear inside, nothing mounted inside leaks out.
    return subprocess.Popen(
        ["unshare", "--mount", "--propagation", "slave", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd="/",
    )
