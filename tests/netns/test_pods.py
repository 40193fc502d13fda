"""Pods of two clusters behind NATs reach each other as they are, past what their clusters masquerade.

Each machine has a bridge with one pod, as a network of a cluster makes it, and that network's rule which
gives everything from pods to elsewhere the machine's address. Nothing tells pods of a smaller MTU on the way:
what would is dropped, so that TCP goes through only where its segments are cut to what fits.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from lab import Lab, Machine, Nat
from lab.netns import NETNS
from meshlab import PRIVATE, Member, Registry, mesh_document

from tests.netns.members_fixture import SHORT_TIMERS

pytestmark = pytest.mark.timeout(300)
MESH = "pods"
WITHIN_S = 90.0  # far above what is seen
PORT = 8080
SIZE = 64 << 10
SEEN_AS = ("10.77.1.0/24", "fd00:77:1::/64")
# What a cluster's network has for the pods of one Node.
CLUSTER_RULES = """
table {family} cluster {{
  chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;
    {family} saddr {wide} {family} daddr != {own} masquerade
  }}
}}
"""
SILENT = """
table inet silent { chain output { type filter hook output priority 0; policy accept;
  icmp type destination-unreachable drop
  icmpv6 type packet-too-big drop
}; }
"""
# Serves one connection after the other: takes SIZE bytes, answers with who sent them, and as many bytes.
SERVE = """
import socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
server = socket.create_server((address, port), family=family)
print("ready", flush=True)
while True:
    connection, peer = server.accept()
    with connection:
        connection.settimeout(30)
        left = size
        try:
            while left > 0 and (data := connection.recv(left)):
                left -= len(data)
            connection.sendall(peer[0].encode().ljust(64) + bytes(size))
        except OSError:
            continue
"""
ASK = """
import json, socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with socket.create_connection((address, port), timeout=30) as connection:
    connection.sendall(bytes(size))
    answer = b""
    while len(answer) < 64 + size and (data := connection.recv(1 << 16)):
        answer += data
    segment = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
print(json.dumps({"seen": answer[:64].decode().strip(), "bytes": len(answer) - 64, "segment": segment}))
"""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with one pod, in a cluster of its own."""

    member: Member
    pod: str  # its namespace
    number: int

    @property
    def machine(self) -> Machine:
        return self.member.machine

    @property
    def prefixes(self) -> tuple[str, str]:
        return f"10.24{self.number}.1.0/24", f"fd00:10:24{self.number}:1::/64"

    def address(self, version: int) -> str:
        """The pod's."""
        return f"10.24{self.number}.1.5" if version == 4 else f"fd00:10:24{self.number}:1::5"

    def in_pod(self, *argv: str) -> list[str]:
        """The words of a command in the pod."""
        return ["nsenter", f"--net={NETNS / self.pod}", "--", *argv]

    def traces(self) -> dict[str, str]:
        """What there is of links, addresses, routes, rules and packet filters."""
        asked = {
            "links": "ip -o link",
            "addresses": "ip -o address",
            "routes4": "ip -4 route show table all",
            "routes6": "ip -6 route show table all",
            "rules4": "ip -4 rule",
            "rules6": "ip -6 rule",
            "filters": "nft --stateless list ruleset",
        }
        said = {name: self.machine.run(command.split()).stdout for name, command in asked.items()}
        passing = re.compile(r"(valid_lft|preferred_lft|expires) \w+")
        return {name: passing.sub("", text) for name, text in said.items()}


@dataclass(slots=True)
class Clusters:
    """The mesh of this file: two clusters of one Node each."""

    lab: Lab
    registry: Registry
    nodes: list[Node] = field(default_factory=list)
    before: list[dict[str, str]] = field(default_factory=list)

    def until(self, done: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + WITHIN_S
        while not done():
            for node in self.nodes:
                node.member.check_alive()
            assert time.monotonic() < end, f"not within {WITHIN_S:g} s: {what}; {self.describe()}"
            time.sleep(0.2)

    def describe(self) -> str:
        logs = ((each, each.member.log.read_text()[-600:]) for each in self.nodes)
        return "\n".join(f"{each.member.name}: {each.traces()}\n{log}" for each, log in logs)

    def offer(self, node: Node, prefixes: tuple[str, ...]) -> None:
        """Have the registry say that pods of a machine have these; behind `=` stands what each is seen as."""
        name = f"{MESH}.external.{node.member.name}"
        document = json.loads(self.registry.scopectl("get", "peers", name, "-o", "json"))
        parts = (each.partition("=") for each in prefixes)
        document["spec"]["podPrefixes"] = [
            {"prefix": prefix, "source": "Static", **({"seenAs": seen} if seen else {})}
            for prefix, _, seen in parts
        ]
        self.registry.apply(json.dumps(document))


def _make_pod(lab: Lab, machine: Machine, number: int) -> str:
    """A bridge with one pod on it, and its cluster's rules; the name of the pod's namespace."""
    pod = lab.namespace(f"pod{number}")
    veth = f"veth{number}"
    machine.run(["ip", "link", "add", "cni0", "type", "bridge"])
    ends = ["type", "veth", "peer", "name", "eth0", "netns", str(NETNS / pod)]
    machine.run(["ip", "link", "add", veth, *ends])
    machine.run(["ip", "link", "set", veth, "master", "cni0", "up"])
    machine.run(["ip", "link", "set", "cni0", "up"])
    inside = ["nsenter", f"--net={NETNS / pod}", "--", "ip"]
    machine.run([*inside, "link", "set", "eth0", "up"])
    for prefix, length, family in ((f"10.24{number}.1.", 24, "ip"), (f"fd00:10:24{number}:1::", 64, "ip6")):
        wide = f"10.24{number}.0.0/16" if family == "ip" else f"fd00:10:24{number}::/48"
        machine.run(["ip", "address", "add", f"{prefix}1/{length}", "dev", "cni0", *_nodad(family)])
        machine.run([*inside, "address", "add", f"{prefix}5/{length}", "dev", "eth0", *_nodad(family)])
        version = "-4" if family == "ip" else "-6"
        machine.run([*inside, version, "route", "add", "default", "via", f"{prefix}1"])
        own = f"{prefix}0/{length}" if family == "ip" else f"{prefix}/{length}"
        machine.run(["nft", "-f", "-"], input=CLUSTER_RULES.format(family=family, wide=wide, own=own))
    machine.run(["nft", "-f", "-"], input=SILENT)
    for setting in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        machine.run(["sysctl", "-q", "-w", f"{setting}=1"])
    return pod


def _nodad(family: str) -> list[str]:
    return ["nodad"] if family == "ip6" else []


@pytest.fixture(scope="module")
def clusters() -> Iterator[Clusters]:
    with Lab(private=PRIVATE) as lab:
        here = Clusters(lab, Registry(lab.server("registry")))
        here.registry.apply(mesh_document(MESH, timers=SHORT_TIMERS, podNetworking="CrossCluster"))
        for number, name in ((4, "ber"), (5, "lim")):
            machine = lab.site(f"site-{name}", nat=Nat.PORT_RESTRICTED).machine(name)
            pod = _make_pod(lab, machine, number)
            here.nodes.append(Node(Member(machine, mesh=MESH, registry=here.registry), pod, number))
        here.before = [node.traces() for node in here.nodes]
        token = here.registry.token(MESH)
        for node in here.nodes:
            node.member.join(token, wait=True)
            here.offer(node, node.prefixes)
        yield here
        for node in here.nodes:
            node.member.hang_up()


def _pings(node: Node, address: str) -> bool:
    argv = node.in_pod("ping", "-c", "1", "-W", "2", "-n", address)
    return node.machine.run(argv, check=False).returncode == 0


@pytest.mark.parametrize("version", [4, 6])
def test_pods_of_two_clusters_see_each_others_own_addresses(clusters: Clusters, version: int) -> None:
    for asker, server in (clusters.nodes, clusters.nodes[::-1]):
        address = server.address(version)
        clusters.until(lambda: _pings(asker, address), f"a ping to {address}")  # noqa: B023 - called here
        serve = server.in_pod("python3", "-c", SERVE, address, str(PORT), str(SIZE))
        with server.machine.popen(serve, stdout=subprocess.PIPE) as serving:
            assert serving.stdout is not None and serving.stdout.readline() == "ready\n"
            argv = asker.in_pod("python3", "-c", ASK, address, str(PORT), str(SIZE))
            asked = asker.machine.run(argv, timeout=60.0, check=False)
            serving.kill()
        assert asked.returncode == 0, asked.stderr
        said = json.loads(asked.stdout)
        assert said["seen"] == asker.address(version)
        assert said["bytes"] == SIZE
        assert said["segment"] <= 1420 - (40 if version == 4 else 60)


def test_what_somebody_takes_away_is_put_back(clusters: Clusters) -> None:
    node, other = clusters.nodes
    for command in ("ip -4 route flush table 83", "nft delete table inet scope_pods_scope0"):
        node.machine.run(command.split())
    for rule in ("-4", "-6"):
        node.machine.run(["ip", rule, "rule", "del", "lookup", "83"])
    clusters.until(lambda: "scope_pods_scope0" in node.traces()["filters"], "the rules")
    clusters.until(lambda: _pings(node, other.address(4)) and _pings(node, other.address(6)), "pings")


def test_pods_answer_by_what_their_prefixes_are_seen_as(clusters: Clusters) -> None:
    node, other = clusters.nodes
    prefixes = tuple(f"{each}={seen}" for each, seen in zip(other.prefixes, SEEN_AS, strict=True))
    clusters.offer(other, prefixes)
    for address in ("10.77.1.5", "fd00:77:1::5"):
        clusters.until(lambda: _pings(node, address), f"a ping to {address}")  # noqa: B023 - called here
    clusters.until(lambda: other.prefixes[0] not in node.traces()["routes4"], "the end of the other route")
    clusters.offer(other, other.prefixes)
    clusters.until(lambda: _pings(node, other.address(4)) and _pings(node, other.address(6)), "pings")


def test_what_is_offered_no_more_leads_nowhere_and_who_leaves_leaves_nothing(clusters: Clusters) -> None:
    node, other = clusters.nodes
    clusters.until(lambda: _pings(node, other.address(4)), "a ping")
    clusters.offer(other, other.prefixes[1:])
    clusters.until(lambda: other.prefixes[0] not in node.traces()["routes4"], "the route's end")
    assert other.prefixes[1] in node.traces()["routes6"]
    assert "lookup 83" not in node.traces()["rules4"]
    for each, before in zip(clusters.nodes, clusters.before, strict=True):
        each.member.leave()
        assert each.traces() == before
