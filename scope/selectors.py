"""Which labels a LabelSelector selects, as Kubernetes decides it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from scope.model import LabelSelector, Operator, Requirement


def selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    """Whether these labels meet everything that the selector asks; an empty one asks nothing."""
    return all(labels.get(key) == value for key, value in selector.match_labels) and all(
        _meets(requirement, labels) for requirement in selector.match_expressions
    )


def _meets(requirement: Requirement, labels: Mapping[str, str]) -> bool:
    match requirement.operator:
        case Operator.IN:
            return labels.get(requirement.key) in requirement.values
        case Operator.NOT_IN:
            return labels.get(requirement.key) not in requirement.values
        case Operator.EXISTS:
            return requirement.key in labels
        case Operator.DOES_NOT_EXIST:
            return requirement.key not in labels
        case _:
            assert_never(requirement.operator)
