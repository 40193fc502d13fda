"""Lab and Site: an internet of network namespaces, put together, impaired, and taken down again.

In the middle stands a router, `core`. Each site's router (or the carrier before it) and each server
has one uplink to it, so a datagram between two sites passes: machine, router, core, router, machine;
a TTL of 2 ends at the core, between the NATs. Where the lab has delays, each uplink runs through the
namespace `wire`, in which one process passes the frames of all uplinks on (`shim.py`).

Uplinks have permanent neighbour entries: no first datagram waits for an address to be resolved.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from enum import Enum
from ipaddress import IPv4Network
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from lab import plan
from lab.grid import Place
from lab.hosts import PRIVATE_DIRECTORIES, Host, end
from lab.nat import MAPPING_TIMEOUT_S, Nat, RouterRules, rebind_ports, router_rules, udp_block
from lab.netns import (
    LabError,
    flush_conntrack,
    ip_batch,
    kill_inside,
    load_nft,
    names_with,
    remove,
    require_tools,
    write_sysctls,
)
from lab.plan import CORE_IPV4, CORE_IPV6, DOWNSTREAM_LINK_LOCAL, UPSTREAM_LINK_LOCAL
from lab.uplinks import Uplinks

# One directory per lab, named like the namespaces' prefix: who owns it, and its hosts' directories.
LABS = Path("/run/scope-lab")

_UPSTREAM_MAC = "02:00:00:00:00:01"
_DOWNSTREAM_MAC = "02:00:00:00:00:02"
_NAME = re.compile(r"[a-z0-9](-?[a-z0-9])*")
_counter = itertools.count(1)


class Traffic(Enum):
    """What a cut swallows."""

    ALL = "all"
    """Every packet."""
    WIREGUARD_DATA = "data"
    """WireGuard's transport data (type 4); handshakes and probes pass."""
    WIREGUARD_HANDSHAKES = "handshakes"
    """WireGuard's handshake messages (types 1 to 3); data and probes pass."""


class Lab:
    """An internet to build sites and servers on. Close it, or use it as a context manager.

    `delay_ms` is one way on each uplink: two sites are 4 * delay_ms apart in round trip. With
    `impairable` (the default where there is a delay) frames pass through the shim, so that delay,
    jitter and loss can be changed later; without, uplinks are plain veth pairs and cost nothing.
    `seed` decides which frames are lost. `private` are directories of which each host has its own.

    It also closes at the interpreter's exit, and on SIGTERM or SIGHUP, which then end the process,
    where the lab is made in the main thread and nobody handles those signals already.
    """

    def __init__(
        self,
        *,
        delay_ms: float = 0.0,
        impairable: bool | None = None,
        seed: int = 1,
        private: Sequence[str] = PRIVATE_DIRECTORIES,
    ) -> None:
        require_tools()
        self.prefix = f"lab{os.getpid()}-{next(_counter)}"
        self.directory = LABS / self.prefix
        self.sites: dict[str, Site] = {}
        self.servers: dict[str, Server] = {}
        self.private = tuple(private)
        self._delay_ms = delay_ms
        self._owner = os.getpid()
        self._state = _State.UP
        self._site_numbers = itertools.count(1)
        self._server_numbers = itertools.count(1)
        self._port_numbers = itertools.count(1)
        self._uplinks: Uplinks | None = None
        atexit.register(self.close)
        _hold_signals(self.prefix)
        try:
            write_owner(self.directory)
            self._build_core()
            if delay_ms > 0 if impairable is None else impairable:
                self._build_wire(seed)
        except BaseException:
            self.close()
            raise

    def site(
        self,
        name: str,
        *,
        nat: Nat,
        ipv6: bool | None = None,
        mapping_timeout_s: int | None = None,
        lan: IPv4Network | None = None,
    ) -> Site:
        """A new site behind a NAT of this kind.

        `ipv6`: whether it has IPv6 as well, behind a stateful firewall unless it is public; by default
        only where the kind says so, so that it is the NAT which is tested. `mapping_timeout_s`: how
        long an idle UDP mapping lives (default: the kernel's 30 s, and 120 s once answered). `lan`: its
        private network, if it is to be another than its own 10.N.0.0/24, say the same as another site's.
        """
        self._check_new(name)
        site = Site(self, name, nat=nat, ipv6=ipv6, mapping_timeout_s=mapping_timeout_s, lan=lan)
        self.sites[name] = site
        return site

    def server(self, name: str) -> Server:
        """A new host straight on the internet, with a public address of each family."""
        self._check_new(name)
        server = Server(self, name)
        self.servers[name] = server
        return server

    def cut(
        self, a: Site | Server, b: Site | Server, *, only: Traffic = Traffic.ALL, one_way: bool = False
    ) -> None:
        """Swallow silently what goes between two ends; with `one_way` only what goes from a to b."""
        self._change_cut("add", a, b, only, one_way=one_way)

    def heal(self, a: Site | Server, b: Site | Server, *, one_way: bool = False) -> None:
        """Undo every cut between two ends; with `one_way` only those from a to b."""
        for only in Traffic:
            # Adding first makes the deletion succeed whether or not there was a cut.
            self._change_cut("add", a, b, only, one_way=one_way)
            self._change_cut("delete", a, b, only, one_way=one_way)

    def hosts(self) -> list[Host]:
        """Every machine and server."""
        machines = [machine for site in self.sites.values() for machine in site.machines.values()]
        return [*machines, *self.servers.values()]

    def keep(self) -> str:
        """Leave the lab up when this process ends; the text says how to enter it and how to remove it."""
        if self._state is not _State.UP:
            return f"the lab {self.prefix} is not up"
        self._state = _State.KEPT
        if self._uplinks:
            self._uplinks.detach()
        command = f"  sudo env PYTHONPATH={Path(__file__).parents[1]} {sys.executable} -m lab"
        lines = [
            f"The lab {self.prefix} stays up. Enter a host or a router with",
            f"{command} enter NAME",
            "where NAME is one of",
            *(f"  {name}" for name in names_with(f"{self.prefix}-")),
            "and remove it, with everything that runs inside, with",
            f"{command} clean {self.prefix}",
        ]
        return "\n".join(lines)

    def close(self) -> None:
        """End every process inside and remove every namespace and directory, unless kept. Idempotent."""
        if self._state is not _State.UP or os.getpid() != self._owner:
            return
        with _Uninterrupted(), contextlib.ExitStack() as last_first:
            self._state = _State.CLOSED
            names = names_with(f"{self.prefix}-")
            last_first.callback(atexit.unregister, self.close)
            last_first.callback(shutil.rmtree, self.directory, ignore_errors=True)
            last_first.callback(remove, names)
            last_first.callback(kill_inside, names)
            if self._uplinks:
                last_first.callback(self._uplinks.close)
            last_first.callback(end, [child for host in self.hosts() for child in host.children()])
        _release_signals(self.prefix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    # What sites, machines and servers build themselves with.

    def namespace(self, name: str, *, router: bool = False) -> str:
        """The name of a new namespace of this lab, made and configured."""
        full = f"{self.prefix}-{name}"
        ip_batch([f"netns add {full}"])
        write_sysctls(full, _SYSCTLS | (_ROUTER_SYSCTLS if router else {}))
        return full

    def next_port(self) -> str:
        """An interface name that is unique in the lab, so that it may move between namespaces."""
        return f"port{next(self._port_numbers)}"

    def connect(self, namespace: str, port: str) -> None:
        """Give a namespace an interface `wan` whose other end is `port` of the core."""
        core = f"address {_UPSTREAM_MAC} netns {self.core}"
        wan = f"wan address {_DOWNSTREAM_MAC} netns {namespace}"
        if self._uplinks is None:
            ip_batch([f"link add {port} {core} type veth peer name {wan}"])
            return
        up, down = f"{port}-up", f"{port}-down"
        ip_batch(
            [
                f"link add {port} {core} type veth peer name {up} netns {self._wire}",
                f"link add {down} netns {self._wire} type veth peer name {wan}",
            ]
        )
        ip_batch([f"link set {end_} up" for end_ in (up, down)], inside=self._wire)
        self._uplinks.join(port, up, down)
        self._uplinks.set(port, delay_ms=self._delay_ms, jitter_ms=0.0, loss=0.0)

    def set_link(self, port: str, *, delay_ms: float | None, jitter_ms: float, loss: float) -> None:
        """Impair an uplink; LabError where the lab is not impairable."""
        if self._uplinks is None:
            raise LabError("this lab's uplinks are plain: make it with Lab(impairable=True) to change them")
        if not 0.0 <= loss <= 1.0 or jitter_ms < 0.0 or (delay_ms or 0.0) < 0.0:
            raise ValueError(f"loss is from 0 to 1, times are not negative: {delay_ms=} {jitter_ms=} {loss=}")
        delay = self._delay_ms if delay_ms is None else delay_ms
        self._uplinks.set(port, delay_ms=delay, jitter_ms=jitter_ms, loss=loss)

    def _build_core(self) -> None:
        self.core = self.namespace("core", router=True)
        ip_batch(
            ["link set lo up", f"addr add {CORE_IPV4}/32 dev lo", f"addr add {CORE_IPV6}/128 dev lo nodad"],
            inside=self.core,
        )
        load_nft(_CUTS, inside=self.core)

    def _build_wire(self, seed: int) -> None:
        self._wire = self.namespace("wire")
        # The ends of the wires are no hosts: nothing may speak there but the shim.
        write_sysctls(self._wire, {"net/ipv6/conf/default/disable_ipv6": "1"})
        self._uplinks = Uplinks(self._wire, seed=seed)

    def _change_cut(
        self, verb: str, a: Site | Server, b: Site | Server, only: Traffic, *, one_way: bool
    ) -> None:
        if a.port == b.port:
            raise LabError(f"{a.name} and {b.name} are one end: nothing passes between them on the internet")
        pairs = [(a.port, b.port)] if one_way else [(a.port, b.port), (b.port, a.port)]
        elements = ", ".join(f'"{source}" . "{target}"' for source, target in pairs)
        load_nft(f"{verb} element inet lab_cuts cut_{only.value} {{ {elements} }}\n", inside=self.core)

    def _check_new(self, name: str) -> None:
        if self._state is not _State.UP:
            raise LabError(f"the lab {self.prefix} is closed")
        if not _NAME.fullmatch(name) or len(name) > 40:
            raise LabError(
                f"{name!r} is no name for a site or host: use up to 40 of a-z, 0-9 and single hyphens"
            )
        if name in ("core", "wire") or name in self.sites or name in self.servers:
            raise LabError(f"the lab has a {name} already")


class Site:
    """A router with a LAN behind it. Made by `Lab.site`."""

    def __init__(
        self,
        lab: Lab,
        name: str,
        *,
        nat: Nat,
        ipv6: bool | None,
        mapping_timeout_s: int | None,
        lan: IPv4Network | None,
    ) -> None:
        self.lab = lab
        self.name = name
        self.nat = nat
        self.machines: dict[str, Machine] = {}
        has_ipv6 = plan.has_ipv6(nat, wanted=ipv6)
        self.place = Place(name, nat, has_ipv6)
        self.plan = plan.site_plan(next(lab._site_numbers), nat, ipv6=has_ipv6, lan=lan)
        self.port = lab.next_port()
        self._generation = 0
        self._timeout_s = mapping_timeout_s
        self._machine_numbers = itertools.count()
        self.router = lab.namespace(name, router=True)
        self.carrier = lab.namespace(f"{name}-carrier", router=True) if nat is Nat.CGNAT else None
        self._build()

    def machine(self, name: str) -> Machine:
        """A new machine in the site's LAN. Its name is unique in the lab."""
        self.lab._check_new(name)
        if any(name in site.machines for site in self.lab.sites.values()):
            raise LabError(f"the lab has a {name} already")
        machine = Machine(self, name)
        self.machines[name] = machine
        return machine

    def next_machine_number(self) -> int:
        """A number no machine has had in this LAN; LabError when it is full."""
        number = next(self._machine_numbers)
        if number >= plan.MAX_MACHINES:
            raise LabError(f"{self.name} has had {plan.MAX_MACHINES} machines, its LAN has no address left")
        return number

    def rebind(self) -> None:
        """Change every UDP mapping: the outermost NAT takes another port range and forgets its flows."""
        self._generation += 1
        self._load_rules()
        flush_conntrack(self.carrier or self.router)

    def reboot(self) -> None:
        """The site's routers forget everything: connections, mappings, who was contacted."""
        self._load_rules()
        for router in self._routers():
            flush_conntrack(router)

    def block_udp(self) -> None:
        """From now on no UDP passes between the site and the internet, silently."""
        load_nft(udp_block(blocked=True), inside=self.router)

    def unblock_udp(self) -> None:
        """UDP passes again, as far as the site's kind lets it."""
        load_nft(udp_block(blocked=False), inside=self.router)

    def set_link(self, *, delay_ms: float | None = None, jitter_ms: float = 0.0, loss: float = 0.0) -> None:
        """Replace the uplink's impairments, each way: delay (None: the lab's), jitter, loss from 0 to 1."""
        self.lab.set_link(self.port, delay_ms=delay_ms, jitter_ms=jitter_ms, loss=loss)

    def _routers(self) -> list[str]:
        return [self.router] if self.carrier is None else [self.router, self.carrier]

    def _build(self) -> None:
        outer = self.carrier or self.router
        self.lab.connect(outer, self.port)
        if self.carrier:
            ends = (
                f"address {_UPSTREAM_MAC} netns {self.carrier}",
                f"address {_DOWNSTREAM_MAC} netns {self.router}",
            )
            ip_batch([f"link add lan {ends[0]} type veth peer name wan {ends[1]}"])
        addresses = self.plan
        prefix = addresses.prefix_ipv6
        core = _downstream_routes(self.port, ipv4=addresses.public_ipv4, ipv6=prefix)
        if addresses.lan_ipv4 and self.nat is Nat.NONE:
            core.append(f"route add {addresses.lan_ipv4} via {addresses.public_ipv4} dev {self.port} onlink")
        ip_batch(core, inside=self.lab.core)
        lan = [
            "link set lo up",
            "link add lan type bridge mcast_snooping 0",
            "link set lan up",
            *_addresses("lan", addresses.router_ipv4(), 24, addresses.router_ipv6(), 64),
        ]
        uplink = _uplink_routes("wan", ipv4=addresses.public_ipv4, ipv6=prefix is not None)
        if self.carrier is None:
            ip_batch([*lan, *uplink], inside=self.router)
        else:
            self._build_carrier(uplink, lan)
        self._load_rules()
        if self._timeout_s is not None:
            # After the rules: connection tracking has sysctls once something needs it.
            seconds = str(self._timeout_s)
            for router in self._routers():
                write_sysctls(router, dict.fromkeys(_UDP_TIMEOUTS, seconds))

    def _build_carrier(self, uplink: list[str], lan: list[str]) -> None:
        assert self.carrier and self.plan.carrier_ipv4
        network = self.plan.carrier_ipv4
        inside = [
            "link set lan up",
            f"addr add {network[1]}/24 dev lan",
            f"neigh add {network[2]} lladdr {_DOWNSTREAM_MAC} dev lan nud permanent",
        ]
        router = [
            "link set wan up",
            f"addr add {network[2]}/24 dev wan",
            f"neigh add {network[1]} lladdr {_UPSTREAM_MAC} dev wan nud permanent",
            f"route add default via {network[1]} dev wan",
        ]
        if prefix := self.plan.prefix_ipv6:
            inside += _downstream_routes("lan", ipv4=None, ipv6=prefix)[1:]
            router += _uplink_routes("wan", ipv4=None, ipv6=True)[1:]
        ip_batch(["link set lo up", *uplink, *inside], inside=self.carrier)
        ip_batch([*lan, *router], inside=self.router)

    def _load_rules(self) -> None:
        ports = rebind_ports(self._generation)
        timeout = self._timeout_s or MAPPING_TIMEOUT_S
        addresses = self.plan
        if self.carrier is None:
            rules = RouterRules(self.nat, addresses.public_ipv4, addresses.lan_ipv4, ports, timeout)
            load_nft(router_rules(rules), inside=self.router)
            return
        assert addresses.carrier_ipv4
        home = RouterRules(Nat.PORT_RESTRICTED, addresses.carrier_ipv4[2], addresses.lan_ipv4)
        carrier = RouterRules(Nat.PORT_RESTRICTED, addresses.public_ipv4, addresses.carrier_ipv4, ports)
        load_nft(router_rules(home), inside=self.router)
        load_nft(router_rules(carrier), inside=self.carrier)


class Machine(Host):
    """A host in a site's LAN, on its interface `eth0`. Made by `Site.machine`."""

    def __init__(self, site: Site, name: str) -> None:
        lab = site.lab
        namespace = lab.namespace(f"{site.name}-{name}")
        super().__init__(name, namespace=namespace, directory=lab.directory / name, private=lab.private)
        self.site = site
        self._cable = lab.next_port()
        ip_batch([f"link add eth0 netns {namespace} type veth peer name {self._cable} netns {site.router}"])
        ip_batch(["link set lo up"], inside=namespace)
        self._plug()
        _note_holder(lab, self)
        self.wait_ready()

    @property
    def place(self) -> Place:
        """Where the machine is now."""
        return self.site.place

    def move(self, site: Site) -> None:
        """Roam: pull the cable, plug it into another site's LAN, take an address and a gateway there."""
        if site.lab is not self.site.lab:
            raise LabError(f"{self.name} cannot move to {site.name}: it is in another lab")
        if site is self.site:
            return
        ip_batch([f"link set {self._cable} netns {site.router}"], inside=self.site.router)
        ip_batch(["addr flush dev eth0 scope global", "neigh flush dev eth0"], inside=self.namespace)
        del self.site.machines[self.name]
        site.machines[self.name] = self
        self.site = site
        self._plug()

    def _plug(self) -> None:
        addresses, number = self.site.plan, self.site.next_machine_number()
        self.ipv4, self.ipv6 = addresses.machine_ipv4(number), addresses.machine_ipv6(number)
        ip_batch([f"link set {self._cable} master lan up"], inside=self.site.router)
        lines = ["link set eth0 up", *_addresses("eth0", self.ipv4, 24, self.ipv6, 64)]
        if gateway := addresses.router_ipv4():
            lines.append(f"route replace default via {gateway} dev eth0")
        if gateway6 := addresses.router_ipv6():
            lines.append(f"route replace default via {gateway6} dev eth0")
        ip_batch(lines, inside=self.namespace)


class Server(Host):
    """A host straight on the internet, on its interface `wan`. Made by `Lab.server`."""

    def __init__(self, lab: Lab, name: str) -> None:
        namespace = lab.namespace(name)
        super().__init__(name, namespace=namespace, directory=lab.directory / name, private=lab.private)
        self.lab = lab
        self.place = Place(name, Nat.NONE, ipv6=True)
        self.port = lab.next_port()
        ipv4, ipv6 = plan.server_addresses(next(lab._server_numbers))
        lab.connect(namespace, self.port)
        ip_batch(_downstream_routes(self.port, ipv4=ipv4, ipv6=ipv6), inside=lab.core)
        uplink = _uplink_routes("wan", ipv4=ipv4, ipv6=True)
        ip_batch(["link set lo up", *uplink, f"addr add {ipv6}/128 dev wan nodad"], inside=namespace)
        self.ipv4, self.ipv6 = ipv4, ipv6
        _note_holder(lab, self)
        self.wait_ready()

    def set_link(self, *, delay_ms: float | None = None, jitter_ms: float = 0.0, loss: float = 0.0) -> None:
        """Replace the uplink's impairments, each way: delay (None: the lab's), jitter, loss from 0 to 1."""
        self.lab.set_link(self.port, delay_ms=delay_ms, jitter_ms=jitter_ms, loss=loss)


def write_owner(directory: Path) -> None:
    """Make a lab's directory, which says whose it is: this process's number and when it started.

    It appears with its owner in it, so that no cleaning takes it for abandoned.
    """
    making = directory.with_name(f".{directory.name}")
    making.mkdir(mode=0o700, parents=True)
    (making / "owner").write_text(f"{os.getpid()} {started_at(os.getpid())}\n")
    making.rename(directory)


def started_at(pid: int) -> int | None:
    """When a process started, in clock ticks since boot, which tells it from a later one of its number."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return None
    # The command may hold spaces and brackets; field 22 counts from after the last one.
    return int(stat.rpartition(")")[2].split()[19])


class _State(Enum):
    UP = "up"
    KEPT = "kept"
    CLOSED = "closed"


_ROUTER_SYSCTLS = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
_SYSCTLS = {
    # A source may be on another interface than the way back to it, as on a roaming machine.
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    # No duplicate detection: an address is usable at once.
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/dad_transmits": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}
_UDP_TIMEOUTS = ("net/netfilter/nf_conntrack_udp_timeout", "net/netfilter/nf_conntrack_udp_timeout_stream")

# WireGuard's message type is the first payload byte (at 64 bits into the UDP header), three zeros after it.
_CUTS = """table inet lab_cuts {
 set cut_all { type ifname . ifname; }
 set cut_data { type ifname . ifname; }
 set cut_handshakes { type ifname . ifname; }
 chain forward {
  type filter hook forward priority filter; policy accept;
  iifname . oifname @cut_all drop
  iifname . oifname @cut_data udp length >= 12 @th,64,32 0x04000000 drop
  iifname . oifname @cut_handshakes udp length >= 12 @th,64,32 { 0x01000000, 0x02000000, 0x03000000 } drop
 }
}
"""


def _addresses(interface: str, ipv4: object | None, bits4: int, ipv6: object | None, bits6: int) -> list[str]:
    lines = [f"addr add {ipv4}/{bits4} dev {interface}"] if ipv4 else []
    return lines + ([f"addr add {ipv6}/{bits6} dev {interface} nodad"] if ipv6 else [])


def _downstream_routes(port: str, *, ipv4: object | None, ipv6: object | None) -> list[str]:
    """What the upstream end of a link needs to reach what is behind it; the first line brings it up."""
    lines = [f"link set {port} up"]
    if ipv4:
        lines.append(f"route add {ipv4} dev {port} src {CORE_IPV4}")
        lines.append(f"neigh add {ipv4} lladdr {_DOWNSTREAM_MAC} dev {port} nud permanent")
    if ipv6:
        lines.append(f"addr add {UPSTREAM_LINK_LOCAL}/64 dev {port} nodad")
        lines.append(f"neigh add {DOWNSTREAM_LINK_LOCAL} lladdr {_DOWNSTREAM_MAC} dev {port} nud permanent")
        lines.append(f"route add {ipv6} via {DOWNSTREAM_LINK_LOCAL} dev {port}")
    return lines


def _uplink_routes(interface: str, *, ipv4: object | None, ipv6: bool) -> list[str]:
    """What the downstream end of a link needs to reach the internet; the first line brings it up."""
    lines = [f"link set {interface} up"]
    if ipv4:
        lines.append(f"addr add {ipv4}/32 dev {interface}")
        lines.append(f"neigh add {CORE_IPV4} lladdr {_UPSTREAM_MAC} dev {interface} nud permanent")
        lines.append(f"route add default via {CORE_IPV4} dev {interface} onlink")
    if ipv6:
        lines.append(f"addr add {DOWNSTREAM_LINK_LOCAL}/64 dev {interface} nodad")
        lines.append(f"neigh add {UPSTREAM_LINK_LOCAL} lladdr {_UPSTREAM_MAC} dev {interface} nud permanent")
        lines.append(f"route add default via {UPSTREAM_LINK_LOCAL} dev {interface}")
    return lines


def _note_holder(lab: Lab, host: Host) -> None:
    """Leave word for `lab enter`, which runs in another process."""
    (lab.directory / f"{host.namespace}.holder").write_text(str(host.holder_pid))


# The labs of this process that are up, and the signals that end it in an orderly way as long as any is.
_up: set[str] = set()
_held: list[signal.Signals] = []


def _hold_signals(lab: str) -> None:
    _up.add(lab)
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _leave)
            _held.append(number)


def _release_signals(lab: str) -> None:
    _up.discard(lab)
    if _up or threading.current_thread() is not threading.main_thread():
        return
    while _held:
        signal.signal(_held.pop(), signal.SIG_DFL)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class _Uninterrupted:
    """Ignore the signals that ask this process to end, while it is ending."""

    def __enter__(self) -> None:
        self._before: dict[signal.Signals, signal.Handlers | object] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
