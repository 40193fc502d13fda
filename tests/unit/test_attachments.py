"""An attachment counts when the edge signed exactly that, in that mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scope_agent.state import make_identity

from scope.attachments import sign_attachment, supersedes, verify_attachment
from scope.model import Attachment, PublicKey
from scope.tombstones import sign_tombstone

EDGE = make_identity(lambda count: b"\x01" * count)
STRANGER = make_identity(lambda count: b"\x02" * count)
HUB = PublicKey(bytes(range(32)))


def signed(epoch: int = 7, hub: PublicKey = HUB) -> Attachment:
    return sign_attachment(
        mesh_uid="mesh-1", edge=EDGE.public.wireguard, hub=hub, epoch=epoch, secret=EDGE.signing
    )


def test_what_the_edge_signed_is_believed_in_its_mesh_alone() -> None:
    assert verify_attachment(signed(), mesh_uid="mesh-1", signing=EDGE.public.signing)
    assert not verify_attachment(signed(), mesh_uid="mesh-2", signing=EDGE.public.signing)
    assert not verify_attachment(signed(), mesh_uid="mesh-1", signing=STRANGER.public.signing)


@pytest.mark.parametrize("changed", [{"epoch": 8}, {"hub": PublicKey(bytes(32))}, {"signature": bytes(64)}])
def test_a_change_undoes_it(changed: dict[str, object]) -> None:
    assert not verify_attachment(
        replace(signed(), **changed),  # type: ignore[arg-type]
        mesh_uid="mesh-1",
        signing=EDGE.public.signing,
    )


def test_a_tombstone_is_none() -> None:
    tombstone = sign_tombstone(
        mesh_uid="mesh-1", peer_uid="edge", key=EDGE.public.wireguard, secret=EDGE.signing
    )
    posing = replace(signed(), signature=tombstone.signature)
    assert not verify_attachment(posing, mesh_uid="mesh-1", signing=EDGE.public.signing)


def test_the_later_epoch_supersedes_and_of_two_equal_ones_everybody_takes_the_same() -> None:
    assert supersedes(signed(8), signed(7)) and not supersedes(signed(7), signed(8))
    assert supersedes(signed(1), None) and not supersedes(signed(7), signed(7))
    other = signed(7, hub=PublicKey(bytes(32)))
    assert supersedes(signed(7), other) is not supersedes(other, signed(7))
