"""Tombstones remove a peer only when the registry, or that peer, signed exactly that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scope.model import PublicKey, Secret, Tombstone
from scope.tombstones import sign_tombstone, verify_tombstone

KEY = PublicKey(bytes(range(32)))
REGISTRY = Secret(b"\x01" * 32)
PEER = Secret(b"\x02" * 32)
STRANGER = Secret(b"\x03" * 32)


def signed_by(secret: Secret) -> Tombstone:
    return sign_tombstone(mesh_uid="mesh-1", peer_uid="peer-1", key=KEY, secret=secret)


REGISTRY_KEY = signed_by(REGISTRY).signer
PEER_KEY = signed_by(PEER).signer


@pytest.mark.parametrize("secret", [REGISTRY, PEER])
def test_the_registry_and_the_peer_itself_may_remove_it(secret: Secret) -> None:
    assert verify_tombstone(signed_by(secret), registry=REGISTRY_KEY, peer=PEER_KEY)


def test_a_stranger_removes_nobody() -> None:
    assert not verify_tombstone(signed_by(STRANGER), registry=REGISTRY_KEY, peer=PEER_KEY)
    assert not verify_tombstone(signed_by(STRANGER), registry=None, peer=None)


def test_a_peer_cannot_remove_another_one() -> None:
    other = signed_by(STRANGER).signer
    assert not verify_tombstone(signed_by(PEER), registry=REGISTRY_KEY, peer=other)


def test_a_stranger_that_claims_to_be_the_registry_removes_nobody() -> None:
    claimed = replace(signed_by(STRANGER), signer=REGISTRY_KEY)
    assert not verify_tombstone(claimed, registry=REGISTRY_KEY, peer=PEER_KEY)


@pytest.mark.parametrize(
    "changed",
    [
        {"mesh_uid": "mesh-2"},
        {"peer_uid": "peer-2"},
        {"mesh_uid": "mesh-1p", "peer_uid": "eer-1"},
        {"peer_uid": "\ud800"},
        {"key": PublicKey(bytes(32))},
        {"signer": PEER_KEY},
        {"signature": bytes(64)},
        {"signature": b""},
    ],
)
def test_a_tombstone_that_was_changed_removes_nobody(changed: dict[str, object]) -> None:
    tombstone = replace(signed_by(REGISTRY), **changed)  # type: ignore[arg-type]
    assert not verify_tombstone(tombstone, registry=REGISTRY_KEY, peer=PEER_KEY)


def test_the_signed_bytes_stay_what_they_are() -> None:
    """Tombstones are kept on disks for a month: a later release must verify them."""
    assert signed_by(REGISTRY).signature.hex().startswith("289dd47d5ff11705773e7aa40a5a7d42")
