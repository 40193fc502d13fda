"""Real packets show that each NAT kind, impairment and command of the lab does what its name says.

The sockets belong to this process and live in the lab's namespaces, so a test is a plain sequence of
sends and receives. That something does not arrive is shown by something sent after it that does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
from lab import GRID_KINDS, Lab, LabError, Machine, Nat, Server, Site, Traffic, place_reason
from lab.internet import LABS
from lab.netns import names_with, processes_in

from tests.netns.device_fixture import one_processor, wait_until

HACK = Path(__file__).parents[2] / "hack"
# Without delay an answer takes microseconds; this is how long a busy machine may take.
ARRIVAL_S = 60.0
# For what must not arrive, after something that was sent later has arrived.
QUIET_S = 0.05
# The port that machines send from, as a WireGuard device would.
PORT = 51820

NATED = [nat for nat in Nat if nat not in (Nat.NONE, Nat.IPV6_ONLY, Nat.UDP_BLOCKED)]


class Port:
    """A bound UDP socket in a host."""

    def __init__(self, host: Machine | Server, port: int = 0, *, family: int | None = None) -> None:
        if family is None:
            family = socket.AF_INET if host.ipv4 else socket.AF_INET6
        self.host = host
        self.socket = host.socket(family)
        self.socket.settimeout(ARRIVAL_S)
        self.socket.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        self.address = host.ipv6 if family == socket.AF_INET6 else host.ipv4

    @property
    def endpoint(self) -> tuple[str, int]:
        return str(self.address), int(self.socket.getsockname()[1])

    def send(self, to: tuple[str, int], payload: bytes = b"hello") -> None:
        with one_processor():
            self.socket.sendto(payload, to)

    def receive(self) -> tuple[bytes, tuple[str, int]]:
        payload, source = self.socket.recvfrom(2048)
        return payload, (source[0], source[1])

    def waiting(self, *, until: bytes = b"", quiet_s: float = QUIET_S) -> list[tuple[bytes, tuple[str, int]]]:
        """Everything that arrives until nothing has for a moment; what is sent last may take its time."""
        got: list[tuple[bytes, tuple[str, int]]] = []
        if until:
            with contextlib.suppress(TimeoutError):
                while not got or got[-1][0] != until:
                    got.append(self.receive())
        self.socket.settimeout(quiet_s)
        with contextlib.suppress(TimeoutError, BlockingIOError):
            while True:
                got.append(self.receive())
        self.socket.settimeout(ARRIVAL_S)
        return got


Opened = Callable[..., Port]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """One lab without delay; each test makes the sites it needs, so that none sees another's mappings."""
    with Lab() as built:
        built.server("first")
        built.server("second")
        yield built


@pytest.fixture
def port() -> Iterator[Opened]:
    with contextlib.ExitStack() as stack:

        def open_port(host: Machine | Server, number: int = 0, *, family: int | None = None) -> Port:
            opened = Port(host, number, family=family)
            stack.callback(opened.socket.close)
            return opened

        yield open_port


_numbers = iter(range(1000))


def new_site(lab: Lab, nat: Nat, **options: object) -> Site:
    return lab.site(f"site-{next(_numbers)}", nat=nat, **options)  # type: ignore[arg-type]


def new_machine(lab: Lab, nat: Nat, **options: object) -> Machine:
    site = new_site(lab, nat, **options)
    return site.machine(f"on-{site.name}")


def seen_by(server: Port, machine: Port) -> tuple[str, int]:
    """The machine's endpoint as a server sees it."""
    machine.send(server.endpoint, b"who am I")
    payload, source = server.receive()
    assert payload == b"who am I"
    return source


def arrives(sender: Port, to: tuple[str, int], at: Port) -> bool:
    """Whether a datagram does, which may take its time."""
    sender.send(to, b"knock")
    return any(payload == b"knock" for payload, _ in at.waiting(until=b"knock", quiet_s=0.0))


def stays_out(sender: Port, to: tuple[str, int], at: Port) -> bool:
    """Whether nothing comes of a datagram, for a moment."""
    sender.send(to, b"knock")
    return all(payload != b"knock" for payload, _ in at.waiting())


@pytest.mark.parametrize("nat", NATED, ids=lambda nat: nat.name)
def test_a_mapping_is_the_same_for_all_destinations_unless_the_nat_is_symmetric(
    lab: Lab, port: Opened, nat: Nat
) -> None:
    inside = port(new_machine(lab, nat), PORT)
    servers = [port(lab.servers["first"]), port(lab.servers["first"]), port(lab.servers["second"])]
    mappings = {seen_by(server, inside) for server in servers}
    assert len(mappings) == (3 if nat is Nat.SYMMETRIC else 1)
    (public,) = {address for address, _ in mappings}
    assert public == str(inside.host.site.plan.public_ipv4)  # type: ignore[union-attr]


LETS_IN = {
    # kind: (another port of an address sent to, an address never sent to)
    Nat.NONE: (True, True),
    Nat.FULL_CONE: (True, True),
    Nat.HAIRPIN: (True, True),
    Nat.ADDRESS_RESTRICTED: (True, False),
    Nat.PORT_RESTRICTED: (False, False),
    Nat.PORT_RESTRICTED_OPEN_INPUT: (False, False),
    Nat.SYMMETRIC: (False, False),
    Nat.CGNAT: (False, False),
    Nat.IPV6_ONLY: (False, False),
}


@pytest.mark.parametrize("nat", LETS_IN, ids=lambda nat: nat.name)
def test_a_nat_lets_in_whom_its_name_says(lab: Lab, port: Opened, nat: Nat) -> None:
    inside = port(new_machine(lab, nat), PORT)
    family = inside.socket.family
    contacted, neighbour = (
        port(lab.servers["first"], family=family),
        port(lab.servers["first"], family=family),
    )
    stranger = port(lab.servers["second"], family=family)
    mapping = seen_by(contacted, inside)
    for sender, payload in ((stranger, b"stranger"), (neighbour, b"other port"), (contacted, b"answer")):
        sender.send(mapping, payload)
    got = {payload for payload, _ in inside.waiting(until=b"answer")}
    assert b"answer" in got
    assert (b"other port" in got, b"stranger" in got) == LETS_IN[nat]


@pytest.mark.parametrize("nat", [Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED_OPEN_INPUT, Nat.CGNAT])
def test_an_unsolicited_datagram_moves_the_mapping_only_where_the_router_takes_it(
    lab: Lab, port: Opened, nat: Nat
) -> None:
    inside, first, second = (
        port(host, PORT) for host in (new_machine(lab, nat), lab.servers["first"], lab.servers["second"])
    )
    mapping = seen_by(first, inside)
    second.send(mapping, b"too early")
    assert inside.waiting() == []
    moved = seen_by(second, inside) != mapping
    assert moved == (nat is Nat.PORT_RESTRICTED_OPEN_INPUT)


@pytest.mark.parametrize("nat", [Nat.HAIRPIN, Nat.FULL_CONE, Nat.PORT_RESTRICTED])
def test_machines_of_a_site_reach_each_other_by_public_endpoint_only_with_hairpin(
    lab: Lab, port: Opened, nat: Nat
) -> None:
    site = new_site(lab, nat)
    a, b = (port(site.machine(f"{name}-{site.name}"), PORT + n) for n, name in enumerate("ab"))
    server = port(lab.servers["first"])
    to_b, from_a = seen_by(server, b), seen_by(server, a)
    a.send(to_b, b"round the corner")
    if nat is Nat.HAIRPIN:
        assert b.receive() == (b"round the corner", from_a)
    else:
        assert b.waiting() == []


@pytest.mark.parametrize("nat", [Nat.FULL_CONE, Nat.ADDRESS_RESTRICTED])
def test_two_machines_on_one_port_get_mappings_of_their_own_from_a_cone_nat(
    lab: Lab, port: Opened, nat: Nat
) -> None:
    site = new_site(lab, nat)
    a, b = (port(site.machine(f"{name}-{site.name}"), PORT) for name in "ab")
    first, second = port(lab.servers["first"]), port(lab.servers["second"])
    of_a, of_b = seen_by(first, a), seen_by(second, b)
    assert of_a != of_b
    assert (seen_by(second, a), seen_by(first, b)) == (of_a, of_b)


def test_two_machines_in_one_lan_reach_each_other_although_udp_is_blocked(lab: Lab, port: Opened) -> None:
    site = new_site(lab, Nat.UDP_BLOCKED, ipv6=True)
    a, b = (site.machine(f"{name}-{site.name}") for name in "ab")
    for family in (socket.AF_INET, socket.AF_INET6):
        sender, receiver = port(a, family=family), port(b, family=family)
        assert arrives(sender, receiver.endpoint, receiver)


@pytest.mark.parametrize("nat", [Nat.PORT_RESTRICTED, Nat.FULL_CONE, Nat.ADDRESS_RESTRICTED, Nat.CGNAT])
def test_a_short_mapping_timeout_ends_an_idle_mapping(lab: Lab, port: Opened, nat: Nat) -> None:
    inside = port(new_machine(lab, nat, mapping_timeout_s=1), PORT)
    server = port(lab.servers["first"])

    def is_open() -> bool:
        return not stays_out(server, seen_by(server, inside), inside)

    wait_until(is_open, "no mapping lasts for long enough to be used")
    mapping = seen_by(server, inside)
    # An arriving datagram keeps a mapping alive, so each look comes after an idle time, and a longer one.
    deadline, idle_s = time.monotonic() + 20, 1.1
    while True:
        time.sleep(idle_s)
        if stays_out(server, mapping, inside):
            break
        idle_s += 0.5
        assert time.monotonic() < deadline, "the mapping outlived its timeout many times over"
    wait_until(is_open, "no new mapping lasts for long enough to be used")


@pytest.mark.parametrize("nat", NATED, ids=lambda nat: nat.name)
def test_rebinding_changes_every_mapping_and_closes_the_old_one(lab: Lab, port: Opened, nat: Nat) -> None:
    inside = port(new_machine(lab, nat), PORT)
    first, second = port(lab.servers["first"]), port(lab.servers["second"])
    seen = [seen_by(first, inside)]
    for _ in range(2):
        inside.host.site.rebind()  # type: ignore[union-attr]
        assert stays_out(first, seen[-1], inside)
        seen.append(seen_by(first, inside))
        assert arrives(first, seen[-1], inside)
        assert (seen_by(second, inside) == seen[-1]) == (nat is not Nat.SYMMETRIC)
    assert len(set(seen)) == 3


@pytest.mark.parametrize("nat", NATED, ids=lambda nat: nat.name)
def test_a_reboot_forgets_who_may_send(lab: Lab, port: Opened, nat: Nat) -> None:
    inside = port(new_machine(lab, nat), PORT)
    server = port(lab.servers["first"])
    mapping = seen_by(server, inside)
    assert arrives(server, mapping, inside)
    inside.host.site.reboot()  # type: ignore[union-attr]
    assert stays_out(server, mapping, inside)
    assert arrives(server, seen_by(server, inside), inside)


def tcp_answers(machine: Machine, server: Server) -> bool:
    with server.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((str(server.ipv4), 0))
        listener.listen()
        with machine.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(ARRIVAL_S)
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                accepted.sendall(b"tcp")
                return client.recv(3) == b"tcp"


def test_blocked_udp_passes_tcp_alone(lab: Lab, port: Opened) -> None:
    machine = new_machine(lab, Nat.UDP_BLOCKED)
    server = port(lab.servers["first"])
    assert stays_out(port(machine), server.endpoint, server)
    assert tcp_answers(machine, lab.servers["first"])


def test_udp_can_be_blocked_and_unblocked(lab: Lab, port: Opened) -> None:
    inside = port(new_machine(lab, Nat.PORT_RESTRICTED))
    server = port(lab.servers["first"])
    site = inside.host.site  # type: ignore[union-attr]
    mapping = seen_by(server, inside)
    site.block_udp()
    assert stays_out(inside, server.endpoint, server)
    assert stays_out(server, mapping, inside)
    site.unblock_udp()
    assert seen_by(server, inside) == mapping


def test_an_ipv6_only_machine_has_no_ipv4_and_reaches_servers_by_ipv6(lab: Lab, port: Opened) -> None:
    machine = new_machine(lab, Nat.IPV6_ONLY)
    inside, server = port(machine), port(lab.servers["first"], family=socket.AF_INET6)
    assert seen_by(server, inside) == inside.endpoint
    with machine.socket(socket.AF_INET) as ipv4, pytest.raises(OSError, match="unreachable"):
        ipv4.sendto(b"", (str(lab.servers["first"].ipv4), 9))


def test_ipv6_beside_a_nat_has_a_firewall_that_answers_pass(lab: Lab, port: Opened) -> None:
    inside = port(new_machine(lab, Nat.SYMMETRIC, ipv6=True), family=socket.AF_INET6)
    contacted, stranger = (port(lab.servers[name], family=socket.AF_INET6) for name in ("first", "second"))
    assert seen_by(contacted, inside) == inside.endpoint
    assert arrives(contacted, inside.endpoint, inside)
    assert stays_out(stranger, inside.endpoint, inside)


def test_a_public_machine_is_reached_at_its_own_address_in_both_families(lab: Lab, port: Opened) -> None:
    machine = new_machine(lab, Nat.NONE)
    for family in (socket.AF_INET, socket.AF_INET6):
        inside, stranger = port(machine, family=family), port(lab.servers["second"], family=family)
        assert arrives(stranger, inside.endpoint, inside)


def test_a_cut_swallows_both_ways_until_it_is_healed(lab: Lab, port: Opened) -> None:
    a, b = port(new_machine(lab, Nat.NONE)), port(new_machine(lab, Nat.NONE))
    sites = a.host.site, b.host.site  # type: ignore[union-attr]
    server = port(lab.servers["first"])
    lab.cut(*sites)
    assert stays_out(a, b.endpoint, b)
    assert stays_out(b, a.endpoint, a)
    assert arrives(a, server.endpoint, server)
    lab.heal(*sites)
    assert arrives(a, b.endpoint, b)
    assert arrives(b, a.endpoint, a)


def test_a_one_way_cut_lets_the_other_way_pass_and_servers_can_be_cut_off(lab: Lab, port: Opened) -> None:
    machine, server = new_machine(lab, Nat.NONE), lab.servers["first"]
    a, b = port(machine), port(server)
    lab.cut(machine.site, server, one_way=True)
    assert stays_out(a, b.endpoint, b)
    assert arrives(b, a.endpoint, a)
    lab.heal(machine.site, server)
    assert arrives(a, b.endpoint, b)


@pytest.mark.parametrize(
    ("only", "passing"),
    [(Traffic.WIREGUARD_DATA, {1, 2, 3, 5}), (Traffic.WIREGUARD_HANDSHAKES, {4, 5})],
)
def test_a_cut_can_swallow_one_kind_of_wireguard_message(
    lab: Lab, port: Opened, only: Traffic, passing: set[int]
) -> None:
    machine, server = new_machine(lab, Nat.PORT_RESTRICTED), lab.servers["first"]
    a, b = port(machine), port(server)
    lab.cut(machine.site, server, only=only)
    for kind in (1, 2, 3, 4, 5):
        a.send(b.endpoint, bytes([kind, 0, 0, 0]) + b"payload")
    a.send(b.endpoint, b"\x04ops")
    got = [payload for payload, _ in b.waiting(until=b"\x04ops")]
    lab.heal(machine.site, server)
    assert {payload[0] for payload in got if payload.endswith(b"payload")} == passing
    assert b"\x04ops" in got


def test_a_machine_that_moves_takes_an_address_there_and_keeps_its_processes(lab: Lab, port: Opened) -> None:
    old, new = new_site(lab, Nat.PORT_RESTRICTED), new_site(lab, Nat.NONE)
    machine, stayed, met = old.machine("roamer"), old.machine("stayed"), new.machine("met")
    inside, server = port(machine, PORT), port(lab.servers["first"])
    before, address = seen_by(server, inside), machine.ipv4
    machine.move(new)
    assert machine.ipv4 != address
    assert machine.site is new and machine.place == new.place
    assert machine.name not in old.machines
    after = seen_by(server, inside)
    assert after != before and after == (str(machine.ipv4), PORT)
    neighbour, left_behind = port(met), port(stayed)
    assert arrives(inside, neighbour.endpoint, neighbour)
    assert stays_out(inside, left_behind.endpoint, left_behind)
    machine.move(old)
    assert seen_by(server, inside)[0] == before[0]


def test_a_second_name_or_a_second_lab_gets_in_nobodys_way(lab: Lab) -> None:
    with pytest.raises(LabError, match="already"):
        lab.server("first")
    with Lab() as other:
        assert other.server("first").namespace != lab.servers["first"].namespace


def punch(a: Port, b: Port, reflector: Port, *, ttl: int = 64, hope: bool) -> bool:
    """Both learn their mapping from a server and send to the other's, then to whom they hear from.

    With `hope` what a busy machine brings late is waited for.
    """
    sides = (a, b)
    targets = {a: [seen_by(reflector, b)], b: [seen_by(reflector, a)]}
    heard: set[Port] = set()
    level, option = (
        (socket.IPPROTO_IP, socket.IP_TTL)
        if a.socket.family == socket.AF_INET
        else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    )
    for hops in (ttl, *[64] * (30 if hope else 3)):
        if heard == {a, b}:
            break
        for side in sides:
            side.socket.setsockopt(level, option, hops)
            for target in targets[side]:
                side.send(target, b"punch")
        for side in sides:
            for payload, source in side.waiting(quiet_s=0.005):
                assert payload == b"punch"
                heard.add(side)
                targets[side] = [source]
    return heard == {a, b}


@pytest.mark.parametrize(
    ("kind", "other"), list(combinations_with_replacement(GRID_KINDS, 2)), ids=lambda kind: kind.name
)
def test_the_grid_says_which_pairs_can_be_punched(lab: Lab, port: Opened, kind: Nat, other: Nat) -> None:
    a, b = new_machine(lab, kind), new_machine(lab, other)
    shared = a.ipv6 is not None and b.ipv6 is not None
    if Nat.UDP_BLOCKED in (kind, other) or not (shared or (a.ipv4 and b.ipv4)):
        assert place_reason(a.place, b.place) is not None
        return
    family = socket.AF_INET6 if shared else socket.AF_INET
    ends = (port(host, PORT, family=family) for host in (a, b, lab.servers["first"]))
    # A first datagram that dies between the NATs: an open input takes one that comes too early for its own.
    hope = place_reason(a.place, b.place) is None
    assert punch(*ends, ttl=2, hope=hope) == hope


@pytest.mark.parametrize("ttl", [2, 64])
def test_between_open_inputs_only_an_opener_that_dies_between_the_nats_connects(
    lab: Lab, port: Opened, ttl: int
) -> None:
    kind = Nat.PORT_RESTRICTED_OPEN_INPUT
    ends = (
        port(host, PORT) for host in (new_machine(lab, kind), new_machine(lab, kind), lab.servers["first"])
    )
    assert punch(*ends, ttl=ttl, hope=ttl == 2) == (ttl == 2)


def test_a_machines_processes_share_wireguards_socket_directory_with_no_other_machine(lab: Lab) -> None:
    site = new_site(lab, Nat.NONE)
    a, b = site.machine("holder-a"), site.machine("holder-b")
    a.run(["touch", "/var/run/wireguard/scope0.sock"])
    assert a.run(["ls", "/var/run/wireguard"]).stdout == "scope0.sock\n"
    assert b.run(["ls", "/var/run/wireguard"]).stdout == ""
    assert not Path("/var/run/wireguard/scope0.sock").exists()


def test_programs_run_where_told_and_a_failing_one_shows_its_output(lab: Lab, tmp_path: Path) -> None:
    machine = new_machine(lab, Nat.NONE)
    done = machine.run(
        ["sh", "-c", "pwd; cat; echo $COLOUR"], cwd=tmp_path, env={"COLOUR": "red"}, input="hi "
    )
    assert done.stdout == f"{tmp_path}\nhi red\n"
    with pytest.raises(LabError, match=r"ended with 3:\nout\nerr"):
        machine.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert machine.run(["false"], check=False).returncode == 1
    with pytest.raises(subprocess.TimeoutExpired):
        machine.run(["sleep", "60"], timeout=0.1)
    # The process that holds the machine's mounts open, and nothing else.
    assert processes_in([machine.namespace]) == [machine.holder_pid]


# A lab of its own, with the shim: 5 ms on each uplink.


@pytest.fixture(scope="module")
def delayed() -> Iterator[Lab]:
    with Lab(delay_ms=5) as built:
        built.site("left", nat=Nat.FULL_CONE).machine("l")
        built.site("right", nat=Nat.CGNAT).machine("r")
        built.server("server")
        yield built


def round_trips(a: Port, b: Port, *, to: tuple[str, int], count: int) -> list[float]:
    """Milliseconds for each exchange that came back, one after the other."""
    took = []
    for _ in range(count):
        started = time.monotonic()
        a.send(to)
        _, source = b.receive()
        b.send(source)
        a.receive()
        took.append((time.monotonic() - started) * 1e3)
    return took


def test_round_trips_take_four_delays_from_the_first_one_on(delayed: Lab, port: Opened) -> None:
    left, right = delayed.sites["left"].machines["l"], delayed.sites["right"].machines["r"]
    a, b, server = port(left), port(right), port(delayed.servers["server"])
    to = seen_by(server, a)
    took: list[float] = []

    def is_quick() -> bool:
        took.extend(round_trips(b, a, to=to, count=20))
        return min(took) < 25.0  # a program that waits for the processor adds to most of them

    wait_until(is_quick, "something adds to every delay")
    assert min(took) >= 20.0


def test_delay_jitter_and_loss_of_one_site_can_be_changed(delayed: Lab, port: Opened) -> None:
    site, server = delayed.sites["left"], delayed.servers["server"]
    a, b = port(site.machines["l"]), port(server)
    site.set_link(delay_ms=20)
    slow = round_trips(a, b, to=b.endpoint, count=5)
    site.set_link(delay_ms=10, jitter_ms=10)
    uneven = round_trips(a, b, to=b.endpoint, count=30)
    site.set_link(loss=1.0)
    a.send(b.endpoint)
    assert b.waiting(quiet_s=0.1) == []
    site.set_link(loss=0.5)
    for number in range(400):
        a.send(b.endpoint, str(number).encode())
    arrived = len(b.waiting(quiet_s=1.0))
    site.set_link()
    plain = round_trips(a, b, to=b.endpoint, count=20)
    assert min(slow) >= 50.0
    assert max(uneven) - min(uneven) > 10.0
    assert 120 < arrived < 280  # eight standard deviations around a half
    assert 20.0 <= min(plain) < 40.0


def test_tcp_passes_the_shim_unharmed(delayed: Lab) -> None:
    content = os.urandom(1 << 20) * 4
    machine, server = delayed.sites["left"].machines["l"], delayed.servers["server"]
    with server.socket(
        socket.AF_INET6 if not machine.ipv4 else socket.AF_INET, socket.SOCK_STREAM
    ) as listener:
        listener.bind((str(server.ipv4), 0))
        listener.listen()
        listener.settimeout(ARRIVAL_S)
        program = "import socket,sys; s=socket.create_connection((sys.argv[1],int(sys.argv[2])),10);"
        program += "sys.stdout.buffer.write(b''.join(iter(lambda: s.recv(65536), b'')))"
        host, number = listener.getsockname()
        received = machine.directory / "received"
        with received.open("wb") as out:
            child = machine.popen([sys.executable, "-c", program, host, str(number)], stdout=out)
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(60)
                accepted.sendall(content)
            assert child.wait(20) == 0
        assert received.read_bytes() == content


def test_a_lab_without_delay_says_how_to_get_one_that_can_be_impaired(lab: Lab) -> None:
    with pytest.raises(LabError, match="impairable=True"):
        new_site(lab, Nat.NONE).set_link(loss=0.1)


def test_ten_sites_are_built_for_less_than_a_second_of_the_processor() -> None:
    started = processor_s()
    with Lab(delay_ms=1) as built:
        for number, nat in enumerate(Nat):
            built.site(f"s{number}", nat=nat).machine(f"m{number}")
        took = processor_s() - started
    assert len(Nat) == 10
    assert took < 1.0


def processor_s() -> float:
    """What this process and the programs that it ran have used, in seconds."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


# How a lab ends, each in a process of its own.

SCRIPT = """
import subprocess, sys, time
from lab import Lab, Nat
with Lab(delay_ms=1) as lab:
    machine = lab.site("home", nat=Nat.FULL_CONE).machine("box")
    machine.popen(["sleep", "1000"])
    # One that has left its parent, its session and its group, as user-space WireGuard does.
    machine.run(["setsid", "--fork", "sh", "-c", "sleep 1000 >/dev/null 2>&1 &"])
    if sys.argv[1] == "keep":
        lab.keep()
    print(lab.prefix, flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
    if sys.argv[1] == "fail":
        raise RuntimeError("on purpose")
"""


def start(how: str) -> tuple[subprocess.Popen[str], str]:
    environment = os.environ | {"PYTHONPATH": str(HACK)}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout
    with child.stdout:
        prefix = child.stdout.readline().strip()
    assert prefix
    return child, prefix


def lab_command(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lab", *words],
        env=os.environ | {"PYTHONPATH": str(HACK)},
        text=True,
        capture_output=True,
        timeout=20,
        check=True,
    )
    return done.stdout


def is_running(pid: int) -> bool:
    """Whether the process is more than an exit status that its foster parent has yet to collect."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_nothing_is_left(prefix: str, inside: list[int]) -> None:
    assert names_with(prefix) == []
    assert not (LABS / prefix).exists()
    assert [pid for pid in inside if is_running(pid)] == []


@pytest.mark.parametrize("how", ["end", "fail", signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_lab_that_ends_leaves_no_namespace_and_no_process(how: str | signal.Signals) -> None:
    child, prefix = start(how if isinstance(how, str) else "wait")
    inside = []
    if isinstance(how, signal.Signals):
        inside = processes_in(names_with(prefix))
        assert len(inside) == 4  # the holder of mounts, the shim, and the two sleepers
        child.send_signal(how)
    status = child.wait(20)
    assert (status == 0) == (how == "end")
    assert_nothing_is_left(prefix, inside)


def test_what_a_killed_lab_leaves_is_cleaned_and_a_living_lab_is_not(lab: Lab) -> None:
    child, prefix = start("wait")
    child.kill()
    child.wait(20)
    inside = processes_in(names_with(prefix))
    assert names_with(prefix)
    assert lab_command("clean", prefix, lab.prefix) == f"removed {prefix}\n"
    assert_nothing_is_left(prefix, inside)
    assert lab.servers["first"].namespace in names_with(lab.prefix)


def test_a_kept_lab_stays_can_be_entered_and_is_cleaned_later() -> None:
    child, prefix = start("keep")
    assert child.wait(20) == 0
    assert "gone" in lab_command("list")
    shown = lab_command("enter", f"{prefix}-home-box", "sh", "-c", "ip -brief addr; ls -d /var/run/wireguard")
    assert "10.1.0.10/24" in shown
    assert "10.1.0.1/24" in lab_command("enter", f"{prefix}-home", "ip", "-brief", "addr")
    # The uplink still passes frames: the shim lives on.
    lab_command("enter", f"{prefix}-home-box", "ping", "-c1", "-W3", "192.0.2.1")
    inside = processes_in(names_with(prefix))
    lab_command("clean", prefix)
    assert_nothing_is_left(prefix, inside)
