"""The planner gives each resource at most one write at a time, nothing at rest, and heals what went wrong."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from ipaddress import IPv4Network, ip_address, ip_network

from scope_operator.plan.addresses import HOLD
from scope_operator.plan.planner import (
    MAX_IN_FLIGHT,
    MESH_INTERVAL,
    Action,
    Confirm,
    CreatePeer,
    DeletePeer,
    Planner,
    RevivePeer,
    WriteAssignment,
    WriteMeshStatus,
    WritePeer,
    key_of,
)
from scope_operator.plan.status import ALIVE

from scope.model import (
    Addressing,
    Assignment,
    Condition,
    Kind,
    Mesh,
    Peer,
    PublicKey,
    Resource,
    Role,
    Tombstone,
)
from scope.registry.memory import Create, Delete, Store, Update, UpdateStatus
from scope.registry.port import Conflict, NotFound, Put
from tests.unit.registry_conformance import MESH, peer, report

WALL = 1_700_000_000.0
KEY = PublicKey(bytes([7]) * 32)


class World:
    """A store, a planner over it, and two clocks that the test moves together."""

    def __init__(self, *, ipv4: str = "100.64.0.0/16", tells_liveness: bool = True) -> None:
        numbers = itertools.count(1)
        self.now = 0.0
        self.store = Store("sim", wall=lambda: WALL + self.now, new_uid=lambda: f"u{next(numbers)}")
        self.planner = Planner(now=0.0, tells_liveness=tells_liveness, signing_key=KEY)
        self.seen = self.store.revision
        self.writes = 0
        spec = replace(MESH.spec, addressing=Addressing(ipv4=IPv4Network(ipv4)))
        self.store.write(Create(replace(MESH, spec=spec)))

    def start(self) -> None:
        for kind in (Kind.MESH, Kind.PEER):
            self.planner.take(self.store.list(kind))
        self.seen = self.store.revision
        self.settle()

    def follow(self) -> None:
        for kind in (Kind.MESH, Kind.PEER):
            for fact in self.store.changes_since(kind, self.seen):
                self.planner.take(fact)
        self.seen = self.store.revision

    def plan(self) -> list[Action]:
        return self.planner.plan(now=self.now, wall=WALL + self.now)

    def do(self, action: Action) -> None:
        if isinstance(action, Confirm):
            self.planner.succeeded(action, self.store.find(*key_of(action)))
            return
        self.writes += 1
        kind = Kind.MESH if isinstance(action, WriteMeshStatus) else Kind.PEER
        resource = action.mesh if isinstance(action, WriteMeshStatus) else action.peer
        meta = resource.meta
        try:
            if isinstance(action, DeletePeer):
                self.store.write(Delete(kind, meta.name, meta.uid))
                self.planner.succeeded(action, None)
            elif isinstance(action, CreatePeer | RevivePeer | WritePeer):
                raise AssertionError("there are no Nodes here")
            else:
                write = UpdateStatus(kind, meta.name, action.part, meta.uid, meta.revision)
                self.planner.succeeded(action, self.store.write(write))
        except (Conflict, NotFound):
            self.planner.outdated(action, self.store.find(kind, meta.name), again_at=self.now)

    def settle(self) -> None:
        self.follow()
        while actions := self.plan():
            for action in actions:
                self.do(action)
            self.follow()

    def later(self, seconds: float, *, alive: tuple[str, ...] = ()) -> None:
        self.now += seconds
        self.planner.hear(dict.fromkeys(alive, 0.0), now=self.now)
        self.planner.sweep()
        self.settle()

    def join(self, seed: int) -> Peer:
        made = self.store.write(Create(peer(seed)))
        assert isinstance(made, Peer)
        return made

    def peer(self, seed: int) -> Peer:
        found = self.store.get(Kind.PEER, peer(seed).meta.name)
        assert isinstance(found, Peer)
        return found

    def mesh(self) -> Mesh:
        found = self.store.get(Kind.MESH, "home")
        assert isinstance(found, Mesh)
        return found

    def condition(self, resource: Resource, kind: str) -> Condition:
        assert isinstance(resource, Mesh | Peer)
        conditions = (
            resource.status.conditions if isinstance(resource, Mesh) else resource.assignment.conditions
        )
        return next(each for each in conditions if each.type == kind)

    def bury(self, seed: int) -> None:
        victim = self.peer(seed)
        assert victim.report is not None
        tombstone = Tombstone(
            self.mesh().meta.uid, victim.meta.uid, victim.report.keys.wireguard, KEY, bytes(64)
        )
        removed = Condition("Removed", "True", "ByAdministrator", "removed", WALL + self.now)
        part = replace(victim.assignment, online=False, conditions=(removed,), tombstone=tombstone)
        self.store.write(UpdateStatus(Kind.PEER, victim.meta.name, part, victim.meta.uid))
        self.settle()


def addresses(world: World) -> list[str]:
    peers = world.store.list(Kind.PEER).resources
    return [str(each.ip) for one in peers if isinstance(one, Peer) for each in one.assignment.addresses]


def test_a_new_peer_gets_its_address_at_once_and_the_mesh_its_counts() -> None:
    world = World()
    world.start()
    world.join(1)
    world.settle()
    assert len(addresses(world)) == 1
    world.later(MESH_INTERVAL)
    assert world.mesh().status.counts.peers == 1
    assert world.mesh().status.signing_key == KEY
    assert world.condition(world.mesh(), "Ready").status == "True"


def test_at_rest_nothing_is_written() -> None:
    world = World()
    for seed in range(1, 20):
        world.join(seed)
    world.start()
    names = tuple(peer(seed).meta.name for seed in range(1, 20))
    world.later(MESH_INTERVAL, alive=names)
    world.later(MESH_INTERVAL, alive=names)
    before = world.writes
    for _ in range(20):
        world.later(60.0, alive=names)
    assert world.writes == before
    assert (world.planner.depth, world.planner.delayed) == (0, 0)


def test_nothing_is_planned_before_meshes_and_peers_are_listed() -> None:
    world = World()
    world.join(1)
    world.planner.take(world.store.list(Kind.PEER))
    assert world.plan() == []
    world.planner.take(world.store.list(Kind.MESH))
    assert {type(action) for action in world.plan()} == {WriteAssignment, WriteMeshStatus}


def test_a_resource_whose_write_is_under_way_is_not_planned_again() -> None:
    world = World()
    world.start()
    world.join(1)
    world.follow()
    actions = [each for each in world.plan() if isinstance(each, WriteAssignment)]
    assert len(actions) == 1
    joined = world.peer(1)
    world.store.write(UpdateStatus(Kind.PEER, joined.meta.name, report(1, port=9), joined.meta.uid))
    world.follow()
    assert not [each for each in world.plan() if isinstance(each, WriteAssignment)]
    world.do(actions[0])  # a conflict: the agent wrote in between
    world.settle()
    assert len(addresses(world)) == 1
    assert world.peer(1).report == report(1, port=9)


def test_a_slow_registry_has_a_bounded_number_of_writes_under_way() -> None:
    world = World()
    for seed in range(1, 200):
        world.join(seed)
    for kind in (Kind.MESH, Kind.PEER):
        world.planner.take(world.store.list(kind))
    assert len(world.plan()) == MAX_IN_FLIGHT
    assert world.plan() == []


def test_peers_planned_together_get_distinct_addresses() -> None:
    world = World(ipv4="100.64.0.0/25")
    for seed in range(1, 127):
        world.join(seed)
    world.start()
    assert len(set(addresses(world))) == 126


def test_a_failed_write_frees_what_it_had_reserved_and_is_tried_again() -> None:
    world = World(ipv4="100.64.0.0/30")
    world.start()
    for seed in (1, 2):
        world.join(seed)
    world.follow()
    actions = [each for each in world.plan() if isinstance(each, WriteAssignment)]
    assert len(actions) == 2
    for action in actions:
        world.planner.failed(action, again_at=world.now + 1.0)
    assert not [each for each in world.plan() if isinstance(each, WriteAssignment)]
    assert world.planner.next_time() is not None
    world.now += 1.0
    world.settle()
    assert len(set(addresses(world))) == 2


def test_a_peer_of_an_existing_interface_is_no_hub_and_is_told_so() -> None:
    world = World()
    world.store.write(Delete(Kind.MESH, "home", world.mesh().meta.uid))
    spec = replace(MESH.spec, addressing=Addressing(), existing_interface="wg0")
    world.store.write(Create(replace(MESH, spec=spec)))
    hub = peer(1)
    world.store.write(Create(replace(hub, spec=replace(hub.spec, role=Role.HUB))))
    world.start()
    assert world.peer(1).assignment.role is Role.EDGE
    assert world.condition(world.peer(1), "Ready").reason == "ManagedElsewhere"
    assert not [each for each in world.mesh().status.conditions if each.type == "HubsAvailable"]


def test_exhaustion_is_said_on_mesh_and_peer_and_ends_when_the_prefix_is_widened() -> None:
    world = World(ipv4="100.64.0.0/30")
    for seed in (1, 2, 3):
        world.join(seed)
    world.start()
    world.later(MESH_INTERVAL)
    kept = addresses(world)
    assert len(kept) == 2
    assert world.condition(world.mesh(), "AddressesExhausted").status == "True"
    assert peer(3).meta.name in world.condition(world.mesh(), "AddressesExhausted").message
    assert world.condition(world.peer(3), "Ready").reason == "NoAddressLeft"
    wider = Addressing(ipv4=IPv4Network("100.64.0.0/29"))
    world.store.write(Update(replace(world.mesh(), spec=replace(world.mesh().spec, addressing=wider))))
    world.settle()
    world.later(MESH_INTERVAL)
    assert len(set(addresses(world))) == 3
    assert set(kept) < set(addresses(world))
    assert world.condition(world.mesh(), "AddressesExhausted").status == "False"
    assert {str(each) for seed in (1, 2, 3) for each in world.peer(seed).assignment.addresses} == {
        f"{address}/29" for address in addresses(world)
    }


def test_a_removed_peers_address_goes_to_whoever_waits_a_day_later() -> None:
    world = World(ipv4="100.64.0.0/30")
    for seed in (1, 2, 3):
        world.join(seed)
    world.start()
    freed = str(world.peer(1).assignment.addresses[0].ip)
    world.bury(1)
    world.later(HOLD - 1)
    assert world.peer(3).assignment.addresses == ()
    world.later(1)
    assert str(world.peer(3).assignment.addresses[0].ip) == freed
    assert world.peer(1).assignment.tombstone is not None


def test_a_mesh_moved_to_another_prefix_moves_its_peers_and_no_others() -> None:
    world = World()
    world.store.write(
        Create(
            replace(
                MESH,
                meta=replace(MESH.meta, name="work"),
                spec=replace(MESH.spec, addressing=Addressing(ipv4=IPv4Network("10.7.0.0/16"))),
            )
        )
    )
    world.join(1)
    world.store.write(Create(peer(2, mesh="work")))
    world.start()
    work_name = peer(2, mesh="work").meta.name
    before = world.store.get(Kind.PEER, work_name)
    moved = Addressing(ipv4=IPv4Network("10.9.0.0/24"))
    world.store.write(Update(replace(world.mesh(), spec=replace(world.mesh().spec, addressing=moved))))
    world.settle()
    assert world.peer(1).assignment.addresses[0].network == IPv4Network("10.9.0.0/24")
    assert world.store.get(Kind.PEER, work_name) == before
    world.store.write(Delete(Kind.MESH, "home", world.mesh().meta.uid))
    world.settle()
    assert world.store.get(Kind.PEER, work_name) == before
    assert world.condition(world.peer(1), "Ready").reason == "NoMesh"
    assert world.peer(1).assignment.addresses[0].network == IPv4Network("10.9.0.0/24")


def test_two_that_hold_one_address_after_a_restore_are_told_apart() -> None:
    world = World()
    world.join(1)
    world.start()
    has = world.peer(1).assignment
    double = replace(peer(2), assignment=has)
    world.store.write(Create(double))
    world.settle()
    assert world.peer(1).assignment == has
    assert len(set(addresses(world))) == 2


def test_online_follows_heartbeats_and_is_written_on_change_only() -> None:
    world = World()
    world.join(1)
    world.start()
    name = peer(1).meta.name
    world.later(5.0, alive=(name,))
    assert world.peer(1).assignment.online
    revision = world.peer(1).meta.revision
    world.now += ALIVE
    world.planner.hear({name: ALIVE - 1}, now=world.now)
    world.settle()
    assert world.peer(1).meta.revision == revision
    world.planner.hear({name: ALIVE}, now=world.now)
    world.settle()
    assert not world.peer(1).assignment.online
    assert world.peer(1).assignment.last_seen == WALL + world.now
    assert world.condition(world.peer(1), "Ready").reason == "Offline"


def test_a_peer_that_reports_is_online_at_once_and_for_as_long_as_a_heartbeat_counts() -> None:
    world = World()
    name = world.join(1).meta.name
    world.start()
    assert not world.peer(1).assignment.online
    world.store.write(UpdateStatus(Kind.PEER, name, report(1, port=7), world.peer(1).meta.uid))
    world.settle()
    assert world.peer(1).assignment.online
    world.later(1.0)
    world.later(ALIVE - 1.0)
    assert world.peer(1).assignment.online
    world.later(1.0)
    assert not world.peer(1).assignment.online


def test_a_report_that_a_list_tells_of_is_no_sign_of_life() -> None:
    world = World()
    name = world.join(1).meta.name
    world.start()
    world.store.write(UpdateStatus(Kind.PEER, name, report(1, port=7), world.peer(1).meta.uid))
    world.seen = world.store.revision
    world.planner.take(world.store.list(Kind.PEER))
    world.settle()
    assert not world.peer(1).assignment.online


def test_a_restarted_registry_side_lets_peers_speak_before_it_calls_them_offline() -> None:
    world = World()
    world.join(1)
    world.start()
    world.later(5.0, alive=(peer(1).meta.name,))
    world.planner = Planner(now=world.now, tells_liveness=True, signing_key=KEY)
    world.start()
    world.later(ALIVE - 1)
    assert world.peer(1).assignment.online
    world.later(1)
    assert not world.peer(1).assignment.online


def test_where_heartbeats_are_not_told_online_is_left_alone() -> None:
    world = World(tells_liveness=False)
    world.store.write(Create(replace(peer(1), assignment=Assignment(online=True, last_seen=1.0))))
    world.start()
    world.now += 10 * ALIVE
    world.planner.sweep()
    world.settle()
    assert world.peer(1).assignment.online


def test_expired_peers_are_deleted_but_not_while_a_restart_could_not_have_heard_them() -> None:
    world = World()
    world.join(1)
    world.join(2)
    world.start()
    expiry = world.mesh().spec.peer_expiry
    world.later(expiry - 1)
    assert len(world.store.list(Kind.PEER).resources) == 2
    world.now += 1
    world.planner = Planner(now=world.now, tells_liveness=True, signing_key=KEY)
    world.start()
    assert len(world.store.list(Kind.PEER).resources) == 2
    world.later(ALIVE, alive=(peer(2).meta.name,))
    assert [each.meta.name for each in world.store.list(Kind.PEER).resources] == [peer(2).meta.name]


def test_a_tombstone_is_deleted_after_the_meshs_time() -> None:
    world = World()
    world.join(1)
    world.start()
    world.bury(1)
    world.later(world.mesh().spec.peer_expiry - 1)
    assert len(world.store.list(Kind.PEER).resources) == 1
    world.later(1)
    assert world.store.list(Kind.PEER).resources == ()


def test_a_route_that_the_elder_gives_up_is_the_youngers() -> None:
    world = World()
    for seed in (1, 2):
        asked = peer(seed)
        world.store.write(
            Create(replace(asked, spec=replace(asked.spec, routes=(ip_network("10.1.0.0/16"),))))
        )
        world.now += 1
    world.start()
    world.later(MESH_INTERVAL)
    assert world.condition(world.peer(2), "RouteConflict").status == "True"
    assert world.condition(world.mesh(), "RouteConflict").status == "True"
    assert [each.type for each in world.peer(1).assignment.conditions] == ["Ready"]
    world.store.write(Update(replace(world.peer(1), spec=replace(world.peer(1).spec, routes=()))))
    world.settle()
    world.later(MESH_INTERVAL)
    assert [each.type for each in world.peer(2).assignment.conditions] == ["Ready"]
    assert world.condition(world.mesh(), "RouteConflict").status == "False"


def test_an_incomplete_list_forgets_nobody_and_a_complete_one_does() -> None:
    world = World()
    world.join(1)
    world.start()
    world.later(MESH_INTERVAL)
    listed = world.store.list(Kind.PEER)
    world.planner.take(replace(listed, resources=(), complete=False))
    world.settle()
    world.later(MESH_INTERVAL)
    assert world.mesh().status.counts.peers == 1
    gone = world.peer(1)
    world.store.write(Delete(Kind.PEER, gone.meta.name, gone.meta.uid))
    world.planner.take(world.store.list(Kind.PEER))
    world.seen = world.store.revision
    world.settle()
    world.later(MESH_INTERVAL)
    assert world.mesh().status.counts.peers == 0


def test_whom_a_list_lacks_keeps_its_address_until_the_registry_says_that_it_is_gone() -> None:
    world = World(ipv4="100.64.0.0/29")
    for seed in range(5):
        world.join(seed)
    world.start()
    before = {seed: world.peer(seed).assignment.addresses for seed in range(5)}
    assert all(before.values())
    listed = world.store.list(Kind.PEER)
    world.planner.take(replace(listed, resources=listed.resources[:1]))
    asked = world.plan()
    assert {type(each) for each in asked} == {Confirm}
    world.join(5)
    world.follow()
    (given,) = world.plan()
    assert isinstance(given, WriteAssignment)
    assert given.part.addresses not in before.values()
    for action in (*asked, given):
        world.do(action)
    world.settle()
    world.later(MESH_INTERVAL)
    assert {seed: world.peer(seed).assignment.addresses for seed in range(5)} == before
    assert world.mesh().status.counts.peers == 6
    assert world.plan() == []


def test_a_mesh_that_a_list_lacks_is_there_until_the_registry_says_that_it_is_gone() -> None:
    world = World()
    world.start()
    listed = world.store.list(Kind.MESH)
    world.planner.take(replace(listed, resources=()))
    world.join(1)
    world.settle()
    assert len(addresses(world)) == 1


def test_whom_a_list_lacks_is_gone_once_the_registry_says_so_and_its_address_is_free() -> None:
    world = World(ipv4="100.64.0.0/30")
    for seed in range(2):
        world.join(seed)
    world.start()
    gone = world.peer(0)
    world.store.write(Delete(Kind.PEER, gone.meta.name, gone.meta.uid))
    world.planner.take(world.store.list(Kind.PEER))
    world.seen = world.store.revision
    world.join(2)
    world.settle()
    assert world.peer(2).assignment.addresses == gone.assignment.addresses


def test_a_peer_that_was_made_anew_while_a_list_lacked_it_is_a_new_one() -> None:
    world = World()
    world.join(1)
    world.start()
    first = world.peer(1)
    world.store.write(Delete(Kind.PEER, first.meta.name, first.meta.uid))
    world.planner.take(world.store.list(Kind.PEER))
    world.seen = world.store.revision
    (asked,) = (each for each in world.plan() if isinstance(each, Confirm))
    second = world.join(1)
    world.do(asked)
    world.settle()
    assert world.peer(1).meta.uid == second.meta.uid != first.meta.uid
    assert world.peer(1).assignment.addresses


def test_a_registry_that_cannot_be_asked_is_asked_again_and_frees_nothing_meanwhile() -> None:
    world = World(ipv4="100.64.0.0/30")
    for seed in range(2):
        world.join(seed)
    world.start()
    world.planner.take(replace(world.store.list(Kind.PEER), resources=()))
    asked = world.plan()
    for action in asked:
        world.planner.failed(action, again_at=world.now + 1.0)
    world.join(2)
    world.settle()
    assert world.peer(2).assignment.addresses == ()
    world.now += 1.0
    assert [type(each) for each in world.plan()] == [Confirm, Confirm]


def test_what_was_deleted_does_not_come_back_by_older_news_and_does_by_newer() -> None:
    world = World()
    world.join(1)
    world.start()
    stale = world.peer(1)
    older = world.store.list(Kind.PEER)
    world.store.write(Delete(Kind.PEER, stale.meta.name, stale.meta.uid))
    world.settle()
    for fact in (Put(stale, older.revision), older):
        world.planner.take(fact)
        assert [each for each in world.plan() if not isinstance(each, WriteMeshStatus)] == []
    again = replace(stale, meta=replace(stale.meta, revision=world.store.revision.number + 1))
    world.planner.take(Put(replace(again, assignment=Assignment()), world.store.revision))
    world.now += MESH_INTERVAL
    assert WriteAssignment in {type(each) for each in world.plan()}


def test_a_restored_registry_whose_list_is_cut_short_gives_no_address_twice() -> None:
    world = World(ipv4="100.64.0.0/29")
    for seed in range(4):
        world.join(seed)
    world.start()
    before = {seed: world.peer(seed).assignment.addresses for seed in range(4)}
    peers, meshes = world.store.list(Kind.PEER), world.store.list(Kind.MESH)
    for _ in range(9):  # the history that is lost
        bury = world.join(5)
        world.settle()
        world.store.write(Delete(Kind.PEER, bury.meta.name, bury.meta.uid))
    world.settle()
    world.store = Store("sim", wall=lambda: WALL + world.now, new_uid=lambda: "after")
    world.store.restore((*meshes.resources, *peers.resources), (), number=peers.revision.number)
    world.seen = world.store.revision
    world.planner.take(world.store.list(Kind.MESH), after=world.planner.seen(Kind.MESH))
    listed = world.store.list(Kind.PEER)
    world.planner.take(replace(listed, resources=listed.resources[:1]), after=world.planner.seen(Kind.PEER))
    world.join(5)
    world.settle()
    assert {seed: world.peer(seed).assignment.addresses for seed in range(4)} == before
    assert len(set(addresses(world))) == 5


def test_a_registry_that_was_restored_is_believed_from_its_list_on() -> None:
    world = World()
    world.join(1)
    world.start()
    old = {kind: world.store.list(kind) for kind in (Kind.MESH, Kind.PEER)}
    has = world.peer(1).assignment
    for port in range(1, 9):
        joined = world.peer(1)
        world.store.write(UpdateStatus(Kind.PEER, joined.meta.name, report(1, port=port), joined.meta.uid))
    world.join(2)
    world.settle()
    world.store = Store("sim", wall=lambda: WALL + world.now, new_uid=lambda: "after")
    restored = [resource for listed in old.values() for resource in listed.resources]
    world.store.restore(restored, (), number=old[Kind.PEER].revision.number)
    for kind in (Kind.MESH, Kind.PEER):
        world.planner.take(world.store.list(kind), after=world.planner.seen(kind))
    world.seen = world.store.revision
    world.settle()
    joined = world.peer(1)
    world.store.write(UpdateStatus(Kind.PEER, joined.meta.name, Assignment(), joined.meta.uid))
    world.settle()
    assert world.peer(1).assignment.addresses == has.addresses


def test_a_younger_mesh_in_the_elders_addresses_is_told() -> None:
    world = World()
    world.now += 1
    world.store.write(Create(replace(MESH, meta=replace(MESH.meta, name="late"))))
    world.start()
    late = world.store.get(Kind.MESH, "late")
    assert world.condition(late, "Ready").reason == "AddressesOverlap"
    assert world.condition(world.mesh(), "Ready").status == "True"


def test_a_held_address_is_honoured_by_a_registry_made_anew() -> None:
    world = World()
    world.start()
    asked = peer(1)
    assert asked.report is not None
    held = replace(asked.report, held_addresses=(ip_address("100.64.200.1"),))
    world.store.write(Create(replace(asked, report=held)))
    world.settle()
    assert addresses(world) == ["100.64.200.1"]


def test_one_change_among_ten_thousand_peers_is_planned_within_20_ms() -> None:
    world = World()
    for seed in range(1, 10_001):
        world.store.write(Create(peer(seed)))
        world.seen = world.store.revision
    world.start()
    world.later(MESH_INTERVAL)
    one = world.peer(5000)
    assert one.report is not None
    best = 1.0
    for port in range(1, 6):
        part = replace(report(1, port=port), keys=one.report.keys)
        world.store.write(UpdateStatus(Kind.PEER, one.meta.name, part, one.meta.uid))
        began = time.perf_counter()
        world.follow()
        world.plan()
        best = min(best, time.perf_counter() - began)
        world.now += MESH_INTERVAL
    assert best < 0.020
