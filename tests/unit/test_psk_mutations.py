"""Nothing passes that was changed on the way, or that its sender had no right to say; in both suites.

The channel below lets only the pair's two sides speak, under X25519. Here it is taken for broken: whoever has
that may say anything to either side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

import pytest
from scope_agent.psk import exchange
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.exchange import (
    ExchangeError,
    Offered,
    Parties,
    control,
    is_genuine,
    make_answer,
    make_offer,
    take_answer,
)
from scope_agent.psk.identity import HybridIdentity, KeyMaker, Succession, make_hybrid_identity
from scope_agent.psk.messages import (
    SIGNATURES_BYTES,
    Answer,
    Control,
    Header,
    Identity,
    Offer,
    Refusal,
    RefusedFor,
    StrangeOffer,
    Succeeded,
    Wanted,
    What,
    Whence,
    decode,
    encode,
)
from scope_agent.psk.parts import cut
from scope_agent.psk.provider import ED448_SIGNATURE_BYTES, SUITES, Suite
from scope_agent.psk.slots import Keys

from scope.model import Fingerprint, PublicKey, Secret
from scope.wire import KeyPart, WireError
from tests.unit.psk_duo import Duo, Side

PROVIDER = CryptographyProvider()
T = TypeVar("T", Offer, Answer)
each_suite = pytest.mark.parametrize("number", SUITES)
CHANGED: dict[str, Any] = {
    "suite": 3,
    "mesh_uid": "another",
    "fingerprint_d": Fingerprint(bytes([5] * 32)),
    "fingerprint_e": Fingerprint(bytes([6] * 32)),
    "key_d": PublicKey(bytes([8] * 32)),
    "key_e": PublicKey(bytes([2] * 32)),
    "epoch": 2,
    "base": bytes([1] * 32),
    "nonce": bytes(32),
}


@dataclass(frozen=True, slots=True)
class Exchanged:
    """One whole exchange, and who could have made another."""

    d: KeyMaker
    e: KeyMaker
    other: HybridIdentity
    of_d: Parties
    of_e: Parties
    offered: Offered
    answer: Answer
    keys: Keys

    def take_offer(self, offer: Offer) -> Keys:
        """E's part."""
        return make_answer(self.of_e, self.e, offer, theirs=self.d.identity.public, base=None)[1]

    def take_answer(self, answer: Answer) -> Keys:
        """D's end of it."""
        theirs = self.e.identity.public
        return take_answer(self.offered, answer, theirs=theirs, base=None, provider=PROVIDER)

    def sign(self, message: Offer | Answer, by: HybridIdentity) -> bytes:
        """Signatures that hold for the message as it is."""
        context = b"offer" if isinstance(message, Offer) else b"answer"
        return exchange._sign(context, message.body(), by, PROVIDER)


@functools.cache
def exchanged(number: int) -> Exchanged:
    suite: Suite = SUITES[number]
    random = Random(number)
    identities = [make_hybrid_identity(random.randbytes, PROVIDER) for _ in range(3)]
    d_key, e_key = PublicKey(bytes([9] * 32)), PublicKey(bytes([1] * 32))
    d, e = (KeyMaker(each, PROVIDER, random.randbytes, suite) for each in identities[:2])
    d_print, e_print = (each.public.fingerprint() for each in identities[:2])
    of_d = Parties("mesh-uid", d_key, d_print, e_key, e_print, suite)
    of_e = Parties("mesh-uid", e_key, e_print, d_key, d_print, suite)
    offered = make_offer(of_d, d, epoch=1, base=None)
    answer, keys = make_answer(of_e, e, offered.offer, theirs=d.identity.public, base=None)
    return Exchanged(d, e, identities[2], of_d, of_e, offered, answer, keys)


def flipped(value: bytes) -> bytes:
    middle = len(value) // 2
    return value[:middle] + bytes((value[middle] ^ 1,)) + value[middle + 1 :]


def _flip(message: T, field: str) -> T:
    changes: dict[str, Any] = {field: flipped(getattr(message, field))}
    return replace(message, **changes)


def _take_as_it_arrives(whole: Exchanged, message: Offer | Answer) -> Keys:
    """Raises WireError where nobody can read it."""
    match decode(encode(message)):
        case Offer() as offer:
            return whole.take_offer(offer)
        case Answer() as answer:
            return whole.take_answer(answer)
        case _:
            raise WireError("an offer of another suite")


# --- every field of what is signed --------------------------------------------------------------------------


@pytest.mark.parametrize("field", list(Header.__slots__))
@each_suite
def test_a_header_that_was_changed_on_the_way_is_refused_in_either_message(number: int, field: str) -> None:
    whole = exchanged(number)
    for message in (whole.offered.offer, whole.answer):
        changed = replace(message, header=replace(message.header, **{field: CHANGED[field]}))
        with pytest.raises((ExchangeError, WireError)):
            _take_as_it_arrives(whole, changed)


@pytest.mark.parametrize("field", ["kem_public", "dh_public", "signatures"])
@each_suite
def test_an_offer_that_was_changed_on_the_way_is_refused(number: int, field: str) -> None:
    whole = exchanged(number)
    offer = whole.offered.offer
    with pytest.raises(ExchangeError, match="signature"):
        whole.take_offer(_flip(offer, field))


@pytest.mark.parametrize("field", ["offer_hash", "ciphertext", "dh_public", "mac", "signatures"])
@each_suite
def test_an_answer_that_was_changed_on_the_way_is_refused(number: int, field: str) -> None:
    whole = exchanged(number)
    with pytest.raises(ExchangeError):
        whole.take_answer(_flip(whole.answer, field))


@pytest.mark.parametrize("field", [each for each in Header.__slots__ if each not in ("epoch", "nonce")])
@each_suite
def test_no_signature_makes_an_offer_for_others_good(number: int, field: str) -> None:
    """Of the rightful signer: the number and the nonce alone are his to choose."""
    whole = exchanged(number)
    header = replace(whole.offered.offer.header, **{field: CHANGED[field]})
    unsigned = replace(whole.offered.offer, header=header)
    with pytest.raises(ExchangeError, match="another pair"):
        whole.take_offer(replace(unsigned, signatures=whole.sign(unsigned, whole.d.identity)))


@pytest.mark.parametrize("field", list(Header.__slots__))
@each_suite
def test_no_signature_makes_an_answer_to_others_good(number: int, field: str) -> None:
    whole = exchanged(number)
    unsigned = replace(whole.answer, header=replace(whole.answer.header, **{field: CHANGED[field]}))
    with pytest.raises(ExchangeError, match="another offer"):
        whole.take_answer(replace(unsigned, signatures=whole.sign(unsigned, whole.e.identity)))


@pytest.mark.parametrize("field", ["ciphertext", "dh_public", "mac"])
@each_suite
def test_a_signed_answer_whose_secrets_differ_shows_in_its_mac(number: int, field: str) -> None:
    """Implicit rejection raises nothing; nor does another point of the curve."""
    whole = exchanged(number)
    unsigned = _flip(whole.answer, field)
    with pytest.raises(ExchangeError, match="different keys"):
        whole.take_answer(replace(unsigned, signatures=whole.sign(unsigned, whole.e.identity)))


# --- signatures ---------------------------------------------------------------------------------------------


def _stripped(good: bytes, foreign: bytes, same: bytes) -> dict[str, bytes]:
    """Signatures of which one is missing, another's, or the same kind twice."""
    at = ED448_SIGNATURE_BYTES
    return {
        "none": bytes(len(good)),
        "Ed448 alone": good[:at] + bytes(len(good) - at),
        "ML-DSA alone": bytes(at) + good[at:],
        "Ed448 of another": foreign[:at] + good[at:],
        "ML-DSA of another": good[:at] + foreign[at:],
        "of another message": same,
    }


@pytest.mark.parametrize("how", _stripped(bytes(3423), b"", b""))
@each_suite
def test_a_signature_that_is_stripped_or_swapped_makes_the_message_worthless(number: int, how: str) -> None:
    whole = exchanged(number)
    offer, answer = whole.offered.offer, whole.answer
    bad = _stripped(offer.signatures, whole.sign(offer, whole.other), answer.signatures)
    with pytest.raises(ExchangeError, match="signature"):
        whole.take_offer(replace(offer, signatures=bad[how]))
    bad = _stripped(answer.signatures, whole.sign(answer, whole.other), offer.signatures)
    with pytest.raises(ExchangeError, match="signature"):
        whole.take_answer(replace(answer, signatures=bad[how]))


@each_suite
def test_a_message_without_room_for_both_signatures_is_none(number: int) -> None:
    whole = exchanged(number)
    for message in (whole.offered.offer, whole.answer):
        data = encode(message)
        for less in (1, ED448_SIGNATURE_BYTES, len(message.signatures)):
            with pytest.raises(WireError):
                decode(data[:-less])
        with pytest.raises(WireError):
            decode(data + b"\0")


@each_suite
def test_whoever_swaps_the_identities_gets_no_key(number: int) -> None:
    """Somebody with an identity of his own, in the place of either side, with everything else right."""
    whole = exchanged(number)
    stranger = KeyMaker(whole.other, PROVIDER, Random(4).randbytes, SUITES[number])
    as_d = replace(whole.of_d, own_fingerprint=whole.other.public.fingerprint())
    with pytest.raises(ExchangeError, match="another pair"):
        whole.take_offer(make_offer(as_d, stranger, epoch=1, base=None).offer)
    with pytest.raises(ExchangeError, match="signature"):
        whole.take_offer(make_offer(whole.of_d, stranger, epoch=1, base=None).offer)
    answer, _ = make_answer(
        whole.of_e, stranger, whole.offered.offer, theirs=whole.d.identity.public, base=None
    )
    with pytest.raises(ExchangeError, match="signature"):
        whole.take_answer(answer)


def test_a_suite_is_part_of_what_a_key_is_made_of() -> None:
    """The same secrets under another suite's label would be another key; and no offer changes its suite."""
    one, two = exchanged(1), exchanged(2)
    for whole, other in ((one, two), (two, one)):
        with pytest.raises(ExchangeError, match="another pair"):
            whole.take_offer(other.offered.offer)
        relabelled = encode(replace(whole.offered.offer, header=other.offered.offer.header))
        with pytest.raises(WireError):
            decode(relabelled)


# --- words about an epoch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", What)
@pytest.mark.parametrize("by_decapsulator", [True, False])
def test_a_word_with_any_field_changed_is_nobodys(what: What, by_decapsulator: bool) -> None:
    keys = exchanged(1).keys
    word = control(what, keys, by_decapsulator=by_decapsulator)
    assert is_genuine(word, keys, by_decapsulator=by_decapsulator)
    assert not is_genuine(word, keys, by_decapsulator=not by_decapsulator), "a word of the other role"
    for other in What:
        if other is not what:
            assert not is_genuine(replace(word, what=other), keys, by_decapsulator=by_decapsulator)
    for changed in ({"epoch": 2}, {"id": flipped(word.id)}, {"mac": flipped(word.mac)}):
        forged = replace(word, **changed)
        assert not is_genuine(forged, keys, by_decapsulator=by_decapsulator)
    for name in ("confirm_d", "confirm_e"):
        others = replace(keys, confirm_d=Secret(bytes(32)), confirm_e=Secret(bytes(32)))
        assert not is_genuine(word, others, by_decapsulator=by_decapsulator), name


# --- said to a running pair ---------------------------------------------------------------------------------


def _agreed(seed: int) -> Duo:
    duo = Duo(seed)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    duo.run(20.0)
    return duo


def _tell(side: Side, message: Any, number: int = 0) -> None:
    for part in cut(number, encode(message)):
        side.receive(part)


def _outcome(duo: Duo) -> tuple[object, ...]:
    return tuple((side.disk, side.device_psk, side.view.failure) for side in duo.sides)


def _forged(duo: Duo) -> list[Any]:
    """What somebody without any key of the pair may say: every kind of message, numbers at their ends."""
    current = duo.d.disk.current
    assert current is not None
    foreign = exchanged(1)
    stolen = foreign.d.identity.public.fingerprint()
    words: list[Any] = [
        Control(what, current.epoch, id_, bytes(32)) for what in What for id_ in (current.id, bytes(32))
    ]
    return [
        *words,
        *(Refusal(reason, epoch) for reason in RefusedFor for epoch in (0, 1, 2**63, 2**64 - 1)),
        Identity(foreign.d.identity.public),
        Identity(duo.e.identity.public, bytes(SIGNATURES_BYTES)),
        Whence(duo.e.identity.public.fingerprint()),
        Succeeded(Succession(duo.d.identity.public, stolen, bytes(SIGNATURES_BYTES))),
        Succeeded(Succession(duo.e.identity.public, stolen, bytes(SIGNATURES_BYTES))),
        foreign.offered.offer,
        foreign.answer,
        StrangeOffer(foreign.offered.offer.header, b""),
    ]


def test_forged_messages_of_every_kind_change_nothing_in_a_pair_at_rest() -> None:
    duo = _agreed(1)
    before = _outcome(duo)
    for number, message in enumerate(_forged(duo)):
        for side in duo.sides:
            _tell(side, message, number)
        duo.run(0.1)
    duo.run(120.0)
    assert _outcome(duo) == before and duo.deaths == []


@pytest.mark.parametrize("field", ["ed448", "mldsa"])
def test_an_identity_that_was_changed_on_the_way_is_not_the_one_that_is_named(field: str) -> None:
    duo = Duo(3)
    duo.is_cut = True
    duo.start()
    duo.run(1.0)
    public = duo.e.identity.public
    changes: dict[str, Any] = {field: flipped(getattr(public, field))}
    assert duo.d.room is not None
    _tell(duo.d, Identity(replace(public, **changes)))
    assert duo.d.room.dropped == 1
    duo.is_cut = False
    duo.until(duo.is_agreed, within=200.0)


def test_forged_wishes_cost_an_exchange_at_most_and_never_the_key() -> None:
    duo = _agreed(2)
    for epoch, id_ in ((0, bytes(32)), (1, bytes(32)), (2**64 - 1, b"\xff" * 32)):
        for side in duo.sides:
            _tell(side, Wanted(epoch, id_))
        duo.until(duo.is_agreed, within=300.0)
    assert duo.deaths == []


@pytest.mark.parametrize("seed", range(3))
def test_all_that_was_ever_said_again_and_to_the_wrong_side_changes_no_key(seed: int) -> None:
    """Replay, reflection, and messages of another pair, in the middle of a rotation, too."""
    duo, others = _agreed(seed), _agreed(seed + 100)
    recorded: list[KeyPart] = [part for _, part in duo.heard + others.heard]
    duo.d.rotate()
    for part in recorded:
        for side in duo.sides:
            side.receive(part)
        duo.run(0.2)
    duo.until(lambda: duo.is_agreed(2), within=400.0)
    recorded = [part for _, part in duo.heard]
    before = duo.d.device_psk
    for part in recorded:
        for side in duo.sides:
            side.receive(part)
    duo.run(1.0)
    assert duo.is_agreed(2) and duo.d.device_psk == before and duo.deaths == []
