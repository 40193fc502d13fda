"""What resources of every kind have: their version, their metadata and their conditions."""

from __future__ import annotations

from collections.abc import Sequence

from scope.model import Condition, Kind, Meta
from scope.resources.fields import Fields, each_once
from scope.resources.limits import MAX_CONDITIONS, MAX_MESSAGE, MAX_REASON
from scope.resources.times import format_time
from scope.resources.values import (
    read_condition_type,
    read_constant,
    read_integer,
    read_label,
    read_one_of,
    read_revision,
    read_subdomain,
    read_text,
    read_time,
    read_uid,
)

GROUP = "scope.ltgc.cc"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
PLURALS = {
    Kind.MESH: "scopemeshes",
    Kind.PEER: "scopepeers",
    Kind.SERVICE: "scopeservices",
    Kind.TOKEN: "jointokens",
}

# Bookkeeping of Kubernetes that comes with every object and that Scope does not use.
_FOREIGN_METADATA = frozenset(
    {
        *("labels", "annotations", "managedFields", "finalizers", "ownerReferences", "selfLink"),
        *("generateName", "deletionTimestamp", "deletionGracePeriodSeconds"),
    }
)


def read_meta(root: Fields, kind: Kind) -> Meta:
    """Read version, kind and metadata of a document."""
    root.required("apiVersion", lambda value: read_constant(API_VERSION, value), "")
    root.required("kind", lambda value: read_constant(kind, value), "")
    fields = root.sub("metadata", required=True)
    fields.ignored = _FOREIGN_METADATA
    return Meta(
        name=fields.required("name", read_label if kind is Kind.MESH else read_subdomain, ""),
        uid=fields.optional("uid", read_uid, ""),
        revision=fields.optional("resourceVersion", read_revision, 0),
        generation=fields.optional("generation", lambda value: read_integer(value, 0, 2**63 - 1), 1),
        created=fields.optional("creationTimestamp", read_time, 0.0),
    )


def read_conditions(fields: Fields) -> tuple[Condition, ...]:
    """Read the conditions of a status, one of each type."""
    conditions = fields.parts("conditions", _read_condition, limit=MAX_CONDITIONS)
    return each_once(fields, "conditions", conditions, key=lambda condition: condition.type)


def _read_condition(fields: Fields) -> Condition:
    return Condition(
        type=fields.required("type", read_condition_type, ""),
        status=fields.required("status", lambda value: read_one_of(("True", "False", "Unknown"), value), ""),
        reason=fields.optional("reason", lambda value: read_text(value, MAX_REASON), ""),
        message=fields.optional("message", lambda value: read_text(value, MAX_MESSAGE), ""),
        changed=fields.optional("lastTransitionTime", read_time, 0.0),
    )


def meta_dict(meta: Meta) -> dict[str, object]:
    """The document of the metadata."""
    return {
        "name": meta.name,
        **({"uid": meta.uid} if meta.uid else {}),
        **({"resourceVersion": str(meta.revision)} if meta.revision else {}),
        "generation": meta.generation,
        **({"creationTimestamp": format_time(meta.created)} if meta.created else {}),
    }


def conditions_dict(conditions: Sequence[Condition]) -> dict[str, object]:
    """The field of the conditions, left out where there are none."""
    if not conditions:
        return {}
    return {
        "conditions": [
            {
                "type": condition.type,
                "status": condition.status,
                "reason": condition.reason,
                "message": condition.message,
                **({"lastTransitionTime": format_time(condition.changed)} if condition.changed else {}),
            }
            for condition in conditions
        ]
    }
