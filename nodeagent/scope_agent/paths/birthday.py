"""A direct path past one symmetric NAT: many ports opened on one side, ports guessed on the other.

A symmetric NAT takes a port of its own for every destination, which nobody can know; and where the other
side's NAT lets in only endpoints that were sent to, neither side's pings arrive. Yet of 64,512 ports one of
256 is met by every 252nd guess. The algorithm, for a pair that a hub relays:

1. The symmetric side asks its packet filter and its probe socket for PORTS ports of its own, then, over the
   relay, the other side to *guess*.
2. It sends one ping from each of these ports to the other side's endpoint: short ones, which open its own NAT
   and die before they reach the other one (`openers`). After two seconds, full ones: its NAT may be the
   second one on the way.
3. The other side pings random ports of the symmetric side's public address, 500 a second, from its own
   endpoint (`guesses`). One that arrives, and that the channel finds genuine, is a *hit*.
4. Rules of the packet filter put the port that was hit in the place of WireGuard's, towards this endpoint
   alone (`scope_agent.wireguard.port_rules`). From then on the endpoint is a route like any other: pinged,
   nominated, judged. The other side learns the symmetric one's endpoint from the first ping.
5. The rules stay while the path is in use, and LINGER longer, since a path may heal.

It is opt-in, because each try fills the tables of both sites' routers with sessions. One try at a time, of
bounded packets and time. One that fails is repeated after a day, at once when either side's public endpoint
or our own network changed, and sooner where a port was hit in these networks before. What came of tries is
kept on disk, so that an agent that starts anew keeps the day. Whoever guesses bounds by itself how often it
does. Time is monotonic seconds. Nothing here sends: what is to be sent comes back.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from scope.model import Endpoint, IPAddress, Mapping, PathKind, PublicKey
from scope.wire import Guess, Guesses, Guessing
from scope_agent.agenda import earliest
from scope_agent.paths.guesses import TRY, Guesser, Say, Standing, empty_ping
from scope_agent.paths.route import NEVER
from scope_agent.paths.schedule import OPENER_TTL
from scope_agent.wireguard.port_rules import Opening, PortRules, Search

PORTS = 256  # opened at once
FIRST_PORT, LAST_PORT = 26256, 29999  # above the ports of WireGuard and hubs, below those of NodePorts
OPENERS_AT_ONCE, OPENERS_STEP = 32, 0.01
FULL_AFTER = 2.0  # from here on the ports' pings go in full
ASKS, ASK_STEP = 4, 0.5  # over the relay, which may lose one
PATIENCE = 5.0  # for the packet filter; and for a path once its rules stand
START_AFTER = 5.0  # relayed for so long: a search that needs no guessing is through
CHECK = 2.0  # seconds between two looks at all pairs
GAP = 10.0  # between two tries of one pair, whatever happened
LINGER = 10.0  # rules outlive their path by so much: it is asked every 1.5 s, and may heal
DAY = 86400.0
AGAIN_AFTER_HIT, AGAIN_GROWTH = 60.0, 4.0  # where a port was hit before
AGAIN_REFUSED = 600.0
RETRY_RULES = 60.0
MAX_KEPT = 256  # pairs on disk, the latest tries: a day has no room for many more, at GAP and TRY for each


@dataclass(frozen=True, slots=True)
class Ask:
    """The rules stand: the peer is to be pinged there."""

    key: PublicKey
    endpoint: Endpoint


Out: TypeAlias = Say | Ask


class _Phase(enum.Enum):
    ARMING = enum.auto()  # the rules for the search are on their way
    ASKING = enum.auto()
    OPENING = enum.auto()
    MENDING = enum.auto()  # there was a hit, and the rules for it are on their way
    PROVING = enum.auto()  # they stand


class _End(enum.Enum):
    """How a try ended, and what there is to say of it."""

    HIT = ""
    GIVEN_UP = " "  # the pair is not what it was
    MISSED = "none of its ports was guessed, next try in a day"
    MISSED_AGAIN = "none of its ports was guessed this time"
    UNABLE = "its ports cannot be guessed"
    SILENT = "the other side does not answer whether it guesses its ports"
    OFF = "the other side does not guess its ports"
    LATER = "the other side guesses its ports later"


_REFUSED = {
    Guesses.OFF: (_End.OFF, AGAIN_REFUSED),
    Guesses.BUSY: (_End.LATER, GAP),
    Guesses.TOO_OFTEN: (_End.LATER, AGAIN_REFUSED),
    Guesses.ELSEWHERE: (_End.LATER, 3 * GAP),
}
_Situation: TypeAlias = tuple[IPAddress, Endpoint]


@dataclass(slots=True)
class _Try:
    """The one try of the symmetric side that is under way."""

    key: PublicKey
    attempt: int
    at: Endpoint
    here: Endpoint
    first: int  # of our ports
    until: float
    next: float
    phase: _Phase = _Phase.ARMING
    count: int = 0  # questions or pings said
    began: float = 0.0

    @property
    def is_searching(self) -> bool:
        """Whether our ports are open to a hit, or are to be."""
        return self.phase in (_Phase.ARMING, _Phase.ASKING, _Phase.OPENING)


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of the tries of one pair, for the disk: `misses` since the last of `hits`."""

    peer: PublicKey
    here: IPAddress
    at: Endpoint
    tried: float  # wall clock, seconds
    misses: int
    hits: int


@dataclass(slots=True)
class _Record:
    """What came of the tries of one pair."""

    situation: _Situation
    tried: float
    next: float
    end: _End
    misses: int = 0
    hits: int = 0

    @property
    def pause(self) -> float:
        """Seconds from the last try to the next."""
        if not self.misses:
            return GAP
        if not self.hits:
            return DAY
        return min(AGAIN_AFTER_HIT * AGAIN_GROWTH ** min(self.misses - 1, 10), DAY)


@dataclass(slots=True)
class _Held:
    port: int
    used: float  # when its path was last in use


@dataclass(frozen=True, slots=True)
class Spent:
    """What was sent for tries, and how many were hit, since the start."""

    tries: int = 0
    hits: int = 0
    misses: int = 0
    pings: int = 0
    guesses: int = 0
    seconds: float = 0.0  # from when the other side agreed to the last hit


class Birthday:
    """All tries of one agent. `random` draws from [0, 1)."""

    def __init__(self, *, random: Callable[[], float]) -> None:
        self._random = random
        self._allowed = False
        self._concerns = False  # there are rules in the kernel, or may be
        self._port = 0
        self._mapping = Mapping.UNKNOWN
        self._own: tuple[Endpoint, ...] = ()
        self._held: dict[Endpoint, _Held] = {}
        self._try: _Try | None = None
        self._guesser = Guesser(random=random)
        self._records: dict[PublicKey, _Record] = {}
        self._attempts = 0
        self._check_at = NEVER
        self._applied: PortRules | None = None  # None: unknown
        self._applying: PortRules | None = None
        self._cannot = ""
        self._apply_after = NEVER
        self._news: set[PublicKey] = set()
        self._spent = Spent()

    # --- what is known -------------------------------------------------------------------------------------

    def restore(self, openings: Iterable[Opening], now: float) -> None:
        """Take what an earlier agent left in the kernel: kept if a path soon goes by it."""
        for opening in openings:
            self._held[opening.endpoint] = _Held(opening.port, now)
            self._concerns = True

    def restore_tries(self, tries: Iterable[Tried], now: float, *, wall: float) -> None:
        """Take what an earlier agent kept. A try that is said to be still to come, as the clock was moved
        back, counts as made now.
        """
        for each in tries:
            tried = now - max(wall - each.tried, 0.0)
            record = _Record((each.here, each.at), tried, tried, _End.HIT, misses=each.misses, hits=each.hits)
            if each.misses:
                record.end = _End.MISSED_AGAIN if each.hits else _End.MISSED
            record.next = tried + record.pause
            self._records[each.peer] = record

    def kept_tries(self, *, offset: float) -> tuple[Tried, ...]:
        """What is to be kept on disk; `offset` is the wall clock less the monotonic one."""
        kept = sorted(
            ((record.tried, key) for key, record in self._records.items() if record.misses or record.hits),
            reverse=True,
        )
        return tuple(
            Tried(key, *record.situation, float(round(record.tried + offset)), record.misses, record.hits)
            for _, key in kept[:MAX_KEPT]
            for record in (self._records[key],)
        )

    def configure(self, *, allowed: bool) -> None:
        """Take whether the mesh allows it."""
        self._allowed = allowed
        self._concerns |= allowed
        if not allowed:
            self._held.clear()
            self._guesser.stop()
            if self._try is not None:
                self._news.add(self._try.key)
                self._try = None

    def set_own(self, mapping: Mapping, endpoints: Iterable[Endpoint]) -> None:
        """Take our own mapping and the public endpoints of IPv4 that reflectors saw of us."""
        self._mapping, self._own = mapping, tuple(endpoints)

    def set_port(self, port: int) -> None:
        """Take WireGuard's port."""
        self._port = port

    def network_changed(self, now: float) -> None:
        """What failed before the change may work after it."""
        current = self._try
        if current is not None and current.is_searching:
            self._give_up(current, now)
        for record in self._records.values():
            record.next, record.misses, record.hits = min(record.next, record.tried + GAP), 0, 0

    def forget(self, key: PublicKey) -> None:
        """The peer is gone."""
        self._records.pop(key, None)
        if self._try is not None and self._try.key == key:
            self._try = None
        self._guesser.stop(key)

    # --- what others may know ------------------------------------------------------------------------------

    @property
    def is_allowed(self) -> bool:
        """Whether the mesh allows it."""
        return self._allowed

    @property
    def spent(self) -> Spent:
        """What was sent so far, and what came of it."""
        return replace(self._spent, guesses=self._guesser.guesses)

    def holds(self, endpoint: Endpoint | None) -> bool:
        """Whether WireGuard has another port towards the endpoint."""
        return endpoint in self._held

    def explain(self, key: PublicKey) -> str:
        """What to say of a pair of which we are the symmetric side; "" where there is nothing to say."""
        if not self._allowed or self._mapping is not Mapping.ENDPOINT_DEPENDENT:
            return ""
        if self._cannot:
            return f"{_End.UNABLE.value}: {self._cannot}"
        if self._try is not None and self._try.key == key:
            return "its ports are being guessed"
        record = self._records.get(key)
        return record.end.value.strip() if record is not None else ""

    def take_news(self) -> set[PublicKey]:
        """Whose explanation or mark may differ from when it was last asked."""
        news, self._news = self._news, set()
        return news

    # --- rules ---------------------------------------------------------------------------------------------

    def take_rules(self, now: float) -> PortRules | None:
        """What the machine is to be given now, once; answered by `applied`."""
        if not self._concerns or not self._port or self._applying is not None or now < self._apply_after:
            return None
        wanted = self._rules()
        if wanted == self._applied:
            return None
        self._applying = wanted
        return wanted

    def applied(self, error: str, now: float) -> None:
        """The rules stand; or they do not, with `error` as part of a sentence, and all is as before."""
        rules, self._applying = self._applying, None
        if rules is None:
            return
        if error != self._cannot:
            self._cannot = error
            self._news |= self._records.keys()
        current = self._try
        if error:
            self._apply_after = now + RETRY_RULES
            if current is not None and current.is_searching:
                self._end(current, _End.UNABLE, now, wait=AGAIN_REFUSED)
            return
        self._applied, self._apply_after = rules, NEVER
        if current is None:
            return
        if current.phase is _Phase.ARMING and rules.search is not None:
            current.phase, current.next, current.count = _Phase.ASKING, now, 0
        elif current.phase is _Phase.MENDING and any(o.endpoint == current.at for o in rules.openings):
            current.phase, current.next, current.until = _Phase.PROVING, now, now + PATIENCE

    def _rules(self) -> PortRules:
        openings = tuple(Opening(at, self._held[at].port) for at in sorted(self._held, key=str))
        search, current = None, self._try
        if current is not None and current.is_searching:
            search = Search(current.at, current.first, current.first + PORTS - 1)
        rules = PortRules(self._port, openings, search)
        return PortRules() if rules.is_empty else rules

    # --- datagrams -----------------------------------------------------------------------------------------

    def hit(self, key: PublicKey, source: Endpoint, port: int, now: float) -> None:
        """The peer's ping came from `source` to a port of ours that is not WireGuard's."""
        current = self._try
        if current is None or current.phase is not _Phase.OPENING or current.key != key:
            return
        if source != current.at or not current.first <= port < current.first + PORTS:
            return
        self._held[source] = _Held(port, NEVER)
        self._spent = replace(self._spent, seconds=now - current.began)
        current.phase, current.until = _Phase.MENDING, current.until + PATIENCE
        current.next = current.until

    def answered(self, key: PublicKey, said: Guessing, now: float) -> None:
        """The peer says whether it guesses."""
        current = self._try
        if current is None or current.phase is not _Phase.ASKING:
            return
        if (current.key, current.attempt) != (key, said.attempt):
            return
        if said.answer is not Guesses.YES:
            end, wait = _REFUSED[said.answer]
            self._end(current, end, now, wait=wait)
            return
        current.phase, current.count = _Phase.OPENING, 0
        current.began, current.next, current.until = now, now, now + TRY
        self._spent = _add(self._spent, tries=1)

    def asked(self, key: PublicKey, guess: Guess, standing: Standing | None, now: float) -> Guessing:
        """The peer wants us to guess; the answer, and from now on guesses."""
        if not self._allowed:
            return Guessing(guess.attempt, Guesses.OFF)
        if self._try is not None:
            return Guessing(guess.attempt, Guesses.BUSY)
        own = self._own if self._mapping is Mapping.ENDPOINT_INDEPENDENT else ()
        return Guessing(guess.attempt, self._guesser.asked(key, guess, standing, own=own, now=now))

    def heard(self, key: PublicKey, source: Endpoint) -> None:
        """A peer spoke from `source`."""
        self._guesser.heard(key, source)

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        looks = self._held or (self._allowed and self._mapping is Mapping.ENDPOINT_DEPENDENT)
        return earliest(
            self._try.next if self._try is not None else None,
            self._guesser.get_timer(),
            self._check_at if looks else None,
        )

    def handle_timer(
        self,
        now: float,
        *,
        keys: Iterable[PublicKey],
        stands: Callable[[PublicKey], Standing | None],
        transactions: Callable[[], int],
    ) -> list[Out]:
        """What is due. `stands` tells how each of the pairs `keys` does."""
        out: list[Out] = []
        if self._try is not None and now >= self._try.next:
            out += self._go_on(self._try, stands(self._try.key), now, transactions)
        out += self._guesser.handle_timer(now, stands=stands, transactions=transactions)
        if now >= self._check_at:
            self._check_at = now + CHECK
            standings = {key: standing for key in keys if (standing := stands(key)) is not None}
            self._let_go(standings.values(), now)
            if self._try is None and not self._guesser.is_guessing:
                self._begin(standings, now)
        return out

    def _let_go(self, standings: Iterable[Standing], now: float) -> None:
        """Take away rules whose path is not in use any more."""
        if not self._held:
            return
        in_use = {standing.endpoint for standing in standings if standing.path is PathKind.DIRECT}
        for endpoint, held in list(self._held.items()):
            is_tried = self._try is not None and self._try.at == endpoint
            if endpoint in in_use or is_tried:
                held.used = now
            elif now - held.used > LINGER:
                del self._held[endpoint]

    def _begin(self, standings: dict[PublicKey, Standing], now: float) -> None:
        """Begin the try that waited longest, if any is due."""
        if not self._allowed or self._mapping is not Mapping.ENDPOINT_DEPENDENT:
            return
        if not self._own or not self._port or self._cannot:
            return
        due = [
            (self._records[key].tried if key in self._records else NEVER, key)
            for key, standing in standings.items()
            if self._is_due(key, standing, now)
        ]
        if not due:
            return
        key = min(due)[1]
        self._attempts = (self._attempts + 1) & 0xFFFFFFFF
        until = now + PATIENCE
        self._try = _Try(
            key,
            self._attempts,
            at=standings[key].endpoints[0],
            here=self._own[0],
            first=self._choose_ports(),
            until=until,
            next=until,
        )
        self._news.add(key)

    def _is_due(self, key: PublicKey, standing: Standing, now: float) -> bool:
        if standing.path is not PathKind.RELAYED or now - standing.since < START_AFTER:
            return False
        if standing.mapping is not Mapping.ENDPOINT_INDEPENDENT or not standing.endpoints:
            return False
        if standing.endpoints[0] in self._held:
            return False
        record = self._records.get(key)
        if record is None:
            return True
        if record.situation != (self._own[0].address, standing.endpoints[0]):
            return now >= record.tried + GAP
        return now >= record.next

    def _choose_ports(self) -> int:
        """The first of PORTS ports in a row, WireGuard's own not among them."""
        first = FIRST_PORT + int(self._random() * (LAST_PORT + 1 - PORTS - FIRST_PORT))
        if not first <= self._port < first + PORTS:
            return first
        return first + PORTS if first + 2 * PORTS <= LAST_PORT + 1 else first - PORTS

    # --- the symmetric side --------------------------------------------------------------------------------

    def _go_on(
        self, current: _Try, standing: Standing | None, now: float, transactions: Callable[[], int]
    ) -> list[Out]:
        if standing is None:
            self._give_up(current, now)
            return []
        if standing.path is PathKind.DIRECT:
            self._end(current, _End.HIT if current.at in self._held else _End.GIVEN_UP, now, wait=GAP)
            return []
        if current.is_searching and standing.path is not PathKind.RELAYED:
            self._give_up(current, now)
            return []
        match current.phase:
            case _Phase.ARMING:
                self._end(current, _End.UNABLE, now, wait=AGAIN_REFUSED)
                return []
            case _Phase.ASKING:
                return self._say_guess(current, standing, now)
            case _Phase.OPENING:
                return self._open(current, now, transactions)
            case _Phase.MENDING:
                self._miss(current, now)
                return []
            case _Phase.PROVING:
                return self._prove(current, now)
            case _:
                assert_never(current.phase)

    def _say_guess(self, current: _Try, standing: Standing, now: float) -> list[Out]:
        if current.count == ASKS or standing.endpoint is None:
            self._end(current, _End.SILENT, now, wait=AGAIN_REFUSED)
            return []
        current.count += 1
        current.next = now + ASK_STEP
        return [Say(current.key, Guess(current.attempt, current.at, current.here), standing.endpoint)]

    def _open(self, current: _Try, now: float, transactions: Callable[[], int]) -> list[Out]:
        if now >= current.until:
            self._miss(current, now)
            return []
        if current.count == 2 * PORTS:
            current.next = current.until
            return []
        is_full = current.count >= PORTS
        if is_full and now < current.began + FULL_AFTER:
            current.next = current.began + FULL_AFTER
            return []
        said = range(current.count, min(current.count + OPENERS_AT_ONCE, (1 + is_full) * PORTS))
        current.count, current.next = said.stop, now + OPENERS_STEP
        self._spent = _add(self._spent, pings=len(said))
        ttl = None if is_full else OPENER_TTL
        return [
            Say(current.key, empty_ping(transactions), current.at, ttl, port=current.first + number % PORTS)
            for number in said
        ]

    def _prove(self, current: _Try, now: float) -> list[Out]:
        """Have the route pinged once; whether it becomes the path is the pair's to say."""
        if now >= current.until:
            self._miss(current, now)
            return []
        is_first, current.next = current.count >= 0, min(now + ASK_STEP, current.until)
        current.count = -1
        return [Ask(current.key, current.at)] if is_first else []

    def _miss(self, current: _Try, now: float) -> None:
        self._held.pop(current.at, None)
        record = self._records.get(current.key)
        is_known = record is not None and record.situation == (current.here.address, current.at)
        was_hit = record is not None and is_known and record.hits
        self._end(current, _End.MISSED_AGAIN if was_hit else _End.MISSED, now)

    def _give_up(self, current: _Try, now: float) -> None:
        self._end(current, _End.GIVEN_UP, now, wait=GAP)

    def _end(self, current: _Try, end: _End, now: float, *, wait: float | None = None) -> None:
        """End the try. The pair's next one is due after `wait`, or after what its tries so far call for."""
        self._try = None
        situation = (current.here.address, current.at)
        record = self._records.get(current.key)
        if record is None or record.situation != situation:
            record = _Record(situation, now, now, end)
            self._records[current.key] = record
        record.tried, record.end = now, end
        if end is _End.HIT:
            record.hits, record.misses = record.hits + 1, 0
            self._spent = _add(self._spent, hits=1)
        elif end in (_End.MISSED, _End.MISSED_AGAIN):
            record.misses += 1
            self._spent = _add(self._spent, misses=1)
        record.next = now + (record.pause if wait is None else wait)
        self._news.add(current.key)


def _add(spent: Spent, *, tries: int = 0, hits: int = 0, misses: int = 0, pings: int = 0) -> Spent:
    return replace(
        spent,
        tries=spent.tries + tries,
        hits=spent.hits + hits,
        misses=spent.misses + misses,
        pings=spent.pings + pings,
    )
