"""Post-quantum pre-shared keys: what a mesh asks of its pairs, what an agent says of them; never a key."""

from __future__ import annotations

from scope.model import (
    Fingerprint,
    IdentityTrust,
    KeyCounts,
    LinkPsk,
    PostQuantum,
    PostQuantumMode,
    PskFailure,
)
from scope.resources.fields import Fields
from scope.resources.limits import FINGERPRINT_DIGITS, MAX_COUNT, MAX_ROTATION, MAX_SUITE, MIN_ROTATION
from scope.resources.problems import refusal
from scope.resources.times import format_duration, format_time
from scope.resources.values import (
    read_choice,
    read_count,
    read_duration,
    read_integer,
    read_text,
    read_time,
)


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
    proved = {"epoch", "since", "suite"}
    if (some := proved & fields.present()) and some != proved:
        fields.refuse(
            f"{', '.join(sorted(some))} without {', '.join(sorted(proved - some))}",
            "all three where a key is proved, or none",
        )
    return LinkPsk(
        epoch=fields.optional("epoch", lambda value: read_integer(value, 1, MAX_COUNT), 0),
        since=fields.optional("since", read_time, 0.0),
        suite=fields.optional("suite", lambda value: read_integer(value, 1, MAX_SUITE), 0),
        trust=fields.optional("trust", lambda value: read_choice(IdentityTrust, value), None),
        failure=fields.optional("failure", lambda value: read_choice(PskFailure, value), None),
    )


def link_psk_dict(psk: LinkPsk) -> dict[str, object]:
    """The document of `psk` of a link."""
    return {
        **({"epoch": psk.epoch, "since": format_time(psk.since), "suite": psk.suite} if psk.epoch else {}),
        **({"trust": str(psk.trust)} if psk.trust is not None else {}),
        **({"failure": str(psk.failure)} if psk.failure is not None else {}),
    }


def read_key_counts(fields: Fields) -> KeyCounts:
    """Read `postQuantum` of a status."""
    return KeyCounts(*(fields.optional(name, read_count, 0) for name in _COUNTS))


def key_counts_dict(counts: KeyCounts) -> dict[str, int]:
    """The document of `postQuantum` of a status; a zero is written out: kubectl shows a blank otherwise."""
    return {name: getattr(counts, name) for name in _COUNTS}


_COUNTS = ("keyed", "unkeyed", "failed")
