"""A hub's kernel relaying real datagrams: what passes, what does not, and what stays as it came."""

from __future__ import annotations

import contextlib
import ctypes
import secrets
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address
from pathlib import Path

import pytest
from lab import Host, Lab, Nat, Server
from lab.netns import NETNS, call_in, flush_conntrack, ip_batch, load_nft, write_sysctls
from scope_agent.relay import rules
from scope_agent.relay.counting import Sent
from scope_agent.relay.shell import selftest
from scope_agent.relay.shell.forwarding import FORWARDING, plan_forwarding, read_sysctls, restore_sysctls
from scope_agent.relay.shell.forwarding import write_sysctls as forward
from scope_agent.relay.shell.hub import HubMachine, Outcome
from scope_agent.relay.shell.rules import KernelRelay
from scope_agent.relay.shell.selftest import why_not

from scope.model import Family, Forwarding, IPAddress, PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side, knock
from tests.netns.device_fixture import one_processor, wait_until

PATIENCE = 60.0
QUIET_S = 1.0  # after what was sent at once: nothing more comes
DEVICE = "scope-t"
TABLE = rules.table(DEVICE)
SEED = 0x5EED
PORTS = (26000, 26255)
A_PORT, B_PORT = 26003, 26200  # of the hub, for either side
A_TOKEN, B_TOKEN = b"tokenofA", b"tokenofB"
PEERS = tuple(PublicKey(bytes([number]) * 32) for number in range(1, 9))
DATA = b"\4\0\0\0" + bytes(28)  # as WireGuard's keepalive looks
PROBE = b"SCop" + bytes(60)
_SO_RCVMARK, _SO_MARK = 75, 36

both_families = pytest.mark.parametrize("family", list(Family), ids=str)


def grant(
    first: int = 2,
    *,
    peers: tuple[PublicKey, PublicKey] = (PEERS[0], PEERS[1]),
    tokens: tuple[bytes, bytes] = (A_TOKEN, B_TOKEN),
    ports: tuple[int, int] = (A_PORT, B_PORT),
    lasting: float = 86400.0,
) -> Grant:
    sides = [
        Side(first + number, peer, token, port)
        for number, (peer, token, port) in enumerate(zip(peers, tokens, ports, strict=True))
    ]
    return Grant((sides[0], sides[1]), time.time() + lasting)


GRANTS = Grants(*PORTS, RelayLimits(), (grant(),))
SECOND = grant(4, peers=(PEERS[0], PEERS[2]), tokens=(b"tokenofC", b"tokenofD"), ports=(26004, 26005))


class End:
    """A UDP socket in a namespace, as WireGuard's would be."""

    def __init__(
        self, namespace: str, family: Family, *, port: int = 0, address: IPAddress | None = None
    ) -> None:
        number = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        self.socket = call_in(namespace, lambda: socket.socket(number, socket.SOCK_DGRAM))
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 1 << 22)  # SO_RCVBUFFORCE
        self.socket.bind(("" if address is None else str(address), port))
        self.socket.settimeout(PATIENCE)

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def send(self, data: bytes, to: IPAddress, port: int) -> None:
        with one_processor():
            self.socket.sendto(data, (str(to), port))

    def receive(self) -> tuple[bytes, IPAddress, int]:
        data, (address, port, *_) = self.socket.recvfrom(4096)
        return data, ip_address(address), port

    def drain(self) -> list[bytes]:
        """All that has come."""
        got = []
        while select.select([self.socket], [], [], 0.0)[0]:
            got.append(self.socket.recv(4096))
        return got

    def count(self) -> int:
        """How many have come and still come, of which there is at least one."""
        self.receive()
        counted = 1
        while select.select([self.socket], [], [], QUIET_S)[0]:
            self.receive()
            counted += 1
        return counted

    def close(self) -> None:
        self.socket.close()


@dataclass(frozen=True, slots=True)
class Internet:
    """A hub, and three others who reach it straight."""

    lab: Lab
    hub: Server
    anna: Server
    bert: Server
    mallory: Server


@pytest.fixture(scope="module")
def internet() -> Iterator[Internet]:
    with Lab() as lab:
        hub, *others = (lab.server(name) for name in ("hub", "anna", "bert", "mallory"))
        write_sysctls(hub.namespace, {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"})
        yield Internet(lab, hub, *others)


@dataclass(frozen=True, slots=True)
class Relay:
    """A hub with the grant of A and B, who have both knocked, in one family."""

    internet: Internet
    family: Family
    a: End
    b: End
    opened: contextlib.ExitStack

    @property
    def hub(self) -> IPAddress:
        return address_of(self.internet.hub, self.family)

    def end(self, host: Host, *, port: int = 0, address: IPAddress | None = None) -> End:
        end = End(host.namespace, self.family, port=port, address=address)
        return self.opened.enter_context(contextlib.closing(end))

    def local(self, port: int) -> End:
        """A socket of the hub itself."""
        return self.end(self.internet.hub, port=port)

    def knock(self, end: End, token: bytes, port: int, *, to: IPAddress | None = None) -> None:
        """Knock, and return when the hub's kernel has heard it: what is sent elsewhere may overtake it."""
        with contextlib.closing(End(self.internet.hub.namespace, self.family, port=port)) as heard:
            end.send(knock(token), to or self.hub, port)
            assert heard.receive()[0] == knock(token)

    def load(self, grants: Grants) -> None:
        load_nft(rules.load(DEVICE, grants, wall=time.time(), seed=SEED), inside=self.internet.hub.namespace)

    def change(self, before: Grants, after: Grants) -> None:
        load_nft(rules.change(DEVICE, before, after, wall=time.time()), inside=self.internet.hub.namespace)

    def passes(self, data: bytes = DATA) -> None:
        """Data goes both ways, and each side finds the other at its own port of the hub."""
        self.a.send(data, self.hub, A_PORT)
        assert self.b.receive() == (data, self.hub, B_PORT)
        self.b.send(data, self.hub, B_PORT)
        assert self.a.receive() == (data, self.hub, A_PORT)

    def elements(self, name: str) -> int:
        """How many a map or set of the table has."""
        shown = self.internet.hub.run(["nft", "list", "map", "inet", TABLE, name], check=False)
        if shown.returncode:
            shown = self.internet.hub.run(["nft", "list", "set", "inet", TABLE, name])
        return shown.stdout.count("expires")


@contextlib.contextmanager
def relayed(internet: Internet, family: Family) -> Iterator[Relay]:
    """The relay of one family; what the hub had before is gone."""
    with contextlib.ExitStack() as opened:
        a, b = (
            opened.enter_context(contextlib.closing(End(host.namespace, family)))
            for host in (internet.anna, internet.bert)
        )
        made = Relay(internet, family, a, b, opened)
        load_nft("flush ruleset\n", inside=internet.hub.namespace)
        made.load(GRANTS)
        made.knock(a, A_TOKEN, A_PORT)
        made.knock(b, B_TOKEN, B_PORT)
        yield made


@pytest.fixture
def relay(internet: Internet, family: Family) -> Iterator[Relay]:
    with relayed(internet, family) as made:
        yield made


def address_of(host: Host, family: Family) -> IPAddress:
    address = host.ipv4 if family is Family.IPV4 else host.ipv6
    assert address is not None
    return address


@both_families
def test_datagrams_of_wireguard_and_probes_go_both_ways_from_the_other_sides_port(relay: Relay) -> None:
    for data in (DATA, b"\1\0\0\0" + bytes(144), b"\4\0\0\0" + secrets.token_bytes(1416), PROBE):
        relay.passes(data)


@both_families
def test_what_looks_like_neither_wireguard_nor_a_probe_stays_at_the_hub_as_it_came(relay: Relay) -> None:
    local = relay.local(A_PORT)
    odd = [
        DATA[:-1],
        b"\5\0\0\0" + bytes(60),
        b"\0\0\0\4" + bytes(60),
        PROBE[:-1],
        b"SCoh" + bytes(60),
        b"SCoq" + bytes(60),
        b"",
    ]
    for data in odd:
        relay.a.send(data, relay.hub, A_PORT)
        assert local.receive() == (data, address_of(relay.internet.anna, relay.family), relay.a.port)
    relay.passes()
    assert relay.b.drain() == []


@both_families
def test_a_knock_also_reaches_the_hubs_own_socket(relay: Relay) -> None:
    local = relay.local(A_PORT)
    relay.a.send(knock(A_TOKEN), relay.hub, A_PORT)
    assert local.receive() == (knock(A_TOKEN), address_of(relay.internet.anna, relay.family), relay.a.port)


@both_families
def test_what_an_outsider_sends_to_a_port_in_use_is_not_relayed(relay: Relay) -> None:
    mallory, local = relay.end(relay.internet.mallory), relay.local(A_PORT)
    for data in (DATA, PROBE):
        mallory.send(data, relay.hub, A_PORT)
        assert local.receive() == (data, address_of(relay.internet.mallory, relay.family), mallory.port)
    relay.passes()
    assert relay.a.drain() == relay.b.drain() == mallory.drain() == []


@both_families
def test_a_datagram_from_another_port_of_the_same_machine_is_not_relayed(relay: Relay) -> None:
    beside, local = relay.end(relay.internet.anna), relay.local(A_PORT)
    beside.send(DATA, relay.hub, A_PORT)
    assert local.receive()[2] == beside.port
    relay.passes()
    assert relay.b.drain() == []


@both_families
def test_a_side_reaches_nobody_by_a_port_that_is_not_its_own(relay: Relay) -> None:
    local = relay.local(B_PORT)
    relay.a.send(DATA, relay.hub, B_PORT)
    assert local.receive()[2] == relay.a.port
    relay.passes()
    assert relay.b.drain() == []


@both_families
def test_a_wrong_token_changes_nothing(relay: Relay) -> None:
    mallory, local = relay.end(relay.internet.mallory), relay.local(A_PORT)
    for wrong in (b"tokenofC", bytes(8), A_TOKEN[:-1] + b"B"):
        mallory.send(knock(wrong), relay.hub, A_PORT)
        assert local.receive()[0] == knock(wrong)
    relay.passes()
    mallory.send(DATA, relay.hub, A_PORT)
    assert local.receive()[0] == DATA
    assert mallory.drain() == []


@both_families
def test_a_right_token_at_another_port_changes_nothing(relay: Relay) -> None:
    mallory, local = relay.end(relay.internet.mallory), relay.local(B_PORT)
    mallory.send(knock(A_TOKEN), relay.hub, B_PORT)
    assert local.receive()[0] == knock(A_TOKEN)
    relay.passes()
    assert mallory.drain() == []


@both_families
def test_a_token_cut_short_changes_nothing(relay: Relay) -> None:
    mallory, local = relay.end(relay.internet.mallory), relay.local(A_PORT)
    mallory.send(knock(A_TOKEN)[:-1], relay.hub, A_PORT)
    local.receive()
    relay.passes()
    assert mallory.drain() == []


@both_families
def test_a_flood_of_wrong_knocks_fills_no_map_and_is_answered_by_nothing(relay: Relay) -> None:
    mallory, local = relay.end(relay.internet.mallory), relay.local(A_PORT)
    tag = "4" if relay.family is Family.IPV4 else "6"
    names = [f"{name}{tag}" for name in ("place", "address", "source", "own", "new_address")] + ["knocks"]
    before = {name: relay.elements(name) for name in names}
    assert before[f"place{tag}"] == before["knocks"] == 2
    for number in range(1000):
        mallory.send(knock(number.to_bytes(8, "big")), relay.hub, A_PORT)
        local.receive()
    assert {name: relay.elements(name) for name in names} == before
    assert mallory.drain() == []


@both_families
def test_a_datagram_leaves_no_more_than_it_brought(relay: Relay) -> None:
    """No answer, no copy: what one side sends arrives once, and nothing comes back for it."""
    for _ in range(20):
        relay.a.send(DATA, relay.hub, A_PORT)
        assert relay.b.receive()[0] == DATA
    relay.passes()
    assert relay.a.drain() == relay.b.drain() == []


@both_families
def test_before_the_other_side_has_knocked_a_datagram_stays_as_it_came(relay: Relay) -> None:
    load_nft("flush ruleset\n", inside=relay.internet.hub.namespace)
    relay.load(GRANTS)
    local = relay.local(A_PORT)
    relay.a.send(knock(A_TOKEN), relay.hub, A_PORT)
    local.receive()
    relay.a.send(DATA, relay.hub, A_PORT)
    assert local.receive() == (DATA, address_of(relay.internet.anna, relay.family), relay.a.port)
    relay.knock(relay.b, B_TOKEN, B_PORT)
    relay.passes()


@both_families
def test_a_side_that_knocks_from_elsewhere_is_spoken_to_and_heard_there_alone(
    relay: Relay,
) -> None:
    relay.passes()
    moved, local = relay.end(relay.internet.anna), relay.local(A_PORT)
    moved.send(knock(A_TOKEN), relay.hub, A_PORT)
    assert local.receive()[2] == moved.port
    relay.a.send(DATA, relay.hub, A_PORT)
    assert local.receive()[2] == relay.a.port
    replace(relay, a=moved).passes()
    assert relay.a.drain() == relay.b.drain() == []
    # And back: what was taken away is learned anew.
    relay.a.send(knock(A_TOKEN), relay.hub, A_PORT)
    assert local.receive()[2] == relay.a.port
    relay.passes()
    assert moved.drain() == []


@both_families
def test_each_side_is_spoken_to_from_the_address_at_which_it_knocked(relay: Relay) -> None:
    second = second_address(relay)
    relay.knock(relay.a, A_TOKEN, A_PORT, to=second)
    relay.b.send(DATA, relay.hub, B_PORT)
    assert relay.a.receive() == (DATA, second, A_PORT)
    relay.a.send(DATA, second, A_PORT)
    assert relay.b.receive() == (DATA, relay.hub, B_PORT)


def second_address(relay: Relay) -> IPAddress:
    """One more address of the hub."""
    hub, lab = relay.internet.hub, relay.internet.lab
    is_v4 = relay.family is Family.IPV4
    second = ip_address("203.0.113.222" if is_v4 else "2001:db8:ffff::222")
    whole = f"{second}/{32 if is_v4 else 128}"
    ip_batch([f"addr add {whole} dev wan{'' if is_v4 else ' nodad'}"], inside=hub.namespace)
    relay.opened.callback(ip_batch, [f"addr del {whole} dev wan"], inside=hub.namespace)
    through = address_of(hub, relay.family)
    (route,) = subprocess.run(
        ["ip", "-n", lab.core, "-4" if is_v4 else "-6", "route", "show", f"{through}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    ip_batch([f"route replace {route.replace(str(through), str(second), 1)}"], inside=lab.core)
    return second


@both_families
def test_knocks_of_one_side_beyond_a_few_a_second_do_nothing(relay: Relay) -> None:
    """A member that plays with its token moves itself, at a bounded pace, and nobody else."""
    tag = "4" if relay.family is Family.IPV4 else "6"
    local = relay.local(A_PORT)
    ends = [relay.end(relay.internet.anna) for _ in range(100)]
    for end in ends:
        end.send(knock(A_TOKEN), relay.hub, A_PORT)
    for _ in ends:
        local.receive()  # what comes from elsewhere may overtake knocks: wait until the kernel has done them
    relay.b.send(DATA, relay.hub, B_PORT)
    (spoken_to,), _, _ = select.select([end.socket for end in ends], [], [], PATIENCE)
    assert 5 <= [end.socket for end in ends].index(spoken_to) < 90
    # One for each side, once the kernel has cleared away; a few more where processors took knocks at once.
    assert relay.elements(f"address{tag}") <= 2 + 10
    wait_until(lambda: relay.elements(f"place{tag}") < 10, "places stay that were taken away")


@both_families
def test_a_grant_that_is_added_or_taken_away_disturbs_no_other(relay: Relay) -> None:
    more = replace(GRANTS, grants=(*GRANTS.grants, SECOND))
    relay.change(GRANTS, more)
    relay.passes()
    c, d = relay.end(relay.internet.anna), relay.end(relay.internet.mallory)
    relay.knock(c, b"tokenofC", 26004)
    relay.knock(d, b"tokenofD", 26005)
    c.send(DATA, relay.hub, 26004)
    assert d.receive() == (DATA, relay.hub, 26005)
    relay.change(more, GRANTS)
    relay.passes()
    c.send(DATA, relay.hub, 26004)  # nothing is relayed any more, though the kernel still knows both places
    relay.knock(c, b"tokenofC", 26004)
    relay.passes()
    assert d.drain() == c.drain() == []


@both_families
def test_a_grant_that_is_renewed_goes_on(relay: Relay) -> None:
    in_25_hours = time.time() + 25 * 3600
    later = replace(GRANTS, grants=(replace(GRANTS.grants[0], expires=in_25_hours),))
    relay.change(GRANTS, later)
    relay.passes()
    relay.knock(relay.a, A_TOKEN, A_PORT)
    relay.passes()
    shown = relay.internet.hub.run(["nft", "list", "map", "inet", TABLE, "token"]).stdout
    assert shown.count("timeout 1d1h") == 2


@both_families
def test_loading_everything_anew_forgets_nobody(relay: Relay) -> None:
    relay.passes()
    for _ in range(5):
        relay.load(replace(GRANTS, limits=RelayLimits(pair=10**9, total=10**9)))
        relay.passes()


@both_families
def test_a_pair_is_held_to_its_rate_both_ways_together_and_others_are_not(relay: Relay) -> None:
    """A burst passes whole; of what follows at once next to nothing."""
    relay.load(replace(GRANTS, limits=RelayLimits(pair=1000), grants=(*GRANTS.grants, SECOND)))
    c, d = relay.end(relay.internet.anna), relay.end(relay.internet.mallory)
    relay.knock(c, b"tokenofC", 26004)
    relay.knock(d, b"tokenofD", 26005)
    big = b"\4\0\0\0" + bytes(1396)
    for _ in range(200):
        relay.a.send(big, relay.hub, A_PORT)
        relay.b.send(big, relay.hub, B_PORT)
    c.send(big, relay.hub, 26004)
    assert d.receive()[0] == big
    passed = (relay.a.count(), relay.b.count())
    assert 150 <= sum(passed) <= 190  # of 400: a burst of 256 KiB
    assert min(passed) > 50


@both_families
def test_all_pairs_together_are_held_to_the_total_rate(relay: Relay) -> None:
    relay.load(replace(GRANTS, limits=RelayLimits(total=1000)))
    big = b"\4\0\0\0" + bytes(1396)
    for _ in range(400):
        relay.a.send(big, relay.hub, A_PORT)
    assert 150 <= relay.b.count() <= 190


@both_families
def test_what_each_side_was_sent_is_counted(relay: Relay) -> None:
    for _ in range(3):
        relay.a.send(DATA, relay.hub, A_PORT)
        relay.b.receive()
    shown = relay.internet.hub.run(["nft", "list", "map", "inet", TABLE, "port"]).stdout
    size = 3 * (len(DATA) + 8 + (20 if relay.family is Family.IPV4 else 40))
    assert f"{rules.mark_of(3):#010x} counter packets 3 bytes {size} : {B_PORT}" in shown
    assert f"{rules.mark_of(2):#010x} counter packets 0 bytes 0 : {A_PORT}" in shown


WATCH = f"""
table inet watch {{
  counter altered {{
  }}
  chain early {{ type filter hook prerouting priority -310
    udp dport {A_PORT} meta mark set 0x53000001
  }}
  chain input {{ type filter hook input priority 0
    udp dport {PORTS[0]}-{PORTS[1]} meta mark != {{ 0, 0x53000001 }} counter name "altered"
  }}
}}
"""


@both_families
def test_marks_of_others_survive_and_what_is_not_relayed_gets_none(relay: Relay) -> None:
    load_nft(WATCH, inside=relay.internet.hub.namespace)
    mallory, a_local, b_local = relay.end(relay.internet.mallory), relay.local(A_PORT), relay.local(B_PORT)
    for local, expected in ((a_local, 0x53000001), (b_local, 0)):
        local.socket.setsockopt(socket.SOL_SOCKET, _SO_RCVMARK, 1)
        for sender in (mallory, relay.a):  # A's place is known, B's port is not A's; marked, it is left alone
            for data in (DATA, PROBE, knock(b"nobody's"), b"other"):
                sender.send(data, relay.hub, local.port)
                got, ancillary, _, _ = local.socket.recvmsg(2048, 64)
                assert got == data
                marks = [
                    struct.unpack("=I", value)[0] for level, kind, value in ancillary if kind == _SO_MARK
                ]
                assert marks == [expected]
    shown = relay.internet.hub.run(["nft", "list", "counter", "inet", "watch", "altered"]).stdout
    assert "packets 0" in shown


LEAVING = """
table inet watch {
  counter marked {
  }
  counter untracked {
  }
  chain out { type filter hook postrouting priority 400
    meta mark != 0 counter name "marked"
  }
  chain passing { type filter hook forward priority 0
    ct state untracked counter name "untracked"
  }
}
"""


@both_families
def test_what_is_relayed_leaves_without_a_mark_and_is_not_tracked(relay: Relay) -> None:
    load_nft(LEAVING, inside=relay.internet.hub.namespace)
    relay.passes()
    shown = relay.internet.hub.run(["nft", "list", "counters"]).stdout
    assert "counter marked {\n\t\tpackets 0" in shown
    assert "counter untracked {\n\t\tpackets 2" in shown


ROUTER = """
table inet router {
  chain source { type nat hook postrouting priority srcnat
    oifname "wan" masquerade
  }
  chain input { type filter hook input priority filter; policy drop;
    ct state established,related accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
  }
  chain forward { type filter hook forward priority filter; policy drop;
    ct state established,related,untracked accept
    iifname "lan0" accept
  }
}
"""


@both_families
def test_masqueraded_and_firewalled_traffic_keeps_working_from_every_port_of_the_range(relay: Relay) -> None:
    """Datagrams that look like WireGuard's, of a machine behind the hub and of the hub itself."""
    inside = behind(relay)
    load_nft(ROUTER, inside=relay.internet.hub.namespace)
    echo = relay.end(relay.internet.mallory)
    there = address_of(relay.internet.mallory, relay.family)
    for namespace in (inside, relay.internet.hub.namespace):
        for port in range(PORTS[0], PORTS[1] + 1):
            with contextlib.closing(End(namespace, relay.family, port=port)) as end:
                end.send(DATA, there, echo.port)
                data, address, seen = echo.receive()
                assert (data, address, seen) == (DATA, relay.hub, port)
                echo.send(DATA, address, seen)
                assert end.receive()[0] == DATA
        relay.passes()
        flush_conntrack(relay.internet.hub.namespace)  # the ports are for the next one


def behind(relay: Relay) -> str:
    """The namespace of a machine in the hub's own LAN."""
    hub, lab = relay.internet.hub, relay.internet.lab
    is_v4 = relay.family is Family.IPV4
    namespace = lab.namespace(f"inside{'4' if is_v4 else '6'}")
    relay.opened.callback(ip_batch, ["link del lan0"], inside=hub.namespace)
    ip_batch([f"link add lan0 netns {hub.namespace} type veth peer name eth0 netns {namespace}"])
    ours, theirs = ("10.77.0.1/24", "10.77.0.2/24") if is_v4 else ("fd77::1/64", "fd77::2/64")
    nodad = "" if is_v4 else " nodad"
    ip_batch(["link set lan0 up", f"addr add {ours} dev lan0{nodad}"], inside=hub.namespace)
    ip_batch(
        [
            "link set eth0 up",
            f"addr add {theirs} dev eth0{nodad}",
            f"route add default via {ours.partition('/')[0]}",
        ],
        inside=namespace,
    )
    return namespace


def test_a_fragmented_datagram_is_left_to_the_hubs_own_socket(internet: Internet) -> None:
    """Where nothing makes it whole before: only its first part would bear a port."""
    with relayed(internet, Family.IPV4) as relay:
        local = relay.local(A_PORT)
        ip_batch(["link set wan mtu 1300"], inside=internet.anna.namespace)
        relay.opened.callback(ip_batch, ["link set wan mtu 1500"], inside=internet.anna.namespace)
        relay.a.socket.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER: fragments may be made
        big = b"\4\0\0\0" + bytes(1396)
        relay.a.send(big, relay.hub, A_PORT)
        assert local.receive()[0] == big
        relay.passes()
        assert relay.b.drain() == []


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """Run a block of this thread in a host's network."""
    with open("/proc/thread-self/ns/net") as here, open(NETNS / host.namespace) as there:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.setns(there.fileno(), 0x4000_0000) == 0
        try:
            yield
        finally:
            assert libc.setns(here.fileno(), 0x4000_0000) == 0


@pytest.fixture
def empty(internet: Internet) -> Internet:
    """The hub has no rules at all."""
    load_nft("flush ruleset\n", inside=internet.hub.namespace)
    return internet


def test_what_a_carrier_brings_over_loopback_is_left_to_the_forwarder_and_moves_nobody(
    internet: Internet,
) -> None:
    loopback, member = IPv4Address("127.0.0.1"), IPv4Address("127.83.1.2")
    with relayed(internet, Family.IPV4) as relay:
        forwarder = relay.local(A_PORT)
        carried = relay.end(internet.hub, address=member)
        for data in (knock(A_TOKEN), DATA, PROBE):
            carried.send(data, loopback, A_PORT)
            assert forwarder.receive() == (data, member, carried.port)
        assert relay.b.drain() == []
        relay.passes()  # and so B still reaches A where A knocked from the world
        assert carried.drain() == []


def test_the_agent_is_told_when_the_kernel_knows_no_places(empty: Internet) -> None:
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        assert relay.apply(GRANTS, time.time())
        assert not relay.apply(GRANTS, time.time())
        again = KernelRelay(DEVICE, seed=SEED)  # the agent was restarted: the rules went on
        assert not again.apply(GRANTS, time.time())
        again.remove()
        assert KernelRelay(DEVICE, seed=SEED).apply(GRANTS, time.time())


def test_a_restarted_agent_loses_nothing_of_what_is_relayed(internet: Internet) -> None:
    with relayed(internet, Family.IPV4) as relay:
        relay.passes()
        with inside(internet.hub):
            assert not KernelRelay(DEVICE, seed=SEED).apply(GRANTS, time.time())
        relay.passes()


@pytest.mark.parametrize(
    "foreign",
    [
        "flush ruleset",
        f"delete table inet {TABLE}",
        f"flush chain inet {TABLE} relay4",
        f"flush map inet {TABLE} token",
        f"add chain inet {TABLE} more",
    ],
)
def test_what_another_program_does_to_the_rules_is_noticed_and_put_right(
    empty: Internet, foreign: str
) -> None:
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        relay.apply(GRANTS, time.time())
        assert relay.is_whole()
        subprocess.run(["nft", foreign], check=True)
        assert not relay.is_whole()
        relay.apply(GRANTS, time.time())
        assert relay.is_whole()


def test_what_other_programs_do_to_their_own_rules_is_no_matter(empty: Internet) -> None:
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        relay.apply(GRANTS, time.time())
        for line in ("add table inet other", "add chain inet other c", "delete table inet other"):
            subprocess.run(["nft", line], check=True)
            assert relay.is_whole()


def test_while_nobody_changes_rules_a_check_starts_no_program(
    empty: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        relay.apply(GRANTS, time.time())
        relay.apply(replace(GRANTS, grants=(*GRANTS.grants, SECOND)), time.time())
        monkeypatch.setenv("PATH", "/nonexistent")
        assert relay.is_whole()


def test_rules_of_another_release_give_way(empty: Internet) -> None:
    load_nft(
        f"table inet {TABLE} {{\n map place4 {{ type ipv4_addr : mark; }}\n}}\n",
        inside=empty.hub.namespace,
    )
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        assert relay.apply(GRANTS, time.time())
        assert relay.is_whole()


def test_a_change_of_rules_that_are_not_there_any_more_loads_all(empty: Internet) -> None:
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        relay.apply(GRANTS, time.time())
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        relay.apply(replace(GRANTS, grants=(*GRANTS.grants, SECOND)), time.time())
        assert relay.is_whole()
        assert (
            "26004"
            in subprocess.run(
                ["nft", "list", "map", "inet", TABLE, "token"], check=True, capture_output=True, text=True
            ).stdout
        )


def test_the_agent_reads_what_each_side_was_sent(internet: Internet) -> None:
    with relayed(internet, Family.IPV4) as relay, inside(internet.hub):
        kernel = KernelRelay(DEVICE, seed=SEED)
        kernel.apply(GRANTS, time.time())
        relay.passes()
        relay.passes()
        size = len(DATA) + 28
        assert kernel.counters() == {2: Sent(2, 2 * size), 3: Sent(2, 2 * size)}


def test_the_agent_reads_which_pairs_were_over_a_limit(internet: Internet) -> None:
    with relayed(internet, Family.IPV4) as relay, inside(internet.hub):
        kernel = KernelRelay(DEVICE, seed=SEED)
        limited = replace(GRANTS, limits=RelayLimits(pair=1000), grants=(*GRANTS.grants, SECOND))
        kernel.apply(limited, time.time(), families=frozenset({Family.IPV4}))
        relay.passes()
        assert kernel.capped() == frozenset()
        for _ in range(200):  # a burst is 256 KiB
            relay.b.send(b"\4\0\0\0" + bytes(1396), relay.hub, B_PORT)
        assert relay.a.count() < 200
        assert kernel.capped() == {2}


def test_nothing_is_left_behind(empty: Internet) -> None:
    with inside(empty.hub):
        relay = KernelRelay(DEVICE, seed=SEED)
        relay.apply(GRANTS, time.time())
        relay.remove()
        relay.remove()
        assert not relay.is_whole()
        assert (
            subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout
            == ""
        )


@both_families
def test_a_hub_sees_that_its_kernel_relays_and_leaves_nothing_behind(empty: Internet, family: Family) -> None:
    before = links_of(empty.hub)
    with inside(empty.hub):
        assert why_not(family) == ""
        assert subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True).stdout == b""
    assert links_of(empty.hub) == before


def links_of(host: Host) -> str:
    return host.run(["ip", "-o", "address"]).stdout + host.run(["ip", "route", "show", "table", "all"]).stdout


@both_families
@pytest.mark.parametrize("rule", ["", "ct state established,related accept"])
def test_a_hub_finds_that_a_chain_of_another_program_drops_what_it_relays(
    empty: Internet, family: Family, rule: str
) -> None:
    chain = f"chain pass {{ type filter hook forward priority 0; policy drop;\n{rule}\n}}"
    load_nft(f"table inet strict {{\n{chain}\n}}\n", inside=empty.hub.namespace)
    with inside(empty.hub):
        assert "the foreign chain inet strict pass drops it" in why_not(family)


@both_families
def test_a_hub_whose_firewall_accepts_what_is_untracked_relays(empty: Internet, family: Family) -> None:
    load_nft(ROUTER, inside=empty.hub.namespace)
    with inside(empty.hub):
        assert why_not(family) == ""


@both_families
def test_a_rule_that_drops_without_a_policy_is_found_too(empty: Internet, family: Family) -> None:
    load_nft(
        "table inet odd {\nchain c { type filter hook prerouting priority -200\nudp dport 51820 drop\n}\n}\n",
        inside=empty.hub.namespace,
    )
    with inside(empty.hub):
        assert "was lost" in why_not(family)


@both_families
def test_a_hub_finds_that_forwarding_is_off(empty: Internet, family: Family) -> None:
    path = FORWARDING[family]
    write_sysctls(empty.hub.namespace, {path: "0"})
    try:
        with inside(empty.hub):
            assert why_not(family) == f"forwarding is off: {path.replace('/', '.')} is 0"
    finally:
        write_sysctls(empty.hub.namespace, {path: "1"})


def test_a_hub_without_nft_says_so(empty: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with inside(empty.hub):
        assert "`nft` is not on the PATH" in why_not(Family.IPV4)


def test_a_hub_without_a_tun_device_looks_at_the_chains(
    empty: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "_TUN", Path("/dev/net/none"))
    with inside(empty.hub):
        assert why_not(Family.IPV4) == ""
        load_nft(ROUTER, inside=empty.hub.namespace)
        reason = why_not(Family.IPV4)
    assert reason.startswith("the foreign chain inet router forward may drop it; tried by no datagram")


def test_forwarding_is_turned_on_for_a_hub_and_put_back_as_it_was(internet: Internet) -> None:
    host = internet.lab.server("plain")
    write_sysctls(host.namespace, {"net/ipv6/conf/wan/accept_ra": "1", "net/ipv6/conf/lo/accept_ra": "0"})
    write_sysctls(host.namespace, {"net/ipv4/conf/all/accept_redirects": "1"})
    with inside(host):
        wanted = plan_forwarding()
        noted = read_sysctls(wanted)
        assert wanted == {
            "net/ipv6/conf/wan/accept_ra": "2",  # it goes on listening to routers
            "net/ipv6/conf/all/forwarding": "1",
            "net/ipv4/conf/all/accept_redirects": "0",
            "net/ipv4/ip_forward": "1",
        }
        assert forward(wanted) == []
        assert plan_forwarding() == {}
        assert read_sysctls(wanted) == wanted
        assert restore_sysctls(noted) == []
        assert read_sysctls(wanted) == noted == {path: "1" if "accept" in path else "0" for path in wanted}


def test_what_the_kernel_sets_along_with_forwarding_is_put_back_too(internet: Internet) -> None:
    host = internet.lab.server("hardened")
    before = {
        "net/ipv4/conf/all/accept_redirects": "0",
        "net/ipv4/conf/wan/forwarding": "1",
        "net/ipv6/conf/wan/forwarding": "1",
    }
    write_sysctls(host.namespace, before)
    with inside(host):
        noted = read_sysctls(wanted := plan_forwarding())
        assert forward(wanted) == []
        assert restore_sysctls(noted) == []
        assert read_sysctls(before) == before
        assert read_sysctls(noted) == noted
        assert [noted[each] for each in FORWARDING.values()] == ["0", "0"]


def test_a_setting_that_somebody_changed_since_is_theirs(internet: Internet) -> None:
    host = internet.lab.server("changed")
    with inside(host):
        noted = read_sysctls(wanted := plan_forwarding())
        forward(wanted)
        forward({"net/ipv4/ip_forward": "0", "net/ipv6/conf/all/forwarding": "2"})
        restore_sysctls(noted)
        assert read_sysctls(noted)["net/ipv6/conf/all/forwarding"] == "2"


def test_a_setting_that_cannot_be_set_is_named(internet: Internet) -> None:
    with inside(internet.hub):
        (refused,) = forward({"net/ipv4/ip_forward": "many"})
    assert "net.ipv4.ip_forward cannot be set to many" in refused


@both_families
def test_a_family_that_the_kernel_does_not_forward_is_left_to_the_forwarder(relay: Relay) -> None:
    local = relay.local(A_PORT)
    with inside(relay.internet.hub):
        KernelRelay(DEVICE, seed=SEED).apply(GRANTS, time.time(), families=frozenset(Family) - {relay.family})
    relay.a.send(DATA, relay.hub, A_PORT)
    assert local.receive()[0] == DATA


def machine(host: Host, notes: list[Mapping[str, str]]) -> HubMachine:
    return HubMachine(
        DEVICE, run_dir=host.directory, seed=SEED, mark=0, noted=notes[-1] if notes else {}, note=notes.append
    )


def test_a_machine_becomes_a_hub_and_is_as_before_when_it_is_none_any_more(internet: Internet) -> None:
    host, notes = internet.lab.server("new"), list[Mapping[str, str]]()
    with inside(host):
        hub = machine(host, notes)
        try:
            before = read_sysctls(plan_forwarding())
            assert hub.apply(GRANTS, time.time()) == Outcome(Forwarding.KERNEL, "", forgot=True)
            assert notes == [before]
            assert hub.apply(GRANTS, time.time()) == Outcome(Forwarding.KERNEL, "", forgot=False)
            again = machine(host, notes)  # of the next agent, which finds all in place
            assert again.apply(GRANTS, time.time()) == Outcome(Forwarding.KERNEL, "", forgot=False)
            assert again.stop() == []
            assert notes == [before, {}]
            assert read_sysctls(before) == before
            assert subprocess.run(["nft", "list", "ruleset"], capture_output=True, check=True).stdout == b""
        finally:
            hub.stop()


def test_a_hub_puts_its_rules_right_and_has_all_sides_knock(empty: Internet) -> None:
    with inside(empty.hub):
        hub = machine(empty.hub, [])
        try:
            hub.apply(GRANTS, time.time())
            wait_until(lambda: hub.check(time.time()) is None, "the forwarder does not run")
            subprocess.run(["nft", "flush", "ruleset"], check=True)
            assert hub.check(time.time()) == Outcome(Forwarding.KERNEL, "", forgot=True)
            assert hub.check(time.time()) is None
        finally:
            hub.stop()


def test_a_hub_learns_that_another_program_holds_a_granted_port(empty: Internet) -> None:
    with inside(empty.hub), contextlib.closing(End(empty.hub.namespace, Family.IPV4, port=A_PORT)):
        hub, seen = machine(empty.hub, []), list[Outcome]()
        try:
            hub.apply(GRANTS, time.time())

            def is_told() -> bool:
                seen.extend(filter(None, [hub.check(time.time())]))
                return bool(seen)

            wait_until(is_told, "nobody says that the port is taken")
            assert seen == [Outcome(Forwarding.KERNEL, "", forgot=False, taken=frozenset({A_PORT}))]
            assert hub.check(time.time()) is None
        finally:
            hub.stop()


def test_a_hub_whose_forwarding_is_turned_off_leaves_it_to_the_forwarder(
    empty: Internet,
) -> None:
    path = FORWARDING[Family.IPV4]
    with inside(empty.hub):
        hub = machine(empty.hub, [])
        try:
            hub.apply(GRANTS, time.time())
            write_sysctls(empty.hub.namespace, {path: "0"})
            reason = "IPv4: forwarding is off: net.ipv4.ip_forward is 0"
            assert hub.check(time.time()) == Outcome(Forwarding.KERNEL, reason, forgot=False)
            write_sysctls(empty.hub.namespace, {path: "1"})
            assert hub.check(time.time()) == Outcome(Forwarding.KERNEL, "", forgot=False)
        finally:
            write_sysctls(empty.hub.namespace, {path: "1"})
            hub.stop()


def test_where_another_program_drops_what_is_forwarded_the_forwarder_takes_over(
    empty: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = "chain pass { type filter hook forward priority 0; policy drop;\n}"
    monkeypatch.setattr("scope_agent.relay.shell.hub.TEST_AGAIN", 0.0)
    with inside(empty.hub):
        hub = machine(empty.hub, [])
        try:
            hub.apply(GRANTS, time.time())
            load_nft(f"table inet strict {{\n{chain}\n}}\n", inside=empty.hub.namespace)
            outcome = hub.check(time.time())
            assert outcome is not None
            assert outcome.forwarding is Forwarding.USER_SPACE
            assert outcome.reason.startswith("the foreign chain inet strict pass drops it")
            load_nft("delete table inet strict\n", inside=empty.hub.namespace)
            assert hub.check(time.time()) == Outcome(Forwarding.KERNEL, "", forgot=True)
        finally:
            hub.stop()


def test_two_symmetric_nats_lose_nothing_and_a_new_mapping_heals_with_the_next_knock(
    internet: Internet,
) -> None:
    """Nobody of the hub's is there but its kernel."""
    lab, hub = internet.lab, internet.hub
    sites = [lab.site(name, nat=Nat.SYMMETRIC) for name in ("berlin", "lima")]
    machines = [site.machine(name) for site, name in zip(sites, ("bob", "lisa"), strict=True)]
    load_nft("flush ruleset\n", inside=hub.namespace)
    load_nft(rules.load(DEVICE, GRANTS, wall=time.time(), seed=SEED), inside=hub.namespace)
    address = address_of(hub, Family.IPV4)
    with contextlib.ExitStack() as opened:
        ends = [
            opened.enter_context(contextlib.closing(End(machine.namespace, Family.IPV4)))
            for machine in machines
        ]
        heard = [
            opened.enter_context(contextlib.closing(End(hub.namespace, Family.IPV4, port=port)))
            for port in (A_PORT, B_PORT)
        ]

        def knock_both() -> None:
            for end, token, at in zip(ends, (A_TOKEN, B_TOKEN), heard, strict=True):
                end.send(knock(token), address, at.port)
                assert at.receive()[0] == knock(token)

        def exchange() -> None:
            for number in range(500):
                data = DATA + number.to_bytes(4, "big")
                for sender, receiver, port in ((0, 1, A_PORT), (1, 0, B_PORT)):
                    ends[sender].send(data, address, port)
                    assert ends[receiver].receive()[0] == data

        knock_both()
        exchange()
        for site in sites:
            site.rebind()
            knock_both()
            exchange()
