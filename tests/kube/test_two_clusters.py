"""Two clusters in one mesh: the registry is in the east, and the west joins it through its gateway."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubelab import ControlPlane

from scope.credentials import ProjectedToken
from scope.join import JoinString
from scope.model import Kind, Peer, PeerReport
from scope.registry.http import HttpRegistry
from scope.registry.port import Refused
from tests.kube.operator_fixture import MESHES, NAMESPACE, Cluster, Replica, eventually, mesh, operated
from tests.kube.test_operator_gateway import GATEWAY, administrator_file, scopectl, served_by
from tests.unit.test_gateway_clusters import machine_keys

MANIFESTS = Path(__file__).parents[2] / "charts" / "manifests"
pytestmark = pytest.mark.timeout(300)  # each starts two control planes and an operator in each

RIGHTS = ("20-accounts.yaml", "30-operator-rights.yaml")


@dataclass
class Two:
    """Both clusters, and how to get into the mesh of the eastern one."""

    east: Cluster
    west: Cluster
    admin: Path
    directory: Path

    async def invite(self) -> Path:
        """A file with a fresh join string for one cluster."""
        said = await scopectl("token", "create", "--mesh", "home", "--single-use", admin=self.admin)
        (line,) = [word.strip("'") for word in said.split() if word.strip("'").startswith("https://")]
        file = self.directory / "join-string"
        file.write_text(line + "\n")
        return file

    async def join(self, file: Path, *, name: str = "west") -> Replica:
        """The western operator, with no more rights than the manifests give it."""
        token = await self.west.plane.token("scope-operator", namespace=NAMESPACE)
        return await self.west.operator(
            f"--cluster-name={name}",
            f"--kubeconfig={self.west.plane.kubeconfig(token=token)}",
            f"--join-string-file={file}",
        )

    async def agent(self, node: str, *, of: Cluster | None = None) -> HttpRegistry:
        """An agent that shows the token of a Node, of the west unless it says otherwise, as the west's."""
        plane = (of or self.west).plane
        token = await plane.token("scope-agent", namespace=NAMESPACE, node=node, audience="scope-gateway")
        file = self.directory / f"token-{time.monotonic_ns()}"
        file.write_text(token)
        join = JoinString.parse((self.directory / "join-string").read_text())
        return HttpRegistry(join.url, pin=join.pin, credential=ProjectedToken("home", "west", str(file)))

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
            await body(Two(east, west, admin, directory))

    asyncio.run(run())


def test_the_nodes_of_both_clusters_are_peers_of_one_mesh(
    own_control_plane: Callable[..., ControlPlane], tmp_path: Path
) -> None:
    async def body(two: Two) -> None:
        await two.east.plane.create_node("n1")
        uids = {name: await two.west.plane.create_node(name) for name in ("n1", "n2")}
        file = await two.invite()
        first = await two.join(file)
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

        # The token is used up and its file is gone: the key that joined is enough from now on.
        first.process.terminate()
        assert await first.ended() == 0
        file.unlink()
        second = await two.join(file)
        await two.west.plane.create_node("n3")
        await two.east.addressed("home.east.n1", "home.west.n1", "home.west.n3")
        assert "cluster.joined" not in second.text

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
