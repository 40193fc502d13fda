"""What stands between a simulated site and the internet: NATs and firewalls as tables of flows.

Two shapes cover every kind. A *flow* table keeps one entry per (inner endpoint, destination), as Linux's
connection tracking does: it keeps the inner port where the answer's way is free (port-restricted), or draws a
new one for every destination (symmetric). A *cone* keeps one mapping per inner endpoint and filters by the
addresses it contacted, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from lab.nat import Nat

from scope.model import Endpoint, IPAddress

UNREPLIED_TIMEOUT = 30.0  # nf_conntrack_udp_timeout
MAPPING_TIMEOUT = 120.0  # nf_conntrack_udp_timeout_stream


class Box(Protocol):
    """A router on the way out: it translates, filters, or both."""

    def outbound(self, inner: Endpoint, to: Endpoint, now: float) -> Endpoint | None:
        """The source that the world sees, None when the datagram does not leave."""

    def inbound(self, outer: Endpoint, source: Endpoint, now: float) -> Endpoint | None:
        """Who inside gets it, None when nobody does."""

    def reboot(self) -> None:
        """Forget every entry."""

    def rebind(self) -> None:
        """Forget every entry, and take other ports from now on."""


@dataclass(slots=True)
class _Flow:
    inner: Endpoint
    port: int
    expires: float
    replied: bool = False


class FlowNat:
    """Port-restricted, symmetric or a stateful firewall (`public` None: addresses stay as they are).

    With `open_input` the router itself takes unsolicited datagrams, and so occupies, towards their sender,
    the port on which the answer of a later flow would come.
    """

    def __init__(
        self,
        public: IPAddress | None,
        *,
        random: Callable[[], float],
        symmetric: bool = False,
        open_input: bool = False,
        timeout: float = MAPPING_TIMEOUT,
    ) -> None:
        self.public = public
        self.timeout = timeout
        self._random = random
        self._symmetric = symmetric
        self._open_input = open_input
        self._shift = 0
        self._flows: dict[tuple[Endpoint, Endpoint], _Flow] = {}
        self._answers: dict[tuple[int, Endpoint], _Flow] = {}
        self._own: dict[tuple[int, Endpoint], float] = {}

    def outbound(self, inner: Endpoint, to: Endpoint, now: float) -> Endpoint | None:
        """Translate, and open the way back for `to`."""
        flow = self._flows.get((inner, to))
        if flow is None or flow.expires < now:
            flow = _Flow(inner, self._choose(inner, to, now), 0.0)
            self._flows[(inner, to)] = flow
            self._answers[(flow.port, to)] = flow
        flow.expires = now + (self.timeout if flow.replied else min(UNREPLIED_TIMEOUT, self.timeout))
        return inner if self.public is None else Endpoint(self.public, flow.port)

    def inbound(self, outer: Endpoint, source: Endpoint, now: float) -> Endpoint | None:
        """Let in what answers a flow."""
        flow = self._answers.get((outer.port, source))
        if flow is None or flow.expires < now or (self.public is None and flow.inner != outer):
            if self._open_input:
                self._own[(outer.port, source)] = now + UNREPLIED_TIMEOUT
            return None
        flow.replied = True
        flow.expires = now + self.timeout
        return flow.inner

    def reboot(self) -> None:
        """Forget every flow."""
        self._flows.clear()
        self._answers.clear()
        self._own.clear()

    def rebind(self) -> None:
        """Forget every flow, and take ports of another range from now on."""
        self.reboot()
        self._shift = self._shift % 20000 + 1000

    def _choose(self, inner: Endpoint, to: Endpoint, now: float) -> int:
        if self.public is None:
            return inner.port
        port = self._any_port() if self._symmetric else 1024 + (inner.port + self._shift - 1024) % 64000
        while self._is_taken(port, inner, to, now):
            port = self._any_port()
        return port

    def _is_taken(self, port: int, inner: Endpoint, to: Endpoint, now: float) -> bool:
        flow = self._answers.get((port, to))
        if flow is not None and flow.expires >= now and flow.inner != inner:
            return True
        return self._own.get((port, to), now) > now

    def _any_port(self) -> int:
        return 1024 + int(self._random() * 64000)


@dataclass(slots=True)
class _Mapping:
    inner: Endpoint
    port: int
    expires: float
    contacted: dict[IPAddress, float] = field(default_factory=dict)


class ConeNat:
    """Full cone, or address-restricted."""

    def __init__(
        self,
        public: IPAddress,
        *,
        random: Callable[[], float],
        restricted: bool,
        timeout: float = MAPPING_TIMEOUT,
    ) -> None:
        self.public = public
        self.timeout = timeout
        self._random = random
        self._restricted = restricted
        self._shift = 0
        self._by_inner: dict[Endpoint, _Mapping] = {}
        self._by_port: dict[int, _Mapping] = {}

    def outbound(self, inner: Endpoint, to: Endpoint, now: float) -> Endpoint | None:
        """Translate by the inner endpoint's one mapping."""
        mapping = self._by_inner.get(inner)
        if mapping is None or mapping.expires < now:
            port = 1024 + (inner.port + self._shift - 1024) % 64000
            while port in self._by_port and self._by_port[port].expires >= now:
                port = 1024 + int(self._random() * 64000)
            mapping = _Mapping(inner, port, 0.0)
            self._by_inner[inner] = self._by_port[port] = mapping
        mapping.expires = now + self.timeout
        mapping.contacted[to.address] = now + self.timeout
        return Endpoint(self.public, mapping.port)

    def inbound(self, outer: Endpoint, source: Endpoint, now: float) -> Endpoint | None:
        """Let in whoever may send to the mapping."""
        mapping = self._by_port.get(outer.port)
        if mapping is None or mapping.expires < now:
            return None
        if self._restricted and mapping.contacted.get(source.address, 0.0) < now:
            return None
        return mapping.inner

    def reboot(self) -> None:
        """Forget every mapping."""
        self._by_inner.clear()
        self._by_port.clear()

    def rebind(self) -> None:
        """Forget every mapping, and take ports of another range from now on."""
        self.reboot()
        self._shift = self._shift % 20000 + 1000


class Blocked:
    """Nothing leaves, nothing enters."""

    def outbound(self, inner: Endpoint, to: Endpoint, now: float) -> Endpoint | None:
        """Never."""
        return None

    def inbound(self, outer: Endpoint, source: Endpoint, now: float) -> Endpoint | None:
        """Never."""
        return None

    def reboot(self) -> None:
        """Nothing to forget."""

    def rebind(self) -> None:
        """Nothing to forget."""


def boxes_of(kind: Nat, public: IPAddress, carrier: IPAddress, *, random: Callable[[], float]) -> list[Box]:
    """The IPv4 boxes of a site, the machines' own router first. `carrier` lies between two NATs in a row."""
    match kind:
        case Nat.NONE | Nat.IPV6_ONLY:
            return []
        case Nat.FULL_CONE | Nat.HAIRPIN:
            return [ConeNat(public, random=random, restricted=False)]
        case Nat.ADDRESS_RESTRICTED:
            return [ConeNat(public, random=random, restricted=True)]
        case Nat.PORT_RESTRICTED:
            return [FlowNat(public, random=random)]
        case Nat.PORT_RESTRICTED_OPEN_INPUT:
            return [FlowNat(public, random=random, open_input=True)]
        case Nat.SYMMETRIC:
            return [FlowNat(public, random=random, symmetric=True)]
        case Nat.CGNAT:
            return [FlowNat(carrier, random=random), FlowNat(public, random=random)]
        case Nat.UDP_BLOCKED:
            return [Blocked()]
