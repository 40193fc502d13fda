"""A carrier in virtual time: TCP between a peer and hubs, loopback endpoints at either end. No agent is
needed.

TCP passes every site, also one that blocks UDP; loses nothing, and takes three ways there and back to
connect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from scope.carrier import (
    Carried,
    Carrier,
    CarrierReport,
    HubReport,
    MemberReport,
    TicketError,
    verify_ticket,
)
from scope.model import Endpoint, PublicKey

if TYPE_CHECKING:
    from tests.sim.world import Machine

CONNECT = 6.0  # of the one way: TCP's handshake, TLS's, and the request
TRY_AGAIN = 1.0
PIN = bytes(range(32))


@dataclass(slots=True, eq=False)
class CarrierProcess:
    """One machine's. `machines` finds a hub by its address."""

    machine: Machine
    find: Callable[[Endpoint], Machine | None]
    is_running: bool = True
    is_reached: bool = True  # as a hub: its TCP port is
    carrier: Carrier | None = None
    carried: int = 0
    dropped: int = 0
    _connected: dict[PublicKey, tuple[Machine, Endpoint]] = field(default_factory=dict)
    _generation: int = 0

    def apply(self, carrier: Carrier | None) -> None:
        """Do this from now on."""
        before, self.carrier = self.carrier, carrier
        wanted = {hub.hub for hub in carrier.peer.hubs} if carrier is not None and carrier.peer else set()
        for hub in self._connected.keys() - wanted:
            del self._connected[hub]
        had = {hub.hub for hub in before.peer.hubs} if before is not None and before.peer else set()
        for hub in wanted - had:
            self._connect(hub)

    def kill(self) -> None:
        """The process dies, and what it carries with it."""
        self.is_running = False
        self._generation += 1
        self._connected.clear()

    def start(self) -> None:
        """It comes back with the same file."""
        self.is_running = True
        for hub in self.carrier.peer.hubs if self.carrier is not None and self.carrier.peer else ():
            self._connect(hub.hub)

    def report(self) -> CarrierReport | None:
        """What it says of itself."""
        if not self.is_running:
            return None
        peer, hub = (self.carrier.peer, self.carrier.hub) if self.carrier is not None else (None, None)
        hubs = tuple(
            HubReport(
                each.hub,
                self._connected[each.hub][1] if each.hub in self._connected else None,
                "" if each.hub in self._connected else "no answer",
                Carried(),
            )
            for each in (peer.hubs if peer is not None else ())
        )
        members = tuple(
            MemberReport(each.peer, connected=self._is_carrying(each.peer), carried=Carried())
            for each in (hub.members if hub is not None else ())
        )
        return CarrierReport(hubs, members, listening=hub is not None, reason="", refused=0, file="")

    def send(self, port: int, to: Endpoint, payload: object) -> None:
        """What a program of this machine sent from a port of it to a loopback endpoint of ours."""
        if not self.is_running or self.carrier is None:
            return
        for hub in self.carrier.peer.hubs if self.carrier.peer is not None else ():
            for passage in hub.passages:
                if passage.endpoint == to:
                    self._to_hub(hub.hub, passage.port, payload)
                    return
        for member in self.carrier.hub.members if self.carrier.hub is not None else ():
            if member.endpoint == to:
                self._to_member(member.peer, port, payload)
                return

    def _connect(self, hub: PublicKey) -> None:
        machine, generation = self.machine, self._generation
        world = machine.world
        part = self.carrier.peer if self.carrier is not None else None
        wanted = next((each for each in part.hubs if each.hub == hub), None) if part is not None else None
        if wanted is None or hub in self._connected or generation != self._generation:
            return
        for address in wanted.addresses:
            other = self.find(address)
            if other is not None and other.carrier.accepts(machine.key, wanted.pin, wanted.ticket):
                delay = CONNECT * (machine.site.delay + other.site.delay)
                world.after(delay, partial(self._open, hub, other, address, generation))
                return
        world.after(TRY_AGAIN, lambda: self._connect(hub))

    def _open(self, hub: PublicKey, other: Machine, address: Endpoint, generation: int) -> None:
        if generation == self._generation and self.is_running:
            self._connected[hub] = other, address

    def accepts(self, peer: PublicKey, pin: bytes, ticket: str) -> bool:
        """As a hub: whether a peer may be carried."""
        part = self.carrier.hub if self.carrier is not None else None
        if part is None or not self.is_running or not self.is_reached or pin != PIN or self.machine.is_off:
            return False
        signing = {member.peer: member.signing for member in part.members}
        wall = self.machine.world.now
        try:
            found = verify_ticket(ticket, mesh_uid=part.mesh_uid, hub=part.hub, signing=signing, wall=wall)
        except TicketError:  # of a member that the hub has not heard of yet
            return False
        return found.peer == peer

    def _to_hub(self, hub: PublicKey, port: int, payload: object) -> None:
        machine, found = self.machine, self._connected.get(hub)
        other = found[0] if found is not None else None
        if other is None or not other.carrier.is_running or not other.carrier.is_reached or other.is_off:
            self.dropped += 1
            self._connected.pop(hub, None)
            self._connect(hub)
            return
        self.carried += 1
        delay = machine.site.delay + other.site.delay
        part = other.carrier.carrier.hub if other.carrier.carrier is not None else None
        own = next((m.endpoint for m in part.members if m.peer == machine.key), None) if part else None
        if part is not None and own is not None and part.carries_to(port):
            machine.world.after(delay, lambda: other.arrived(own, port, payload))

    def _to_member(self, peer: PublicKey, port: int, payload: object) -> None:
        for machine in self.machine.world.machines:
            if machine.key == peer and machine.carrier.is_connected_to(self.machine.key):
                machine.carrier.from_hub(self.machine, port, payload)
                return
        self.dropped += 1

    def _is_carrying(self, peer: PublicKey) -> bool:
        return any(
            machine.key == peer and machine.carrier.is_connected_to(self.machine.key)
            for machine in self.machine.world.machines
        )

    def is_connected_to(self, hub: PublicKey) -> bool:
        """Whether that hub carries us now."""
        return self.is_running and hub in self._connected

    def from_hub(self, hub: Machine, port: int, payload: object) -> None:
        """What a hub's program sent to us from one of its ports."""
        machine, part = self.machine, self.carrier.peer if self.carrier is not None else None
        if part is None:
            return
        for each in part.hubs:
            for passage in each.passages:
                if (each.hub, passage.port) == (hub.key, port):
                    delay = machine.site.delay + hub.site.delay
                    source, own = passage.endpoint, part.wireguard_port
                    machine.world.after(delay, partial(machine.arrived, source, own, payload))
                    return
