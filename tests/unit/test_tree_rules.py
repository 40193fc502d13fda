"""The rules of a hub that forwards: what they name, and that `nft` could read them."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network

from scope_agent.tree.rules import ForwardedPrefixes, delete, forwarded_prefixes, load, table

from scope.model import Addressing

SPACE = Addressing(IPv4Network("100.80.0.0/16"), IPv6Network("fd5c:9e0::/48"))


def _rules(text: str, chain: str) -> list[str]:
    start = f"add rule inet {table('scope0')} {chain} "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]


def test_only_prefixes_of_the_mesh_go_on_and_all_else_of_the_device_is_dropped() -> None:
    forwarded = forwarded_prefixes(SPACE, routes=[ip_network("10.1.0.0/16")], own=[])
    rules = _rules(load("scope0", forwarded), "forward")
    inside = "{ 10.1.0.0/16, 100.80.0.0/16 }"
    assert rules == [
        f'iifname "scope0" oifname "scope0" ip saddr {inside} ip daddr {inside} counter name "came4" accept',
        'iifname "scope0" oifname "scope0" ip6 saddr { fd5c:9e0::/48 } ip6 daddr { fd5c:9e0::/48 } '
        'counter name "came6" accept',
        'iifname "scope0" drop',
        'oifname "scope0" drop',
    ]


def test_what_goes_from_edge_to_edge_is_counted_behind_all_other_chains_too() -> None:
    text = load("scope0", forwarded_prefixes(SPACE, routes=[], own=[]))
    assert _rules(text, "passed") == [
        'iifname "scope0" oifname "scope0" meta nfproto ipv4 counter name "passed4"',
        'iifname "scope0" oifname "scope0" meta nfproto ipv6 counter name "passed6"',
    ]


def test_what_the_hub_offers_itself_is_reached_from_the_mesh_and_reaches_it() -> None:
    forwarded = forwarded_prefixes(SPACE, routes=[], own=[ip_network("192.168.7.0/24")])
    rules = _rules(load("scope0", forwarded), "forward")
    assert 'iifname "scope0" ip saddr { 100.80.0.0/16 } ip daddr { 192.168.7.0/24 } accept' in rules
    assert 'oifname "scope0" ip saddr { 192.168.7.0/24 } ip daddr { 100.80.0.0/16 } accept' in rules
    assert rules[-2:] == ['iifname "scope0" drop', 'oifname "scope0" drop']


def test_prefixes_are_named_once_and_no_route_into_the_mesh_is_the_hubs_own() -> None:
    routes = [ip_network("10.0.0.0/9"), ip_network("10.128.0.0/9"), ip_network("10.3.0.0/16")]
    forwarded = forwarded_prefixes(SPACE, routes=routes, own=[ip_network("100.0.0.0/8")])
    assert forwarded == ForwardedPrefixes(
        inside=(ip_network("10.0.0.0/8"), SPACE.ipv4, SPACE.ipv6),  # type: ignore[arg-type]
        offered=(),
    )


def test_the_rules_replace_what_was_there_in_one_step() -> None:
    text = load("scope0", forwarded_prefixes(SPACE, routes=[], own=[]))
    assert text.startswith(delete("scope0"))


def test_a_device_with_an_odd_name_gets_a_table_with_a_plain_one() -> None:
    assert table("wg;x") == "scope_tree_77673b78"
