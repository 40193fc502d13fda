"""Post-quantum pre-shared keys: what a mesh asks of its pairs, what an agent says of them; never a key."""

from __future__ import annotations

from scope.model import Fingerprint, LinkPsk, PostQuantum, PostQuantumMode
from scope.resources.fields import Fields
from scope.resources.limits import FINGERPRINT_DIGITS, MAX_COUNT, MAX_ROTATION, MIN_ROTATION
from scope.resources.problems import refusal
from scope.resources.times import format_duration, format_time
from scope.resources.values import read_choice, read_duration, read_integer, read_text, read_time


def read_post_quantum(fields: Fields) -> PostQuantum:
    """Read `spec.postQuantum` of a mesh."""
    usual = PostQuantum()
    return PostQuantum(
        mode=fields.optional("mode", lambda value: read_choice(PostQuantumMode, value), usual.mode),
        rotation_interval=fields.optional(
            "rotationInterval",
            lambda value: read_duration(value, MIN_ROTATION, MAX_ROTATION),
            usual.rotation_interval,
        ),
    )


def post_quantum_dict(asked: PostQuantum) -> dict[str, object]:
    """The document of `spec.postQuantum`."""
    return {"mode": str(asked.mode), "rotationInterval": format_duration(asked.rotation_interval)}


def read_fingerprint(value: object) -> Fingerprint:
    """Read the fingerprint of a peer's identity."""
    allowed = f"{FINGERPRINT_DIGITS} lowercase hexadecimal digits"
    try:
        return Fingerprint.parse(read_text(value, FINGERPRINT_DIGITS, allowed))
    except ValueError:
        raise refusal(value, allowed) from None


def read_link_psk(fields: Fields) -> LinkPsk:
    """Read `psk` of a link."""
    return LinkPsk(
        epoch=fields.required("epoch", lambda value: read_integer(value, 1, MAX_COUNT), 1),
        since=fields.required("since", read_time, 0.0),
    )


def link_psk_dict(psk: LinkPsk) -> dict[str, object]:
    """The document of `psk` of a link."""
    return {"epoch": psk.epoch, "since": format_time(psk.since)}
