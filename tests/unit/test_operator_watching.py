"""What the operator makes of a watch event."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scope_operator.kube.watching import fact_of

from scope import resources
from scope.model import Kind, Meta, Peer, PeerSpec, Revision
from scope.registry.port import Deleted, Put

PEER = Peer(Meta("home.east.n1", uid="u1", revision=7, created=0.0), PeerSpec(mesh="home"))


def event(kind: str | None, peer: Peer = PEER) -> dict[str, Any]:
    return {"type": kind, "object": resources.to_dict(peer)}


def test_a_change_is_read_and_a_deletion_told() -> None:
    changed = replace(PEER, meta=replace(PEER.meta, revision=8))
    for known in ({}, {PEER.meta.name: PEER}):
        fact = fact_of(Kind.PEER, event("MODIFIED", changed), registry_id="r", known=known.get)
        assert fact == Put(changed, Revision("r", 8))
    gone = fact_of(Kind.PEER, event("DELETED", changed), registry_id="r", known=lambda _: changed)
    assert gone == Deleted(changed, Revision("r", 8))


def test_a_peer_that_is_listed_as_it_is_known_is_not_read_anew() -> None:
    fact = fact_of(Kind.PEER, event(None), registry_id="r", known={PEER.meta.name: PEER}.get)
    assert isinstance(fact, Put)
    assert fact.resource is PEER


def test_another_peer_of_the_same_name_is_read() -> None:
    former = replace(PEER, meta=replace(PEER.meta, uid="u0"))
    fact = fact_of(Kind.PEER, event(None), registry_id="r", known=lambda _: former)
    assert isinstance(fact, Put)
    assert fact.resource == PEER


def test_what_cannot_be_read_is_no_fact() -> None:
    document = event("ADDED")
    document["object"]["spec"] = {"mesh": 7}
    assert fact_of(Kind.PEER, document, registry_id="r") is None
