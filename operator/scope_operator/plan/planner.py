"""The whole registry side, sans-IO: facts of a registry in, writes to it out.

`take` keeps the newest of every mesh and peer, with an index of the addresses in use, and puts the keys
that a fact touches into a queue in which each key stands once. `plan` takes keys from it and gives an
action for each resource that is not as it should be: a key that is planned twice gives nothing the second
time. The shell does each action and says how it ended (`succeeded`, `outdated`, `failed`); until then that
resource is not planned again, so a slow registry never has two writes of one resource under way.

Peers are planned at once, since a peer without an address is waiting for it; a mesh's status, which counts
them, at most every `MESH_INTERVAL` seconds. `now` is monotonic, `wall` is in resources.

On Kubernetes `nodes` says which peers the cluster's Nodes ask for; the planner creates and deletes those.
Facts may come from several sources at once (a watch, a list of one's own, answers to writes), in any order:
the newer state of a resource stays, and one that was seen deleted does not come back by older news.

Whom a list lacks is not believed to be gone: a list may be cut short, and an address given to another while
its holder lives is two machines with one address. Each is asked for by name (`Confirm`) before anything else
is planned for it, and is a member with all that it holds until the registry says that there is none.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from scope.model import (
    Assignment,
    Cluster,
    GatewayOrigin,
    HubMode,
    IPAddress,
    Kind,
    Mesh,
    MeshStatus,
    Peer,
    PublicKey,
    Reflector,
    Resource,
    Revision,
    Role,
    kind_of,
)
from scope.registry.port import Deleted, Listed, Put
from scope_operator.plan.conditions import RouteConflict, keys_failed, mesh_conditions
from scope_operator.plan.nodes import NodeFact, NodePeers
from scope_operator.plan.roles import (
    Asked,
    HubPlan,
    are_kept,
    asked_of,
    assign_role,
    hubs_state,
    may_stay,
    plan_hubs,
)
from scope_operator.plan.routes import route_conflicts
from scope_operator.plan.status import ALIVE, is_expired, plan_assignment, plan_mesh_status

MESH_INTERVAL = 5.0  # seconds between writes of a mesh's counts: they are for people
HUBS_INTERVAL = 10.0  # seconds between choices of hubs, which look at every peer: none is in a hurry
MAX_DELETED = 4096  # uids of deleted resources: what is under way when they go is answered within seconds
MAX_IN_FLIGHT = 64  # writes under way: enough to fill a batch of the embedded registry, few for an API server

Key: TypeAlias = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class WriteAssignment:
    """Replace the registry side's part of the peer's status, if it is still at the revision of `peer`."""

    peer: Peer
    part: Assignment
    mesh: Mesh | None  # the peer's, where there is one


@dataclass(frozen=True, slots=True)
class WriteMeshStatus:
    """Replace the mesh's status, if it is still at the revision of `mesh`."""

    mesh: Mesh
    part: MeshStatus


@dataclass(frozen=True, slots=True)
class WritePeer:
    """Replace the spec of the peer of a Node by that of `peer`, if it is still at its revision."""

    peer: Peer
    mesh: Mesh | None  # the peer's, where there is one


@dataclass(frozen=True, slots=True)
class CreatePeer:
    """Create the peer that a Node asks for; `mesh` owns it."""

    peer: Peer
    mesh: Mesh


@dataclass(frozen=True, slots=True)
class RevivePeer:
    """Take back that a peer is to leave."""

    peer: Peer


class Why(enum.StrEnum):
    """Why a peer is deleted."""

    EXPIRED = "Expired"  # away, or removed, for too long
    NODE_LEFT = "NodeLeft"  # its Node is gone, was made anew, or is not selected any more


@dataclass(frozen=True, slots=True)
class DeletePeer:
    """Delete a peer."""

    peer: Peer
    why: Why
    mesh: Mesh | None  # the peer's, where there is one


@dataclass(frozen=True, slots=True)
class Confirm:
    """Read what a list lacks; `resource` is how it was known."""

    resource: Mesh | Peer


Write: TypeAlias = WriteAssignment | WriteMeshStatus | WritePeer | CreatePeer | RevivePeer | DeletePeer
Action: TypeAlias = Write | Confirm


def key_of(action: Action) -> Key:
    """What an action is about."""
    match action:
        case Confirm(resource=resource):
            return kind_of(resource), resource.meta.name
        case WriteMeshStatus(mesh=mesh):
            return Kind.MESH, mesh.meta.name
        case (
            WriteAssignment(peer=peer)
            | WritePeer(peer=peer)
            | CreatePeer(peer=peer)
            | RevivePeer(peer=peer)
            | DeletePeer(peer=peer)
        ):
            return Kind.PEER, peer.meta.name


@dataclass(slots=True)
class _Members:
    """The peers of one mesh, with what planning one of them needs to know of the others."""

    peers: dict[str, Peer] = field(default_factory=dict)
    taken: dict[IPAddress, str] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)  # peers for which no address was left
    routed: dict[str, Peer] = field(default_factory=dict)  # members with routes
    conflicts: dict[str, RouteConflict] = field(default_factory=dict)
    asked: dict[str, Asked] | None = None  # who is to be a hub because someone asks; None: not looked yet
    hubs: HubPlan | None = None  # the latest choice; None: who is a hub stands in the peers alone
    hubs_due: float = 0.0  # when to choose anew (monotonic)


class Planner:
    """The registry side of all meshes of one registry.

    `tells_liveness` says whether `hear` is called: where it is not, something else writes `online`. `nodes`
    is about the Nodes of one cluster; without it no peer is created. Without `assigns` nothing else is
    planned than to create and delete those: a cluster that joined has its registry elsewhere.
    """

    def __init__(
        self,
        *,
        now: float,
        tells_liveness: bool,
        signing_key: PublicKey | None = None,
        reflectors: tuple[Reflector, ...] = (),
        gateway: GatewayOrigin | None = None,
        nodes: NodePeers | None = None,
        assigns: bool = True,
    ) -> None:
        self._started = now
        self._nodes = nodes
        self._assigns = assigns
        self._cluster = Cluster(nodes.cluster, nodes.uid) if nodes is not None else None
        self._deleted: dict[str, int] = {}  # uid: the revision at which it was gone; the latest last
        self._doubted: set[str] = set()  # uids of those that a list lacked
        self._tells_liveness = tells_liveness
        self._signing_key = signing_key
        self._reflectors = reflectors
        self._gateway = gateway
        self._listed: set[Kind] = set()
        self._seen: dict[Kind, Revision] = {}  # the newest revision that a fact told
        self._meshes: dict[str, Mesh] = {}
        self._peers: dict[str, Peer] = {}
        self._members: dict[str, _Members] = {}
        self._alive: set[str] = set()
        self._spoke: set[str] = set()  # peers that reported since the last `hear`
        self._reported: dict[str, float] = {}  # peers that did before, and when that was heard of
        self._heard_out = False  # a peer alive before our start has had the time to say so
        self._queue: dict[Key, None] = {}
        self._later: list[tuple[float, Key]] = []
        self._delayed: set[Key] = set()  # the keys in `_later`
        self._in_flight: set[Key] = set()
        self._mesh_due: dict[str, float] = {}
        self._contested: set[str] = set()  # meshes whose routes are to be judged anew: every Node has some

    @property
    def is_listed(self) -> bool:
        """Whether everything that a plan is made from was listed once."""
        return {Kind.MESH, Kind.PEER} <= self._listed and (self._nodes is None or self._nodes.is_listed)

    @property
    def depth(self) -> int:
        """How many keys wait to be planned or for the end of their write."""
        return len(self._queue) + len(self._in_flight)

    @property
    def delayed(self) -> int:
        """How many keys wait for a time, such as meshes for that of their counts' next write."""
        return len(self._later)

    def announce(
        self,
        *,
        signing_key: PublicKey | None,
        reflectors: tuple[Reflector, ...],
        gateway: GatewayOrigin | None,
    ) -> None:
        """What every mesh says of the registry, from now on."""
        self._signing_key, self._reflectors, self._gateway = signing_key, reflectors, gateway
        self._queue.update(((Kind.MESH, name), None) for name in self._meshes)

    # --- what is known ------------------------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """The number of the newest revision that a fact told, of whatever kind."""
        told = [revision.number for revision in self._seen.values()]
        return max((*told, self._nodes.revision if self._nodes is not None else 0), default=0)

    def seen(self, kind: Kind) -> Revision | None:
        """The newest revision that a fact told: what a list that is asked for now is compared with."""
        return self._seen.get(kind)

    def peer(self, name: str) -> Peer | None:
        """The peer of that name, as it is known."""
        return self._peers.get(name)

    def take(self, fact: Listed | Put | Deleted | NodeFact, *, after: Revision | None = None) -> None:
        """Take what a list, a watch or the answer to a write says.

        `after` is for lists: what `seen` was when it was asked for. A list older than that was restored.
        """
        match fact:
            case Listed(kind, revision, resources, complete):
                self._take_list(kind, revision, resources, complete=complete, after=after)
            case Put(resource, revision):
                self._listen(resource)
                self._put(resource, at=resource.meta.revision)
                self._note(kind_of(resource), revision)
            case Deleted(last, revision):
                self._forget(last, at=revision.number)
                self._note(kind_of(last), revision)
            case _:
                if self._nodes is not None:
                    self._nodes.take(fact)

    def _take_list(
        self,
        kind: Kind,
        revision: Revision,
        resources: tuple[Resource, ...],
        *,
        complete: bool,
        after: Revision | None,
    ) -> None:
        restored = after is not None and (revision.registry != after.registry or revision < after)
        present = {resource.meta.uid for resource in resources}
        self._doubted -= present
        known: list[Mesh | Peer] = list(self._known(kind).values())
        absent = [each for each in known if each.meta.uid not in present]
        if restored:
            # Or made anew: what is known says nothing about whom it has, and its revisions begin again.
            self._deleted.clear()
            self._seen.pop(kind, None)
            for each in known:
                self._unindex(each)
        # The elder of two that claim one address is indexed first, and keeps it.
        for resource in sorted(resources, key=lambda each: (each.meta.created, each.meta.uid)):
            self._put(resource, at=revision.number)
        for each in absent:
            if restored and each.meta.name not in self._known(kind):
                self._put(each, at=each.meta.revision)
                self._doubt(each)
            elif not restored and complete and each.meta.revision <= revision.number:
                self._doubt(each)
        if kind is Kind.PEER and kind not in self._listed and self._nodes is not None:
            self._nodes.begin(each for each in resources if isinstance(each, Peer))
        self._listed.add(kind)
        self._note(kind, revision)

    def _note(self, kind: Kind, revision: Revision) -> None:
        seen = self._seen.get(kind)
        if seen is None or seen.registry != revision.registry or seen < revision:
            self._seen[kind] = revision

    def hear(self, ages: Mapping[str, float], *, now: float) -> None:
        """Take the age of every peer's last heartbeat; peers that came or fell silent are planned."""
        self._reported.update(dict.fromkeys(self._spoke, now))
        self._spoke.clear()
        self._reported = {name: at for name, at in self._reported.items() if now - at < ALIVE}
        self._alive = {name for name, age in ages.items() if age < ALIVE} | self._reported.keys()
        self._heard_out = now - self._started >= ALIVE
        for name, peer in self._peers.items():
            if self._is_online(peer) != peer.assignment.online:
                self._queue[Kind.PEER, name] = None

    def _listen(self, resource: Resource) -> None:
        """A report that changes is a sign of life: only the peer itself writes it.

        The first one of a peer without a Node is written as it joins, and no agent need run yet.
        """
        if not self._tells_liveness or not isinstance(resource, Peer) or resource.report is None:
            return
        known = self._peers.get(resource.meta.name)
        if known is None or known.meta.uid != resource.meta.uid or _is_old(resource, known):
            return
        is_join = known.report is None and not resource.spec.node_name
        if known.report != resource.report and not is_join:
            self._spoke.add(resource.meta.name)

    def sweep(self) -> None:
        """Plan everything anew: for what time alone brings about."""
        self._queue.update(((Kind.PEER, name), None) for name in self._peers)
        self._queue.update(((Kind.MESH, name), None) for name in self._meshes)

    # --- what is to be done -------------------------------------------------------------------------------

    def plan(self, *, now: float, wall: float) -> list[Action]:
        """The next actions; empty when there are none, when enough are under way, or before both kinds are
        listed.
        """
        if not self.is_listed:
            return []
        if self._nodes is not None:
            self._queue.update(((Kind.PEER, name), None) for name in self._nodes.judge(now=now))
        while self._contested:
            self._judge_routes(self._contested.pop())
        while self._later and self._later[0][0] <= now:
            _, key = heapq.heappop(self._later)
            self._delayed.discard(key)
            self._queue[key] = None
        actions: list[Action] = []
        blocked: list[Key] = []
        while self._queue and len(self._in_flight) < MAX_IN_FLIGHT:
            key = next(iter(self._queue))
            del self._queue[key]
            if key in self._in_flight:
                blocked.append(key)
                continue
            action = self._plan_one(key, now=now, wall=wall)
            if action is not None:
                self._in_flight.add(key)
                actions.append(action)
        self._queue.update(dict.fromkeys(blocked))
        return actions

    def nodes_due(self, *, now: float) -> float | None:
        """When Nodes are to be listed anew, to confirm that peers are to go (monotonic); None: no need."""
        return self._nodes.list_due(now=now) if self._nodes is not None else None

    def next_time(self) -> float | None:
        """When `plan` is to be called even if nothing happens (monotonic)."""
        return self._later[0][0] if self._later else None

    def succeeded(self, action: Action, stored: Resource | None) -> None:
        """The action is done; `stored` is the resource as it is now, None when it was deleted."""
        key = key_of(action)
        self._in_flight.discard(key)
        if isinstance(action, Confirm):
            self._confirmed(action.resource, stored)
        elif stored is not None:
            if isinstance(action, RevivePeer) and self._nodes is not None:
                self._nodes.revived(action.peer)
            self._put(stored, at=stored.meta.revision)
        elif isinstance(action, DeletePeer):
            self._forget(action.peer)
            self._queue[key] = None  # a Node made anew asks for a peer of the same name

    def outdated(self, action: Write, stored: Resource | None, *, again_at: float) -> None:
        """The resource had changed: here it is as it is now (None: it is gone), to be planned anew.

        What could not be created is planned anew at `again_at` (monotonic) if it still is not known.
        """
        self._undo(action)
        key = key_of(action)
        if isinstance(action, CreatePeer):
            if stored is not None:
                self._deleted.pop(stored.meta.uid, None)  # the registry insists that it is there
                self._put(stored, at=stored.meta.revision)
            self._delay(key, again_at)
        elif stored is not None:
            self._put(stored, at=stored.meta.revision)
            self._queue[key] = None
        else:
            self._forget(action.mesh if isinstance(action, WriteMeshStatus) else action.peer)

    def _confirmed(self, asked: Mesh | Peer, stored: Resource | None) -> None:
        """Take what the registry has under the name of one that a list lacked."""
        key = kind_of(asked), asked.meta.name
        known = self._find(key)
        self._doubted.discard(asked.meta.uid)
        if stored is None or stored.meta.uid != asked.meta.uid:
            self._forget(asked)
        elif known is asked and stored.meta.revision < asked.meta.revision:
            self._unindex(asked)  # the registry was restored: what it has is older, and right
        if stored is not None:
            self._put(stored, at=stored.meta.revision)
        self._queue[key] = None

    def failed(self, action: Action, *, again_at: float) -> None:
        """The registry could not do it; it is planned anew at `again_at` (monotonic)."""
        self._undo(action)
        self._delay(key_of(action), again_at)

    def _delay(self, key: Key, until: float) -> None:
        if key not in self._delayed:
            self._delayed.add(key)
            heapq.heappush(self._later, (until, key))

    def _plan_one(self, key: Key, *, now: float, wall: float) -> Action | None:
        kind, name = key
        known = self._find(key)
        if known is not None and known.meta.uid in self._doubted:
            return Confirm(known)
        if kind is Kind.PEER:
            peer = self._peers.get(name)
            return self._plan_peer(peer, now=now, wall=wall) if peer is not None else self._plan_new(name)
        mesh = self._meshes.get(name)
        if mesh is None or not self._assigns:
            return None
        due = self._mesh_due.get(name, now)
        if due > now:
            self._delay(key, due)
            return None
        return self._plan_mesh(mesh, now=now, wall=wall)

    def _plan_new(self, name: str) -> Action | None:
        wanted = self._nodes.missing(name) if self._nodes is not None else None
        mesh = self._meshes.get(wanted.spec.mesh) if wanted is not None else None
        return CreatePeer(wanted, mesh) if wanted is not None and mesh is not None else None

    def _plan_peer(self, peer: Peer, *, now: float, wall: float) -> Action | None:
        name, mesh = peer.meta.name, self._meshes.get(peer.spec.mesh)
        members = self._members[peer.spec.mesh]
        nodes = self._nodes
        if nodes is not None and nodes.may_go(peer, members=len(members.peers), now=now):
            return DeletePeer(peer, Why.NODE_LEFT, mesh)
        if nodes is not None and nodes.may_stay(peer):
            return RevivePeer(peer)
        spec = nodes.followed(peer) if nodes is not None else peer.spec
        if spec != peer.spec:
            return WritePeer(replace(peer, spec=spec), mesh)
        if not self._assigns:
            return None
        stays = nodes is not None and nodes.is_wanted(peer)
        if mesh is not None and not stays and self._is_expired(peer, mesh, wall=wall):
            return DeletePeer(peer, Why.EXPIRED, mesh)
        part = plan_assignment(
            peer,
            mesh=mesh,
            taken=members.taken,
            conflict=members.conflicts.get(name),
            role=self._role(peer, mesh, members),
            online=self._is_online(peer),
            wall=wall,
            displaced=nodes.displaced(peer) if nodes is not None else "",
        )
        self._note_lack(members, peer, part)
        if part == peer.assignment:
            return None
        for interface in part.addresses:
            members.taken[interface.ip] = name  # from now on, so that no other peer is planned onto it
        return WriteAssignment(peer, part, mesh)

    def _role(self, peer: Peer, mesh: Mesh | None, members: _Members) -> Role:
        """Hub or Edge; as it is where the mesh is away, or nobody has chosen yet since our start."""
        if mesh is None:
            return peer.assignment.role
        asked = self._note_asked(peer, mesh, members)
        chosen = peer.assignment.role is Role.HUB
        if mesh.spec.hubs.mode is HubMode.DECLARED:
            known = self._asked(mesh, members)
            chosen = may_stay(peer) and are_kept(mesh, peers=members.peers, asked=known)
        elif members.hubs is not None:
            chosen = peer.meta.name in members.hubs.chosen
        return assign_role(peer, asked=asked, chosen=chosen)

    def _note_asked(self, peer: Peer, mesh: Mesh, members: _Members) -> Asked | None:
        """Who asks that the peer be a hub; the mesh is planned where that changed."""
        known, name = self._asked(mesh, members), peer.meta.name
        before = known.get(name)
        if self._nodes is not None and self._nodes.lacks_node(peer):
            return before  # an absent Node is believed slowly, and so is what its labels said
        asked = self._ask(peer, mesh)
        if asked is not before:
            if asked is None:
                del known[name]
            else:
                known[name] = asked
            members.hubs_due = 0.0
            self._queue[Kind.MESH, mesh.meta.name] = None
        return asked

    def _asked(self, mesh: Mesh, members: _Members) -> dict[str, Asked]:
        """Those that somebody asks for, by name."""
        if members.asked is None:
            members.asked = {
                name: asked
                for name, peer in members.peers.items()
                if (asked := self._ask(peer, mesh)) is not None
            }
        return members.asked

    def _ask(self, peer: Peer, mesh: Mesh) -> Asked | None:
        if mesh.spec.existing_interface:
            return None  # it has no hubs, whatever a peer says
        labels = self._nodes.labels(peer) if self._nodes is not None else None
        return asked_of(peer, hubs=mesh.spec.hubs, labels=labels)

    def _choose_hubs(self, mesh: Mesh, members: _Members, *, now: float, wall: float) -> HubPlan:
        """Whom the registry chooses as hubs; peers whose role that changes are planned."""
        is_auto = mesh.spec.hubs.mode is HubMode.AUTO
        if is_auto and members.hubs is not None and now < members.hubs_due:
            self._delay((Kind.MESH, mesh.meta.name), members.hubs_due)
            return members.hubs
        asked, before = self._asked(mesh, members), self._chosen(members)
        plan = plan_hubs(mesh, peers=members.peers, asked=asked, chosen=before, wall=wall)
        members.hubs, members.hubs_due = plan, now + HUBS_INTERVAL
        for name in (*sorted(plan.chosen - before), *sorted(before - plan.chosen)):
            self._queue[Kind.PEER, name] = None
        return plan

    def _chosen(self, members: _Members) -> frozenset[str]:
        """Whom the registry chose before, by what this process or, at its start, the peers remember."""
        if members.hubs is not None:
            return frozenset(name for name in members.hubs.chosen if name in members.peers)
        asked = members.asked or {}
        return frozenset(
            name
            for name, peer in members.peers.items()
            if peer.assignment.role is Role.HUB and name not in asked and peer.assignment.tombstone is None
        )

    def _note_lack(self, members: _Members, peer: Peer, part: Assignment) -> None:
        name, mesh = peer.meta.name, self._meshes.get(peer.spec.mesh)
        wanted = 0
        if mesh is not None and peer.assignment.tombstone is None:
            wanted = sum(
                prefix is not None for prefix in (mesh.spec.addressing.ipv4, mesh.spec.addressing.ipv6)
            )
        lacks = len(part.addresses) < wanted
        if lacks == (name in members.lacking):
            return
        (members.lacking.add if lacks else members.lacking.discard)(name)
        self._queue[Kind.MESH, peer.spec.mesh] = None

    def _plan_mesh(self, mesh: Mesh, *, now: float, wall: float) -> Action | None:
        members, nodes = self._members_of(mesh.meta.name), self._nodes
        hubs = self._choose_hubs(mesh, members, now=now, wall=wall)
        part = plan_mesh_status(
            mesh,
            peers=members.peers.values(),
            conditions=mesh_conditions(
                mesh,
                overlaps=_older_overlap(mesh, self._meshes.values()),
                without_address=sorted(members.lacking),
                conflicting=sorted(members.conflicts),
                wall=wall,
                ports=nodes.port_conflict(mesh) if nodes is not None else None,
                impostor=nodes.cluster if nodes is not None and nodes.is_refused(mesh) else "",
                hubs=hubs_state(
                    mesh,
                    peers=members.peers,
                    asked=self._asked(mesh, members),
                    chosen=self._chosen(members),
                ),
                keys=keys_failed(mesh, (peer for peer in members.peers.values() if peer.assignment.online)),
            ),
            signing_key=self._signing_key,
            reflectors=self._reflectors,
            gateway=self._gateway,
            cluster=self._cluster,
            hubs=hubs.told,
        )
        if part == mesh.status:
            return None
        self._mesh_due[mesh.meta.name] = now + MESH_INTERVAL
        return WriteMeshStatus(mesh, part)

    def _is_online(self, peer: Peer) -> bool:
        if not self._tells_liveness or peer.assignment.tombstone is not None:
            return peer.assignment.online
        if peer.meta.name in self._alive or peer.meta.name in self._spoke:
            return True
        return peer.assignment.online and not self._heard_out

    def _is_expired(self, peer: Peer, mesh: Mesh, *, wall: float) -> bool:
        if self._is_online(peer) or not is_expired(peer, mesh=mesh, wall=wall):
            return False
        # After a long time without a registry every peer looks expired, until it had the time to be heard.
        return peer.assignment.tombstone is not None or self._heard_out or not self._tells_liveness

    # --- the cache and its indices ------------------------------------------------------------------------

    def _members_of(self, mesh: str) -> _Members:
        return self._members.setdefault(mesh, _Members())

    def _known(self, kind: Kind) -> Mapping[str, Mesh | Peer]:
        return self._meshes if kind is Kind.MESH else self._peers

    def _find(self, key: Key) -> Mesh | Peer | None:
        kind, name = key
        return self._known(kind).get(name)

    def _doubt(self, resource: Mesh | Peer) -> None:
        self._doubted.add(resource.meta.uid)
        self._queue[kind_of(resource), resource.meta.name] = None

    def _put(self, resource: Resource, *, at: int) -> None:
        """Take a resource that was there at the revision `at`."""
        uid = resource.meta.uid
        if at <= self._deleted.get(uid, -1):
            return
        self._deleted.pop(uid, None)
        match resource:
            case Mesh(meta=meta):
                before = self._meshes.get(meta.name)
                if _is_old(resource, before):
                    return
                self._meshes[meta.name] = resource
                self._queue[Kind.MESH, meta.name] = None
                if self._nodes is not None:
                    self._nodes.put_mesh(resource)
                if before is None or before.meta.uid != meta.uid or before.spec != resource.spec:
                    self._mesh_changed(meta.name)
            case Peer(meta=meta):
                known = self._peers.get(meta.name)
                if _is_old(resource, known):
                    return
                if known is not None and known.spec.mesh != resource.spec.mesh:
                    self._unindex(known)
                self._index(resource)
                self._queue[Kind.PEER, meta.name] = None
                self._queue[Kind.MESH, resource.spec.mesh] = None
            case _:
                return

    def _index(self, peer: Peer) -> None:
        """Make `peer` the one that is known under its name."""
        name, members = peer.meta.name, self._members_of(peer.spec.mesh)
        before = members.peers.get(name)
        self._peers[name] = members.peers[name] = peer
        if self._nodes is not None:
            self._nodes.put_peer(peer)
        holds = {interface.ip for interface in peer.assignment.addresses}
        held = {interface.ip for interface in before.assignment.addresses} if before is not None else set()
        self._release(members, name, held - holds)
        for address in holds:
            members.taken.setdefault(address, name)
        spec = peer.spec
        is_routed = bool(spec.routes or spec.pod_prefixes) and peer.assignment.tombstone is None
        was = members.routed.get(name)
        if is_routed:
            members.routed[name] = peer
        else:
            members.routed.pop(name, None)
        if is_routed != (was is not None) or (was is not None and _routes(was) != _routes(peer)):
            self._contested.add(peer.spec.mesh)

    def _forget(self, resource: Resource, *, at: int | None = None) -> None:
        """Take that a resource is gone, at the revision `at` or, where that is not told, by now."""
        seen = self._seen.get(kind_of(resource))
        gone = at if at is not None else max(resource.meta.revision, seen.number if seen is not None else 0)
        self._deleted[resource.meta.uid] = max(gone, self._deleted.pop(resource.meta.uid, 0))
        if len(self._deleted) > MAX_DELETED:
            del self._deleted[next(iter(self._deleted))]
        self._unindex(resource)

    def _unindex(self, resource: Resource) -> None:
        name = resource.meta.name
        self._doubted.discard(resource.meta.uid)
        if isinstance(resource, Mesh):
            known: Resource | None = self._meshes.get(name)
            if known is not None and known.meta.uid == resource.meta.uid:
                del self._meshes[name]
                self._mesh_due.pop(name, None)
                if self._nodes is not None:
                    self._nodes.drop_mesh(name)
                self._mesh_changed(name)
        elif isinstance(resource, Peer):
            peer = self._peers.get(name)
            if peer is None or peer.meta.uid != resource.meta.uid:
                return
            members = self._members_of(peer.spec.mesh)
            del self._peers[name], members.peers[name]
            members.lacking.discard(name)
            if members.asked is not None:
                members.asked.pop(name, None)
            members.hubs_due = 0.0
            self._release(members, name, {interface.ip for interface in peer.assignment.addresses})
            if members.routed.pop(name, None) is not None:
                self._contested.add(peer.spec.mesh)
            if self._nodes is not None:
                self._nodes.drop_peer(peer)
            self._queue[Kind.MESH, peer.spec.mesh] = None

    def _release(self, members: _Members, name: str, addresses: Iterable[IPAddress]) -> None:
        """Free what `name` holds of `addresses`; whoever found none left is planned again."""
        freed = [address for address in addresses if members.taken.get(address) == name]
        for address in freed:
            del members.taken[address]
        if freed:
            self._queue.update(((Kind.PEER, each), None) for each in members.lacking)

    def _undo(self, action: Action) -> None:
        """Forget what was reserved for an action that was not done."""
        self._in_flight.discard(key_of(action))
        if isinstance(action, WriteAssignment):
            peer = action.peer
            planned = {interface.ip for interface in action.part.addresses}
            has = {interface.ip for interface in peer.assignment.addresses}
            self._release(self._members_of(peer.spec.mesh), peer.meta.name, planned - has)

    def _mesh_changed(self, name: str) -> None:
        self._contested.add(name)
        members = self._members_of(name)
        members.asked, members.hubs_due = None, 0.0
        self._queue.update(((Kind.PEER, peer), None) for peer in members.peers)
        self._queue.update(((Kind.MESH, other), None) for other in self._meshes)  # they may overlap it

    def _judge_routes(self, name: str) -> None:
        members, mesh = self._members_of(name), self._meshes.get(name)
        before = members.conflicts
        members.conflicts = route_conflicts(mesh, members.routed.values()) if mesh is not None else {}
        for peer in before.keys() | members.conflicts.keys():
            if before.get(peer) != members.conflicts.get(peer):
                self._queue[Kind.PEER, peer] = None
                self._queue[Kind.MESH, name] = None


def _is_old(resource: Resource, known: Resource | None) -> bool:
    """Whether what is known of the same resource is as new or newer."""
    return (
        known is not None
        and known.meta.uid == resource.meta.uid
        and known.meta.revision >= resource.meta.revision
    )


def _routes(peer: Peer) -> tuple[object, ...]:
    """What of a peer decides about conflicts of its routes."""
    return peer.spec.routes, peer.spec.pod_prefixes, peer.report is not None


def _older_overlap(mesh: Mesh, meshes: Iterable[Mesh]) -> Mesh | None:
    """The oldest mesh whose address space `mesh` overlaps, among those older than it."""
    older = (
        other
        for other in meshes
        if (other.meta.created, other.meta.uid) < (mesh.meta.created, mesh.meta.uid) and _overlap(mesh, other)
    )
    return min(older, key=lambda each: (each.meta.created, each.meta.uid), default=None)


def _overlap(one: Mesh, other: Mesh) -> bool:
    ours, theirs = one.spec.addressing, other.spec.addressing
    if ours.ipv4 is not None and theirs.ipv4 is not None and ours.ipv4.overlaps(theirs.ipv4):
        return True
    return ours.ipv6 is not None and theirs.ipv6 is not None and ours.ipv6.overlaps(theirs.ipv6)
