"""Operators as processes, in front of a real API server, and what a test asks of both."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from kubelab import ApiError, ControlPlane

SCOPE = "/apis/scope.ltgc.cc/v1alpha1"
PEERS, MESHES = f"{SCOPE}/scopepeers", f"{SCOPE}/scopemeshes"
NAMESPACE = "scope-system"
RIGHTS = Path(__file__).parents[2] / "charts" / "manifests" / "30-operator-rights.yaml"
LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/scope-operator"
T = TypeVar("T")

SOON = 120.0  # seconds: what takes milliseconds on an idle machine


def mesh(name: str = "home", **spec: object) -> dict[str, object]:
    """A ScopeMesh with room for 65,000 peers."""
    return {
        "apiVersion": "scope.ltgc.cc/v1alpha1",
        "kind": "ScopeMesh",
        "metadata": {"name": name},
        "spec": {"addressing": {"ipv4": "100.64.0.0/16"}, **spec},
    }


class Replica:
    """One `scope-operator` process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def text(self) -> str:
        """What it logged."""
        return self.log.read_text()

    async def metrics_url(self) -> str:
        """Where it tells of itself."""

        async def found() -> str | None:
            assert self.process.returncode is None, self.text
            for line in self.text.splitlines():
                if "operator.serving" in line:
                    return f"http://127.0.0.1:{line.rpartition('metrics_port=')[2]}"
            return None

        return await eventually(found)

    async def page(self, path: str) -> tuple[int, str]:
        """The status and text of one of its pages."""
        async with aiohttp.ClientSession() as session, session.get(await self.metrics_url() + path) as answer:
            return answer.status, await answer.text()

    def signal(self, number: int) -> None:
        """Send a signal to it alone."""
        self.process.send_signal(number)

    async def ended(self, *, within: float = SOON) -> int:
        """Its exit status. Raises TimeoutError."""
        return await asyncio.wait_for(self.process.wait(), within)


class Cluster:
    """A control plane with Scope's resources, and the operators that a test starts."""

    def __init__(self, plane: ControlPlane, stack: AsyncExitStack) -> None:
        self.plane = plane
        self._stack = stack
        self._number = 0

    async def operator(
        self,
        *options: str,
        program: tuple[str, ...] = ("-m", "scope_operator.kube"),
        user: str = "",
        gateway: bool = False,
    ) -> Replica:
        """Start a replica; as `user`, who has the operator's rights, or as administrator."""
        token = await self._token(user) if user else None
        self._number += 1
        log = self.plane.logs / f"operator-{self._number}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *program,
                "--cluster-name=east",
                f"--namespace={NAMESPACE}",
                f"--kubeconfig={self.plane.kubeconfig(token=token)}",
                "--metrics-address=127.0.0.1",
                "--metrics-port=0",
                *(() if gateway else ("--no-gateway",)),
                *options,
                stdout=output,
                stderr=output,
            )
        replica = Replica(process, log)
        self._stack.push_async_callback(end, process)
        return replica

    async def _token(self, user: str) -> str:
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": user, "namespace": NAMESPACE},
        }
        await self.plane.apply(account, RIGHTS)
        subject = {"kind": "ServiceAccount", "name": user, "namespace": NAMESPACE}
        for kind, role, namespace in (
            ("ClusterRole", "scope-operator", None),
            ("Role", "scope-operator", NAMESPACE),
            ("Role", "scope-operator-events", "default"),
        ):
            place = {} if namespace is None else {"namespace": namespace}
            await self.plane.apply(
                {
                    "apiVersion": "rbac.authorization.k8s.io/v1",
                    "kind": "ClusterRoleBinding" if namespace is None else "RoleBinding",
                    "metadata": {"name": f"{role}-{user}", **place},
                    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role},
                    "subjects": [subject],
                }
            )
        return await self.plane.token(user, namespace=NAMESPACE)

    async def peers(self) -> dict[str, dict[str, Any]]:
        """All ScopePeers by name."""
        found = await self.plane.request("GET", PEERS)
        return {each["metadata"]["name"]: each for each in found["items"]}

    async def addressed(self, *names: str) -> dict[str, dict[str, Any]]:
        """The ScopePeers once they are exactly these, each with an address."""

        async def there() -> dict[str, dict[str, Any]] | None:
            peers = await self.peers()
            whole = set(peers) == set(names) and all(addresses(each) for each in peers.values())
            return peers if whole else None

        return await eventually(there)

    async def condition(self, name: str, kind: str, *, path: str = MESHES, **wanted: str) -> dict[str, Any]:
        """A condition of a mesh (or of what is at `path`) once it is as wanted."""

        async def there() -> dict[str, Any] | None:
            found = await self.plane.request("GET", f"{path}/{name}")
            for each in found.get("status", {}).get("conditions", ()):
                if each["type"] == kind and wanted.items() <= each.items():
                    return dict(each)
            return None

        return await eventually(there)

    async def events(self, reason: str) -> list[dict[str, Any]]:
        """Events of that reason, once there is one."""

        async def there() -> list[dict[str, Any]] | None:
            found = await self.plane.request("GET", "/apis/events.k8s.io/v1/events")
            return [each for each in found["items"] if each["reason"] == reason] or None

        return await eventually(there)

    async def hand_over(self) -> None:
        """Let nobody wait for a Lease whose holder was killed."""
        try:
            await self.plane.request("DELETE", LEASE)
        except ApiError as error:
            if error.status != 404:
                raise

    async def leader(self) -> str:
        """Who holds the Lease, once somebody does."""

        async def held() -> str | None:
            try:
                lease = await self.plane.request("GET", LEASE)
            except ApiError as error:
                if error.status != 404:
                    raise
                return None
            return str(lease["spec"].get("holderIdentity", "")) or None

        return await eventually(held)


def addresses(peer: Mapping[str, Any]) -> tuple[str, ...]:
    """A ScopePeer's addresses."""
    return tuple(peer.get("status", {}).get("addresses", ()))


async def eventually(look: Callable[[], Awaitable[T | None]], *, within: float = SOON) -> T:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + within
    while True:
        found = await look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within} s"
        await asyncio.sleep(0.05)


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


@asynccontextmanager
async def operated(plane: ControlPlane) -> AsyncIterator[Cluster]:
    """The cluster with its namespace; its operators end with the block."""
    async with AsyncExitStack() as stack:
        await plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        yield Cluster(plane, stack)


def run(plane: ControlPlane, body: Callable[[Cluster], Awaitable[None]]) -> None:
    """Run a test's body."""

    async def within() -> None:
        async with operated(plane) as made:
            await body(made)

    asyncio.run(within())
