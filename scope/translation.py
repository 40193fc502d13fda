"""How pods of one cluster are seen from another: each address at the same place of another prefix. Pure.

Clusters that were made from the same defaults have pods with the same addresses. Each of them is then seen by
the others by a prefix that nobody else has.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from scope.model import IPAddress, IPNetwork, Mesh, Translation


def translations_of(mesh: Mesh, cluster: str) -> tuple[Translation, ...]:
    """What is asked for the cluster of that name."""
    return next((each.translate for each in mesh.spec.clusters if each.name == cluster), ())


def seen_prefix(prefix: IPNetwork, translations: Sequence[Translation]) -> IPNetwork | None:
    """By which prefix others see this one; None: as it is."""
    found = _longest(prefix, translations)
    if found is None:
        return None
    first, length = _moved(prefix.network_address, found), prefix.prefixlen
    return IPv4Network((first, length)) if prefix.version == 4 else IPv6Network((first, length))


def seen_address(address: IPAddress, translations: Sequence[Translation]) -> IPAddress:
    """By which address others see this one."""
    if isinstance(address, IPv4Address):
        found = _longest(IPv4Network(address), translations)
        return address if found is None else IPv4Address(_moved(address, found))
    found = _longest(IPv6Network(address), translations)
    return address if found is None else IPv6Address(_moved(address, found))


def _longest(prefix: IPNetwork, translations: Sequence[Translation]) -> Translation | None:
    """A prefix that is only partly translated is not: its pods would be seen in two ways."""
    fitting = [
        each
        for each in translations
        if each.inside.version == prefix.version
        and each.inside.prefixlen <= prefix.prefixlen
        and prefix.network_address in each.inside
    ]
    return max(fitting, key=lambda each: each.inside.prefixlen, default=None)


def _moved(address: IPAddress, translation: Translation) -> int:
    return int(address) - int(translation.inside.network_address) + int(translation.outside.network_address)
