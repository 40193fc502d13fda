"""The Registry port on a real API server: the conformance suite, and what is Kubernetes' own."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kubelab import APPLY, MERGE, ControlPlane

from scope.model import (
    Assignment,
    Family,
    Kind,
    Link,
    Mesh,
    MeshStatus,
    Meta,
    PathKind,
    Peer,
    PeerSpec,
    Revision,
    Role,
    StatusPart,
)
from scope.registry.follow import follow
from scope.registry.kube import client as kube_client
from scope.registry.kube import objects
from scope.registry.kube import registry as kube_registry
from scope.registry.kube.access import ServiceAccount, from_kubeconfig
from scope.registry.kube.client import KubeClient
from scope.registry.kube.leases import Leases
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import (
    Conflict,
    Deleted,
    Disconnected,
    Fact,
    Gone,
    Listed,
    Put,
    Refused,
    Registry,
    Unavailable,
)
from tests.unit.registry_conformance import (
    MESH,
    TOKEN,
    RegistryConformance,
    bare,
    created,
    peer,
    report,
    resource_of,
    watched,
)

NAMESPACE = "default"
PEERS = "/apis/scope.ltgc.cc/v1alpha1/scopepeers"
MESHES = "/apis/scope.ltgc.cc/v1alpha1/scopemeshes"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"


@asynccontextmanager
async def opened(
    plane: ControlPlane, *, silence: float = 90.0, **options: Any
) -> AsyncIterator[KubeRegistry]:
    """The registry of a control plane, as its administrator."""
    async with KubeClient(await from_kubeconfig(plane.kubeconfig()), silence=silence) as client:
        yield KubeRegistry(client, namespace=NAMESPACE, **options)


def on(plane: ControlPlane, body: Callable[[KubeRegistry], Awaitable[None]], **options: Any) -> None:
    """Run `body` on the registry, within a time that only a lost wake-up exceeds."""

    async def run() -> None:
        async with asyncio.timeout(120), opened(plane, **options) as registry:
            await body(registry)

    asyncio.run(run())


def node_peer(node: str, *, mesh: str = "home", cluster: str = "here") -> Peer:
    """The peer of a Node, as the operator makes it."""
    spec = PeerSpec(mesh=mesh, cluster=cluster, node_name=node, node_uid=f"uid-{node}")
    return Peer(Meta(f"{mesh}.{cluster}.{node}"), spec)


class TestKubeRegistry(RegistryConformance):
    @pytest.fixture(autouse=True)
    def _plane(self, control_plane: ControlPlane) -> None:
        self.plane = control_plane

    @asynccontextmanager
    async def opened(self, *, backlog: int) -> AsyncIterator[Registry]:
        async with opened(self.plane) as registry:
            yield registry

    def forgotten(self, listed: Listed) -> Revision:
        """An API server keeps far more than a suite can write, but nothing from before its own start."""
        return Revision(listed.revision.registry, 1)


# --- reading ------------------------------------------------------------------------------------------------


def test_the_registry_is_known_by_the_uid_of_kube_system(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        namespace = await control_plane.request("GET", "/api/v1/namespaces/kube-system")
        assert (await registry.list(Kind.MESH)).revision.registry == namespace["metadata"]["uid"]

    on(control_plane, body)


def test_a_configured_id_needs_no_right_to_a_namespace(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        mark = control_plane.audit.mark()
        assert (await registry.list(Kind.MESH)).revision.registry == "ours"
        assert "namespaces" not in {asked.resource for asked in control_plane.audit.since(mark)}

    on(control_plane, body, registry_id="ours")


def test_a_list_of_many_pages_is_of_one_revision(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_registry, "PAGE", 2)

    async def body(registry: KubeRegistry) -> None:
        made = [await created(registry, bare(seed)) for seed in range(1, 6)]
        mark = control_plane.audit.mark()
        listed = await registry.list(Kind.PEER)
        assert listed.complete
        assert set(listed.resources) == set(made)
        assert listed.revision.number >= made[-1].meta.revision
        pages = [asked for asked in control_plane.audit.since(mark) if asked.resource == "scopepeers"]
        assert len(pages) == 3

    on(control_plane, body)


def test_what_is_known_as_it_stands_is_not_read_anew_and_what_changed_is(control_plane: ControlPlane) -> None:
    known: dict[str, Peer] = {}
    asked: list[int] = []

    def known_at(name: str, revision: int) -> Peer | None:
        asked.append(revision)
        return known.get(name)

    async def body(registry: KubeRegistry) -> None:
        for seed in range(1, 4):
            peer = await created(registry, bare(seed))
            assert isinstance(peer, Peer)
            known[peer.meta.name] = peer
        same, other, changed = known.values()
        known[other.meta.name] = replace(other, meta=replace(other.meta, uid="another's"))
        spec = replace(changed.spec, role=Role.HUB)
        await registry.update(replace(changed, spec=spec))
        listed = await registry.list(Kind.PEER)
        assert set(asked) == {listed.revision.number}
        found = {each.meta.name: each for each in listed.resources}
        assert found[same.meta.name] is same
        assert found[other.meta.name] == other
        assert found[changed.meta.name].spec == spec

    on(control_plane, body, known=known_at)


def test_a_page_that_is_lost_loses_the_list(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_registry, "PAGE", 2)
    asked: list[str] = []

    async def body(registry: KubeRegistry) -> None:
        for seed in range(1, 6):
            await created(registry, bare(seed))
        client = registry._client
        whole = client.ask

        async def ask(method: str, path: str, **options: Any) -> Any:
            if "continue" in (options.get("query") or {}):
                asked.append(path)
                raise Unavailable("the second page is lost")
            return await whole(method, path, **options)

        monkeypatch.setattr(client, "ask", ask)
        with pytest.raises(Unavailable, match="second page"):
            await registry.list(Kind.PEER)
        assert asked == [PEERS]

    on(control_plane, body)


def test_what_cannot_be_read_makes_a_list_incomplete_and_hides_nothing_else(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = objects.read

    def read_old(kind: Kind, document: Any) -> Any:
        """As a version that knows less than the registry holds."""
        if document["metadata"]["name"] == bare(1).meta.name:
            document = {**document, "spec": {**document["spec"], "role": "Oracle"}}
        return read(kind, document)

    async def body(registry: KubeRegistry) -> None:
        before = await registry.list(Kind.PEER)
        await created(registry, bare(1))
        known = await created(registry, bare(2))
        monkeypatch.setattr(kube_registry, "read", read_old)
        listed = await registry.list(Kind.PEER)
        assert (listed.complete, listed.resources) == (False, (known,))
        (fact,) = await watched(registry, before.revision, count=1)
        assert resource_of(fact) == known

    with caplog.at_level(logging.WARNING):
        on(control_plane, body)
    assert "spec.role" in caplog.text


def test_lists_and_watches_of_one_mesh_hold_that_mesh_and_its_peers(control_plane: ControlPlane) -> None:
    other = replace(MESH, meta=Meta("other"))

    async def body(registry: KubeRegistry) -> None:
        async with opened(control_plane, mesh="home") as scoped:
            meshes, peers = await scoped.list(Kind.MESH), await scoped.list(Kind.PEER)
            await created(registry, other)
            home = await created(registry, MESH)
            await created(registry, Peer(Meta("other.external.p1"), PeerSpec("other")))
            ours = await created(registry, bare(1))
            assert (await scoped.list(Kind.MESH)).resources == (home,)
            assert (await scoped.list(Kind.PEER)).resources == (ours,)
            (fact,) = await watched(scoped, meshes.revision, count=1, kind=Kind.MESH)
            assert resource_of(fact) == home
            (fact,) = await watched(scoped, peers.revision, count=1)
            assert resource_of(fact) == ours

    on(control_plane, body)


def test_lists_of_one_node_hold_its_peers_in_every_mesh(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        ours = [await created(registry, node_peer("n1", mesh=mesh)) for mesh in ("home", "other")]
        await created(registry, node_peer("n2"))
        await created(registry, bare(1))
        async with opened(control_plane, node="n1") as scoped:
            assert set((await scoped.list(Kind.PEER)).resources) == set(ours)

    on(control_plane, body)


def test_an_agent_is_told_of_others_what_it_acts_on_and_of_itself_everything(
    control_plane: ControlPlane,
) -> None:
    async def body(registry: KubeRegistry) -> None:
        await created(registry, MESH)
        own, other = [await created(registry, peer(seed)) for seed in (1, 2)]
        link = Link(own.meta.name, PathKind.DIRECT, latency=0.01)
        talkative = replace(report(2, port=9), links=(link,), direct=1)
        await registry.update_status(Kind.PEER, other.meta.name, talkative, uid=other.meta.uid)
        async with opened(control_plane, mesh="home", own=own.meta.name) as scoped:
            listed = await scoped.list(Kind.PEER)
            told = {member.meta.name: member for member in listed.resources}
            assert told[own.meta.name] == own
            theirs = told[other.meta.name]
            assert isinstance(theirs, Peer)
            assert theirs.report == report(2, port=9)
            slower = replace(talkative, links=(replace(link, latency=0.02),))
            await registry.update_status(Kind.PEER, other.meta.name, slower, uid=other.meta.uid)
            about_us = replace(report(1, port=9), links=(replace(link, peer=other.meta.name),))
            await registry.update_status(Kind.PEER, own.meta.name, about_us, uid=own.meta.uid)
            moved = replace(slower, endpoints=report(2, port=10).endpoints)
            await registry.update_status(Kind.PEER, other.meta.name, moved, uid=other.meta.uid)
            facts = [resource_of(fact) for fact in await watched(scoped, listed.revision, count=2)]
            assert [(fact.meta.name, fact.report) for fact in facts if isinstance(fact, Peer)] == [
                (own.meta.name, about_us),
                (other.meta.name, report(2, port=10)),
            ]

    on(control_plane, body)


# --- watching -----------------------------------------------------------------------------------------------


def watches(plane: ControlPlane, mark: int) -> int:
    """How many watches of ScopePeers were opened since."""
    return sum(
        asked.verb == "watch" and asked.resource == "scopepeers" and asked.stage == "ResponseStarted"
        for asked in plane.audit.since(mark)
    )


def test_a_watch_goes_on_when_the_server_ends_it_in_time(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_client, "WATCH_SECONDS", (2, 2))
    monkeypatch.setattr(kube_registry, "CUT_SECONDS", 1.5)

    async def body(registry: KubeRegistry) -> None:
        listed = await registry.list(Kind.PEER)
        mark = control_plane.audit.mark()
        changes = registry.watch(Kind.PEER, listed.revision)
        waiting = asyncio.ensure_future(anext(changes))
        while watches(control_plane, mark) < 3:  # noqa: ASYNC110 - the log has no event
            await asyncio.sleep(0.05)
        made = await created(registry, bare(1))
        assert resource_of(await waiting) == made
        verbs = [asked.verb for asked in control_plane.audit.since(mark) if asked.resource == "scopepeers"]
        assert "list" not in verbs

    on(control_plane, body)


def test_a_silent_watch_is_opened_anew_without_a_list_of_everything(control_plane: ControlPlane) -> None:
    async def run() -> None:
        async with asyncio.timeout(120), opened(control_plane, silence=0.3) as registry:
            listed = await registry.list(Kind.PEER)
            mark = control_plane.audit.mark()
            waiting = asyncio.ensure_future(anext(registry.watch(Kind.PEER, listed.revision)))
            while watches(control_plane, mark) < 3:  # noqa: ASYNC110 - the log has no event
                await asyncio.sleep(0.05)
            made = await created(registry, bare(1))
            assert resource_of(await waiting) == made
            lists = [asked.path for asked in control_plane.audit.since(mark) if asked.verb == "list"]
            assert all("limit=1&" in f"{path}&" for path in lists)

    asyncio.run(run())


def test_a_watch_ends_as_lost_when_our_own_network_has_changed(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        listed = await registry.list(Kind.PEER)
        changes = registry.watch(Kind.PEER, listed.revision)
        first = asyncio.ensure_future(anext(changes))
        made = await created(registry, bare(1))
        assert resource_of(await first) == made  # it is open, and read
        second = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        await registry.reconnect()
        with pytest.raises(Unavailable):
            await second
        assert (await registry.list(Kind.PEER)).resources == (made,)

    on(control_plane, body)


def test_a_frozen_server_is_lost_and_found_again(own_control_plane: Callable[..., ControlPlane]) -> None:
    plane = own_control_plane()
    facts: list[Fact] = []

    async def run() -> None:
        async with asyncio.timeout(120):
            async with opened(plane, silence=0.5) as registry, opened(plane) as writer:
                arrived = asyncio.Event()

                async def keep() -> None:
                    async for fact in follow(
                        registry, Kind.PEER, sleep=asyncio.sleep, uniform=lambda low, _: low
                    ):
                        facts.append(fact)
                        arrived.set()

                async def until(done: Callable[[], bool]) -> None:
                    while not done():
                        arrived.clear()
                        await arrived.wait()

                keeping = asyncio.ensure_future(keep())
                await until(lambda: bool(facts))
                plane.api_server.kill()
                await until(lambda: isinstance(facts[-1], Disconnected))
                await plane.start()
                await until(lambda: isinstance(facts[-1], Listed))
                made = await created(writer, bare(1))
                await until(lambda: isinstance(facts[-1], Put))
                assert isinstance(facts[-1], Put)
                assert facts[-1].resource == made
                keeping.cancel()

    asyncio.run(run())


def test_a_registry_that_was_restored_is_told_by_its_revision(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = own_control_plane()

    async def run() -> None:
        async with asyncio.timeout(120), opened(plane, silence=0.5) as registry:
            await created(registry, MESH)
            snapshot = await plane.snapshot()
            for seed in range(1, 10):
                await created(registry, bare(seed))
            newest = (await registry.list(Kind.PEER)).revision
            await plane.restore(snapshot)
            with pytest.raises((Gone, Unavailable)):
                await anext(registry.watch(Kind.PEER, newest))
            again = await registry.list(Kind.PEER)
            assert again.revision.registry == newest.registry
            assert again.revision.number < newest.number
            assert (again.resources, again.complete) == ((), True)

    asyncio.run(run())


def test_a_watch_from_what_a_restored_server_has_yet_to_reach_is_told_to_list_again(
    control_plane: ControlPlane,
) -> None:
    async def run() -> None:
        async with asyncio.timeout(120), opened(control_plane, silence=0.3) as registry:
            listed = await registry.list(Kind.PEER)
            ahead = Revision(listed.revision.registry, listed.revision.number + 1000)
            registry._seen[Kind.PEER] = ahead.number  # as if it had been told so before the restore
            with pytest.raises(Gone, match="newer than the newest"):
                await anext(registry.watch(Kind.PEER, ahead))

    asyncio.run(run())


# --- writing ------------------------------------------------------------------------------------------------


def test_a_peer_belongs_to_its_mesh(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        mesh = await created(registry, MESH)
        await created(registry, bare(1))
        stored = await control_plane.request("GET", f"{PEERS}/{bare(1).meta.name}")
        (owner,) = stored["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("ScopeMesh", "home", mesh.meta.uid)

    on(control_plane, body)


def test_a_new_spec_leaves_labels_and_owners_alone(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        await created(registry, MESH)
        member = await created(registry, bare(1))
        path = f"{PEERS}/{member.meta.name}"
        label = {"metadata": {"labels": {"team": "a"}}}
        await control_plane.request("PATCH", path, label, content_type=MERGE)
        await registry.update(replace(member, spec=replace(member.spec, role=Role.HUB)))
        metadata = (await control_plane.request("GET", path))["metadata"]
        assert metadata["labels"] == {"team": "a"}
        assert len(metadata["ownerReferences"]) == 1

    on(control_plane, body)


def test_each_writer_owns_its_part_and_takes_back_what_it_no_longer_says(
    control_plane: ControlPlane,
) -> None:
    async def body(registry: KubeRegistry) -> None:
        await created(registry, MESH)
        member = await created(registry, peer(1))
        name, uid = member.meta.name, member.meta.uid
        await registry.update_status(Kind.PEER, name, Assignment(role=Role.HUB), uid=uid)
        await registry.update_status(Kind.PEER, name, report(1, port=9), uid=uid)
        stored = await control_plane.request("GET", f"{PEERS}/{name}")
        owned = {
            entry["manager"]: set(entry["fieldsV1"]["f:status"])
            for entry in stored["metadata"]["managedFields"]
            if entry.get("subresource") == "status"
        }
        assert owned.keys() == {"scope-agent", "scope-operator"}
        assert not owned["scope-agent"] & owned["scope-operator"]
        assert stored["status"]["endpoints"]
        await registry.update_status(Kind.PEER, name, replace(report(1, port=9), endpoints=()), uid=uid)
        stored = await control_plane.request("GET", f"{PEERS}/{name}")
        assert "endpoints" not in stored["status"]
        assert stored["status"]["role"] == "Hub"

    on(control_plane, body)


@pytest.mark.parametrize("named", [True, False], ids=["from its revision", "from any revision"])
def test_an_equal_status_writes_nothing(control_plane: ControlPlane, *, named: bool) -> None:
    async def body(registry: KubeRegistry) -> None:
        mesh = await created(registry, MESH)
        part: StatusPart = MeshStatus(observed_generation=1)
        first = await registry.update_status(Kind.MESH, "home", part, uid=mesh.meta.uid)
        again = await registry.update_status(
            Kind.MESH, "home", part, uid=mesh.meta.uid, if_revision=first.meta.revision if named else None
        )
        assert again == first
        assert (await registry.get(Kind.MESH, "home")).meta.revision == first.meta.revision

    on(control_plane, body)


def test_writers_who_name_no_revision_do_not_hinder_each_other(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        await created(registry, MESH)
        member = await created(registry, peer(1))
        name, uid = member.meta.name, member.meta.uid
        await asyncio.gather(
            registry.update_status(Kind.PEER, name, report(1, port=9), uid=uid),
            registry.update_status(Kind.PEER, name, Assignment(role=Role.HUB), uid=uid),
            registry.update(replace(member, spec=replace(member.spec, role=Role.HUB))),
        )
        stored = await registry.get(Kind.PEER, name)
        assert isinstance(stored, Peer)
        assert (stored.report, stored.assignment.role, stored.spec.role) == (
            report(1, port=9),
            Role.HUB,
            Role.HUB,
        )

    on(control_plane, body)


def test_a_refusal_is_the_sentence_of_the_definition(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        mesh = await created(registry, MESH)
        half = Peer(Meta("half"), PeerSpec("home", cluster="here"))
        with pytest.raises(Refused, match="set them all, or none for an external peer"):
            await registry.create(half)
        assert mesh == await registry.get(Kind.MESH, "home")

    on(control_plane, body)


POLICY = """
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: no-hubs}
spec:
  matchConstraints:
    resourceRules:
      - {apiGroups: [scope.ltgc.cc], apiVersions: ["*"], operations: [CREATE], resources: [scopepeers]}
  validations:
    - expression: "!has(object.spec.role) || object.spec.role != 'Hub'"
      message: "this cluster has no hubs: leave the role to the operator"
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: no-hubs}
spec: {policyName: no-hubs, validationActions: [Deny]}
"""


def test_a_refusal_is_the_sentence_of_an_admission_policy(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    plane = own_control_plane()

    async def body(registry: KubeRegistry) -> None:
        await plane.apply(POLICY)
        hub = replace(bare(1), spec=replace(bare(1).spec, role=Role.HUB))
        while True:  # a policy takes a while to become active
            try:
                stored = await created(registry, hub)
            except Refused as error:
                assert str(error) == "this cluster has no hubs: leave the role to the operator"  # noqa: PT017
                return
            await registry.delete(Kind.PEER, stored.meta.name, uid=stored.meta.uid)
            await asyncio.sleep(0.1)

    on(plane, body)


# --- join tokens --------------------------------------------------------------------------------------------


def test_a_join_token_is_a_secret_that_a_person_can_read_and_write(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        used = replace(TOKEN, spec=replace(TOKEN.spec, single_use=True, used_by=("a" * 64, "b" * 64)))
        await created(registry, used)
        path = f"/api/v1/namespaces/{NAMESPACE}/secrets"
        secret = await control_plane.request("GET", f"{path}/scope-token-tk-1")
        assert secret["type"] == "scope.ltgc.cc/join-token"
        texts = {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}
        assert texts == {
            "mesh": "home",
            "role": "Auto",
            "secretHash": base64.b64encode(bytes(32)).decode(),
            "expires": "2033-05-18T03:33:20Z",
            "singleUse": "true",
            "usedBy": "a" * 64 + "\n" + "b" * 64,
        }
        by_hand = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "scope-token-mine"},
            "type": "scope.ltgc.cc/join-token",
            "stringData": {
                "mesh": "home",
                "secretHash": base64.b64encode(bytes(32)).decode() + "\n",
                "expires": "2033-05-18T03:33:20Z",
            },
        }
        await control_plane.request("POST", path, by_hand)
        foreign = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "scope-token-not"}}
        await control_plane.request("POST", path, foreign)
        listed = await registry.list(Kind.TOKEN)
        assert listed.complete
        assert {token.meta.name: token.spec for token in listed.resources} == {
            "tk-1": used.spec,
            "mine": TOKEN.spec,
        }

    on(control_plane, body)


def test_a_token_is_used_once_whoever_else_tries(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        token = await created(registry, TOKEN)
        uses = [replace(token, spec=replace(token.spec, used_by=(f"m{number}",))) for number in range(8)]
        answers = await asyncio.gather(
            *(registry.update(use, if_revision=token.meta.revision) for use in uses), return_exceptions=True
        )
        assert sum(isinstance(answer, Conflict) for answer in answers) == 7

    on(control_plane, body)


# --- heartbeats ---------------------------------------------------------------------------------------------


def test_the_heartbeat_of_a_nodes_peers_is_one_lease_that_they_own(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        peers = [await created(registry, node_peer("n1", mesh=mesh)) for mesh in ("home", "other")]
        mark = control_plane.audit.mark()
        for _ in range(3):
            for member in peers:
                await registry.heartbeat(member.meta.name)
        lease = await control_plane.request("GET", f"{LEASES}/agent.n1")
        assert lease["spec"]["leaseDurationSeconds"] == 180
        assert {owner["uid"] for owner in lease["metadata"]["ownerReferences"]} == {
            member.meta.uid for member in peers
        }
        writes = [asked for asked in control_plane.audit.since(mark) if asked.is_write]
        assert [(asked.resource, asked.name) for asked in writes] == [("leases", "agent.n1")] * 2

    on(control_plane, body)


def test_a_peer_without_a_node_has_a_lease_of_its_own(control_plane: ControlPlane) -> None:
    async def body(registry: KubeRegistry) -> None:
        member = await created(registry, bare(1))
        await registry.heartbeat(member.meta.name)
        name = f"peer.{member.meta.name}"
        lease = await control_plane.request("GET", f"{LEASES}/{name}")
        assert [owner["uid"] for owner in lease["metadata"]["ownerReferences"]] == [member.meta.uid]
        await await_lease(registry.leases, (name, member.meta.name))
        assert registry.leases.beats().keys() == {(name, member.meta.name)}

    on(control_plane, body)


def test_a_peer_that_was_made_anew_owns_the_lease_from_its_next_heartbeat(
    control_plane: ControlPlane,
) -> None:
    async def body(registry: KubeRegistry) -> None:
        first = await created(registry, node_peer("n1"))
        await registry.heartbeat(first.meta.name)
        listed = await registry.list(Kind.PEER)
        async with aclosing(registry.watch(Kind.PEER, listed.revision)) as changes:  # type: ignore[type-var]
            await registry.delete(Kind.PEER, first.meta.name, uid=first.meta.uid)
            assert isinstance(await anext(changes), Deleted)
            second = await created(registry, node_peer("n1"))
            await anext(changes)
        await registry.heartbeat(second.meta.name)
        lease = await control_plane.request("GET", f"{LEASES}/agent.n1")
        assert [owner["uid"] for owner in lease["metadata"]["ownerReferences"]] == [second.meta.uid]

    on(control_plane, body)


def test_ages_are_by_the_listeners_clock(control_plane: ControlPlane) -> None:
    clock = 1000.0

    async def run() -> None:
        nonlocal clock
        async with (
            asyncio.timeout(120),
            KubeClient(await from_kubeconfig(control_plane.kubeconfig())) as client,
        ):
            # An agent whose clock is an hour ahead, and one that is an hour behind.
            ahead = Leases(client, NAMESPACE, now=lambda: clock, wall=lambda: 1_700_003_600.0 + clock)
            behind = Leases(client, NAMESPACE, now=lambda: clock, wall=lambda: 1_699_996_400.0 + clock)
            listener = Leases(client, NAMESPACE, now=lambda: clock, wall=lambda: 1_700_000_000.0 + clock)
            uid = "7bd5ef31-9c5c-4f12-a3cf-53b58c1fb9b7"
            first, second = ("agent.n1", "home.here.n1"), ("agent.n2", "home.here.n2")
            await ahead.renew("agent.n1", peer="home.here.n1", uid=uid)
            await behind.renew("agent.n2", peer="home.here.n2", uid=uid)
            await await_lease(listener, second)
            assert listener.beats() == {first: 0.0, second: 3600.0}
            clock += 60.0
            await behind.renew("agent.n2", peer="home.here.n2", uid=uid)
            while listener.beats()[second] > 3600.0 - 1.0:
                await listener.hear()
            assert listener.beats() == {first: 60.0, second: 0.0}

    asyncio.run(run())


async def await_lease(leases: Leases, beat: tuple[str, str]) -> None:
    """Listen until the API server's cache holds a Lease that names a ScopePeer."""
    while beat not in leases.beats():
        await leases.hear()
        await asyncio.sleep(0.01)


# --- who asks -----------------------------------------------------------------------------------------------


def test_a_token_is_read_again_for_every_request(control_plane: ControlPlane, tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(120):
            (tmp_path / "ca.crt").write_bytes(control_plane.authority.certificate.read_bytes())
            (tmp_path / "token").write_text("expired")
            async with KubeClient(ServiceAccount(control_plane.url, tmp_path)) as client:
                registry = KubeRegistry(client, namespace=NAMESPACE)
                with pytest.raises(Unavailable, match="does not take our token"):
                    await registry.list(Kind.MESH)
                (tmp_path / "token").write_text(await control_plane.admin_token() + "\n")
                assert (await registry.list(Kind.MESH)).complete

    asyncio.run(run())


def test_a_right_that_is_missing_is_named(control_plane: ControlPlane, tmp_path: Path) -> None:
    async def run() -> None:
        async with asyncio.timeout(120):
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody"}}
            path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/nobody?fieldManager=test"
            await control_plane.request("PATCH", path, account, content_type=APPLY)
            (tmp_path / "ca.crt").write_bytes(control_plane.authority.certificate.read_bytes())
            (tmp_path / "token").write_text(await control_plane.token("nobody", namespace=NAMESPACE))
            async with KubeClient(ServiceAccount(control_plane.url, tmp_path)) as client:
                registry = KubeRegistry(client, namespace=NAMESPACE, registry_id="ours")
                with pytest.raises(Refused, match='cannot list resource "scopemeshes"'):
                    await registry.list(Kind.MESH)

    asyncio.run(run())


def test_a_mesh_of_the_api_server_is_the_mesh_that_was_asked_for(control_plane: ControlPlane) -> None:
    """The definition's defaults are the model's."""

    async def body(registry: KubeRegistry) -> None:
        document = {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopeMesh",
            "metadata": {"name": "home"},
            "spec": {"addressing": {"ipv4": "100.64.0.0/16"}},
        }
        await control_plane.request("POST", MESHES, document)
        mesh = await registry.get(Kind.MESH, "home")
        assert isinstance(mesh, Mesh)
        assert mesh.spec == replace(MESH.spec, addressing=replace(MESH.spec.addressing, ipv6=None))
        assert mesh.spec.prefer is Family.IPV6

    on(control_plane, body)
