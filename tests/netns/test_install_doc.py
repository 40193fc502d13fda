"""The walk of docs/install.md on machines behind NATs."""

from __future__ import annotations

import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from lab import Lab, LabError, Nat

from tests import walk_fixture
from tests.docs_fixture import ROOT

PRIVATE = ("/var/run/wireguard", "/run/scope", "/var/lib", "/etc/default")
PEERS = ("berlin", "oslo", "lima")


class Walk(walk_fixture.Walk):
    """The page, with a registry and three machines."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        registry = lab.server("registry")
        machines = {
            "berlin": lab.site("home", nat=Nat.PORT_RESTRICTED).machine("berlin"),
            "oslo": lab.site("mobile", nat=Nat.CGNAT).machine("oslo"),
            "lima": lab.site("hosted", nat=Nat.NONE).machine("lima"),
        }
        page = ROOT / "docs" / "install.md"
        super().__init__(page, {"registry": registry, **machines}, registry=registry, directory=directory)

    def prepare(self, place: str, text: str) -> None:
        """The registry is asked as soon as it answers."""
        if "scopectl" in text and place == "registry":
            self.wait_for("the registry serves", self.registry_serves)

    def paths(self, place: str) -> dict[str, str]:
        """As for every page, but by the last part of a peer's name."""
        return {name.rpartition(".")[2]: path for name, path in super().paths(place).items()}

    def registry_serves(self) -> bool:
        """Whether scopectl gets an answer; LabError while it does not."""
        self.run("registry", "scopectl", "get", "meshes")
        return True

    def address(self, place: str) -> str:
        """An address of a peer inside the mesh."""
        return str(self.status(place)["addresses"][0])

    def wait_until_all_direct(self, place: str) -> None:
        """Until the agent on `place` has a direct path to both others."""
        others = dict.fromkeys(set(PEERS) - {place}, "Direct")
        self.wait_for(f"{place} has direct paths", lambda: self.paths(place) == others)


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
        walk.wait_for("berlin cuts lima off", lambda: walk.paths("berlin") == {"oslo": "Direct"})

        walk.on("scope-agent leave")
        for place in ("lima", "oslo"):
            with pytest.raises(LabError, match="scope0"):
                walk.run(place, "ip", "link", "show", "scope0")
            assert walk.run(place, "ls", "/var/lib/scope") == ""
        walk.wait_for("berlin forgets oslo", lambda: walk.paths("berlin") == {})

        walk.finish()
        walk.wait_for(
            "the restored registry knows berlin",
            lambda: "berlin" in walk.run("registry", "scopectl", "get", "peers"),
        )
