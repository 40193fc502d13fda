"""Which prefix is proposed where two peers claim one: free, of the same length, and to one of them alone."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network

from scope_operator.plan.free_prefixes import FreePrefixes

from scope.model import IPNetwork


def _free(*known: str) -> FreePrefixes:
    return FreePrefixes(map(ip_network, known), mesh_uid="1")


def _proposed(like: str, *known: str) -> str:
    return str(_free(*known).propose(ip_network(like)))


def test_a_proposal_overlaps_nothing_that_is_known() -> None:
    assert _proposed("10.244.0.0/16") == "10.192.0.0/16"
    assert _proposed("10.244.0.0/16", "10.192.7.0/24", "10.193.0.0/16") == "10.194.0.0/16"
    assert _proposed("10.244.0.0/24", "10.192.0.0/23", "10.192.3.0/24") == "10.192.2.0/24"
    assert _proposed("10.0.0.0/11", "10.192.0.0/10", "10.1.0.0/16") == "10.32.0.0/11"


def test_what_is_proposed_to_one_is_not_proposed_to_another() -> None:
    free = _free("10.192.1.0/24")
    found: list[IPNetwork | None] = [free.propose(ip_network(f"10.9.{n}.0/24")) for n in range(4)]
    found.append(free.propose(ip_network("10.9.0.0/16")))
    expected = [f"10.192.{n}.0/24" for n in (0, 2, 3, 4)] + ["10.193.0.0/16"]
    assert [str(each) for each in found] == expected


def test_there_may_be_none() -> None:
    pools = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
    assert _free(*pools).propose(IPv4Network("10.1.2.0/24")) is None
    assert _free(*pools[:3]).propose(IPv4Network("10.1.2.0/24")) == IPv4Network("100.64.0.0/24")
    assert _free("10.0.0.0/9").propose(IPv4Network("10.0.0.0/8")) is None


def test_a_mesh_has_a_unique_local_prefix_of_its_own_to_propose_from() -> None:
    one, other = (FreePrefixes((), mesh_uid=uid) for uid in ("1", "2"))
    like = IPv6Network("fd00:244::/56")
    first, second = one.propose(like), other.propose(like)
    assert first is not None and second is not None and first != second
    assert first.network_address in IPv6Network("fd00::/8") and first.prefixlen == 56
    assert one.propose(IPv6Network("fd00::/16")) not in (None, first)
