"""WireGuard in the kernel, over generic netlink."""

from __future__ import annotations

import errno
from dataclasses import replace

from scope.model import ConfigError, DeviceKind
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
from scope_agent.wireguard.shell.links import Links, NetlinkSocket, failure

NETLINK_GENERIC = 16

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


class KernelDevice:
    """A `scope_agent.wireguard.shell.device.Driver` on kernel WireGuard."""

    kind = DeviceKind.KERNEL

    def __init__(self, name: str, links: Links) -> None:
        self._name = name
        self._links = links
        self._socket = NetlinkSocket(NETLINK_GENERIC)
        self._family: netlink.WireGuardFamily | None = None

    def observe(self) -> ObservedDevice:
        """Read everything. Raises ApplyError, ConfigError."""
        facts = self._links.observe()
        observed = ObservedDevice(self._name)
        if facts.link is not None:
            try:
                dump = self._socket.ask(self._wireguard().get_device(self._name))
                observed = netlink.parse_wireguard(dump, self._name)
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
                    for request in self._requests(action):
                        self._socket.ask(request)
                except OSError as error:
                    raise failure(f"{type(action).__name__} on {self._name}", error) from None

    def keep(self, desired: DesiredDevice) -> None:
        """Nothing: the kernel does not crash and come back empty."""

    def delete(self) -> None:
        """Remove the device with its sessions, and its guards. Raises ApplyError."""
        self._links.delete()

    def close(self) -> None:
        """Give the descriptors back; the device stays."""
        self._socket.close()
        self._links.close()

    def _requests(self, action: WireGuardAction) -> list[netlink.Request]:
        family, name = self._wireguard(), self._name
        match action:
            case SetPrivateKey(private_key):
                return [family.set_private_key(name, private_key)]
            case SetListenPort(port):
                return [family.set_listen_port(name, port)]
            case SetFwmark(mark):
                return [family.set_fwmark(name, mark)]
            case RemovePeer(key):
                return [family.remove_peer(name, key)]
            case AddPeer(key, endpoint, allowed_ips, keepalive, psk):
                return family.add_peer(
                    name, key, endpoint=endpoint, allowed_ips=allowed_ips, keepalive=keepalive, psk=psk
                )
            case SetEndpoint(key, endpoint):
                return [family.set_endpoint(name, key, endpoint)]
            case SetPsk(key, psk):
                return [family.set_psk(name, key, psk)]
            case AddAllowedIps(key, allowed_ips):
                return family.set_allowed_ips(name, key, allowed_ips, replacing=False)
            case SetAllowedIps(key, allowed_ips):
                return family.set_allowed_ips(name, key, allowed_ips, replacing=True)
            case SetKeepalive(key, keepalive):
                return [family.set_keepalive(name, key, keepalive)]

    def _wireguard(self) -> netlink.WireGuardFamily:
        if self._family is None:
            try:
                (reply,) = self._socket.ask(netlink.get_wireguard_family())
            except OSError as error:
                raise failure("Asking the kernel for WireGuard", error) from None
            self._family = netlink.WireGuardFamily(netlink.parse_family(reply))
        return self._family
