"""Makes and checks tombstones: signed records of deliberate removals.

The signature (Ed25519) covers a label and then the mesh's UID, the peer's UID, the peer's WireGuard key and
the signer's key, each behind its length in four bytes (big endian; UIDs in UTF-8): no two removals share an
encoding, and no other signature of the project can be taken for one.

Whose signature counts is for the caller to say, from what it knows of the mesh and never from the tombstone:
the registry's signing key, or the signing key that the removed peer published.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scope.model import PublicKey, Secret, Tombstone

_LABEL = b"scope tombstone 1"


def sign_tombstone(*, mesh_uid: str, peer_uid: str, key: PublicKey, secret: Secret) -> Tombstone:
    """A tombstone for the peer with WireGuard key `key`.

    `secret` is the signer's raw 32-byte Ed25519 private key.
    """
    private = Ed25519PrivateKey.from_private_bytes(secret.raw)
    signer = PublicKey(private.public_key().public_bytes_raw())
    signature = private.sign(_statement(mesh_uid=mesh_uid, peer_uid=peer_uid, key=key, signer=signer))
    return Tombstone(mesh_uid=mesh_uid, peer_uid=peer_uid, key=key, signer=signer, signature=signature)


def verify_tombstone(tombstone: Tombstone, *, registry: PublicKey | None, peer: PublicKey | None) -> bool:
    """Whether the tombstone removes its peer.

    `registry` is the registry's signing key, `peer` the removed peer's own (None where it is not known). Any
    other signer removes nobody, whatever it signed.
    """
    if tombstone.signer not in (registry, peer):
        return False
    try:
        statement = _statement(
            mesh_uid=tombstone.mesh_uid,
            peer_uid=tombstone.peer_uid,
            key=tombstone.key,
            signer=tombstone.signer,
        )
        Ed25519PublicKey.from_public_bytes(tombstone.signer.raw).verify(tombstone.signature, statement)
    except (InvalidSignature, ValueError):  # ValueError: a UID with lone surrogates, a key that is no point
        return False
    return True


def _statement(*, mesh_uid: str, peer_uid: str, key: PublicKey, signer: PublicKey) -> bytes:
    fields = (_LABEL, mesh_uid.encode(), peer_uid.encode(), key.raw, signer.raw)
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
