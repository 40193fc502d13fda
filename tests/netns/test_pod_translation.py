"""Pods with one and the same address, in two clusters that were made alike, reach each other.

Each cluster is a Node with one pod, the network of both has the same prefixes for pods and for Services, and
masquerades whatever leaves a pod. Between the Nodes lies a device, as that of a mesh. To pods fit smaller
packets than into it, which nobody but an ICMP message tells.
"""

from __future__ import annotations

import errno
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import pytest
from scope_agent.pods.rules import PodNetwork
from scope_agent.pods.shell.network import PodRoutes

from scope.model import Translation
from tests.netns.device_fixture import Namespace

pytestmark = pytest.mark.timeout(300)
PATIENCE_S = 60.0  # far above what is seen
FAMILIES = {4: (socket.AF_INET, "ip"), 6: (socket.AF_INET6, "ip6")}
PODS = {4: ip_network("10.244.1.0/24"), 6: ip_network("fd00:10:244:1::/64")}
POD = {4: "10.244.1.5", 6: "fd00:10:244:1::5"}
SERVICE = {4: "10.96.0.10", 6: "fd00:10:96::a"}
PORT, SERVICE_PORT, CLOSED = 8080, 80, 9
SMALL_MTU, MESH_MTU = 1300, 1420
SIZE = 256 << 10
# What a cluster's network, and its kube-proxy for a Service of the other cluster, have on a Node.
CLUSTER_RULES = """
table {family} cluster {{
  chain services {{ type nat hook prerouting priority dstnat; policy accept;
    {family} daddr {service} tcp dport {port} dnat to {target}
  }}
  chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;
    {family} saddr {pods} {family} daddr != {pods} masquerade
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Node with one pod, each in its namespace."""

    number: int
    node: Namespace
    pod: Namespace

    def seen_as(self, version: int) -> str:
        """The prefix of its pods for the other one."""
        return f"10.20{self.number}.1.0/24" if version == 4 else f"fd00:20{self.number}:1::/64"

    def pod_seen_as(self, version: int) -> str:
        return str(ip_address(self.seen_as(version).partition("/")[0]) + 5)


def _join(one: Cluster, other: Cluster) -> None:
    """The way between the Nodes. Both ends have one hardware address, so that nobody need ask for it."""
    ends = ["type", "veth", "peer", "name", "scope0", "netns", other.node.path()]
    one.node.ip("link", "add", "scope0", *ends)
    for each in (one, other):
        device = ["dev", "scope0"]
        each.node.ip("link", "set", *device, "address", "02:00:00:00:00:01", "arp", "off")
        each.node.ip("link", "set", *device, "mtu", str(MESH_MTU))
        each.node.ip("address", "add", f"100.80.0.{each.number}/32", *device)
        each.node.ip("address", "add", f"fd5c::{each.number}/128", *device, "nodad")
        each.node.ip("link", "set", *device, "up")
    for each, far in ((one, other), (other, one)):
        each.node.ip("route", "add", f"100.80.0.{far.number}/32", "dev", "scope0")
        each.node.ip("-6", "route", "add", f"fd5c::{far.number}/128", "dev", "scope0")


def _make_pod(cluster: Cluster) -> None:
    node, pod = cluster.node, cluster.pod
    node.ip("link", "add", "cni0", "type", "veth", "peer", "name", "eth0", "netns", pod.path())
    node.ip("link", "set", "cni0", "up")
    pod.ip("link", "set", "eth0", "up")
    for version, prefix in PODS.items():
        gateway, length = prefix.network_address + 1, prefix.prefixlen
        nodad = ["nodad"] if version == 6 else []
        node.ip("address", "add", f"{gateway}/{length}", "dev", "cni0", *nodad)
        pod.ip("address", "add", f"{POD[version]}/{length}", "dev", "eth0", *nodad)
        pod.ip(f"-{version}", "route", "add", "default", "via", str(gateway))
        route = [str(prefix), "dev", "cni0", *(["proto", "kernel", "metric", "256"] if version == 6 else [])]
        node.ip(f"-{version}", "route", "replace", *route, "mtu", str(SMALL_MTU))
    with node.entered():
        for setting in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            subprocess.run(["sysctl", "-q", "-w", f"{setting}=1"], check=True)


def _make_network(cluster: Cluster, other: Cluster) -> PodRoutes:
    """The cluster's own rules, and then what the agent has for pods."""
    with cluster.node.entered():
        for version, (_, family) in FAMILIES.items():
            target = other.pod_seen_as(version)
            rules = CLUSTER_RULES.format(
                family=family,
                service=SERVICE[version],
                port=SERVICE_PORT,
                target=f"{target}:{PORT}" if version == 4 else f"[{target}]:{PORT}",
                pods=PODS[version],
            )
            subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
        routes = PodRoutes("scope0")
        translated = {Translation(PODS[each], ip_network(cluster.seen_as(each))) for each in FAMILIES}
        reached = {ip_network(other.seen_as(each)) for each in FAMILIES}
        routes.apply(
            PodNetwork(
                frozenset(PODS.values()), frozenset(reached), MESH_MTU, translated=frozenset(translated)
            )
        )
        return routes


@pytest.fixture(scope="module")
def clusters(networks: dict[Cluster, PodRoutes]) -> tuple[Cluster, Cluster]:
    one, other = networks
    return one, other


@pytest.fixture(scope="module")
def networks() -> Iterator[dict[Cluster, PodRoutes]]:
    with ExitStack() as stack:
        spaces = [stack.enter_context(closing(Namespace())) for _ in range(4)]
        one, other = Cluster(1, spaces[0], spaces[1]), Cluster(2, spaces[2], spaces[3])
        _join(one, other)
        for each in (one, other):
            _make_pod(each)
        networks = {one: _make_network(one, other), other: _make_network(other, one)}
        for each, routes in networks.items():
            with each.node.entered():
                assert routes.check() == ""
        yield networks
        for each, routes in networks.items():
            with each.node.entered():
                routes.remove()
                left = subprocess.run(["nft", "list", "tables"], check=True, capture_output=True, text=True)
                assert "scope" not in left.stdout


def _socket_in(pod: Namespace, version: int, kind: socket.SocketKind) -> socket.socket:
    with pod.entered():
        made = socket.socket(FAMILIES[version][0], kind)
    made.settimeout(PATIENCE_S)
    return made


def _ask(asker: Cluster, server: Cluster, version: int, to: tuple[str, int]) -> tuple[str, int]:
    """Send SIZE bytes to a server in the other pod, and take as many; whom it saw, and how many came."""
    with (
        _socket_in(server.pod, version, socket.SOCK_STREAM) as listening,
        _socket_in(asker.pod, version, socket.SOCK_STREAM) as asking,
    ):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((POD[version], PORT))
        listening.listen()
        seen: list[str] = []

        def serve() -> None:
            connection, peer = listening.accept()
            seen.append(peer[0])
            with connection:
                connection.settimeout(PATIENCE_S)
                _take(connection, SIZE)
                connection.sendall(bytes(SIZE))

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        asking.connect(to)
        asking.sendall(bytes(SIZE))
        came = _take(asking, SIZE)
        serving.join(PATIENCE_S)
    return seen[0], came


def _take(connection: socket.socket, size: int) -> int:
    came = 0
    while came < size and (data := connection.recv(1 << 16)):
        came += len(data)
    return came


@pytest.mark.parametrize("version", FAMILIES)
def test_pods_with_the_same_address_reach_each_other(clusters: tuple[Cluster, Cluster], version: int) -> None:
    for each in clusters:
        assert POD[version] in each.pod.ip("-o", f"-{version}", "address", "show", "dev", "eth0")
    for asker, server in (clusters, clusters[::-1]):
        for to in ((server.pod_seen_as(version), PORT), (SERVICE[version], SERVICE_PORT)):
            assert _ask(asker, server, version, to) == (asker.pod_seen_as(version), SIZE)


@pytest.mark.parametrize("version", FAMILIES)
def test_a_pod_learns_which_packets_fit_beyond_the_translation(
    clusters: tuple[Cluster, Cluster], version: int
) -> None:
    for asker, server in (clusters, clusters[::-1]):
        to = server.pod_seen_as(version)
        assert _ask(asker, server, version, (to, PORT)) == (asker.pod_seen_as(version), SIZE)
        assert f"mtu {SMALL_MTU}" in asker.pod.ip(f"-{version}", "route", "get", to)


@pytest.mark.parametrize("version", FAMILIES)
def test_datagrams_and_what_is_said_of_them_come_back(
    clusters: tuple[Cluster, Cluster], version: int
) -> None:
    for asker, server in (clusters, clusters[::-1]):
        to = server.pod_seen_as(version)
        with (
            _socket_in(server.pod, version, socket.SOCK_DGRAM) as serving,
            _socket_in(asker.pod, version, socket.SOCK_DGRAM) as asking,
            _socket_in(asker.pod, version, socket.SOCK_DGRAM) as refused,
        ):
            serving.bind((POD[version], PORT))
            for size in (1, 1000, 4000):  # the last one in pieces
                asking.sendto(bytes(size), (to, PORT))
                data, sender = serving.recvfrom(1 << 16)
                assert (len(data), sender[0]) == (size, asker.pod_seen_as(version))
                serving.sendto(data, sender)
                data, sender = asking.recvfrom(1 << 16)
                assert (len(data), sender[0]) == (size, to)
            refused.connect((to, CLOSED))
            refused.send(b"?")
            with pytest.raises(OSError, match="refused") as error:
                refused.recv(1)
            assert error.value.errno == errno.ECONNREFUSED


def test_a_chain_of_others_that_drops_what_goes_to_pods_is_named(networks: dict[Cluster, PodRoutes]) -> None:
    """Each change of rules has the next look count what passed, without waiting for its turn."""
    asker, server = networks
    routes = networks[server]

    def look(rules: str) -> str:
        with server.node.entered():
            subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
            return routes.check()

    dropping = "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }"
    assert look(dropping) == ""
    with _socket_in(asker.pod, 4, socket.SOCK_DGRAM) as asking:
        for _ in range(5):
            asking.sendto(b"?", (server.pod_seen_as(4), PORT))
    assert look("table ip beside { }") == (
        "the foreign chain ip filter FORWARD drops IPv4 to or from pods: "
        "let it accept what goes to or from scope0"
    )
    assert look("delete table ip filter; delete table ip beside") == ""
