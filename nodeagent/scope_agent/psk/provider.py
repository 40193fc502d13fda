"""The primitives of the exchange behind one small interface, and the self-test that each provider must pass.

A provider brings a key encapsulation (ML-KEM-1024, FIPS 203), a Diffie-Hellman function (X448, RFC 7748) and
two signatures (Ed448, RFC 8032; ML-DSA-65, FIPS 204). Private keys are seeds, so whoever draws random bytes
makes them; only the encapsulation and the hedged signature draw their own. Every length is checked here: a
library that pads or cuts what it is given would make keys that no other side has.

A tampered ciphertext raises nothing: by FIPS 203 the secret is then another one, and the confirmation of the
exchange fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm

from scope.model import ConfigError, Secret

KEM_SEED_BYTES, KEM_PUBLIC_BYTES, KEM_CIPHERTEXT_BYTES, KEM_SECRET_BYTES = 64, 1568, 1568, 32
DH_BYTES = 56  # private, public and shared alike
ED448_BYTES, ED448_SIGNATURE_BYTES = 57, 114
MLDSA_SEED_BYTES, MLDSA_PUBLIC_BYTES, MLDSA_SIGNATURE_BYTES = 32, 1952, 3309

RandomBytes: TypeAlias = Callable[[int], bytes]

# SHA-256 of the ML-KEM-1024 public key of the seed 00 01 02 ... 3f.
_KNOWN_SEED = Secret(bytes(range(KEM_SEED_BYTES)))
_KNOWN_PUBLIC = "c7b8fa0aa471d5ae18922d6ccad5b31e1d84f92ae723abfd13747018740a8530"


class ProviderError(Exception):
    """What the other side sent is no key, no ciphertext, or a point that gives everybody the same secret."""


class Provider(Protocol):
    """Raises ProviderError for what is not of the right length or not valid."""

    def kem_public(self, seed: Secret) -> bytes:
        """The ML-KEM-1024 public key of a seed of KEM_SEED_BYTES."""
        ...

    def encapsulate(self, public: bytes) -> tuple[Secret, bytes]:
        """A fresh secret and its ciphertext, in this order."""
        ...

    def decapsulate(self, seed: Secret, ciphertext: bytes) -> Secret:
        """The secret of a ciphertext; of a tampered one another secret."""
        ...

    def dh_public(self, private: Secret) -> bytes:
        """The X448 public key of DH_BYTES private bytes."""
        ...

    def dh(self, private: Secret, public: bytes) -> Secret:
        """The shared secret; low-order points are refused."""
        ...

    def sign(self, ed448: Secret, mldsa: Secret, message: bytes, context: bytes) -> bytes:
        """Both signatures, Ed448 first. `context` is ML-DSA's; `message` says it, too."""
        ...

    def verify(
        self, ed448: bytes, mldsa: bytes, *, signatures: bytes, message: bytes, context: bytes
    ) -> bool:
        """Whether both signatures hold."""
        ...

    def sign_public(self, ed448: Secret, mldsa: Secret) -> tuple[bytes, bytes]:
        """The public halves of two signing seeds."""
        ...


def self_test(provider: Provider) -> None:
    """Try each primitive once, both ways, and against a known answer. Raises ConfigError.

    A library built without an algorithm says so only when it is used, and one that returns a pair in the
    other order, or pads its input, says nothing at all.
    """
    try:
        sound = _is_sound(provider)
    except (ProviderError, UnsupportedAlgorithm, ValueError) as error:
        raise ConfigError(
            f"post-quantum keys cannot be made here ({error}): install the wheel of cryptography 48 or "
            "later, or set spec.postQuantum.mode of the ScopeMesh to Off"
        ) from None
    if not sound:
        raise ConfigError(
            "post-quantum keys cannot be made here: the cryptography library gives wrong answers; "
            "install it anew"
        )


def _is_sound(provider: Provider) -> bool:
    public = provider.kem_public(_KNOWN_SEED)
    secret, ciphertext = provider.encapsulate(public)
    tampered = bytes((ciphertext[0] ^ 1,)) + ciphertext[1:]
    one, other = Secret(bytes(range(DH_BYTES))), Secret(bytes(range(1, DH_BYTES + 1)))
    ed448, mldsa = Secret(bytes(range(ED448_BYTES))), Secret(bytes(range(MLDSA_SEED_BYTES)))
    keys = provider.sign_public(ed448, mldsa)
    signatures = provider.sign(ed448, mldsa, b"message", b"context")
    return (
        hashlib.sha256(public).hexdigest() == _KNOWN_PUBLIC
        and len(secret.raw) == KEM_SECRET_BYTES
        and provider.decapsulate(_KNOWN_SEED, ciphertext) == secret
        and provider.decapsulate(_KNOWN_SEED, tampered) != secret
        and provider.dh(one, provider.dh_public(other)) == provider.dh(other, provider.dh_public(one))
        and provider.verify(*keys, signatures=signatures, message=b"message", context=b"context")
        and not provider.verify(*keys, signatures=signatures, message=b"massage", context=b"context")
        and not provider.verify(*keys, signatures=signatures, message=b"message", context=b"another")
    )
