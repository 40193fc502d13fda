"""What our carrier is to do: carry us to hubs, carry others to us, or nothing. Pure.

Both halves stand in one file of one process (`scope.carrier`), which outlives the agent. One application is
in flight at a time, and the next one is of the newest wishes. Loopback endpoints are kept for as long as what
they stand for, also by the next run of the agent, which finds them in the file: WireGuard's endpoints do not
move when agent or carrier start anew.

A passage is told of once the carrier has it: what is sent there before would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from scope.carrier import (
    MEMBER_PORT,
    PASSAGE_PORT,
    TICKET_LIFETIME,
    TICKET_RENEWAL,
    Carrier,
    CarrierReport,
    CarryingHub,
    HubPart,
    Member,
    Passage,
    PeerPart,
    assign_loopbacks,
    sign_ticket,
)
from scope.model import Endpoint, GatewayOrigin, HubCarrier, Hubs, PublicKey, Secret
from scope.resources import as_reason
from scope_agent.agenda import earliest
from scope_agent.carrier.boarding import Boarding, ListeningHub, Surroundings

APPLY_AGAIN = 2.0  # seconds after one that failed: the process may only have been slow to start
MEMBER_MOST = 16384  # hubs carry no more: each is a socket
_SPREAD = 1024  # the meshes of one machine have ports of their own


@dataclass(frozen=True, slots=True)
class ApplyCarrier:
    """Have the carrier do this; None: nothing. The hub's certificate and key are filled in there."""

    carrier: Carrier | None


@dataclass(frozen=True, slots=True)
class CarrierSeen:
    """What the carrier says of itself.

    `answers` an ApplyCarrier, and then `is_in_effect` says whether the carrier does that now. `report` is
    None where none answers, and `error` says why. `pin` is of the hub's certificate, once there is one.
    """

    report: CarrierReport | None
    error: str = ""
    pin: bytes | None = None
    answers: bool = False
    is_in_effect: bool = False


class Carriage:
    """`signing` is our own Ed25519 key, `earlier` what the last run asked for, `wall` the clock at `now`.

    `upstream` is the gateway to which we lead as a hub; where it is None, the one that the mesh names.
    """

    def __init__(
        self,
        *,
        own: PublicKey,
        signing: Secret,
        upstream: GatewayOrigin | None,
        earlier: Carrier | None,
        now: float,
        wall: float,
    ) -> None:
        self._own, self._signing, self._upstream = own, signing, upstream
        self._offset = wall - now
        self._boarding = Boarding(own=own, is_carried=earlier is not None and earlier.peer is not None)
        self._applied = self._in_effect = earlier
        self._in_flight: Carrier | None = None
        self._is_busy = False
        self._is_dirty = False
        self._retry_at: float | None = None
        self._is_configured = False
        self._mesh_uid = ""
        self._hubs = Hubs()
        self._gateway: GatewayOrigin | None = None
        self._is_hub = False
        self._listen_port = 0
        self._members: Mapping[PublicKey, PublicKey] = {}
        self._granted: Mapping[PublicKey, Set[int]] = {}
        self._tickets: dict[PublicKey, tuple[str, float]] = {}  # hub -> (ticket, when to renew it)
        self._held_passages: dict[bytes, Endpoint] = {}
        self._held_members: dict[bytes, Endpoint] = {}
        self._seen: CarrierSeen | None = None
        self._is_changed = True
        self._connected: Set[PublicKey] = frozenset()
        self._news: set[PublicKey] = set()  # hubs that are connected since it was last asked

    # --- what is known -------------------------------------------------------------------------------------

    def configure(
        self,
        *,
        mesh_uid: str,
        hubs: Hubs,
        is_hub: bool,
        listen_port: int,
        members: Mapping[PublicKey, PublicKey],
        listening: Mapping[PublicKey, ListeningHub],
        gateway: GatewayOrigin | None = None,
    ) -> None:
        """What the mesh says: `members` are WireGuard keys with their signing keys."""
        if not self._is_configured:
            self._hold_earlier(mesh_uid)
        self._is_configured = self._is_dirty = True
        self._mesh_uid, self._hubs, self._is_hub = mesh_uid, hubs, is_hub
        self._listen_port, self._members, self._gateway = listen_port, members, gateway
        self._boarding.set_hubs(listening, members=members.keys())

    def set_granted(self, ports: Mapping[PublicKey, Set[int]]) -> None:
        """Take the ports that hubs granted to us."""
        if ports != self._granted:
            self._granted = ports
            self._is_dirty = True

    @property
    def is_at_rest(self) -> bool:
        """Whether `observe` need not be asked for as long as somebody answers over UDP."""
        return self._boarding.is_at_rest

    def observe(self, around: Surroundings, now: float) -> bool:
        """Take what being carried depends on. Whether hubs begin to carry us, so that UDP leads nowhere."""
        before, was_carried = self._boarding.chosen, self.is_carried
        self._boarding.observe(around, now)
        self._is_dirty |= before != self._boarding.chosen
        return self.is_carried and not was_carried

    def seen(self, seen: CarrierSeen, now: float) -> None:
        """Take what the carrier says."""
        if seen.report is not None:
            connected = {each.hub for each in seen.report.hubs if each.address is not None}
            self._boarding.connected(connected, now)
            self._news |= connected - self._connected
            self._connected = connected
        earlier = self._seen.pin if self._seen is not None else None
        self._seen = CarrierSeen(seen.report, seen.error, pin=seen.pin or earlier)
        if not seen.answers:
            return
        self._is_busy = False
        if seen.is_in_effect:
            self._in_effect = self._in_flight
            self._retry_at = None
            self._is_changed = True
        else:
            self._retry_at = now + APPLY_AGAIN

    # --- what comes of it ----------------------------------------------------------------------------------

    @property
    def is_carried(self) -> bool:
        """Whether hubs are to carry us."""
        return bool(self._boarding.chosen)

    def take_change(self) -> bool:
        """Whether `passages` or `members` changed since it was last asked."""
        is_changed, self._is_changed = self._is_changed, False
        return is_changed

    def take_connected(self) -> list[PublicKey]:
        """Hubs to which the carrier was connected since it was last asked."""
        if not self._news:
            return []
        news, self._news = self._news, set()
        return sorted(news)

    def passages(self) -> dict[tuple[PublicKey, int], Endpoint]:
        """Where ports of hubs are reached now: (hub, its port) -> loopback endpoint."""
        part = self._in_effect.peer if self._in_effect is not None else None
        return {
            (hub.hub, passage.port): passage.endpoint
            for hub in (part.hubs if part is not None else ())
            for passage in hub.passages
        }

    def ways_to_hubs(self) -> dict[PublicKey, Endpoint]:
        """Where WireGuard of hubs is reached now."""
        return {
            hub: endpoint
            for (hub, port), endpoint in self.passages().items()
            if (listening := self._boarding.find(hub)) is not None and listening.wireguard_port == port
        }

    def members(self) -> dict[PublicKey, Endpoint]:
        """We are a hub: where those that we may carry speak from."""
        part = self._in_effect.hub if self._in_effect is not None else None
        return {each.peer: each.endpoint for each in part.members} if part is not None else {}

    def report(self) -> HubCarrier | None:
        """What our own status says of it; None where we are not asked to carry, or do not know yet."""
        seen = self._seen
        if not self._listens or seen is None or seen.pin is None:
            return None
        if seen.report is None:
            reason = seen.error
        else:
            reason = "" if seen.report.listening else seen.report.reason
            if not seen.report.listening and not reason:
                return None  # it is about to
        return HubCarrier(self._hubs.carrier_port, seen.pin, as_reason(reason))

    def trouble(self, names: Mapping[PublicKey, str]) -> str:
        """What is amiss with it, in words; "" where nothing is. `names` are those of hubs."""
        seen = self._seen
        if seen is None or (not self._listens and not self.is_carried):
            return ""
        if seen.report is None:
            return seen.error
        said = [
            f"{names.get(each.hub, 'a hub')} does not carry us: {each.reason}"
            for each in seen.report.hubs
            if each.address is None and each.hub in self._boarding.chosen
        ]
        if self._listens and not seen.report.listening and seen.report.reason:
            said.append(f"nobody is carried: {seen.report.reason}")
        return "; ".join(said)

    def get_timer(self) -> float | None:
        """When `observe` or `take_apply` wants to be asked next."""
        return earliest(
            self._boarding.get_timer(),
            self._retry_at if not self._is_busy else None,
            *[renew for hub, (_, renew) in self._tickets.items() if hub in self._boarding.chosen],
        )

    def take_apply(self, now: float) -> ApplyCarrier | None:
        """What the carrier is to do from now on, where that is something else and nothing is in flight."""
        if self._is_busy or not self._is_configured or (self._retry_at is not None and now < self._retry_at):
            return None
        self._is_dirty |= any(now >= renew for _, renew in self._tickets.values())
        if not self._is_dirty and self._retry_at is None:
            return None
        wanted = self._want(now)
        self._is_dirty = False
        if wanted == self._applied and self._retry_at is None:
            return None
        self._applied = self._in_flight = wanted
        self._is_busy, self._retry_at = True, None
        return ApplyCarrier(wanted)

    # --- how -----------------------------------------------------------------------------------------------

    @property
    def _listens(self) -> bool:
        return self._is_hub and self._hubs.carrier_port != 0

    def _want(self, now: float) -> Carrier | None:
        peer = self._peer_part(now) if self._boarding.chosen else None
        hub = self._hub_part() if self._listens else None
        return Carrier(peer, hub) if peer is not None or hub is not None else None

    def _peer_part(self, now: float) -> PeerPart:
        chosen = {hub: at for hub in self._boarding.chosen if (at := self._boarding.find(hub)) is not None}
        ports = {hub: sorted({at.wireguard_port, *self._granted.get(hub, ())}) for hub, at in chosen.items()}
        names = {(hub, port): self._passage_name(hub, port) for hub in chosen for port in ports[hub]}
        endpoints = assign_loopbacks(
            names.values(), port=self._own_port(PASSAGE_PORT), held=self._held_passages
        )
        self._held_passages = endpoints
        self._tickets = {hub: self._ticket(hub, now) for hub in chosen}
        return PeerPart(
            self._listen_port,
            tuple(
                CarryingHub(
                    hub,
                    at.addresses,
                    at.pin,
                    self._tickets[hub][0],
                    tuple(Passage(endpoints[names[hub, port]], port) for port in ports[hub]),
                )
                for hub, at in chosen.items()
            ),
        )

    def _ticket(self, hub: PublicKey, now: float) -> tuple[str, float]:
        known = self._tickets.get(hub)
        if known is not None and now < known[1]:
            return known
        expires = round(now + self._offset) + TICKET_LIFETIME
        text = sign_ticket(
            mesh_uid=self._mesh_uid, peer=self._own, hub=hub, expires=expires, secret=self._signing
        )
        return text, now + TICKET_RENEWAL

    def _hub_part(self) -> HubPart:
        members = sorted(self._members)[:MEMBER_MOST]
        endpoints = assign_loopbacks(
            map(self._member_name, members), port=self._own_port(MEMBER_PORT), held=self._held_members
        )
        self._held_members = endpoints
        first, last = self._hubs.ports
        return HubPart(
            mesh_uid=self._mesh_uid,
            hub=self._own,
            port=self._hubs.carrier_port,
            certificate="",
            key=Secret(b""),
            wireguard_port=self._listen_port,
            first_port=first,
            last_port=last,
            limits=self._hubs.limits,
            members=tuple(
                Member(key, self._members[key], endpoints[self._member_name(key)]) for key in members
            ),
            upstream=self._upstream or self._gateway,
        )

    def _own_port(self, port: int) -> int:
        """A UDP port of this mesh's, none of those at which a hub's forwarder listens."""
        first, last = self._hubs.ports
        port += 2 * (self._listen_port % _SPREAD)
        while first <= port <= last or port == self._listen_port:
            port += 2  # members and passages differ in the last bit
        return port

    def _member_name(self, key: PublicKey) -> bytes:
        return b"member" + self._mesh_uid.encode() + key.raw

    def _passage_name(self, hub: PublicKey, port: int) -> bytes:
        return b"passage" + self._mesh_uid.encode() + hub.raw + port.to_bytes(2, "big")

    def _hold_earlier(self, mesh_uid: str) -> None:
        self._mesh_uid = mesh_uid
        earlier = self._in_effect
        if earlier is None:
            return
        for hub in earlier.peer.hubs if earlier.peer is not None else ():
            for passage in hub.passages:
                self._held_passages[self._passage_name(hub.hub, passage.port)] = passage.endpoint
        for member in earlier.hub.members if earlier.hub is not None else ():
            self._held_members[self._member_name(member.peer)] = member.endpoint
