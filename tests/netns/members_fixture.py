"""What tests of meshes with hubs share: members, how they reach each other, and pings between two."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from lab import Lab
from meshlab import Member, Reach

# The ladder, made short: the reason stands in status when its last rung is reached.
SHORT_TIMERS = {
    "probeInterval": "500ms",
    "addressFallback": "1s",
    "report": "2s",
    "connectBack": "3s",
    "hubFallback": "5s",
}


@dataclass(frozen=True, slots=True)
class Members:
    """The mesh of a file, named `mesh`; `within_s` is far above what anything takes that is waited for."""

    lab: Lab
    mesh: str
    members: dict[str, Member]
    within_s: float

    def reach(self, name: str, other: str) -> Reach | None:
        """How one says to reach the other."""
        status = self.members[name].status()
        return status.peers.get(f"{self.mesh}.external.{other}") if status is not None else None

    def until(self, done: Callable[[], bool], what: str, *, within_s: float | None = None) -> None:
        """Wait for a state of the mesh."""
        patience = self.within_s if within_s is None else within_s
        end = time.monotonic() + patience
        while not done():
            for member in self.members.values():
                member.check_alive()
            assert time.monotonic() < end, f"not within {patience:g} s: {what}; {self.describe()}"
            time.sleep(0.1)

    def describe(self) -> str:
        """How each says to reach each other one."""
        pairs = [(name, other) for name in self.members for other in self.members if other != name]
        return "; ".join(f"{name}: {self.reach(name, other)}" for name, other in pairs)

    def ping_from(self, source: str, target: str, *options: str) -> subprocess.Popen[str]:
        """Ping from one to the other through the mesh, with times."""
        status = self.members[target].status()
        assert status is not None and status.address is not None
        argv = ["ping", "-D", "-O", "-n", "-W", "3", *options, status.address]
        return self.members[source].machine.popen(argv, stdout=subprocess.PIPE)
