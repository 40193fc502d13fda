"""Reads the machine's interfaces, and again on each netlink event, in a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from scope_agent.inputs import InterfacesChanged
from scope_agent.underlay.core import Interface, underlay_of
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.interfaces import InterfaceFacts, Interfaces

log = logging.getLogger(__name__)

BURST = 0.02  # a dump per event would cost more than it tells while a cable is plugged in
RETRY = 1.0  # after the kernel answered with an error


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
        interfaces = Interfaces()
        last: InterfacesChanged | None = None
        while not self._stopping:
            try:
                found = underlay_of(map(_interface, interfaces.read()), own=self._own)
            except ApplyError as error:
                log.warning("interfaces.unreadable error=%s", error)
                time.sleep(RETRY)
                continue
            if found != last:
                last = found
                self._report(found)
            interfaces.wait()
            time.sleep(BURST)

    def _report(self, found: InterfacesChanged) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed, found)


def _interface(facts: InterfaceFacts) -> Interface:
    link = facts.link
    return Interface(name=link.name, kind=link.kind, up=link.up, mtu=link.mtu, addresses=facts.addresses)
