"""The suites of the exchange, their primitives behind one small interface, and each provider's self-test.

A suite is a key encapsulation (ML-KEM, FIPS 203) with a Diffie-Hellman function (RFC 7748): ML-KEM-1024 with
X448, or, where a library has no X448, ML-KEM-768 with X25519. Both sides of a pair are set to the same one:
none is ever negotiated. Identities have two signatures whatever the suite: Ed448 (RFC 8032) and ML-DSA-65
(FIPS 204).

Private keys are seeds, so whoever draws random bytes makes them; only the encapsulation and the hedged
signature draw their own. Providers check every length: a library that pads or cuts what it is given would
make keys that no other side has.

A tampered ciphertext raises nothing: by FIPS 203 the secret is then another one, and the confirmation of the
exchange fails.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm

from scope.model import ConfigError, Secret

KEM_SEED_BYTES, KEM_SECRET_BYTES = 64, 32
ED448_BYTES, ED448_SIGNATURE_BYTES = 57, 114
MLDSA_SEED_BYTES, MLDSA_PUBLIC_BYTES, MLDSA_SIGNATURE_BYTES = 32, 1952, 3309

RandomBytes: TypeAlias = Callable[[int], bytes]

_KNOWN_SEED = Secret(bytes(range(KEM_SEED_BYTES)))


@dataclass(frozen=True, slots=True)
class Suite:
    """How two sides come to a secret. The number goes over the wire and is never given to another one."""

    number: int
    kem: str
    dh: str
    kem_public_bytes: int
    kem_ciphertext_bytes: int
    dh_bytes: int  # private, public and shared alike
    known_public: str  # SHA-256 of the KEM's public key of the seed 00 01 02 ... 3f


SUITES: Mapping[int, Suite] = MappingProxyType(
    {
        suite.number: suite
        for suite in (
            Suite(
                1,
                kem="ML-KEM-1024",
                dh="X448",
                kem_public_bytes=1568,
                kem_ciphertext_bytes=1568,
                dh_bytes=56,
                known_public="c7b8fa0aa471d5ae18922d6ccad5b31e1d84f92ae723abfd13747018740a8530",
            ),
            Suite(
                2,
                kem="ML-KEM-768",
                dh="X25519",
                kem_public_bytes=1184,
                kem_ciphertext_bytes=1088,
                dh_bytes=32,
                known_public="0b7934c83125c788995e2ba6bd761e33046b3e40571be53e023309a29f398cc9",
            ),
        )
    }
)


class ProviderError(Exception):
    """What the other side sent is no key, no ciphertext, or a point that gives everybody the same secret."""


class Provider(Protocol):
    """Raises ProviderError for what is not of the right length or not valid."""

    def kem_public(self, suite: Suite, seed: Secret) -> bytes:
        """The KEM's public key of a seed of KEM_SEED_BYTES."""
        ...

    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        """A fresh secret and its ciphertext, in this order."""
        ...

    def decapsulate(self, suite: Suite, seed: Secret, ciphertext: bytes) -> Secret:
        """The secret of a ciphertext; of a tampered one another secret."""
        ...

    def dh_public(self, suite: Suite, private: Secret) -> bytes:
        """The Diffie-Hellman public key of `dh_bytes` private bytes."""
        ...

    def dh(self, suite: Suite, private: Secret, public: bytes) -> Secret:
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


def require_length(value: bytes, length: int, what: str) -> None:
    """Raises ProviderError for bytes of another length."""
    if len(value) != length:
        raise ProviderError(f"{what} is {length} bytes, not {len(value)}")


def self_test(provider: Provider, suite: Suite) -> None:
    """Try each primitive once, both ways, and against a known answer. Raises ConfigError.

    A library built without an algorithm says so only when it is used, and one that returns a pair in the
    other order, or pads its input, says nothing at all.
    """
    try:
        failed = _first_failure(provider, suite)
    except (ProviderError, UnsupportedAlgorithm, ValueError) as error:
        failed = str(error)
    if failed:
        raise ConfigError(
            f"post-quantum keys cannot be made here ({failed}): install the wheel of cryptography 48 or "
            "later, see what --key-provider names, or set spec.postQuantum.mode of the ScopeMesh to Off"
        )


def _first_failure(provider: Provider, suite: Suite) -> str:
    """What is wrong with the answers of a provider; "" where nothing is."""
    public = provider.kem_public(suite, _KNOWN_SEED)
    secret, ciphertext = provider.encapsulate(suite, public)
    tampered = bytes((ciphertext[0] ^ 1,)) + ciphertext[1:]
    one = Secret(bytes(range(suite.dh_bytes)))
    other = Secret(bytes(range(1, suite.dh_bytes + 1)))
    ed448, mldsa = Secret(bytes(range(ED448_BYTES))), Secret(bytes(range(MLDSA_SEED_BYTES)))
    keys = provider.sign_public(ed448, mldsa)
    signatures = provider.sign(ed448, mldsa, b"message", b"context")
    checks = {
        f"the public key of {suite.kem}": hashlib.sha256(public).hexdigest() == suite.known_public,
        f"the encapsulation of {suite.kem}": len(secret.raw) == KEM_SECRET_BYTES
        and len(ciphertext) == suite.kem_ciphertext_bytes
        and provider.decapsulate(suite, _KNOWN_SEED, ciphertext) == secret,
        f"the implicit rejection of {suite.kem}": provider.decapsulate(suite, _KNOWN_SEED, tampered)
        != secret,
        f"the check of public keys of {suite.kem}": _refuses(
            lambda: provider.encapsulate(suite, b"\xff" * suite.kem_public_bytes)
        )
        and _refuses(lambda: provider.encapsulate(suite, public[:-1])),
        f"the check of ciphertexts of {suite.kem}": _refuses(
            lambda: provider.decapsulate(suite, _KNOWN_SEED, ciphertext[:-1])
        ),
        suite.dh: provider.dh(suite, one, provider.dh_public(suite, other))
        == provider.dh(suite, other, provider.dh_public(suite, one)),
        f"the check of low-order points of {suite.dh}": _refuses(
            lambda: provider.dh(suite, one, bytes(suite.dh_bytes))
        ),
        "a signature": provider.verify(*keys, signatures=signatures, message=b"message", context=b"context"),
        "a false signature": not provider.verify(
            *keys, signatures=signatures, message=b"massage", context=b"context"
        )
        and not provider.verify(*keys, signatures=signatures, message=b"message", context=b"another"),
    }
    wrong = next((what for what, holds in checks.items() if not holds), "")
    return f"the library is wrong about {wrong}" if wrong else ""


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ProviderError:
        return True
    return False
