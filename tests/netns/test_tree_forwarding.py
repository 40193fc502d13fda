"""A hub of a tree whose packets another program drops: it finds out, and when that is over.

One namespace is the hub, with a wire in place of its mesh device: what comes in there for another edge goes
out there again.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

import pytest
from scope_agent.tree.rules import forwarded_prefixes
from scope_agent.tree.shell import forwarding
from scope_agent.tree.shell.forwarding import TreeForwarding
from scope_agent.wireguard.losing import ENOUGH

from scope.model import Addressing, Family
from tests.netns.device_fixture import Namespace

DEVICE = "scope0"
FORWARDED = forwarded_prefixes(
    Addressing(IPv4Network("100.80.0.0/16"), IPv6Network("fd5c:9e0::/48")), routes=[], own=[]
)
EDGES = {Family.IPV4: "100.80.2.1", Family.IPV6: "fd5c:9e0:0:2::1"}
DROPS = "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"
REJECTS = """
table inet wall { chain forward { type filter hook forward priority 10; policy accept;
  ct state established,related accept
  reject with icmpx admin-prohibited; }; }
"""


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub that forwards, and another machine that sends."""

    namespace: Namespace
    edge: Namespace
    forwarding: TreeForwarding

    def send(self, family: Family, count: int = ENOUGH) -> None:
        """Datagrams by way of the hub, for another edge."""
        number = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
        with self.edge.entered(), socket.socket(number, socket.SOCK_DGRAM) as sender:
            for _ in range(count):
                sender.sendto(b"data", (EDGES[family], 9))

    def check(self) -> str:
        """What the hub says of it now."""
        with self.namespace.entered():
            return self.forwarding.check()

    def nft(self, rules: str) -> None:
        """Another program's."""
        with self.namespace.entered():
            subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(forwarding, "COUNT_AGAIN", 0.0)
    namespace, edge = Namespace(), Namespace()
    namespace.ip("link", "add", DEVICE, "type", "veth", "peer", "name", "up0", "netns", edge.path())
    for end, device, host in ((namespace, DEVICE, "fe"), (edge, "up0", "1")):
        end.ip("address", "add", f"100.80.1.{int(host, 16)}/24", "dev", device)
        end.ip("address", "add", f"fd5c:9e0:0:1::{host}/64", "dev", device, "nodad")
        end.ip("link", "set", device, "up")
    namespace.ip("route", "add", "100.80.2.0/24", "dev", DEVICE)
    namespace.ip("route", "add", "fd5c:9e0:0:2::/64", "dev", DEVICE)
    edge.ip("route", "add", "100.80.2.0/24", "via", "100.80.1.254")
    edge.ip("route", "add", "fd5c:9e0:0:2::/64", "via", "fd5c:9e0:0:1::fe")
    with namespace.entered():
        for setting in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            subprocess.run(["sysctl", "-q", "-w", f"{setting}=1"], check=True)
        tree = TreeForwarding(DEVICE)
        tree.apply(FORWARDED, off=[])
    yield Hub(namespace, edge, tree)
    namespace.close()
    edge.close()


@pytest.mark.parametrize("family", list(Family))
def test_what_passes_is_no_matter_and_what_another_program_drops_is_told_until_it_does_not(
    hub: Hub, family: Family
) -> None:
    hub.send(family)
    assert hub.check() == ""
    name = "ip" if family is Family.IPV4 else "ip6"
    hub.nft(DROPS.replace("table ip ", f"table {name} "))
    hub.check()  # it sees that rules changed
    hub.send(family)
    assert hub.check() == (
        f"the foreign chain {name} filter FORWARD drops {family} between edges: let it accept what goes from "
        f"{DEVICE} to {DEVICE}"
    )
    hub.nft(
        f'add rule {name} filter FORWARD iifname "{DEVICE}" oifname "{DEVICE}" accept'
    )  # what it says to do
    assert hub.check() != ""  # it has not seen yet that this does
    hub.send(family, 1)
    assert hub.check() == ""


def test_a_chain_that_is_gone_is_blamed_no_longer_without_a_packet(hub: Hub) -> None:
    hub.nft(DROPS)
    hub.send(Family.IPV4)
    assert "ip filter FORWARD" in hub.check()
    hub.nft("delete table ip filter")
    assert hub.check() == ""


def test_a_chain_that_rejects_by_a_rule_is_found_out_too(hub: Hub) -> None:
    hub.nft(REJECTS)
    hub.send(Family.IPV6)
    assert "inet wall forward" in hub.check()


def test_what_is_known_survives_a_program_that_begins_with_a_flush(hub: Hub) -> None:
    hub.nft(DROPS)
    hub.send(Family.IPV4)
    assert hub.check() != ""
    hub.nft("flush ruleset\n" + DROPS)
    assert "ip filter FORWARD" in hub.check()
    with hub.namespace.entered():
        shown = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    assert "scope_tree_scope0" in shown
