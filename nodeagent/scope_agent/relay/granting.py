"""A hub's side of relays: who is granted what, for how long, and who is to be told. Pure.

A pair has one grant here, whichever of the two asked for it, and however often: to ask again makes it last
longer. Both sides are told each time, so that the other one knocks without having asked. Each side gets a
port that none of its other grants here has; two peers may well have the same one, since a side is known by
where it knocks from, and by its token. The ids of the two differ in their last bit alone, which tells the
kernel's rules whose other side is whose.

An id rests for a while once its grant is gone: what the kernel learned for it lives on for MAPPING_VALID, and
must not lead the next pair's datagrams to the last one's places.

Grants of peers that are members no longer go at once. Where the range of ports changes, grants with a port
outside of it are made anew and told, and so are those whose port another program of the machine holds: the
forwarder would not hear there. A peer that is to be a hub no longer says so to all sides, and goes on
for as long as these need to move elsewhere.

`wall` is the time in seconds since the epoch, as grants outlive the agent and the machine. It is to be taken
from a clock that does not jump while the agent runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from scope.model import Forwarding, PublicKey, RelayLimits, RelayReport
from scope.relay import MAPPING_VALID, Grant, Grants, Side
from scope.resources import as_reason
from scope.wire import TOKEN_BYTES, AskRelay, Granted, Refused, RefusedBecause
from scope_agent.relay.rules import MAX_ID

LIFETIME: Final = (
    86400.0  # of a grant, and of each renewal: a day without the hub's agent costs nobody a relay
)
LEAVING: Final = 60.0  # for how long grants go on where the machine is no hub any more: sides move within 3 s
ASKS_PER_SECOND, ASK_BURST = 5.0, 256.0  # of one peer: one for each port of the default range at once
REFUSED_LATELY: Final = 3600.0  # pairs that got no port are counted for so long, as sides ask again each hour
MAX_REFUSED: Final = 1024  # pairs that are counted so
_RESTING: Final = MAPPING_VALID + 30.0  # what is kept longest in the kernel lives 10 s longer than a mapping


@dataclass(frozen=True, slots=True)
class Telling:
    """Say something to the holder of a probe key."""

    to: PublicKey
    message: Granted | Refused


class Granting:
    """The grants of one hub in one mesh. `random` gives so many random bytes: tokens are secret."""

    def __init__(self, *, random: Callable[[int], bytes]) -> None:
        self._random = random
        self._is_hub = False
        self._ports = range(0)
        self._listen_port = 0
        self._held_by_others: set[int] = set()  # ports of the range
        self._limits = RelayLimits()
        self._members: Mapping[PublicKey, PublicKey] = {}
        self._forwarding: Forwarding | None = None  # until it is known
        self._reason = ""
        self._grants: dict[frozenset[PublicKey], Grant] = {}
        self._taken: dict[PublicKey, set[int]] = {}  # by peer: the ports of its grants
        self._pairs_of_ids: set[int] = set()  # half of each even id in use
        self._resting: dict[int, float] = {}  # half of an id -> until when
        self._next = 1  # half of the id to try first
        self._allowance: dict[PublicKey, tuple[float, float]] = {}  # asker -> (asks, when)
        self._refused: dict[frozenset[PublicKey], float] = {}  # pairs that got no port -> until when
        self._as_grants: Grants | None = None
        self._due: float | None = None  # nothing ends before it; what is renewed does not put it off
        self.dropped = 0  # asks beyond the bound

    # --- what is so ----------------------------------------------------------------------------------------

    @property
    def is_hub(self) -> bool:
        """Whether the mesh asks this peer to relay."""
        return self._is_hub

    def grants(self) -> Grants:
        """What is granted now: the same value for as long as nothing changes."""
        if self._as_grants is None:
            first, last = (self._ports[0], self._ports[-1]) if self._ports else (0, 0)
            self._as_grants = Grants(first, last, self._limits, tuple(self._grants.values()))
        return self._as_grants

    def report(self, wall: float) -> RelayReport | None:
        """What our own status says of it; None while we are no hub, or do not know yet what forwards."""
        if not self._is_hub or self._forwarding is None:
            return None
        return RelayReport(
            forwarding=self._forwarding,
            pairs=len(self._grants),
            refused=sum(until > wall for until in self._refused.values()),
            reason=as_reason("; ".join(filter(None, (self._reason, self._why_avoided())))),
        )

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next, in wall time."""
        return self._due

    # --- what happens --------------------------------------------------------------------------------------

    def restore(self, grants: Grants, wall: float) -> None:
        """Take what an earlier run granted: before the first `configure`, which says who may keep it."""
        for grant in grants.grants:
            first, second = grant.sides
            is_pair = first.id ^ second.id == 1 and 2 <= first.id & ~1 < MAX_ID and first.peer != second.peer
            # A clock that went back must not make a grant last for longer than any does.
            expires = min(grant.expires, wall + LIFETIME)
            if is_pair and expires > wall and self._may_have(grant):
                self._keep(replace(grant, expires=expires))
        self._ports = range(grants.first_port, grants.last_port + 1)
        self._limits = grants.limits
        self._next = max(self._pairs_of_ids, default=0) + 1
        self._as_grants = None

    def configure(
        self,
        *,
        is_hub: bool,
        ports: tuple[int, int],
        limits: RelayLimits,
        listen_port: int,
        members: Mapping[PublicKey, PublicKey],
        wall: float,
    ) -> list[Telling]:
        """What the mesh says: `members` are WireGuard keys with their probe keys, `ports` first and last.

        What comes to `listen_port` is for our own WireGuard: nobody is granted that one.
        """
        tellings: list[Telling] = []
        self._members = members
        for pair in [pair for pair in self._grants if not pair <= members.keys()]:
            self._drop(pair, wall)
        for gone in self._allowance.keys() - members.keys():
            del self._allowance[gone]
        wanted = range(ports[0], ports[1] + 1)
        if (wanted, limits, listen_port) != (self._ports, self._limits, self._listen_port):
            self._ports, self._limits, self._listen_port = wanted, limits, listen_port
            self._as_grants = None
            self._refused.clear()
            self._held_by_others.clear()
            tellings += self._regrant(wall)
        if not is_hub and any(grant.expires > wall + LEAVING for grant in self._grants.values()):
            tellings += self._leave(wall)
        if is_hub and not self._is_hub:
            self._forwarding = None  # what was known is of another time
        self._is_hub = is_hub
        return tellings

    def forwards(self, by: Forwarding, reason: str, wall: float) -> list[Telling]:
        """What forwards here, and in words why not the kernel. Sides are told where that is another thing."""
        was, self._forwarding, self._reason = self._forwarding, by, reason
        if by is was or by is Forwarding.NONE or was is None:
            return []
        return self.tell_all(wall)

    def avoid(self, ports: Collection[int], wall: float) -> list[Telling]:
        """Other programs hold these ports: nobody is granted one, until the range changes."""
        news = {port for port in ports if port in self._ports} - self._held_by_others
        if not news:
            return []
        self._held_by_others |= news
        return self._regrant(wall)

    def tell_all(self, wall: float) -> list[Telling]:
        """What to say when the kernel forgot where sides are: each knocks at once."""
        return [telling for grant in self._grants.values() for telling in self._tell(grant, wall)]

    def ask(self, asker: PublicKey, request: AskRelay, wall: float) -> list[Telling]:
        """A member, by its WireGuard key, asks to be relayed. What is said, to it and to the other side."""
        peer = request.peer
        if asker not in self._members or not self._allows(asker, wall):
            self.dropped += 1
            return []
        if not self._is_hub:
            return self._refuse(asker, peer, RefusedBecause.NO_HUB)
        if peer not in self._members or peer == asker:
            return self._refuse(asker, peer, RefusedBecause.UNKNOWN_PEER)
        if self._forwarding is None:
            return []  # it is being tried; an asker that hears nothing asks again
        if self._forwarding is Forwarding.NONE:
            return self._refuse(asker, peer, RefusedBecause.NO_FORWARDING)
        pair = frozenset((asker, peer))
        known = self._grants.get(pair)
        grant = replace(known, expires=wall + LIFETIME) if known else self._make(asker, peer, wall)
        if grant is None:
            if len(self._refused) < MAX_REFUSED or pair in self._refused:
                self._refused[pair] = wall + REFUSED_LATELY
                self._wake_by(wall + REFUSED_LATELY)
            return self._refuse(asker, peer, RefusedBecause.NO_PORT_LEFT)
        self._refused.pop(pair, None)
        self._keep(grant)
        return self._tell(grant, wall)

    def handle_timer(self, wall: float) -> None:
        """Let go what has expired."""
        for pair in [pair for pair, grant in self._grants.items() if grant.expires <= wall]:
            self._drop(pair, wall)
        for pair in [pair for pair, until in self._refused.items() if until <= wall]:
            del self._refused[pair]
        ends = [grant.expires for grant in self._grants.values()]
        self._due = min((*ends, *self._refused.values()), default=None)

    # --- how -----------------------------------------------------------------------------------------------

    def _allows(self, asker: PublicKey, wall: float) -> bool:
        asks, at = self._allowance.get(asker, (ASK_BURST, wall))
        asks = min(ASK_BURST, asks + max(0.0, wall - at) * ASKS_PER_SECOND)
        if asks < 1.0:
            return False
        self._allowance[asker] = (asks - 1.0, wall)
        return True

    def _refuse(self, asker: PublicKey, peer: PublicKey, reason: RefusedBecause) -> list[Telling]:
        return [Telling(self._members[asker], Refused(peer, reason))]

    def _tell(self, grant: Grant, wall: float) -> list[Telling]:
        first, second = grant.sides
        lifetime = max(0, round(grant.expires - wall))
        user_space = self._forwarding is not Forwarding.KERNEL
        return [
            Telling(
                self._members[side.peer],
                Granted(other.peer, side.token, side.port, lifetime=lifetime, user_space=user_space),
            )
            for side, other in ((first, second), (second, first))
            if side.peer in self._members
        ]

    def _make(self, asker: PublicKey, peer: PublicKey, wall: float) -> Grant | None:
        """A new grant; None where ports or ids are used up."""
        lower, higher = sorted((asker, peer))
        half = self._free_half(wall)
        ports = [self._free_port(each) for each in (lower, higher)]
        if half is None or None in ports:
            return None
        first, second = (
            Side(2 * half + number, each, self._random(TOKEN_BYTES), port)
            for number, (each, port) in enumerate(zip((lower, higher), ports, strict=True))
            if port is not None
        )
        return Grant((first, second), wall + LIFETIME)

    def _free_port(self, peer: PublicKey) -> int | None:
        taken = self._taken.get(peer, set())
        return next((port for port in self._ports if self._is_grantable(port) and port not in taken), None)

    def _is_grantable(self, port: int) -> bool:
        """Whether it may be granted."""
        return port in self._ports and port != self._listen_port and port not in self._held_by_others

    def _why_avoided(self) -> str:
        if not self._held_by_others:
            return ""
        more = len(self._held_by_others) - 1
        others = f" and {more} more are" if more else " is"
        return (
            f"UDP port {min(self._held_by_others)}{others} held by another program (`ss -ulpn` names it), so "
            "pairs get others of spec.hubs.ports"
        )

    def _free_half(self, wall: float) -> int | None:
        for half in [half for half, until in self._resting.items() if until <= wall]:
            del self._resting[half]
        count = MAX_ID // 2
        for step in range(count):
            half = (self._next - 1 + step) % count + 1
            if half not in self._pairs_of_ids and half not in self._resting:
                self._next = half % count + 1
                return half
        return None

    def _may_have(self, grant: Grant) -> bool:
        return grant.sides[0].id // 2 not in self._pairs_of_ids and all(
            side.port not in self._taken.get(side.peer, set()) for side in grant.sides
        )

    def _wake_by(self, wall: float) -> None:
        self._due = wall if self._due is None else min(self._due, wall)

    def _keep(self, grant: Grant) -> None:
        self._grants[_pair(grant)] = grant
        self._wake_by(grant.expires)
        self._pairs_of_ids.add(grant.sides[0].id // 2)
        for side in grant.sides:
            self._taken.setdefault(side.peer, set()).add(side.port)
        self._as_grants = None

    def _drop(self, pair: frozenset[PublicKey], wall: float) -> None:
        grant = self._grants.pop(pair)
        half = grant.sides[0].id // 2
        self._pairs_of_ids.discard(half)
        self._resting[half] = wall + _RESTING
        for side in grant.sides:
            self._taken[side.peer].discard(side.port)
            if not self._taken[side.peer]:
                del self._taken[side.peer]
        self._as_grants = None

    def _regrant(self, wall: float) -> list[Telling]:
        """Make anew what has a port that may not be granted."""
        outside = [
            grant
            for grant in self._grants.values()
            if not all(self._is_grantable(side.port) for side in grant.sides)
        ]
        for grant in outside:
            self._drop(_pair(grant), wall)
        tellings: list[Telling] = []
        for grant in outside:
            first, second = (side.peer for side in grant.sides)
            made = self._make(first, second, wall)
            if made is not None:
                made = replace(made, expires=grant.expires)
                self._keep(made)
                tellings += self._tell(made, wall)
        return tellings

    def _leave(self, wall: float) -> list[Telling]:
        for grant in list(self._grants.values()):
            self._keep(replace(grant, expires=min(grant.expires, wall + LEAVING)))
        self._refused.clear()
        return [telling for grant in self._grants.values() for telling in self._tell_leaving(grant)]

    def _tell_leaving(self, grant: Grant) -> Iterable[Telling]:
        first, second = (side.peer for side in grant.sides)
        yield from self._refuse(first, second, RefusedBecause.NO_HUB)
        yield from self._refuse(second, first, RefusedBecause.NO_HUB)


def _pair(grant: Grant) -> frozenset[PublicKey]:
    return frozenset(side.peer for side in grant.sides)
