"""The gateway's keys in their Secret: read back as they were written, and damage is said."""

from __future__ import annotations

import base64
import hashlib
import itertools
from typing import Any

import pytest
from scope_operator.kube.gateway import keys_of, new_keys, secret_of

from scope.model import ConfigError


def fresh() -> dict[str, Any]:
    numbers = itertools.count(1)
    return secret_of(new_keys(lambda count: bytes([next(numbers)]) * count), namespace="scope-system")


def test_keys_are_read_back_as_they_were_made() -> None:
    secret = fresh()
    keys = keys_of(secret)
    assert keys.signing.raw == bytes([1]) * 32
    assert keys.probe.raw == bytes([2]) * 32
    assert keys.tls_key.raw.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert keys.identity("uid").administrator == hashlib.sha256(keys.token.raw).digest()
    assert "Secret(...)" in repr(keys)
    assert "PRIVATE" not in repr(keys)


@pytest.mark.parametrize("field", ["tls.key", "signing", "probe", "admin.json"])
@pytest.mark.parametrize("value", [None, "!", base64.b64encode(b"short").decode()])
def test_a_damaged_secret_is_refused_with_what_to_do(field: str, value: str | None) -> None:
    secret = fresh()
    if value is None:
        del secret["data"][field]
    else:
        secret["data"][field] = value
    if field == "tls.key" and value not in (None, "!"):
        return  # what is in it, the gateway says when it serves
    with pytest.raises(ConfigError, match="restore it from a backup"):
        keys_of(secret)
