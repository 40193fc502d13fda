"""A provider of the exchange at the price of a hash: for thousands of exchanges in virtual time."""

from __future__ import annotations

import hashlib
from random import Random

from scope_agent.psk.provider import (
    ED448_BYTES,
    ED448_SIGNATURE_BYTES,
    MLDSA_PUBLIC_BYTES,
    MLDSA_SIGNATURE_BYTES,
    Suite,
)

from scope.model import Secret


def _hash(size: int, *parts: bytes) -> bytes:
    shake = hashlib.shake_256()
    for part in parts:
        shake.update(len(part).to_bytes(4, "big") + part)
    return shake.digest(size)


class ToyProvider:
    """The shape of a provider, at the price of a hash; nothing is secret here."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def kem_public(self, suite: Suite, seed: Secret) -> bytes:
        return _hash(suite.kem_public_bytes, b"kem", seed.raw)

    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        ciphertext = self._random.randbytes(suite.kem_ciphertext_bytes)
        return Secret(_hash(32, public, ciphertext)), ciphertext

    def decapsulate(self, suite: Suite, seed: Secret, ciphertext: bytes) -> Secret:
        return Secret(_hash(32, self.kem_public(suite, seed), ciphertext))

    def dh_public(self, suite: Suite, private: Secret) -> bytes:
        return _hash(suite.dh_bytes, b"dh", private.raw)

    def dh(self, suite: Suite, private: Secret, public: bytes) -> Secret:
        return Secret(_hash(suite.dh_bytes, *sorted((self.dh_public(suite, private), public))))

    def sign_public(self, ed448: Secret, mldsa: Secret) -> tuple[bytes, bytes]:
        return _hash(ED448_BYTES, b"ed", ed448.raw), _hash(MLDSA_PUBLIC_BYTES, b"ml", mldsa.raw)

    def sign(self, ed448: Secret, mldsa: Secret, message: bytes, context: bytes) -> bytes:
        first, second = self.sign_public(ed448, mldsa)
        return _hash(ED448_SIGNATURE_BYTES, first, message) + _hash(
            MLDSA_SIGNATURE_BYTES, second, message, context
        )

    def verify(
        self, ed448: bytes, mldsa: bytes, *, signatures: bytes, message: bytes, context: bytes
    ) -> bool:
        return signatures == _hash(ED448_SIGNATURE_BYTES, ed448, message) + _hash(
            MLDSA_SIGNATURE_BYTES, mldsa, message, context
        )
