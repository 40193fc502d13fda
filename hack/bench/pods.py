"""Pods of two clusters through the mesh, against their Nodes' own path and a bare WireGuard device on it.

All three are measured in one lab, turn by turn. The pods are behind a bridge of their Node, whose network
masquerades what leaves it, as those of clusters do. `pods-routes` is about many prefixes: what one Node does
when 250 others offer two each, from the snapshot to the kernel.
"""

from __future__ import annotations

import gc
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Interface, IPv4Network, IPv6Network
from statistics import median

from lab import Lab, Machine, Nat
from lab.netns import NETNS, call_in, ip_batch
from meshlab import Member
from scope_agent.pods.core import Pods
from scope_agent.pods.rules import PodNetwork
from scope_agent.pods.shell.network import PodRoutes

from bench.agents import MESH, BenchError, World, world
from bench.result import Benchmark, Row, Sample, Target
from bench.size import resident_mib
from bench.stand_ins import agent_identity, stand_in_identity
from bench.throughput import BARE_ADDRESSES, bare_pair, mtu_of, rate
from scope.model import (
    Addressing,
    Assignment,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PodNetworking,
    PodPrefix,
    PodSource,
    Snapshot,
)
from scope.topology import peers_for

MASQUERADE = """
table ip cluster {{ chain postrouting {{ type nat hook postrouting priority srcnat; policy accept;
  ip saddr {own} ip daddr != {own} masquerade
}}; }}
"""
WITHIN_S = 60.0
ROUND_TRIPS = 2_000
ECHO_PORT = 7007
PEERS, ROUTED_DEVICE = 250, "bench0"


@dataclass(frozen=True, slots=True)
class _Pod:
    """One pod on a Node; what a command in it begins with."""

    member: Member
    namespace: str
    prefix: str
    address: str

    @property
    def inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--net={NETNS / self.namespace}", "--")


def _pair(here: World) -> tuple[_Pod, _Pod]:
    """Two Nodes without NATs, each with a pod, which reach each other; a bare device stands beside."""
    members = here.member("first", Nat.NONE), here.member("second", Nat.NONE)
    for member in members:
        member.join(here.token, arguments=("--wireguard", "UserSpace"))
    here.settle()
    first, second = (_make_pod(here.lab, member, number) for number, member in enumerate(members, start=1))
    for pod in (first, second):
        name = f"{MESH}.external.{pod.member.name}"
        document = json.loads(here.registry.scopectl("get", "peers", name, "-o", "json"))
        document["spec"]["podPrefixes"] = [{"prefix": pod.prefix, "source": "Static"}]
        here.registry.apply(json.dumps(document))
    deadline = time.monotonic() + WITHIN_S
    ping = [*first.inside, "ping", "-n", "-c", "1", "-W", "1", second.address]
    while first.member.machine.run(ping, check=False).returncode != 0:
        if time.monotonic() > deadline:
            raise BenchError("the pods do not reach each other")
        time.sleep(0.2)
    bare_pair(first.member.machine, second.member.machine, mtu=mtu_of(first.member.machine))
    return first, second


def _make_pod(lab: Lab, member: Member, number: int) -> _Pod:
    pod = _Pod(member, lab.namespace(f"pod{number}"), f"10.24{number}.1.0/24", f"10.24{number}.1.5")
    machine = member.machine
    veth, gateway = f"veth{number}", f"10.24{number}.1.1"
    for words in (
        ["link", "add", "cni0", "type", "bridge"],
        ["link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", str(NETNS / pod.namespace)],
        ["link", "set", veth, "master", "cni0", "up"],
        ["address", "add", f"{gateway}/24", "dev", "cni0"],
        ["link", "set", "cni0", "up"],
    ):
        machine.run(["ip", *words])
    ip_batch(
        ["link set eth0 up", f"addr add {pod.address}/24 dev eth0", f"route add default via {gateway}"],
        inside=pod.namespace,
    )
    machine.run(["nft", "-f", "-"], input=MASQUERADE.format(own=pod.prefix))
    machine.run(["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])
    return pod


def _throughput(attempts: int) -> Iterator[Sample | Row]:
    with world(delay_ms=0.0, spec={"podNetworking": "CrossCluster"}) as here:
        first, second = _pair(here)
        machines = first.member.machine, second.member.machine
        path = str(machines[1].ipv4)
        before = rate(*machines, BARE_ADDRESSES[1])
        for _ in range(attempts):
            pods = rate(*machines, second.address, inside=(first.inside, second.inside))
            after = rate(*machines, BARE_ADDRESSES[1])
            device, bare = (before + after) / 2, rate(*machines, path)
            yield pods / device
            yield {
                "pod to pod, Gbit/s": pods * 8e-9,
                "bare device, Gbit/s": device * 8e-9,
                "bare path, Gbit/s": bare * 8e-9,
                "pods / bare device": pods / device,
                "pods / bare path": pods / bare,
            }
            before = after


def _latency(attempts: int) -> Iterator[Sample | Row]:
    with world(delay_ms=0.0, spec={"podNetworking": "CrossCluster"}) as here, ExitStack() as opened:
        first, second = _pair(here)
        nodes = [opened.enter_context(each.member.machine.socket()) for each in (first, second)]
        pods = [opened.enter_context(call_in(each.namespace, _udp)) for each in (first, second)]
        for end in (*nodes, *pods):
            end.bind(("", ECHO_PORT))
            end.settimeout(WITHIN_S)
        path = str(_machine(second).ipv4)
        for _ in range(attempts):
            device = _round_trip(nodes, BARE_ADDRESSES[1])
            through = _round_trip(pods, second.address)
            device = (device + _round_trip(nodes, BARE_ADDRESSES[1])) / 2
            bare = _round_trip(nodes, path)
            yield (through - device) / 2
            yield {
                "pod to pod, there and back, ms": through,
                "bare device, ms": device,
                "bare path, ms": bare,
            }


def _machine(pod: _Pod) -> Machine:
    return pod.member.machine


def _udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def _round_trip(ends: Sequence[socket.socket], address: str) -> float:
    """Milliseconds there and back: the median of many. One program holds both ends."""
    times = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        ends[0].sendto(b"ping", (address, ECHO_PORT))
        _, sender = ends[1].recvfrom(64)
        ends[1].sendto(b"pong", sender)
        ends[0].recv(64)
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def _routes(attempts: int) -> Iterator[Sample | Row]:
    """From a snapshot in which every prefix is new to all of them in the kernel."""
    with Lab() as lab:
        namespace = lab.namespace("node")
        ip_batch([f"link add {ROUTED_DEVICE} type bridge", f"link set {ROUTED_DEVICE} up"], inside=namespace)
        gc.collect()
        resting = resident_mib("self")
        snapshot = _snapshot()
        for attempt in range(attempts):
            room = Pods(left=False)
            began = time.thread_time()
            room.configure(snapshot, peers_for(snapshot), mtu=1420, is_removed=False)
            planned = time.thread_time() - began
            wanted = room.take_apply(0.0)
            if wanted is None or wanted[0] is None or len(wanted[0].reached) != 2 * PEERS:
                raise BenchError("not every prefix was planned")
            routes = PodRoutes(ROUTED_DEVICE)
            apply = partial(_timed, routes.apply, wanted[0])
            applied, again = call_in(namespace, apply), call_in(namespace, apply)
            call_in(namespace, routes.remove)
            yield 1e3 * (planned + applied)
            if attempt == attempts - 1:
                yield {
                    "routes": 2 * PEERS,
                    "peers": PEERS,
                    "plan, ms of processor": 1e3 * planned,
                    "apply, ms": 1e3 * applied,
                    "apply again, nothing to do, ms": 1e3 * again,
                    "memory with the snapshot, MiB": resident_mib("self") - resting,
                }


def _timed(act: Callable[[PodNetwork], None], network: PodNetwork) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    act(network)
    return time.perf_counter() - began


def _snapshot() -> Snapshot:
    mesh = Mesh(
        Meta("home", uid="mesh"),
        MeshSpec(Addressing(IPv4Network("100.80.0.0/16")), pod_networking=PodNetworking.CROSS_CLUSTER),
    )
    own = _peer(0, cluster="here")
    others = [_peer(number, cluster="there") for number in range(1, PEERS + 1)]
    return Snapshot(mesh, own, {peer.report.keys.wireguard: peer for peer in others if peer.report})


def _peer(number: int, *, cluster: str) -> Peer:
    """A Node with a prefix of pods of each family."""
    prefixes = (
        IPv4Network((f"10.{number // 250}.{number % 250}.0", 24)),
        IPv6Network(((0xFD00 << 112) + (number << 64), 64)),
    )
    identity = agent_identity() if number == 0 else stand_in_identity(number)
    return Peer(
        Meta(f"home.{cluster}.n{number}", uid=f"uid-{number}"),
        PeerSpec(
            "home",
            cluster=cluster,
            node_name=f"n{number}",
            pod_prefixes=tuple(PodPrefix(each, PodSource.NODE) for each in prefixes),
        ),
        PeerReport(identity.public),
        Assignment((IPv4Interface((int(IPv4Network("100.80.0.0/16")[1]) + number, 16)),), online=True),
    )


BENCHMARKS = (
    Benchmark(
        "pods-throughput",
        unit="ratio",
        what="TCP between pods of two clusters, against a bare WireGuard device between their Nodes",
        target=Target(median=0.9, more_is_better=True),
        attempts=6,
        run=_throughput,
    ),
    Benchmark(
        "pods-latency",
        unit="ms",
        what="what pods of two clusters wait longer, one way, than on a bare device between their Nodes",
        target=Target(median=0.2),
        attempts=5,
        run=_latency,
    ),
    Benchmark(
        "pods-routes",
        unit="ms",
        what="500 prefixes of pods of 250 Nodes: from the snapshot to the kernel",
        target=Target(median=1_000.0),
        attempts=5,
        run=_routes,
    ),
)
