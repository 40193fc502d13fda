"""The walk of docs/install.md, its commands taken from the page, on machines behind NATs.

The blocks marked `walk` run in their order, each on the machines it names. What differs from the page: the
registry's name is an address, since the lab has no DNS; and services are started by a stand-in for systemctl,
which reads the units of docs/systemd.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from lab import Host, Lab, LabError, Nat

from tests.docs_fixture import PROGRAMS, ROOT, Block, blocks

PRIVATE = ("/var/run/wireguard", "/run/scope", "/var/lib", "/etc/default")
PATIENCE = 60.0  # seconds: many times what it takes, for a machine that is busy
PEERS = ("berlin", "oslo", "lima")


class Walk:
    """The page, block by block."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        registry = lab.server("registry")
        self._hosts: dict[str, Host] = {
            "registry": registry,
            "berlin": lab.site("home", nat=Nat.PORT_RESTRICTED).machine("berlin"),
            "oslo": lab.site("mobile", nat=Nat.CGNAT).machine("oslo"),
            "lima": lab.site("hosted", nat=Nat.NONE).machine("lima"),
        }
        self._address = str(registry.ipv4)
        self._join_string = ""
        self._programs = _programs(directory)
        self._rest: Iterator[Block] = iter([b for b in blocks(ROOT / "docs" / "install.md") if b.places])

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
        """Run a command on a machine and return what it prints; LabError when it fails."""
        host = self._hosts[place]
        environment = {
            **os.environ,
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "LAB_HOST": str(host.directory),
        }
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', place, *argv]
        return host.run(named, env=environment, cwd=host.directory, timeout=PATIENCE).stdout

    def status(self, place: str) -> dict[str, str]:
        """The path to each other peer that the agent on `place` knows, by the last part of its name."""
        status = json.loads(self.run(place, "scopectl", "status", "-o", "json"))
        return {peer["name"].rpartition(".")[2]: peer["path"] for peer in status["peers"]}

    def registry_serves(self) -> bool:
        """Whether scopectl gets an answer; LabError while it does not."""
        self.run("registry", "scopectl", "get", "meshes")
        return True

    def address(self, place: str) -> str:
        """An address of a peer inside the mesh."""
        return str(json.loads(self.run(place, "scopectl", "status", "-o", "json"))["addresses"][0])

    def wait_until_all_direct(self, place: str) -> None:
        """Until the agent on `place` has a direct path to both others."""
        others = dict.fromkeys(set(PEERS) - {place}, "Direct")
        self.wait_for(f"{place} has direct paths", lambda: self.status(place) == others)

    def log(self, place: str) -> str:
        """What the services of a machine said."""
        logs = self._hosts[place].directory.glob("*.log")
        return "".join(f"--- {place} {log.name}\n{log.read_text()[-4000:]}" for log in sorted(logs))

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        """Until it holds; with what every machine said when it never does."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if holds():
                    return
            except LabError as error:
                what = f"{what}: {error}" if time.monotonic() > deadline else what
            assert time.monotonic() < deadline, "\n".join([what, *map(self.log, self._hosts)])
            time.sleep(0.2)

    def _do(self, block: Block) -> None:
        if block.language != "sh":
            place, file = block.places
            (self._hosts[place].directory / file).write_text(block.text)
            return
        text = block.text.replace("registry.example.net", self._address).replace(
            "JOIN STRING", self._join_string
        )
        for place in block.places:
            if "scopectl" in text and place == "registry":
                self.wait_for("the registry serves", self.registry_serves)
            try:
                printed = self.run(place, "bash", "-eu", "-o", "pipefail", "-c", text)
            except LabError as error:
                raise AssertionError("\n".join([str(error), *map(self.log, self._hosts)])) from None
            if "token create" in text:
                self._join_string = printed.strip()


def _programs(directory: Path) -> Path:
    """A directory of programs to find first: ours, and stand-ins for sudo and systemctl."""
    folder = directory / "bin"
    folder.mkdir()
    for program in PROGRAMS:
        (folder / program).symlink_to(Path(sys.executable).parent / program)
    systemctl = f'{sys.executable} {Path(__file__).parent / "systemctl_fixture.py"} "$LAB_HOST"'
    for name, does in (("sudo", "exec"), ("systemctl", f"exec {systemctl}")):
        (folder / name).write_text(f'#!/bin/sh\n{does} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.timeout(300)
def test_the_walk_of_the_install_page_makes_a_mesh_of_three_machines_and_unmakes_it(tmp_path: Path) -> None:
    with Lab(private=PRIVATE) as lab:
        walk = Walk(lab, tmp_path)

        walk.on("systemctl enable --now scope-agent@home")
        for place in PEERS:
            walk.wait_until_all_direct(place)

        walk.on("scopectl ping")
        oslo = walk.address("oslo")
        walk.run("oslo", "systemctl", "stop", "scope-agent@home")
        assert "1 received" in walk.run("berlin", "ping", "-c", "1", "-W", "2", oslo)
        walk.run("oslo", "systemctl", "start", "scope-agent@home")
        walk.wait_until_all_direct("oslo")

        walk.on("scopectl get peers")
        peers = json.loads(walk.run("registry", "scopectl", "get", "peers", "-o", "json"))["items"]
        assert {peer["metadata"]["name"] for peer in peers} == {f"home.external.{place}" for place in PEERS}
        for peer in peers:
            assert {ip_address(a.partition("/")[0]).version for a in peer["status"]["addresses"]} == {4, 6}

        walk.on("peer remove home.external.lima")
        walk.wait_for("berlin cuts lima off", lambda: walk.status("berlin") == {"oslo": "Direct"})

        walk.on("scope-agent leave")
        for place in ("lima", "oslo"):
            with pytest.raises(LabError, match="scope0"):
                walk.run(place, "ip", "link", "show", "scope0")
            assert walk.run(place, "ls", "/var/lib/scope") == ""
        walk.wait_for("berlin forgets oslo", lambda: walk.status("berlin") == {})

        walk.finish()
        walk.wait_for(
            "the restored registry knows berlin",
            lambda: "berlin" in walk.run("registry", "scopectl", "get", "peers"),
        )
