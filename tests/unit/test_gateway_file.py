"""The file by which the agents of a joined cluster find its registry."""

from __future__ import annotations

import json

import pytest

from scope.credentials import base64url
from scope.gateway_file import GatewayFile
from scope.model import ConfigError, PublicKey

KEY = PublicKey(bytes(range(32)))
WHOLE = {"url": "https://east:7443", "pin": base64url(bytes(32)), "mesh": "home", "registryKey": str(KEY)}


@pytest.mark.parametrize("pin", [None, bytes(range(32))])
def test_what_the_operator_writes_the_agent_reads(pin: bytes | None) -> None:
    file = GatewayFile("https://east:7443", pin, "home", KEY)
    assert GatewayFile.parse(file.format()) == file


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        *(json.dumps({**WHOLE, **damage}) for damage in ({"pin": "AA"}, {"registryKey": "AA"})),
    ],
)
def test_a_damaged_file_is_refused_and_whose_move_is_next_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway.json is damaged .* restart the cluster's operator"):
        GatewayFile.parse(text)
