"""Hubs on a real API server: who is one, why, and that it is written once."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from kubelab import MERGE, ControlPlane

from scope.model import Candidate, CandidateKind, Endpoint, Kind, Link, Mapping, PathKind, PeerReport
from scope.registry.kube.access import from_kubeconfig
from scope.registry.kube.client import KubeClient
from scope.registry.kube.registry import KubeRegistry
from tests.kube.operator_fixture import MESHES, NAMESPACE, PEERS, Cluster, eventually, mesh, run
from tests.unit.registry_conformance import keys


async def hubs_are(east: Cluster, *names: str) -> None:
    """Wait until these peers are the hubs, and no others."""

    async def so() -> bool:
        peers = await east.peers()
        return {name for name, peer in peers.items() if peer.get("status", {}).get("role") == "Hub"} == set(
            names
        )

    await eventually(so)


async def told(east: Cluster) -> dict[str, tuple[bool, str]]:
    made = await east.plane.request("GET", f"{MESHES}/home")
    return {each["peer"]: (each["chosen"], each["reason"]) for each in made["status"].get("hubs", ())}


def test_a_label_a_name_or_the_peers_own_spec_makes_a_hub(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        for number in range(4):
            await east.plane.create_node(f"n{number}", labels={"hub": "yes"} if number == 0 else {})
        chosen = {"names": ["home.east.n1", "home.east.gone"], "selector": {"matchLabels": {"hub": "yes"}}}
        await east.plane.apply(mesh(hubs=chosen))
        await east.operator()
        await east.addressed(*(f"home.east.n{number}" for number in range(4)))
        await hubs_are(east, "home.east.n0", "home.east.n1")
        for name, role in (("home.east.n2", "Hub"), ("home.east.n1", "Edge")):
            await east.plane.request("PATCH", f"{PEERS}/{name}", {"spec": {"role": role}}, content_type=MERGE)
        await hubs_are(east, "home.east.n0", "home.east.n2")
        condition = await east.condition("home", "HubsAvailable", status="False", reason="AllOffline")
        assert "start scope-agent there" in condition["message"]

        async def said() -> bool:
            return await told(east) == {
                "home.east.n0": (True, "its Node is selected by spec.hubs; offline"),
                "home.east.n2": (True, "its spec says Hub; offline"),
                "home.east.gone": (False, "named in spec.hubs, but the mesh has no such ScopePeer"),
                "home.east.n1": (False, "named in spec.hubs, but its spec says Edge"),
            }

        await eventually(said)
        labels: dict[str, Any] = {"metadata": {"labels": {"hub": None}}}
        await east.plane.request("PATCH", "/api/v1/nodes/n0", labels, content_type=MERGE)
        await hubs_are(east, "home.east.n2")

    run(control_plane, body)


def test_a_chosen_hub_is_written_once_however_latencies_wobble(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        names = [f"home.east.n{number}" for number in range(3)]
        for number in range(3):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh(hubs={"mode": "Auto"}))
        await east.operator(user="op-1")
        peers = await east.addressed(*names)
        await east.condition("home", "HubsAvailable", status="False", reason="NobodyReachable")
        async with KubeClient(await from_kubeconfig(east.plane.kubeconfig())) as client:
            registry = KubeRegistry(client, namespace=NAMESPACE)

            async def report(number: int, latency: float) -> None:
                mapping = Mapping.ENDPOINT_DEPENDENT if number == 2 else Mapping.NONE
                host = Candidate(Endpoint.parse(f"192.0.2.{number + 1}:51820"), CandidateKind.HOST)
                links = tuple(
                    Link(name, PathKind.DIRECT, latency=latency) for name in names if name != names[number]
                )
                part = PeerReport(keys(number), (host,), mapping, links=links)
                uid = peers[names[number]]["metadata"]["uid"]
                await registry.update_status(Kind.PEER, names[number], part, uid=uid)

            for number in range(3):
                await report(number, 0.020)
            await east.condition("home", "HubsAvailable", status="True")
            (hub,) = [name for name, (is_hub, _) in (await told(east)).items() if is_hub]
            assert hub in names[:2]
            await hubs_are(east, hub)
            await asyncio.sleep(6.0)  # the mesh's counts are written within five seconds
            began = datetime.now(UTC)
            mark = east.plane.audit.mark()
            for latency in (0.024, 0.017, 0.021):
                for number in range(3):
                    await report(number, latency)
                await asyncio.sleep(6.0)
        logged = [each for each in east.plane.audit.since(mark) if datetime.fromisoformat(each.at) > began]
        ours = [each for each in logged if ":op-" in each.user and each.is_write]
        assert [each for each in ours if each.resource != "leases"] == []
        assert ours  # the leader renews: the log is being read
        await hubs_are(east, hub)

    run(control_plane, body)


def test_a_tree_without_hubs_says_what_to_do_until_it_has_one(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n0")
        await east.plane.apply(mesh(topology="Tree"))
        await east.operator()
        peers = await east.addressed("home.east.n0")
        condition = await east.condition("home", "HubsAvailable", status="False", reason="TreeWithoutHubs")
        assert "name some in spec.hubs.names" in condition["message"]
        hubs = {"spec": {"hubs": {"names": ["home.east.n0"]}}}
        await east.plane.request("PATCH", f"{MESHES}/home", hubs, content_type=MERGE)
        await east.condition("home", "HubsAvailable", status="False", reason="AllOffline")
        async with KubeClient(await from_kubeconfig(east.plane.kubeconfig())) as client:
            registry = KubeRegistry(client, namespace=NAMESPACE)
            uid = peers["home.east.n0"]["metadata"]["uid"]
            part = PeerReport(keys(0), mapping=Mapping.NONE)
            await registry.update_status(Kind.PEER, "home.east.n0", part, uid=uid)
            condition = await east.condition("home", "HubsAvailable", status="True")
            assert condition["message"] == "routed by home.east.n0"
            edge = PeerReport(keys(0), mapping=Mapping.NONE, hub="home.east.n0")
            await registry.update_status(Kind.PEER, "home.east.n0", edge, uid=uid)
        stored = await east.plane.request("GET", f"{PEERS}/home.east.n0")
        assert stored["status"]["hub"] == "home.east.n0"

    run(control_plane, body)
