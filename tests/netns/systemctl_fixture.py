"""`systemctl` for a machine of the lab, where no systemd runs: starts and stops the services of docs/systemd.

    systemctl_fixture.py DIRECTORY enable|disable|start|stop|restart [--now] UNIT

It takes from a unit what a walk through the documentation needs: the condition, the directories and their
modes, the environment file and the command. Stopping sends SIGTERM to the main process alone, as
KillMode=process does. It restarts nothing. Process numbers and logs are kept in DIRECTORY.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

UNITS = Path(__file__).parents[2] / "docs" / "systemd"
PLACES = {"StateDirectory": Path("/var/lib"), "RuntimeDirectory": Path("/run")}
STOP_SECONDS = 15


def main(directory: Path, verb: str, *arguments: str) -> None:
    """Do what systemctl would."""
    name = arguments[-1].removesuffix(".service")
    works = verb in ("start", "stop", "restart") or "--now" in arguments
    if works and verb in ("disable", "stop", "restart"):
        _stop(directory / f"{name}.pid")
    if works and verb in ("enable", "start", "restart"):
        _start(directory, name)


def _start(directory: Path, name: str) -> None:
    template, _, instance = name.partition("@")
    path = UNITS / (f"{template}@.service" if instance else f"{name}.service")
    keys = _read(path.read_text().replace("%i", instance))
    if not all(Path(condition).exists() for condition in keys.get("ConditionPathExists", [])):
        return
    for key, parent in PLACES.items():
        for folder in " ".join(keys.get(key, [])).split():
            (parent / folder).mkdir(mode=int(keys[f"{key}Mode"][0], 8), exist_ok=True)
    environment = dict(line.split("=", 1) for line in keys.get("Environment", []))
    for file in keys.get("EnvironmentFile", []):
        if Path(file.removeprefix("-")).exists():
            lines = Path(file.removeprefix("-")).read_text().splitlines()
            environment |= dict(line.split("=", 1) for line in lines)
    words = []
    for word in keys["ExecStart"][0].split():
        words += environment[word[1:]].split() if word.startswith("$") else [word]
    with open(directory / f"{name}.log", "a") as log:
        process = subprocess.Popen(
            [Path(words[0]).name, *words[1:]],
            cwd="/",
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            umask=int(keys["UMask"][0], 8),
            start_new_session=True,
        )
    (directory / f"{name}.pid").write_text(str(process.pid))


def _stop(file: Path) -> None:
    if not file.exists():
        return
    pid = int(file.read_text())
    file.unlink()
    try:
        descriptor = os.pidfd_open(pid)
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(STOP_SECONDS * 1000):
        sys.exit(f"{file.stem} did not stop in {STOP_SECONDS} s")


def _read(text: str) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            keys.setdefault(key, []).append(value)
    return keys


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
