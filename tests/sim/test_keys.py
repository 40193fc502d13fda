"""Post-quantum keys between whole agents: over the real channel, into devices that hold both sides to it."""

from __future__ import annotations

import functools
from base64 import b64encode
from dataclasses import replace
from typing import Any

import pytest
from lab.nat import Nat
from scope_agent.inputs import CommandArrived
from scope_agent.psk.identity import TrustPolicy, make_hybrid_identity
from scope_agent.psk.trust import certify

from scope.model import Endpoint, IdentityTrust, KeyCounts, PeerReport, PostQuantum, PostQuantumMode
from tests.sim import world as world_module
from tests.sim.wireguard import Device, Initiation, WireGuardDatagram
from tests.sim.world import Machine, World


def _world(mode: PostQuantumMode, *, seed: int = 1, interval: float = 3600.0) -> World:
    world = World(seed)
    _ask(world, mode, interval=interval)
    return world


def _ask(world: World, mode: PostQuantumMode, *, interval: float = 3600.0) -> None:
    world.registry.change_mesh(lambda spec: replace(spec, post_quantum=PostQuantum(mode, interval)))


def _epoch(machine: Machine, other: Machine) -> int:
    return int(_psk(machine, other)["epoch"] or 0)


def _psk(machine: Machine, other: Machine) -> dict[str, Any]:
    """What the status of one machine says of the key with another; of one that it does not know, nothing."""
    if machine.agent is None:
        return {"epoch": None, "failure": ""}
    status: Any = machine.agent.status(machine.world.now)
    found = [peer["psk"] for peer in status["peers"] if peer["name"] == other.name]
    return dict(found[0]) if found else {"epoch": None, "failure": ""}


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
    assert report.post_quantum == KeyCounts(keyed=1)
    (link,) = report.links
    assert link.psk is not None and link.psk.failure is None
    assert (link.psk.epoch, link.psk.suite, link.psk.trust) == (1, 1, IdentityTrust.REGISTRY)
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


def _first_pings(mode: PostQuantumMode, seed: int) -> float:
    """Seconds from a second peer's join to the first packet each way."""
    world = _world(mode, seed=seed)
    a = world.peer(Nat.PORT_RESTRICTED)
    world.run(3.0)
    b, joined = world.peer(Nat.PORT_RESTRICTED), world.now
    while not (a.received and b.received):
        a.ping(b, 1)
        b.ping(a, 1)
        world.run(0.02)
        assert world.now < joined + 60.0, world.describe()
    return world.now - joined


@pytest.mark.parametrize("seed", range(1, 7))
def test_the_first_ping_takes_less_than_twice_as_long_where_keys_are_required(seed: int) -> None:
    """Beside what the library's import takes, which has a processor of its own while a path is looked for."""
    off, required = (_first_pings(mode, seed) for mode in (PostQuantumMode.OFF, PostQuantumMode.REQUIRED))
    assert required - world_module.SET_UP_DELAY < 2.0 * off


def test_a_first_handshake_that_is_lost_costs_one_retry_of_wireguards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = _world(PostQuantumMode.REQUIRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    lost: list[float] = []
    pass_on = Device.receive

    def receive(device: Device, source: Endpoint, datagram: WireGuardDatagram) -> None:
        if not lost and isinstance(datagram, Initiation):
            lost.append(world.now)
        else:
            pass_on(device, source, datagram)

    monkeypatch.setattr(Device, "receive", receive)
    world.until(lambda: _is_keyed(a, b), within=15.0)
    assert world.now - lost[0] < 6.0


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


def test_a_machine_that_boots_speaks_with_its_kept_key_before_it_can_make_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = _world(PostQuantumMode.REQUIRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=30.0)
    world.run(10.0)
    a.switch_off()
    world.run(5.0)
    monkeypatch.setattr(world_module, "SET_UP_DELAY", 3600.0)
    a.switch_on()
    world.until(lambda: world.is_direct(a, b) and _is_keyed(a, b), within=30.0)
    world.run(60.0)
    assert _is_keyed(a, b)
    assert _report(world, a).identity == a.hybrid.public.fingerprint(), "what is published stays"
    assert [link.psk and link.psk.epoch for link in _report(world, a).links] == [1]


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


def _shown(machine: Machine, other: Machine) -> dict[str, Any]:
    """What `scopectl identity show` says on one machine of another."""
    machine.give(CommandArrived(1, "identity show"))
    identity: Any = machine.replies[-1].value["identity"]
    (found,) = [peer for peer in identity["peers"] if peer["name"] == other.name]
    return dict(found)


def _trust(machine: Machine, other: Machine) -> None:
    fingerprint = str(other.hybrid.public.fingerprint())
    machine.give(CommandArrived(1, "identity trust", other.name, fingerprint))
    assert machine.replies[-1].value == {"ok": True, "named": fingerprint}


def test_an_identity_is_rotated_by_one_command_and_no_packet_is_lost() -> None:
    world = _world(PostQuantumMode.REQUIRED)
    a, b = world.peer(Nat.PORT_RESTRICTED), world.peer(Nat.PORT_RESTRICTED)
    world.until(lambda: world.is_direct(a, b) and _is_keyed(a, b), within=20.0)
    old, sent = a.hybrid, world.now
    a.stream(b, rate=4.0, seconds=240.0)
    a.give(CommandArrived(1, "identity rotate"))
    world.until(lambda: _is_keyed(a, b, 2), within=200.0)
    new = a.hybrid.public.fingerprint()
    assert new != old.public.fingerprint() and a.hybrid.ed448 != old.ed448
    assert a.replies[-1].value == {"ok": True, "fingerprint": str(new)}
    world.until(lambda: _report(world, a).identity == new, within=20.0)
    assert _shown(b, a)["pinned"] == str(new) and _shown(b, a)["trust"] == "Registry"
    world.run(5.0)
    assert _lost(a, b, range(1, int((world.now - sent - 6.0) * 4))) == 0


def test_a_full_disk_leaves_the_identity_as_it_is_and_is_said() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.until(lambda: _is_keyed(a, b), within=200.0)
    a.disk_fails = True
    before = a.hybrid
    a.give(CommandArrived(1, "identity rotate"))
    world.run(1.0)
    assert a.replies[-1].value == {"ok": False, "error": "no space left on device"} and a.hybrid is before


def test_another_identity_of_a_pinned_peer_is_refused_until_it_is_trusted() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    for machine in (a, b):
        machine.trust = TrustPolicy(IdentityTrust.PINNED)
        machine.restart()
    world.until(
        lambda: all("is not trusted yet" in _psk(*pair)["failure"] for pair in ((a, b), (b, a))), within=60.0
    )
    assert _shown(a, b)["trust"] is None
    _trust(a, b)
    _trust(b, a)
    world.until(lambda: _is_keyed(a, b), within=300.0)
    assert _shown(a, b)["trust"] == "Pinned"
    b.hybrid = make_hybrid_identity(b.key_random.randbytes, b.provider)  # nobody signed that this follows
    b.restart()
    world.until(lambda: "another one than before" in _psk(a, b)["failure"], within=60.0)
    a.give(CommandArrived(1, "rotate", ""))
    world.run(300.0)
    assert _is_keyed(a, b, 1) and _epoch(a, b) == 1
    _trust(a, b)
    world.until(lambda: _is_keyed(a, b, 2), within=900.0)


def test_agents_with_a_ca_key_with_those_whom_it_certified_and_nobody_else() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    members = [world.peer(Nat.NONE) for _ in range(3)]
    a, b, c = members
    ca = make_hybrid_identity(a.key_random.randbytes, a.provider)
    for machine in members:
        machine.trust = TrustPolicy(IdentityTrust.CA, ca.public)
        machine.restart()
    world.until(lambda: all("no certificate" in _psk(a, other)["failure"] for other in (b, c)), within=60.0)
    for machine in (a, b):
        signed = certify(ca, machine.name, machine.hybrid.public.fingerprint(), machine.provider)
        machine.give(CommandArrived(2, "identity certify", argument=b64encode(signed).decode()))
        world.run(1.0)
        assert machine.replies[-1].value["ok"] is True
    world.until(lambda: _is_keyed(a, b), within=400.0)
    assert _shown(a, b)["trust"] == "CA"
    assert _epoch(a, c) == 0 and "shows no certificate" in _shown(a, c)["reason"]
    wrong = certify(ca, b.name, c.hybrid.public.fingerprint(), c.provider)
    c.give(CommandArrived(2, "identity certify", argument=b64encode(wrong).decode()))
    assert c.replies[-1].value["ok"] is False and c.name in str(c.replies[-1].value["error"])


def test_commands_about_identities_say_what_is_wrong_with_them() -> None:
    world = _world(PostQuantumMode.PREFERRED)
    a, b = world.peer(Nat.NONE), world.peer(Nat.NONE)
    world.run(10.0)
    for command, peer, argument, expected in (
        ("identity trust", b.name, "abc", "64 lowercase hexadecimal digits"),
        ("identity trust", "nobody", "00" * 32, "no peer 'nobody'"),
        ("identity certify", "", "abc", "that is no certificate"),
        ("identity", "", "", "this agent knows: status"),
    ):
        a.give(CommandArrived(1, command, peer, argument))
        assert a.replies[-1].value["ok"] is False and expected in str(a.replies[-1].value["error"])
    _ask(world, PostQuantumMode.OFF)
    world.run(10.0)
    a.give(CommandArrived(1, "identity rotate"))
    assert "makes no post-quantum keys" in str(a.replies[-1].value["error"])
