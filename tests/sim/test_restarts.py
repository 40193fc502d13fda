"""What outlives what: the device its agent, the mesh its registry, the agent its disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab.nat import Nat
from scope_agent.inputs import CommandArrived, FactArrived
from scope_agent.wireguard.device import SetEndpoint

from scope.model import Endpoint, PathKind
from scope.registry.port import Deleted
from tests.sim.world import Machine, World


def _mesh(seed: int, count: int = 2, kind: Nat = Nat.PORT_RESTRICTED) -> tuple[World, list[Machine]]:
    world = World(seed)
    machines = [world.peer(kind) for _ in range(count)]
    world.until(world.is_converged, within=5.0)
    world.run(20.0)
    return world, machines


def _numbers(machine: Machine) -> list[int]:
    return [packet.number for _, _, packet in machine.received]


def _status(machine: Machine) -> dict[str, object]:
    machine.give(CommandArrived(1, "status"))
    status = machine.replies[-1].value["status"]
    assert isinstance(status, dict)
    return status


# --- restarts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("away", [0.05, 5.0, 60.0])
def test_the_restart_of_an_agent_loses_no_packet_and_changes_no_endpoint(seed: int, away: float) -> None:
    world, (a, b) = _mesh(seed)
    a.stream(b, rate=50.0, seconds=away + 20.0, answer=False)
    b.stream(a, rate=50.0, seconds=away + 20.0, answer=False)
    world.run(2.0)
    changes = a.device.endpoint_changes + b.device.endpoint_changes
    a.restart(after=away)
    world.run(away + 25.0)
    assert a.device.endpoint_changes + b.device.endpoint_changes == changes
    for machine in (a, b):
        assert _numbers(machine) == list(range(len(_numbers(machine))))
    assert not a.refused_packets and not b.refused_packets
    assert world.is_direct(a, b)


@pytest.mark.parametrize("outputs", range(0, 24, 2))
def test_an_agent_that_dies_at_any_output_comes_back_to_a_direct_path(outputs: int) -> None:
    world = World(outputs)
    a, b = world.machine(world.site(Nat.PORT_RESTRICTED)), world.machine(world.site(Nat.PORT_RESTRICTED))
    a.join()
    b.join()
    a.crash_after = outputs
    world.run(1.0)
    world.until(lambda: world.is_direct(a, b), within=10.0)


def test_an_agent_that_starts_cold_reaches_its_mesh_from_disk_while_the_registry_is_gone() -> None:
    world, machines = _mesh(3, count=6)
    world.registry.go_down()
    for machine in machines:
        machine.crash()
        machine.device.delete()
    world.run(30.0)
    for machine in machines:
        machine.start()
    assert world.until(world.is_converged, within=5.0) < 1.0


def test_one_restarted_agent_without_registry_or_reflector_finds_peers_that_run() -> None:
    world, machines = _mesh(4, count=4)
    world.registry.go_down()
    world.run(60.0)
    machines[0].crash()
    machines[0].device.delete()
    world.run(5.0)
    machines[0].start()
    assert world.until(world.is_converged, within=10.0) < 1.5


@pytest.mark.parametrize("seed", range(3))
def test_a_nat_that_moves_while_the_registry_is_gone_is_followed(
    seed: int,
) -> None:
    world = World(seed)
    home, office = world.site(Nat.PORT_RESTRICTED), world.site(Nat.PORT_RESTRICTED)
    at_home, away, open_peer = (world.machine(site) for site in (home, office, world.site(Nat.NONE)))
    for machine in (at_home, away, open_peer):
        machine.join()
    world.until(world.is_converged, within=5.0)
    for machine in (at_home, away):
        machine.stream(open_peer, rate=10.0, seconds=60.0)
    at_home.stream(away, rate=10.0, seconds=60.0)
    world.run(20.0)
    for box in home.boxes:
        box.rebind()
    world.run(8.0)
    world.registry.go_down()
    away.crash()
    world.run(0.3)
    away.start()
    for box in home.boxes:
        box.rebind()
    assert world.until(world.is_converged, within=20.0) < 8.0


def test_two_restored_peers_with_no_echo_get_their_last_good_endpoints_after_a_second() -> None:
    world, (a, b) = _mesh(5)
    for machine in (a, b):
        machine.crash()
        machine.device.delete()
    b_was = b.endpoint_of(a)
    a.start()  # alone
    world.run(1.3)
    peer = a.device.peers[b.key]
    assert peer.endpoint is not None and peer.allowed_ips
    assert peer.endpoint.address == b.site.public
    assert b_was is None


def test_a_peer_that_the_disk_does_not_know_yet_keeps_its_place_until_the_registry_is_heard() -> None:
    world, (a, b) = _mesh(7)
    a.disk_fails = True
    c = world.peer(Nat.NONE)
    world.until(lambda: world.is_direct(a, c), within=5.0)
    a.stream(c, rate=50.0, seconds=60.0, answer=False)
    world.run(2.0)
    a.crash()
    world.registry.go_down()
    a.start()
    world.run(70.0)
    assert _numbers(c) == list(range(len(_numbers(c)))) and len(_numbers(c)) > 2500
    assert c.key in a.device.peers and world.is_direct(a, b)


def test_a_full_disk_is_said_and_stops_nothing() -> None:
    world, (a, b) = _mesh(6)
    a.disk_fails = True
    c = world.peer(Nat.NONE)
    world.until(lambda: world.is_direct(a, c) and world.is_direct(a, b), within=5.0)
    world.run(5.0)
    conditions = _status(a)["conditions"]
    assert isinstance(conditions, list)
    assert [c["type"] for c in conditions] == ["Disk"] and "no space left" in conditions[0]["message"]
    a.disk_fails = False
    world.run(60.0)
    assert _status(a)["conditions"] == []
    assert c.key in a.disk.snapshot.peers


def test_a_device_that_fails_is_tried_again_with_backoff() -> None:
    world = World(7)
    a = world.machine(world.site(Nat.NONE))
    a.device_fails = True
    a.join()
    b = world.peer(Nat.NONE)
    world.run(60.0)
    assert 3 <= len(a.batches) <= 12
    a.device_fails = False
    world.until(lambda: world.is_direct(a, b), within=35.0)


# --- without a registry ----------------------------------------------------------------------------------


def test_a_day_without_the_registry_loses_nothing_and_grows_nothing() -> None:
    world, machines = _mesh(8, count=3)
    world.registry.go_down()
    world.run(600.0)
    sizes = [_size(machine) for machine in machines]
    lost = 0
    for _ in range(24 * 6):
        marks = [len(machine.received) for machine in machines]
        for machine in machines:
            for other in machines:
                if machine is not other:
                    machine.ping(other, answer=False)
        world.run(600.0)
        lost += sum(2 - (len(m.received) - mark) for m, mark in zip(machines, marks, strict=True))
    assert lost == 0
    assert [_size(machine) for machine in machines] == sizes


def _size(machine: Machine) -> dict[str, int]:
    """Entries of everything an agent keeps by peer, datagram or time."""
    assert machine.agent is not None
    found: dict[str, int] = {}

    def count(name: str, value: object, depth: int) -> None:
        if isinstance(value, dict | set | list | tuple | frozenset) or hasattr(value, "maxlen"):
            found[name] = found.get(name, 0) + len(value)  # type: ignore[arg-type]
        if isinstance(value, dict):
            for inner in value.values():
                count(name + "[]", inner, depth + 1)
        elif type(value).__module__.startswith("scope") and depth < 6:
            names = getattr(value, "__slots__", None) or getattr(value, "__dict__", {}).keys()
            for inner in names:
                count(f"{name}.{inner}", getattr(value, inner, None), depth + 1)

    rooms = ("_paths", "_membership", "_channel", "_carrying", "_reporting")
    for name in (*rooms, "_sessions", "_origins", "_passed", "_backlog", "_touched"):
        count(name, getattr(machine.agent, name), 0)
    # A ping's trace and a moved appointment come and go; what matters is that they are few.
    assert all(n <= 200 for n in found.values()), found
    return {name: n for name, n in found.items() if "pending" not in name and "_heap" not in name}


def test_a_registry_that_comes_back_is_told_what_changed_meanwhile() -> None:
    world, (a, b) = _mesh(9)
    world.registry.go_down(reflecting=True)
    a.move(world.site(Nat.PORT_RESTRICTED))
    world.run(60.0)
    world.registry.come_up()
    world.run(60.0)
    report = world.registry.peer(a).report
    assert report is not None
    assert a.site.public in {candidate.endpoint.address for candidate in report.endpoints}
    assert world.is_direct(a, b)


# --- the device in foreign hands -------------------------------------------------------------------------


def test_what_a_foreign_tool_changes_is_put_right_within_ten_seconds_and_counted() -> None:
    world, (a, b) = _mesh(10)
    peer = a.device.peers[b.key]
    right = peer.allowed_ips, peer.keepalive
    peer.allowed_ips, peer.keepalive = frozenset(), 0
    world.run(11.0)
    assert (a.device.peers[b.key].allowed_ips, a.device.peers[b.key].keepalive) == right
    device = _status(a)["device"]
    assert isinstance(device, dict) and device["drift"] == 2
    del a.device.peers[b.key]
    world.run(11.0)
    world.until(lambda: world.is_direct(a, b), within=10.0)


def test_a_deleted_device_is_made_anew() -> None:
    world, (a, b) = _mesh(11)
    a.device.delete()
    world.run(11.0)
    a.stream(b, rate=5.0, seconds=20.0)
    world.until(lambda: world.is_direct(a, b) and bool(b.received), within=10.0)


def test_an_endpoint_that_wireguard_moved_to_a_verified_path_is_no_drift() -> None:
    world = World(12)
    a, b = world.peer(Nat.PORT_RESTRICTED, ipv6=True), world.peer(Nat.PORT_RESTRICTED, ipv6=True)
    world.until(lambda: world.is_direct(a, b), within=5.0)
    world.run(1.5)
    world.run(20.0)
    a.stream(b, rate=5.0, seconds=60.0)
    for machine, other in ((a, b), (b, a)):
        machine.device.peers[other.key].endpoint = Endpoint(other.site.public, other.device.listen_port)
    world.run(12.0)
    for machine in (a, b):
        device = _status(machine)["device"]
        assert isinstance(device, dict) and device["drift"] == 0
        assert not machine.refused_packets


def test_an_endpoint_that_a_foreign_tool_moved_to_nowhere_is_put_back() -> None:
    world, (a, b) = _mesh(13)
    world.run(5.0)  # past the keepalive
    right = a.endpoint_of(b)
    assert right is not None
    for link in world.network.link(b.site, a.site, both=False):
        link.cut = True  # nothing of b's leads WireGuard back by itself
    a.device.peers[b.key].endpoint = replace(right, port=9)
    before = len(a.batches)
    world.run(12.0)
    assert a.endpoint_of(b) == right
    assert [x for _, batch in a.batches[before:] for x in batch.actions if isinstance(x, SetEndpoint)]


# --- removal ---------------------------------------------------------------------------------------------


def test_a_removed_peer_loses_the_data_path_within_three_seconds_also_where_no_registry_is_heard() -> None:
    world, (a, b, c, gone) = _mesh(14, count=4)
    for machine in (b, c):
        world.registry.disconnect(machine, "cut off")
        machine.connected = False
        world.registry.forsake(machine)
    world.registry.remove(gone)
    world.run(3.0)
    for machine in (a, b, c):
        assert gone.key not in machine.device.peers
    world.run(10.0)
    assert gone.agent is not None and gone.agent.removed
    assert not gone.device.peers


def test_a_tombstone_survives_a_restart_and_an_old_snapshot_of_the_registry() -> None:
    world, (a, _, gone) = _mesh(15, count=3)
    old = world.registry.backup()
    world.registry.remove(gone)
    gone.crash()
    world.run(5.0)
    world.registry.restore(old)
    a.restart(after=1.0)
    world.run(60.0)
    assert gone.key not in a.device.peers
    assert gone.name in {peer.meta.name for peer in world.registry.peers()}  # the old snapshot does name it


def test_a_tombstone_is_told_to_a_peer_that_was_away() -> None:
    world, (a, b, gone) = _mesh(16, count=3)
    b.crash()
    world.registry.remove(gone)
    gone.crash()
    world.run(10.0)
    world.registry.go_down()
    b.start()
    world.until(lambda: gone.key not in b.device.peers, within=3.0)
    assert world.is_direct(a, b)


def test_a_registry_restored_to_an_old_revision_removes_nobody_for_ten_minutes() -> None:
    world = World(17)
    first = [world.peer(Nat.NONE) for _ in range(2)]
    world.run(10.0)
    old = world.registry.backup()
    late = world.peer(Nat.NONE)
    world.until(world.is_converged, within=5.0)
    world.run(10.0)
    world.registry.restore(old)
    world.run(580.0)
    assert all(late.key in machine.device.peers for machine in first)
    world.run(60.0)
    assert all(late.key not in machine.device.peers for machine in first)


def test_a_deletion_is_believed_at_once_and_an_unsigned_tombstone_is_not() -> None:
    world, (a, b, c) = _mesh(18, count=3)
    peer = world.registry.peer(b)
    tombstone = replace(world.registry.remove(c), peer_uid=peer.meta.uid, key=b.key)
    world.registry.assign(b, replace(peer.assignment, tombstone=tombstone))
    world.run(3.0)
    assert c.key not in a.device.peers and b.key in a.device.peers
    b.crash()
    a.give(FactArrived(Deleted(peer, world.registry.store.revision)))
    world.run(1.0)
    assert b.key not in a.device.peers


def test_many_that_vanish_from_one_list_stay_until_a_second_one_half_a_minute_later() -> None:
    world, machines = _mesh(19, count=8, kind=Nat.NONE)
    a, *others = machines
    gone = others[:5]
    for machine in gone:
        world.registry.vanish(machine)
    world.registry.list_for(a)
    world.run(20.0)
    assert all(machine.key in a.device.peers for machine in gone)
    world.run(15.0)
    assert not any(machine.key in a.device.peers for machine in gone)


def test_a_peer_that_leaves_is_gone_everywhere_and_its_address_is_unreachable() -> None:
    world, (a, b, c) = _mesh(20, count=3)
    c.leave()
    world.run(3.0)
    for machine in (a, b):
        assert c.key not in machine.device.peers
        assert machine.agent is not None
        assert {view.path for view in machine.agent.paths(world.now).pairs.values()} == {PathKind.DIRECT}
