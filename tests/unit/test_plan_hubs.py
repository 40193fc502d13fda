"""The planner writes who is a hub, the same on every registry and after each restart, and nothing at rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import pytest
from scope_operator.plan.hubs import BETTER_AFTER, GRACE, STABLE
from scope_operator.plan.nodes import CONFIRM, NodeDeleted, NodePeers, NodePut
from scope_operator.plan.planner import (
    HUBS_INTERVAL,
    MESH_INTERVAL,
    Planner,
    WriteAssignment,
    WriteMeshStatus,
)

from scope.model import (
    Candidate,
    CandidateKind,
    Condition,
    Endpoint,
    Forwarding,
    HubMode,
    Hubs,
    Kind,
    LabelSelector,
    Link,
    Mapping,
    Mesh,
    PathKind,
    Peer,
    PeerReport,
    RelayReport,
    Role,
    TopologyMode,
)
from scope.registry.memory import Create, Delete, Update, UpdateStatus
from tests.unit import test_plan_nodes, test_plan_planner
from tests.unit.registry_conformance import keys, peer

AUTO = Hubs(mode=HubMode.AUTO)
LABELS = LabelSelector((("hub", "yes"),))
World: TypeAlias = test_plan_planner.World | test_plan_nodes.World


class Machines(test_plan_planner.World):
    """The embedded registry: machines join by themselves, and there are no Nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: tuple[str, ...] = ()

    def restart(self) -> None:
        self.planner = Planner(now=self.now, tells_liveness=True, signing_key=test_plan_planner.KEY)
        self.start()

    def pass_time(self, seconds: float) -> None:
        self.later(seconds, alive=self.alive)

    def add(self, number: int) -> str:
        name = self.join(number).meta.name
        self.alive = (*self.alive, name)
        self.settle()
        return name

    def home(self) -> Mesh:
        return self.mesh()


class Cluster(test_plan_nodes.World):
    """Kubernetes: every Node is a peer."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh()

    def restart(self) -> None:
        self.cluster = NodePeers(cluster="east", uid="east-uid")
        self.planner = Planner(now=self.now, tells_liveness=True, nodes=self.cluster)
        self.start()

    def pass_time(self, seconds: float) -> None:
        self.later(seconds)

    def add(self, number: int, **labels: str) -> str:
        node = self.node(f"n{number}", **labels)
        self.planner.take(NodePut(node))
        self.settle()
        return self.peer(node.name).meta.name

    def home(self) -> Mesh:
        return self.get_mesh()


def started(make: Callable[[], Machines | Cluster]) -> Machines | Cluster:
    world = make()
    world.start()
    return world


@pytest.fixture(params=[Machines, Cluster], ids=["embedded", "kubernetes"])
def world(request: pytest.FixtureRequest) -> Machines | Cluster:
    return started(request.param)


def ask(world: Machines | Cluster, hubs: Hubs) -> None:
    mesh = world.home()
    world.store.write(Update(replace(mesh, spec=replace(mesh.spec, hubs=hubs))))
    world.settle()


def find(world: World, name: str) -> Peer:
    found = world.store.get(Kind.PEER, name)
    assert isinstance(found, Peer)
    return found


def hubs_of(world: World) -> list[str]:
    peers = world.store.list(Kind.PEER).resources
    return sorted(
        each.meta.name for each in peers if isinstance(each, Peer) and each.assignment.role is Role.HUB
    )


def told(world: Machines | Cluster) -> dict[str, tuple[bool, str]]:
    return {each.peer: (each.chosen, each.reason) for each in world.home().status.hubs}


def said(world: Machines | Cluster) -> Condition:
    found = condition(world)
    assert found is not None
    return found


def condition(world: Machines | Cluster) -> Condition | None:
    return next((each for each in world.home().status.conditions if each.type == "HubsAvailable"), None)


def report(
    world: Machines | Cluster,
    name: str,
    *,
    is_open: bool = True,
    seen: dict[str, float] | None = None,
    relay: RelayReport | None = None,
) -> None:
    """What the peer's agent says; `seen` are its round trips in seconds."""
    stored = find(world, name)
    number = int("".join(filter(str.isdigit, name)))
    links = tuple(Link(other, PathKind.DIRECT, latency=rtt) for other, rtt in (seen or {}).items())
    address = f"192.0.2.{number}" if is_open else f"10.0.0.{number}"
    part = PeerReport(
        keys(number) if stored.report is None else stored.report.keys,
        (Candidate(Endpoint.parse(f"{address}:51820"), CandidateKind.HOST),),
        Mapping.NONE if is_open else Mapping.ENDPOINT_DEPENDENT,
        links=links,
        relay=relay,
    )
    world.store.write(UpdateStatus(Kind.PEER, name, part, stored.meta.uid))
    world.settle()


def open_peers(world: Machines | Cluster, count: int) -> list[str]:
    names = [world.add(number) for number in range(1, count + 1)]
    for name in names:
        report(world, name)
    world.pass_time(5.0)
    return names


def writes_of(world: Machines | Cluster, act: Callable[[], None]) -> int:
    before = world.store.revision.number
    act()
    return world.store.revision.number - before


def test_who_is_named_is_a_hub_from_its_first_assignment_and_an_edge_when_it_is_named_no_more(
    world: Machines | Cluster,
) -> None:
    name = "home.external.p1" if isinstance(world, Machines) else "home.east.n1"
    ask(world, Hubs(names=(name,)))
    world.pass_time(MESH_INTERVAL)
    assert said(world).reason == "NoSuchPeer"
    assigned = []
    do = world.do

    def watch(action: object) -> None:
        assigned.extend([action.part.role] if isinstance(action, WriteAssignment) else [])
        do(action)  # type: ignore[arg-type]

    world.do = watch  # type: ignore[method-assign]
    assert world.add(1) == name
    world.add(2)
    assert hubs_of(world) == [name]
    assert assigned[0] is Role.HUB
    report(world, name)
    world.pass_time(MESH_INTERVAL)
    assert said(world).message == f"relayed by {name}"
    assert told(world) == {name: (True, "named in spec.hubs")}
    ask(world, Hubs())
    world.pass_time(MESH_INTERVAL)
    assert hubs_of(world) == []
    assert told(world) == {}
    assert condition(world) is None


def test_the_spec_of_a_peer_outweighs_what_its_mesh_asks(world: Machines | Cluster) -> None:
    one, other = world.add(1), world.add(2)
    ask(world, Hubs(names=(one,)))
    for name, role in ((one, Role.EDGE), (other, Role.HUB)):
        stored = find(world, name)
        world.store.write(Update(replace(stored, spec=replace(stored.spec, role=role))))
        report(world, name)
    world.pass_time(MESH_INTERVAL)
    assert hubs_of(world) == [other]
    assert told(world) == {
        other: (True, "its spec says Hub"),
        one: (False, "named in spec.hubs, but its spec says Edge"),
    }
    assert said(world).status == "False"


def test_a_label_makes_a_nodes_peer_a_hub_and_an_edge_again() -> None:
    world = Cluster()
    world.start()
    ask(world, Hubs(selector=LABELS))
    world.pass_time(MESH_INTERVAL)
    assert said(world).reason == "NoSuchNode"
    name = world.add(1, hub="yes")
    other = world.add(2)
    assert hubs_of(world) == [name]
    for node, labels in (("n2", {"hub": "yes"}), ("n1", {"hub": "no"})):
        world.number += 1
        world.nodes[node] = replace(world.nodes[node], labels=labels, revision=world.number)
        world.planner.take(NodePut(world.nodes[node]))
    world.settle()
    assert hubs_of(world) == [other]
    world.restart()
    assert hubs_of(world) == [other]


def test_the_last_hub_stays_one_where_a_typing_error_names_nobody(world: Machines | Cluster) -> None:
    name, other = world.add(1), world.add(2)
    ask(world, Hubs(names=(name,)))
    report(world, name)
    ask(world, Hubs(names=("home.external.typo",)))
    for _ in range(2):
        world.pass_time(MESH_INTERVAL)
        assert hubs_of(world) == [name]
        assert told(world)[name] == (True, "nobody asks for it any more; kept while nobody else is a hub")
        available = said(world)
        assert (available.status, available.reason) == ("False", "NobodyElse")
        assert f"so {name} stays one: the mesh has no ScopePeer home.external.typo" in available.message
        world.restart()
    ask(world, Hubs(names=(other,)))
    world.pass_time(MESH_INTERVAL)
    assert hubs_of(world) == [other]


def test_the_hubs_of_a_tree_stay_until_there_are_others_or_it_is_one_no_more(
    world: Machines | Cluster,
) -> None:
    names = open_peers(world, 2)
    mesh = world.home()
    world.store.write(Update(replace(mesh, spec=replace(mesh.spec, topology=TopologyMode.TREE))))
    ask(world, Hubs(names=tuple(names)))
    ask(world, Hubs())
    world.pass_time(MESH_INTERVAL)
    assert hubs_of(world) == names
    assert "stay hubs: name some in spec.hubs.names" in said(world).message
    mesh = world.home()
    world.store.write(Update(replace(mesh, spec=replace(mesh.spec, topology=TopologyMode.FULL))))
    world.settle()
    assert hubs_of(world) == []


def test_who_says_edge_is_not_kept_as_a_hub(world: Machines | Cluster) -> None:
    name = world.add(1)
    ask(world, Hubs(names=(name,)))
    stored = find(world, name)
    world.store.write(Update(replace(stored, spec=replace(stored.spec, role=Role.EDGE))))
    world.settle()
    assert hubs_of(world) == []


def test_the_last_hub_whose_node_lost_the_label_stays_until_another_has_it() -> None:
    world = Cluster()
    world.start()
    ask(world, Hubs(selector=LABELS))
    name, other = world.add(1, hub="yes"), world.add(2)
    report(world, name)

    def label(node: str, **labels: str) -> None:
        world.number += 1
        world.nodes[node] = replace(world.nodes[node], labels=labels, revision=world.number)
        world.planner.take(NodePut(world.nodes[node]))
        world.settle()
        world.pass_time(MESH_INTERVAL)

    label("n1")
    assert hubs_of(world) == [name]
    assert said(world).reason == "NobodyElse"
    label("n2", hub="yes")
    assert hubs_of(world) == [other]


def test_a_selector_of_hubs_on_a_registry_without_nodes_says_to_name_them() -> None:
    world = Machines()
    world.start()
    world.add(1)
    ask(world, Hubs(selector=LabelSelector()))
    world.pass_time(MESH_INTERVAL)
    available = said(world)
    assert (available.status, available.reason) == ("False", "NoSuchNode")
    assert available.message.endswith("other peers are named in spec.hubs.names")


def test_nodes_that_an_api_server_lost_for_a_while_stay_hubs() -> None:
    world = Cluster()
    world.start()
    ask(world, Hubs(selector=LABELS))
    names = [world.add(number, hub="yes") for number in range(1, 7)]
    kept = dict(world.nodes)
    for node in kept.values():
        world.number += 1
        world.planner.take(NodeDeleted(replace(node, revision=world.number)))
    world.settle()
    world.later(CONFIRM / 2)
    assert hubs_of(world) == names


def test_auto_chooses_two_writes_nothing_at_rest_and_decides_the_same_after_a_restart(
    world: Machines | Cluster,
) -> None:
    ask(world, AUTO)
    names = open_peers(world, 4)
    world.pass_time(STABLE)
    world.pass_time(STABLE)
    world.pass_time(HUBS_INTERVAL)
    chosen = hubs_of(world)
    assert len(chosen) == 2
    assert {name for name, (is_hub, _) in told(world).items() if is_hub} == set(chosen)
    assert set(told(world)) == set(names)

    def rest() -> None:
        for _ in range(60):
            world.pass_time(60.0)

    assert writes_of(world, rest) == 0
    world.now += 1.0
    assert writes_of(world, world.restart) == 0
    assert writes_of(world, rest) == 0
    assert hubs_of(world) == chosen
    assert said(world).status == "True"


def test_reports_of_other_latencies_write_nothing_but_themselves(world: Machines | Cluster) -> None:
    ask(world, AUTO)
    names = open_peers(world, 3)
    for _ in range(3):
        world.pass_time(STABLE)
    wobbles = (0.020, 0.024, 0.018, 0.022)

    def report_again() -> None:
        for turn, rtt in enumerate(wobbles):
            for name in names:
                seen = {other: rtt + 0.001 * turn for other in names if other != name}
                report(world, name, seen=seen)
            world.pass_time(60.0)
            world.pass_time(HUBS_INTERVAL)

    assert writes_of(world, report_again) == len(wobbles) * len(names)


def test_a_hub_that_dies_is_replaced_also_by_a_planner_that_started_meanwhile() -> None:
    world = Machines()
    world.start()
    ask(world, AUTO)
    names = open_peers(world, 3)
    for _ in range(3):
        world.pass_time(STABLE)
    dead, other = hubs_of(world)
    [spare] = set(names) - {dead, other}
    world.alive = (other, spare)
    for _ in range(4):
        world.pass_time(60.0)
    assert not find(world, dead).assignment.online
    assert hubs_of(world) == sorted((dead, other))
    world.restart()
    for _ in range(4):
        world.pass_time(60.0)
    assert hubs_of(world) == sorted((dead, other))
    world.restart()
    for _ in range(int(GRACE / 60)):
        world.pass_time(60.0)
    assert hubs_of(world) == sorted((other, spare))


def test_a_status_that_could_not_be_written_does_not_change_the_choice(world: Machines | Cluster) -> None:
    """Roles are written and the mesh is not: whoever plans next keeps to the roles."""
    ask(world, AUTO)
    names = open_peers(world, 2)
    for _ in range(3):
        world.pass_time(STABLE)
    assert hubs_of(world) == names
    late = world.add(3)
    report(world, late)
    near = dict.fromkeys(names, 0.090) | {late: 0.010}
    do = world.do
    watcher = world.add(4)
    report(world, watcher, is_open=False, seen=near)
    for _ in range(int(BETTER_AFTER / 60)):
        world.pass_time(60.0)

    def refuse(action: object) -> None:
        if isinstance(action, WriteMeshStatus):
            world.planner.failed(action, again_at=world.now + 3600.0)
        else:
            do(action)  # type: ignore[arg-type]

    world.do = refuse  # type: ignore[method-assign]
    for _ in range(7):
        world.pass_time(60.0)
    assert hubs_of(world) == sorted((*names, late))
    world.do = do  # type: ignore[method-assign]
    world.restart()
    assert hubs_of(world) == sorted((*names, late))
    for _ in range(int(GRACE / 60) + 2):
        world.pass_time(60.0)
    assert late in hubs_of(world)
    assert len(hubs_of(world)) == 2


def test_hubs_stay_what_they_are_when_a_registry_lists_peers_before_meshes() -> None:
    world = Machines()
    world.start()
    ask(world, AUTO)
    open_peers(world, 3)
    for _ in range(3):
        world.pass_time(STABLE)
    chosen = hubs_of(world)
    world.planner = Planner(now=world.now, tells_liveness=True, signing_key=test_plan_planner.KEY)
    for kind in (Kind.PEER, Kind.MESH):
        world.planner.take(world.store.list(kind))
    assert writes_of(world, world.settle) == 0
    assert hubs_of(world) == chosen


def test_a_choice_holds_while_roles_cannot_be_written(world: Machines | Cluster) -> None:
    ask(world, AUTO)
    names = open_peers(world, 2)
    for _ in range(3):
        world.pass_time(STABLE)
    late, watcher = world.add(3), world.add(4)
    report(world, late)
    report(world, watcher, is_open=False, seen=dict.fromkeys(names, 0.090) | {late: 0.010})
    do = world.do

    def refuse(action: object) -> None:
        if isinstance(action, WriteAssignment) and action.part.role is Role.HUB:
            world.planner.failed(action, again_at=world.now + STABLE)
        else:
            do(action)  # type: ignore[arg-type]

    world.do = refuse  # type: ignore[method-assign]
    for _ in range(int((STABLE + BETTER_AFTER) / 60) + 3):
        world.pass_time(60.0)
    assert hubs_of(world) == names
    assert told(world)[late][0]
    world.do = do  # type: ignore[method-assign]
    world.pass_time(STABLE)
    assert late in hubs_of(world)


def test_a_hub_that_does_not_forward_says_so_itself_and_on_its_mesh(world: Machines | Cluster) -> None:
    name = world.add(1)
    ask(world, Hubs(names=(name,)))
    report(world, name, relay=RelayReport(Forwarding.NONE, reason="ip_forward is off"))
    world.pass_time(MESH_INTERVAL)
    world.pass_time(MESH_INTERVAL)
    [failed] = [each for each in find(world, name).assignment.conditions if each.type == "RelayFailed"]
    assert failed.status == "True"
    assert "ip_forward is off" in failed.message
    available = said(world)
    assert (available.status, available.reason) == ("False", "NotForwarding")
    assert told(world) == {name: (True, "named in spec.hubs; does not forward: ip_forward is off")}
    report(world, name, relay=RelayReport(Forwarding.KERNEL, pairs=1))
    world.pass_time(MESH_INTERVAL)
    assert all(each.type != "RelayFailed" for each in find(world, name).assignment.conditions)
    assert said(world).status == "True"


def test_a_hub_whose_edges_do_not_get_through_says_so_itself_and_on_its_mesh(
    world: Machines | Cluster,
) -> None:
    name = world.add(1)
    ask(world, Hubs(names=(name,)))
    why = "the foreign chain ip filter FORWARD drops IPv4 between edges"
    report(world, name, relay=RelayReport(Forwarding.KERNEL, unrouted=why))
    world.pass_time(MESH_INTERVAL)
    world.pass_time(MESH_INTERVAL)
    [failed] = [each for each in find(world, name).assignment.conditions if each.type == "RelayFailed"]
    assert failed.status == "True"
    assert why in failed.message
    available = said(world)
    assert (available.status, available.reason) == ("False", "NotForwarding")
    assert why in available.message
    assert told(world) == {name: (True, f"named in spec.hubs; does not forward: {why}")}
    report(world, name, relay=RelayReport(Forwarding.KERNEL))
    world.pass_time(MESH_INTERVAL)
    assert said(world).status == "True"


def test_peers_keep_their_roles_while_their_mesh_is_away() -> None:
    world = Machines()
    world.start()
    name = world.add(1)
    ask(world, Hubs(names=(name,)))
    mesh = world.home()
    world.store.write(Delete(Kind.MESH, "home", mesh.meta.uid))
    world.settle()
    assert hubs_of(world) == [name]


def test_a_peer_that_is_deleted_and_made_anew_is_asked_for_anew() -> None:
    world = Machines()
    world.start()
    name = world.add(1)
    ask(world, Hubs(names=(name,)))
    world.store.write(Delete(Kind.PEER, name, find(world, name).meta.uid))
    world.settle()
    world.pass_time(MESH_INTERVAL)
    assert said(world).reason == "NoSuchPeer"
    world.store.write(Create(peer(1)))
    world.settle()
    assert hubs_of(world) == [name]


def test_meshes_choose_their_hubs_apart() -> None:
    world = Machines()
    world.start()
    name = world.add(1)
    ask(world, Hubs(names=(name,)))
    other = replace(world.home(), meta=replace(world.home().meta, name="work", uid="", revision=0))
    world.store.write(Create(replace(other, spec=replace(other.spec, hubs=Hubs()))))
    world.store.write(Create(peer(7, mesh="work")))
    world.settle()
    assert hubs_of(world) == [name]
