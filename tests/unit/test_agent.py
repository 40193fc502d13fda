"""The whole agent: what one input costs, what strangers and members can make it keep, what status says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface

import pytest
from lab.nat import Nat
from scope_agent.inputs import CommandArrived, DatagramArrived, FactArrived, Socket
from scope_agent.paths.pair import Pair
from scope_agent.paths.routes import MAX_ROUTES
from scope_agent.state import make_identity

from scope.channel import Channel
from scope.model import (
    Assignment,
    Candidate,
    CandidateKind,
    Endpoint,
    Kind,
    Mapping,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    Revision,
    Secret,
)
from scope.registry.port import Listed, Put
from scope.wire import Ping
from tests.sim.world import Machine, World


def _large(count: int) -> tuple[World, Machine, list[Peer], Revision]:
    """An agent that knows `count` peers, none of which answers; all are declared unreachable."""
    world = World(1)
    machine = world.peer(Nat.NONE)
    peers = []
    for number in range(count):
        endpoint = Endpoint(IPv4Address(f"203.{number // 250}.{number % 250}.5"), 20000)
        peers.append(
            Peer(
                Meta(f"far{number}", uid=f"far-{number}"),
                PeerSpec("mesh"),
                PeerReport(make_identity(world.bytes).public, (Candidate(endpoint, CandidateKind.HOST),)),
                Assignment((IPv4Interface(f"10.200.{10 + number // 250}.{number % 250}/16"),), online=True),
            )
        )
    world.run(3.0)
    revision = world.registry.store.revision
    everyone = (world.registry.peer(machine), *peers)
    machine.give(FactArrived(Listed(Kind.PEER, revision, everyone)))
    world.run(90.0)
    return world, machine, peers, revision


def _calls(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """How often pairs are asked for their timer or their view."""
    counts: Counter[str] = Counter()
    for name in ("get_timer", "view"):
        original = getattr(Pair, name)

        def counted(*args: object, _name: str = name, _original: Callable[..., object] = original) -> object:
            counts[_name] += 1
            return _original(*args)

        monkeypatch.setattr(Pair, name, counted)
    run()
    monkeypatch.undo()
    return counts.total()


def test_an_input_about_one_peer_costs_the_same_in_a_mesh_of_ten_and_of_two_hundred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costs = []
    for count in (10, 200):
        world, machine, peers, revision = _large(count)
        report = peers[3].report
        assert report is not None
        later = Revision(revision.registry, revision.number + 1)
        moved = Candidate(Endpoint.parse("203.0.113.200:5000"), CandidateKind.HOST)
        news = Peer(
            peers[3].meta, peers[3].spec, PeerReport(report.keys, (moved,), Mapping.NONE), peers[3].assignment
        )
        costs.append(_calls(monkeypatch, lambda: machine.give(FactArrived(Put(news, later)))))  # noqa: B023
        assert world.until(lambda: True, within=0.1) == 0.0
    assert costs[0] == costs[1] <= 6


def test_unreachable_peers_are_ever_more_seldom_searched() -> None:
    world, machine, _, _ = _large(100)
    world.run(2000.0)
    before = machine.sent["Send"]
    world.run(600.0)
    assert machine.sent["Send"] - before < 100 * 30  # about one search each in ten minutes


def test_a_member_that_speaks_from_thousands_of_places_is_kept_in_bounds() -> None:
    world = World(2)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    world.run(20.0)
    assert a.agent is not None and b.agent is not None
    right = a.endpoint_of(b)
    for number in range(3_000):
        source = Endpoint(IPv4Address(0x0B000000 + number), 4000)
        data = b.agent._channel.seal(a.identity.public.probe, Ping(number, has_session=True, received=0))
        a.give(DatagramArrived(data, Socket(source)))
    assert len(a.agent._paths._pairs[b.key]._routes) <= MAX_ROUTES
    assert len(a.agent._paths._agenda._heap) < 1000
    world.run(30.0)
    assert a.endpoint_of(b) == right
    assert world.is_direct(a, b)


def test_a_datagram_forwarded_from_a_spoofed_source_redirects_nothing() -> None:
    world = World(3)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    right = b.endpoint_of(a)
    spoofed = Endpoint.parse("198.18.250.66:666")
    original = b.arrived
    b.arrived = lambda source, port, payload: original(  # type: ignore[method-assign]
        spoofed if isinstance(payload, bytes) else source, port, payload
    )
    a.stream(b, rate=10.0, seconds=20.0)
    for _ in range(20):
        world.run(1.0)
        assert b.endpoint_of(a) == right


def test_bytes_of_strangers_are_dropped_and_counted() -> None:
    world = World(4)
    a = world.peer(Nat.NONE)
    world.run(2.0)
    stranger = Channel(secret=Secret(world.bytes(32)), boot_id=world.bytes(16))
    stranger.set_correspondents(frozenset({a.identity.public.probe}))
    before, dropped = a.sent["Send"], _dropped(a)
    hello = stranger.seal(a.identity.public.probe, Ping(1, has_session=False, received=0))
    for data in (b"", b"\x01" * 148, world.bytes(500), hello):
        a.give(DatagramArrived(data, Socket(Endpoint.parse("203.0.113.9:1"))))
    assert a.sent["Send"] == before  # nobody unknown gets an answer
    assert _dropped(a) == dropped + 4


def _dropped(machine: Machine) -> int:
    machine.give(CommandArrived(1, "status"))
    status = machine.replies[-1].value["status"]
    assert isinstance(status, dict)
    return int(status["dropped"])


def test_status_is_plain_json_without_a_secret_and_an_unknown_command_says_what_is_known() -> None:
    world = World(5)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    a.give(CommandArrived(1, "status"))
    text = json.dumps(dict(a.replies[-1].value))
    assert '"path": "Direct"' in text and b.name in text
    a.give(CommandArrived(2, "dance"))
    assert "status" in str(a.replies[-1].value["error"])


def _candidates(machine: Machine, name: str) -> list[dict[str, object]]:
    machine.give(CommandArrived(3, "explain", name))
    told = machine.replies[-1].value["candidates"]
    assert isinstance(told, list)
    json.dumps(told)
    return told


def test_a_path_is_explained_by_every_candidate_with_its_result_and_times() -> None:
    world = World(8)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    world.run(4.0)
    by_kind = {each["kind"]: each for each in _candidates(a, b.name)}
    reflexive, host = by_kind["Reflexive"], by_kind["Host"]
    assert (reflexive["result"], reflexive["endpoint"]) == ("InUse", str(a.endpoint_of(b)))
    assert isinstance(reflexive["rttMs"], float) and isinstance(reflexive["answeredSeconds"], float)
    assert host["result"] == "NoAnswer"  # an address of the other side's own network
    assert isinstance(host["pingedSeconds"], float) and host["answeredSeconds"] is None
    assert isinstance(host["pings"], int) and host["pings"] > 0


def test_what_was_never_tried_says_why_and_nobody_is_explained_as_nobody() -> None:
    world = World(9)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    inside = Endpoint(IPv4Address("10.200.0.77"), 7)
    world.registry.change_peer(b, replace(world.registry.peer(b).spec, endpoints=(inside,)))
    world.until(lambda: world.is_direct(a, b), within=5.0)
    [static] = [each for each in _candidates(a, b.name) if each["kind"] == "Static"]
    assert (static["result"], static["why"]) == ("Refused", "inside the mesh's own prefix")
    assert (static["pings"], static["pingedSeconds"]) == (0, None)
    a.give(CommandArrived(4, "explain", "home.nobody"))
    assert a.replies[-1].value == {"ok": False, "error": "there is no other peer 'home.nobody'"}


def test_a_route_that_fell_silent_and_a_relay_are_told_apart() -> None:
    world = World(10)
    world.hub()
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    world.until(lambda: world.is_relayed(a, b), within=10.0)
    world.run(3.0)
    relays = [each for each in _candidates(a, b.name) if each["kind"] == "Relay"]
    assert [each["result"] for each in relays] == ["InUse"] and relays[0]["hub"]
    b.switch_off()
    a.stream(b, rate=2.0, seconds=25.0)  # who sends nothing notices nothing
    world.run(30.0)
    [relay] = [each for each in _candidates(a, b.name) if each["kind"] == "Relay"]
    assert relay["result"] in ("Silent", "NotAsked")
    assert isinstance(relay["answeredSeconds"], float) and relay["answeredSeconds"] > 25.0
