"""Events are few: each transition once, and peers that come or go together in one."""

from __future__ import annotations

from dataclasses import replace

from scope_operator.kube.news import SHOWN, News, Overheard, news_of, together
from scope_operator.plan.planner import CreatePeer, DeletePeer, Why, Write, WriteAssignment, WriteMeshStatus
from scope_operator.reconcile import Done

from scope.model import (
    Assignment,
    Condition,
    Mesh,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    Resource,
    Revision,
    Tombstone,
)
from scope.registry.port import Conflict, Deleted, Put
from tests.unit.registry_conformance import MESH, keys

HOME = replace(MESH, meta=Meta("home", uid="mesh-uid"))
NODE_PEER = Peer(
    Meta("home.east.n1", uid="u1"), PeerSpec("home", cluster="east", node_name="n1", node_uid="x")
)
GIVEN = Assignment(online=True)


def told(action: Write) -> tuple[News, ...]:
    return news_of(Done(action, None, None, 0.0))


def reasons(action: Write) -> list[str]:
    return [each.reason for each in told(action)]


def with_condition(mesh: Mesh, kind: str, status: str, reason: str = "Why") -> Mesh:
    condition = Condition(kind, status, reason, f"{kind} is {status}", 1.0)
    return replace(mesh, status=replace(mesh.status, conditions=(condition,)))


def test_a_condition_is_told_when_it_begins_and_when_it_ends() -> None:
    clear, full = (with_condition(HOME, "AddressesExhausted", status) for status in ("False", "True"))
    (begun,) = told(WriteMeshStatus(clear, full.status))
    assert (begun.reason, begun.is_warning, begun.about.uid) == ("AddressesExhausted", True, "mesh-uid")
    assert reasons(WriteMeshStatus(HOME, full.status)) == ["AddressesExhausted"]
    assert reasons(WriteMeshStatus(full, full.status)) == []
    assert reasons(WriteMeshStatus(full, clear.status)) == ["AddressesExhaustedResolved"]
    assert reasons(WriteMeshStatus(HOME, clear.status)) == []


def test_hubs_that_go_and_come_back_are_told_but_not_that_a_new_mesh_has_none_yet() -> None:
    lacking, served = (with_condition(HOME, "HubsAvailable", status) for status in ("False", "True"))
    assert reasons(WriteMeshStatus(HOME, lacking.status)) == []
    assert reasons(WriteMeshStatus(served, lacking.status)) == ["HubsUnavailable"]
    assert reasons(WriteMeshStatus(lacking, served.status)) == ["HubsUnavailableResolved"]


def test_a_cluster_whose_name_is_taken_is_told_once() -> None:
    refused = with_condition(HOME, "Ready", "False", "ClusterNameTaken")
    assert reasons(WriteMeshStatus(HOME, refused.status)) == ["ClusterNameTaken"]
    assert reasons(WriteMeshStatus(refused, refused.status)) == []


def test_a_machine_that_comes_back_with_other_keys_is_told_once() -> None:
    seen = Overheard()
    first, again = (replace(NODE_PEER, report=PeerReport(keys(seed))) for seed in (1, 2))
    facts = [first, replace(first, assignment=GIVEN), again, again]
    told = [seen.take(Put(peer, Revision("r", number))) for number, peer in enumerate((NODE_PEER, *facts))]
    assert [len(news) for news in told] == [0, 0, 0, 1, 0]
    (news,) = told[3]
    assert (news.about.name, news.reason, news.is_warning) == ("home.east.n1", "KeysReplaced", True)
    assert (
        f"Node n1 has new keys (WireGuard {keys(2).wireguard} in place of {keys(1).wireguard})" in news.note
    )


def test_a_peer_made_anew_and_one_off_the_cluster_are_no_news_of_keys() -> None:
    seen, external = Overheard(), replace(NODE_PEER, spec=PeerSpec("home"))
    for number, peer in enumerate((NODE_PEER, external)):
        before = replace(peer, report=PeerReport(keys(1)))
        after = replace(peer, report=PeerReport(keys(2)))
        assert seen.take(Put(before, Revision("r", 2 * number))) == ()
        if peer is NODE_PEER:
            assert seen.take(Deleted(before, Revision("r", 1))) == ()
        assert seen.take(Put(after, Revision("r", 2 * number + 1))) == ()


def test_a_peer_that_others_remove_is_told_once_and_not_again_when_it_is_deleted() -> None:
    removed = Condition("Removed", "True", "ByAdministrator", "removed; its keys cannot join again", 1.0)
    stone = Tombstone(
        mesh_uid="mesh-uid", peer_uid="u1", key=keys(1).wireguard, signer=keys(2).signing, signature=bytes(64)
    )
    laptop = Peer(Meta("laptop", uid="u1"), PeerSpec("home"), report=PeerReport(keys(1)))
    buried = replace(laptop, assignment=Assignment(conditions=(removed,), tombstone=stone))
    seen = Overheard()
    facts: list[Resource] = [HOME, laptop, buried, buried]
    told = [seen.take(Put(each, Revision("r", number))) for number, each in enumerate(facts)]
    assert [len(news) for news in told] == [0, 0, 1, 0]
    (news,) = told[2]
    assert (news.about.uid, news.reason, news.peer) == ("mesh-uid", "PeerRemoved", "laptop")
    assert news.note == "removed; its keys cannot join again"
    assert reasons(DeletePeer(buried, Why.EXPIRED, HOME)) == []


def test_a_peer_that_was_removed_before_this_replica_started_is_no_news() -> None:
    stone = Tombstone(
        mesh_uid="mesh-uid", peer_uid="u1", key=keys(1).wireguard, signer=keys(2).signing, signature=bytes(64)
    )
    seen = Overheard()
    for each in (HOME, replace(NODE_PEER, assignment=Assignment(tombstone=stone))):
        assert seen.take(Put(each, Revision("r", 1))) == ()


def test_a_peers_conflict_of_routes_is_told_and_its_end_too() -> None:
    overlap = Condition("RouteConflict", "True", "RoutesOverlap", "overlaps", 1.0)
    disputed = replace(GIVEN, conditions=(overlap,))
    settled = replace(NODE_PEER, assignment=GIVEN)
    assert reasons(WriteAssignment(settled, disputed, HOME)) == ["RouteConflict"]
    conflicting = replace(NODE_PEER, assignment=disputed)
    assert reasons(WriteAssignment(conflicting, GIVEN, HOME)) == ["RouteConflictResolved"]


def test_an_address_that_was_anothers_is_told_each_time() -> None:
    first = Condition("AddressConflict", "False", "GivenAnother", "it is another's", 1.0)
    settled = replace(NODE_PEER, assignment=GIVEN)
    moved = replace(GIVEN, conditions=(first,))
    assert reasons(WriteAssignment(settled, moved, HOME)) == ["AddressConflict"]
    again = replace(GIVEN, conditions=(replace(first, changed=2.0),))
    assert reasons(WriteAssignment(replace(NODE_PEER, assignment=moved), again, HOME)) == ["AddressConflict"]
    assert reasons(WriteAssignment(replace(NODE_PEER, assignment=moved), moved, HOME)) == []


def test_a_peer_is_told_when_it_is_first_assigned_and_when_it_goes() -> None:
    (came,) = told(WriteAssignment(NODE_PEER, GIVEN, HOME))
    assert (came.reason, came.about.name, came.peer) == ("PeerAdded", "home", "home.east.n1")
    assert reasons(WriteAssignment(replace(NODE_PEER, assignment=GIVEN), Assignment(), HOME)) == []
    assert reasons(CreatePeer(NODE_PEER, HOME)) == []
    assert reasons(DeletePeer(NODE_PEER, Why.NODE_LEFT, HOME)) == ["PeerRemoved"]
    assert reasons(DeletePeer(NODE_PEER, Why.EXPIRED, None)) == []


def test_what_failed_is_no_news() -> None:
    done = Done(DeletePeer(NODE_PEER, Why.NODE_LEFT, HOME), None, Conflict("changed"), 0.0)
    assert news_of(done) == ()


def test_peers_that_come_together_are_one_event() -> None:
    came = [
        news
        for number in range(SHOWN + 3)
        for news in told(WriteAssignment(replace(NODE_PEER, meta=Meta(f"p{number}")), GIVEN, HOME))
    ]
    full = with_condition(HOME, "AddressesExhausted", "True")
    one, other = together([*came, *told(WriteMeshStatus(HOME, full.status))])
    assert one.reason == "AddressesExhausted"
    assert other.note.startswith("p0, p1, p2, p3, p4 and 3 more: ")
