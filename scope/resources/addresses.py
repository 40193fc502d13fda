"""Endpoints, addresses and prefixes: readers of single values, as in `values`."""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network

from scope.model import Endpoint, Family, IPAddress, IPInterface, IPNetwork
from scope.resources.limits import (
    IPV4_LENGTHS,
    IPV4_RANGES,
    IPV6_LENGTHS,
    IPV6_RANGE,
    MAX_CIDR,
    MAX_ENDPOINT,
    MIN_ROUTE_LENGTH,
)
from scope.resources.problems import Refused, refusal, show
from scope.resources.values import read_text

# Stands in for an endpoint that is missing: the document is refused, so it never leaves this package.
NO_ENDPOINT = Endpoint(ip_address("0.0.0.0"), 1)  # noqa: S104
NO_PREFIX: IPNetwork = IPv4Network("0.0.0.0/32")  # likewise

_ENDPOINT_FORM = "ADDRESS:PORT, IPv6 as [ADDRESS]:PORT, port 1 to 65535"


def read_endpoint(value: object) -> Endpoint:
    text = _unzoned(value, MAX_ENDPOINT, _ENDPOINT_FORM)
    if ":0" in text[text.rfind(":") :]:
        raise refusal(value, _ENDPOINT_FORM, "a port has no leading zero")
    try:
        endpoint = _parsed_endpoint(text)
    except ValueError as error:
        raise refusal(value, _ENDPOINT_FORM, str(error)) from None
    if endpoint.family is Family.IPV4 and text.startswith("["):
        raise refusal(value, _ENDPOINT_FORM, f'did you mean "{endpoint}"?')
    return endpoint


# Every peer's links name the endpoints of the same others: a mesh has far fewer endpoints than links.
@lru_cache(maxsize=16384)
def _parsed_endpoint(text: str) -> Endpoint:
    return Endpoint.parse(text)


_BROADCAST = ip_address("255.255.255.255")


def read_static_endpoint(value: object) -> Endpoint:
    endpoint = read_endpoint(value)
    address = endpoint.address
    if address.is_unspecified or address.is_multicast or address.is_loopback or address == _BROADCAST:
        raise refusal(value, "an address that other peers can send to")
    return endpoint


def read_address(value: object) -> IPAddress:
    allowed = "an IPv4 or IPv6 address"
    try:
        return _unmapped(ip_address(_unzoned(value, MAX_CIDR, allowed)))
    except ValueError:
        raise refusal(value, allowed) from None


def read_unicast_address(value: object) -> IPAddress:
    """An address that other machines can send to, beyond its own link."""
    address = read_address(value)
    elsewhere = address.is_unspecified or address.is_loopback or address.is_link_local
    if elsewhere or address.is_multicast or address == _BROADCAST:
        raise refusal(value, "an address that other machines can send to")
    return address


def read_interface(value: object) -> IPInterface:
    allowed = "an address with the length of its mesh's prefix, as 100.64.0.7/16"
    text = _unzoned(value, MAX_CIDR, allowed)
    if not _LENGTH.search(text):
        raise refusal(value, allowed, "its length is missing")
    try:
        interface = ip_interface(text)
        _unmapped(interface.ip)
    except ValueError:
        raise refusal(value, allowed) from None
    return interface


def _prefix(value: object) -> IPNetwork:
    allowed = "a prefix, as 100.64.0.0/16 or fd5c:be1:7a30::/64"
    text = _unzoned(value, MAX_CIDR, allowed)
    if not _LENGTH.search(text):
        raise refusal(value, allowed, "its length is missing")
    try:
        network = ip_network(text, strict=False)
        _unmapped(network.network_address)
    except ValueError as error:
        raise refusal(value, allowed, str(error)) from None
    if ip_interface(text).ip != network.network_address:
        raise Refused(f"{show(value)} has bits set beyond its length", str(network))
    return network


def read_mesh_ipv4(value: object) -> IPv4Network:
    network = _prefix(value)
    allowed = "a prefix inside " + ", ".join(map(str, IPV4_RANGES))
    if not isinstance(network, IPv4Network) or not any(network.subnet_of(known) for known in IPV4_RANGES):
        raise refusal(value, allowed)
    if network.prefixlen not in IPV4_LENGTHS:
        raise refusal(value, f"a length from /{IPV4_LENGTHS[0]} to /{IPV4_LENGTHS[-1]}")
    return network


def read_mesh_ipv6(value: object) -> IPv6Network:
    network = _prefix(value)
    if not isinstance(network, IPv6Network) or not network.subnet_of(IPV6_RANGE):
        raise refusal(value, f"a unique local prefix inside {IPV6_RANGE} (RFC 4193)")
    if network.prefixlen not in IPV6_LENGTHS:
        raise refusal(value, f"a length from /{IPV6_LENGTHS[0]} to /{IPV6_LENGTHS[-1]}")
    return network


def read_route(value: object) -> IPNetwork:
    network = _prefix(value)
    shortest = MIN_ROUTE_LENGTH[network.version]
    if network.prefixlen < shortest:
        raise refusal(value, f"a length of /{shortest} or more", "a wider one would swallow the underlay")
    if network.is_multicast or network.is_loopback or network.is_link_local:
        raise refusal(value, "a prefix of unicast addresses that can be routed")
    return network


def parse_route(value: object) -> IPNetwork | None:
    """A prefix that a peer may offer, as somebody else writes it; None for any other."""
    try:
        return read_route(value)
    except Refused:
        return None


# A length is written as a number, not as a netmask.
_LENGTH = re.compile(r"/(?:0|[1-9][0-9]{0,2})\Z")


def _unmapped(address: IPAddress) -> IPAddress:
    """The address, unless it is IPv4 written as IPv6, a second spelling of it. Raises ValueError."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    if mapped is not None:
        raise ValueError(f"write {mapped}")
    return address


def _unzoned(value: object, limit: int, allowed: str) -> str:
    """Text without a zone: `%eth0` means something on one machine only."""
    text = read_text(value, limit, allowed)
    if "%" in text:
        raise refusal(value, allowed, "a zone (%) means nothing to other machines")
    return text
