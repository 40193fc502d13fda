"""The path towards one peer: punch, verify, nominate, watch, repair.

The algorithm, for the pair of ourselves and one peer:

1. Every endpoint the peer publishes, every endpoint others saw it at, and every endpoint it spoke from is a
   *route*. A search pings all routes at 0, 100, 200, 400, 800 and 1600 ms (the less preferred family 250 ms
   later, RFC 8305) and then every probe interval. Before the first full ping towards an endpoint behind a
   NAT goes an *opener* that dies after our own NAT: it opens our side without leaving, in the other side's
   NAT, the entry of an unsolicited packet, which some NATs answer by moving the other side's port.
2. An inbound ping makes its source a route and is answered with an echo and a ping of our own.
3. The peer with the lower key decides. After its first verified echo it waits min(200 ms, one RTT) for
   better ones, then *nominates* the best route: both sides set it, five times, an RTT apart, because
   WireGuard moves an endpoint to the source of every packet and two crosswise settings chase each other.
4. A path in use is judged by WireGuard's own counters: bytes out and none back for 500 ms make it *suspect*;
   three pings in 300 ms, none answered, make it dead. A peer's receive counter that stands still over two
   echoes while ours goes on sending is a dead data path although probes pass. An idle path is left to
   WireGuard's keepalive.
5. A dead path starts a new search; the last good endpoint is asked every 1.5 s for ten minutes. After
   `hub_fallback` without a path the peer is declared unreachable, with the reason, and tried again after
   60 s growing to 10 min.

Time is monotonic seconds. Nothing here sends: `take` returns what is due.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from scope.model import Endpoint, Family, Mapping, PathKind, PublicKey, Timers
from scope.wire import Message, Nominate, Nominated, Ping, Pong
from scope_agent.paths.candidates import rank

PUNCH = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)  # both sides' pings meet within the life of any NAT entry
FAMILY_DELAY = 0.25  # RFC 8305, section 5
OPENERS = 2  # pings of a punch that stay short of the other side's NAT; then 400 ms have passed for its own
OPENER_TTL = 2  # leaves our router, dies at the next hop
SETTLE_MAX = 0.2  # what waiting for a better first route may cost
SETTLE_TIMES = 5  # settings of an endpoint after a nomination: measured to end the chase within 50 ms
SETTLE_MIN_STEP = 0.02  # on one LAN the RTT is too short to space settings by
SUSPECT_AFTER = 0.5
SUSPECT_PINGS = (0.0, 0.1, 0.2)
VERDICT_AFTER = 0.2  # patience after the last suspect ping, at least; else two RTTs
YOUNG = 10.0  # a new path is pinged every probe interval for so long
FRESH = 3.0  # an echo proves a route for so long
VERIFIED = 30.0  # WireGuard may roam among routes that echoed so lately
PROBATION = 1.0  # an endpoint that WireGuard found by itself may stay for so long until its echo
GATE = 1.0  # the side that does not initiate waits so long for the other's handshake
HANDSHAKE_PATIENCE = 6.0  # WireGuard's own retry of a lost initiation, and a little
LAST_GOOD_INTERVAL = 1.5
LAST_GOOD_FOR = 600.0
RETRY_FIRST, RETRY_MAX = 60.0, 600.0
SWITCH_HOLD = 5.0  # between two switches among living routes
RTT_GAIN = 0.8  # a route of equal rank must be this much quicker, and RTT_MARGIN, to be switched to
RTT_MARGIN = 0.01
DATA_DEAD_FOR = 60.0
# Counters are compared no oftener: what was sent within one such time shows, by the end of the next, in the
# counter of the peer, which reads it every quarter of a second and reports it half a second late at most.
STALL_WINDOW = 1.0
STALL_BYTES = 200  # less than this between two echoes is keepalives and handshakes
MAX_ROUTES = 32  # twice what a peer may publish: the rest are sources it spoke from
MAX_PENDING = 16  # unanswered pings remembered per pair and route
CALLS = (0.0, 1.0, 3.0)  # call-me-maybe of one search: the first may be lost, the second find no session
BETTER_INTERVAL = 20.0  # a better route than the one in use is asked so often: both firewalls are open then
# What keepalives (32 bytes) and handshake messages (148, 92) may add up to between two looks at the device.
_OVERHEAD = frozenset(148 * a + 92 * b + 32 * c for a in range(3) for b in range(3) for c in range(3))
NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class SendTo:
    """A message due to an endpoint of the peer."""

    message: Message
    endpoint: Endpoint
    ttl: int | None = None


@dataclass(frozen=True, slots=True)
class CallPeer:
    """A call-me-maybe is due, over whatever carries it."""


@dataclass(frozen=True, slots=True)
class CheckMapping:
    """A path is in doubt: perhaps it is our own mapping that moved."""


Due: TypeAlias = SendTo | CallPeer | CheckMapping


@dataclass(frozen=True, slots=True)
class PairView:
    """What the rest of the agent needs to know of a pair."""

    endpoint: Endpoint | None  # to program; None: leave what the device has
    ready: bool  # the peer may have endpoint, keepalive and allowed IPs
    settling: bool  # set the endpoint again whatever the device says
    verified: frozenset[Endpoint]
    path: PathKind
    rtt: float | None
    observed: Endpoint | None  # where the peer was last seen to send from
    declared: bool  # the ladder's last bound has passed without a path
    reason: str  # why not direct; "" when direct
    since: float  # of the present `path`


@dataclass(slots=True)
class _Route:
    endpoint: Endpoint
    rank: tuple[int, int]
    listed: bool = False  # somebody published it; else the peer only spoke from it
    opener: bool = False  # the first pings of a punch stay short of the other side's NAT
    base: float = 0.0
    attempt: int = 0
    next: float | None = None
    pending: dict[int, float] = field(default_factory=dict)
    rtt: float | None = None
    echoed: float = NEVER
    heard: float = NEVER
    here: Endpoint | None = None
    probation: float = NEVER  # WireGuard moved here by itself at this time
    data_dead: float = NEVER
    lost: float = NEVER  # given up at this time: only a later echo proves it


class Pair:
    """One pair's machine. `lower`: our WireGuard key is the lower one, so we nominate."""

    def __init__(
        self,
        *,
        key: PublicKey,
        lower: bool,
        random: Callable[[], float],
        timers: Timers,
        prefer: Family,
        now: float,
    ) -> None:
        self.key = key
        self._lower = lower
        self._random = random
        self._timers = timers
        self._prefer = prefer
        self._routes: dict[Endpoint, _Route] = {}
        self._mapping = Mapping.UNKNOWN
        # search
        self._started = now
        self._calls = 0
        self._next_call: float | None = None
        self._declared = False
        self._connected_back = False
        self._retry_at: float | None = None
        self._retry_after = RETRY_FIRST
        self._burst_from = now
        # path
        self._current: Endpoint | None = None
        self._alive = False
        self._since = now
        self._nominated_at = NEVER
        self._decide_at: float | None = None
        self._last_good: Endpoint | None = None
        self._restore_at: float | None = None
        self._lost_at = NEVER
        self._reason = ""
        # nomination
        self._sequence = 0
        self._acknowledged = True
        self._named: Endpoint | None = None  # our own endpoint in the nomination that stands
        self._asked_for: tuple[int, Endpoint] | None = None
        self._settle_next: float | None = None
        self._settle_left = 0
        self._settle_due = False
        # session and counters
        self._session = False
        self._peer_session = False
        self._gate_until: float | None = None
        self._ready = False
        self._tx = self._rx = -1
        self._reading: tuple[int, int, Endpoint | None, bool] | None = None
        self._device_endpoint: Endpoint | None = None
        self._tx_moved = NEVER
        self._unanswered_since: float | None = None
        self._suspect: float | None = None
        self._suspect_step = 0
        self._check_mapping = False
        self._stall: tuple[int, int, float] | None = None  # our bytes out, theirs in, when they were compared
        self._stalls = 0

    # --- what is known of the peer -------------------------------------------------------------------------

    def configure(self, timers: Timers, prefer: Family) -> None:
        """Take the mesh's timers and preferred family."""
        self._timers, self._prefer = timers, prefer
        for route in self._routes.values():
            route.rank = rank(route.endpoint, prefer)

    def set_candidates(self, endpoints: frozenset[Endpoint], mapping: Mapping, now: float) -> None:
        """The endpoints that may work now; new ones are tried at once where they could help."""
        self._mapping = mapping
        for endpoint in sorted(endpoints, key=lambda e: (rank(e, self._prefer), str(e))):
            route = self._route(endpoint)
            if route is None:
                break
            if route.listed:
                continue
            route.listed = True
            route.opener = self._wants_opener(route)
            if route.echoed == NEVER:
                self._schedule_punch(route, now)
        for endpoint, route in list(self._routes.items()):
            if endpoint not in endpoints:
                route.listed = False
                if endpoint != self._current and now - max(route.echoed, route.heard) > VERIFIED:
                    del self._routes[endpoint]

    def _wants_opener(self, route: _Route) -> bool:
        behind_nat = self._mapping is not Mapping.NONE
        return behind_nat and route.rank[0] > 0 and route.endpoint != self._last_good

    def restore(self, endpoint: Endpoint, now: float) -> None:
        """The last good endpoint from disk: asked first, and programmed after a second without an echo."""
        self._last_good = endpoint
        self._lost_at = now
        route = self._route(endpoint)
        if route is not None:
            route.opener = False
            self._schedule_punch(route, now)
        self._restore_at = now + GATE

    def adopt(self, endpoint: Endpoint, *, session: bool, now: float) -> None:
        """The device, which outlived the last agent, already reaches the peer there: leave it as it is."""
        self._current, self._last_good = endpoint, endpoint
        self._ready, self._session = True, session
        self._restore_at = None
        route = self._route(endpoint)
        if route is not None:
            route.opener = False
            self._schedule_punch(route, now)

    def search(self, now: float, *, call: bool = True) -> None:
        """Start the ladder again: a new peer, a network change, a call from the peer, a lost path."""
        self._started = now
        self._declared = False
        self._connected_back = False
        self._retry_at, self._retry_after = None, RETRY_FIRST
        self._punch(now, call=call)

    def network_changed(self, now: float, *, lost: bool) -> None:
        """Our own addresses changed; `lost`: one of them is gone, so the path in use is doubtful at once."""
        if lost and self._alive:
            self._lose("our network changed", now)
        elif self._alive:
            self._doubt(now)
            self._punch(now, call=True)
        else:
            self.search(now)

    def called(self, endpoints: frozenset[Endpoint], *, opened: bool, now: float) -> None:
        """A call-me-maybe: the peer punches towards us now.

        `opened`: it knows our endpoints, so its NAT is open and we ping in full. Where it may have called
        before it heard of them, openers go first.
        """
        for endpoint in endpoints:
            is_new = endpoint not in self._routes
            route = self._route(endpoint)
            if route is not None and (opened or is_new):
                route.opener = not opened and self._wants_opener(route)
        if self._alive:
            self._doubt(now)
        else:
            self._retry_at, self._retry_after = None, RETRY_FIRST
        self._punch(now, call=False)

    def mapping_known(self, now: float) -> None:
        """We learned where reflectors see us: worth telling the peer, once, while it is being searched."""
        if not self._alive and not self._declared and now - self._burst_from > 0.02:
            self._next_call = now

    def origin_changed(self, now: float) -> None:
        """The peer counts anew: its nominations and counters start again, and it knows none of ours."""
        self._asked_for = None
        self._stall = None
        current = self._routes.get(self._current) if self._current else None
        if not self._lower:
            self._sequence = 0
        elif self._alive and current is not None:
            self._nominate(current, now)

    def confirmed(self, source: Endpoint | None, now: float) -> None:
        """The channel can seal for the peer now: repeat at once what the first try could not say.

        `source` is where the peer's cookie came from, None when it came over a carrier.
        """
        if source is not None:
            route = self._route(source)
            if route is not None:
                route.opener = False
        if not self._alive:
            self._punch(now, call=source is None or self._next_call is not None)

    # --- datagrams -----------------------------------------------------------------------------------------

    def receive(self, message: Ping | Pong | Nominate | Nominated, source: Endpoint, now: float) -> list[Due]:
        """Take one authenticated message from the peer; what must be said at once comes back."""
        match message:
            case Ping():
                return self._receive_ping(message, source, now)
            case Pong():
                self._receive_pong(message, now)
                return []
            case Nominate():
                return self._receive_nominate(message, now)
            case Nominated():
                self._acknowledged = self._acknowledged or message.sequence == self._sequence
                return []

    def _receive_ping(self, ping: Ping, source: Endpoint, now: float) -> list[Due]:
        self._peer_session = ping.has_session
        self._compare_counters(ping.received, now)
        answer = SendTo(
            Pong(ping.transaction, observed=source, has_session=self._session, received=max(self._rx, 0)),
            source,
        )
        route = self._route(source)
        if route is None:
            return [answer]
        route.heard = now
        if self._is_data_dead(route, now):
            return []  # an echo would tell the peer that the path works
        route.opener = False
        unproven = now - route.echoed > 1.0
        in_flight = any(now - at < 0.05 for at in route.pending.values())
        if unproven and not in_flight:
            route.base, route.attempt, route.next = now, 0, now
        current = self._routes.get(self._current) if self._current else None
        if self._alive and current is not None and source != self._current and now - current.echoed > 1.0:
            self._doubt(now)
        return [answer]

    def _receive_pong(self, pong: Pong, now: float) -> None:
        self._peer_session = pong.has_session
        for route in self._routes.values():
            sent = route.pending.pop(pong.transaction, None)
            if sent is None:
                continue
            sample = now - sent
            route.rtt = (
                sample if route.rtt is None or sample < route.rtt else 0.75 * route.rtt + 0.25 * sample
            )
            route.echoed = now
            route.here = pong.observed
            route.pending = {t: at for t, at in route.pending.items() if at > sent}
            self._compare_counters(pong.received, now)
            self._echoed(route, now)
            if self._lower and self._alive and route.endpoint == self._current:
                if route.here != self._named:
                    self._nominate(route, now)  # our mapping moved: the peer is to follow
                elif not self._acknowledged and self._settle_next is None:
                    self._settle_left, self._settle_next = 1, now
            return

    def _echoed(self, route: _Route, now: float) -> None:
        if route.endpoint == self._current:
            self._unanswered_since = None
            self._suspect = None
        if self._asked_for is not None and self._asked_for[1] == route.endpoint:
            self._follow(self._asked_for[0], route, now)
        if not self._alive:
            if self._lower and self._decide_at is None and self._usable(route, now):
                self._decide_at = now + min(SETTLE_MAX, route.rtt or SETTLE_MAX)
            elif not self._lower and self._usable(route, now):
                if route.endpoint == self._device_endpoint:
                    self._current = self._last_good = route.endpoint  # the peer's data came from there
                if route.endpoint == self._current:
                    self._live(now)
        elif self._lower and route.endpoint != self._current and self._decide_at is None:
            self._decide_at = now + min(SETTLE_MAX, route.rtt or SETTLE_MAX)
        route.next = self._next_ping(route, now)

    def _receive_nominate(self, nominate: Nominate, now: float) -> list[Due]:
        if self._lower or nominate.sequence < self._sequence:
            return []  # a peer that takes itself for the lower one, or an old nomination that came late
        if nominate.sequence == self._sequence and self._current == nominate.here:
            return [SendTo(Nominated(nominate.sequence), nominate.here)]
        route = self._route(nominate.here)
        if route is None:
            return []
        if now - route.echoed > FRESH:
            self._asked_for = (nominate.sequence, nominate.here)  # follow once it has echoed to us
            route.opener = False
            route.next = now
            return []
        self._follow(nominate.sequence, route, now)
        return [SendTo(Nominated(nominate.sequence), route.endpoint)]

    def _follow(self, sequence: int, route: _Route, now: float) -> None:
        self._sequence = sequence
        self._asked_for = None
        self._take(route, now)

    # --- the device ----------------------------------------------------------------------------------------

    def observe(
        self, *, tx: int, rx: int, endpoint: Endpoint | None, handshake: bool, session: bool, now: float
    ) -> bool:
        """Take the device's counters (bytes since its start), endpoint, and whether a new handshake was seen.

        False when nothing came of it.
        """
        reading = (tx, rx, endpoint, session)
        if reading == self._reading and not handshake and endpoint in (None, self._current):
            return False
        self._reading, self._device_endpoint = reading, endpoint
        self._session = session
        if handshake:
            self._gate_until = now if self._gate_until is not None else None
        moved = tx - self._tx if self._tx >= 0 else 0
        if rx != self._rx:
            self._unanswered_since = None
        elif moved > 0 and moved not in _OVERHEAD and self._unanswered_since is None:
            self._unanswered_since = now
        if moved > 0 and moved not in _OVERHEAD:
            self._tx_moved = now
            for route in self._routes.values():
                if route.next is None:
                    route.next = self._next_ping(route, now)
        self._tx, self._rx = tx, rx
        if endpoint is not None and endpoint != self._current and self._ready:
            self._device_roamed(endpoint, now)
        return True

    def _device_roamed(self, endpoint: Endpoint, now: float) -> None:
        """WireGuard moved to where an authenticated packet came from: prove it, then agree on it."""
        route = self._route(endpoint)
        if route is None:
            return
        if now - route.echoed > FRESH and now - route.probation > VERIFIED:
            route.probation = now
            route.opener = False
            route.base, route.attempt, route.next = now, 0, now
        if not self._alive or now - self._nominated_at < SWITCH_HOLD:
            return
        current = self._routes.get(self._current) if self._current else None
        if now - route.echoed > VERIFIED:
            self._doubt(now)
        elif self._lower and current is not None and self._usable(current, now):
            self._nominate(current, now)  # the two sides chase each other over two living paths

    def _compare_counters(self, received: int, now: float) -> None:
        """Bytes we sent between two reports of the peer's receive counter, against what arrived there.

        A counter of 0 is unknown: nobody holds a session and has received nothing.
        """
        if received == 0:
            self._stall = None
        if self._tx < 0 or received == 0:
            return
        if self._stall is None or received < self._stall[1]:
            self._stall, self._stalls = (self._tx, received, now), 0
            return
        sent, arrived = self._tx - self._stall[0], received - self._stall[1]
        if arrived > 0:
            self._stalls = 0
            current = self._routes.get(self._current) if self._current else None
            if current is not None:
                current.data_dead = NEVER
        elif sent <= STALL_BYTES or now - self._stall[2] < STALL_WINDOW:
            return
        else:
            self._stalls += 1
        self._stall = (self._tx, received, now)
        if self._stalls >= 2 and self._alive and self._current is not None:
            self._stalls = 0
            current = self._routes.get(self._current)
            if current is not None:
                current.data_dead = now
            self._lose(f"probes to {self._current} pass but WireGuard's packets do not", now)

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `take` wants to run next."""
        times = [
            route.next for route in self._routes.values() if route.next is not None
        ]  # at most MAX_ROUTES
        times += [
            t
            for t in (
                self._next_call, self._decide_at, self._settle_next, self._retry_at, self._gate_until,
                self._restore_at, self._suspicion_due(), self._ladder_due(),
            )
            if t is not None
        ]  # fmt: skip
        return min(times, default=None)

    def take(self, now: float, transactions: Callable[[], int]) -> list[Due]:
        """Everything due at `now`."""
        due: list[Due] = []
        if self._check_mapping:
            self._check_mapping = False
            due.append(CheckMapping())
        self._climb(now)
        if self._restore_at is not None and now >= self._restore_at:
            self._restore_at = None
            if not self._alive and self._current is None and self._last_good is not None:
                self._current, self._ready = self._last_good, True
        if self._gate_until is not None and now >= self._gate_until:
            self._gate_until = None
            self._ready = True
        self._judge(now)
        if self._decide_at is not None and now >= self._decide_at:
            self._decide_at = None
            self._decide(now)
        if self._settle_next is not None and now >= self._settle_next:
            due += self._settle(now)
        for route in list(self._routes.values()):
            if route.next is not None and now >= route.next:
                due.append(self._ping(route, now, transactions))
        if self._next_call is not None and now >= self._next_call:
            self._calls += 1
            more = self._calls < len(CALLS) and not self._alive
            self._next_call = self._burst_from + CALLS[self._calls] if more else None
            if self._next_call is not None and self._next_call <= now:
                self._next_call = now + CALLS[1]
            if not self._alive:
                due.append(CallPeer())
        return due

    def settled(self) -> None:
        """The endpoint was handed to the device."""
        self._settle_due = False

    # --- the view ------------------------------------------------------------------------------------------

    def view(self, now: float) -> PairView:
        """The pair as the rest of the agent may know it."""
        current = self._routes.get(self._current) if self._current else None
        verified = frozenset(
            r.endpoint
            for r in self._routes.values()
            if now - r.echoed < VERIFIED or now - r.probation < PROBATION or r.endpoint == self._current
        )
        heard = max(self._routes.values(), key=lambda r: r.heard, default=None)
        return PairView(
            endpoint=self._current,
            ready=self._ready and self._gate_until is None,
            settling=self._settle_due,
            verified=verified,
            path=PathKind.DIRECT if self._alive else PathKind.NONE,
            rtt=current.rtt if current else None,
            observed=heard.endpoint if heard is not None and heard.heard > NEVER else None,
            declared=self._declared,
            reason="" if self._alive else self._reason,
            since=self._since,
        )

    @property
    def alive(self) -> bool:
        """Whether the path in use is believed to work."""
        return self._alive

    def is_punching(self, now: float) -> bool:
        """Whether the search began so lately that the two sides' pings are still to meet."""
        return now - self._burst_from < PUNCH[-1] + FAMILY_DELAY

    @property
    def has_session(self) -> bool:
        """Whether our WireGuard holds a live session with the peer."""
        return self._session

    @property
    def last_good(self) -> Endpoint | None:
        """The endpoint to try first after a restart."""
        return self._last_good

    def knows(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint is one of the pair's routes."""
        return endpoint in self._routes

    @property
    def tried(self) -> frozenset[Endpoint]:
        """Endpoints that were pinged."""
        return frozenset(self._routes)

    def busy_until(self, now: float) -> float | None:
        """Until when a fresh look at the device would help: a handshake is awaited, or a doubt is open."""
        if self._gate_until is not None or self._suspect is not None:
            return now + SUSPECT_AFTER
        if self._alive and not self._session and now < self._nominated_at + HANDSHAKE_PATIENCE:
            return self._nominated_at + HANDSHAKE_PATIENCE
        return None

    # --- searching -----------------------------------------------------------------------------------------

    def _route(self, endpoint: Endpoint) -> _Route | None:
        """The route to an endpoint; a new one only while there is room or a stale one to give up."""
        route = self._routes.get(endpoint)
        if route is not None:
            return route
        if len(self._routes) >= MAX_ROUTES:
            spare = [r for r in self._routes.values() if not r.listed and r.endpoint != self._current]
            if not spare:
                return None
            del self._routes[min(spare, key=lambda r: max(r.echoed, r.heard)).endpoint]
        route = _Route(endpoint, rank(endpoint, self._prefer))
        self._routes[endpoint] = route
        return route

    def _punch(self, now: float, *, call: bool) -> None:
        self._burst_from = now
        for route in self._routes.values():
            self._schedule_punch(route, now)
        if call:
            self._calls, self._next_call = 0, now

    def _schedule_punch(self, route: _Route, now: float) -> None:
        preferred_exists = any(r.endpoint.family is self._prefer for r in self._routes.values())
        later = preferred_exists and route.endpoint.family is not self._prefer and route.echoed == NEVER
        route.base = now + (FAMILY_DELAY if later else 0.0)
        route.attempt = 0
        route.next = route.base

    def _ping(self, route: _Route, now: float, transactions: Callable[[], int]) -> SendTo:
        opener = route.opener and route.attempt < OPENERS and not self._alive
        transaction = transactions()
        route.attempt += 1
        if len(route.pending) >= MAX_PENDING:
            del route.pending[next(iter(route.pending))]
        route.pending[transaction] = now
        route.next = self._next_ping(route, now)
        ping = Ping(transaction, has_session=self._session, received=max(self._rx, 0))
        return SendTo(ping, route.endpoint, OPENER_TTL if opener else None)

    def _next_ping(self, route: _Route, now: float) -> float | None:
        """When a route wants its next ping; None while it is not needed."""
        interval = self._timers.probe_interval
        is_current = route.endpoint == self._current
        if is_current and self._suspect is not None:
            # `_judge` paces these
            return None
        if self._alive:
            if is_current:
                young = now - self._nominated_at < YOUNG
                return now + interval if young or self._is_active(now) else None
            if not self._is_better(route) or self._is_data_dead(route, now):
                return None
            if route.attempt < len(PUNCH):
                return route.base + PUNCH[route.attempt]
            if now < self._started + self._timers.address_fallback:
                return now + interval
            foreign = route.rank[0] == 0 and route.echoed == NEVER  # a private address of another site
            return now + BETTER_INTERVAL if self._is_active(now) and not foreign else None
        if route.attempt < len(PUNCH):
            return max(route.base + PUNCH[route.attempt], now + 0.01)
        if route.endpoint == self._last_good and now - self._lost_at < LAST_GOOD_FOR:
            return now + min(LAST_GOOD_INTERVAL, interval)
        if not self._declared:
            return now + interval
        return None

    def _is_active(self, now: float) -> bool:
        return now - self._tx_moved < 2 * self._timers.probe_interval

    def _is_better(self, route: _Route) -> bool:
        current = self._routes.get(self._current) if self._current else None
        return current is None or route.rank < current.rank

    def _ladder_due(self) -> float | None:
        if self._alive or self._declared:
            return None
        if not self._connected_back:
            return self._started + self._timers.connect_back
        return self._started + self._timers.hub_fallback

    def _climb(self, now: float) -> None:
        """The ladder's bounds while there is no path."""
        if self._alive:
            return
        if not self._connected_back and now >= self._started + self._timers.connect_back:
            self._connected_back = True
            self._punch(now, call=True)
        if not self._declared and now >= self._started + self._timers.hub_fallback:
            self._declared = True
            self._since = now
            self._schedule_retry(now)
        if self._retry_at is not None and now >= self._retry_at:
            self._retry_after = min(2 * self._retry_after, RETRY_MAX)
            self._schedule_retry(now)
            self._punch(now, call=True)

    def _schedule_retry(self, now: float) -> None:
        self._retry_at = now + self._retry_after * (0.9 + 0.2 * self._random())

    # --- judging -------------------------------------------------------------------------------------------

    def _suspicion_due(self) -> float | None:
        if self._suspect is not None:
            if self._suspect_step < len(SUSPECT_PINGS):
                return self._suspect + SUSPECT_PINGS[self._suspect_step]
            return self._verdict_at()
        if self._alive and self._unanswered_since is not None:
            return self._unanswered_since + SUSPECT_AFTER
        return None

    def _verdict_at(self) -> float:
        current = self._routes.get(self._current) if self._current else None
        patience = max(VERDICT_AFTER, 2 * (current.rtt or 0.0) if current else 0.0)
        return (self._suspect or 0.0) + SUSPECT_PINGS[-1] + patience

    def _doubt(self, now: float) -> None:
        if self._suspect is None and self._alive:
            self._suspect, self._suspect_step, self._check_mapping = now, 0, True

    def _judge(self, now: float) -> None:
        if not self._alive:
            self._suspect = None
            return
        if self._suspect is None:
            if self._unanswered_since is None or now < self._unanswered_since + SUSPECT_AFTER:
                return
            self._doubt(now)
        current = self._routes.get(self._current) if self._current else None
        if current is None or self._suspect is None:
            return
        if self._suspect_step < len(SUSPECT_PINGS):
            if now >= self._suspect + SUSPECT_PINGS[self._suspect_step]:
                self._suspect_step += 1
                current.next = now
                if self._suspect_step == len(SUSPECT_PINGS):
                    for route in self._routes.values():
                        if route is not current and now - route.echoed > 1.0:
                            route.opener = False
                            route.base, route.attempt, route.next = now, 0, now
            return
        if now >= self._verdict_at():
            self._suspect = None
            self._lose(f"no answer from {self._current}", now)

    def _lose(self, reason: str, now: float) -> None:
        current = self._routes.get(self._current) if self._current else None
        if current is not None:
            current.lost = now
        self._check_mapping = True
        self._alive = False
        self._since = now
        self._reason = reason
        self._last_good = self._current
        self._lost_at = now
        self._suspect = None
        self._unanswered_since = None
        self.search(now)
        if self._lower and any(self._usable(r, now) for r in self._routes.values()):
            self._decide_at = now

    def explain(self, reason: str) -> None:
        """The agent knows better why there is no path (mappings, families, reflectors)."""
        if not self._alive:
            self._reason = reason

    # --- deciding ------------------------------------------------------------------------------------------

    def _usable(self, route: _Route, now: float) -> bool:
        lately = now - route.echoed < FRESH and route.echoed > route.lost
        return lately and not self._is_data_dead(route, now)

    def _is_data_dead(self, route: _Route, now: float) -> bool:
        return now - route.data_dead < DATA_DEAD_FOR

    def _decide(self, now: float) -> None:
        routes = [r for r in self._routes.values() if self._usable(r, now)]
        if not routes:
            return
        best = min(routes, key=lambda r: (r.rank, r.rtt or 0.0))
        current = self._routes.get(self._current) if self._current else None
        if self._alive and current is not None:
            if best is current or not self._better(best, current):
                return
            if best.rank == current.rank and now - self._nominated_at < SWITCH_HOLD:
                return
        elif current is not None and current in routes and current.rank == best.rank:
            best = best if self._better(best, current) else current
        self._nominate(best, now)

    def _nominate(self, route: _Route, now: float) -> None:
        self._sequence += 1
        self._acknowledged = False
        self._named = route.here
        self._take(route, now)

    def _better(self, route: _Route, current: _Route) -> bool:
        if route.rank != current.rank:
            return route.rank < current.rank
        if route.rtt is None or current.rtt is None:
            return False
        return route.rtt < RTT_GAIN * current.rtt and route.rtt < current.rtt - RTT_MARGIN

    def _take(self, route: _Route, now: float) -> None:
        """Use a route: the endpoint to set, five times."""
        self._current = route.endpoint
        self._last_good = route.endpoint
        self._nominated_at = now
        self._restore_at = None
        self._settle_left, self._settle_next = SETTLE_TIMES, now
        self._live(now)
        if not self._ready:
            self._ready = True
            self._gate_until = None if self._initiates() else now + GATE

    def _initiates(self) -> bool:
        """Whether the handshake is ours to start: the side without a session does, else the lower key."""
        if self._session == self._peer_session:
            return self._lower
        return not self._session

    def _live(self, now: float) -> None:
        if not self._alive:
            self._alive = True
            self._since = now
        self._declared = False
        self._retry_at = None
        self._next_call = None
        self._suspect = None
        self._unanswered_since = None
        self._reason = ""
        for route in self._routes.values():
            route.next = (
                self._next_ping(route, now)
                if route.next is not None or route.endpoint == self._current
                else None
            )

    def _settle(self, now: float) -> list[Due]:
        current = self._routes.get(self._current) if self._current else None
        if current is None:
            self._settle_next = None
            return []
        self._settle_due = True
        self._settle_left -= 1
        step = max(current.rtt or 0.0, SETTLE_MIN_STEP)
        # Not in step with the traffic: packets that come at a beat would undo every setting alike.
        self._settle_next = now + step * (1.0 + 0.5 * self._random()) if self._settle_left > 0 else None
        if not self._lower or self._acknowledged or current.here is None:
            return []
        return [SendTo(Nominate(self._sequence, there=current.endpoint, here=current.here), current.endpoint)]
