"""Durations and times as text, and back."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal

from scope.resources.limits import MAX_DURATION_TEXT, MAX_TIME

_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}  # milliseconds
_DURATION = re.compile(r"(?:[0-9]{1,12}ms|[0-9]{1,9}[smhd])+")
_DURATION_PART = re.compile(r"([0-9]+)(ms|s|m|h|d)")
_DAY, _CLOCK = r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = re.compile(rf"({_DAY})T({_CLOCK}:[0-5][0-9])(\.[0-9]{{1,9}})?(Z|[+-]{_CLOCK})")


def parse_duration(text: str) -> float:
    """Seconds of "500ms", "2s", "1h30m" or "30d". Raises ValueError."""
    if len(text) > MAX_DURATION_TEXT or not _DURATION.fullmatch(text):
        raise ValueError("a duration is a whole number with its unit: ms, s, m, h or d")
    return sum(int(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text)) / 1000


def format_duration(seconds: float) -> str:
    """The duration in the largest unit that divides it, to the millisecond."""
    milliseconds = round(seconds * 1000)
    unit = max((u for u, size in _UNITS.items() if milliseconds % size == 0), key=lambda u: _UNITS[u])
    return f"{milliseconds // _UNITS[unit]}{unit}" if milliseconds else "0s"


def parse_time(text: str) -> float:
    """Seconds since the Unix epoch of an RFC 3339 time. Raises ValueError."""
    found = _TIME.fullmatch(text)
    if not found:
        raise ValueError("a time is RFC 3339, as 2026-01-31T12:00:00Z")
    day, clock, fraction, zone = found.groups()
    whole = int(datetime.fromisoformat(f"{day}T{clock}{zone}").timestamp())
    if not 0 <= whole <= MAX_TIME:
        raise ValueError("a time is in the years 1970 to 9999")
    return float(f"{whole}{fraction or ''}")


def format_time(wall: float) -> str:
    """RFC 3339 in UTC with as many digits as bring the same float back (nanoseconds at most)."""
    whole, _, fraction = f"{Decimal(repr(wall)):.9f}".partition(".")
    fraction = fraction.rstrip("0")
    text = datetime.fromtimestamp(int(whole), UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"
