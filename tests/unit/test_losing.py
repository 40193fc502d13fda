"""Whether others lose what is forwarded, by what was counted before and behind them."""

from __future__ import annotations

from scope_agent.wireguard.losing import BELIEVED, ENOUGH, ForeignChain, Losses, Passage

from scope.model import Family
from scope.resources import MAX_REASON

EDGES = ("between edges", "what goes from scope0 to scope0")
V4, V6 = Family.IPV4, Family.IPV6
DOCKER = ForeignChain("ip filter FORWARD", frozenset({V4}), drops=True)
FIREWALLD = ForeignChain("inet firewalld filter_FORWARD", frozenset(Family), drops=False)
NOTHING = Passage()


def count(losses: Losses, came: int, passed: int, *, has_moved: bool = False, now: float = 0.0) -> None:
    losses.count({V4: Passage(came, passed), V6: NOTHING}, has_moved=has_moved, now=now)


def losing(*chains: ForeignChain) -> Losses:
    losses = Losses()
    count(losses, ENOUGH, 0)
    losses.blame(chains)
    return losses


def test_where_packets_come_and_none_passes_the_chain_that_drops_is_named() -> None:
    assert losing(FIREWALLD, DOCKER).why(*EDGES) == (
        "the foreign chain ip filter FORWARD drops IPv4 between edges: let it accept what goes from scope0 "
        "to scope0"
    )


def test_nothing_is_said_before_enough_was_lost() -> None:
    losses = Losses()
    count(losses, ENOUGH - 1, 0)
    assert not losses.is_losing
    assert losses.why(*EDGES) == ""


def test_what_is_dropped_beside_what_passes_is_somebodys_wish() -> None:
    losses = Losses()
    count(losses, 100, 1)
    count(losses, 1000, 1, now=1.0)
    assert not losses.is_losing


def test_a_chain_without_a_policy_is_named_where_none_has_one() -> None:
    assert "inet firewalld filter_FORWARD" in losing(FIREWALLD).why(*EDGES)


def test_a_firewall_that_nobody_sees_is_told_of_without_a_name() -> None:
    assert losing().why(*EDGES).startswith("a firewall that `nft` does not show")


def test_it_is_over_with_the_first_packet_that_passes() -> None:
    losses = losing(DOCKER)
    count(losses, ENOUGH + 1, 1)
    assert losses.why(*EDGES) == ""


def test_it_is_over_when_the_blamed_chain_is_gone_and_new_losses_are_blamed_on_who_is_there() -> None:
    losses = losing(DOCKER)
    losses.blame([])
    assert losses.why(*EDGES) == ""
    count(losses, ENOUGH + 2, 0)
    assert not losses.is_losing  # what was lost before is no sign of now
    count(losses, 2 * ENOUGH, 0)
    losses.blame([FIREWALLD])
    assert "firewalld" in losses.why(*EDGES)


def test_what_passed_before_the_rules_were_changed_says_nothing_of_what_is_lost_since() -> None:
    losses = Losses()
    count(losses, 10, 10)
    count(losses, 10, 10, has_moved=True)
    count(losses, 10 + ENOUGH, 10)
    assert losses.is_losing


def test_changes_all_the_time_do_not_hide_what_is_lost() -> None:
    losses = Losses()
    for came in range(ENOUGH + 1):
        count(losses, came, 0, has_moved=True)
    assert losses.is_losing


def test_a_filter_that_does_not_tell_of_changes_is_found_out_after_a_while() -> None:
    losses = Losses()
    count(losses, 10, 10)
    count(losses, 20, 20, now=BELIEVED + 1)
    count(losses, 20 + ENOUGH, 20, now=BELIEVED + 2)
    assert losses.is_losing


def test_counters_that_start_anew_leave_what_is_known_until_they_tell_otherwise() -> None:
    losses = losing(DOCKER)
    losses.begin()
    count(losses, 0, 0)
    assert losses.is_losing
    count(losses, 1, 1)
    assert not losses.is_losing


def test_each_family_is_lost_for_itself_and_the_reason_fits_into_a_status() -> None:
    losses = Losses()
    losses.count({V4: Passage(9, 0), V6: Passage(9, 0)}, has_moved=False, now=0.0)
    many = [ForeignChain(f"inet {'x' * 30} chain{n}", frozenset(Family), drops=True) for n in range(9)]
    losses.blame(many)
    long = "a" * 15
    why = losses.why("between edges", f"what goes from {long} to {long}")
    assert "IPv4 and IPv6" in why
    assert len(why) <= MAX_REASON
