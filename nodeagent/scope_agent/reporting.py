"""When our report is written to the registry: what others wait for at once, what changed together as one.

One report is in flight at a time. The next is held to what the registry holds of us, whoever wrote that, so
the same thing is never said twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from scope.model import Peer, PeerReport, PublicKey, Snapshot
from scope.registry.port import Fact, Listed, Put
from scope_agent.desired import is_news
from scope_agent.paths.core import Changes, PathsView

# Endpoints and mapping, and an identity where keys are required: others wait for them. Bursts make one write.
URGENT = 0.05
# Of the ladder's report bound, for paths: one write while a mesh forms or falls back. Every peer reads every
# other's report, so the larger the mesh, the longer changes are gathered.
LINKS, PER_PEER, LONGEST = 0.15, 0.005, 0.6
LATENCY = 30.0  # latencies alone
RETRY_MIN = 1.0  # after a failed write, and while no mesh is known
RETRY_MAX = 6.0  # jittered by half: a report is known ten seconds after an outage of the registry


class Viewed(Protocol):
    """Whoever knows how peers are reached."""

    def view(self, now: float) -> PathsView:
        """All paths."""


class Reporting:
    """The pace of our reports. `own` is our WireGuard key, `random` draws from [0, 1)."""

    def __init__(self, *, own: PublicKey, written: PeerReport | None, random: Callable[[], float]) -> None:
        self._own = own
        self._random = random
        self._written = written
        self._writing: PeerReport | None = None
        self._at: float | None = None
        self._retry = RETRY_MIN
        self._is_due = True
        self._is_awaited = False
        self.error = ""  # why the last write failed

    def expect(self, *, is_awaited: bool = False) -> None:
        """Something may be worth a report; `is_awaited`: others can send us nothing before they have it."""
        self._is_due = True
        self._is_awaited |= is_awaited

    def receive(self, fact: Fact) -> None:
        """Take what the registry holds of us, unless a write of ours is under way."""
        if self._writing is not None:
            return
        resources = (
            fact.resources if isinstance(fact, Listed) else (fact.resource,) if isinstance(fact, Put) else ()
        )
        for resource in resources:
            if not isinstance(resource, Peer) or resource.report is None:
                continue
            if resource.report.keys.wireguard == self._own:
                self._written = resource.report

    def observe(self, changes: Changes, *, paths: Viewed, snapshot: Snapshot, now: float) -> None:
        """Take what changed, and put the next report on time for it."""
        if self._is_due or changes.own or changes.moved:
            self._write_after(self._delay(paths, snapshot, now), now)
            self._is_due = self._is_awaited = False
        elif changes.pairs and self._at is None:
            self._write_after(LATENCY, now)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return self._at if self._writing is None else None

    def handle_timer(self, now: float) -> bool:
        """Whether a report is to be made now; asked again, it is not."""
        if self._at is None or now < self._at or self._writing is not None:
            return False
        self._at = None
        return True

    def take(self, wanted: PeerReport) -> bool:
        """Whether a report that was made is to be written: until `applied` or `failed` it is in flight."""
        if not is_news(wanted, self._written):
            return False
        self._writing = wanted
        return True

    def applied(self) -> None:
        """The report was written."""
        self._written, self._writing = self._writing, None
        self._is_due = True
        self.error, self._retry = "", RETRY_MIN

    def failed(self, error: str, now: float) -> None:
        """The report was not written."""
        self._writing, self.error = None, error
        self._at = now + self._retry * (0.5 + self._random())
        self._retry = min(2 * self._retry, RETRY_MAX)

    def _write_after(self, delay: float, now: float) -> None:
        at = now + delay * (0.8 + 0.4 * self._random())
        if self._at is None or at < self._at:
            self._at = at

    def _delay(self, paths: Viewed, snapshot: Snapshot, now: float) -> float:
        if self.error:
            return self._retry
        if self._is_awaited or self._owes_endpoints(paths, now):
            return URGENT
        mesh = snapshot.mesh
        if mesh is None:
            return RETRY_MIN
        return min(LINKS + PER_PEER * len(snapshot.peers), LONGEST) * mesh.spec.timers.report

    def _owes_endpoints(self, paths: Viewed, now: float) -> bool:
        """Whether others cannot reach us by what is written."""
        view, written = paths.view(now), self._written
        return written is None or (view.candidates, view.mapping) != (written.endpoints, written.mapping)
