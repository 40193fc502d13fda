"""Holding a peer's WireGuard endpoint for a moment, while a pair changes between two paths that both work.

WireGuard sends to where the last packet came from, so packets under way on the one path lead it back there.
While a hold lasts they look as if they came from the endpoint that is held. Where both paths are of one
address family and lead to one address of ours, the packet filter itself writes the other source, whatever
the rate. It cannot make an IPv4 packet an IPv6 one: then it diverts the datagram to a socket of ours, and we
send it to WireGuard over loopback as if from the endpoint held. An ordinary socket could not have that one,
since its port may be WireGuard's own, so it is a raw one; and a transparent one, since the address is the
peer's.

A hold ends by itself, also when this process is gone. Where it cannot be set, for want of `nft`,
CAP_NET_ADMIN or CAP_NET_RAW, paths change as they would without it: no packet is lost, but the ends may take
longer to agree.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import ip_address

from scope.model import Endpoint, Family, IPAddress, PublicKey, endpoint_at
from scope_agent.wireguard.device import HoldEndpoint
from scope_agent.wireguard.hold_rules import Divert, Relabel, Rule, delete, load
from scope_agent.wireguard.shell.nft import NftError, run_nft

log = logging.getLogger(__name__)

# What comes over the old path while this process is busy elsewhere; the kernel counts 2304 bytes a datagram.
BUFFER_BYTES = 8 << 20
READ_AT_ONCE = 256  # datagrams a turn: probes and timers wait for no more than some milliseconds
TIDY_AFTER = 0.5  # after its end a hold's last datagrams have been read
_DATAGRAM_BYTES = 65535
_SO_RCVBUFFORCE = 33
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_IPV6_CHECKSUM, _UDP_CHECKSUM_OFFSET, _UDP_HEADER = 7, 6, 8


class _BackIn:
    """Speaks to our WireGuard at `own` and `port` as if from `shown`."""

    def __init__(self, shown: Endpoint, own: IPAddress, port: int) -> None:
        """Raises OSError."""
        self._ports = struct.pack("!HH", shown.port, port)
        self._socket = _open(shown.family, socket.SOCK_RAW)
        try:
            if shown.family is Family.IPV4:
                self._socket.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
            else:
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_CHECKSUM, _UDP_CHECKSUM_OFFSET)
            self._socket.bind((str(shown.address), 0))  # so nothing arrives here: no datagram is for the peer
            self._socket.connect((str(own), 0))
        except OSError:
            self._socket.close()
            raise

    def send(self, data: bytes) -> None:
        """Send one datagram. Raises OSError."""
        # No checksum: IPv4 allows that, and for IPv6 the kernel fills it in.
        self._socket.send(self._ports + struct.pack("!HH", _UDP_HEADER + len(data), 0) + data)

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()


@dataclass(slots=True)
class _Held:
    """One peer's hold."""

    hold: HoldEndpoint
    until: float
    own: IPAddress  # where the peer's datagrams arrive by the path that is held
    back_in: _BackIn


class EndpointHolds:
    """All holds of one device."""

    def __init__(self) -> None:
        self._held: dict[PublicKey, _Held] = {}
        self._ways: dict[Endpoint, _BackIn] = {}  # by source: how a diverted datagram comes back in
        self._diverts: dict[Family, socket.socket] = {}
        self._port = 0  # WireGuard's, with which the table was loaded; 0 without a table
        self._lock = asyncio.Lock()
        self._tidying: asyncio.Task[None] | None = None
        self._is_told = False

    async def set(self, hold: HoldEndpoint, *, port: int) -> None:
        """Hold an endpoint, in place of the peer's last hold; `port` is WireGuard's. Never fails."""
        async with self._lock:
            try:
                await self._set(hold, port)
            except (NftError, OSError) as error:
                self._tell(error)
        if self._tidying is None:
            self._tidying = asyncio.ensure_future(self._tidy())

    def close(self) -> None:
        """End all holds and give sockets back. Blocks while a hold lasts, for as long as `nft` takes."""
        if self._tidying is not None:
            self._tidying.cancel()
        if self._port:
            with contextlib.suppress(NftError):
                run_nft(delete(self._port))
            for each in self._diverts.values():
                self._put_back(each)
        for held in self._held.values():
            held.back_in.close()
        for each in self._diverts.values():
            asyncio.get_running_loop().remove_reader(each)
            each.close()
        self._held.clear()
        self._ways.clear()
        self._diverts.clear()

    async def _set(self, hold: HoldEndpoint, port: int) -> None:
        own = _own_address_towards(hold.endpoint)
        last = self._held.get(hold.key)
        if last is not None and (last.hold.endpoint, last.own, self._port) == (hold.endpoint, own, port):
            back_in = last.back_in
        else:
            back_in = _BackIn(hold.endpoint, own, port)
        held = _Held(hold, time.monotonic() + hold.seconds, own, back_in)
        # The new rules divert before we hear that they are loaded, and the last hold's until then: each must
        # find its own way. What the last ones diverted was of other endpoints.
        was = last.hold.against if last is not None else frozenset()
        self._ways |= dict.fromkeys(hold.against - was, back_in)
        try:
            for seen in hold.against:
                self._open_divert(seen.family)
            await self._load({**self._held, hold.key: held}, port)
        except (NftError, OSError):
            if last is None or last.back_in is not back_in:
                self._close_way(back_in)
            raise
        self._held[hold.key] = held
        self._ways |= dict.fromkeys((*hold.against, hold.endpoint, *was), back_in)
        if last is not None and last.back_in is not back_in:
            self._close_way(last.back_in)

    def _close_way(self, back_in: _BackIn) -> None:
        self._ways = {seen: way for seen, way in self._ways.items() if way is not back_in}
        back_in.close()

    async def _load(self, holds: dict[PublicKey, _Held], port: int) -> None:
        now = time.monotonic()
        rules: list[Rule] = []
        for held in holds.values():
            left, shown = held.until - now, held.hold.endpoint
            for seen in held.hold.against if left > 0.0 else ():
                if seen.family is shown.family:
                    rules.append(Relabel(seen, shown, held.own, left))
                rules.append(Divert(seen, self._diverts[seen.family].getsockname()[1], left))
        moved = delete(self._port) if self._port not in (0, port) else ""
        await asyncio.to_thread(run_nft, moved + (load(port, rules) if rules else delete(port)))
        self._port = port if rules else 0

    async def _tidy(self) -> None:
        """Forget holds that are over, and take the table away with the last of them."""
        while self._held:
            due = min(held.until for held in self._held.values()) + TIDY_AFTER
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            async with self._lock:
                now = time.monotonic()
                for key in [k for k, held in self._held.items() if now >= held.until + TIDY_AFTER]:
                    self._close_way(self._held.pop(key).back_in)
                if not self._held:
                    with contextlib.suppress(NftError):  # its elements have expired: it does nothing
                        await self._load({}, self._port)
        self._tidying = None

    # --- what the packet filter cannot turn itself ---------------------------------------------------------

    def _open_divert(self, family: Family) -> None:
        """Open the socket that diverted datagrams come to; it stays open."""
        if family in self._diverts:
            return
        opened = _open(family)
        _widen(opened)
        if family is Family.IPV6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        opened.bind(("", 0))
        asyncio.get_running_loop().add_reader(opened, self._put_back, opened)
        self._diverts[family] = opened

    def _put_back(self, divert: socket.socket) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                data, (host, port, *_) = divert.recvfrom(_DATAGRAM_BYTES)
            except BlockingIOError:
                return
            way = self._ways.get(endpoint_at(host, port)) if port else None
            if way is None:
                continue
            try:
                way.send(data)
            except OSError as error:
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        if not self._is_told:
            self._is_told = True
            log.warning("hold.unavailable error=%s; two ends may take longer to agree on a new path", error)


def _open(family: Family, kind: int = socket.SOCK_DGRAM) -> socket.socket:
    number = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    opened = socket.socket(number, kind | socket.SOCK_CLOEXEC, socket.IPPROTO_UDP)
    opened.setblocking(False)
    return opened


def _own_address_towards(endpoint: Endpoint) -> IPAddress:
    """The address of ours that routing chooses, and so the one that the peer's datagrams arrive at.

    Raises OSError.
    """
    with _open(endpoint.family) as trial:
        trial.connect((str(endpoint.address), endpoint.port))
        return ip_address(trial.getsockname()[0].partition("%")[0])


def _widen(target: socket.socket) -> None:
    try:
        target.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    except PermissionError:  # what the system allows anyone
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
