"""Netlink sockets, and on them what kernel and user-space devices share: the link, its addresses and routes.

Calls block until the kernel has answered: microseconds as a rule, but as long as another program holds the
kernel's routing lock. `device.Device` calls them on a thread of its own.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
from dataclasses import dataclass

from scope.model import ConfigError, IPInterface, IPNetwork
from scope_agent.wireguard import netlink
from scope_agent.wireguard.device import (
    AddAddress,
    AddGuard,
    AddRoute,
    ApplyError,
    PortTaken,
    RemoveAddress,
    RemoveGuard,
    RemoveRoute,
    SetMtu,
    SetUp,
)

LinkAction = SetMtu | SetUp | AddAddress | RemoveAddress | AddRoute | RemoveRoute | AddGuard | RemoveGuard

# Longer than the routing lock is held while a machine tears down many namespaces at once.
ANSWER_TIMEOUT = 10.0
# A dump that changed while it was read is read again; under steady change the caller retries later.
DUMP_ATTEMPTS = 5
_READ_BYTES = 1 << 16  # the kernel fills at most 32 KiB of it

_SOL_NETLINK = 270
_EXTENDED_ACK, _CAPPED_ACK, _STRICT_CHECK = 11, 10, 12

_GONE = {errno.ENODEV, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL}


class NetlinkSocket:
    """Asks the kernel and waits for its answer. The network namespace is the creating thread's."""

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE)
        self._sequence = itertools.count(1)
        for option in (_EXTENDED_ACK, _CAPPED_ACK, _STRICT_CHECK):
            try:
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            except OSError:  # kernels before 4.20 lack one: their answers are longer, not other
                continue
        self._socket.bind((0, 0))
        self._socket.settimeout(ANSWER_TIMEOUT)

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()

    def ask(self, request: netlink.Request) -> list[netlink.Reply]:
        """Send a request and collect what it yields. Raises OSError with the kernel's errno, ApplyError."""
        for _ in range(DUMP_ATTEMPTS):
            answers = self._ask_once(request)
            if not any(answer.flags & netlink.DUMP_INTERRUPTED for answer in answers):
                return answers
        raise ApplyError("The kernel's tables change faster than they can be read")

    def _ask_once(self, request: netlink.Request) -> list[netlink.Reply]:
        sequence = next(self._sequence)
        answers: list[netlink.Reply] = []
        try:
            self._socket.send(request.encoded(sequence))
            while True:
                for reply in netlink.replies(self._socket.recv(_READ_BYTES)):
                    if reply.sequence != sequence:  # the rest of an answer that came too late
                        continue
                    if reply.kind == netlink.ERROR:
                        _raise_refusal(reply)
                        return answers
                    if reply.kind == netlink.DONE:
                        return answers
                    answers.append(reply)
        except TimeoutError:
            raise ApplyError(f"The kernel did not answer within {ANSWER_TIMEOUT:.0f} s") from None
        except netlink.NetlinkError as error:
            raise ApplyError(f"The kernel's answer cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """What rtnetlink says of a device; `link` is None where there is none of that name."""

    link: netlink.Link | None
    addresses: frozenset[IPInterface]
    routes: frozenset[IPNetwork]
    guarded: frozenset[IPNetwork]


class Links:
    """One interface by name: its link, addresses, routes and guards."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = NetlinkSocket()
        self._metric = netlink.guard_metric(name)

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()

    def find(self) -> netlink.Link | None:
        """The interface, if there is one. Raises ApplyError."""
        try:
            (reply,) = self._socket.ask(netlink.get_link(self.name))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise failure(f"Reading {self.name}", error) from None
        return netlink.parse_link(reply)

    def create_wireguard(self) -> bool:
        """Make a kernel WireGuard device; False where the kernel has none to make. Raises ConfigError."""
        try:
            self._socket.ask(netlink.create_wireguard(self.name))
        except OSError as error:
            if error.errno == errno.EEXIST:
                return True
            if error.errno in {errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT}:
                return False
            raise failure(f"Making the device {self.name}", error) from None
        return True

    def observe(self) -> LinkFacts:
        """Read link, addresses, routes and guards. Raises ApplyError."""
        link = self.find()
        index = None if link is None else link.index
        try:
            routes = [
                route
                for family in (netlink.AF_INET, netlink.AF_INET6)
                for reply in self._socket.ask(netlink.get_routes(family))
                if reply.kind == netlink.NEW_ROUTE and (route := netlink.parse_route(reply)) is not None
            ]
            addresses = frozenset[IPInterface]() if index is None else self._addresses(index)
        except OSError as error:
            raise failure(f"Reading addresses and routes of {self.name}", error) from None
        except netlink.NetlinkError as error:
            raise ApplyError(f"Reading addresses and routes of {self.name}: {error}") from None
        return LinkFacts(
            link,
            addresses=addresses,
            routes=frozenset(
                route.prefix for route in routes if route.index is not None and route.index == index
            ),
            guarded=frozenset(
                route.prefix for route in routes if route.index is None and route.metric == self._metric
            ),
        )

    def apply(self, action: LinkAction) -> None:
        """Perform one action; one that is done already is done. Raises ApplyError, ConfigError."""
        try:
            self._socket.ask(self._request(action))
        except OSError as error:
            removing = isinstance(action, RemoveAddress | RemoveRoute | RemoveGuard)
            if (removing and error.errno in _GONE) or self._stands(action, error):
                return
            raise failure(f"{type(action).__name__} {_subject(action)} on {self.name}", error) from None

    def delete(self) -> None:
        """Remove the interface and its guards, if they are there. Raises ApplyError."""
        facts = self.observe()
        for prefix in facts.guarded:
            self.apply(RemoveGuard(prefix))
        if facts.link is None:
            return
        try:
            self._socket.ask(netlink.delete_link(facts.link.index))
        except OSError as error:
            if error.errno not in _GONE:
                raise failure(f"Removing {self.name}", error) from None

    def _addresses(self, index: int) -> frozenset[IPInterface]:
        found = (
            netlink.parse_address(reply, index)
            for reply in self._socket.ask(netlink.get_addresses(index))
            if reply.kind == netlink.NEW_ADDRESS
        )
        return frozenset(address for address in found if address is not None)

    def _request(self, action: LinkAction) -> netlink.Request:
        match action:
            case SetMtu(mtu):
                return netlink.set_mtu(self._index(), mtu)
            case SetUp():
                return netlink.set_up(self._index())
            case AddAddress(address):
                return netlink.add_address(self._index(), address)
            case RemoveAddress(address):
                return netlink.remove_address(self._index(), address)
            case AddRoute(prefix):
                return netlink.add_route(self._index(), prefix)
            case RemoveRoute(prefix):
                return netlink.remove_route(self._index(), prefix)
            case AddGuard(prefix):
                return netlink.add_guard(prefix, self._metric)
            case RemoveGuard(prefix):
                return netlink.remove_guard(prefix, self._metric)

    def _index(self) -> int:
        link = self.find()
        if link is None:
            raise ApplyError(f"There is no device {self.name}")
        return link.index

    def _stands(self, action: LinkAction, error: OSError) -> bool:
        """Whether EEXIST means that the wanted thing itself is there, not another in its place."""
        if error.errno != errno.EEXIST:
            return False
        match action:
            case AddAddress():
                return True
            case AddRoute(prefix):
                return prefix in self.observe().routes
            case AddGuard(prefix):
                return prefix in self.observe().guarded
            case _:
                return False


def failure(doing: str, error: OSError) -> ApplyError | ConfigError:
    """The error to raise for an errno, by whose move is next."""
    reason = error.strerror or os.strerror(error.errno or 0)
    if error.errno in {errno.EPERM, errno.EACCES}:
        return ConfigError(
            f"{doing}: {reason}. Programming the network needs CAP_NET_ADMIN: run as root, or give the "
            "service AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW (in Kubernetes: capabilities.add "
            "[NET_ADMIN, NET_RAW])"
        )
    if error.errno == errno.EADDRINUSE:
        return PortTaken(
            f"{doing}: another program holds that UDP port; stop it (`ss -ulpn` names it) or choose another "
            "port"
        )
    if error.errno == errno.EEXIST:
        return ApplyError(
            f"{doing}: another route or address holds that place (`ip route`, `ip address` show it)"
        )
    return ApplyError(f"{doing}: {reason}")


def _raise_refusal(reply: netlink.Reply) -> None:
    code, sentence = netlink.error_of(reply)
    if code:
        reason = os.strerror(code)
        raise OSError(code, f"{reason} ({sentence})" if sentence else reason)


def _subject(action: LinkAction) -> str:
    match action:
        case SetMtu(mtu):
            return str(mtu)
        case SetUp():
            return ""
        case AddAddress(address) | RemoveAddress(address):
            return str(address)
        case AddRoute(prefix) | RemoveRoute(prefix) | AddGuard(prefix) | RemoveGuard(prefix):
            return str(prefix)
