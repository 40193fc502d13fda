"""Two clusters in one mesh: the registry is in the east, and the west joins it through its gateway."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kubelab import MERGE, ApiError, ControlPlane
from lab import Lab, Machine, Nat, Server
from meshlab import PRIVATE, Member, Pinger, mesh_document
from meshlab.cluster import Cluster as LabCluster
from meshlab.programs import POLL_S, program, tail

from scope.credentials import ProjectedToken
from scope.gateway_file import GatewayFile
from scope.join import JoinString
from scope.model import Kind, Peer, PeerReport
from scope.registry.http import HttpRegistry
from scope.registry.port import Refused
from tests.kube.operator_fixture import MESHES, NAMESPACE, PEERS, Cluster, Replica, eventually, mesh, operated
from tests.kube.test_operator_gateway import GATEWAY, administrator_file, scopectl, served_by
from tests.kube.test_operator_gateway import SECRET as GATEWAY_SECRET
from tests.unit.test_gateway_clusters import machine_keys

MANIFESTS = Path(__file__).parents[2] / "charts" / "manifests"

PATIENCE_S = 180.0  # for who lost its gateway: it asks again later and later
RIGHTS = ("20-accounts.yaml", "30-operator-rights.yaml")


@dataclass
class Two:
    """Both clusters, and how to get into the mesh of the eastern one."""

    east: Cluster
    west: Cluster
    gateway: Replica
    admin: Path
    directory: Path

    async def restart_gateway(self, *options: str) -> None:
        """Another operator in the east, where the one before listened."""
        listened = (await served_by(self.gateway)).removeprefix("https://")
        self.gateway.process.terminate()  # hands the Lease back
        assert await self.gateway.ended() == 0
        said = (f"--listen={listened}", *GATEWAY[1:], *options)
        self.gateway = await self.east.operator(*said, gateway=True)
        await served_by(self.gateway)

    async def invite(self) -> Path:
        """A file with a fresh join string for one cluster."""
        said = await scopectl("token", "create", "--mesh", "home", "--single-use", admin=self.admin)
        (line,) = [word.strip("'") for word in said.split() if word.strip("'").startswith("https://")]
        file = self.directory / "join-string"
        file.write_text(line + "\n")
        return file

    async def join(self, file: Path, *options: str, name: str = "west") -> Replica:
        """The western operator, with no more rights than the manifests give it."""
        token = await self.west.plane.token("scope-operator", namespace=NAMESPACE)
        return await self.west.operator(
            f"--cluster-name={name}",
            f"--kubeconfig={self.west.plane.kubeconfig(token=token)}",
            f"--join-string-file={file}",
            *options,
        )

    async def agent(self, node: str, *, of: Cluster | None = None) -> HttpRegistry:
        """An agent that shows the token of a Node, of the west unless it says otherwise, as the west's."""
        plane = (of or self.west).plane
        token = await plane.token("scope-agent", namespace=NAMESPACE, node=node, audience="scope-gateway")
        file = self.directory / f"token-{time.monotonic_ns()}"
        file.write_text(token)
        join = JoinString.parse((self.directory / "join-string").read_text())
        credential = ProjectedToken("home", "west", str(file))
        return HttpRegistry(join.url, pin=join.pin, credential=credential, registry_key=join.registry_key)

    async def mesh(self) -> dict[str, Any]:
        """The mesh as the eastern API server has it."""
        return await self.east.plane.request("GET", f"{MESHES}/home")


def two_clusters(
    make: Callable[..., ControlPlane], directory: Path, body: Callable[[Two], Awaitable[None]]
) -> None:
    """Run `body` beside an operator with a gateway in the east, and rights but no operator in the west."""
    planes = make(), make()

    async def run() -> None:
        async with operated(planes[0]) as east, operated(planes[1]) as west:
            for cluster in (east, west):
                for file in RIGHTS:
                    await cluster.plane.apply(MANIFESTS / file)
            await east.plane.apply(mesh())
            replica = await east.operator(*GATEWAY, gateway=True)
            admin = await administrator_file(east, directory, url=await served_by(replica))
            await body(Two(east, west, replica, admin, directory))

    asyncio.run(run())


async def _gateway_file(cluster: Cluster) -> GatewayFile:
    """What the operator of a joined cluster tells its agents."""
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/scope-gateway"
    return GatewayFile.parse((await cluster.plane.request("GET", path))["data"]["gateway.json"])


@pytest.mark.timeout(600)
def test_the_nodes_of_both_clusters_are_peers_of_one_mesh_also_after_their_gateway_got_another_key(
    own_control_plane: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    async def body(two: Two) -> None:
        await two.east.plane.create_node("n1")
        uids = {name: await two.west.plane.create_node(name) for name in ("n1", "n2")}
        file = await two.invite()
        gateway = JoinString.parse(await asyncio.to_thread(file.read_text)).url
        first = await two.join(file, f"--registry-url={gateway}")
        peers = await two.east.addressed("home.east.n1", "home.west.n1", "home.west.n2")
        spec = peers["home.west.n1"]["spec"]
        assert (spec["cluster"], spec["nodeName"], spec["nodeUID"]) == ("west", "n1", uids["n1"])
        found = {each["name"]: each for each in (await two.mesh())["status"]["clusters"]}
        jwks = await two.west.plane.request("GET", "/openid/v1/jwks")
        assert [each["kid"] for each in found["west"]["keys"]] == [each["kid"] for each in jwks["keys"]]
        assert "signingKey" not in found["east"]

        await two.west.plane.request("DELETE", "/api/v1/nodes/n2")
        began = time.monotonic()
        await two.east.addressed("home.east.n1", "home.west.n1")
        assert time.monotonic() - began < 30

        await two.west.plane.request("DELETE", "/api/v1/nodes/n1")
        anew = await two.west.plane.create_node("n1")

        async def renewed() -> dict[str, Any] | None:
            peer = (await two.east.peers()).get("home.west.n1")
            return peer if peer is not None and peer["spec"]["nodeUID"] == anew else None

        assert (await eventually(renewed))["metadata"]["uid"] != peers["home.west.n1"]["metadata"]["uid"]

        # Its gateway's certificate is renewed, which nobody has to know; then its key is replaced.
        before = await _gateway_file(two.west)
        async with await two.agent("n1") as agent:  # which knows the pin of now for as long as it runs
            await two.restart_gateway("--advertise=renewed.example.net")
            await agent.list(Kind.PEER)
            assert await _gateway_file(two.west) == before
            await two.east.plane.request(
                "PATCH", GATEWAY_SECRET, {"data": {"tls.key": None}}, content_type=MERGE
            )
            await two.restart_gateway()

            async def followed() -> GatewayFile | None:
                file = await _gateway_file(two.west)
                return file if file.pin != before.pin else None

            after = await eventually(followed, within=PATIENCE_S)
            assert after == replace(before, pin=after.pin)
            await agent.list(Kind.PEER)
        async with HttpRegistry(before.url, pin=before.pin, credential=None) as stranger:
            with pytest.raises(Refused, match="does not vouch for it"):
                await stranger.list(Kind.PEER)

        # The token is used up and its file is gone: the key that joined, and the pin that was followed, are
        # enough from now on.
        first.process.terminate()
        assert await first.ended() == 0
        file.unlink()
        second = await two.join(file)
        await two.west.plane.create_node("n3")

        async def appeared() -> bool:
            return "home.west.n3" in await two.east.peers()

        await eventually(appeared, within=PATIENCE_S)
        assert "cluster.joined" not in second.text
        assert "gateway_key_replaced" in first.text
        assert "gateway_key_replaced" not in second.text

    two_clusters(own_control_plane, tmp_path, body)


def test_agents_are_known_by_the_tokens_of_their_own_api_server(
    own_control_plane: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    async def body(two: Two) -> None:
        for name in ("n1", "n2"):
            await two.west.plane.create_node(name)
        await two.east.plane.create_node("n1")
        await two.join(await two.invite())
        await two.east.addressed("home.east.n1", "home.west.n1", "home.west.n2")

        async with await two.agent("n1") as agent:
            own, other = [await agent.get(Kind.PEER, f"home.west.{name}") for name in ("n1", "n2")]
            assert isinstance(own, Peer)
            for number in (1, 2):  # the second time the machine was imaged anew
                report = PeerReport(machine_keys(number), direct=number)
                await agent.update_status(Kind.PEER, own.meta.name, report, uid=own.meta.uid)
                peer = (await two.east.peers())[own.meta.name]
                assert peer["status"]["keys"]["wireGuard"] == str(report.keys.wireguard)
                assert peer["metadata"]["uid"] == own.meta.uid
                assert peer["status"]["addresses"]
            (event,) = await two.east.events("KeysReplaced")
            assert event["regarding"]["name"] == own.meta.name
            first, second = (machine_keys(number).wireguard for number in (1, 2))
            assert f"Node n1 has new keys (WireGuard {second} in place of {first})" in event["note"]
            with pytest.raises(Refused, match="a peer writes its own status alone"):
                await agent.update_status(Kind.PEER, other.meta.name, report, uid=other.meta.uid)
            await agent.heartbeat(own.meta.name)

        # The same issuer, account and Node name: only the key of the API server tells them apart.
        async with await two.agent("n1", of=two.east) as foreign:
            with pytest.raises(Refused, match="a key that cluster 'west' has not registered"):
                await foreign.list(Kind.PEER)

    two_clusters(own_control_plane, tmp_path, body)


def test_a_cluster_that_takes_anothers_name_is_refused_and_told_why(
    own_control_plane: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    async def body(two: Two) -> None:
        await two.east.plane.create_node("n1")
        await two.west.plane.create_node("n2")
        await two.east.addressed("home.east.n1")

        async def uid_of(cluster: Cluster) -> str:
            found = await cluster.plane.request("GET", "/api/v1/namespaces/kube-system")
            return str(found["metadata"]["uid"])

        refused = await two.join(await two.invite(), name="east")
        assert await refused.ended() == 1
        assert (
            f"in mesh 'home' the name 'east' belongs to the cluster whose kube-system namespace has UID "
            f"{await uid_of(two.east)}, and yours has {await uid_of(two.west)}: give yours another name"
        ) in refused.text
        assert "Traceback" not in refused.text
        assert set(await two.east.peers()) == {"home.east.n1"}

        # The key that was refused is kept and the token is unused: under its own name it joins with both.
        await two.join(tmp_path / "join-string")
        await two.east.addressed("home.east.n1", "home.west.n2")
        path = f"/api/v1/namespaces/{NAMESPACE}/secrets/scope-cluster"
        secret = await two.west.plane.request("GET", path)
        joined = json.loads(base64.b64decode(secret["data"]["joined.json"]))
        assert (joined["mesh"], joined["registry"]) == ("home", await uid_of(two.east))

    two_clusters(own_control_plane, tmp_path, body)


# --- agents ---------------------------------------------------------------------------------------------

HUB = "home.default.e-1"
JOINING = ("00-namespace", "10-cluster", "20-accounts", "30-operator-rights")  # as docs/kubernetes.md has it


@dataclass
class LabPair:
    """Two clusters in the lab: a Node of each with its agent, and a Node of each whose agent never came.

    The eastern Node is a hub.
    """

    lab: Lab
    east: LabCluster
    west: ControlPlane
    west_server: Server
    members: tuple[Member, Member]  # of the eastern and of the western Node
    pinger: Pinger
    mounted: Path = field(init=False)  # what a kubelet brings to the western Node

    def __post_init__(self) -> None:
        self.mounted = self.members[1].machine.directory / "gateway"
        self.mounted.mkdir()

    def western(self, node: str) -> list[str]:
        """The arguments of an agent in the west, which has no way to its own API server."""
        said = {"--node": node, "--cluster": "west", "--namespace": NAMESPACE, "--gateway": str(self.mounted)}
        return ["--kubernetes", *(word for option in said.items() for word in option)]

    def join_west(self) -> None:
        """Start the western operator, as its ServiceAccount."""
        file = self.west_server.directory / "join-string"
        file.write_text(self.east.token("home"))
        token = asyncio.run(self.west.token("scope-operator", namespace=NAMESPACE))
        said = {
            "--cluster-name": "west",
            "--namespace": NAMESPACE,
            "--kubeconfig": str(self.west.kubeconfig(token=token)),
            "--join-string-file": str(file),
        }
        with self.operator_log.open("w") as log:
            words = [word for option in said.items() for word in option]
            self.west_server.popen([program("scope-operator"), *words], stdout=log, stderr=log)

    @property
    def operator_log(self) -> Path:
        """The western operator's."""
        return self.west_server.directory / "operator.log"

    def mount(self) -> bool:
        """Bring the ConfigMap to the Node, as its kubelet does once there is one."""
        path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/scope-gateway"
        try:
            found = asyncio.run(self.west.request("GET", path))
        except ApiError as error:
            if error.status != 404:
                raise
            return False
        for name, text in found["data"].items():
            (self.mounted / name).write_text(text)
        return True

    def keys(self, name: str) -> Any:
        """The keys of a ScopePeer; none where its agent never came."""
        return self.status(name).get("keys")

    def status(self, name: str) -> dict[str, Any]:
        """The status of a ScopePeer; empty where there is none."""
        try:
            found = asyncio.run(self.east.plane.request("GET", f"{PEERS}/{name}"))
        except ApiError as error:
            if error.status != 404:
                raise
            return {}
        return dict(found.get("status", {}))

    def address(self, member: Member) -> str:
        """The address of an agent, once it has one."""
        found: list[str] = []

        def told() -> bool:
            status = member.status()
            found[:] = [status.address] if status is not None and status.address else []
            return bool(found)

        self.until(told, member.log)
        return found[0]

    def until(self, done: Callable[[], Any], *logs: Path) -> None:
        """Return once that is true; show the ends of the logs when it never is."""
        deadline = time.monotonic() + 60.0
        while not done():
            assert time.monotonic() < deadline, "\n".join(tail(log) for log in (self.operator_log, *logs))
            time.sleep(5 * POLL_S)


@pytest.fixture(scope="module")
def lab_pair() -> Iterator[LabPair]:
    """Both clusters; the western one has not joined yet, and its agent waits."""
    with Lab(delay_ms=5, private=PRIVATE) as lab, Pinger() as pinger:
        east = LabCluster(lab.server("east"))
        east.apply(mesh_document("home", hubs={"names": [HUB]}))
        server = lab.server("west")
        east.introduce(server)
        west = ControlPlane(host=server)
        try:
            asyncio.run(install(west))
            machines = [
                lab.site("open", nat=Nat.NONE).machine("e-1"),
                lab.site("office", nat=Nat.PORT_RESTRICTED).machine("w-1"),
            ]
            first, second = [Member(each, mesh="home", registry=east) for each in machines]
            pair = LabPair(lab, east, west, server, (first, second), pinger)
            first.run(*east.add_node(machines[0]))
            asyncio.run(east.plane.create_node("e-2"))
            (pair.mounted / "token").write_text(asyncio.run(agents_token(west, "w-1")))
            second.run(*pair.western("w-1"))
            yield pair
            for member in pair.members:
                member.hang_up()
        finally:
            west.close()


async def install(west: ControlPlane) -> None:
    await west.start()
    await west.apply(*(MANIFESTS / f"{name}.yaml" for name in JOINING))
    for node in ("w-1", "w-2"):
        await west.create_node(node)


async def agents_token(west: ControlPlane, node: str) -> str:
    return await west.token("scope-agent", namespace=NAMESPACE, node=node, audience="scope-gateway")


def test_agents_of_both_clusters_ping_each_other(lab_pair: LabPair) -> None:
    east, west = lab_pair.members
    lab_pair.until(lambda: "node.no_gateway" in west.log.read_text(), west.log)
    lab_pair.join_west()
    lab_pair.until(lab_pair.mount, west.log)
    for member, other in ((east, "home.west.w-1"), (west, "home.default.e-1")):
        lab_pair.until(partial(reaches, member, other), east.log, west.log)
    addresses = [lab_pair.address(member) for member in (east, west)]
    flows = [
        lab_pair.pinger.flow(east.machine, addresses[1]),
        lab_pair.pinger.flow(west.machine, addresses[0]),
    ]
    lab_pair.until(lambda: all(flow.first for flow in flows), east.log, west.log)

    # A ScopePeer that was deleted by hand is made again, and its agent is the peer that it was.
    path, before = f"{PEERS}/home.west.w-1", lab_pair.keys("home.west.w-1")
    asyncio.run(lab_pair.east.plane.request("DELETE", path))
    lab_pair.until(lambda: says(west.log, "mesh.removed mesh=home"), west.log)
    lab_pair.until(lambda: lab_pair.keys("home.west.w-1") == before, west.log)
    for flow in flows:
        lab_pair.pinger.restart(flow)
    lab_pair.until(lambda: all(flow.first for flow in flows), east.log, west.log)
    lab_pair.until(lambda: (status := west.status()) and status.address == addresses[1], west.log)


def reaches(member: Member, name: str) -> bool:
    """Whether an agent has a direct path to a peer."""
    status = member.status()
    reach = status.peers.get(name) if status is not None else None
    return reach is not None and reach.is_direct


def test_a_machine_that_reaches_only_the_tcp_port_of_a_node_joins_by_it_and_talks_to_the_other_cluster(
    lab_pair: LabPair,
) -> None:
    lab, east, (hub, west) = lab_pair.lab, lab_pair.east, lab_pair.members
    site = lab.site("closed", nat=Nat.PORT_RESTRICTED)
    site.block_udp()
    lab.cut(site, east.server)
    lab_pair.until(lambda: carries(lab_pair.status(HUB)), hub.log)
    token = east.token("home", hub=HUB)
    locked = Member(site.machine("locked"), mesh="home", registry=east)
    locked.join(token, wait=True)
    try:
        address = lab_pair.address(locked)
        lab_pair.until(partial(is_carried, locked, "home.west.w-1"), locked.log, hub.log)
        flows = [
            lab_pair.pinger.flow(locked.machine, lab_pair.address(west)),
            lab_pair.pinger.flow(west.machine, address),
        ]
        lab_pair.until(lambda: all(flow.first for flow in flows), locked.log, hub.log, west.log)
    finally:
        locked.hang_up()


def carries(status: dict[str, Any]) -> bool:
    """Whether a hub tells that members are carried by it."""
    carrier = status.get("relay", {}).get("carrier", {})
    return bool(carrier) and not carrier.get("reason")


def is_carried(member: Member, name: str) -> bool:
    """Whether an agent reaches a peer over TCP to the hub."""
    status = member.status()
    reach = status.peers.get(name) if status is not None else None
    return reach is not None and reach.is_relayed and reach.carried and reach.hub == HUB


def test_an_agent_with_the_token_of_another_node_is_refused_in_both_clusters(lab_pair: LabPair) -> None:
    east, west = (member.machine for member in lab_pair.members)
    # The tokens of e-1 and w-1, in the hands of agents that say that they are those of e-2 and w-2.
    eastern = ["--kubernetes", "--node", "e-2", "--cluster", "default", "--namespace", NAMESPACE]
    eastern += ["--api-server", lab_pair.east.plane.url, "--service-account", str(east.directory / "account")]
    for machine, arguments, name, sentence in (
        (east, eastern, "home.default.e-2", "may write only the ScopePeers of its own Node"),
        (west, lab_pair.western("w-2"), "home.west.w-2", "a peer writes its own status alone"),
    ):
        log = run_impostor(machine, arguments)
        lab_pair.until(partial(says, log, sentence), log)
        assert lab_pair.keys(name) is None


def run_impostor(machine: Machine, arguments: list[str]) -> Path:
    """Run a second agent on a machine, with files of its own: its log."""
    own, log = machine.directory / "impostor", machine.directory / "impostor.log"
    apart = ["--state", str(own), "--run-dir", str(own / "run")]
    with log.open("w") as output:
        machine.popen([program("scope-agent"), "run", *arguments, *apart], stdout=output, stderr=output)
    return log


def says(log: Path, sentence: str) -> bool:
    """Whether a program said that."""
    return sentence in log.read_text()
