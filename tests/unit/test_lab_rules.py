"""The lab's pure parts: the address plan, the routers' rules as text, and which pairs can be direct."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network
from itertools import pairwise, product

import pytest
from lab.grid import GRID_KINDS, Place, place_reason, reason
from lab.nat import REBIND_PORTS, Nat, RouterRules, rebind_ports, router_rules, udp_block
from lab.plan import MAX_INDEX, has_ipv6, server_addresses, site_plan

RESERVED = [
    ip_network(text)
    for text in (
        "198.51.100.0/24",
        "203.0.113.0/24",
        "192.0.2.0/24",
        "198.18.0.0/15",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "2001:db8::/32",
    )
]


def rules_for(nat: Nat) -> str:
    plan = site_plan(3, nat, ipv6=has_ipv6(nat))
    return router_rules(RouterRules(nat, plan.public_ipv4, plan.lan_ipv4))


def test_every_address_of_a_lab_is_reserved_for_documentation_benchmarks_or_private_use() -> None:
    for index, nat in product((1, MAX_INDEX), Nat):
        plan = site_plan(index, nat, ipv6=True)
        found = [plan.public_ipv4, plan.machine_ipv4(0), plan.machine_ipv6(199), plan.router_ipv4()]
        found += [plan.carrier_ipv4[1]] if plan.carrier_ipv4 else []
        for address in [*found, *server_addresses(index)]:
            assert address is None or any(address in network for network in RESERVED), address


def test_no_two_sites_or_servers_share_an_address_or_a_prefix() -> None:
    plans = [site_plan(index, Nat.CGNAT, ipv6=True) for index in range(1, MAX_INDEX + 1)]
    servers = [address for index in range(1, MAX_INDEX + 1) for address in server_addresses(index)]
    for part in ("public_ipv4", "lan_ipv4", "carrier_ipv4", "prefix_ipv6"):
        assert len({getattr(plan, part) for plan in plans}) == MAX_INDEX
    assert len(set(servers)) == 2 * MAX_INDEX
    assert not any(address in plan.prefix_ipv6 for plan in plans for address in servers if plan.prefix_ipv6)


def test_an_ipv6_only_site_has_no_ipv4_anywhere() -> None:
    plan = site_plan(1, Nat.IPV6_ONLY, ipv6=True)
    assert (plan.public_ipv4, plan.lan_ipv4, plan.machine_ipv4(0)) == (None, None, None)
    assert plan.machine_ipv6(0) is not None


def test_an_ipv6_only_site_cannot_be_asked_to_have_no_ipv6() -> None:
    with pytest.raises(ValueError, match="IPv6-only"):
        has_ipv6(Nat.IPV6_ONLY, wanted=False)


def test_a_lan_can_be_the_same_in_two_sites() -> None:
    lan = IPv4Network("192.168.1.0/24")
    first, second = (site_plan(index, Nat.FULL_CONE, ipv6=False, lan=lan) for index in (1, 2))
    assert first.machine_ipv4(0) == second.machine_ipv4(0)
    assert first.public_ipv4 != second.public_ipv4


@pytest.mark.parametrize("index", [0, MAX_INDEX + 1])
def test_a_site_beyond_the_plan_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="room for"):
        site_plan(index, Nat.NONE, ipv6=True)


def test_loading_a_routers_rules_first_forgets_the_old_ones() -> None:
    for nat in Nat:
        assert rules_for(nat).count("delete table") == 2


def test_a_public_site_has_neither_nat_nor_firewall() -> None:
    assert "{" not in rules_for(Nat.NONE)


def test_only_the_symmetric_nat_takes_a_random_port_for_each_destination() -> None:
    assert [nat for nat in Nat if "fully-random" in rules_for(nat)] == [Nat.SYMMETRIC]


def test_only_the_open_input_kind_and_the_public_one_let_unsolicited_packets_reach_the_router() -> None:
    open_ones = [nat for nat in Nat if "ct state new,invalid drop" not in rules_for(nat)]
    assert open_ones == [Nat.NONE, Nat.PORT_RESTRICTED_OPEN_INPUT]


def test_each_rebinding_takes_ports_that_the_one_before_did_not_have() -> None:
    ranges = [rebind_ports(generation) for generation in range(6)]
    assert ranges[0] is None
    assert all(a != b for a, b in pairwise(ranges))
    (low, high), (next_low, _) = REBIND_PORTS
    assert 60999 < low < high < next_low


def test_unblocking_udp_leaves_no_rule() -> None:
    assert "drop" in udp_block(blocked=True)
    assert "drop" not in udp_block(blocked=False)


def test_the_grid_is_symmetric_and_has_every_kind_but_hairpin() -> None:
    assert set(GRID_KINDS) == set(Nat) - {Nat.HAIRPIN}
    for a, b in product(Nat, Nat):
        assert (reason(a, b) is None) == (reason(b, a) is None)


HARD = {Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED_OPEN_INPUT, Nat.CGNAT, Nat.SYMMETRIC}


def test_symmetric_reaches_all_but_symmetric_and_port_restricted_kinds() -> None:
    unreachable = {nat for nat in Nat if reason(Nat.SYMMETRIC, nat)}
    assert unreachable == HARD | {Nat.IPV6_ONLY, Nat.UDP_BLOCKED}


def test_blocked_udp_reaches_nobody_and_ipv6_only_reaches_who_has_ipv6() -> None:
    assert all("UDP" in (reason(Nat.UDP_BLOCKED, nat) or "") for nat in Nat)
    assert {nat for nat in Nat if reason(Nat.IPV6_ONLY, nat) is None} == {Nat.NONE, Nat.IPV6_ONLY}


def test_two_symmetric_sites_with_ipv6_can_be_direct() -> None:
    assert place_reason(Place("a", Nat.SYMMETRIC, ipv6=True), Place("b", Nat.SYMMETRIC, ipv6=True)) is None


def test_two_machines_of_one_site_can_be_direct_whatever_its_kind() -> None:
    blocked = Place("a", Nat.UDP_BLOCKED, ipv6=False)
    assert place_reason(blocked, blocked) is None
