"""What a change of a mesh would do is foretold: links, hubs, and who loses what, with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network
from itertools import combinations
from random import Random

import pytest

from scope.model import (
    Addressing,
    Assignment,
    Endpoint,
    HubMode,
    Hubs,
    LabelSelector,
    Link,
    Mapping,
    Mesh,
    MeshSpec,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Role,
    Tombstone,
    TopologyMode,
)
from scope.preview import HubLoad, Loss, Preview, State, changed, preview, state
from tests.unit.registry_conformance import keys

PREFIX = IPv4Network("100.64.0.0/16")
FULL = MeshSpec(Addressing(ipv4=PREFIX))
TREE = replace(FULL, topology=TopologyMode.TREE)
TOMBSTONE = Tombstone("m", "u", PublicKey(bytes(32)), PublicKey(bytes(32)), bytes(64))


def a_peer(
    number: int,
    *links: Link,
    role: Role = Role.EDGE,
    asked: Role = Role.AUTO,
    online: bool = True,
    mapping: Mapping = Mapping.NONE,
    hub: str = "",
    routes: Iterable[str] = (),
    node: str = "",
) -> Peer:
    """The peer `p<number>`; `role` is what it is, `asked` what its spec says."""
    spec = PeerSpec("home", role=asked, routes=tuple(map(ip_network, routes)), node_name=node)
    address = ip_interface(f"100.64.0.{number}/16")
    return Peer(
        Meta(f"p{number}", uid=f"u{number}", created=float(number)),
        spec,
        PeerReport(keys(number), links=links, mapping=mapping, hub=hub),
        Assignment(addresses=(address,), role=role, online=online),
    )


def foretold(now: MeshSpec, then: MeshSpec, *peers: Peer, asked: Iterable[Peer] = ()) -> Preview:
    before = state(Mesh(Meta("home"), now), peers)
    merged = {peer.meta.name: peer for peer in (*peers, *asked)}
    return preview(before, changed(before, mesh=Mesh(Meta("home"), then), peers=merged.values()))


def named(spec: MeshSpec, *hubs: str) -> MeshSpec:
    return replace(spec, hubs=Hubs(names=hubs))


# --- links --------------------------------------------------------------------------------------------------


def pairs_with_a_link(mesh: State) -> set[tuple[str, str]]:
    """Looked at one by one."""
    return {
        pair
        for pair in combinations(sorted(mesh.by_name), 2)
        if not mesh.is_tree or mesh.hubs.intersection(pair)
    }


@pytest.mark.parametrize("seed", range(40))
def test_links_are_counted_as_if_every_pair_was_looked_at(seed: int) -> None:
    random = Random(seed)

    def some() -> State:
        names = random.sample(range(1, 20), random.randint(0, 15))
        peers = tuple(a_peer(number) for number in sorted(names))
        hubs = frozenset(peer.meta.name for peer in peers if random.random() < 0.3)
        return State(Mesh(Meta("home"), random.choice([FULL, TREE])), peers, hubs)

    now, then = some(), some()
    told = preview(now, then)
    before, after = pairs_with_a_link(now), pairs_with_a_link(then)
    assert (told.links_now, told.links_then) == (len(before), len(after))
    assert (told.made, told.dropped) == (len(after - before), len(before - after))


def test_a_tree_without_hubs_drops_nothing_and_says_what_it_needs() -> None:
    told = foretold(FULL, TREE, a_peer(1), a_peer(2))
    assert (told.links_then, told.dropped) == (1, 0)
    assert told.changes == ("spec.topology: Full -> Tree",)
    assert any("name some in spec.hubs.names" in note for note in told.notes)


def test_removed_peers_and_those_of_other_meshes_are_not_counted() -> None:
    gone = replace(a_peer(3), assignment=Assignment(tombstone=TOMBSTONE))
    other = replace(a_peer(4), spec=PeerSpec("work"))
    assert foretold(FULL, FULL, a_peer(1), a_peer(2), gone, other).links_now == 1


def test_hubs_that_read_traffic_and_a_single_hub_are_said_beforehand() -> None:
    notes = foretold(FULL, named(TREE, "p1"), a_peer(1), a_peer(2)).notes
    assert any(note.startswith("hubs would read what they route") for note in notes)
    assert any(note.startswith("p1 would be the only hub") for note in notes)


# --- who is a hub -------------------------------------------------------------------------------------------


def test_a_hub_is_whom_a_spec_names_and_never_one_that_says_edge() -> None:
    told = foretold(
        named(FULL, "p1"),
        named(FULL, "p2", "p4"),
        a_peer(1, role=Role.HUB),
        a_peer(2),
        a_peer(3, asked=Role.HUB, role=Role.HUB),
        a_peer(4, asked=Role.EDGE),
    )
    assert [(load.hub, load.is_new, load.goes) for load in told.hubs] == [
        ("p1", False, True),
        ("p2", True, False),
        ("p3", False, False),
    ]


def test_hubs_that_the_registry_chose_stay_while_it_chooses() -> None:
    auto = replace(FULL, hubs=Hubs(mode=HubMode.AUTO))
    chosen = a_peer(1, role=Role.HUB)
    assert not foretold(auto, replace(auto, mtu=1400), chosen).hubs[0].goes
    assert foretold(auto, FULL, chosen).hubs[0].goes


def test_a_node_stays_a_hub_while_the_selector_stays_and_what_a_new_one_makes_is_not_guessed() -> None:
    selector, another = (LabelSelector(((label, "yes"),)) for label in ("hub", "router"))
    now = replace(FULL, hubs=Hubs(selector=selector))
    node = a_peer(1, role=Role.HUB, node="n1")
    assert not foretold(now, replace(now, mtu=1400), node).hubs[0].goes
    told = foretold(now, replace(now, hubs=Hubs(selector=another)), node)
    assert not told.hubs[0].goes
    assert any("labels of Nodes" in note for note in told.notes)


def test_the_last_hubs_stay_where_nobody_else_would_be_one() -> None:
    hub, edge = a_peer(1, role=Role.HUB), a_peer(2, far("p1", 1), hub="p1")
    told = foretold(named(TREE, "p1"), named(TREE, "typo"), hub, edge)
    assert [(load.goes, load.edges_then) for load in told.hubs] == [(False, 1)]
    assert "nobody that spec.hubs asks for is a hub, so p1 would stay" in told.notes
    assert foretold(named(FULL, "p1"), FULL, hub, edge).hubs[0].goes
    assert foretold(named(TREE, "p1"), named(TREE, "p2"), hub, edge).hubs[0].goes


def test_the_file_may_change_a_peer_too() -> None:
    hub = a_peer(1, asked=Role.HUB)
    told = foretold(FULL, FULL, a_peer(1), a_peer(2), asked=[hub])
    assert told.changes == ("ScopePeer p1, spec.role: Auto -> Hub",)
    assert [load.hub for load in told.hubs] == ["p1"]


# --- hubs' loads --------------------------------------------------------------------------------------------


def far(peer: str, milliseconds: float) -> Link:
    return Link(peer, PathKind.DIRECT, latency=milliseconds / 1000)


def test_an_edge_goes_to_the_nearest_hub_that_it_measured() -> None:
    hubs = [a_peer(number, role=Role.HUB) for number in (1, 2)]
    edges = [
        a_peer(3, far("p1", 10), far("p2", 20)),
        a_peer(4, far("p1", 30), far("p2", 20)),
        a_peer(5, far("p1", 30)),
        a_peer(6, online=False),
    ]
    told = foretold(named(FULL, "p1", "p2"), named(TREE, "p1", "p2"), *hubs, *edges)
    assert told.hubs == (HubLoad("p1", 0, 1, 0, 0), HubLoad("p2", 0, 1, 0, 0))
    assert told.undecided == 1


def test_an_edge_stays_where_it_is_attached_and_moves_when_that_hub_goes() -> None:
    hubs = [a_peer(number, role=Role.HUB) for number in (1, 2)]
    edge = a_peer(3, far("p1", 90), far("p2", 20), hub="p1")
    both = named(TREE, "p1", "p2")
    assert foretold(both, both, *hubs, edge).hubs == (HubLoad("p1", 1, 1, 0, 0), HubLoad("p2", 0, 0, 0, 0))
    assert foretold(both, named(TREE, "p2"), *hubs, edge).hubs == (
        HubLoad("p1", 1, 0, 0, 0, goes=True),
        HubLoad("p2", 0, 2, 0, 0),  # and p1, which is an edge now
    )


def test_a_relayed_pair_counts_once_and_is_routed_in_a_tree() -> None:
    peers = (
        a_peer(1, role=Role.HUB),
        a_peer(2, Link("p3", PathKind.RELAYED, hub="p1")),
        a_peer(3, Link("p2", PathKind.RELAYED, hub="p1")),
    )
    told = foretold(named(FULL, "p1"), named(TREE, "p1"), *peers)
    assert told.hubs == (HubLoad("p1", 0, 2, 1, 0),)


def test_pairs_of_a_hub_that_goes_are_counted_where_one_other_is_left_and_else_are_told() -> None:
    hubs = [a_peer(number, role=Role.HUB) for number in (1, 2, 3)]
    pair = a_peer(4, Link("p5", PathKind.RELAYED, hub="p1")), a_peer(5)
    told = foretold(named(FULL, "p1", "p2"), named(FULL, "p2"), *hubs[:2], *pair)
    assert told.hubs == (HubLoad("p1", 0, 0, 1, 0, goes=True), HubLoad("p2", 0, 0, 0, 1))
    told = foretold(named(FULL, "p1", "p2", "p3"), named(FULL, "p2", "p3"), *hubs, *pair)
    assert [load.pairs_then for load in told.hubs] == [0, 0, 0]
    assert any("nearest of other hubs, and count for none: 1" in note for note in told.notes)


# --- who loses a path ---------------------------------------------------------------------------------------


def test_an_edge_that_reaches_no_hub_would_reach_nobody_and_why_is_said() -> None:
    stuck = a_peer(3, Link("p1", PathKind.NONE, reason="UDP blocked towards p1"))
    told = foretold(
        named(FULL, "p1", "p2"),
        named(TREE, "p1", "p2"),
        a_peer(1, role=Role.HUB),
        a_peer(2, role=Role.HUB, online=False),
        stuck,
        a_peer(4),
    )
    assert told.paths_lost == (
        Loss("p3", "everybody: no path to p1 (UDP blocked towards p1); p2 is offline"),
    )


def test_what_the_hub_reports_counts_as_what_the_edge_does() -> None:
    hub = a_peer(1, Link("p2", PathKind.NONE, reason="no answer"), role=Role.HUB)
    told = foretold(named(FULL, "p1"), named(TREE, "p1"), hub, a_peer(2))
    assert [loss.peer for loss in told.paths_lost] == ["p2"]


def test_who_reaches_the_hubs_only_by_one_that_goes_loses_them() -> None:
    relayed = Link("p2", PathKind.RELAYED, hub="p1")
    peers = (a_peer(1, role=Role.HUB), a_peer(2, role=Role.HUB), a_peer(3, relayed, hub="p1"))
    told = foretold(named(TREE, "p1", "p2"), named(TREE, "p2"), *peers)
    # p1 becomes an edge, and reaches p2 as before.
    assert told.paths_lost == (Loss("p3", "everybody: p2 is reached by p1, which would be no hub"),)


def test_what_was_lost_before_is_not_blamed_on_the_change() -> None:
    stuck = a_peer(2, Link("p1", PathKind.NONE, reason="no answer"))
    tree = named(TREE, "p1")
    assert not foretold(tree, replace(tree, mtu=1400), a_peer(1, role=Role.HUB), stuck).paths_lost


def test_without_the_last_hub_relayed_pairs_lose_their_path() -> None:
    relayed = Link("p3", PathKind.RELAYED, hub="p1", reason="symmetric NAT on both sides")
    peers = (a_peer(1, role=Role.HUB), a_peer(2, relayed), a_peer(3))
    told = foretold(named(FULL, "p1"), FULL, *peers)
    assert told.paths_lost == (
        Loss("p2", "p3: relayed by p1, and no hub would be online (symmetric NAT on both sides)"),
    )
    kept = (*peers, a_peer(4, role=Role.HUB))
    assert not foretold(named(FULL, "p1", "p4"), named(FULL, "p4"), *kept).paths_lost


def test_edges_behind_symmetric_nats_need_a_hub_when_the_tree_ends() -> None:
    symmetric = [a_peer(number, mapping=Mapping.ENDPOINT_DEPENDENT, hub="p1") for number in (2, 3, 4)]
    tree, hub = named(TREE, "p1"), a_peer(1, role=Role.HUB)
    with_hub = foretold(tree, named(FULL, "p1"), hub, *symmetric)
    assert not with_hub.paths_lost
    assert any(note.startswith("3 edges are behind symmetric NATs") for note in with_hub.notes)
    without = foretold(tree, FULL, hub, *symmetric)
    assert [loss.peer for loss in without.paths_lost] == ["p2", "p3", "p4"]
    assert without.paths_lost[0].what == ("2 others: symmetric NAT on both sides, and no hub would be online")
    static = [
        replace(peer, spec=replace(peer.spec, endpoints=(Endpoint.parse("192.0.2.7:1"),)))
        for peer in symmetric
    ]
    assert not foretold(tree, FULL, hub, *static).paths_lost


# --- addresses and routes -----------------------------------------------------------------------------------


def test_an_address_outside_of_the_new_prefix_is_lost_and_a_wider_one_loses_none() -> None:
    narrow = replace(FULL, addressing=Addressing(ipv4=IPv4Network("100.64.0.0/30")))
    told = foretold(FULL, narrow, a_peer(1), a_peer(9), a_peer(10))
    assert told.addresses_lost == (
        Loss("p10", "100.64.0.10: outside of 100.64.0.0/30, so another one takes its place"),
        Loss("p9", "100.64.0.9: outside of 100.64.0.0/30, so another one takes its place"),
    )
    assert any(note.startswith("100.64.0.0/30 has room for 2 of 3 peers") for note in told.notes)
    wide = replace(FULL, addressing=Addressing(ipv4=IPv4Network("100.64.0.0/10")))
    assert not foretold(FULL, wide, a_peer(1)).addresses_lost


def test_a_family_that_goes_takes_its_addresses_along() -> None:
    only6 = replace(FULL, addressing=Addressing(ipv6=IPv6Network("fd00:9::/64")))
    told = foretold(FULL, only6, a_peer(1))
    assert told.addresses_lost == (Loss("p1", "100.64.0.1: the mesh would have no IPv4"),)


def test_a_route_that_the_wider_prefix_overlaps_would_not_be_used() -> None:
    wide = replace(FULL, addressing=Addressing(ipv4=IPv4Network("100.64.0.0/10")))
    told = foretold(FULL, wide, a_peer(1, routes=["100.70.0.0/24"]))
    assert told.routes_lost == (Loss("p1", "100.70.0.0/24: it overlaps the prefixes of the mesh"),)


def test_a_route_that_an_older_peer_has_would_not_be_used() -> None:
    younger = a_peer(2, routes=["10.1.0.0/16"])
    told = foretold(FULL, FULL, a_peer(1, routes=["10.1.2.0/24"]), a_peer(2), asked=[younger])
    assert told.routes_lost == (Loss("p2", "10.1.0.0/16: p1 has it"),)


def test_a_prefix_of_another_mesh_would_be_refused() -> None:
    now = state(Mesh(Meta("home"), FULL), [a_peer(1)])
    other = Mesh(Meta("work"), FULL)
    [refused] = preview(now, now, others=[other]).refused
    assert "overlaps 100.64.0.0/16 of ScopeMesh work" in refused
