"""A mesh's life, drawn from one number: join, leave, roam, partition, reboot, crash; then calm.

After the last disturbance every cut is healed and every machine sends to every other. Within `CALM` seconds
every traversable pair must have a direct path that both devices agree on: packets arrive both ways and no
endpoint moves any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lab.nat import Nat

from tests.sim.world import Machine, World

CALM = 75.0  # a pair that was declared unreachable is tried again after 60 s at the latest in a short life
SETTLED = 3.0  # so long nothing may move
KINDS = (
    Nat.NONE,
    Nat.FULL_CONE,
    Nat.ADDRESS_RESTRICTED,
    Nat.PORT_RESTRICTED,
    Nat.PORT_RESTRICTED,
    Nat.SYMMETRIC,
    Nat.CGNAT,
    Nat.IPV6_ONLY,
    Nat.UDP_BLOCKED,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a life came to."""

    seed: int
    peers: int
    converged_after: float
    events: int
    story: tuple[str, ...]


class DidNotConverge(AssertionError):
    """The message holds the seed, the story and the state of every pair."""


class Life:
    """One mesh, from its first join to its calm."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.random = self.world.random
        self.story: list[str] = []
        self._heal: list[Callable[[], None]] = []

    def live(self) -> Outcome:
        """Run it all. Raises DidNotConverge, Livelock."""
        world, random = self.world, self.random
        if random.random() < 0.4:
            world.network.weather.loss = random.choice((0.01, 0.05))
            world.network.weather.jitter = random.choice((0.0, 0.02))
            world.network.weather.duplication = random.choice((0.0, 0.02))
        for _ in range(random.randint(2, 4)):
            self._join()
            world.run(random.choice((0.0, 0.05, 1.0)))
        world.run(random.uniform(0.0, 3.0))
        for _ in range(random.randint(1, 5)):
            choices = (
                self._join, self._leave, self._roam, self._partition, self._reboot_nat, self._rebind_nat,
                self._restart, self._crash, self._registry_away, self._talk, self._remove,
            )  # fmt: skip
            random.choice(choices)()
            world.run(random.choice((0.0, 0.01, 0.3, 1.0, 3.0, 8.0, 20.0)))
        for heal in self._heal:
            heal()
        world.network.links.clear()
        self._note("calm")
        return self._calm()

    def _calm(self) -> Outcome:
        world = self.world
        start = world.now
        while world.now - start < CALM:
            self._ping_all()
            world.run(1.0)
            if world.is_converged() and self._is_settled():
                after = world.now - start
                return Outcome(world.seed, len(world.members()), after, world.events, tuple(self.story))
        raise DidNotConverge(
            f"seed {world.seed} did not converge in {CALM:.0f} s: replay it with `python -m tests.sim --seed "
            f"{world.seed} --verbose`\n" + "\n".join(self.story) + "\n" + world.describe()
        )

    def _is_settled(self) -> bool:
        """Whether packets pass both ways between all traversable pairs while no endpoint moves."""
        world = self.world
        members = world.members()
        world.run(1.0)
        before = [m.device.endpoint_changes for m in members]
        counts = {(a.key, b.key): 0 for a in members for b in members}
        marks = [len(m.received) for m in members]
        for _ in range(3):
            self._ping_all()
            world.run(SETTLED / 3)
        for machine, mark in zip(members, marks, strict=True):
            for _, sender, _ in machine.received[mark:]:
                counts[(sender, machine.key)] = counts.get((sender, machine.key), 0) + 1
        return (
            world.is_converged()
            and before == [m.device.endpoint_changes for m in members]
            and all(
                counts[(a.key, b.key)] > 0
                for a in members
                for b in members
                if a is not b and world.traversable(a, b)
            )
        )

    def _ping_all(self) -> None:
        members = self.world.members()
        for a in members:
            for b in members:
                if a is not b:
                    a.ping(b)

    # --- what happens --------------------------------------------------------------------------------------

    def _note(self, what: str) -> None:
        self.story.append(f"{self.world.now:8.3f} {what}")

    def _any(self) -> Machine | None:
        members = self.world.members()
        return self.random.choice(members) if members else None

    def _site(self) -> object:
        kind = self.random.choice(KINDS)
        ipv6 = self.random.random() < 0.4
        lan = self.random.choice((None, None, "192.168.1.0/24")) if kind is not Nat.NONE else None
        return self.world.network.site(
            kind, ipv6=ipv6, delay=self.random.choice((0.002, 0.01, 0.04)), lan=lan
        )

    def _join(self) -> None:
        random = self.random
        if len([m for m in self.world.machines if m.agent is not None]) >= 6:
            return
        shared = [m.site for m in self.world.members()]
        site = random.choice(shared) if shared and random.random() < 0.2 else self._site()
        machine = self.world.machine(site)  # type: ignore[arg-type]
        machine.join()
        self._note(f"{machine.name} joins at {machine.place}")

    def _leave(self) -> None:
        machine = self._any()
        if machine is not None and self.world.registry.up and len(self.world.members()) > 2:
            self._note(f"{machine.name} leaves")
            machine.leave()

    def _remove(self) -> None:
        machine = self._any()
        if machine is not None and self.world.registry.up and len(self.world.members()) > 2:
            self._note(f"{machine.name} is removed")
            self.world.registry.remove(machine)
            self.world.after(3.0, machine.crash)

    def _roam(self) -> None:
        machine = self._any()
        if machine is not None:
            machine.move(self._site())  # type: ignore[arg-type]
            self._note(f"{machine.name} roams to {machine.place}")

    def _partition(self) -> None:
        a, b = self._any(), self._any()
        if a is None or b is None or a.site is b.site:
            return
        both = self.random.random() < 0.7
        family = None
        links = self.world.network.link(a.site, b.site, family, both=both)
        data_only = self.random.random() < 0.2
        for link in links:
            link.cut, link.drops_data = not data_only, data_only
        what = "WireGuard's data is dropped" if data_only else "a cut"
        self._note(f"{what} between {a.name} and {b.name}{'' if both else ', one way'}")
        if self.random.random() < 0.5:

            def heal() -> None:
                for link in links:
                    link.cut = link.drops_data = False

            self.world.after(self.random.choice((1.0, 10.0, 70.0)), heal)

    def _reboot_nat(self) -> None:
        machine = self._any()
        if machine is not None:
            self._note(f"{machine.name}'s NAT reboots")
            for box in [*machine.site.boxes, machine.site.firewall]:
                if box is not None:
                    box.reboot()

    def _rebind_nat(self) -> None:
        machine = self._any()
        if machine is not None:
            self._note(f"{machine.name}'s NAT rebinds")
            for box in machine.site.boxes:
                box.rebind()

    def _restart(self) -> None:
        machine = self._any()
        if machine is not None:
            self._note(f"{machine.name}'s agent restarts")
            machine.restart(after=self.random.choice((0.05, 2.0)))

    def _crash(self) -> None:
        machine = self._any()
        if machine is not None:
            machine.crash_after = self.random.randint(0, 12)
            self._note(f"{machine.name}'s agent crashes after {machine.crash_after} outputs")

    def _registry_away(self) -> None:
        registry = self.world.registry
        if registry.up:
            self._note("the registry goes away")
            registry.go_down(reflecting=self.random.random() < 0.5)
            self._heal.append(registry.come_up)
            self.world.after(self.random.choice((2.0, 20.0)), registry.come_up)

    def _talk(self) -> None:
        a, b = self._any(), self._any()
        if a is not None and b is not None and a is not b:
            rate, answer = self.random.choice((1.0, 20.0)), self.random.random() < 0.7
            self._note(
                f"{a.name} sends {rate:.0f} packets a second to {b.name}, {'' if answer else 'un'}answered"
            )
            a.stream(b, rate=rate, seconds=10.0, answer=answer)


def live(seed: int) -> Outcome:
    """One life. Raises DidNotConverge, Livelock."""
    return Life(seed).live()
