"""What leads to pods of other clusters: routes in a table of their own, a rule, the packet filter. It blocks.

The table is beside the main one, where a cluster's own network may have a route for the same prefix: adding
another fails there, and replacing it would take it from its owner. One rule of each family leads to it, for
all meshes of this machine, as long as one has routes there. Under each route lies a blackhole, so that
nothing for those pods leaves in plaintext while the device is away.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from scope.model import ConfigError, IPNetwork
from scope_agent.pods.icmp import quoted_rules
from scope_agent.pods.owners import OwnedRoute, owners, tell
from scope_agent.pods.rules import PodNetwork, delete, load, quoted, table
from scope_agent.wireguard import netlink
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.losing import Losses
from scope_agent.wireguard.shell.links import NetlinkSocket, failure
from scope_agent.wireguard.shell.nft import NftError, ask_nft, load_messages, read_generation, run_nft
from scope_agent.wireguard.shell.passage import list_foreign_chains, read_passages

TABLE: Final = 83  # as the protocol number of our routes; fits the byte that old kernels have for it
# Behind what networks of clusters look at first (Cilium has rules at 9 to 111), before those by which some
# send whatever a pod says out of an interface of its own (from 512 on in AWS), and before the main table.
PRIORITY: Final = 483
COUNT_AGAIN: Final = 10.0  # seconds: `nft` takes some milliseconds; while something is lost, at each look
_FAMILIES: Final = {4: netlink.AF_INET, 6: netlink.AF_INET6}
_SETTINGS: Final = {4: "net.ipv4.ip_forward", 6: "net.ipv6.conf.all.forwarding"}


@dataclass(frozen=True, slots=True)
class _Standing:
    """What of ours is in the table: prefixes that lead into the device, and blackholes."""

    routes: frozenset[IPNetwork]
    guards: frozenset[IPNetwork]


class PodRoutes:
    """What one mesh device has for pods."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._metric = netlink.guard_metric(device)
        self._network: PodNetwork | None = None
        self._led: PodNetwork | None = None  # the same, without what others lead to
        self._shown: str | None = None  # the packet filter's table, as `nft` shows it
        self._generation: int | None = None  # of the ruleset, when that was last known to be whole
        self._losses = Losses()
        self._count_at = 0.0

    def apply(self, network: PodNetwork) -> None:
        """Have this, and nothing else. Raises ApplyError, ConfigError."""
        self._network = network
        with self._kernel() as kernel:
            led, _ = self._left_to_us(kernel, network)
            self._filter(led)
            self._lead(kernel, led.reached)

    def check(self) -> str:
        """Put back what others took away. What stands against it, in words; "" for nothing.

        Raises ApplyError, ConfigError.
        """
        network, generation = self._network, read_generation()
        if network is None:
            return ""
        has_moved = generation is None or generation != self._generation
        with self._kernel() as kernel:
            led, owned = self._left_to_us(kernel, network)
            if led != self._led:
                self._filter(led)
            elif has_moved:
                if self._show() != self._shown:
                    self._filter(led)
                else:
                    self._generation = generation
            self._lead(kernel, led.reached)
        if has_moved or self._losses.is_losing or time.monotonic() >= self._count_at:
            self._count(has_moved=has_moved)
        lost = self._losses.why("to or from pods", f"what goes to or from {self._device}")
        troubles = (_not_forwarding({prefix.version for prefix in network.offered}), lost, owned)
        return "; ".join(filter(None, troubles))

    def remove(self) -> None:
        """Leave nothing behind. Raises ApplyError, ConfigError."""
        self._network, self._losses = None, Losses()
        with self._kernel() as kernel:
            self._lead(kernel, frozenset())
        if shutil.which("nft") is None:  # nobody loaded anything
            return
        try:
            if self._show() is not None:
                run_nft(delete(self._device))
        except NftError as error:
            raise ApplyError(str(error)) from None

    # --- the packet filter ---------------------------------------------------------------------------------

    def _filter(self, network: PodNetwork) -> None:
        try:
            run_nft(load(self._device, network))
            if turned := quoted(network):
                load_messages(quoted_rules(self._device, turned))
            self._led = network
            self._generation = None
            self._losses.begin()
            self._shown = self._show()
        except NftError as error:
            raise ApplyError(f"pods cannot keep their addresses into the mesh: {error}") from None

    def _count(self, *, has_moved: bool) -> None:
        """See what passes the chains of others. Raises ApplyError."""
        now = time.monotonic()
        self._count_at = now + COUNT_AGAIN
        try:
            self._losses.count(read_passages(table(self._device)), has_moved=has_moved, now=now)
            if self._losses.is_losing:
                self._losses.blame(list_foreign_chains())
        except NftError as error:
            raise ApplyError(str(error)) from None

    def _show(self) -> str | None:
        return ask_nft(["--stateless", "list", "table", "inet", table(self._device)])

    # --- routes and rules ----------------------------------------------------------------------------------

    @contextmanager
    def _kernel(self) -> Iterator[NetlinkSocket]:
        try:
            with closing(NetlinkSocket()) as kernel:
                yield kernel
        except netlink.NetlinkError as error:
            raise ApplyError(f"Routes to pods by {self._device}: {error}") from None
        except OSError as error:
            raise failure(f"Routes to pods by {self._device}", error) from None

    def _lead(self, kernel: NetlinkSocket, wanted: frozenset[IPNetwork]) -> None:
        """Guards first and last, the rule when there is something behind it, and no longer."""
        index = self._index(kernel)
        if wanted and index is None:
            raise ApplyError(f"There is no device {self._device}")
        for version, family in _FAMILIES.items():
            ours, others = self._standing(kernel, family, index)
            here = frozenset(prefix for prefix in wanted if prefix.version == version)
            for prefix in sorted(here - ours.guards, key=_order):
                kernel.ask(netlink.add_guard(prefix, self._metric, TABLE))
            if index is not None:
                for prefix in sorted(here - ours.routes, key=_order):
                    kernel.ask(netlink.add_route(index, prefix, TABLE))
                for prefix in sorted(ours.routes - here, key=_order):
                    kernel.ask(netlink.remove_route(index, prefix, TABLE))
            for prefix in sorted(ours.guards - here, key=_order):
                kernel.ask(netlink.remove_guard(prefix, self._metric, TABLE))
            self._rule(kernel, family, is_wanted=bool(here or others))

    def _left_to_us(self, kernel: NetlinkSocket, network: PodNetwork) -> tuple[PodNetwork, str]:
        """What of it nobody else leads to, and who does lead to the rest, in words."""
        if not network.beside:
            return network, ""
        names = {
            link.index: link.name
            for reply in kernel.ask(netlink.get_links())
            if reply.kind == netlink.NEW_LINK
            for link in (netlink.parse_link(reply),)
        }
        routes = [
            OwnedRoute(route.prefix, names.get(route.index, ""), route.protocol)
            for family in _FAMILIES.values()
            for reply in kernel.ask(netlink.get_all_routes(family))
            if reply.kind == netlink.NEW_ROUTE and (route := netlink.parse_any_route(reply)) is not None
        ]
        owned = owners(network.beside, routes)
        return replace(network, reached=network.reached - owned.keys()), tell(owned)

    def _index(self, kernel: NetlinkSocket) -> int | None:
        try:
            (reply,) = kernel.ask(netlink.get_link(self._device))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        return netlink.parse_link(reply).index

    def _standing(self, kernel: NetlinkSocket, family: int, index: int | None) -> tuple[_Standing, bool]:
        """What is there of this device, and whether there is something of another mesh."""
        try:
            replies = kernel.ask(netlink.get_routes(family, TABLE))
        except OSError as error:
            if error.errno != errno.ENOENT:  # there is no such table yet
                raise
            replies = []
        routes = [
            route
            for reply in replies
            if reply.kind == netlink.NEW_ROUTE and (route := netlink.parse_route(reply, TABLE)) is not None
        ]
        ours = _Standing(
            frozenset(route.prefix for route in routes if route.index is not None and route.index == index),
            frozenset(
                route.prefix for route in routes if route.index is None and route.metric == self._metric
            ),
        )
        return ours, len(routes) > len(ours.routes) + len(ours.guards)

    def _rule(self, kernel: NetlinkSocket, family: int, *, is_wanted: bool) -> None:
        has = any(
            netlink.is_rule(reply, table=TABLE, priority=PRIORITY)
            for reply in kernel.ask(netlink.get_rules(family))
            if reply.kind == netlink.NEW_RULE
        )
        if is_wanted and not has:
            kernel.ask(netlink.add_rule(family, table=TABLE, priority=PRIORITY))
        elif has and not is_wanted:
            kernel.ask(netlink.remove_rule(family, table=TABLE, priority=PRIORITY))


def remove_pod_routes(device: str) -> list[str]:
    """Take away what a device has for pods; what stays comes back in words."""
    try:
        PodRoutes(device).remove()
    except (ApplyError, ConfigError) as error:
        return [f"what led to pods by {device} may stay: {error}"]
    return []


def _not_forwarding(versions: set[int]) -> str:
    """The kernel's settings by which nothing of a family is forwarded to or from pods."""
    off = [_SETTINGS[version] for version in sorted(versions) if not _is_on(_SETTINGS[version])]
    return f"pods are cut off: {' and '.join(off)} = 0; set 1 in /etc/sysctl.d" if off else ""


def _is_on(setting: str) -> bool:
    try:
        return Path("/proc/sys", *setting.split(".")).read_text().strip() != "0"
    except OSError:  # a kernel without that family
        return True


def _order(prefix: IPNetwork) -> tuple[int, int]:
    return int(prefix.network_address), prefix.prefixlen
