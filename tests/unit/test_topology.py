"""Allowed IPs of a full mesh: everyone gets its own, and nobody takes another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_interface, ip_network

from hypothesis import given
from hypothesis import strategies as st

from scope.model import (
    Addressing,
    Assignment,
    IPNetwork,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerSpec,
    PodNetworking,
    PodPrefix,
    PodSource,
    PublicKey,
    Snapshot,
)
from scope.topology import RefusalReason, RefusedClaim, Topology, by_hub, peers_for, rehomed, settle

SPACE = Addressing(IPv4Network("100.64.0.0/16"), IPv6Network("fd00:1::/64"))
MESH = Mesh(Meta("home"), MeshSpec(SPACE))


def _key(name: str) -> PublicKey:
    return PublicKey(name.encode().ljust(32, b"."))


def _peer(name: str, *, created: float, addresses: Sequence[str] = (), routes: Sequence[str] = ()) -> Peer:
    return Peer(
        Meta(name, uid=f"uid-{name}", created=created),
        PeerSpec("home", routes=tuple(map(ip_network, routes))),
        assignment=Assignment(addresses=tuple(map(ip_interface, addresses))),
    )


def _settle(*peers: Peer, own: Peer | None = None) -> Topology:
    return peers_for(Snapshot(mesh=MESH, own=own, peers={_key(peer.meta.name): peer for peer in peers}))


def _node(name: str, *, cluster: str, created: float, pods: str, address: str = "") -> Peer:
    """A peer of a cluster, whose pods have one prefix."""
    peer = _peer(name, created=created, addresses=[address] if address else [])
    prefixes = (PodPrefix(ip_network(pods), PodSource.NODE),)
    spec = replace(peer.spec, cluster=cluster, node_name=name, node_uid=name, pod_prefixes=prefixes)
    return replace(peer, spec=spec)


def _settle_pods(
    *peers: Peer, own: Peer, networking: PodNetworking = PodNetworking.CROSS_CLUSTER
) -> Topology:
    mesh = replace(MESH, spec=replace(MESH.spec, pod_networking=networking))
    return peers_for(Snapshot(mesh=mesh, own=own, peers={_key(peer.meta.name): peer for peer in peers}))


def _prefixes(topology: Topology, name: str) -> set[str]:
    return {str(prefix) for prefix in topology.allowed_ips[_key(name)]}


def _seen_as(peer: Peer, prefix: str) -> Peer:
    [pods] = peer.spec.pod_prefixes
    pods = replace(pods, seen_as=ip_network(prefix))
    return replace(peer, spec=replace(peer.spec, pod_prefixes=(pods,)))


def test_clusters_with_the_same_pods_reach_each_other_by_what_each_is_seen_as() -> None:
    a, b = (_node(name, cluster=name, created=1, pods="10.244.1.0/24") for name in "ab")
    a, b = _seen_as(a, "10.201.1.0/24"), _seen_as(b, "10.202.1.0/24")
    for own, other, seen in ((a, b, "10.202.1.0/24"), (b, a, "10.201.1.0/24")):
        topology = _settle_pods(other, own=own)
        assert _prefixes(topology, other.meta.name) == {seen}
        assert topology.pods == {ip_network(seen)}
        assert topology.refused == ()


def test_pods_of_ones_own_cluster_are_reached_by_what_they_really_have() -> None:
    own = _seen_as(_node("a", cluster="a", created=2, pods="10.244.1.0/24"), "10.201.1.0/24")
    beside = _seen_as(_node("a2", cluster="a", created=3, pods="10.244.2.0/24"), "10.201.2.0/24")
    far = _seen_as(_node("b", cluster="b", created=1, pods="10.244.2.0/24"), "10.202.2.0/24")
    mesh = replace(MESH, spec=replace(MESH.spec, pod_networking=PodNetworking.ALL))
    peers = {_key(peer.meta.name): peer for peer in (beside, far)}
    topology = peers_for(Snapshot(mesh=mesh, own=own, peers=peers))
    assert _prefixes(topology, "a2") == {"10.201.2.0/24", "10.244.2.0/24"}
    assert topology.beside == {ip_network("10.244.2.0/24")}
    assert topology.pods == topology.beside | {ip_network("10.202.2.0/24")}
    assert topology.refused == ()


def test_pods_that_have_what_ones_own_cluster_hides_are_not_believed() -> None:
    own = _seen_as(_node("a", cluster="a", created=2, pods="10.244.1.0/24"), "10.201.1.0/24")
    beside = _seen_as(_node("a2", cluster="a", created=3, pods="10.244.2.0/24"), "10.201.2.0/24")
    others = [_node(f"b{n}", cluster="b", created=1, pods=f"10.244.{n}.0/24") for n in (1, 2, 3)]
    topology = _settle_pods(*others, beside, own=own)
    assert topology.pods == {ip_network("10.244.3.0/24")}
    assert [(each.peer, each.reason, each.holder) for each in topology.refused] == [
        ("b1", RefusalReason.OURS, "a"),
        ("b2", RefusalReason.TAKEN, "a2"),
    ]


def test_a_peer_holds_its_addresses_and_routes() -> None:
    topology = _settle(
        _peer("a", created=1, addresses=["100.64.0.1/16", "fd00:1::1/64"], routes=["10.1.0.0/16"]),
        _peer("b", created=2, addresses=["100.64.0.2/16"]),
    )
    assert _prefixes(topology, "a") == {"100.64.0.1/32", "fd00:1::1/128", "10.1.0.0/16"}
    assert _prefixes(topology, "b") == {"100.64.0.2/32"}
    assert topology.refused == ()


def test_nobody_holds_anything_before_the_mesh_is_known() -> None:
    peers = {_key("a"): _peer("a", created=1, addresses=["100.64.0.1/16"])}
    assert peers_for(Snapshot(peers=peers)) == Topology({_key("a"): frozenset()})


def test_the_incumbent_keeps_a_prefix_that_a_later_peer_claims_in_whole_or_in_part_or_around() -> None:
    old = _peer("z-old", created=1, routes=["10.1.0.0/16"])
    for claim in ("10.1.0.0/16", "10.1.2.0/24", "10.0.0.0/8"):
        topology = _settle(_peer("a-new", created=2, routes=[claim]), old)
        assert _prefixes(topology, "z-old") == {"10.1.0.0/16"}
        assert _prefixes(topology, "a-new") == set()
        assert topology.refused == (
            RefusedClaim("a-new", ip_network(claim), RefusalReason.TAKEN, holder="z-old"),
        )


def test_of_two_peers_created_at_once_the_lower_uid_is_the_incumbent() -> None:
    topology = _settle(
        _peer("b", created=1, addresses=["100.64.0.1/16"]), _peer("a", created=1, addresses=["100.64.0.1/16"])
    )
    assert _prefixes(topology, "a") == {"100.64.0.1/32"}
    assert _prefixes(topology, "b") == set()


def test_a_peer_may_offer_a_prefix_inside_another_of_its_own() -> None:
    topology = _settle(_peer("a", created=1, routes=["10.1.0.0/24", "10.0.0.0/8"]))
    assert _prefixes(topology, "a") == {"10.0.0.0/8", "10.1.0.0/24"}
    assert topology.refused == ()


def test_the_narrow_claim_stands_where_the_wide_one_around_it_falls() -> None:
    topology = _settle(
        _peer("a", created=1, routes=["10.9.0.0/16"]),
        _peer("b", created=2, routes=["10.0.0.0/8", "10.1.0.0/16"]),
    )
    assert _prefixes(topology, "b") == {"10.1.0.0/16"}


def test_our_own_address_and_network_are_never_a_peers() -> None:
    own = _peer("own", created=9, addresses=["100.64.0.1/16"], routes=["192.168.1.0/24"])
    thief = _peer(
        "thief", created=1, addresses=["100.64.0.1/16"], routes=["192.168.0.0/16", "192.168.1.7/32"]
    )
    topology = _settle(thief, own=own)
    assert _prefixes(topology, "thief") == set()
    assert {claim.reason for claim in topology.refused} == {RefusalReason.OURS}


def test_a_route_into_the_meshs_own_space_is_refused() -> None:
    topology = _settle(
        _peer("thief", created=1, routes=["100.64.0.2/32", "100.64.0.0/10", "fd00::/16"]),
        _peer("b", created=2, addresses=["100.64.0.2/16"]),
    )
    assert _prefixes(topology, "thief") == set()
    assert {claim.reason for claim in topology.refused} == {RefusalReason.MESH}
    assert _prefixes(topology, "b") == {"100.64.0.2/32"}


def test_our_own_mistaken_route_into_the_mesh_takes_no_address_from_others() -> None:
    own = _peer("own", created=1, routes=["100.64.0.0/16"])
    topology = _settle(_peer("b", created=2, addresses=["100.64.0.2/16"]), own=own)
    assert _prefixes(topology, "b") == {"100.64.0.2/32"}


def test_an_address_outside_the_meshs_space_is_ignored() -> None:
    topology = _settle(_peer("a", created=1, addresses=["10.0.0.1/8", "100.64.0.1/16"]))
    assert _prefixes(topology, "a") == {"100.64.0.1/32"}
    assert [str(claim.prefix) for claim in topology.refused] == ["10.0.0.1/32"]


def test_a_mesh_of_one_family_gives_no_address_of_the_other() -> None:
    mesh = Mesh(Meta("home"), MeshSpec(Addressing(ipv6=SPACE.ipv6)))
    peer = _peer("a", created=1, addresses=["100.64.0.1/16", "fd00:1::1/64"])
    topology = peers_for(Snapshot(mesh=mesh, peers={_key("a"): peer}))
    assert _prefixes(topology, "a") == {"fd00:1::1/128"}


# Few prefixes, of lengths and places that make them meet.
ROUTES = st.builds(
    lambda place, length: ip_network((0x0A000000 + (place << 12), length), strict=False),
    st.integers(0, 15),
    st.integers(16, 20),
)


@st.composite
def _crowd(draw: st.DrawFn) -> list[Peer]:
    return [
        replace(
            _peer(
                f"p{n}",
                created=draw(st.integers(0, 3)),
                addresses=[f"100.64.0.{draw(st.integers(1, 4))}/16"],
            ),
            spec=PeerSpec("home", routes=tuple(draw(st.lists(ROUTES, max_size=4)))),
        )
        for n in range(draw(st.integers(1, 6)))
    ]


@given(_crowd())
def test_no_two_peers_share_an_address_and_it_is_all_one_in_what_order_they_came(crowd: list[Peer]) -> None:
    topology = _settle(*crowd)
    assert _settle(*reversed(crowd)) == topology
    owned: list[tuple[PublicKey, IPNetwork]] = [(k, p) for k, ps in topology.allowed_ips.items() for p in ps]
    for one, prefix in owned:
        for other, held in owned:
            assert one == other or prefix.version != held.version or not prefix.overlaps(held)


@given(_crowd())
def test_a_newcomer_takes_nothing_from_anyone(crowd: list[Peer]) -> None:
    peers = {_key(peer.meta.name): peer for peer in crowd}
    newcomer = _peer("new", created=99, addresses=["100.64.0.1/16"], routes=["10.0.0.0/8"])
    before = settle(SPACE, peers).allowed_ips
    after = settle(SPACE, peers | {_key("new"): newcomer}).allowed_ips
    assert {key: after[key] for key in before} == before


# --- trees -----------------------------------------------------------------------------------------------

H1, H2, A, B = (_key(name) for name in ("h1", "h2", "a", "b"))


def _settled() -> Topology:
    return _settle(
        _peer("h1", created=1, addresses=["100.64.0.1/16"], routes=["10.9.0.0/16"]),
        _peer("h2", created=2, addresses=["100.64.0.2/16"]),
        _peer("a", created=3, addresses=["100.64.0.3/16", "fd00:1::3/64"], routes=["10.1.0.0/16"]),
        _peer("b", created=4, addresses=["100.64.0.4/16"]),
    )


def test_an_edge_reaches_everything_by_its_hub_and_knows_nobody_but_hubs() -> None:
    topology = by_hub(_settled(), SPACE, hubs={H1, H2}, home=H2)
    assert topology.allowed_ips.keys() == {H1, H2}
    assert _prefixes(topology, "h1") == set()
    assert _prefixes(topology, "h2") == {"100.64.0.0/16", "fd00:1::/64", "10.9.0.0/16", "10.1.0.0/16"}
    assert topology.routes == _settled().routes


def test_an_edge_without_a_hub_reaches_nobody_and_leaks_nothing() -> None:
    topology = by_hub(_settled(), SPACE, hubs={H1, H2}, home=None)
    assert set(topology.allowed_ips.values()) == {frozenset()}
    assert topology.routes == {ip_network("10.9.0.0/16"), ip_network("10.1.0.0/16")}


def test_beside_its_hub_an_edge_gives_other_edges_what_is_theirs_and_the_hub_wider_prefixes() -> None:
    topology = by_hub(_settled(), SPACE, hubs={H1, H2}, home=H2, beside=True)
    assert _prefixes(topology, "a") == {"100.64.0.3/32", "fd00:1::3/128", "10.1.0.0/16"}
    assert _prefixes(topology, "h1") == set()
    assert _prefixes(topology, "h2") == {"100.64.0.0/16", "fd00:1::/64", "10.8.0.0/15", "10.0.0.0/15"}


def test_beside_its_hub_an_edge_has_no_prefix_at_two_peers() -> None:
    edge = _peer("a", created=1, addresses=["100.64.0.3"], routes=["10.1.0.0/16", "10.0.0.0/15"])
    topology = by_hub(_settle(edge, _peer("h2", created=2)), SPACE, hubs={H2}, home=H2, beside=True)
    assert _prefixes(topology, "a") == {"100.64.0.3/32", "10.1.0.0/16", "10.0.0.0/15"}
    assert _prefixes(topology, "h2") == {"100.64.0.0/16", "fd00:1::/64", "10.0.0.0/14"}


def test_a_hub_reaches_an_edge_by_the_hub_it_moved_to_and_back_again() -> None:
    settled = _settled()
    tree = rehomed(settled, settled, {A: (None, H1), B: (None, H1)})
    assert _prefixes(tree, "a") == _prefixes(tree, "b") == set()
    assert _prefixes(tree, "h1") >= {"100.64.0.3/32", "10.1.0.0/16", "100.64.0.4/32", "10.9.0.0/16"}
    moved = rehomed(tree, settled, {A: (H1, H2)})
    assert _prefixes(moved, "h1") == {"100.64.0.1/32", "10.9.0.0/16", "100.64.0.4/32"}
    assert _prefixes(moved, "h2") == {"100.64.0.2/32", "100.64.0.3/32", "fd00:1::3/128", "10.1.0.0/16"}
    assert rehomed(moved, settled, {A: (H2, None), B: (H1, None)}) == settled


@given(st.lists(st.tuples(st.sampled_from((A, B)), st.sampled_from((None, H1, H2))), max_size=12))
def test_moving_edges_one_by_one_leads_to_what_is_worked_out_anew(
    moves: list[tuple[PublicKey, PublicKey | None]],
) -> None:
    settled = _settled()
    tree = settled
    homes: dict[PublicKey, PublicKey | None] = {A: None, B: None}
    for edge, home in moves:
        tree = rehomed(tree, settled, {edge: (homes[edge], home)})
        homes[edge] = home
    assert tree == rehomed(settled, settled, {edge: (None, home) for edge, home in homes.items()})


# --- pods ---------------------------------------------------------------------------------------------------


def test_pods_of_other_clusters_are_reached_through_the_mesh_and_those_of_ones_own_are_not() -> None:
    own = _node("a1", cluster="a", created=1, pods="10.1.1.0/24")
    beside = _node("a2", cluster="a", created=2, pods="10.1.2.0/24")
    far = _node("b1", cluster="b", created=3, pods="10.2.1.0/24")
    topology = _settle_pods(beside, far, own=own)
    assert topology.pods == {ip_network("10.2.1.0/24")}
    assert topology.routes == frozenset()
    # What a hub passes on for its neighbour has the sources of that one's pods.
    assert _prefixes(topology, "a2") == {"10.1.2.0/24"}
    assert _prefixes(topology, "b1") == {"10.2.1.0/24"}


def test_all_reaches_pods_of_ones_own_cluster_and_says_which_these_are() -> None:
    own = _node("a1", cluster="a", created=1, pods="10.1.1.0/24")
    beside = _node("a2", cluster="a", created=2, pods="10.1.2.0/24")
    far = _node("b1", cluster="b", created=3, pods="10.2.1.0/24")
    topology = _settle_pods(beside, far, own=own, networking=PodNetworking.ALL)
    assert topology.pods == {ip_network("10.1.2.0/24"), ip_network("10.2.1.0/24")}
    assert topology.beside == {ip_network("10.1.2.0/24")}
    assert _settle_pods(beside, far, own=own).beside == frozenset()


def test_an_external_peer_reaches_the_pods_of_every_cluster() -> None:
    own = _peer("nas", created=1)
    topology = _settle_pods(
        _node("a1", cluster="a", created=2, pods="10.1.1.0/24"),
        _node("b1", cluster="b", created=3, pods="10.2.1.0/24"),
        own=own,
    )
    assert topology.pods == {ip_network("10.1.1.0/24"), ip_network("10.2.1.0/24")}


def test_without_pod_networking_nobody_holds_the_pods_that_it_offers() -> None:
    own = _peer("nas", created=1)
    topology = _settle(_node("a1", cluster="a", created=2, pods="10.1.1.0/24"), own=own)
    assert topology.pods == frozenset()
    assert _prefixes(topology, "a1") == set()


def test_nobody_is_routed_off_the_pods_of_its_own_cluster_by_an_older_claim() -> None:
    own = _node("a1", cluster="a", created=5, pods="10.1.1.0/24")
    beside = _node("a2", cluster="a", created=6, pods="10.1.2.0/24")
    elder = _node("b1", cluster="b", created=1, pods="10.1.0.0/16")
    twin = _node("b2", cluster="b", created=2, pods="10.1.2.0/24")
    topology = _settle_pods(elder, twin, beside, own=own)
    assert topology.pods == frozenset()
    assert [(each.peer, each.reason, each.holder) for each in topology.refused] == [
        ("b1", RefusalReason.TAKEN, "a2"),
        ("b2", RefusalReason.TAKEN, "a2"),
    ]
    third = _settle_pods(elder, twin, beside, own=_peer("nas", created=9))
    assert third.pods == {ip_network("10.1.0.0/16")}  # for everybody else the incumbent has it


def test_an_edge_of_a_tree_reaches_pods_by_its_hub() -> None:
    own = _node("a1", cluster="a", created=1, pods="10.1.1.0/24")
    hub = _peer("hub", created=2, addresses=["100.64.0.9/16"])
    settled = _settle_pods(hub, _node("b1", cluster="b", created=3, pods="10.2.1.0/24"), own=own)
    seen = by_hub(settled, SPACE, hubs={_key("hub")}, home=_key("hub"))
    assert ip_network("10.2.1.0/24") in seen.allowed_ips[_key("hub")]
    assert seen.pods == settled.pods
