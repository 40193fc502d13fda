"""The operator against a real API server: Nodes become peers, each with an address, nothing else moves."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kubelab import MERGE, ControlPlane

from scope.model import Kind
from scope.registry.kube.access import from_kubeconfig
from scope.registry.kube.client import KubeClient
from scope.registry.kube.leases import Leases
from scope.registry.kube.objects import peer_lease
from scope.registry.kube.registry import KubeRegistry
from tests.kube.operator_fixture import (
    MESHES,
    NAMESPACE,
    PEERS,
    Cluster,
    addresses,
    eventually,
    mesh,
    run,
)
from tests.unit.registry_conformance import report

ALTERED = str(Path(__file__).with_name("altered_operator.py"))


def test_one_node_and_one_mesh_become_one_peer_with_one_address(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        uid = await east.plane.create_node("n1")
        replica = await east.operator()
        await east.plane.apply(mesh())
        peer = (await east.addressed("home.east.n1"))["home.east.n1"]
        spec = {"mesh": "home", "role": "Auto", "cluster": "east", "nodeName": "n1", "nodeUID": uid}
        assert peer["spec"] == spec
        assert len(addresses(peer)) == 1
        (owner,) = peer["metadata"]["ownerReferences"]

        async def named() -> dict[str, Any] | None:
            made = await east.plane.request("GET", f"{MESHES}/home")
            return made if made.get("status", {}).get("clusters") else None

        made = await eventually(named)
        assert (owner["kind"], owner["uid"]) == ("ScopeMesh", made["metadata"]["uid"])
        identity = (await east.plane.request("GET", "/api/v1/namespaces/kube-system"))["metadata"]["uid"]
        assert made["status"]["clusters"] == [{"name": "east", "uid": identity}]
        assert (await replica.page("/readyz"))[0] == 200
        assert (await replica.page("/healthz"))[0] == 200
        _, metrics = await replica.page("/metrics")
        assert "scope_operator_leader 1.0" in metrics
        assert 'scope_operator_writes_total{kind="create_peer",result="ok"} 1.0' in metrics
        (event,) = await east.events("PeerAdded")
        assert event["regarding"]["name"] == "home"
        assert "home.east.n1" in event["note"]

    run(control_plane, body)


def test_prefixes_of_pods_follow_their_nodes_and_move_when_they_are_issued_anew(
    control_plane: ControlPlane,
) -> None:
    async def body(east: Cluster) -> None:
        prefixes = ["10.244.1.0/24", "fd00:10:244:1::/64"]
        await east.plane.create_node("n1", pods=prefixes)
        await east.operator()
        await east.plane.apply(mesh(podNetworking="CrossCluster"))

        async def offered(node: str) -> bool | None:
            peers = await east.peers()
            wanted = [{"prefix": prefix, "source": "Node"} for prefix in prefixes]
            of = {name: each["spec"].get("podPrefixes") for name, each in peers.items()}
            return of == {f"home.east.{node}": wanted} or None

        await eventually(lambda: offered("n1"))
        await east.plane.request("DELETE", "/api/v1/nodes/n1")
        await east.plane.create_node("n2", pods=prefixes)
        await eventually(lambda: offered("n2"))

    run(control_plane, body)


def test_a_node_that_leaves_takes_its_peer_and_no_other_is_touched(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        for number in range(4):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh())
        await east.operator()
        before = await east.addressed(*(f"home.east.n{number}" for number in range(4)))
        await east.plane.request("DELETE", "/api/v1/nodes/n2")
        after = await east.addressed("home.east.n0", "home.east.n1", "home.east.n3")
        assert all(after[name] == before[name] for name in after)
        (event,) = await east.events("PeerRemoved")
        assert "home.east.n2" in event["note"]

    run(control_plane, body)


def test_a_node_made_anew_is_a_new_peer(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        await east.plane.apply(mesh())
        await east.operator()
        before = (await east.addressed("home.east.n1"))["home.east.n1"]
        await east.plane.request("DELETE", "/api/v1/nodes/n1")
        uid = await east.plane.create_node("n1")

        async def anew() -> bool:
            peer = (await east.peers()).get("home.east.n1")
            return peer is not None and peer["spec"]["nodeUID"] == uid and bool(addresses(peer))

        await eventually(anew)
        assert (await east.peers())["home.east.n1"]["metadata"]["uid"] != before["metadata"]["uid"]

    run(control_plane, body)


def test_a_node_that_is_selected_no_more_is_no_peer_any_more(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1", labels={"site": "berlin"})
        await east.plane.create_node("n2", labels={"site": "lima"})
        await east.plane.apply(mesh(nodeSelector={"matchLabels": {"site": "berlin"}}))
        await east.operator()
        await east.addressed("home.east.n1")
        labels = {"metadata": {"labels": {"site": "berlin"}}}
        await east.plane.request("PATCH", "/api/v1/nodes/n2", labels, content_type=MERGE)
        await east.addressed("home.east.n1", "home.east.n2")
        labels = {"metadata": {"labels": {"site": "lima"}}}
        await east.plane.request("PATCH", "/api/v1/nodes/n1", labels, content_type=MERGE)
        await east.addressed("home.east.n2")

    run(control_plane, body)


def test_a_deleted_mesh_takes_its_peers_with_it_and_another_mesh_keeps_its_own(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        await east.plane.apply(mesh(), mesh("work", addressing={"ipv4": "100.65.0.0/16"}))
        await east.operator()
        before = await east.addressed("home.east.n1", "work.east.n1")
        await east.plane.request("DELETE", f"{MESHES}/home")
        after = await east.addressed("work.east.n1")
        assert after["work.east.n1"] == before["work.east.n1"]

    run(own_control_plane(controllers=True), body)


def test_two_meshes_with_one_fixed_port_on_one_node_are_told_apart(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        await east.plane.apply(mesh(listenPort=51820))
        await east.operator()
        await east.addressed("home.east.n1")
        await asyncio.sleep(1.1)  # times of creation are whole seconds: the younger one is to yield
        await east.plane.apply(mesh("work", addressing={"ipv4": "100.65.0.0/16"}, listenPort=51820))
        await east.addressed("home.east.n1", "work.east.n1")
        found = await east.condition("work", "PortConflict", status="True")
        assert "51820 is ScopeMesh home's on n1" in found["message"]
        await east.condition("work", "Ready", status="False", reason="PortTaken")
        await east.condition("home", "Ready", status="True")
        (event,) = await east.events("PortConflict")
        assert (event["regarding"]["name"], event["type"]) == ("work", "Warning")
        await east.plane.apply(mesh("work", addressing={"ipv4": "100.65.0.0/16"}, listenPort=0))
        await east.condition("work", "PortConflict", status="False")
        assert len(await east.events("PortConflictResolved")) == 1

    run(control_plane, body)


def test_a_mesh_that_is_full_says_so_and_widening_it_moves_nobody(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        for number in range(3):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh(addressing={"ipv4": "100.64.0.0/30"}))
        await east.operator()
        await east.condition("home", "AddressesExhausted", status="True")
        await east.events("AddressesExhausted")

        async def given() -> dict[str, tuple[str, ...]] | None:
            peers = await east.peers()
            found = {name: addresses(peer) for name, peer in peers.items() if addresses(peer)}
            return found if len(found) == 2 else None

        before = await eventually(given)
        await east.plane.apply(mesh(addressing={"ipv4": "100.64.0.0/24"}))

        async def widened() -> bool:
            peers = (await east.peers()).values()
            return all(address.endswith("/24") for peer in peers for address in addresses(peer) or ("",))

        await eventually(widened)
        after = await east.addressed(*(f"home.east.n{number}" for number in range(3)))
        for name, had in before.items():
            assert [each.split("/")[0] for each in addresses(after[name])] == [had[0].split("/")[0]]
        await east.condition("home", "AddressesExhausted", status="False")

    run(control_plane, body)


def test_an_address_that_a_person_gives_to_a_second_peer_stays_with_the_first(
    control_plane: ControlPlane,
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        await east.plane.create_node("n2")
        await east.plane.apply(mesh())
        await east.operator()
        before = await east.addressed("home.east.n1", "home.east.n2")
        stolen = {"status": {"addresses": list(addresses(before["home.east.n1"]))}}
        await east.plane.request("PATCH", f"{PEERS}/home.east.n2/status", stolen, content_type=MERGE)
        said = await east.condition("home.east.n2", "AddressConflict", path=PEERS)
        assert "home.east.n1" in said["message"]
        after = await east.addressed("home.east.n1", "home.east.n2")
        assert addresses(after["home.east.n1"]) == addresses(before["home.east.n1"])
        assert addresses(after["home.east.n2"]) != addresses(after["home.east.n1"])
        (event,) = await east.events("AddressConflict")
        assert event["regarding"]["name"] == "home.east.n2"

    run(control_plane, body)


def test_a_peer_made_by_hand_for_another_machine_gets_an_address_and_is_left_alone(
    control_plane: ControlPlane,
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        laptop = {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopePeer",
            "metadata": {"name": "laptop"},
            "spec": {"mesh": "home", "routes": ["192.168.7.0/24"]},
        }
        await east.plane.apply(mesh())
        await east.plane.apply(laptop)
        await east.operator()
        before = await east.addressed("home.east.n1", "laptop")
        await east.plane.request("DELETE", "/api/v1/nodes/n1")
        after = await east.addressed("laptop")
        assert after["laptop"]["spec"] == before["laptop"]["spec"]
        assert addresses(after["laptop"]) == addresses(before["laptop"])

    run(control_plane, body)


def test_a_peer_away_for_longer_than_peer_expiry_goes_and_one_with_a_node_stays(
    control_plane: ControlPlane,
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        await east.plane.apply(mesh(peerExpiry="1h"))
        laptop = {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopePeer",
            "metadata": {"name": "laptop"},
            "spec": {"mesh": "home"},
        }
        await east.plane.apply(laptop)
        replica = await east.operator()
        await east.addressed("home.east.n1", "laptop")
        replica.signal(signal.SIGTERM)
        await replica.ended()
        await east.operator(program=(ALTERED, "ahead", "7200", "--"))
        await east.addressed("home.east.n1")
        (event,) = [each for each in await east.events("PeerRemoved") if "laptop" in each["note"]]
        assert "peerExpiry" in event["note"]

    run(control_plane, body)


def test_at_rest_nothing_is_written_but_leases(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        for number in range(5):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh())
        names = [f"home.east.n{number}" for number in range(5)]
        await east.operator(user="op-1")
        await east.operator(user="op-2")
        await east.addressed(*names)
        await east.condition("home", "Ready", status="True")

        async def told() -> bool:
            made = await east.plane.request("GET", f"{MESHES}/home")
            notes = " ".join(each["note"] for each in await east.events("PeerAdded"))
            return made["status"]["counts"]["peers"] == 5 and all(name in notes for name in names)

        await eventually(told)
        began = datetime.now(UTC)
        mark = east.plane.audit.mark()
        for number in range(5):  # what kubelets do all the time
            status = {"status": {"nodeInfo": {"bootID": f"at rest {number}"}}}
            await east.plane.request("PATCH", f"/api/v1/nodes/n{number}/status", status, content_type=MERGE)
        await asyncio.sleep(12.0)
        # A write is in the log a moment after it is seen: what came in before is no write at rest.
        logged = [each for each in east.plane.audit.since(mark) if datetime.fromisoformat(each.at) > began]
        ours = [each for each in logged if ":op-" in each.user]
        assert [each for each in ours if each.is_write and each.resource != "leases"] == []
        assert [each for each in ours if each.is_write]  # the leader renews: the log is being read

    run(control_plane, body)


@pytest.mark.parametrize(("number", "within"), [(signal.SIGKILL, 15.0), (signal.SIGTERM, 5.0)])
def test_the_second_replica_takes_over_without_a_double_write(
    control_plane: ControlPlane, number: signal.Signals, within: float
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n0")
        await east.plane.apply(mesh())
        first = await east.operator(user="op-1")
        holder = await east.leader()
        second = await east.operator(user="op-2")
        await east.addressed("home.east.n0")

        async def ready() -> bool:
            return (await second.page("/readyz"))[0] == 200

        await eventually(ready)
        mark = east.plane.audit.mark()
        began = datetime.now(UTC)
        first.signal(number)
        names = ["home.east.n0"]
        for each in range(1, 6):  # work that either of them may do
            await east.plane.create_node(f"n{each}")
            names.append(f"home.east.n{each}")

        async def taken() -> bool:
            return await east.leader() not in (holder, "")

        await eventually(taken)
        assert await first.ended() == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        assert "Traceback" not in first.text
        await east.addressed(*names)
        writes = [each for each in east.plane.audit.since(mark) if each.is_write and ":op-" in each.user]
        # By the API server's clock: how long this process took to see it does not count.
        taking = [each.at for each in writes if ":op-2" in each.user and each.resource == "leases"]
        took = (datetime.fromisoformat(taking[0]) - began).total_seconds()
        print(f"taken over after {took:.1f} s")  # noqa: T201 - a figure
        assert took < within
        users = [each.user.rpartition(":")[2] for each in writes if each.resource.startswith("scope")]
        assert users == sorted(users)  # op-2 writes after op-1, and never between
        created = [each.path for each in writes if each.resource == "scopepeers" and each.verb == "create"]
        assert len(created) == 5

    run(control_plane, body)


def test_an_agents_lease_makes_nobody_look_alive_but_its_own_nodes_peers(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        for number in (1, 2):
            await east.plane.create_node(f"n{number}")
        external = {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopePeer",
            "metadata": {"name": "n1"},  # called like a Node
            "spec": {"mesh": "home"},
        }
        await east.plane.apply(mesh())
        await east.plane.apply(external)
        names = ["home.east.n1", "home.east.n2", "n1"]
        await east.operator(program=(ALTERED, "hears", "1", "--"))
        peers = await east.addressed(*names)

        async def online() -> set[str]:
            return {name for name, each in (await east.peers()).items() if each["status"].get("online")}

        async def own_is_online() -> bool:
            return "home.east.n1" in await online()

        async def external_is_online() -> bool:
            return "n1" in await online()

        async with KubeClient(await from_kubeconfig(east.plane.kubeconfig())) as client:
            leases = Leases(client, NAMESPACE)
            for name in reversed(names):  # its own comes last: by then the Lease names all three
                await leases.renew("agent.n1", peer=name, uid=peers[name]["metadata"]["uid"])
            await eventually(own_is_online)
            assert await online() == {"home.east.n1"}
            await leases.renew(peer_lease("n1"), peer="n1", uid=peers["n1"]["metadata"]["uid"])
            await eventually(external_is_online)
            assert await online() == {"home.east.n1", "n1"}

    run(control_plane, body)


def test_a_peer_that_reports_is_online_without_a_list_of_leases(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.create_node("n1")
        await east.plane.apply(mesh())
        await east.operator()
        name = "home.east.n1"
        uid = (await east.addressed(name))[name]["metadata"]["uid"]
        async with KubeClient(await from_kubeconfig(east.plane.kubeconfig())) as client:
            registry = KubeRegistry(client, namespace=NAMESPACE)
            await registry.update_status(Kind.PEER, name, report(1, port=7), uid=uid)
        await east.condition(name, "Ready", path=PEERS, status="True")
        assert (await east.peers())[name]["status"]["online"]

    run(control_plane, body)


@pytest.mark.parametrize("when", [("before", "2"), ("after", "1")])
def test_an_operator_killed_at_any_write_leaves_nothing_that_the_next_does_not_mend(
    control_plane: ControlPlane, when: tuple[str, str]
) -> None:
    async def body(east: Cluster) -> None:
        for number in range(2):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh())
        # Two peers are created and addressed, the mesh is written: five writes at least, one by one. Each
        # replica does one of them, and dies after it or before the next.
        for _ in range(4):
            dying = await east.operator(program=(ALTERED, "dies", *when, "--"))
            assert await dying.ended() == -signal.SIGKILL
            await east.hand_over()
        await east.operator()
        peers = await east.addressed("home.east.n0", "home.east.n1")
        given = [address for peer in peers.values() for address in addresses(peer)]
        assert len(given) == len(set(given)) == 2
        await east.condition("home", "Ready", status="True")

    run(control_plane, body)
