"""An edge's side of the tree: which hub it is attached to, how it moves between hubs and topologies. Pure.

An edge of a tree claims one hub, its *home*, which then leads to the whole mesh; every other hub is kept
warm. It claims the nearest hub of those that it reaches. It moves to a clearly nearer one after a while, and
to any other at once when the path to its home dies. The home takes what others send to the edge when it has
the claim, and so does the edge with the hub's answer; where the last home is dead there is nothing to wait
for.

The path to the home is asked every WATCH seconds also when it is idle, since what others send would else be
lost in silence. When it falls into doubt the other hubs are asked too: by the verdict it is known who lives.

A claim has an epoch, above that of any earlier claim of ours that we know of: from disk, from a hub's answer,
and from the wall clock, which alone would do if it never went back. A hub that knows a later claim of ours
answers with that, and we claim again, above it. So nothing has to be on disk for an edge to be right.

From a full mesh to a tree the edge keeps its links to other edges until a hub has taken its claim. From a
tree to a full mesh it stays attached for LEAVE_AFTER, while pairs of edges find their paths; then it claims
itself, which frees the hubs to reach it straight again.

Time is monotonic seconds, `wall` seconds since the epoch. Hubs are named by their WireGuard keys.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Final

from scope.attachments import supersedes
from scope.model import Attachment, PublicKey
from scope_agent.agenda import earliest

WATCH: Final = 1.0  # seconds between two looks at the home
WATCH_OTHERS: Final = 30.0  # at a hub that may become the home: its round trip, and that it lives
AGAIN_FIRST, AGAIN_LONGEST = 0.3, 30.0  # between two claims that nobody answers
SILENT_AFTER: Final = 2  # claims without an answer, and another hub is tried,
SILENT_FOR: Final = 30.0  # and this one not for so long
FIRST_PATIENCE: Final = 2.0  # for a home that is known from disk and was not reached yet
NEARER, NEARER_BY = 0.8, 0.01  # of the home's round trip, and seconds: else a hub is not worth a move
NEARER_FOR: Final = 5.0  # seconds for which it has to be so
LEAVE_AFTER: Final = 60.0  # the ladder's last bound: by then a pair has its path, or none
RELEASE_AGAIN, RELEASE_FOR = 1.0, 30.0  # hubs are told that we are attached no more; in the end they forget


class Phase(enum.Enum):
    """Where the edge stands between the two topologies."""

    FULL = enum.auto()  # a full mesh
    JOINING = enum.auto()  # a full mesh until a hub has taken our claim
    TREE = enum.auto()
    LEAVING = enum.auto()  # attached, and beside it as in a full mesh


@dataclass(frozen=True, slots=True)
class Reach:
    """How a hub is reached. `rtt` in seconds, None before an echo."""

    is_alive: bool
    rtt: float | None = None
    is_in_doubt: bool = False


@dataclass(frozen=True, slots=True)
class Claiming:
    """Tell a hub our claim."""

    hub: PublicKey
    claim: Attachment


class Attaching:
    """`own` is our WireGuard key; `sign` makes our claim of a hub with an epoch."""

    def __init__(self, *, own: PublicKey, sign: Callable[[PublicKey, int], Attachment]) -> None:
        self._own = own
        self._sign = sign
        self._hubs: frozenset[PublicKey] = frozenset()
        self._reach: dict[PublicKey, Reach] = {}
        self._silent: dict[
            PublicKey, float
        ] = {}  # hubs that do not answer, and until when they are not tried
        self._phase: Phase | None = None  # until the mesh is known
        self._claim: Attachment | None = None  # the last one that we made, or learned of
        self._chosen: PublicKey | None = None  # the hub that we claim
        self._home: PublicKey | None = None
        self._is_taken = False  # the hub has answered our claim
        self._tries = 0
        self._claim_at: float | None = None
        self._patient_until = float("-inf")
        self._nearer: tuple[PublicKey, float] | None = None  # a hub that is nearer than the home, since when
        self._leave_at: float | None = None
        self._releases: dict[PublicKey, None] = {}  # hubs to be told that we are attached no more
        self._release_at: float | None = None
        self._release_until = float("-inf")
        self._out: list[Claiming] = []
        self._is_in_doubt = False

    # --- what is so ----------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Where we stand."""
        return self._phase or Phase.FULL

    @property
    def home(self) -> PublicKey | None:
        """The hub that leads to the mesh."""
        return self._home

    @property
    def claim(self) -> Attachment | None:
        """For the disk: our last claim."""
        return self._claim

    def watched(self) -> dict[PublicKey, float]:
        """How often hubs are to be asked, in seconds."""
        if self.phase is Phase.FULL:
            return {}
        return {hub: WATCH if hub == self._chosen else WATCH_OTHERS for hub in self._hubs}

    def take_doubt(self) -> frozenset[PublicKey]:
        """The hubs that are to be asked now, because the home may be gone; asked again, none."""
        is_in_doubt, self._is_in_doubt = self._is_in_doubt, False
        return self._hubs - {self._chosen} if is_in_doubt else frozenset()

    def outputs(self) -> list[Claiming]:
        """What is to be sent now."""
        out, self._out = self._out, []
        return out

    # --- what happens --------------------------------------------------------------------------------------

    def restore(self, claim: Attachment | None) -> None:
        """Take the last claim from disk."""
        self._claim = claim

    def configure(
        self, hubs: Set[PublicKey], *, wants_tree: bool, was_full: bool, now: float, wall: float
    ) -> None:
        """What the mesh says: its hubs, and whether we are an edge of a tree.

        `was_full`: should this be the first that is heard of the mesh, then an earlier run knew it, so that
        its links stand unless our claim says otherwise.
        """
        gone = self._hubs - hubs
        self._hubs = frozenset(hubs)
        for hub in gone:
            self._reach.pop(hub, None)
            self._silent.pop(hub, None)
            self._releases.pop(hub, None)
        if self._phase is None:
            self._begin(wants_tree=wants_tree, was_full=was_full, now=now, wall=wall)
        elif wants_tree and self._phase in (Phase.FULL, Phase.LEAVING):
            self._phase = Phase.TREE if self._home is not None else Phase.JOINING
            self._leave_at = self._release_at = None
            self._releases = {}
        elif not wants_tree and self._phase is Phase.TREE and self._home is not None:
            self._phase, self._leave_at = Phase.LEAVING, now + LEAVE_AFTER
        elif not wants_tree and self._phase in (Phase.JOINING, Phase.TREE):
            self._leave(now, wall)
        self._choose(now, wall)

    def _begin(self, *, wants_tree: bool, was_full: bool, now: float, wall: float) -> None:
        claim = self._claim
        is_attached = claim is not None and claim.hub != self._own
        if not wants_tree:
            self._leave(now, wall)
            return
        self._phase = Phase.JOINING if was_full and not is_attached else Phase.TREE
        if claim is not None and claim.hub in self._hubs:
            self._chosen = self._home = claim.hub
            self._patient_until = now + FIRST_PATIENCE
            self._claim_at = now

    def stop(self) -> None:
        """Be no edge any more: we are a hub."""
        self._phase = Phase.FULL
        self._chosen = self._home = self._claim_at = self._leave_at = self._release_at = self._nearer = None
        self._releases = {}

    def observe(self, hub: PublicKey, reach: Reach, *, now: float, wall: float) -> None:
        """Take how a hub is reached now."""
        if hub not in self._hubs:
            return
        before = self._reach.get(hub, Reach(is_alive=False))
        self._reach[hub] = reach
        if hub == self._chosen:
            self._is_in_doubt |= reach.is_in_doubt and not before.is_in_doubt
            if reach.is_alive:
                self._patient_until = float("-inf")
                if not before.is_alive and not self._is_taken:
                    self._claim_at = now
            elif before.is_alive:
                self._patient_until = float("-inf")
        self._choose(now, wall)

    def greeted(self, hub: PublicKey, now: float) -> None:
        """The hub has started anew: it may not know of our claim."""
        self._silent.pop(hub, None)
        if hub == self._chosen:
            self._say_again(now)

    def answered(self, hub: PublicKey, held: Attachment, *, now: float, wall: float) -> None:
        """The claim of ours that a hub holds; its signature was verified."""
        self._silent.pop(hub, None)
        if held == self._claim:
            self._releases.pop(hub, None)
            if hub == self._chosen:
                self._taken()
        elif supersedes(held, self._claim):
            self._claim = held  # made by us, and forgotten
            if self._chosen is not None:
                self._claim_hub(self._chosen, now, wall)
            elif self.phase is Phase.FULL and held.hub != self._own:
                self._release(now, wall)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return earliest(
            self._claim_at,
            self._leave_at,
            self._release_at,
            self._nearer[1] + NEARER_FOR if self._nearer is not None else None,
            self._patient_until if self._patient_until > float("-inf") else None,
        )

    def handle_timer(self, now: float, wall: float) -> None:
        """Do what is due."""
        if self._leave_at is not None and now >= self._leave_at:
            self._leave(now, wall)
        if self._patient_until <= now:
            self._patient_until = float("-inf")
        self._choose(now, wall)
        if self._claim_at is not None and now >= self._claim_at:
            self._say(now, wall)
        if self._release_at is not None and now >= self._release_at:
            self._say_release(now)

    # --- choosing ------------------------------------------------------------------------------------------

    def _is_alive(self, hub: PublicKey) -> bool:
        reach = self._reach.get(hub)
        return reach is not None and reach.is_alive

    def _rtt(self, hub: PublicKey) -> float:
        reach = self._reach.get(hub)
        return reach.rtt if reach is not None and reach.rtt is not None else float("inf")

    def _choose(self, now: float, wall: float) -> None:
        """Claim another hub, where that is called for."""
        if self.phase is Phase.FULL:
            return
        living = [hub for hub in self._hubs if self._is_alive(hub) and self._silent.get(hub, now) <= now]
        best = min(living, key=lambda hub: (self._rtt(hub), hub), default=None)
        chosen = self._chosen
        if chosen not in self._hubs:
            self._home = self._home if self._home in self._hubs else None
            chosen = self._chosen = self._claim_at = None
        nearer, self._nearer = self._nearer, None
        if best is None or best == chosen:
            pass
        elif chosen is None or (chosen in self._silent and not self._is_taken):
            self._claim_hub(best, now, wall)
        elif not self._is_alive(chosen):
            if now >= self._patient_until:
                self._claim_hub(best, now, wall)
        elif self._is_nearer(best, chosen):
            self._nearer = nearer if nearer is not None and nearer[0] == best else (best, now)
            if now >= self._nearer[1] + NEARER_FOR:  # as the timer has it, to the last bit
                self._claim_hub(best, now, wall)
        if self._home != self._chosen and not (self._home is not None and self._is_alive(self._home)):
            self._home = self._chosen if self.phase is not Phase.JOINING else None

    def _is_nearer(self, hub: PublicKey, than: PublicKey) -> bool:
        rtt, other = self._rtt(hub), self._rtt(than)
        return rtt < NEARER * other and rtt < other - NEARER_BY

    # --- claiming ------------------------------------------------------------------------------------------

    def _next_claim(self, hub: PublicKey, wall: float) -> Attachment:
        last = self._claim.epoch if self._claim is not None else 0
        return self._sign(hub, max(last + 1, int(wall * 1000)))

    def _claim_hub(self, hub: PublicKey, now: float, wall: float) -> None:
        self._claim = self._next_claim(hub, wall)
        self._chosen, self._nearer = hub, None
        self._say_again(now)

    def _say_again(self, now: float) -> None:
        self._is_taken, self._tries, self._claim_at = False, 0, now

    def _say(self, now: float, wall: float) -> None:
        if self._chosen is not None and self._tries >= SILENT_AFTER and self._chosen not in self._silent:
            self._silent[self._chosen] = now + SILENT_FOR
            self._choose(now, wall)
        chosen = self._chosen
        if chosen is None:
            self._claim_at = None
            return
        if self._claim is None or self._claim.hub != chosen:
            self._claim = self._next_claim(chosen, wall)
        if self._is_alive(chosen):
            self._out.append(Claiming(chosen, self._claim))
            self._tries += 1
        self._claim_at = now + min(AGAIN_FIRST * 2 ** min(max(self._tries - 1, 0), 10), AGAIN_LONGEST)

    def _taken(self) -> None:
        self._is_taken, self._claim_at, self._home = True, None, self._chosen
        if self._phase is Phase.JOINING:
            self._phase = Phase.TREE

    # --- leaving -------------------------------------------------------------------------------------------

    def _leave(self, now: float, wall: float) -> None:
        """Be a peer of a full mesh, and let hubs know."""
        self.stop()
        if self._claim is not None and self._claim.hub != self._own:
            self._release(now, wall)

    def _release(self, now: float, wall: float) -> None:
        self._claim = self._next_claim(self._own, wall)
        self._releases = dict.fromkeys(sorted(self._hubs))
        self._release_at, self._release_until = now, now + RELEASE_FOR

    def _say_release(self, now: float) -> None:
        claim = self._claim
        if claim is not None:
            self._out += [Claiming(hub, claim) for hub in self._releases if self._is_alive(hub)]
        goes_on = self._releases and now < self._release_until
        self._release_at = now + RELEASE_AGAIN if goes_on else None
