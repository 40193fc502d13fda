"""Starting and steering the process that delays a lab's uplinks (`shim.py`)."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from lab.hosts import end
from lab.netns import LabError, call_in

_PROGRAM = Path(__file__).with_name("shim.py")


class Uplinks:
    """The shim of one lab, in its own namespace. Not thread-safe."""

    def __init__(self, namespace: str, *, seed: int) -> None:
        self.process = call_in(namespace, lambda: _start(seed))

    def join(self, name: str, left: str, right: str) -> None:
        """Pass frames between two interfaces of the shim's namespace, without delay as yet."""
        self._say(f"link {name} {left} {right}")

    def set(self, name: str, *, delay_ms: float, jitter_ms: float, loss: float) -> None:
        """What happens to each frame from now on, in each direction."""
        self._say(f"set {name} {delay_ms / 1e3} {jitter_ms / 1e3} {loss}")

    def detach(self) -> None:
        """Let the shim outlive this process."""
        self._say("detach")

    def close(self) -> None:
        """End the shim."""
        end([self.process])
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # it died with a command unread
                pipe.close()

    def _say(self, command: str) -> None:
        commands, answers = self.process.stdin, self.process.stdout
        assert commands is not None and answers is not None
        try:
            commands.write(command + "\n")
            commands.flush()
            answer = answers.readline().strip()
        except BrokenPipeError:
            answer = ""
        if answer != "ok":
            raise LabError(
                f"the delay shim did not do `{command}`: {answer or 'it has died, see its standard error'}"
            )


def _start(seed: int) -> subprocess.Popen[str]:
    # -I and -S: neither the user's environment nor installed packages can slow it down or change it.
    argv = [sys.executable, "-I", "-S", str(_PROGRAM), str(seed)]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd="/"
    )
