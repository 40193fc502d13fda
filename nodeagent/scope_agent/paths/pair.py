"""The path towards one peer: punch, verify, nominate, watch, repair.

The algorithm, for the pair of ourselves and one peer, and in brackets the part that keeps each step's state:

1. Every endpoint the peer publishes, every endpoint others saw it at, and every endpoint it spoke from is a
   *route* (`route`, `routes`). A search pings all routes at 0, 100, 200, 400, 800 and 1600 ms (the less
   preferred family 250 ms later, RFC 8305) and then every probe interval (`schedule`). Towards an endpoint
   behind a NAT these are *openers*, which die after our own NAT, until the peer was heard or says in a call
   that it has opened towards us (`openers`). They open our side without leaving, in the other side's NAT, the
   entry of an unsolicited packet, which some NATs answer by moving the other side's port.
2. An inbound ping makes its source a route and is answered with an echo and a ping of our own.
3. The peer with the lower key decides. After its first verified echo it waits min(200 ms, one RTT) for
   better ones, then *nominates* the best route: both sides set it, five times, an RTT apart (`nomination`).
   A nomination away from a path that carries data is an *offer*: the peer changes first, and each side holds
   its endpoint against what is still under way (`changeover`). WireGuard is given a first path on one side
   before the other, so that handshakes do not cross (`gate`).
4. A path in use (`path`) is judged by WireGuard's own counters: bytes out and none back for 300 ms make it
   *suspect*; three pings in 200 ms, none answered, make it dead (`liveness`, `doubt`). A peer's receive
   counter that stands still while ours goes on sending is a dead data path although probes pass (`counters`).
   An idle path is left to WireGuard's keepalive.
5. A dead path starts a new search; the last good endpoint is asked every 1.5 s for ten minutes. After
   `hub_fallback` without a path the peer is declared unreachable, with the reason, and tried again after
   60 s growing to 10 min (`search`). A pair that both sides have opened and that stays silent rests for
   longer than a NAT remembers, because a packet that came too early may have moved a port.
6. A hub's port that was granted to the pair is a route too, behind all direct ones: nominated, judged and
left
   like any other. While it is in use the search of step 5 goes on as without a path; what is declared then is
   that the pair is relayed. The same holds, last of all, for what our own carrier leads to over TCP.

The parts know nothing of each other's state; what one means for another is said here, and only here.
Time is monotonic seconds. Nothing here sends: `take` returns what is due, and `view` what the rest may know.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping as MappingOf
from typing import assert_never

from scope.carrier import is_carried
from scope.model import Endpoint, Family, Mapping, PathKind, PublicKey, Timers
from scope.wire import Nominate, Nominated, Ping, Pong
from scope_agent.agenda import earliest
from scope_agent.paths import schedule
from scope_agent.paths.changeover import Changeover, Offer
from scope_agent.paths.counters import SUSPECT_AFTER, Flow
from scope_agent.paths.doubt import Ruling
from scope_agent.paths.due import CallPeer, CheckMapping, Due, SendTo
from scope_agent.paths.gate import Gate
from scope_agent.paths.liveness import Liveness
from scope_agent.paths.nomination import Nomination, Settling
from scope_agent.paths.openers import Openers
from scope_agent.paths.path import Path
from scope_agent.paths.route import FRESH, NEVER, RECENT, VERIFIED, Relay, Route
from scope_agent.paths.routes import Routes
from scope_agent.paths.search import MEETING, Search, Step
from scope_agent.paths.view import PairView

DECIDE_MAX = 0.2  # what waiting for a better first route may cost
PING_BACK_PAUSE = 10.0  # between two punches that the peer's pings set off; a search pings by itself
SWITCH_HOLD = 5.0  # between two switches among living routes
WATCH_PATIENCE = 0.9  # for the answer on a watched path: an agent that is started anew takes no longer
HANDSHAKE_PATIENCE = 6.0  # WireGuard's own retry of a lost initiation, and a little


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
        self._lower = lower
        self._random = random
        self._routes = Routes(prefer)
        self._openers = Openers()
        self._search = Search(timers=timers, random=random, now=now)
        self._path = Path(now)
        self._nomination = Nomination()
        self._settling = Settling()
        self._changeover = Changeover(key)
        self._gate = Gate(lower=lower)
        self._liveness = Liveness()
        self._counters = self._liveness.counters
        self._decide_at: float | None = None
        self._heard_at = NEVER  # when the peer last spoke, over anything
        self._reading: tuple[int, int, Endpoint | None, bool] | None = None
        self._device_endpoint: Endpoint | None = None
        self._watch: float | None = None  # how often the path is to be asked, idle or not

    # --- what is known of the peer -------------------------------------------------------------------------

    def configure(self, timers: Timers, prefer: Family) -> None:
        """Take the mesh's timers and preferred family."""
        self._search.timers = timers
        self._routes.prefer(prefer)

    def set_candidates(self, endpoints: frozenset[Endpoint], mapping: Mapping, now: float) -> None:
        """The endpoints that may work now; new ones are tried at once where they could help."""
        self._openers.mapping = mapping
        for endpoint in sorted(endpoints, key=self._routes.order):
            route = self._open(endpoint)
            if route is None:
                break
            if route.listed:
                continue
            route.listed = True
            self._openers.list(route, last_good=self._path.last_good)
            if route.echoed == NEVER:
                self._routes.punch(route, now)
        self._routes.unlist_others(endpoints, in_use=self._path.endpoint, now=now)

    def set_relays(self, relays: MappingOf[Endpoint, Relay], now: float) -> None:
        """The hubs' ports that are granted to the pair; new ones are tried at once where they could help."""
        for route in self._routes.grant(relays, in_use=self._path.endpoint):
            if not self._path.is_direct:
                self._routes.punch(route, now)
        in_use = self._route_in_use
        if in_use is not None and in_use.relay is not None and not in_use.listed and self._path.is_alive:
            for route in self._routes:
                if route.relay is not None and route.listed:
                    self._routes.punch(route, now)  # whatever answers is better

    def watch(self, interval: float | None, now: float) -> None:
        """Ask the path in use so often, also while it is idle, and doubt it once it is silent for longer.

        For a path whose death nobody would notice: others send by it what this side only receives.
        """
        self._watch = interval
        route = self._route_in_use
        if interval is not None and route is not None and self._path.is_alive:
            route.next = now if route.next is None else min(route.next, now + interval)

    def suspect(self, now: float) -> None:
        """Ask the path in use now; without an answer it is dead."""
        self._suspect(now)

    def expect_carried(self, endpoint: Endpoint, relay: Relay) -> None:
        """We are a hub: where our carrier has the peer speak from, if it carries it."""
        self._routes.expect(endpoint, relay)

    def knocked(self, now: float) -> None:
        """The hubs know where we are: what was silent may answer now."""
        for route in self._routes:
            if route.relay is not None and not self._path.is_alive and route.next is None:
                route.next = now

    def restore(self, endpoint: Endpoint, now: float) -> None:
        """The last good endpoint from disk: asked first, and programmed after a second without an echo."""
        self._path.restore(endpoint, now)
        self._ask_in_full(endpoint, now)

    def adopt(self, endpoint: Endpoint, *, session: bool, now: float) -> None:
        """The device, which outlived the last agent, already reaches the peer there: leave it as it is."""
        known = self._routes.get(endpoint)
        self._path.adopt(endpoint, now, relayed=known is not None and known.relay is not None)
        self._gate.session = session
        self._gate.force()
        self._ask_in_full(endpoint, now)

    def search(self, now: float, *, call: bool = True) -> None:
        """Start the ladder again: a new peer, a network change, a call from the peer, a lost path."""
        self._search.start(now, had_path=self._path.taken_at > NEVER)
        self._punch(now, call=call)

    def network_changed(self, now: float, *, lost: bool) -> None:
        """Our own addresses changed; `lost`: one of them is gone, so the path in use is doubtful at once."""
        if lost and self._path.is_alive:
            self._lose("our network changed", now)
        elif self._path.is_direct:
            self._suspect(now)
            self._punch(now, call=True)
        else:
            self._suspect(now)
            self.search(now)

    def called(
        self, endpoints: frozenset[Endpoint], *, opened: frozenset[Family], reply: bool, now: float
    ) -> None:
        """A call-me-maybe: the peer punches towards us now.

        `opened`: the families in which it has opened towards us, so that we ping in full. `reply`: it knows
        none of our endpoints.
        """
        for endpoint in sorted(endpoints, key=self._routes.order):
            self._open(endpoint)
        self._openers.called(self._routes, opened, last_good=self._path.last_good)
        if self._path.is_direct:
            self._suspect(now)
        else:
            self._search.called(now)
            self._search.is_met |= Family.IPV4 in opened
            if reply:
                self._search.reply(now)
        self._punch(now, call=False)

    def mapping_known(self, now: float) -> None:
        """We learned where reflectors see us: worth telling the peer, once, while it is being searched."""
        if not self._path.is_direct:
            self._search.call_again(now)

    def origin_changed(self, now: float) -> None:
        """The peer counts anew: its nominations and counters start again, and it knows none of ours."""
        self._nomination.awaited = None
        self._counters.forget_comparison()
        route = self._route_in_use
        if not self._lower:
            self._nomination.sequence = 0
        elif self._path.is_alive and route is not None:
            self._nominate(route, now)

    def confirmed(self, source: Endpoint | None, now: float) -> None:
        """The channel can seal for the peer now: repeat at once what the first try could not say.

        `source` is where the peer's cookie came from, None when it came over a carrier.
        """
        self._heard_at = now
        route = self._open(source) if source is not None else None
        if route is not None:
            route.opener = False
        if not self._path.is_direct:
            self._punch(now, call=source is None or self._search.is_calling)

    def ask(self, endpoint: Endpoint, now: float) -> None:
        """The peer may answer there now: a port was found at which it can."""
        self._ask_in_full(endpoint, now)

    def connected(self, now: float) -> None:
        """Our carrier leads to the peer itself now: ask it there, unless something works."""
        for route in self._routes:
            if is_carried(route.endpoint) and not self._path.is_alive:
                self._routes.punch(route, now)

    def explain(self, reason: str) -> None:
        """The agent knows better why there is no direct path (mappings, families, reflectors)."""
        if not self._path.is_direct:
            self._path.reason = reason

    # --- datagrams -----------------------------------------------------------------------------------------

    def receive(self, message: Ping | Pong | Nominate | Nominated, source: Endpoint, now: float) -> list[Due]:
        """Take one authenticated message from the peer; what must be said at once comes back."""
        self._heard_at = now
        match message:
            case Ping():
                return self._receive_ping(message, source, now)
            case Pong():
                self._receive_pong(message, source, now)
                return []
            case Nominate():
                return self._receive_nominate(message, now)
            case Nominated(sequence):
                self._nomination.acknowledge(sequence)
                self._take_offered(now)
                return []

    def _receive_ping(self, ping: Ping, source: Endpoint, now: float) -> list[Due]:
        self._gate.peer_session = ping.has_session
        self._compare_counters(ping.received, now)
        echo = Pong(
            ping.transaction,
            observed=source,
            has_session=self._gate.session,
            received=self._counters.received,
        )
        answer = SendTo(echo, source)
        route = self._open(source)
        if route is None:
            return [answer]
        route.heard, route.guessed = now, ping.guessed
        if route.is_data_dead(now):
            return []  # an echo would tell the peer that the path works
        self._ping_back(route, now)
        in_use = self._route_in_use
        if in_use is not None and route is not in_use and in_use.silence(now) > RECENT:
            self._suspect(now)
        return [answer]

    def _ping_back(self, route: Route, now: float) -> None:
        """The peer is there: ask it, too, but not as often as it asks us.

        Two sides that hear each other late would else have each other's pings make ever more of them.
        """
        was_opener, route.opener = route.opener, False
        if route.silence(now) <= RECENT or route.is_asked(now):
            return
        if was_opener or not route.attempt or now - route.punched > PING_BACK_PAUSE:
            route.punch(now)
        elif route.attempt < len(schedule.PUNCH):
            route.next = now  # the punch goes on, its next ping at once

    def _receive_pong(self, pong: Pong, source: Endpoint, now: float) -> None:
        self._gate.peer_session = pong.has_session
        route = next((r for r in self._routes if r.take_echo(pong, source, now)), None)
        if route is None:
            return
        self._compare_counters(pong.received, now)
        self._echoed(route, now)
        is_on_path = self._path.is_alive and route.endpoint == self._path.endpoint
        if not self._lower or not is_on_path or self._changeover.is_offering:
            return
        if route.here != self._nomination.here:
            self._nominate(route, now)  # our mapping moved: the peer is to follow
        elif not self._nomination.is_acknowledged and self._settling.next is None:
            self._settling.start(now, times=1)

    def _echoed(self, route: Route, now: float) -> None:
        if route.endpoint == self._path.endpoint:
            self._liveness.clear()
        awaited = self._nomination.awaited
        if awaited is not None and awaited[1] == route.endpoint:
            self._follow(awaited[0], route, now)
        if self._lower:
            self._consider(route, now)
        elif not self._path.is_alive and route.is_usable(now):
            self._revive(route, now)
        route.next = self._next_ping(route, now)

    def _consider(self, route: Route, now: float) -> None:
        """Decide soon, unless that is due already or the echo changes nothing."""
        is_news = route.endpoint != self._path.endpoint if self._path.is_alive else route.is_usable(now)
        if is_news and self._decide_at is None:
            self._decide_at = now + min(DECIDE_MAX, route.rtt or DECIDE_MAX)

    def _revive(self, route: Route, now: float) -> None:
        """Without a nomination: the path in use answers again, or is where the peer's data came from."""
        if route.endpoint == self._device_endpoint:
            self._path.move(route.endpoint, now, relayed=route.relay is not None)
        if route.endpoint == self._path.endpoint:
            self._live(now)

    def _receive_nominate(self, nominate: Nominate, now: float) -> list[Due]:
        if self._lower or nominate.sequence < self._nomination.sequence:
            return []  # a peer that takes itself for the lower one, or an old nomination that came late
        if nominate.sequence == self._nomination.sequence and self._path.endpoint == nominate.here:
            again = SendTo(Nominated(nominate.sequence), nominate.here)
            return list(self._changeover.answer_again(again, now))
        route = self._open(nominate.here)
        if route is None:
            return []
        if route.silence(now) > FRESH:
            self._nomination.awaited = (nominate.sequence, nominate.here)
            route.opener = False
            route.next = now
            return []
        self._follow(nominate.sequence, route, now)
        answer = SendTo(Nominated(nominate.sequence), route.endpoint)
        return list(self._changeover.answer(answer, now))

    # --- the device ----------------------------------------------------------------------------------------

    def has_read(self, *, tx: int, rx: int, endpoint: Endpoint | None, session: bool) -> bool:
        """Whether the device said just this last time, of the path in use: nothing comes of it."""
        return (tx, rx, endpoint, session) == self._reading and endpoint in (None, self._path.endpoint)

    def observe(
        self, *, tx: int, rx: int, endpoint: Endpoint | None, handshake: bool, session: bool, now: float
    ) -> bool:
        """Take the device's counters (bytes since its start), endpoint, and whether a new handshake was seen.

        False when nothing came of it.
        """
        if not handshake and self.has_read(tx=tx, rx=rx, endpoint=endpoint, session=session):
            return False
        self._reading, self._device_endpoint = (tx, rx, endpoint, session), endpoint
        self._gate.session = session
        if handshake:
            self._gate.handshake_seen(now)
        if self._counters.read(tx=tx, rx=rx, now=now):
            situation = self._situation(now)
            for route in self._routes:
                if route.next is None:
                    route.next = schedule.next_ping(route, now, situation)
        if endpoint is not None and endpoint != self._path.endpoint and self._gate.is_given:
            self._device_roamed(endpoint, now)
        return True

    def _device_roamed(self, endpoint: Endpoint, now: float) -> None:
        """WireGuard moved to where an authenticated packet came from: prove it, then agree on it."""
        route = self._open(endpoint)
        if route is None:
            return
        if route.silence(now) > FRESH and now - route.probation > VERIFIED:
            route.probation = now
            route.opener = False
            route.punch(now)
        if not self._path.is_alive or now - self._path.taken_at < SWITCH_HOLD or self._changeover.is_offering:
            return
        in_use = self._route_in_use
        if route.silence(now) > VERIFIED:
            self._suspect(now)
        elif self._lower and in_use is not None and in_use.is_usable(now):
            self._nominate(in_use, now)  # the two sides chase each other over two living paths

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `take` wants to run next."""
        return earliest(
            *[route.next for route in self._routes],  # at most MAX_ROUTES
            self._search.get_timer(searching=not self._path.is_direct),
            self._path.get_timer(),
            self._gate.until,
            self._liveness.get_timer(rtt=self._rtt) if self._path.is_alive else None,
            self._silent_at(),
            self._decide_at,
            self._settling.next,
            self._changeover.get_timer(),
        )

    def take(self, now: float, transactions: Callable[[], int], *, can_call: bool) -> list[Due]:
        """Everything due at `now`. `can_call`: something carries our calls to the peer."""
        due: list[Due] = []
        if self._liveness.take_check():
            due.append(CheckMapping())
        if not self._path.is_direct:
            self._climb(now)
        if self._path.handle_timer(now):
            self._gate.force()
        self._gate.take(now)
        silent_at = self._silent_at()
        if silent_at is not None and now >= silent_at:
            self._suspect(now)
        self._judge(now)
        if self._decide_at is not None and now >= self._decide_at:
            self._decide_at = None
            self._decide(now)
        if self._settling.next is not None and now >= self._settling.next:
            due += self._settle(now)
        offer = self._changeover.due_offer(now)
        if offer is not None:
            due += self._make_offer(offer, now)
        due += self._changeover.take_answer(now)
        for route in self._routes:
            if route.next is not None and now >= route.next:
                due.append(self._ping(route, now, transactions, can_call=can_call))
        if self._search.take_call(now, searching=not self._path.is_direct):
            due.append(CallPeer())
        return due

    def settled(self) -> None:
        """Endpoint and hold were handed to the device."""
        self._settling.is_due = False
        self._changeover.settled()

    def held(self, now: float) -> None:
        """The device's endpoint is held now: what waited for it may be said."""
        self._changeover.held(now)

    # --- the view ------------------------------------------------------------------------------------------

    def view(self, now: float) -> PairView:
        """The pair as the rest of the agent may know it."""
        in_use = self._route_in_use
        verified = self._routes.verified(now)
        relay = in_use.relay if in_use is not None and self._path.is_alive else None
        return PairView(
            endpoint=self._path.endpoint,
            ready=self._gate.is_open,
            settling=self._settling.is_due,
            hold=self._changeover.hold,
            verified=verified | {in_use.endpoint} if in_use is not None else verified,
            path=self._kind,
            rtt=self._rtt,
            observed=self._routes.last_heard(),
            declared=self._search.declared,
            reason="" if self._path.is_direct else self._path.reason,
            since=self._path.since,
            hub=relay.hub if relay is not None else "",
            user_space=(
                relay is not None and in_use is not None and (relay.user_space or in_use.crosses_families)
            ),
            birthday=self._path.is_direct and in_use is not None and in_use.guessed,
            carried=relay is not None and in_use is not None and in_use.is_carried,
            is_in_doubt=self._liveness.is_in_doubt,
        )

    @property
    def _kind(self) -> PathKind:
        if not self._path.is_alive:
            return PathKind.NONE
        return PathKind.RELAYED if self._path.is_relayed else PathKind.DIRECT

    @property
    def alive(self) -> bool:
        """Whether the path in use is believed to work."""
        return self._path.is_alive

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the path in use leads; None: nowhere yet."""
        return self._path.endpoint

    @property
    def direct(self) -> bool:
        """Whether it also leads straight to the peer, so that nothing is searched."""
        return self._path.is_direct

    @property
    def is_over_udp(self) -> bool:
        """Whether the path in use works, and does not lead to our own carrier."""
        return self._path.is_alive and not self._is_by_carrier

    @property
    def is_by_carrier(self) -> bool:
        """Whether the path in use works, and leads to our own carrier."""
        return self._path.is_alive and self._is_by_carrier

    @property
    def _is_by_carrier(self) -> bool:
        return self._path.endpoint is not None and is_carried(self._path.endpoint)

    @property
    def is_urgent(self) -> bool:
        """Whether a path in use waits for a verdict or an agreement: that takes no more than a few pings."""
        return self._path.is_alive and (
            self._liveness.is_in_doubt
            or self._decide_at is not None
            or self._settling.next is not None
            or self._changeover.get_timer() is not None
            or self._gate.until is not None
        )

    def opened(self, now: float) -> tuple[Endpoint, ...]:
        """The peer's public endpoints that we have lately sent towards."""
        return tuple(route.endpoint for route in self._routes if route.is_public and route.is_opened(now))

    def is_answering(self, now: float) -> bool:
        """Whether the peer is there now: what is due towards it is no shot in the dark, and grows stale."""
        return self._path.is_direct or now - self._heard_at < FRESH

    def is_punching(self, now: float) -> bool:
        """Whether the search began so lately that the two sides' pings are still to meet."""
        return self._search.is_punching(now)

    @property
    def last_good(self) -> Endpoint | None:
        """The endpoint to try first after a restart."""
        return self._path.last_good

    def knows(self, endpoint: Endpoint) -> bool:
        """Whether the endpoint is one of the pair's routes."""
        return endpoint in self._routes

    @property
    def is_met(self) -> bool:
        """Whether the peer said in this search that it has opened towards us."""
        return self._search.is_met

    @property
    def tried(self) -> frozenset[Endpoint]:
        """Endpoints that were pinged, relays aside."""
        return frozenset(route.endpoint for route in self._routes if route.relay is None)

    @property
    def routes(self) -> tuple[Route, ...]:
        """Everything that was tried, relays included: to be looked at, not to be touched."""
        return tuple(self._routes)

    def busy_until(self, now: float) -> float | None:
        """Until when a fresh look at the device would help: a handshake is awaited, or a doubt is open."""
        if self._gate.until is not None or self._liveness.is_in_doubt:
            return now + SUSPECT_AFTER
        if self._path.is_alive and not self._gate.session and now < self._path.taken_at + HANDSHAKE_PATIENCE:
            return self._path.taken_at + HANDSHAKE_PATIENCE
        return None

    # --- searching -----------------------------------------------------------------------------------------

    @property
    def _route_in_use(self) -> Route | None:
        return self._routes.get(self._path.endpoint)

    @property
    def _rtt(self) -> float | None:
        route = self._route_in_use
        return route.rtt if route is not None else None

    def _open(self, endpoint: Endpoint) -> Route | None:
        return self._routes.open(endpoint, in_use=self._path.endpoint)

    def _ask_in_full(self, endpoint: Endpoint, now: float) -> None:
        """Punch towards an endpoint that worked: the other side's NAT knows us."""
        route = self._open(endpoint)
        if route is not None:
            route.opener = False
            self._routes.punch(route, now)

    def _punch(self, now: float, *, call: bool) -> None:
        for route in self._routes:
            if route.relay is None or not self._path.is_alive:
                self._routes.punch(route, now)
        self._search.punch(now, call=call)

    def _climb(self, now: float) -> None:
        for step in self._search.climb(now):
            match step:
                case Step.CONNECT_BACK | Step.RETRY:
                    self._punch(now, call=True)
                case Step.DECLARE:
                    if not self._path.is_alive:
                        self._path.since = now
                case Step.REST:
                    if self._search.is_met and self._openers.mapping is not Mapping.NONE:
                        self._rest(now)
                case Step.WAKE:
                    self._wake(now)
                case _:
                    assert_never(step)

    def _rest(self, now: float) -> None:
        """Be silent, WireGuard's handshakes included, so that NATs forget what came too early.

        Not towards a hub, whose NAT, if it has one, is another.
        """
        self._search.rest(now)
        for route in self._routes:
            if route.attempt >= len(schedule.PUNCH) and route.relay is None:
                route.next = None
        self._path.rest()

    def _wake(self, now: float) -> None:
        """Begin anew: both NATs have forgotten the pair."""
        self._openers.wake(self._routes)
        self._path.wake(now + MEETING)
        self._punch(now, call=True)

    def _ping(self, route: Route, now: float, transactions: Callable[[], int], *, can_call: bool) -> SendTo:
        ttl = schedule.ttl(route, can_call=can_call) if not self._path.is_direct else None
        transaction = transactions()
        route.ask(transaction, now)
        route.next = self._next_ping(route, now)
        ping = Ping(transaction, has_session=self._gate.session, received=self._counters.received)
        return SendTo(ping, route.endpoint, ttl)

    def _next_ping(self, route: Route, now: float) -> float | None:
        return schedule.next_ping(route, now, self._situation(now))

    def _situation(self, now: float) -> schedule.Situation:
        interval, in_use = self._search.timers.probe_interval, self._route_in_use
        searching = schedule.Searching(
            interval=interval,
            last_good=self._path.last_good,
            lost_at=self._path.lost_at,
            is_resting=self._search.is_resting,
            given_up=self._search.declared,
        )
        if not self._path.is_alive or in_use is None:
            return searching
        connected = schedule.Connected(
            interval=interval,
            in_use=in_use,
            since=self._path.taken_at,
            is_in_doubt=self._liveness.is_in_doubt,
            is_active=self._counters.is_active(now, within=2 * interval),
            watch=self._watch,
            search_until=self._search.eager_until,
        )
        return schedule.Relayed(searching, connected) if self._path.is_relayed else connected

    # --- judging -------------------------------------------------------------------------------------------

    def _silent_at(self) -> float | None:
        """When a watched path has been silent for too long; None while it is in doubt already."""
        route = self._route_in_use
        if self._watch is None or route is None or not self._path.is_alive or self._liveness.is_in_doubt:
            return None
        return max(route.echoed, self._path.taken_at, self._path.since) + self._watch + WATCH_PATIENCE

    def _suspect(self, now: float) -> None:
        if self._path.is_alive:
            self._liveness.suspect(now)

    def _judge(self, now: float) -> None:
        route = self._route_in_use
        if route is None or not self._path.is_alive:
            return
        match self._liveness.handle_timer(now, rtt=route.rtt):
            case Ruling.PING:
                route.next = now
            case Ruling.LAST_PING:
                route.next = now
                for other in self._routes:
                    if other is not route and other.silence(now) > RECENT:
                        other.opener = False
                        other.punch(now)
            case Ruling.DEAD:
                self._lose(f"no answer from {self._path.endpoint}", now)

    def _compare_counters(self, received: int, now: float) -> None:
        """Hold the peer's receive counter against what we sent."""
        flow, route = self._counters.compare(received, now), self._route_in_use
        if flow is Flow.ARRIVES and route is not None:
            route.data_dead = NEVER
        if flow is Flow.STALLED and self._path.is_alive:
            self._counters.forget_stalls()
            if route is not None:
                route.data_dead = now
            self._lose(f"probes to {self._path.endpoint} pass but WireGuard's packets do not", now)

    def _lose(self, reason: str, now: float) -> None:
        route = self._route_in_use
        if route is not None:
            route.lost = now
        self._path.lose(reason, now)
        self._changeover.drop()
        self._liveness.lose()
        self.search(now)
        if self._lower and self._routes.best(now) is not None:
            self._decide_at = now

    # --- deciding ------------------------------------------------------------------------------------------

    def _decide(self, now: float) -> None:
        best, in_use = self._routes.best(now), self._route_in_use
        if best is None or self._changeover.is_offering:
            return
        if self._path.is_alive and in_use is not None:
            if not best.beats(in_use):
                return
            if best.rank == in_use.rank and now - self._path.taken_at < SWITCH_HOLD:
                return
            if not self._changeover.may_offer(now):
                return
            if self._is_flowing(now):
                self._nomination.name(best.here)
                self._changeover.offer(best.endpoint, now)
                self._hold_at(in_use, {best.endpoint}, now)
                return
        elif in_use is not None and in_use.is_usable(now) and not best.beats(in_use):
            best = in_use
        self._nominate(best, now)

    def _nominate(self, route: Route, now: float) -> None:
        self._changeover.withdraw()
        self._nomination.name(route.here)
        self._take_path(route, now)

    def _follow(self, sequence: int, route: Route, now: float) -> None:
        self._nomination.follow(sequence)
        self._take_path(route, now)

    def _make_offer(self, offer: Offer, now: float) -> list[Due]:
        """Say it; the peer's data on the new route must not lead us there before we have its answer."""
        route, in_use = self._routes.get(offer.route), self._route_in_use
        if in_use is None:
            self._changeover.withdraw()
            return []
        if route is None or route.here is None or not offer.left:
            self._changeover.give_up(now)
            self._nominate(in_use, now)  # the peer may have changed although its answers were lost
            return []
        offer.step(now, rtt=route.rtt, random=self._random)
        self._hold_at(in_use, {route.endpoint}, now)
        nominate = Nominate(self._nomination.sequence, there=route.endpoint, here=route.here)
        return [SendTo(nominate, route.endpoint)]

    def _take_offered(self, now: float) -> None:
        """The peer took the route that we offered: so do we."""
        if not self._nomination.is_acknowledged:
            return
        route = self._routes.get(self._changeover.withdraw())
        if route is not None:
            self._take_path(route, now)

    def _leads(self, route: Route, now: float) -> bool:
        """Whether data may come by the route: it lives, or only what we sent got lost there."""
        return (self._path.is_alive and route.is_verified(now)) or route.is_data_dead(now)

    def _is_flowing(self, now: float) -> bool:
        """Whether data may be under way."""
        return self._counters.is_flowing(now, within=2 * self._search.timers.probe_interval)

    def _hold_at(self, route: Route, against: set[Endpoint], now: float) -> None:
        rtts = [each.rtt for each in self._routes if each is route or each.endpoint in against]
        self._changeover.hold_at(route.endpoint, against, rtts=rtts, now=now)

    def _take_path(self, route: Route, now: float) -> None:
        """Use a route: its endpoint is to be set, five times, and held against the routes that are left."""
        left = {self._path.endpoint, self._device_endpoint} - {route.endpoint}
        against = {each.endpoint for each in self._routes if each.endpoint in left and self._leads(each, now)}
        if against and self._is_flowing(now):
            self._hold_at(route, against, now)
        was_direct = self._path.is_direct
        self._path.take(route.endpoint, now, relayed=route.relay is not None)
        self._routes.drop_withdrawn(in_use=route.endpoint)
        self._settling.start(now)
        self._live(now)
        if was_direct and not self._path.is_direct:
            self.search(now)  # the peer had to leave the direct path

    def _live(self, now: float) -> None:
        """There is a path: what a doubt still had in mind is dropped, and of a direct one the search too."""
        self._path.live(now)
        self._gate.start(now)
        self._liveness.clear()
        if self._path.is_direct:
            self._search.succeed()
        situation = self._situation(now)
        for route in self._routes:
            if self._path.is_relayed and route.relay is None:
                continue
            is_wanted = route.next is not None or route.endpoint == self._path.endpoint
            route.next = schedule.next_ping(route, now, situation) if is_wanted else None

    def _settle(self, now: float) -> list[Due]:
        route = self._route_in_use
        if route is None:
            self._settling.next = None
            return []
        self._settling.step(now, rtt=route.rtt, random=self._random)
        # While another route is offered the number is that route's.
        is_said = self._nomination.is_acknowledged or self._changeover.is_offering
        if not self._lower or is_said or route.here is None:
            return []
        nominate = Nominate(self._nomination.sequence, there=route.endpoint, here=route.here)
        return [SendTo(nominate, route.endpoint)]
