"""What an agent is told of a mesh, and what is left out because it acts on none of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import IPv4Network, ip_interface

import aiohttp
from scope_operator.gateway.limits import Limits

from scope.credentials import authorization
from scope.model import (
    Addressing,
    Assignment,
    Candidate,
    CandidateKind,
    Condition,
    Endpoint,
    Forwarding,
    HubChoice,
    Kind,
    Link,
    Mesh,
    MeshCounts,
    MeshSpec,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    RelayReport,
    Revision,
    Role,
)
from scope.projection import is_told, projected
from scope.registry.http import BOOKMARK, HttpRegistry
from scope.registry.port import Put
from tests.unit.gateway_fixture import ADMIN, REGISTRY, Running, credential_of, enrolled, gateway, keys_of

SEEN = Endpoint.parse("198.51.100.7:4500")
HERE = Candidate(Endpoint.parse("192.0.2.1:51820"), CandidateKind.HOST)


def on_gateway(body: Callable[[Running], Awaitable[None]], *, limits: Limits | None = None) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), gateway(limits=limits) as running:
            await body(running)

    asyncio.run(run())


def as_agent(running: Running, peer: Peer) -> HttpRegistry:
    return HttpRegistry(running.url, pin=None, credential=credential_of(peer), for_agent=True)


async def report(running: Running, peer: Peer, **fields: object) -> Peer:
    """The peer after its agent reported these fields anew."""
    stored = await running.registry.get(Kind.PEER, peer.meta.name)
    assert isinstance(stored, Peer) and stored.report is not None
    written = replace(stored.report, **fields)  # type: ignore[arg-type]
    changed = await running.registry.update_status(Kind.PEER, peer.meta.name, written, uid=peer.meta.uid)
    assert isinstance(changed, Peer)
    return changed


def link(name: str, *, observed: Endpoint | None = None, latency: float | None = None) -> Link:
    return Link(name, PathKind.DIRECT, endpoint=SEEN, observed=observed, latency=latency, reason="")


def test_an_agent_is_not_told_how_others_reach_each_other_but_where_they_saw_whom() -> None:
    async def body(running: Running) -> None:
        own, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        links = (link("home.external.p9"), link("home.external.p8", observed=SEEN, latency=0.02))
        whole = await report(running, other, endpoints=(HERE,), links=links, direct=2, unreachable=1)
        mine = await report(running, own, links=links, direct=2)
        async with as_agent(running, own) as agent, running.admin as admin:
            told = {peer.meta.name: peer for peer in (await agent.list(Kind.PEER)).resources}
            assert told[own.meta.name] == mine
            seen = told[other.meta.name]
            assert isinstance(seen, Peer) and seen.report is not None and whole.report is not None
            kept = (Link("home.external.p8", PathKind.DIRECT, observed=SEEN),)
            assert seen.report == replace(whole.report, links=kept, direct=0, unreachable=0)
            assert seen.meta == whole.meta
            assert whole in (await admin.list(Kind.PEER)).resources

    on_gateway(body)


def test_a_change_that_no_agent_acts_on_is_an_event_for_everybody_else() -> None:
    async def body(running: Running) -> None:
        own, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        async with as_agent(running, own) as agent, running.admin as admin:
            since = (await admin.list(Kind.PEER)).revision
            told, seen = agent.watch(Kind.PEER, since), admin.watch(Kind.PEER, since)
            counted = await report(running, other, links=(link("home.external.p9"),), direct=1)
            moved = await report(running, other, endpoints=(HERE,))
            assert [await anext(seen), await anext(seen)] == [put(counted), put(moved)]
            fact = await anext(told)
            assert isinstance(fact, Put) and fact == Put(projected(moved), put(moved).revision)
            mine = await report(running, own, direct=1)
            assert await anext(told) == put(mine)

    on_gateway(body)


def test_an_agent_is_not_told_the_totals_of_its_mesh_but_of_its_spec() -> None:
    async def body(running: Running) -> None:
        own = await enrolled(running.registry, 1)
        async with as_agent(running, own) as agent:
            (mesh,) = (await agent.list(Kind.MESH)).resources
            assert isinstance(mesh, Mesh)
            told = agent.watch(Kind.MESH, running.registry.store.revision)
            status = replace(mesh.status, counts=MeshCounts(peers=1), observed_generation=1)
            await running.registry.update_status(Kind.MESH, "home", status, uid=mesh.meta.uid)
            await running.registry.update(replace(mesh, spec=replace(mesh.spec, mtu=1400)))
            fact = await anext(told)
            assert isinstance(fact, Put) and isinstance(fact.resource, Mesh)
            assert fact.resource.spec.mtu == 1400
            assert fact.resource.status == mesh.status

    on_gateway(body)


def test_what_is_assigned_to_a_peer_is_told_and_why_it_lacks_something_is_not() -> None:
    before = _peer()
    refused = Condition("Ready", "False", "AddressesExhausted", "no address is free")
    unlucky = replace(before, assignment=Assignment(conditions=(refused,), last_seen=5.0))
    addressed = replace(before, assignment=Assignment(addresses=(ip_interface("100.64.0.7/16"),)))
    online = replace(before, assignment=Assignment(online=True))
    again = replace(before, meta=replace(before.meta, uid="another", revision=9))
    assert not is_told(before, unlucky)
    assert [is_told(before, after) for after in (addressed, online, again)] == [True, True, True]
    assert is_told(None, before)


def test_what_a_hub_relays_and_why_it_was_chosen_is_nothing_to_an_agent() -> None:
    before = _peer()
    assert before.report is not None
    relaying = replace(before.report, relay=RelayReport(Forwarding.KERNEL, pairs=3))
    hub = replace(before, assignment=Assignment(role=Role.HUB))
    assert not is_told(before, replace(before, report=relaying))
    assert is_told(before, hub)
    mesh = Mesh(Meta("home", "uid"), MeshSpec(Addressing(ipv4=IPv4Network("100.80.0.0/16"))))
    chosen = replace(mesh.status, hubs=(HubChoice("home.external.p1", chosen=True, reason="named"),))
    assert not is_told(mesh, replace(mesh, status=chosen))


def test_latencies_that_change_places_are_nothing_new_to_an_agent() -> None:
    before = _peer(link("a", observed=SEEN, latency=0.2), link("b", observed=SEEN, latency=0.1))
    after = _peer(link("b", observed=SEEN, latency=0.3), link("a", observed=SEEN, latency=0.2))
    assert not is_told(before, after)


def _peer(*links: Link) -> Peer:
    return Peer(Meta("home.external.p1", "uid"), PeerSpec("home"), PeerReport(keys_of(1), links=links))


def test_a_stream_of_which_something_was_left_out_says_how_far_it_is() -> None:
    async def body(running: Running) -> None:
        own, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        since = running.registry.store.revision
        changed = await report(running, other, direct=1)
        lines = await agent_lines(running, own, since=since, count=3)
        assert lines[1] == {
            "specversion": "1.0",
            "id": f"bookmark-{changed.meta.revision}",
            "source": f"/registries/{REGISTRY}",
            "type": BOOKMARK,
            "time": lines[1]["time"],
            "scoperevision": str(changed.meta.revision),
        }
        assert lines[2] == {}  # it was said; now it is an empty line again

    on_gateway(body, limits=Limits(heartbeat=0.01))


def test_a_watch_goes_on_from_a_bookmark_after_what_came_before_it_is_forgotten() -> None:
    async def body(running: Running) -> None:
        own, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        async with as_agent(running, own) as agent:
            since = (await agent.list(Kind.PEER)).revision
            told = agent.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(told))
            while running.feed.counts() != (1, 0):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.001)
            for number in range(1, 100):  # more than the gateway keeps
                await report(running, other, direct=number)
                await asyncio.sleep(0)
            newest = running.registry.store.revision
            while any(watcher.position < newest for watcher in agent._watchers):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            # A second watch from here reopens the stream from where the first one is.
            late = asyncio.ensure_future(anext(agent.watch(Kind.MESH, newest)))
            moved = await report(running, other, endpoints=(HERE,))
            fact = await waiting
            assert isinstance(fact, Put) and fact.revision == put(moved).revision
            late.cancel()

    on_gateway(body, limits=Limits(heartbeat=0.01))


def test_a_view_that_nobody_has_is_refused() -> None:
    async def body(running: Running) -> None:
        await enrolled(running.registry, 1)
        for target in ("/v1/events?since=0&view=all", "/apis/scope.ltgc.cc/v1alpha1/scopepeers?view=all"):
            async with (
                aiohttp.ClientSession() as session,
                session.get(running.url + target, headers={"Authorization": _admin(target)}) as response,
            ):
                assert response.status == 400
                assert (await response.json())["message"] == "view is whole or agent, not 'all'"

    on_gateway(body)


def _admin(target: str) -> str:
    return authorization(ADMIN, method="GET", target=target, body=b"", wall=0.0, nonce=bytes(16))


async def agent_lines(
    running: Running, peer: Peer, *, since: Revision, count: int
) -> list[dict[str, object]]:
    """The first lines of an agent's stream; an empty one is an empty object."""
    target = f"/v1/events?since={since.number}&view=agent"
    header = authorization(
        credential_of(peer), method="GET", target=target, body=b"", wall=time.time(), nonce=bytes(16)
    )
    async with (
        aiohttp.ClientSession() as session,
        session.get(running.url + target, headers={"Authorization": header}) as response,
    ):
        assert response.status == 200
        lines = [await response.content.readline() for _ in range(count)]
    return [json.loads(line) if line.strip() else {} for line in lines]


def put(peer: Peer) -> Put:
    return Put(peer, Revision(REGISTRY, peer.meta.revision))
