"""What happens in the demo, in order, and how long each thing may take.

A stage that does not come true in time is a failure that is told, and the story goes on: the end shows what
works and what does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from lab import Lab
from meshlab import Flow, Member, PairRecord, Pinger, Watch, WatchError

from demo.cast import HUBS, LEAVER, NEWCOMER, REBOOTS, ROAMER, ROAMS_TO, ROLES, SCENES, Role
from demo.frame import Event, Frame, Mood, Spread, Tally, hub_of, rows_of, tally_of
from demo.origin import Origin
from demo.screen import Screen
from demo.summary import document

STAGES = ("internet", "registry", "join", "hubs", "roam", "reboot", "leave", "newcomer", "tree", "done")
# Far above what is seen, so that only what does not work at all runs into it; all of them together stay
# below a minute and a half on an idle machine, because none of them is then reached. On a busy one a path may
# be taken for one that swallows WireGuard's packets, and is then left alone for a minute.
ALL_JOINED_S = 180.0  # ten programs' imports are as many seconds of the processor
HEALED_S = 90.0
# How long a hub's agent stays dead: every relayed pair pings once a second, and some knock.
DEAD_S = 4.0
# While the topology changes, pairs of edges ping each other so often, and none is to be silent for longer
# than is promised. A machine that does ten other things adds to that, so it is told, and fails nothing.
TREE_PING_S, PROMISED_S = 0.2, 3.0
RESHAPED_S = 90.0
SETTLED_S = 1.0  # what a change does to a pair shows within that
# To be seen by a person before the next thing happens.
PAUSE_S = 2.0
UNDER_WAY_S = 1.0  # an answer may take so long
_LOOK_S = 0.1


class Story:
    """One performance. `failures` is empty when everything came true."""

    def __init__(
        self,
        screen: Screen,
        lab: Lab,
        pinger: Pinger,
        *,
        origin: Origin,
        started: float,
        verbose: bool,
    ) -> None:
        self._screen = screen
        self._lab = lab
        self._origin = origin
        self._started = started
        self._stage = 0
        self._events: list[Event] = []
        self._members: dict[str, Member] = {}
        self._options = ("--verbose",) if verbose else ()
        self.watch = Watch([], pinger, has_hubs=True)
        self.failures: list[str] = []
        self.as_full: dict[str, object] | None = None  # the file, of the mesh before it became a tree

    def perform(self) -> None:
        """All stages. LabError when a program does not even start or dies."""
        for number, act in enumerate(
            (
                self._build,
                self._serve,
                self._join,
                self._lose_hubs,
                self._roam,
                self._reboot,
                self._leave,
                self._join_late,
                self._grow_tree,
            )
        ):
            self._stage = number
            self._show()
            act()
        self._stage = len(STAGES) - 1
        self._show()

    @property
    def events(self) -> list[Event]:
        """All that was told."""
        return self._events

    # --- the stages -----------------------------------------------------------------------------------------

    def _build(self) -> None:
        for scene in SCENES:
            self._lab.site(scene.name, nat=scene.nat, ipv6=scene.ipv6)
        for role in ROLES:
            self._lab.sites[role.site].machine(role.name)
        self._tell(
            f"an internet with {len(SCENES)} sites, {len(ROLES)} machines, 40 ms between any two sites"
        )

    def _serve(self) -> None:
        self._origin.serve(self._lab)
        self._tell(self._origin.served)

    def _join(self) -> None:
        asked = time.monotonic()
        members = [self._member(role) for role in ROLES]
        self._tell(self._origin.joining)
        joined: set[str] = set()

        def complete() -> bool:
            for member in members:
                if member.name not in joined and (at := member.joined_at()) is not None:
                    joined.add(member.name)
                    self._tell(f"{member.name} has joined ({at - asked:.1f} s from its start)")
            return self.watch.is_complete()

        if not self._until(complete, within_s=ALL_JOINED_S):
            return
        last = max(at for member in members if (at := member.joined_at()) is not None)
        tally = tally_of(self.watch)
        self._tell(
            f"all {tally.possible} pairs that can be direct are, {tally.relayed} more talk through a hub, "
            f"all pinged both ways: {max(self._first_pings(self.watch.pairs.values())) - last:.1f} s after "
            "the last join",
            Mood.GOOD,
        )
        self._pause()

    def _lose_hubs(self) -> None:
        relayed = [pair for pair in self.watch.pairs.values() if pair.is_relayed]
        hub = max(HUBS, key=lambda name: len(self._carried(name, relayed)))
        member, carried = self._members[hub], self._carried(hub, relayed)
        self.watch.members.remove(member)  # it is no longer to be alive, and what it carries goes on
        member.kill()
        self._tell(f"{hub}, the hub of {len(carried) // 2} pairs: its agent is killed")
        self.watch.mark(carried)
        self._wait(DEAD_S)
        flows = [pair.flow for pair in carried if pair.flow is not None]
        sent, lost = sum(flow.sent for flow in flows), self._lost(flows)
        told = f"{lost} of {sent} relayed pings are lost while it is dead"
        if lost or not sent:
            self.failures.append(f"{STAGES[self._stage]}: {told}")
        self._tell(told, Mood.BAD if lost or not sent else Mood.GOOD)
        member.run_again()
        self.watch.add(member)
        self._cut_off(hub)

    def _lost(self, flows: Sequence[Flow]) -> int:
        """Pings that were not answered, those aside that are under way."""
        lost = {flow.number: flow.sent - flow.answered for flow in flows}
        until = time.monotonic() + UNDER_WAY_S
        while any(lost.values()) and time.monotonic() < until:
            time.sleep(_LOOK_S / 10)
            lost = {flow.number: min(lost[flow.number], flow.sent - flow.answered) for flow in flows}
        return sum(lost.values())

    def _cut_off(self, hub: str) -> None:
        site = self._members[hub].machine.site
        carried = self._carried(hub, [pair for pair in self.watch.pairs.values() if pair.is_relayed])
        site.block_udp()
        self._tell(f"{hub} is cut off from the internet")
        self._await_healed(carried, f"{len(carried) // 2} pairs go on through the other hub")
        site.unblock_udp()
        self._pause()

    def _roam(self) -> None:
        member, target = self._members[ROAMER], self._lab.sites[ROAMS_TO]
        left = member.machine.site.name
        self._tell(f"{ROAMER} roams: from {left} to {ROAMS_TO}, another NAT and another address")
        pairs = self._possible(member)
        member.machine.move(target)
        self._await_healed(pairs, f"{ROAMER} is reached at its new place")

    def _reboot(self) -> None:
        site = self._lab.sites[REBOOTS]
        inside = [self._members[name] for name in site.machines]
        pairs = [p for p in self._possible(*inside) if p.source.machine.site is not p.target.machine.site]
        site.rebind()
        self._tell(f"{REBOOTS}'s router reboots: every connection is forgotten, every port is another")
        self._await_healed(pairs, f"{' and '.join(member.name for member in inside)} are reached again")

    def _leave(self) -> None:
        member = self._members.pop(LEAVER)
        status = self.watch.statuses.get(LEAVER)
        name = status.peer if status is not None else ""
        others = [other for other in self._members.values() if other is not member]
        self._tell(f"{LEAVER} {self._origin.leaving}")
        asked = time.monotonic()
        self.watch.drop(member)
        self._origin.leave(member)

        def knowing() -> list[str]:
            statuses = {other.name: self.watch.statuses.get(other.name) for other in others}
            return [who for who, status in statuses.items() if status is None or name in status.peers]

        within_s = self._origin.gone_within_s
        missing = lambda: f"{LEAVER} is still known to {', '.join(knowing())}"  # noqa: E731
        if self._until(lambda: not knowing(), within_s=within_s, missing=missing):
            self._tell(f"nobody knows {LEAVER} any more, {time.monotonic() - asked:.1f} s after", Mood.GOOD)
        self._pause()

    def _join_late(self) -> None:
        asked = time.monotonic()
        self._lab.sites[NEWCOMER.site].machine(NEWCOMER.name)
        member = self._member(NEWCOMER)
        self._tell(f"{NEWCOMER.name}, behind {NEWCOMER.site}'s NAT, {self._origin.joins_late}")
        if not self._until(self.watch.is_complete, within_s=ALL_JOINED_S):
            return
        pairs = self._possible(member)
        joined = member.joined_at()
        assert joined is not None
        late = max(self._first_pings(pairs)) - joined
        self._tell(
            f"{NEWCOMER.name} joined in {joined - asked:.1f} s; "
            f"its {len(pairs) // 2} possible pairs were direct and pinged {late:.1f} s later",
            Mood.GOOD,
        )
        self._pause()

    def _grow_tree(self) -> None:
        self.as_full = document(self.watch)
        edges = [member for member in self.watch.members if member.name not in HUBS]
        pairs = [p for p in self.watch.pairs.values() if p.source in edges and p.target in edges]
        is_tree = lambda: all(pair.is_routed for pair in pairs) and self.watch.is_complete()  # noqa: E731
        is_full = lambda: not any(p.is_routed for p in pairs) and self.watch.is_complete()  # noqa: E731
        if self._reshape("Tree", pairs, is_tree):
            attached = {hub: [edge.name for edge in edges if hub_of(edge, self.watch) == hub] for hub in HUBS}
            named = "; ".join(f"to {hub} {', '.join(names) or 'nobody'}" for hub, names in attached.items())
            self._tell(f"edges are attached {named}, and go by these hubs to each other", Mood.GOOD)
            self._pause()
        self._reshape("Full", pairs, is_full)

    def _reshape(self, topology: str, pairs: list[PairRecord], done: Callable[[], bool]) -> bool:
        """Apply another topology while these pairs ping; whether it became true in time."""
        pinging = [pair for pair in pairs if pair.source.name < pair.target.name]  # a ping goes both ways
        self.watch.mark(pinging)
        self.watch.pace(pinging, TREE_PING_S)
        if not self._until(lambda: all(pair.is_pinged for pair in pinging), within_s=HEALED_S):
            return False
        self._tell(f"the mesh is to be {topology}, while {len(pinging)} pairs of edges ping each other")
        self._origin.reshape(topology)
        applied = time.monotonic()
        if not self._until(done, within_s=RESHAPED_S):
            return False
        took = time.monotonic() - applied
        self._wait(SETTLED_S)
        now = time.monotonic()
        flows = [pair.flow for pair in pinging if pair.flow is not None]
        silent_s = max((flow.silent_s(now) for flow in flows), default=0.0)
        self.watch.pace(pinging)
        self._tell(
            f"it is {topology} {took:.1f} s after that was applied; {self._lost(flows)} of "
            f"{sum(flow.sent for flow in flows)} pings are lost, no pair is silent for longer than "
            f"{silent_s:.1f} s",
            Mood.GOOD if silent_s <= PROMISED_S else Mood.BAD,
        )
        return True

    def _carried(self, hub: str, pairs: Iterable[PairRecord]) -> list[PairRecord]:
        """Those of the pairs that talk through a hub."""
        status = self.watch.statuses.get(hub)
        return [p for p in pairs if status is not None and p.reach is not None and p.reach.hub == status.peer]

    # --- inside ---------------------------------------------------------------------------------------------

    def _member(self, role: Role) -> Member:
        machine = self._lab.sites[role.site].machines[role.name]
        member = self._origin.join(machine, arguments=self._options)
        self._members[role.name] = member
        self.watch.add(member)
        return member

    def _possible(self, *members: Member) -> list[PairRecord]:
        return [pair for pair in self.watch.of(*members) if pair.is_possible]

    def _await_healed(self, pairs: list[PairRecord], text: str) -> None:
        """Pings sent from now on come back over paths that are at their best, both ways."""
        since = self.watch.mark(pairs)
        healed = lambda: all(pair.healed_at is not None for pair in pairs)  # noqa: E731
        if self._until(healed, within_s=HEALED_S):
            times = [at - since for pair in pairs if (at := pair.healed_at) is not None]
            self._tell(f"{text}: {Spread.of(times)}", Mood.GOOD)
        self._pause()

    def _until(
        self, done: Callable[[], bool], *, within_s: float, missing: Callable[[], str] | None = None
    ) -> bool:
        """Look and show until it is done; whether it was in time."""

        def look() -> bool:
            self._show()
            return done()

        try:
            self.watch.until(look, within_s=within_s, missing=missing or self.watch.describe_unfinished)
        except WatchError as error:
            self.failures.append(f"{STAGES[self._stage]}: {error}")
            self._tell(str(error).splitlines()[0], Mood.BAD)
            return False
        return True

    def _pause(self) -> None:
        self._wait(PAUSE_S)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.watch.look()
            self._show()
            time.sleep(_LOOK_S)

    def _first_pings(self, pairs: Iterable[PairRecord]) -> list[float]:
        return [pair.pinged_at for pair in pairs if pair.is_possible and pair.pinged_at is not None]

    def _tell(self, text: str, mood: Mood = Mood.PLAIN) -> None:
        event = Event(time.monotonic() - self._started, text, mood)
        self._events.append(event)
        self._screen.tell(event)
        self._show()

    def _show(self) -> None:
        rows, tally = rows_of(self.watch), tally_of(self.watch) if self.watch.pairs else Tally()
        self._screen.show(Frame(self._started, self._stage, STAGES, rows, tuple(self._events), tally))
