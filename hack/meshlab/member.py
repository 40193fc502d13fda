"""One machine's agent: join, run, kill, leave, and what it says over its local socket."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import LabError, Machine
from lab.hosts import end
from lab.netns import flush_conntrack, ip_batch, load_nft, processes_in

from meshlab.names import Introduces
from meshlab.programs import await_line, program, tail

_JOIN_S = 90.0
_LEAVE_S = 120.0
DEVICE = "scope0"  # what an agent calls it unless told otherwise


@dataclass(frozen=True, slots=True)
class Reach:
    """How one agent reaches one peer. Times are monotonic seconds of this machine."""

    peer: str
    address: str | None  # IPv4, inside the mesh
    path: str  # Direct, Relayed, Routed, None
    family: str | None
    endpoint: str | None
    rtt_ms: float | None
    since: float
    handshake_s: float | None  # since WireGuard's last
    rx: int
    tx: int
    reason: str
    hub: str  # name of the ScopePeer that relays or routes, else empty
    birthday: bool = False  # direct by a port of a symmetric NAT that was guessed
    carried: bool = False  # over TCP between the hub and one of the two

    @property
    def is_direct(self) -> bool:
        return self.path == "Direct"

    @property
    def is_relayed(self) -> bool:
        return self.path == "Relayed"

    @property
    def is_routed(self) -> bool:
        return self.path == "Routed"


@dataclass(frozen=True, slots=True)
class Status:
    """What one agent says."""

    peer: str
    address: str | None
    mapping: str
    connected: bool
    device: str
    drift: int
    hub: str  # of an edge of a tree: name of the ScopePeer that it is attached to, else empty
    peers: Mapping[str, Reach]
    birthday: Mapping[str, object]  # what guessing ports took so far; empty where the mesh does not allow it

    @staticmethod
    def of(document: Mapping[str, object], *, now: float) -> Status:
        """From the answer to `status`, which came at monotonic `now`."""
        said = _Json(document)
        peers = (_reach(_Json(peer), now) for peer in said.mappings("peers"))
        return Status(
            peer=said.text("peer") or "",
            address=_ipv4(said.texts("addresses")),
            mapping=said.text("mapping") or "",
            connected=bool(_Json(said.mapping("registry")).get("connected")),
            device=_Json(said.mapping("device")).text("kind") or "",
            drift=int(_Json(said.mapping("device")).number("drift") or 0),
            hub=said.text("hub") or "",
            peers={reach.peer: reach for reach in peers},
            birthday=said.mapping("birthday"),
        )


class Member:
    """The agent of one machine in one mesh."""

    def __init__(self, machine: Machine, *, mesh: str, registry: Introduces) -> None:
        self.machine = machine
        self.mesh = mesh
        self.log = machine.directory / "agent.log"
        self.process: subprocess.Popen[str] | None = None
        self.asked_at: float | None = None
        self._connection: socket.socket | None = None
        self._received = b""
        self._arguments: Sequence[str] = ()  # of `run`
        registry.introduce(machine)

    @property
    def name(self) -> str:
        return self.machine.name

    def join(self, token: str, *, wait: bool = False, arguments: Sequence[str] = ()) -> None:
        """Join and go on as an agent; with `wait` return once the registry has taken it."""
        self.asked_at = time.monotonic()
        self._arguments = arguments
        self._start("join", "-", "--name", self.name, "--run", *arguments, said=token)
        if wait:
            self.await_joined()

    def await_joined(self) -> None:
        """Return when the registry has taken it; LabError with the end of its log when it does not."""
        assert self.process is not None
        await_line(self.process, self.log, "Joined ", within_s=_JOIN_S)

    def run(self, *arguments: str) -> None:
        """Start the agent of a machine that has joined, or is a Node."""
        self._arguments = arguments
        self._start("run", *arguments)

    def run_again(self) -> None:
        """Start the agent again after `kill`, as it ran before."""
        self._start("run", *self._arguments)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the agent, and nothing else; its device stays."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait()
        self.hang_up()

    def lose_power(self) -> None:
        """Every process of the machine is gone, and all that its kernel and /run held; its disk stays.

        The agent is not started again.
        """
        host = self.machine
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for pid in processes_in([host.namespace]):
            if pid != host.holder_pid:
                _kill(pid)
        # A TUN whose process was killed stays where it was made persistent.
        found = host.run(["ip", "-o", "link", "show", "dev", DEVICE], check=False)
        if found.returncode == 0:
            ip_batch([f"link del {DEVICE}"], inside=host.namespace)
        for family in ("-4", "-6"):
            host.run(["ip", family, "route", "flush", "type", "blackhole"], check=False)
        load_nft("flush ruleset\n", inside=host.namespace)
        flush_conntrack(host.namespace)
        host.run(["sh", "-c", "rm -rf /run/scope/* /var/run/wireguard/*"])

    def carrier_pid(self) -> int:
        """The process that carries it over TCP, or others as a hub; LabError where not just one runs."""
        found = []
        for pid in processes_in([self.machine.namespace]):
            with contextlib.suppress(OSError):  # it has ended
                if b"scope_dataplane.carrier" in Path("/proc", str(pid), "cmdline").read_bytes():
                    found.append(pid)
        if len(found) != 1:
            raise LabError(f"{self.name} has {len(found)} carriers")
        return found[0]

    def leave(self) -> None:
        """Leave the mesh: LabError when that fails."""
        self.machine.run([program("scope-agent"), "leave"], timeout=_LEAVE_S)
        self.hang_up()
        if self.process is not None:
            end([self.process])

    def joined_at(self) -> float | None:
        """When the registry's answer to the join was on disk (monotonic); None before."""
        try:
            written = (self._root() / "var/lib/scope" / self.mesh / "enrolment.json").stat().st_mtime
        except OSError:
            return None
        return written - time.time() + time.monotonic()

    def check_alive(self) -> None:
        """LabError with the end of its log when the agent has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise LabError(
                f"the agent of {self.name} ended with {self.process.returncode}:\n{tail(self.log)}"
            )

    def ask(self) -> bool:
        """Ask for the status without waiting for it; whether there is an agent to ask."""
        try:
            if self._connection is None:
                self._connection = socket.socket(socket.AF_UNIX)
                self._connection.connect(str(self._root() / "run/scope" / f"{self.mesh}.sock"))
            self._connection.sendall(b'{"command": "status"}\n')
        except OSError:
            self.hang_up()
            return False
        return True

    def answer(self, *, within_s: float = 10.0) -> Status | None:
        """The answer to `ask`; None when the agent gives none."""
        if self._connection is None:
            return None
        self._connection.settimeout(within_s)
        try:
            while b"\n" not in self._received:
                if not (more := self._connection.recv(1 << 18)):
                    raise ConnectionResetError
                self._received += more
        except OSError:
            self.hang_up()
            return None
        line, _, self._received = self._received.partition(b"\n")
        document = json.loads(line)
        return Status.of(document["status"], now=time.monotonic()) if document["ok"] else None

    def status(self) -> Status | None:
        """What the agent says now; None while there is none."""
        return self.answer() if self.ask() else None

    def hang_up(self) -> None:
        """Close the connection to the agent's local socket; the next question opens another."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._received = None, b""

    def _start(self, *arguments: str, said: str = "") -> None:
        with self.log.open("a") as log, tempfile.TemporaryFile("w+") as stdin:
            stdin.write(said + "\n")
            stdin.seek(0)
            self.process = self.machine.popen(
                [program("scope-agent"), *arguments], stdin=stdin, stdout=log, stderr=log
            )

    def _root(self) -> Path:
        # The machine's directories as its own processes see them.
        return Path("/proc", str(self.machine.holder_pid), "root")


class _Json:
    """Reads members of a JSON object as the type that they should have, else as absent."""

    def __init__(self, value: Mapping[str, object]) -> None:
        self._value = value

    def get(self, key: str) -> object:
        return self._value.get(key)

    def text(self, key: str) -> str | None:
        value = self.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> float | None:
        value = self.get(key)
        return value if isinstance(value, int | float) else None

    def mapping(self, key: str) -> Mapping[str, object]:
        value = self.get(key)
        return value if isinstance(value, dict) else {}

    def mappings(self, key: str) -> list[Mapping[str, object]]:
        value = self.get(key)
        return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []

    def texts(self, key: str) -> list[str]:
        value = self.get(key)
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _reach(peer: _Json, now: float) -> Reach:
    return Reach(
        peer=peer.text("name") or "",
        address=_ipv4(peer.texts("addresses")),
        path=peer.text("path") or "None",
        family=peer.text("family"),
        endpoint=peer.text("endpoint"),
        rtt_ms=peer.number("rttMs"),
        since=now - (peer.number("sinceSeconds") or 0.0),
        handshake_s=peer.number("lastHandshakeSeconds"),
        rx=int(peer.number("rx") or 0),
        tx=int(peer.number("tx") or 0),
        reason=peer.text("reason") or "",
        hub=peer.text("hub") or "",
        birthday=peer.get("birthday") is True,
        carried=peer.get("carried") is True,
    )


def _ipv4(addresses: Sequence[str]) -> str | None:
    return next((address for address in addresses if ":" not in address), None)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
