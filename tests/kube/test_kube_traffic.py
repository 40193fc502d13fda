"""The traffic of two Nodes goes on while the API server misbehaves in every way that the fault proxy knows,
and while their agents are replaced.

Real agents, user-space WireGuard and packets, one Node behind a NAT; the agents reach the API server by way
of the proxy only.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from kubelab import ControlPlane, FaultProxy
from lab import Lab, Nat
from meshlab import PRIVATE, Flow, Pinger, Status

from tests.kube.test_faults import FAULTS
from tests.kube.test_kube_agent import (
    Cluster,
    Node,
    is_direct,
    join,
    knows_a_way,
    make_node,
    peer_name,
    start,
    until,
)

T = TypeVar("T")

ROUNDS = 10  # of a loop: a connection that was closed lets go of its socket in one of the next few
PINGS_S = 0.05  # twenty a second each way: a gap as short as one lost packet is seen


class Loop:
    """An event loop in a thread of its own, for what must run while the test waits."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of some work in that loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End it, and what still runs in it."""
        self.run(cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for _ in range(ROUNDS):
        await asyncio.sleep(0)


@contextmanager
def proxied(plane: ControlPlane) -> Iterator[tuple[FaultProxy, Loop]]:
    """A fault proxy beside the API server, and the loop that it runs in."""
    loop, proxy = Loop(), FaultProxy(plane)
    try:
        loop.run(proxy.__aenter__())
        try:
            yield proxy, loop
        finally:
            loop.run(proxy.__aexit__(None, None, None))
    finally:
        loop.close()


def lost(cluster: Cluster, flows: list[Flow]) -> int:
    """How many pings since the flows were restarted have had no answer; no more are sent."""
    for flow in flows:
        cluster.pinger.stop(flow)
    with_patience = partial(all_answered, flows)
    try:
        until(with_patience, within_s=120.0, missing=lambda: "")
    except AssertionError:
        return sum(flow.sent - flow.answered for flow in flows)
    return 0


def all_answered(flows: list[Flow]) -> bool:
    return all(flow.sent == flow.answered for flow in flows)


def is_connected_to(status: Status, name: str) -> bool:
    """Whether an agent hears the API server, and reaches a peer directly."""
    return status.connected and is_direct(status, name)


def await_connected(cluster: Cluster) -> None:
    """Return when both agents hear the API server again."""
    for node in cluster.nodes:
        cluster.await_status("home", node, lambda status: status.connected)


def test_no_packet_is_lost_while_the_api_server_fails_and_is_restored_and_agents_are_replaced() -> None:
    with Lab(delay_ms=5, private=PRIVATE) as lab, Pinger(calm_s=PINGS_S, eager_s=PINGS_S) as pinger:
        api = lab.server("api")
        plane = ControlPlane(host=api)
        try:
            asyncio.run(start(plane))
            with proxied(plane) as (proxy, loop):
                machines = [
                    lab.site("open", nat=Nat.NONE).machine("t-open"),
                    lab.site("nat", nat=Nat.PORT_RESTRICTED).machine("t-nat"),
                ]
                nodes = [
                    Node(each, asyncio.run(make_node(plane, each.name)), plane, api_server=proxy.url)
                    for each in machines
                ]
                try:
                    story(Cluster(plane, api, nodes, pinger), proxy, loop)
                finally:  # before the proxy, which they would still ask
                    for node in nodes:
                        if node.agent is not None:
                            node.kill()
                    until(lambda: not proxy.open_watches, within_s=120.0, missing=lambda: "watches of nobody")
        finally:
            plane.close(keep_logs=False)


def story(cluster: Cluster, proxy: FaultProxy, loop: Loop) -> None:
    """The faults one after the other, while pings go both ways."""
    plane = cluster.plane
    flows = join(cluster, "home", "100.80.0.0/16")
    cluster.await_direct("home")
    cluster.await_pings(flows)
    for node in cluster.nodes:
        known = node.state / "home" / "snapshot.json"
        until(partial(knows_a_way, known), within_s=120.0, missing=partial("no way in {}".format, known))
    before = {node.name: cluster.peer("home", node)["status"]["addresses"] for node in cluster.nodes}
    snapshot = asyncio.run(plane.snapshot())
    cluster.make_mesh("later", "100.81.0.0/16")  # what the restored etcd has forgotten
    for flow in flows:
        cluster.pinger.restart(flow)

    for fault, (begin, count) in FAULTS.items():
        met = proxy.requests

        def is_met(since: int = met, count: int = count) -> bool:
            return proxy.requests - since >= count

        loop.run(in_loop(begin, proxy))
        until(is_met, within_s=120.0, missing=partial("nobody met {}".format, fault))
        loop.run(in_loop(FaultProxy.heal, proxy))
    loop.run(in_loop(FaultProxy.cut_watches, proxy))  # frozen ones would be given up a minute later
    await_connected(cluster)

    proxy.affects = "/scopepeers"
    proxy.truncate_lists(drop=1)
    loop.run(in_loop(FaultProxy.cut_watches, proxy))
    until(lambda: proxy.truncated >= 2, within_s=120.0, missing=lambda: "no list lacked anybody")
    loop.run(in_loop(FaultProxy.heal, proxy))
    proxy.affects = ""
    loop.run(in_loop(FaultProxy.cut_watches, proxy))
    await_connected(cluster)

    plane.api_server.kill()
    asyncio.run(plane.api_server.start())
    await_connected(cluster)
    plane.api_server.kill()  # with watches open it would take its time to end
    asyncio.run(plane.restore(snapshot))
    asyncio.run(plane.start())
    await_connected(cluster)

    # An upgrade replaces one pod after the other, by what the new template says.
    for node, other in (cluster.nodes, cluster.nodes[::-1]):
        node.kill(signal.SIGTERM)
        node.run("--verbose")
        cluster.await_status("home", node, partial(is_connected_to, name=peer_name("home", other)))

    sent = sum(flow.sent for flow in flows)
    assert sent > 2 * 10 / PINGS_S, f"{sent} pings are too few to tell of ten seconds each way"
    assert lost(cluster, flows) == 0
    after = {node.name: cluster.peer("home", node)["status"]["addresses"] for node in cluster.nodes}
    assert after == before


async def in_loop(step: Any, proxy: FaultProxy) -> None:
    step(proxy)
