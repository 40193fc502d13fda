"""A join token at rest."""

from __future__ import annotations

import base64

from scope.model import JoinToken, Kind, Role, TokenSpec
from scope.resources.fields import Fields, unless_empty
from scope.resources.limits import MAX_USED_BY
from scope.resources.meta import read_meta
from scope.resources.times import format_time
from scope.resources.values import read_base64, read_boolean, read_choice, read_label, read_time, read_uid


def parse_token(document: object, *, ignore_unknown: bool = False) -> JoinToken:
    """Read a join token at rest. Raises InvalidResource."""
    root = Fields.of(document, ignore_unknown=ignore_unknown)
    meta = read_meta(root, Kind.TOKEN)
    spec = root.sub("spec", required=True)
    token = TokenSpec(
        mesh=spec.required("mesh", read_label, ""),
        secret_hash=spec.required("secretHash", lambda value: read_base64(value, size=32), b""),
        role=spec.optional("role", lambda value: read_choice(Role, value), Role.AUTO),
        expires=spec.required("expires", read_time, 0.0),
        single_use=spec.optional("singleUse", read_boolean, False),
        used_by=spec.items("usedBy", read_uid, limit=MAX_USED_BY),
    )
    root.done()
    return JoinToken(meta, token)


def token_spec_dict(spec: TokenSpec) -> dict[str, object]:
    """The document of a token's spec."""
    return {
        "mesh": spec.mesh,
        "secretHash": base64.b64encode(spec.secret_hash).decode(),
        "role": str(spec.role),
        "expires": format_time(spec.expires),
        "singleUse": spec.single_use,
        **unless_empty("usedBy", spec.used_by),
    }
