"""The agent of a mesh on an existing interface: two in virtual time, told of each other by a registry."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from scope_agent.inputs import DiskState, FactArrived
from scope_agent.mesh_psk_agent import MeshPskAgent, MeshPskConfig
from scope_agent.psk_agent import ForeignDevice
from scope_agent.state import identity_of, identity_on

from scope.model import (
    Addressing,
    Kind,
    Mesh,
    MeshSpec,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    PostQuantum,
    PostQuantumMode,
    Revision,
    Secret,
    Snapshot,
)
from scope.registry.port import Deleted, Fact, Listed, Put
from scope.tombstones import sign_tombstone
from tests.unit.foreign_pair import MANAGER, WALL, Side, World

MESH = Mesh(
    Meta("home", uid="mesh-uid"),
    MeshSpec(
        Addressing(), existing_interface="wg0", post_quantum=PostQuantum(PostQuantumMode.PREFERRED, 3600.0)
    ),
)
REGISTRY = identity_of(*(Secret(Random(n).randbytes(32)) for n in (71, 72, 73)))


class Registry:
    """What both agents are told, and when."""

    def __init__(self) -> None:
        self.world = World()
        self.first, self.second = self.world.sides
        self.number = 0
        self.peers = {side.number: self._peer(side) for side in self.world.sides}

    def _peer(self, side: Side) -> Peer:
        report = PeerReport(self._identity(side).public, identity=side.identity.public.fingerprint())
        return Peer(Meta(f"home.m{side.number}", uid=f"u{side.number}"), PeerSpec("home"), report)

    def _identity(self, side: Side):  # type: ignore[no-untyped-def]
        probe = Secret(Random(100 + side.number).randbytes(32))
        signing = Secret(Random(200 + side.number).randbytes(32))
        return identity_on(side.key, identity_of(probe, probe, signing))

    def start(self, side: Side, *, snapshot: Snapshot | None = None) -> None:
        side.channel = side.new_channel()
        agent = MeshPskAgent(
            MeshPskConfig("home", self._identity(side), REGISTRY.public.signing),
            ForeignDevice("wg0", side.key, listen_port=51820, fwmark=0),
            channel=side.channel,
            state=DiskState(snapshot or Snapshot()),
            records=dict(side.disk),
            random=side.random.random,
            now=self.world.now,
            wall=WALL + self.world.now,
        )
        side.run(agent)
        side.perform()

    def inform(self, side: Side) -> None:
        self.number += 1
        revision = Revision("r", self.number)
        self.tell(Listed(Kind.MESH, revision, (MESH,)), side)
        self.tell(Listed(Kind.PEER, revision, tuple(self.peers.values())), side)

    def tell(self, fact: Fact, *sides: Side) -> None:
        for side in sides or self.world.sides:
            side.take(FactArrived(fact))

    def put(self, peer: Peer, *sides: Side) -> None:
        self.number += 1
        self.tell(Put(peer, Revision("r", self.number)), *sides)

    def buried(self, side: Side) -> Peer:
        peer = self.peers[side.number]
        tombstone = sign_tombstone(
            mesh_uid="mesh-uid", peer_uid=peer.meta.uid, key=side.key, secret=REGISTRY.signing
        )
        return replace(peer, assignment=replace(peer.assignment, tombstone=tombstone))

    def epochs(self) -> list[object]:
        return [_psk(side)["epoch"] for side in self.world.sides]

    def is_back(self) -> bool:
        return self.first.psk == self.second.psk == MANAGER


def _psk(side: Side) -> dict[str, object]:
    peers = side.ask("status")["status"]["peers"]  # type: ignore[index]
    return peers[0]["psk"] if peers else {"epoch": None}


def _agent(side: Side) -> MeshPskAgent:
    assert isinstance(side.agent, MeshPskAgent)
    return side.agent


@pytest.fixture
def keyed() -> Registry:
    registry = Registry()
    for side in registry.world.sides:
        registry.start(side)
        registry.inform(side)
    registry.world.until(lambda: registry.epochs() == [1, 1], within=300.0)
    return registry


def test_members_of_the_mesh_key_their_devices_and_say_so_in_their_reports(keyed: Registry) -> None:
    assert keyed.first.psk == keyed.second.psk != MANAGER
    keyed.world.run(30.0)
    report = keyed.first.report
    assert report is not None
    (link,) = report.links
    assert (link.peer, link.path) == ("home.m2", PathKind.DIRECT)
    assert link.psk is not None and (link.psk.epoch, link.psk.failure) == (1, None)
    assert report.keys.wireguard == keyed.first.key and report.endpoints == ()
    assert report.post_quantum is not None and report.post_quantum.keyed == 1


def test_a_stranger_on_the_device_is_left_alone_until_the_mesh_names_it() -> None:
    registry = Registry()
    second = registry.peers.pop(2)
    for side in registry.world.sides:
        registry.start(side)
    registry.inform(registry.first)
    registry.world.run(300.0)
    assert registry.first.sent == [] and registry.is_back()
    registry.peers[2] = second
    registry.put(second, registry.first)
    registry.inform(registry.second)
    registry.world.until(lambda: registry.epochs() == [1, 1], within=300.0)


def test_a_restart_keeps_the_key_before_the_registry_is_heard(keyed: Registry) -> None:
    key, snapshot = keyed.first.psk, _agent(keyed.first).snapshot()
    keyed.first.psk = MANAGER  # the machine booted, too
    keyed.start(keyed.first, snapshot=snapshot)
    keyed.world.run(1.0)
    assert keyed.first.psk == keyed.second.psk == key


@pytest.mark.parametrize("number", [1, 2])
def test_a_removed_peer_and_the_others_go_back_to_the_managers_key(keyed: Registry, number: int) -> None:
    removed = keyed.world.sides[number - 1]
    keyed.put(keyed.buried(removed))
    keyed.world.until(keyed.is_back, within=600.0)
    agent = _agent(removed)
    keyed.world.until(lambda: agent.has_left, within=300.0)
    keyed.world.run(600.0)
    assert keyed.is_back() and not _agent(removed.other).has_left


def test_a_peer_that_was_removed_while_an_agent_was_away_is_led_back_after_its_start(keyed: Registry) -> None:
    staying, removed = keyed.world.sides
    snapshot = _agent(staying).snapshot()
    staying.agent = None
    keyed.put(keyed.buried(removed), removed)
    keyed.world.run(60.0)
    assert staying.psk == removed.psk != MANAGER
    keyed.peers[2] = keyed.buried(removed)
    keyed.start(staying, snapshot=snapshot)
    keyed.inform(staying)
    keyed.world.until(keyed.is_back, within=900.0)


def test_whoever_does_not_answer_keeps_the_key_that_both_sides_hold(keyed: Registry) -> None:
    key, keyed.world.is_cut = keyed.first.psk, True
    keyed.world.run(60.0)
    keyed.number += 1
    keyed.tell(Deleted(keyed.peers[2], Revision("r", keyed.number)), keyed.first)
    keyed.world.run(600.0)
    assert keyed.first.psk == keyed.second.psk == key
    (condition,) = keyed.first.ask("status")["status"]["conditions"]  # type: ignore[index]
    assert "home.m2 are going back" in condition["message"]
    keyed.world.is_cut = False
    keyed.world.until(keyed.is_back, within=900.0)


def test_a_peer_that_comes_back_is_keyed_anew(keyed: Registry) -> None:
    keyed.number += 1
    keyed.tell(Deleted(keyed.peers[2], Revision("r", keyed.number)), keyed.first)
    keyed.world.until(keyed.is_back, within=600.0)
    keyed.start(keyed.second)
    keyed.inform(keyed.second)
    keyed.put(keyed.peers[2], keyed.first)
    keyed.world.until(lambda: keyed.first.psk == keyed.second.psk != MANAGER, within=600.0)


def test_an_idle_pair_goes_back_without_waiting_for_traffic(keyed: Registry) -> None:
    keyed.world.is_used = False
    keyed.world.run(400.0)  # the session is long gone
    assert keyed.first.ask("give-back")["ok"] is True
    agent = _agent(keyed.first)
    keyed.world.until(lambda: agent.has_left, within=300.0)
    assert keyed.is_back()


def test_who_leaves_is_told_whom_it_waits_for_and_for_how_long_at_most(keyed: Registry) -> None:
    assert keyed.first.ask("give-back")["ok"] is True
    started, agent = keyed.world.now, _agent(keyed.first)
    (awaited,) = keyed.first.ask("status")["status"]["awaited"]  # type: ignore[index]
    assert awaited["name"] == "home.m2" and awaited["reason"] == ""
    keyed.world.until(lambda: agent.has_left, within=awaited["seconds"])
    assert keyed.world.now > started
    assert keyed.first.ask("status")["status"]["awaited"] == []  # type: ignore[index]


def test_a_mesh_on_another_interface_is_another_mesh(keyed: Registry) -> None:
    keyed.number += 1
    moved = replace(MESH, spec=replace(MESH.spec, existing_interface="wg1"))
    keyed.tell(Put(moved, Revision("r", keyed.number)), keyed.first)
    assert "is on wg1, and this peer on wg0" in _agent(keyed.first).replaced
