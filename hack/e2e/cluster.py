"""One cluster of the lab: a public server with the control plane, itself a Node, and Nodes behind NATs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kubelab import ControlPlane, KubeLabError, KubeNode
from kubelab.programs import kubernetes_program
from lab import Host, Machine, Server

NAMESPACE = "scope-system"
# A step takes seconds; two cores may be doing ten other things.
PATIENCE_S = 240.0
_POLL_S = 0.5
# Of the gateway's Service, so that whoever reaches the public Node reaches it.
GATEWAY_PORT, REFLECTOR_PORTS = 30443, (30478, 30479)


class Cluster:
    """A cluster named `name`: `hub` is on the internet, each of `machines` behind its site's NAT.

    `disks` is where its Nodes keep theirs; `images` is what they run.
    """

    def __init__(
        self,
        name: str,
        *,
        hub: Server,
        machines: Sequence[Machine],
        disks: Path,
        images: Path,
        kept: bool,
    ) -> None:
        self.name = name
        self.server = hub
        self.plane = ControlPlane(host=hub, kubelets=True, kept=True)
        self.kubeconfig = self.plane.kubeconfig()
        hosts: list[Host] = [hub, *machines]
        self.nodes = {
            host.name: KubeNode(
                host.name, host=host, plane=self.plane, disk=disks / host.name, images=images, kept=kept
            )
            for host in hosts
        }

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

    def power_off(self) -> None:
        """End every Node, and what runs in it."""
        for node in self.nodes.values():
            node.power_off()

    def remove(self) -> None:
        """Take away what the Nodes left on this machine; they are off."""
        for node in self.nodes.values():
            node.remove()

    async def kubectl(self, *arguments: str, document: str | None = None) -> str:
        """What kubectl prints."""
        return await self.plane.kubectl(*arguments, document=document)

    async def helm(self, *arguments: str, values: Mapping[str, object] | None = None) -> str:
        """What helm prints; KubeLabError with its reason when it fails."""
        env = {
            "PATH": os.defpath,
            "HOME": str(self.plane.directory),
            "KUBECONFIG": str(self.kubeconfig),
            "HELM_NAMESPACE": NAMESPACE,
        }
        argv = [kubernetes_program("helm"), *arguments, *([] if values is None else ["--values=-"])]
        done = await asyncio.to_thread(
            self.server.run,
            argv,
            env=env,
            input=None if values is None else json.dumps(values),
            check=False,
            timeout=PATIENCE_S,
        )
        if done.returncode != 0:
            raise KubeLabError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    async def peers(self) -> list[dict[str, Any]]:
        """Every ScopePeer, as it stands now."""
        listed = await self.plane.request("GET", "/apis/scope.ltgc.cc/v1alpha1/scopepeers")
        return list(listed["items"])

    async def pods(self, app: str) -> list[dict[str, Any]]:
        """The pods of one of Scope's workloads."""
        query = f"labelSelector=app.kubernetes.io/name%3D{app}"
        listed = await self.plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods?{query}")
        return list(listed["items"])

    async def ping(self, source: str, address: str, *, count: int = 1) -> subprocess.CompletedProcess[str]:
        """Ping from a Node, with its host network."""
        argv = ["ping", "-n", "-c", str(count), "-i", "0.2", "-W", "2", address]
        return await asyncio.to_thread(self.nodes[source].host.run, argv, check=False, timeout=count + 30.0)


def is_ready(thing: Mapping[str, Any]) -> bool:
    """Whether a ScopePeer, a ScopeMesh, a Node or a pod says that it is Ready."""
    conditions = thing.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


class Waiting:
    """The bound of asking again and again: `while not done(): await waiting.pause("what for")`."""

    def __init__(self, *, within_s: float = PATIENCE_S) -> None:
        self._within_s = within_s
        self._deadline = time.monotonic() + within_s

    async def pause(self, what: str) -> None:
        """Wait a moment; KubeLabError, with what was waited for, when time is over."""
        if time.monotonic() > self._deadline:
            raise KubeLabError(f"not within {self._within_s:g} s: {what}")
        await asyncio.sleep(_POLL_S)
