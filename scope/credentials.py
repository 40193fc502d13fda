"""How callers of the gateway show who they are, and how they know that they speak to the right one.

A peer signs every request with its own Ed25519 key: `Authorization: Bearer <JWT>`, alg EdDSA, with the claims

    iss  the peer's name            aud  the registry's id          jti  128 random bits, base64url
    sub  the peer's uid             iat  wall clock                 exp  iat + LIFETIME, never more than 60 s
    req  base64url of SHA-256 over METHOD LF TARGET LF BODY, where TARGET is path and query as sent

so that a token stolen from a log is worth nothing for another request, another registry or another minute.

The operator of a joined cluster signs in the same way with its cluster's key: `iss` is the cluster's name,
`sub` the UID of its kube-system namespace, and one claim more, `mesh`. Its header says `typ` CLUSTER_TYPE
where a peer's says PEER_TYPE (RFC 8725, section 3.11), so a cluster is never taken for a peer of its name,
nor a peer for a cluster. An agent of a joined cluster sends its ServiceAccount token for the audience
AUDIENCE, and in two headers the mesh and the cluster under whose keys it holds: what issuers call
themselves is alike in all clusters.

An administrator sends a bearer secret. The registry's own certificate is known by its pin: SHA-256 over the
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
from typing import TypeAlias, assert_never

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from scope.model import Secret

LIFETIME = 30.0  # seconds that a signed request lives: a slow uplink, and half of what the gateway allows
MAX_LIFETIME = 60.0  # the gateway keeps every jti this long, so a longer life would cost it memory
PIN_BYTES = 32

PEER_TYPE = "JWT"
CLUSTER_TYPE = "scope-cluster+jwt"
AUDIENCE = "scope-gateway"  # of the tokens that kubelets project for agents
MESH_HEADER = "Scope-Mesh"
CLUSTER_HEADER = "Scope-Cluster"


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


@dataclass(frozen=True, slots=True)
class ClusterCredential:
    """What the operator of a joined cluster signs with; `uid` is its kube-system namespace's.

    `signing` is the 32-byte seed of the Ed25519 key that it joined `mesh` with.
    """

    mesh: str
    cluster: str
    uid: str
    registry: str
    signing: Secret


@dataclass(frozen=True, slots=True)
class ProjectedToken:
    """The file in which a kubelet keeps the ServiceAccount token of an agent of a joined cluster fresh."""

    mesh: str
    cluster: str
    path: str


SigningCredential: TypeAlias = PeerCredential | ClusterCredential
Credential: TypeAlias = SigningCredential | AdminCredential | ProjectedToken


def authorization(
    credential: SigningCredential | AdminCredential,
    *,
    method: str,
    target: str,
    body: bytes,
    wall: float,
    nonce: bytes,
) -> str:
    """The Authorization header of one request; `nonce` is 16 fresh bytes, `wall` the gateway's time."""
    if isinstance(credential, AdminCredential):
        return f"Bearer {credential.token.raw.decode('ascii')}"
    claims: dict[str, str | float] = {
        "aud": credential.registry,
        "iat": wall,
        "exp": wall + LIFETIME,
        "jti": base64url(nonce),
        "req": request_digest(method, target, body),
    }
    match credential:
        case PeerCredential(name, uid):
            kind, claims = PEER_TYPE, {"iss": name, "sub": uid, **claims}
        case ClusterCredential(mesh, cluster, uid):
            kind, claims = CLUSTER_TYPE, {"iss": cluster, "sub": uid, "mesh": mesh, **claims}
        case _:
            assert_never(credential)
    return f"Bearer {_signed({'alg': 'EdDSA', 'typ': kind}, claims, credential.signing)}"


def request_digest(method: str, target: str, body: bytes) -> str:
    """What the claim `req` holds for a request; no method or target contains a line feed."""
    return base64url(hashlib.sha256(b"%b\n%b\n%b" % (method.encode(), target.encode(), body)).digest())


def pin_of(certificate: bytes) -> bytes:
    """The pin of a certificate given as DER. Raises ValueError when it is not one."""
    from cryptography import x509  # takes long, and an agent's first ping waits for all that it imports

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
