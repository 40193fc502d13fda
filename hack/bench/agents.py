"""Meshes to measure: a lab, its registry, agents on its machines, and the times until they reach each other.

All times are of this process's monotonic clock. Agents are the installed programs, with bytecode that is
compiled already, as an installer leaves it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab import Host, Lab, Machine, Nat
from meshlab import PRIVATE, Flow, Member, Pinger, Registry, Status, Watch, mesh_document

MESH = "bench"
FAR_MS = 10.0  # each way on each uplink: 40 ms round trip between two sites
POLL_S = 0.01  # between two questions to an agent while a time is taken: the resolution of these times
PING_S = 0.01  # likewise between two pings
PATIENCE_S = 30.0  # an attempt that takes longer counts as never
SETTLE_S = 60.0  # for a mesh to be whole before anything is measured
SAVED_S = 2.0  # an agent of a small mesh writes what it learned to disk within a second
REST_S = 1.0  # between two attempts, for what the last one stirred up to come to rest

BYTECODE = Path("build/bench/bytecode").absolute()


class BenchError(Exception):
    """What was to be measured could not be set up; the message says what was missing."""


@dataclass(slots=True)
class World:
    """A lab with a registry, agents that join one mesh, and pings between them."""

    lab: Lab
    registry: Registry
    pinger: Pinger
    token: str
    members: list[Member] = field(default_factory=list)
    flows: dict[tuple[str, str], Flow] = field(default_factory=dict)  # by names, from and to
    addresses: dict[str, str] = field(default_factory=dict)  # inside the mesh, by name

    def member(self, name: str, nat: Nat, *, ipv6: bool | None = None) -> Member:
        """A machine behind a NAT of its own, not joined yet."""
        return self.member_on(self.lab.site(f"{name}-site", nat=nat, ipv6=ipv6).machine(name))

    def member_on(self, machine: Machine) -> Member:
        """A member on a machine, not joined yet."""
        member = Member(machine, mesh=MESH, registry=self.registry)
        self.members.append(member)
        return member

    def settle(self, *, within_s: float = SETTLE_S) -> None:
        """Return when every pair that can be direct says so; BenchError when that takes too long."""
        watch = Watch(self.members)
        deadline = time.monotonic() + within_s
        while True:
            watch.look()
            missing = [
                f"{pair.source.name} -> {pair.target.name}"
                for pair in watch.pairs.values()
                if pair.obstacle is None and not pair.is_direct
            ]
            if not missing and len(watch.pairs) == len(self.members) * (len(self.members) - 1):
                break
            for member in self.members:
                member.check_alive()
            if time.monotonic() > deadline:
                raise BenchError(
                    f"not direct within {within_s:g} s: {', '.join(missing) or 'not all joined'}"
                )
            time.sleep(0.1)
        for name, status in watch.statuses.items():
            self._note(name, status)

    def flow(self, source: Member, target: Member) -> Flow:
        """The pings from one to the other, started if need be; both have joined."""
        key = (source.name, target.name)
        if key not in self.flows or self.flows[key].address != self.addresses[target.name]:
            if key in self.flows:
                self.pinger.stop(self.flows[key])
            self.flows[key] = self.pinger.flow(source.machine, self.addresses[target.name])
        return self.flows[key]

    def await_ping(self, flow: Flow, *, within_s: float = PATIENCE_S) -> float | None:
        """When the first answer since the flow's last restart came; None when none does."""
        deadline = time.monotonic() + within_s
        while flow.first is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return flow.first

    def await_direct(self, source: Member, target: Member, *, within_s: float = PATIENCE_S) -> float | None:
        """When one first says that its path to the other is direct; None when it does not."""
        return self.await_path(source, target, direct=True, within_s=within_s)

    def await_path(
        self, source: Member, target: Member, *, direct: bool, within_s: float = PATIENCE_S
    ) -> float | None:
        """When one first says that its path to the other is direct, or that it is not."""
        deadline = time.monotonic() + within_s
        while (now := time.monotonic()) < deadline:
            if self.is_direct(source, target) is direct:
                return time.monotonic()
            time.sleep(max(0.0, POLL_S - (time.monotonic() - now)))
        return None

    def is_direct(self, source: Member, target: Member) -> bool:
        """What an agent says of its path to a member: False also while it says nothing."""
        status = self.ask(source)
        if status is None:
            return False
        reach = next((r for r in status.peers.values() if r.address == self.addresses.get(target.name)), None)
        return reach is not None and reach.is_direct

    def ask(self, member: Member) -> Status | None:
        """What an agent says now; None while it says nothing."""
        status = member.status()
        if status is not None:
            self._note(member.name, status)
        return status

    def time_to_direct(self, member: Member, other: Member, start: Callable[[], None]) -> float | None:
        """Seconds from `start` until both say Direct and a ping each way was answered."""
        began = time.monotonic()
        for flow in (self.flows.get((member.name, other.name)), self.flows.get((other.name, member.name))):
            if flow is not None:
                self.pinger.restart(flow)
        start()
        deadline = began + PATIENCE_S
        waiting = [(member, other), (other, member)]
        reached = began
        while waiting and time.monotonic() < deadline:
            asked = time.monotonic()
            for pair in list(waiting):
                if self.is_direct(*pair):
                    waiting.remove(pair)
                    reached = time.monotonic()
            time.sleep(max(0.0, POLL_S - (time.monotonic() - asked)))
        if waiting:
            return None
        answers = [self.await_ping(self.flow(*pair)) for pair in ((member, other), (other, member))]
        arrived = [answer for answer in answers if answer is not None]
        return max(reached, *arrived) - began if len(arrived) == 2 else None

    def _note(self, name: str, status: Status) -> None:
        if status.address is not None:
            self.addresses[name] = status.address


@contextlib.contextmanager
def world(
    *, delay_ms: float = FAR_MS, ping_s: float = PING_S, spec: dict[str, object] | None = None
) -> Iterator[World]:
    """A lab with a serving registry and an empty mesh. `spec` replaces fields of the mesh's spec."""
    prepare_programs()
    # Pings never slow down: each flow is there to tell a time by.
    pinging = Pinger(eager_s=ping_s, calm_s=ping_s, patience_s=float("inf"))
    with Lab(delay_ms=delay_ms, private=PRIVATE) as lab, pinging as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, **(spec or {})))
        yield World(lab, registry, pinger, registry.token(MESH))


@contextlib.contextmanager
def pair(
    nat: Nat = Nat.PORT_RESTRICTED, *, ipv6: bool | None = None
) -> Iterator[tuple[World, Member, Member]]:
    """A world with two members that are direct, with pings running both ways."""
    with world() as here:
        first, second = here.member("first", nat, ipv6=ipv6), here.member("second", nat, ipv6=ipv6)
        for member in (first, second):
            member.join(here.token)
        here.settle()
        for flow in (here.flow(first, second), here.flow(second, first)):
            if here.await_ping(flow) is None:
                raise BenchError("the pair is direct, but no ping comes back")
        yield here, first, second


AGENT_MODULES = (
    "scope_agent.__main__, scope.registry.http, scope_dataplane.wireguard, scope_dataplane.carrier, pyroute2"
)


def prepare_programs(modules: str = AGENT_MODULES) -> None:
    """Have the bytecode of what runs compiled before anything is timed, and let every child use it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(BYTECODE)
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)


def spawn(
    host: Host,
    module: str,
    *arguments: str,
    log: Path,
    path: Sequence[Path] = (),
    inside: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start one of the project's modules in a host; `path` goes before the installed packages.

    `inside`: the words of a command that starts another one elsewhere, as in a pod.
    """
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, path))}
    with log.open("a") as output:
        return host.popen(
            [*inside, sys.executable, "-m", module, *arguments], env=environment, stdout=output, stderr=output
        )
