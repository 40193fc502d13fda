"""The agent of a device that something else manages: two in virtual time, with devices that are models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from scope_agent.peers_file import parse_peers, render_line
from scope_agent.psk_agent import plan_alone
from scope_agent.wireguard.device import NO_PSK, SetPsk

from scope.ctl.local import parse_status
from scope.ctl.metrics import metrics_text
from scope.model import Fingerprint, PostQuantum, PostQuantumMode, PublicKey
from scope.resources import InvalidResource
from tests.unit.foreign_pair import MANAGER, Side, World


def _keyed() -> tuple[World, Side, Side]:
    world = World()
    for side in world.sides:
        side.start()
    world.until(lambda: all(side.epoch() == 1 for side in world.sides), within=300.0)
    return world, *world.sides  # type: ignore[return-value]


def test_two_agents_that_know_each_others_lines_key_their_devices() -> None:
    _, first, second = _keyed()
    assert first.psk == second.psk not in (MANAGER, NO_PSK)
    assert first.status()["reached"] is True and first.status()["reason"] == ""


def test_a_silent_peer_is_asked_once_a_minute_and_left_as_it_is() -> None:
    world = World()
    first, _ = world.sides
    first.start()
    world.run(300.0)
    first.sent.clear()
    world.run(3600.0)
    assert 55 <= len(first.sent) <= 65
    assert first.psk == MANAGER and "no agent answers" in str(first.status()["reason"])


def test_another_identity_than_the_named_one_is_said_and_changes_nothing() -> None:
    world = World()
    first, second = world.sides
    first.start(replace(second.line(), identity=Fingerprint(bytes(32))))
    second.start()
    world.until(lambda: "another identity" in str(first.status()["reason"]), within=60.0)
    world.run(300.0)
    assert first.psk == second.psk == MANAGER


def test_a_key_that_the_device_does_not_have_is_said() -> None:
    world = World()
    first, second = world.sides
    first.start(replace(second.line(), wireguard=PublicKey(bytes([5] * 32))))
    world.run(20.0)
    assert "wg0 has no peer with this public key" in str(first.status()["reason"])


def test_an_interface_that_vanishes_is_said_and_keyed_again_when_it_is_back() -> None:
    world, first, second = _keyed()
    key = second.psk
    for _ in range(5):
        first.is_up = False
        world.run(20.0)
        (condition,) = first.ask("status")["status"]["conditions"]  # type: ignore[index]
        assert "there is no interface wg0" in condition["message"]
        first.is_up, first.psk = True, MANAGER
        world.run(20.0)
        assert first.psk == second.psk == key
    assert first.status()["reason"] == ""


def test_a_device_that_was_made_anew_unseen_has_no_session_and_proves_nothing() -> None:
    world, first, second = _keyed()
    first.ask("rotate")
    world.until(lambda: first.psk == second.psk and first.epoch() == 1 and not world.is_laid(), within=1.0)
    world.until(world.is_laid, within=200.0)
    for side in world.sides:
        side.psk, side.stamp = MANAGER, None
    world.run(20.0)
    assert first.epoch() == second.epoch() == 1
    assert first.status()["lastHandshakeSeconds"] is None
    world.until(lambda: first.epoch() == second.epoch() == 2, within=300.0)


@pytest.mark.parametrize("who", [(1,), (2,), (1, 2)], ids=["one", "the other", "both"])
@pytest.mark.parametrize("is_rotating", [False, True], ids=["at rest", "amid a rotation"])
def test_machines_that_boot_have_their_keys_again_and_the_tunnel_comes_back(
    who: tuple[int, ...], is_rotating: bool
) -> None:
    world, first, second = _keyed()
    key = first.psk
    if is_rotating:
        first.ask("rotate")
        world.until(world.is_laid, within=300.0)
        key = first.psk
    for side in (world.sides[number - 1] for number in who):
        side.psk, side.stamp = MANAGER, None  # the manager makes its interface anew
        side.start()
    world.run(5.0)
    assert first.psk == second.psk == key
    world.rekey()
    assert first.stamp == second.stamp
    if is_rotating:
        world.until(lambda: first.epoch() == second.epoch() == 2, within=600.0)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("after", [0.0, 0.03, 0.1, 1.0, 60.0, 119.0])
def test_a_reload_of_the_manager_amid_a_rotation_is_put_right(number: int, after: float) -> None:
    world, first, second = _keyed()
    world.run(70.0)  # from here on a new key waits for a young session
    first.ask("rotate")
    world.until(world.is_laid, within=100.0)
    world.run(after)
    world.sides[number - 1].psk = MANAGER  # as `wg syncconf` does, whose session goes on
    world.run(20.0)
    assert first.psk == second.psk != MANAGER
    world.until(lambda: first.epoch() == second.epoch() == 2, within=700.0)
    assert first.stamp == second.stamp and "reason" in first.status() and first.status()["reason"] == ""


def test_a_device_with_another_mark_is_another_device() -> None:
    world, first, _ = _keyed()
    first.fwmark = 7
    world.run(20.0)
    assert first.agent is not None and "start this agent again" in first.agent.replaced


@pytest.mark.parametrize("number", [1, 2])
def test_leaving_takes_both_sides_back_and_is_over_then(number: int) -> None:
    world, *_ = _keyed()
    leaving = world.sides[number - 1]
    assert leaving.ask("leave")["ok"] is True
    assert leaving.agent is not None
    agent = leaving.agent
    world.until(lambda: agent.has_left, within=600.0)
    assert leaving.psk == leaving.other.psk == MANAGER
    leaving.agent = None
    world.run(300.0)
    assert leaving.other.psk == MANAGER


def test_leaving_names_who_is_out_of_reach_and_changes_nothing_unless_forced() -> None:
    world, first, second = _keyed()
    key, world.is_cut = first.psk, True
    world.run(60.0)
    answer = first.ask("leave")
    assert answer["ok"] is False and "out of reach: m2" in str(answer["error"])
    world.run(60.0)
    assert first.psk == second.psk == key
    assert first.ask("leave-forced") == {"ok": True, "away": "m2"}
    agent = first.agent
    assert agent is not None
    world.until(lambda: agent.has_left, within=30.0)
    assert first.psk == MANAGER and second.psk == key


def test_scopectl_reads_what_the_agent_says_of_its_keys() -> None:
    world, first, _ = _keyed()
    world.run(60.0)
    said = json.loads(json.dumps(first.ask("status")["status"]))
    status = parse_status(said)
    (peer,) = status.peers
    assert (status.mesh, status.device, peer.name, peer.path) == ("@wg0", "wg0", "m2", "Direct")
    assert (peer.psk_epoch, peer.psk_suite, peer.psk_trust, peer.psk_reason) == (1, 1, "Pinned", "")
    assert peer.psk_age is not None and 0.0 < peer.psk_age < 600.0
    assert 'scope_peer_key_epoch{mesh="@wg0",peer="m2"} 1.0' in metrics_text(status)


def test_without_an_agent_only_keys_of_ours_give_way_to_the_managers() -> None:
    world, first, second = _keyed()
    agent = first.agent
    assert agent is not None
    world.run(1.0)
    (record,) = first.disk.values()
    observed = agent.observed  # type: ignore[union-attr]
    assert observed is not None and observed.peers[second.key].psk == first.psk
    assert plan_alone(observed, first.disk) == (SetPsk(second.key, MANAGER),)
    unproved = replace(record, current=None, next=record.current, active=True)
    assert plan_alone(observed, {second.key: unproved}) == (SetPsk(second.key, MANAGER),)
    assert plan_alone(observed, {second.key: replace(record, manager=None)}) == ()
    for peers in ({}, {second.key: replace(observed.peers[second.key], psk=MANAGER)}):
        assert plan_alone(replace(observed, peers=peers), first.disk) == ()


def test_a_nudge_goes_to_an_address_that_is_the_peers_alone() -> None:
    world, first, second = _keyed()
    first.ask("rotate")
    world.until(lambda: first.epoch() == second.epoch() == 2, within=600.0)
    assert set(first.nudged) <= {"10.7.0.2"} and set(second.nudged) <= {"10.7.0.1"}
    assert first.nudged or second.nudged


# --- the peers file -----------------------------------------------------------------------------------------


def test_a_line_is_read_back_as_it_was_printed() -> None:
    line = replace(World().sides[0].line(), name='odd "name"\\')
    parsed = parse_peers(yaml.safe_load("rotationInterval: 10m\npeers:\n" + render_line(line)))
    assert parsed.peers == {line.wireguard: line}
    assert parsed.policy == PostQuantum(PostQuantumMode.PREFERRED, 600.0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"publicKey": "abc"}, "peers[0].publicKey"),
        ({"probeKey": None}, "peers[0].probeKey"),
        ({"identity": "00"}, "peers[0].identity"),
        ({"endpoint": "192.0.2.1:1"}, "peers[0].endpoint"),
        ({"name": ""}, "peers[0].name"),
    ],
)
def test_a_wrong_line_is_refused_with_the_place_and_what_is_allowed(
    change: dict[str, object], named: str
) -> None:
    line = yaml.safe_load(render_line(World().sides[0].line()))[0]
    with pytest.raises(InvalidResource) as refused:
        parse_peers({"peers": [line | change]})
    assert named in str(refused.value)


@pytest.mark.parametrize("document", [None, [], {}, {"peers": []}, {"peers": [1]}, {"peers": "a"}])
def test_what_is_no_peers_file_is_refused(document: object) -> None:
    with pytest.raises(InvalidResource):
        parse_peers(document)


def test_two_lines_of_one_machine_are_refused() -> None:
    line = yaml.safe_load(render_line(World().sides[0].line()))[0]
    with pytest.raises(InvalidResource, match="a second"):
        parse_peers({"peers": [line, line]})
