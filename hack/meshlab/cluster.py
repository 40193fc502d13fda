"""A Kubernetes cluster on a server of the lab as the registry: its API server, the operator, and the gateway.

    cluster = Cluster(lab.server("cluster"))
    cluster.apply(mesh_document("demo"))
    member = Member(machine, mesh="demo", registry=cluster)
    member.run(*cluster.add_node(machine))                # on a Node
    other.join(cluster.token("demo"))                     # on a machine off the cluster

Nodes are objects without a kubelet: what the DaemonSet would start is started here, with the token that a pod
on that Node would have. All of the rest is as users install it: definitions, rights and policies, and the
operator signed in as its own ServiceAccount. It lives as long as its lab.
"""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from kubelab import ControlPlane, KubeLabError
from kubelab.programs import ROOT
from lab import Host, LabError, Machine, Server

from meshlab.member import Member
from meshlab.names import NAME, Names
from meshlab.programs import POLL_S, await_line, program

CLUSTER = "default"  # as 10-cluster.yaml has it
NAMESPACE = "scope-system"
# What users apply, but for what needs a kubelet to run it.
_INSTALLED = (
    "00-namespace",
    "10-cluster",
    "20-accounts",
    "30-operator-rights",
    "31-agent-rights",
    "40-policies",
)
_ADMIN = "var/lib/scope-registry/admin.json"  # where scopectl looks for it
_TOKEN_S = 7 * 86_400  # a kept lab is looked at for days, and no kubelet renews a token
# Imports, an election and keys, on a machine that does ten other things; an end is noticed at once.
_START_S = 90.0
T = TypeVar("T")


class Cluster:
    """A cluster that runs, with the operator serving; PRIVATE directories of the lab are needed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.log = server.directory / "operator.log"
        self._names = Names(server)
        self.introduce(server)
        # The operator has its key in a file there; one that is killed would leave it to this machine.
        server.run(["mount", "-t", "tmpfs", "-o", "mode=0700", "lab", "/dev/shm"])
        self.plane = _done(_started(server))
        self.kubeconfig = self.plane.kubeconfig()
        self._operate()

    def introduce(self, host: Host) -> None:
        """Let a host find the gateway by its name."""
        self._names.introduce(host)

    def apply(self, document: str) -> None:
        """Create or update what a YAML or JSON document describes."""
        _done(self.plane.apply(document))

    def token(self, mesh: str, *, hub: str | None = None) -> str:
        """A fresh join string, which scopectl makes with the file that is in the gateway's Secret.

        With `hub`, a ScopePeer, it leads to that hub's carrier.
        """
        admin = Path("/proc", str(self.server.holder_pid), "root", _ADMIN)
        if not admin.exists():
            admin.touch(mode=0o600)
            admin.write_text(_done(self._administrator_file()))
        options = [] if hub is None else ["--hub", hub]
        return self.server.run(
            [program("scopectl"), "token", "create", "--mesh", mesh, *options]
        ).stdout.strip()

    def add_node(self, machine: Machine) -> list[str]:
        """Make a machine a Node: the arguments with which `scope-agent run` is its agent."""
        account = machine.directory / "account"
        account.mkdir()
        (account / "ca.crt").write_bytes(self.plane.authority.certificate.read_bytes())
        (account / "token").write_text(_done(self._register(machine.name)))
        said = {
            "--node": machine.name,
            "--cluster": CLUSTER,
            "--namespace": NAMESPACE,
            "--api-server": self.plane.url,
            "--service-account": str(account),
        }
        return ["--kubernetes", *(word for option in said.items() for word in option)]

    def remove_node(self, member: Member) -> None:
        """Delete a member's Node; its agent ends, as its pod does."""
        _done(self.plane.request("DELETE", f"/api/v1/nodes/{member.name}"))
        member.kill(signal.SIGTERM)

    def _operate(self) -> None:
        token = _done(self.plane.token("scope-operator", namespace=NAMESPACE, seconds=_TOKEN_S))
        said = {
            "--cluster-name": CLUSTER,
            "--namespace": NAMESPACE,
            "--kubeconfig": str(self.plane.kubeconfig(token=token)),
            "--advertise": NAME,
        }
        with self.log.open("w") as log:
            process = self.server.popen(
                [program("scope-operator"), *(word for option in said.items() for word in option)],
                stdout=log,
                stderr=log,
            )
        await_line(process, self.log, "gateway.serving", within_s=_START_S)

    async def _register(self, node: str) -> str:
        """Create a Node: the token of its agent."""
        await self.plane.create_node(node)
        return await self.plane.token("scope-agent", namespace=NAMESPACE, node=node, seconds=_TOKEN_S)

    async def _administrator_file(self) -> str:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            secret = await self.plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/scope-gateway")
            text = base64.b64decode(secret["data"]["admin.json"]).decode()
            if "url" in json.loads(text):
                return text
            await asyncio.sleep(POLL_S)
        raise LabError(f"the operator does not say where its gateway serves: see {self.log}")


async def _started(server: Server) -> ControlPlane:
    plane = ControlPlane(host=server, kept=True)
    await plane.start()
    manifests = [ROOT / "charts" / "manifests" / f"{name}.yaml" for name in _INSTALLED]
    documents = [*sorted((ROOT / "crds").glob("*.yaml")), *manifests]
    # At once: a start of kubectl is half a second of processor time.
    await plane.apply("\n---\n".join(path.read_text() for path in documents))
    return plane


def _done(work: Coroutine[Any, Any, T]) -> T:
    """What it gives, waited for. Raises LabError."""
    try:
        return asyncio.run(work)
    except (KubeLabError, aiohttp.ClientError, OSError) as error:
        raise LabError(f"the cluster of the lab: {error}") from None
