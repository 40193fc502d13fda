"""One cluster, by what any administrator has of it: a kubeconfig, kubectl and helm."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kubelab import KubeLabError
from kubelab.programs import kubernetes_program

NAMESPACE = "scope-system"
# A step takes seconds; two cores may be doing ten other things.
PATIENCE_S = 240.0
_POLL_S = 1.0
# Of the gateway's Service, so that whoever reaches the public Node reaches it.
GATEWAY_PORT, REFLECTOR_PORTS = 30443, (30478, 30479)


class Runner(Protocol):
    """Runs a program to its end, in a network that reaches the cluster."""

    def __call__(
        self,
        argv: Sequence[str],
        *,
        check: bool,
        timeout: float,
        env: Mapping[str, str],
        input: str | None,
    ) -> subprocess.CompletedProcess[str]: ...


class Cluster:
    """The cluster that Scope calls `name`. `home` is a folder for what kubectl and helm keep."""

    def __init__(self, name: str, *, kubeconfig: Path, home: Path, run: Runner) -> None:
        self.name = name
        self.kubeconfig = kubeconfig
        self._env = {
            "PATH": os.defpath,
            "HOME": str(home),
            "KUBECONFIG": str(kubeconfig),
            "HELM_NAMESPACE": NAMESPACE,
        }
        self._run_here = run

    async def kubectl(self, *arguments: str, document: str | None = None) -> str:
        """What kubectl prints; KubeLabError with its reason when it fails."""
        return await self.run(kubernetes_program("kubectl"), *arguments, document=document)

    async def helm(self, *arguments: str, values: Mapping[str, object] | None = None) -> str:
        """What helm prints; KubeLabError with its reason when it fails."""
        read = [] if values is None else ["--values=-"]
        document = None if values is None else json.dumps(values)
        return await self.run(kubernetes_program("helm"), *arguments, *read, document=document)

    async def run(self, *argv: str, document: str | None = None) -> str:
        """What a program prints that reaches the cluster; KubeLabError with its reason when it fails."""
        done = await asyncio.to_thread(
            self._run_here, argv, check=False, timeout=PATIENCE_S, env=self._env, input=document
        )
        if done.returncode != 0:
            program = Path(argv[0]).name
            raise KubeLabError(
                f"{program} {' '.join(argv[1:])} in {self.name}: {done.stderr.strip() or done.stdout.strip()}"
            )
        return done.stdout

    async def apply(self, *documents: Mapping[str, object]) -> None:
        """Apply these objects in one go."""
        listed = {"apiVersion": "v1", "kind": "List", "items": documents}
        await self.kubectl("apply", "-f", "-", document=json.dumps(listed))

    async def get(self, kind: str, *options: str) -> list[dict[str, Any]]:
        """Every object of a kind, as it stands now."""
        return list(json.loads(await self.kubectl("get", kind, "-o", "json", *options))["items"])

    async def pods(self, app: str, *, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
        """The pods of one workload."""
        return await self.get("pods", f"--namespace={namespace}", f"--selector=app.kubernetes.io/name={app}")

    async def node_names(self) -> list[str]:
        """The names of its Nodes, sorted."""
        return sorted(node["metadata"]["name"] for node in await self.get("nodes"))

    async def await_pods(self, app: str, count: int, *, namespace: str = NAMESPACE) -> list[dict[str, Any]]:
        """A workload's pods, once there are so many and all are Ready."""
        waiting = Waiting()
        while True:
            pods = await self.pods(app, namespace=namespace)
            ready = [pod for pod in pods if is_ready(pod)]
            if len(ready) == len(pods) == count:
                return pods
            await waiting.pause(
                f"{count} pods {app} Ready in {self.name}; {len(ready)} of {len(pods)} are: {waits(pods)}"
            )


def is_ready(thing: Mapping[str, Any]) -> bool:
    """Whether a ScopePeer, a ScopeMesh, a Node or a pod says that it is Ready."""
    conditions = thing.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def waits(pods: list[dict[str, Any]]) -> str:
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


class Teller:
    """Says what goes on, and how long each step took."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, line: str) -> None:
        """One line, with the seconds since the beginning."""
        print(f"{time.monotonic() - self._began:6.1f} s  {line}", flush=True)

    def step(self, what: str) -> Step:
        """A step: `with teller.step("what is done"):`."""
        return Step(what, self.tell)


class Step:
    """Tells a step's beginning, its end and its time; one that raises is told as failed."""

    def __init__(self, what: str, tell: Callable[[str], None]) -> None:
        self._what = what
        self._tell = tell
        self._began = 0.0

    def __enter__(self) -> None:
        self._tell(f"==> {self._what}")
        self._began = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        took = time.monotonic() - self._began
        self._tell(
            f"    done in {took:.1f} s" if kind is None else f"FAILED after {took:.1f} s: {self._what}"
        )
