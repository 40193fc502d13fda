"""Which endpoints may be candidates, and which of two is better.

A peer can claim any endpoint, so every claim passes `refusal` and `misplacement` before a datagram is sent to
it. Ranking is by ordered tuples, never by weights: private before public, the preferred family before the
other one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network

from scope.model import Candidate, CandidateKind, Endpoint, Family, IPAddress, IPInterface, IPNetwork, Peer

# Prefixes that stand for one site: an endpoint in one of them is reached, if at all, without a NAT between.
_PRIVATE: tuple[IPNetwork, ...] = (
    IPv4Network("10.0.0.0/8"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv4Network("100.64.0.0/10"),
    IPv6Network("fc00::/7"),
)
# Between a carrier and its customers (RFC 6598): reached only from inside, and other overlays number from it.
_CARRIER = IPv4Network("100.64.0.0/10")
# Addresses of which is remembered what they are: the same few of each peer are asked about again and again.
REMEMBERED = 4096
MAX_PUBLISHED = 16  # host addresses of a multi-homed server, reflexive and static ones, with room


def contains(networks: Iterable[IPNetwork], address: IPAddress) -> bool:
    """Whether any of `networks` holds `address`; families never match each other."""
    return any(network.version == address.version and address in network for network in networks)


def refusal(endpoint: Endpoint, *, mesh: Iterable[IPNetwork], own: frozenset[Endpoint]) -> str | None:
    """Why `endpoint` can never be a candidate for another peer, in words; None when it may be one."""
    address = endpoint.address
    if (unfit := _unfitness(address)) is not None:
        return unfit
    if contains(mesh, address):
        return "inside the mesh's own prefix"
    if endpoint in own:
        return "our own endpoint"
    return None


@lru_cache(REMEMBERED)
def _unfitness(address: IPAddress) -> str | None:
    """Why no datagram from elsewhere can be meant for the address, in words."""
    if address.is_loopback:
        return "loopback"
    if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
        return "not a unicast address"
    if address.is_link_local:
        return "link-local without a scope"
    return None


def misplacement(
    endpoint: Endpoint, *, interfaces: Collection[IPInterface], routed: Iterable[IPNetwork]
) -> str | None:
    """Why `endpoint` cannot be reached from a machine with these underlay interfaces; None when it may be.

    `routed`: prefixes that the mesh carries to its peers, pods among them.
    """
    address = endpoint.address
    networks = [interface.network for interface in interfaces]
    if contains([_CARRIER], address) and not any(contains([_CARRIER], i.ip) for i in interfaces):
        return "in a carrier's shared range, and no interface here is"
    if contains(routed, address) and not contains(networks, address):
        return "inside a prefix that the mesh itself routes"
    return None


@lru_cache(REMEMBERED)
def is_private(address: IPAddress) -> bool:
    """Whether the address is of a site's own range (RFC 1918, RFC 4193) or a carrier's (RFC 6598)."""
    return contains(_PRIVATE, address)


def claims(peer: Peer) -> frozenset[Endpoint]:
    """Where a peer says to be, and its user."""
    published = peer.report.endpoints if peer.report is not None else ()
    return frozenset(candidate.endpoint for candidate in published) | frozenset(peer.spec.endpoints)


def public_addresses(peer: Peer) -> tuple[IPAddress, ...]:
    """Where a peer may be reached at whichever port, by its own word and its user's, likeliest first."""
    static = [endpoint.address for endpoint in peer.spec.endpoints]
    found = {
        kind: [c.endpoint.address for c in (peer.report.endpoints if peer.report else ()) if c.kind is kind]
        for kind in (CandidateKind.STATIC, CandidateKind.HOST, CandidateKind.REFLEXIVE)
    }
    hosts = [address for address in found[CandidateKind.HOST] if not is_private(address)]
    ordered = static + found[CandidateKind.STATIC] + hosts + found[CandidateKind.REFLEXIVE]
    return tuple(dict.fromkeys(ordered))


def public_reflexive(candidates: Iterable[Candidate]) -> tuple[Endpoint, ...]:
    """Where reflectors saw a peer's NAT, over IPv4 and not inside of a carrier's network."""
    return tuple(
        candidate.endpoint
        for candidate in candidates
        if candidate.kind is CandidateKind.REFLEXIVE
        and candidate.endpoint.family is Family.IPV4
        and not is_private(candidate.endpoint.address)
    )


def rank(endpoint: Endpoint, prefer: Family) -> tuple[int, int]:
    """Lower is better: private before public, then the preferred family."""
    return (0 if is_private(endpoint.address) else 1, 0 if endpoint.family is prefer else 1)


def own_candidates(
    *,
    interfaces: frozenset[IPInterface],
    listen_port: int,
    static: tuple[Endpoint, ...],
    reflexive: Iterable[Endpoint],
    mesh: tuple[IPNetwork, ...],
) -> tuple[Candidate, ...]:
    """What a peer publishes of itself, best kinds first, each endpoint once, at most MAX_PUBLISHED."""
    found: dict[Endpoint, Candidate] = {}
    hosts = (Endpoint(interface.ip, listen_port) for interface in sorted(interfaces, key=_by_address))
    for kind, endpoints in (
        (CandidateKind.STATIC, iter(static)),
        (CandidateKind.HOST, hosts),
        (CandidateKind.REFLEXIVE, iter(sorted(reflexive, key=str))),
    ):
        for endpoint in endpoints:
            if refusal(endpoint, mesh=mesh, own=frozenset()) is None and not is_temporary(endpoint):
                found.setdefault(endpoint, Candidate(endpoint, kind))
    return tuple(found.values())[:MAX_PUBLISHED]


def is_temporary(endpoint: Endpoint) -> bool:
    """Whether the endpoint's address is one that nobody else can route to (Teredo, 6to4 leftovers)."""
    address = endpoint.address
    return address.version == 6 and (address.teredo is not None or address.sixtofour is not None)


def _by_address(interface: IPInterface) -> tuple[int, int]:
    return (interface.version, int(interface.ip))
