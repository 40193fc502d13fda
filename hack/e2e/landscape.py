"""The clusters of the lab: real ones, in network namespaces, and what may be done to their machines.

Two: `west`, with the control plane on a machine of the internet, which is a Node too and the hub, and two
Nodes each behind a NAT of its own; and `east`, all of which is behind one NAT.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kubelab import ControlPlane, KubeNode
from lab import Host, Lab, Machine, Nat, Server

from e2e.cluster import Cluster
from e2e.dns import dns

# Of pods and, after the comma, of their IPv6: a prefix of each Node's is taken from them.
_PODS = {"west": "10.244.0.0/16,fd00:244::/56", "east": "10.245.0.0/16,fd00:245::/56"}
# The interface of a machine in a site.
UPLINK = "eth0"


class LabCluster(Cluster):
    """A cluster of the lab: its control plane runs on the first of `hosts`, and all of them are its Nodes.

    `pods` is what its Nodes' prefixes are taken from, `disks` where they keep their files, `images` what they
    run.
    """

    def __init__(
        self,
        name: str,
        *,
        pods: str,
        hosts: Sequence[Server | Machine],
        disks: Path,
        images: Path,
        kept: bool,
    ) -> None:
        self.server = hosts[0]
        self.plane = ControlPlane(host=self.server, kubelets=True, kept=True, pods=pods)
        super().__init__(
            name, kubeconfig=self.plane.kubeconfig(), home=self.plane.directory, run=self.server.run
        )
        self._disks, self._images, self._kept = disks, images, kept
        self.nodes = {host.name: self._node(host) for host in hosts}

    async def start(self) -> None:
        """Start the control plane, then every Node at once; all are Ready when this returns."""
        await self.plane.start()
        starting = [asyncio.create_task(node.start()) for node in self.nodes.values()]
        try:
            await asyncio.gather(*starting)
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)

    async def add(self, host: Machine) -> KubeNode:
        """Make one more machine a Node, which is Ready when this returns."""
        node = self.nodes[host.name] = self._node(host)
        await node.start()
        return node

    def power_off(self) -> None:
        """End every Node, and what runs in it."""
        for node in self.nodes.values():
            node.power_off()

    def remove(self) -> None:
        """Take away what it left on this machine; its Nodes are off."""
        self.plane.close()
        for node in self.nodes.values():
            node.remove()

    async def ping(self, source: str, address: str) -> subprocess.CompletedProcess[str]:
        """Ping from a Node, with its host network."""
        argv = ["ping", "-n", "-c", "1", "-W", "2", address]
        return await asyncio.to_thread(self.nodes[source].host.run, argv, check=False, timeout=30.0)

    def _node(self, host: Host) -> KubeNode:
        return KubeNode(
            host.name,
            host=host,
            plane=self.plane,
            disk=self._disks / host.name,
            images=self._images,
            kept=self._kept,
        )


class Landscape:
    """Both clusters, and the sites that their machines are in."""

    def __init__(self, lab: Lab, *, disks: Path, images: Path, kept: bool) -> None:
        self.lab = lab
        home = lab.site("home", nat=Nat.PORT_RESTRICTED)
        office = lab.site("office", nat=Nat.SYMMETRIC)
        branch = lab.site("branch", nat=Nat.PORT_RESTRICTED)
        self.west = LabCluster(
            "west",
            pods=_PODS["west"],
            hosts=[lab.server("west-1"), home.machine("west-2"), office.machine("west-3")],
            disks=disks,
            images=images,
            kept=kept,
        )
        self.east = LabCluster(
            "east",
            pods=_PODS["east"],
            hosts=[branch.machine("east-1"), branch.machine("east-2")],
            disks=disks,
            images=images,
            kept=kept,
        )
        self.clusters = [self.west, self.east]

    async def start(self) -> None:
        """Start both; all Nodes are Ready when this returns."""
        await asyncio.gather(*(cluster.start() for cluster in self.clusters))

    async def answer_names(self) -> None:
        """Give both a DNS."""
        await asyncio.gather(*(cluster.apply(*dns()) for cluster in self.clusters))

    def nodes(self) -> list[KubeNode]:
        """Every Node of both."""
        return [node for cluster in self.clusters for node in cluster.nodes.values()]

    def power_off(self) -> None:
        for cluster in self.clusters:
            cluster.power_off()

    def remove(self) -> None:
        for cluster in self.clusters:
            cluster.remove()
