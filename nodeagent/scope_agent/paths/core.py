"""All paths of one agent: the pairs, our own candidates and mapping, and the pace of pings.

`Paths` owns one `Pair` per peer and one `Reflexive`, turns the snapshot into routes, matches answers to
questions, and says in words why a pair has no direct path. Sans-IO, in five verbs: `receive`, `handle_timer`,
`get_timer`, `outputs`, `view`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Set
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from types import MappingProxyType
from typing import TypeAlias

from scope.carrier import is_carried
from scope.model import (
    Candidate,
    CandidateKind,
    Endpoint,
    Family,
    IPAddress,
    IPInterface,
    IPNetwork,
    Mapping,
    PathKind,
    Peer,
    PodNetworking,
    PublicKey,
    Role,
    Snapshot,
    Timers,
)
from scope.topology import hidden_pods, offered
from scope.wire import (
    MAX_CANDIDATES,
    CallMeMaybe,
    Guess,
    Guessing,
    Message,
    Nominate,
    Nominated,
    Ping,
    Pong,
)
from scope_agent.agenda import Agenda, earliest
from scope_agent.paths.birthday import Ask, Birthday, Spent, Tried
from scope_agent.paths.candidates import (
    claims,
    is_private,
    misplacement,
    own_candidates,
    public_reflexive,
    refusal,
)
from scope_agent.paths.due import CallPeer, CheckMapping, SendTo
from scope_agent.paths.explaining import Attempt, explain
from scope_agent.paths.guesses import Say, Standing
from scope_agent.paths.pace import Pace
from scope_agent.paths.pair import Pair
from scope_agent.paths.reflexive import MAX_TARGETS, ReflectorTarget, Reflexive
from scope_agent.paths.route import Relay
from scope_agent.paths.view import PairView
from scope_agent.wireguard.port_rules import Opening, PortRules

COUNTER_STALE = 0.5  # a receive counter read longer before the latest traffic is reported as 0: unknown
CARRIER_PATIENCE = 2.0  # on a busy machine a reflector's answer may be read so late
MAX_WITHDRAWN = 1024  # a port of two hubs for each of five hundred peers
UDP_IS_NEWS = (
    10.0  # seconds without an answer over UDP, and the next one says that a network lets it out again
)
MAX_CARRIERS = 3  # a call-me-maybe goes over so many at once: each may be lost, or not reach the other side


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for the holder of a probe key, straight to an endpoint."""

    to: PublicKey
    message: Message
    endpoint: Endpoint
    ttl: int | None = None
    port: int | None = None  # of ours; None: WireGuard's


@dataclass(frozen=True, slots=True)
class Call:
    """A message for the holder of a probe key, over any carrier that both reach."""

    to: PublicKey
    message: Message


_MINOR = ("rtt", "is_in_doubt")
# What of a pair's view is worth a report at once: all but how long the way is, and whether it is being asked.
_way: Callable[[PairView], tuple[object, ...]] = attrgetter(
    *(each.name for each in fields(PairView) if each.name not in _MINOR)
)

PathsOutput: TypeAlias = Outgoing | Call


@dataclass(frozen=True, slots=True)
class PeerReading:
    """What the device says of one peer."""

    tx: int
    rx: int
    endpoint: Endpoint | None
    handshake: bool  # a new handshake since the last reading
    session: bool


@dataclass(frozen=True, slots=True)
class PathsView:
    """What others may know of paths. `pairs` is by WireGuard key, and good until the next input."""

    pairs: MappingOf[PublicKey, PairView] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    mapping: Mapping = Mapping.UNKNOWN
    reflectors_silent_since: float | None = None  # None while one answers, or none is known
    reflectors_known: bool = False


@dataclass(slots=True)
class Changes:
    """What differs from when it was last asked."""

    pairs: set[PublicKey] = field(default_factory=set)  # whose view differs in anything
    moved: bool = False  # a path, an endpoint or a reason differs, not only a latency
    own: bool = False  # our candidates or our mapping differ
    kept: bool = False  # what to know after a restart may differ: last good endpoints, tries to guess ports


class Paths:
    """The paths room. `own` is our WireGuard key, `random` draws from [0, 1)."""

    def __init__(self, *, own: PublicKey, random: Callable[[], float]) -> None:
        self._own = own
        self._random = random
        self._pairs: dict[PublicKey, Pair] = {}
        self._keys: dict[PublicKey, PublicKey] = {}  # WireGuard key -> probe key
        self._peer_of: dict[PublicKey, PublicKey] = {}  # probe key -> WireGuard key
        self._origins: dict[PublicKey, bytes] = {}
        self._snapshot = Snapshot()
        self._interfaces: frozenset[IPInterface] = frozenset()
        self._listen_port = 0
        self._reflexive = Reflexive()
        self._inner: frozenset[IPAddress] = frozenset()
        self._agenda: Agenda[PublicKey] = Agenda()
        self._transaction = 0
        self._unread_since: float | None = None  # the device's counters moved and were not read since
        self._out: deque[PathsOutput] = deque()
        # searching pairs that are due, the longest due first; those whose search is young go first
        self._young: dict[PublicKey, None] = {}
        self._waiting: dict[PublicKey, None] = {}
        self._pace = Pace()
        self._restored: dict[PublicKey, Endpoint] = {}
        self._watched: dict[PublicKey, float] = {}
        # kept up to date by `_touch` and `view`, so that one datagram costs the same in a mesh of any size
        self._dirty: set[PublicKey] = set()
        self._views: dict[PublicKey, PairView] = {}
        self._view = PathsView(pairs=MappingProxyType(self._views))
        self._view_of: tuple[object, ...] = ()  # its other parts, as they were when it was made
        self._changes = Changes()
        self._living: dict[PublicKey, None] = {}
        self._busy: dict[PublicKey, float] = {}  # until when
        self._last_good: dict[PublicKey, Endpoint] = {}
        self._open_peers: dict[PublicKey, tuple[ReflectorTarget, ...]] = {}
        self._targets: tuple[ReflectorTarget, ...] = ()
        self._observers: dict[str, dict[str, Endpoint]] = {}  # subject's name -> observer's name -> where
        self._candidates: tuple[Candidate, ...] = ()
        self._mapping = Mapping.UNKNOWN
        self._families: frozenset[Family] = frozenset()
        self._own_endpoints: frozenset[Endpoint] = frozenset()
        self._relays: dict[PublicKey, MappingOf[Endpoint, Relay]] = {}  # of pairs that have any
        self._carried: dict[PublicKey, MappingOf[Endpoint, Relay]] = {}  # hubs that our carrier leads to
        self._expected: dict[PublicKey, tuple[Endpoint, Relay]] = {}  # peers that it may have speak to us
        self._heard_udp = float("-inf")  # when somebody last spoke to us over UDP
        self._over_udp: dict[PublicKey, None] = {}  # pairs whose path lives, and is not carried
        self._lost_udp: float | None = None  # since when there is none of them
        self._withdrawn: dict[Endpoint, None] = {}  # hubs' ports that were granted once, the latest last
        self._hubs_at: frozenset[Endpoint] = frozenset()  # where hubs themselves say to be
        self._hub_addresses: frozenset[IPAddress] = frozenset()
        self._routed: frozenset[IPNetwork] = frozenset()  # what peers offer beyond their addresses
        self._birthday = Birthday(random=random)

    # --- what is known -------------------------------------------------------------------------------------

    def set_snapshot(self, snapshot: Snapshot, now: float, *, pairs: Set[PublicKey] | None = None) -> None:
        """Take the peers, their endpoints, the mesh's timers and reflectors.

        `pairs`: the peers that we are to have a path to, by WireGuard key; None: all.
        """
        pods = snapshot.mesh.spec.pod_networking if snapshot.mesh is not None else PodNetworking.OFF
        routed = frozenset(
            prefix
            for peer in snapshot.peers.values()
            for prefix in (*offered(peer.spec, pods), *hidden_pods(peer.spec, pods))
        )
        if pairs is not None:
            peers = {key: peer for key, peer in snapshot.peers.items() if key in pairs}
            snapshot = replace(snapshot, peers=peers)
        before, self._snapshot = self._snapshot, snapshot
        if before.mesh is not None and snapshot.mesh is not None and before.mesh.spec != snapshot.mesh.spec:
            for pair in self._pairs.values():
                pair.configure(self._timers(), self._prefer())
        if snapshot.mesh is not None:
            self._birthday.configure(allowed=snapshot.mesh.spec.birthday)
        gone = before.peers.keys() - snapshot.peers.keys()
        news = [key for key, peer in snapshot.peers.items() if before.peers.get(key) is not peer]
        stale = set(news)  # whose routes are to be worked out anew
        hubs = (peer for peer in snapshot.peers.values() if peer.assignment.role is Role.HUB)
        hubs_at = frozenset(endpoint for hub in hubs for endpoint in claims(hub))
        if hubs_at != self._hubs_at:
            self._hubs_at = hubs_at
            self._hub_addresses = frozenset(endpoint.address for endpoint in hubs_at)
            stale |= snapshot.peers.keys()
        if routed != self._routed:
            self._routed = routed
            stale |= snapshot.peers.keys()
        for key in gone:
            stale |= self._note_observations(before.peers[key], None)
            self._forget(key)
        for key in news:
            stale |= self._note_observations(before.peers.get(key), snapshot.peers[key])
            self._note_open(key, snapshot.peers[key])
        for key in sorted(stale & snapshot.peers.keys()):
            self._know(key, snapshot.peers[key], now)
        self._set_reflectors(now)

    def _know(self, key: PublicKey, peer: Peer, now: float) -> None:
        if peer.report is None:
            return
        probe = peer.report.keys.probe
        if self._keys.get(key) != probe:
            self._keys[key] = probe
            self._peer_of[probe] = key
        pair = self._pairs.get(key) or self._new_pair(key, now)
        pair.set_candidates(self._routes_to(peer), peer.report.mapping, now)
        self._touch(key, now)

    def _note_observations(self, before: Peer | None, after: Peer | None) -> set[PublicKey]:
        """Take where a peer saw others; the keys of those it now sees elsewhere."""
        was, is_now = _observations(before), _observations(after)
        if was == is_now:
            return set()
        for observer, name in was.keys() - is_now.keys():
            del self._observers[name][observer]
            if not self._observers[name]:
                del self._observers[name]
        for (observer, name), endpoint in is_now.items():
            self._observers.setdefault(name, {})[observer] = endpoint
        moved = {link[1] for link in was.keys() | is_now.keys() if was.get(link) != is_now.get(link)}
        return {key for key, peer in self._snapshot.peers.items() if peer.meta.name in moved}

    def _note_open(self, key: PublicKey, peer: Peer) -> None:
        """A peer without a NAT can tell us where it sees us."""
        report = peer.report
        self._open_peers.pop(key, None)
        if report is None or report.mapping is not Mapping.NONE:
            return
        self._open_peers[key] = tuple(
            ReflectorTarget(report.keys.probe, candidate.endpoint)
            for candidate in report.endpoints
            if candidate.kind in (CandidateKind.HOST, CandidateKind.STATIC)
            and not is_private(candidate.endpoint.address)
            and self._refusal(candidate.endpoint) is None
        )

    def set_interfaces(self, interfaces: frozenset[IPInterface], listen_port: int, now: float) -> None:
        """Take our own addresses and WireGuard's port; a change makes every path doubtful."""
        before = (self._interfaces, self._listen_port)
        if before == (interfaces, listen_port):
            return
        self._interfaces, self._listen_port = interfaces, listen_port
        self._families = frozenset(Family.IPV4 if i.version == 4 else Family.IPV6 for i in interfaces)
        self._own_endpoints = frozenset(Endpoint(i.ip, listen_port) for i in interfaces if listen_port)
        self._birthday.set_port(listen_port)
        self._set_reflectors(now)
        for key, peer in self._snapshot.peers.items():
            if key in self._pairs and peer.report is not None:
                self._pairs[key].set_candidates(self._routes_to(peer), peer.report.mapping, now)
                self._touch(key, now)
        if not before[0]:
            return
        self._reflexive.restart(now, forget=True)
        self._birthday.network_changed(now)
        lost = bool(before[0] - interfaces)
        for key, pair in self._pairs.items():
            pair.network_changed(now, lost=lost)
            self._touch(key, now)

    def restore(self, last_good: dict[PublicKey, Endpoint], now: float) -> None:
        """Take the last good endpoints from disk."""
        self._restored = dict(last_good)
        for key, pair in self._pairs.items():
            if key in last_good:
                pair.restore(last_good[key], now)
                self._touch(key, now)

    def restore_openings(self, openings: Iterable[Opening], now: float) -> None:
        """Take the ports that an earlier agent had WireGuard speak from."""
        self._birthday.restore(openings, now)

    def restore_tries(self, tries: Iterable[Tried], now: float, *, wall: float) -> None:
        """Take what came of guessing ports, as an earlier agent kept it."""
        self._birthday.restore_tries(tries, now, wall=wall)

    def kept_tries(self, *, offset: float) -> tuple[Tried, ...]:
        """The same, for the disk; `offset` is the wall clock less the monotonic one."""
        return self._birthday.kept_tries(offset=offset)

    def take_port_rules(self, now: float) -> PortRules | None:
        """The ports that WireGuard is to speak from, once; answered by `port_rules_applied`."""
        return self._birthday.take_rules(now)

    def port_rules_applied(self, error: str, now: float) -> None:
        """The ports are as they should be, or, with `error` as part of a sentence, as they were."""
        self._birthday.applied(error, now)
        self._explain_birthday(now)

    @property
    def birthday_spent(self) -> Spent | None:
        """What guessing ports took so far; None where the mesh does not allow it."""
        return self._birthday.spent if self._birthday.is_allowed else None

    def set_relays(self, key: PublicKey, relays: MappingOf[Endpoint, Relay], now: float) -> None:
        """Take the hubs' ports that are granted to us and the peer with WireGuard key `key`."""
        usable = {
            endpoint: relay
            for endpoint, relay in relays.items()
            if is_carried(endpoint)
            or (self._never(endpoint) is None and (not self._families or endpoint.family in self._families))
        }
        for endpoint in sorted(self._relays.get(key, {}).keys() - usable.keys(), key=str):
            self._withdrawn[endpoint] = None  # the hub may go on for a while, and so may the other side
        while len(self._withdrawn) > MAX_WITHDRAWN:
            del self._withdrawn[next(iter(self._withdrawn))]
        self._relays[key] = usable
        if not usable:
            del self._relays[key]
        self._offer_relays(key, now)

    def set_carried(self, carried: MappingOf[PublicKey, MappingOf[Endpoint, Relay]], now: float) -> None:
        """Take where our carrier leads to hubs themselves, by their WireGuard keys: nowhere else."""
        before, self._carried = self._carried, dict(carried)
        for key in sorted(before.keys() | carried.keys()):
            if before.get(key) != carried.get(key):
                self._offer_relays(key, now)

    def connected(self, hub: PublicKey, now: float) -> None:
        """Our carrier reaches a hub that it did not reach before: what was asked there was lost."""
        if hub in self._pairs:
            self._pairs[hub].connected(now)
            self._touch(hub, now)

    def expect_carried(self, expected: MappingOf[PublicKey, Endpoint], relay: Relay) -> None:
        """Take where our carrier has peers speak from, should it carry them: we are the hub of `relay`."""
        for key, endpoint in expected.items():
            if self._expected.get(key) != (endpoint, relay):
                self._expected[key] = endpoint, relay
                if key in self._pairs:
                    self._pairs[key].expect_carried(endpoint, relay)

    def _offer_relays(self, key: PublicKey, now: float) -> None:
        if key in self._pairs:
            self._pairs[key].set_relays(self._relays_of(key), now)
            self._touch(key, now)

    def watch(self, intervals: MappingOf[PublicKey, float], now: float) -> None:
        """Ask these peers so often, in seconds, also over idle paths; others not."""
        if intervals == self._watched:
            return
        before, self._watched = self._watched, dict(intervals)
        for key in sorted(self._pairs.keys() & (before.keys() | intervals.keys())):
            if before.get(key) != intervals.get(key):
                self._pairs[key].watch(intervals.get(key), now)
                self._touch(key, now)

    def suspect(self, key: PublicKey, now: float) -> None:
        """Ask a peer now whether it is there."""
        if key in self._pairs:
            self._pairs[key].suspect(now)
            self._touch(key, now)

    def _relays_of(self, key: PublicKey) -> dict[Endpoint, Relay]:
        return {**self._relays.get(key, {}), **self._carried.get(key, {})}

    def knocked(self, key: PublicKey, now: float) -> None:
        """Hubs were just told where we are to be found by this peer."""
        if key in self._pairs:
            self._pairs[key].knocked(now)
            self._touch(key, now)

    def adopt(self, key: PublicKey, endpoint: Endpoint, *, session: bool, now: float) -> None:
        """The device already reaches the peer at `endpoint`."""
        pair = self._pairs.get(key)
        # A pair that rests has its device send nowhere; an agent that starts then goes by what the disk says.
        if pair is not None and not self._is_refused(endpoint, pair):
            pair.adopt(endpoint, session=session, now=now)
            self._touch(key, now)

    def traffic_moved(self, now: float) -> None:
        """The device's counters have moved since they were last read."""
        if self._unread_since is None:
            self._unread_since = now

    def observe(self, readings: dict[PublicKey, PeerReading], now: float) -> None:
        """Take the device's counters."""
        self._unread_since = None
        for key, reading in readings.items():
            pair = self._pairs.get(key)
            endpoint = reading.endpoint
            if pair is None:
                continue
            if not reading.handshake and pair.has_read(
                tx=reading.tx, rx=reading.rx, endpoint=endpoint, session=reading.session
            ):
                continue
            if endpoint is not None and self._is_refused(endpoint, pair):
                endpoint = None
            news = pair.observe(
                tx=reading.tx, rx=reading.rx, endpoint=endpoint, handshake=reading.handshake,
                session=reading.session, now=now,
            )  # fmt: skip
            if news:
                self._touch(key, now)

    def set_inner(self, addresses: frozenset[IPAddress]) -> None:
        """Say by which addresses this machine's own containers, virtual machines and tunnels know it."""
        self._inner = addresses

    # --- datagrams -----------------------------------------------------------------------------------------

    def receive(
        self, sender: PublicKey, message: Message, source: Endpoint | None, *, origin: bytes, now: float
    ) -> None:
        """Take a message of the holder of probe key `sender`; `source` is None when a carrier brought it."""
        key = self._peer_of.get(sender)
        pair = self._pairs.get(key) if key is not None else None
        if pair is not None and source is not None and self._is_refused(source, pair):
            return
        if isinstance(message, Pong) and self._reflexive.answer(
            sender, message.transaction, self._as_seen_outside(message.observed), now
        ):
            self._publish(now)
            self._tell_mapping(now)
        if pair is None or key is None:
            return
        if self._origins.get(sender) != origin:
            if sender in self._origins:
                pair.origin_changed(now)
            self._origins[sender] = origin
        match message:
            case CallMeMaybe():
                own = frozenset(c.endpoint for c in self._candidates if not is_private(c.endpoint.address))
                opened = own & frozenset(message.opened)
                pair.called(
                    frozenset(c.endpoint for c in message.candidates if self._refusal(c.endpoint) is None),
                    opened=frozenset(endpoint.family for endpoint in opened),
                    reply=bool(own) and not opened,
                    now=now,
                )
            case Ping() | Pong() | Nominate() | Nominated() if source is not None:
                if isinstance(message, Nominate) and self._is_refused(message.here, pair):
                    return
                self._birthday.heard(key, source)
                for due in pair.receive(message, source, now):
                    if isinstance(due, SendTo):
                        said = self._said(due.message, due.endpoint, now)
                        self._out.append(Outgoing(sender, said, due.endpoint, due.ttl))
            case Guess() if source is not None:
                self._look(now)
                answer = self._birthday.asked(key, message, self._stands(key), now)
                self._out.append(Outgoing(sender, answer, source))
                return
            case Guessing():
                self._birthday.answered(key, message, now)
                self._explain_birthday(now)
                return
            case _:
                return
        self._touch(key, now)

    def hit(self, sender: PublicKey, source: Endpoint, port: int, now: float) -> None:
        """A ping of the holder of probe key `sender` came to a port of ours that is not WireGuard's."""
        key = self._peer_of.get(sender)
        if key is not None:
            self._birthday.hit(key, source, port, now)
            self._explain_birthday(now)

    def confirmed(self, sender: PublicKey, source: Endpoint | None, now: float) -> None:
        """The channel can seal for `sender` now."""
        key = self._peer_of.get(sender)
        if key is not None and key in self._pairs:
            pair = self._pairs[key]
            is_refused = source is not None and self._is_refused(source, pair)
            pair.confirmed(None if is_refused else source, now)
            self._touch(key, now)
        if any(target.probe_key == sender for target in self._targets):
            self._reflexive.restart(now, forget=False)

    def heard_over_udp(self, now: float) -> None:
        """Somebody spoke to us over UDP; where that is news, better paths are searched at once."""
        was_silent = now - self._heard_udp > UDP_IS_NEWS
        self._heard_udp = now
        if not was_silent:
            return
        for key, pair in self._pairs.items():
            if pair.is_by_carrier:
                pair.search(now)
                self._touch(key, now)

    def doubt_udp(self, now: float) -> None:
        """UDP seems to lead nowhere: idle paths over it, which nobody would miss yet, are asked."""
        for key in list(self._over_udp):
            self._pairs[key].suspect(now)
            self._touch(key, now)

    @property
    def any_by_carrier(self) -> bool:
        """Whether some path in use leads to our own carrier."""
        return any(self._pairs[key].is_by_carrier for key in self._living)

    def udp_silent_since(self) -> float | None:
        """Since when nobody has answered over UDP; None while somebody does, or nobody was asked."""
        if not self._families:
            return None
        since = self._reflexive.silent_since() if self._targets else self._lost_udp
        return None if since is None else max(since, self._heard_udp)

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return earliest(
            self._agenda.next(),
            self._reflexive.get_timer() if self._families else None,
            self._birthday.get_timer(),
            self._pace.next_search() if self._young or self._waiting else None,
        )

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        asks = self._reflexive.get_timer()
        if self._families and asks is not None and asks <= now:
            for question in self._reflexive.handle_timer(now, self._next_transaction):
                ping = Ping(question.transaction, has_session=False, received=0)
                self._out.append(Outgoing(question.target.probe_key, ping, question.target.endpoint))
            if self._publish(now):
                self._tell_mapping(now)
        guess = self._birthday.get_timer()
        if guess is not None and guess <= now:
            self._guess(now)
        due = self._agenda.next()
        self._pace.earn(now, late=now - due if due is not None else 0.0)
        while (key := self._agenda.take(now)) is not None:
            pair = self._pairs[key]
            is_there = pair.is_answering(now) and self._pace.may_answer
            if pair.direct or pair.is_urgent or is_there:
                self._serve(key, now)
            elif pair.is_punching(now):
                self._young[key] = None
            else:
                self._waiting[key] = None
        while (self._young or self._waiting) and self._pace.may_search:
            self._serve(next(iter(self._young or self._waiting)), now)

    def _serve(self, key: PublicKey, now: float) -> None:
        """Do what is due for one pair."""
        pair = self._pairs[key]
        is_searched = not pair.direct
        self._young.pop(key, None)
        self._waiting.pop(key, None)
        can_call = not pair.direct and self._can_call(key, now)
        for due in pair.take(now, self._next_transaction, can_call=can_call):
            match due:
                case SendTo(message, endpoint, ttl):
                    if isinstance(message, Ping) and is_searched:
                        self._pace.spend()
                    said = self._said(message, endpoint, now)
                    self._out.append(Outgoing(self._keys[key], said, endpoint, ttl))
                case CheckMapping():
                    self._reflexive.check(now)
                case CallPeer():
                    opened = pair.opened(now)[:MAX_CANDIDATES]
                    call = CallMeMaybe(self._candidates[:MAX_CANDIDATES], opened)
                    self._out.append(Call(self._keys[key], call))
        if not pair.direct:
            pair.explain(self._why_not(key, now))
        self._touch(key, now)

    def _guess(self, now: float) -> None:
        """Do what guessing ports wants."""
        self._look(now)
        due = self._birthday.handle_timer(
            now, keys=self._pairs, stands=self._stands, transactions=self._next_transaction
        )
        for out in due:
            match out:
                case Say(key, message, endpoint, ttl, port):
                    self._out.append(Outgoing(self._keys[key], message, endpoint, ttl, port))
                case Ask(key, endpoint):
                    self._pairs[key].ask(endpoint, now)
                    self._touch(key, now)
        self._explain_birthday(now)

    def _stands(self, key: PublicKey) -> Standing | None:
        """How a pair stands, as it was last looked at."""
        view, peer = self._views.get(key), self._snapshot.peers.get(key)
        if view is None or peer is None or peer.report is None:
            return None
        endpoints = tuple(e for e in public_reflexive(peer.report.endpoints) if self._refusal(e) is None)
        return Standing(view.path, view.since, view.endpoint, peer.report.mapping, endpoints)

    def _explain_birthday(self, now: float) -> None:
        news = self._birthday.take_news()
        self._changes.kept |= bool(news)
        for key in news & self._pairs.keys():
            if not self._pairs[key].direct:
                self._pairs[key].explain(self._why_not(key, now))
            self._touch(key, now)

    def _said(self, message: Message, endpoint: Endpoint, now: float) -> Message:
        """What is to be said to an endpoint: nothing that is stale, and whether the port was guessed."""
        said = self._without_stale_counter(message, now)
        if isinstance(said, Ping) and self._birthday.holds(endpoint):
            return replace(said, guessed=True)
        return said

    def _without_stale_counter(self, message: Message, now: float) -> Message:
        """On a busy machine the device is read late, and the peer would take what arrived since for lost."""
        if self._unread_since is None or now - self._unread_since < COUNTER_STALE:
            return message
        return replace(message, received=0) if isinstance(message, Ping | Pong) else message

    def _can_call(self, key: PublicKey, now: float) -> bool:
        """Whether something carries a call to the peer, or a reflector may still answer and then does."""
        silent = self._reflexive.silent_since()
        hopes = bool(self._targets) and (silent is None or now - silent < CARRIER_PATIENCE)
        return hopes or bool(self.carriers(self._keys[key], now))

    def outputs(self) -> list[PathsOutput]:
        """What is to be sent now."""
        out = list(self._out)
        self._out.clear()
        return out

    # --- views ---------------------------------------------------------------------------------------------

    def view(self, now: float) -> PathsView:
        """All pairs; only those that were touched since the last view are worked out anew."""
        self._look(now)
        own = (self._candidates, self._mapping, self._reflexive.silent_since(), bool(self._targets))
        if own != self._view_of:
            self._view, self._view_of = PathsView(MappingProxyType(self._views), *own), own
        return self._view

    def explain(self, key: PublicKey, now: float) -> tuple[Attempt, ...]:
        """Every candidate towards a peer, and what came of it; none of one that we have no link with."""
        peer, pair = self._snapshot.peers.get(key), self._pairs.get(key)
        if peer is None or pair is None:
            return ()
        view = pair.view(now)
        return explain(
            peer,
            observed=self._observers.get(peer.meta.name, {}).values(),
            routes=pair.routes,
            in_use=view.endpoint if view.path is not PathKind.NONE else None,
            refusal=self._refusal,
            families=self._families,
            now=now,
        )

    def changes(self, now: float) -> Changes:
        """What changed since the last call."""
        self._look(now)
        changes, self._changes = self._changes, Changes()
        return changes

    def _look(self, now: float) -> None:
        for key in self._dirty:
            pair = self._pairs.get(key)
            if pair is None:
                continue
            before, view = self._views.get(key), pair.view(now)
            if view.path is PathKind.DIRECT and self._birthday.holds(view.endpoint):
                view = replace(view, birthday=True)
            if view != before:
                self._views[key] = view
                self._changes.pairs.add(key)
                self._changes.moved |= before is None or _way(before) != _way(view)
        self._dirty.clear()

    def _publish(self, now: float) -> bool:
        """Work out anew what we say of ourselves; whether it is something else."""
        own = self._snapshot.own
        addresses = frozenset(interface.ip for interface in self._interfaces)
        candidates = own_candidates(
            interfaces=self._interfaces,
            listen_port=self._listen_port,
            static=own.spec.endpoints if own is not None else (),
            reflexive=self._reflexive.published(now),
            mesh=self._mesh_prefixes(),
        )
        mapping = self._reflexive.mapping(addresses, now)
        if (candidates, mapping) == (self._candidates, self._mapping):
            return False
        self._candidates, self._mapping = candidates, mapping
        self._birthday.set_own(mapping, public_reflexive(candidates))
        self._changes.own = True
        return True

    def _as_seen_outside(self, observed: Endpoint) -> Endpoint | None:
        """What a reflector saw, unless it is in a container here, to which this machine translated us."""
        if observed.address in self._inner and observed.port != self._listen_port:
            return None
        return observed

    @property
    def any_alive(self) -> bool:
        """Whether some peer is reached."""
        return bool(self._living)

    def carriers(self, to: PublicKey, now: float) -> list[PublicKey]:
        """Probe keys of whoever may pass a datagram on to `to`: reflectors that answer, then living peers."""
        reflectors = [target.probe_key for target in self._reflexive.answering(now)]
        peers = [self._keys[key] for key in itertools.islice(self._living, MAX_CARRIERS + 1)]
        return [key for key in dict.fromkeys(reflectors + peers) if key != to][:MAX_CARRIERS]

    def endpoint_of(self, probe: PublicKey, now: float) -> Endpoint | None:
        """Where a carrier or peer is reached now, by probe key."""
        for target in self._reflexive.answering(now):
            if target.probe_key == probe:
                return target.endpoint
        key = self._peer_of.get(probe)
        pair = self._pairs.get(key) if key is not None else None
        return pair.endpoint if pair is not None and pair.alive else None

    def settled(self, key: PublicKey, now: float) -> None:
        """Endpoint and hold of `key` were handed to the device."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.settled()
            self._touch(key, now)

    def held(self, key: PublicKey, now: float) -> None:
        """The device holds the endpoint of `key` now."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.held(now)
            self._touch(key, now)

    def last_good(self) -> MappingOf[PublicKey, Endpoint]:
        """What to try first after a restart, by WireGuard key; good until the next input."""
        return MappingProxyType(self._last_good)

    def busy(self, now: float) -> bool:
        """Whether some pair waits for the device's news."""
        return any(now < until for until in self._busy.values())

    # --- inside --------------------------------------------------------------------------------------------

    def _timers(self) -> Timers:
        return self._snapshot.mesh.spec.timers if self._snapshot.mesh is not None else Timers()

    def _prefer(self) -> Family:
        return self._snapshot.mesh.spec.prefer if self._snapshot.mesh is not None else Family.IPV6

    def _mesh_prefixes(self) -> tuple[IPNetwork, ...]:
        if self._snapshot.mesh is None:
            return ()
        addressing = self._snapshot.mesh.spec.addressing
        return tuple(prefix for prefix in (addressing.ipv4, addressing.ipv6) if prefix is not None)

    def _refusal(self, endpoint: Endpoint) -> str | None:
        return self._never(endpoint) or self._relay_only(endpoint)

    def _relay_only(self, endpoint: Endpoint) -> str | None:
        """A hub's ports for relaying lead to whom it granted them, whoever claims to be there."""
        if endpoint in self._withdrawn:
            return "a hub's port for relaying"
        mesh = self._snapshot.mesh
        if mesh is None or endpoint.address not in self._hub_addresses or endpoint in self._hubs_at:
            return None
        first, last = mesh.spec.hubs.ports
        return "a hub's port for relaying" if first <= endpoint.port <= last else None

    def _never(self, endpoint: Endpoint) -> str | None:
        never = refusal(endpoint, mesh=self._mesh_prefixes(), own=self._own_endpoints)
        return never or misplacement(endpoint, interfaces=self._interfaces, routed=self._routed)

    def _is_refused(self, endpoint: Endpoint, pair: Pair) -> bool:
        """Whether the peer cannot rightly be there; its routes were asked about once."""
        return not pair.knows(endpoint) and self._refusal(endpoint) is not None

    def _new_pair(self, key: PublicKey, now: float) -> Pair:
        pair = Pair(
            key=key,
            lower=self._own < key,
            random=self._random,
            timers=self._timers(),
            prefer=self._prefer(),
            now=now,
        )
        self._pairs[key] = pair
        if key in self._restored:
            pair.restore(self._restored[key], now)
        pair.set_relays(self._relays_of(key), now)
        pair.watch(self._watched.get(key), now)
        if key in self._expected:
            pair.expect_carried(*self._expected[key])
        pair.search(now)
        return pair

    def _forget(self, key: PublicKey) -> None:
        self._birthday.forget(key)
        del self._pairs[key]
        probe = self._keys.pop(key)
        self._peer_of.pop(probe, None)
        self._origins.pop(probe, None)
        self._agenda.put(key, None)
        self._young.pop(key, None)
        self._waiting.pop(key, None)
        self._restored.pop(key, None)
        self._relays.pop(key, None)
        self._open_peers.pop(key, None)
        self._living.pop(key, None)
        self._over_udp.pop(key, None)
        self._expected.pop(key, None)
        self._busy.pop(key, None)
        self._note_last_good(key, None)
        self._dirty.discard(key)
        self._changes.moved |= self._views.pop(key, None) is not None

    def _routes_to(self, peer: Peer) -> frozenset[Endpoint]:
        claimed = claims(peer) | set(self._observers.get(peer.meta.name, {}).values())
        return frozenset(
            e
            for e in claimed
            if self._refusal(e) is None and (not self._families or e.family in self._families)
        )

    def _set_reflectors(self, now: float) -> None:
        """The registry's reflectors, and a few peers without a NAT: not the same ones for everybody."""
        mesh = self._snapshot.mesh
        named = [
            ReflectorTarget(reflector.probe_key, endpoint, only_answers=True)
            for reflector in (mesh.status.reflectors if mesh is not None else ())
            for endpoint in reflector.endpoints
        ]
        nearest = heapq.nsmallest(
            MAX_TARGETS, self._open_peers, key=lambda key: (not self._is_heard(key), key < self._own, key)
        )
        targets = named + [target for key in nearest for target in self._open_peers[key]]
        self._targets = tuple(t for t in targets if t.endpoint.family in self._families)
        self._reflexive.set_targets(self._targets, now)
        self._publish(now)

    def _is_heard(self, key: PublicKey) -> bool:
        """Whether a peer is there, by its path or by the registry's word, which may be old."""
        return key in self._living or self._snapshot.peers[key].assignment.online

    def _tell_mapping(self, now: float) -> None:
        """Peers that do not hear us yet should hear of the new mapping."""
        for key, pair in self._pairs.items():
            if not pair.direct:
                pair.mapping_known(now)
                self._touch(key, now)

    def _touch(self, key: PublicKey, now: float) -> None:
        """Work out the pair's view and timer anew."""
        self._dirty.add(key)
        pair = self._pairs[key]
        if pair.alive:
            self._living[key] = None
        else:
            self._living.pop(key, None)
        if pair.is_over_udp:
            self._over_udp[key] = None
            self._lost_udp = None
        else:
            self._over_udp.pop(key, None)
            if not self._over_udp and self._lost_udp is None:
                self._lost_udp = now
        busy_until = pair.busy_until(now)
        if busy_until is not None:
            self._busy[key] = busy_until
        else:
            self._busy.pop(key, None)
        self._note_last_good(key, pair.last_good)
        if pair.is_answering(now):
            self._young.pop(key, None)
            self._waiting.pop(key, None)
        elif key in self._young or key in self._waiting:
            return
        due = pair.get_timer()
        self._agenda.put(key, max(due, now) if due is not None else None)

    def _note_last_good(self, key: PublicKey, endpoint: Endpoint | None) -> None:
        if self._last_good.get(key) == endpoint:
            return
        self._changes.kept = True
        if endpoint is not None:
            self._last_good[key] = endpoint
        else:
            del self._last_good[key]

    def _next_transaction(self) -> int:
        self._transaction = (self._transaction + 1) & 0xFFFFFFFF
        return self._transaction

    def _why_not(self, key: PublicKey, now: float) -> str:
        """Why the pair has no direct path, in words for the person who asks."""
        peer = self._snapshot.peers.get(key)
        report = peer.report if peer is not None else None
        if report is None:
            return "the peer has not reported its endpoints yet"
        if not self._families:
            return "this machine has no usable address"
        if not report.endpoints:
            return "the peer publishes no endpoint"
        theirs = {c.endpoint.family for c in report.endpoints}
        if not theirs & self._families:
            here, there = (_families_text(f) for f in (self._families, theirs))
            return f"no address family in common: {here} here, {there} there"
        mine = self._mapping
        silent = self._reflexive.silent_since()
        if silent is not None and now - silent > self._timers().probe_interval and not self._over_udp:
            return "no reflector answers: is UDP blocked here?"
        if mine is Mapping.ENDPOINT_DEPENDENT and report.mapping is Mapping.ENDPOINT_DEPENDENT:
            both = "symmetric NAT on both sides"
            return f"{both}, so no side's ports can be guessed" if self._birthday.is_allowed else both
        if Mapping.ENDPOINT_DEPENDENT in (mine, report.mapping):
            where = "here" if mine is Mapping.ENDPOINT_DEPENDENT else "there"
            why = f"symmetric NAT {where}, and the other side's NAT lets in only whom it was sent to"
            guessed = self._birthday.explain(key)
            return f"{why}; {guessed}" if guessed else why
        if report.mapping is Mapping.UNKNOWN and not any(
            c.kind in (CandidateKind.REFLEXIVE, CandidateKind.STATIC) for c in report.endpoints
        ):
            return "no answer, and no reflector has seen the peer: is UDP blocked there?"
        pair = self._pairs[key]
        tried = sorted(str(e) for e in pair.tried)
        if not tried:
            return "no endpoint to try"
        said = f"no answer from {', '.join(tried[:3])}"
        if not pair.is_met or report.mapping is Mapping.NONE:
            return said
        return f"{said}, though both sides have opened: a NAT may have moved a port, or a firewall is between"


def _observations(peer: Peer | None) -> dict[tuple[str, str], Endpoint]:
    """By (its own name, the other's): where the peer reports to have seen others."""
    if peer is None or peer.report is None:
        return {}
    links = peer.report.links
    return {(peer.meta.name, link.peer): link.observed for link in links if link.observed is not None}


def _families_text(families: set[Family] | frozenset[Family]) -> str:
    return " and ".join(sorted(families))
