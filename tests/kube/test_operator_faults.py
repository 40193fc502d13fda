"""The operator through outages of the API server and a restored etcd: it converges, and deletes nobody."""

from __future__ import annotations

import time
from collections.abc import Callable

from kubelab import ControlPlane

from tests.kube.operator_fixture import Cluster, addresses, eventually, mesh, run


def test_an_api_server_that_restarts_costs_no_peer_and_little_time(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    async def body(east: Cluster) -> None:
        for number in range(5):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh())
        names = [f"home.east.n{number}" for number in range(5)]
        replicas = [await east.operator() for _ in range(2)]
        before = await east.addressed(*names)
        east.plane.api_server.kill()
        await east.plane.api_server.start()
        began = time.monotonic()
        await east.plane.create_node("late")
        after = await east.addressed(*names, "home.east.late")
        print(f"in step {time.monotonic() - began:.1f} s after the API server's return")  # noqa: T201
        assert all(after[name]["metadata"]["uid"] == before[name]["metadata"]["uid"] for name in names)
        assert all(addresses(after[name]) == addresses(before[name]) for name in names)
        assert any(replica.process.returncode is None for replica in replicas)
        assert "Traceback" not in "".join(replica.text for replica in replicas)

    run(own_control_plane(), body)


def test_a_restored_etcd_is_noticed_and_every_peer_keeps_its_address(
    own_control_plane: Callable[..., ControlPlane],
) -> None:
    async def body(east: Cluster) -> None:
        for number in range(5):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh())
        names = [f"home.east.n{number}" for number in range(5)]
        replicas = [await east.operator() for _ in range(2)]
        before = await east.addressed(*names)
        snapshot = await east.plane.snapshot()
        await east.plane.create_node("late")
        held = addresses((await east.addressed(*names, "home.east.late"))["home.east.late"])
        for number in range(30):  # the history that is lost
            labels = {"metadata": {"labels": {"number": str(number)}}}
            await east.plane.request(
                "PATCH", "/api/v1/nodes/n0", labels, content_type="application/merge-patch+json"
            )
        east.plane.api_server.kill()  # with watches open it would take its time to end
        await east.plane.restore(snapshot)
        await east.plane.start()
        began = time.monotonic()
        await east.plane.create_node("late")  # its kubelet registers it anew

        async def whole() -> bool:
            peers = await east.peers()
            return "home.east.late" in peers and bool(addresses(peers["home.east.late"]))

        await eventually(whole)
        print(f"in step {time.monotonic() - began:.1f} s after the restore")  # noqa: T201
        after = await east.addressed(*names, "home.east.late")
        assert all(after[name]["metadata"]["uid"] == before[name]["metadata"]["uid"] for name in names)
        assert all(addresses(after[name]) == addresses(before[name]) for name in names)
        assert addresses(after["home.east.late"]) == held
        # From here on it hears of what happens, and not from lists alone.
        began = time.monotonic()
        await east.plane.create_node("later")
        await east.addressed(*names, "home.east.late", "home.east.later")
        print(f"heard of a Node within {time.monotonic() - began:.1f} s")  # noqa: T201
        assert any(replica.process.returncode is None for replica in replicas)
        assert "Traceback" not in "".join(replica.text for replica in replicas)

    run(own_control_plane(), body)
