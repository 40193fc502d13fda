"""Traffic of pods, by what any cluster can do: pods that answer, that call, that keep a stream going.

What a pod found is in its status, where its kubelet put its last words: nobody has to reach the pod. A pod
that streams is ended by deleting it; a finalizer keeps its status until it was read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubelab import KubeLabError

from e2e.cluster import PATIENCE_S, Cluster, Waiting
from e2e.pod import PORT

NAMESPACE = "e2e"
ANSWER = "answer"
PROTOCOLS = ("tcp", "udp")
_SOURCE = Path(__file__).with_name("pod.py").read_text()
# In bytes a second: what a busy machine still does.
_SLOWEST = 500_000.0
_FINALIZER = "e2e.scope.ltgc.cc/read"


@dataclass(frozen=True, slots=True)
class Answering:
    """A pod that answers: its Node and its addresses, IPv4 first."""

    node: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Streamed:
    """What became of one stream of datagrams; `gap_s` is the longest time without an answer."""

    source: str
    target: str
    sent: int
    lost: int
    gap_s: float


class Traffic:
    """The pods of one cluster. `image` has python3."""

    def __init__(self, cluster: Cluster, *, image: str) -> None:
        self.cluster = cluster
        self._image = image

    async def start(self) -> None:
        """Have a pod on every Node that answers, and export their Service; they are not ready yet."""
        labels = {"app.kubernetes.io/name": ANSWER}
        container = {**self._container("answer"), "name": ANSWER, "ports": [{"containerPort": PORT}]}
        container["readinessProbe"] = {"tcpSocket": {"port": PORT}, "periodSeconds": 1}
        await self.cluster.apply(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
            {
                "apiVersion": "apps/v1",
                "kind": "DaemonSet",
                "metadata": {"name": ANSWER, "namespace": NAMESPACE},
                "spec": {
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}, "spec": self._spec(container)},
                },
            },
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {
                    "name": ANSWER,
                    "namespace": NAMESPACE,
                    "annotations": {"scope.ltgc.cc/export": "true"},
                },
                "spec": {
                    "selector": labels,
                    "ipFamilyPolicy": "PreferDualStack",
                    "ports": [
                        {"name": name, "port": PORT, "protocol": name.upper()} for name in ("tcp", "udp")
                    ],
                },
            },
        )

    async def await_service(self, name: str, endpoints: int) -> None:
        """Return when a Service is here with so many endpoints of each of its families that are ready."""
        waiting = Waiting()
        while True:
            selector = f"--selector=kubernetes.io/service-name={name}"
            slices = await self.cluster.get("endpointslices", f"--namespace={NAMESPACE}", selector)
            ready: dict[str, int] = {}
            for each in slices:
                found = [one for one in each.get("endpoints") or [] if one["conditions"].get("ready")]
                family = each["addressType"]
                ready[family] = ready.get(family, 0) + len(found)
            if ready and set(ready.values()) == {endpoints}:
                return
            await waiting.pause(f"{endpoints} endpoints of each family of {name}; there are {ready}")

    async def answering(self, count: int) -> list[Answering]:
        """The pods that answer, once there are so many and all do."""
        found = await self.cluster.await_pods(ANSWER, count, namespace=NAMESPACE)
        pods = [
            Answering(pod["spec"]["nodeName"], tuple(each["ip"] for each in pod["status"]["podIPs"]))
            for pod in found
        ]
        return sorted(pods, key=lambda pod: pod.node)

    async def call(
        self,
        name: str,
        *,
        node: str,
        targets: Iterable[str],
        sizes: Sequence[int],
        host: bool = False,
        protocols: Sequence[str] = PROTOCOLS,
        rate: float | None = None,
    ) -> dict[str, Any]:
        """Have a pod of a Node, or with `host` its network, call them all; what it found.

        `rate` bounds the datagrams, in bytes a second. KubeLabError when a call failed, with the reasons of
        the first ones.
        """
        called = list(targets)
        plan = {"targets": called, "sizes": sizes, "protocols": protocols, "rate": rate}
        await self._run_pod(name, node, self._container("call", json.dumps(plan)), host=host)
        waiting = Waiting(within_s=PATIENCE_S + sum(sizes) * len(called) / _SLOWEST)
        while (pod := await self._pod(name))["status"]["phase"] not in ("Succeeded", "Failed"):
            await waiting.pause(f"the pod {name} on {node} has called")
        found = _last_words(pod)
        await self._remove(name)
        if found["failures"]:
            raise KubeLabError(
                f"{found['failures']} calls of {name} on {node} failed: {'; '.join(found['first'])}"
            )
        return found

    async def stream(self, name: str, *, node: str, targets: Iterable[str]) -> None:
        """Have a pod of a Node stream to them all, until `end_stream`."""
        container = self._container("stream", json.dumps({"targets": list(targets)}))
        await self._run_pod(name, node, container, host=False, finalizers=[_FINALIZER])
        waiting = Waiting()
        while (await self._pod(name))["status"]["phase"] != "Running":
            await waiting.pause(f"the pod {name} on {node} runs")

    async def end_stream(self, name: str) -> list[Streamed]:
        """End a stream: what became of it."""
        await self.cluster.kubectl("delete", "pod", name, f"--namespace={NAMESPACE}", "--wait=false")
        waiting = Waiting()
        while not _has_ended(pod := await self._pod(name)):
            await waiting.pause(f"the pod {name} has ended")
        freed = '{"metadata": {"finalizers": null}}'
        await self.cluster.kubectl(
            "patch", "pod", name, f"--namespace={NAMESPACE}", "--type=merge", f"--patch={freed}"
        )
        return [
            Streamed(name, target, each["sent"], each["lost"], each["gap"])
            for target, each in _last_words(pod).items()
        ]

    async def _run_pod(
        self,
        name: str,
        node: str,
        container: Mapping[str, object],
        *,
        host: bool,
        finalizers: Sequence[str] = (),
    ) -> None:
        await self.cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": NAMESPACE, "finalizers": list(finalizers)},
                "spec": {
                    **self._spec({**container, "name": "pod"}),
                    "nodeName": node,
                    "hostNetwork": host,
                    "restartPolicy": "Never",
                },
            }
        )

    async def _pod(self, name: str) -> dict[str, Any]:
        said = await self.cluster.kubectl("get", "pod", name, f"--namespace={NAMESPACE}", "-o", "json")
        found: dict[str, Any] = json.loads(said)
        return found

    async def _remove(self, name: str) -> None:
        await self.cluster.kubectl("delete", "pod", name, f"--namespace={NAMESPACE}", "--wait=false")

    def _container(self, *arguments: str) -> dict[str, Any]:
        named = {"fieldRef": {"fieldPath": "spec.nodeName"}}
        return {
            "image": self._image,
            "command": ["python3", "-I", "-c", _SOURCE, *arguments],
            "env": [{"name": "POD", "valueFrom": named}],
        }

    def _spec(self, container: Mapping[str, object]) -> dict[str, object]:
        return {
            "containers": [container],
            "tolerations": [{"operator": "Exists"}],
            "terminationGracePeriodSeconds": 60,
        }


def _has_ended(pod: Mapping[str, Any]) -> bool:
    return any(each["state"].get("terminated") for each in pod["status"].get("containerStatuses", []))


def _last_words(pod: Mapping[str, Any]) -> dict[str, Any]:
    (status,) = pod["status"]["containerStatuses"]
    ended = status["state"]["terminated"]
    if ended["exitCode"] != 0:
        raise KubeLabError(f"the pod {pod['metadata']['name']} ended with {ended['exitCode']}: see its log")
    found: dict[str, Any] = json.loads(ended["message"])
    return found
