"""A provider whose ML-KEM is that of liboqs; the rest is `cryptography`'s, for liboqs has no curves.

It speaks to the shared library itself. The Python package of the same project is not used: where it finds no
library it fetches the sources, builds them, and ends the process when that fails. `Library` is what the shell
loaded (`shell/making.py`): the C functions that are used here, of `oqs/kem.h`.

liboqs reads as many bytes as the algorithm has, whatever it is given, and its older releases take public keys
that FIPS 203 (7.2) has refused: lengths and coefficients are checked here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from scope.model import Secret
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.provider import (
    KEM_SECRET_BYTES,
    KEM_SEED_BYTES,
    ProviderError,
    Suite,
    require_length,
)

_SUCCESS = 0  # OQS_STATUS
_MODULUS = 3329
_EXPANDED_BYTES = {"ML-KEM-1024": 3168, "ML-KEM-768": 2400}  # of a decapsulation key
_Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of liboqs, with their C types set; a status other than 0 is a failure."""

    new: _Function  # OQS_KEM_new: (name) -> kem, or NULL where the library was built without it
    make_keys: _Function  # OQS_KEM_keypair_derand: (kem, public key out, private key out, seed) -> status
    encapsulate: _Function  # OQS_KEM_encaps: (kem, ciphertext out, secret out, public key) -> status
    decapsulate: _Function  # OQS_KEM_decaps: (kem, secret out, ciphertext, private key) -> status


class LiboqsProvider(CryptographyProvider):
    """ML-KEM by liboqs."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._kems: dict[str, object] = {}

    def kem_public(self, suite: Suite, seed: Secret) -> bytes:
        """See Provider."""
        public, private = self._expand(suite, seed)
        _wipe(private)
        return public

    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        """See Provider."""
        require_length(public, suite.kem_public_bytes, f"a public key of {suite.kem}")
        if not _is_reduced(public[:-32]):
            raise ProviderError(f"a public key of {suite.kem} with coefficients out of range")
        ciphertext = ctypes.create_string_buffer(suite.kem_ciphertext_bytes)
        secret = ctypes.create_string_buffer(KEM_SECRET_BYTES)
        _must(self._library.encapsulate(self._kem(suite), ciphertext, secret, public), suite)
        return Secret(_take(secret)), ciphertext.raw

    def decapsulate(self, suite: Suite, seed: Secret, ciphertext: bytes) -> Secret:
        """See Provider."""
        require_length(ciphertext, suite.kem_ciphertext_bytes, f"a ciphertext of {suite.kem}")
        _, private = self._expand(suite, seed)
        secret = ctypes.create_string_buffer(KEM_SECRET_BYTES)
        status = self._library.decapsulate(self._kem(suite), secret, ciphertext, private)
        _wipe(private)
        _must(status, suite)
        return Secret(_take(secret))

    def _expand(self, suite: Suite, seed: Secret) -> tuple[bytes, ctypes.Array[ctypes.c_char]]:
        require_length(seed.raw, KEM_SEED_BYTES, f"a seed of {suite.kem}")
        public = ctypes.create_string_buffer(suite.kem_public_bytes)
        private = ctypes.create_string_buffer(_EXPANDED_BYTES[suite.kem])
        status = self._library.make_keys(self._kem(suite), public, private, seed.raw)
        _must(status, suite)
        return public.raw, private

    def _kem(self, suite: Suite) -> object:
        kem = self._kems.setdefault(suite.kem, self._library.new(suite.kem.encode()))
        if not kem:
            raise ProviderError(f"liboqs was built without {suite.kem}")
        return kem


def _must(status: object, suite: Suite) -> None:
    if status != _SUCCESS:
        raise ProviderError(f"liboqs refused what it was given for {suite.kem}")


def _is_reduced(packed: bytes) -> bool:
    """Whether every coefficient of twelve bits is below the modulus."""
    for at in range(0, len(packed), 3):
        first, middle, last = packed[at : at + 3]
        if first | (middle & 15) << 8 >= _MODULUS or middle >> 4 | last << 4 >= _MODULUS:
            return False
    return True


def _take(buffer: ctypes.Array[ctypes.c_char]) -> bytes:
    value: bytes = buffer.raw
    _wipe(buffer)
    return value


def _wipe(buffer: ctypes.Array[ctypes.c_char]) -> None:
    ctypes.memset(buffer, 0, len(buffer))
