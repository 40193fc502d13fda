"""The operator through outages of the API server and a restored etcd: it converges, and deletes nobody."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from kubelab import MERGE, ControlPlane

from tests.kube.operator_fixture import Cluster, addresses, mesh, run

NODES = tuple(f"n{number}" for number in range(5))
PEERS = tuple(f"home.east.{name}" for name in NODES)
LATE = "home.east.late"


@asynccontextmanager
async def kept(east: Cluster) -> AsyncIterator[None]:
    """Five Nodes as peers of two replicas; at the end they are who they were, and a replica runs."""
    for name in NODES:
        await east.plane.create_node(name)
    await east.plane.apply(mesh())
    replicas = [await east.operator() for _ in range(2)]
    before = await east.addressed(*PEERS)
    yield
    after = await east.peers()
    assert all(after[name]["metadata"]["uid"] == before[name]["metadata"]["uid"] for name in PEERS)
    assert all(addresses(after[name]) == addresses(before[name]) for name in PEERS)
    assert any(replica.process.returncode is None for replica in replicas)
    assert "Traceback" not in "".join(replica.text for replica in replicas)


def test_an_api_server_that_restarts_costs_no_peer_and_little_time(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    async def body(east: Cluster) -> None:
        async with kept(east):
            east.plane.api_server.kill()
            await east.plane.api_server.start()
            began = time.monotonic()
            await east.plane.create_node("late")
            await east.addressed(*PEERS, LATE)
            print(f"in step {time.monotonic() - began:.1f} s after the API server's return")  # noqa: T201

    run(own_control_plane(), body)


def test_a_restored_etcd_is_noticed_and_every_peer_keeps_its_address(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    async def body(east: Cluster) -> None:
        async with kept(east):
            snapshot = await east.plane.snapshot()
            await east.plane.create_node("late")
            held = addresses((await east.addressed(*PEERS, LATE))[LATE])
            for number in range(30):  # the history that is lost
                labels = {"metadata": {"labels": {"number": str(number)}}}
                await east.plane.request("PATCH", "/api/v1/nodes/n0", labels, content_type=MERGE)
            east.plane.api_server.kill()  # with watches open it would take its time to end
            await east.plane.restore(snapshot)
            await east.plane.start()
            began = time.monotonic()
            await east.plane.create_node("late")  # its kubelet registers it anew
            after = await east.addressed(*PEERS, LATE)
            print(f"in step {time.monotonic() - began:.1f} s after the restore")  # noqa: T201
            assert addresses(after[LATE]) == held
            # From here on it hears of what happens, and not from lists alone.
            began = time.monotonic()
            await east.plane.create_node("later")
            await east.addressed(*PEERS, LATE, "home.east.later")
            print(f"heard of a Node within {time.monotonic() - began:.1f} s")  # noqa: T201

    run(own_control_plane(), body)
