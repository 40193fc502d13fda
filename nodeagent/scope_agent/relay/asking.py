"""A peer's side of relays: which hubs to ask for which pair, what they granted, and when to knock there.

For every pair without a living direct path the two nearest hubs are asked, by the RTT of our own direct path
to them. The other side asks its own two, and each hub tells both sides; so a pair holds up to four grants,
and the echoes that come back through the hubs say which one is the shortest way. A hub of which we hear
nothing, or that refuses, is asked again ever more rarely, and the next one is asked in its place.

A grant is *warm* while we knock there: every 20 s, and at once where that is news to the hub. It is *cold*
while the pair's direct path is stable: it is kept, but costs nothing. Doubt about the direct path warms it
again, and so does the hub when it says Granted unasked, because the other side may be in doubt alone. For the
same reason a pair that lost its path asks again for what it holds: the hub then tells the other side.

Where our carrier leads to a hub over TCP, what it grants is reached at *passages* of that carrier besides:
loopback endpoints that stand for the hub's ports. While the hub answers there alone, we knock there alone: a
knock that reached it over UDP would turn its answers to where we may not hear them.

Sans-IO, in verbs: `set_*`, `observe`, `granted`, `refused`, `handle_timer`, `get_timer`, `outputs`, `held`.
Peers and hubs are named by their WireGuard keys. Time is monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from scope.model import Endpoint, Family, IPAddress, PathKind, PublicKey
from scope.relay import knock
from scope.wire import Granted, Refused, RefusedBecause
from scope_agent.agenda import Agenda

HUBS = 2  # asked for each pair: one that dies is left for the other
MAX_GRANTS = 4  # of one pair: our two hubs, and the other side's
MAX_ADDRESSES = 4  # of one hub, where we knock
KNOCK_INTERVAL = 20.0  # AWS security groups forget one-way UDP after 30 s; hubs believe a knock for 120 s
RENEW = 3600.0  # a grant lasts for a day: a hub's agent may be away for most of it
WARM_FOR = 30.0  # how long a direct path is young, or a hub's unasked word is news
ASK_FIRST, ASK_LONGEST = 0.3, 60.0  # between questions that nobody answers
SILENT_AFTER = 2  # questions without an answer, and another hub is asked too
NOT_YET_FIRST = 1.0  # a hub that just started, or heard not yet of the peer or of its role, soon will
REFUSED_FIRST, REFUSED_LONGEST = 30.0, 600.0  # ports become free, but not within seconds
TOLD_LATELY = 5.0  # a hub that granted so lately told the other side, too
ASKS_PER_SECOND, ASK_BURST = 100.0, 40  # a thousand pairs that lose their paths at once burden no hub
NEARER, NEARER_BY = 0.8, 0.01  # of another's RTT, and seconds: else it is not worth a change


@dataclass(frozen=True, slots=True)
class HeldGrant:
    """What a hub granted to us: also what the disk keeps. `lifetime`: seconds from when it was granted."""

    hub: PublicKey
    peer: PublicKey
    token: bytes = field(repr=False)
    port: int
    lifetime: float
    user_space: bool


@dataclass(frozen=True, slots=True)
class Hub:
    """A peer that relays: its ScopePeer's name, and where it says to be, likeliest first."""

    name: str
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a pair stands."""

    path: PathKind
    since: float
    is_in_doubt: bool = False
    is_expected: bool = True  # somebody says that the peer is there, or it is not long that it was searched
    endpoint: Endpoint | None = None  # of a living path
    rtt: float | None = None
    is_hub_itself: bool = False  # the path leads to the peer itself, as a hub that our carrier reaches


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the hub to relay between us and the peer."""

    hub: PublicKey
    peer: PublicKey


@dataclass(frozen=True, slots=True)
class Knock:
    """Send `data` as it is, from WireGuard's own port."""

    endpoint: Endpoint
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Knocked:
    """Hubs were just told where we are to be found by the peer."""

    peer: PublicKey


@dataclass(frozen=True, slots=True)
class Offered:
    """Where the peer may be reached through hubs, all of it: endpoint -> (the hub's name, by a process)."""

    peer: PublicKey
    relays: Mapping[Endpoint, tuple[str, bool]]


AskingOutput: TypeAlias = Ask | Knock | Knocked | Offered


@dataclass(slots=True)
class _Question:
    """What one hub is asked for one pair."""

    next: float  # when to ask (again)
    tries: int = 0  # since its last answer
    refusals: int = 0  # since its last grant
    refused_until: float = 0.0
    answered: float = float("-inf")  # when it last granted


@dataclass(slots=True)
class _Pair:
    """One pair's part. `until`: when each grant ends."""

    standing: Standing
    grants: dict[PublicKey, HeldGrant] = field(default_factory=dict)
    until: dict[PublicKey, float] = field(default_factory=dict)
    questions: dict[PublicKey, _Question] = field(default_factory=dict)
    chosen: tuple[PublicKey, ...] = ()
    offered: Mapping[Endpoint, tuple[str, bool]] = field(default_factory=dict)
    is_warm: bool = False
    woken: float = float("-inf")  # when a hub last spoke of it unasked
    knock_at: float = 0.0  # while it is warm

    @property
    def is_direct(self) -> bool:
        return self.standing.path is PathKind.DIRECT

    def warm_until(self) -> float | None:
        """When the grants turn cold, unless something happens; None: not by themselves."""
        standing = self.standing
        if standing.is_in_doubt or standing.path is PathKind.RELAYED:
            return None
        if standing.path is PathKind.NONE and standing.is_expected:
            return None
        return max(standing.since if self.is_direct and self.grants else float("-inf"), self.woken) + WARM_FOR


@dataclass(frozen=True, slots=True)
class _Reached:
    """A way to a hub itself, the better one first in order."""

    is_carried: bool
    rtt: float
    address: IPAddress | None  # of the hub's; None: over our carrier


class Asking:
    """What we ask of hubs. `random` draws from [0, 1)."""

    def __init__(self, *, random: Callable[[], float]) -> None:
        self._random = random
        self._hubs: dict[PublicKey, Hub] = {}
        self._reached: dict[PublicKey, _Reached] = {}
        self._passages: Mapping[
            tuple[PublicKey, int], Endpoint
        ] = {}  # (hub, its port) -> where it is carried
        self._families: frozenset[Family] = frozenset()
        self._pairs: dict[PublicKey, _Pair] = {}
        self._restored: list[HeldGrant] = []
        self._slot = float("-inf")  # when the next question fits the pace
        self._out: deque[AskingOutput] = deque()
        self._agenda: Agenda[PublicKey] = Agenda()
        self._is_changed = False
        self._ports: Mapping[PublicKey, frozenset[int]] | None = None  # of `ports`, until a grant changes

    # --- what is known -------------------------------------------------------------------------------------

    def restore(self, grants: Iterable[HeldGrant]) -> None:
        """Take the grants from disk. Nobody knows how old they are: they are good until no echo says so."""
        self._restored = list(grants)

    def set_members(self, peers: Iterable[PublicKey], hubs: Mapping[PublicKey, Hub], now: float) -> None:
        """Take the other members, and who of them are hubs; what concerns others is dropped."""
        members = set(peers)
        for key in self._pairs.keys() - members:
            del self._pairs[key]
            self._agenda.put(key, None)
            self._ports = None
        for key in sorted(members - self._pairs.keys()):
            self._pairs[key] = _Pair(Standing(PathKind.DIRECT, float("-inf")))  # until we hear otherwise
        if self._restored and members:  # of a mesh that is not known yet nobody is a member
            restored, self._restored = self._restored, []
            for grant in restored:
                if grant.peer in self._pairs and grant.hub in hubs:
                    self._hold(self._pairs[grant.peer], grant, now)
        if hubs == self._hubs:
            return
        self._hubs = dict(hubs)
        for hub in self._reached.keys() - hubs.keys():
            del self._reached[hub]
        for pair in self._pairs.values():
            for hub in pair.questions.keys() - hubs.keys():
                del pair.questions[hub]
            for hub in pair.grants.keys() - hubs.keys():
                self._drop(pair, hub)
        self._touch_all(now)

    def set_families(self, families: frozenset[Family], now: float) -> None:
        """Our network changed, and these are the address families that it has now."""
        self._families = families
        for pair in self._pairs.values():
            pair.knock_at = now
        self._touch_all(now)

    def set_passages(self, passages: Mapping[tuple[PublicKey, int], Endpoint], now: float) -> None:
        """Take where our carrier leads to ports of hubs: (hub, port) -> endpoint. New ones are knocked at."""
        if passages == self._passages:
            return
        before, self._passages = self._passages, dict(passages)
        for key, pair in self._pairs.items():
            places = [(hub, grant.port) for hub, grant in pair.grants.items()]
            if any(before.get(place) != self._passages.get(place) for place in places):
                pair.knock_at = now
                self._serve(key, now)

    def connected(self, hub: PublicKey, now: float) -> None:
        """Our carrier reaches a hub that it did not reach before: what was said there was lost."""
        for key, pair in self._pairs.items():
            if hub in pair.grants:
                pair.knock_at = now
                self._serve(key, now)

    def wanted_hubs(self) -> frozenset[PublicKey]:
        """Hubs to be reached, however: they relay a pair now, or might one that has no path."""
        hubs_at = {endpoint: hub for (hub, _), endpoint in self._passages.items()}
        wanted: set[PublicKey] = set()
        for pair in self._pairs.values():
            standing = pair.standing
            if standing.path is PathKind.NONE and standing.is_expected:
                wanted |= pair.grants.keys()
            elif standing.endpoint in hubs_at:
                wanted.add(hubs_at[standing.endpoint])
        return frozenset(wanted)

    def distances(self) -> Mapping[PublicKey, float]:
        """The hubs that we reach themselves, with the RTT (seconds)."""
        return {hub: reached.rtt for hub, reached in self._reached.items()}

    def observe(self, key: PublicKey, standing: Standing, now: float) -> None:
        """Take how a pair stands; of a hub it is also the way to it."""
        pair = self._pairs.get(key)
        if pair is None:
            return
        before, pair.standing = pair.standing, standing
        if key in self._hubs:
            self._reach(key, standing, now)
        is_worse = before.path is PathKind.DIRECT or standing.path is PathKind.NONE
        for hub, question in pair.questions.items() if before.path is not standing.path else ():
            if is_worse and now - question.answered > TOLD_LATELY:
                question.next = now
            elif before.path is PathKind.NONE and hub in pair.grants and not question.tries:
                question.next = self._renewal(question.answered, pair)
        is_good = standing.path is not PathKind.NONE and not standing.is_in_doubt
        was_good = before.path is not PathKind.NONE and not before.is_in_doubt
        if was_good and not is_good:
            pair.knock_at = now  # perhaps it is our own mapping that moved
        if (before.path, before.is_in_doubt, before.is_expected) != (
            standing.path, standing.is_in_doubt, standing.is_expected,
        ):  # fmt: skip
            self._serve(key, now)

    def _reach(self, hub: PublicKey, standing: Standing, now: float) -> None:
        is_there = standing.path is PathKind.DIRECT or standing.is_hub_itself
        if not is_there or standing.rtt is None or standing.endpoint is None:
            if self._reached.pop(hub, None) is not None:
                self._touch_all(now)
            return
        before = self._reached.get(hub)
        address = None if standing.is_hub_itself else standing.endpoint.address
        self._reached[hub] = _Reached(standing.is_hub_itself, standing.rtt, address)
        if before is None or before.is_carried is not standing.is_hub_itself:
            for pair in self._pairs.values():
                question = pair.questions.get(hub)
                if question is not None and question.tries:
                    question.next, question.tries = now, 0
        if before is None or before.address != address:
            self._touch_all(now)

    # --- answers -------------------------------------------------------------------------------------------

    def granted(self, hub: PublicKey, message: Granted, now: float) -> None:
        """Take a hub's word, asked for or not. Who is no hub grants nothing."""
        pair = self._pairs.get(message.peer)
        if pair is None or hub not in self._hubs or hub == message.peer:
            return
        question = pair.questions.get(hub)
        is_unasked = question is None or not question.tries
        if question is None:
            question = pair.questions[hub] = _Question(now)
        question.tries = question.refusals = 0
        question.answered, question.refused_until = now, 0.0
        question.next = self._renewal(now, pair)
        self._hold(
            pair,
            HeldGrant(
                hub, message.peer, message.token, message.port, float(message.lifetime), message.user_space
            ),
            now,
        )
        if is_unasked:
            pair.woken = now
        planned = pair.knock_at
        self._serve(message.peer, now)
        if pair.knock_at == planned:  # not just now, at all of them
            self._knock(message.peer, pair, [hub])

    def _renewal(self, answered: float, pair: _Pair) -> float:
        """When to ask again. A hub may lose what it granted: a pair that has no path asks before long."""
        interval = RENEW if pair.standing.path is not PathKind.NONE else ASK_LONGEST
        return answered + interval * (0.9 + 0.2 * self._random())

    def refused(self, hub: PublicKey, message: Refused, now: float) -> None:
        """Take a hub's refusal, asked for or not: another hub is asked, and this one again later."""
        pair = self._pairs.get(message.peer)
        if pair is None or hub not in self._hubs or hub == message.peer:
            return
        question = pair.questions.setdefault(hub, _Question(now))
        first = REFUSED_FIRST if message.reason is RefusedBecause.NO_PORT_LEFT else NOT_YET_FIRST
        delay = min(first * 2**question.refusals, REFUSED_LONGEST)
        question.refusals = min(question.refusals + 1, 16)
        question.tries = 0
        question.next = question.refused_until = now + delay * (0.9 + 0.2 * self._random())
        if message.reason is not RefusedBecause.UNKNOWN_PEER:
            self._drop(pair, hub)
        self._serve(message.peer, now)

    def held(self) -> tuple[HeldGrant, ...]:
        """All grants, for the disk."""
        known = (grant for pair in self._pairs.values() for grant in pair.grants.values())
        return tuple(sorted((*self._restored, *known), key=lambda grant: (grant.peer, grant.hub)))

    def ports(self) -> Mapping[PublicKey, frozenset[int]]:
        """Which ports each hub granted to us: the same value for as long as nothing changes."""
        if self._ports is None:
            found: dict[PublicKey, set[int]] = {}
            for pair in self._pairs.values():
                for hub, grant in pair.grants.items():
                    found.setdefault(hub, set()).add(grant.port)
            self._ports = {hub: frozenset(ports) for hub, ports in found.items()}
        return self._ports

    def take_change(self) -> bool:
        """Whether the disk is to hear of what is held; asked again, it is not."""
        is_changed, self._is_changed = self._is_changed, False
        return is_changed

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return self._agenda.next()

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        while (key := self._agenda.take(now)) is not None:
            self._serve(key, now)

    def outputs(self) -> list[AskingOutput]:
        """What is to be done now, in order."""
        out = list(self._out)
        self._out.clear()
        return out

    # --- one pair ------------------------------------------------------------------------------------------

    def _serve(self, key: PublicKey, now: float) -> None:
        """Do what is due for one pair."""
        pair = self._pairs[key]
        for hub in [hub for hub, until in pair.until.items() if until <= now]:
            self._drop(pair, hub)
        warm_until = pair.warm_until()
        was_warm, pair.is_warm = pair.is_warm, warm_until is None or now < warm_until
        if pair.is_warm and not was_warm:
            pair.knock_at = now
        asked = self._choose(key, pair, now) if self._wants_hubs(pair) else []
        for hub in asked:
            self._ask(key, pair, hub, now)
        self._offer(key, pair)
        if pair.is_warm and now >= pair.knock_at:
            pair.knock_at = now + KNOCK_INTERVAL * (0.9 + 0.1 * self._random())
            self._knock(key, pair, list(pair.grants))
        self._arm(key, pair, asked, now)

    def _wants_hubs(self, pair: _Pair) -> bool:
        """Whether hubs are to be asked: a doubt may be over in a moment, so what is held is enough for it."""
        return pair.is_warm and (not pair.is_direct or (pair.standing.is_in_doubt and not pair.grants))

    def _choose(self, key: PublicKey, pair: _Pair, now: float) -> list[PublicKey]:
        """The hubs to ask: the two nearest that answer, and those in whose place they were taken."""
        ranking = sorted((way.is_carried, way.rtt, hub) for hub, way in self._reached.items() if hub != key)
        silent: list[PublicKey] = []
        able: list[PublicKey] = []
        for _, _, hub in ranking:
            question = pair.questions.get(hub)
            if question is not None and now < question.refused_until:
                continue
            is_silent = question is not None and question.tries >= SILENT_AFTER
            (silent if is_silent else able).append(hub)
        kept = [hub for hub in pair.chosen if hub in able][:HUBS]
        others = [hub for hub in able if hub not in kept]
        missing = HUBS - len(kept)
        kept, others = kept + others[:missing], others[missing:]
        if others:
            farthest, nearest = max(kept, key=self._distance), others[0]
            if self._is_nearer(nearest, farthest):
                kept[kept.index(farthest)] = nearest
        pair.chosen = tuple(kept)
        return kept + silent

    def _distance(self, hub: PublicKey) -> tuple[bool, float]:
        return self._reached[hub].is_carried, self._reached[hub].rtt

    def _is_nearer(self, hub: PublicKey, other: PublicKey) -> bool:
        here, there = self._reached[hub], self._reached[other]
        if here.is_carried is not there.is_carried:
            return there.is_carried
        return here.rtt < NEARER * there.rtt and here.rtt < there.rtt - NEARER_BY

    def _ask(self, key: PublicKey, pair: _Pair, hub: PublicKey, now: float) -> None:
        question = pair.questions.setdefault(hub, _Question(now))
        if now < question.next:
            return
        slot = max(self._slot, now - ASK_BURST / ASKS_PER_SECOND) + 1.0 / ASKS_PER_SECOND
        if slot > now:
            question.next = now + (slot - now) * (1.0 + self._random())
            return
        self._slot = slot
        question.next = now + min(ASK_FIRST * 2**question.tries, ASK_LONGEST)
        question.tries = min(question.tries + 1, 16)
        self._out.append(Ask(hub, key))

    def _hold(self, pair: _Pair, grant: HeldGrant, now: float) -> None:
        if grant.hub not in pair.grants and len(pair.grants) >= MAX_GRANTS:
            spare = [hub for hub in pair.grants if hub not in pair.chosen]
            if not spare:
                return
            self._drop(pair, min(spare, key=lambda hub: pair.until[hub]))
        self._is_changed |= pair.grants.get(grant.hub) != grant
        self._ports = None
        pair.grants[grant.hub] = grant
        pair.until[grant.hub] = now + grant.lifetime

    def _drop(self, pair: _Pair, hub: PublicKey) -> None:
        self._is_changed |= pair.grants.pop(hub, None) is not None
        self._ports = None
        pair.until.pop(hub, None)

    def _offer(self, key: PublicKey, pair: _Pair) -> None:
        """Say where the peer may be reached, where that changed."""
        relays = {
            endpoint: (self._hubs[hub].name, grant.user_space or endpoint == passage)
            for hub, grant in pair.grants.items()
            for passage in [self._passages.get((hub, grant.port))]
            for endpoint in self._places(hub, grant.port)
        }
        if relays != pair.offered:
            pair.offered = relays
            self._out.append(Offered(key, relays))

    def _knock(self, key: PublicKey, pair: _Pair, hubs: list[PublicKey]) -> None:
        known = [(hub, pair.grants[hub]) for hub in hubs if hub in pair.grants]
        for hub, grant in known:
            # The likeliest place last: a hub goes by the last knock.
            for endpoint in reversed(self._places(hub, grant.port)):
                self._out.append(Knock(endpoint, knock(grant.token)))
        if known:
            self._out.append(Knocked(key))

    def _places(self, hub: PublicKey, port: int) -> list[Endpoint]:
        """Where to find a granted port of a hub, the likeliest first: over UDP, then over our carrier."""
        reached, passage = self._reached.get(hub), self._passages.get((hub, port))
        if passage is not None and (reached is None or reached.is_carried):
            return [passage]
        places = [Endpoint(address, port) for address in self._addresses(hub)]
        return places if passage is None else [*places, passage]

    def _addresses(self, hub: PublicKey) -> list[IPAddress]:
        """Where to knock: in each family where we reach the hub, else wherever it says to be."""
        reached = self._reached.get(hub)
        first = [reached.address] if reached is not None and reached.address is not None else []
        others = [a for a in self._hubs[hub].addresses if all(a.version != b.version for b in first)]
        families = {4: Family.IPV4, 6: Family.IPV6}
        found = [address for address in first + others if families[address.version] in self._families]
        return list(dict.fromkeys(found))[:MAX_ADDRESSES]

    def _arm(self, key: PublicKey, pair: _Pair, asked: Iterable[PublicKey], now: float) -> None:
        times = list(pair.until.values())
        if pair.is_warm:
            times.append(pair.knock_at if pair.grants else float("inf"))
            times.append(pair.warm_until() or float("inf"))
        times += [pair.questions[hub].next for hub in asked]
        if self._wants_hubs(pair):
            times += [q.refused_until for q in pair.questions.values() if q.refused_until > now]
        due = min(times, default=float("inf"))
        self._agenda.put(key, max(due, now) if due < float("inf") else None)

    def _touch_all(self, now: float) -> None:
        for key in self._pairs:
            self._serve(key, now)
