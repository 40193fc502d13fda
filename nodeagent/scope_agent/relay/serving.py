"""A hub's side towards its agent: what the machine is to relay, and whom to tell once it does. Pure.

A side that is told knocks at once, so it is told only when its grant is in the rules: what is to be said
waits for the machine to have taken what was decided before. One application is in flight at a time, and the
next one is of the newest grants, so many that ask at once make few.

Grants live by the wall clock. It is read once, at the start: it may jump later, and no grant ends for that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from scope.model import Forwarding, Hubs, PublicKey, RelayReport
from scope.relay import Grants
from scope.wire import AskRelay
from scope_agent.relay.counting import Counted, Relayed, relayed
from scope_agent.relay.granting import Granting, Telling


@dataclass(frozen=True, slots=True)
class Apply:
    """Relay these grants; None: be no hub."""

    grants: Grants | None


class Serving:
    """`random` draws from [0, 1), `earlier` is what the last run kept, `wall` the wall clock at `now`."""

    def __init__(
        self, *, random: Callable[[], float], earlier: Grants | None, now: float, wall: float
    ) -> None:
        self._granting = Granting(random=lambda count: bytes(int(random() * 256) for _ in range(count)))
        self._offset = wall - now
        self._is_known = earlier is None  # what the machine relays; else what the last run left
        self._applied: Grants | None = None
        self._is_busy = False
        self._is_configured = False
        self._waiting: list[Telling] = []  # for the next application
        self._telling: list[Telling] = []  # for the one in flight
        self._told: list[Telling] = []  # to be said now
        if earlier is not None:
            self._granting.restore(earlier, wall)

    @property
    def dropped(self) -> int:
        """Asks that got no answer."""
        return self._granting.dropped

    def relayed(self, counted: Counted | None) -> Relayed | None:
        """What the pairs were sent that the machine relays; None where it is to relay nothing."""
        if self._applied is None:
            return None
        return relayed(self._applied, counted or Counted({}, {}, error="not counted yet: ask again"))

    def report(self, now: float) -> RelayReport | None:
        """What our own status says of it."""
        return self._granting.report(now + self._offset)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        due = self._granting.get_timer()
        return None if due is None else due - self._offset

    def handle_timer(self, now: float) -> None:
        """Let go what has expired."""
        due = self.get_timer()
        if due is not None and now >= due:
            self._granting.handle_timer(now + self._offset)

    def configure(
        self,
        hubs: Hubs,
        *,
        is_hub: bool,
        listen_port: int,
        members: Mapping[PublicKey, PublicKey],
        now: float,
    ) -> None:
        """What the mesh says; `members` are WireGuard keys with their probe keys."""
        self._is_configured = True
        self._waiting += self._granting.configure(
            is_hub=is_hub,
            ports=hubs.ports,
            limits=hubs.limits,
            listen_port=listen_port,
            members=members,
            wall=now + self._offset,
        )

    def ask(self, asker: PublicKey, request: AskRelay, now: float) -> None:
        """A peer, by its WireGuard key, asks to be relayed."""
        self._waiting += self._granting.ask(asker, request, now + self._offset)

    def relaying(
        self,
        by: Forwarding,
        reason: str,
        *,
        forgot: bool,
        answers: bool,
        now: float,
        taken: Collection[int] = (),
    ) -> None:
        """What forwards now; `answers` an Apply. `forgot`: the machine knows where nobody is.

        `taken`: granted ports that another program holds.
        """
        if answers:
            self._is_busy = False
            self._told += self._telling
            self._telling = []
        if self._applied is None:
            return
        wall = now + self._offset
        again = self._granting.forwards(by, reason, wall)
        self._told += self._granting.tell_all(wall) if forgot else again
        self._waiting += self._granting.avoid(taken, wall)

    def take_apply(self) -> Apply | None:
        """What the machine is to relay from now on, where it is something else, and nothing is in flight."""
        if self._is_busy or not self._is_configured:
            return None
        grants = self._granting.grants()
        wanted = grants if self._granting.is_hub or grants.grants else None
        if self._is_known and wanted == self._applied:
            self._told += self._waiting
            self._waiting = []
            return None
        self._is_known, self._is_busy, self._applied = True, True, wanted
        self._telling, self._waiting = self._waiting, []
        return Apply(wanted)

    def take_tellings(self) -> list[Telling]:
        """What is to be said now: the last word to each side about each pair."""
        if not self._told:
            return []
        told, self._told = self._told, []
        return list({(telling.to, telling.message.peer): telling for telling in told}.values())
