"""By which prefix and address pods of one cluster are seen by others."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from scope.model import Translation
from scope.translation import seen_address, seen_prefix

TRANSLATIONS = tuple(
    Translation(ip_network(inside), ip_network(outside))
    for inside, outside in (
        ("10.244.0.0/16", "10.201.0.0/16"),
        ("10.244.9.0/24", "10.99.1.0/24"),
        ("fd00:244::/56", "fd00:201:0:ff00::/56"),
    )
)


@pytest.mark.parametrize(
    ("prefix", "seen"),
    [
        ("10.244.0.0/16", "10.201.0.0/16"),
        ("10.244.7.0/24", "10.201.7.0/24"),
        ("10.244.9.128/26", "10.99.1.128/26"),  # of two the longer one counts
        ("10.244.0.0/15", None),  # half of it
        ("10.0.0.0/8", None),
        ("10.245.0.0/24", None),
        ("fd00:244:0:3::/64", "fd00:201:0:ff03::/64"),
        ("fd00:245::/64", None),
    ],
)
def test_a_prefix_is_seen_at_the_same_place_of_another(prefix: str, seen: str | None) -> None:
    assert seen_prefix(ip_network(prefix), TRANSLATIONS) == (ip_network(seen) if seen else None)


@pytest.mark.parametrize(
    ("address", "seen"),
    [
        ("10.244.7.5", "10.201.7.5"),
        ("10.244.9.5", "10.99.1.5"),
        ("10.243.9.5", "10.243.9.5"),
        ("fd00:244:0:3::5", "fd00:201:0:ff03::5"),
        ("fd00:244:0:100::5", "fd00:244:0:100::5"),
    ],
)
def test_an_address_is_seen_at_the_same_place_of_another(address: str, seen: str) -> None:
    assert seen_address(ip_address(address), TRANSLATIONS) == ip_address(seen)
