"""Two machines whose device something else manages, in virtual time: devices are models, agents real."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from random import Random

from scope_agent.inputs import (
    Applied,
    CommandArrived,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    KeysSetUp,
    NudgeTunnel,
    Observe,
    PskSaved,
    Reply,
    SavePsk,
    SaveState,
    Send,
    SetUpKeys,
    Socket,
    Target,
    WriteReport,
)
from scope_agent.mesh_psk_agent import MeshPskAgent
from scope_agent.peers_file import ForeignPeer, PeersFile
from scope_agent.psk.identity import KeyMaker, make_hybrid_identity
from scope_agent.psk.slots import Record
from scope_agent.psk_agent import ForeignDevice, PskAgent
from scope_agent.wireguard.device import NO_PSK, ObservedDevice, ObservedPeer, SetPsk

from scope.channel import Channel
from scope.model import DeviceKind, Endpoint, PeerReport, PostQuantum, PostQuantumMode, PublicKey, Secret
from tests.toy_provider import ToyProvider

MANAGER = Secret(bytes([9] * 32))
WALL = 1_800_000_000.0


class Side:
    """One machine: its device, its disk, its agent."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.random = Random(number)
        self.key = PublicKey(self.random.randbytes(32))
        self.endpoint = Endpoint.parse(f"192.0.2.{number}:51820")
        self.channel = self.new_channel()
        self.identity = make_hybrid_identity(self.random.randbytes, world.provider)
        self.disk: dict[PublicKey, Record] = {}
        self.is_up = True
        self.fwmark = 0
        self.psk: Secret | None = MANAGER
        self.stamp: float | None = None
        self.agent: PskAgent | MeshPskAgent | None = None
        self.armed: float | None = None
        self.said: dict[str, object] = {}
        self.sent: list[tuple[float, Endpoint]] = []
        self.nudged: list[str] = []
        self.report: PeerReport | None = None  # the last one that was written

    def new_channel(self) -> Channel:
        return Channel(
            secret=Secret(Random(100 + self.number).randbytes(32)), boot_id=self.random.randbytes(16)
        )

    def maker(self) -> KeyMaker:
        return KeyMaker(self.identity, self.world.provider, self.random.randbytes)

    def line(self) -> ForeignPeer:
        fingerprint = self.identity.public.fingerprint()
        return ForeignPeer(f"m{self.number}", self.key, self.channel.public_key, fingerprint)

    @property
    def other(self) -> Side:
        return self.world.sides[2 - self.number]

    def start(self, line: ForeignPeer | None = None) -> None:
        self.channel = self.new_channel()
        peer = line or self.other.line()
        self.run(
            PskAgent(
                ForeignDevice("wg0", self.key, listen_port=51820, fwmark=0),
                PeersFile(PostQuantum(PostQuantumMode.PREFERRED, 3600.0), {peer.wireguard: peer}),
                channel=self.channel,
                maker=self.maker(),
                records=dict(self.disk),
                random=self.random.random,
                now=self.world.now,
                wall=WALL + self.world.now,
            )
        )

    def run(self, agent: PskAgent | MeshPskAgent) -> None:
        """Be this agent from now on."""
        self.agent = agent
        self.later(0.001, self.look)

    def later(self, delay: float, call: Callable[[], None]) -> None:
        agent = self.agent
        self.world.at(self.world.now + delay, lambda: call() if self.agent is agent else None)

    def look(self) -> None:
        assert self.agent is not None
        device = ObservedDevice("wg0")
        if self.is_up:
            peer = ObservedPeer(
                self.other.key,
                endpoint=self.other.endpoint,
                allowed_ips=frozenset({ip_network("10.0.0.0/8"), ip_network(f"10.7.0.{3 - self.number}/32")}),
                psk=None if self.psk == NO_PSK else self.psk,
                last_handshake=self.stamp,
            )
            device = replace(
                device,
                exists=True,
                up=True,
                public_key=self.key,
                listen_port=51820,
                fwmark=self.fwmark,
                peers={peer.key: peer},
            )
        self.take(DeviceObserved(device, DeviceKind.KERNEL, WALL + self.world.now))

    def take(self, event: object) -> None:
        assert self.agent is not None
        self.agent.receive(event, self.world.now)  # type: ignore[arg-type]
        self.perform()

    def ask(self, command: str) -> dict[str, object]:
        self.take(CommandArrived(1, command))
        return self.said

    def perform(self) -> None:
        agent = self.agent
        assert agent is not None
        for output in agent.outputs():
            match output:
                case Send(Socket(endpoint), data):
                    self.sent.append((self.world.now, endpoint))
                    self.world.carry(self, endpoint, data)
                case DeviceBatch(actions, None):
                    for action in actions:
                        assert isinstance(action, SetPsk) and action.key == self.other.key
                        self.psk = action.psk
                    self.later(0.01, lambda: self.take(Applied(Target.DEVICE)))
                    self.later(0.02, self.look)
                case Observe():
                    self.later(0.01, self.look)
                case SavePsk(key, record):
                    if record is None:
                        self.disk.pop(key, None)
                    else:
                        self.disk[key] = record
                        self.later(0.01, lambda key=key: self.take(PskSaved(key)))  # type: ignore[misc]
                case NudgeTunnel(address=address):
                    self.nudged.append(str(address))
                    self.world.rekey()
                case SetUpKeys():
                    self.later(0.1, lambda: self.take(KeysSetUp(self.maker())))
                case WriteReport(report=report):
                    self.report = report
                    self.later(0.05, lambda: self.take(Applied(Target.REGISTRY)))
                case SaveState():
                    self.later(0.01, lambda: self.take(Applied(Target.DISK)))
                case Reply(value=value):
                    self.said = dict(value)
                case _:
                    raise AssertionError(output)
        due = agent.get_timer()
        if due is not None and (self.armed is None or due < self.armed or self.armed <= self.world.now):
            self.armed = due
            self.later(max(0.0, due - self.world.now), self.tick)

    def tick(self) -> None:
        assert self.agent is not None
        self.armed = None
        self.agent.handle_timer(self.world.now)
        self.perform()

    def status(self) -> dict[str, object]:
        (peer,) = self.ask("status")["status"]["peers"]  # type: ignore[index]
        return peer

    def epoch(self) -> object:
        return self.status()["psk"]["epoch"]  # type: ignore[index]


class World:
    """Both sides, their wire, and a tunnel whose handshakes succeed where the keys are the same."""

    def __init__(self) -> None:
        self.now = 100.0
        self.provider = ToyProvider(Random(7))
        self.is_cut = False
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.sides = [Side(self, 1), Side(self, 2)]
        self.is_used = True
        self.at(self.now, self.tunnel)

    def at(self, when: float, call: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, call))

    def is_laid(self) -> bool:
        """Whether both devices have a key that no handshake has proved."""
        return all(record.active for side in self.sides for record in side.disk.values())

    def carry(self, sender: Side, endpoint: Endpoint, data: bytes) -> None:
        (receiver,) = (side for side in self.sides if side.endpoint == endpoint)
        if self.is_cut or receiver.agent is None:
            return
        arrived = DatagramArrived(data, Socket(sender.endpoint))
        receiver.later(0.02, lambda: receiver.take(arrived))

    def tunnel(self) -> None:
        """Traffic flows: WireGuard rekeys every two minutes."""
        if self.is_used:
            self.rekey()
        self.at(self.now + 121.0, self.tunnel)

    def rekey(self) -> None:
        first, second = self.sides
        if first.psk == second.psk and first.is_up and second.is_up:
            first.stamp = second.stamp = WALL + self.now

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            when, _, call = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            call()
        self.now = end

    def until(self, holds: Callable[[], bool], *, within: float) -> None:
        end = self.now + within
        while not holds():
            assert self.now < end, [side.ask("status") for side in self.sides if side.agent is not None]
            self.run(1.0)
