"""The request of a cluster to join a mesh: what its operator says of it, signed with the key that it asks to
bind.

The signature (Ed25519) covers a label and then the registry's signing key, the mesh, the token's id and the
cluster as compact JSON with sorted names, each behind its length in four bytes (big endian): it proves that
the operator holds the private half of the signing key, for this registry, mesh and token alone.

As a dictionary, for HTTP, where `cluster` is as `scope.resources` writes it into a mesh's status:

    {"mesh", "tokenID", "secret": base64, "signature": base64,
     "cluster": {"name", "uid", "signingKey": base64, "issuer", "keys": [JWK],
                 "serviceAccount": {"namespace", "name"}}}
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scope.enrolment import SECRET_BYTES, SIGNATURE_BYTES, read_bytes, read_object, read_text
from scope.model import Cluster, ConfigError, PublicKey, Secret
from scope.resources import MAX_LABEL, cluster_to_dict, parse_cluster

_LABEL = b"scope cluster enrolment 1"
_FIELDS = ("mesh", "tokenID", "secret", "cluster", "signature")


@dataclass(frozen=True, slots=True)
class ClusterEnrolment:
    """A cluster's request to bring its Nodes into `mesh`; `sign_cluster_enrolment` fills in the signature."""

    mesh: str
    token_id: str
    secret: Secret  # of the token
    cluster: Cluster  # with its trust
    signature: bytes = b""


def sign_cluster_enrolment(
    request: ClusterEnrolment, *, registry: PublicKey, signing: Secret
) -> ClusterEnrolment:
    """The request signed for the registry whose signing key is `registry`; `signing` is the 32-byte seed."""
    signature = Ed25519PrivateKey.from_private_bytes(signing.raw).sign(_statement(request, registry))
    return replace(request, signature=signature)


def verify_cluster_enrolment(request: ClusterEnrolment, *, registry: PublicKey) -> bool:
    """Whether the holder of the cluster's signing key made the request for this registry."""
    trust = request.cluster.trust
    if trust is None:
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(trust.signing_key.raw)
        key.verify(request.signature, _statement(request, registry))
    except (InvalidSignature, ValueError):
        return False
    return True


def cluster_enrolment_to_dict(request: ClusterEnrolment) -> dict[str, object]:
    """The request as a dictionary, secret included: for TLS and no log."""
    return {
        "mesh": request.mesh,
        "tokenID": request.token_id,
        "secret": base64.b64encode(request.secret.raw).decode(),
        "cluster": cluster_to_dict(request.cluster),
        "signature": base64.b64encode(request.signature).decode(),
    }


def parse_cluster_enrolment(document: object) -> ClusterEnrolment:
    """Read a request. Raises ConfigError with the field's path and what is allowed, never with a secret."""
    fields = read_object(document, "the request", _FIELDS)
    cluster = parse_cluster(fields.get("cluster"))
    if cluster.trust is None:
        raise ConfigError("cluster: allowed: signingKey, issuer, keys and serviceAccount beside name and uid")
    return ClusterEnrolment(
        mesh=read_text(fields, "mesh", MAX_LABEL),
        token_id=read_text(fields, "tokenID", MAX_LABEL),
        secret=Secret(read_bytes(fields, "secret", SECRET_BYTES)),
        cluster=cluster,
        signature=read_bytes(fields, "signature", SIGNATURE_BYTES),
    )


def _statement(request: ClusterEnrolment, registry: PublicKey) -> bytes:
    cluster = json.dumps(cluster_to_dict(request.cluster), sort_keys=True, separators=(",", ":"))
    fields = (_LABEL, registry.raw, request.mesh.encode(), request.token_id.encode(), cluster.encode())
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
