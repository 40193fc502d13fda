"""docs/topology.md is walked through: its file is planned, and what it shows is what the commands print."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from scope_agent.paths.explaining import Attempt, Result
from scope_agent.status import candidates

from scope.ctl.__main__ import main
from scope.ctl.explaining import RESULTS
from scope.model import (
    Addressing,
    Assignment,
    Candidate,
    CandidateKind,
    Endpoint,
    Hubs,
    Kind,
    Link,
    Mapping,
    Mesh,
    MeshSpec,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    Role,
)
from scope.registry.memory import MemoryRegistry
from tests.docs_fixture import ROOT, blocks
from tests.unit.gateway_fixture import ADMIN, gateway
from tests.unit.registry_conformance import keys
from tests.unit.test_ctl_local import STATUS, agent_at

PAGE = ROOT / "docs" / "topology.md"
HERE = {"fra": "198.51.100.10:51820", "sgp": "198.51.100.20:51820", "berlin": "203.0.113.4:40112"}
FAR = {
    ("berlin", "fra"): 8.0,
    ("berlin", "sgp"): 161.0,
    ("lima", "fra"): 190.0,
    ("lima", "sgp"): 244.0,
    ("oslo", "fra"): 0.0,
    ("oslo", "sgp"): 0.0,
}


async def fill(registry: MemoryRegistry) -> None:
    """The mesh of the page as it was before: full, with one hub, and a peer that UDP does not leave."""
    spec = MeshSpec(Addressing(ipv4=IPv4Network("100.64.0.0/16")), hubs=Hubs(names=("home.external.fra",)))
    await registry.create(Mesh(Meta("home"), spec))
    for number, name in enumerate(("fra", "sgp", "berlin", "lima", "oslo"), start=1):
        full = f"home.external.{name}"
        await registry.create(Peer(Meta(full), PeerSpec("home"), PeerReport(keys(number))))
        peer = await registry.get(Kind.PEER, full)
        assert isinstance(peer, Peer) and peer.report is not None
        role = Role.HUB if name == "fra" else Role.EDGE
        assigned = Assignment((IPv4Interface(f"100.64.0.{number}/16"),), role, online=True)
        await registry.update_status(Kind.PEER, full, assigned, uid=peer.meta.uid)
        endpoints = (Candidate(Endpoint.parse(HERE[name]), CandidateKind.REFLEXIVE),) if name in HERE else ()
        mapping = Mapping.ENDPOINT_DEPENDENT if name in ("berlin", "lima") else Mapping.NONE
        report = replace(peer.report, links=tuple(links(name)), endpoints=endpoints, mapping=mapping)
        await registry.update_status(Kind.PEER, full, report, uid=peer.meta.uid)


def links(name: str) -> list[Link]:
    found = []
    if name in ("berlin", "lima"):
        other = "lima" if name == "berlin" else "berlin"
        relay = Endpoint.parse("198.51.100.10:26004")
        found.append(
            Link(
                f"home.external.{other}",
                PathKind.RELAYED,
                endpoint=relay,
                latency=0.199,
                reason="symmetric NAT on both sides",
                hub="home.external.fra",
            )
        )
    for (edge, hub), milliseconds in FAR.items():
        if edge != name:
            continue
        to = f"home.external.{hub}"
        at = Endpoint.parse(HERE[hub])
        if milliseconds:
            found.append(Link(to, PathKind.DIRECT, endpoint=at, latency=milliseconds / 1000))
        else:
            found.append(Link(to, PathKind.NONE, reason="no reflector answers: is UDP blocked here?"))
    return found


ATTEMPTS = (
    Attempt(
        Endpoint.parse("198.51.100.10:51820"),
        CandidateKind.HOST,
        Result.IN_USE,
        pings=4,
        rtt=0.008,
        asked=1.2,
        echoed=1.2,
        heard=31.0,
    ),
    Attempt(
        Endpoint.parse("10.0.0.5:51820"),
        CandidateKind.HOST,
        Result.NO_ANSWER,
        pings=6,
        asked=58.0,
    ),
    Attempt(
        Endpoint.parse("[2001:db8:7::5]:51820"),
        CandidateKind.HOST,
        Result.REFUSED,
        why="no IPv6 address here",
    ),
)


def answer(request: dict[str, object]) -> bytes:
    """The agent on berlin."""
    fra = {"name": "home.external.fra", "path": "Direct", "endpoint": HERE["fra"], "online": True}
    if request["command"] == "status":
        return json.dumps({"ok": True, "status": STATUS | {"peers": [fra]}}).encode() + b"\n"
    assert request == {"command": "explain", "peer": "home.external.fra"}
    return json.dumps({"ok": True, "candidates": candidates(ATTEMPTS)}).encode() + b"\n"


def shown() -> list[tuple[str, str]]:
    """Every command of the page with the block behind it: what it is said to print."""
    found = blocks(PAGE)
    return [
        (each.text.strip(), found[index + 1].text)
        for index, each in enumerate(found)
        if each.language == "sh" and each.places
    ]


def test_the_page_shows_what_its_commands_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [file] = [block for block in blocks(PAGE) if block.language == "yaml"]
    (tmp_path / file.places[1]).write_text(file.text)

    def run(command: str, *options: str) -> str:
        words = shlex.split(command.removeprefix("sudo "))
        assert words[0] == "scopectl"
        assert main([*words[1:], *options]) == 0
        return capsys.readouterr().out

    async def walk(said: Callable[[str, str], None]) -> None:
        async with gateway() as running, asyncio.timeout(60):
            await fill(running.registry)
            admin = tmp_path / "admin.json"
            admin.write_text(
                json.dumps(
                    {"url": running.url, "pin": None, "registryKey": "", "token": ADMIN.token.raw.decode()}
                )
            )
            admin.chmod(0o600)
            for command, told in shown():
                if not command.startswith("sudo "):
                    said(await asyncio.to_thread(run, command, "--admin-file", str(admin)), told)

    pairs: list[tuple[str, str]] = []
    asyncio.run(walk(lambda printed, told: pairs.append((printed, told))))
    socket = tmp_path / "home.sock"
    [(command, told)] = [each for each in shown() if each[0].startswith("sudo ")]
    with agent_at(socket, answer):
        pairs.append((run(command, "--socket", str(socket)), told))
    assert len(pairs) == 3
    for printed, told in pairs:
        assert printed == told


def test_every_result_of_a_candidate_is_explained() -> None:
    page = PAGE.read_text()
    assert RESULTS.keys() == set(Result)
    assert all(f"| `{words}` |" in page for words in RESULTS.values())
