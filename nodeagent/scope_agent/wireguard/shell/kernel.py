"""WireGuard in the kernel, through pyroute2: imported only where the kernel carries the device."""

from __future__ import annotations

import asyncio
import errno
import os
from base64 import b64decode, b64encode
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from scope.model import ConfigError, DeviceKind, Endpoint, IPNetwork, PublicKey, Secret
from scope_agent.wireguard import netlink
from scope_agent.wireguard.device import (
    Action,
    AddAddress,
    AddAllowedIps,
    AddGuard,
    AddPeer,
    AddRoute,
    ApplyError,
    CreateDevice,
    DesiredDevice,
    ObservedDevice,
    ObservedPeer,
    RemoveAddress,
    RemoveGuard,
    RemovePeer,
    RemoveRoute,
    SetAllowedIps,
    SetEndpoint,
    SetFwmark,
    SetKeepalive,
    SetListenPort,
    SetMtu,
    SetPrivateKey,
    SetPsk,
    SetUp,
)
from scope_agent.wireguard.shell.links import ANSWER_TIMEOUT, DUMP_ATTEMPTS, Links, failure
from scope_agent.wireguard.shell.pyroute2_wireguard import (
    AsyncWireGuard,
    NetlinkDecodeError,
    NetlinkError,
    genlmsg,
    wgmsg,
)

# One netlink attribute holds at most 65,535 bytes, an allowed IP takes at most 40.
ALLOWED_IPS_PER_CALL = 1000

WireGuardAction = (
    SetPrivateKey
    | SetListenPort
    | SetFwmark
    | AddPeer
    | RemovePeer
    | SetEndpoint
    | SetPsk
    | AddAllowedIps
    | SetAllowedIps
    | SetKeepalive
)

_T = TypeVar("_T")


class KernelDevice:
    """A `scope_agent.wireguard.shell.device.Driver` on kernel WireGuard."""

    kind = DeviceKind.KERNEL

    def __init__(self, name: str, links: Links) -> None:
        self._name = name
        self._links = links
        self._wireguard = _WireGuard(name)
        self._reader = Reader()

    def observe(self) -> ObservedDevice:
        """Read everything. Raises ApplyError, ConfigError."""
        facts = self._links.observe()
        observed = ObservedDevice(self._name)
        if facts.link is not None:
            try:
                observed = self._reader.read(self._name, self._wireguard.info())
                observed = replace(observed, up=facts.link.up, mtu=facts.link.mtu)
            except OSError as error:
                if error.errno != errno.ENODEV:  # it went between the two readings
                    raise failure(f"Reading peers of {self._name}", error) from None
            except netlink.NetlinkError as error:
                raise ApplyError(f"Reading peers of {self._name}: {error}") from None
        return replace(observed, addresses=facts.addresses, routes=facts.routes, guarded=facts.guarded)

    def apply(self, action: Action) -> None:
        """Perform one action. Raises ApplyError, ConfigError."""
        match action:
            case CreateDevice():
                if not self._links.create_wireguard():
                    raise ConfigError("The kernel no longer offers WireGuard: load the module `wireguard`")
            case (
                SetMtu()
                | SetUp()
                | AddAddress()
                | RemoveAddress()
                | AddRoute()
                | RemoveRoute()
                | AddGuard()
                | RemoveGuard()
            ):
                self._links.apply(action)
            case _:
                try:
                    for call in calls_for(action):
                        self._wireguard.set(call)
                except OSError as error:
                    raise failure(f"{type(action).__name__} on {self._name}", error) from None

    def keep(self, desired: DesiredDevice) -> None:
        """Nothing: the kernel does not crash and come back empty."""

    def delete(self) -> None:
        """Remove the device with its sessions, and its guards. Raises ApplyError."""
        self._links.delete()

    def close(self) -> None:
        """Give the descriptors back; the device stays."""
        self._wireguard.close()
        self._links.close()


class _WireGuard:
    """pyroute2's socket and the event loop that it lives on, both opened at the first call.

    The network namespace is that of the thread which makes that call.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.Runner(debug=False)  # asyncio's debugging logs what calls returned: messages
        self._socket: AsyncWireGuard | None = None

    def info(self) -> list[Any]:
        """All messages of a dump. Raises OSError with the kernel's errno, ApplyError."""

        async def dump(socket: AsyncWireGuard) -> list[Any]:
            return [message async for message in await socket.info(self._name)]

        for _ in range(DUMP_ATTEMPTS):
            messages = self._ask(dump)
            if not any(message["header"]["flags"] & netlink.DUMP_INTERRUPTED for message in messages):
                return messages
        raise ApplyError(f"The peers of {self._name} change faster than they can be read")

    def set(self, call: dict[str, Any]) -> None:
        """Make one change. Raises OSError with the kernel's errno, ApplyError."""
        self._ask(lambda socket: socket.set(self._name, **call))

    def close(self) -> None:
        """Give the descriptors back."""
        self._hang_up()
        self._loop.close()

    def _ask(self, request: Callable[[AsyncWireGuard], Awaitable[_T]]) -> _T:
        try:
            return self._loop.run(self._talk(request))
        except NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from None
        except NetlinkDecodeError as error:
            raise ApplyError(f"The kernel's answer cannot be read: {error.exception}") from None
        except TimeoutError:
            raise ApplyError(f"The kernel did not answer within {ANSWER_TIMEOUT:.0f} s") from None

    async def _talk(self, request: Callable[[AsyncWireGuard], Awaitable[_T]]) -> _T:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                if self._socket is None:
                    self._socket = AsyncWireGuard()
                    await self._socket.setup_endpoint()
                    self._socket.register_policy(self._socket.prid, DumpMessage)
                return await request(self._socket)
        except BaseException:
            self._hang_up()  # what is left of a failed conversation could pass for the next answer
            raise

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


# --- actions to pyroute2's arguments ------------------------------------------------------------------------


def calls_for(action: WireGuardAction) -> list[dict[str, Any]]:
    """The arguments of one or more calls of pyroute2's `set`. They hold keys: not to be logged."""
    match action:
        case SetPrivateKey(private_key):
            return [{"private_key": b64encode(private_key.raw)}]
        case SetListenPort(port):
            return [{"listen_port": port}]
        case SetFwmark(mark):
            return [{"fwmark": mark}]
        case RemovePeer(key):
            return [{"peer": {"public_key": b64encode(key.raw), "remove": True}}]
        case AddPeer(key, endpoint, allowed_ips, keepalive, psk):
            facts: dict[str, Any] = {"persistent_keepalive": keepalive}
            if endpoint is not None:
                facts |= _endpoint(endpoint)
            if psk is not None:
                facts["preshared_key"] = b64encode(psk.raw)
            first, *rest = _chunks(allowed_ips)
            whole = {"public_key": b64encode(key.raw), "replace_allowed_ips": True, "allowed_ips": first}
            return [{"peer": whole | facts}, *(_update(key, allowed_ips=chunk) for chunk in rest)]
        case SetEndpoint(key, endpoint):
            return [_update(key, **_endpoint(endpoint))]
        case SetPsk(key, psk):
            return [_update(key, preshared_key=b64encode(psk.raw))]
        case AddAllowedIps(key, allowed_ips):
            return [_update(key, allowed_ips=chunk) for chunk in _chunks(allowed_ips)]
        case SetAllowedIps(key, allowed_ips):
            first, *rest = _chunks(allowed_ips)
            return [
                _update(key, allowed_ips=first, replace_allowed_ips=True),
                *(_update(key, allowed_ips=chunk) for chunk in rest),
            ]
        case SetKeepalive(key, keepalive):
            return [_update(key, persistent_keepalive=keepalive)]


def _update(key: PublicKey, **facts: Any) -> dict[str, Any]:
    """A change to a peer that is nothing where the peer is gone."""
    return {"peer": {"public_key": b64encode(key.raw), "update_only": True, **facts}}


def _endpoint(endpoint: Endpoint) -> dict[str, Any]:
    return {"endpoint_addr": str(endpoint.address), "endpoint_port": endpoint.port}


def _chunks(prefixes: frozenset[IPNetwork]) -> list[list[str]]:
    """At least one chunk, which may be empty: replacing by nothing is a call, too."""
    every = [str(prefix) for prefix in prefixes]
    starts = range(0, max(len(every), 1), ALLOWED_IPS_PER_CALL)
    return [every[start : start + ALLOWED_IPS_PER_CALL] for start in starts]


# --- pyroute2's messages to an observation ------------------------------------------------------------------


class DumpMessage(genlmsg):  # type: ignore[misc]
    """pyroute2's WireGuard message with its peers left as bytes: to read them is nine tenths of the work."""

    prefix = wgmsg.prefix
    parse_wg_key = wgmsg.parse_wg_key
    nla_map = tuple((name, "cdata" if name == "WGDEVICE_A_PEERS" else kind) for name, kind in wgmsg.nla_map)


class Reader:
    """Reads dumps. Peers that did not change from one to the next are not read again."""

    def __init__(self) -> None:
        self._known: dict[bytes, ObservedPeer] = {}

    def read(self, name: str, messages: Iterable[Any]) -> ObservedDevice:
        """Read a device out of many DumpMessages; a peer may be split over two. Raises NetlinkError."""
        observed = ObservedDevice(name=name, exists=True)
        seen: dict[bytes, ObservedPeer] = {}
        peers: dict[PublicKey, ObservedPeer] = {}
        for message in messages:
            if (port := message.get_attr("WGDEVICE_A_LISTEN_PORT")) is not None:
                public_key = message.get_attr("WGDEVICE_A_PUBLIC_KEY")
                observed = replace(
                    observed,
                    public_key=None if public_key is None else PublicKey(b64decode(public_key)),
                    listen_port=port,
                    fwmark=message.get_attr("WGDEVICE_A_FWMARK", 0),
                )
            for _, data in netlink.attributes(message.get_attr("WGDEVICE_A_PEERS", b"")):
                peer = seen[data] = self._known.get(data) or _read_peer(data)
                first = peers.get(peer.key)
                if first is not None:  # the rest of a peer carries its key and further allowed IPs only
                    peer = replace(first, allowed_ips=first.allowed_ips | peer.allowed_ips)
                peers[peer.key] = peer
        self._known = seen
        return replace(observed, peers=peers)


def _read_peer(data: bytes) -> ObservedPeer:
    entry = wgmsg.wgdevice_peer(netlink.attribute(0, data))
    entry.decode()
    endpoint = entry.get_attr("WGPEER_A_ENDPOINT")
    psk = b64decode(entry.get_attr("WGPEER_A_PRESHARED_KEY", b""))
    handshake = entry.get_attr("WGPEER_A_LAST_HANDSHAKE_TIME", {"tv_sec": 0})
    return ObservedPeer(
        key=PublicKey(b64decode(entry.get_attr("WGPEER_A_PUBLIC_KEY"))),
        endpoint=None if endpoint is None else _read_endpoint(endpoint["addr"], endpoint["port"]),
        allowed_ips=frozenset(
            _read_prefix(allowed["addr"]) for allowed in entry.get_attr("WGPEER_A_ALLOWEDIPS", ())
        ),
        keepalive=entry.get_attr("WGPEER_A_PERSISTENT_KEEPALIVE_INTERVAL", 0),
        psk=Secret(psk) if any(psk) else None,  # the kernel says "none" by zeros
        rx=entry.get_attr("WGPEER_A_RX_BYTES", 0),
        tx=entry.get_attr("WGPEER_A_TX_BYTES", 0),
        last_handshake=handshake["tv_sec"] + handshake["tv_nsec"] / 1e9 if handshake["tv_sec"] else None,
    )


@lru_cache(maxsize=4096)  # what changes of a peer is its counters, as a rule
def _read_endpoint(address: str, port: int) -> Endpoint | None:
    return Endpoint(ip_address(address), port) if port else None


@lru_cache(maxsize=16384)
def _read_prefix(text: str) -> IPNetwork:
    return ip_network(text)
