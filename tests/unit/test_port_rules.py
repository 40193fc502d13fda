"""Rules for the ports that WireGuard has beside its own: what is loaded, and what is read of it."""

from __future__ import annotations

import json
from ipaddress import IPv4Address

import pytest
from scope_agent.wireguard.port_rules import Opening, PortRules, Search, delete, load, parse_openings, table

from scope.model import Endpoint

PEER = Endpoint(IPv4Address("192.0.2.7"), 40000)
OTHER = Endpoint(IPv4Address("192.0.2.9"), 41000)


def test_each_peer_has_its_port_in_both_directions_and_nobody_else_any() -> None:
    text = load("scope0", PortRules(21000, (Opening(PEER, 27001), Opening(OTHER, 27002))))
    assert "{ 192.0.2.7 . 40000 : 27001, 192.0.2.9 . 41000 : 27002 }" in text
    assert "{ 192.0.2.7 . 40000 . 27001 : 21000, 192.0.2.9 . 41000 . 27002 : 21000 }" in text
    assert "udp sport 21000 udp sport set ip daddr . udp dport map @out" in text
    assert "udp dport set ip saddr . udp sport . udp dport map @in" in text
    assert "unreachable" not in text


def test_a_table_takes_the_place_of_an_earlier_one_in_one_step() -> None:
    assert load("scope0", PortRules(21000, (Opening(PEER, 27001),))).startswith(delete("scope0"))


def test_without_rules_there_is_no_table() -> None:
    assert load("scope0", PortRules()) == delete("scope0")


def test_while_ports_are_searched_the_kernel_does_not_call_them_closed() -> None:
    text = load("scope0", PortRules(21000, search=Search(PEER, 27000, 27255)))
    assert "ip daddr 192.0.2.7 icmp type destination-unreachable icmp code port-unreachable" in text
    assert "@th,240,16 27000-27255 drop" in text


def test_two_devices_have_two_tables_whatever_they_are_called() -> None:
    names = {table("scope0"), table("scope1"), table("a; drop"), table("a; drop ")}
    assert len(names) == 4 and all(" " not in name and ";" not in name for name in names)


def test_what_nft_shows_is_read_again() -> None:
    elements = [
        [{"concat": ["192.0.2.9", 41000]}, 27002],
        [{"concat": ["192.0.2.7", 40000]}, 27001],
    ]
    shown = json.dumps({"nftables": [{"metainfo": {}}, {"map": {"name": "out", "elem": elements}}]})
    assert parse_openings(shown) == (Opening(PEER, 27001), Opening(OTHER, 27002))
    assert parse_openings(json.dumps({"nftables": [{"map": {"name": "out"}}]})) == ()


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "{}",
        "[]",
        json.dumps({"nftables": []}),
        json.dumps({"nftables": [{"map": {"elem": [[{"concat": ["::1", 1]}, 2]]}}]}),
        json.dumps({"nftables": [{"map": {"elem": [[{"concat": ["192.0.2.7", 0]}, 2]]}}]}),
        json.dumps({"nftables": [{"map": {"elem": [["192.0.2.7", 2]]}}]}),
    ],
)
def test_a_map_that_is_not_ours_is_refused(shown: str) -> None:
    with pytest.raises(ValueError, match="not a map of ours"):
        parse_openings(shown)
