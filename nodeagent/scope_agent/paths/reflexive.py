"""Our own mapping, as reflectors see it: the endpoint, and the mapping class.

One ping a refresh interval to one reflector endpoint per family keeps the mapping alive and notices when it
moves. The class needs the view of two reflector endpoints for the same local socket: the same endpoint from
both is an endpoint-independent mapping, different ones a dependent one (RFC 4787, section 4.1); with one
answer it is unknown. A reflector that sees one of our own interface addresses says there is no NAT.

A peer that reflects may have sent to us before we sent to it, and there are NATs that then move our port for
it alone; so what the registry's reflectors, which only ever answer, agree on outweighs what peers see. A call
that they pass on may come first too, after the NAT has forgotten us: then a peer that agrees with one wins.
What a reflector saw before it fell silent says nothing against what another sees now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scope.model import Endpoint, Family, IPAddress, Mapping, PublicKey

REFRESH = 20.0  # AWS security groups forget one-way UDP after 30 s; home routers seldom before
RETRIES = (0.0, 0.1, 0.3, 1.0, 2.0)  # after a start or a network change, until one answer is there
ANSWER_VALID = 65.0  # three refreshes and a little: one lost ping must not unpublish an endpoint
SECOND_VIEW = 60.0  # another reflector is asked so often besides: the class takes two
MAX_TARGETS = 8  # reflector endpoints asked per family
CHECK_INTERVAL = 1.0  # a thousand paths that fall into doubt together are one question
OVERDUE = 0.5  # an answer that takes longer than that of any reflector on Earth
PATIENCE = 2.0  # a refresh unanswered for so long: everyone is asked


@dataclass(frozen=True, slots=True)
class ReflectorTarget:
    """One endpoint of one reflector."""

    probe_key: PublicKey
    endpoint: Endpoint
    only_answers: bool = False  # it never sends to us first


@dataclass(frozen=True, slots=True)
class Question:
    """A ping due to a reflector."""

    target: ReflectorTarget
    transaction: int


@dataclass(slots=True)
class _Asked:
    """What is known of one reflector endpoint."""

    pending: dict[int, float] = field(default_factory=dict)
    seen: Endpoint | None = None
    at: float = float("-inf")

    def is_overdue(self, now: float) -> bool:
        """Whether it left a question unanswered since it last answered."""
        return any(at > self.at and now - at > OVERDUE for at in self.pending.values())


class Reflexive:
    """Asks reflectors, remembers what they saw. Verbs: set_*, answer, handle_timer, get_timer."""

    def __init__(self) -> None:
        self._targets: dict[ReflectorTarget, _Asked] = {}
        self._attempt = 0
        self._due: float | None = None
        self._silent_since: float | None = None
        self._awaited: _Asked | None = None  # the refresher of this round, until it answers
        self._asked_at = 0.0
        self._published: frozenset[Endpoint] = frozenset()
        self._checked = float("-inf")

    def set_targets(self, targets: tuple[ReflectorTarget, ...], now: float) -> None:
        """Replace the reflectors; new ones are asked at once."""
        kept: dict[ReflectorTarget, _Asked] = {}
        counts: dict[Family, int] = {}
        for target in targets:
            family = target.endpoint.family
            counts[family] = counts.get(family, 0) + 1
            if counts[family] <= MAX_TARGETS:
                kept[target] = self._targets.get(target, _Asked())
        fresh = kept.keys() - self._targets.keys()
        self._targets = kept
        if fresh:
            self.restart(now, forget=False)
        if not kept:
            self._due = None

    def restart(self, now: float, *, forget: bool) -> None:
        """Ask everyone again now; `forget` what was seen when the network changed under us."""
        if forget:
            for asked in self._targets.values():
                asked.seen, asked.at = None, float("-inf")
        self._attempt = 0
        self._silent_since = now
        self._due = now if self._targets else None

    def check(self, now: float) -> None:
        """Some path is in doubt: ask the refresher now, unless it was asked just so."""
        if self._targets and now - self._checked > CHECK_INTERVAL:
            self._checked = self._due = now

    def answer(self, sender: PublicKey, transaction: int, observed: Endpoint | None, now: float) -> bool:
        """Take a pong; True when it changed what we know of our mapping.

        `observed` is None where what the reflector saw says nothing of it.
        """
        for target, asked in self._targets.items():
            if target.probe_key == sender and transaction in asked.pending:
                del asked.pending[transaction]
                before = self.endpoints(now), self.mapping_of(target.endpoint.family, now)
                has_moved = asked.seen not in (None, observed)
                if has_moved:
                    self._forget_family(target.endpoint.family)
                asked.seen, asked.at = observed, now
                if self._awaited is asked:
                    self._awaited, self._due = None, now + REFRESH
                if has_moved:
                    self._due = now
                self._silent_since = None
                return before != (self.endpoints(now), self.mapping_of(target.endpoint.family, now))
        return False

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run."""
        return self._due

    def handle_timer(self, now: float, new_transaction: Callable[[], int]) -> list[Question]:
        """The pings due now."""
        if self._due is None or now < self._due:
            return []
        if self._awaited is not None and self._awaited.at < self._asked_at:
            self._attempt = 0
            self._silent_since = self._asked_at if self._silent_since is None else self._silent_since
        self._awaited = None
        first_round = self._attempt < len(RETRIES) - 1
        self._attempt += 1
        wanted_since = max(now - REFRESH, self._silent_since or 0.0)
        unanswered = any(asked.at < wanted_since for asked in self._targets.values())
        if first_round and unanswered:
            self._due = now + RETRIES[self._attempt] - RETRIES[self._attempt - 1]
        else:
            self._due = now + REFRESH
        refreshing = not (first_round and unanswered)
        questions: list[Question] = []
        places: dict[Family, int] = {}
        for target, asked in self._by_freshness():
            place = places[target.endpoint.family] = places.get(target.endpoint.family, -1) + 1
            missing = (first_round or self._silent_since is not None) and asked.at < wanted_since
            second = place == 1 and now - asked.at > SECOND_VIEW
            if place > 0 and not missing and not second:
                continue
            transaction = new_transaction()
            asked.pending = {t: at for t, at in asked.pending.items() if now - at < REFRESH}
            asked.pending[transaction] = now
            questions.append(Question(target, transaction))
            if refreshing and place == 0 and self._silent_since is None:
                self._awaited, self._asked_at, self._due = asked, now, now + PATIENCE
        return questions

    def endpoints(self, now: float) -> frozenset[Endpoint]:
        """The endpoints that reflectors saw lately."""
        return frozenset(
            asked.seen
            for family in Family
            for _, asked in self._views(family, now)
            if asked.seen and now - asked.at < ANSWER_VALID
        )

    def published(self, now: float) -> frozenset[Endpoint]:
        """What others may try: all that was seen, or of a dependent mapping one port per address.

        Nobody else is let in at the port of a dependent mapping, but a ping to its address opens NATs that
        filter by address. One that was published stays while its address is seen: the port says nothing.
        """
        seen = self.endpoints(now)
        families = {endpoint.family for endpoint in seen}
        dependent = {f for f in families if self.mapping_of(f, now) is Mapping.ENDPOINT_DEPENDENT}
        kept: dict[IPAddress, Endpoint] = {}
        ports = (endpoint for endpoint in seen if endpoint.family in dependent)
        for endpoint in sorted(ports, key=lambda e: (e not in self._published, str(e))):
            earlier = [e for e in self._published if e.address == endpoint.address]
            kept.setdefault(endpoint.address, earlier[0] if earlier else endpoint)
        self._published = frozenset(kept.values()) | {e for e in seen if e.family not in dependent}
        return self._published

    def answering(self, now: float) -> tuple[ReflectorTarget, ...]:
        """Reflectors that answered lately, the latest first."""
        live = [(a.at, t) for t, a in self._targets.items() if now - a.at < ANSWER_VALID]
        return tuple(target for _, target in sorted(live, key=lambda pair: -pair[0]))

    def mapping_of(self, family: Family, now: float) -> Mapping:
        """The mapping class in one family (without regard to our own addresses)."""
        views = [(target.only_answers, asked.seen) for target, asked in self._views(family, now)]
        if len(views) < 2:
            return Mapping.UNKNOWN
        weighty = [seen for only_answers, seen in views if only_answers]
        if len(weighty) < 2:
            agree = len({seen for _, seen in views}) == 1
        else:
            others = {seen for only_answers, seen in views if not only_answers}
            agree = len(set(weighty)) == 1 or bool(others & set(weighty))
        return Mapping.ENDPOINT_INDEPENDENT if agree else Mapping.ENDPOINT_DEPENDENT

    def mapping(self, own: frozenset[IPAddress], now: float) -> Mapping:
        """The mapping class to publish: IPv4's where it is known, since that is where NATs are."""
        seen = self.endpoints(now)
        if seen and all(endpoint.address in own for endpoint in seen):
            return Mapping.NONE
        for family in (Family.IPV4, Family.IPV6):
            found = self.mapping_of(family, now)
            if found is not Mapping.UNKNOWN:
                return found
        return Mapping.UNKNOWN

    def silent_since(self) -> float | None:
        """Since when no reflector has answered; None when one has."""
        return self._silent_since

    def _views(self, family: Family, now: float) -> list[tuple[ReflectorTarget, _Asked]]:
        """What reflectors saw, but for what one that no longer answers saw otherwise than the latest."""
        views = [
            (target, asked)
            for target, asked in self._targets.items()
            if target.endpoint.family is family and asked.seen and now - asked.at < 3 * ANSWER_VALID
        ]
        latest = max((asked for _, asked in views), key=lambda asked: asked.at, default=None)
        return [
            (target, asked)
            for target, asked in views
            if latest is None or asked.seen == latest.seen or not asked.is_overdue(now)
        ]

    def _forget_family(self, family: Family) -> None:
        """A mapping moved: what other reflectors saw of the old one says nothing of the new one."""
        for target, asked in self._targets.items():
            if target.endpoint.family is family:
                asked.seen, asked.at = None, float("-inf")
        self._attempt = 0

    def _by_freshness(self) -> list[tuple[ReflectorTarget, _Asked]]:
        """Targets in the order of asking: those that answered last first, so that one stays the refresher."""
        return sorted(self._targets.items(), key=lambda item: (-item[1].at, str(item[0].endpoint)))
