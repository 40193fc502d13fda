"""One agent among many peers that answer: that it comes to an end, and what it plans on the way."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from collections.abc import Mapping as MappingOf
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from random import Random

import pytest
from bench.stand_ins import agent_identity, stand_in_identity
from scope_agent import agent as agent_module
from scope_agent.agent import MAX_BATCH, Agent, AgentConfig
from scope_agent.inputs import (
    Applied,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    DiskState,
    Input,
    InterfacesChanged,
    Observe,
    Send,
    Socket,
    Target,
)
from scope_agent.paths import pace
from scope_agent.wireguard.device import AddPeer, DesiredDevice, DesiredPeer, ObservedDevice, ObservedPeer
from scope_agent.wireguard.plan import plan_device, plan_peers

from scope.channel import Channel, Hello, Received
from scope.model import (
    Addressing,
    Assignment,
    Candidate,
    CandidateKind,
    DeviceKind,
    Endpoint,
    IPAddress,
    Mapping,
    Mesh,
    MeshSpec,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Snapshot,
)
from scope.wire import Nominate, Nominated, Ping, Pong

PREFIX = IPv4Network("100.80.0.0/16")
THEIRS, OURS = IPv4Address("198.51.100.7"), Endpoint.parse("203.0.113.5:25000")
FIRST_PORT = 30000
RTT, BATCH_S = 0.01, 0.02
WALL = 1.8e9


class Crowd:
    """An agent that starts from a snapshot of `count` peers, each of which answers what it is asked.

    They see it at `seen`; `inner` are addresses of its own containers' interfaces.
    """

    def __init__(
        self, count: int, *, seen: Endpoint = OURS, inner: frozenset[IPAddress] = frozenset()
    ) -> None:
        self._seen = seen
        identity = agent_identity()
        own = Peer(
            Meta("agent", uid="agent"),
            PeerSpec("home"),
            PeerReport(identity.public),
            Assignment((IPv4Interface("100.80.0.1/16"),)),
        )
        peers = {peer.report.keys.wireguard: peer for peer in map(_peer, range(count)) if peer.report}
        mesh = Mesh(Meta("home", uid="mesh"), MeshSpec(Addressing(PREFIX)))
        self.now = 100.0
        self.agent = Agent(
            AgentConfig("home", "scope0", identity, PublicKey(bytes(32))),
            channel=Channel(secret=identity.probe, boot_id=bytes(16)),
            state=DiskState(Snapshot(mesh, own, peers), listen_port=OURS.port),
            random=Random(1).random,
            now=self.now,
        )
        self.batches: list[DeviceBatch] = []
        self.known: set[PublicKey] = set()
        self.desired: DesiredDevice | None = None
        self._channels = [self._channel(number, identity.public.probe) for number in range(count)]
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._give(InterfacesChanged(frozenset({IPv4Interface("203.0.113.5/24")}), inner=inner))
        self._look()

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while True:
            due = self.agent.get_timer()
            arrives = self._heap[0][0] if self._heap else end + 1.0
            if min(arrives, end + 1.0 if due is None else due) > end:
                self.now = end
                return
            if due is not None and due <= arrives:
                self.now = max(self.now, due)
                self.agent.handle_timer(self.now)
                self._perform()
            else:
                at, _, call = heapq.heappop(self._heap)
                self.now = max(self.now, at)
                call()

    @property
    def direct(self) -> int:
        """With how many peers a path stands."""
        return sum(pair.path is PathKind.DIRECT for pair in self.agent.paths(self.now).pairs.values())

    def _channel(self, number: int, agent: PublicKey) -> Channel:
        channel = Channel(secret=stand_in_identity(number).probe, boot_id=(number + 1).to_bytes(16, "big"))
        channel.set_correspondents(frozenset({agent}))
        return channel

    def _after(self, delay: float, call: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.now + delay, self._sequence, call))

    def _give(self, event: Input) -> None:
        self.agent.receive(event, self.now)
        self._perform()

    def _perform(self) -> None:
        for output in self.agent.outputs():
            match output:
                case Send(Socket(endpoint, None), data):
                    self._answer(endpoint, data)
                case DeviceBatch():
                    self.batches.append(output)
                    self._after(BATCH_S, lambda batch=output: self._apply(batch))  # type: ignore[misc]
                case Observe():
                    self._after(BATCH_S, self._look)
                case _:
                    pass

    def _answer(self, endpoint: Endpoint, data: bytes) -> None:
        channel = self._channels[endpoint.port - FIRST_PORT]
        answer: bytes | None = None
        match channel.open(data):
            case Hello(_, cookie):
                answer = cookie
            case Received(sender, Ping(transaction)):
                answer = channel.seal(sender, Pong(transaction, self._seen, has_session=True, received=0))
            case Received(sender, Nominate(sequence)):
                answer = channel.seal(sender, Nominated(sequence))
            case _:
                pass
        if answer is not None:
            arrived = DatagramArrived(answer, Socket(endpoint))
            self._after(RTT, lambda: self._give(arrived))

    def _apply(self, batch: DeviceBatch) -> None:
        self.desired = batch.desired
        self.known |= {action.key for action in batch.actions if isinstance(action, AddPeer)}
        self._give(Applied(Target.DEVICE))
        self._look()

    def _look(self) -> None:
        self._give(DeviceObserved(self._observed(), DeviceKind.USER_SPACE, WALL + self.now))

    def _observed(self) -> ObservedDevice:
        """The device after everything that was asked of it, with the peers that it was told of."""
        desired = self.desired
        if desired is None:
            return ObservedDevice("scope0")
        peers = {
            key: ObservedPeer(
                key,
                peer.endpoint,
                peer.allowed_ips,
                peer.keepalive,
                last_handshake=WALL if peer.endpoint else None,
            )
            for key, peer in desired.peers.items()
            if key in self.known
        }
        return ObservedDevice(
            "scope0", True, True, desired.public_key, desired.listen_port, desired.mtu, desired.fwmark,
            desired.addresses, desired.routes, desired.guarded, peers,
        )  # fmt: skip


def _peer(number: int) -> Peer:
    endpoint = Endpoint(THEIRS, FIRST_PORT + number)
    return Peer(
        Meta(f"peer-{number}", uid=f"uid-{number}"),
        PeerSpec("home"),
        PeerReport(
            stand_in_identity(number).public, (Candidate(endpoint, CandidateKind.HOST),), Mapping.NONE
        ),
        Assignment((IPv4Interface(f"{PREFIX[2 + number]}/16"),)),
    )


def test_a_pair_that_answers_does_not_wait_behind_all_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # One turn of all 240 takes 6 s; an echo is too old to decide by after 3 s.
    monkeypatch.setattr(pace, "PACE_PER_SECOND", 40.0)
    monkeypatch.setattr(pace, "PACE_BURST", 10)
    crowd = Crowd(240)
    crowd.run(2 * 240 / 40.0 + 2.0)  # two pings for each: one before its channel stands, one after
    assert crowd.direct == 240


def test_a_long_plan_is_done_batch_by_batch_and_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def whole_device(desired: DesiredDevice, observed: ObservedDevice) -> tuple[object, ...]:
        compared.append(len(desired.peers))
        return plan_device(desired, observed)

    def some_peers(
        desired: MappingOf[PublicKey, DesiredPeer], observed: MappingOf[PublicKey, ObservedPeer]
    ) -> tuple[object, ...]:
        compared.append(len(desired))
        return plan_peers(desired, observed)

    monkeypatch.setattr(agent_module, "plan_device", whole_device)
    monkeypatch.setattr(agent_module, "plan_peers", some_peers)
    crowd = Crowd(300)
    crowd.run(20.0)
    assert crowd.desired is not None and crowd.known == crowd.desired.peers.keys()
    assert len(crowd.known) == crowd.direct == 300
    assert all(len(batch.actions) <= MAX_BATCH for batch in crowd.batches)
    # The whole device before and after it was made; then no more than what changed and one batch's worth.
    whole = [count for count in compared if count == 300]
    assert len(whole) <= 4
    assert len(compared) > 10


def test_open_peers_reflect_also_where_the_registry_last_called_them_offline() -> None:
    crowd = Crowd(3)
    crowd.run(3.0)
    view = crowd.agent.paths(crowd.now)
    assert view.mapping is Mapping.NONE
    assert view.reflectors_silent_since is None


def test_what_a_reflector_in_a_container_of_this_machine_sees_is_no_mapping_and_no_candidate() -> None:
    bridge = IPv4Address("10.244.0.1")
    crowd = Crowd(3, seen=Endpoint(bridge, 51736), inner=frozenset({bridge}))
    crowd.run(3.0)
    view = crowd.agent.paths(crowd.now)
    assert view.mapping is Mapping.UNKNOWN
    assert bridge not in {candidate.endpoint.address for candidate in view.candidates}
    assert view.reflectors_silent_since is None


def test_the_address_of_a_bridge_at_the_port_that_we_listen_on_is_where_we_are_seen() -> None:
    bridge = IPv4Address("192.168.1.1")
    crowd = Crowd(3, seen=Endpoint(bridge, OURS.port), inner=frozenset({bridge}))
    crowd.run(3.0)
    candidates = crowd.agent.paths(crowd.now).candidates
    assert bridge in {candidate.endpoint.address for candidate in candidates}
