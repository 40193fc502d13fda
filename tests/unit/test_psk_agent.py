"""The agent of a device that something else manages: two in virtual time, with devices that are models."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_network
from random import Random

import pytest
import yaml
from scope_agent.inputs import (
    Applied,
    CommandArrived,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    NudgeTunnel,
    Observe,
    PskSaved,
    Reply,
    SavePsk,
    Send,
    Socket,
    Target,
)
from scope_agent.peers_file import ForeignPeer, PeersFile, parse_peers, render_line
from scope_agent.psk.identity import KeyMaker, make_hybrid_identity
from scope_agent.psk.slots import Record
from scope_agent.psk_agent import ForeignDevice, PskAgent
from scope_agent.wireguard.device import NO_PSK, ObservedDevice, ObservedPeer, SetPsk

from scope.channel import Channel
from scope.model import DeviceKind, Endpoint, Fingerprint, PostQuantum, PostQuantumMode, PublicKey, Secret
from scope.resources import InvalidResource
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
        self.agent: PskAgent | None = None
        self.armed: float | None = None
        self.said: dict[str, object] = {}
        self.sent: list[tuple[float, Endpoint]] = []
        self.nudged: list[str] = []

    def new_channel(self) -> Channel:
        return Channel(
            secret=Secret(Random(100 + self.number).randbytes(32)), boot_id=self.random.randbytes(16)
        )

    def line(self) -> ForeignPeer:
        fingerprint = self.identity.public.fingerprint()
        return ForeignPeer(f"m{self.number}", self.key, self.channel.public_key, fingerprint)

    @property
    def other(self) -> Side:
        return self.world.sides[2 - self.number]

    def start(self, line: ForeignPeer | None = None) -> None:
        self.channel = self.new_channel()
        peer = line or self.other.line()
        self.agent = PskAgent(
            ForeignDevice("wg0", self.key, listen_port=51820, fwmark=0),
            PeersFile(PostQuantum(PostQuantumMode.PREFERRED, 3600.0), {peer.wireguard: peer}),
            channel=self.channel,
            maker=KeyMaker(self.identity, self.world.provider, self.random.randbytes),
            records=dict(self.disk),
            random=self.random.random,
            now=self.world.now,
            wall=WALL + self.world.now,
        )
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
                    if record is not None:
                        self.disk[key] = record
                        self.later(0.01, lambda key=key: self.take(PskSaved(key)))  # type: ignore[misc]
                case NudgeTunnel(address=address):
                    self.nudged.append(str(address))
                    self.world.rekey()
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


def _keyed() -> tuple[World, Side, Side]:
    world = World()
    for side in world.sides:
        side.start()
    world.until(lambda: all(side.epoch() == 1 for side in world.sides), within=300.0)
    return world, *world.sides  # type: ignore[return-value]


def test_two_agents_that_know_each_others_lines_key_their_devices() -> None:
    _, first, second = _keyed()
    assert first.psk == second.psk not in (MANAGER, NO_PSK)
    assert first.status()["reached"] is True and first.status()["reason"] == ""


def test_a_silent_peer_is_asked_once_a_minute_and_left_as_it_is() -> None:
    world = World()
    first, _ = world.sides
    first.start()
    world.run(300.0)
    first.sent.clear()
    world.run(3600.0)
    assert 55 <= len(first.sent) <= 65
    assert first.psk == MANAGER and "no agent answers" in str(first.status()["reason"])


def test_another_identity_than_the_named_one_is_said_and_changes_nothing() -> None:
    world = World()
    first, second = world.sides
    first.start(replace(second.line(), identity=Fingerprint(bytes(32))))
    second.start()
    world.until(lambda: "another identity" in str(first.status()["reason"]), within=60.0)
    world.run(300.0)
    assert first.psk == second.psk == MANAGER


def test_a_key_that_the_device_does_not_have_is_said() -> None:
    world = World()
    first, second = world.sides
    first.start(replace(second.line(), wireguard=PublicKey(bytes([5] * 32))))
    world.run(20.0)
    assert "wg0 has no peer with this public key" in str(first.status()["reason"])


def test_an_interface_that_vanishes_is_said_and_keyed_again_when_it_is_back() -> None:
    world, first, second = _keyed()
    key = second.psk
    for _ in range(5):
        first.is_up = False
        world.run(20.0)
        (condition,) = first.ask("status")["status"]["conditions"]  # type: ignore[index]
        assert "there is no interface wg0" in condition["message"]
        first.is_up, first.psk = True, MANAGER
        world.run(20.0)
        assert first.psk == second.psk == key
    assert first.status()["reason"] == ""


def test_a_device_that_was_made_anew_unseen_has_no_session_and_proves_nothing() -> None:
    world, first, second = _keyed()
    first.ask("rotate")
    world.until(lambda: first.psk == second.psk and first.epoch() == 1 and not world.is_laid(), within=1.0)
    world.until(world.is_laid, within=200.0)
    for side in world.sides:
        side.psk, side.stamp = MANAGER, None
    world.run(20.0)
    assert first.epoch() == second.epoch() == 1
    assert first.status()["lastHandshakeSeconds"] is None
    world.until(lambda: first.epoch() == second.epoch() == 2, within=300.0)


def test_a_device_with_another_mark_is_another_device() -> None:
    world, first, _ = _keyed()
    first.fwmark = 7
    world.run(20.0)
    assert first.agent is not None and "start this agent again" in first.agent.replaced


@pytest.mark.parametrize("number", [1, 2])
def test_leaving_takes_both_sides_back_and_is_over_then(number: int) -> None:
    world, *_ = _keyed()
    leaving = world.sides[number - 1]
    assert leaving.ask("leave")["ok"] is True
    assert leaving.agent is not None
    agent = leaving.agent
    world.until(lambda: agent.has_left, within=600.0)
    assert leaving.psk == leaving.other.psk == MANAGER
    leaving.agent = None
    world.run(300.0)
    assert leaving.other.psk == MANAGER


def test_leaving_names_who_is_out_of_reach_and_changes_nothing_unless_forced() -> None:
    world, first, second = _keyed()
    key, world.is_cut = first.psk, True
    world.run(60.0)
    answer = first.ask("leave")
    assert answer["ok"] is False and "out of reach: m2" in str(answer["error"])
    world.run(60.0)
    assert first.psk == second.psk == key
    assert first.ask("leave-forced") == {"ok": True, "away": "m2"}
    agent = first.agent
    assert agent is not None
    world.until(lambda: agent.has_left, within=30.0)
    assert first.psk == MANAGER and second.psk == key


def test_a_nudge_goes_to_an_address_that_is_the_peers_alone() -> None:
    world, first, second = _keyed()
    first.ask("rotate")
    world.until(lambda: first.epoch() == second.epoch() == 2, within=600.0)
    assert set(first.nudged) <= {"10.7.0.2"} and set(second.nudged) <= {"10.7.0.1"}
    assert first.nudged or second.nudged


# --- the peers file -----------------------------------------------------------------------------------------


def test_a_line_is_read_back_as_it_was_printed() -> None:
    line = replace(World().sides[0].line(), name='odd "name"\\')
    parsed = parse_peers(yaml.safe_load("rotationInterval: 10m\npeers:\n" + render_line(line)))
    assert parsed.peers == {line.wireguard: line}
    assert parsed.policy == PostQuantum(PostQuantumMode.PREFERRED, 600.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"publicKey": "abc"}, "peers[0].publicKey"),
        ({"probeKey": None}, "peers[0].probeKey"),
        ({"identity": "00"}, "peers[0].identity"),
        ({"endpoint": "192.0.2.1:1"}, "peers[0].endpoint"),
        ({"name": ""}, "peers[0].name"),
    ],
)
def test_a_wrong_line_is_refused_with_the_place_and_what_is_allowed(
    change: dict[str, object], named: str
) -> None:
    line = yaml.safe_load(render_line(World().sides[0].line()))[0]
    with pytest.raises(InvalidResource) as refused:
        parse_peers({"peers": [line | change]})
    assert named in str(refused.value)


@pytest.mark.parametrize("document", [None, [], {}, {"peers": []}, {"peers": [1]}, {"peers": "a"}])
def test_what_is_no_peers_file_is_refused(document: object) -> None:
    with pytest.raises(InvalidResource):
        parse_peers(document)


def test_two_lines_of_one_machine_are_refused() -> None:
    line = yaml.safe_load(render_line(World().sides[0].line()))[0]
    with pytest.raises(InvalidResource, match="a second"):
        parse_peers({"peers": [line, line]})
