"""The text that a hub's kernel is given; what it does with it is in tests/netns/test_relay_kernel.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scope_agent.relay.rules import MAX_ID, change, delete, is_change, load, mark_of, table

from scope.model import PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side

NOW = 1_700_000_000.0
# What other programs of one machine decide by: kube-proxy, Cilium, Calico and Tailscale, portmap.
FOREIGN_BITS = 0x4000 | 0x8000 | 0x0F00 | 0xF0000


def grant(half: int, *, lasting: float = 86400.0) -> Grant:
    first, second = (
        Side(2 * half + n, PublicKey(bytes([n + 1]) * 32), bytes([half, n]) * 4, 26000 + half) for n in (0, 1)
    )
    return Grant((first, second), NOW + lasting)


GRANTS = Grants(26000, 26255, RelayLimits(), (grant(1), grant(2)))


def test_every_side_has_a_mark_of_its_own_that_means_nothing_to_others() -> None:
    marks = {mark_of(number) for number in range(1, MAX_ID + 1)}
    assert len(marks) == MAX_ID
    assert all(mark >> 24 == 0x53 and not mark & FOREIGN_BITS for mark in marks)


def test_the_marks_of_a_pair_differ_in_their_last_bit_alone() -> None:
    assert all(mark_of(number) ^ 1 == mark_of(number ^ 1) for number in range(2, MAX_ID + 1))


@pytest.mark.parametrize("number", [0, -1, MAX_ID + 1])
def test_an_id_that_fits_no_mark_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="1 to 16383"):
        mark_of(number)


def test_ids_that_are_none_of_a_pair_are_refused() -> None:
    (first, second) = grant(1).sides
    odd = Grant((first, replace(second, id=5)), NOW + 1)
    with pytest.raises(ValueError, match="last bit"):
        load("scope0", replace(GRANTS, grants=(odd,)), wall=NOW, seed=1)


def test_one_more_grant_costs_no_more_where_there_are_a_thousand() -> None:
    few = replace(GRANTS, grants=(grant(1),))
    many = replace(GRANTS, grants=tuple(grant(half) for half in range(1, 200)))
    new = grant(201)
    added = change("scope0", few, replace(few, grants=(*few.grants, new)), wall=NOW)
    assert change("scope0", many, replace(many, grants=(*many.grants, new)), wall=NOW) == added
    assert added.count("add element") == 3


def test_what_is_renewed_gets_a_later_end_and_nothing_else_is_touched() -> None:
    later = replace(GRANTS, grants=(replace(GRANTS.grants[0], expires=NOW + 90000), GRANTS.grants[1]))
    lines = change("scope0", GRANTS, later, wall=NOW).splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["delete", "element", "inet", "scope_relay_scope0", "token"],
        ["add", "element", "inet", "scope_relay_scope0", "token"],
    ]
    assert lines[1].count("timeout 90060s") == 2


def test_where_nothing_differs_there_is_nothing_to_do() -> None:
    assert change("scope0", GRANTS, GRANTS, wall=NOW) == ""


def test_other_ports_or_limits_take_more_than_a_change() -> None:
    assert is_change(GRANTS, replace(GRANTS, grants=()))
    assert not is_change(GRANTS, replace(GRANTS, first_port=26001))
    assert not is_change(GRANTS, replace(GRANTS, limits=RelayLimits(total=1)))


def test_what_has_expired_is_not_loaded() -> None:
    text = load("scope0", replace(GRANTS, grants=(grant(1, lasting=-1), grant(2))), wall=NOW, seed=1)
    assert grant(1).sides[0].token.hex() not in text
    assert grant(2).sides[0].token.hex() in text


def test_nothing_that_was_learned_is_flushed() -> None:
    flushed = {
        line.split()[4] for line in load("d", GRANTS, wall=NOW, seed=1).splitlines() if "flush" in line
    }
    assert not {
        name for name in flushed if name.startswith(("place", "exact", "address", "source", "own", "new"))
    }


@pytest.mark.parametrize(("device", "name"), [("scope0", "scope0"), ("wg+a b", "77672b612062")])
def test_a_device_of_any_name_has_a_table(device: str, name: str) -> None:
    assert table(device) == f"scope_relay_{name}"
    assert delete(device).endswith(f"delete table inet scope_relay_{name}\n")
