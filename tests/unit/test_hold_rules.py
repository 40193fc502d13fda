"""Rules that hold an endpoint, and for how long."""

from __future__ import annotations

from ipaddress import ip_address

from scope_agent.paths.changeover import HOLD_MARGIN, HOLD_MAX, hold_for
from scope_agent.wireguard.hold_rules import Divert, Relabel, delete, load

from scope.model import Endpoint

V4 = Endpoint.parse("192.0.2.2:7000")
OTHER_V4 = Endpoint.parse("198.51.100.2:7001")
V6 = Endpoint.parse("[2001:db8::2]:7002")
OWN = ip_address("192.0.2.1")


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_a_table_takes_the_place_of_the_one_before_it_in_one_step() -> None:
    text = load(47001, [Divert(V4, 5000, 1.0)])
    assert text.startswith(delete(47001) + "table inet scope_hold_47001 {")


def test_only_data_for_wireguards_port_that_did_not_come_over_loopback_is_looked_at() -> None:
    assert 'iifname != "lo" udp dport 47001 @th,64,32 0x04000000 jump held' in lines(load(47001, []))


def test_every_rule_asks_a_set_whose_elements_expire() -> None:
    said = lines(
        load(47001, [Relabel(V4, OTHER_V4, OWN, 0.25), Divert(V4, 5000, 0.25), Divert(V6, 5001, 1.5)])
    )
    assert "elements = { 192.0.2.2 . 7000 timeout 250ms };" in " ".join(said)
    assert "elements = { 2001:db8::2 . 7002 timeout 1500ms };" in " ".join(said)
    rules = [line for line in said if line.endswith("accept")]
    assert len(rules) == 3
    assert all(("@from4" if "ip saddr" in rule else "@from6") in rule for rule in rules)


def test_of_one_endpoint_what_the_packet_filter_can_write_comes_before_what_it_diverts() -> None:
    said = load(47001, [Relabel(V4, OTHER_V4, OWN, 1.0), Divert(V4, 5000, 1.0)])
    assert said.index("ip daddr 192.0.2.1 ip saddr set 198.51.100.2 udp sport set 7001") < said.index(
        "udp dport set 5000"
    )


def test_fragments_of_ipv6_are_not_given_another_source() -> None:
    said = load(47001, [Relabel(V6, Endpoint.parse("[2001:db8::3]:7002"), ip_address("2001:db8::1"), 1.0)])
    assert "exthdr frag missing ip6 saddr set" in said


def test_a_hold_lasts_longer_the_slower_the_path_is_and_never_for_long() -> None:
    assert hold_for([None]) == HOLD_MARGIN
    assert hold_for([0.02, 0.1]) == 0.2 + HOLD_MARGIN
    assert hold_for([30.0]) == HOLD_MAX
