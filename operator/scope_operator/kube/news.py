"""What is worth a Kubernetes Event: peers that came and went, and conditions that began or ended.

`news_of` reads it off a write that succeeded, `Overheard` off what others wrote. A condition that is stored
already is not written again, so each transition is told once, whichever replica writes and however often it
restarts. Peers that come or go together are told together.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import quote

from scope import resources
from scope.model import Assignment, Condition, Mesh, Peer, PeerKeys, Resource, kind_of
from scope.registry.kube.client import KubeClient, Object
from scope.registry.port import Deleted, Put, RegistryError, Unavailable
from scope_operator.plan.conditions import (
    ADDRESS_CONFLICT,
    ADDRESSES_EXHAUSTED,
    HUBS_AVAILABLE,
    PORT_CONFLICT,
    POST_QUANTUM,
    READY,
    REMOVED,
    ROUTE_CONFLICT,
)
from scope_operator.plan.nodes import NodeDeleted, NodePut
from scope_operator.plan.planner import (
    CreatePeer,
    DeletePeer,
    RevivePeer,
    Why,
    WriteAssignment,
    WriteMeshStatus,
    WritePeer,
)
from scope_operator.reconcile import Done

log = logging.getLogger(__name__)

# Events of cluster-scoped objects stand here, where `kubectl describe` looks for them.
NAMESPACE = "default"
CONTROLLER = "scope.ltgc.cc/operator"
TOGETHER = 2.0  # seconds: a cluster that joins is one Event, not a thousand
SHOWN = 5  # names in one Event
MAX_NOTE = 1024  # characters, the API server's bound
MAX_WAITING = 256  # Events that wait for an API server; beyond it the eldest are not told
ATTEMPTS = 3
RETRY_SECONDS = 5.0

# The conditions that are told: the status that is the problem, and what the Event is called.
PROBLEMS = {
    ADDRESSES_EXHAUSTED: ("True", ADDRESSES_EXHAUSTED),
    PORT_CONFLICT: ("True", PORT_CONFLICT),
    ROUTE_CONFLICT: ("True", ROUTE_CONFLICT),
    HUBS_AVAILABLE: ("False", "HubsUnavailable"),
    POST_QUANTUM: ("False", "PostQuantumFailed"),
}
WORTH = frozenset(
    {"ClusterNameTaken", "AddressesOverlap"}
)  # reasons of not being ready that no other condition tells


@dataclass(frozen=True, slots=True)
class About:
    """Which object an Event is about; without a namespace for what is in none."""

    kind: str
    name: str
    uid: str
    namespace: str = ""
    api_version: str = resources.API_VERSION


@dataclass(frozen=True, slots=True)
class News:
    """One Event, or, with `peer`, a part of one about several peers of a mesh."""

    about: About
    reason: str
    note: str
    is_warning: bool = False
    peer: str = ""


def news_of(done: Done) -> tuple[News, ...]:
    """What a write brought; nothing where it failed."""
    if done.error is not None:
        return ()
    match done.action:
        case WriteMeshStatus(mesh, part):
            return tuple(_turns(_about(mesh), mesh.status.conditions, part.conditions))
        case WriteAssignment(peer, part, mesh):
            came = _came(peer, mesh) if peer.assignment == Assignment() else ()
            return (*came, *_turns(_about(peer), peer.assignment.conditions, part.conditions))
        case DeletePeer(peer) if peer.assignment.tombstone is not None:
            return ()  # its removal was told when it happened
        case DeletePeer(peer, why, mesh):
            note = "their Nodes are gone or not selected" if why is Why.NODE_LEFT else "past peerExpiry"
            return _of_mesh(mesh, "PeerRemoved", note, peer)
        case CreatePeer() | RevivePeer() | WritePeer():
            return ()


def together(news: Iterable[News]) -> list[News]:
    """The same news with those about peers of one mesh, for one reason, as one."""
    told: list[News] = []
    groups: dict[tuple[About, str, str], list[str]] = {}
    for each in news:
        if each.peer:
            groups.setdefault((each.about, each.reason, each.note), []).append(each.peer)
        else:
            told.append(each)
    for (about, reason, note), peers in groups.items():
        more = len(peers) - SHOWN
        names = ", ".join(sorted(peers)[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        told.append(News(about, reason, f"{names}: {note}" if note else names))
    return told


def _came(peer: Peer, mesh: Mesh | None) -> tuple[News, ...]:
    note = "peers of Nodes" if peer.spec.node_name else "joined from outside of the cluster"
    return _of_mesh(mesh, "PeerAdded", note, peer)


def _of_mesh(mesh: Mesh | None, reason: str, note: str, peer: Peer) -> tuple[News, ...]:
    return (News(_about(mesh), reason, note, peer=peer.meta.name),) if mesh is not None else ()


def _turns(about: About, before: Iterable[Condition], after: Iterable[Condition]) -> Iterable[News]:
    earlier = {each.type: each for each in before}
    for condition in after:
        was = earlier.pop(condition.type, None)
        if condition.type == ADDRESS_CONFLICT:
            if was is None or was.changed != condition.changed:
                yield News(about, ADDRESS_CONFLICT, condition.message, is_warning=True)
        elif condition.type in PROBLEMS:
            bad, name = PROBLEMS[condition.type]
            # A mesh is made before its hubs are there.
            is_new = was.status != bad if was is not None else condition.type != HUBS_AVAILABLE
            if condition.status == bad and is_new:
                yield News(about, name, condition.message, is_warning=True)
            elif condition.status != bad and was is not None and was.status == bad:
                yield News(about, f"{name}Resolved", f"it was: {was.message}")
        elif condition.type == READY and condition.reason in WORTH - {was.reason if was else ""}:
            yield News(about, condition.reason, condition.message, is_warning=True)
    for kind, (bad, name) in PROBLEMS.items():  # some conditions are left out when they end
        if kind in earlier and earlier[kind].status == bad:
            yield News(about, f"{name}Resolved", f"it was: {earlier[kind].message}")


def _about(resource: Resource) -> About:
    return About(str(kind_of(resource)), resource.meta.name, resource.meta.uid)


class Overheard:
    """What a watch tells that others wrote: a Node's machine with other keys, and peers that were removed."""

    def __init__(self) -> None:
        self._keys: dict[str, PeerKeys] = {}  # by uid, as all of these
        self._members: set[str] = set()
        self._meshes: dict[str, About] = {}  # by name

    def take(self, fact: Put | Deleted | NodePut | NodeDeleted) -> tuple[News, ...]:
        """Take a fact; what it brought."""
        match fact:
            case Put(Mesh() as mesh):
                self._meshes[mesh.meta.name] = _about(mesh)
            case Deleted(Mesh(meta=meta)):
                self._meshes.pop(meta.name, None)
            case Put(Peer() as peer):
                return (*self._removal(peer), *self._renewal(peer))
            case Deleted(Peer(meta=meta)):
                self._keys.pop(meta.uid, None)
                self._members.discard(meta.uid)
        return ()

    def _removal(self, peer: Peer) -> tuple[News, ...]:
        uid, mesh = peer.meta.uid, self._meshes.get(peer.spec.mesh)
        if peer.assignment.tombstone is None:
            self._members.add(uid)
            return ()
        if uid not in self._members or mesh is None:
            return ()
        self._members.remove(uid)
        said = [each.message for each in peer.assignment.conditions if each.type == REMOVED]
        return (News(mesh, "PeerRemoved", "; ".join(said), peer=peer.meta.name),)

    def _renewal(self, peer: Peer) -> tuple[News, ...]:
        if not peer.spec.node_name or peer.report is None:
            return ()
        keys, before = peer.report.keys, self._keys.get(peer.meta.uid)
        self._keys[peer.meta.uid] = keys
        if before is None or before == keys:
            return ()
        note = (
            f"Node {peer.spec.node_name} has new keys (WireGuard {keys.wireguard} in place of "
            f"{before.wireguard}): its machine was imaged anew, or its agent lost its state"
        )
        return (News(_about(peer), "KeysReplaced", note, is_warning=True),)


class Newsroom:
    """Posts Events; `identity` is the replica's. `wall` is the wall clock."""

    def __init__(self, client: KubeClient, *, identity: str, wall: Callable[[], float]) -> None:
        self._client = client
        self._identity = identity
        self._wall = wall
        self._waiting: list[News] = []
        self._wake = asyncio.Event()

    def tell(self, done: Done) -> None:
        """Take what a write brought."""
        self.post(*news_of(done))

    def post(self, *news: News) -> None:
        """Have it told."""
        if news:
            self._waiting = [*self._waiting, *news]
            self._wake.set()

    async def run(self) -> None:
        """Post until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(TOGETHER)
            self._wake.clear()
            waiting, self._waiting = self._waiting, []
            for news in together(waiting)[-MAX_WAITING:]:
                await self._post(news)

    async def _post(self, news: News) -> None:
        body, namespace = self._event(news), news.about.namespace or NAMESPACE
        path = f"/apis/events.k8s.io/v1/namespaces/{quote(namespace, safe='')}/events"
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(RETRY_SECONDS)
            try:
                await self._client.ask("POST", path, body=body)
            except Unavailable as error:
                log.warning("event.failed reason=%s error=%s", news.reason, error)
            except RegistryError as error:
                log.warning("event.refused reason=%s error=%s", news.reason, error)
                return
            else:
                return

    def _event(self, news: News) -> Object:
        about = news.about
        moment = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {
                "name": f"{about.name[:200]}.{secrets.token_hex(8)}",
                "namespace": about.namespace or NAMESPACE,
            },
            "eventTime": moment,
            "type": "Warning" if news.is_warning else "Normal",
            "reason": news.reason,
            "note": news.note[:MAX_NOTE],
            "action": "Reconciled",
            "reportingController": CONTROLLER,
            "reportingInstance": self._identity[:128],
            "regarding": {
                "apiVersion": about.api_version,
                "kind": about.kind,
                "name": about.name,
                **({"namespace": about.namespace} if about.namespace else {}),
                **({"uid": about.uid} if about.uid else {}),
            },
        }
