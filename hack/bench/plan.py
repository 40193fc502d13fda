"""How the registry side plans among many peers, without an API server: one change, and what a peer weighs.

The operator's planner is given Nodes, a mesh and a ScopePeer for each Node, read from documents as an API
server sends them, and every write that it asks for is done at once. A change is an agent's new endpoint. They
are far enough apart for the mesh's counts, which are over all peers, to be due at each: the most that one
change costs. Times are of the processor, so that they hold on a busy machine.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import TypeVar

from scope_operator.plan.nodes import Node, NodePeers, NodesListed
from scope_operator.plan.planner import MESH_INTERVAL, Action, Planner, WriteAssignment, WriteMeshStatus

from bench.agents import BenchError
from bench.kube_cluster import CLUSTER, LINKS, SIZES, first_report
from bench.result import Benchmark, Row, Sample, Target
from scope import resources
from scope.model import (
    Addressing,
    Candidate,
    CandidateKind,
    Endpoint,
    Kind,
    LabelSelector,
    Link,
    Mesh,
    MeshSpec,
    Meta,
    PathKind,
    Peer,
    PeerSpec,
    Resource,
    Revision,
)
from scope.names import peer_name
from scope.registry.port import Listed, Put

LARGEST = 10_000
MESH = "plan"
PREFIX = IPv4Network("10.0.0.0/8")
CHANGES = 200
WALL = 1_800_000_000.0
KIB = 1024.0
R = TypeVar("R", Mesh, Peer)


def _plan(attempts: int) -> Iterator[Sample | Row]:
    for size in (*SIZES, LARGEST):
        memory = _memory(size)
        registry = _Registry(size)
        began = time.thread_time()
        registry.settle()
        entered = time.thread_time() - began
        samples = [registry.change(number) for number in range(attempts)]
        yield {
            "peers": size,
            "one change, median, ms": statistics.median(samples),
            "one change, p99, ms": Target().quantile(samples, 0.99),
            "all of them at a start, ms for each": 1e3 * entered / size,
            "memory for each peer, KiB": memory / size / KIB,
        }
        if size == LARGEST:
            yield from samples


def _memory(size: int) -> int:
    """Bytes that a planner holds, with what it was told."""
    gc.collect()
    tracemalloc.start()
    try:
        registry = _Registry(size)
        registry.settle()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


class _Registry:
    """A planner, and a registry that does at once what it asks for."""

    def __init__(self, size: int) -> None:
        self._revision = itertools.count(1)
        self._now = 1_000.0
        self._nodes = [Node(f"node-{number:05}", f"uid-{number}", {"mesh": MESH}) for number in range(size)]
        self._planner = Planner(
            now=0.0, tells_liveness=True, nodes=NodePeers(cluster=CLUSTER, uid="uid-of-kube-system")
        )
        spec = MeshSpec(Addressing(PREFIX), node_selector=LabelSelector((("mesh", MESH),)))
        made = Mesh(Meta(MESH, uid="uid-of-mesh"), spec)
        names = [peer_name(MESH, CLUSTER, node.name) for node in self._nodes]
        peers = [self._stored(_peer(node, names)) for node in self._nodes]
        revision = Revision("registry", next(self._revision))
        self._planner.take(Listed(Kind.MESH, revision, (self._stored(made),)))
        self._planner.take(Listed(Kind.PEER, revision, tuple(peers)))
        self._planner.take(NodesListed(tuple(self._nodes), revision.number, asked_at=0.0))
        self._planner.hear(dict.fromkeys(names, 0.0), now=self._now)
        self.peers: dict[str, Peer] = {}

    def settle(self) -> None:
        """Plan until there is nothing to do."""
        while actions := self._planner.plan(now=self._now, wall=WALL):
            for action in actions:
                self._planner.succeeded(action, self._done(action))

    def change(self, number: int) -> float:
        """One agent's endpoint changes: the milliseconds until nothing is left to be planned."""
        self._now += MESH_INTERVAL + 1.0
        peer = self.peers[peer_name(MESH, CLUSTER, self._nodes[number * 7919 % len(self._nodes)].name)]
        if peer.report is None:
            raise BenchError(f"{peer.meta.name} has no report")
        moved = Candidate(Endpoint(IPv4Address("198.18.0.0") + number, 51820), CandidateKind.REFLEXIVE)
        changed = self._stored(replace(peer, report=replace(peer.report, endpoints=(moved,), direct=number)))
        fact = Put(changed, Revision("registry", changed.meta.revision))
        began = time.thread_time()
        self._planner.take(fact)
        self.settle()
        return 1e3 * (time.thread_time() - began)

    def _done(self, action: Action) -> Resource:
        match action:
            case WriteAssignment(peer=peer, part=part):
                stored = replace(peer, assignment=part, meta=self._next(peer.meta))
                self.peers[stored.meta.name] = stored
                return stored
            case WriteMeshStatus(mesh=made, part=status):
                return replace(made, status=status, meta=self._next(made.meta))
            case _:
                raise BenchError(f"nothing was to be created or deleted, and yet: {type(action).__name__}")

    def _stored(self, resource: R) -> R:
        """The resource as it comes out of an API server: its texts are nobody else's."""
        document = resources.to_dict(replace(resource, meta=self._next(resource.meta)))
        stored = resources.parse(json.loads(json.dumps(document)))
        if not isinstance(stored, type(resource)):
            raise BenchError(f"a {type(resource).__name__} came back as {type(stored).__name__}")
        return stored

    def _next(self, meta: Meta) -> Meta:
        return replace(meta, revision=next(self._revision))


def _peer(node: Node, names: list[str]) -> Peer:
    """The ScopePeer of a Node whose agent has reported, with as many links as agents publish."""
    name = peer_name(MESH, CLUSTER, node.name)
    spec = PeerSpec(MESH, cluster=CLUSTER, node_name=node.name, node_uid=node.uid)
    report = first_report(name)
    seen = report.endpoints[-1].endpoint
    links = tuple(Link(other, PathKind.DIRECT, endpoint=seen, latency=0.02) for other in names[:LINKS])
    return Peer(Meta(name, uid=f"uid-of-{name}"), spec, replace(report, links=links, direct=len(names) - 1))


BENCHMARKS = (
    Benchmark(
        "plan-10000",
        unit="ms",
        what="planning one change among 10,000 peers, the mesh's counts included",
        target=Target(p99=20.0),
        attempts=CHANGES,
        run=_plan,
    ),
)
