"""The Nodes of a cluster get their peers and lose them, and a mistake of the API server deletes nobody."""

from __future__ import annotations

import itertools
from dataclasses import replace
from ipaddress import IPv4Network, ip_network

from scope_agent.state import make_identity
from scope_operator.plan.nodes import (
    CONFIRM,
    HOLD,
    Node,
    NodeDeleted,
    NodePeers,
    NodePut,
    NodesListed,
)
from scope_operator.plan.planner import (
    MESH_INTERVAL,
    Action,
    Confirm,
    CreatePeer,
    DeletePeer,
    Planner,
    RevivePeer,
    Why,
    WriteMeshStatus,
    WritePeer,
    key_of,
)

from scope.model import (
    Addressing,
    Cluster,
    Condition,
    Kind,
    LabelSelector,
    Mesh,
    MeshCluster,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PodNetworking,
    PodPrefix,
    PodSource,
    Translation,
)
from scope.names import MAX_NAME, peer_name
from scope.registry.memory import Create, Delete, Store, Update, UpdateStatus
from scope.registry.port import AlreadyExists, Conflict, Deleted, NotFound
from tests.unit.registry_conformance import MESH

WALL = 1_700_000_000.0
BERLIN = LabelSelector(match_labels=(("site", "berlin"),))


class World:
    """A cluster called `east` with Nodes that the test makes, one planner, a store, and its clocks."""

    def __init__(self, *, uid: str = "east-uid") -> None:
        numbers = itertools.count(1)
        self.now = 0.0
        self.number = 0
        self.nodes: dict[str, Node] = {}
        self.store = Store("kube", wall=lambda: WALL + self.now, new_uid=lambda: f"u{next(numbers)}")
        self.cluster = NodePeers(cluster="east", uid=uid)
        self.planner = Planner(now=0.0, tells_liveness=True, nodes=self.cluster)
        self.seen = self.store.revision
        self.done: list[Action] = []

    def mesh(self, name: str = "home", spec: MeshSpec = MESH.spec) -> Mesh:
        made = self.store.write(Create(Mesh(Meta(name), spec)))
        assert isinstance(made, Mesh)
        return made

    def get_mesh(self, name: str = "home") -> Mesh:
        found = self.store.get(Kind.MESH, name)
        assert isinstance(found, Mesh)
        return found

    def node(self, name: str, *, uid: str = "", **labels: str) -> Node:
        self.number += 1
        made = Node(name, uid or f"node-{self.number}", labels, self.number)
        self.nodes[name] = made
        return made

    def node_with_pods(self, name: str, *prefixes: str, uid: str = "") -> None:
        pods = tuple(PodPrefix(ip_network(each), PodSource.NODE) for each in prefixes)
        self.nodes[name] = replace(self.node(name, uid=uid), pods=pods)

    def pods(self, node: str) -> list[str]:
        return [f"{each.prefix} {each.source}" for each in self.peer(node).spec.pod_prefixes]

    def listed(self, *, complete: bool = True, nodes: tuple[Node, ...] | None = None) -> NodesListed:
        found = tuple(self.nodes.values()) if nodes is None else nodes
        return NodesListed(found, self.number, self.now, self.cluster.revision, complete)

    def start(self) -> None:
        for kind in (Kind.MESH, Kind.PEER):
            self.planner.take(self.store.list(kind))
        self.planner.take(self.listed())
        self.seen = self.store.revision
        self.settle()

    def settle(self) -> None:
        self.follow()
        while actions := self.planner.plan(now=self.now, wall=WALL + self.now):
            for action in actions:
                self.do(action)
            self.follow()

    def follow(self) -> None:
        for kind in (Kind.MESH, Kind.PEER):
            for fact in self.store.changes_since(kind, self.seen):
                self.planner.take(fact)
        self.seen = self.store.revision

    def do(self, action: Action) -> None:
        self.done.append(action)
        if isinstance(action, Confirm):
            self.planner.succeeded(action, self.store.find(*key_of(action)))
            return
        kind = Kind.MESH if isinstance(action, WriteMeshStatus) else Kind.PEER
        resource = action.mesh if isinstance(action, WriteMeshStatus) else action.peer
        meta = resource.meta
        try:
            if isinstance(action, CreatePeer):
                self.planner.succeeded(action, self.store.write(Create(action.peer)))
            elif isinstance(action, WritePeer):
                self.planner.succeeded(action, self.store.write(Update(action.peer, meta.revision)))
            elif isinstance(action, DeletePeer):
                self.store.write(Delete(kind, meta.name, meta.uid))
                self.planner.succeeded(action, None)
            elif isinstance(action, RevivePeer):
                asked = Peer(meta, replace(action.peer.spec, leaving=False))
                self.planner.succeeded(action, self.store.write(Update(asked, meta.revision)))
            else:
                write = UpdateStatus(kind, meta.name, action.part, meta.uid, meta.revision)
                self.planner.succeeded(action, self.store.write(write))
        except (AlreadyExists, Conflict, NotFound):
            self.planner.outdated(action, self.store.find(kind, meta.name), again_at=self.now + 1.0)

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.planner.hear(dict.fromkeys(self.peers(), 0.0), now=self.now)
        self.planner.sweep()
        self.settle()

    def restart(self) -> None:
        """Another process in place of the planner's."""
        self.cluster = NodePeers(cluster=self.cluster.cluster, uid=self.cluster.uid)
        self.planner = Planner(now=self.now, tells_liveness=True, nodes=self.cluster)
        self.start()

    def tell_to_leave(self, node: str) -> None:
        peer = self.peer(node)
        self.store.write(Update(replace(peer, spec=replace(peer.spec, leaving=True))))
        self.settle()

    def lists(self, *, complete: bool = True, nodes: tuple[Node, ...] | None = None) -> None:
        self.planner.take(self.listed(complete=complete, nodes=nodes))
        self.settle()

    def peers(self) -> list[str]:
        return sorted(each.meta.name for each in self.store.list(Kind.PEER).resources)

    def peer(self, node: str, mesh: str = "home") -> Peer:
        found = self.store.get(Kind.PEER, peer_name(mesh, "east", node))
        assert isinstance(found, Peer)
        return found

    def condition(self, mesh: str, kind: str) -> Condition | None:
        return next((each for each in self.get_mesh(mesh).status.conditions if each.type == kind), None)


def cluster_of(count: int) -> World:
    world = World()
    world.mesh()
    for number in range(count):
        world.node(f"n{number:03}")
    world.start()
    assert len(world.peers()) == count
    return world


def test_every_node_that_a_mesh_selects_gets_a_peer_with_an_address() -> None:
    world = World()
    world.mesh(spec=replace(MESH.spec, node_selector=BERLIN))
    node = world.node("n1", site="berlin")
    world.node("n2", site="lima")
    world.start()
    assert world.peers() == ["home.east.n1"]
    peer = world.peer("n1")
    assert peer.spec == PeerSpec("home", cluster="east", node_name="n1", node_uid=node.uid)
    assert peer.assignment.addresses
    world.later(MESH_INTERVAL)
    assert world.get_mesh().status.clusters == (Cluster("east", "east-uid"),)


def test_a_node_that_leaves_takes_its_peer_and_nothing_else_with_it() -> None:
    world = cluster_of(5)
    kept = {name: world.store.get(Kind.PEER, name) for name in world.peers()}
    world.planner.take(NodeDeleted(world.nodes.pop("n003")))
    world.settle()
    assert world.peers() == sorted(kept.keys() - {"home.east.n003"})
    assert all(world.store.get(Kind.PEER, name) == kept[name] for name in world.peers())


def test_a_node_that_is_no_longer_selected_is_no_peer_any_more() -> None:
    world = World()
    world.mesh(spec=replace(MESH.spec, node_selector=BERLIN))
    node = world.node("n1", site="berlin")
    world.start()
    world.planner.take(NodePut(replace(node, labels={"site": "lima"}, revision=9)))
    world.settle()
    assert world.peers() == []
    world.planner.take(NodePut(replace(node, revision=10)))
    world.settle()
    assert world.peers() == ["home.east.n1"]


def test_a_mesh_that_selects_otherwise_is_followed() -> None:
    world = World()
    mesh = world.mesh()
    world.node("n1", site="berlin")
    world.node("n2", site="lima")
    world.start()
    selector = LabelSelector(match_labels=(("site", "lima"),))
    world.store.write(Update(replace(mesh, spec=replace(mesh.spec, node_selector=selector))))
    world.settle()
    assert world.peers() == ["home.east.n2"]


def test_a_node_made_anew_under_its_name_gets_a_new_peer() -> None:
    world = cluster_of(2)
    before = world.peer("n000")
    world.node("n000", uid="another")
    world.planner.take(NodePut(world.nodes["n000"]))
    world.settle()
    after = world.peer("n000")
    assert after.meta.uid != before.meta.uid
    assert after.spec.node_uid == "another"
    assert after.assignment.addresses


def test_a_peer_deleted_by_hand_comes_back_while_its_node_is_there() -> None:
    world = cluster_of(1)
    victim = world.peer("n000")
    world.store.write(Delete(Kind.PEER, victim.meta.name, victim.meta.uid))
    world.settle()
    assert world.peer("n000").meta.uid != victim.meta.uid


def test_peers_of_other_clusters_and_external_ones_are_left_alone_and_addressed() -> None:
    world = cluster_of(1)
    for name, spec in {
        "home.west.n9": PeerSpec("home", cluster="west", node_name="n9", node_uid="w9"),
        "laptop": PeerSpec("home"),
    }.items():
        world.store.write(Create(Peer(Meta(name), spec)))
    world.settle()
    world.later(60.0)
    world.lists()
    assert {"home.west.n9", "laptop"} <= set(world.peers())
    for name in ("home.west.n9", "laptop"):
        found = world.store.get(Kind.PEER, name)
        assert isinstance(found, Peer)
        assert found.assignment.addresses


def test_a_peer_made_by_hand_under_the_name_of_a_nodes_says_so_and_stays() -> None:
    world = World()
    world.mesh()
    world.store.write(Create(Peer(Meta("home.east.n1"), PeerSpec("home"))))
    world.node("n1")
    world.start()
    found = world.peer("n1")
    assert found.spec == PeerSpec("home")
    (ready,) = [each for each in found.assignment.conditions if each.type == "Ready"]
    assert ready.reason == "NameOfNode"
    assert "Node n1 is no peer" in ready.message
    world.store.write(Delete(Kind.PEER, found.meta.name, found.meta.uid))
    world.settle()
    assert world.peer("n1").spec.node_name == "n1"


def test_a_second_peer_of_a_node_under_another_name_goes() -> None:
    world = cluster_of(1)
    twin = replace(world.peer("n000").spec)
    world.store.write(Create(Peer(Meta("twin"), twin)))
    world.settle()
    assert world.peers() == ["home.east.n000"]


def test_peers_of_a_deleted_mesh_are_left_to_their_owner() -> None:
    world = cluster_of(3)
    mesh = world.get_mesh()
    world.store.write(Delete(Kind.MESH, "home", mesh.meta.uid))
    world.settle()
    world.later(60.0)
    world.lists()
    assert len(world.peers()) == 3
    assert not [each for each in world.done if isinstance(each, DeletePeer)]


def test_an_incomplete_list_deletes_nobody() -> None:
    world = cluster_of(2)
    world.lists(complete=False, nodes=())
    world.later(60.0)
    world.lists(complete=False, nodes=())
    assert len(world.peers()) == 2


def test_without_a_list_nothing_is_planned() -> None:
    world = World()
    world.mesh()
    for kind in (Kind.MESH, Kind.PEER):
        world.planner.take(world.store.list(kind))
    world.planner.take(NodePut(world.node("n1")))
    assert world.planner.plan(now=0.0, wall=WALL) == []


def test_many_nodes_that_vanish_at_once_go_after_a_second_list() -> None:
    world = cluster_of(40)
    world.lists(nodes=())
    assert len(world.peers()) == 40
    due = world.planner.nodes_due(now=world.now)
    assert due == world.now + CONFIRM
    world.later(CONFIRM - 1)
    world.lists(nodes=())
    assert len(world.peers()) == 40
    world.later(1)
    world.lists(nodes=())
    assert world.peers() == []
    assert world.planner.nodes_due(now=world.now) is None


def test_many_nodes_that_vanish_by_mistake_are_back_in_the_second_list() -> None:
    world = cluster_of(40)
    before = [world.peer(name) for name in world.nodes]
    world.lists(nodes=())
    world.later(CONFIRM)
    world.lists()
    assert [each.meta.uid for each in before] == [world.peer(name).meta.uid for name in world.nodes]
    assert [each.assignment.addresses for each in before] == [
        world.peer(name).assignment.addresses for name in world.nodes
    ]


def test_many_nodes_that_are_deleted_one_by_one_are_many_all_the_same() -> None:
    world = cluster_of(20)
    for name in list(world.nodes)[:15]:
        world.planner.take(NodeDeleted(world.nodes.pop(name)))
        world.settle()
    assert len(world.peers()) == 17
    world.later(CONFIRM)
    world.lists()
    assert len(world.peers()) == 5


def test_a_tenth_of_a_large_mesh_may_go_at_once() -> None:
    world = cluster_of(100)
    for name in list(world.nodes)[:10]:
        world.planner.take(NodeDeleted(world.nodes.pop(name)))
    world.settle()
    assert len(world.peers()) == 90


def test_after_a_restore_nothing_is_deleted_for_a_while() -> None:
    world = cluster_of(3)
    only = next(iter(world.nodes.values()))
    world.planner.take(NodesListed((only,), revision=1, asked_at=world.now, after=world.cluster.revision))
    world.settle()
    world.later(CONFIRM)
    world.planner.take(NodesListed((only,), revision=1, asked_at=world.now, after=1))
    world.settle()
    assert len(world.peers()) == 3
    world.later(HOLD)
    world.planner.take(NodesListed((only,), revision=2, asked_at=world.now, after=1))
    world.settle()
    assert world.peers() == [peer_name("home", "east", only.name)]


def test_a_node_that_a_watch_told_during_a_list_stays() -> None:
    world = cluster_of(1)
    asked = world.listed()
    world.planner.take(NodePut(world.node("late")))
    world.planner.take(asked)
    world.settle()
    assert world.peers() == ["home.east.late", "home.east.n000"]


def test_a_node_of_a_cluster_whose_name_is_taken_is_no_peer_and_the_mesh_says_so() -> None:
    world = World(uid="impostor")
    mesh = world.mesh()
    status = replace(mesh.status, clusters=(Cluster("east", "first"),))
    world.store.write(UpdateStatus(Kind.MESH, "home", status, mesh.meta.uid))
    world.store.write(
        Create(Peer(Meta("home.east.n1"), PeerSpec("home", cluster="east", node_name="n1", node_uid="x")))
    )
    world.node("n2")
    world.start()
    assert world.peers() == ["home.east.n1"]
    ready = world.condition("home", "Ready")
    assert ready is not None
    assert ready.reason == "ClusterNameTaken"
    assert "--cluster-name" in ready.message
    assert world.get_mesh().status.clusters == (Cluster("east", "first"),)


def test_two_meshes_may_not_have_one_port_on_one_node() -> None:
    world = World()
    spec = replace(MESH.spec, listen_port=51820)
    older = world.mesh("older", spec)
    world.now += 1.0
    space = Addressing(ipv4=IPv4Network("100.65.0.0/16"))
    younger = world.mesh("younger", replace(spec, node_selector=BERLIN, addressing=space))
    world.node("n1", site="lima")
    world.start()
    assert older.meta.created < younger.meta.created
    assert world.condition("younger", "PortConflict") is None
    world.planner.take(NodePut(world.node("n2", site="berlin")))
    world.later(MESH_INTERVAL)
    found = world.condition("younger", "PortConflict")
    assert found is not None
    assert (found.status, found.reason) == ("True", "PortTaken")
    assert "51820 is ScopeMesh older's on n2" in found.message
    assert world.condition("older", "PortConflict") is None
    world.store.write(Update(replace(younger, spec=replace(younger.spec, listen_port=51821))))
    world.later(MESH_INTERVAL)
    found = world.condition("younger", "PortConflict")
    assert found is not None
    assert found.status == "False"


def test_a_node_away_for_long_keeps_its_peer_and_an_external_peer_expires() -> None:
    world = cluster_of(1)
    world.store.write(Create(Peer(Meta("laptop"), PeerSpec("home"))))
    world.settle()
    world.now += 1000.0
    world.planner.hear({}, now=world.now)
    world.settle()
    world.now += world.get_mesh().spec.peer_expiry
    world.planner.hear({}, now=world.now)
    world.planner.sweep()
    world.settle()
    assert world.peers() == ["home.east.n000"]
    assert [each.why for each in world.done if isinstance(each, DeletePeer)] == [Why.EXPIRED]


def test_an_address_claimed_twice_by_hand_stays_with_who_had_it_and_the_other_says_why() -> None:
    world = cluster_of(2)
    first, second = world.peer("n000"), world.peer("n001")
    stolen = replace(second.assignment, addresses=first.assignment.addresses)
    world.store.write(UpdateStatus(Kind.PEER, second.meta.name, stolen, second.meta.uid))
    world.settle()
    assert world.peer("n000").assignment.addresses == first.assignment.addresses
    moved = world.peer("n001")
    assert moved.assignment.addresses == second.assignment.addresses
    (said,) = [each for each in moved.assignment.conditions if each.type == "AddressConflict"]
    assert said.reason == "GivenAnother"
    assert first.meta.name in said.message
    world.later(60.0)
    world.later(60.0)
    before = len(world.done)
    world.later(60.0)
    assert len(world.done) == before


def test_a_nodes_peer_that_the_first_list_lacked_is_read_and_keeps_who_it_is() -> None:
    world = World()
    world.mesh()
    world.node("n1")
    world.start()
    before = world.peer("n1")
    world.cluster = NodePeers(cluster="east", uid="east-uid")
    world.planner = Planner(now=world.now, tells_liveness=True, nodes=world.cluster)
    world.done.clear()
    world.planner.take(world.store.list(Kind.MESH))
    world.planner.take(replace(world.store.list(Kind.PEER), resources=()))
    world.planner.take(world.listed())
    world.settle()
    assert world.peer("n1") == before
    assert [type(action) for action in world.done if not isinstance(action, WriteMeshStatus)] == [CreatePeer]


def test_a_peer_that_cannot_be_created_and_is_not_there_is_tried_again_after_its_time_only() -> None:
    world = World()
    world.mesh()
    world.start()
    world.node("n1")
    world.planner.take(NodePut(world.nodes["n1"]))
    (action,) = (each for each in world.planner.plan(now=0.0, wall=WALL) if isinstance(each, CreatePeer))
    world.planner.outdated(action, None, again_at=world.now + 1.0)
    assert world.planner.plan(now=0.9, wall=WALL) == []
    assert [type(each) for each in world.planner.plan(now=1.0, wall=WALL)] == [CreatePeer]


def test_a_peer_that_the_registry_has_although_it_was_seen_deleted_is_believed() -> None:
    world = World()
    world.mesh()
    world.node("n1")
    world.start()
    stored = world.peer("n1")
    world.planner.take(Deleted(stored, world.store.revision))
    (action,) = (each for each in world.planner.plan(now=0.0, wall=WALL) if isinstance(each, CreatePeer))
    world.done.clear()
    world.do(action)
    world.later(2.0)
    assert [type(each) for each in world.done].count(CreatePeer) == 1
    assert world.peer("n1").assignment.addresses == stored.assignment.addresses


def test_at_rest_nothing_is_written() -> None:
    world = cluster_of(10)
    world.later(MESH_INTERVAL)
    world.later(MESH_INTERVAL)
    before = len(world.done)
    for _ in range(10):
        world.lists()
        world.later(60.0)
        for node in list(world.nodes.values()):  # kubelets report every five minutes
            world.number += 1
            world.nodes[node.name] = replace(node, revision=world.number)
            world.planner.take(NodePut(world.nodes[node.name]))
        world.settle()
    assert len(world.done) == before
    assert (world.planner.depth, world.planner.delayed) == (0, 0)


def test_names_that_would_be_too_long_are_cut_and_stay_apart() -> None:
    long = "n" * 240
    one, other = peer_name("home", "east", f"{long}.a"), peer_name("home", "east", f"{long}.b")
    assert len(one) <= MAX_NAME
    assert one != other
    assert peer_name("home", "east", "n1") == "home.east.n1"


def test_a_peer_that_is_told_to_leave_does_so_until_an_operator_starts_anew() -> None:
    world = cluster_of(2)
    before = world.peer("n000")
    world.tell_to_leave("n000")
    world.later(CONFIRM)
    assert world.peer("n000").spec.leaving
    for left, reason in ((False, "Leaving"), (True, "Left")):
        said = PeerReport(make_identity(bytes).public, left=left)
        world.store.write(UpdateStatus(Kind.PEER, before.meta.name, said, before.meta.uid))
        world.settle()
        ready = next(each for each in world.peer("n000").assignment.conditions if each.type == "Ready")
        assert (ready.status, ready.reason) == ("False", reason)

    world.restart()
    after = world.peer("n000")
    assert (after.spec, after.meta.uid) == (before.spec, before.meta.uid)
    assert after.assignment.addresses == before.assignment.addresses
    assert [each.peer.meta.name for each in world.done if isinstance(each, RevivePeer)] == ["home.east.n000"]


def test_whoever_tells_a_peer_to_leave_again_is_heard() -> None:
    world = cluster_of(1)
    world.tell_to_leave("n000")
    world.restart()
    world.tell_to_leave("n000")
    world.later(CONFIRM)
    assert world.peer("n000").spec.leaving


def test_a_peer_of_another_cluster_leaves_as_long_as_that_one_says() -> None:
    world = cluster_of(1)
    spec = PeerSpec("home", cluster="west", node_name="n1", node_uid="w-1", leaving=True)
    world.store.write(Create(Peer(Meta("home.west.n1"), spec)))
    world.restart()
    stored = world.store.get(Kind.PEER, "home.west.n1")
    assert isinstance(stored, Peer)
    assert stored.spec.leaving


# --- pods ---------------------------------------------------------------------------------------------------

PODS = replace(MESH.spec, pod_networking=PodNetworking.CROSS_CLUSTER)


def test_a_peer_offers_the_pods_of_its_node_where_the_mesh_asks_for_them() -> None:
    world = World()
    mesh = world.mesh()
    world.node_with_pods("n1", "10.244.1.0/24", "fd00:10:244:1::/64")
    world.start()
    assert world.pods("n1") == []
    world.store.write(Update(replace(mesh, spec=PODS)))
    world.settle()
    assert world.pods("n1") == ["10.244.1.0/24 Node", "fd00:10:244:1::/64 Node"]
    world.node_with_pods("n2", "10.244.2.0/24")
    world.planner.take(NodePut(world.nodes["n2"]))
    world.settle()
    assert world.pods("n2") == ["10.244.2.0/24 Node"]
    assert [type(each) for each in world.done if isinstance(each, WritePeer)] == [WritePeer]  # made with it
    world.store.write(Update(replace(world.get_mesh(), spec=MESH.spec)))
    world.settle()
    assert world.pods("n1") == world.pods("n2") == []


def test_a_node_that_gets_its_prefix_later_is_followed_and_what_the_user_wrote_stays() -> None:
    world = World()
    world.mesh(spec=PODS)
    node = world.node("n1")
    world.start()
    peer = world.peer("n1")
    static = PodPrefix(ip_network("10.9.0.0/16"), PodSource.STATIC)
    world.store.write(Update(replace(peer, spec=replace(peer.spec, pod_prefixes=(static,)))))
    world.node_with_pods("n1", "10.244.1.0/24", uid=node.uid)
    world.planner.take(NodePut(world.nodes["n1"]))
    world.settle()
    assert world.pods("n1") == ["10.244.1.0/24 Node", "10.9.0.0/16 Static"]


def test_prefixes_of_a_cluster_that_is_translated_say_as_what_others_see_them() -> None:
    world = World()
    world.mesh(spec=PODS)
    world.node_with_pods("n1", "10.244.1.0/24", "10.245.1.0/24")
    world.start()
    static = PodPrefix(ip_network("10.244.9.0/24"), PodSource.STATIC, ip_network("10.7.9.0/24"))
    peer = world.peer("n1")
    world.store.write(
        Update(replace(peer, spec=replace(peer.spec, pod_prefixes=(*peer.spec.pod_prefixes, static))))
    )
    world.settle()
    to = Translation(ip_network("10.244.0.0/16"), ip_network("10.192.0.0/16"))
    other = MeshCluster("elsewhere", (replace(to, inside=ip_network("10.245.0.0/16")),))
    clusters = (other, MeshCluster(world.cluster.cluster, (to,)))
    world.store.write(Update(replace(world.get_mesh(), spec=replace(PODS, clusters=clusters))))
    world.settle()
    seen = {str(each.prefix): each.seen_as for each in world.peer("n1").spec.pod_prefixes}
    assert seen == {
        "10.244.1.0/24": ip_network("10.192.1.0/24"),
        "10.245.1.0/24": None,
        "10.244.9.0/24": ip_network("10.7.9.0/24"),
    }
    world.node_with_pods("n2", "10.244.2.0/24")
    world.planner.take(NodePut(world.nodes["n2"]))
    world.settle()
    [made] = world.peer("n2").spec.pod_prefixes
    assert made.seen_as == ip_network("10.192.2.0/24")


def test_a_prefix_that_is_issued_anew_moves_at_once_though_its_last_node_is_believed_slowly() -> None:
    world = World()
    world.mesh(spec=PODS)
    for number in range(10):
        world.node_with_pods(f"n{number}", f"10.244.{number}.0/24")
    world.start()
    for number in range(5):  # half of the cluster: nobody goes before a second list
        world.planner.take(NodeDeleted(world.nodes.pop(f"n{number}")))
    world.settle()
    assert len(world.peers()) == 10
    assert world.pods("n3") == ["10.244.3.0/24 Node"]
    world.node_with_pods("n10", "10.244.3.0/24")
    world.planner.take(NodePut(world.nodes["n10"]))
    world.settle()
    assert world.pods("n3") == []
    assert world.pods("n4") == ["10.244.4.0/24 Node"]
    assert world.pods("n10") == ["10.244.3.0/24 Node"]


def test_a_node_that_was_made_anew_has_its_prefix_by_its_new_peer() -> None:
    world = World()
    world.mesh(spec=PODS)
    world.node_with_pods("n1", "10.244.1.0/24")
    world.start()
    before = world.peer("n1").meta.uid
    world.planner.take(NodeDeleted(world.nodes.pop("n1")))
    world.node_with_pods("n1", "10.244.1.0/24")
    world.planner.take(NodePut(world.nodes["n1"]))
    world.settle()
    assert world.peer("n1").meta.uid != before
    assert world.pods("n1") == ["10.244.1.0/24 Node"]
