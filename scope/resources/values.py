"""Single values: each reader returns the value, or raises Refused with what was found and what is allowed."""

from __future__ import annotations

import base64
import binascii
import enum
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from scope import model
from scope.model import PublicKey
from scope.resources.limits import (
    MAX_COUNT,
    MAX_DURATION_TEXT,
    MAX_INTERFACE,
    MAX_LABEL,
    MAX_LABEL_KEY,
    MAX_LATENCY,
    MAX_MTU,
    MAX_NAME,
    MAX_ORIGIN,
    MAX_REASON,
    MAX_REQUIREMENTS,
    MAX_UID,
    MIN_MTU,
)
from scope.resources.problems import Refused, guess, refusal, show
from scope.resources.times import format_duration, parse_duration, parse_time

E = TypeVar("E", bound=enum.StrEnum)
# Stands in for a key that is missing: the document is refused, so it never leaves this package.
NO_KEY = PublicKey(bytes(model.KEY_BYTES))


def read_text(value: object, limit: int, allowed: str = "") -> str:
    """A string of printable characters: what reaches a terminal carries no escape sequence."""
    if not isinstance(value, str) or not value.isprintable():
        raise refusal(value, allowed or "text without control characters")
    if len(value) > limit:
        found = f"{show(value)} has {len(value)} characters"
        raise Refused(found, allowed or f"at most {limit} characters")
    return value


def as_reason(text: str) -> str:
    """What anybody said, as a reason that may stand in a status: one line, cut where it is too long."""
    if not text:
        return ""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= MAX_REASON else f"{line[: MAX_REASON - 1]}…"


def read_some_text(value: object, limit: int) -> str:
    allowed = f"1 to {limit} characters"
    text = read_text(value, limit, allowed)
    if not text:
        raise refusal(value, allowed)
    return text


# As in the definition of a ScopeMesh, for its gateway.
_ORIGIN = re.compile(
    r"https://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])"
    r"(?::(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
)


def read_origin(value: object) -> str:
    allowed = "https://HOST or https://HOST:PORT"
    text = read_text(value, MAX_ORIGIN, allowed)
    if not _ORIGIN.fullmatch(text):
        raise refusal(value, allowed)
    return text


_INTERFACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_=+.-]{0,14}")


def read_device_name(value: object) -> str:
    """Read the name of a network interface, of the letters that wg-quick takes."""
    allowed = f"the name of an interface: a-z, A-Z, 0-9 and _=+.-, at most {MAX_INTERFACE}"
    text = read_text(value, MAX_INTERFACE, allowed)
    if not _INTERFACE.fullmatch(text):
        raise refusal(value, allowed)
    return text


def read_condition_type(value: object) -> str:
    return read_some_text(value, MAX_LABEL)


_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
# As Kubernetes reads one, the names of Nodes included: the length of each label is left to DNS.
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")


def read_label(value: object) -> str:
    allowed = f"a DNS label: a-z, 0-9 and -, at most {MAX_LABEL}"
    text = read_text(value, MAX_LABEL, allowed)
    if not _LABEL.fullmatch(text):
        raise refusal(value, allowed, _name_hint(text))
    return text


def read_subdomain(value: object) -> str:
    allowed = f"DNS labels (a-z, 0-9 and -) joined by dots, at most {MAX_NAME}"
    text = read_text(value, MAX_NAME, allowed)
    if not _SUBDOMAIN.fullmatch(text):
        raise refusal(value, allowed, _name_hint(text))
    return text


EXTERNAL = "external"  # stands in the names of peers off Kubernetes where others have their cluster


def read_cluster_name(value: object) -> str:
    name = read_label(value)
    if name == EXTERNAL:
        raise refusal(value, "any other DNS label", "the names of external peers begin with it")
    return name


_LABEL_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL_KEY = re.compile(rf"(?:(?P<prefix>{_SUBDOMAIN.pattern})/)?{_LABEL_NAME.pattern}")


def read_label_key(value: object) -> str:
    allowed = "the key of a label, as topology.kubernetes.io/zone"
    text = read_text(value, MAX_LABEL_KEY, allowed)
    found = _LABEL_KEY.fullmatch(text)
    if not found or len(found["prefix"] or "") > MAX_NAME:
        raise refusal(value, allowed)
    return text


def read_label_value(value: object) -> str:
    allowed = f"the value of a label: letters, digits and ._-, at most {MAX_LABEL}"
    text = read_text(value, MAX_LABEL, allowed)
    if text and not _LABEL_NAME.fullmatch(text):
        raise refusal(value, allowed)
    return text


def read_labels(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise refusal(value, "an object of label keys and values")
    if len(value) > MAX_REQUIREMENTS:
        raise Refused(f"{len(value)} labels", f"at most {MAX_REQUIREMENTS}")
    return tuple(sorted((read_label_key(key), read_label_value(wanted)) for key, wanted in value.items()))


def _name_hint(text: str) -> str:
    lower = text.lower().replace("_", "-")
    return f'did you mean "{lower}"?' if lower != text and _LABEL.fullmatch(lower) else ""


_UID = re.compile(r"[A-Za-z0-9._:+/=-]*")


def read_uid(value: object) -> str:
    allowed = f"letters, digits and ._:+/=-, at most {MAX_UID}"
    text = read_text(value, MAX_UID, allowed)
    if not _UID.fullmatch(text):
        raise refusal(value, allowed)
    return text


def read_object_uid(value: object) -> str:
    """The UID of an object of Kubernetes, which is never empty."""
    if value == "":
        raise refusal(value, f"a UID: letters, digits and ._:+/=-, 1 to {MAX_UID}")
    return read_uid(value)


def read_revision(value: object) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,19}", value):
        raise refusal(value, "a whole number as a string")
    return int(value)


def read_constant(wanted: str, value: object) -> str:
    if value != wanted:
        raise refusal(value, wanted)
    return wanted


def read_one_of(choices: Sequence[str], value: object) -> str:
    if isinstance(value, str) and value in choices:
        return value
    raise refusal(value, ", ".join(choices), guess(value, choices))


def read_choice(kinds: type[E], value: object) -> E:
    if isinstance(value, str):
        try:
            return kinds(value)
        except ValueError:
            pass
    return kinds(read_one_of([str(kind) for kind in kinds], value))


def read_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise refusal(value, "true, false")
    return value


def read_integer(value: object, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise refusal(value, f"a whole number from {lowest} to {highest}")
    return value


def read_count(value: object) -> int:
    return read_integer(value, 0, MAX_COUNT)


def read_mtu(value: object) -> int | None:
    if value == "Auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_MTU <= value <= MAX_MTU:
        raise refusal(value, f"Auto, or a whole number from {MIN_MTU} to {MAX_MTU}")
    return value


def read_latency(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_LATENCY * 1000:
        raise refusal(value, f"milliseconds, from 0 to {MAX_LATENCY * 1000:.0f}")
    return round(value * 1000) / 1_000_000


def read_duration(value: object, lowest: float, highest: float) -> float:
    allowed = f"{format_duration(lowest)} to {format_duration(highest)}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise refusal(value, allowed, 'a duration has a unit, as "2s"')
    text = read_text(value, MAX_DURATION_TEXT, allowed)
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise refusal(value, allowed, str(error)) from None
    if not lowest <= seconds <= highest:
        raise refusal(value, allowed)
    return seconds


def read_time(value: object) -> float:
    text = read_text(value, MAX_LABEL, "RFC 3339, as 2026-01-31T12:00:00Z")
    try:
        return parse_time(text)
    except ValueError as error:
        raise refusal(value, "RFC 3339, as 2026-01-31T12:00:00Z", str(error)) from None


def read_base64(value: object, *, size: int) -> bytes:
    allowed = f"{size} bytes in base64"
    text = read_text(value, 4 * (size + 2) // 3 + 4, allowed)
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise refusal(value, allowed) from None
    if len(raw) != size or base64.b64encode(raw).decode() != text:
        raise refusal(value, allowed)
    return raw


def read_base64url(value: object, *, longest: int, allowed: str) -> bytes:
    """At most `longest` bytes in canonical unpadded base64url (RFC 7515, section 2)."""
    text = read_text(value, 4 * longest // 3 + 2, allowed)
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise refusal(value, allowed) from None
    if not 0 < len(raw) <= longest or as_base64url(raw) != text:
        raise refusal(value, allowed)
    return raw


def as_base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def read_key(value: object) -> PublicKey:
    return PublicKey(read_base64(value, size=model.KEY_BYTES))
