"""What one edge that moves to another hub costs a hub of a large tree: the whole agent, without a network.

The agent is one of 20 hubs. Its device, which outlived an earlier run, has every peer, and every edge is
attached to some hub. Another hub then brings the claim of one edge that has moved. Measured is from that
datagram until the device is told: opened, its signature checked, planned. Times are of the processor, so that
they hold on a busy machine.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from random import Random

from scope_agent.agent import Agent, AgentConfig
from scope_agent.inputs import (
    Applied,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    DiskState,
    Input,
    InterfacesChanged,
    Output,
    Send,
    Socket,
)
from scope_agent.inputs import (
    Target as BatchTarget,
)
from scope_agent.wireguard.device import AddAllowedIps, DesiredDevice, ObservedDevice, ObservedPeer

from bench.agents import BenchError
from bench.result import Benchmark, Row, Sample, Target
from bench.stand_ins import agent_identity, stand_in_identity
from scope.attachments import sign_attachment
from scope.channel import BOOT_ID_BYTES, Channel
from scope.model import (
    Addressing,
    Assignment,
    Attachment,
    Candidate,
    CandidateKind,
    DeviceKind,
    Endpoint,
    Mapping,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Role,
    Snapshot,
    TopologyMode,
)
from scope.wire import Attach

HUBS = 20
SIZES = (100, 1_000, 10_000)  # edges
CHANGES = 100
PREFIX = IPv4Network("10.0.0.0/8")
OURS = Endpoint.parse("203.0.113.5:25000")
WALL = 1_800_000_000.0
MESH = "mesh"


def _tree(attempts: int) -> Iterator[Sample | Row]:
    for size in SIZES:
        hub = _Hub(size)
        gc.collect()
        samples = [hub.move(number) for number in range(attempts)]
        yield {
            "edges": size,
            "hubs": HUBS,
            "one edge moves, median, ms": statistics.median(samples),
            "one edge moves, p99, ms": Target().quantile(samples, 0.99),
        }
        if size == SIZES[-1]:
            yield from samples


class _Hub:
    """The agent of a hub; stand-ins 0 to 18 are the other hubs, the rest are edges."""

    def __init__(self, edges: int) -> None:
        self._edges = edges
        self._hubs = [stand_in_identity(number).public.wireguard for number in range(HUBS - 1)]
        identity = agent_identity()
        own = Peer(
            Meta("hub", uid="hub"),
            PeerSpec("home"),
            PeerReport(identity.public),
            Assignment((IPv4Interface("10.0.0.1/8"),), Role.HUB),
        )
        peers = {
            peer.report.keys.wireguard: peer for peer in map(_peer, range(HUBS - 1 + edges)) if peer.report
        }
        mesh = Mesh(Meta("home", uid=MESH), MeshSpec(Addressing(PREFIX), topology=TopologyMode.TREE))
        claims = tuple(self._claim(edge, self._hubs[edge % len(self._hubs)], 1) for edge in range(edges))
        self._now = 100.0
        self._agent = Agent(
            AgentConfig("home", "scope0", identity, PublicKey(bytes(32))),
            channel=Channel(secret=identity.probe, boot_id=bytes(BOOT_ID_BYTES)),
            state=DiskState(Snapshot(mesh, own, peers), listen_port=OURS.port, attachments=claims),
            random=Random(1).random,
            now=self._now,
            wall=WALL,
        )
        self._device = ObservedDevice(
            "scope0",
            exists=True,
            public_key=identity.public.wireguard,
            listen_port=OURS.port,
            peers={key: _known(peer) for key, peer in peers.items()},
        )
        self._bearer = Channel(secret=stand_in_identity(0).probe, boot_id=b"\1" * BOOT_ID_BYTES)
        self._agent_key = identity.public.probe
        self._bearer.set_correspondents(frozenset({self._agent_key}))
        self._at = Socket(_endpoint(0))
        self._give(InterfacesChanged(frozenset({IPv4Interface("203.0.113.5/24")})))
        self._settle(self._give(DeviceObserved(self._device, DeviceKind.USER_SPACE, WALL)))
        self._greet()

    def move(self, number: int) -> float:
        """One edge goes to the next hub: the milliseconds until the device is told."""
        self._now += 0.001
        edge = number * 7919 % self._edges
        hub = self._hubs[(edge + 1 + number // self._edges) % len(self._hubs)]
        moved = self._claim(edge, hub, 2 + number)
        datagram = DatagramArrived(self._bearer.seal(self._agent_key, Attach((moved,))), self._at)
        began = time.thread_time()
        outputs = self._give(datagram)
        took = 1e3 * (time.thread_time() - began)
        actions = [action for each in outputs if isinstance(each, DeviceBatch) for action in each.actions]
        gained = [action.key for action in actions if isinstance(action, AddAllowedIps)]
        if hub not in gained:
            raise BenchError(f"the hub to which an edge moved was not given its prefixes, only: {actions}")
        self._settle(outputs)
        return took

    def _greet(self) -> None:
        """Have the channel with the other hub stand, by whatever the two have to say first."""
        for _ in range(3):
            hello = self._bearer.seal(self._agent_key, Attach((self._claim(0, self._hubs[0], 1),)))
            for each in self._give(DatagramArrived(hello, self._at)):
                if isinstance(each, Send) and each.leg == self._at:
                    self._bearer.open(each.data)

    def _settle(self, outputs: list[Output]) -> None:
        """Do what the device is told until nothing is left."""
        while batches := [each for each in outputs if isinstance(each, DeviceBatch)]:
            desired = batches[-1].desired
            assert desired is not None
            self._device = _made(desired)
            outputs = self._give(Applied(BatchTarget.DEVICE))
            outputs += self._give(DeviceObserved(self._device, DeviceKind.USER_SPACE, WALL))

    def _give(self, event: Input) -> list[Output]:
        self._agent.receive(event, self._now)
        return self._agent.outputs()

    def _claim(self, edge: int, hub: PublicKey, epoch: int) -> Attachment:
        identity = stand_in_identity(HUBS - 1 + edge)
        key = identity.public.wireguard
        return sign_attachment(mesh_uid=MESH, edge=key, hub=hub, epoch=epoch, secret=identity.signing)


def _known(peer: Peer) -> ObservedPeer:
    """A peer of the device as an earlier agent left it."""
    if peer.report is None:
        raise BenchError(f"{peer.meta.name} has no report")
    return ObservedPeer(
        peer.report.keys.wireguard,
        peer.report.endpoints[0].endpoint,
        frozenset(IPv4Network((int(each), 32)) for each in peer.assignment.addresses),
        last_handshake=WALL,
    )


def _made(desired: DesiredDevice) -> ObservedDevice:
    peers = {
        key: ObservedPeer(key, peer.endpoint, peer.allowed_ips, peer.keepalive, last_handshake=WALL)
        for key, peer in desired.peers.items()
    }
    return ObservedDevice(
        desired.name,
        exists=True,
        up=True,
        public_key=desired.public_key,
        listen_port=desired.listen_port,
        mtu=desired.mtu,
        fwmark=desired.fwmark,
        addresses=desired.addresses,
        routes=desired.routes,
        guarded=desired.guarded,
        peers=peers,
    )


def _peer(number: int) -> Peer:
    role = Role.HUB if number < HUBS - 1 else Role.EDGE
    candidate = Candidate(_endpoint(number), CandidateKind.HOST)
    return Peer(
        Meta(f"peer-{number}", uid=f"uid-{number}"),
        PeerSpec("home"),
        PeerReport(stand_in_identity(number).public, (candidate,), Mapping.NONE),
        Assignment((IPv4Interface((int(PREFIX.network_address) + 2 + number, 8)),), role, online=True),
    )


def _endpoint(number: int) -> Endpoint:
    return Endpoint(IPv4Address("198.18.0.1") + number, 51820)


BENCHMARKS = (
    Benchmark(
        "tree-10000",
        unit="ms",
        what="one edge among 10,000 moves to another of 20 hubs: until a hub's device is told",
        target=Target(p99=50.0),
        attempts=CHANGES,
        run=_tree,
    ),
)
