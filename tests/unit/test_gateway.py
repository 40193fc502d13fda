"""Who may do what at the gateway, and what everyone else is told."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network
from typing import Any

import aiohttp
import pytest
from scope_operator.gateway.limits import Limits

from scope import resources
from scope.admission import Rate
from scope.credentials import AdminCredential, authorization
from scope.model import Assignment, Candidate, CandidateKind, Endpoint, Kind, Peer, PublicKey, Role, Secret
from scope.registry.http import HttpRegistry
from scope.registry.port import Conflict, Gone, NotFound, PeerRemoved, Refused, Unavailable
from scope.tombstones import sign_tombstone
from tests.unit.gateway_fixture import (
    REGISTRY_KEY,
    Running,
    credential_of,
    enrolled,
    gateway,
    keys_of,
    signing_seed,
)
from tests.unit.registry_conformance import MESH

PEERS = "/apis/scope.ltgc.cc/v1alpha1/scopepeers"
MESHES = "/apis/scope.ltgc.cc/v1alpha1/scopemeshes"


def on_gateway(
    body: Callable[[Running], Awaitable[None]], *, limits: Limits | None = None, backlog: int = 64
) -> None:
    """Run `body` beside a fresh gateway."""

    async def run() -> None:
        async with asyncio.timeout(30), gateway(limits=limits, backlog=backlog) as running:
            await body(running)

    asyncio.run(run())


async def ask(
    running: Running, method: str, target: str, *, body: bytes = b"", header: str | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """One request as its bytes are given: code, JSON body, headers."""
    headers = {} if header is None else {"Authorization": header}
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, running.url + target, data=body or None, headers=headers) as response,
    ):
        raw = await response.read()
        return response.status, json.loads(raw) if raw else {}, dict(response.headers)


def signed(
    running: Running, peer: Peer, method: str, target: str, *, body: bytes = b"", nonce: bytes = bytes(16)
) -> str:
    """The header with which `peer` makes a request now."""
    return authorization(
        credential_of(peer), method=method, target=target, body=body, wall=running.clock(), nonce=nonce
    )


async def removed(running: Running, peer: Peer) -> Peer:
    """The peer with the registry's tombstone."""
    mesh = await running.registry.get(Kind.MESH, peer.spec.mesh)
    assert peer.report is not None
    tombstone = sign_tombstone(
        mesh_uid=mesh.meta.uid, peer_uid=peer.meta.uid, key=peer.report.keys.wireguard, secret=REGISTRY_KEY
    )
    assignment = replace(peer.assignment, tombstone=tombstone)
    stored = await running.registry.update_status(Kind.PEER, peer.meta.name, assignment, uid=peer.meta.uid)
    assert isinstance(stored, Peer)
    return stored


# --- who is let in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", PEERS),
        ("GET", MESHES),
        ("GET", f"{PEERS}/home.external.p1"),
        ("POST", MESHES),
        ("POST", PEERS),
        ("PUT", f"{MESHES}/home"),
        ("PUT", f"{PEERS}/home.external.p1"),
        ("PUT", f"{PEERS}/home.external.p1/status"),
        ("PUT", f"{MESHES}/home/status"),
        ("DELETE", f"{PEERS}/home.external.p1"),
        ("DELETE", f"{PEERS}/home.external.p1?purge=true"),
        ("DELETE", f"{MESHES}/home"),
        ("GET", "/v1/events?since=0"),
        ("POST", "/v1/courier/AAAA"),
        ("POST", "/v1/heartbeat"),
        ("POST", "/v1/leave"),
        ("GET", "/v1/tokens"),
        ("POST", "/v1/tokens"),
        ("DELETE", "/v1/tokens/abc"),
    ],
)
def test_without_a_credential_nothing_is_read_or_changed(method: str, target: str) -> None:
    async def body(running: Running) -> None:
        await enrolled(running.registry, 1)
        before = running.registry.store.revision
        code, status, headers = await ask(running, method, target, body=b"{}" if method != "GET" else b"")
        assert (code, status["kind"], status["reason"]) == (401, "Status", "Unauthorized")
        assert headers["WWW-Authenticate"].startswith("Bearer")
        assert running.registry.store.revision == before

    on_gateway(body)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", MESHES),
        ("POST", PEERS),
        ("PUT", f"{MESHES}/home"),
        ("PUT", f"{MESHES}/home/status"),
        ("PUT", f"{PEERS}/home.external.p1"),
        ("DELETE", f"{PEERS}/home.external.p1"),
        ("DELETE", f"{PEERS}/home.external.p2?purge=true"),
        ("DELETE", f"{MESHES}/home"),
        ("GET", "/v1/tokens"),
        ("POST", "/v1/tokens"),
        ("DELETE", "/v1/tokens/abc"),
    ],
)
def test_a_peer_administers_nothing(method: str, target: str) -> None:
    async def body(running: Running) -> None:
        peer, _ = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        before = running.registry.store.revision
        payload = b"" if method == "GET" else json.dumps(resources.to_dict(MESH)).encode()
        header = signed(running, peer, method, target, body=payload)
        code, status, _ = await ask(running, method, target, body=payload, header=header)
        assert (code, status["reason"]) == (403, "Forbidden")
        assert running.registry.store.revision == before

    on_gateway(body)


def test_another_administrators_token_is_refused() -> None:
    async def body(running: Running) -> None:
        foreign = AdminCredential(Secret(b"administrator-of-another"))
        async with HttpRegistry(running.url, pin=None, credential=foreign) as client:
            with pytest.raises(Refused, match=r"admin\.json"):
                await client.list(Kind.PEER)

    on_gateway(body)


def test_a_signature_of_another_key_is_refused() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        forged = replace(credential_of(peer), signing=signing_seed(2))
        async with HttpRegistry(running.url, pin=None, credential=forged) as client:
            with pytest.raises(Refused, match="does not hold"):
                await client.list(Kind.PEER)

    on_gateway(body)


def test_a_peer_is_known_by_its_uid_not_by_its_name() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        await running.registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
        again = await enrolled(running.registry, 1)
        assert again.meta.uid != peer.meta.uid
        async with running.as_peer(peer) as client:
            with pytest.raises(Refused, match="of that uid"):
                await client.list(Kind.PEER)

    on_gateway(body)


def test_a_mesh_is_deleted_only_when_its_peers_are_gone() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        mesh = await running.registry.get(Kind.MESH, "home")
        async with running.admin as client:
            with pytest.raises(
                Conflict, match=f"has 1 peers, {peer.meta.name} among them: `scopectl peer remove`"
            ):
                await client.delete(Kind.MESH, "home", uid=mesh.meta.uid)
            await client.remove_peer(peer.meta.name)
            await client.delete(Kind.MESH, "home", uid=mesh.meta.uid)

    on_gateway(body)


def test_a_request_for_another_registry_is_refused() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        elsewhere = replace(credential_of(peer), registry="another")
        async with HttpRegistry(running.url, pin=None, credential=elsewhere) as client:
            with pytest.raises(Refused, match="another registry"):
                await client.list(Kind.PEER)

    on_gateway(body)


def test_a_signed_request_is_taken_once() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        header = signed(running, peer, "GET", PEERS)
        assert (await ask(running, "GET", PEERS, header=header))[0] == 200
        code, status, _ = await ask(running, "GET", PEERS, header=header)
        assert (code, status["reason"]) == (401, "Unauthorized")
        assert "before" in status["message"]

    on_gateway(body)


@pytest.mark.parametrize(
    ("method", "target", "payload"),
    [("GET", f"{PEERS}/home.external.p1", b""), ("GET", f"{PEERS}?x=1", b""), ("POST", "/v1/leave", b"{}")],
)
def test_a_signature_covers_method_target_and_body(method: str, target: str, payload: bytes) -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        header = signed(running, peer, "GET", PEERS)
        code, status, _ = await ask(running, method, target, body=payload, header=header)
        assert code == 401
        assert "another request" in status["message"]

    on_gateway(body)


def test_an_expired_request_is_refused_and_told_the_time() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        header = signed(running, peer, "GET", PEERS)
        running.clock.ahead = 61.0
        code, status, _ = await ask(running, "GET", PEERS, header=header)
        assert (code, status["reason"]) == (401, "ClockSkew")
        assert abs(status["details"]["now"] - running.clock()) < 5

    on_gateway(body)


def test_a_request_that_lives_too_long_is_refused() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        import scope.credentials as credentials

        lifetime = credentials.LIFETIME
        credentials.LIFETIME = 3600.0
        try:
            header = signed(running, peer, "GET", PEERS)
        finally:
            credentials.LIFETIME = lifetime
        code, status, _ = await ask(running, "GET", PEERS, header=header)
        assert code == 401
        assert "longer than 60 seconds" in status["message"]

    on_gateway(body)


@pytest.mark.parametrize("ahead", [-4000.0, 4000.0])
def test_a_peer_with_a_wrong_clock_learns_the_time_and_is_served(ahead: float) -> None:
    async def body(running: Running) -> None:
        running.clock.ahead = abs(ahead)
        peer = await enrolled(running.registry, 1)
        wall = running.clock() + ahead
        async with HttpRegistry(
            running.url, pin=None, credential=credential_of(peer), wall=lambda: wall
        ) as client:
            assert len((await client.list(Kind.PEER)).resources) == 1

    on_gateway(body)


@pytest.mark.parametrize("header", ["", "Bearer", "Basic YTpi", "Bearer a.b.c", "Bearer ..", "Bearer \u00e9"])
def test_a_damaged_credential_is_refused(header: str) -> None:
    async def body(running: Running) -> None:
        code, status, _ = await ask(running, "GET", PEERS, header=header)
        assert (code, status["reason"]) == (401, "Unauthorized")

    on_gateway(body)


# --- what a peer sees and writes ----------------------------------------------------------------------------


def test_a_peer_sees_its_own_mesh_alone() -> None:
    async def body(running: Running) -> None:
        peer, foreign = (
            await enrolled(running.registry, 1),
            await enrolled(running.registry, 2, mesh="other"),
        )
        async with running.as_peer(peer) as client:
            assert [r.meta.name for r in (await client.list(Kind.MESH)).resources] == ["home"]
            assert (await client.list(Kind.PEER)).resources == (peer,)
            for kind, name in ((Kind.MESH, "other"), (Kind.PEER, foreign.meta.name)):
                with pytest.raises(NotFound):
                    await client.get(kind, name)

    on_gateway(body)


def test_a_peer_writes_its_own_report() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        assert peer.report is not None
        candidate = Candidate(Endpoint.parse("192.0.2.1:7"), CandidateKind.STATIC)
        report = replace(peer.report, endpoints=(candidate,))
        async with running.as_peer(peer) as client:
            stored = await client.update_status(Kind.PEER, peer.meta.name, report, uid=peer.meta.uid)
            assert isinstance(stored, Peer)
            assert stored.report == report
            with pytest.raises(Conflict):
                await client.update_status(
                    Kind.PEER, peer.meta.name, peer.report, uid=peer.meta.uid, if_revision=peer.meta.revision
                )

    on_gateway(body)


def test_a_peer_writes_no_other_peers_report() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        assert other.report is not None
        async with running.as_peer(peer) as client:
            with pytest.raises(Refused, match="own status"):
                await client.update_status(Kind.PEER, other.meta.name, other.report, uid=other.meta.uid)
        assert await running.registry.get(Kind.PEER, other.meta.name) == other

    on_gateway(body)


def test_a_peer_changes_no_keys() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        assert peer.report is not None
        report = replace(peer.report, keys=keys_of(2))
        async with running.as_peer(peer) as client:
            with pytest.raises(Refused, match="keys are bound"):
                await client.update_status(Kind.PEER, peer.meta.name, report, uid=peer.meta.uid)
        assert await running.registry.get(Kind.PEER, peer.meta.name) == peer

    on_gateway(body)


def test_a_peer_assigns_itself_nothing() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        async with running.as_peer(peer) as client:
            with pytest.raises(Refused, match="fieldManager"):
                await client.update_status(
                    Kind.PEER, peer.meta.name, Assignment(role=Role.HUB), uid=peer.meta.uid
                )
        target = f"{PEERS}/{peer.meta.name}/status"
        payload = json.dumps(
            resources.to_dict(replace(peer, assignment=Assignment(role=Role.HUB, online=True)))
        )
        header = signed(running, peer, "PUT", target, body=payload.encode())
        code, status, _ = await ask(running, "PUT", target, body=payload.encode(), header=header)
        assert (code, status["reason"]) == (403, "Forbidden")
        assert await running.registry.get(Kind.PEER, peer.meta.name) == peer

    on_gateway(body)


def test_a_report_does_not_change_the_spec() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        target = f"{PEERS}/{peer.meta.name}/status"
        asked = replace(peer, spec=replace(peer.spec, role=Role.HUB))
        payload = json.dumps(resources.to_dict(asked)).encode()
        header = signed(running, peer, "PUT", target, body=payload)
        assert (await ask(running, "PUT", target, body=payload, header=header))[0] == 200
        assert await running.registry.get(Kind.PEER, peer.meta.name) == peer

    on_gateway(body)


def test_a_peer_sends_heartbeats_for_itself_alone() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        async with running.as_peer(peer) as client:
            await client.heartbeat(peer.meta.name)
            with pytest.raises(Refused):
                await client.heartbeat(other.meta.name)
        assert set(running.registry.seconds_since_heartbeat()) == {peer.meta.name}

    on_gateway(body)


def test_a_removed_peer_is_refused_and_its_stream_ends_with_its_tombstone() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        async with running.as_peer(peer) as client, running.as_peer(other) as second:
            since = (await client.list(Kind.PEER)).revision
            facts = client.watch(Kind.PEER, since)
            others = second.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(facts))
            await asyncio.sleep(0.05)
            gone = await removed(running, peer)
            assert (await waiting).resource == gone  # type: ignore[union-attr]
            with pytest.raises(PeerRemoved, match="was removed"):
                await anext(facts)
            with pytest.raises(PeerRemoved, match="join with a new token"):
                await client.list(Kind.PEER)
            assert (await anext(others)).resource == gone  # type: ignore[union-attr]
            await others.aclose()  # type: ignore[attr-defined]

    on_gateway(body)


# --- limits -------------------------------------------------------------------------------------------------


def test_an_oversize_body_is_refused() -> None:
    async def body(running: Running) -> None:
        code, status, _ = await ask(running, "POST", "/v1/join", body=b"x" * (64 * 1024 + 1))
        assert (code, status["reason"]) == (413, "RequestEntityTooLarge")
        assert "65536 bytes" in status["message"]

    on_gateway(body)


def test_an_oversize_header_is_refused() -> None:
    async def body(running: Running) -> None:
        async with (
            aiohttp.ClientSession() as session,
            session.get(running.url + "/healthz", headers={"X-Large": "x" * 10000}) as response,
        ):
            assert response.status == 400

    on_gateway(body)


def test_a_source_that_asks_too_often_is_told_to_wait() -> None:
    async def body(running: Running) -> None:
        answers = [await ask(running, "GET", "/healthz") for _ in range(4)]
        assert [code for code, _, _ in answers] == [200, 200, 200, 429]
        assert int(answers[-1][2]["Retry-After"]) >= 1
        assert answers[-1][1]["reason"] == "TooManyRequests"

    on_gateway(body, limits=Limits(source=Rate(0.01, 3)))


def test_guesses_at_a_credential_are_limited() -> None:
    async def body(running: Running) -> None:
        codes = [(await ask(running, "GET", PEERS, header=f"Bearer guess{n}"))[0] for n in range(5)]
        assert codes == [401, 401, 401, 429, 429]

    on_gateway(body, limits=Limits(stranger=Rate(0.01, 3)))


def test_a_peer_that_asks_too_often_does_not_hold_up_another() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        async with running.as_peer(peer) as client, running.as_peer(other) as second:
            await client.list(Kind.PEER)
            await client.list(Kind.PEER)
            with pytest.raises(Unavailable, match="too often"):
                await client.list(Kind.PEER)
            await second.list(Kind.PEER)

    on_gateway(body, limits=Limits(peer=Rate(0.01, 2)))


def test_connections_beyond_the_limit_are_refused_with_a_sentence() -> None:
    async def body(running: Running) -> None:
        host, _, port = running.url.removeprefix("http://").partition(":")
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        reader, writer = await asyncio.open_connection(host, int(port))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 10" in answer
        assert b"too many connections" in answer
        for _, other in [*held, (reader, writer)]:
            other.close()

    on_gateway(body, limits=Limits(connections_per_source=2))


def test_a_connection_that_asks_for_nothing_is_dropped() -> None:
    async def body(running: Running) -> None:
        host, _, port = running.url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost:")
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()

    on_gateway(body, limits=Limits(first_request_seconds=0.1))


# --- streams ------------------------------------------------------------------------------------------------


def test_a_peers_new_stream_closes_its_old_one() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        async with running.as_peer(peer) as first, running.as_peer(peer) as second:
            since = (await first.list(Kind.PEER)).revision
            older, newer = first.watch(Kind.PEER, since), second.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(older))
            await until(lambda: running.feed.counts()[0] == 1)
            arriving = asyncio.ensure_future(anext(newer))
            with pytest.raises(Conflict, match="newer stream"):
                await waiting
            other = await enrolled(running.registry, 2)
            assert (await arriving).resource == other  # type: ignore[union-attr]
            await newer.aclose()  # type: ignore[attr-defined]

    on_gateway(body)


def test_streams_beyond_the_limit_are_refused() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        async with running.as_peer(peer) as first, running.as_peer(other) as second:
            since = (await first.list(Kind.PEER)).revision
            held = first.watch(Kind.PEER, since)
            waiting = asyncio.ensure_future(anext(held))
            await until(lambda: running.feed.counts()[0] == 1)
            with pytest.raises(Unavailable, match="too many event streams"):
                await anext(second.watch(Kind.PEER, since))
            waiting.cancel()

    on_gateway(body, limits=Limits(streams=1))


def test_a_stopping_gateway_says_so_on_its_streams() -> None:
    async def body(running: Running) -> None:
        async with running.admin as client:
            await enrolled(running.registry, 1)
            facts = client.watch(Kind.PEER, (await client.list(Kind.PEER)).revision)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: running.feed.counts()[1] == 1)
            running.feed.end_all()
            with pytest.raises(Unavailable, match="stopping"):
                await waiting

    on_gateway(body)


def test_a_stream_that_is_quiet_brings_heartbeats() -> None:
    async def body(running: Running) -> None:
        lines = await stream_lines(running, count=4)
        assert lines == [b"\n"] * 4

    on_gateway(body, limits=Limits(heartbeat=0.01))


def test_each_change_is_one_event_of_its_type() -> None:
    async def body(running: Running) -> None:
        registry = running.registry
        peer = await enrolled(registry, 1)
        assert peer.report is not None
        name, uid = peer.meta.name, peer.meta.uid
        candidate = Candidate(Endpoint.parse("192.0.2.1:7"), CandidateKind.STATIC)
        moved = replace(peer.report, endpoints=(candidate,))
        await registry.update_status(Kind.PEER, name, moved, uid=uid)
        await registry.update_status(Kind.PEER, name, replace(moved, direct=1), uid=uid)
        await removed(running, peer)
        mesh = await registry.get(Kind.MESH, "home")
        await registry.delete(Kind.PEER, name, uid=uid)
        await registry.delete(Kind.MESH, "home", uid=mesh.meta.uid)
        events = [json.loads(line) for line in await stream_lines(running, count=8) if line.strip()]
        assert [event["type"].removeprefix("cc.ltgc.scope:") for event in events] == [
            "meshUpdate",
            "peerJoin",
            "peerMove",
            "peerConn",
            "peerLeave",
            "peerLeave",
            "meshUpdate",
        ]
        assert [event["scoperevision"] for event in events] == [str(number) for number in range(1, 8)]
        assert [event.get("scopedeleted", False) for event in events] == [False] * 5 + [True] * 2
        for event in events:
            assert event["specversion"] == "1.0"
            assert event["id"]
            assert event["source"]
            assert resources.parse(event["data"]).meta.name == event["subject"]

    on_gateway(body)


def test_a_stream_from_before_the_backlog_is_told_to_list_again() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        assert peer.report is not None
        for direct in range(1, 80):
            report = replace(peer.report, direct=direct)
            await running.registry.update_status(Kind.PEER, peer.meta.name, report, uid=peer.meta.uid)
            await asyncio.sleep(0)
        async with running.as_peer(peer) as client:
            with pytest.raises(Gone, match="list again"):
                await anext(
                    client.watch(Kind.PEER, replace((await client.list(Kind.PEER)).revision, number=1))
                )

    on_gateway(body)


def test_a_stream_of_another_mesh_is_not_found() -> None:
    async def body(running: Running) -> None:
        peer, _ = await enrolled(running.registry, 1), await enrolled(running.registry, 2, mesh="other")
        target = "/v1/events?since=0&mesh=other"
        code, status, _ = await ask(running, "GET", target, header=signed(running, peer, "GET", target))
        assert (code, status["reason"]) == (404, "NotFound")

    on_gateway(body)


# --- the courier --------------------------------------------------------------------------------------------


def test_the_courier_brings_a_datagram_to_the_holder_of_its_key() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2)
        assert peer.report is not None
        assert other.report is not None
        async with running.as_peer(peer) as client, running.as_peer(other) as second:
            with pytest.raises(NotFound, match="event stream"):
                await client.courier(other.report.keys.probe, b"sealed")
            facts = second.watch(Kind.PEER, (await second.list(Kind.PEER)).revision)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: running.feed.counts()[0] == 1)
            await client.courier(other.report.keys.probe, b"sealed")
            arrived = await anext(second.couriered())
            assert (arrived.sender, arrived.datagram) == (peer.report.keys.probe, b"sealed")
            waiting.cancel()

    on_gateway(body)


def test_the_courier_crosses_no_meshes_and_takes_no_large_datagram() -> None:
    async def body(running: Running) -> None:
        peer, other = await enrolled(running.registry, 1), await enrolled(running.registry, 2, mesh="other")
        assert other.report is not None
        async with running.as_peer(peer) as client, running.as_peer(other) as second:
            facts = second.watch(Kind.PEER, (await second.list(Kind.PEER)).revision)
            waiting = asyncio.ensure_future(anext(facts))
            await until(lambda: running.feed.counts()[0] == 1)
            with pytest.raises(NotFound):
                await client.courier(other.report.keys.probe, b"sealed")
            with pytest.raises(Refused, match="1232"):
                await client.courier(other.report.keys.probe, bytes(1233))
            with pytest.raises(NotFound):
                await client.courier(PublicKey(bytes(32)), b"sealed")
            waiting.cancel()

    on_gateway(body)


def test_a_peer_that_couriers_too_much_is_told_to_wait() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        async with running.as_peer(peer) as client:
            with pytest.raises(NotFound):
                await client.courier(PublicKey(bytes(32)), b"sealed")
            with pytest.raises(Unavailable, match="too many datagrams"):
                await client.courier(PublicKey(bytes(32)), b"sealed")

    on_gateway(body, limits=Limits(courier=Rate(0.01, 1)))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until `condition` holds; the test's own time limit ends what never does."""
    while not condition():  # noqa: ASYNC110 - what it waits for has no event to wait on
        await asyncio.sleep(0.001)


async def stream_lines(running: Running, *, count: int) -> list[bytes]:
    """The first lines of an administrator's stream from the registry's beginning."""
    lines: list[bytes] = []
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            running.url + "/v1/events?since=0",
            headers={"Authorization": "Bearer administrator-of-the-test"},
        ) as response,
    ):
        assert response.content_type == "application/x-ndjson"
        async for line in response.content:
            lines.append(line)
            if len(lines) == count:
                break
    return lines


def test_a_list_follows_changes_of_every_kind() -> None:
    async def body(running: Running) -> None:
        registry = running.registry
        async with running.admin as client:
            peer, other = await enrolled(registry, 1), await enrolled(registry, 2, mesh="other")
            assert (await client.list(Kind.PEER)).resources == (peer, other)
            assert peer.report is not None
            report = replace(peer.report, direct=1)
            changed = await registry.update_status(Kind.PEER, peer.meta.name, report, uid=peer.meta.uid)
            assert (await client.list(Kind.PEER)).resources == (changed, other)
            await registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
            again = await enrolled(registry, 1)
            assert (await client.list(Kind.PEER)).resources == (other, again)
            async with running.as_peer(again) as member:
                assert (await member.list(Kind.PEER)).resources == (again,)

    on_gateway(body)


def test_a_reader_that_is_too_slow_is_told_to_list_again() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        assert peer.report is not None
        await until(lambda: peer.meta.name in running.feed.peers)
        stream = await running.feed.open(peer, "home", running.registry.store.revision)
        for direct in range(1, 100):
            report = replace(peer.report, direct=direct)
            await running.registry.update_status(Kind.PEER, peer.meta.name, report, uid=peer.meta.uid)
            await asyncio.sleep(0)
        stored = await running.registry.get(Kind.PEER, peer.meta.name)
        await until(lambda: running.feed.peers[peer.meta.name] == stored)
        assert running.feed.take(stream) == []
        assert stream.ended is not None
        assert (stream.ended.code, stream.ended.reason) == (410, "Expired")

    on_gateway(body)


def test_a_reader_that_takes_nothing_is_cut() -> None:
    async def body(running: Running) -> None:
        peer = await enrolled(running.registry, 1)
        host, _, port = running.url.removeprefix("http://").partition(":")
        own = socket.socket()
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        own.setblocking(False)
        with own:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(own, (host, int(port)))
            target = "/v1/events?since=0"
            header = signed(running, peer, "GET", target)
            request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nAuthorization: {header}\r\n\r\n"
            await loop.sock_sendall(own, request.encode())
            await until(lambda: running.feed.counts()[0] == 1)
            routes = tuple(IPv4Network((0x0A000000 + 256 * number, 24)) for number in range(64))
            while running.feed.counts()[0]:
                peer = replace(peer, spec=replace(peer.spec, routes=routes, role=Role.HUB))
                await running.registry.update(peer)
                await asyncio.sleep(0)
                peer = replace(peer, spec=replace(peer.spec, routes=(), role=Role.AUTO))
                await running.registry.update(peer)
                await asyncio.sleep(0)

    on_gateway(body, limits=Limits(stall=0.2), backlog=1_000_000)


def test_a_compressed_body_is_taken_as_the_bytes_that_it_is() -> None:
    async def body(running: Running) -> None:
        bomb = gzip.compress(b" " * 50_000_000)
        assert len(bomb) < 64 * 1024
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                running.url + "/v1/join", data=bomb, headers={"Content-Encoding": "gzip"}
            ) as response,
        ):
            assert response.status == 400
            assert "not JSON" in (await response.json())["message"]

    on_gateway(body)
