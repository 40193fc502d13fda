"""What is told of a tree: an edge says by which hub it is reached, and no pair of edges counts as cut off."""

from __future__ import annotations

from dataclasses import replace

from lab.nat import Nat
from scope_agent.inputs import CommandArrived
from scope_operator.plan.status import count

from scope.ctl.explaining import peer_text
from scope.ctl.local import AgentStatus, parse_status
from scope.ctl.render import status_text
from scope.model import MeshCounts, TopologyMode
from scope.preview import preview, state
from tests.sim.world import Machine, World


def _tree(*, hubs: int, edges: int) -> tuple[World, list[Machine], list[Machine]]:
    world = World(3)
    world.registry.change_mesh(lambda spec: replace(spec, topology=TopologyMode.TREE))
    found = [world.hub(delay=0.005 + 0.02 * number) for number in range(hubs)]
    peers = [world.peer(Nat.PORT_RESTRICTED) for _ in range(edges)]
    return world, found, peers


def _status(machine: Machine) -> AgentStatus:
    machine.give(CommandArrived(1, "status"))
    return parse_status(machine.replies[-1].value["status"])


def _hub_of(world: World, machine: Machine) -> str:
    report = world.registry.peer(machine).report
    return report.hub if report is not None else ""


def test_an_edge_reports_its_hub_and_another_one_when_that_dies() -> None:
    world, (near, far), edges = _tree(hubs=2, edges=3)
    world.until(lambda: all(_hub_of(world, edge) == near.name for edge in edges), within=30.0)
    assert _hub_of(world, near) == _hub_of(world, far) == ""
    near.switch_off()
    world.until(lambda: all(_hub_of(world, edge) == far.name for edge in edges), within=30.0)


def test_edges_of_a_tree_are_no_pairs_and_none_is_unreachable() -> None:
    world, (hub, other), edges = _tree(hubs=2, edges=4)
    world.until(lambda: all(_hub_of(world, edge) for edge in edges), within=30.0)
    world.run(90.0)  # beyond the ladder's last bound, after which silence is told
    links = 1 + 2 * len(edges)
    assert count(world.registry.peers()) == MeshCounts(
        peers=6, online=6, direct=links, relayed=0, unreachable=0
    )
    now = state(world.registry.mesh(), world.registry.peers())
    told = preview(now, now)
    assert told.links_now == links
    loads = {load.hub: load.edges_now for load in told.hubs}
    assert loads == {hub.name: len(edges), other.name: 0}


def test_an_edge_says_what_it_is_attached_to_and_who_routes() -> None:
    world, (hub,), (a, b) = _tree(hubs=1, edges=2)
    world.until(lambda: bool(_hub_of(world, a)) and bool(_hub_of(world, b)), within=30.0)
    status = _status(a)
    text = status_text(status, color=False)
    assert next(line.split()[-1] for line in text.splitlines() if line.startswith("Attached to:")) == hub.name
    assert "2: 1 direct, 0 relayed, 1 routed, 0 without a path" in text
    [other] = [peer for peer in status.peers if peer.name == b.name]
    assert (other.path, other.hub, other.reason) == ("Routed", hub.name, "")
    a.give(CommandArrived(2, "explain", b.name))
    assert a.replies[-1].value == {"ok": True, "candidates": []}
    assert peer_text(other, (), color=False) == (
        f"{b.name}: routed by {hub.name}\n"
        f"edges of a tree have no links with each other: see `scopectl explain {hub.name}`\n"
    )


def test_an_edge_that_no_hub_answers_says_so() -> None:
    world, (hub,), (a, b) = _tree(hubs=1, edges=2)
    world.until(lambda: bool(_hub_of(world, a)) and bool(_hub_of(world, b)), within=30.0)
    c = world.machine(world.site(Nat.PORT_RESTRICTED))
    hub.switch_off()
    c.join()
    world.run(10.0)
    told = {peer.name: (peer.path, peer.reason) for peer in _status(c).peers}
    assert told[a.name] == ("None", "attached to no hub yet")
