"""What is done on the clusters and checked, in order: install, join, traffic, uninstall.

Each step tells its time, and a failed one raises. What takes the machines themselves, and not only a
kubeconfig, is in `machines.py`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from kubelab import KubeLabError
from kubelab.programs import ROOT

from e2e.cluster import GATEWAY_PORT, NAMESPACE, REFLECTOR_PORTS, Cluster, Teller, Waiting, is_ready
from e2e.traffic import ANSWER, PROTOCOLS, Answering, Traffic
from e2e.traffic import NAMESPACE as TRAFFIC

MESH = "home"
SIZES = (1, 1400, 1 << 16, 10_000_000)
# What is said to the chart in every cluster: Nodes may lack WireGuard in their kernel, and leave at the end.
_VALUES: dict[str, object] = {
    "agent": {"tun": True},
    "wireguard": {"enabled": True},
    "cleanup": {"onUninstall": True},
    "services": {"export": True},
}
# Of the datagrams of a gigabyte, in bytes a second: 80 Mbit/s.
_MUCH, _MUCH_RATE = 1_000_000_000, 10_000_000.0
_CHART = ROOT / "charts" / "scope"
_SCOPECTL = ROOT / ".venv" / "bin" / "scopectl"


class Story:
    """The steps of one run. The first of `clusters` has the registry, on its Node `hub`, the others join it.

    `public` is the address by which that Node is reached from everywhere. `work` is a folder for what is made
    on the way.
    """

    def __init__(
        self,
        clusters: Sequence[Cluster],
        *,
        hub: str,
        public: str,
        work: Path,
        image: str,
        teller: Teller,
    ) -> None:
        self.clusters = list(clusters)
        self.registry = clusters[0]
        self.traffic = {cluster.name: Traffic(cluster, image=image) for cluster in clusters}
        self._hub = hub
        self._public = public
        self._work = work
        self._teller = teller
        self._nodes: dict[str, list[str]] = {}
        self._joined = [self.registry]

    async def start_answering(self) -> None:
        """A pod on every Node that answers."""
        await self.refresh()
        with self._teller.step("a pod on every Node answers"):
            await asyncio.gather(*(traffic.start() for traffic in self.traffic.values()))
            await asyncio.gather(*(self.answering(name) for name in self.traffic))

    async def install(self) -> None:
        """The chart in every cluster, one ScopeMesh, and a cluster after the other that joins it."""
        with self._teller.step(f"package the chart and install it in {self.registry.name}"):
            await self.registry.helm("package", str(_CHART), "--destination", str(self._work))
            await self._install_chart(self.registry, self._gateway_values())
        with self._teller.step("operator, agents and user-space WireGuard run in their pods"):
            await self._await_workloads(self.registry)
        began = time.monotonic()
        with self._teller.step("apply one ScopeMesh: every Node is a peer, and Ready"):
            await self.registry.apply(self._mesh())
            await self.await_peers()
        count = len(self._nodes[self.registry.name])
        self._teller.tell(f"{count} peers Ready {time.monotonic() - began:.1f} s after the ScopeMesh")
        for cluster in self.clusters[1:]:
            await self._join(cluster)
        for line in (await self.registry.kubectl("get", "smesh,speer")).splitlines():
            self._teller.tell(line)

    async def await_peers(self) -> None:
        """Return when the Nodes of the clusters that have joined, and nobody else, are peers, and Ready."""
        waiting = Waiting()
        while True:
            peers = await self.registry.get("scopepeers")
            expected = {
                f"{MESH}.{cluster.name}.{node}"
                for cluster in self._joined
                for node in self._nodes[cluster.name]
            }
            ready = {peer["metadata"]["name"] for peer in peers if is_ready(peer)}
            if ready == expected and len(peers) == len(expected):
                return
            why = {
                peer["metadata"]["name"]: [
                    each.get("reason") for each in peer.get("status", {}).get("conditions", [])
                ]
                for peer in peers
                if not is_ready(peer)
            }
            await waiting.pause(f"Ready: {sorted(expected)}; of {len(peers)} are not: {why}")

    async def refresh(self) -> None:
        """Look anew which Nodes the clusters have."""
        for cluster in self.clusters:
            self._nodes[cluster.name] = await cluster.node_names()

    async def answering(self, name: str) -> list[Answering]:
        """The pods of a cluster that answer, one on every Node."""
        return await self.traffic[name].answering(len(self._nodes[name]))

    async def call(
        self,
        name: str,
        node: str,
        targets: Sequence[str],
        *,
        sizes: Sequence[int],
        host: bool = False,
        protocols: Sequence[str] = PROTOCOLS,
        rate: float | None = None,
    ) -> None:
        """A pod of a Node, or its host network, calls them all, and is seen by its own address."""
        what = "host" if host else "pod"
        found = await self.traffic[name].call(
            f"{what}-{node}",
            node=node,
            targets=targets,
            sizes=sizes,
            host=host,
            protocols=protocols,
            rate=rate,
        )
        expected = len(targets) * len(sizes) * len(protocols)
        if found["done"] != expected:
            raise KubeLabError(f"{what} of {node}: {found['done']} of {expected} calls were answered")
        if changed := [pair for pair in found["seen"] if len(set(pair.split("="))) != 1]:
            raise KubeLabError(f"{what} of {node}: calls from one address were seen from another: {changed}")
        rates = " and ".join(f"{rate:g} Mbit/s by {name}" for name, rate in found["mbits"].items())
        again = f", {found['again']} datagrams sent again" if found["again"] else ""
        self._teller.tell(f"    {what} of {node}: {found['done']} calls; the slowest {rates}{again}")

    async def call_pods(self) -> None:
        """Pods of each cluster call those of the others, and so do Nodes; nobody's address is changed."""
        answering = {name: await self.answering(name) for name in self.traffic}
        sizes = f"{len(SIZES)} sizes up to {max(SIZES) // 1_000_000} MB"
        for source, target in permutations(self.traffic, 2):
            addresses = [address for pod in answering[target] for address in pod.addresses]
            nodes = [pod.node for pod in answering[source]]
            with self._teller.step(
                f"pods of {source} to those of {target}: IPv4, IPv6, TCP, UDP, {sizes}, addresses kept"
            ):
                await asyncio.gather(*(self.call(source, node, addresses, sizes=SIZES) for node in nodes))
            name = f"{ANSWER}-{target}.{TRAFFIC}.svc.cluster.local"
            with self._teller.step(f"pods of {source} to {name}: the same, by name"):
                await self.traffic[source].await_service(f"{ANSWER}-{target}", len(answering[target]))
                names = [f"{name}/4", f"{name}/6"]
                await asyncio.gather(*(self.call(source, node, names, sizes=SIZES) for node in nodes))
            with self._teller.step(f"a Node of {source} to pods of {target}: the same"):
                await self.call(source, nodes[-1], addresses, sizes=SIZES, host=True)

    async def call_much(self) -> None:
        """A gigabyte by TCP, and one by UDP at a rate that two cores keep up with."""
        source, target = self.clusters[-1].name, self.registry.name
        (here, *_), there = await self.answering(source), (await self.answering(target))[-1]
        for protocol in PROTOCOLS:
            with self._teller.step(f"a pod of {source} sends 1 GB to one of {target} by {protocol.upper()}"):
                await self.call(
                    source,
                    here.node,
                    there.addresses[:1],
                    sizes=[_MUCH],
                    protocols=[protocol],
                    rate=_MUCH_RATE,
                )

    async def uninstall(self) -> None:
        """Uninstall the releases, that with the registry last; each has its Nodes leave before."""
        with self._teller.step("uninstall everywhere; Nodes leave their mesh before"):
            for cluster in reversed(self.clusters):
                await cluster.kubectl("delete", "namespace", TRAFFIC, "--ignore-not-found", "--wait=false")
                await cluster.helm("uninstall", "scope", "--wait", "--timeout=5m")
                waiting = Waiting()
                apps = ("scope-operator", "scope-wireguard", "scope-agent")
                while left := [pod["metadata"]["name"] for app in apps for pod in await cluster.pods(app)]:
                    await waiting.pause(f"pods of Scope are gone; there is still {left}")

    async def _join(self, cluster: Cluster) -> None:
        began = time.monotonic()
        with self._teller.step(f"{cluster.name} joins with a join string: its Nodes are peers, and Ready"):
            invitation = await self._invitation()
            await self._install_chart(
                cluster,
                {
                    "clusterName": cluster.name,
                    "registry": {"url": f"https://{self._public}:{GATEWAY_PORT}"},
                    **_VALUES,
                },
                invitation=invitation,
            )
            await self._await_workloads(cluster)
            self._joined.append(cluster)
            await self.await_peers()
        self._teller.tell(
            f"{cluster.name} is in the mesh {time.monotonic() - began:.1f} s after its join string"
        )

    async def _invitation(self) -> str:
        """A join string, as an administrator makes it."""
        secret = json.loads(
            await self.registry.kubectl(
                "get", "secret", "scope-gateway", f"--namespace={NAMESPACE}", "-o", "json"
            )
        )
        admin = self._work / "admin.json"
        admin.touch(mode=0o600)
        admin.write_bytes(base64.b64decode(secret["data"]["admin.json"]))
        said = await self.registry.run(
            str(_SCOPECTL), "token", "create", "--mesh", MESH, "--single-use", "--admin-file", str(admin)
        )
        (line,) = [word.strip("'") for word in said.split() if word.strip("'").startswith("https://")]
        return line

    async def _install_chart(
        self, cluster: Cluster, values: dict[str, object], *, invitation: str | None = None
    ) -> None:
        (package,) = self._work.glob("scope-*.tgz")
        labels = {"pod-security.kubernetes.io/enforce": "privileged"}
        namespace = {"name": NAMESPACE, "labels": labels}
        await cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": namespace})
        if invitation is not None:
            await cluster.apply(
                {
                    "apiVersion": "v1",
                    "kind": "Secret",
                    "metadata": {"name": "scope-join", "namespace": NAMESPACE},
                    "stringData": {"join-string": f"{invitation}\n"},
                }
            )
        await cluster.helm("install", "scope", str(package), values=values)

    async def _await_workloads(self, cluster: Cluster) -> None:
        await cluster.await_pods("scope-operator", 2)
        for app in ("scope-wireguard", "scope-agent"):
            await cluster.await_pods(app, len(self._nodes[cluster.name]))

    def _gateway_values(self) -> dict[str, object]:
        """What a user says to the chart where the kernel lacks WireGuard and one Node is on the internet."""
        first, second = REFLECTOR_PORTS
        return {
            "clusterName": self.registry.name,
            "operator": {"nodeSelector": {"kubernetes.io/hostname": self._hub}},
            "gateway": {
                "advertise": [f"{self._public}:{GATEWAY_PORT}"],
                "service": {
                    "type": "NodePort",
                    "nodePorts": {"gateway": GATEWAY_PORT, "reflector1": first, "reflector2": second},
                },
            },
            **_VALUES,
        }

    def _mesh(self) -> dict[str, Any]:
        return {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopeMesh",
            "metadata": {"name": MESH},
            "spec": {
                "addressing": {"ipv4": "100.80.0.0/16", "ipv6": "fd5c:be1:7a30::/64"},
                "hubs": {"names": [f"{MESH}.{self.registry.name}.{self._hub}"]},
                "podNetworking": "CrossCluster",
            },
        }
