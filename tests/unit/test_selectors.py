"""Which labels a selector selects."""

from __future__ import annotations

import pytest

from scope.model import LabelSelector, Operator, Requirement
from scope.selectors import selects

LABELS = {"zone": "a", "tier": ""}


def test_an_empty_selector_selects_everything() -> None:
    assert selects(LabelSelector(), {})
    assert selects(LabelSelector(), LABELS)


@pytest.mark.parametrize(
    ("operator", "key", "values", "selected"),
    [
        (Operator.IN, "zone", ("b", "a"), True),
        (Operator.IN, "zone", ("b",), False),
        (Operator.IN, "absent", ("a", ""), False),
        (Operator.NOT_IN, "zone", ("b",), True),
        (Operator.NOT_IN, "zone", ("b", "a"), False),
        (Operator.NOT_IN, "absent", ("a",), True),
        (Operator.EXISTS, "tier", (), True),
        (Operator.EXISTS, "absent", (), False),
        (Operator.DOES_NOT_EXIST, "absent", (), True),
        (Operator.DOES_NOT_EXIST, "tier", (), False),
    ],
)
def test_each_operator_selects_as_in_kubernetes(
    operator: Operator, key: str, values: tuple[str, ...], selected: bool
) -> None:
    selector = LabelSelector(match_expressions=(Requirement(key, operator, values),))
    assert selects(selector, LABELS) is selected


def test_a_label_must_be_there_with_its_value_also_where_the_value_is_empty() -> None:
    assert selects(LabelSelector((("tier", ""),)), LABELS)
    assert not selects(LabelSelector((("tier", "x"),)), LABELS)
    assert not selects(LabelSelector((("absent", ""),)), LABELS)


def test_everything_that_is_asked_must_be_met() -> None:
    zone, tier = Requirement("zone", Operator.IN, ("a",)), Requirement("tier", Operator.DOES_NOT_EXIST)
    assert not selects(LabelSelector((("zone", "a"),), (zone, tier)), LABELS)
    assert not selects(LabelSelector((("zone", "b"),), (zone,)), LABELS)
    assert selects(LabelSelector((("zone", "a"),), (zone,)), LABELS)
