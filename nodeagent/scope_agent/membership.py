"""Who is a member: registry facts, the snapshot from disk and tombstones become one Snapshot.

The registry advises, the agent decides what to believe:

- a peer that is put is believed, unless a tombstone names its uid or key;
- a removal is believed on a DELETED event; on a tombstone signed by the registry or by the peer itself; or
  when a complete list, not older than the last one seen, holds the mesh and our own ScopePeer but not the
  peer. Where a list would remove more than MANY peers and a tenth of the mesh, it takes a second list, at
  least 30 s later, that says the same;
- a peer that is told to leave is no member while it is;
- a revision that goes backwards, or another registry id, is a restore: for ten minutes nothing is removed but
  by a signed tombstone, then a complete list is asked for; no tombstone is forgotten.

Tombstones are kept for good measure on disk and passed on to peers, so an old snapshot brings nobody back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scope.model import Kind, Mesh, Peer, PublicKey, Revision, Snapshot, Tombstone, kind_of
from scope.registry.port import Deleted, Disconnected, Fact, Listed, Put
from scope.tombstones import verify_tombstone

MANY = 3  # so few peers may vanish at once without a second look
SECOND_LIST_AFTER = 30.0
RESTORE_PATIENCE = 600.0
MAX_TOMBSTONES = 4096  # 200 bytes each; the oldest go first, long after their peers' expiry


@dataclass(frozen=True, slots=True)
class Registration:
    """Whether the registry is heard, for status."""

    connected: bool
    since: float
    reason: str = ""


class Membership:
    """The membership room. `own` is our WireGuard key, `mesh` the mesh's name.

    `registry_key` is the registry's signing key; None: whichever the ScopeMesh's status names, where the
    registry itself has been authenticated otherwise.
    """

    def __init__(self, *, own: PublicKey, mesh: str, registry_key: PublicKey | None, now: float) -> None:
        self._own = own
        self._mesh_name = mesh
        self._registry_key = registry_key
        self._mesh: Mesh | None = None
        self._own_peer: Peer | None = None
        self._made_anew = ""  # uid of our own peer while it was given no addresses since it was made anew
        self._peers: dict[str, Peer] = {}  # by uid: all that the registry holds
        self._claims: dict[PublicKey, set[str]] = {}  # uids that name a WireGuard key: one, if all is well
        self._believed: dict[PublicKey, Peer] = {}
        self._tombstones: dict[str, Tombstone] = {}  # by uid of the removed peer
        self._buried: set[PublicKey] = set()
        self._revisions: dict[Kind, Revision] = {}  # each kind has a stream of its own
        self._doubted: tuple[frozenset[str], float] | None = None
        self._patient_until = float("-inf")
        self._registration = Registration(connected=False, since=now, reason="not asked yet")
        self._snapshot = Snapshot()
        self._relist_at: float | None = None
        self._complete = False

    # --- inputs --------------------------------------------------------------------------------------------

    def restore(self, snapshot: Snapshot) -> None:
        """Take the last good snapshot from disk."""
        self._mesh, self._own_peer = snapshot.mesh, snapshot.own
        if snapshot.revision is not None:
            self._revisions = {Kind.MESH: snapshot.revision, Kind.PEER: snapshot.revision}
        for tombstone in snapshot.tombstones:
            self._keep(tombstone)
        for peer in snapshot.peers.values():
            self._hold(peer)
        self._publish()

    def receive(self, fact: Fact, now: float) -> None:
        """Take one fact of the registry."""
        match fact:
            case Disconnected(reason):
                if self._registration.connected or self._registration.reason != reason:
                    self._registration = Registration(connected=False, since=now, reason=reason)
                return
            case Listed():
                self._registered(now)
                self._listed(fact, now)
            case Put(resource, revision):
                self._registered(now)
                if self._is_news(kind_of(resource), revision, now) and isinstance(resource, Mesh | Peer):
                    self._put(resource)
            case Deleted(last, revision):
                self._registered(now)
                news = self._is_news(kind_of(last), revision, now)
                if news and isinstance(last, Peer) and now >= self._patient_until:
                    self._drop(last.meta.uid)
        self._publish()

    def bury(self, tombstone: Tombstone) -> bool:
        """Take a tombstone that a peer passed on; True when it was news and its signature holds."""
        if tombstone.peer_uid in self._tombstones or self._mesh is None:
            return False
        if tombstone.mesh_uid != self._mesh.meta.uid or not self._is_signed(tombstone):
            return False
        self._keep(tombstone)
        self._publish()
        return True

    # --- views ---------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What is believed now; the same object until it changes."""
        return self._snapshot

    @property
    def is_complete(self) -> bool:
        """Whether everybody is known: a complete list was believed since the start, not the disk alone."""
        return self._complete

    def is_buried(self, key: PublicKey) -> bool:
        """Whether a tombstone names the WireGuard key."""
        return key in self._buried

    def removed(self) -> dict[PublicKey, Peer]:
        """Those whom a tombstone names, by WireGuard key, as far as the registry still tells of them."""
        return {
            peer.report.keys.wireguard: peer
            for uid, peer in self._peers.items()
            if uid in self._tombstones and peer.report is not None
        }

    def registration(self) -> Registration:
        """Whether the registry is heard."""
        return self._registration

    def wants_list(self, now: float) -> bool:
        """Whether a second list is due to confirm that many peers are gone; asked once."""
        if self._relist_at is None or now < self._relist_at:
            return False
        self._relist_at = None
        return True

    def get_timer(self) -> float | None:
        """When `wants_list` turns true."""
        return self._relist_at

    def removed_self(self) -> bool:
        """Whether we were deliberately removed: we are to leave."""
        return self._own in self._buried

    # --- inside --------------------------------------------------------------------------------------------

    def _registered(self, now: float) -> None:
        if not self._registration.connected:
            self._registration = Registration(connected=True, since=now)

    def _is_news(self, kind: Kind, revision: Revision, now: float) -> bool:
        """Take the revision of one change; False for one that a list, asked for meanwhile, held already."""
        before = self._revisions.get(kind)
        if before is not None and before.registry == revision.registry and revision.number < before.number:
            return False
        self._advance(kind, revision, now)
        return True

    def _advance(self, kind: Kind, revision: Revision, now: float) -> bool:
        """Take a revision; False when it goes backwards: the registry was restored."""
        before = self._revisions.get(kind)
        self._revisions[kind] = revision
        if before is None or (before.registry == revision.registry and before.number <= revision.number):
            return True
        self._patient_until = now + RESTORE_PATIENCE
        self._relist_at = self._patient_until
        self._doubted = None
        return False

    def _listed(self, listed: Listed, now: float) -> None:
        forward = self._advance(listed.kind, listed.revision, now)
        if listed.kind is Kind.MESH:
            for resource in listed.resources:
                if isinstance(resource, Mesh):
                    self._put(resource)
            return
        present = {resource.meta.uid for resource in listed.resources}
        for resource in listed.resources:
            if isinstance(resource, Peer):
                self._put(resource)
        if not listed.complete or not forward or now < self._patient_until or self._mesh is None:
            return
        if self._own_peer is None or self._own_peer.meta.uid not in present:
            return
        self._complete = True
        self._believe_absence(frozenset(self._peers.keys() - present), now)

    def _believe_absence(self, gone: frozenset[str], now: float) -> None:
        many = len(gone) > MANY and len(gone) * 10 > len(self._peers)
        if many:
            if self._doubted is None or self._doubted[0] != gone:
                self._doubted = (gone, now)
                self._relist_at = now + SECOND_LIST_AFTER
                return
            if now - self._doubted[1] < SECOND_LIST_AFTER:
                return
        self._doubted = None
        for uid in gone:
            self._drop(uid)

    def _put(self, resource: Mesh | Peer) -> None:
        if isinstance(resource, Mesh):
            if resource.meta.name == self._mesh_name:
                self._mesh = resource
            return
        if resource.spec.mesh != self._mesh_name:
            return
        tombstone = resource.assignment.tombstone
        if (
            tombstone is not None
            and tombstone.peer_uid == resource.meta.uid
            and tombstone.peer_uid not in self._tombstones
            and (self._mesh is None or tombstone.mesh_uid == self._mesh.meta.uid)
            and self._is_signed(tombstone, resource)
        ):
            self._keep(tombstone)
        if resource.report is not None and resource.report.keys.wireguard == self._own:
            self._own_peer = self._with_addresses(resource)
            return
        self._hold(resource)

    def _with_addresses(self, own: Peer) -> Peer:
        """Our own peer, if it was made anew and has no addresses yet, with those that we hold.

        The registry gives them again where they are free; traffic need not stop until it has.
        """
        before = self._own_peer
        if before is not None and before.meta.uid != own.meta.uid:
            self._made_anew = own.meta.uid
        if own.assignment.addresses:
            self._made_anew = ""
        if before is None or self._made_anew != own.meta.uid:
            return own
        return replace(own, assignment=replace(own.assignment, addresses=before.assignment.addresses))

    def _is_signed(self, tombstone: Tombstone, peer: Peer | None = None) -> bool:
        """Whether the registry, or the removed peer itself, signed."""
        own = self._own_peer
        if peer is None and own is not None and own.meta.uid == tombstone.peer_uid:
            peer = own
        peer = peer or self._peers.get(tombstone.peer_uid)
        report = peer.report if peer is not None else None
        if report is not None and report.keys.wireguard != tombstone.key:
            return False
        own_key = report.keys.signing if report is not None else None
        registry_key = self._registry_key
        if registry_key is None and self._mesh is not None:
            registry_key = self._mesh.status.signing_key
        return verify_tombstone(tombstone, registry=registry_key, peer=own_key)

    def _keep(self, tombstone: Tombstone) -> None:
        self._tombstones.setdefault(tombstone.peer_uid, tombstone)
        self._buried.add(tombstone.key)
        self._settle(tombstone.key)
        while len(self._tombstones) > MAX_TOMBSTONES:
            forgotten = self._tombstones.pop(next(iter(self._tombstones)))
            self._buried.discard(forgotten.key)
            self._settle(forgotten.key)

    # Each change settles one key, so that one endpoint's news costs a mesh of ten thousand next to nothing.

    def _hold(self, peer: Peer) -> None:
        uid = peer.meta.uid
        before = self._peers.get(uid)
        if before == peer:
            return
        if before is not None:
            self._drop(uid)
        self._peers[uid] = peer
        if peer.report is not None:
            self._claims.setdefault(peer.report.keys.wireguard, set()).add(uid)
            self._settle(peer.report.keys.wireguard)

    def _drop(self, uid: str) -> None:
        peer = self._peers.pop(uid, None)
        if peer is None or peer.report is None:
            return
        key = peer.report.keys.wireguard
        self._claims[key].discard(uid)
        if not self._claims[key]:
            del self._claims[key]
        self._settle(key)

    def _settle(self, key: PublicKey) -> None:
        """Believe the oldest peer that names the key, unless the key was removed or is our own."""
        held = [self._peers[uid] for uid in self._claims.get(key, ()) if uid not in self._tombstones]
        claimants = [peer for peer in held if not peer.spec.leaving]
        if not claimants or key in self._buried or key == self._own:
            self._believed.pop(key, None)
        else:
            self._believed[key] = min(claimants, key=lambda peer: (peer.meta.created, peer.meta.uid))

    def _publish(self) -> None:
        self._snapshot = Snapshot(
            mesh=self._mesh,
            own=self._own_peer,
            peers=dict(self._believed),
            tombstones=tuple(self._tombstones.values()),
            revision=self._revisions.get(Kind.PEER),
        )
