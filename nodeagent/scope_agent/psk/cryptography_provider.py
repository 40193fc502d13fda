"""The provider that agents use: all primitives by the `cryptography` package, from release 48 on.

Imported when keys are to be made, and not at an agent's start.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey, Ed448PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
    MLKEM1024PrivateKey,
    MLKEM1024PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.x448 import X448PrivateKey, X448PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from scope.model import Secret
from scope_agent.psk.provider import (
    ED448_SIGNATURE_BYTES,
    MLDSA_SIGNATURE_BYTES,
    ProviderError,
    Suite,
    require_length,
)


class CryptographyProvider:
    """All of it by the `cryptography` package."""

    def kem_public(self, suite: Suite, seed: Secret) -> bytes:
        """See Provider."""
        return _kem_private(suite, seed).public_key().public_bytes_raw()

    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        """See Provider."""
        require_length(public, suite.kem_public_bytes, f"a public key of {suite.kem}")
        kind = MLKEM1024PublicKey if suite.kem == "ML-KEM-1024" else MLKEM768PublicKey
        try:
            secret, ciphertext = kind.from_public_bytes(public).encapsulate()
        except ValueError:
            raise ProviderError(f"a public key of {suite.kem} with coefficients out of range") from None
        return Secret(secret), ciphertext

    def decapsulate(self, suite: Suite, seed: Secret, ciphertext: bytes) -> Secret:
        """See Provider."""
        require_length(ciphertext, suite.kem_ciphertext_bytes, f"a ciphertext of {suite.kem}")
        return Secret(_kem_private(suite, seed).decapsulate(ciphertext))

    def dh_public(self, suite: Suite, private: Secret) -> bytes:
        """See Provider."""
        if suite.dh == "X448":
            return X448PrivateKey.from_private_bytes(private.raw).public_key().public_bytes_raw()
        return X25519PrivateKey.from_private_bytes(private.raw).public_key().public_bytes_raw()

    def dh(self, suite: Suite, private: Secret, public: bytes) -> Secret:
        """See Provider."""
        require_length(public, suite.dh_bytes, f"a public key of {suite.dh}")
        try:
            if suite.dh == "X448":
                own = X448PrivateKey.from_private_bytes(private.raw)
                return Secret(own.exchange(X448PublicKey.from_public_bytes(public)))
            own_25519 = X25519PrivateKey.from_private_bytes(private.raw)
            return Secret(own_25519.exchange(X25519PublicKey.from_public_bytes(public)))
        except ValueError:
            raise ProviderError(f"a public key of {suite.dh} of low order") from None

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


def _kem_private(suite: Suite, seed: Secret) -> MLKEM1024PrivateKey | MLKEM768PrivateKey:
    kind = MLKEM1024PrivateKey if suite.kem == "ML-KEM-1024" else MLKEM768PrivateKey
    return kind.from_seed_bytes(seed.raw)
