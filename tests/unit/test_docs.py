"""What the documentation says holds: its links, files, commands, messages and services."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from scope_operator.gateway.options import PORT, REFLECTOR_PORTS

from scope import resources
from scope.model import Addressing, Mesh, MeshSpec, Meta
from tests.docs_fixture import PROGRAMS, ROOT, blocks, commands, pages, prose, shell_lines, spans

INSTALL = ROOT / "docs" / "install.md"
UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SOURCES = ("scope", "operator/scope_operator", "nodeagent/scope_agent", "nodeagent/scope_dataplane")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TREE_PATH = re.compile(r"(?:scope|operator|nodeagent|docs|hack|tests)/[\w./@-]*")
BOUNDARY = "\0"


class Parsed(Exception):
    """A command line was understood."""


class NotUnderstood(Exception):
    """A command line was refused, with argparse's reason."""


@pytest.fixture
def understand(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Hands a command line to the program's own parser; raises NotUnderstood."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise Parsed

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise NotUnderstood(message)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)

    def run(command: list[str]) -> None:
        module, function = SCRIPTS[command[0]].split(":")
        with pytest.raises(Parsed):
            getattr(importlib.import_module(module), function)(command[1:])

    return run


# --- pages --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_file_of_the_tree_that_a_page_names_exists(page: Path) -> None:
    named = {span for span in spans(page) if TREE_PATH.fullmatch(span)}
    assert not {name for name in named if not (ROOT / name).exists()}


def test_every_make_target_that_a_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        target
        for page in pages()
        for target in re.findall(r"\bmake ([a-z]+)\b(?=`| KEEP| BENCH|$)", page.read_text(), re.MULTILINE)
    }
    assert named >= {"demo", "test"}
    assert named <= targets


def test_every_module_of_the_agent_and_the_registry_has_its_room_in_the_architecture() -> None:
    named = {
        name.rstrip("/")
        for name in re.findall(r"`([\w./-]+)`", (ROOT / "docs" / "architecture.md").read_text())
    }
    rooms = [
        path
        for folder in SOURCES
        for path in (ROOT / folder).iterdir()
        if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").exists())
    ]
    homeless = {
        str(path.relative_to(ROOT))
        for path in rooms
        if not named & {str(path.relative_to(ROOT)), path.name, f"{path.parent.name}/{path.name}"}
        and not any(name.startswith(f"{path.relative_to(ROOT)}/") for name in named)
    }
    assert not homeless


# --- commands -----------------------------------------------------------------------------------------------


def shown_commands() -> list[tuple[str, list[str]]]:
    return [
        (page.name, command) for page in pages() for line in shell_lines(page) for command in commands(line)
    ]


def test_the_pages_show_every_program() -> None:
    assert {command[0] for _, command in shown_commands()} >= {"scope-agent", "scope-registry", "scopectl"}


@pytest.mark.parametrize(
    ("page", "command"), shown_commands(), ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_every_command_of_a_page_is_understood(
    page: str, command: list[str], understand: Callable[[list[str]], None]
) -> None:
    understand(command)


def test_every_command_named_in_a_sentence_is_one(understand: Callable[[list[str]], None]) -> None:
    wrong = []
    for page in pages():
        for span in spans(page):
            for command in commands(span):
                if command[1:] and "…" not in span:
                    try:
                        understand(command)
                    except NotUnderstood as reason:
                        # A sentence may name a command without what it takes.
                        if "arguments are required" not in str(reason):
                            wrong.append(f"{page.name}: {span}: {reason}")
    assert not wrong


def test_every_block_of_shell_is_shell() -> None:
    for page in pages():
        for block in blocks(page):
            if block.language == "sh":
                checked = subprocess.run(
                    ["bash", "-n"], input=block.text, text=True, capture_output=True, check=False
                )
                assert checked.returncode == 0, f"{block.page}: {checked.stderr}\n{block.text}"


# --- what install.md promises -------------------------------------------------------------------------------


def test_the_mesh_to_copy_is_the_example_and_a_mesh() -> None:
    (written,) = (block.text for block in blocks(INSTALL) if "mesh.yaml" in block.places)
    assert written == (ROOT / "docs" / "examples" / "mesh.yaml").read_text()
    assert resources.parse(yaml.safe_load(written)).meta.name == "home"


def test_the_fields_of_a_mesh_and_their_defaults_are_the_real_ones() -> None:
    spec = resources.to_dict(Mesh(Meta("home"), MeshSpec(Addressing())))["spec"]
    assert isinstance(spec, dict)
    real = {name: str(value) for name, value in spec.items() if name not in ("addressing", "timers")}
    real |= {f"timers.{name}": value for name, value in spec["timers"].items()}
    told = dict(re.findall(r"^\| `([\w.]+)` \| `(\w+)` \|", INSTALL.read_text(), re.MULTILINE))
    assert told == real


def test_the_ports_to_open_are_the_ports_that_are_served() -> None:
    opened = {
        int(port)
        for block in blocks(INSTALL)
        for line in block.lines
        if "ufw" in line or "dport" in line
        for port in re.findall(r"\b\d{4,5}\b", line)
    }
    assert opened == {PORT, *REFLECTOR_PORTS}


@functools.cache
def source_texts() -> list[str]:
    """Every text of the sources as the reader of an error gets it; what is filled in is a boundary."""
    texts = []
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    texts.append(
                        "".join(
                            str(v.value) if isinstance(v, ast.Constant) else BOUNDARY for v in node.values
                        )
                    )
    return texts


def symptoms() -> list[str]:
    table = INSTALL.read_text().partition("## When something is wrong")[2]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("symptom", symptoms())
def test_every_message_in_the_table_of_troubles_is_one_that_the_programs_say(symptom: str) -> None:
    texts = source_texts()
    for part in symptom.split("…"):
        wanted = part.strip(" :;,.")
        assert not wanted or any(wanted in text.replace("`", "") for text in texts), f"nobody says {wanted!r}"


# --- services -----------------------------------------------------------------------------------------------


def keys_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def unit(name: str) -> dict[str, list[str]]:
    return keys_of(ROOT / "docs" / "systemd" / name)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_every_service_starts_a_command_that_its_program_understands(
    path: Path, understand: Callable[[list[str]], None]
) -> None:
    (line,) = keys_of(path)["ExecStart"]
    words = [word.replace("%i", "home") for word in line.split() if not word.startswith("$")]
    assert words[0].startswith("/usr/local/bin/")
    command = [Path(words[0]).name, *words[1:]]
    assert command[0] in PROGRAMS
    understand(command)


@pytest.mark.parametrize("name", ["scope-agent@.service", "scope-wireguard@.service"])
def test_ending_a_service_of_a_peer_ends_nothing_that_carries_traffic(name: str) -> None:
    keys = unit(name)
    assert keys["KillMode"] == ["process"]
    assert keys["OOMPolicy"] == ["continue"]
    assert keys["RuntimeDirectoryPreserve"] == ["yes"]
    assert set(keys["RuntimeDirectory"][0].split()) == {"scope", "wireguard"}


def test_services_come_back_by_themselves_and_never_give_up() -> None:
    for path in UNITS:
        keys = keys_of(path)
        assert (keys["Restart"], keys["StartLimitIntervalSec"]) == (["always"], ["0"]), path.name


def test_no_service_may_do_more_than_it_must() -> None:
    assert unit("scope-registry.service")["CapabilityBoundingSet"] == [""]
    assert unit("scope-registry.service")["DynamicUser"] == ["yes"]
    for name, needed in (
        ("scope-agent@.service", "CAP_NET_ADMIN CAP_NET_RAW"),
        ("scope-wireguard@.service", "CAP_NET_ADMIN"),
    ):
        keys = unit(name)
        assert keys["CapabilityBoundingSet"] == keys["AmbientCapabilities"] == [needed]
        assert keys["DeviceAllow"] == ["/dev/net/tun rw"]
    for path in UNITS:
        keys = keys_of(path)
        assert (keys["NoNewPrivileges"], keys["ProtectSystem"], keys["ProtectHome"]) == (
            ["yes"],
            ["strict"],
            ["yes"],
        )
        assert keys["UMask"] == ["0077"]


def test_what_services_keep_is_for_their_user_alone() -> None:
    for name, directory in (("scope-agent@.service", "scope"), ("scope-registry.service", "scope-registry")):
        assert (unit(name)["StateDirectory"], unit(name)["StateDirectoryMode"]) == ([directory], ["0700"])


def test_systemd_itself_finds_nothing_wrong_with_the_services(tmp_path: Path) -> None:
    """Where there is no systemd to ask, as in a container, the tests above have read the keys that matter."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    instances = []
    for path in UNITS:
        instance = tmp_path / path.name.replace("@.", "@home.")
        instance.write_text(path.read_text().replace("/usr/local/bin/", f"{tmp_path}/"))
        instances.append(instance)
    for program in PROGRAMS:
        (tmp_path / program).write_text("#!/bin/sh\n")
        (tmp_path / program).chmod(0o755)
    verified = subprocess.run(
        [analyze, "verify", *instances], capture_output=True, text=True, check=False, timeout=60
    )
    said = [line for line in verified.stderr.splitlines() if "scope-" in line]
    assert not said
