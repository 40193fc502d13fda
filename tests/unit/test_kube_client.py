"""What an API server's answers mean, where it is found, and what is written to it: without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from scope.model import ConfigError, Kind, Meta, Peer, PeerReport, PeerSpec
from scope.registry.kube.access import ServiceAccount, in_cluster
from scope.registry.kube.client import error_of
from scope.registry.kube.objects import (
    lease,
    lease_path,
    node_lease,
    object_path,
    peer_lease,
    peers_of_lease,
    read,
    speaks_for,
)
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    Gone,
    NotFound,
    Refused,
    RegistryError,
    Unavailable,
)
from scope.resources import InvalidResource, status_to_dict
from tests.unit.registry_conformance import keys

URL = "https://192.0.2.1:6443"


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (400, "BadRequest", Refused),
        (401, "Unauthorized", Unavailable),
        (403, "Forbidden", Refused),
        (404, "NotFound", NotFound),
        (409, "AlreadyExists", AlreadyExists),
        (409, "Conflict", Conflict),
        (410, "Expired", Gone),
        (422, "Invalid", Refused),
        (429, "TooManyRequests", Unavailable),
        (500, "InternalError", Unavailable),
        (503, "ServiceUnavailable", Unavailable),
        (504, "Timeout", Unavailable),
    ],
)
def test_each_status_says_whose_move_is_next(code: int, reason: str, error: type[RegistryError]) -> None:
    said = error_of({"code": code, "reason": reason, "message": "a sentence"}, url=URL)
    assert type(said) is error
    assert code == 401 or str(said) == "a sentence"


def test_a_policys_own_sentence_is_the_refusal() -> None:
    message = (
        "scopepeers.scope.ltgc.cc \"p\" is forbidden: ValidatingAdmissionPolicy 'agents' with binding "
        "'agents' denied request: write to your own Node's ScopePeer alone"
    )
    said = error_of({"code": 403, "reason": "Forbidden", "message": message}, url=URL)
    assert str(said) == "write to your own Node's ScopePeer alone"


def test_a_server_is_left_alone_for_as_long_as_it_asks() -> None:
    said = error_of({"code": 429, "details": {"retryAfterSeconds": 3}}, url=URL, retry_after=7.0)
    assert isinstance(said, Unavailable)
    assert said.retry_after == 7.0
    said = error_of({"code": 503, "details": {"retryAfterSeconds": 3}}, url=URL)
    assert isinstance(said, Unavailable)
    assert said.retry_after == 3.0


def test_an_answer_without_a_status_names_server_and_code() -> None:
    assert str(error_of({"code": 502}, url=URL)) == f"{URL} answered HTTP 502"


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}, "https://10.0.0.1:443"),
        ({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}, "https://[fd00::1]:443"),
    ],
)
def test_a_pod_is_told_where_its_api_server_is(environ: dict[str, str], url: str) -> None:
    assert in_cluster(environ=environ).url == url
    assert in_cluster(url="https://api.example/", environ=environ).url == "https://api.example"


def test_outside_of_a_pod_the_api_server_must_be_named() -> None:
    with pytest.raises(ConfigError, match="--api-server"):
        in_cluster(environ={})
    with pytest.raises(ConfigError, match="starts with https://"):
        in_cluster(url="http://192.0.2.1", environ={})


def test_what_is_not_there_yet_is_awaited(tmp_path: Path) -> None:
    access = ServiceAccount(URL, tmp_path)
    with pytest.raises(Unavailable, match=r"ca\.crt"):
        access.tls()
    with pytest.raises(Unavailable, match="token"):
        access.authorization().send(None)


def test_names_stay_within_their_part_of_a_path() -> None:
    assert object_path(Kind.PEER, "a/../b", "ns").endswith("/scopepeers/a%2F..%2Fb")
    assert object_path(Kind.TOKEN, "t1", "ns") == "/api/v1/namespaces/ns/secrets/scope-token-t1"
    assert lease_path("agent.n/1", "ns").endswith("/leases/agent.n%2F1")


def test_a_lease_names_its_owners_and_no_other_lease_does() -> None:
    owners = {"home.here.n1": "u1", "work.here.n1": "u2"}
    document = lease("agent.n1", namespace="ns", owners=owners, wall=1.5)
    assert peers_of_lease(document) == ("agent.n1", tuple(owners), "1970-01-01T00:00:01.500000Z")
    document["metadata"]["name"] = "scope-operator"
    assert peers_of_lease(document) == ("scope-operator", (), "")


def node_peer(name: str, *, cluster: str = "here", node: str = "n1") -> Peer:
    return Peer(Meta(name), PeerSpec(mesh="home", cluster=cluster, node_name=node))


@pytest.mark.parametrize(
    ("name", "peer", "speaks"),
    [
        ("agent.n1", node_peer("home.here.n1"), True),
        ("agent.n2", node_peer("home.here.n1"), False),
        ("agent.n1", node_peer("home.there.n1", cluster="there"), False),
        ("agent.n1", node_peer("n1", cluster="", node=""), False),
        ("agent.", node_peer("n1", node=""), False),
        ("peer.n1", node_peer("n1", cluster="", node=""), True),
        ("peer.home.there.n1", node_peer("home.there.n1", cluster="there"), True),
        ("peer.n1", node_peer("home.here.n1"), False),
    ],
)
def test_a_lease_speaks_for_its_own_node_or_its_one_peer(name: str, peer: Peer, *, speaks: bool) -> None:
    assert speaks_for(name, peer, cluster="here") is speaks


def test_a_name_that_leaves_a_lease_no_room_is_refused_for_a_node_and_hashed_for_a_peer() -> None:
    assert node_lease("n" * 247) == "agent." + "n" * 247
    with pytest.raises(ConfigError, match=r"has 248 characters.*of at most 247"):
        node_lease("n" * 248)
    first, second = (peer_lease("p" * 250 + letter) for letter in "ab")
    assert first != second
    assert first.startswith("peer-")
    assert len(first) <= 253


@pytest.mark.parametrize(
    ("secret", "problem"),
    [
        ({"metadata": {"name": "other"}, "data": {}}, "scope-token-ID"),
        ({"metadata": {"name": "scope-token-a"}, "data": {"mesh": "%"}}, "not base64"),
        ({"metadata": {"name": "scope-token-a"}, "data": {}}, "spec.mesh"),
        ({"metadata": {"name": "scope-token-a"}, "data": {"singleUse": "bWF5YmU="}}, "spec.singleUse"),
    ],
)
def test_a_secret_that_is_no_token_says_why(secret: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidResource, match=problem):
        read(Kind.TOKEN, secret)


def test_items_of_a_list_need_not_repeat_their_kind() -> None:

    document = {
        "metadata": {"name": "p", "resourceVersion": "7", "managedFields": [{"manager": "x"}]},
        "spec": {"mesh": "home"},
        "status": status_to_dict(PeerReport(keys(1))),
    }
    peer = read(Kind.PEER, document)
    assert (peer.meta.name, peer.meta.revision) == ("p", 7)
