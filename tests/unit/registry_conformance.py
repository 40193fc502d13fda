"""What every registry does, whatever stands behind the port: one suite for all adapters.

An adapter's test module makes a subclass of `RegistryConformance` (named `Test...`, so that pytest collects
it) with its own `opened`: an asynchronous context manager that gives a fresh, empty registry whose watch
keeps at most `backlog` changes.

    class TestMemoryRegistry(RegistryConformance):
        @asynccontextmanager
        async def opened(self, *, backlog: int) -> AsyncIterator[Registry]:
            yield MemoryRegistry("memory", backlog=backlog, ...)

`kinds` names the kinds that the adapter serves: join tokens are never served over HTTP.

Where a test counts changes it creates peers without a status: Kubernetes takes a status by a request of its
own, so that a peer which is created with one is two changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, IPv6Network
from typing import TypeVar

import pytest

from scope.model import (
    Addressing,
    Assignment,
    Candidate,
    CandidateKind,
    Condition,
    Endpoint,
    Family,
    JoinToken,
    Kind,
    Mapping,
    Mesh,
    MeshCounts,
    MeshSpec,
    MeshStatus,
    Meta,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    PublicKey,
    Resource,
    Revision,
    Role,
    Service,
    ServicePort,
    ServiceSpec,
    TokenSpec,
)
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    Deleted,
    Gone,
    Listed,
    NotFound,
    Put,
    Refused,
    Registry,
)

BACKLOG = 64
R = TypeVar("R", bound=Resource)

MESH = Mesh(
    meta=Meta("home"),
    spec=MeshSpec(Addressing(ipv4=IPv4Network("100.64.0.0/16"), ipv6=IPv6Network("fd00:5c0::/64"))),
)
SERVICE = Service(
    Meta("home.east.shop.web"),
    ServiceSpec("home", "east", "shop", "web", ports=(ServicePort(80, name="http"),)),
)
TOKEN = JoinToken(Meta("tk-1"), TokenSpec(mesh="home", secret_hash=bytes(32), expires=2_000_000_000.0))


def keys(seed: int) -> PeerKeys:
    """Distinct public keys for each seed; nobody holds their private halves."""
    return PeerKeys(*(PublicKey(bytes([part]) + seed.to_bytes(31, "big")) for part in (1, 2, 3)))


def peer(seed: int, *, mesh: str = "home") -> Peer:
    """A peer with keys, as enrolment makes it."""
    return Peer(
        meta=Meta(f"{mesh}.external.p{seed}"),
        spec=PeerSpec(mesh=mesh),
        report=PeerReport(keys=keys(seed)),
    )


def bare(seed: int) -> Peer:
    """`peer(seed)` before its agent has said anything: one change in every registry."""
    return replace(peer(seed), report=None)


def report(seed: int, *, port: int) -> PeerReport:
    """What the agent of `peer(seed)` might say."""
    return PeerReport(
        keys=keys(seed),
        endpoints=(Candidate(Endpoint.parse(f"192.0.2.{seed}:{port}"), CandidateKind.REFLEXIVE),),
        mapping=Mapping.ENDPOINT_INDEPENDENT,
    )


class RegistryConformance:
    """The suite. Each test runs on a fresh registry."""

    kinds: tuple[Kind, ...] = tuple(Kind)

    def opened(self, *, backlog: int) -> AbstractAsyncContextManager[Registry]:
        """A fresh, empty registry."""
        raise NotImplementedError

    def forgotten(self, listed: Listed) -> Revision:
        """A revision that is older than what a backlog of 8 changes keeps, 20 changes after `listed`."""
        return listed.revision

    def on(self, body: Callable[[Registry], Awaitable[None]], *, backlog: int = BACKLOG) -> None:
        """Run `body` on a fresh registry, within a time that only a lost wake-up exceeds."""

        async def run() -> None:
            async with asyncio.timeout(30), self.opened(backlog=backlog) as registry:
                await body(registry)

        asyncio.run(run())

    def test_a_new_registry_is_empty_and_its_list_is_complete(self) -> None:
        async def body(registry: Registry) -> None:
            for kind in self.kinds:
                listed = await registry.list(kind)
                assert (listed.kind, listed.resources, listed.complete) == (kind, (), True)
                assert listed.revision.registry

        self.on(body)

    def test_what_is_created_is_stored_whole_and_gets_uid_revision_and_time(self) -> None:
        async def body(registry: Registry) -> None:
            asked: dict[Kind, Resource] = {
                Kind.MESH: MESH,
                Kind.PEER: peer(1),
                Kind.SERVICE: SERVICE,
                Kind.TOKEN: TOKEN,
            }
            for kind in self.kinds:
                created = await registry.create(asked[kind])
                assert created.meta.uid
                assert created.meta.revision > 0
                assert created.meta.created > 0
                assert created.meta.generation == 1
                assert replace(created, meta=asked[kind].meta) == asked[kind]
                assert await registry.get(kind, asked[kind].meta.name) == created
                assert (await registry.list(kind)).resources == (created,)

        self.on(body)

    def test_a_name_is_taken_once(self) -> None:
        async def body(registry: Registry) -> None:
            await registry.create(MESH)
            with pytest.raises(AlreadyExists):
                await registry.create(MESH)
            await registry.create(peer(1))
            with pytest.raises(AlreadyExists):
                await registry.create(peer(1))

        self.on(body)

    def test_of_parallel_creations_of_one_name_one_succeeds(self) -> None:
        async def body(registry: Registry) -> None:
            await registry.create(MESH)
            answers = await asyncio.gather(
                *(registry.create(peer(1)) for _ in range(8)), return_exceptions=True
            )
            assert sum(isinstance(answer, Peer) for answer in answers) == 1
            assert sum(isinstance(answer, AlreadyExists) for answer in answers) == 7

        self.on(body)

    def test_what_is_absent_is_not_found(self) -> None:
        async def body(registry: Registry) -> None:
            with pytest.raises(NotFound):
                await registry.get(Kind.PEER, "nobody")
            with pytest.raises(NotFound):
                await registry.update(replace(MESH, meta=replace(MESH.meta, uid="u")))
            with pytest.raises(NotFound):
                await registry.update_status(Kind.PEER, "nobody", Assignment(), uid="u")
            with pytest.raises(NotFound):
                await registry.delete(Kind.MESH, "nobody", uid="u")

        self.on(body)

    def test_an_update_replaces_the_spec_and_leaves_the_status(self) -> None:
        async def body(registry: Registry) -> None:
            mesh = await created(registry, MESH)
            status = MeshStatus(counts=MeshCounts(peers=3))
            with_status = await registry.update_status(Kind.MESH, "home", status, uid=mesh.meta.uid)
            asked = replace(mesh, spec=replace(mesh.spec, prefer=Family.IPV4), status=MeshStatus())
            updated = await registry.update(asked)
            assert isinstance(updated, Mesh)
            assert updated.spec.prefer is Family.IPV4
            assert updated.status == status
            assert updated.meta.generation == 2
            assert updated.meta.revision > with_status.meta.revision > mesh.meta.revision
            assert (updated.meta.uid, updated.meta.created) == (mesh.meta.uid, mesh.meta.created)
            assert await registry.get(Kind.MESH, "home") == updated

        self.on(body)

    def test_an_equal_write_changes_no_revision(self) -> None:
        async def body(registry: Registry) -> None:
            mesh = await created(registry, MESH)
            member = await created(registry, peer(1))
            assert await registry.update(mesh) == mesh
            assert member.report is not None
            uid = member.meta.uid
            assert await registry.update_status(Kind.PEER, member.meta.name, member.report, uid=uid) == member
            assert (await registry.list(Kind.PEER)).resources == (member,)

        self.on(body)

    def test_a_write_from_an_old_revision_is_a_conflict(self) -> None:
        async def body(registry: Registry) -> None:
            mesh = await created(registry, MESH)
            asked = replace(mesh, spec=replace(mesh.spec, prefer=Family.IPV4))
            newer = await registry.update(asked, if_revision=mesh.meta.revision)
            with pytest.raises(Conflict):
                await registry.update(mesh, if_revision=mesh.meta.revision)
            with pytest.raises(Conflict):
                await registry.update_status(
                    Kind.MESH, "home", MeshStatus(), uid=mesh.meta.uid, if_revision=mesh.meta.revision
                )
            assert await registry.get(Kind.MESH, "home") == newer

        self.on(body)

    def test_of_parallel_writes_from_one_revision_one_succeeds(self) -> None:
        async def body(registry: Registry) -> None:
            mesh = await created(registry, MESH)
            specs = [replace(mesh.spec, listen_port=1000 + port) for port in range(8)]
            answers = await asyncio.gather(
                *(
                    registry.update(replace(mesh, spec=spec), if_revision=mesh.meta.revision)
                    for spec in specs
                ),
                return_exceptions=True,
            )
            assert sum(isinstance(answer, Mesh) for answer in answers) == 1
            assert sum(isinstance(answer, Conflict) for answer in answers) == 7

        self.on(body)

    def test_a_write_that_names_another_uid_is_a_conflict(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            first = await created(registry, peer(1))
            await registry.delete(Kind.PEER, first.meta.name, uid=first.meta.uid)
            second = await created(registry, peer(1))
            assert second.meta.uid != first.meta.uid
            name, old = first.meta.name, first.meta.uid
            with pytest.raises(Conflict):
                await registry.update(first)
            with pytest.raises(Conflict):
                await registry.update_status(Kind.PEER, name, report(1, port=9), uid=old)
            with pytest.raises(Conflict):
                await registry.delete(Kind.PEER, name, uid=old)
            assert await registry.get(Kind.PEER, name) == second

        self.on(body)

    def test_the_writers_of_a_status_keep_out_of_each_others_part(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            member = await created(registry, peer(1))
            name, uid = member.meta.name, member.meta.uid
            assignment = Assignment(
                addresses=(IPv4Interface("100.64.0.9/16"),),
                role=Role.HUB,
                online=True,
                last_seen=5.0,
                conditions=(Condition("Ready", "True", "Assigned", "has an address", 5.0),),
            )
            await registry.update_status(Kind.PEER, name, assignment, uid=uid)
            stored = await registry.update_status(Kind.PEER, name, report(1, port=9), uid=uid)
            assert isinstance(stored, Peer)
            assert (stored.assignment, stored.report) == (assignment, report(1, port=9))
            assert stored.meta.generation == 1
            assert await registry.get(Kind.PEER, name) == stored

        self.on(body)

    def test_a_status_write_cannot_change_keys(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            member = await created(registry, peer(1))
            foreign = replace(report(1, port=9), keys=keys(2))
            with pytest.raises(Refused):
                await registry.update_status(Kind.PEER, member.meta.name, foreign, uid=member.meta.uid)
            assert await registry.get(Kind.PEER, member.meta.name) == member

        self.on(body)

    def test_whom_a_peer_is_cannot_change(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            member = await created(registry, peer(1))
            for spec in (
                replace(member.spec, mesh="other"),
                replace(member.spec, cluster="fra", node_name="n1", node_uid="0d3f"),
            ):
                with pytest.raises(Refused, match="delete this ScopePeer and create another"):
                    await registry.update(replace(member, spec=spec))
            assert await registry.get(Kind.PEER, member.meta.name) == member

        self.on(body)

    def test_a_part_of_another_kinds_status_is_refused(self) -> None:
        async def body(registry: Registry) -> None:
            mesh = await created(registry, MESH)
            with pytest.raises(Refused):
                await registry.update_status(Kind.MESH, "home", Assignment(), uid=mesh.meta.uid)

        self.on(body)

    def test_what_is_deleted_is_gone(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            first, second = await created(registry, peer(1)), await created(registry, peer(2))
            await registry.delete(Kind.PEER, first.meta.name, uid=first.meta.uid)
            with pytest.raises(NotFound):
                await registry.get(Kind.PEER, first.meta.name)
            assert (await registry.list(Kind.PEER)).resources == (second,)

        self.on(body)

    def test_a_watch_gives_the_changes_since_a_list_in_order_each_once(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            first = await created(registry, peer(1))
            listed = await registry.list(Kind.PEER)
            name, uid = first.meta.name, first.meta.uid
            second = await created(registry, bare(2))
            changed = await registry.update_status(Kind.PEER, name, report(1, port=9), uid=uid)
            await registry.delete(Kind.PEER, name, uid=uid)
            facts = await watched(registry, listed.revision, count=3)
            last = facts[2]
            assert isinstance(last, Deleted)
            assert [resource_of(fact) for fact in facts[:2]] == [second, changed]
            # A registry may give the last state the revision of its end.
            assert replace(last.last, meta=replace(last.last.meta, revision=changed.meta.revision)) == changed
            numbers = [fact.revision.number for fact in facts]
            assert numbers == sorted(set(numbers))
            assert numbers[0] > listed.revision.number
            assert {fact.revision.registry for fact in facts} == {listed.revision.registry}

        self.on(body)

    def test_a_watch_that_waits_is_woken_by_a_change(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            listed = await registry.list(Kind.PEER)
            async with aclosing_watch(registry, listed.revision) as facts:
                waiting = asyncio.ensure_future(anext(facts))
                await asyncio.sleep(0)
                first = await created(registry, bare(1))
                assert resource_of(await waiting) == first
                second = await created(registry, bare(2))
                assert resource_of(await anext(facts)) == second

        self.on(body)

    def test_a_watch_can_be_resumed_from_any_fact(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            listed = await registry.list(Kind.PEER)
            made = [await created(registry, bare(seed)) for seed in range(1, 6)]
            facts = await watched(registry, listed.revision, count=5)
            for at, fact in enumerate(facts[:-1]):
                rest = await watched(registry, fact.revision, count=4 - at)
                assert [resource_of(later) for later in rest] == made[at + 1 :]

        self.on(body)

    def test_watchers_of_a_kind_see_no_other_kind(self) -> None:
        async def body(registry: Registry) -> None:
            listed = await registry.list(Kind.PEER)
            await created(registry, MESH)
            member = await created(registry, bare(1))
            (fact,) = await watched(registry, listed.revision, count=1)
            assert resource_of(fact) == member

        self.on(body)

    def test_many_watchers_each_see_everything(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            listed = await registry.list(Kind.PEER)
            watchers = [asyncio.ensure_future(watched(registry, listed.revision, count=5)) for _ in range(5)]
            made = [await created(registry, bare(seed)) for seed in range(1, 6)]
            for facts in await asyncio.gather(*watchers):
                assert [resource_of(fact) for fact in facts] == made

        self.on(body)

    def test_a_watch_from_before_the_backlog_is_told_to_list_again(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            old = self.forgotten(await registry.list(Kind.PEER))
            member = await created(registry, peer(1))
            name, uid = member.meta.name, member.meta.uid
            for port in range(1, 20):
                await registry.update_status(Kind.PEER, name, report(1, port=port), uid=uid)
            with pytest.raises(Gone):
                await watched(registry, old, count=1)
            again = await registry.list(Kind.PEER)
            later = await created(registry, bare(2))
            (fact,) = await watched(registry, again.revision, count=1)
            assert resource_of(fact) == later

        self.on(body, backlog=8)

    def test_a_watch_from_a_revision_of_another_registry_or_of_the_future_is_told_to_list_again(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            here = (await registry.list(Kind.PEER)).revision
            with pytest.raises(Gone):
                await watched(registry, Revision("another", here.number), count=1)
            with pytest.raises(Gone):
                await watched(registry, Revision(here.registry, here.number + 1000), count=1)

        self.on(body)

    def test_a_heartbeat_is_taken_from_a_peer_and_changes_no_resource(self) -> None:
        async def body(registry: Registry) -> None:
            await created(registry, MESH)
            member = await created(registry, peer(1))
            before = (await registry.list(Kind.PEER)).resources
            await registry.heartbeat(member.meta.name)
            assert (await registry.list(Kind.PEER)).resources == before
            with pytest.raises(NotFound):
                await registry.heartbeat("home.external.nobody")

        self.on(body)


async def created(registry: Registry, resource: R) -> R:
    """`registry.create`, with the type of what was asked."""
    stored = await registry.create(resource)
    assert isinstance(stored, type(resource))
    return stored


def aclosing_watch(
    registry: Registry, since: Revision, *, kind: Kind = Kind.PEER
) -> aclosing[AsyncGenerator[Put | Deleted, None]]:
    """A watch that is closed when its block ends."""
    facts = registry.watch(kind, since)
    assert isinstance(facts, AsyncGenerator)
    return aclosing(facts)


async def watched(
    registry: Registry, since: Revision, *, count: int, kind: Kind = Kind.PEER
) -> list[Put | Deleted]:
    """The first `count` changes after `since`."""
    facts: list[Put | Deleted] = []
    async with aclosing_watch(registry, since, kind=kind) as changes:
        async for fact in changes:
            facts.append(fact)
            if len(facts) == count:
                break
    return facts


def resource_of(fact: Put | Deleted) -> Resource:
    """What a change is about."""
    return fact.last if isinstance(fact, Deleted) else fact.resource
