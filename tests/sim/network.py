"""Sites, machines' addresses, and what happens to a datagram between them.

A datagram leaves its machine, passes the routers of its site (each takes a hop and may translate or refuse),
crosses the internet (one more hop), and is offered to the routers of the destination's site when it arrives
there. `Link`s say what goes wrong on the way from one site to another, in one direction. Two sites may also
have a line of their own, on which their private addresses reach each other past all routers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from random import Random
from typing import Protocol

from lab.nat import Nat

from scope.model import Endpoint, Family, IPAddress
from tests.sim.nat import Box, FlowNat, boxes_of

LAN_DELAY = 0.0005


class Receiver(Protocol):
    """A machine, as the network sees it."""

    site: Site

    def arrived(self, source: Endpoint, port: int, payload: object) -> None:
        """A datagram for one of the machine's UDP ports."""


@dataclass(slots=True)
class Link:
    """What happens on the way from one site to another, in one direction and one family."""

    loss: float = 0.0
    duplication: float = 0.0
    jitter: float = 0.0  # up to so many seconds more: reorders
    delay: float = 0.0  # always so many seconds more
    cut: bool = False
    drops_data: bool = False  # WireGuard's transport packets alone


@dataclass(slots=True)
class Site:
    """A place: its boxes, its address space, its distance."""

    name: str
    kind: Nat
    delay: float  # one way to the middle of the internet
    boxes: list[Box]  # IPv4, the machines' own router first
    firewall: Box | None  # IPv6
    lan: IPv4Network
    public: IPv4Address
    prefix: IPv6Network | None
    machines: dict[IPAddress, Receiver] = field(default_factory=dict)


class Network:
    """The internet. `schedule(at, call)` runs a delivery later."""

    def __init__(
        self,
        *,
        random: Random,
        now: Callable[[], float],
        schedule: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self.sites: list[Site] = []
        self.links: dict[tuple[str, str, Family], Link] = {}
        self.lines: dict[tuple[str, str], Link] = {}
        self.weather = Link()  # on every way that has no link of its own
        self.delivered = self.dropped = 0
        self.is_data: Callable[[object], bool] = lambda payload: False
        self._random, self._now, self._schedule = random, now, schedule
        self._by_address: dict[IPAddress, Site] = {}
        self._numbers = 0

    def site(self, kind: Nat, *, ipv6: bool = False, delay: float = 0.01, lan: str | None = None) -> Site:
        """A new site. Machines without a NAT get public addresses; `lan` replaces the private network."""
        self._numbers += 1
        n = self._numbers
        public = IPv4Address(f"198.51.{100 + n // 250}.{1 + n % 250}")
        prefix = IPv6Network(f"2001:db8:{n:x}::/64") if ipv6 or kind is Nat.IPV6_ONLY else None
        default = f"198.18.{n}.0/24" if kind is Nat.NONE else f"10.{n}.0.0/24"
        draw = self._random.random
        firewall: Box | None = None
        if kind is Nat.UDP_BLOCKED:
            firewall = boxes_of(kind, public, public, random=draw)[0]
        elif kind is not Nat.NONE:
            firewall = FlowNat(None, random=draw)
        site = Site(
            name=f"site{n}",
            kind=kind,
            delay=delay,
            boxes=boxes_of(kind, public, IPv4Address(f"100.64.{n}.10"), random=draw),
            firewall=firewall,
            lan=IPv4Network(lan or default),
            public=public,
            prefix=prefix,
        )
        self.sites.append(site)
        if kind not in (Nat.NONE, Nat.IPV6_ONLY):
            self._by_address[public] = site
        return site

    def attach(self, machine: Receiver, site: Site) -> list[IPv4Address | IPv6Address]:
        """Give a machine addresses at a site."""
        self._numbers += 1
        number = self._numbers
        addresses: list[IPv4Address | IPv6Address] = []
        if site.kind is not Nat.IPV6_ONLY:
            addresses.append(site.lan[10 + number % 200])
        if site.prefix is not None:
            addresses.append(site.prefix[0x100 + number])
        for address in addresses:
            site.machines[address] = machine
            if site.kind in (Nat.NONE, Nat.IPV6_ONLY) or address.version == 6:
                self._by_address[address] = site
        return addresses

    def detach(self, machine: Receiver) -> None:
        """Take a machine's addresses away."""
        for address in [a for a, m in machine.site.machines.items() if m is machine]:
            del machine.site.machines[address]
            if self._by_address.get(address) is machine.site and address != machine.site.public:
                del self._by_address[address]

    def link(self, a: Site, b: Site, family: Family | None = None, *, both: bool = True) -> list[Link]:
        """The links from a to b (and back), of one family or both, to change them."""
        ways = [(a, b), (b, a)] if both else [(a, b)]
        families = [family] if family is not None else list(Family)
        return [self.links.setdefault((x.name, y.name, f), Link()) for x, y in ways for f in families]

    def line(self, a: Site, b: Site) -> list[Link]:
        """The line between two sites' private networks, laid with the first call: one link each way."""
        return [self.lines.setdefault((x.name, y.name), Link()) for x, y in ((a, b), (b, a))]

    def send(
        self, site: Site, inner: Endpoint, to: Endpoint, payload: object, *, ttl: int | None = None
    ) -> None:
        """Send one datagram from a machine's socket at `site`."""
        now = self._now()
        address = to.address
        if address in site.machines and (address in site.lan or address.version == 6):
            self._schedule(now + LAN_DELAY, lambda: self._hand_over(site, inner, to, payload))
            return
        other = self._over_line(site, address) if self.lines else None
        if other is not None:
            line, delay = self.lines[(site.name, other.name)], site.delay + other.delay
            self._travel(line, delay, lambda: self._hand_over(other, inner, to, payload))
            return
        hops = ttl if ttl is not None else 64
        source: Endpoint | None = inner
        for box in site.boxes if address.version == 4 else [site.firewall] if site.firewall else []:
            hops -= 1
            if hops <= 0 or source is None:
                return
            source = box.outbound(source, to, now)
        if not site.boxes and address.version == 4:
            hops -= 1
        if source is None:
            return
        if address == site.public and site.boxes:
            if site.kind in (Nat.HAIRPIN, Nat.FULL_CONE) and site.kind is Nat.HAIRPIN:
                seen = source
                self._schedule(now + 2 * LAN_DELAY, lambda: self._enter(site, seen, to, payload))
            return
        target = self._by_address.get(address)
        if target is None or hops <= 1:  # the internet takes a hop
            return
        self._cross(site, target, source, to, payload)

    def _over_line(self, site: Site, address: IPAddress) -> Site | None:
        """The site that has the private address at the other end of a line of ours."""
        for other in self.sites:
            if (site.name, other.name) in self.lines and address in other.lan and address in other.machines:
                return other
        return None

    def _cross(self, site: Site, target: Site, source: Endpoint, to: Endpoint, payload: object) -> None:
        link = self.links.get((site.name, target.name, to.family), self.weather)
        if link.drops_data and self.is_data(payload):
            self.dropped += 1
            return
        self._travel(link, site.delay + target.delay, lambda: self._enter(target, source, to, payload))

    def _travel(self, link: Link, delay: float, arrive: Callable[[], None]) -> None:
        if link.cut:
            self.dropped += 1
            return
        copies = 1
        if link.loss or link.duplication:
            if self._random.random() < link.loss:
                self.dropped += 1
                return
            copies = 2 if self._random.random() < link.duplication else 1
        for _ in range(copies):
            jitter = link.jitter * self._random.random() if link.jitter else 0.0
            self._schedule(self._now() + delay + link.delay + jitter, arrive)

    def _enter(self, site: Site, source: Endpoint, to: Endpoint, payload: object) -> None:
        now = self._now()
        target: Endpoint | None = to
        boxes = site.boxes if to.address.version == 4 else [site.firewall] if site.firewall else []
        for box in reversed(boxes):
            if target is None:
                return
            target = box.inbound(target, source, now)
        if target is not None:
            self._hand_over(site, source, target, payload)

    def _hand_over(self, site: Site, source: Endpoint, to: Endpoint, payload: object) -> None:
        machine = site.machines.get(to.address)
        if machine is not None:
            self.delivered += 1
            machine.arrived(source, to.port, payload)
