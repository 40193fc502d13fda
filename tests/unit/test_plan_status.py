"""Conditions name the first thing that is wrong, routes stay with the elder, and counts count pairs once."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest
from scope_operator.plan.addresses import HOLD
from scope_operator.plan.conditions import keys_failed, mesh_conditions, peer_conditions
from scope_operator.plan.routes import route_conflicts
from scope_operator.plan.status import count, is_expired, plan_assignment

from scope.model import (
    Assignment,
    Condition,
    KeyCounts,
    Link,
    LinkPsk,
    Mesh,
    MeshCluster,
    MeshCounts,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    PodNetworking,
    PodPrefix,
    PodSource,
    PostQuantum,
    PostQuantumMode,
    PskFailure,
    PublicKey,
    Role,
    Tombstone,
    Translation,
)
from scope.resources import parse, to_dict
from tests.unit.registry_conformance import MESH, keys

HOME = replace(MESH, meta=replace(MESH.meta, uid="m", revision=1, created=1.0))
KEY = PublicKey(bytes(32))
TOMBSTONE = Tombstone("m", "u", KEY, KEY, bytes(64))


def member(number: int, *, routes: tuple[str, ...] = (), assignment: Assignment = Assignment()) -> Peer:  # noqa: B008
    return Peer(
        Meta(f"p{number}", uid=f"u{number}", revision=number, created=float(number)),
        PeerSpec("home", routes=tuple(map(ip_network, routes))),
        report=PeerReport(keys(number)),
        assignment=assignment,
    )


def removed(number: int, *, at: float) -> Peer:
    gone = Condition("Removed", "True", "ByAdministrator", "removed", at)
    addresses = (ip_interface("100.64.0.9/16"),)
    return member(number, assignment=Assignment(addresses=addresses, conditions=(gone,), tombstone=TOMBSTONE))


def planned(peer: Peer, *, online: bool, wall: float) -> Assignment:
    return plan_assignment(peer, mesh=HOME, taken={}, conflict=None, role=Role.EDGE, online=online, wall=wall)


def test_an_unchanged_peer_is_planned_as_it_is() -> None:
    first = planned(member(1), online=True, wall=10.0)
    again = planned(member(1, assignment=first), online=True, wall=99.0)
    assert again == first
    assert first.online
    assert first.last_seen == 10.0
    assert len(first.addresses) == 2
    assert parse(to_dict(member(1, assignment=first))) == member(1, assignment=first)


def test_going_offline_is_written_once_with_its_time() -> None:
    first = planned(member(1), online=True, wall=10.0)
    off = planned(member(1, assignment=first), online=False, wall=300.0)
    assert (off.online, off.last_seen) == (False, 300.0)
    assert planned(member(1, assignment=off), online=False, wall=999.0) == off
    assert [(each.reason, each.changed) for each in off.conditions] == [("Offline", 300.0)]


def test_the_first_failing_check_gives_the_reason() -> None:
    def ready(peer: Peer, *, mesh: Mesh | None = HOME, lacks: bool = False, online: bool = True) -> str:
        (condition, *_) = peer_conditions(
            peer, mesh=mesh, lacks_address=lacks, conflict=None, online=online, wall=5.0
        )
        assert condition.type == "Ready"
        return condition.reason

    bare = replace(member(1), report=None)
    assert ready(bare, mesh=None, lacks=True, online=False) == "NoMesh"
    assert ready(bare, lacks=True, online=False) == "NoKeys"
    assert ready(member(1), lacks=True, online=False) == "NoAddressLeft"
    assert ready(member(1), online=False) == "Offline"
    assert ready(member(1)) == "Ready"
    managed = replace(HOME, spec=replace(HOME.spec, existing_interface="wg0"))
    assert ready(member(1), mesh=managed) == "Ready"
    assert ready(member(1, routes=("10.1.0.0/16",)), mesh=managed) == "ManagedElsewhere"
    hub = replace(member(1), spec=PeerSpec("home", role=Role.HUB))
    assert (ready(hub), ready(hub, mesh=managed)) == ("Ready", "ManagedElsewhere")


def test_a_mesh_says_who_has_no_address_and_whom_it_overlaps() -> None:
    def conditions(
        *, overlaps: Mesh | None = None, lacking: tuple[str, ...] = (), conflicting: tuple[str, ...] = ()
    ) -> dict[str, Condition]:
        made = mesh_conditions(
            HOME, overlaps=overlaps, without_address=lacking, conflicting=conflicting, wall=5.0
        )
        return {each.type: each for each in made}

    well = conditions()
    assert {name: each.status for name, each in well.items()} == {
        "Ready": "True",
        "AddressesExhausted": "False",
        "RouteConflict": "False",
    }
    short = conditions(lacking=("a", "b", "c", "d", "e"))
    assert short["Ready"].reason == "NoAddressLeft"
    assert short["AddressesExhausted"].status == "True"
    assert "a, b, c and 2 more: widen spec.addressing" in short["AddressesExhausted"].message
    older = replace(HOME, meta=Meta("older"))
    assert conditions(overlaps=older, lacking=("a",))["Ready"].reason == "AddressesOverlap"
    disputed = conditions(conflicting=("a",))
    assert (disputed["Ready"].status, disputed["RouteConflict"].status) == ("True", "True")


def test_a_condition_keeps_the_time_of_its_last_change_of_status() -> None:
    first = planned(member(1), online=False, wall=10.0)
    bare = replace(member(1, assignment=first), report=None)
    still = planned(bare, online=False, wall=20.0)
    assert (still.conditions[0].reason, still.conditions[0].changed) == ("NoKeys", 10.0)


def test_a_removed_peer_keeps_its_tombstone_and_gives_its_address_back_after_a_day() -> None:
    peer = removed(1, at=1000.0)
    assert planned(peer, online=False, wall=2000.0) == peer.assignment
    released = planned(peer, online=False, wall=1000.0 + HOLD)
    assert released == replace(peer.assignment, addresses=())


def test_peers_expire_after_the_meshs_time_offline_or_removed_and_never_online() -> None:
    expiry = HOME.spec.peer_expiry
    away = member(1, assignment=Assignment(last_seen=500.0))
    assert not is_expired(away, mesh=HOME, wall=500.0 + expiry - 1)
    assert is_expired(away, mesh=HOME, wall=500.0 + expiry)
    assert not is_expired(
        replace(away, meta=replace(away.meta, created=1000.0)), mesh=HOME, wall=900.0 + expiry
    )
    online = member(1, assignment=Assignment(online=True, last_seen=500.0))
    assert not is_expired(online, mesh=HOME, wall=500.0 + 10 * expiry)
    assert is_expired(removed(1, at=1000.0), mesh=HOME, wall=1000.0 + expiry)
    assert not is_expired(removed(1, at=1000.0), mesh=HOME, wall=999.0 + expiry)


def test_the_elder_keeps_a_route_and_the_younger_is_told() -> None:
    conflicts = route_conflicts(
        HOME,
        [
            member(2, routes=("10.1.0.0/16",)),
            member(1, routes=("10.1.2.0/24",)),
            member(3, routes=("10.2.0.0/16",)),
        ],
    )
    assert set(conflicts) == {"p2"}
    (condition, conflict) = peer_conditions(
        member(2), mesh=HOME, lacks_address=False, conflict=conflicts["p2"], online=True, wall=5.0
    )
    assert condition.status == "True"
    assert conflict.type == "RouteConflict"
    assert conflict.message == (
        "route 10.1.0.0/16 of ScopePeer p2 overlaps one of ScopePeer p1, which had it first and keeps it: "
        "remove one, or give one another prefix: 10.192.0.0/16 is free"
    )


def test_what_an_agent_says_of_its_pods_is_a_condition_for_as_long_as_it_says_it() -> None:
    peer = member(1)
    assert peer.report is not None
    hindered = replace(peer, report=replace(peer.report, pods_trouble="another network leads there"))

    def told(asked: Peer, *, online: bool = True) -> list[tuple[str, str, str]]:
        conditions = peer_conditions(
            asked, mesh=HOME, lacks_address=False, conflict=None, online=online, wall=5.0
        )
        return [(each.type, each.status, each.message) for each in conditions if each.type != "Ready"]

    assert told(hindered) == [("PodNetworking", "False", "another network leads there")]
    assert told(hindered, online=False) == []  # it may be long past
    assert told(peer) == []


def _node(seed: int, cluster: str, prefix: str, seen_as: str = "") -> Peer:
    pods = PodPrefix(ip_network(prefix), PodSource.NODE, ip_network(seen_as) if seen_as else None)
    peer = member(seed)
    spec = replace(
        peer.spec, cluster=cluster, node_name=f"n{seed}", node_uid=f"u{seed}", pod_prefixes=(pods,)
    )
    return replace(peer, spec=spec)


def _told(*nodes: Peer, clusters: tuple[MeshCluster, ...] = ()) -> dict[str, str]:
    """What the condition of each peer with one says."""
    mesh = replace(
        HOME, spec=replace(HOME.spec, pod_networking=PodNetworking.CROSS_CLUSTER, clusters=clusters)
    )
    conflicts = route_conflicts(mesh, nodes)
    told: dict[str, str] = {}
    for node in nodes:
        conditions = peer_conditions(
            node,
            mesh=mesh,
            lacks_address=False,
            conflict=conflicts.get(node.meta.name),
            online=True,
            wall=5.0,
        )
        for condition in conditions:
            if condition.type == "RouteConflict":
                told[node.meta.name] = condition.message
    return told


def test_of_clusters_with_the_same_pods_each_is_told_how_to_be_seen() -> None:
    nodes = [_node(seed, cluster, f"10.244.{seed % 2}.0/24") for seed, cluster in enumerate("aabbc", start=2)]
    told = _told(*nodes)
    cures = {name: message.partition("seenAs): ")[2] for name, message in told.items()}
    of_a = "of cluster a 10.244.0.0/16 to 10.193.0.0/16"
    assert cures == {
        "p4": f"of cluster b 10.244.0.0/16 to 10.192.0.0/16, {of_a}",
        "p5": f"of cluster b 10.244.0.0/16 to 10.192.0.0/16, {of_a}",
        "p6": f"of cluster c 10.244.0.0/16 to 10.194.0.0/16, {of_a}",
    }
    assert told["p4"].startswith(
        "route 10.244.0.0/24 of ScopePeer p4 overlaps one of ScopePeer p2, which had it first and keeps it: "
    )


def test_who_is_not_translated_is_told_where_its_pods_are_not_reached() -> None:
    to = Translation(ip_network("10.244.0.0/16"), ip_network("10.192.0.0/16"))
    theirs = _node(3, "b", "10.244.1.0/24", seen_as="10.192.1.0/24")
    told = _told(_node(2, "a", "10.244.1.0/24"), theirs, clusters=(MeshCluster("b", (to,)),))
    assert told == {
        "p2": "route 10.244.1.0/24 of ScopePeer p2 is, where ScopePeer p3 is, that of its own cluster's "
        "pods, which cannot reach these: translate pods (spec.clusters, seenAs): "
        "of cluster a 10.244.0.0/16 to 10.193.0.0/16"
    }
    beside = _node(4, "b", "10.244.1.0/25", seen_as="10.192.1.0/25")
    assert _told(_node(2, "a", "10.244.0.0/16"), beside).keys() == {"p2"}
    assert _told(_node(2, "a", "10.244.1.0/26"), beside).keys() == {"p2"}
    assert _told(_node(2, "b", "10.244.1.0/26"), beside) == {}
    both = _node(2, "a", "10.244.1.0/24", seen_as="10.193.1.0/24")
    assert _told(both, theirs) == {}


@pytest.mark.parametrize(
    ("elder", "younger", "conflicts"),
    [
        (("10.0.0.0/8",), ("10.9.9.0/24",), True),
        (("10.9.9.0/24",), ("10.0.0.0/8",), True),
        (("10.1.0.0/24", "10.3.0.0/24"), ("10.0.0.0/8",), True),
        (("10.1.0.0/24", "10.0.0.0/8"), ("10.200.0.0/16",), True),  # its own wider route counts as well
        (("10.0.0.0/8", "10.1.0.0/24"), ("10.200.0.0/16",), True),
        (("10.1.0.0/24",), ("10.1.1.0/24", "10.0.255.0/24"), False),
        (("fd01::/16",), ("fd01:2::/48",), True),
        (("10.0.0.0/8",), ("fd01::/48",), False),
        ((), ("100.64.0.0/10",), True),  # the mesh's own addresses
    ],
)
def test_any_overlap_is_a_conflict(elder: tuple[str, ...], younger: tuple[str, ...], conflicts: bool) -> None:
    found = route_conflicts(HOME, [member(1, routes=elder), member(2, routes=younger)])
    assert set(found) == ({"p2"} if conflicts else set())


def test_counts_are_of_members_and_of_pairs() -> None:
    def reporting(number: int, direct: int, unreachable: int = 0) -> Peer:
        peer = member(number, assignment=Assignment(online=True))
        return replace(peer, report=PeerReport(keys(number), direct=direct, unreachable=unreachable))

    peers = [
        reporting(1, 2),
        reporting(2, 2),
        reporting(3, 2),
        reporting(4, 0, 3),
        removed(5, at=1.0),
        member(6),
    ]
    assert count(peers) == MeshCounts(peers=5, online=4, direct=3, relayed=0, unreachable=2)


def _keyed(number: int, *links: Link, failed: int = 0, keyed: int = 0, unkeyed: int = 0) -> Peer:
    counts = KeyCounts(keyed=keyed, unkeyed=unkeyed, failed=failed)
    peer = member(number, assignment=Assignment(online=True))
    return replace(peer, report=PeerReport(keys(number), links=links, post_quantum=counts))


def _failed(other: str, failure: PskFailure, *, epoch: int = 0) -> Link:
    return Link(other, PathKind.DIRECT, psk=LinkPsk(epoch, failure=failure))


def _asking(mode: PostQuantumMode) -> Mesh:
    return replace(HOME, spec=replace(HOME.spec, post_quantum=PostQuantum(mode)))


def _post_quantum(mesh: Mesh, *peers: Peer) -> Condition | None:
    told = mesh_conditions(
        mesh, overlaps=None, without_address=(), conflicting=(), wall=5.0, keys=keys_failed(mesh, peers)
    )
    return next((each for each in told if each.type == "PostQuantum"), None)


def test_keys_are_counted_by_pairs_and_by_nobody_where_there_are_none() -> None:
    peers = [_keyed(1, keyed=2), _keyed(2, keyed=1, unkeyed=1), _keyed(3, keyed=1, unkeyed=1, failed=1)]
    assert count(peers).post_quantum == KeyCounts(keyed=2, unkeyed=1, failed=1)
    assert count([member(1)]).post_quantum is None


@pytest.mark.parametrize(
    ("mode", "failures", "reason", "told"),
    [
        (
            PostQuantumMode.REQUIRED,
            [(PskFailure.UNANSWERED, 0), (PskFailure.CONFLICT, 3)],
            "Conflict",
            "p1 with p3: another program replaces the key",
        ),
        (
            PostQuantumMode.REQUIRED,
            [(PskFailure.UNANSWERED, 0), (PskFailure.DISK, 3)],
            "Unconfirmed",
            "p1 with p2: no traffic before a key is proved; the other one does not answer",
        ),
        (
            PostQuantumMode.PREFERRED,
            [(PskFailure.UNANSWERED, 0), (PskFailure.DISK, 3)],
            "Disk",
            "p1 with p3: a key could not be written down",
        ),
        (PostQuantumMode.PREFERRED, [(PskFailure.UNANSWERED, 2)], "Unanswered", "p1 with p2"),
    ],
)
def test_what_stands_against_keys_is_told_of_mesh_and_peer_the_gravest_first(
    mode: PostQuantumMode, failures: list[tuple[PskFailure, int]], reason: str, told: str
) -> None:
    mesh = _asking(mode)
    links = [_failed(f"p{number}", kind, epoch=at) for number, (kind, at) in enumerate(failures, start=2)]
    peer = _keyed(1, *links, failed=len(links))
    condition = _post_quantum(mesh, peer)
    assert condition is not None and (condition.status, condition.reason) == ("False", reason)
    assert told in condition.message
    _, own = peer_conditions(peer, mesh=mesh, lacks_address=False, conflict=None, online=True, wall=5.0)
    assert (own.type, own.status, own.reason) == ("PostQuantumFailed", "True", reason)
    assert own.message == condition.message
    assert (
        len(peer_conditions(peer, mesh=HOME, lacks_address=False, conflict=None, online=True, wall=5.0)) == 1
    )


def test_a_mesh_whose_keys_are_well_says_so_and_one_without_says_nothing() -> None:
    condition = _post_quantum(_asking(PostQuantumMode.REQUIRED), _keyed(1, keyed=1))
    assert condition is not None and condition.status == "True"
    assert _post_quantum(HOME, _keyed(1, _failed("p2", PskFailure.DISK), failed=1)) is None
