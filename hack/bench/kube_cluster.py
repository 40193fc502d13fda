"""A cluster to measure: a real API server, a real operator, and as many agents as asked for, simulated.

The Nodes are objects, each about as large as a kubelet makes it; half of them belong to each of two meshes.
All agents are in this process and have no data path. What each of them writes is what a real one writes: a
report as soon as its ScopePeer is there, a change of it when asked to, a Lease every minute; and each Node's
status is written every five minutes, as kubelets do. The operator and the agents have the rights that users
install; the policies are left out, since they ask for a token of each Node's own.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from ssl import SSLContext
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kubelab import MERGE, ControlPlane, Program
from kubelab.programs import ThisMachine

from bench.agents import BenchError, prepare_programs
from bench.meter import Meter
from scope.credentials import read_base64url
from scope.model import (
    Candidate,
    CandidateKind,
    DeviceKind,
    Endpoint,
    Kind,
    Link,
    PathKind,
    Peer,
    PeerKeys,
    PeerReport,
    PublicKey,
    Secret,
)
from scope.model import (
    Mapping as NatMapping,
)
from scope.registry.follow import follow
from scope.registry.kube.client import KubeClient
from scope.registry.kube.objects import node_lease
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import Conflict, Deleted, Disconnected, Fact, Listed, Put

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
NAMESPACE = "scope-system"
CLUSTER = "bench"
SIZES = (100, 300, 1_000)  # peers
MESHES = {"north": "100.64.0.0/16", "south": "100.65.0.0/16"}
MANIFESTS = ("00-namespace", "20-accounts", "30-operator-rights", "31-agent-rights")
AT_ONCE = 32  # requests of this process under way: it shares its processors with who answers them
IMAGES = 30  # of a Node: kubelets list up to fifty
LINKS = 16  # of a report: as many as agents publish
LEASE_S = 60.0  # between two heartbeats of an agent
NODE_STATUS_S = 300.0  # between two reports of a kubelet that has nothing new to say
PATIENCE_S = 300.0  # what takes longer never comes
LOOK_S = 0.02  # between two looks at a count


@dataclass(frozen=True, slots=True)
class TokenAccess:
    """How a client of this process comes to the API server: by token, or without one as its administrator."""

    plane: ControlPlane
    url: str
    token: str | None = None
    server_name: str | None = None

    def tls(self) -> SSLContext | None:
        """A context that trusts the control plane."""
        return self.plane.tls(as_admin=self.token is None)

    async def authorization(self) -> str | None:
        """The header of that name."""
        return f"Bearer {self.token}" if self.token is not None else None


class Operator:
    """The `scope-operator` process, with its gateway, on a way of its own to the API server."""

    def __init__(self, plane: ControlPlane, *, token: str, url: str) -> None:
        self._log = plane.logs / "operator.log"
        self._log.touch()
        self._mark = 0
        argv = [
            sys.executable,
            "-m",
            "scope_operator.kube",
            f"--cluster-name={CLUSTER}",
            f"--namespace={NAMESPACE}",
            f"--kubeconfig={plane.kubeconfig(token=token, url=url)}",
            "--metrics-address=127.0.0.1",
            "--metrics-port=0",
            "--listen=127.0.0.1:0",
            "--reflector-ports=0,0",
            "--advertise=127.0.0.1",
        ]
        self.program = Program(
            "scope-operator", argv, where=ThisMachine(), log=self._log, is_ready=self._is_ready
        )

    async def start(self) -> None:
        """Start it; it is ready when this returns."""
        self._mark = self._log.stat().st_size
        await self.program.start(within_s=PATIENCE_S)

    def check(self) -> None:
        """Raises KubeLabError, with its last words, when it has ended."""
        _ = self.program.pid

    @property
    def memory_mib(self) -> float:
        """Its resident memory."""
        return self.program.resident_bytes() / 2**20

    @property
    def gateway(self) -> str | None:
        """Where its gateway listens; None while it does not."""
        told = self._told("gateway.serving", "listening=")
        return f"https://{told}" if told is not None else None

    async def figures(self) -> Mapping[str, float]:
        """Its gauges by name, without labels; empty while it does not answer."""
        answer = await self._page("/metrics")
        lines = (line.split(" ") for line in (answer or "").splitlines() if line[:1] not in ("#", ""))
        return {name: float(value) for name, value in lines if "{" not in name}

    async def is_steady(self) -> bool:
        """Whether it leads and has nothing to do now."""
        return _is_steady(await self.figures())

    async def is_idle(self) -> bool:
        """Whether it leads and has nothing to do, at a later time neither."""
        figures = await self.figures()
        return _is_steady(figures) and figures.get("scope_operator_delayed") == 0

    async def _is_ready(self) -> bool:
        return await self._page("/readyz") is not None

    async def _page(self, path: str) -> str | None:
        port = self._told("operator.serving", "metrics_port=")
        if port is None:
            return None
        with suppress(aiohttp.ClientError, TimeoutError):
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://127.0.0.1:{port}{path}") as answer,
            ):
                return await answer.text() if answer.ok else None
        return None

    def _told(self, event: str, name: str) -> str | None:
        """What a line of its log says, since its last start."""
        with self._log.open() as log:
            log.seek(self._mark)
            for line in log:
                if event in line and line.endswith("\n"):
                    return line.rpartition(name)[2].strip()
        return None


@dataclass(slots=True)
class Fleet:
    """The agents, and the kubelets of their Nodes. `seen` tells of all meshes, `written` takes writes."""

    seen: KubeRegistry
    written: KubeRegistry
    kubelets: KubeClient
    nodes: tuple[str, ...]
    peers: dict[str, Peer] = field(default_factory=dict)
    addressed: set[str] = field(default_factory=set)
    online: set[str] = field(default_factory=set)
    _reporting: set[str] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    _moves: int = 0
    _failure: BaseException | None = None

    async def run(self) -> None:
        """Follow the ScopePeers, report and beat, until cancelled."""
        try:
            async with asyncio.TaskGroup() as works:
                works.create_task(self._beat())
                works.create_task(self._tell_nodes())
                async for fact in follow(self.seen, Kind.PEER, sleep=asyncio.sleep, uniform=random.uniform):
                    self._take(fact)
        finally:
            await end(*self._tasks)

    def check(self) -> None:
        """Raise what an agent met."""
        if self._failure is not None:
            raise self._failure

    async def report_links(self) -> None:
        """Let every agent write a report of the size that it has in a mesh that has formed."""
        names = list(self.peers)
        await _all(self._write(name, self._with_links(name, names)) for name in names)

    async def move(self, name: str) -> Endpoint:
        """Let an agent publish another endpoint: which."""
        moved = self.next_endpoint()
        await self.publish(name, moved)
        return moved

    def next_endpoint(self) -> Endpoint:
        """One that nobody has published yet."""
        self._moves += 1
        return Endpoint(IPv4Address("198.18.0.0") + self._moves % 0x20000, 1024 + self._moves % 60_000)

    async def publish(self, name: str, endpoint: Endpoint) -> None:
        """Let an agent publish this reflexive endpoint in place of its last."""
        report = self.peers[name].report or first_report(name)
        kept = tuple(each for each in report.endpoints if each.kind is not CandidateKind.REFLEXIVE)
        candidate = Candidate(endpoint, CandidateKind.REFLEXIVE)
        await self._write(name, replace(report, endpoints=(*kept, candidate)))

    async def storm(self, *, per_second: int, seconds: float) -> float:
        """Let so many agents publish another endpoint each second: how many did, a second."""
        names = random.sample(sorted(self.peers), len(self.peers))
        count = int(per_second * seconds)
        began = time.monotonic()
        async with asyncio.TaskGroup() as writes:
            for number in range(count):
                await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
                writes.create_task(self.move(names[number % len(names)]))
        return count / (time.monotonic() - began)

    def _take(self, fact: Fact) -> None:
        match fact:
            case Listed(resources=resources):
                for resource in resources:
                    self._put(resource)
            case Put(resource):
                self._put(resource)
            case Deleted(last):
                for known in (self.addressed, self.online, self._reporting):
                    known.discard(last.meta.name)
                self.peers.pop(last.meta.name, None)
            case Disconnected(reason):  # also when definitions are young: the server opens their stores anew
                log.info("agents.disconnected reason=%s", reason)

    def _put(self, resource: object) -> None:
        if not isinstance(resource, Peer):
            return
        name = resource.meta.name
        self.peers[name] = resource
        (self.addressed.add if resource.assignment.addresses else self.addressed.discard)(name)
        (self.online.add if resource.assignment.online else self.online.discard)(name)
        if resource.report is None and name not in self._reporting:
            self._reporting.add(name)
            self._spawn(self._enter(resource))

    async def _enter(self, peer: Peer) -> None:
        await self._write(peer.meta.name, first_report(peer.meta.name))
        await self._renew(peer)

    async def _write(self, name: str, report: PeerReport) -> None:
        async with self._writers:
            meta = self.peers[name].meta
            try:
                await self.written.update_status(
                    Kind.PEER, name, report, uid=meta.uid, if_revision=meta.revision
                )
            except Conflict:  # the operator wrote meanwhile
                await self.written.update_status(Kind.PEER, name, report, uid=meta.uid)

    async def _renew(self, peer: Peer) -> None:
        async with self._writers:
            await self.written.leases.renew(
                node_lease(peer.spec.node_name), peer=peer.meta.name, uid=peer.meta.uid
            )

    async def _beat(self) -> None:
        while True:
            for name in random.sample(sorted(self._reporting), len(self._reporting)):
                await asyncio.sleep(LEASE_S / len(self.nodes))
                if name in self.peers:
                    self._spawn(self._renew(self.peers[name]))
            if not self._reporting:
                await asyncio.sleep(LOOK_S)

    async def _tell_nodes(self) -> None:
        while True:
            for name in random.sample(self.nodes, len(self.nodes)):
                await asyncio.sleep(NODE_STATUS_S / len(self.nodes))
                self._spawn(self._tell_node(name))

    async def _tell_node(self, name: str) -> None:
        status = {"status": {"conditions": node_conditions(time.time())}}
        await self.kubelets.ask("PATCH", f"/api/v1/nodes/{name}/status", body=status, content_type=MERGE)

    def _with_links(self, name: str, names: list[str]) -> PeerReport:
        report = self.peers[name].report or first_report(name)
        others = [other for other in random.sample(names, min(len(names), LINKS + 1)) if other != name]
        links = (
            Link(other, PathKind.DIRECT, endpoint=self.next_endpoint(), latency=0.02)
            for other in others[:LINKS]
        )
        return replace(report, links=tuple(links), direct=len(names) - 1)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = self._failure or error


@dataclass(frozen=True, slots=True)
class Spent:
    """Processor time, in seconds."""

    operator: float
    server: float  # the API server and etcd
    agents: float  # this process, which is all of them

    def since(self, before: Spent) -> Spent:
        """What was spent between two of these."""
        return Spent(
            self.operator - before.operator, self.server - before.server, self.agents - before.agents
        )


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to measure."""

    plane: ControlPlane
    operator: Operator
    to_operator: Meter  # what the operator and the API server say to each other
    to_agents: Meter  # likewise what all agents write
    fleet: Fleet
    agent_token: str

    def spent(self) -> Spent:
        """Processor time so far."""
        return Spent(
            self.operator.program.cpu_seconds(),
            self.plane.api_server.cpu_seconds() + self.plane.etcd.cpu_seconds(),
            time.process_time(),
        )

    async def registry_id(self) -> str:
        """The cluster's identity."""
        found = await self.plane.request("GET", "/api/v1/namespaces/kube-system")
        return str(found["metadata"]["uid"])

    async def gateway_pin(self) -> bytes:
        """The pin of the gateway's key."""
        secret = await self.plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/scope-gateway")
        return read_base64url(json.loads(base64.b64decode(secret["data"]["admin.json"]))["pin"])

    def client(self, *, url: str | None = None) -> KubeClient:
        """A connection of an agent's own."""
        return KubeClient(TokenAccess(self.plane, url or self.plane.url, self.agent_token))

    async def apply_meshes(self) -> None:
        """`kubectl apply` of both meshes."""
        items = [mesh(name, prefix) for name, prefix in MESHES.items()]
        await self.plane.kubectl("apply", "-f", "-", document=json_list(items))

    async def await_addressed(self) -> None:
        """Return when every Node's peer has an address."""
        fleet = self.fleet
        await self.until(lambda: len(fleet.addressed) == len(fleet.nodes), "every peer has an address")

    async def until(self, done: Callable[[], bool], what: str) -> None:
        """Return once it is so. Raises BenchError, KubeLabError (the operator ended), what an agent met."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            self.fleet.check()
            self.operator.check()
            if time.monotonic() > deadline:
                raise BenchError(f"not within {PATIENCE_S:.0f} s: {what}")
            await asyncio.sleep(LOOK_S)

    async def settle(self) -> None:
        """Bring the meshes to rest: every peer addressed and online, with a report of full size."""
        await self.await_addressed()
        fleet = self.fleet
        await self.until(
            lambda: all(peer.report is not None for peer in fleet.peers.values()), "every agent has reported"
        )
        await fleet.report_links()
        # The operator lists Leases every 30 s.
        await self.until(lambda: len(fleet.online) == len(fleet.nodes), "every peer is online")
        await self.await_idle()

    async def await_steady(self) -> None:
        """Return when the operator has nothing to do now."""
        await self._await(self.operator.is_steady)

    async def await_idle(self) -> None:
        """Return when the operator has nothing to do, at a later time neither."""
        await self._await(self.operator.is_idle)

    async def _await(self, holds: Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not await holds():
            self.operator.check()
            if time.monotonic() > deadline:
                raise BenchError(f"the operator still has work after {PATIENCE_S:.0f} s")
            await asyncio.sleep(LOOK_S)

    async def add_node(self, name: str) -> None:
        """One Node more, of the first mesh."""
        await self.fleet.kubelets.ask("POST", "/api/v1/nodes", body=node(name, next(iter(MESHES))))


@asynccontextmanager
async def cluster(nodes: int) -> AsyncIterator[Cluster]:
    """A cluster with so many Nodes and a ready operator, and no mesh yet."""
    prepare_programs("scope_operator.kube.__main__, scope_operator.kube.process, kubernetes.aio")
    async with ControlPlane() as plane:
        await plane.apply(ROOT / "crds")
        for name in MANIFESTS:
            await plane.apply(ROOT / "charts" / "manifests" / f"{name}.yaml")
        operators, agents = [
            await plane.token(account, namespace=NAMESPACE) for account in ("scope-operator", "scope-agent")
        ]
        names = tuple(f"node-{number:05}" for number in range(nodes))
        with Meter(plane.url) as to_operator, Meter(plane.url) as to_agents:
            async with (
                KubeClient(TokenAccess(plane, plane.url)) as kubelets,
                KubeClient(TokenAccess(plane, plane.url, agents)) as watching,
                KubeClient(TokenAccess(plane, to_agents.url, agents)) as writing,
            ):
                meshes = tuple(MESHES)
                await _all(
                    kubelets.ask("POST", "/api/v1/nodes", body=node(name, meshes[number % len(meshes)]))
                    for number, name in enumerate(names)
                )
                operator = Operator(plane, token=operators, url=to_operator.url)
                seen, written = (KubeRegistry(each, namespace=NAMESPACE) for each in (watching, writing))
                fleet = Fleet(seen, written, kubelets, names)
                living = asyncio.create_task(fleet.run())
                try:
                    await operator.start()
                    yield Cluster(plane, operator, to_operator, to_agents, fleet, agents)
                finally:
                    operator.program.kill()
                    await end(living)


def mesh(name: str, prefix: str) -> dict[str, object]:
    """A ScopeMesh of the Nodes that are labelled with its name."""
    return {
        "apiVersion": "scope.ltgc.cc/v1alpha1",
        "kind": "ScopeMesh",
        "metadata": {"name": name},
        "spec": {"addressing": {"ipv4": prefix}, "nodeSelector": {"matchLabels": {"mesh": name}}},
    }


def node(name: str, mesh_name: str) -> dict[str, object]:
    """A Node with what makes a real one large: 6 KB."""
    images = [
        {
            "names": [f"registry.example/team/service-{number}@sha256:{number:064x}", f"service-{number}:1"],
            "sizeBytes": 100_000_000 + number,
        }
        for number in range(IMAGES)
    ]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "mesh": mesh_name}},
        "status": {"images": images, "conditions": node_conditions(time.time())},
    }


def node_conditions(wall: float) -> list[dict[str, object]]:
    """A Node's conditions as a kubelet writes them at that time."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall))
    kinds = ("MemoryPressure", "DiskPressure", "PIDPressure", "Ready")
    return [
        {
            "type": kind,
            "status": "True" if kind == "Ready" else "False",
            "reason": f"KubeletSays{kind}",
            "message": f"the kubelet says so of {kind}",
            "lastHeartbeatTime": moment,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        for kind in kinds
    ]


def signing_seed(name: str) -> Secret:
    """The private half of the key that the agent of that peer signs with."""
    return Secret(hashlib.sha256(f"signing {name}".encode()).digest())


def first_report(name: str) -> PeerReport:
    """What an agent reports at its start."""
    wireguard, probe = (
        PublicKey(hashlib.sha256(f"{use} {name}".encode()).digest()) for use in ("wireguard", "probe")
    )
    signing = Ed25519PrivateKey.from_private_bytes(signing_seed(name).raw).public_key().public_bytes_raw()
    number = int.from_bytes(wireguard.raw[:2], "big")
    own = Endpoint(IPv4Address("10.0.0.0") + number, 51820)
    seen = Endpoint(IPv4Address("203.0.113.0") + number % 256, 1024 + number % 60_000)
    return PeerReport(
        PeerKeys(wireguard, probe, PublicKey(signing)),
        endpoints=(Candidate(own, CandidateKind.HOST), Candidate(seen, CandidateKind.REFLEXIVE)),
        mapping=NatMapping.ENDPOINT_INDEPENDENT,
        device=DeviceKind.KERNEL,
    )


def json_list(items: Iterable[Mapping[str, object]]) -> str:
    """One document of several objects, for kubectl."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)})


def _is_steady(figures: Mapping[str, float]) -> bool:
    return bool(figures.get("scope_operator_leader")) and figures.get("scope_operator_queue_depth") == 0


async def _all(works: Iterable[Awaitable[object]]) -> None:
    """Do all of them, a bounded number at a time."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def do(work: Awaitable[object]) -> None:
        async with slots:
            await work

    async with asyncio.TaskGroup() as tasks:
        for work in works:
            tasks.create_task(do(work))


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
