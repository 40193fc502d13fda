"""What tests read out of the documentation: pages, blocks of code with their marks, and command lines.

A block that is to be run stands behind an HTML comment, `<!-- walk: PLACE ... [FILE] -->`: where it runs,
and, for a block that is no shell, the file that it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAMS = (
    "scope-agent",
    "scope-carrier",
    "scope-forwarder",
    "scope-operator",
    "scope-registry",
    "scope-wireguard",
    "scopectl",
)

_FENCE = re.compile(
    r"(?:^<!-- walk: (?P<places>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_INDENTED = re.compile(r"^    (\S.*)$", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code. `places` are where it runs, none for one that is only shown."""

    page: str
    language: str
    text: str
    places: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The commands of a shell block, one a line."""
        return [line for line in self.text.splitlines() if line and not line.startswith("#")]


def pages() -> list[Path]:
    """Every page of the documentation."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    name = str(page.relative_to(ROOT))
    return [
        Block(name, found["language"], found["text"], tuple((found["places"] or "").split()))
        for found in _FENCE.finditer(page.read_text())
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """The code inside sentences and tables."""
    return _SPAN.findall(prose(page))


def shell_lines(page: Path) -> Iterator[str]:
    """Every line of shell that a reader may copy: fenced as `sh`, or indented."""
    for block in blocks(page):
        if block.language == "sh":
            yield from block.lines
    yield from _INDENTED.findall(prose(page))


def commands(line: str) -> Iterator[list[str]]:
    """The arguments of each of our programs in a line of shell, the program's name first."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>(")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    try:
        words = list(lexer)
    except ValueError:  # one line of a here-document or of a picture
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set(";|&<>()"):
            if command and command[0] in PROGRAMS:
                yield command
            command = []
        elif command or word != "sudo":
            command.append(word.removesuffix(")"))
