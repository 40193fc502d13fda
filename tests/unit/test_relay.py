"""Grants and knocks: what the hub's agent writes for its forwarder is what the forwarder reads."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope.model import PublicKey, RelayLimits
from scope.relay import (
    KNOCK_BYTES,
    Grant,
    Grants,
    GrantsFileError,
    Side,
    decode_grants,
    encode_grants,
    knock,
)
from scope.wire import AskRelay, Granted, Refused, RefusedBecause, encode_message

KEY = PublicKey(bytes(range(32)))
sides = st.builds(
    Side,
    id=st.integers(1, 2**14),
    peer=st.binary(min_size=32, max_size=32).map(PublicKey),
    token=st.binary(min_size=8, max_size=8),
    port=st.integers(1, 65535),
)
limits = st.builds(RelayLimits, pair=st.integers(0, 2**40), total=st.integers(0, 2**40))
grants = st.builds(Grant, st.tuples(sides, sides), st.floats(0, 2**40))
all_grants = st.builds(
    Grants,
    first_port=st.integers(1, 65535),
    last_port=st.integers(1, 65535),
    limits=limits,
    grants=st.lists(grants, max_size=4).map(tuple),
)


@given(all_grants)
def test_grants_come_back_from_their_file(written: Grants) -> None:
    assert decode_grants(encode_grants(written)) == written


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 2}',
        '{"version": 1, "ports": [1], "limits": {"pair": 0, "total": 0}, "grants": []}',
        '{"version": 1, "ports": [1, 2], "limits": {"pair": 0, "total": 0}, "grants": [{"sides": []}]}',
    ],
)
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(GrantsFileError):
        decode_grants(text)


@given(grants)
def test_a_grant_with_a_short_token_is_refused(grant: Grant) -> None:
    document = json.loads(encode_grants(Grants(1, 2, RelayLimits(), (grant,))))
    document["grants"][0]["sides"][0]["token"] = "00"
    with pytest.raises(GrantsFileError, match="8 bytes, not 1"):
        decode_grants(json.dumps(document))


def test_a_token_is_printed_nowhere() -> None:
    assert b"secret!!".hex() not in repr(Side(id=1, peer=KEY, token=b"secret!!", port=26000))
    assert "secret!!" not in repr(Side(id=1, peer=KEY, token=b"secret!!", port=26000))


def test_a_knock_is_its_magic_and_the_token() -> None:
    assert knock(b"12345678") == b"SCok12345678"
    assert len(knock(bytes(8))) == KNOCK_BYTES
    assert int.from_bytes(knock(bytes(8))[:4], "little") not in range(1, 5)


def test_no_answer_of_a_hub_is_larger_than_its_question() -> None:
    question = len(encode_message(AskRelay(KEY)))
    granted = Granted(KEY, token=bytes(8), port=1, lifetime=1, user_space=True)
    assert len(encode_message(granted)) == question
    assert len(encode_message(Refused(KEY, RefusedBecause.NO_HUB))) < question
