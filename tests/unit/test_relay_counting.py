"""What a hub shows of its pairs: the counts of kernel and forwarder in one list, the busiest first."""

from __future__ import annotations

from scope_agent.relay.counting import SHOWN, Counted, Sent, relayed
from scope_agent.relay.shell.forwarder import ForwarderCounters, SideCounters
from scope_agent.relay.shell.hub import what_was_sent

from scope.model import Forwarding, PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side


def grant(half: int) -> Grant:
    first, second = (
        Side(2 * half + n, PublicKey(half.to_bytes(31, "big") + bytes([n])), bytes(8), 26000) for n in (0, 1)
    )
    return Grant((first, second), 1.0)


def grants(*halves: int) -> Grants:
    return Grants(26000, 26255, RelayLimits(), tuple(grant(half) for half in halves))


def test_a_pair_has_what_kernel_and_forwarder_sent_to_each_of_its_sides() -> None:
    counted = Counted({2: Sent(1, 100), 4: Sent(5, 50)}, {2: Sent(2, 20), 3: Sent(3, 30)})
    found = relayed(grants(1, 2, 3), counted)
    assert (found.pairs, found.sent) == (3, Sent(11, 200))
    both, kernel, idle = found.busiest
    assert both.peers == tuple(side.peer for side in grant(1).sides)
    assert both.sent == (Sent(3, 120), Sent(3, 30))
    assert both.by == (Forwarding.KERNEL, Forwarding.USER_SPACE)
    assert (kernel.sent, kernel.by) == ((Sent(5, 50), Sent()), (Forwarding.KERNEL,))
    assert (idle.bytes, idle.by) == (0, ())


def test_what_came_to_the_forwarder_from_a_side_was_sent_to_the_other_one() -> None:
    first = SideCounters(2, (4,), bytes=100, packets=1, dropped=0, is_capped=False)
    second = SideCounters(3, (6,), bytes=20, packets=2, dropped=5, is_capped=True)
    told = ForwarderCounters(((first, second),), taken=(), drops={}, sent={})
    assert what_was_sent(told) == ({2: Sent(2, 20), 3: Sent(1, 100)}, frozenset({3}))


def test_either_side_over_a_limit_makes_its_pair_capped() -> None:
    found = relayed(grants(1, 2, 3), Counted({}, {}, frozenset({2, 5})))
    assert [pair.is_capped for pair in found.busiest] == [True, True, False]


def test_of_many_pairs_the_busiest_are_shown_and_all_are_in_the_sum() -> None:
    halves = range(1, 2 * SHOWN + 1)
    found = relayed(grants(*halves), Counted({2 * half: Sent(1, half) for half in halves}, {}))
    assert (found.pairs, found.sent.packets, found.sent.bytes) == (len(halves), len(halves), sum(halves))
    assert [pair.bytes for pair in found.busiest] == list(reversed(halves))[:SHOWN]


def test_counts_of_sides_without_a_grant_are_nobodys() -> None:
    assert relayed(grants(), Counted({2: Sent(1, 1)}, {})).sent == Sent()
