"""What is done on the clusters and checked, in order. Each step tells its time, and a failed one raises."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

from kubelab import KubeLabError
from kubelab.programs import ROOT

from e2e.cluster import GATEWAY_PORT, NAMESPACE, REFLECTOR_PORTS, Cluster, Waiting, is_ready
from e2e.nodes import holdings

MESH = "home"
_CHART = ROOT / "charts" / "scope"


class Story:
    """The steps of one run."""

    def __init__(self, cluster: Cluster, *, work: Path) -> None:
        self._cluster = cluster
        self._work = work
        self._began = time.monotonic()
        self._before: dict[str, list[str]] = {}

    async def perform(self) -> None:
        """Everything, from clusters that do not run yet to Nodes that are clean again."""
        await self._boot()
        await self._install()
        await self._apply_mesh()
        await self._ping()
        await self._uninstall()

    async def _boot(self) -> None:
        cluster = self._cluster
        with self._step("start the cluster"):
            await cluster.start()
        for line in (await cluster.kubectl("get", "nodes", "-o", "wide")).splitlines():
            self._tell(line)
        self._before = self._holdings()

    async def _install(self) -> None:
        cluster = self._cluster
        with self._step("package the chart and install it"):
            await cluster.helm("package", str(_CHART), "--destination", str(self._work))
            (package,) = self._work.glob("scope-*.tgz")
            await cluster.kubectl("create", "namespace", NAMESPACE)
            await cluster.kubectl(
                "label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=privileged"
            )
            await cluster.helm("install", "scope", str(package), values=_values(cluster))
        with self._step("operator, agents and user-space WireGuard run in their pods"):
            await self._running("scope-operator", 2)
            await self._running("scope-wireguard", len(cluster.nodes))
            await self._running("scope-agent", len(cluster.nodes))

    async def _apply_mesh(self) -> None:
        cluster = self._cluster
        began = time.monotonic()
        with self._step("apply one ScopeMesh: every Node is a peer, and Ready"):
            await cluster.kubectl("apply", "-f", "-", document=json.dumps(_mesh(cluster)))
            waiting = Waiting()
            while True:
                ready = [peer for peer in await cluster.peers() if is_ready(peer)]
                if len(ready) == len(cluster.nodes):
                    break
                await waiting.pause(f"{len(cluster.nodes)} ScopePeers Ready; there are {len(ready)}")
        self._tell(f"{len(cluster.nodes)} peers Ready {time.monotonic() - began:.1f} s after the ScopeMesh")

    async def _ping(self) -> None:
        cluster = self._cluster
        addresses = {
            str(peer["spec"]["nodeName"]): [each.split("/")[0] for each in peer["status"]["addresses"]]
            for peer in await cluster.peers()
        }
        with self._step("each Node pings each other one through the mesh, IPv4 and IPv6"):
            for source, target in permutations(addresses, 2):
                for address in addresses[target]:
                    waiting = Waiting()
                    while (done := await cluster.ping(source, address)).returncode != 0:
                        await waiting.pause(f"{source} pings {target} at {address}: {done.stdout}")
        for line in (await cluster.kubectl("get", "smesh,speer")).splitlines():
            self._tell(line)

    async def _uninstall(self) -> None:
        cluster = self._cluster
        with self._step("delete the mesh, and uninstall: Nodes are as before"):
            await cluster.kubectl("delete", "smesh", "--all")
            waiting = Waiting()
            while left := self._left():
                await waiting.pause(f"Nodes are clean; there is still {left}")
            await cluster.helm("uninstall", "scope", "--wait", "--timeout=3m")
            waiting = Waiting()
            while pods := await self._pods_left():
                await waiting.pause(f"pods of Scope are gone; there is still {pods}")
        if left := self._left():
            raise KubeLabError(f"Nodes still hold {left}")

    async def _running(self, app: str, count: int) -> None:
        waiting = Waiting()
        while True:
            pods = await self._cluster.pods(app)
            ready = [pod for pod in pods if is_ready(pod)]
            if len(ready) == len(pods) == count:
                return
            await waiting.pause(f"{count} pods {app} Ready; {len(ready)} of {len(pods)} are: {_waits(pods)}")

    async def _pods_left(self) -> list[str]:
        apps = ("scope-operator", "scope-wireguard", "scope-agent")
        return [pod["metadata"]["name"] for app in apps for pod in await self._cluster.pods(app)]

    def _holdings(self) -> dict[str, list[str]]:
        return {node.name: holdings(node.host, node.disk) for node in self._cluster.nodes.values()}

    def _left(self) -> dict[str, list[str]]:
        """What each Node has now and had not before, and what it had."""
        changes: dict[str, list[str]] = {}
        for name, now in self._holdings().items():
            before = self._before[name]
            more = [f"+ {line}" for line in now if line not in before]
            less = [f"- {line}" for line in before if line not in now]
            if more or less:
                changes[name] = more + less
        return changes

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        self._tell(f"==> {what}")
        began = time.monotonic()
        try:
            yield
        except BaseException:
            self._tell(f"FAILED after {time.monotonic() - began:.1f} s: {what}")
            raise
        self._tell(f"    done in {time.monotonic() - began:.1f} s")

    def _tell(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {line}", flush=True)


def _values(cluster: Cluster) -> dict[str, object]:
    """What a user says to the chart where the kernel lacks WireGuard and one Node is on the internet."""
    gateway, (first, second) = GATEWAY_PORT, REFLECTOR_PORTS
    return {
        "clusterName": cluster.name,
        "operator": {"nodeSelector": {"kubernetes.io/hostname": cluster.server.name}},
        "gateway": {
            "advertise": [f"{cluster.server.ipv4}:{gateway}"],
            "service": {
                "type": "NodePort",
                "nodePorts": {"gateway": gateway, "reflector1": first, "reflector2": second},
            },
        },
        "agent": {"tun": True},
        "wireguard": {"enabled": True},
    }


def _mesh(cluster: Cluster) -> dict[str, object]:
    return {
        "apiVersion": "scope.ltgc.cc/v1alpha1",
        "kind": "ScopeMesh",
        "metadata": {"name": MESH},
        "spec": {
            "addressing": {"ipv4": "100.80.0.0/16", "ipv6": "fd5c:be1:7a30::/64"},
            "hubs": {"names": [f"{MESH}.{cluster.name}.{cluster.server.name}"]},
        },
    }


def _waits(pods: list[dict[str, Any]]) -> str:
    """Why pods are not ready, in their kubelets' words."""
    said = []
    for pod in pods:
        for status in pod.get("status", {}).get("containerStatuses", []):
            why = status.get("state", {}).get("waiting")
            if why is not None:
                said.append(
                    f"{pod['metadata']['name']}: {why.get('reason')} {why.get('message', '')}".strip()
                )
    return "; ".join(said) or "their kubelets do not say why"
