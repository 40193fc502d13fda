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
from scope_agent.relay.shell.forwarding import FORWARDING
from scope_operator.gateway.options import PORT, REFLECTOR_PORTS

from scope import resources
from scope.model import Addressing, Mesh, MeshSpec, Meta
from tests.docs_fixture import PROGRAMS, ROOT, blocks, commands, pages, prose, shell_lines, spans

INSTALL = ROOT / "docs" / "install.md"
KUBERNETES = ROOT / "docs" / "kubernetes.md"
MANIFESTS = ROOT / "charts" / "manifests"
UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
SOURCES = ("scope", "operator/scope_operator", "nodeagent/scope_agent", "nodeagent/scope_dataplane")

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TREE_PATH = re.compile(r"(?:scope|operator|nodeagent|docs|hack|tests|crds|charts)/[\w./@-]*")
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
    real = {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in spec.items()
        if name not in ("addressing", "timers")
    }
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
    # What the API server says for us: a sentence, or an expression with its parts in quotes.
    for policy in documents("40-policies"):
        texts += [
            rule.get("message", rule.get("messageExpression"))
            for rule in policy["spec"].get("validations", ())
        ]
    return texts


def documents(manifest: str) -> list[dict[str, Any]]:
    """The objects of one of the plain manifests."""
    return list(yaml.safe_load_all((MANIFESTS / f"{manifest}.yaml").read_text()))


def symptoms(page: Path = INSTALL) -> list[str]:
    """What a page's tables of troubles quote, a message for each row: the first that is no single word."""
    table = page.read_text().partition("## When something is wrong")[2]
    rows = re.findall(r"^\| .*\|$", table, re.MULTILINE)
    quoted = [re.findall(r"`([^`]+)`", row) for row in rows if row.startswith("| `")]
    return [next((text for text in texts if " " in text), texts[0]) for texts in quoted]


@pytest.mark.parametrize("symptom", [*symptoms(), *symptoms(KUBERNETES)])
def test_every_message_in_the_table_of_troubles_is_one_that_the_programs_say(symptom: str) -> None:
    texts = source_texts()
    for part in symptom.split("…"):
        wanted = part.strip(" :;,.")
        assert not wanted or any(wanted in text.replace("`", "") for text in texts), f"nobody says {wanted!r}"


def constants(module: str) -> set[str]:
    """The texts of a module that are one word in capitals and small letters, as reasons are."""
    tree = ast.parse((ROOT / "operator" / "scope_operator" / module).read_text())
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[A-Z][a-z]+(?:[A-Z][a-z]+)+", node.value)
    } - {"WireGuard"}  # a name


def test_every_reason_of_a_pair_without_a_path_is_in_the_table_of_troubles() -> None:
    (why,) = [
        node
        for path in (ROOT / "nodeagent" / "scope_agent" / "paths").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") == "why_not"
    ]
    said = {
        part.value.strip()
        for statement in why.body[1:]
        for part in ast.walk(statement)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value.strip(" ,:")
    }
    assert len(said) > 10
    explained = " ".join(symptoms())
    missing = {text for text in said if text.partition(": a NAT")[0].strip(" ,:") not in explained}
    assert not missing


# --- what kubernetes.md promises ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["plan/conditions.py", "kube/news.py", "enrolment.py"])
def test_every_condition_reason_and_event_of_the_operator_is_explained(module: str) -> None:
    page = KUBERNETES.read_text()
    assert constants(module)
    assert not {word for word in constants(module) if f"`{word}`" not in page}


@pytest.mark.parametrize("plural", ["scopemeshes", "scopepeers"])
def test_every_column_that_kubectl_shows_is_explained(plural: str) -> None:
    definition = yaml.safe_load((ROOT / "crds" / f"{plural}.yaml").read_text())
    (version,) = definition["spec"]["versions"]
    columns = {column["name"].upper() for column in version["additionalPrinterColumns"]}
    kind = definition["spec"]["names"]["kind"]
    section = (
        KUBERNETES.read_text().partition(f"\nA {kind}")[2].partition("\n\nA ")[0].partition("\n\nWhy")[0]
    )
    told = {
        name
        for cell in re.findall(r"^\| (`[A-Z].*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cell)
    }
    assert told == columns


@pytest.mark.parametrize("manifest", ["30-operator-rights", "31-agent-rights", "32-service-rights"])
def test_every_right_that_the_manifests_give_is_explained(manifest: str) -> None:
    rows = re.findall(r"^\| ([a-z, ]+) \| (.*?) \|", KUBERNETES.read_text(), re.MULTILINE)
    for role in documents(manifest):
        for rule in role.get("rules", ()):
            verbs = ", ".join(rule["verbs"])
            named = rule.get("resourceNames") or rule.get("resources") or rule["nonResourceURLs"]
            told = [on for may, on in rows if may == verbs]
            assert any(all(f"`{each}`" in on for each in named) for on in told), f"{verbs} {named}"


def test_every_policy_of_the_manifests_is_explained() -> None:
    page = KUBERNETES.read_text()
    assert not {each["metadata"]["name"] for each in documents("40-policies")} - set(spans(KUBERNETES))
    for field in ("addresses", "role", "conditions", "online", "lastSeen", "tombstone"):
        assert field in page.partition("## Permissions")[2].partition("\n## ")[0]


def test_operators_are_started_as_their_program_understands(understand: Callable[[list[str]], None]) -> None:
    (written,) = (block.text for block in blocks(KUBERNETES) if "joining.yaml" in block.places)
    shipped = [each for each in documents("50-operator") if each["kind"] == "Deployment"]
    for workload in (yaml.safe_load(written), *shipped):
        (container,) = workload["spec"]["template"]["spec"]["containers"]
        understand(
            ["scope-operator", *(each.replace("$(SCOPE_CLUSTER)", "fra") for each in container["args"])]
        )


def test_the_ports_of_the_gateway_are_those_that_the_page_opens() -> None:
    (service,) = [each for each in documents("50-operator") if each["kind"] == "Service"]
    ports = {port["port"] for port in service["spec"]["ports"]}
    assert ports == {PORT, *REFLECTOR_PORTS}
    sentence = next(line for line in KUBERNETES.read_text().split("\n\n") if "`scope-gateway` opens" in line)
    assert {int(port) for port in re.findall(r"\b\d{4}\b", sentence)} == ports


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
        ("scope-psk@.service", "CAP_NET_ADMIN CAP_NET_RAW"),
        ("scope-wireguard@.service", "CAP_NET_ADMIN"),
        ("scope-forwarder@.service", "CAP_NET_ADMIN"),
        ("scope-carrier@.service", "CAP_NET_ADMIN CAP_NET_BIND_SERVICE"),
    ):
        keys = unit(name)
        assert keys["CapabilityBoundingSet"] == keys["AmbientCapabilities"] == [needed]
        devices = keys.get("DeviceAllow", [])
        opens_none = name in ("scope-psk@.service", "scope-forwarder@.service", "scope-carrier@.service")
        assert devices == ([] if opens_none else ["/dev/net/tun rw"])
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


def test_only_what_the_page_on_security_names_reaches_for_settings_of_the_kernel() -> None:
    reaching = {
        path.relative_to(ROOT).as_posix()
        for source in SOURCES
        for path in (ROOT / source).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and str(node.value).startswith("/proc/sys")
    }
    shells = "nodeagent/scope_agent/relay/shell"
    only_read = {f"{shells}/selftest.py", "nodeagent/scope_agent/pods/shell/network.py"}
    assert reaching == {f"{shells}/forwarding.py", *only_read}
    text = (ROOT / "docs" / "security.md").read_text()
    for setting in (
        *FORWARDING.values(),
        "net/ipv6/conf/INTERFACE/accept_ra",
        "net/ipv4/conf/all/accept_redirects",
    ):
        assert f"`{setting.replace('/', '.')}`" in text
