"""The provider that agents use: all four primitives by the `cryptography` package, from release 48 on.

Imported when keys are to be made, and not at an agent's start.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey, Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM1024PrivateKey, MLKEM1024PublicKey
from cryptography.hazmat.primitives.asymmetric.x448 import X448PrivateKey, X448PublicKey

from scope.model import Secret
from scope_agent.psk.provider import (
    DH_BYTES,
    ED448_SIGNATURE_BYTES,
    KEM_CIPHERTEXT_BYTES,
    KEM_PUBLIC_BYTES,
    MLDSA_SIGNATURE_BYTES,
    ProviderError,
)


class CryptographyProvider:
    """All four by the `cryptography` package, from release 48 on."""

    def kem_public(self, seed: Secret) -> bytes:
        """See Provider."""
        return MLKEM1024PrivateKey.from_seed_bytes(seed.raw).public_key().public_bytes_raw()

    def encapsulate(self, public: bytes) -> tuple[Secret, bytes]:
        """See Provider."""
        _require(public, KEM_PUBLIC_BYTES, "an ML-KEM-1024 public key")
        try:
            secret, ciphertext = MLKEM1024PublicKey.from_public_bytes(public).encapsulate()
        except ValueError:
            raise ProviderError("an ML-KEM-1024 public key with coefficients out of range") from None
        return Secret(secret), ciphertext

    def decapsulate(self, seed: Secret, ciphertext: bytes) -> Secret:
        """See Provider."""
        _require(ciphertext, KEM_CIPHERTEXT_BYTES, "an ML-KEM-1024 ciphertext")
        return Secret(MLKEM1024PrivateKey.from_seed_bytes(seed.raw).decapsulate(ciphertext))

    def dh_public(self, private: Secret) -> bytes:
        """See Provider."""
        return X448PrivateKey.from_private_bytes(private.raw).public_key().public_bytes_raw()

    def dh(self, private: Secret, public: bytes) -> Secret:
        """See Provider."""
        _require(public, DH_BYTES, "an X448 public key")
        try:
            own = X448PrivateKey.from_private_bytes(private.raw)
            return Secret(own.exchange(X448PublicKey.from_public_bytes(public)))
        except ValueError:
            raise ProviderError("an X448 public key of low order") from None

    def sign(self, ed448: Secret, mldsa: Secret, message: bytes, context: bytes) -> bytes:
        """See Provider."""
        first = Ed448PrivateKey.from_private_bytes(ed448.raw).sign(message)
        return first + MLDSA65PrivateKey.from_seed_bytes(mldsa.raw).sign(message, context)

    def verify(
        self, ed448: bytes, mldsa: bytes, *, signatures: bytes, message: bytes, context: bytes
    ) -> bool:
        """See Provider."""
        if len(signatures) != ED448_SIGNATURE_BYTES + MLDSA_SIGNATURE_BYTES:
            return False
        try:
            Ed448PublicKey.from_public_bytes(ed448).verify(signatures[:ED448_SIGNATURE_BYTES], message)
            MLDSA65PublicKey.from_public_bytes(mldsa).verify(
                signatures[ED448_SIGNATURE_BYTES:], message, context
            )
        except (InvalidSignature, ValueError):
            return False
        return True

    def sign_public(self, ed448: Secret, mldsa: Secret) -> tuple[bytes, bytes]:
        """See Provider."""
        first = Ed448PrivateKey.from_private_bytes(ed448.raw).public_key().public_bytes_raw()
        return first, MLDSA65PrivateKey.from_seed_bytes(mldsa.raw).public_key().public_bytes_raw()


def _require(value: bytes, length: int, what: str) -> None:
    if len(value) != length:
        raise ProviderError(f"{what} is {length} bytes, not {len(value)}")
