"""A mesh's life, drawn from one number: join, leave, roam, partition, reboot, crash; then calm.

In half of the lives there are hubs, which come and go: their agents die, they lose power, they are asked to
be none any more, and others in their place.

After the last disturbance every cut is healed and every machine sends to every other. Within `CALM` seconds
every traversable pair must have a direct path that both devices agree on, and every other pair that both
reach one hub a relayed one: packets arrive both ways and no endpoint moves any more. In a tree every edge
that reaches a hub must have a home, and hear everybody by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lab.nat import Nat

from scope.model import Role, TopologyMode
from tests.sim.world import Machine, World

CALM = 75.0  # a pair that was declared unreachable is tried again after 60 s at the latest in a short life
# A hub believes for 120 s that a side is where it knocked, in each address family by itself: a peer that
# moves to where there is one family only is sought in the other until then, and found with the next knock.
CALM_WITH_HUBS = 145.0
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
        for _ in range(random.choice((0, 0, 1, 2))):
            self._hub_joins()
            world.run(random.choice((0.0, 1.0)))
        for _ in range(random.randint(2, 4)):
            self._join()
            world.run(random.choice((0.0, 0.05, 1.0)))
        world.run(random.uniform(0.0, 3.0))
        for number in range(random.randint(1, 5)):
            random.choice(self._disturbances(number))()
            world.run(random.choice((0.0, 0.01, 0.3, 1.0, 3.0, 8.0, 20.0)))
        for heal in self._heal:
            heal()
        world.network.links.clear()
        self._note("calm")
        return self._calm()

    def _disturbances(self, number: int) -> tuple[Callable[[], None], ...]:
        """What may happen next, after so many other things."""
        return (
            self._join, self._leave, self._roam, self._partition, self._reboot_nat, self._rebind_nat,
            self._restart, self._crash, self._registry_away, self._talk, self._remove,
            self._hub_joins, self._hub_is_off, self._hub_is_one_no_more, self._become_hub,
        )  # fmt: skip

    def _calm(self) -> Outcome:
        world = self.world
        start = world.now
        calm = CALM_WITH_HUBS if any(self._is_hub(m) for m in world.members()) else CALM
        while world.now - start < calm:
            self._ping_all()
            world.run(1.0)
            if self._is_converged() and self._is_settled():
                after = world.now - start
                return Outcome(world.seed, len(world.members()), after, world.events, tuple(self.story))
        raise DidNotConverge(
            f"seed {world.seed} did not converge in {calm:.0f} s: replay it with `python -m tests.sim --seed "
            f"{world.seed} --verbose`\n" + "\n".join(self.story) + "\n" + world.describe()
        )

    def _pairs(self) -> list[tuple[Machine, Machine]]:
        members = self.world.members()
        return [(a, b) for i, a in enumerate(members) for b in members[:i]]

    def _is_relayable(self, a: Machine, b: Machine) -> bool:
        """Whether some hub can be reached by both, at ports that nobody has opened for it."""
        reachable = self.world.traversable
        others = (m for m in self.world.members() if m is not a and m is not b)
        hubs = (m for m in others if self._is_hub(m) and m.site.kind is Nat.NONE)
        return any(reachable(a, hub) and reachable(b, hub) for hub in hubs)

    def _is_converged(self) -> bool:
        """Whether every pair has the best path that it can have."""
        world = self.world
        return all(
            world.is_direct(a, b)
            if world.traversable(a, b)
            else not self._is_relayable(a, b) or world.is_relayed(a, b)
            for a, b in self._pairs()
        )

    def _is_settled(self) -> bool:
        """Whether packets pass both ways between all pairs that have a path while no endpoint moves."""
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
            self._is_converged()
            and before == [m.device.endpoint_changes for m in members]
            and all(
                counts.get((a.key, b.key), 0) > 0 and counts.get((b.key, a.key), 0) > 0
                for a, b in self._pairs()
                if self._has_a_way(a, b)
            )
        )

    def _has_a_way(self, a: Machine, b: Machine) -> bool:
        """Whether packets must pass between the two."""
        return self.world.traversable(a, b) or self._is_relayable(a, b)

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

    def _is_hub(self, machine: Machine) -> bool:
        return self.world.registry.peer(machine).assignment.role is Role.HUB

    def _any_hub(self) -> Machine | None:
        hubs = [m for m in self.world.members() if self._is_hub(m)]
        return self.random.choice(hubs) if hubs else None

    def _hub_joins(self) -> None:
        if len([m for m in self.world.machines if m.agent is not None]) < 6 and self.world.registry.up:
            hub = self.world.hub(
                ipv6=self.random.random() < 0.4, delay=self.random.choice((0.002, 0.01, 0.04))
            )
            self._note(f"{hub.name} joins as a hub at {hub.place}")

    def _hub_is_off(self) -> None:
        hub = self._any_hub()
        if hub is None:
            return
        self._note(f"{hub.name}, a hub, is switched off")
        hub.switch_off()

        def heal() -> None:
            if hub.is_off:
                hub.switch_on()

        self._heal.append(heal)
        self.world.after(self.random.choice((1.0, 10.0, 200.0)), heal)

    def _hub_is_one_no_more(self) -> None:
        hub = self._any_hub()
        if hub is not None and self.world.registry.up:
            self._note(f"{hub.name} is no hub any more")
            self._assign(hub, Role.EDGE)

    def _become_hub(self) -> None:
        machine = self._any()
        if machine is not None and self.world.registry.up and self._any_hub() is None:
            self._note(f"{machine.name} is to be a hub")
            self._assign(machine, Role.HUB)

    def _assign(self, machine: Machine, role: Role) -> None:
        registry = self.world.registry
        registry.assign(machine, replace(registry.peer(machine).assignment, role=role))

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


class HubLife(Life):
    """The life of a mesh with hubs from its start: one goes first of all, and others come and go."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        for _ in range(self.random.choice((1, 2, 2, 3))):
            self._hub_joins()

    def _disturbances(self, number: int) -> tuple[Callable[[], None], ...]:
        going = (self._hub_is_off, self._hub_is_one_no_more)
        return going if number == 0 else (*super()._disturbances(number), *going, self._hub_joins)


class TreeLife(Life):
    """The life of a mesh that is a tree in the end, and mostly before.

    Whoever can reach a hub must then be attached to one that lives, know no other edge, and hear everybody.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        if self.random.random() < 0.7:
            self._become(TopologyMode.TREE)
        for _ in range(self.random.choice((1, 2, 3))):
            self._hub_joins()
        self._heal.append(self._end_as_a_tree)

    def _end_as_a_tree(self) -> None:
        self.world.registry.come_up()
        self._become(TopologyMode.TREE)
        if self._any_hub() is None:
            hub = self.world.hub(ipv6=True)
            self._note(f"{hub.name} joins as a hub at {hub.place}")

    def _become(self, mode: TopologyMode) -> None:
        if self.world.registry.mesh().spec.topology is not mode:
            self._note(f"the mesh is to be {mode}")
            self.world.registry.change_mesh(lambda spec: replace(spec, topology=mode))

    def _become_hub(self) -> None:
        """A change of topology in its place: a hub behind a NAT is of no use to most."""
        if self.world.registry.up:
            self._become(self.random.choice(tuple(TopologyMode)))

    def _roam(self) -> None:
        """Hubs stay: they must reach each other, as an edge takes the nearest, whatever that reaches."""
        machine = self._any()
        if machine is not None and not self._is_hub(machine):
            machine.move(self._site())  # type: ignore[arg-type]
            self._note(f"{machine.name} roams to {machine.place}")

    def _hubs(self) -> list[Machine]:
        return [m for m in self.world.members() if self._is_hub(m)]

    def _has_a_way(self, a: Machine, b: Machine) -> bool:
        return self._reaches_a_hub(a) and self._reaches_a_hub(b)

    def _reaches_a_hub(self, machine: Machine) -> bool:
        hubs = self._hubs()
        return machine in hubs or any(self.world.traversable(machine, hub) for hub in hubs)

    def _is_converged(self) -> bool:
        hubs = {hub.key for hub in self._hubs()}
        edges = {m.key: m for m in self.world.members() if m.key not in hubs and self._reaches_a_hub(m)}
        return all(
            edge.agent is not None and edge.agent.home in hubs and not edge.device.peers.keys() & edges.keys()
            for edge in edges.values()
        )


def live(seed: int) -> Outcome:
    """One life. Raises DidNotConverge, Livelock."""
    return Life(seed).live()


def live_with_hubs(seed: int) -> Outcome:
    """One life of hubs that come and go. Raises DidNotConverge, Livelock."""
    return HubLife(seed).live()


def live_in_a_tree(seed: int) -> Outcome:
    """One life of a tree. Raises DidNotConverge, Livelock."""
    return TreeLife(seed).live()
