"""Real packets by a guessed port: symmetric against port-restricted, with one hub.

Pings through WireGuard go on when the pair leaves the relay for the guessed port, and while the symmetric
side's agent is dead: the packet filter's rules and WireGuard need no agent. That nothing at all is lost, and
how soon a path is left, is shown in virtual time (`tests/sim/test_birthday.py`); a busy machine may lose some
by itself.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from lab import Lab, Nat
from meshlab import PRIVATE, Member, Registry, mesh_document

from tests.netns.members_fixture import Members

MESH = "birthday"
EDGES = ("anna", "bert")  # behind a symmetric NAT, and a port-restricted one
RELAYED_S = 90.0
# Relayed for five seconds, a try of five; one in three thousand misses, and a busy machine waits.
GUESSED_S = 180.0
LEFT_S = 20.0  # a path that a NAT forgot is left for the relay
ANSWERED = 0.98  # of all pings, on a busy machine
TABLE = "scope_ports_scope0"


@dataclass(frozen=True, slots=True)
class Pair(Members):
    """The mesh of this file."""

    def is_relayed(self) -> bool:
        return all(
            (reach := self.reach(*pair)) is not None and reach.is_relayed for pair in (EDGES, EDGES[::-1])
        )

    def is_guessed(self) -> bool:
        return all(
            (reach := self.reach(*pair)) is not None and reach.is_direct and reach.birthday
            for pair in (EDGES, EDGES[::-1])
        )

    def is_by_own_port(self) -> bool:
        """Whether a guess met WireGuard's own port, as one try in some hundred does: no rules are needed."""
        both = [self.reach(*pair) for pair in (EDGES, EDGES[::-1])]
        are_direct = all(reach is not None and reach.is_direct and not reach.birthday for reach in both)
        return are_direct and TABLE not in self.rules()

    def await_direct(self) -> None:
        """Return once a guess has met a port, WireGuard's own or one that stands in for it."""
        self.until(
            lambda: self.is_guessed() or self.is_by_own_port(), "direct by a guess", within_s=GUESSED_S
        )

    def await_guess(self) -> None:
        """Return once the pair is direct by a port that stands in for WireGuard's own."""
        while True:
            self.await_direct()
            if self.is_guessed():
                return
            self.lab.sites["site-anna"].reboot()
            self.until(lambda: not self.is_by_own_port(), "the end of that path")

    def rules(self) -> str:
        """The packet filter's rules of the machine behind the symmetric NAT."""
        return self.members["anna"].machine.run(["nft", "list", "ruleset"]).stdout

    def ping(self, *options: str) -> subprocess.Popen[str]:
        """Ping from one side to the other."""
        return self.ping_from(*EDGES, *options)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Lab(delay_ms=10, private=PRIVATE) as lab:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, birthday=True, hubs={"names": [f"{MESH}.external.hub"]}))
        token = registry.token(MESH)
        members = {}
        for name, nat in (("hub", Nat.NONE), ("anna", Nat.SYMMETRIC), ("bert", Nat.PORT_RESTRICTED)):
            members[name] = Member(
                lab.site(f"site-{name}", nat=nat).machine(name), mesh=MESH, registry=registry
            )
            # As most machines are, the one behind the symmetric NAT is firewalled itself.
            if name == "anna":
                members[name].machine.run(["nft", "-f", "-"], input=FIREWALL)
            members[name].join(token, wait=True)
        yield Pair(lab, MESH, members, RELAYED_S)
        for member in members.values():
            member.hang_up()


FIREWALL = """
table inet host {
  chain in { type filter hook input priority 0; policy drop;
    iifname { "lo", "scope0" } accept
    ct state established,related accept
    meta l4proto { icmp, ipv6-icmp } accept
  }
}
"""


def test_a_relayed_pair_becomes_direct_by_a_guessed_port_and_goes_on(pair: Pair) -> None:
    pair.until(lambda: pair.is_relayed() or pair.is_guessed(), "a relay")
    said, _ = pair.ping("-c", "1", "-w", "30").communicate()  # and WireGuard has a session
    assert "1 received" in said
    pinging = pair.ping("-i", "0.02")
    try:
        pair.await_direct()
        time.sleep(3.0)  # some go over the new path
    finally:
        pinging.send_signal(signal.SIGINT)
        said, _ = pinging.communicate(timeout=30.0)
    answered = {int(each) for each in re.findall(r"bytes from .* icmp_seq=(\d+)", said)}
    # The last ones are under way when the program ends.
    assert len(answered) > 100 and len(answered) >= ANSWERED * max(answered), said[-300:]
    pair.await_guess()
    assert TABLE in pair.rules()


def test_traffic_goes_on_without_the_agent_and_its_next_one_keeps_the_path(pair: Pair) -> None:
    pair.await_guess()
    anna, before = pair.members["anna"], turned(pair.rules())
    pinging = pair.ping("-c", "300", "-i", "0.02")
    time.sleep(1.0)  # some go before
    anna.kill()
    time.sleep(2.0)
    anna.run_again()
    said, _ = pinging.communicate(timeout=60.0)
    match = re.search(r"(\d+) received", said)
    assert match is not None and int(match[1]) >= ANSWERED * 300, said[-300:]
    pair.until(pair.is_guessed, "direct by the same port")
    assert turned(pair.rules()) == before


def test_rules_that_another_program_flushes_are_put_back(pair: Pair) -> None:
    pair.await_guess()
    before = turned(pair.rules())
    pair.members["anna"].machine.run(["nft", "flush", "ruleset"])
    pair.until(lambda: turned(pair.rules()) == before, "the rules")


def test_a_nat_that_reboots_sends_the_pair_back_to_the_relay(pair: Pair) -> None:
    pair.await_guess()
    pinging = pair.ping("-i", "0.02")
    try:
        time.sleep(2.0)  # some go before
        pair.lab.sites["site-anna"].reboot()
        rebooted = time.time()
        pair.until(pair.is_relayed, "the relay")
        time.sleep(1.0)  # some go over the relay
    finally:
        pinging.send_signal(signal.SIGINT)
        said, _ = pinging.communicate(timeout=30.0)
    at = [float(each) for each in re.findall(r"^\[([0-9.]+)\] \d+ bytes from", said, re.MULTILINE)]
    silence, since = max((later - earlier, earlier) for earlier, later in pairwise(at))
    assert silence < LEFT_S and abs(since - rebooted) < LEFT_S
    # The next guess takes another port, or none; the rules of the old one do not stay.
    pair.until(
        lambda: "scope_ports" not in pair.rules() or pair.is_guessed(), "a new path", within_s=GUESSED_S
    )


def test_who_leaves_leaves_no_rules(pair: Pair) -> None:
    anna = pair.members.pop("anna")
    anna.leave()
    assert TABLE not in anna.machine.run(["nft", "list", "ruleset"]).stdout


def turned(rules: str) -> list[str]:
    """Towards whom WireGuard has which other port."""
    return sorted(re.findall(r"[0-9.]+ \. \d+ : \d+", rules))
