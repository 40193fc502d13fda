"""All paths of one agent: the pairs, our own candidates and mapping, and the pace of pings.

`Paths` owns one `Pair` per peer and one `Reflexive`, turns the snapshot into routes, matches answers to
questions, and says in words why a pair has no direct path. Sans-IO, in five verbs: `receive`, `handle_timer`,
`get_timer`, `outputs`, `view`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from scope.model import (
    Candidate,
    CandidateKind,
    Endpoint,
    Family,
    IPAddress,
    IPInterface,
    IPNetwork,
    Mapping,
    Peer,
    PublicKey,
    Snapshot,
    Timers,
)
from scope.wire import MAX_CANDIDATES, CallMeMaybe, Message, Nominate, Nominated, Ping, Pong
from scope_agent.paths.candidates import own_candidates, refusal
from scope_agent.paths.pair import CallPeer, Pair, PairView, SendTo
from scope_agent.paths.reflexive import ReflectorTarget, Reflexive

# A ping is about 150 bytes on the wire. A thousand peers that are searched at once are spread over seconds, a
# hundred are not held up; home routers take this rate of new sessions.
PACE_PER_SECOND = 400.0
PACE_BURST = 120
_QUEUE_MAX = 8192  # pings waiting for the pace: 32 routes of 256 peers; more would be stale before they go


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message for the holder of a probe key, straight to an endpoint."""

    to: PublicKey
    message: Message
    endpoint: Endpoint
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A message for the holder of a probe key, over any carrier that both reach."""

    to: PublicKey
    message: Message


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
    """What the rest of the agent may know of paths."""

    pairs: dict[PublicKey, PairView] = field(default_factory=dict)  # by WireGuard key
    candidates: tuple[Candidate, ...] = ()
    mapping: Mapping = Mapping.UNKNOWN
    reflectors_silent_since: float | None = None  # None while one answers, or none is known
    reflectors_known: bool = False


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
        self._heap: list[tuple[float, int, PublicKey]] = []
        self._armed: dict[PublicKey, float] = {}
        self._sequence = 0
        self._transaction = 0
        self._out: deque[PathsOutput] = deque()
        self._waiting: deque[Outgoing] = deque()
        self._tokens = float(PACE_BURST)
        self._tokens_at = 0.0
        self._restored: dict[PublicKey, Endpoint] = {}
        self._dirty: set[PublicKey] = set()
        self._views: dict[PublicKey, PairView] = {}

    # --- what is known -------------------------------------------------------------------------------------

    def set_snapshot(self, snapshot: Snapshot, now: float) -> None:
        """Take the peers, their endpoints, the mesh's timers and reflectors."""
        before, self._snapshot = self._snapshot, snapshot
        timers, prefer = self._timers(), self._prefer()
        if before.mesh is not None and snapshot.mesh is not None and before.mesh.spec != snapshot.mesh.spec:
            for pair in self._pairs.values():
                pair.configure(timers, prefer)
        for key in self._pairs.keys() - snapshot.peers.keys():
            self._forget(key)
        observed = _observed_by_others(snapshot)
        for key, peer in snapshot.peers.items():
            if peer.report is None:
                continue
            probe = peer.report.keys.probe
            if self._keys.get(key) != probe:
                self._keys[key] = probe
                self._peer_of[probe] = key
            pair = self._pairs.get(key)
            if pair is None:
                pair = self._new_pair(key, now)
            elif before.peers.get(key) == peer and not observed.get(peer.meta.name):
                continue
            pair.set_candidates(self._routes_to(peer, observed), peer.report.mapping, now)
            self._touch(key, now)
        self._set_reflectors(now)

    def set_interfaces(self, interfaces: frozenset[IPInterface], listen_port: int, now: float) -> None:
        """Take our own addresses and WireGuard's port; a change makes every path doubtful."""
        before = (self._interfaces, self._listen_port)
        if before == (interfaces, listen_port):
            return
        self._interfaces, self._listen_port = interfaces, listen_port
        self._set_reflectors(now)
        if not before[0]:
            return
        self._reflexive.restart(now, forget=True)
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

    def adopt(self, key: PublicKey, endpoint: Endpoint, *, session: bool, now: float) -> None:
        """The device already reaches the peer at `endpoint`."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.adopt(endpoint, session=session, now=now)
            self._touch(key, now)

    def observe(self, readings: dict[PublicKey, PeerReading], now: float) -> None:
        """Take the device's counters."""
        for key, reading in readings.items():
            pair = self._pairs.get(key)
            if pair is None:
                continue
            endpoint = reading.endpoint
            if endpoint is not None and self._refusal(endpoint) is not None:
                endpoint = None
            pair.observe(
                tx=reading.tx, rx=reading.rx, endpoint=endpoint, handshake=reading.handshake,
                session=reading.session, now=now,
            )  # fmt: skip
            self._touch(key, now)

    # --- datagrams -----------------------------------------------------------------------------------------

    def receive(
        self, sender: PublicKey, message: Message, source: Endpoint | None, *, origin: bytes, now: float
    ) -> None:
        """Take a message of the holder of probe key `sender`; `source` is None when a carrier brought it."""
        key = self._peer_of.get(sender)
        pair = self._pairs.get(key) if key is not None else None
        if isinstance(message, Pong) and self._reflexive.answer(
            sender, message.transaction, message.observed, now
        ):
            self._mapping_changed(now)
        if pair is None or key is None:
            return
        if self._origins.get(sender) != origin:
            if sender in self._origins:
                pair.origin_changed()
            self._origins[sender] = origin
        match message:
            case CallMeMaybe():
                pair.called(
                    frozenset(c.endpoint for c in message.candidates if self._refusal(c.endpoint) is None),
                    now,
                )
            case Ping() | Pong() | Nominate() | Nominated() if source is not None:
                if isinstance(message, Nominate) and self._refusal(message.here) is not None:
                    return
                for due in pair.receive(message, source, now):
                    if isinstance(due, SendTo):
                        self._out.append(Outgoing(sender, due.message, due.endpoint, due.ttl))
            case _:
                return
        self._touch(key, now)

    def confirmed(self, sender: PublicKey, source: Endpoint | None, now: float) -> None:
        """The channel can seal for `sender` now."""
        key = self._peer_of.get(sender)
        if key is not None and key in self._pairs:
            self._pairs[key].confirmed(source, now)
            self._touch(key, now)
        if any(target.probe_key == sender for target in self._targets()):
            self._reflexive.restart(now, forget=False)

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        times = [self._heap[0][0]] if self._heap else []
        reflexive = self._reflexive.get_timer()
        if reflexive is not None and self._families():
            times.append(reflexive)
        if self._waiting:
            times.append(self._tokens_at + (1.0 - self._tokens) / PACE_PER_SECOND)
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if self._families():
            for question in self._reflexive.handle_timer(now, self._transaction + 1):
                self._transaction = question.transaction
                ping = Ping(question.transaction, has_session=False, received=0)
                self._out.append(Outgoing(question.target.probe_key, ping, question.target.endpoint))
        while self._heap and self._heap[0][0] <= now:
            at, _, key = heapq.heappop(self._heap)
            if self._armed.get(key) != at:
                continue
            del self._armed[key]
            pair = self._pairs.get(key)
            if pair is None:
                continue
            for due in pair.take(now, self._next_transaction):
                match due:
                    case SendTo(message, endpoint, ttl):
                        self._pace(Outgoing(self._keys[key], message, endpoint, ttl))
                    case CallPeer():
                        self._out.append(
                            Call(self._keys[key], CallMeMaybe(self.candidates(now)[:MAX_CANDIDATES]))
                        )
            if not pair.alive:
                pair.explain(self._why_not(key, now))
            self._touch(key, now)
        self._release(now)

    def outputs(self) -> list[PathsOutput]:
        """What is to be sent now."""
        out = list(self._out)
        self._out.clear()
        return out

    # --- views ---------------------------------------------------------------------------------------------

    def view(self, now: float) -> PathsView:
        """All pairs; only those that were touched since the last view are worked out anew."""
        for key in self._dirty:
            pair = self._pairs.get(key)
            if pair is not None:
                self._views[key] = pair.view(now)
        self._dirty.clear()
        return PathsView(
            pairs=dict(self._views),
            candidates=self.candidates(now),
            mapping=self.mapping(now),
            reflectors_silent_since=self._reflexive.silent_since(),
            reflectors_known=bool(self._targets()),
        )

    def candidates(self, now: float) -> tuple[Candidate, ...]:
        """What we publish of ourselves."""
        reflexive = self._reflexive.endpoints(now)
        if self._reflexive.mapping(self._own_addresses(), now) is Mapping.ENDPOINT_DEPENDENT:
            reflexive = frozenset()  # nobody else would be let in there
        own = self._snapshot.own
        return (
            own_candidates(
                interfaces=self._interfaces,
                listen_port=self._listen_port,
                static=own.spec.endpoints if own is not None else (),
                reflexive=reflexive,
                mesh=self._mesh_prefixes(),
            )
            if self._listen_port
            else ()
        )

    def mapping(self, now: float) -> Mapping:
        """Our mapping class."""
        return self._reflexive.mapping(self._own_addresses(), now)

    def carriers(self, to: PublicKey, now: float) -> list[PublicKey]:
        """Probe keys of whoever may pass a datagram on to `to`: reflectors that answer, then living peers."""
        reflectors = [target.probe_key for target in self._reflexive.answering(now)]
        peers = [self._keys[key] for key, pair in self._pairs.items() if pair.alive]
        return [key for key in dict.fromkeys(reflectors + peers) if key != to][:3]

    def endpoint_of(self, probe: PublicKey, now: float) -> Endpoint | None:
        """Where a carrier or peer is reached now, by probe key."""
        for target in self._reflexive.answering(now):
            if target.probe_key == probe:
                return target.endpoint
        key = self._peer_of.get(probe)
        view = self._pairs[key].view(now) if key is not None and key in self._pairs else None
        return view.endpoint if view is not None else None

    def settled(self, key: PublicKey, now: float) -> None:
        """The endpoint of `key` was handed to the device."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.settled()
            self._touch(key, now)

    def last_good(self) -> dict[PublicKey, Endpoint]:
        """What to try first after a restart."""
        found = dict(self._restored)
        found.update((key, pair.last_good) for key, pair in self._pairs.items() if pair.last_good is not None)
        return {key: endpoint for key, endpoint in found.items() if key in self._pairs}

    def busy(self) -> bool:
        """Whether some pair waits for the device's news."""
        return any(pair.busy for pair in self._pairs.values())

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

    def _own_addresses(self) -> frozenset[IPAddress]:
        return frozenset(interface.ip for interface in self._interfaces)

    def _families(self) -> frozenset[Family]:
        """The families we can send in at all."""
        return frozenset(
            Family.IPV4 if interface.version == 4 else Family.IPV6 for interface in self._interfaces
        )

    def _refusal(self, endpoint: Endpoint) -> str | None:
        own = frozenset(
            Endpoint(interface.ip, self._listen_port) for interface in self._interfaces if self._listen_port
        )
        return refusal(endpoint, mesh=self._mesh_prefixes(), own=own)

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
        pair.search(now)
        return pair

    def _forget(self, key: PublicKey) -> None:
        del self._pairs[key]
        probe = self._keys.pop(key)
        self._peer_of.pop(probe, None)
        self._origins.pop(probe, None)
        self._armed.pop(key, None)
        self._views.pop(key, None)
        self._restored.pop(key, None)

    def _routes_to(self, peer: Peer, observed: dict[str, frozenset[Endpoint]]) -> frozenset[Endpoint]:
        report = peer.report
        published = {c.endpoint for c in report.endpoints} if report is not None else set()
        claimed = published | set(peer.spec.endpoints) | observed.get(peer.meta.name, frozenset())
        families = self._families()
        return frozenset(
            e for e in claimed if self._refusal(e) is None and (not families or e.family in families)
        )

    def _targets(self) -> tuple[ReflectorTarget, ...]:
        """The registry's reflectors, and every peer without a NAT."""
        mesh = self._snapshot.mesh
        families = self._families()
        named = [
            ReflectorTarget(reflector.probe_key, endpoint)
            for reflector in (mesh.status.reflectors if mesh is not None else ())
            for endpoint in reflector.endpoints
        ]
        open_peers = [
            ReflectorTarget(peer.report.keys.probe, candidate.endpoint)
            for _, peer in sorted(self._snapshot.peers.items())
            if peer.report is not None and peer.report.mapping is Mapping.NONE and peer.assignment.online
            for candidate in peer.report.endpoints
            if candidate.kind in (CandidateKind.HOST, CandidateKind.STATIC)
            and self._refusal(candidate.endpoint) is None
        ]
        return tuple(t for t in named + open_peers if t.endpoint.family in families)

    def _set_reflectors(self, now: float) -> None:
        self._reflexive.set_targets(self._targets(), now)

    def _mapping_changed(self, now: float) -> None:
        """Peers that do not hear us yet should hear of the new mapping."""
        for key, pair in self._pairs.items():
            if not pair.alive:
                pair.mapping_known(now)
                self._touch(key, now)

    def _touch(self, key: PublicKey, now: float) -> None:
        """Work out the pair's view and timer anew."""
        self._dirty.add(key)
        due = self._pairs[key].get_timer()
        if due is None:
            self._armed.pop(key, None)
            return
        due = max(due, now)
        if self._armed.get(key) != due:
            self._armed[key] = due
            self._sequence += 1
            heapq.heappush(self._heap, (due, self._sequence, key))

    def _next_transaction(self) -> int:
        self._transaction = (self._transaction + 1) & 0xFFFFFFFF
        return self._transaction

    def _pace(self, outgoing: Outgoing) -> None:
        """Answers and nominations go at once; pings wait for the pace."""
        if not isinstance(outgoing.message, Ping):
            self._out.append(outgoing)
        elif len(self._waiting) < _QUEUE_MAX:
            self._waiting.append(outgoing)

    def _release(self, now: float) -> None:
        self._tokens = min(PACE_BURST, self._tokens + (now - self._tokens_at) * PACE_PER_SECOND)
        self._tokens_at = now
        while self._waiting and self._tokens >= 1.0:
            self._tokens -= 1.0
            self._out.append(self._waiting.popleft())

    def _why_not(self, key: PublicKey, now: float) -> str:
        """Why the pair has no direct path, in words for the person who asks."""
        peer = self._snapshot.peers.get(key)
        report = peer.report if peer is not None else None
        if report is None:
            return "the peer has not reported its endpoints yet"
        if not self._families():
            return "this machine has no usable address"
        if not report.endpoints:
            return "the peer publishes no endpoint"
        theirs = {c.endpoint.family for c in report.endpoints}
        if not theirs & self._families():
            here, there = (_families_text(f) for f in (self._families(), theirs))
            return f"no address family in common: {here} here, {there} there"
        mine = self.mapping(now)
        silent = self._reflexive.silent_since()
        if (
            silent is not None
            and now - silent > self._timers().probe_interval
            and not any(pair.alive for pair in self._pairs.values())
        ):
            return "no reflector answers: is UDP blocked here?"
        if mine is Mapping.ENDPOINT_DEPENDENT and report.mapping is Mapping.ENDPOINT_DEPENDENT:
            return "symmetric NAT on both sides"
        if Mapping.ENDPOINT_DEPENDENT in (mine, report.mapping):
            where = "here" if mine is Mapping.ENDPOINT_DEPENDENT else "there"
            return f"symmetric NAT {where}, and the other side's NAT lets in only whom it was sent to"
        if report.mapping is Mapping.UNKNOWN and not any(
            c.kind in (CandidateKind.REFLEXIVE, CandidateKind.STATIC) for c in report.endpoints
        ):
            return "no answer, and no reflector has seen the peer: is UDP blocked there?"
        tried = sorted(str(e) for e in self._pairs[key].tried)
        return f"no answer from {', '.join(tried[:3])}" if tried else "no endpoint to try"


def _observed_by_others(snapshot: Snapshot) -> dict[str, frozenset[Endpoint]]:
    """By peer name: endpoints at which other peers report to have seen it."""
    found: dict[str, frozenset[Endpoint]] = {}
    for peer in snapshot.peers.values():
        for link in peer.report.links if peer.report is not None else ():
            if link.observed is not None:
                found[link.peer] = found.get(link.peer, frozenset()) | {link.observed}
    return found


def _families_text(families: set[Family] | frozenset[Family]) -> str:
    return " and ".join(sorted(families))
