"""How a gateway that got another TLS key is believed by those who know it by the pin of an earlier one.

Its certificate carries, in an extension of its own, the pins of the keys that this one replaces, and a
signature (Ed25519) of the registry's signing key over a label, the pin of the certificate's own key and
those: each behind its length in four bytes (big endian). Whoever joined knows that signing key. A certificate
names the keys before its own alone, so that an earlier key is never taken for a later one.

    extension: the signature, 64 bytes, then 32 bytes for each pin
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scope.model import PublicKey, Secret

# A UUID below the arc for such (ITU-T X.667): nobody gives out a number for it.
OID: Final = "2.25.192246066048980167960789915991313122"
MAX_REPLACED: Final = 16  # pins that are named: a key is replaced when it was lost or stolen, not every month
_LABEL = b"scope gateway key 1"
_SIGNATURE, _PIN = 64, 32  # bytes


def vouch(pin: bytes, replaced: Sequence[bytes], *, signing: Secret) -> bytes:
    """The content of the extension; `signing` is the raw 32-byte Ed25519 private key of the registry."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(signing.raw)
    return private.sign(_statement(pin, replaced)) + b"".join(replaced)


def replaced_by(content: bytes) -> tuple[bytes, ...]:
    """The pins that the content of an extension names."""
    return tuple(content[at : at + _PIN] for at in range(_SIGNATURE, len(content), _PIN))


def replaces(certificate: bytes, *, pin: bytes, registry: PublicKey) -> bool:
    """Whether the key of a certificate (DER) takes the place of that of `pin`, as the registry vouches."""
    from cryptography import x509  # takes long, and an agent's first ping waits for all that it imports
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from scope.credentials import pin_of

    try:
        extensions = x509.load_der_x509_certificate(certificate).extensions
        found = extensions.get_extension_for_oid(x509.ObjectIdentifier(OID)).value
        if not isinstance(found, x509.UnrecognizedExtension):
            return False
        signature, replaced = found.value[:_SIGNATURE], replaced_by(found.value)
        if pin not in replaced:
            return False
        key = Ed25519PublicKey.from_public_bytes(registry.raw)
        key.verify(signature, _statement(pin_of(certificate), replaced))
    except (InvalidSignature, ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        return False
    return True


def _statement(pin: bytes, replaced: Sequence[bytes]) -> bytes:
    return b"".join(len(field).to_bytes(4, "big") + field for field in (_LABEL, pin, *replaced))
