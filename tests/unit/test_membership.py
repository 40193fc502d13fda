"""What is believed of the mesh, fact by fact (the rules of removal are also tested on whole meshes)."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network
from random import Random

import pytest
from scope_agent.membership import RESTORE_PATIENCE, SECOND_LIST_AFTER, Membership
from scope_agent.state import make_identity

from scope.model import (
    Addressing,
    Assignment,
    Condition,
    Kind,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    Revision,
)
from scope.registry.port import Deleted, Disconnected, Listed, Put
from scope.tombstones import sign_tombstone

RANDOM = Random(1)
REGISTRY = make_identity(RANDOM.randbytes)
IDENTITIES = [make_identity(RANDOM.randbytes) for _ in range(60)]
PEERS = [
    Peer(Meta(f"p{n}", uid=f"u{n}", created=float(n)), PeerSpec("m"), PeerReport(identity.public))
    for n, identity in enumerate(IDENTITIES)
]
OWN = PEERS[0]
MESH = Mesh(Meta("m", uid="mesh-uid"), MeshSpec(Addressing(ipv4=IPv4Network("10.9.0.0/16"))))


def _at(number: int, registry: str = "r") -> Revision:
    return Revision(registry, number)


def _members(count: int = 60, *, at: int = 10) -> Membership:
    own = IDENTITIES[0].public.wireguard
    membership = Membership(own=own, mesh="m", registry_key=REGISTRY.public.signing, now=0.0)
    membership.receive(Listed(Kind.MESH, _at(at), (MESH,)), 0.0)
    membership.receive(Listed(Kind.PEER, _at(at), tuple(PEERS[:count])), 0.0)
    return membership


def _names(membership: Membership) -> set[str]:
    return {peer.meta.name for peer in membership.snapshot().peers.values()}


def _tombstone(number: int, *, signer: int | None = None, uid: str | None = None):  # type: ignore[no-untyped-def]
    secret = REGISTRY.signing if signer is None else IDENTITIES[signer].signing
    key = IDENTITIES[number].public.wireguard
    return sign_tombstone(mesh_uid="mesh-uid", peer_uid=uid or f"u{number}", key=key, secret=secret)


def test_everybody_listed_is_believed_but_ourselves_and_those_of_other_meshes() -> None:
    membership = _members(4)
    stranger = replace(PEERS[5], spec=PeerSpec("other"))
    membership.receive(Put(stranger, _at(11)), 1.0)
    assert _names(membership) == {"p1", "p2", "p3"}
    assert membership.snapshot().own == OWN


def test_a_peer_that_comes_back_with_other_keys_loses_the_earlier_ones_at_once() -> None:
    membership = _members(4)
    renewed = replace(PEERS[1], report=PeerReport(IDENTITIES[50].public))
    membership.receive(Put(renewed, _at(11)), 1.0)
    believed = membership.snapshot().peers
    assert believed[IDENTITIES[50].public.wireguard] == renewed
    assert IDENTITIES[1].public.wireguard not in believed
    assert _names(membership) == {"p1", "p2", "p3"}


def test_a_peer_that_is_told_to_leave_is_no_member_until_that_is_taken_back() -> None:
    membership = _members(4)
    leaving = replace(PEERS[1], spec=replace(PEERS[1].spec, leaving=True))
    membership.receive(Put(leaving, _at(11)), 1.0)
    assert _names(membership) == {"p2", "p3"}
    membership.receive(Put(PEERS[1], _at(12)), 2.0)
    assert _names(membership) == {"p1", "p2", "p3"}


def test_few_absences_in_a_complete_list_are_believed_at_once() -> None:
    membership = _members(20)
    membership.receive(Listed(Kind.PEER, _at(11), tuple(PEERS[:18])), 1.0)
    assert len(_names(membership)) == 17


@pytest.mark.parametrize("fault", ["incomplete", "without ourselves"])
def test_a_list_that_lacks_something_removes_nobody(fault: str) -> None:
    membership = _members(20)
    resources = tuple(PEERS[:18]) if fault == "incomplete" else tuple(PEERS[1:18])
    membership.receive(Listed(Kind.PEER, _at(11), resources, complete=fault != "incomplete"), 1.0)
    assert len(_names(membership)) == 19


def test_more_than_three_and_a_tenth_take_a_second_list_half_a_minute_later() -> None:
    membership = _members(60)
    few = Listed(Kind.PEER, _at(11), tuple(PEERS[:50]))
    membership.receive(few, 1.0)
    assert len(_names(membership)) == 59
    assert membership.get_timer() == 1.0 + SECOND_LIST_AFTER
    assert membership.wants_list(40.0) and not membership.wants_list(41.0)
    membership.receive(few, 20.0)
    assert len(_names(membership)) == 59
    membership.receive(few, 32.0)
    assert len(_names(membership)) == 49


@pytest.mark.parametrize("revision", [_at(3), _at(99, "another")], ids=["older", "another registry"])
def test_a_restore_removes_nobody_for_ten_minutes_and_then_asks_for_a_list(revision: Revision) -> None:
    membership = _members(20)
    old = Listed(Kind.PEER, revision, tuple(PEERS[:18]))
    membership.receive(old, 1.0)
    membership.receive(Deleted(PEERS[1], replace(revision, number=revision.number + 1)), 2.0)
    assert len(_names(membership)) == 19
    assert membership.wants_list(2.0 + RESTORE_PATIENCE)
    membership.receive(replace(old, revision=replace(revision, number=revision.number + 2)), 700.0)
    assert len(_names(membership)) == 17


def test_the_streams_of_meshes_and_peers_may_overtake_each_other() -> None:
    membership = _members(20)
    membership.receive(Put(PEERS[20], _at(14)), 1.0)
    membership.receive(Put(replace(MESH, meta=replace(MESH.meta, generation=2)), _at(12)), 1.0)
    membership.receive(Deleted(PEERS[1], _at(15)), 2.0)
    assert "p1" not in _names(membership)  # no restore was seen


def test_a_change_that_a_newer_list_held_already_is_no_restore() -> None:
    membership = _members(20, at=30)
    membership.receive(Put(PEERS[3], _at(25)), 1.0)
    membership.receive(Deleted(PEERS[1], _at(31)), 2.0)
    assert "p1" not in _names(membership)


def test_a_tombstone_of_the_registry_or_of_the_peer_itself_removes_and_no_other() -> None:
    membership = _members(6)
    assert not membership.bury(_tombstone(1, signer=2))
    assert not membership.bury(replace(_tombstone(1), signature=bytes(64)))
    assert not membership.bury(_tombstone(2, signer=2, uid="u1"))
    assert _names(membership) == {"p1", "p2", "p3", "p4", "p5"}
    assert membership.bury(_tombstone(1)) and membership.bury(_tombstone(2, signer=2))
    assert not membership.bury(_tombstone(1))  # no news
    assert _names(membership) == {"p3", "p4", "p5"}


def test_an_unsigned_tombstone_in_a_resource_removes_nobody_not_even_ourselves() -> None:
    membership = _members(4)
    for number in (0, 1):
        fake = replace(_tombstone(number), signature=bytes(64))
        resource = replace(PEERS[number], assignment=Assignment(tombstone=fake))
        membership.receive(Put(resource, _at(11 + number)), 1.0)
    assert not membership.removed_self()
    assert "p1" in _names(membership)


def test_a_buried_peer_stays_buried_after_an_old_list_and_a_restart() -> None:
    membership = _members(6)
    membership.bury(_tombstone(1))
    membership.receive(Listed(Kind.PEER, _at(2), tuple(PEERS[:6])), 5.0)
    assert "p1" not in _names(membership)
    fresh = Membership(
        own=OWN.report.keys.wireguard,  # type: ignore[union-attr]
        mesh="m",
        registry_key=REGISTRY.public.signing,
        now=0.0,
    )
    fresh.restore(membership.snapshot())
    fresh.receive(Put(replace(PEERS[1], meta=Meta("again", uid="new-uid")), _at(20)), 1.0)
    assert not {"p1", "again"} & _names(fresh)


def test_our_own_tombstone_says_that_we_are_to_leave() -> None:
    membership = _members(3)
    membership.receive(Put(replace(OWN, assignment=Assignment(tombstone=_tombstone(0))), _at(11)), 1.0)
    assert membership.removed_self()


def test_our_own_leaving_is_believed_without_the_registry_and_only_when_we_signed_it() -> None:
    membership = _members(4)
    assert not membership.bury(_tombstone(0, signer=1))
    assert not membership.removed_self()
    assert membership.bury(_tombstone(0, signer=0))
    assert membership.removed_self()


def test_of_two_peers_with_one_key_the_older_is_believed() -> None:
    membership = _members(3)
    later = replace(PEERS[1], meta=Meta("thief", uid="u99", created=500.0))
    membership.receive(Put(later, _at(11)), 1.0)
    assert _names(membership) == {"p1", "p2"}
    membership.receive(Deleted(PEERS[1], _at(12)), 2.0)
    assert _names(membership) == {"thief", "p2"}


def test_a_lost_registry_is_said_and_changes_nothing() -> None:
    membership = _members(5)
    before = membership.snapshot()
    membership.receive(Disconnected("no route"), 9.0)
    assert membership.snapshot() is before
    assert (membership.registration().connected, membership.registration().reason) == (False, "no route")


def test_without_a_key_of_the_registry_the_one_that_the_mesh_names_is_believed() -> None:
    own = IDENTITIES[0].public.wireguard
    membership = Membership(own=own, mesh="m", registry_key=None, now=0.0)
    membership.receive(Listed(Kind.MESH, _at(10), (MESH,)), 0.0)
    membership.receive(Listed(Kind.PEER, _at(10), tuple(PEERS[:4])), 0.0)
    assert not membership.bury(_tombstone(1))
    named = replace(MESH, status=replace(MESH.status, signing_key=REGISTRY.public.signing))
    membership.receive(Put(named, _at(11)), 1.0)
    assert not membership.bury(_tombstone(1, signer=2))
    assert membership.bury(_tombstone(1))
    assert _names(membership) == {"p2", "p3"}


def test_our_own_peer_made_anew_keeps_its_addresses_until_it_is_given_some() -> None:
    membership = _members(3)
    held, given = (Assignment((IPv4Interface(address),)) for address in ("10.9.0.7/16", "10.9.0.8/16"))
    membership.receive(Put(replace(OWN, assignment=held), _at(11)), 1.0)
    anew = replace(OWN, meta=replace(OWN.meta, uid="another"))
    membership.receive(Put(anew, _at(12)), 2.0)
    own = membership.snapshot().own
    assert own is not None
    assert (own.meta.uid, own.assignment.addresses) == ("another", held.addresses)
    ready = Assignment(conditions=(Condition("Ready", "False", "Waiting", "soon", 1.0),))
    membership.receive(Put(replace(anew, assignment=ready), _at(13)), 3.0)
    own = membership.snapshot().own
    assert own is not None
    assert own.assignment.addresses == held.addresses
    membership.receive(Put(replace(anew, assignment=given), _at(14)), 4.0)
    assert membership.snapshot().own == replace(anew, assignment=given)
