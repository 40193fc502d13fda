"""Makes and checks attachments: an edge's signed claims of the hub by which it is reached.

The signature (Ed25519, by the edge's signing key) covers a label and then the mesh's UID, the edge's and the
hub's WireGuard keys and the epoch (8 bytes, big endian), each behind its length in four bytes: an attachment
counts in one mesh only, and no other signature of the project can be taken for one.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scope.model import Attachment, PublicKey, Secret

_LABEL = b"scope attachment 1"


def sign_attachment(
    *, mesh_uid: str, edge: PublicKey, hub: PublicKey, epoch: int, secret: Secret
) -> Attachment:
    """The claim of the edge with WireGuard key `edge`. `secret` is its raw 32-byte Ed25519 private key."""
    private = Ed25519PrivateKey.from_private_bytes(secret.raw)
    statement = _statement(mesh_uid=mesh_uid, edge=edge, hub=hub, epoch=epoch)
    return Attachment(edge, hub, epoch, private.sign(statement))


def verify_attachment(attachment: Attachment, *, mesh_uid: str, signing: PublicKey) -> bool:
    """Whether the edge with signing key `signing` said so in this mesh."""
    statement = _statement(
        mesh_uid=mesh_uid, edge=attachment.edge, hub=attachment.hub, epoch=attachment.epoch
    )
    try:
        Ed25519PublicKey.from_public_bytes(signing.raw).verify(attachment.signature, statement)
    except (InvalidSignature, ValueError):  # ValueError: a key that is no point
        return False
    return True


def supersedes(new: Attachment, held: Attachment | None) -> bool:
    """Whether a claim holds in place of another one of its edge. Everybody decides alike."""
    return held is None or (new.epoch, new.hub) > (held.epoch, held.hub)


def _statement(*, mesh_uid: str, edge: PublicKey, hub: PublicKey, epoch: int) -> bytes:
    fields = (_LABEL, mesh_uid.encode(), edge.raw, hub.raw, epoch.to_bytes(8, "big"))
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)
