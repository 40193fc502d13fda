"""What agents believe, and what the operator does, while the API server and the way to it misbehave.

An agent's side is the real one from the sockets to what it believes: the Kubernetes client, the adapter, the
following of its lists and watches, and the membership room. The operator is the program itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from kubelab import ControlPlane, FaultProxy
from scope_agent.membership import Membership

from scope.model import Kind, PublicKey
from scope.registry.follow import follow
from scope.registry.kube import registry as kube_registry
from scope.registry.kube.access import from_kubeconfig
from scope.registry.kube.client import KubeClient
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import Listed
from tests.kube.operator_fixture import Cluster, Replica, addresses, end, eventually, mesh, run
from tests.unit.registry_conformance import MESH, keys, peer

Make = Callable[..., ControlPlane]
Begin = Callable[[FaultProxy], None]

RECOVERY_S = 60.0  # from a fault's end until everything is as the API server has it; the machine may be busy
# A frozen watch is told from a quiet one by its missing bookmarks, which take a minute; here sooner.
SILENCE_S = 3.0
OWN, COUNT = 0, 12
AGENT_WATCHES, OPERATOR_WATCHES = 2, 3  # of meshes and peers, and of Nodes
NAMESPACE = "default"


def key(seed: int) -> PublicKey:
    return keys(seed).wireguard


def everyone(*, without: tuple[int, ...] = ()) -> frozenset[PublicKey]:
    """The keys of the agent's peers, as they are at first."""
    return frozenset(key(seed) for seed in range(1, COUNT + 1) if seed not in without)


class View:
    """What one agent believes, and every set of peers that it ever believed since it knew all."""

    def __init__(self, registry: KubeRegistry) -> None:
        self.registry = registry
        self.membership = Membership(
            own=key(OWN), mesh=MESH.meta.name, registry_key=None, now=time.monotonic()
        )
        self.lists = 0  # of peers
        self.history: list[frozenset[PublicKey]] = []

    @property
    def peers(self) -> frozenset[PublicKey]:
        return frozenset(self.membership.snapshot().peers)

    async def follow(self, kind: Kind) -> None:
        """Hear of a kind without end."""
        async for fact in follow(self.registry, kind, sleep=asyncio.sleep, uniform=random.uniform):
            self.membership.receive(fact, time.monotonic())
            self.lists += isinstance(fact, Listed) and kind is Kind.PEER
            if self.history or self.peers == everyone():
                self.history.append(self.peers)

    async def until(self, wanted: frozenset[PublicKey]) -> float:
        """Return when exactly these are believed: the seconds it took."""
        began = time.monotonic()

        async def there() -> bool:
            return self.peers == wanted

        await eventually(there, within=60.0)
        return time.monotonic() - began

    def never_lost(self, kept: frozenset[PublicKey]) -> bool:
        """Whether these were believed all the time."""
        return bool(self.history) and all(kept <= seen for seen in self.history)


@asynccontextmanager
async def registry(kubeconfig: Path, *, silence: float = SILENCE_S) -> AsyncIterator[KubeRegistry]:
    async with KubeClient(await from_kubeconfig(kubeconfig), silence=silence) as client:
        yield KubeRegistry(client, namespace=NAMESPACE)


@asynccontextmanager
async def viewed(kubeconfig: Path) -> AsyncIterator[View]:
    """An agent's view by that way to the API server, once it knows everybody."""
    async with registry(kubeconfig) as reached:
        view = View(reached)
        following = [asyncio.create_task(view.follow(kind)) for kind in (Kind.MESH, Kind.PEER)]
        try:
            await view.until(everyone())
            yield view
            for task in following:
                assert not task.done(), "following ended"
        finally:
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)


@asynccontextmanager
async def populated(plane: ControlPlane) -> AsyncIterator[KubeRegistry]:
    """A mesh of the agent itself and its COUNT peers; what is given writes past every fault."""
    async with registry(plane.kubeconfig(), silence=90.0) as direct:
        await direct.create(MESH)
        for seed in range(COUNT + 1):
            await direct.create(peer(seed))
        yield direct


async def remove(direct: KubeRegistry, seed: int) -> None:
    name = peer(seed).meta.name
    stored = await direct.get(Kind.PEER, name)
    await direct.delete(Kind.PEER, name, uid=stored.meta.uid)


def slow(proxy: FaultProxy) -> None:
    proxy.delay_s = 2.0
    proxy.cut_watches()


def refusing(status: int, *, share: float = 1.0) -> Begin:
    def begin(proxy: FaultProxy) -> None:
        proxy.answer(status, share=share, retry_after_s=1 if status == 429 else None)
        proxy.cut_watches()

    return begin


def frozen_for_new_ones_too(proxy: FaultProxy) -> None:
    proxy.freeze_watches()


def frozen(proxy: FaultProxy) -> None:
    proxy.freeze_watches(new_ones=False)


# What begins, and how many requests of a client it is to hit before it ends.
FAULTS: dict[str, tuple[Begin, int]] = {
    "two seconds a request": (slow, 1),
    "429 to all": (refusing(429), 3),
    "429 to half": (refusing(429, share=0.5), 3),
    "500 to all": (refusing(500), 3),
    "500 to half": (refusing(500, share=0.5), 3),
    "watches cut": (FaultProxy.cut_watches, 1),
    "watches too old": (FaultProxy.expire_watches, 1),
    "watches frozen": (frozen, 0),
    "new watches frozen too": (frozen_for_new_ones_too, 2),
}


async def watched(proxy: FaultProxy, count: int) -> None:
    """Return when so many watches are open: a fault that comes before them would not meet them."""

    async def opened() -> bool:
        return proxy.open_watches >= count

    await eventually(opened)


async def hit(proxy: FaultProxy, *, since: int, count: int) -> None:
    """Return when so many requests have met the fault."""

    async def met() -> bool:
        return proxy.requests - since >= count

    await eventually(met, within=60.0)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_agent_is_in_step_soon_after_the_way_to_the_api_server_is_well_again(
    control_plane: ControlPlane, fault: str
) -> None:
    begin, count = FAULTS[fault]

    async def body() -> None:
        token = await control_plane.admin_token()
        async with (
            FaultProxy(control_plane) as proxy,
            populated(control_plane) as direct,
            viewed(control_plane.kubeconfig(token=token, url=proxy.url)) as view,
        ):
            await watched(proxy, AGENT_WATCHES)
            before = proxy.requests
            begin(proxy)
            await remove(direct, 1)
            await direct.create(peer(COUNT + 1))
            await hit(proxy, since=before, count=count)
            proxy.heal()
            took = await view.until(everyone(without=(1,)) | {key(COUNT + 1)})
            assert view.never_lost(everyone(without=(1,)))
        print(f"{fault}: in step {took:.1f} s after it was over")  # noqa: T201
        assert took < RECOVERY_S

    asyncio.run(body())


def test_an_agent_is_in_step_soon_after_the_api_server_was_killed_and_started(
    own_control_plane: Make,
) -> None:
    plane = own_control_plane()

    async def body() -> None:
        async with populated(plane) as direct, viewed(plane.kubeconfig()) as view:
            await remove(direct, 1)
            plane.api_server.kill()
            await plane.api_server.start()
            await direct.create(peer(COUNT + 1))
            took = await view.until(everyone(without=(1,)) | {key(COUNT + 1)})
            assert view.never_lost(everyone(without=(1,)))
        assert took < RECOVERY_S

    asyncio.run(body())


def test_an_agent_keeps_whom_a_restored_registry_has_forgotten(own_control_plane: Make) -> None:
    plane = own_control_plane()
    later = frozenset({key(COUNT + 1), key(COUNT + 2)})

    async def body() -> None:
        async with populated(plane) as direct, viewed(plane.kubeconfig()) as view:
            snapshot = await plane.snapshot()
            for seed in (COUNT + 1, COUNT + 2):
                await direct.create(peer(seed))
            await view.until(everyone() | later)
            known = view.lists
            await plane.restore(snapshot)
            await direct.create(peer(COUNT + 3))
            took = await view.until(everyone() | later | {key(COUNT + 3)})
            assert view.lists > known, "the restored registry was not listed"
            assert view.never_lost(everyone())
        assert took < RECOVERY_S

    asyncio.run(body())


@pytest.mark.parametrize("what", ["items", "pages"])
def test_an_agent_believes_no_list_that_lacks_many_until_a_second_one_says_so(
    control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(kube_registry, "PAGE", 5 if what == "pages" else 500)

    async def body() -> None:
        token = await control_plane.admin_token()
        async with (
            FaultProxy(control_plane) as proxy,
            populated(control_plane) as direct,
            viewed(control_plane.kubeconfig(token=token, url=proxy.url)) as view,
        ):
            await watched(proxy, AGENT_WATCHES)
            proxy.affects = "/scopepeers"
            proxy.truncate_lists(drop=0 if what == "pages" else 5, lose_pages=what == "pages")
            known = view.lists
            proxy.cut_watches()

            async def listed() -> bool:
                return view.lists > known

            await eventually(listed)
            assert proxy.truncated
            # What is watched from that list on is heard, and makes it no truer.
            await direct.create(peer(COUNT + 1))
            await view.until(everyone() | {key(COUNT + 1)})
            proxy.heal()
            proxy.cut_watches()
            await remove(direct, 1)
            await view.until(everyone(without=(1,)) | {key(COUNT + 1)})
            assert view.never_lost(everyone(without=(1,)))

    asyncio.run(body())


# The operator, but for its patience with watches.
IMPATIENT = (
    "-c",
    f"from scope_operator.kube import __main__, watching; watching.SILENCE_SECONDS = {SILENCE_S};"
    "__main__.main()",
)


@asynccontextmanager
async def operated_through(proxy: FaultProxy, east: Cluster) -> AsyncIterator[Replica]:
    """An operator by way of the proxy; it ends with the block, and must not end earlier."""
    kubeconfig = east.plane.kubeconfig(token=await east.plane.admin_token(), url=proxy.url)
    replica = await east.operator(f"--kubeconfig={kubeconfig}", program=IMPATIENT)
    try:
        yield replica
        assert replica.process.returncode is None
        assert "Traceback" not in replica.text
    finally:
        print(replica.text)  # noqa: T201 - pytest shows it where the test fails
        await end(replica.process)


def held_by(peers: Mapping[str, Mapping[str, Any]], *names: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Who each peer is, and its addresses."""
    return {name: (peers[name]["metadata"]["uid"], addresses(peers[name])) for name in names if name in peers}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_operator_is_in_step_soon_after_the_way_to_the_api_server_is_well_again(
    control_plane: ControlPlane, fault: str
) -> None:
    begin, count = FAULTS[fault]
    names = [f"home.east.n{number}" for number in range(6)]

    async def body(east: Cluster) -> None:
        for number in range(6):
            await east.plane.create_node(f"n{number}")
        await east.plane.apply(mesh())
        async with FaultProxy(east.plane) as proxy, operated_through(proxy, east):
            before = held_by(await east.addressed(*names), *names[1:])
            await watched(proxy, OPERATOR_WATCHES)
            met = proxy.requests
            begin(proxy)
            await east.plane.request("DELETE", "/api/v1/nodes/n0")
            await east.plane.create_node("late")
            await hit(proxy, since=met, count=count)
            assert held_by(await east.peers(), *names[1:]) == before
            proxy.heal()
            began = time.monotonic()
            after = await east.addressed(*names[1:], "home.east.late")
            took = time.monotonic() - began
            assert held_by(after, *names[1:]) == before
        print(f"{fault}: in step {took:.1f} s after it was over")  # noqa: T201
        assert took < RECOVERY_S

    run(control_plane, body)


@pytest.mark.parametrize("kind", ["nodes", "scopepeers"])
def test_an_operator_deletes_nobody_and_gives_no_address_twice_by_a_list_that_lacks_many(
    control_plane: ControlPlane, kind: str
) -> None:
    names = [f"home.east.n{number}" for number in range(7)]
    late = [f"home.east.late{number}" for number in range(4)]

    async def body(east: Cluster) -> None:
        for number in range(7):
            await east.plane.create_node(f"n{number}")
        # So few addresses that one which is thought to be free is soon given.
        await east.plane.apply(mesh(addressing={"ipv4": "100.64.0.0/28"}))
        async with FaultProxy(east.plane) as proxy, operated_through(proxy, east):
            before = held_by(await east.addressed(*names), *names)
            await watched(proxy, OPERATOR_WATCHES)
            proxy.affects = f"/{kind}"
            proxy.truncate_lists(drop=5)
            proxy.expire_watches()

            async def listed() -> bool:
                return proxy.truncated >= 2  # by the watch, and by the operator's own lists after it

            await eventually(listed)
            for number in range(4):
                await east.plane.create_node(f"late{number}")
            await eventually(lambda: whole(east, *names, *late))
            proxy.heal()
            proxy.expire_watches()
            await east.plane.create_node("last")

            async def distinct() -> bool:
                peers = await east.addressed(*names, *late, "home.east.last")
                given = [address for each in peers.values() for address in addresses(each)]
                return len(given) == len(set(given))

            await eventually(distinct, within=RECOVERY_S)
            assert held_by(await east.peers(), *names) == before

    run(control_plane, body)


async def whole(east: Cluster, *names: str) -> bool:
    peers = await east.peers()
    return all(name in peers and addresses(peers[name]) for name in names)
