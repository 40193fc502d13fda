"""The one error that ends a command: a sentence with the next step, printed without a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """The command failed (exit code 1). The message is for the person at the terminal."""
