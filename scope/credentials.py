"""How callers of the gateway show who they are, and how they know that they speak to the right one.

A peer signs every request with its own Ed25519 key: `Authorization: Bearer <JWT>`, alg EdDSA, with the claims

    iss  the peer's name            aud  the registry's id          jti  128 random bits, base64url
    sub  the peer's uid             iat  wall clock                 exp  iat + LIFETIME, never more than 60 s
    req  base64url of SHA-256 over METHOD LF TARGET LF BODY, where TARGET is path and query as sent

so that a token stolen from a log is worth nothing for another request, another registry or another minute. An
administrator sends a bearer secret. The registry's own certificate is known by its pin: SHA-256 over the
DER of its SubjectPublicKeyInfo, which stays when the certificate is renewed.

The client makes the JWT by hand, since that is four lines; the gateway verifies with a library.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from scope.model import Secret

LIFETIME = 30.0  # seconds that a signed request lives: a slow uplink, and half of what the gateway allows
MAX_LIFETIME = 60.0  # the gateway keeps every jti this long, so a longer life would cost it memory
PIN_BYTES = 32


@dataclass(frozen=True, slots=True)
class PeerCredential:
    """What a peer signs its requests with. `signing` is the 32-byte seed of its Ed25519 key."""

    name: str
    uid: str
    registry: str
    signing: Secret


@dataclass(frozen=True, slots=True)
class AdminCredential:
    """The secret of the registry's administrator, as `admin.json` holds it."""

    token: Secret


Credential: TypeAlias = PeerCredential | AdminCredential


def authorization(
    credential: Credential, *, method: str, target: str, body: bytes, wall: float, nonce: bytes
) -> str:
    """The Authorization header of one request; `nonce` is 16 fresh bytes, `wall` the gateway's time."""
    match credential:
        case AdminCredential(token):
            return f"Bearer {token.raw.decode('ascii')}"
        case PeerCredential(name, uid, registry, signing):
            claims: dict[str, str | float] = {
                "iss": name,
                "sub": uid,
                "aud": registry,
                "iat": wall,
                "exp": wall + LIFETIME,
                "jti": base64url(nonce),
                "req": request_digest(method, target, body),
            }
            return f"Bearer {_signed({'alg': 'EdDSA', 'typ': 'JWT'}, claims, signing)}"


def request_digest(method: str, target: str, body: bytes) -> str:
    """What the claim `req` holds for a request; no method or target contains a line feed."""
    return base64url(hashlib.sha256(b"%b\n%b\n%b" % (method.encode(), target.encode(), body)).digest())


def pin_of(certificate: bytes) -> bytes:
    """The pin of a certificate given as DER. Raises ValueError when it is not one."""
    key = x509.load_der_x509_certificate(certificate).public_key()
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def base64url(raw: bytes) -> str:
    """Base64 for URLs and JWTs (RFC 7515): `-` and `_`, no padding."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def read_base64url(text: str) -> bytes:
    """The bytes of canonical unpadded base64url. Raises ValueError."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"not base64url: {error}") from None
    if base64url(raw) != text:
        raise ValueError("not canonical base64url: padded, or its last character carries stray bits")
    return raw


def _signed(header: Mapping[str, str], claims: Mapping[str, str | float], signing: Secret) -> str:
    """A compact JWS (RFC 7515) over both."""
    parts = (json.dumps(part, separators=(",", ":")).encode() for part in (header, claims))
    message = ".".join(base64url(part) for part in parts)
    signature = Ed25519PrivateKey.from_private_bytes(signing.raw).sign(message.encode())
    return f"{message}.{base64url(signature)}"
