"""A hub's side of the tree: where each edge is attached, and how all hubs come to know it. Pure.

A hub keeps the latest claim of each edge, whoever brings it, as long as the edge is a member and signed it.
It answers with what it holds. What comes from the edge itself it passes on to all other hubs, and again until
each has answered with the same; a hub that starts anew is told everything, and so is a peer that becomes one.
So hubs agree without the registry, and what one of them forgot it hears from the others and from its edges.

An edge is reached by the hub of its claim, where that is a hub of the mesh. Without a claim, and where the
claim names the edge itself, it is reached straight.

In a full mesh claims still count: edges that come from a tree, or know of one before we do, are attached.
They say when they are no longer; what is left is forgotten after FORGET_AFTER.

Hubs and edges are named by their WireGuard keys. Time is monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from scope.attachments import supersedes, verify_attachment
from scope.model import Attachment, PublicKey, Snapshot
from scope.wire import MAX_ATTACHMENTS
from scope_agent.agenda import earliest

FORGET_AFTER: Final = 120.0  # edges stay attached for a minute; twice that
AGAIN_FIRST, AGAIN_LONGEST = 0.3, 30.0  # between two tellings that a hub does not answer
WINDOW: Final = 16 * MAX_ATTACHMENTS  # claims under way to one hub


@dataclass(frozen=True, slots=True)
class Telling:
    """Tell a hub where edges are attached."""

    hub: PublicKey
    attachments: tuple[Attachment, ...]


@dataclass(slots=True)
class _Told:
    """What one hub is to be told. Keys are edges, in order."""

    waiting: dict[PublicKey, None] = field(default_factory=dict)
    under_way: dict[PublicKey, None] = field(default_factory=dict)
    tries: int = 0  # since it last answered
    say_at: float | None = None  # when more is to be said
    again_at: float | None = None  # when what is under way is to be said again


class Holding:
    """The claims that one hub holds. `own` is our WireGuard key."""

    def __init__(self, *, own: PublicKey) -> None:
        self._own = own
        self._snapshot = Snapshot()
        self._is_hub = False
        self._hubs: frozenset[PublicKey] = frozenset()  # the others
        self._held: dict[PublicKey, Attachment] = {}
        self._restored: tuple[Attachment, ...] = ()
        self._told: dict[PublicKey, _Told] = {}
        self._moved: dict[PublicKey, Attachment | None] = {}  # edges, with their claims before
        self.changes = 0  # how often a claim was taken or dropped
        self._forget_at: float | None = None

    # --- what is so ----------------------------------------------------------------------------------------

    @property
    def held(self) -> Mapping[PublicKey, Attachment]:
        """The claims, by edge."""
        return self._held

    @property
    def has_attached(self) -> bool:
        """Whether some edge claims a hub."""
        return any(claim.hub != claim.edge for claim in self._held.values())

    def home_of(self, edge: PublicKey) -> PublicKey | None:
        """The other hub by which an edge is reached; None: straight."""
        return self._home_by(self._held.get(edge), edge)

    def homes(self) -> dict[PublicKey, PublicKey]:
        """The edges that are reached by other hubs."""
        homes = ((edge, self._home_by(claim, edge)) for edge, claim in self._held.items())
        return {edge: home for edge, home in homes if home is not None}

    def take_moves(self) -> dict[PublicKey, tuple[PublicKey | None, PublicKey | None]]:
        """The edges that are reached by another hub than before, with both; asked again, none."""
        if not self._moved:
            return {}
        moved, self._moved = self._moved, {}
        moves = {edge: (self._home_by(before, edge), self.home_of(edge)) for edge, before in moved.items()}
        return {edge: move for edge, move in moves.items() if move[0] != move[1]}

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        first = self._forget_at
        for told in self._told.values():
            first = earliest(first, told.say_at, told.again_at)
        return first

    # --- what happens --------------------------------------------------------------------------------------

    def restore(self, attachments: tuple[Attachment, ...]) -> None:
        """Take what was held before a restart: before the first `configure`, which says who is a member."""
        self._restored = attachments

    def configure(
        self, snapshot: Snapshot, hubs: Set[PublicKey], *, is_hub: bool, is_tree: bool, now: float
    ) -> None:
        """What the mesh says; `hubs` are the other ones."""
        self._snapshot, self._is_hub = snapshot, is_hub
        if not is_hub:
            self._held, self._told, self._moved = {}, {}, {}
            self._hubs, self._forget_at = frozenset(), None
            return
        restored, self._restored = self._restored, ()
        for claim in restored:
            self._take(claim)
        for edge in self._held.keys() - snapshot.peers.keys():
            del self._held[edge]
        for hub in self._hubs - hubs:
            self._told.pop(hub, None)
        new, self._hubs = sorted(hubs - self._hubs), frozenset(hubs)
        for hub in new:
            self.greeted(hub, now)
        if is_tree or not self._held:
            self._forget_at = None
        elif self._forget_at is None:
            self._forget_at = now + FORGET_AFTER

    def take(
        self, sender: PublicKey, attachments: Iterable[Attachment], *, is_tree: bool, now: float
    ) -> tuple[Attachment, ...]:
        """Take claims that the edge itself or another hub brings; what we hold of these edges comes back."""
        if not self._is_hub:
            return ()
        known: list[Attachment] = []
        for claim in attachments:
            if sender != claim.edge and sender not in self._hubs:
                continue  # a signature takes time to check, and nobody else has a reason to bring it
            if self._take(claim) and sender == claim.edge:
                for hub in sorted(self._hubs):
                    self._tell(hub, claim.edge, now)
            if claim.edge in self._held:
                known.append(self._held[claim.edge])
        if self._held and not is_tree and self._forget_at is None:
            self._forget_at = now + FORGET_AFTER
        return tuple(known)

    def answered(self, hub: PublicKey, attachments: Iterable[Attachment], now: float) -> None:
        """What another hub holds of edges that we told it of."""
        if not self._is_hub or hub not in self._hubs:
            return
        told = self._told.get(hub)
        for claim in attachments:
            self._take(claim)
            if told is not None and self._held.get(claim.edge) == claim:
                told.waiting.pop(claim.edge, None)
                told.under_way.pop(claim.edge, None)
                told.tries = 0
        if told is None:
            return
        if told.waiting:
            told.say_at = now
        elif not told.under_way:
            del self._told[hub]

    def greeted(self, hub: PublicKey, now: float) -> None:
        """Another hub has started anew: it is to hear everything."""
        if hub in self._hubs and self._held:
            self._told[hub] = _Told(waiting=dict.fromkeys(self._held), say_at=now)

    def reached(self, hub: PublicKey, now: float) -> None:
        """Another hub is there again: what it did not answer is said at once."""
        told = self._told.get(hub)
        if told is not None:
            told.tries, told.again_at = 0, now

    def handle_timer(self, now: float) -> list[Telling]:
        """Do what is due: what is to be said now."""
        if self._forget_at is not None and now >= self._forget_at:
            self._forget_at = None
            self._note(self._held)
            self._held, self._told = {}, {}
        tellings: list[Telling] = []
        for hub, told in self._told.items():
            if told.again_at is not None and now >= told.again_at:
                told.waiting = told.under_way | told.waiting
                told.under_way, told.again_at, told.say_at = {}, None, now
                told.tries += 1
            if told.say_at is not None and now >= told.say_at:
                told.say_at = None
                tellings += self._say(hub, told, now)
        return tellings

    # --- how -----------------------------------------------------------------------------------------------

    def _take(self, claim: Attachment) -> bool:
        """Whether the claim is news, and to be believed."""
        edge = self._snapshot.peers.get(claim.edge)
        mesh = self._snapshot.mesh
        if mesh is None or edge is None or edge.report is None:
            return False
        if not supersedes(claim, self._held.get(claim.edge)):
            return False
        if claim.hub not in (self._own, claim.edge) and claim.hub not in self._snapshot.peers:
            return False
        if not verify_attachment(claim, mesh_uid=mesh.meta.uid, signing=edge.report.keys.signing):
            return False
        self._note((claim.edge,))
        self._held[claim.edge] = claim
        return True

    def _note(self, edges: Iterable[PublicKey]) -> None:
        self.changes += 1
        for edge in edges:
            self._moved.setdefault(edge, self._held.get(edge))

    def _home_by(self, claim: Attachment | None, edge: PublicKey) -> PublicKey | None:
        if claim is None or claim.hub not in self._hubs or edge in self._hubs:
            return None
        return claim.hub

    def _tell(self, hub: PublicKey, edge: PublicKey, now: float) -> None:
        told = self._told.setdefault(hub, _Told())
        told.under_way.pop(edge, None)  # an earlier claim of it
        told.waiting[edge] = None
        told.say_at = now

    def _say(self, hub: PublicKey, told: _Told, now: float) -> list[Telling]:
        """The next claims: as many as the window takes, few to a hub that does not answer."""
        window = MAX_ATTACHMENTS if told.tries else WINDOW
        edges = list(islice(told.waiting, max(window - len(told.under_way), 0)))
        for edge in edges:
            del told.waiting[edge]
            told.under_way[edge] = None
        if told.again_at is None and told.under_way:
            told.again_at = now + min(AGAIN_FIRST * 2 ** min(told.tries, 10), AGAIN_LONGEST)
        known = [self._held[edge] for edge in edges if edge in self._held]
        starts = range(0, len(known), MAX_ATTACHMENTS)
        return [Telling(hub, tuple(known[start : start + MAX_ATTACHMENTS])) for start in starts]
