"""One exchange: both sides derive the same keys, and nothing that was touched on the way passes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from cryptography.hazmat.primitives.hashes import SHA3_256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scope_agent.psk import exchange
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.exchange import (
    ExchangeError,
    Offered,
    Parties,
    control,
    make_answer,
    make_offer,
    take_answer,
)
from scope_agent.psk.identity import HybridIdentity, KeyMaker, PublicIdentity, make_hybrid_identity
from scope_agent.psk.messages import NO_ID, Answer, Offer, PskMessage, What, decode, encode
from scope_agent.psk.provider import SUITES
from scope_agent.psk.slots import Keys

from scope.model import PublicKey, Secret
from scope.wire import WireError
from tests.fuzz import keys as fuzz

PROVIDER = CryptographyProvider()
RANDOM = Random(7)
D_KEY, E_KEY = PublicKey(bytes([9] * 32)), PublicKey(bytes([1] * 32))
D, E, OTHER = (make_hybrid_identity(RANDOM.randbytes, PROVIDER) for _ in range(3))
D_PARTIES = Parties("mesh-uid", D_KEY, D.public.fingerprint(), E_KEY, E.public.fingerprint())
E_PARTIES = Parties("mesh-uid", E_KEY, E.public.fingerprint(), D_KEY, D.public.fingerprint())


def _offer(
    epoch: int = 1, base: Keys | None = None, parties: Parties = D_PARTIES, identity: HybridIdentity = D
) -> Offered:
    return make_offer(parties, _maker(identity), epoch=epoch, base=base)


def _maker(identity: HybridIdentity) -> KeyMaker:
    return KeyMaker(identity, PROVIDER, RANDOM.randbytes)


def _answer(
    offer: PskMessage, base: Keys | None = None, theirs: PublicIdentity = D.public
) -> tuple[Answer, Keys]:
    assert isinstance(offer, Offer)
    return make_answer(E_PARTIES, _maker(E), offer, theirs=theirs, base=base)


def _take(
    offered: Offered, answer: PskMessage, base: Keys | None = None, theirs: PublicIdentity = E.public
) -> Keys:
    assert isinstance(answer, Answer)
    return take_answer(offered, answer, theirs=theirs, base=base, provider=PROVIDER)


def test_both_sides_derive_the_same_keys() -> None:
    offered = _offer()
    answer, keys = _answer(decode(encode(offered.offer)))
    assert _take(offered, decode(encode(answer))) == keys
    secrets = {keys.psk.raw, keys.chain.raw, keys.confirm_d.raw, keys.confirm_e.raw, keys.id}
    assert len(secrets) == 5 and all(len(secret) == 32 for secret in secrets)


def test_the_base_goes_into_the_next_key_and_must_be_the_same_on_both_sides() -> None:
    first = _offer()
    _, base = _answer(first.offer)
    offered = _offer(epoch=2, base=base)
    assert offered.offer.header.base == base.id
    answer, keys = _answer(offered.offer, base=base)
    assert _take(offered, answer, base=base) == keys
    with pytest.raises(ExchangeError, match="different keys"):
        _take(offered, answer, base=replace(base, chain=Secret(bytes(32))))
    with pytest.raises(ExchangeError, match="another pair"):
        _answer(offered.offer, base=None)


def test_what_the_key_is_made_of_is_what_the_description_says() -> None:
    """The derivation again, by another implementation of HKDF, from what both messages carry."""
    offered = _offer()
    answer, keys = _answer(offered.offer)
    offer = offered.offer
    kem = PROVIDER.decapsulate(SUITES[1], offered.kem_seed, answer.ciphertext)
    dh = PROVIDER.dh(SUITES[1], offered.dh_private, answer.dh_public)
    label = b"scope psk 1"

    def lp(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    transcript = hashlib.sha3_512(lp(offer.body(), answer.body())).digest()
    material = (
        kem.raw + dh.raw + answer.ciphertext + answer.dh_public + offer.kem_public + offer.dh_public + label
    )
    hkdf = HKDF(SHA3_256(), 32, salt=bytes(32), info=lp(label, b"psk", transcript))
    assert hkdf.derive(material) == keys.psk.raw


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_changed_byte_of_an_offer_is_answered(data: st.DataObject) -> None:
    wire = bytearray(encode(_OFFERED.offer))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    try:
        message = decode(bytes(wire))
    except WireError:
        return
    if isinstance(message, Offer):
        with pytest.raises(ExchangeError):
            _answer(message)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_changed_byte_of_an_answer_is_taken(data: st.DataObject) -> None:
    wire = bytearray(encode(_ANSWER))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    try:
        message = decode(bytes(wire))
    except WireError:
        return
    if isinstance(message, Answer):
        with pytest.raises(ExchangeError):
            _take(_OFFERED, message)


_OFFERED = _offer()
_ANSWER, _KEYS = _answer(_OFFERED.offer)


def test_the_smaller_key_makes_no_offers_that_anybody_answers() -> None:
    offered = _offer(parties=E_PARTIES, identity=E)
    with pytest.raises(ExchangeError):
        make_answer(D_PARTIES, _maker(D), offered.offer, theirs=E.public, base=None)


def test_an_answer_to_an_earlier_offer_is_refused() -> None:
    with pytest.raises(ExchangeError, match="another offer"):
        _take(_offer(), _ANSWER)


@pytest.mark.parametrize("point", [bytes(56), b"\x01" + bytes(55)])
def test_low_order_points_are_refused(point: bytes) -> None:
    unsigned = replace(_OFFERED.offer, dh_public=point)
    signed = replace(unsigned, signatures=exchange._sign(b"offer", unsigned.body(), D, PROVIDER))
    with pytest.raises(ExchangeError, match="low order"):
        _answer(signed)


def test_a_key_with_coefficients_out_of_range_is_refused() -> None:
    unsigned = replace(_OFFERED.offer, kem_public=b"\xff" * 1568)
    signed = replace(unsigned, signatures=exchange._sign(b"offer", unsigned.body(), D, PROVIDER))
    with pytest.raises(ExchangeError, match="out of range"):
        _answer(signed)


def test_no_secret_has_a_printable_form() -> None:
    for value in (_KEYS, _OFFERED, D):
        text = repr(value)
        for secret in (_KEYS.psk, _KEYS.chain, _OFFERED.kem_seed, _OFFERED.dh_private, D.ed448, D.mldsa):
            assert secret.raw.hex() not in text and repr(secret.raw) not in text


@settings(max_examples=200)
@given(st.binary(max_size=200) | st.binary(min_size=5000, max_size=6000))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message = decode(data)
    except WireError:
        return
    assert encode(message) == data


@given(st.integers(0, 2**64 - 1), st.sampled_from(What))
def test_words_survive_the_wire(epoch: int, what: What) -> None:
    word = control(what, replace(_KEYS, epoch=epoch), by_decapsulator=False)
    assert decode(encode(word)) == word


def test_an_offer_without_a_base_says_so() -> None:
    assert _OFFERED.offer.header.base == NO_ID


CORPUS = Path(fuzz.__file__).parent / "corpus-keys"


def test_the_seeds_of_the_fuzzer_are_the_messages_that_they_are_called() -> None:
    names = []
    for path in sorted(CORPUS.iterdir()):
        data = path.read_bytes()
        fuzz.check(data)
        if path.name.startswith("message-"):
            names.append(type(fuzz.check_message(data[1:])).__name__)
        elif path.name not in ("program-contradiction", "program-gives-way"):
            assert fuzz.check_program(data[1:]), path.name
    assert {each.__name__ for each in get_args(PskMessage)} == set(names)


def test_a_damaged_seed_is_a_message_or_none() -> None:
    random = Random(11)
    seeds = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    for _ in range(500):
        data = bytearray(random.choice(seeds))
        data[random.randrange(1, len(data))] = random.randrange(256)
        fuzz.check(bytes(data[: random.choice((len(data), random.randrange(1, len(data) + 1)))]))


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_parts_in_any_order_make_the_message_that_they_are_of(program: bytes) -> None:
    fuzz.check_program(program)
