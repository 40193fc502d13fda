"""The published exchanges with fixed randomness come out of this implementation, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scope_agent.psk.exchange import Offered, is_genuine, take_answer
from scope_agent.psk.messages import Answer, Control, Offer, What, decode, encode
from scope_agent.psk.provider import ED448_SIGNATURE_BYTES, SUITES
from scope_agent.psk.slots import Keys

from scope.model import Secret
from tests import psk_vectors
from tests.psk_vectors import BY_DECAPSULATOR, FILE, PROVIDER, Person

DOCUMENT: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
EXCHANGES = DOCUMENT["exchanges"]


def _person(side: str) -> Person:
    shown = DOCUMENT["sides"][side]
    return psk_vectors.person(side, bytes.fromhex(shown["ed448Seed"]), bytes.fromhex(shown["mldsaSeed"]))


D, E = _person("D"), _person("E")


def _bytes(values: dict[str, str]) -> dict[str, bytes]:
    return {name: bytes.fromhex(value) for name, value in values.items()}


def _base(shown: dict[str, Any]) -> Keys | None:
    """The exchange that this one builds on: the one before it in the file."""
    if shown["base"] is None:
        return None
    before = EXCHANGES[EXCHANGES.index(shown) - 1]
    keys = _bytes(before["keys"])
    assert (keys["id"].hex(), keys["chain"].hex()) == (shown["base"]["id"], shown["base"]["chain"])
    secrets = {name: Secret(keys[key]) for name, key in SECRETS.items()}
    return Keys(before["epoch"], keys["id"], suite=before["suite"], **secrets)


SECRETS = {"psk": "psk", "chain": "chain", "confirm_d": "confirmD", "confirm_e": "confirmE"}


def test_the_file_has_every_suite_with_and_without_a_base() -> None:
    found = {(shown["suite"], shown["base"] is None) for shown in EXCHANGES}
    assert found == {(number, first) for number in SUITES for first in (True, False)}


def test_both_sides_are_who_the_file_says() -> None:
    for side, known in (("D", D), ("E", E)):
        shown, public = DOCUMENT["sides"][side], known.identity.public
        assert known.key.raw.hex() == shown["wireguardKey"]
        assert (public.ed448.hex(), public.mldsa.hex()) == (shown["ed448Public"], shown["mldsaPublic"])
        assert public.fingerprint().raw.hex() == shown["fingerprint"]
    assert D.key.raw > E.key.raw


@pytest.mark.parametrize("shown", EXCHANGES, ids=lambda each: f"suite {each['suite']} epoch {each['epoch']}")
def test_an_exchange_comes_out_as_published(shown: dict[str, Any]) -> None:
    suite, base = SUITES[shown["suite"]], _base(shown)
    random = _bytes(shown["random"])
    offered, answer, keys = psk_vectors.exchange(suite, D, E, epoch=shown["epoch"], base=base, random=random)
    published_offer, published = (decode(bytes.fromhex(shown[name])) for name in ("offer", "answer"))
    assert isinstance(published_offer, Offer) and isinstance(published, Answer)
    # All but the ML-DSA signatures is the same each time.
    assert published_offer.body() == offered.offer.body()
    assert (published.body(), published.mac) == (answer.body(), answer.mac)
    for old, new in ((published_offer, offered.offer), (published, answer)):
        assert old.signatures[:ED448_SIGNATURE_BYTES] == new.signatures[:ED448_SIGNATURE_BYTES]
    assert _bytes(shown["keys"]) == psk_vectors.keys_of(keys)
    assert _bytes(shown["steps"]) == psk_vectors.steps(offered, answer, base)
    assert _bytes(shown["words"]) == psk_vectors.words(keys)


@pytest.mark.parametrize("shown", EXCHANGES, ids=lambda each: f"suite {each['suite']} epoch {each['epoch']}")
def test_the_published_messages_are_taken_and_give_the_published_keys(shown: dict[str, Any]) -> None:
    """Their signatures hold, ML-DSA's included."""
    base, random = _base(shown), _bytes(shown["random"])
    offer, answer = (decode(bytes.fromhex(shown[name])) for name in ("offer", "answer"))
    assert isinstance(offer, Offer) and isinstance(answer, Answer)
    offered = Offered(offer, Secret(random["kemSeed"]), Secret(random["dhPrivateD"]))
    keys = take_answer(offered, answer, theirs=E.identity.public, base=base, provider=PROVIDER)
    assert psk_vectors.keys_of(keys) == _bytes(shown["keys"])
    context, body = b"offer", offer.body()
    assert PROVIDER.verify(
        D.identity.public.ed448,
        D.identity.public.mldsa,
        signatures=offer.signatures,
        message=psk_vectors.signed(context, body),
        context=context,
    )
    for name, raw in _bytes(shown["words"]).items():
        word = decode(raw)
        assert isinstance(word, Control) and encode(word) == raw
        assert is_genuine(word, keys, by_decapsulator=What[name] in BY_DECAPSULATOR)
