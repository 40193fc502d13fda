"""Agents of Kubernetes Nodes: a real API server, real user-space WireGuard, real packets, one behind a NAT.

The tests are one story on one lab, in order: each finds what the one before left.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from kubelab import APPLY, MERGE, ApiError, ControlPlane
from lab import Host, Lab, LabError, Machine, Nat
from meshlab import PRIVATE, Flow, Member, Pinger, Status
from meshlab.programs import POLL_S, program, tail

from scope.model import Assignment, Kind, Role
from scope.registry.kube.objects import OPERATOR, status_patch

ROOT = Path(__file__).parents[2]
NAMESPACE = "scope-system"
CLUSTER = "default"  # as 10-cluster.yaml has it
API = "/apis/scope.ltgc.cc/v1alpha1"
PEERS, MESHES = f"{API}/scopepeers", f"{API}/scopemeshes"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"

OFFICE_PORT = 51999  # of an interface that no agent made

# Who agents are, what they may do, and to whose objects: as users install it.
MANIFESTS = ("00-namespace", "10-cluster", "20-accounts", "31-agent-rights", "40-policies")


class NodeMember(Member):
    """The agent of one Node, seen in one of its meshes."""

    def __init__(self, node: Node, *, mesh: str) -> None:
        self.node = node
        self.machine = node.machine
        self.mesh = mesh
        self.log = node.log
        self.process = None
        self.asked_at = None
        self._connection = None
        self._received = b""


@dataclass
class Node:
    """A machine that is a Node of the cluster, and its agent's one process."""

    machine: Machine
    token: str
    plane: ControlPlane
    agent: Any = None
    api_server: str = ""  # where its agent asks; "": the API server itself
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.machine.directory / "agent.log"
        self.account = self.machine.directory / "account"
        self.account.mkdir()
        (self.account / "ca.crt").write_bytes(self.plane.authority.certificate.read_bytes())
        (self.account / "token").write_text(self.token)

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def state(self) -> Path:
        """Where its agent keeps keys and snapshots."""
        return Path("/proc", str(self.machine.holder_pid), "root/var/lib/scope")

    def run(self, *options: str) -> None:
        """Start the agent as its DaemonSet does, with `options` besides."""
        arguments = ["--kubernetes", "--node", self.name, "--cluster", CLUSTER, "--namespace", NAMESPACE]
        url = self.api_server or self.plane.url
        access = ["--api-server", url, "--service-account", str(self.account)]
        with self.log.open("a") as log:
            argv = [program("scope-agent"), "run", *arguments, *access, *options]
            self.agent = self.machine.popen(argv, stdout=log, stderr=log)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the agent; its devices stay."""
        self.agent.send_signal(number)
        self.agent.wait()

    def devices(self) -> set[str]:
        """The names of its interfaces."""
        shown = self.machine.run(["ip", "-json", "link", "show"]).stdout
        return {link["ifname"] for link in json.loads(shown)}


@dataclass
class Cluster:
    """A cluster in the lab, and this test in its operator's place."""

    plane: ControlPlane
    api: Host  # where its API server is
    nodes: list[Node]
    pinger: Pinger

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None, **options: Any) -> Any:
        """One request of the administrator."""
        return asyncio.run(self.plane.request(method, path, body, **options))

    def make_mesh(self, name: str, prefix: str) -> None:
        """A ScopeMesh of its own addresses."""
        self.declare_mesh(name, {"addressing": {"ipv4": prefix}})

    def declare_mesh(self, name: str, spec: Mapping[str, object]) -> None:
        """A ScopeMesh."""
        document = {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopeMesh",
            "metadata": {"name": name},
            "spec": spec,
        }
        self.ask("POST", MESHES, document)

    def make_peer(self, mesh: str, node: Node) -> str:
        """The ScopePeer of a Node: its UID."""
        uid = self.ask("GET", f"/api/v1/nodes/{node.name}")["metadata"]["uid"]
        document = {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopePeer",
            "metadata": {"name": peer_name(mesh, node)},
            "spec": {"mesh": mesh, "cluster": CLUSTER, "nodeName": node.name, "nodeUID": uid},
        }
        return str(self.ask("POST", PEERS, document)["metadata"]["uid"])

    def assign(self, mesh: str, node: Node, address: str) -> None:
        """Give a peer its address, as the operator writes it."""
        name = peer_name(mesh, node)
        part = Assignment(addresses=(IPv4Interface(address),), role=Role.EDGE, online=True)
        path = f"{PEERS}/{name}/status?fieldManager={OPERATOR}&force=true"

        def written() -> bool:
            revision = int(self.peer(mesh, node)["metadata"]["resourceVersion"])
            patch = status_patch(Kind.PEER, name, part, if_revision=revision)
            try:
                self.ask("PATCH", path, patch, content_type=APPLY)
            except ApiError as error:
                if error.status != 409:  # the agent has written meanwhile
                    raise
                return False
            return True

        until(written, within_s=120.0, missing=lambda: f"{name} is never left alone")

    def peer(self, mesh: str, node: Node) -> dict[str, Any]:
        """The stored ScopePeer."""
        return dict(self.ask("GET", f"{PEERS}/{peer_name(mesh, node)}"))

    def await_keys(self, mesh: str, node: Node) -> dict[str, str]:
        """The public keys that the agent publishes."""
        return until(
            lambda: self.peer(mesh, node).get("status", {}).get("keys"),
            within_s=120.0,
            missing=lambda: f"no keys of {node.name}:\n{tail(node.log)}",
        )

    def await_direct(self, mesh: str) -> None:
        """Return when both agents reach each other directly in a mesh."""
        for node, other in (self.nodes, self.nodes[::-1]):
            self.await_status(mesh, node, partial(is_direct, name=peer_name(mesh, other)))

    def await_status(self, mesh: str, node: Node, holds: Callable[[Status], bool]) -> None:
        """Return when what an agent says of a mesh is as it should be."""
        member = NodeMember(node, mesh=mesh)

        def reached() -> bool:
            status = member.status()
            return status is not None and holds(status)

        try:
            until(reached, within_s=120.0, missing=lambda: f"{node.name}:\n{tail(node.log)}")
        finally:
            member.hang_up()

    def await_report(self, mesh: str, node: Node, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The status of a ScopePeer, once it is as it should be."""

        def reported() -> dict[str, Any] | None:
            status: dict[str, Any] = self.peer(mesh, node)["status"]
            return status if holds(status) else None

        found = until(reported, within_s=120.0, missing=lambda: f"{node.name}:\n{tail(node.log)}")
        assert isinstance(found, dict)
        return found

    def leave(self, *, patience_s: float) -> None:
        """Have the Nodes leave, as the chart's Job does. Raises LabError with what it said."""
        options = [f"--kubeconfig={self.plane.kubeconfig()}", f"--namespace={NAMESPACE}"]
        said = [f"--cluster-name={CLUSTER}", f"--leave={patience_s:g}"]
        self.api.run([program("scope-operator"), *options, *said], timeout=180.0)

    def await_beats(self, node: Node, names: list[str]) -> None:
        """Return when the Lease of a Node speaks for these ScopePeers."""

        def named() -> bool:
            try:
                lease = self.ask("GET", f"{LEASES}/agent.{node.name}")
            except ApiError as error:
                if error.status != 404:
                    raise
                return False
            return [owner["name"] for owner in lease["metadata"]["ownerReferences"]] == names

        until(named, within_s=120.0, missing=lambda: f"not {names} beat on {node.name}:\n{tail(node.log)}")

    def await_pings(self, flows: list[Flow]) -> None:
        """Return when a new ping of each flow has come back."""
        for flow in flows:
            self.pinger.restart(flow)
        until(
            lambda: all(flow.first for flow in flows),
            within_s=120.0,
            missing=lambda: f"not all came back: {flows}",
        )


def peer_name(mesh: str, node: Node) -> str:
    """The name that the operator gives."""
    return f"{mesh}.{CLUSTER}.{node.name}"


def is_direct(status: Status, name: str) -> bool:
    """Whether the agent reaches a peer directly."""
    reach = status.peers.get(name)
    return reach is not None and reach.is_direct


def is_whole(status: Mapping[str, Any]) -> bool:
    """Whether an agent tells that it holds what it was given, and reaches its one peer."""
    given = [address.partition("/")[0] for address in status.get("addresses", ())]
    return bool(given) and status.get("heldAddresses") == given and status.get("direct") == 1


def knows_a_way(snapshot: Path) -> bool:
    """Whether what is on disk suffices to reach somebody without the registry."""
    return snapshot.exists() and bool(json.loads(snapshot.read_text())["lastGood"])


def until(done: Callable[[], Any], *, within_s: float, missing: Callable[[], str]) -> Any:
    """What `done` gives once that is true."""
    deadline = time.monotonic() + within_s
    while not (found := done()):
        assert time.monotonic() < deadline, missing()
        time.sleep(5 * POLL_S)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A control plane on a server of the lab, and two Nodes, one of them behind a NAT."""
    with Lab(delay_ms=5, private=PRIVATE) as lab, Pinger() as pinger:
        api = lab.server("api")
        plane = ControlPlane(host=api)
        try:
            asyncio.run(start(plane))
            machines = [
                lab.site("open", nat=Nat.NONE).machine("n-open"),
                lab.site("nat", nat=Nat.PORT_RESTRICTED).machine("n-nat"),
            ]
            nodes = [
                Node(machine, asyncio.run(make_node(plane, machine.name)), plane) for machine in machines
            ]
            yield Cluster(plane, api, nodes, pinger)
        finally:
            plane.close(keep_logs=False)


async def start(plane: ControlPlane) -> None:
    """What a user applies, but for the programs themselves."""
    await plane.start()
    await plane.apply(ROOT / "crds", *(ROOT / "charts/manifests" / f"{name}.yaml" for name in MANIFESTS))


async def make_node(plane: ControlPlane, name: str) -> str:
    """A Node, and the token that a pod on it would have."""
    await plane.create_node(name)
    return await plane.token("scope-agent", namespace=NAMESPACE, node=name)


@pytest.fixture(scope="module")
def joined(cluster: Cluster) -> list[Flow]:
    """Both agents in one mesh, and pings each way through it."""
    return join(cluster, "home", "100.80.0.0/16")


def join(cluster: Cluster, mesh: str, prefix: str) -> list[Flow]:
    """Have both Nodes in a mesh, as the operator does; agents that do not run yet are started."""
    cluster.make_mesh(mesh, prefix)
    hosts = IPv4Network(prefix)
    for number, node in enumerate(cluster.nodes, start=1):
        cluster.make_peer(mesh, node)
        if node.agent is None:
            node.run()
        cluster.await_keys(mesh, node)
        cluster.assign(mesh, node, f"{hosts[number]}/{hosts.prefixlen}")
    first, second = cluster.nodes
    return [
        cluster.pinger.flow(first.machine, str(hosts[2])),
        cluster.pinger.flow(second.machine, str(hosts[1])),
    ]


def test_two_nodes_join_through_the_api_server_and_ping_each_other(
    cluster: Cluster, joined: list[Flow]
) -> None:
    cluster.await_direct("home")
    cluster.await_pings(joined)


def test_each_agent_writes_its_part_and_beats_its_lease(cluster: Cluster, joined: list[Flow]) -> None:
    for node in cluster.nodes:
        status = cluster.await_report("home", node, is_whole)
        assert status["device"] == "UserSpace"
        cluster.await_beats(node, [peer_name("home", node)])


def test_what_an_agent_may_not_do_it_has_not_tried(cluster: Cluster, joined: list[Flow]) -> None:
    account = f"system:serviceaccount:{NAMESPACE}:scope-agent"
    asked = [each for each in cluster.plane.audit.since() if each.user == account]
    assert asked
    assert {each.code for each in asked if each.code >= 400} <= {404, 409}
    written = {(each.resource, each.subresource) for each in asked if each.is_write}
    assert written == {("scopepeers", "status"), ("leases", "")}


def test_a_second_mesh_is_served_beside_the_first(cluster: Cluster, joined: list[Flow]) -> None:
    flows = join(cluster, "work", "100.81.0.0/16")
    cluster.await_direct("work")
    cluster.await_pings(flows + joined)
    for node in cluster.nodes:
        assert {"scope0", "scope1"} <= node.devices()
        cluster.await_beats(node, [peer_name(mesh, node) for mesh in ("home", "work")])


def test_agents_that_start_while_the_api_server_is_down_serve_from_disk(
    cluster: Cluster, joined: list[Flow]
) -> None:
    for node in cluster.nodes:
        for mesh in ("home", "work"):
            snapshot = node.state / mesh / "snapshot.json"
            until(
                partial(knows_a_way, snapshot),
                within_s=120.0,
                missing=partial("no way to anybody in {}".format, snapshot),
            )
    cluster.plane.api_server.kill()
    try:
        for node in cluster.nodes:
            node.kill(signal.SIGTERM)
            node.run()
        cluster.await_direct("home")
        cluster.await_direct("work")
        cluster.await_pings(joined)
    finally:
        asyncio.run(cluster.plane.start())
    for node in cluster.nodes:
        cluster.await_status("home", node, lambda status: status.connected)


def test_a_peer_that_was_made_anew_gets_the_keys_and_addresses_that_are_held(
    cluster: Cluster, joined: list[Flow]
) -> None:
    node = cluster.nodes[1]
    before = cluster.peer("home", node)
    cluster.ask("DELETE", f"{PEERS}/{peer_name('home', node)}")
    uid = cluster.make_peer("home", node)
    assert uid != before["metadata"]["uid"]
    assert cluster.await_keys("home", node) == before["status"]["keys"]
    (address,) = before["status"]["addresses"]
    held = [address.partition("/")[0]]
    cluster.await_report("home", node, lambda status: status.get("heldAddresses") == held)
    cluster.assign("home", node, address)
    cluster.await_direct("home")
    cluster.await_pings(joined)


def test_a_mesh_whose_peer_is_gone_is_left_and_the_other_stays(cluster: Cluster, joined: list[Flow]) -> None:
    node = cluster.nodes[0]
    kept = node.state / "work"
    assert (kept / "enrolment.json").exists()
    cluster.ask("DELETE", f"{PEERS}/{peer_name('work', node)}")
    until(
        lambda: "scope1" not in node.devices() and not kept.exists(),
        within_s=120.0,
        missing=lambda: f"scope1 or {kept} is still there:\n{tail(node.log)}",
    )
    assert "scope0" in node.devices()
    cluster.await_pings(joined)


def test_nodes_that_are_told_to_leave_are_waited_for_and_who_has_not_left_is_named(
    cluster: Cluster, joined: list[Flow]
) -> None:
    first, second = cluster.nodes
    before = {node.name: cluster.peer("home", node)["status"] for node in cluster.nodes}
    second.kill()
    with pytest.raises(LabError, match=f"Node {second.name}, mesh home: its agent"):
        cluster.leave(patience_s=0)
    cluster.await_report("home", first, lambda status: status.get("left") is True)
    assert not {"scope0", "scope1"} & first.devices()
    assert "scope0" in second.devices()
    second.run()
    cluster.leave(patience_s=120)
    for node in cluster.nodes:
        assert not {"scope0", "scope1"} & node.devices()
        assert not [each for each in node.state.iterdir() if each.is_dir()]

    # What the operator of the next installation does.
    for node in cluster.nodes:
        spec = {"spec": {"leaving": None}}
        cluster.ask("PATCH", f"{PEERS}/{peer_name('home', node)}", spec, content_type=MERGE)
    cluster.await_direct("home")
    cluster.await_pings(joined)
    for node in cluster.nodes:
        status = cluster.await_report("home", node, is_whole)
        assert status["addresses"] == before[node.name]["addresses"]
        assert status["keys"] != before[node.name]["keys"]


@pytest.fixture
def interfaces(cluster: Cluster) -> Iterator[list[Interface]]:
    """An interface of wg-quick's on each Node, with one pre-shared key, and nothing that sends."""
    made = [Interface(node, number) for number, node in enumerate(cluster.nodes, start=1)]
    psk = cluster.nodes[0].machine.run(["wg", "genpsk"]).stdout.strip()
    first, second = made
    try:
        first.bring_up(second, psk, endpoint="")  # the other one is behind a NAT
        address = next(each for each in first.node.machine.addresses() if each.version == 4)
        second.bring_up(first, psk, endpoint=f"Endpoint = {address}:{OFFICE_PORT}\n")
        yield made
    finally:
        for interface in made:
            interface.quick("down")


class Interface:
    """`wg0` of a Node, which is wg-quick's."""

    def __init__(self, node: Node, number: int) -> None:
        self.node, self.number = node, number
        self.config = node.machine.directory / "wg0.conf"
        self.private = node.machine.run(["wg", "genkey"]).stdout.strip()
        self.public = node.machine.run(["wg", "pubkey"], input=self.private).stdout.strip()

    def bring_up(self, other: Interface, psk: str, *, endpoint: str) -> None:
        self.config.touch(0o600)
        self.config.write_text(
            f"[Interface]\nPrivateKey = {self.private}\nListenPort = {OFFICE_PORT}\n"
            f"Address = 10.77.0.{self.number}/24\nMTU = 1380\n"
            f"[Peer]\nPublicKey = {other.public}\nPresharedKey = {psk}\n"
            f"AllowedIPs = 10.77.0.{other.number}/32\n{endpoint}"
        )
        self.quick("up")

    def quick(self, action: str) -> None:
        go = "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go"
        self.node.machine.run(["env", go, "wg-quick", action, str(self.config)], check=action == "up")

    def psk(self) -> str:
        return self.node.machine.run(["wg", "show", "wg0", "preshared-keys"]).stdout.split()[1]


def test_a_mesh_on_an_interface_of_its_nodes_keys_that_and_leaves_it_as_it_was_when_deleted(
    cluster: Cluster, joined: list[Flow], interfaces: list[Interface]
) -> None:
    managers = interfaces[0].psk()
    cluster.declare_mesh("office", {"existingInterface": "wg0", "postQuantum": {"mode": "Preferred"}})
    for interface in interfaces:
        cluster.make_peer("office", interface.node)
    for interface in interfaces:
        assert cluster.await_keys("office", interface.node)["wireGuard"] == interface.public

    def shown() -> str:
        return "\n".join(f"{each.psk()}\n{tail(each.node.log)}" for each in interfaces)

    def is_keyed() -> bool:
        psks = {interface.psk() for interface in interfaces}
        return len(psks) == 1 and managers not in psks

    until(is_keyed, within_s=400.0, missing=shown)
    for interface in interfaces:  # as the garbage collector does for a ScopeMesh that is deleted
        cluster.ask("DELETE", f"{PEERS}/{peer_name('office', interface.node)}")
    cluster.ask("DELETE", f"{MESHES}/office")

    def is_left() -> bool:
        return all(
            interface.psk() == managers and not (interface.node.state / "office").exists()
            for interface in interfaces
        )

    until(is_left, within_s=400.0, missing=shown)
    for interface in interfaces:
        assert "wg0" in interface.node.devices()
    cluster.await_pings(joined)


def test_a_cluster_or_node_that_is_not_named_is_asked_for(cluster: Cluster) -> None:
    with pytest.raises(LabError, match="--kubernetes needs --node: give it, or set NODE_NAME"):
        cluster.nodes[0].machine.run([program("scope-agent"), "run", "--kubernetes"])
