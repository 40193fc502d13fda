"""The tree as one peer sees it: whom it has links with, who leads to the others, what it forwards. Pure.

An edge has an `Attaching`, a hub a `Holding`; a peer may be the one today and the other tomorrow. Both are
here so that the agent speaks to one room, in verbs: `configure`, `observe`, `receive`, `greeted`,
`handle_timer`, `get_timer`, `outputs`, `take_changes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from scope.attachments import sign_attachment, verify_attachment
from scope.model import Attachment, PeerKeys, PublicKey, Role, Secret, Snapshot, TopologyMode
from scope.topology import Topology, by_hub, offered, rehomed
from scope.wire import Attach, Attached
from scope_agent.agenda import earliest
from scope_agent.tree.attaching import Attaching, Phase, Reach
from scope_agent.tree.holding import Holding
from scope_agent.tree.rules import ForwardedPrefixes, forwarded_prefixes


@dataclass(frozen=True, slots=True)
class Say:
    """Say something to a hub, by its WireGuard key."""

    to: PublicKey
    message: Attach


@dataclass(frozen=True, slots=True)
class TreeChanges:
    """What differs from when it was last asked. `moves`: edges, and the hubs that led there and do now."""

    is_reshaped: bool  # all is to be worked out anew
    moves: Mapping[PublicKey, tuple[PublicKey | None, PublicKey | None]]
    to_keep: bool  # the disk should know


_UNCHANGED = TreeChanges(is_reshaped=False, moves=MappingProxyType({}), to_keep=False)


class Tree:
    """The tree room. `keys` and `signing`, the private half, are ours; `wall` is the wall clock at `now`."""

    def __init__(self, keys: PeerKeys, *, signing: Secret, now: float, wall: float) -> None:
        self._own = own = keys.wireguard
        self._keys, self._signing = keys, signing
        self._offset = wall - now
        self._snapshot = Snapshot()
        self._was_full = False
        self._is_tree = self._is_hub = False
        self._hubs: frozenset[PublicKey] = frozenset()
        self._attaching = Attaching(own=own, sign=self._sign)
        self._holding = Holding(own=own)
        self._alive: dict[PublicKey, bool] = {}  # hubs, as they were last observed
        self._shape: tuple[object, ...] = ()
        self._kept: tuple[object, ...] = ()

    # --- what is so ----------------------------------------------------------------------------------------

    @property
    def home(self) -> PublicKey | None:
        """The hub that we are attached to."""
        return self._attaching.home

    def pairs(self) -> frozenset[PublicKey] | None:
        """The peers that we have links with; None: all."""
        return self._hubs if self._attaching.phase is Phase.TREE else None

    def watched(self) -> dict[PublicKey, float]:
        """How often hubs are to be asked whether they are there, in seconds."""
        return self._attaching.watched()

    def take_doubt(self) -> frozenset[PublicKey]:
        """The hubs that are to be asked now; asked again, none."""
        return self._attaching.take_doubt()

    def topology(self, settled: Topology) -> Topology:
        """By whom everything is reached, worked out anew. `settled` says what is whose."""
        mesh = self._snapshot.mesh
        if mesh is None:
            return settled
        if self._is_hub:
            homes = self._holding.homes()
            return rehomed(settled, settled, {edge: (None, hub) for edge, hub in homes.items()})
        phase = self._attaching.phase
        if phase in (Phase.FULL, Phase.JOINING):
            return settled
        return by_hub(
            settled,
            mesh.spec.addressing,
            hubs=self._hubs,
            home=self.home,
            beside=phase is Phase.LEAVING,
        )

    def forwarding(self, settled: Topology) -> ForwardedPrefixes | None:
        """What a hub forwards; None: nothing."""
        own, mesh = self._snapshot.own, self._snapshot.mesh
        if mesh is None or own is None or not self._is_hub:
            return None
        if not self._is_tree and not self._holding.has_attached:
            return None
        return forwarded_prefixes(
            mesh.spec.addressing,
            routes=settled.routes | settled.pods,
            own=offered(own.spec, mesh.spec.pod_networking),
        )

    def kept(self) -> tuple[Attachment, ...]:
        """For the disk: all claims that we hold, and our own last one."""
        held = tuple(self._holding.held.values())
        return held if self._attaching.claim is None else (*held, self._attaching.claim)

    def take_changes(self) -> TreeChanges:
        """What changed since the last call."""
        shape = (self._hubs, self._is_hub, self._attaching.phase, self.home)
        kept = (self._attaching.claim, self._holding.changes)
        moves = self._holding.take_moves()
        if not moves and shape == self._shape and kept == self._kept:
            return _UNCHANGED
        shape_before, self._shape = self._shape, shape
        kept_before, self._kept = self._kept, kept
        return TreeChanges(shape_before != shape, moves, kept_before != kept)

    # --- what happens --------------------------------------------------------------------------------------

    def restore(self, attachments: tuple[Attachment, ...], *, was_in_mesh: bool) -> None:
        """Take what was kept. `was_in_mesh`: an earlier run knew other peers."""
        self._was_full = was_in_mesh
        self._attaching.restore(next((each for each in attachments if each.edge == self._own), None))
        self._holding.restore(tuple(each for each in attachments if each.edge != self._own))

    def configure(self, snapshot: Snapshot, *, is_removed: bool, now: float) -> None:
        """Take what is known of the mesh."""
        self._snapshot = snapshot
        mesh, own = snapshot.mesh, snapshot.own
        if mesh is None or own is None:
            return
        self._is_tree = mesh.spec.topology is TopologyMode.TREE
        self._is_hub = own.assignment.role is Role.HUB and not is_removed
        self._hubs = frozenset(
            key for key, peer in snapshot.peers.items() if peer.assignment.role is Role.HUB
        )
        self._holding.configure(snapshot, self._hubs, is_hub=self._is_hub, is_tree=self._is_tree, now=now)
        if self._is_hub:
            self._attaching.stop()
        else:
            self._attaching.configure(
                self._hubs, wants_tree=self._is_tree, was_full=self._was_full, now=now, wall=self._wall(now)
            )

    def observe(self, key: PublicKey, reach: Reach, now: float) -> None:
        """Take how a peer is reached now."""
        if key not in self._hubs:
            return
        was_alive = self._alive.get(key, False)
        self._alive[key] = reach.is_alive
        if reach.is_alive and not was_alive:
            self._holding.reached(key, now)
        if not self._is_hub:
            self._attaching.observe(key, reach, now=now, wall=self._wall(now))

    def greeted(self, key: PublicKey, now: float) -> None:
        """A peer has started anew."""
        if self._is_hub:
            self._holding.greeted(key, now)
        elif key in self._hubs:
            self._attaching.greeted(key, now)

    def receive(self, sender: PublicKey, message: Attach | Attached, now: float) -> Attached | None:
        """Take a message of a peer; what is to be answered comes back."""
        match message:
            case Attach(attachments):
                known = self._holding.take(sender, attachments, is_tree=self._is_tree, now=now)
                return Attached(known) if known else None
            case Attached(attachments):
                self._holding.answered(sender, attachments, now)
                if not self._is_hub and sender in self._hubs:
                    self._take_answer(sender, attachments, now)
                return None

    def _take_answer(self, hub: PublicKey, attachments: tuple[Attachment, ...], now: float) -> None:
        mesh = self._snapshot.mesh
        if mesh is None:
            return
        for held in attachments[:1]:
            if held.edge == self._own and verify_attachment(
                held, mesh_uid=mesh.meta.uid, signing=self._keys.signing
            ):
                self._attaching.answered(hub, held, now=now, wall=self._wall(now))

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return earliest(self._attaching.get_timer(), self._holding.get_timer())

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if not self._is_hub:
            self._attaching.handle_timer(now, self._wall(now))

    def outputs(self, now: float) -> list[Say]:
        """What is to be sent now."""
        said = [Say(each.hub, Attach((each.claim,))) for each in self._attaching.outputs()]
        return said + [Say(each.hub, Attach(each.attachments)) for each in self._holding.handle_timer(now)]

    def _wall(self, now: float) -> float:
        return now + self._offset

    def _sign(self, hub: PublicKey, epoch: int) -> Attachment:
        mesh = self._snapshot.mesh
        uid = mesh.meta.uid if mesh is not None else ""
        return sign_attachment(mesh_uid=uid, edge=self._own, hub=hub, epoch=epoch, secret=self._signing)


__all__ = ["Reach", "Say", "Tree", "TreeChanges"]
