"""The agent of a Kubernetes Node over a memory registry: what it serves, as whom, and when it leaves."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network, ip_address
from pathlib import Path
from typing import Any

import pytest
from scope_agent import node as shell
from scope_agent.inputs import DiskState
from scope_agent.mesh_loop import Gateway as Courier
from scope_agent.mesh_loop import HttpModule, RemovedFromMesh
from scope_agent.node import KubeModule, NodeAgent, NodeConfig
from scope_agent.pods.cni import FILE, PLUGINS
from scope_agent.pods.shell.cni import CniDirectories
from scope_agent.run import upstream_of
from scope_agent.state import Enrolment, StateDir, make_identity
from scope_agent.wireguard.device import ApplyError

from scope.gateway_file import NAME, GatewayFile
from scope.model import (
    Addressing,
    Assignment,
    ConfigError,
    GatewayOrigin,
    Kind,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PostQuantum,
    PostQuantumMode,
    PublicKey,
    Resource,
    Revision,
    Snapshot,
    Tombstone,
)
from scope.registry.http import HttpRegistry
from scope.registry.kube.registry import KubeRegistry
from scope.registry.memory import MemoryRegistry
from scope.registry.port import AlreadyExists, Listed, PeerRemoved
from tests.unit.registry_conformance import created

TOMBSTONE = Tombstone("mesh", "peer", PublicKey(bytes(32)), PublicKey(bytes(32)), bytes(64))


class Cluster(MemoryRegistry):
    """A memory registry in an API server's place; `offset` moves its revisions, as a restore does."""

    def __init__(self) -> None:
        numbers = itertools.count(1)
        clock = itertools.count(1)
        super().__init__(
            "cluster",
            wall=lambda: float(next(clock)),
            now=lambda: 0.0,
            new_uid=lambda: f"uid-{next(numbers)}",
            new_signal=asyncio.Event,
        )
        self.offset = 0
        self.lists = self.gets = 0
        self.pods: list[str] = []

    async def get(self, kind: Kind, name: str) -> Resource:
        self.gets += 1
        return await super().get(kind, name)

    async def list(self, kind: Kind) -> Listed:
        self.lists += 1
        listed = await super().list(kind)
        return replace(listed, revision=replace(listed.revision, number=listed.revision.number + self.offset))

    def watch(self, kind: Kind, since: Revision) -> Any:
        return super().watch(kind, replace(since, number=since.number - self.offset))

    async def ask(self, method: str, path: str) -> dict[str, Any]:
        """The one Node that an agent asks for."""
        assert (method, path) == ("GET", "/api/v1/nodes/n1")
        return {"spec": {"podCIDRs": self.pods}}

    async def close(self) -> None:
        """End every watch."""
        self.close_watches()


class FakeRunner:
    """Runs until it is cancelled, or fails as it is told."""

    running: dict[str, Enrolment]
    ran: set[str]  # the meshes of all that ever were running
    upstreams: list[GatewayOrigin | None]
    failures: list[ConfigError]

    def __init__(self, config: Any, enrolment: Enrolment, *, connect: Callable[[], Awaitable[Any]]) -> None:
        self.upstreams.append(upstream_of(config, enrolment))
        self.enrolment = enrolment
        self.connect = connect

    async def run(self) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.running[self.enrolment.mesh] = self.enrolment
        self.ran.add(self.enrolment.mesh)
        try:
            await self.connect()
            await asyncio.Event().wait()
        finally:
            del self.running[self.enrolment.mesh]


class FakeDevice:
    deleted: list[str]

    def __init__(self, name: str, **_: object) -> None:
        self.name = name

    async def delete(self) -> None:
        self.deleted.append(self.name)

    async def close(self) -> None:
        pass


async def _open_fake(
    config: Any, enrolment: Enrolment, *, connect: Callable[[], Awaitable[Any]]
) -> FakeRunner:
    return FakeRunner(config, enrolment, connect=connect)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners and devices that are none, and times that a test can wait out."""
    FakeRunner.running, FakeRunner.failures, FakeDevice.deleted = {}, [], []
    FakeRunner.upstreams, FakeRunner.ran = [], set()
    monkeypatch.setattr(shell, "open_runner", _open_fake)
    monkeypatch.setattr(shell, "choose_device", FakeDevice)
    monkeypatch.setattr(shell, "SECOND_LIST_AFTER", 0.05)
    monkeypatch.setattr(shell, "RETRY", 0.02)
    monkeypatch.setattr(shell, "CNI_CHECK", 0.02)
    monkeypatch.setattr(shell, "RESTART", 0.02)


class World:
    """One Node's agent, running, and the registry that it follows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.registry = Cluster()
        self.cni: CniDirectories | None = None

    def state(self, mesh: str) -> StateDir:
        """What the agent keeps of a mesh."""
        return StateDir(mesh, self.root / "state")

    async def peer(self, mesh: str, *, node: str = "n1", cluster: str = "here") -> Peer:
        """What an operator makes, where there is a mesh."""
        with suppress(AlreadyExists):
            await self.registry.create(Mesh(Meta(mesh), MeshSpec(Addressing(IPv4Network("10.9.0.0/16")))))
        spec = PeerSpec(mesh=mesh, cluster=cluster, node_name=node, node_uid=f"uid-of-{node}")
        return await created(self.registry, Peer(Meta(f"{mesh}.{cluster}.{node}"), spec))

    async def assign(self, peer: Peer, assignment: Assignment) -> None:
        """What an operator writes."""
        await self.registry.update_status(Kind.PEER, peer.meta.name, assignment, uid=peer.meta.uid)

    async def report_of(self, name: str) -> PeerReport:
        """What the agent published."""
        peer = await self.registry.get(Kind.PEER, name)
        assert isinstance(peer, Peer)
        assert peer.report is not None
        return peer.report

    def enrol(self, mesh: str, *, url: str = "", held: str = "") -> Enrolment:
        """Leave a machine's state as an earlier agent did."""
        enrolment = Enrolment(
            mesh=mesh,
            device="scope0",
            identity=make_identity(bytes),
            url=url,
            pin=None,
            registry_id="",
            registry_key=None,
            peer_name=f"{mesh}.here.n1",
            peer_uid="uid-before",
        )
        state = self.state(mesh)
        state.prepare()
        state.save_enrolment(enrolment)
        if held:
            own = Peer(
                Meta(enrolment.peer_name),
                PeerSpec(mesh),
                PeerReport(enrolment.identity.public),
                Assignment((IPv4Interface(held),)),
            )
            state.save(DiskState(Snapshot(own=own), listen_port=20000))
        return enrolment

    def new_agent(self, *, gateway: Path | None = None, upstream: GatewayOrigin | None = None) -> NodeAgent:
        """Its agent."""
        config = NodeConfig(
            node="n1",
            cluster="here",
            namespace="scope-system",
            state_root=self.root / "state",
            run_dir=self.root / "run",
            api_server="https://192.0.2.1",
            service_account=self.root,
            gateway=gateway,
            upstream=upstream,
            cni=self.cni,
        )
        return NodeAgent(config)

    @asynccontextmanager
    async def agent(
        self, *, gateway: Path | None = None, upstream: GatewayOrigin | None = None
    ) -> AsyncIterator[NodeAgent]:
        """Its agent, from start to stop."""
        agent = self.new_agent(gateway=gateway, upstream=upstream)
        running = asyncio.ensure_future(agent.run())
        try:
            yield agent
        finally:
            agent.stop()
            await running


def stands_for(value: object) -> Callable[..., Any]:
    """What makes `value`, whatever it is asked for."""
    return lambda *_, **__: value


def on(root: Path, monkeypatch: pytest.MonkeyPatch, body: Callable[[World], Awaitable[None]]) -> None:
    """Run `body` in a world of its own."""
    world = World(root)
    module = KubeModule(
        in_cluster=stands_for(None),
        KubeClient=stands_for(world.registry),
        Leases=stands_for(None),
        KubeRegistry=stands_for(world.registry),
    )
    monkeypatch.setattr(shell, "_import_kube", lambda: module)

    async def run() -> None:
        async with asyncio.timeout(60):
            await body(world)

    asyncio.run(run())


async def until(done: Callable[[], bool]) -> None:
    """Return once it is so."""
    while not done():  # noqa: ASYNC110 - files and fakes have no event
        await asyncio.sleep(0.002)


def test_a_node_serves_each_mesh_that_has_a_peer_for_it_with_keys_and_a_device_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            await world.peer("work")
            await until(lambda: "work" in FakeRunner.running)
            home, work = FakeRunner.running["home"], FakeRunner.running["work"]
            assert [home.device, work.device] == ["scope0", "scope1"]
            assert home.identity.public != work.identity.public
            assert (await world.report_of("home.here.n1")).keys == home.identity.public
            assert (await world.report_of("work.here.n1")).keys == work.identity.public
            assert world.state("home").load_enrolment() == home
        assert FakeRunner.running == {}

    on(tmp_path, monkeypatch, body)


def test_on_an_existing_interface_a_node_is_known_by_the_key_that_it_has_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"wg0": PublicKey(bytes([3] * 32))}

    async def device_key(interface: str, _: Path) -> PublicKey:
        return keys[interface]

    monkeypatch.setattr(shell, "device_key", device_key)

    async def body(world: World) -> None:
        policy = PostQuantum(PostQuantumMode.PREFERRED)
        spec = MeshSpec(Addressing(), existing_interface="wg0", post_quantum=policy)
        await world.registry.create(Mesh(Meta("home"), spec))
        peer = await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            before = FakeRunner.running["home"]
            assert before.is_foreign and before.device == "wg0"
            published = (await world.report_of(peer.meta.name)).keys
            assert published == before.identity.public and published.wireguard == keys["wg0"]
        keys["wg0"] = PublicKey(bytes([5] * 32))  # its manager made it anew
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            await until_holds(lambda: world.report_of(peer.meta.name), keys["wg0"])

    on(tmp_path, monkeypatch, body)


def test_an_existing_interface_stays_up_when_its_mesh_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def device_key(_: str, __: Path) -> PublicKey:
        return PublicKey(bytes([3] * 32))

    monkeypatch.setattr(shell, "device_key", device_key)

    async def body(world: World) -> None:
        policy = PostQuantum(PostQuantumMode.PREFERRED)
        spec = MeshSpec(Addressing(), existing_interface="wg0", post_quantum=policy)
        await world.registry.create(Mesh(Meta("home"), spec))
        peer = await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            await world.registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
            await until(lambda: not world.state("home").is_enrolled())
        assert FakeDevice.deleted == []

    on(tmp_path, monkeypatch, body)


async def until_holds(report: Callable[[], Awaitable[PeerReport]], key: PublicKey) -> None:
    """Wait until a report names the WireGuard key."""
    async with asyncio.timeout(60.0):
        while (await report()).keys.wireguard != key:  # noqa: ASYNC110 - a registry has no event for it
            await asyncio.sleep(0.01)


def test_as_a_hub_a_node_leads_to_the_gateway_that_its_agent_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        await world.peer("home")
        gateway = GatewayOrigin("https://gateway:7443", bytes(32))
        async with world.agent(upstream=gateway):
            await until(lambda: "home" in FakeRunner.running)
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
        assert FakeRunner.upstreams == [gateway, None]

    on(tmp_path, monkeypatch, body)


def test_a_node_of_the_same_name_in_another_cluster_is_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        other = await world.peer("home", cluster="there")
        async with world.agent():
            await world.peer("work")
            await until(lambda: "work" in FakeRunner.running)
            assert set(FakeRunner.running) == {"work"}
            stored = await world.registry.get(Kind.PEER, other.meta.name)
            assert isinstance(stored, Peer)
            assert stored.report is None

    on(tmp_path, monkeypatch, body)


def test_a_mesh_on_disk_is_served_before_the_registry_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        enrolment = world.enrol("home")
        gate = asyncio.Event()
        heard = world.registry.list

        async def unheard(kind: Kind) -> Listed:
            await gate.wait()
            return await heard(kind)

        monkeypatch.setattr(world.registry, "list", unheard)
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            assert FakeRunner.running["home"] == enrolment
            gate.set()

    on(tmp_path, monkeypatch, body)


def test_a_peer_that_was_made_anew_gets_the_keys_and_addresses_that_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        before = world.enrol("home", held="10.9.0.7/16")
        peer = await world.peer("home")
        async with world.agent():
            await until(lambda: world.state("home").load_enrolment().peer_uid == peer.meta.uid)
            report = await world.report_of(peer.meta.name)
            assert report.keys == before.identity.public
            assert report.held_addresses == (ip_address("10.9.0.7"),)

    on(tmp_path, monkeypatch, body)


async def tell_to_leave(world: World, name: str, *, leaving: bool = True) -> None:
    """What `scope-operator --leave` writes, and what the next operator takes away."""
    peer = await world.registry.get(Kind.PEER, name)
    assert isinstance(peer, Peer)
    await world.registry.update(replace(peer, spec=replace(peer.spec, leaving=leaving)))


async def until_left(world: World, name: str) -> None:
    """Return once a ScopePeer says that its agent has left."""
    while not (await world.report_of(name)).left:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.002)


def test_a_peer_that_is_told_to_leave_is_taken_down_and_says_so_and_comes_back_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        home = (await world.peer("home")).meta.name
        await world.peer("work")
        async with world.agent():
            await until(lambda: {"home", "work"} <= FakeRunner.running.keys())
            before = FakeRunner.running["home"]
            await tell_to_leave(world, home)
            await until_left(world, home)
            assert FakeDevice.deleted == [before.device]
            assert not world.state("home").is_enrolled()
            assert set(FakeRunner.running) == {"work"}
            await tell_to_leave(world, home, leaving=False)
            await until(lambda: "home" in FakeRunner.running)
            report = await world.report_of(home)
            assert (report.left, report.keys) == (False, FakeRunner.running["home"].identity.public)
            assert report.keys != before.identity.public

    on(tmp_path, monkeypatch, body)


def test_an_agent_that_was_killed_before_it_could_say_that_it_left_says_so_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        home = await world.peer("home")
        await world.registry.update_status(
            Kind.PEER, home.meta.name, PeerReport(make_identity(bytes).public), uid=home.meta.uid
        )
        await tell_to_leave(world, home.meta.name)
        async with world.agent():
            await until_left(world, home.meta.name)
        assert FakeRunner.ran == set()

    on(tmp_path, monkeypatch, body)


def test_a_node_gives_its_pods_their_network_before_it_is_a_peer_and_until_every_mesh_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = tmp_path / "bin"
    plugins.mkdir()
    for name in PLUGINS:
        (plugins / name).touch()
    file = tmp_path / FILE

    async def body(world: World) -> None:
        world.cni = CniDirectories(tmp_path, plugins)
        async with world.agent() as agent:
            await until(lambda: "--allocate-node-cidrs" in agent.unplugged)
            assert not file.exists()
            world.registry.pods.append("10.244.1.0/24")
            await until(file.exists)
            await until(lambda: not agent.unplugged)
            assert "10.244.1.0/24" in file.read_text()
            home, work = [(await world.peer(mesh)).meta.name for mesh in ("home", "work")]
            await until(lambda: {"home", "work"} <= FakeRunner.running.keys())
            await tell_to_leave(world, home)
            await until_left(world, home)
            assert file.exists()
            await tell_to_leave(world, work)
            await until_left(world, work)
            assert not file.exists()
            await tell_to_leave(world, home, leaving=False)
            await until(file.exists)

    on(tmp_path, monkeypatch, body)


def test_a_node_on_which_something_stays_does_not_say_that_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(_: FakeDevice) -> None:
        raise ApplyError("the device is busy")

    monkeypatch.setattr(FakeDevice, "delete", refuse)

    async def body(world: World) -> None:
        home = (await world.peer("home")).meta.name
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            await tell_to_leave(world, home)
            await until(lambda: "mesh.device_stays" in caplog.text)
            await until(lambda: not world.state("home").is_enrolled())
        assert not (await world.report_of(home)).left

    on(tmp_path, monkeypatch, body)


def test_a_mesh_is_left_when_two_lists_lack_its_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        home = await world.peer("home")
        await world.peer("work")
        async with world.agent():
            await until(lambda: len(FakeRunner.running) == 2)
            await world.registry.delete(Kind.PEER, home.meta.name, uid=home.meta.uid)
            await until(lambda: not world.state("home").is_enrolled())
            assert len(FakeDevice.deleted) == 1
            assert set(FakeRunner.running) == {"work"}
            assert not world.state("home").path.exists()

    on(tmp_path, monkeypatch, body)


@pytest.mark.parametrize("looks", [(0.0,), (0.0, 0.05, 0.05)], ids=["deleted first", "deleted last"])
def test_a_deleted_mesh_is_left_without_waiting_for_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: tuple[float, ...]
) -> None:
    monkeypatch.setattr(shell, "SECOND_LIST_AFTER", 3600.0)
    monkeypatch.setattr(shell, "MESH_LOOKS", looks)

    async def body(world: World) -> None:
        home = await world.peer("home")
        await world.peer("work")
        async with world.agent():
            await until(lambda: len(FakeRunner.running) == 2)
            mesh = await world.registry.get(Kind.MESH, "home")
            if len(looks) == 1:
                await world.registry.delete(Kind.MESH, "home", uid=mesh.meta.uid)
            await world.registry.delete(Kind.PEER, home.meta.name, uid=home.meta.uid)
            if len(looks) > 1:
                await asyncio.sleep(0)
                await world.registry.delete(Kind.MESH, "home", uid=mesh.meta.uid)
            await until(lambda: not world.state("home").is_enrolled())
            assert set(FakeRunner.running) == {"work"}

    on(tmp_path, monkeypatch, body)


def test_a_deleted_peer_of_a_mesh_that_stands_waits_for_two_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "SECOND_LIST_AFTER", 3600.0)
    monkeypatch.setattr(shell, "MESH_LOOKS", (0.0, 0.01, 0.01))

    async def body(world: World) -> None:
        home = await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            gets = world.registry.gets
            await world.registry.delete(Kind.PEER, home.meta.name, uid=home.meta.uid)
            await until(lambda: world.registry.gets >= gets + 3)
            await asyncio.sleep(0)
            assert "home" in FakeRunner.running
            assert world.state("home").is_enrolled()

    on(tmp_path, monkeypatch, body)


def test_a_peer_that_comes_back_in_time_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(world: World) -> None:
        home = await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            enrolment = FakeRunner.running["home"]
            await world.registry.delete(Kind.PEER, home.meta.name, uid=home.meta.uid)
            again = await world.peer("home")
            await until(lambda: world.state("home").load_enrolment().peer_uid == again.meta.uid)
            lists = world.registry.lists
            await asyncio.sleep(0.2)
            assert world.registry.lists == lists
            assert FakeRunner.running["home"] == enrolment
            assert (await world.report_of(again.meta.name)).keys == enrolment.identity.public

    on(tmp_path, monkeypatch, body)


def test_a_mesh_is_not_left_for_what_a_restored_registry_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        home = await world.peer("home")
        world.registry.offset = 1000
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            world.registry.offset = 0
            await world.registry.delete(Kind.PEER, home.meta.name, uid=home.meta.uid)
            lists = world.registry.lists
            await until(lambda: world.registry.lists > lists + 5)
            assert "home" in FakeRunner.running
            assert world.state("home").is_enrolled()

    on(tmp_path, monkeypatch, body)


def test_a_mesh_that_no_list_since_the_start_held_is_not_left_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        world.enrol("home")
        async with world.agent():
            await until(lambda: world.registry.lists > 5)
            assert "home" in FakeRunner.running
            assert world.state("home").is_enrolled()

    on(tmp_path, monkeypatch, body)


def test_a_peer_that_was_removed_is_left_and_a_new_one_gets_new_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        home = await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
            before = FakeRunner.running["home"].identity.public
            await world.assign(home, Assignment(tombstone=TOMBSTONE))
            await until(lambda: not world.state("home").is_enrolled())
            removed = await world.registry.get(Kind.PEER, home.meta.name)
            await world.registry.delete(Kind.PEER, home.meta.name, uid=removed.meta.uid)
            again = await world.peer("home")
            await until(lambda: "home" in FakeRunner.running)
            assert (await world.report_of(again.meta.name)).keys != before

    on(tmp_path, monkeypatch, body)


def test_a_runner_that_stops_is_started_again_unless_its_peer_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: World) -> None:
        FakeRunner.failures = [ConfigError("the disk is full")]
        await world.peer("home")
        async with world.agent():
            await until(lambda: "home" in FakeRunner.running)
        FakeRunner.failures = [RemovedFromMesh("removed")]
        async with world.agent():
            await until(lambda: not FakeRunner.failures)
            await asyncio.sleep(0.1)
            assert FakeRunner.running == {}

    on(tmp_path, monkeypatch, body)


def test_a_mesh_that_was_joined_through_a_gateway_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(world: World) -> None:
        before = world.enrol("home", url="https://192.0.2.9:7443")
        peer = await world.peer("home")
        async with world.agent():
            await until(lambda: "makes room for the Node's own peer" in caplog.text)
            assert world.state("home").load_enrolment() == before
            stored = await world.registry.get(Kind.PEER, peer.meta.name)
            assert isinstance(stored, Peer)
            assert stored.report is None

    on(tmp_path, monkeypatch, body)


def test_what_a_person_must_mend_ends_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> Any:
        raise ConfigError("KUBERNETES_SERVICE_HOST is not set")

    async def body(world: World) -> None:
        module = shell._import_kube()
        monkeypatch.setattr(shell, "_import_kube", lambda: replace(module, in_cluster=refuse))
        with pytest.raises(ConfigError, match="KUBERNETES_SERVICE_HOST"):
            await world.new_agent().run()

    on(tmp_path, monkeypatch, body)


def test_importing_the_agent_of_a_node_loads_no_client() -> None:
    late = ["aiohttp", "kubernetes", "prometheus_client", "scope.registry.http"]
    code = f"import sys, scope_agent.node; print([name for name in {late!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- where the registry is elsewhere ------------------------------------------------------------------------

GATEWAY = GatewayFile("https://east:7443", None, "home", PublicKey(bytes([7]) * 32))


class Gateway(Cluster):
    """A gateway: one ScopePeer is asked for; `removed` is what it says of one that was removed on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.removed = False
        self.asked = 0

    async def get(self, kind: Kind, name: str) -> Resource:
        self.asked += 1
        if self.removed:
            raise PeerRemoved("it was removed")
        return await super().get(kind, name)


class Joined(World):
    """A Node whose cluster joined a mesh elsewhere, and what its kubelet brought."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.registry: Gateway = Gateway()
        self.mounted = root / "gateway"
        self.mounted.mkdir()

    def mount(self, gateway: GatewayFile = GATEWAY) -> None:
        """Bring the file."""
        (self.mounted / NAME).write_text(gateway.format())

    async def asked(self, times: int) -> None:
        """Return once the gateway was asked so often from now on."""
        before = self.registry.asked
        await until(lambda: self.registry.asked >= before + times)


def joined(root: Path, monkeypatch: pytest.MonkeyPatch, body: Callable[[Joined], Awaitable[None]]) -> None:
    """Run `body` in a joined cluster, whose own API server nobody can ask."""
    world = Joined(root)
    module = HttpModule(stands_for(world.registry), stands_for(None), stands_for(None))
    monkeypatch.setattr(shell, "import_http", lambda: module)
    monkeypatch.setattr(shell, "ASK_AGAIN", 0.01)

    async def run() -> None:
        async with asyncio.timeout(60):
            await body(world)

    asyncio.run(run())


def test_a_gateway_brings_datagrams_and_an_api_server_does_not() -> None:
    assert isinstance(HttpRegistry(GATEWAY.url, pin=None, credential=None), Courier)
    assert not issubclass(KubeRegistry, Courier)


def test_a_node_of_a_joined_cluster_waits_for_its_gateway_and_its_peer_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def body(world: Joined) -> None:
        async with world.agent(gateway=world.mounted):
            await until(lambda: "node.no_gateway" in caplog.text)
            world.mount()
            await world.asked(3)
            assert caplog.text.count("node.no_peer") == 1
            peer = await world.peer("home")
            await until(lambda: "home" in FakeRunner.running)
            assert FakeRunner.running["home"].registry_key == GATEWAY.registry_key
            assert FakeRunner.running["home"].peer_uid == peer.meta.uid
            keys = (await world.report_of(peer.meta.name)).keys
            assert keys == FakeRunner.running["home"].identity.public

    joined(tmp_path, monkeypatch, body)


def test_a_gateway_that_knows_no_peer_any_more_is_believed_late_and_one_that_says_removed_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: Joined) -> None:
        world.mount()
        peer = await world.peer("home")
        async with world.agent(gateway=world.mounted):
            await until(lambda: "home" in FakeRunner.running)
            await world.registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
            await world.asked(1)
            await asyncio.sleep(2 * shell.SECOND_LIST_AFTER)
            await world.asked(2)
            assert "home" in FakeRunner.running
            world.registry.removed = True
            await until(lambda: not world.state("home").is_enrolled())
            assert FakeDevice.deleted == ["scope0"]

    joined(tmp_path, monkeypatch, body)


def test_a_mesh_that_the_gateway_does_not_serve_is_left_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "RESTORE_PATIENCE", 0.05)

    async def body(world: Joined) -> None:
        world.mount()
        world.enrol("before")
        await world.peer("home")
        async with world.agent(gateway=world.mounted):
            await until(lambda: FakeRunner.running.keys() == {"home"} and "before" in FakeRunner.ran)

    joined(tmp_path, monkeypatch, body)


def test_a_peer_that_was_made_anew_is_run_although_the_one_before_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: Joined) -> None:
        world.mount()
        FakeRunner.failures.append(RemovedFromMesh("it was"))
        await world.peer("home")
        async with world.agent(gateway=world.mounted):
            await until(lambda: not FakeRunner.failures and "home" in FakeRunner.running)

    joined(tmp_path, monkeypatch, body)


def test_an_agent_ends_when_another_gateway_is_named_so_that_it_starts_with_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(world: Joined) -> None:
        world.mount()
        agent = world.new_agent(gateway=world.mounted)
        running = asyncio.ensure_future(agent.run())
        await world.asked(1)
        world.mount(replace(GATEWAY, url="https://elsewhere:7443"))
        await running

    joined(tmp_path, monkeypatch, body)
