"""What takes the machines of the lab: pings between Nodes, and what Nodes held before and after."""

from __future__ import annotations

from itertools import permutations

from kubelab import KubeLabError

from e2e.cluster import Teller, Waiting
from e2e.landscape import UPLINK, Landscape
from e2e.nodes import holdings


class Machines:
    """Steps on the machines of a landscape."""

    def __init__(self, landscape: Landscape, *, teller: Teller) -> None:
        self._landscape = landscape
        self._teller = teller
        self._before: dict[str, list[str]] = {}
        self._addresses: dict[str, object] = {}

    async def start(self) -> None:
        """Start every cluster."""
        with self._teller.step("start the clusters"):
            await self._landscape.start()
        for cluster in self._landscape.clusters:
            for line in (await cluster.kubectl("get", "nodes", "-o", "wide")).splitlines():
                self._teller.tell(line)

    def note_holdings(self) -> None:
        """Note what Nodes hold, once each has had a pod: with the first one its kernel begins to forward."""
        self._before = self._holdings()
        self._addresses = {node.name: node.host.ipv4 for node in self._landscape.nodes()}

    async def ping(self) -> None:
        """Each Node pings each other one, through the mesh."""
        homes = {name: cluster for cluster in self._landscape.clusters for name in cluster.nodes}
        addresses = {
            str(peer["spec"]["nodeName"]): [each.split("/")[0] for each in peer["status"]["addresses"]]
            for peer in await self._landscape.west.get("scopepeers")
        }
        with self._teller.step("each Node pings each other one through the mesh, IPv4 and IPv6"):
            for source, target in permutations(addresses, 2):
                for address in addresses[target]:
                    waiting = Waiting()
                    while (done := await homes[source].ping(source, address)).returncode != 0:
                        await waiting.pause(f"{source} pings {target} at {address}: {done.stdout}")

    async def await_clean(self) -> None:
        """Nodes hold what they held before."""
        with self._teller.step("Nodes are as before"):
            if left := self._left():
                raise KubeLabError(f"Nodes still hold {left}")

    def _holdings(self) -> dict[str, list[str]]:
        return {node.name: holdings(node.host, node.disk) for node in self._landscape.nodes()}

    def _left(self) -> dict[str, list[str]]:
        """What each Node has now and had not before, and what it had."""
        changes: dict[str, list[str]] = {}
        now = self._holdings()
        for node in self._landscape.nodes():
            before, after = self._before[node.name], now[node.name]
            changed = [f"+ {line}" for line in after if line not in before]
            changed += [f"- {line}" for line in before if line not in after]
            if node.host.ipv4 != self._addresses[node.name]:
                # It has moved, and what it is plugged into is another network.
                changed = [line for line in changed if UPLINK not in line.split()]
            if changed:
                changes[node.name] = changed
        return changes
