"""Post-quantum keys between whole agents: over the real channel, into devices that hold both sides to it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from lab.nat import Nat
from scope_agent.inputs import CommandArrived

from scope.model import PeerReport, PostQuantum, PostQuantumMode
from tests.sim.world import Machine, World


def _world(mode: PostQuantumMode, *, seed: int = 1, interval: float = 3600.0) -> World:
    world = World(seed)
    _ask(world, mode, interval=interval)
    return world


def _ask(world: World, mode: PostQuantumMode, *, interval: float = 3600.0) -> None:
    world.registry.change_mesh(lambda spec: replace(spec, post_quantum=PostQuantum(mode, interval)))


def _epoch(machine: Machine, other: Machine) -> int:
    assert machine.agent is not None
    status: Any = machine.agent.status(machine.world.now)
    (found,) = [peer["psk"]["epoch"] for peer in status["peers"] if peer["name"] == other.name]
    return int(found or 0)


def _report(world: World, machine: Machine) -> PeerReport:
    report = world.registry.peer(machine).report
    assert report is not None
    return report


def _is_keyed(a: Machine, b: Machine, epoch: int = 1) -> bool:
    """Whether both show the same proved key, from `epoch` on, both devices have it, and a session stands."""
    if a.agent is None or b.agent is None or b.key not in a.device.peers or a.key not in b.device.peers:
        return False
    psk = a.device.peers[b.key].psk
    session = a.device.peers[b.key].session
    return (
        psk is not None
        and psk == b.device.peers[a.key].psk
        and _epoch(a, b) == _epoch(b, a) >= epoch
        and session is not None
        and a.world.now - session.born < 180.0
    )


def _lost(a: Machine, b: Machine, numbers: range) -> int:
    """Of the packets with these numbers that `a` sent, how many never arrived."""
    arrived = {packet.number for _, sender, packet in b.received if sender == a.key}
    return len(set(numbers) - arrived)


def test_two_agents_agree_on_a_key_that_the_next_handshake_proves() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    a.stream(b, rate=10.0, seconds=150.0)
    world.until(lambda: _is_keyed(a, b), within=145.0)
    assert _report(world, a).identity == a.hybrid.public.fingerprint()
    world.run(10.0)
    assert _lost(a, b, range(1, 1300)) == 0


def test_the_report_says_which_key_and_since_when_and_not_the_key() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=200.0)
    world.run(60.0)
    report = _report(world, a)
    assert report.post_quantum == 1
    assert [link.psk and link.psk.epoch for link in report.links] == [1]
    psk = a.device.peers[b.key].psk
    assert psk is not None and psk.raw.hex() not in repr(report)


def test_required_lets_no_packet_pass_before_the_key_is_proved_and_is_quick_about_it() -> None:
    world = _world(PostQuantumMode.REQUIRED)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    while not (a.device.peers.get(b.key) and a.device.peers[b.key].allowed_ips):
        world.run(0.01)
        assert world.now < 8.0, world.describe()
    assert a.device.peers[b.key].psk is not None
    world.until(lambda: world.is_direct(a, b) and _is_keyed(a, b), within=8.0)
    a.ping(b, 7)
    world.run(1.0)
    assert _lost(a, b, range(7, 8)) == 0


def test_off_says_nothing_of_keys() -> None:
    world = _world(PostQuantumMode.OFF)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.run(200.0)
    assert a.device.peers[b.key].psk is None and _report(world, a).identity is None
    assert not {"SavePsk", "SetUpKeys"} & set(a.sent)


def test_a_running_mesh_may_begin_to_ask_for_keys_and_cease_to() -> None:
    world = World(5)
    a, b = world.peer(Nat.NONE), world.peer(Nat.PORT_RESTRICTED)
    world.run(150.0)
    _ask(world, PostQuantumMode.PREFERRED, interval=300.0)
    world.until(lambda: _is_keyed(a, b), within=250.0)
    _ask(world, PostQuantumMode.OFF, interval=300.0)
    epoch = _epoch(a, b)
    world.run(1000.0)
    assert _is_keyed(a, b) and _epoch(a, b) == epoch
    a.restart()
    world.run(400.0)
    assert _is_keyed(a, b) and _epoch(a, b) == epoch


def test_keys_are_rotated_through_a_hub_while_packets_pass() -> None:
    world = _world(PostQuantumMode.PREFERRED, interval=300.0)
    world.hub()
    a, b = world.peer(Nat.SYMMETRIC), world.peer(Nat.SYMMETRIC)
    world.until(lambda: world.is_relayed(a, b), within=10.0)
    a.stream(b, rate=5.0, seconds=1500.0)
    world.until(lambda: _is_keyed(a, b, 3), within=1400.0)
    world.run(5.0)
    sent = int((world.now - 10.0) * 5)
    assert _lost(a, b, range(10, sent - 30)) == 0


def test_a_rotation_by_hand_is_one_command() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=200.0)
    a.give(CommandArrived(1, "rotate", b.name))
    assert a.replies[-1].value == {"ok": True, "peers": 1}
    world.until(lambda: _is_keyed(a, b, 2), within=200.0)


def test_keys_go_on_rotating_with_the_registry_gone() -> None:
    world = _world(PostQuantumMode.PREFERRED, interval=300.0)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=200.0)
    world.registry.go_down()
    a.restart()
    world.until(lambda: _is_keyed(a, b, 3), within=1300.0)


def test_a_machine_that_boots_has_its_key_back_and_speaks_no_other() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=200.0)
    world.run(30.0)
    a.switch_off()
    world.run(5.0)
    a.switch_on()
    world.until(lambda: world.is_direct(a, b) and _is_keyed(a, b), within=30.0)


def test_a_machine_that_can_make_no_keys_any_more_boots_with_those_it_has() -> None:
    world = _world(PostQuantumMode.REQUIRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=30.0)
    world.run(10.0)
    a.switch_off()
    a.key_trouble = "the library is gone"
    world.run(5.0)
    a.switch_on()
    world.until(lambda: world.is_direct(a, b) and _is_keyed(a, b), within=30.0)
    world.run(1.0)
    assert a.agent is not None
    assert "the library is gone" in str(a.agent.status(world.now)["conditions"])
    a.give(CommandArrived(1, "rotate", b.name))
    assert a.replies[-1].value == {"ok": False, "error": "the library is gone"}


def test_agents_that_crash_at_any_output_agree_in_the_end_and_lose_no_session() -> None:
    """Each output of either agent, from the first part of a rotation on."""
    for victim in (0, 1):
        for after in range(0, 24, 3):
            world = _world(PostQuantumMode.PREFERRED, seed=after + 100 * victim)
            peers = world.peer(Nat.NONE), world.peer(Nat.NONE)
            a, b = peers
            world.until(functools.partial(_is_keyed, a, b), within=200.0)
            a.give(CommandArrived(1, "rotate", ""))
            peers[victim].crash_after = after
            world.until(functools.partial(_is_keyed, a, b, 2), within=900.0)


@pytest.mark.parametrize("seed", range(3))
def test_a_mesh_of_several_agents_is_keyed_throughout(seed: int) -> None:
    world = _world(PostQuantumMode.REQUIRED, seed=seed)
    kinds = (Nat.NONE, Nat.PORT_RESTRICTED, Nat.FULL_CONE, Nat.PORT_RESTRICTED)
    members = [world.peer(kind) for kind in kinds]
    world.until(lambda: all(_is_keyed(a, b) for i, a in enumerate(members) for b in members[:i]), within=60.0)
