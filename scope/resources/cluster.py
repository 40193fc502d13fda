"""The entry of a cluster in a mesh, and by which keys the tokens of its agents are known."""

from __future__ import annotations

from typing import assert_never

from scope.model import AgentTokens, Cluster, ClusterTrust, Curve, EcKey, RsaKey, ServiceAccount, TokenKey
from scope.resources.fields import Fields, each_once
from scope.resources.limits import MAX_EXPONENT, MAX_ISSUER, MAX_KEY_ID, MAX_TOKEN_KEYS, RSA_BITS
from scope.resources.problems import refusal
from scope.resources.values import (
    NO_KEY,
    as_base64url,
    read_base64url,
    read_choice,
    read_cluster_name,
    read_constant,
    read_key,
    read_label,
    read_object_uid,
    read_one_of,
    read_some_text,
    read_subdomain,
)


def parse_cluster(document: object) -> Cluster:
    """Read the entry of a cluster as it stands in a mesh's status. Raises InvalidResource."""
    fields = Fields.of(document, path="cluster", ignore_unknown=False)
    cluster = read_cluster(fields)
    fields.done()
    return cluster


def cluster_to_dict(cluster: Cluster) -> dict[str, object]:
    """The document of a cluster."""
    trust = cluster.trust
    joined = {"signingKey": str(trust.signing_key), **tokens_to_dict(trust.tokens)} if trust else {}
    return {"name": cluster.name, "uid": cluster.uid, **joined}


def parse_tokens(document: object) -> AgentTokens:
    """Read by what a cluster's agents are known. Raises InvalidResource."""
    fields = Fields.of(document, path="tokens", ignore_unknown=False)
    tokens = _read_tokens(fields)
    fields.done()
    return tokens


def tokens_to_dict(tokens: AgentTokens) -> dict[str, object]:
    """The document of what a cluster's agents are known by."""
    account = tokens.service_account
    return {
        "issuer": tokens.issuer,
        "keys": [_token_key_dict(key) for key in tokens.keys],
        "serviceAccount": {"namespace": account.namespace, "name": account.name},
    }


def parse_jwks(document: object) -> tuple[TokenKey, ...]:
    """Read what an API server answers at /openid/v1/jwks. Raises InvalidResource."""
    fields = Fields.of(document, path="jwks", ignore_unknown=True)
    keys = _read_token_keys(fields)
    fields.done()
    return keys


def read_cluster(fields: Fields) -> Cluster:
    """Read the entry of a cluster in a mesh's status."""
    name = fields.required("name", read_cluster_name, "")
    uid = fields.required("uid", read_object_uid, "")
    if not _TRUST_FIELDS & fields.present():
        fields.expected |= _TRUST_FIELDS
        return Cluster(name, uid)
    return Cluster(
        name, uid, ClusterTrust(fields.required("signingKey", read_key, NO_KEY), _read_tokens(fields))
    )


_TRUST_FIELDS = frozenset({"signingKey", "issuer", "keys", "serviceAccount"})


def _read_tokens(fields: Fields) -> AgentTokens:
    account = fields.sub("serviceAccount", required=True)
    return AgentTokens(
        issuer=fields.required("issuer", lambda value: read_some_text(value, MAX_ISSUER), ""),
        keys=_read_token_keys(fields),
        service_account=ServiceAccount(
            namespace=account.required("namespace", read_label, ""),
            name=account.required("name", read_subdomain, ""),
        ),
    )


def _read_token_keys(fields: Fields) -> tuple[TokenKey, ...]:
    keys = fields.parts("keys", _read_token_key, limit=MAX_TOKEN_KEYS)
    if not keys and not fields.refused("keys"):
        fields.refuse("no key", f"1 to {MAX_TOKEN_KEYS} public keys, as /openid/v1/jwks has them", at="keys")
    return each_once(fields, "keys", keys, key=lambda each: each.id)


def _read_token_key(fields: Fields) -> TokenKey:
    kind = fields.required("kty", lambda value: read_one_of(("RSA", "EC"), value), "")
    name = fields.required("kid", lambda value: read_some_text(value, MAX_KEY_ID), "")
    fields.optional("use", lambda value: read_constant("sig", value), "")
    if kind == "EC":
        curve = fields.required("crv", lambda value: read_choice(Curve, value), Curve.P256)
        fields.optional("alg", lambda value: read_constant(ALGORITHMS[curve], value), "")
        size = _COORDINATE_BYTES[curve]
        coordinates = [fields.required(each, lambda value: _coordinate(value, size), 0) for each in "xy"]
        return EcKey(name, curve, *coordinates)
    fields.optional("alg", lambda value: read_constant(RSA_ALGORITHM, value), "")
    return RsaKey(
        name,
        fields.required("n", _modulus, 0) if kind else 0,
        fields.required("e", _exponent, 0) if kind else 0,
    )


RSA_ALGORITHM = "RS256"  # what an API server signs with: its key decides, never a token's header
ALGORITHMS = {Curve.P256: "ES256", Curve.P384: "ES384", Curve.P521: "ES512"}
_COORDINATE_BYTES = {Curve.P256: 32, Curve.P384: 48, Curve.P521: 66}


def _coordinate(value: object, size: int) -> int:
    allowed = f"{size} bytes in base64url"
    raw = read_base64url(value, longest=size, allowed=allowed)
    if len(raw) != size:
        raise refusal(value, allowed)
    return int.from_bytes(raw, "big")


def _modulus(value: object) -> int:
    allowed = f"a modulus of {RSA_BITS[0]} to {RSA_BITS[-1]} bits in base64url"
    number = int.from_bytes(read_base64url(value, longest=RSA_BITS[-1] // 8, allowed=allowed), "big")
    if number.bit_length() not in RSA_BITS or number % 2 == 0:
        raise refusal(value, allowed)
    return number


def _exponent(value: object) -> int:
    allowed = f"an odd number from 3 to {MAX_EXPONENT} in base64url, as AQAB"
    number = int.from_bytes(read_base64url(value, longest=4, allowed=allowed), "big")
    if number < 3 or number % 2 == 0:
        raise refusal(value, allowed)
    return number


def _token_key_dict(key: TokenKey) -> dict[str, object]:
    match key:
        case RsaKey(name, modulus, exponent):
            return {"kty": "RSA", "kid": name, "n": _number(modulus), "e": _number(exponent)}
        case EcKey(name, curve, x, y):
            size = _COORDINATE_BYTES[curve]
            point = {"x": _number(x, size), "y": _number(y, size)}
            return {"kty": "EC", "kid": name, "crv": str(curve), **point}
    assert_never(key)


def _number(number: int, size: int = 0) -> str:
    return as_base64url(number.to_bytes(size or (number.bit_length() + 7) // 8, "big"))
