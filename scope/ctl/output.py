"""What is known of the place where output goes: its width, and whether it shows colours."""

from __future__ import annotations

import os
import sys


def width() -> int | None:
    """The terminal's columns; None where the output is no terminal."""
    return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None


def color() -> bool:
    """Whether colours are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
