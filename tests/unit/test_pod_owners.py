"""Who else leads to pods of our own cluster."""

from __future__ import annotations

from ipaddress import ip_network

from scope_agent.pods.owners import OwnedRoute, owners, tell

from scope.resources import as_reason

PODS = [ip_network(each) for each in ("10.244.1.0/24", "10.244.2.0/24", "fd00:10:1::/64")]


def route(prefix: str, device: str = "flannel.1", protocol: int = 3) -> OwnedRoute:
    return OwnedRoute(ip_network(prefix), device, protocol)


def owned(*routes: OwnedRoute) -> set[str]:
    return {str(prefix) for prefix in owners(PODS, routes)}


def test_a_route_to_the_prefix_itself_to_a_wider_one_or_to_a_part_of_it_owns_it() -> None:
    assert owned(route("10.244.2.0/24")) == {"10.244.2.0/24"}
    assert owned(route("10.244.0.0/16")) == {"10.244.1.0/24", "10.244.2.0/24"}
    assert owned(route("10.244.1.192/26")) == {"10.244.1.0/24"}
    assert owned(route("fd00:10:1::1:0/112")) == {"fd00:10:1::/64"}


def test_routes_beside_it_and_default_routes_own_nothing() -> None:
    assert owned(route("10.244.3.0/24"), route("10.243.255.0/24"), route("fd00:10:2::/64")) == set()
    assert owned(route("0.0.0.0/0"), route("0.0.0.0/1"), route("::/0")) == set()


def test_the_owner_is_named_by_interface_and_protocol_in_what_fits_a_status() -> None:
    by_flannel = tell(owners(PODS, [route("10.244.2.0/24"), route("10.244.1.0/24")]))
    assert by_flannel == (
        "another network leads to 10.244.1.0/24 and 1 more, by flannel.1 (protocol boot): pods of this "
        "cluster stay with it"
    )
    several = tell(owners(PODS, [route("fd00:10:1::/64", "", 77)]))
    assert "to fd00:10:1::/64, by several interfaces (protocol 77)" in several
    longest = ip_network("fd00:1234:1234:1234:1234:1234:1234:0/112")
    words = tell({longest: route(str(longest), "fifteen-letters", 12)})
    assert as_reason(words) == words
    assert tell({}) == ""


def test_the_closest_route_is_the_one_that_is_named() -> None:
    found = owners(PODS, [route("10.244.0.0/16", "eth0", 2), route("10.244.2.0/24", "cilium_host", 4)])
    assert found[PODS[1]].device == "cilium_host"
    assert found[PODS[0]].device == "eth0"
