"""The other side of a search for a port: guesses, and how often we make them.

A peer behind a symmetric NAT (`birthday`) asks us to ping ports of its public address. We do so where the
registry, too, says that it is there, and where it sends to where we are; for one peer at a time, at a bounded
rate, and a few times an hour: what a peer publishes is its own claim, and the address may be a stranger's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from scope.model import Endpoint, IPAddress, Mapping, PathKind, PublicKey
from scope.wire import Guess, Guesses, Message, Ping

GUESSES = 2048  # against 256 open ports the chance to miss is one in three thousand
RATE = 500.0  # guesses a second
AT_ONCE = 50  # an agent that was held up does not send all it missed
STEP = 0.02  # seconds between two handfuls of guesses
LOWEST = 1024  # NATs keep well-known ports for themselves
# Seconds: GUESSES take 4.1 on a machine that is not busy, and NATs forget unanswered pings after 30.
TRY = 10.0
PAUSE = 5.0  # between two tries for one peer: it waits longer itself
HOUR, MAX_PER_PEER, MAX_PER_HOUR = 3600.0, 6, 60  # tries in an hour: 60 of them are 122,880 pings


@dataclass(frozen=True, slots=True)
class Standing:
    """How a pair stands. `endpoints` are the public ones of IPv4 that reflectors saw of the peer."""

    path: PathKind
    since: float
    endpoint: Endpoint | None  # in use, the relay's or the peer's
    mapping: Mapping
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Say:
    """A message for a peer, straight to an endpoint; `port` is ours, None for WireGuard's."""

    key: PublicKey
    message: Message
    endpoint: Endpoint
    ttl: int | None = None
    port: int | None = None


@dataclass(slots=True)
class _Spree:
    """The guesses for one peer that are under way."""

    key: PublicKey
    attempt: int
    address: IPAddress
    began: float
    next: float
    said: set[int] = field(default_factory=set)


class Guesser:
    """The guesses of one agent. `random` draws from [0, 1)."""

    def __init__(self, *, random: Callable[[], float]) -> None:
        self._random = random
        self._spree: _Spree | None = None
        self._lately: deque[tuple[float, PublicKey]] = deque(maxlen=MAX_PER_HOUR)
        self.guesses = 0  # since the start

    @property
    def is_guessing(self) -> bool:
        """Whether guesses are under way."""
        return self._spree is not None

    def asked(
        self,
        key: PublicKey,
        guess: Guess,
        standing: Standing | None,
        *,
        own: Collection[Endpoint],
        now: float,
    ) -> Guesses:
        """The peer wants us to guess: whether we do, from now on. `own`: where we are, if our class fits."""
        spree = self._spree
        if spree is not None:
            is_same = (spree.key, spree.attempt) == (key, guess.attempt)
            return Guesses.YES if is_same else Guesses.BUSY  # the same: our answer was lost
        if standing is None or not _fits(guess, standing) or guess.at not in own:
            return Guesses.ELSEWHERE
        while self._lately and now - self._lately[0][0] > HOUR:
            self._lately.popleft()
        mine = [at for at, whose in self._lately if whose == key]
        if len(self._lately) >= MAX_PER_HOUR or len(mine) >= MAX_PER_PEER:
            return Guesses.TOO_OFTEN
        if mine and now - mine[-1] < PAUSE:
            return Guesses.TOO_OFTEN
        self._lately.append((now, key))
        self._spree = _Spree(key, guess.attempt, guess.here.address, began=now, next=now)
        return Guesses.YES

    def heard(self, key: PublicKey, source: Endpoint) -> None:
        """A peer spoke from `source`: where it is the address that we guess at, a guess was right."""
        if self._spree is not None and (self._spree.key, self._spree.address) == (key, source.address):
            self._spree = None

    def stop(self, key: PublicKey | None = None) -> None:
        """Guess no more: for this peer, or for nobody."""
        if self._spree is not None and key in (None, self._spree.key):
            self._spree = None

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return self._spree.next if self._spree is not None else None

    def handle_timer(
        self,
        now: float,
        *,
        stands: Callable[[PublicKey], Standing | None],
        transactions: Callable[[], int],
    ) -> list[Say]:
        """The guesses that are due."""
        spree = self._spree
        if spree is None or now < spree.next:
            return []
        standing = stands(spree.key)
        is_over = len(spree.said) == GUESSES or now - spree.began > TRY
        if is_over or standing is None or standing.path is PathKind.DIRECT:
            self._spree = None
            return []
        owed = int((now - spree.began) * RATE) + 1 - len(spree.said)
        count = min(owed, AT_ONCE, GUESSES - len(spree.said))
        spree.next = now + STEP
        self.guesses += count
        return [
            Say(spree.key, empty_ping(transactions), Endpoint(spree.address, self._new_port(spree)))
            for _ in range(count)
        ]

    def _new_port(self, spree: _Spree) -> int:
        port = 0
        while port in spree.said or not port:
            port = LOWEST + int(self._random() * (65536 - LOWEST))
        spree.said.add(port)
        return port


def empty_ping(transactions: Callable[[], int]) -> Ping:
    """Nobody answers it, and what it says of WireGuard is nothing."""
    return Ping(transactions(), has_session=False, received=0)


def _fits(guess: Guess, standing: Standing) -> bool:
    """Whether a hub relays the pair, its class fits, and the registry sees it at that address."""
    return (
        standing.path is PathKind.RELAYED
        and standing.mapping is Mapping.ENDPOINT_DEPENDENT
        and any(guess.here.address == endpoint.address for endpoint in standing.endpoints)
    )
