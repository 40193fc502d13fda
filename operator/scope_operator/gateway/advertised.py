"""Where peers find this registry: the hosts it advertises, and the addresses that these stand for now."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from scope.model import ConfigError, Endpoint, IPAddress, PublicKey, Reflector

log = logging.getLogger(__name__)

MAX_ENDPOINTS = 16  # of a Reflector: two ports on a few addresses, with room
# Addresses for documentation (RFC 5737, RFC 3849): asking the kernel for the way there sends nothing.
ELSEWHERE = ((socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "192.0.2.1"))


@dataclass(frozen=True, slots=True)
class Advertised:
    """A host, by name or address, and the gateway's TCP port there (None: the one it listens on)."""

    host: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Advertised:
        """Read `HOST`, `HOST:PORT`, `2001:db8::1` or `[2001:db8::1]:PORT`. Raises ValueError."""
        try:
            return cls(str(ip_address(text)))
        except ValueError:
            pass
        host, colon, port = text.rpartition(":")
        if not colon or text.endswith("]"):
            host, port = text, ""
        if host.startswith("[") and host.endswith("]"):
            host = str(IPv6Address(host[1:-1]))
        elif not host or not all(c.isascii() and (c.isalnum() or c in "-._") for c in host):
            raise ValueError("a host is a name or an address, IPv6 with a port as [ADDRESS]:PORT")
        if not colon or not port:
            return cls(host)
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise ValueError("a port is 1 to 65535")
        return cls(host, int(port))

    def url(self, port: int) -> str:
        """The gateway's URL here; `port` is what it listens on."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:{self.port or port}"


def own_addresses() -> tuple[Advertised, ...]:
    """The addresses from which this machine sends to elsewhere. Raises ConfigError when there is none."""
    found = []
    for family, elsewhere in ELSEWHERE:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((elsewhere, 9))
                found.append(Advertised(probe.getsockname()[0]))
            except OSError:
                continue
    if not found:
        raise ConfigError(
            "this machine has no route to elsewhere: say where peers find it with --advertise HOST"
        )
    # Join strings name the first: IPv4 is what most of those who join have.
    return tuple(reversed(found))


async def resolve(hosts: Sequence[Advertised]) -> tuple[IPAddress, ...]:
    """The addresses of all hosts, each once; a name that does not resolve now is logged and left out."""
    loop = asyncio.get_running_loop()
    addresses: dict[IPAddress, None] = {}
    for host in hosts:
        try:
            found = await loop.getaddrinfo(host.host, None, type=socket.SOCK_DGRAM)
        except OSError as error:
            log.warning("advertised.unresolved host=%s reason=%s", host.host, error)
            continue
        for *_, address in found:
            addresses[ip_address(str(address[0]).partition("%")[0])] = None
    return tuple(addresses)


def reflector_at(
    probe_key: PublicKey, addresses: Iterable[IPAddress], listening: Iterable[Endpoint]
) -> Reflector:
    """Every advertised address with every UDP port that is listened on in its family."""
    listening = tuple(listening)
    endpoints: dict[Endpoint, None] = {}
    for address in addresses:
        for bound in listening:
            if bound.address.version == address.version:
                endpoints[Endpoint(address, bound.port)] = None
    return Reflector(probe_key, tuple(endpoints)[:MAX_ENDPOINTS])
