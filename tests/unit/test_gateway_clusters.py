"""Operators and agents of joined clusters at the gateway: what each may do, and what each forgery is told."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Any

import aiohttp
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scope_operator.gateway import app, feed
from scope_operator.gateway.authorisation import Authority, Claimed
from scope_operator.gateway.limits import Limits

from scope import resources
from scope.admission import Rate, Refusal
from scope.credentials import (
    CLUSTER_HEADER,
    CLUSTER_TYPE,
    MESH_HEADER,
    PEER_TYPE,
    ClusterCredential,
    PeerCredential,
    ProjectedToken,
    authorization,
    base64url,
    request_digest,
)
from scope.model import (
    Assignment,
    Backend,
    Candidate,
    CandidateKind,
    Curve,
    Endpoint,
    EndpointState,
    Kind,
    Mesh,
    Meta,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    PublicKey,
    Resource,
    Role,
    Secret,
    Service,
    ServiceEndpoint,
    ServicePort,
    ServiceSpec,
)
from scope.names import service_name
from scope.registry.http import HttpRegistry
from scope.registry.memory import MemoryRegistry
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    Deleted,
    Gone,
    NotFound,
    PeerRemoved,
    Put,
    Refused,
    Unavailable,
)
from tests.unit.cluster_fixture import ACCOUNT, ISSUER, ApiServer, JoiningCluster, invite
from tests.unit.gateway_fixture import REGISTRY, REGISTRY_KEY, Running, enrolled, gateway
from tests.unit.test_gateway import ask, removed, until

PEERS = "/apis/scope.ltgc.cc/v1alpha1/scopepeers"
MESHES = "/apis/scope.ltgc.cc/v1alpha1/scopemeshes"
WEST = JoiningCluster()
EAST = JoiningCluster("east", "kube-system-of-east", seed=88, api=ApiServer(2))


def machine_keys(number: int) -> PeerKeys:
    """Keys as a machine makes them."""
    private = [bytes([part, part]) + number.to_bytes(29, "big") + bytes(1) for part in (8, 16)]
    public = [X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw() for raw in private]
    signing = Ed25519PrivateKey.from_private_bytes(machine_seed(number).raw).public_key()
    return PeerKeys(*map(PublicKey, (*public, signing.public_bytes_raw())))


def machine_seed(number: int) -> Secret:
    return Secret(bytes([3]) + number.to_bytes(31, "big"))


@dataclass(frozen=True)
class Joined:
    """A gateway with mesh `home`, an external peer in it, and the clusters west and east."""

    running: Running

    def operator(self, cluster: JoiningCluster = WEST) -> HttpRegistry:
        return HttpRegistry(self.running.url, pin=None, credential=cluster.credential(REGISTRY))

    @asynccontextmanager
    async def agent(
        self, directory: Path, *, token: str | None = None, cluster: JoiningCluster = WEST
    ) -> AsyncIterator[HttpRegistry]:
        file = directory / "token"
        file.write_text(cluster.api.token(wall=self.running.clock()) if token is None else token)
        credential = ProjectedToken(cluster.mesh, cluster.name, str(file))
        async with HttpRegistry(self.running.url, pin=None, credential=credential) as client:
            yield client

    async def node(self, name: str = "n1", cluster: JoiningCluster = WEST) -> Peer:
        """The peer of a Node, created by its cluster's operator."""
        async with self.operator(cluster) as operator:
            stored = await operator.create(cluster.peer(name))
        assert isinstance(stored, Peer)
        return stored

    async def ask_with(
        self, token: str, *, mesh: str | None = "home", cluster: str | None = "west"
    ) -> tuple[int, str, str]:
        """List peers with a token and these headers: code, reason, message."""
        headers = {"Authorization": f"Bearer {token}"}
        headers |= {} if mesh is None else {MESH_HEADER: mesh}
        headers |= {} if cluster is None else {CLUSTER_HEADER: cluster}
        async with (
            aiohttp.ClientSession() as session,
            session.get(self.running.url + PEERS, headers=headers) as response,
        ):
            answer = await response.json()
            return response.status, answer.get("reason", ""), answer.get("message", "")


def joined(body: Callable[[Joined], Awaitable[None]], *, limits: Limits | None = None) -> None:
    """Run `body` beside a gateway that both clusters joined."""

    async def run() -> None:
        async with asyncio.timeout(30), gateway(limits=limits) as running:
            await enrolled(running.registry, 1)
            await invite(running.registry, wall=running.clock(), single_use=False)
            for cluster in (WEST, EAST):
                async with HttpRegistry(running.url, pin=None, credential=None) as client:
                    await client.join_cluster(cluster.document(registry=REGISTRY_KEY))
            await body(Joined(running))

    asyncio.run(run())


def report_of(number: int, **changes: Any) -> PeerReport:
    return replace(PeerReport(machine_keys(number)), **changes)


# --- joining over HTTP --------------------------------------------------------------------------------------


def test_a_cluster_that_joins_is_told_its_mesh_and_its_registry() -> None:
    async def run() -> None:
        async with asyncio.timeout(60), gateway() as running:
            await enrolled(running.registry, 1)
            await invite(running.registry, wall=running.clock())
            async with HttpRegistry(running.url, pin=None, credential=None) as client:
                answer = await client.join_cluster(WEST.document(registry=REGISTRY_KEY))
            assert (answer.registry, answer.mesh.meta.name) == (REGISTRY, "home")
            assert answer.mesh.status.clusters == (WEST.cluster,)
            async with HttpRegistry(running.url, pin=None, credential=None) as client:
                with pytest.raises(Refused, match="has UID kube-system-of-west, and yours has another"):
                    await client.join_cluster(replace(WEST, uid="another").document(registry=REGISTRY_KEY))

    asyncio.run(run())


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"mesh": 1}', b'{"cluster": {"name": "UPPER"}}'])
def test_a_damaged_request_to_join_is_refused_with_its_field(body: bytes) -> None:
    async def run(at: Joined) -> None:
        code, status, _ = await ask(at.running, "POST", "/v1/clusters", body=body)
        assert code in (400, 422)
        assert len(status["message"].split()) > 3

    joined(run)


def test_an_operator_replaces_the_keys_of_its_own_cluster_alone() -> None:
    async def body(at: Joined) -> None:
        tokens = replace(WEST.tokens, keys=(ApiServer(5, "key-5").public,))
        async with at.operator() as operator:
            await operator.replace_cluster_tokens("west", tokens)
            with pytest.raises(Refused, match="operator of cluster 'west'"):
                await operator.replace_cluster_tokens("east", tokens)
        mesh = await at.running.registry.get(Kind.MESH, "home")
        assert isinstance(mesh, Mesh)
        west, east = mesh.status.clusters
        assert (west.trust and west.trust.tokens, east) == (tokens, EAST.cluster)

    joined(body)


def test_nobody_but_an_operator_replaces_keys() -> None:
    async def body(at: Joined) -> None:
        peer = await enrolled(at.running.registry, 1, mesh="other")
        for client in (at.running.admin, at.running.as_peer(peer)):
            async with client:
                with pytest.raises(Refused, match="for the operator of a joined cluster"):
                    await client.replace_cluster_tokens("west", WEST.tokens)
        code, _, _ = await ask(at.running, "PUT", "/v1/clusters/west/keys", body=b"{}")
        assert code == 401

    joined(body)


def test_a_removed_cluster_and_its_agents_are_refused_and_its_peers_are_gone(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        await at.node()
        other = await at.node("n2", EAST)
        async with at.operator() as operator, at.agent(tmp_path) as agent, at.running.admin as admin:
            since = (await operator.list(Kind.PEER)).revision
            facts = operator.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: at.running.feed.counts()[0] == 1)
            await admin.remove_cluster("home", "west")
            with pytest.raises(Refused, match="cluster 'west' was removed from mesh 'home'"):
                await waiting
            for client in (operator, agent):
                with pytest.raises(Refused, match="no cluster 'west' has joined mesh 'home'"):
                    await client.list(Kind.PEER)
            names = [peer.meta.name for peer in (await admin.list(Kind.PEER)).resources]
            assert names == ["home.external.p1", other.meta.name]
            with pytest.raises(NotFound):
                await admin.remove_cluster("home", "west")

    joined(body)


def test_only_an_administrator_removes_clusters() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as operator:
            with pytest.raises(Refused, match="administrator, not for clusters"):
                await operator.remove_cluster("home", "east")
        assert (await ask(at.running, "DELETE", "/v1/clusters/west?mesh=home"))[0] == 401

    joined(body)


# --- exported Services --------------------------------------------------------------------------------------


def web_of(cluster: str, *, name: str = "web", mesh: str = "home") -> Service:
    """The record of a Service of a cluster."""
    spec = ServiceSpec(mesh, cluster, "shop", name, ports=(ServicePort(80),))
    return Service(Meta(service_name(mesh, cluster, "shop", name)), spec)


def test_an_operator_writes_its_own_services_and_reads_those_of_its_mesh() -> None:
    async def body(at: Joined) -> None:
        await enrolled(at.running.registry, 2, mesh="other")
        await at.running.registry.create(web_of("south", mesh="other"))
        async with at.operator() as west, at.operator(EAST) as east:
            mine, theirs = await west.create(web_of("west")), await east.create(web_of("east"))
            assert isinstance(mine, Service)
            assert isinstance(theirs, Service)
            assert set((await west.list(Kind.SERVICE)).resources) == {mine, theirs}
            with pytest.raises(NotFound):
                await west.get(Kind.SERVICE, web_of("south", mesh="other").meta.name)
            more = replace(mine, spec=replace(mine.spec, ports=(ServicePort(81),)))
            changed = await west.update(more, if_revision=mine.meta.revision)
            assert changed.spec == more.spec
            refusal = "operator of cluster 'west' writes of its own Services in mesh 'home'"
            for forged in (web_of("east", name="db"), web_of("west", mesh="other")):
                with pytest.raises(Refused, match=refusal):
                    await west.create(forged)
            with pytest.raises(Refused, match=refusal):
                await west.update(theirs)
            with pytest.raises(Refused, match=refusal):
                await west.delete(Kind.SERVICE, theirs.meta.name, uid=theirs.meta.uid)
            with pytest.raises(Refused, match=r"is called 'home\.west\.shop\.db'"):
                await west.create(replace(web_of("west", name="db"), meta=Meta("another")))
            await west.delete(Kind.SERVICE, mine.meta.name, uid=mine.meta.uid)
            assert (await east.list(Kind.SERVICE)).resources == (theirs,)

    joined(body)


def test_an_update_may_not_take_over_the_record_of_another_service() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as west:
            mine = await west.create(web_of("west"))
            assert isinstance(mine, Service)
            bent = replace(mine, spec=replace(mine.spec, service="db"))
            with pytest.raises(Refused, match=r"is called 'home\.west\.shop\.db'"):
                await west.update(bent)

    joined(body)


def test_services_are_not_for_peers(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        await at.running.registry.create(web_of("west"))
        await at.node()
        async with at.agent(tmp_path) as agent:
            with pytest.raises(Refused, match="for operators, not for peers"):
                await agent.list(Kind.SERVICE)
            with pytest.raises(Refused, match="for operators, not for peers"):
                await agent.get(Kind.SERVICE, web_of("west").meta.name)
        async with HttpRegistry(at.running.url, pin=None, credential=None, services=True) as stranger:
            with pytest.raises(Refused):
                await stranger.list(Kind.SERVICE)

    joined(body)


def test_only_who_asks_for_them_hears_of_services() -> None:
    async def body(at: Joined) -> None:
        credential = WEST.credential(REGISTRY)
        async with (
            HttpRegistry(at.running.url, pin=None, credential=credential, services=True) as west,
            at.operator(EAST) as east,
        ):
            facts = west.watch(Kind.SERVICE, (await west.list(Kind.SERVICE)).revision)
            waiting = asyncio.ensure_future(anext(facts))
            peers = east.watch(Kind.PEER, (await east.list(Kind.PEER)).revision)
            silent = asyncio.ensure_future(anext(peers))
            await until(lambda: at.running.feed.counts()[0] == 2)
            stored = await east.create(web_of("east"))
            heard = await waiting
            assert isinstance(heard, Put)
            assert heard.resource == stored
            await at.node("n1", EAST)
            fact = await silent
            assert isinstance(fact, Put)
            assert isinstance(fact.resource, Peer)
            await east.delete(Kind.SERVICE, stored.meta.name, uid=stored.meta.uid)
            gone = await anext(facts)
            assert isinstance(gone, Deleted)
            assert gone.last == stored
            with pytest.raises(Refused, match="open it with services=True"):
                await anext(east.watch(Kind.SERVICE, (await east.list(Kind.SERVICE)).revision))

    joined(body)


def test_a_service_of_a_thousand_pods_passes_and_other_bodies_do_not_get_larger() -> None:
    async def body(at: Joined) -> None:
        address = IPv6Address("2001:db8:1111:2222:3333:4444:5555:0")
        ends = tuple(ServiceEndpoint(address + i, EndpointState.NOT_READY) for i in range(1000))
        large = web_of("west")
        large = replace(large, spec=replace(large.spec, backends=(Backend((ServicePort(80),), ends),)))
        async with at.operator() as west:
            stored = await west.create(large)
            assert stored.spec == large.spec
        code, status, _ = await ask(at.running, "POST", "/v1/join", body=b" " * (64 * 1024 + 1))
        assert (code, status["reason"]) == (413, "RequestEntityTooLarge")

    joined(body)


def test_a_cluster_exports_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "MAX_SERVICES", 2)

    async def body(at: Joined) -> None:
        async with at.operator() as west, at.operator(EAST) as east:
            for name in ("a", "b"):
                await west.create(web_of("west", name=name))
            with pytest.raises(Refused, match="exports 2 Services to mesh 'home', the most it may"):
                await west.create(web_of("west", name="c"))
            await east.create(web_of("east"))

    joined(body)


def test_large_services_push_old_changes_out_of_what_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "HISTORY_BYTES", 2000)

    async def body(at: Joined) -> None:
        west, east = (
            HttpRegistry(at.running.url, pin=None, credential=each.credential(REGISTRY), services=True)
            for each in (WEST, EAST)
        )
        async with west, east:
            stored = await west.create(web_of("west"))
            assert isinstance(stored, Service)
            since = (await west.list(Kind.SERVICE)).revision
            facts = west.watch(Kind.SERVICE, since)
            heard = asyncio.ensure_future(anext(facts))
            await until(lambda: at.running.feed.counts()[0] == 1)
            ends = tuple(ServiceEndpoint(IPv4Address("10.1.0.1") + i) for i in range(100))
            for many in (50, 100):
                spec = replace(stored.spec, backends=(Backend((), ends[:many]),))
                changed = await west.update(replace(stored, spec=spec))
                fact = await heard
                assert isinstance(fact, Put)
                assert fact.resource == changed
                heard = asyncio.ensure_future(anext(facts))
            heard.cancel()
            with pytest.raises(Gone):
                await anext(east.watch(Kind.SERVICE, since))

    joined(body)


def test_what_was_exported_to_a_mesh_goes_with_the_mesh() -> None:
    async def body(at: Joined) -> None:
        await at.running.registry.delete(
            Kind.PEER,
            "home.external.p1",
            uid=(await at.running.registry.get(Kind.PEER, "home.external.p1")).meta.uid,
        )
        async with at.operator() as west, at.running.admin as admin:
            await west.create(web_of("west"))
            mesh = await admin.get(Kind.MESH, "home")
            await admin.delete(Kind.MESH, "home", uid=mesh.meta.uid)
            assert (await admin.list(Kind.SERVICE)).resources == ()

    joined(body)


def test_what_a_cluster_exported_goes_with_it() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as west, at.operator(EAST) as east, at.running.admin as admin:
            await west.create(web_of("west"))
            kept = await east.create(web_of("east"))
            await admin.remove_cluster("home", "west")
            assert (await east.list(Kind.SERVICE)).resources == (kept,)

    joined(body)


# --- what an operator sees and writes -----------------------------------------------------------------------


def test_an_operator_keeps_the_peers_of_its_nodes() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as operator:
            created = await operator.create(WEST.peer())
            assert isinstance(created, Peer)
            assert await operator.get(Kind.PEER, created.meta.name) == created
            spec = replace(created.spec, routes=(IPv4Network("10.1.0.0/24"),))
            updated = await operator.update(replace(created, spec=spec), if_revision=created.meta.revision)
            assert isinstance(updated, Peer)
            assert updated.spec == spec
            with pytest.raises(Conflict):
                await operator.update(created, if_revision=created.meta.revision)
            with pytest.raises(AlreadyExists):
                await operator.create(WEST.peer())
            await operator.delete(Kind.PEER, created.meta.name, uid=created.meta.uid)
            with pytest.raises(NotFound):
                await operator.get(Kind.PEER, created.meta.name)

    joined(body)


def test_an_operator_changes_the_spec_of_a_peer_and_leaves_its_status() -> None:
    async def body(at: Joined) -> None:
        registry, own = at.running.registry, await at.node()
        await registry.update_status(Kind.PEER, own.meta.name, report_of(1), uid=own.meta.uid)
        assigned = Assignment(role=Role.HUB, online=True)
        await registry.update_status(Kind.PEER, own.meta.name, assigned, uid=own.meta.uid)
        async with at.operator() as operator:
            stored = await operator.get(Kind.PEER, own.meta.name)
            assert isinstance(stored, Peer)
            spec = replace(stored.spec, role=Role.HUB)
            asked = replace(stored, spec=spec, assignment=Assignment(), report=report_of(2))
            updated = await operator.update(asked, if_revision=stored.meta.revision)
        assert isinstance(updated, Peer)
        assert (updated.spec, updated.report, updated.assignment) == (spec, report_of(1), assigned)

    joined(body)


def test_an_operator_sees_its_mesh_and_its_own_peers_alone() -> None:
    async def body(at: Joined) -> None:
        await enrolled(at.running.registry, 2, mesh="other")
        own, foreign = await at.node(), await at.node("n1", EAST)
        async with at.operator() as operator:
            assert [mesh.meta.name for mesh in (await operator.list(Kind.MESH)).resources] == ["home"]
            assert (await operator.list(Kind.PEER)).resources == (own,)
            hidden = ((Kind.PEER, foreign.meta.name), (Kind.PEER, "home.external.p1"), (Kind.MESH, "other"))
            for kind, name in hidden:
                with pytest.raises(NotFound):
                    await operator.get(kind, name)

    joined(body)


def test_an_operator_hears_of_its_mesh_and_its_own_peers_alone() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as operator:
            peers, meshes = await operator.list(Kind.PEER), await operator.list(Kind.MESH)
            of_peers = operator.watch(Kind.PEER, peers.revision)
            of_meshes = operator.watch(Kind.MESH, meshes.revision)
            waiting = asyncio.ensure_future(anext(of_peers))
            waiting_mesh = asyncio.ensure_future(anext(of_meshes))
            await until(lambda: at.running.feed.counts()[0] == 1)
            await at.node("n1", EAST)
            await enrolled(at.running.registry, 2)
            own = await at.node()
            fact = await waiting
            assert isinstance(fact, Put)
            assert fact.resource == own
            mesh = await at.running.registry.get(Kind.MESH, "home")
            assert isinstance(mesh, Mesh)
            status = replace(mesh.status, observed_generation=1)
            changed = await at.running.registry.update_status(Kind.MESH, "home", status, uid=mesh.meta.uid)
            heard = await waiting_mesh
            assert isinstance(heard, Put)
            assert heard.resource == changed
            await at.running.registry.delete(Kind.PEER, own.meta.name, uid=own.meta.uid)
            gone = await anext(of_peers)
            assert isinstance(gone, Deleted)
            assert gone.last == own

    joined(body)


def test_an_operator_has_one_stream_and_takes_none_of_the_administrators() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as first, at.operator() as second:
            since = (await first.list(Kind.PEER)).revision
            older, newer = first.watch(Kind.PEER, since), second.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(older))
            await until(lambda: at.running.feed.counts() == (1, 0))
            arriving = asyncio.ensure_future(anext(newer))
            with pytest.raises(Conflict, match="newer stream of the same cluster"):
                await waiting
            assert at.running.feed.counts() == (1, 0)
            own = await at.node()
            fact = await arriving
            assert isinstance(fact, Put)
            assert fact.resource == own

    joined(body)


NOT_ITS_OWN = [
    pytest.param(EAST.peer(), "writes peers of its Nodes", id="another cluster's"),
    pytest.param(
        Peer(Meta("home.external.x"), PeerSpec("home")), "writes peers of its Nodes", id="an external one"
    ),
    pytest.param(
        Peer(Meta("other.west.n1"), PeerSpec("other", cluster="west", node_name="n1", node_uid="u")),
        "writes peers of its Nodes",
        id="another mesh's",
    ),
    pytest.param(
        replace(WEST.peer(), meta=Meta("home.east.n1")),
        "Node 'n1' has the peer 'home.west.n1'|called",
        id="a stolen name",
    ),
    pytest.param(replace(WEST.peer(), report=report_of(1)), "status: ", id="with keys"),
    pytest.param(replace(WEST.peer(), assignment=Assignment(role=Role.HUB)), "status: ", id="with a role"),
]


@pytest.mark.parametrize(("peer", "sentence"), NOT_ITS_OWN)
def test_an_operator_creates_no_peer_but_those_of_its_nodes(peer: Peer, sentence: str) -> None:
    async def body(at: Joined) -> None:
        before = at.running.registry.store.revision
        async with at.operator() as operator:
            with pytest.raises(Refused, match=sentence):
                await operator.create(peer)
        assert at.running.registry.store.revision == before

    joined(body)


def test_an_operator_fills_no_mesh_beyond_what_it_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_PEERS", 2)

    async def body(at: Joined) -> None:
        own = await at.node()
        await until(partial(_has, at, own))
        async with at.operator() as operator:
            with pytest.raises(Refused, match="mesh 'home' has 2 peers, the most it may have: select fewer"):
                await operator.create(WEST.peer("n2"))

    joined(body)


def test_a_peer_stays_that_of_its_node_its_cluster_and_its_mesh() -> None:
    async def body(at: Joined) -> None:
        await enrolled(at.running.registry, 2, mesh="other")
        own = await at.node()
        changes: tuple[dict[str, Any], ...] = (
            {"cluster": "east"},
            {"node_name": "n2"},
            {"node_uid": "another"},
            {"mesh": "other"},
            {"cluster": "", "node_name": "", "node_uid": ""},
        )
        async with at.operator() as operator:
            for change in changes:
                with pytest.raises(Refused):
                    await operator.update(replace(own, spec=replace(own.spec, **change)))
        assert await at.running.registry.get(Kind.PEER, own.meta.name) == own

    joined(body)


def test_an_operator_touches_nobody_elses_peers() -> None:
    async def body(at: Joined) -> None:
        external = await at.running.registry.get(Kind.PEER, "home.external.p1")
        async with at.operator() as operator:
            for peer in (external, await at.node("n1", EAST)):
                assert isinstance(peer, Peer)
                asked = replace(peer, spec=replace(WEST.peer().spec), report=None, assignment=Assignment())
                with pytest.raises((NotFound, Refused)):
                    await operator.update(asked)
                with pytest.raises(NotFound):
                    await operator.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
                with pytest.raises(NotFound):
                    await operator.remove_peer(peer.meta.name)
                assert await at.running.registry.get(Kind.PEER, peer.meta.name) == peer

    joined(body)


def test_an_operator_writes_no_status() -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        mesh = await at.running.registry.get(Kind.MESH, "home")
        assert isinstance(mesh, Mesh)
        before = at.running.registry.store.revision
        async with at.operator() as operator:
            for part in (report_of(1), Assignment(role=Role.HUB)):
                with pytest.raises(Refused, match=r"status: .* not a cluster's"):
                    await operator.update_status(Kind.PEER, own.meta.name, part, uid=own.meta.uid)
            with pytest.raises(Refused):
                await operator.update_status(Kind.MESH, "home", mesh.status, uid=mesh.meta.uid)
        assert at.running.registry.store.revision == before

    joined(body)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", MESHES),
        ("PUT", f"{MESHES}/home"),
        ("PUT", f"{MESHES}/home/status"),
        ("DELETE", f"{MESHES}/home"),
        ("POST", "/v1/leave"),
        ("POST", "/v1/heartbeat"),
        ("POST", "/v1/heartbeat?peer=home.external.p1"),
        ("POST", "/v1/courier/" + "A" * 43),
        ("GET", "/v1/tokens"),
        ("POST", "/v1/tokens"),
        ("DELETE", "/v1/tokens/tk-1"),
    ],
)
def test_an_operator_administers_nothing_and_is_no_peer(method: str, target: str) -> None:
    async def body(at: Joined) -> None:
        mesh = await at.running.registry.get(Kind.MESH, "home")
        payload = b"" if method == "GET" else json.dumps(resources.to_dict(mesh)).encode()
        before = at.running.registry.store.revision
        header = signed(at, WEST.credential(REGISTRY), method, target, body=payload)
        code, status, _ = await ask(at.running, method, target, body=payload, header=header)
        assert (code, status["reason"]) == (403, "Forbidden")
        assert at.running.registry.store.revision == before

    joined(body)


def test_an_operator_that_asks_too_often_is_told_to_wait_and_holds_up_no_other() -> None:
    async def body(at: Joined) -> None:
        async with at.operator() as operator, at.operator(EAST) as other:
            await operator.list(Kind.PEER)
            await operator.list(Kind.PEER)
            with pytest.raises(Unavailable, match="this cluster's operator asks too often"):
                await operator.list(Kind.PEER)
            await other.list(Kind.PEER)

    joined(body, limits=Limits(cluster=Rate(0.01, 2)))


# --- who is an operator -------------------------------------------------------------------------------------


def signed(
    at: Joined,
    credential: ClusterCredential | PeerCredential,
    method: str,
    target: str,
    *,
    body: bytes = b"",
    nonce: bytes = bytes(16),
) -> str:
    return authorization(
        credential, method=method, target=target, body=body, wall=at.running.clock(), nonce=nonce
    )


@pytest.mark.parametrize(
    ("credential", "sentence"),
    [
        (replace(WEST, seed=99).credential(REGISTRY), "does not hold"),
        (replace(WEST, uid="another").credential(REGISTRY), "has another kube-system UID"),
        (replace(WEST, name="nowhere").credential(REGISTRY), "no cluster 'nowhere' has joined mesh 'home'"),
        (replace(WEST, mesh="elsewhere").credential(REGISTRY), "has joined mesh 'elsewhere'"),
        (WEST.credential("another"), "another registry"),
        (replace(WEST, name="east").credential(REGISTRY), "has another kube-system UID"),
        (replace(WEST, name="east", uid=EAST.uid).credential(REGISTRY), "does not hold"),
    ],
)
def test_who_is_not_the_operator_is_refused(credential: ClusterCredential, sentence: str) -> None:
    async def body(at: Joined) -> None:
        async with HttpRegistry(at.running.url, pin=None, credential=credential) as client:
            with pytest.raises(Refused, match=sentence):
                await client.list(Kind.PEER)

    joined(body)


def test_an_operators_request_is_taken_once_in_time_and_as_it_was_signed() -> None:
    async def body(at: Joined) -> None:
        header = signed(at, WEST.credential(REGISTRY), "GET", PEERS)
        code, status, _ = await ask(at.running, "GET", MESHES, header=header)
        assert code == 401
        assert "another request" in status["message"]
        assert (await ask(at.running, "GET", PEERS, header=header))[0] == 200
        code, status, _ = await ask(at.running, "GET", PEERS, header=header)
        assert code == 401
        assert "made before" in status["message"]
        late = signed(at, WEST.credential(REGISTRY), "GET", PEERS, nonce=bytes([1]) * 16)
        at.running.clock.ahead = 61.0
        code, status, _ = await ask(at.running, "GET", PEERS, header=late)
        assert (code, status["reason"]) == (401, "ClockSkew")

    joined(body)


def test_a_cluster_is_never_taken_for_a_peer_of_its_name_nor_a_peer_for_a_cluster() -> None:
    async def body(at: Joined) -> None:
        numbers = iter([WEST.uid, "another"])
        at.running.registry.store._new_uid = lambda: next(numbers)
        # A peer with the cluster's own name and uid, and the peer's key.
        twin = await at.running.registry.create(Peer(Meta("west"), PeerSpec("home"), report_of(7)))
        assert twin.meta.uid == WEST.uid
        as_peer = PeerCredential("west", WEST.uid, REGISTRY, machine_seed(7))
        as_cluster = WEST.credential(REGISTRY)
        # The peer may say that it is alive, the cluster create peers: neither what is the other's.
        for credential, target, expected in (
            (as_peer, "/v1/heartbeat", 204),
            (as_cluster, "/v1/heartbeat", 403),
            (as_peer, PEERS, 403),
            (as_cluster, PEERS, 201),
        ):
            payload = json.dumps(resources.to_dict(WEST.peer())).encode() if target == PEERS else b""
            header = signed(at, credential, "POST", target, body=payload, nonce=os.urandom(16))
            code, _, _ = await ask(at.running, "POST", target, body=payload, header=header)
            assert code == expected
        # Each with the other's key, under its own type.
        for credential, signing in ((as_peer, WEST.signing), (as_cluster, machine_seed(7))):
            header = signed(at, replace(credential, signing=signing), "GET", PEERS)
            code, status, _ = await ask(at.running, "GET", PEERS, header=header)
            assert code == 401
            assert "does not hold" in status["message"]

    joined(body)


@pytest.mark.parametrize("kind", ["at+jwt", "", "SCOPE-CLUSTER+JWT", 7])
def test_a_token_of_an_unknown_type_is_refused(kind: object) -> None:
    async def body(at: Joined) -> None:
        header = {"alg": "EdDSA", "typ": kind}
        parts = [base64url(json.dumps(part).encode()) for part in (header, {"iss": "west", "mesh": "home"})]
        code, status, _ = await ask(at.running, "GET", PEERS, header=f"Bearer {'.'.join(parts)}.AAAA")
        assert code == 401
        assert status["reason"] == "Unauthorized"

    joined(body)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "?watch=1", 7, None, ["west"], "a" * 254])
@pytest.mark.parametrize("kind", [PEER_TYPE, CLUSTER_TYPE])
def test_what_is_no_name_is_not_asked_of_the_registry(name: object, kind: str) -> None:
    class Asked(MemoryRegistry):
        async def get(self, kind: Kind, name: str) -> Resource:
            raise AssertionError(name)

    async def run() -> None:
        registry = Asked.__new__(Asked)
        authority = Authority(
            registry,
            registry_id=REGISTRY,
            administrator=bytes(32),
            wall=lambda: 0.0,
            replays_per_peer=1,
            replays_per_cluster=1,
        )
        claims = {"iss": name, "mesh": name, "sub": "u"}
        parts = [base64url(json.dumps(part).encode()) for part in ({"alg": "EdDSA", "typ": kind}, claims)]
        claimed = Claimed(f"Bearer {'.'.join(parts)}.AAAA")
        with pytest.raises(Refusal) as refused:
            await authority.caller(claimed, method="GET", target=PEERS, body=b"")
        assert refused.value.code == 401

    asyncio.run(run())


def test_an_operators_claims_without_its_mesh_are_nobodys() -> None:
    async def body(at: Joined) -> None:
        now = at.running.clock()
        claims = {
            "iss": "west",
            "sub": WEST.uid,
            "aud": REGISTRY,
            "iat": now,
            "exp": now + 30,
            "jti": "x",
            "req": request_digest("GET", PEERS, b""),
        }
        key = Ed25519PrivateKey.from_private_bytes(WEST.signing.raw)
        token = jwt.encode(claims, key, algorithm="EdDSA", headers={"typ": CLUSTER_TYPE})
        code, _, _ = await ask(at.running, "GET", PEERS, header=f"Bearer {token}")
        assert code == 401

    joined(body)


# --- agents by the tokens of their Nodes --------------------------------------------------------------------


@pytest.mark.parametrize("curve", [None, *Curve])
def test_an_agent_is_the_peer_of_the_node_in_its_token(tmp_path: Path, curve: Curve | None) -> None:
    async def body(at: Joined) -> None:
        api = ApiServer(6, "key-6", curve)
        async with at.operator() as operator:
            await operator.replace_cluster_tokens("west", replace(WEST.tokens, keys=(api.public,)))
        own, other = await at.node(), await at.node("n2")
        async with at.agent(tmp_path, token=api.token()) as agent:
            listed = (await agent.list(Kind.PEER)).resources
            assert [peer.meta.name for peer in listed] == ["home.external.p1", own.meta.name, other.meta.name]
            report = report_of(1, endpoints=(Candidate(Endpoint.parse("192.0.2.1:7"), CandidateKind.STATIC),))
            stored = await agent.update_status(Kind.PEER, own.meta.name, report, uid=own.meta.uid)
            assert isinstance(stored, Peer)
            assert stored.report == report
            await agent.heartbeat(own.meta.name)
        assert set(at.running.registry.seconds_since_heartbeat()) == {own.meta.name}

    joined(body)


def test_an_agent_writes_the_status_of_its_own_node_alone(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own, other = await at.node(), await at.node("n2")
        foreign = await at.node("n1", EAST)
        external = await at.running.registry.get(Kind.PEER, "home.external.p1")
        before = at.running.registry.store.revision
        async with at.agent(tmp_path) as agent:
            for peer in (other, foreign, external):
                with pytest.raises(Refused, match="a peer writes its own status alone"):
                    await agent.update_status(Kind.PEER, peer.meta.name, report_of(1), uid=peer.meta.uid)
                with pytest.raises(Refused, match="for itself alone"):
                    await agent.heartbeat(peer.meta.name)
            with pytest.raises(Refused, match="fieldManager"):
                await agent.update_status(
                    Kind.PEER, own.meta.name, Assignment(role=Role.HUB), uid=own.meta.uid
                )
            with pytest.raises(Refused, match="administrator, not for peers"):
                await agent.update(replace(own, spec=replace(own.spec, role=Role.HUB)))
            with pytest.raises(Refused, match="administrator, not for peers"):
                await agent.delete(Kind.PEER, own.meta.name, uid=own.meta.uid)
        assert at.running.registry.store.revision == before

    joined(body)


def _node(**fields: object) -> dict[str, object]:
    return {"kubernetes.io": {"node": fields}}


REFUSED_TOKENS: list[Any] = [
    pytest.param({"kubernetes.io": None}, 403, "the token names no Node", id="no kubernetes claim"),
    pytest.param({"kubernetes.io": {"pod": {}}}, 403, "the token names no Node", id="bound to a pod alone"),
    pytest.param({"kubernetes.io": "n1"}, 403, "the token names no Node", id="a claim of another kind"),
    pytest.param(
        {"kubernetes.io": {"node": "n1"}}, 403, "the token names no Node", id="a Node that is a text"
    ),
    pytest.param(_node(name="n1"), 403, "the token names no Node", id="a Node without a UID"),
    pytest.param(_node(name="", uid=""), 403, "the token names no Node", id="an empty Node"),
    pytest.param(_node(name=["n1"], uid="u"), 403, "the token names no Node", id="a list of Nodes"),
    pytest.param(
        _node(name="n1", uid="another"),
        404,
        "is of an earlier Node 'n1' .*makes a new one",
        id="a Node made anew",
    ),
    pytest.param(
        _node(name="n9", uid="u"), 404, "Node 'n9' of cluster 'west' has no ScopePeer", id="no peer"
    ),
    pytest.param(
        {"sub": "system:serviceaccount:default:default"},
        403,
        "agents of cluster 'west' are",
        id="another account",
    ),
    pytest.param(
        {"sub": "system:serviceaccount:scope-system:scope-agent2"},
        403,
        "agents of cluster",
        id="a longer name",
    ),
    pytest.param({"sub": None}, 401, "does not hold", id="no account"),
    pytest.param(
        {"aud": ["https://kubernetes.default.svc"]},
        401,
        "not for the audience scope-gateway",
        id="another audience",
    ),
    pytest.param({"aud": None}, 401, "does not hold|audience", id="no audience"),
    pytest.param({"iss": "https://elsewhere"}, 401, f"not issued by '{ISSUER}'", id="another issuer"),
    pytest.param({"iss": None}, 401, "does not hold|issued", id="no issuer"),
    pytest.param({"exp": None}, 401, "does not hold", id="no end"),
    pytest.param({"exp": "never"}, 401, "does not hold", id="an end that is a text"),
    pytest.param({"exp": True}, 401, "does not hold", id="an end that is a truth"),
]


@pytest.mark.parametrize(("changes", "code", "sentence"), REFUSED_TOKENS)
def test_a_token_that_does_not_say_which_node_it_is_of_is_refused(
    changes: dict[str, Any], code: int, sentence: str
) -> None:
    async def body(at: Joined) -> None:
        await at.node()
        seen, _, message = await at.ask_with(WEST.api.token(**changes))
        assert seen == code
        assert re.search(sentence, message), message

    joined(body)


def test_a_token_lives_a_minute_longer_than_it_says_for_clocks_that_differ() -> None:
    async def body(at: Joined) -> None:
        await at.node()
        now = at.running.clock()
        for expired, code in ((50, 200), (70, 401)):
            token = WEST.api.token(exp=int(now) - expired, iat=int(now) - 4000, nbf=int(now) - 4000)
            seen, _, message = await at.ask_with(token)
            assert seen == code, message
        assert "expired 7" in message
        assert "clocks" in message
        for ahead, code in ((50, 200), (70, 401)):
            for token in (WEST.api.token(nbf=int(now) + ahead), WEST.api.token(iat=int(now) + ahead)):
                seen, _, message = await at.ask_with(token)
                assert seen == code, message
        assert "from the future" in message

    joined(body)


def test_a_token_without_a_signature_is_refused() -> None:
    async def body(at: Joined) -> None:
        await at.node()
        for algorithm in ("none", "None", "NONE"):
            header = {"alg": algorithm, "kid": WEST.api.kid, "typ": "JWT"}
            parts = [base64url(json.dumps(part).encode()) for part in (header, WEST.api.claims())]
            for signature in ("", "AAAA"):
                code, _, message = await at.ask_with(f"{parts[0]}.{parts[1]}.{signature}")
                assert code == 401
                assert "does not hold" in message or "not a JWT" in message

    joined(body)


@pytest.mark.parametrize("curve", [None, Curve.P256])
def test_a_public_key_is_no_shared_secret(curve: Curve | None) -> None:
    async def body(at: Joined) -> None:
        api = ApiServer(6, "key-6", curve)
        async with at.operator() as operator:
            await operator.replace_cluster_tokens("west", replace(WEST.tokens, keys=(api.public,)))
        await at.node()
        header = {"alg": "HS256", "kid": api.kid, "typ": "JWT"}
        parts = [base64url(json.dumps(part).encode()) for part in (header, api.claims())]
        message = ".".join(parts).encode()
        for secret in (api.pem, api.pem.strip(), base64.b64encode(api.pem)):
            forged = base64url(hmac.new(secret, message, hashlib.sha256).digest())
            code, _, sentence = await at.ask_with(f"{message.decode()}.{forged}")
            assert code == 401
            assert "does not hold" in sentence

    joined(body)


def test_a_key_is_used_with_its_own_algorithm_alone() -> None:
    async def body(at: Joined) -> None:
        api = ApiServer(6, "key-6", None)
        async with at.operator() as operator:
            await operator.replace_cluster_tokens("west", replace(WEST.tokens, keys=(api.public,)))
        await at.node()
        assert (await at.ask_with(api.token()))[0] == 200
        for algorithm in ("RS384", "RS512", "PS256"):
            token = jwt.encode(api.claims(), api.private, algorithm=algorithm, headers={"kid": api.kid})
            code, _, sentence = await at.ask_with(token)
            assert code == 401
            assert "does not hold" in sentence

    joined(body)


def test_issuers_are_alike_in_all_clusters_and_nobody_trusts_them() -> None:
    async def body(at: Joined) -> None:
        assert WEST.tokens.issuer == EAST.tokens.issuer
        assert WEST.api.kid == EAST.api.kid
        own, foreign = await at.node(), await at.node("n1", EAST)
        # The same Node name, issuer and key id: only the key tells whose token it is.
        for token, cluster, code in (
            (WEST.api.token(), "west", 200),
            (EAST.api.token(), "east", 200),
            (EAST.api.token(), "west", 401),
            (WEST.api.token(), "east", 401),
            (ApiServer(99).token(), "west", 401),
        ):
            seen, _, message = await at.ask_with(token, cluster=cluster)
            assert seen == code, message
        assert own.meta.name != foreign.meta.name

    joined(body)


@pytest.mark.parametrize(
    ("mesh", "cluster", "sentence"),
    [
        (None, "west", "no cluster 'west' has joined mesh ''"),
        ("home", None, "no cluster '' has joined mesh 'home'"),
        ("home", "nowhere", "no cluster 'nowhere' has joined"),
        ("other", "west", "has joined mesh 'other'"),
        ("home", "west/../east", "has joined mesh 'home'"),
        ("..", "west", "has joined mesh '..'"),
        ("", "west", "has joined mesh ''"),
    ],
)
def test_a_token_holds_for_the_cluster_that_is_named(
    mesh: str | None, cluster: str | None, sentence: str
) -> None:
    async def body(at: Joined) -> None:
        await at.node()
        await enrolled(at.running.registry, 2, mesh="other")
        code, _, message = await at.ask_with(WEST.api.token(), mesh=mesh, cluster=cluster)
        assert code == 401
        assert sentence in message

    joined(body)


def test_a_projected_token_without_its_cluster_and_other_credentials_with_one_are_refused() -> None:
    async def body(at: Joined) -> None:
        await at.node()
        assert (await at.ask_with(WEST.api.token(), mesh=None, cluster=None))[0] == 401
        assert (await at.ask_with("administrator-of-the-test"))[0] == 401
        header = signed(at, WEST.credential(REGISTRY), "GET", PEERS)
        assert (await at.ask_with(header.removeprefix("Bearer ")))[0] == 401

    joined(body)


def test_a_key_that_was_replaced_holds_no_longer_and_the_new_one_does() -> None:
    async def body(at: Joined) -> None:
        await at.node()
        rotated = ApiServer(7, "key-7")
        code, _, message = await at.ask_with(rotated.token())
        assert code == 401
        assert "a key that cluster 'west' has not registered" in message
        async with at.operator() as operator:
            both = replace(WEST.tokens, keys=(WEST.api.public, rotated.public))
            await operator.replace_cluster_tokens("west", both)
            assert [(await at.ask_with(api.token()))[0] for api in (WEST.api, rotated)] == [200, 200]
            await operator.replace_cluster_tokens("west", replace(both, keys=(rotated.public,)))
        assert [(await at.ask_with(api.token()))[0] for api in (WEST.api, rotated)] == [401, 200]

    joined(body)


def test_a_removed_nodes_agent_is_told_so(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        async with at.agent(tmp_path) as agent:
            await agent.update_status(Kind.PEER, own.meta.name, report_of(1), uid=own.meta.uid)
            stored = await at.running.registry.get(Kind.PEER, own.meta.name)
            assert isinstance(stored, Peer)
            await removed(at.running, stored)
            with pytest.raises(PeerRemoved):
                await agent.list(Kind.PEER)

    joined(body)


def test_guesses_at_tokens_are_limited() -> None:
    async def body(at: Joined) -> None:
        forged = ApiServer(99).token()
        codes = [(await at.ask_with(forged))[0] for _ in range(5)]
        assert codes[-1] == 429

    joined(body, limits=Limits(stranger=Rate(0.01, 5)))


# --- a machine that was imaged anew -------------------------------------------------------------------------


def test_a_node_that_was_imaged_anew_has_new_keys_and_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        external = at.running.as_peer(await _external(at))
        async with at.agent(tmp_path) as agent, external as other:
            await agent.update_status(Kind.PEER, own.meta.name, report_of(1), uid=own.meta.uid)
            since = (await other.list(Kind.PEER)).revision
            facts = other.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: at.running.feed.counts()[0] == 1)
            with caplog.at_level(logging.INFO):
                renewed = await agent.update_status(Kind.PEER, own.meta.name, report_of(2), uid=own.meta.uid)
            assert isinstance(renewed, Peer)
            assert renewed.report == report_of(2)
            heard = await waiting
            assert isinstance(heard, Put)
            assert heard.resource == renewed
        assert renewed.meta.uid == own.meta.uid
        before, now = machine_keys(1).wireguard, machine_keys(2).wireguard
        assert f"peer.keys_replaced name={own.meta.name} node=n1 before={before} now={now}" in caplog.text

    joined(body)


async def _external(at: Joined) -> Peer:
    peer = await at.running.registry.get(Kind.PEER, "home.external.p1")
    assert isinstance(peer, Peer)
    return peer


def test_a_first_report_is_no_news_of_new_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        async with at.agent(tmp_path) as agent:
            await agent.update_status(Kind.PEER, own.meta.name, report_of(1), uid=own.meta.uid)
        assert "keys_replaced" not in caplog.text

    with caplog.at_level(logging.INFO):
        joined(body)


def test_keys_change_by_the_token_of_the_node_alone(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        async with at.agent(tmp_path) as agent:
            await agent.update_status(Kind.PEER, own.meta.name, report_of(1), uid=own.meta.uid)
        by_key = PeerCredential(own.meta.name, own.meta.uid, REGISTRY, machine_seed(1))
        async with HttpRegistry(at.running.url, pin=None, credential=by_key) as client:
            with pytest.raises(Refused, match="keys are bound"):
                await client.update_status(Kind.PEER, own.meta.name, report_of(2), uid=own.meta.uid)
        external = await _external(at)
        async with at.running.as_peer(external) as client:
            with pytest.raises(Refused, match="keys are bound"):
                await client.update_status(Kind.PEER, external.meta.name, report_of(2), uid=external.meta.uid)

    joined(body)


def test_an_earlier_key_signs_nothing_any_more(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        by_key = PeerCredential(own.meta.name, own.meta.uid, REGISTRY, machine_seed(1))
        async with (
            at.agent(tmp_path) as agent,
            HttpRegistry(at.running.url, pin=None, credential=by_key) as earlier,
        ):
            await agent.update_status(Kind.PEER, own.meta.name, report_of(1), uid=own.meta.uid)
            await earlier.list(Kind.PEER)
            await agent.update_status(Kind.PEER, own.meta.name, report_of(2), uid=own.meta.uid)
            with pytest.raises(Refused, match="does not hold"):
                await earlier.list(Kind.PEER)

    joined(body)


def test_keys_of_another_peer_and_unsound_ones_are_refused(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own, other = await at.node(), await at.node("n2")
        async with at.agent(tmp_path) as agent:
            await at.running.registry.update_status(
                Kind.PEER, other.meta.name, report_of(2), uid=other.meta.uid
            )
            keys = machine_keys(1)
            for wrong, sentence in (
                (machine_keys(2), "belongs to ScopePeer 'home.west.n2'"),
                (replace(keys, probe=machine_keys(2).probe), "belongs to ScopePeer 'home.west.n2'"),
                (replace(keys, wireguard=PublicKey(bytes(32))), "low order"),
                (replace(keys, wireguard=PublicKey(b"\xff" * 32)), "not in canonical form"),
                (replace(keys, signing=PublicKey((1).to_bytes(32, "little"))), "low order"),
                (replace(keys, probe=keys.wireguard), "must be three"),
            ):
                with pytest.raises(Refused, match=f"{sentence}.*delete the agent's state directory"):
                    await agent.update_status(Kind.PEER, own.meta.name, PeerReport(wrong), uid=own.meta.uid)
        assert await at.running.registry.get(Kind.PEER, own.meta.name) == own

    joined(body)


def test_the_courier_finds_a_node_by_the_key_that_it_has_now(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        async with at.agent(tmp_path) as agent, at.running.as_peer(await _external(at)) as other:
            facts = agent.watch(Kind.PEER, (await agent.list(Kind.PEER)).revision)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: at.running.feed.counts()[0] == 1)
            with pytest.raises(NotFound):
                await other.courier(machine_keys(1).probe, b"sealed")
            for number in (1, 2):
                report = report_of(number)
                stored = await agent.update_status(Kind.PEER, own.meta.name, report, uid=own.meta.uid)
                await until(partial(_has, at, stored))
                await other.courier(machine_keys(number).probe, b"sealed")
                assert (await anext(agent.couriered())).datagram == b"sealed"
            with pytest.raises(NotFound):
                await other.courier(machine_keys(1).probe, b"sealed")
            waiting.cancel()

    joined(body)


def _has(at: Joined, peer: Resource) -> bool:
    return at.running.feed.peers.get(peer.meta.name) == peer


def test_a_deleted_nodes_stream_ends(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        own = await at.node()
        async with at.agent(tmp_path) as agent, at.operator() as operator:
            facts = agent.watch(Kind.PEER, (await agent.list(Kind.PEER)).revision)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: at.running.feed.counts()[0] == 1)
            await operator.delete(Kind.PEER, own.meta.name, uid=own.meta.uid)
            gone = await waiting
            assert isinstance(gone, Deleted)
            with pytest.raises(PeerRemoved):
                await anext(facts)
            with pytest.raises(NotFound, match="has no ScopePeer"):
                await agent.list(Kind.PEER)

    joined(body)


# --- the file of a token ------------------------------------------------------------------------------------


def test_a_token_is_read_from_its_file_for_each_request(tmp_path: Path) -> None:
    async def body(at: Joined) -> None:
        await at.node()
        async with at.agent(tmp_path, token=WEST.api.token(exp=1)) as agent:
            with pytest.raises(Refused, match="expired"):
                await agent.list(Kind.PEER)
            (tmp_path / "token").write_text(WEST.api.token() + "\n")
            await agent.list(Kind.PEER)

    joined(body)


@pytest.mark.parametrize("content", [None, b"", b"\n", b"x" * 9000, b"\xff\xfe"])
def test_without_a_token_an_agent_waits_and_says_where_it_looked(
    tmp_path: Path, content: bytes | None
) -> None:
    async def body(at: Joined) -> None:
        file = tmp_path / "token"
        if content is not None:
            file.write_bytes(content)
        credential = ProjectedToken("home", "west", str(file))
        async with HttpRegistry(at.running.url, pin=None, credential=credential) as client:
            with pytest.raises(Unavailable, match=str(file)):
                await client.list(Kind.PEER)

    joined(body)


def test_an_account_of_another_name_may_be_registered() -> None:
    async def body(at: Joined) -> None:
        await at.node()
        async with at.operator() as operator:
            account = replace(ACCOUNT, name="agents")
            await operator.replace_cluster_tokens("west", replace(WEST.tokens, service_account=account))
        assert (await at.ask_with(WEST.api.token()))[0] == 403
        subject = "system:serviceaccount:scope-system:agents"
        assert (await at.ask_with(WEST.api.token(sub=subject)))[0] == 200

    joined(body)
