"""A page of the documentation walked through in the lab, its commands taken from the page.

The blocks marked `walk` run in their order, each on the hosts that it names. What differs from the page: the
registry's name is an address, since the lab has no DNS, and services are started by a stand-in for systemctl,
which reads the units of docs/systemd.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lab import Host, LabError

from tests.docs_fixture import PROGRAMS, ROOT, Block, blocks

PATIENCE = 180.0  # seconds: many times what it takes, for a machine that is busy


class Walk:
    """A page, block by block; `registry` is the host that the page calls registry.example.net."""

    passing: tuple[type[Exception], ...] = (LabError,)  # what a look may raise as long as it is too early

    def __init__(self, page: Path, hosts: Mapping[str, Host], *, registry: Host, directory: Path) -> None:
        self.hosts = hosts
        self.printed = ""  # by the last block
        self._address = str(registry.ipv4)
        self._join_string = ""
        self._programs = _programs(directory)
        self._rest: Iterator[Block] = iter([block for block in blocks(page) if block.places])

    def on(self, until: str) -> None:
        """Go on to the block that holds `until`, that one included."""
        for block in self._rest:
            self._do(block)
            if until in block.text:
                return
        raise AssertionError(f"the page has no further block with {until!r}")

    def finish(self) -> None:
        """Go on to the end of the page."""
        for block in self._rest:
            self._do(block)

    def run(self, place: str, *argv: str) -> str:
        """Run a command on a host and return what it prints; LabError when it fails."""
        host = self.hosts[place]
        environment = {**os.environ, "LAB_HOST": str(host.directory), **self.environment(place)}
        environment["PATH"] = f"{self._programs}:{environment['PATH']}"
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', place, *argv]
        return host.run(named, env=environment, cwd=host.directory, timeout=PATIENCE).stdout

    def environment(self, place: str) -> dict[str, str]:
        """What a shell there has besides."""
        return {}

    def prepare(self, place: str, text: str) -> None:
        """Wait for what a reader would wait for before a block."""

    def status(self, place: str) -> Any:
        """What the agent of a place says."""
        return json.loads(self.run(place, "scopectl", "status", "-o", "json"))

    def paths(self, place: str) -> dict[str, str]:
        """The path to each other peer that the agent of a place knows, by name."""
        return {peer["name"]: peer["path"] for peer in self.status(place)["peers"]}

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        """Until it holds; with what every program said when it never does."""
        deadline = time.monotonic() + PATIENCE
        while True:
            looked, said = time.monotonic(), ""
            try:
                if holds():
                    return
            except self.passing as error:
                said = f": {error}"
            assert time.monotonic() < deadline, "\n".join([what + said, *map(self.log, self.hosts)])
            time.sleep(max(0.2, time.monotonic() - looked))  # a look starts programs: not too many

    def log(self, place: str) -> str:
        """What the programs of a place said last."""
        logs = self.hosts[place].directory.glob("*.log")
        return "".join(f"--- {place} {log.name}\n{log.read_text()[-4000:]}" for log in sorted(logs))

    def _do(self, block: Block) -> None:
        if block.language != "sh":
            place, file = block.places
            (self.hosts[place].directory / file).write_text(block.text)
            return
        text = block.text.replace("registry.example.net", self._address)
        text = text.replace("JOIN STRING", self._join_string)
        for place in block.places:
            self.prepare(place, text)
            try:
                self.printed = self.run(place, "bash", "-eu", "-o", "pipefail", "-c", text)
            except LabError as error:
                raise AssertionError("\n".join([str(error), *map(self.log, self.hosts)])) from None
            if "token create" in text:
                self._join_string = self.printed.strip()


def _programs(directory: Path) -> Path:
    """A directory of programs to find first: ours, and stand-ins for sudo and systemctl."""
    folder = directory / "bin"
    folder.mkdir()
    for program in PROGRAMS:
        (folder / program).symlink_to(Path(sys.executable).parent / program)
    fixture = ROOT / "tests" / "netns" / "systemctl_fixture.py"
    systemctl = f'exec {sys.executable} {fixture} "$LAB_HOST"'
    for name, does in (("sudo", "exec"), ("systemctl", systemctl)):
        (folder / name).write_text(f'#!/bin/sh\n{does} "$@"\n')
        (folder / name).chmod(0o755)
    return folder
