"""Reads the machine's interfaces, and again on each netlink event, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from ipaddress import ip_interface

from scope_agent.inputs import InterfacesChanged
from scope_agent.underlay.core import Interface, underlay_of

log = logging.getLogger(__name__)

_UP = 0x1
BURST = 0.02  # a dump per event would cost more than it tells while a cable is plugged in
RETRY = 1.0  # after netlink lost events or answered with an error


class InterfaceWatch:
    """Calls `changed` in `loop` with the whole underlay, first at once and then whenever it differs."""

    def __init__(self, own: str, changed: Callable[[InterfacesChanged], None]) -> None:
        self._own = own
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="interfaces", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Report nothing more; the thread ends with the process."""
        self._stopping = True

    def _run(self) -> None:
        from pyroute2 import IPRoute  # 100 ms that the first ping need not wait for
        from pyroute2.netlink import rtnl

        groups = rtnl.RTMGRP_LINK | rtnl.RTMGRP_IPV4_IFADDR | rtnl.RTMGRP_IPV6_IFADDR
        last: InterfacesChanged | None = None
        while not self._stopping:
            try:
                with IPRoute() as events, IPRoute() as reader:
                    events.bind(groups)
                    while not self._stopping:
                        found = underlay_of(_read(reader), own=self._own)
                        if found != last:
                            last = found
                            self._report(found)
                        for _ in events.get():
                            pass
                        time.sleep(BURST)
            except Exception as error:  # noqa: BLE001 - pyroute2 raises its own kinds, and OSError; all mean "ask again"
                log.warning("interfaces.unreadable error=%s", error)
                time.sleep(RETRY)

    def _report(self, found: InterfacesChanged) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed, found)


def _read(reader: object) -> list[Interface]:
    addresses: dict[int, list[str]] = {}
    for message in reader.get_addr():  # type: ignore[attr-defined]
        text = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
        if text:
            addresses.setdefault(message["index"], []).append(f"{text}/{message['prefixlen']}")
    return [
        Interface(
            name=link.get("IFLA_IFNAME"),
            kind=(link.get(("linkinfo", "kind")) or ""),
            up=bool(link["flags"] & _UP),
            mtu=link.get("IFLA_MTU") or 1500,
            addresses=frozenset(ip_interface(text) for text in addresses.get(link["index"], ())),
        )
        for link in reader.get_links()  # type: ignore[attr-defined]
    ]
