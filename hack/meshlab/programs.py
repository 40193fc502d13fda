"""The project's own programs, as installed beside the running interpreter, and their output."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from lab import LabError

POLL_S = 0.02  # how often a file or a process is looked at: far below what is measured with it
_LOG_TAIL = 15  # lines of a program's log in an error


def program(name: str) -> str:
    """The path of an installed program."""
    return str(Path(sys.executable).with_name(name))


def await_line(process: subprocess.Popen[str], log: Path, text: str, *, within_s: float) -> None:
    """Return when the log holds the text; LabError with its end when the process ends or time is over."""
    deadline = time.monotonic() + within_s
    while text not in log.read_text():
        if process.poll() is not None:
            raise LabError(f"it ended with {process.returncode}:\n{tail(log)}")
        if time.monotonic() > deadline:
            raise LabError(f"no line with {text!r} within {within_s:g} s:\n{tail(log)}")
        time.sleep(POLL_S)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL:])
