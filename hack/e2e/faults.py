"""What happens to clusters in their life, while datagrams go from every pod to those of the other cluster.

A Node comes, agents are replaced, an API server is away, a Node moves to another network, one is rebooted,
one goes. Where nothing is taken from a stream's own way, not one datagram may be lost.
"""

from __future__ import annotations

import asyncio
import time
from itertools import permutations

from kubelab import KubeLabError
from kubelab.node import KubeNode
from lab import Nat

from e2e.cluster import NAMESPACE, PATIENCE_S, Cluster, Teller, Waiting, is_ready
from e2e.landscape import LabCluster, Landscape
from e2e.story import Story
from e2e.traffic import Streamed

# Small calls prove that a way is there.
_SIZES = (1, 1400)
# What a stream may be without answers while a Node moves: its agent finds new paths, or a hub relays.
_MOVE_GAP_S = 60.0


class Faults:
    """Steps that change a landscape whose clusters are in one mesh.

    `outage_s` is how long an API server is away.
    """

    def __init__(self, landscape: Landscape, story: Story, *, outage_s: float, teller: Teller) -> None:
        self._landscape = landscape
        self._story = story
        self._outage_s = outage_s
        self._teller = teller

    async def perform(self) -> None:
        """All of them, in an order in which one sets the scene for the next."""
        west = self._landscape.west
        await self._add_node(west)
        await self._roll_agents()
        await self._stop_api_server(west)
        await self._move_node(west.nodes["west-3"])
        await self._reboot_node(west, west.nodes["west-2"])
        await self._remove_node(west, "west-4")

    async def _add_node(self, cluster: LabCluster) -> None:
        """One more machine, behind two NATs."""
        with self._teller.step(f"a Node is added to {cluster.name}: pods of the others reach its pods"):
            began = time.monotonic()
            machine = self._landscape.lab.site("cabin", nat=Nat.CGNAT).machine("west-4")
            await cluster.add(machine)
            ready_s = time.monotonic() - began
            await self._story.refresh()
            await self._reach(cluster, "west-4")
        took = time.monotonic() - began
        self._teller.tell(
            f"    its kubelet was ready after {ready_s:.1f} s, its pods called after {took:.1f} s"
        )

    async def _roll_agents(self) -> None:
        with self._teller.step("agents are replaced everywhere: no datagram is lost"):
            await self._start_streams()
            await asyncio.gather(*(self._replace_agents(each) for each in self._landscape.clusters))
            self._tell_streams(streams := await self._end_streams())
        _check_lossless(streams)

    async def _stop_api_server(self, cluster: LabCluster) -> None:
        with self._teller.step(
            f"the API server of {cluster.name} is away for {self._outage_s:g} s: no datagram is lost"
        ):
            await self._start_streams()
            cluster.plane.api_server.kill()
            await asyncio.sleep(self._outage_s)
            await cluster.plane.api_server.start(within_s=PATIENCE_S)
            self._tell_streams(streams := await self._end_streams())
        _check_lossless(streams)

    async def _move_node(self, node: KubeNode) -> None:
        """With its pods, to another network and another NAT."""
        with self._teller.step(f"{node.name} moves behind another NAT: its pods are reached again"):
            hotel = self._landscape.lab.site("hotel", nat=Nat.ADDRESS_RESTRICTED)
            await self._start_streams()
            node.host.move(hotel)  # type: ignore[attr-defined]
            await node.readdress()
            await self._reach(self._landscape.west, node.name)
            self._tell_streams(streams := await self._end_streams())
        longest = max(each.gap_s for each in streams)
        if longest > _MOVE_GAP_S:
            raise KubeLabError(f"a stream had no answer for {longest:g} s, more than {_MOVE_GAP_S:g}")

    async def _reboot_node(self, cluster: LabCluster, node: KubeNode) -> None:
        with self._teller.step(f"{node.name} is rebooted: it is as before"):
            began = time.monotonic()
            before = await self._starts(cluster, node.name)
            await node.reboot()
            await node.await_ready()
            waiting = Waiting()
            while not self._have_restarted(before, now := await self._starts(cluster, node.name)):
                await waiting.pause(f"pods of {node.name} have started again: {before} were, {now} are")
            await self._story.await_peers()
            await self._reach(cluster, node.name)
        self._teller.tell(f"    its pods called {time.monotonic() - began:.1f} s after its power was cut")

    async def _remove_node(self, cluster: LabCluster, name: str) -> None:
        with self._teller.step(f"{name} is removed: its peer goes, and what leads to its pods"):
            node = cluster.nodes.pop(name)
            (prefix, *_) = (await self._prefixes(cluster))[name]
            node.power_off()
            await cluster.kubectl("delete", "node", name)
            began = time.monotonic()
            await self._story.refresh()
            await self._story.await_peers()
            waiting = Waiting()
            while left := self._leading_to(prefix):
                await waiting.pause(f"nothing leads to {prefix} of {name}; there still does on {left}")
            node.remove()
        self._teller.tell(f"    all were gone {time.monotonic() - began:.1f} s after the Node")

    async def _reach(self, cluster: LabCluster, name: str) -> None:
        """Pods of the other cluster call the pod of a Node, and that one calls them."""
        other = next(each for each in self._landscape.clusters if each is not cluster)
        pods = {each.name: await self._story.answering(each.name) for each in (cluster, other)}
        (there,) = [pod for pod in pods[cluster.name] if pod.node == name]
        here = pods[other.name][-1]
        await self._story.call(other.name, here.node, there.addresses, sizes=_SIZES)
        await self._story.call(cluster.name, name, here.addresses, sizes=_SIZES)

    async def _start_streams(self) -> None:
        """A stream from each Node's pod to every pod of the other cluster."""
        starting = []
        for source, target in permutations(self._landscape.clusters, 2):
            addresses = [pod.addresses[0] for pod in await self._story.answering(target.name)]
            traffic = self._story.traffic[source.name]
            starting += [
                traffic.stream(f"stream-{node}", node=node, targets=addresses) for node in source.nodes
            ]
        await asyncio.gather(*starting)

    async def _end_streams(self) -> list[Streamed]:
        ending = [
            self._story.traffic[cluster.name].end_stream(f"stream-{node}")
            for cluster in self._landscape.clusters
            for node in cluster.nodes
        ]
        return [streamed for streams in await asyncio.gather(*ending) for streamed in streams]

    def _tell_streams(self, streams: list[Streamed]) -> None:
        sent, lost = sum(each.sent for each in streams), sum(each.lost for each in streams)
        longest = max(each.gap_s for each in streams)
        told = f"{len(streams)} streams: {sent} datagrams, {lost} lost; at most {longest:g} s without one"
        self._teller.tell(f"    {told}")

    async def _replace_agents(self, cluster: Cluster) -> None:
        named = ("daemonset/scope-agent", f"--namespace={NAMESPACE}")
        await cluster.kubectl("rollout", "restart", *named)
        await cluster.kubectl("rollout", "status", *named, "--timeout=200s")

    async def _starts(self, cluster: LabCluster, node: str) -> dict[str, int]:
        """How often each container of a Node's DaemonSets was started, and is ready now."""
        found: dict[str, int] = {}
        for pod in await cluster.get("pods", "--all-namespaces", f"--field-selector=spec.nodeName={node}"):
            owners = {owner["kind"] for owner in pod["metadata"].get("ownerReferences", [])}
            if "DaemonSet" in owners and is_ready(pod):
                for status in pod["status"]["containerStatuses"]:
                    found[f"{pod['metadata']['name']}/{status['name']}"] = status["restartCount"]
        return found

    def _have_restarted(self, before: dict[str, int], now: dict[str, int]) -> bool:
        return now.keys() == before.keys() and all(now[name] > count for name, count in before.items())

    async def _prefixes(self, cluster: LabCluster) -> dict[str, list[str]]:
        return {node["metadata"]["name"]: node["spec"]["podCIDRs"] for node in await cluster.get("nodes")}

    def _leading_to(self, prefix: str) -> list[str]:
        """The Nodes that have a route to it, of another than their own network of pods."""
        listing = ["ip", "route", "show", "table", "all", "proto", "83"]
        return [
            name
            for cluster in self._landscape.clusters
            for name, node in cluster.nodes.items()
            if prefix in node.host.run(listing, check=False).stdout
        ]


def _check_lossless(streams: list[Streamed]) -> None:
    if lossy := [each for each in streams if each.lost]:
        raise KubeLabError(f"datagrams were lost: {lossy}")
