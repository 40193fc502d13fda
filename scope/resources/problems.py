"""What is wrong with a document, in words for whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scope.model import ConfigError
from scope.resources.limits import MAX_LABEL, MAX_PROBLEMS, SHOWN_VALUE


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a document: where, what was found, what is allowed, and perhaps what was meant."""

    path: str
    found: str
    allowed: str
    hint: str = ""

    def __str__(self) -> str:
        return "; ".join(
            part for part in (f"{self.path}: {self.found}", f"allowed: {self.allowed}", self.hint) if part
        )


class InvalidResource(ConfigError):
    """A document that is not a resource. The text has a line for each of its `problems`."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems[:MAX_PROBLEMS])
        more = len(problems) - len(self.problems)
        lines = [str(problem) for problem in self.problems] + ([f"and {more} more"] if more else [])
        super().__init__("\n".join(lines))


class Refused(Exception):
    """A value that is not allowed where it stands; `Fields` turns it into a Problem with the path."""

    def __init__(self, found: str, allowed: str, hint: str = "") -> None:
        super().__init__(found)
        self.found, self.allowed, self.hint = found, allowed, hint


def show(value: object) -> str:
    """A refused value as JSON, cut to SHOWN_VALUE characters; what it is where it is no single value."""
    match value:
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case int() if abs(value) > 2**64:
            return "a huge number"
        case bool() | int() | float() | str():
            text = json.dumps(value[:SHOWN_VALUE] if isinstance(value, str) else value)
            return text if len(text) <= SHOWN_VALUE + 2 else text[:SHOWN_VALUE] + "..."
        case _:
            return f"a {type(value).__name__}"


def refusal(value: object, allowed: str, hint: str = "") -> Refused:
    """What is raised of a value that is another than what is allowed."""
    return Refused(f"{show(value)} is not allowed", allowed, hint)


def guess(value: object, choices: Sequence[str]) -> str:
    """A guess at what was meant, or nothing."""
    if not isinstance(value, str) or len(value) > MAX_LABEL:
        return ""
    for choice in choices:
        if choice.lower() == value.lower():
            return f'did you mean "{choice}"?'
    from difflib import get_close_matches  # only a refusal needs it

    close = get_close_matches(value, choices, n=1)
    return f'did you mean "{close[0]}"?' if close else ""
