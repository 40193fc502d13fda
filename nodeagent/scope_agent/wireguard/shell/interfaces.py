"""The machine's network interfaces, and a way to wait until they change."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from scope.model import IPInterface
from scope_agent.wireguard import netlink
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.links import NetlinkSocket, failure

_LINK, _IPV4_ADDRESS, _IPV6_ADDRESS = 0x1, 0x10, 0x100  # RTMGRP_* of linux/rtnetlink.h
_EVENT_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class InterfaceFacts:
    """One interface with its addresses, link-local ones left out."""

    link: netlink.Link
    addresses: frozenset[IPInterface]


class Interfaces:
    """Reads all interfaces of the creating thread's network namespace. Every call may block.

    Events queue from the creation on, so that nothing is missed between `read` and `wait`.
    """

    def __init__(self) -> None:
        self._reader = NetlinkSocket()
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._events = socket.socket(socket.AF_NETLINK, flags, socket.NETLINK_ROUTE)
        self._events.bind((0, _LINK | _IPV4_ADDRESS | _IPV6_ADDRESS))

    def read(self) -> list[InterfaceFacts]:
        """Every interface as it is now. Raises ApplyError."""
        try:
            links = [netlink.parse_link(reply) for reply in self._reader.ask(netlink.get_links())]
            found = [netlink.parse_any_address(reply) for reply in self._reader.ask(netlink.get_addresses(0))]
        except OSError as error:
            raise failure("Reading the interfaces", error) from None
        except netlink.NetlinkError as error:
            raise ApplyError(f"Reading the interfaces: {error}") from None
        addresses: dict[int, set[IPInterface]] = {}
        for entry in found:
            if entry is not None:
                addresses.setdefault(entry[0], set()).add(entry[1])
        return [InterfaceFacts(link, frozenset(addresses.get(link.index, ()))) for link in links]

    def wait(self, seconds: float | None = None) -> bool:
        """True once something changed (all events so far are taken), False after `seconds` without."""
        self._events.settimeout(seconds)
        try:
            self._receive()
        except TimeoutError:
            return False
        self._events.settimeout(0)
        try:
            while True:
                self._receive()
        except BlockingIOError:
            return True

    def close(self) -> None:
        """Give the descriptors back."""
        self._reader.close()
        self._events.close()

    def _receive(self) -> None:
        try:
            self._events.recv(_EVENT_BYTES)
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:  # ENOBUFS: more events than the buffer holds; that something changed is all we ask
            return
