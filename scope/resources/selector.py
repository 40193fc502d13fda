"""A label selector: which Nodes are meant."""

from __future__ import annotations

from scope.model import LabelSelector, Operator, Requirement
from scope.resources.fields import Fields, unless_empty
from scope.resources.limits import MAX_REQUIREMENTS, MAX_VALUES
from scope.resources.values import read_choice, read_label_key, read_label_value, read_labels


def read_selector(fields: Fields) -> LabelSelector:
    """Read a selector; an empty object means every Node."""
    return LabelSelector(
        match_labels=fields.optional("matchLabels", read_labels, ()),
        match_expressions=fields.parts("matchExpressions", _read_requirement, limit=MAX_REQUIREMENTS),
    )


def selector_dict(selector: LabelSelector) -> dict[str, object]:
    """The document of a selector."""
    expressions = [
        {"key": each.key, "operator": str(each.operator), **unless_empty("values", each.values)}
        for each in selector.match_expressions
    ]
    return {
        **({"matchLabels": dict(selector.match_labels)} if selector.match_labels else {}),
        **({"matchExpressions": expressions} if expressions else {}),
    }


def _read_requirement(fields: Fields) -> Requirement:
    requirement = Requirement(
        key=fields.required("key", read_label_key, ""),
        operator=fields.required("operator", lambda value: read_choice(Operator, value), Operator.EXISTS),
        values=fields.items("values", read_label_value, limit=MAX_VALUES),
    )
    compares = requirement.operator in (Operator.IN, Operator.NOT_IN)
    if compares != bool(fields.values.get("values")) and not fields.refused("operator", "values"):
        found = "no value" if compares else "values that nothing is compared with"
        allowed = "one value or more" if compares else "none"
        fields.refuse(f"{found} for {requirement.operator}", allowed, at="values")
    return requirement
