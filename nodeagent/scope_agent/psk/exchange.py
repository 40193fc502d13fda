"""One exchange: an Offer, its Answer, and the key that both sides then have. Pure functions.

The decapsulator D is the side with the larger WireGuard key (raw bytes); it makes the Offer with an ephemeral
KEM key and an ephemeral Diffie-Hellman key of its suite. The encapsulator E answers with a ciphertext and its
own Diffie-Hellman key. Both messages name the suite, the mesh, both identities, both WireGuard keys, the
epoch and what it builds on, and are signed by Ed448 and by ML-DSA-65; the keys are derived from both secrets
and the whole transcript:

    th  = SHA3-512(lp(Offer's body, Answer's body))
    PRK = HKDF-Extract(the base epoch's chain value, or zeros;
                       KEM secret | DH secret | ciphertext | DH key of E | KEM key | DH key of D | label)
    psk, chain, confirm D, confirm E, id = HKDF-Expand(PRK, lp(label, name, th)), 32 bytes each

The label names the suite. `lp` puts a length of four bytes before each part; HKDF is that of RFC 5869 with
SHA3-256. The key holds while either secret does, and no worse than the base epoch's. Implicit rejection makes
the KEM's secret of a tampered ciphertext another one, silently: the Answer's MAC under E's confirmation key
shows it.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace

from scope.model import Fingerprint, PublicKey, Secret
from scope_agent.psk.identity import HybridIdentity, KeyMaker, PublicIdentity
from scope_agent.psk.messages import (
    MAC_BYTES,
    NO_ID,
    NONCE_BYTES,
    SIGNATURES_BYTES,
    Answer,
    Control,
    Header,
    Offer,
    What,
)
from scope_agent.psk.provider import KEM_SEED_BYTES, SUITES, Provider, ProviderError, Suite
from scope_agent.psk.slots import Keys

_LABEL = b"scope psk "  # and the suite's number
_MANAGER_LABEL = b"scope psk of the manager 1"
_SIGN_PREFIX = b"scope psk signature 1"
_NO_CHAIN = Secret(bytes(32))


class ExchangeError(Exception):
    """A message that is not what it should be, of a peer that is who it says: the old key stays."""


@dataclass(frozen=True, slots=True)
class Parties:
    """Who exchanges, in which mesh, by which suite. D and E are told apart by the WireGuard keys alone."""

    mesh_uid: str
    own: PublicKey
    own_fingerprint: Fingerprint
    peer: PublicKey
    peer_fingerprint: Fingerprint
    suite: Suite = SUITES[1]

    @property
    def is_decapsulator(self) -> bool:
        """Whether we start exchanges."""
        return self.own.raw > self.peer.raw

    def header(self, *, epoch: int, base: bytes, nonce: bytes) -> Header:
        """The header of an exchange of ours."""
        own, peer = (self.own_fingerprint, self.own), (self.peer_fingerprint, self.peer)
        (fingerprint_d, key_d), (fingerprint_e, key_e) = (own, peer) if self.is_decapsulator else (peer, own)
        return Header(
            self.suite.number,
            self.mesh_uid,
            fingerprint_d=fingerprint_d,
            fingerprint_e=fingerprint_e,
            key_d=key_d,
            key_e=key_e,
            epoch=epoch,
            base=base,
            nonce=nonce,
        )


@dataclass(frozen=True, slots=True)
class Offered:
    """An Offer of ours with the private halves that its Answer needs."""

    offer: Offer
    kem_seed: Secret
    dh_private: Secret


def manager_keys(psk: Secret, current: Keys | None) -> Keys:
    """The pre-shared key of who manages the device, as keys of both holders; zeros stand for none.

    Without `current`: what a pair's first exchange builds on. With it: the way back, of which only those can
    speak who hold `current`, too.
    """
    salt = current.chain if current is not None else _NO_CHAIN
    prk = _hmac(salt.raw, _lp(_MANAGER_LABEL, psk.raw))

    def expand(name: bytes) -> bytes:
        return _hmac(prk, _lp(_MANAGER_LABEL, name) + b"\x01")

    return Keys(
        epoch=current.epoch if current is not None else 0,
        id=expand(b"id"),
        psk=psk,
        chain=Secret(expand(b"chain")),
        confirm_d=Secret(expand(b"confirm D")),
        confirm_e=Secret(expand(b"confirm E")),
    )


def make_offer(parties: Parties, maker: KeyMaker, *, epoch: int, base: Keys | None) -> Offered:
    """D's part: a signed Offer for `epoch`, on top of `base`."""
    provider, random_bytes, suite = maker.provider, maker.random_bytes, parties.suite
    kem_seed, dh_private = Secret(random_bytes(KEM_SEED_BYTES)), Secret(random_bytes(suite.dh_bytes))
    header = parties.header(
        epoch=epoch, base=base.id if base is not None else NO_ID, nonce=random_bytes(NONCE_BYTES)
    )
    unsigned = Offer(
        header, provider.kem_public(suite, kem_seed), provider.dh_public(suite, dh_private), signatures=b""
    )
    signatures = _sign(b"offer", unsigned.body(), maker.identity, provider)
    return Offered(replace(unsigned, signatures=signatures), kem_seed, dh_private)


def make_answer(
    parties: Parties,
    maker: KeyMaker,
    offer: Offer,
    *,
    theirs: PublicIdentity,
    base: Keys | None,
) -> tuple[Answer, Keys]:
    """E's part, and the keys. Raises ExchangeError; the epoch is the caller's to judge."""
    provider, suite = maker.provider, parties.suite
    header = parties.header(
        epoch=offer.header.epoch, base=base.id if base is not None else NO_ID, nonce=offer.header.nonce
    )
    if parties.is_decapsulator or offer.header != header:
        raise ExchangeError("an offer for another pair, mesh, suite or base")
    _verify(b"offer", offer.body(), offer.signatures, theirs, provider)
    dh_private = Secret(maker.random_bytes(suite.dh_bytes))
    try:
        kem_secret, ciphertext = provider.encapsulate(suite, offer.kem_public)
        dh_secret = provider.dh(suite, dh_private, offer.dh_public)
    except ProviderError as error:
        raise ExchangeError(str(error)) from None
    unsigned = Answer(
        header,
        offer_hash=hashlib.sha3_512(offer.body()).digest(),
        ciphertext=ciphertext,
        dh_public=provider.dh_public(suite, dh_private),
        mac=bytes(MAC_BYTES),
        signatures=bytes(SIGNATURES_BYTES),
    )
    keys = _derive(offer, unsigned, kem_secret=kem_secret, dh_secret=dh_secret, base=base)
    mac = _answer_mac(keys, unsigned)
    signatures = _sign(b"answer", unsigned.body(), maker.identity, provider)
    return replace(unsigned, mac=mac, signatures=signatures), keys


def take_answer(
    offered: Offered, answer: Answer, *, theirs: PublicIdentity, base: Keys | None, provider: Provider
) -> Keys:
    """D's end of it. Raises ExchangeError."""
    offer, suite = offered.offer, SUITES[offered.offer.header.suite]
    if answer.header != offer.header or answer.offer_hash != hashlib.sha3_512(offer.body()).digest():
        raise ExchangeError("an answer to another offer")
    _verify(b"answer", answer.body(), answer.signatures, theirs, provider)
    try:
        kem_secret = provider.decapsulate(suite, offered.kem_seed, answer.ciphertext)
        dh_secret = provider.dh(suite, offered.dh_private, answer.dh_public)
    except ProviderError as error:
        raise ExchangeError(str(error)) from None
    keys = _derive(offer, answer, kem_secret=kem_secret, dh_secret=dh_secret, base=base)
    if not hmac.compare_digest(_answer_mac(keys, answer), answer.mac):
        raise ExchangeError("the two sides derived different keys")
    return keys


def control(what: What, keys: Keys, *, by_decapsulator: bool) -> Control:
    """A word about an epoch, under the speaker's confirmation key."""
    mac = _control_mac(what, keys, by_decapsulator=by_decapsulator)
    return Control(what, keys.epoch, keys.id, mac)


def is_genuine(word: Control, keys: Keys, *, by_decapsulator: bool) -> bool:
    """Whether a word about `keys` comes from their other holder, in its role."""
    if (word.epoch, word.id) != (keys.epoch, keys.id):
        return False
    mac = _control_mac(word.what, keys, by_decapsulator=by_decapsulator)
    return hmac.compare_digest(mac, word.mac)


# --- derivation ---------------------------------------------------------------------------------------------


def _derive(
    offer: Offer, answer: Answer, *, kem_secret: Secret, dh_secret: Secret, base: Keys | None
) -> Keys:
    label = _LABEL + str(offer.header.suite).encode()
    transcript = hashlib.sha3_512(_lp(offer.body(), answer.body())).digest()
    material = b"".join(
        (
            kem_secret.raw,
            dh_secret.raw,
            answer.ciphertext,
            answer.dh_public,
            offer.kem_public,
            offer.dh_public,
            label,
        )
    )
    salt = base.chain if base is not None else _NO_CHAIN
    prk = _hmac(salt.raw, material)

    def expand(name: bytes) -> bytes:
        return _hmac(prk, _lp(label, name, transcript) + b"\x01")  # one block of RFC 5869, section 2.3

    return Keys(
        epoch=offer.header.epoch,
        id=expand(b"id"),
        psk=Secret(expand(b"psk")),
        chain=Secret(expand(b"chain")),
        confirm_d=Secret(expand(b"confirm D")),
        confirm_e=Secret(expand(b"confirm E")),
        suite=offer.header.suite,
    )


def _answer_mac(keys: Keys, answer: Answer) -> bytes:
    return _hmac(keys.confirm_e.raw, _lp(b"answer", answer.body()))


def _control_mac(what: What, keys: Keys, *, by_decapsulator: bool) -> bytes:
    key = keys.confirm_d if by_decapsulator else keys.confirm_e
    return _hmac(key.raw, _lp(b"control", bytes((what,)), keys.epoch.to_bytes(8, "big"), keys.id))


def _sign(context: bytes, body: bytes, identity: HybridIdentity, provider: Provider) -> bytes:
    return provider.sign(identity.ed448, identity.mldsa, _signed(context, body), context)


def _verify(
    context: bytes, body: bytes, signatures: bytes, theirs: PublicIdentity, provider: Provider
) -> None:
    message = _signed(context, body)
    if not provider.verify(
        theirs.ed448, theirs.mldsa, signatures=signatures, message=message, context=context
    ):
        raise ExchangeError("a signature does not hold")


def _signed(context: bytes, body: bytes) -> bytes:
    return _lp(_SIGN_PREFIX, context) + hashlib.sha3_512(body).digest()


def _lp(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def _hmac(key: bytes, message: bytes) -> bytes:
    return hmac.new(key, message, hashlib.sha3_256).digest()
