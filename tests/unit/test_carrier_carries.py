"""Both ends of the carrier in one process, over real sockets: what goes on, and who stays outside."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace

import aiohttp
import pytest
from aiohttp import web
from scope_dataplane import carrier_hub
from scope_dataplane.batches import SOL_UDP, UDP_SEGMENT
from scope_dataplane.carrier_queue import QUEUE_BYTES, ROOM_BYTES, FrameQueue, Room

from scope.admission import Rate
from scope.carrier import CARRIER_PATH, MAX_FRAME, REFUSED_HEADER, Carried, Passage, encode_frame
from scope.model import Endpoint, PublicKey, RelayLimits
from scope.registry.http import PinnedKey
from tests.unit.carrier_fixture import (
    Machine,
    carried,
    certificate,
    connected,
    heard,
    machine,
    place,
    port_of,
    report_with,
    serving,
    tcp_port,
    until,
    with_way,
)


@pytest.fixture
def one() -> Iterator[Machine]:
    with machine() as made:
        yield made


@pytest.fixture
def two() -> Iterator[Machine]:
    with machine(2) as made:
        yield made


def wireguard(size: int, *, fill: int = 7) -> bytes:
    return struct.pack("<I", 4) + bytes([fill]) * (size - 4)


async def goes_both_ways(made: Machine, number: int = 0, *, text: bytes = b"there") -> None:
    """A datagram from a peer to the hub's WireGuard and one back, however often they are lost."""
    peer = made.peers[number].wireguard
    for program in (made.wireguard, peer):
        program.settimeout(0.1)
    try:
        for _ in range(300):
            peer.sendto(text, made.passage(number))
            try:
                while (await heard(made.wireguard))[0] != text:
                    pass
                made.wireguard.sendto(b"back", made.member(number))
                while (await heard(peer))[0] != b"back":
                    pass
            except TimeoutError:
                continue
            return
        pytest.fail("nothing goes both ways")
    finally:
        for program in (made.wireguard, peer):
            program.settimeout(30)


# --- datagrams ----------------------------------------------------------------------------------------------


def test_a_datagram_goes_to_the_hubs_port_and_the_answer_comes_from_where_it_was_sent(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()), carried(one.peer()) as peer:
            await connected(peer)
            for program, passage in (
                (one.wireguard, one.passage()),
                (one.relay, one.passage(relay=True)),
            ):
                one.peers[0].wireguard.sendto(b"there", passage)
                assert await heard(program) == (b"there", one.member())
                program.sendto(b"back", one.member())
                assert await heard(one.peers[0].wireguard) == (b"back", passage)

    asyncio.run(body())


@pytest.mark.parametrize("size", [1, 1452, 65507 - 64])
def test_datagrams_of_any_size_arrive_as_they_were(one: Machine, size: int) -> None:
    async def body() -> None:
        async with serving(one.hub()), carried(one.peer()) as peer:
            await connected(peer)
            sent = bytes(number % 251 for number in range(size))
            one.peers[0].wireguard.sendto(sent, one.passage())
            assert (await heard(one.wireguard))[0] == sent

    asyncio.run(body())


def test_a_batch_arrives_as_the_datagrams_that_it_was(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()), carried(one.peer()) as peer:
            await connected(peer)
            sent = [wireguard(1000, fill=number) for number in range(20)] + [wireguard(77)]
            segments = [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1000))]
            one.peers[0].wireguard.sendmsg([b"".join(sent)], segments, 0, one.passage())
            assert [(await heard(one.wireguard))[0] for _ in sent] == sent

    asyncio.run(body())


def test_datagrams_of_mixed_sizes_and_senders_keep_their_borders_and_ports(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()), carried(one.peer()) as peer:
            await connected(peer)
            sizes = [100, 100, 60, 100, 200, 200, 1, 32, 32, 900]
            sent = [wireguard(max(4, size), fill=at)[:size] for at, size in enumerate(sizes)]
            for at, datagram in enumerate(sent):
                (one.wireguard, one.relay)[at % 2].sendto(datagram, one.member())
            got = [await heard(one.peers[0].wireguard) for _ in sent]
            for relay in (False, True):
                came = [datagram for datagram, source in got if source == one.passage(relay=relay)]
                assert came == sent[int(relay) :: 2]

    asyncio.run(body())


def test_only_the_machines_own_wireguard_is_carried(one: Machine) -> None:
    async def body() -> None:
        stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with stranger:
            async with serving(one.hub()), carried(one.peer()) as peer:
                await connected(peer)
                stranger.sendto(b"from a program that is none of ours", one.passage())
                one.peers[0].wireguard.sendto(b"there", one.passage())
                assert await heard(one.wireguard) == (b"there", one.member())
                stranger.sendto(b"the same at the hub", one.member())
                one.wireguard.sendto(b"back", one.member())
                assert await heard(one.peers[0].wireguard) == (b"back", one.passage())

    asyncio.run(body())


def test_what_is_for_a_port_that_is_neither_wireguards_nor_a_relays_goes_nowhere(one: Machine) -> None:
    async def body() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
            service.bind(("127.0.0.1", 0))
            service.setblocking(False)
            reached = Passage(Endpoint.parse("127.83.255.1:26444"), port_of(service))
            part = one.peer()
            part = with_way(part, passages=(*part.hubs[0].passages, reached))
            async with serving(one.hub()) as hub, carried(part) as peer:
                await connected(peer)
                one.peers[0].wireguard.sendto(b"x", place(reached.endpoint))
                await until(lambda: hub.report()[0].carried.dropped == 1, "the hub dropped it")
                with pytest.raises(BlockingIOError):
                    service.recv(10)

    asyncio.run(body())


# --- who may ------------------------------------------------------------------------------------------------


def test_a_hub_with_another_certificate_is_not_spoken_to(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()) as hub, carried(one.peer(pin=bytes(32))) as peer:
            report = await report_with(peer, "another certificate")
            assert report.address is None
            assert hub.report() == () and hub.refused == 0  # it never saw the ticket

    asyncio.run(body())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("forged", "not signed"),
        ("expired", "expired"),
        ("of another mesh", "not signed"),
        ("for another hub", "not signed"),
        ("of a stranger", "not a member"),
        ("nonsense", "not a ticket"),
    ],
)
def test_a_wrong_ticket_opens_nothing_and_the_peer_is_told_why(two: Machine, kind: str, reason: str) -> None:
    first, second = two.peers
    ticket = {
        "forged": first.ticket()[:-10] + "AAAAAAAAAA",
        "expired": first.ticket(lifetime=-1),
        "of another mesh": first.ticket(mesh="another"),
        "for another hub": first.ticket(hub=PublicKey(b"\x11" * 32)),
        "of a stranger": second.ticket(),
        "nonsense": "nonsense",
    }[kind]

    async def body() -> None:
        part = two.hub()
        part = replace(part, members=part.members[:1])
        async with serving(part) as hub, carried(two.peer(ticket=ticket)) as peer:
            report = await report_with(peer, reason)
            assert report.address is None
            assert hub.refused >= 1 and hub.report() == ()

    asyncio.run(body())


def test_a_member_that_is_removed_is_cut_off_and_the_others_are_not(two: Machine) -> None:
    async def body() -> None:
        whole = two.hub()
        async with serving(whole) as hub, carried(two.peer(0)) as gone, carried(two.peer(1)) as stays:
            await connected(gone)
            await connected(stays)
            await hub.follow(replace(whole, members=whole.members[1:]))
            assert "not a member" in (await report_with(gone, "not a member")).reason
            await goes_both_ways(two, 1)
            assert [report.peer for report in hub.report()] == [two.peers[1].key]

    asyncio.run(body())


def test_a_member_has_one_connection_and_the_newest_counts(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()) as hub, aiohttp.ClientSession() as session:

            async def connect() -> aiohttp.ClientWebSocketResponse:
                return await session.ws_connect(
                    f"https://127.0.0.1:{one.port}{CARRIER_PATH}",
                    ssl=PinnedKey(certificate()[2]),
                    headers={"Authorization": f"Bearer {one.peers[0].ticket()}"},
                    max_msg_size=MAX_FRAME,
                )

            first = await connect()
            second = await connect()
            assert (await first.receive()).type is aiohttp.WSMsgType.CLOSE
            await second.send_bytes(encode_frame(port_of(one.wireguard), 5, b"there"))
            assert await heard(one.wireguard) == (b"there", one.member())
            one.wireguard.sendto(b"back", one.member())
            assert (await second.receive()).data == encode_frame(port_of(one.wireguard), 4, b"back")
            assert [report.connected for report in hub.report()] == [True]
            await first.close()
            await second.close()

    asyncio.run(body())


def test_a_connection_that_ends_while_the_next_one_begins_takes_nothing_from_it(
    one: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with serving(one.hub()) as hub, aiohttp.ClientSession() as session:

            async def connect() -> aiohttp.ClientWebSocketResponse:
                return await session.ws_connect(
                    f"https://127.0.0.1:{one.port}{CARRIER_PATH}",
                    ssl=PinnedKey(certificate()[2]),
                    headers={"Authorization": f"Bearer {one.peers[0].ticket()}"},
                )

            first = await connect()
            await until(lambda: hub.report()[0].connected, "the first is there")
            prepare = web.WebSocketResponse.prepare

            async def slowly(self: web.WebSocketResponse, request: web.BaseRequest) -> object:
                await first.close()
                await until(lambda: _connection(hub) is None, "the first is gone")
                return await prepare(self, request)

            monkeypatch.setattr(web.WebSocketResponse, "prepare", slowly)
            second = await connect()
            await second.send_bytes(encode_frame(port_of(one.wireguard), 5, b"there"))
            assert await heard(one.wireguard) == (b"there", one.member())
            await second.close()

    asyncio.run(body())


def test_a_ticket_that_ends_ends_the_connection_unless_a_new_one_came(
    two: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with serving(two.hub()) as hub, carried(two.peer(0)) as renews, carried(two.peer(1)) as sleeps:
            await connected(renews)
            await connected(sleeps)
            later = 3600
            renews.follow(with_way(two.peer(0), ticket=two.peers[0].ticket(lifetime=86400 + later)))
            await goes_both_ways(two, 0)  # what is sent after the ticket arrives after it
            real = time.time
            monkeypatch.setattr(time, "time", lambda: real() + 86400 + later / 2)
            await hub.look()
            await report_with(sleeps, "expired")
            assert renews.report()[0].address is not None
            await goes_both_ways(two, 0)

    asyncio.run(body())


def test_a_message_that_is_no_frame_ends_the_connection(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()), aiohttp.ClientSession() as session:
            connection = await session.ws_connect(
                f"https://127.0.0.1:{one.port}{CARRIER_PATH}",
                ssl=PinnedKey(certificate()[2]),
                headers={"Authorization": f"Bearer {one.peers[0].ticket()}"},
            )
            await connection.send_bytes(b"no")
            message = await connection.receive()
            assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1002)
            await connection.close()

    asyncio.run(body())


def test_one_address_that_asks_too_often_is_put_off(one: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_hub, "ATTEMPTS", Rate(0.001, 5))

    async def body() -> None:
        async with serving(one.hub()), aiohttp.ClientSession() as session:
            said = []
            for _ in range(7):
                async with session.get(
                    f"https://127.0.0.1:{one.port}{CARRIER_PATH}", ssl=PinnedKey(certificate()[2])
                ) as answer:
                    said.append((answer.status, answer.headers[REFUSED_HEADER]))
            assert said[:5] == [(403, "no ticket")] * 5
            assert [code for code, _ in said[5:]] == [429, 429]

    asyncio.run(body())


# --- how much -----------------------------------------------------------------------------------------------


def test_a_member_that_floods_does_not_stop_another(two: Machine) -> None:
    async def body() -> None:
        limits = RelayLimits(pair=20_000)
        async with (
            serving(two.hub(limits=limits)) as hub,
            carried(two.peer(0)) as floods,
            carried(two.peer(1)) as other,
        ):
            await connected(floods)
            await connected(other)
            for _ in range(3000):
                two.peers[0].wireguard.sendto(bytes(1400), two.passage(0, relay=True))
            await goes_both_ways(two, 1)
            of = two.peers[0].key
            await until(lambda: _counted(hub, of).dropped > 0, "the hub drops")
            assert _counted(hub, of).received_bytes < 3000 * 1400 / 2

    asyncio.run(body())


def _counted(hub: carrier_hub.HubCarrier, peer: PublicKey) -> Carried:
    return next(report.carried for report in hub.report() if report.peer == peer)


def test_a_queue_drops_the_oldest_and_never_grows() -> None:
    queue = FrameQueue(Room())
    frames = [(bytes([number]) * 60_000, 3) for number in range(20)]
    for frame in frames:
        queue.put(*frame)
    kept = []
    while (taken := queue.take()) is not None:
        kept.append(taken)
    assert sum(len(frame) for frame, _ in kept) <= QUEUE_BYTES
    assert kept == frames[-len(kept) :]
    assert queue.dropped == 3 * (len(frames) - len(kept))
    queue.put(b"x" * 100, 2)
    queue.clear()
    assert queue.take() is None and queue.dropped == 3 * (len(frames) - len(kept)) + 2


def test_what_waits_for_all_members_together_is_bounded_and_the_longest_queue_pays() -> None:
    room = Room(100_000)
    small, large, late = (FrameQueue(room) for _ in range(3))
    for _ in range(10):
        small.put(bytes(1000), 1)
        large.put(bytes(8000), 1)
    assert small.dropped == large.dropped == 0
    late.put(bytes(40_000), 5)
    assert room.bytes == small.bytes + large.bytes + late.bytes <= 100_000
    assert (small.dropped, large.dropped, late.dropped) == (0, 5, 0)


def test_no_number_of_slow_members_fills_a_hubs_memory() -> None:
    room = Room()
    queues = [FrameQueue(room) for _ in range(2 * ROOM_BYTES // QUEUE_BYTES)]
    for queue in queues:
        for _ in range(QUEUE_BYTES // 60_000):
            queue.put(bytes(60_000), 1)
    assert room.bytes == sum(queue.bytes for queue in queues) <= ROOM_BYTES
    assert all(queue.bytes for queue in queues), "a member has nothing any more"
    for queue in queues:
        queue.clear()
    assert room.bytes == 0
    queues[0].put(bytes(60_000), 1)
    assert queues[0].take() == (bytes(60_000), 1)


def test_one_long_frame_takes_the_place_of_many_short_ones() -> None:
    room = Room(100_000)
    short, long = FrameQueue(room), FrameQueue(room)
    for _ in range(1000):
        short.put(bytes(100), 1)
    long.put(bytes(40_000), 1)
    assert (short.bytes, long.bytes) == (50_000, 40_000)


# --- coming back --------------------------------------------------------------------------------------------


def test_a_peer_comes_back_by_itself_when_the_hubs_carrier_does(one: Machine) -> None:
    async def body() -> None:
        async with carried(one.peer()) as peer:
            async with serving(one.hub()):
                await connected(peer)
                await goes_both_ways(one)
            await until(lambda: peer.report()[0].address is None, "the peer knows")
            async with serving(one.hub()):
                await connected(peer)
                await goes_both_ways(one)

    asyncio.run(body())


def test_the_next_address_of_a_hub_is_tried_where_one_leads_nowhere(one: Machine) -> None:
    async def body() -> None:
        closed = Endpoint.parse(f"127.0.0.1:{tcp_port()}")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen(1)  # takes connections, and says nothing
            mute = Endpoint.parse(f"127.0.0.1:{port_of(silent)}")
            part = one.peer()
            good = part.hubs[0].addresses[0]
            async with serving(one.hub()), carried(with_way(part, addresses=(closed, mute, good))) as peer:
                await connected(peer)
                assert peer.report()[0].address == good
                await goes_both_ways(one)

    asyncio.run(body())


def test_a_network_that_changed_makes_a_connection_anew(
    one: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with serving(one.hub()) as hub, carried(one.peer()) as peer:
            await connected(peer)
            peer.look()
            assert peer.report()[0].address is not None
            with monkeypatch.context() as patched:
                patched.setattr("scope_dataplane.carrier_peer._leaves_from", lambda *_, **__: "192.0.2.7")
                before = _connection(hub)
                peer.look()
                await until(lambda: _connection(hub) not in (None, before), "there is another connection")
            await goes_both_ways(one)

    asyncio.run(body())


def _connection(hub: carrier_hub.HubCarrier) -> object:
    return next(iter(hub._carried.values())).connection


def test_a_renewed_certificate_cuts_nobody_off(one: Machine) -> None:
    async def body() -> None:
        async with serving(one.hub()) as hub, carried(one.peer()) as peer:
            await connected(peer)
            before = _connection(hub)
            text, key, pin = certificate(1)
            await hub.follow(replace(one.hub(), certificate=text, key=key))
            await goes_both_ways(one)
            assert _connection(hub) is before
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"https://127.0.0.1:{one.port}/x", ssl=PinnedKey(pin)) as answer,
            ):
                assert answer.status == 503

    asyncio.run(body())


def test_a_port_that_is_taken_is_told_and_tried_again(one: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_hub, "BIND_INTERVAL", 0.0)

    async def body() -> None:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as other:
            other.bind(("::", one.port))
            other.listen(1)
            async with serving(one.hub()) as hub:
                assert hub.reason == f"TCP port {one.port}: Address already in use"
                other.close()
                await hub.look()
                assert hub.is_listening
                assert hub.reason == ""

    asyncio.run(body())


def test_a_passage_that_is_taken_is_told_and_the_others_serve(one: Machine) -> None:
    async def body() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(one.passage(relay=True))
            async with serving(one.hub()), carried(one.peer()) as peer:
                await connected(peer)
                await goes_both_ways(one)
                assert "in use" in peer.report()[0].reason
                other.close()
                peer.look()
                assert peer.report()[0].reason == ""

    asyncio.run(body())
