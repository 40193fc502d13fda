"""The forwarder with real packets: one hub on the lab's internet, peers of either family, and an outsider.

The sockets belong to this process and live in the lab's namespaces. That something does not arrive is shown
by something sent after it that does, and by the forwarder's own counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from lab import Lab, Server
from lab.netns import call_in, ip_batch, load_nft, write_sysctls
from scope_agent.relay import rules
from scope_agent.relay.shell.forwarder import ForwarderCounters, ForwarderProcess, grants_path
from scope_agent.relay.shell.forwarding import FORWARDING, read_sysctls

from scope.model import PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side, encode_grants, knock
from tests.netns.device_fixture import one_processor

PATIENCE = 60.0
UNDER_WAY = 50  # packets that any socket holds
ARRIVAL_S = 60.0  # without delay it takes microseconds; this is how long a busy machine may take
QUIET_S = 0.05  # for what must not arrive, after something that was sent later has arrived
PORT, OTHER_PORT = 26000, 26001
UDP_SEGMENT, SOL_UDP = 103, 17
MTU_PAYLOAD = 1452

Where = tuple[str, int]


def token(number: int) -> bytes:
    return number.to_bytes(8, "big")


def grant(number: int, *, ports: tuple[int, int] = (PORT, OTHER_PORT), lasts: float = 1000.0) -> Grant:
    """The grant of two sides, `number` and the one after it."""
    first, second = (
        Side(each, PublicKey(each.to_bytes(32, "big")), token(each), port)
        for each, port in zip((number, number + 1), ports, strict=True)
    )
    return Grant((first, second), time.time() + lasts)


def all_grants(*granted: Grant, pair: int = 0) -> Grants:
    return Grants(26000, 26255, RelayLimits(pair=pair), granted)


def data(number: int = 0, size: int = 100) -> bytes:
    """A datagram that looks like WireGuard's."""
    return struct.pack("<IQ", 4, number) + bytes(size - 12)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


class Peer:
    """A UDP socket on a host, as WireGuard's."""

    def __init__(self, host: Server, family: int, *, own: str = "") -> None:
        self.host = host
        self.family = family
        self.socket = host.socket(family)
        self.socket.settimeout(ARRIVAL_S)
        self.socket.bind((own, 0))

    def send(self, payload: bytes, to: Where) -> None:
        with one_processor():
            self.socket.sendto(payload, to)

    def receive(self) -> tuple[bytes, Where]:
        payload, source = self.socket.recvfrom(1 << 16)
        return payload, (source[0], source[1])

    def is_quiet(self) -> bool:
        self.socket.settimeout(QUIET_S)
        try:
            self.socket.recvfrom(1 << 16)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(ARRIVAL_S)
        return False


class Hub:
    """The forwarder on a host, as the program that it is."""

    def __init__(self, host: Server, file: Path) -> None:
        self.host = host
        self.file = file
        self.log = file.with_suffix(".log")
        self.process: subprocess.Popen[str] | None = None
        self.asked = ForwarderProcess(file)

    def write(self, grants: Grants) -> None:
        temporary = self.file.with_suffix(".new")
        temporary.write_text(encode_grants(grants))
        temporary.replace(self.file)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            self.process = self.host.popen(
                [sys.executable, "-m", "scope_dataplane.forwarder", "--grants", str(self.file), *arguments],
                stderr=log,
            )
        return self.process

    def serve(self, grants: Grants, *arguments: str) -> None:
        self.write(grants)
        self.start(*arguments)
        self.counters()

    def counters(self) -> ForwarderCounters:
        deadline = time.monotonic() + PATIENCE
        while (told := self.asked.counters()) is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return told

    def families(self, number: int) -> tuple[int, ...]:
        """Over what a side is found."""
        return next(side.families for pair in self.counters().pairs for side in pair if side.id == number)

    def at(self, port: int, family: int = socket.AF_INET) -> Where:
        return str(self.host.ipv4 if family == socket.AF_INET else self.host.ipv6), port

    def knock(self, peer: Peer, number: int, port: int) -> None:
        """Knock, and see that it was heard."""
        peer.send(knock(token(number)), self.at(port, peer.family))
        version = 4 if peer.family == socket.AF_INET else 6
        wait_until(lambda: version in self.families(number), f"the knock of {number} is heard")

    def await_drops(self, **drops: int) -> None:
        """Return when so many were dropped, by why: also from elsewhere, and later than they were sent."""
        wait_until(
            lambda: {why: self.counters().drops[why] for why in drops} == drops, f"dropped are {drops}"
        )

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as built:
        for name in ("hub", "alice", "bob", "mallory"):
            built.server(name)
        yield built


@pytest.fixture
def hub(lab: Lab, tmp_path: Path) -> Iterator[Hub]:
    directory = Path("/run") / f"scope-forwarder-test-{os.getpid()}"  # short enough for a Unix socket
    directory.mkdir(mode=0o700)
    made = Hub(lab.servers["hub"], directory / "g.json")
    yield made
    made.end()
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.fixture
def peer(lab: Lab) -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(name: str, family: int = socket.AF_INET, *, own: str = "") -> Peer:
        made.append(Peer(lab.servers[name], family, own=own))
        return made[-1]

    yield make
    for each in made:
        each.socket.close()


Made = Callable[..., Peer]
V4, V6 = socket.AF_INET, socket.AF_INET6


def assert_speak(hub: Hub, alice: Peer, bob: Peer, *, size: int = 100) -> None:
    """Each hears the other at its own port of the hub."""
    for sender, receiver, to, heard_at in ((alice, bob, PORT, OTHER_PORT), (bob, alice, OTHER_PORT, PORT)):
        sent = data(to, size)
        sender.send(sent, hub.at(to, sender.family))
        assert receiver.receive() == (sent, hub.at(heard_at, receiver.family))


def joined(hub: Hub, alice: Peer, bob: Peer) -> None:
    hub.serve(all_grants(grant(1)))
    hub.knock(alice, 1, PORT)
    hub.knock(bob, 2, OTHER_PORT)


# --- relaying -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(V4, V4), (V4, V6), (V6, V4), (V6, V6)])
def test_a_pair_speaks_through_the_hub_over_any_families(
    hub: Hub, peer: Made, first: int, second: int
) -> None:
    alice, bob = peer("alice", first), peer("bob", second)
    joined(hub, alice, bob)
    for size in (32, 100, MTU_PAYLOAD, 1472, 4000):
        assert_speak(hub, alice, bob, size=size)
    probe = b"SCop" + bytes(60)
    alice.send(probe, hub.at(PORT, first))
    assert bob.receive()[0] == probe
    counters = hub.counters()
    (pair,) = counters.pairs
    assert [side.packets for side in pair] == [6, 5]
    assert pair[0].bytes == 32 + 100 + MTU_PAYLOAD + 1472 + 4000 + 64
    assert not any(counters.drops.values())


def test_it_answers_from_the_address_that_was_knocked_at(hub: Hub, peer: Made) -> None:
    alice, bob = peer("hub", V4, own="127.0.0.1"), peer("bob", V6)
    hub.serve(all_grants(grant(1)))
    hub.knock(bob, 2, OTHER_PORT)
    for own in ("127.0.0.2", "127.0.0.3"):
        alice.send(knock(token(1)), (own, PORT))
        alice.send(data(1), (own, PORT))
        assert bob.receive() == (data(1), hub.at(OTHER_PORT, V6))
        bob.send(data(2), hub.at(OTHER_PORT, V6))
        assert alice.receive() == (data(2), (own, PORT))


def test_a_changed_mapping_is_followed_from_the_next_knock_on(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    moved = peer("alice")
    moved.send(data(7), hub.at(PORT))
    hub.await_drops(stranger=1)
    moved.send(knock(token(1)), hub.at(PORT))
    assert_speak(hub, moved, bob)
    alice.send(data(9), hub.at(PORT))
    hub.await_drops(stranger=2)
    assert_speak(hub, moved, bob)
    assert alice.is_quiet()


def test_pairs_of_one_hub_are_apart(hub: Hub, peer: Made) -> None:
    """Many peers at the same port, and one peer at many."""
    hub.serve(all_grants(grant(1), grant(3), grant(5, ports=(OTHER_PORT, OTHER_PORT))))
    alice, bob, carol, dave = peer("alice"), peer("bob"), peer("alice", V6), peer("bob", V6)
    hub.knock(alice, 1, PORT)
    hub.knock(bob, 2, OTHER_PORT)
    hub.knock(carol, 3, PORT)
    hub.knock(dave, 4, OTHER_PORT)
    hub.knock(alice, 5, OTHER_PORT)
    hub.knock(carol, 6, OTHER_PORT)
    assert_speak(hub, alice, bob)
    assert_speak(hub, carol, dave)
    alice.send(data(5), hub.at(OTHER_PORT))
    assert carol.receive() == (data(5), hub.at(OTHER_PORT, V6))
    assert bob.is_quiet() and dave.is_quiet() and alice.is_quiet()


def test_what_the_kernel_can_relay_never_comes_to_the_process(hub: Hub, peer: Made) -> None:
    """One file of grants, two that forward: the rules within a family, the process from one to the other."""
    alice, bob, dave = peer("alice"), peer("bob"), peer("bob", V6)
    granted = all_grants(grant(2), grant(4, ports=(26002, 26003)))
    switches = dict.fromkeys(FORWARDING.values(), "1")
    inside = hub.host.namespace
    before = call_in(inside, lambda: read_sysctls(switches))
    write_sysctls(inside, switches)
    load_nft(rules.load("scope0", granted, wall=time.time(), seed=1), inside=inside)
    try:
        hub.serve(granted)
        for each, number, port in (
            (alice, 2, PORT),
            (bob, 3, OTHER_PORT),
            (alice, 4, 26002),
            (dave, 5, 26003),
        ):
            hub.knock(each, number, port)
        for _ in range(20):
            assert_speak(hub, alice, bob)
            alice.send(data(3), hub.at(26002))
            assert dave.receive() == (data(3), hub.at(26003, V6))
            dave.send(data(4), hub.at(26003, V6))
            assert alice.receive() == (data(4), hub.at(26002))
        counters = hub.counters()
        assert [[side.packets for side in pair] for pair in counters.pairs] == [[0, 0], [20, 20]]
        assert not any(counters.drops.values())
        hub.end()
        assert_speak(hub, alice, bob)
    finally:
        load_nft(rules.delete("scope0"), inside=inside)
        write_sysctls(inside, before)


# --- batches ------------------------------------------------------------------------------------------------


def send_batch(sender: Peer, payload: bytes, to: Where) -> None:
    segment = (SOL_UDP, UDP_SEGMENT, struct.pack("=H", MTU_PAYLOAD))
    with one_processor():
        sender.socket.sendmsg([payload], [segment], 0, to)


def batch(count: int, *, tail: int) -> list[bytes]:
    return [*(data(number, MTU_PAYLOAD) for number in range(count)), data(count, tail)]


@pytest.mark.parametrize(("first", "second"), [(V4, V4), (V4, V6), (V6, V4)])
def test_a_batch_arrives_as_a_batch_and_leaves_as_one(hub: Hub, peer: Made, first: int, second: int) -> None:
    alice, bob = peer("alice", first), peer("bob", second)
    joined(hub, alice, bob)
    rounds = 20
    for _ in range(rounds):
        sent = batch(43, tail=700)
        send_batch(alice, b"".join(sent), hub.at(PORT, first))
        assert [bob.receive()[0] for _ in sent] == sent
    counters = hub.counters()
    assert counters.sent == {"batches": rounds, "segments": 44 * rounds, "singles": 0}
    assert counters.pairs[0][0].packets == 44 * rounds
    assert counters.pairs[0][0].bytes == (43 * MTU_PAYLOAD + 700) * rounds


def test_single_datagrams_of_one_sender_that_wait_leave_in_a_batch(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    assert hub.process is not None
    hub.process.send_signal(signal.SIGSTOP)
    sent = batch(19, tail=500)
    for payload in sent:
        alice.send(payload, hub.at(PORT))
    hub.process.send_signal(signal.SIGCONT)
    assert [bob.receive()[0] for _ in sent] == sent
    assert hub.counters().sent == {"batches": 1, "segments": 20, "singles": 0}


def test_a_knock_at_the_end_of_a_batch_is_heard_and_not_passed_on(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    joined(hub, alice, bob)
    alice = peer("alice")
    sent = [data(number, MTU_PAYLOAD) for number in range(5)]
    send_batch(alice, b"".join(sent) + knock(token(1)), hub.at(PORT))
    assert [bob.receive()[0] for _ in sent] == sent
    assert_speak(hub, alice, bob)
    assert hub.counters().pairs[0][0].packets == 6


def test_a_batch_for_a_way_that_is_too_narrow_leaves_in_pieces(lab: Lab, hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    namespace, narrow = hub.host.namespace, f"{bob.host.ipv6}/128"
    (default,) = hub.host.run(["ip", "-6", "route", "show", "default"]).stdout.splitlines()
    way = " ".join(default.split()[1 : default.split().index("dev") + 2])
    ip_batch([f"route add {narrow} {way} mtu lock 1300"], inside=namespace)
    try:
        sent = batch(9, tail=700)
        send_batch(alice, b"".join(sent), hub.at(PORT))
        assert [bob.receive()[0] for _ in sent] == sent
    finally:
        ip_batch([f"route del {narrow}"], inside=namespace)
    assert hub.counters().sent == {"batches": 0, "segments": 0, "singles": 10}
    hub.knock(bob, 2, OTHER_PORT)
    send_batch(alice, b"".join(sent), hub.at(PORT))
    assert [bob.receive()[0] for _ in sent] == sent
    assert hub.counters().sent == {"batches": 1, "segments": 10, "singles": 10}


# --- outsiders ----------------------------------------------------------------------------------------------


def test_an_outsider_opens_uses_redirects_and_hears_nothing(hub: Hub, peer: Made) -> None:
    alice, bob, mallory = peer("alice"), peer("bob", V6), peer("mallory")
    joined(hub, alice, bob)
    strange = [
        knock(token(99)),
        knock(token(2)),  # right, but not at this port
        knock(token(1))[:-1],
        knock(token(1)) + b"\0",
        data(),
        b"SCop" + bytes(60),
        b"",
        b"\0",
        bytes(1400),
    ]
    for payload in strange:
        mallory.send(payload, hub.at(PORT))
    send_batch(mallory, b"".join(batch(5, tail=40)), hub.at(PORT))
    hub.await_drops(knock=2, stranger=7 + 6)
    assert_speak(hub, alice, bob)
    assert mallory.is_quiet() and bob.is_quiet() and alice.is_quiet()


def test_what_is_neither_wireguards_nor_a_probe_does_not_pass_for_members_either(
    hub: Hub, peer: Made
) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    for payload in (
        b"",
        b"\4\0\0\0",
        bytes(1400),
        b"\5\0\0\0" + bytes(60),
        b"SCoh" + bytes(60),
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        alice.send(payload, hub.at(PORT))
    assert_speak(hub, alice, bob)
    assert bob.is_quiet()
    counters = hub.counters()
    assert counters.drops["shape"] == counters.pairs[0][0].dropped == 6


def test_a_side_at_a_port_of_the_hub_itself_is_not_believed(hub: Hub, peer: Made) -> None:
    """Two such sides would hand one datagram to each other for ever."""
    hub.serve(all_grants(grant(1)))
    raw = call_in(hub.host.namespace, lambda: socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_RAW))
    with raw:
        for number, to, claimed in ((1, PORT, OTHER_PORT), (2, OTHER_PORT, PORT)):
            udp = struct.pack("!HHHH", claimed, to, 8 + 12, 0) + knock(token(number))
            local = socket.inet_aton("127.0.0.1")
            header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, local, local)
            raw.sendto(header + udp, ("127.0.0.1", 0))
    wait_until(lambda: hub.counters().drops["knock"] == 2, "both were seen")
    assert hub.families(1) == hub.families(2) == ()
    # A peer on the hub's loopback, at a port that is not the forwarder's own, is one like any other.
    carol, bob = peer("hub", V4, own="127.0.0.1"), peer("bob")
    hub.knock(bob, 2, OTHER_PORT)
    carol.send(knock(token(1)), ("127.0.0.1", PORT))
    carol.send(data(2), ("127.0.0.1", PORT))
    assert bob.receive() == (data(2), hub.at(OTHER_PORT))
    bob.send(data(3), hub.at(OTHER_PORT))
    assert carol.receive() == (data(3), ("127.0.0.1", PORT))


def test_a_pair_gets_no_more_than_its_rate(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    hub.serve(all_grants(grant(1), grant(3), pair=100_000))
    began = time.monotonic()
    hub.knock(alice, 1, PORT)
    hub.knock(bob, 2, OTHER_PORT)
    for number in range(500):
        alice.send(data(number, 1000), hub.at(PORT))
    wait_until(lambda: sum(hub.counters().drops.values()) + hub.counters().pairs[0][0].packets == 500, "all")
    counters = hub.counters()
    # What it holds at first, what the rate brings until now, and one batch more.
    assert 20_000 <= counters.pairs[0][0].bytes <= 25_000 + 100_000 * (time.monotonic() - began) + 65_536
    assert counters.drops["rate"] == counters.pairs[0][0].dropped > 0
    assert [side.is_capped for pair in counters.pairs for side in pair] == [True, False, False, False]


# --- the file -----------------------------------------------------------------------------------------------


def test_replacing_the_file_while_packets_flow_loses_none(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    total = 2000
    got: set[int] = set()

    def listen() -> None:
        with contextlib.suppress(TimeoutError):
            while len(got) < total:
                got.add(struct.unpack_from("<Q", bob.receive()[0], 4)[0])

    def is_followed(number: int) -> bool:
        return number - len(got) < UNDER_WAY

    listener = threading.Thread(target=listen)
    listener.start()
    for number in range(total):
        if number % 100 == 0:
            more = (grant(3 + 2 * each, ports=(26002 + number // 100, 26030)) for each in range(number % 300))
            hub.write(all_grants(grant(1, lasts=1000.0 + number), *more))
        # A busy machine may leave the forwarder without a processor for longer than its socket can hold.
        wait_until(partial(is_followed, number), "packets are lost")
        alice.send(data(number), hub.at(PORT))
        time.sleep(0.001)
    listener.join()
    assert got == set(range(total))
    assert not any(hub.counters().drops.values())


def test_a_grant_that_leaves_the_file_is_served_no_longer(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    joined(hub, alice, bob)
    assert_speak(hub, alice, bob)
    hub.write(all_grants(grant(3)))
    wait_until(lambda: hub.counters().pairs[0][0].id == 3, "the new file is read")
    alice.send(data(), hub.at(PORT))
    carol, dave = peer("alice", V6), peer("bob", V6)
    hub.knock(carol, 3, PORT)
    hub.knock(dave, 4, OTHER_PORT)
    assert_speak(hub, carol, dave)
    assert bob.is_quiet()
    hub.await_drops(stranger=1)


def test_a_grant_ends_when_its_time_has_come(hub: Hub, peer: Made) -> None:
    hub.serve(all_grants(grant(3)))
    hub.write(all_grants(grant(3), grant(1, lasts=5.0)))
    wait_until(lambda: len(hub.counters().pairs) == 2, "the new file is read")
    wait_until(lambda: len(hub.counters().pairs) == 1, "the grant has ended")
    assert hub.counters().pairs[0][0].id == 3


def test_a_broken_file_changes_nothing_and_is_named_once(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    hub.file.write_text('{"version": 1, "ports": [26000')
    wait_until(lambda: "changes nothing" in hub.log.read_text(), "the broken file is named")
    time.sleep(0.6)  # two looks more
    assert_speak(hub, alice, bob)
    assert hub.log.read_text().count("changes nothing") == 1
    hub.write(all_grants(grant(1), grant(3)))
    wait_until(lambda: len(hub.counters().pairs) == 2, "the next file is read")
    assert_speak(hub, alice, bob)


def test_without_the_file_it_waits_and_ends_when_it_is_removed(hub: Hub, peer: Made) -> None:
    process = hub.start()
    wait_until(hub.file.with_suffix(".lock").exists, "it has its lock")
    assert process.poll() is None and not hub.asked.is_running()
    hub.write(all_grants(grant(1)))
    wait_until(hub.asked.is_running, "it serves")
    assert len(hub.counters().pairs) == 1
    hub.file.unlink()
    assert process.wait(PATIENCE) == 0
    assert not hub.file.with_suffix(".sock").exists()
    assert not hub.asked.is_running()


# --- the process --------------------------------------------------------------------------------------------


def test_killed_and_started_again_it_serves_from_the_next_knocks_on(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    joined(hub, alice, bob)
    assert_speak(hub, alice, bob)
    hub.end()
    hub.start()
    wait_until(hub.asked.is_running, "it serves again")
    hub.counters()
    alice.send(data(1), hub.at(PORT))
    hub.await_drops(stranger=1)
    hub.knock(alice, 1, PORT)
    hub.knock(bob, 2, OTHER_PORT)
    assert_speak(hub, alice, bob)


@pytest.mark.parametrize("is_serving", [False, True])
def test_it_ends_when_it_is_asked_to(hub: Hub, is_serving: bool) -> None:
    if is_serving:
        hub.serve(all_grants(grant(1)))
    else:
        hub.start()
        wait_until(hub.file.with_suffix(".lock").exists, "it has its lock")
    assert hub.process is not None
    hub.process.terminate()
    assert hub.process.wait(PATIENCE) == 0
    assert not hub.file.with_suffix(".sock").exists()


def test_one_forwarder_serves_one_file(hub: Hub) -> None:
    hub.serve(all_grants(grant(1)))
    command = [sys.executable, "-m", "scope_dataplane.forwarder", "--grants", str(hub.file)]
    done = hub.host.run(command, check=False)
    assert done.returncode == 1
    assert "another scope-forwarder" in done.stderr
    assert hub.asked.is_running()


def test_what_keeps_it_from_starting_is_said_with_what_to_do(hub: Hub, tmp_path: Path) -> None:
    far = tmp_path / ("far" * 40) / "g.json"
    far.parent.mkdir()
    far.write_text(encode_grants(all_grants()))
    program = [sys.executable, "-m", "scope_dataplane.forwarder", "--grants"]
    done = hub.host.run([*program, str(far)], check=False)
    assert (done.returncode, done.stderr.count("shorter path")) == (1, 1)
    without = "-net_admin,-net_raw"  # a kernel since 5.17 marks packets with either
    plain = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *program, str(hub.file)]
    done = hub.host.run([*plain, "--mark", "1"], check=False)
    assert (done.returncode, done.stderr.count("CAP_NET_ADMIN")) == (1, 1)


def test_a_port_that_another_program_has_is_named_and_the_others_are_served(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    taken = hub.host.socket(V4)
    taken.bind(("", 26007))
    hub.serve(all_grants(grant(1), grant(3, ports=(26007, 26007))))
    hub.knock(alice, 1, PORT)
    hub.knock(bob, 2, OTHER_PORT)
    assert_speak(hub, alice, bob)
    (named,) = hub.counters().taken
    assert (named.port, named.version) == (26007, 4)
    assert hub.log.read_text().count("port 26007, IPv4") == 1
    carol = peer("bob", V6)
    hub.knock(carol, 3, 26007)
    taken.close()
    wait_until(lambda: not hub.counters().taken, "the port is tried again")
    hub.knock(alice, 4, 26007)
    carol.send(data(4), hub.at(26007, V6))
    assert alice.receive() == (data(4), hub.at(26007))


def test_its_packets_carry_the_mark(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    load_nft(
        "table inet marked { chain out { type filter hook output priority 0;\n"
        f"meta mark 0xca6c udp sport {OTHER_PORT} counter\n}}\n}}\n",
        inside=hub.host.namespace,
    )
    try:
        hub.serve(all_grants(grant(1)), "--mark", "0xca6c")
        hub.knock(alice, 1, PORT)
        hub.knock(bob, 2, OTHER_PORT)
        assert_speak(hub, alice, bob)
        assert "packets 1 " in hub.host.run(["nft", "list", "table", "inet", "marked"]).stdout
    finally:
        hub.host.run(["nft", "delete", "table", "inet", "marked"])


def test_a_token_is_nowhere_but_in_the_file(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    joined(hub, alice, bob)
    alice.send(knock(token(77)), hub.at(PORT))
    hub.file.write_text(hub.file.read_text()[:-5])
    wait_until(lambda: "changes nothing" in hub.log.read_text(), "the broken file is named")
    assert hub.process is not None
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(hub.file.with_suffix(".sock")))
        told = asking.makefile().read()
    arguments = Path("/proc", str(hub.process.pid), "cmdline").read_text()
    for secret in (token(1).hex(), token(77).hex(), repr(token(1))):
        assert secret not in told + arguments + hub.log.read_text()
    assert stat_mode(hub.file.with_suffix(".sock")) == stat_mode(hub.file.with_suffix(".lock")) == 0o600


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_readers_that_read_nothing_hold_nothing_up(hub: Hub, peer: Made) -> None:
    alice, bob = peer("alice"), peer("bob")
    joined(hub, alice, bob)
    more = (grant(3 + 2 * number) for number in range(3000))
    hub.write(all_grants(grant(1), *more))
    wait_until(lambda: len(hub.counters().pairs) == 3001, "the new file is read")
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            idle = stack.enter_context(socket.socket(socket.AF_UNIX))
            idle.connect(str(hub.file.with_suffix(".sock")))
        assert_speak(hub, alice, bob)
        assert len(hub.counters().pairs) == 3001


# --- as the agent has it ------------------------------------------------------------------------------------


@pytest.fixture
def agents(lab: Lab, hub: Hub) -> Iterator[ForwarderProcess]:
    """The agent's view; its file lies where the test's own forwarder would have it."""
    yield hub.asked
    call_in(hub.host.namespace, hub.asked.stop)


def test_the_agent_starts_one_that_does_not_end_with_it(
    hub: Hub, peer: Made, agents: ForwarderProcess
) -> None:
    alice, bob = peer("alice"), peer("bob", V6)
    assert agents.counters() is None and not agents.is_running()
    call_in(hub.host.namespace, lambda: agents.program(all_grants(grant(1))))
    wait_until(agents.is_running, "it serves")
    hub.knock(alice, 1, PORT)
    hub.knock(bob, 2, OTHER_PORT)
    # An agent that starts anew finds it, and what it learned.
    successor = ForwarderProcess(hub.file)
    call_in(hub.host.namespace, lambda: successor.program(all_grants(grant(1), grant(3))))
    wait_until(lambda: len(hub.counters().pairs) == 2, "the new file is read")
    assert_speak(hub, alice, bob)
    assert stat_mode(hub.file) == 0o600
    (pid,) = started_for(hub.file)
    assert os.getsid(pid) == pid
    successor.stop()
    assert not agents.is_running() and not hub.file.exists()
    assert agents.counters() is None


def test_one_that_was_killed_is_started_again(hub: Hub, agents: ForwarderProcess) -> None:
    call_in(hub.host.namespace, lambda: agents.program(all_grants(grant(1))))
    wait_until(agents.is_running, "it serves")
    (pid,) = started_for(hub.file)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not agents.is_running(), "it is gone")

    def is_back() -> bool:
        call_in(hub.host.namespace, lambda: agents.program(all_grants(grant(1))))
        return agents.is_running()

    wait_until(is_back, "it is back")
    assert started_for(hub.file) != [pid]
    assert len(hub.counters().pairs) == 1


def test_stopping_one_that_never_served_leaves_nothing(hub: Hub, agents: ForwarderProcess) -> None:
    call_in(hub.host.namespace, lambda: agents.program(all_grants(grant(1))))
    agents.stop()
    assert started_for(hub.file) == []


def test_the_unit_reads_the_file_that_the_agent_writes() -> None:
    unit = (Path(__file__).parents[2] / "docs" / "systemd" / "scope-forwarder@.service").read_text()
    assert f"--grants {grants_path(Path('/run/scope'), '%i')}\n" in unit


def started_for(file: Path) -> list[int]:
    """The forwarders that run for a file."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            arguments = path.read_bytes().split(b"\0")
            if b"scope_dataplane.forwarder" in arguments and os.fsencode(file) in arguments:
                found.append(int(path.parent.name))
    return found
