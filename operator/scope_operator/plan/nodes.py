"""Which ScopePeers the Nodes of one cluster ask for: one for every Node that a mesh selects, following it.

    Nodes, meshes, the cluster's own peers -> CreatePeer, WritePeer, DeletePeer, RevivePeer

A peer of a Node stands for that one Node: its spec names cluster, Node and the Node's UID, so a Node that is
deleted and made again gets a new peer under the same name. Only peers that name this cluster are ever
touched; those of other clusters and those made by hand for machines elsewhere are not even looked at. A mesh
that is deleted takes its peers with it by ownership, so nothing is deleted for it here. A mesh in which this
cluster's name belongs to another cluster is left alone whole.

Peers that are told to leave belong to an installation that goes. One that begins lets those come back which
were told before it.

Where a mesh asks for pod networking, a peer offers the prefixes of its Node's pods. Those of a Node that is
not there any more stay with its peer until the peer goes, or a Node that is there has them: one that is
issued anew moves at once.

An absent Node is believed slowly where believing it would hurt. `DeletePeer` wants a complete list of Nodes;
where more than `FEW` peers and a `SHARE`th of the mesh would go at once, it also wants a second one, asked
for `CONFIRM` seconds later. For `HOLD` seconds after the Nodes' revision went backwards, which is a restored
backup, nothing is deleted at all. `now` is monotonic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from scope.model import IPNetwork, Mesh, Meta, Peer, PeerSpec, PodNetworking, PodPrefix, PodSource
from scope.names import peer_name
from scope.resources import MAX_ROUTES
from scope.selectors import selects
from scope.translation import seen_prefix, translations_of
from scope_operator.plan.conditions import PortConflict

FEW = 3  # peers that may always go at once: a small cluster is scaled down by so many
SHARE = 10  # a tenth of a mesh: what a rolling replacement of Nodes takes at a time
CONFIRM = 30.0  # seconds: an API server that lost its Nodes' store is found out, or repaired, by then
HOLD = 600.0  # seconds after a restore: kubelets register their Nodes anew within minutes


@dataclass(frozen=True, slots=True)
class Node:
    """What a Kubernetes Node says that matters here. `labels` is not to be changed."""

    name: str
    uid: str
    labels: Mapping[str, str] = field(default_factory=dict)
    revision: int = 0
    pods: tuple[PodPrefix, ...] = ()


@dataclass(frozen=True, slots=True)
class NodesListed:
    """All Nodes at one revision; `complete` is False when anything was left out.

    `asked_at` is when it was asked for (monotonic), `after` the newest revision that was known then: a list
    that is older was restored.
    """

    nodes: tuple[Node, ...]
    revision: int
    asked_at: float
    after: int = 0
    complete: bool = True


@dataclass(frozen=True, slots=True)
class NodePut:
    """A Node was created or changed."""

    node: Node


@dataclass(frozen=True, slots=True)
class NodeDeleted:
    """A Node is gone. `last` is its last state."""

    last: Node


NodeFact: TypeAlias = NodesListed | NodePut | NodeDeleted


class NodePeers:
    """The Nodes and meshes of the cluster called `cluster`, whose kube-system namespace has the UID `uid`."""

    def __init__(self, *, cluster: str, uid: str) -> None:
        self.cluster = cluster
        self.uid = uid
        self._nodes: dict[str, Node] = {}
        self._pods: dict[IPNetwork, set[str]] = {}  # which Nodes have a prefix for their pods, names
        self._meshes: dict[str, Mesh] = {}
        self._issued: set[IPNetwork] = set()  # prefixes that Nodes got since the last `judge`
        self._names: dict[str, tuple[str, str]] = {}  # peer name: mesh and Node
        self._own: dict[str, Peer] = {}  # this cluster's peers
        self._own_of: dict[str, set[str]] = {}  # the same by mesh, names
        self._touched: dict[str, None] = {}  # names whose fate is to be judged, in order
        self._leaving: dict[str, dict[str, float]] = {}  # by mesh: peers that no Node asks for, since when
        self._left: dict[str, deque[float]] = {}  # by mesh: when such peers went
        self._told_before: set[str] = set()  # uids of peers that were told to leave before our start
        self._went: list[str] = []  # meshes of peers that went since the last `judge`
        self._listed_at: float | None = None  # when the newest complete list was asked for
        self._revision = 0
        self._hold_until = 0.0

    @property
    def revision(self) -> int:
        """The newest revision that was told: what a list that is asked for now is compared with."""
        return self._revision

    @property
    def is_listed(self) -> bool:
        """Whether every Node is known: before that, nothing is deleted."""
        return self._listed_at is not None

    # --- what is known ------------------------------------------------------------------------------------

    def take(self, fact: NodeFact) -> None:
        """Take what a list or a watch says of Nodes."""
        match fact:
            case NodesListed():
                self._take_list(fact)
            case NodePut(node):
                known = self._nodes.get(node.name)
                if known is None or known.uid != node.uid or known.revision < node.revision:
                    self._put(node)
                    self._revision = max(self._revision, node.revision)
            case NodeDeleted(last):
                known = self._nodes.get(last.name)
                if known is not None and known.uid == last.uid:
                    self._drop(last.name)
                self._revision = max(self._revision, last.revision)

    def put_mesh(self, mesh: Mesh) -> None:
        """Take a mesh that is new or changed."""
        name = mesh.meta.name
        known = self._meshes.get(name)
        self._meshes[name] = mesh
        if (
            known is None
            or known.meta.uid != mesh.meta.uid
            or known.spec.node_selector != mesh.spec.node_selector
            or known.spec.pod_networking != mesh.spec.pod_networking
            or known.spec.clusters != mesh.spec.clusters
            or known.status.clusters != mesh.status.clusters
        ):
            for node in self._nodes:
                self._touch(name, node)
            self._touched.update(dict.fromkeys(self._own_of.get(name, ())))

    def drop_mesh(self, name: str) -> None:
        """Take that a mesh is gone: its peers go by ownership, and are not asked for any more."""
        self._meshes.pop(name, None)
        self._leaving.pop(name, None)
        self._left.pop(name, None)

    def put_peer(self, peer: Peer) -> None:
        """Take a peer that is new or changed, of whatever cluster."""
        name = peer.meta.name
        self._forget(name)
        if self._is_own(peer):
            self._own[name] = peer
            self._own_of.setdefault(peer.spec.mesh, set()).add(name)
            self._names.setdefault(name, (peer.spec.mesh, peer.spec.node_name))
        self._touched[name] = None

    def drop_peer(self, peer: Peer) -> None:
        """Take that a peer is gone."""
        name = peer.meta.name
        self._forget(name)
        if self._leaving.get(peer.spec.mesh, {}).pop(name, None) is not None:
            self._went.append(peer.spec.mesh)
        if self._wanted(name) is None:
            self._names.pop(name, None)
        else:
            self._touched[name] = None

    def begin(self, peers: Iterable[Peer]) -> None:
        """Take the peers of the first list since our start: who is told to leave there was told before."""
        self._told_before.update(peer.meta.uid for peer in peers if self._is_own(peer) and peer.spec.leaving)

    # --- what follows -------------------------------------------------------------------------------------

    def judge(self, *, now: float) -> list[str]:
        """The names that facts touched since the last call: each is to be planned.

        All of them are judged before one is planned, so that peers that leave together are seen together.
        """
        for mesh in self._went:
            self._left.setdefault(mesh, deque()).append(now)
        self._went.clear()
        touched = list(self._touched)
        self._touched.clear()
        for name in touched:
            peer = self._own.get(name)
            if peer is None:
                continue
            leaving = self._leaving.setdefault(peer.spec.mesh, {})
            if self._is_to_go(peer):
                leaving.setdefault(name, now)
            else:
                leaving.pop(name, None)
        issued, self._issued = self._issued, set()
        held = [name for leaving in self._leaving.values() for name in leaving] if issued else []
        touched += [
            name
            for name in held
            if name in self._own and any(each.prefix in issued for each in self._own[name].spec.pod_prefixes)
        ]
        return touched

    def is_wanted(self, peer: Peer) -> bool:
        """Whether a Node asks for this very peer: it stays, however long its machine is away."""
        return self._is_own(peer) and not self._is_to_go(peer) and peer.spec.mesh in self._meshes

    def may_stay(self, peer: Peer) -> bool:
        """Whether a peer that is told to leave need not, since nobody told it that while we were here."""
        return peer.spec.leaving and peer.meta.uid in self._told_before and self.is_wanted(peer)

    def revived(self, peer: Peer) -> None:
        """Take that a peer was let come back: from now on whoever tells it to leave means it."""
        self._told_before.discard(peer.meta.uid)

    def missing(self, name: str) -> Peer | None:
        """The peer to be created under this name, given that there is none."""
        return self._wanted(name)

    def followed(self, peer: Peer) -> PeerSpec:
        """The spec that a peer is to have: what its Node says of pods, and else what it has."""
        mesh = self._meshes.get(peer.spec.mesh)
        if mesh is None or not self._is_own(peer) or self.is_refused(mesh):
            return peer.spec
        kept = tuple(each for each in peer.spec.pod_prefixes if each.source is PodSource.STATIC)
        node = self._nodes.get(peer.spec.node_name)
        if mesh.spec.pod_networking is PodNetworking.OFF:
            theirs: tuple[PodPrefix, ...] = ()
        elif node is not None and node.uid == peer.spec.node_uid:
            theirs = self._pods_of(node, mesh)
        else:
            others = (each for each in peer.spec.pod_prefixes if each.source is not PodSource.STATIC)
            theirs = tuple(each for each in others if not self._pods.get(each.prefix))
        return replace(peer.spec, pod_prefixes=(*theirs, *kept)[:MAX_ROUTES])

    def may_go(self, peer: Peer, *, members: int, now: float) -> bool:
        """Whether a peer is to be deleted now; `members` counts the peers of its mesh.

        Where it is not yet, the list of Nodes that confirms it (`list_due`) brings it up again.
        """
        mesh = peer.spec.mesh
        since = self._leaving.get(mesh, {}).get(peer.meta.name)
        if since is None or self._listed_at is None or now < self._hold_until:
            return False
        if self._listed_at >= since + CONFIRM:
            return True
        left = self._left.setdefault(mesh, deque())
        while left and left[0] <= now - CONFIRM:
            left.popleft()
        at_once = len(self._leaving[mesh]) + len(left)
        return at_once <= FEW or at_once * SHARE <= members + len(left)

    def list_due(self, *, now: float) -> float | None:
        """When Nodes are to be listed anew (monotonic) to confirm departures; None: nothing waits."""
        if self._listed_at is None:
            return None
        due = [
            max(since + CONFIRM, self._hold_until)
            for leaving in self._leaving.values()
            for since in leaving.values()
        ]
        waiting = [each for each in due if self._listed_at < each]
        return max(min(waiting), now) if waiting else None

    def is_refused(self, mesh: Mesh) -> bool:
        """Whether this cluster's name stands for another cluster in that mesh."""
        return any(each.name == self.cluster and each.uid != self.uid for each in mesh.status.clusters)

    def port_conflict(self, mesh: Mesh) -> PortConflict | None:
        """An older mesh that has the same fixed port on Nodes of this one."""
        port = mesh.spec.listen_port
        rivals = [
            other
            for other in self._meshes.values()
            if port and other.spec.listen_port == port and _age(other) < _age(mesh)
        ]
        for rival in sorted(rivals, key=_age):
            both = sorted(
                node.name
                for node in self._nodes.values()
                if selects(mesh.spec.node_selector, node.labels)
                and selects(rival.spec.node_selector, node.labels)
            )
            if both:
                return PortConflict(port, holder=rival.meta.name, nodes=tuple(both))
        return None

    def labels(self, peer: Peer) -> Mapping[str, str] | None:
        """The labels of the peer's Node; None of a peer that stands for no Node here."""
        node = self._nodes.get(peer.spec.node_name) if self._is_own(peer) else None
        return node.labels if node is not None and node.uid == peer.spec.node_uid else None

    def lacks_node(self, peer: Peer) -> bool:
        """Whether the peer is this cluster's and its Node is not known, or not any more."""
        return self._is_own(peer) and self.labels(peer) is None

    def displaced(self, peer: Peer) -> str:
        """The Node that is no peer because this one has the name of its; "" where there is none."""
        wanted = None if self._is_own(peer) else self._wanted(peer.meta.name)
        return wanted.spec.node_name if wanted is not None else ""

    # --- steps --------------------------------------------------------------------------------------------

    def _take_list(self, listed: NodesListed) -> None:
        if listed.revision < listed.after:
            self._hold_until = listed.asked_at + HOLD
            for name in list(self._nodes):
                self._drop(name)
            self._revision = 0
        for node in listed.nodes:
            self.take(NodePut(node))
        if listed.complete:
            present = {node.name for node in listed.nodes}
            # What a watch told after the list was made stays.
            older = [each.name for each in self._nodes.values() if each.revision <= listed.revision]
            for name in older:
                if name not in present:
                    self._drop(name)
            self._listed_at = listed.asked_at
            for leaving in self._leaving.values():  # whoever waited for this list
                self._touched.update(dict.fromkeys(leaving))
        self._revision = max(self._revision, listed.revision)

    def _put(self, node: Node) -> None:
        known = self._nodes.get(node.name)
        self._nodes[node.name] = node
        before = known.pods if known is not None else ()
        if before != node.pods:
            self._move_pods(node.name, before, node.pods)
        if known is None or (known.uid, known.labels, before) != (node.uid, node.labels, node.pods):
            self._touch_all(node.name)

    def _drop(self, node: str) -> None:
        self._move_pods(node, self._nodes.pop(node).pods, ())
        self._touch_all(node)

    def _move_pods(self, node: str, before: tuple[PodPrefix, ...], after: tuple[PodPrefix, ...]) -> None:
        """Note whose prefixes are whose."""
        for each in before:
            self._pods[each.prefix].discard(node)
            if not self._pods[each.prefix]:
                del self._pods[each.prefix]
        for each in after:
            self._pods.setdefault(each.prefix, set()).add(node)
        self._issued.update(each.prefix for each in after)

    def _touch_all(self, node: str) -> None:
        for mesh in self._meshes:
            self._touch(mesh, node)

    def _touch(self, mesh: str, node: str) -> None:
        name = peer_name(mesh, self.cluster, node)
        if name in self._own or node in self._nodes:
            self._names[name] = (mesh, node)
            self._touched[name] = None
        else:
            self._names.pop(name, None)

    def _forget(self, name: str) -> None:
        known = self._own.pop(name, None)
        if known is not None:
            self._own_of[known.spec.mesh].discard(name)

    def _is_own(self, peer: Peer) -> bool:
        return peer.spec.cluster == self.cluster and bool(peer.spec.node_name)

    def _is_to_go(self, peer: Peer) -> bool:
        """Whether no Node asks for a peer of this cluster."""
        mesh = self._meshes.get(peer.spec.mesh)
        if mesh is None or self.is_refused(mesh):
            return False
        wanted = self._wanted(peer.meta.name)
        return wanted is None or _stands_for(wanted) != _stands_for(peer)

    def _wanted(self, name: str) -> Peer | None:
        """The peer of that name, as it is created, if a Node asks for it."""
        mesh_name, node_name = self._names.get(name, ("", ""))
        mesh, node = self._meshes.get(mesh_name), self._nodes.get(node_name)
        if mesh is None or node is None or name != peer_name(mesh_name, self.cluster, node_name):
            return None
        if self.is_refused(mesh) or not selects(mesh.spec.node_selector, node.labels):
            return None
        pods = self._pods_of(node, mesh) if mesh.spec.pod_networking is not PodNetworking.OFF else ()
        spec = PeerSpec(
            mesh=mesh_name,
            cluster=self.cluster,
            node_name=node_name,
            node_uid=node.uid,
            pod_prefixes=pods[:MAX_ROUTES],
        )
        return Peer(Meta(name), spec)

    def _pods_of(self, node: Node, mesh: Mesh) -> tuple[PodPrefix, ...]:
        """A Node's prefixes, with what others see them as."""
        translations = translations_of(mesh, self.cluster)
        return tuple(replace(each, seen_as=seen_prefix(each.prefix, translations)) for each in node.pods)


def _stands_for(peer: Peer) -> tuple[str, str, str]:
    return peer.spec.mesh, peer.spec.node_name, peer.spec.node_uid


def _age(mesh: Mesh) -> tuple[float, str]:
    return mesh.meta.created, mesh.meta.uid
