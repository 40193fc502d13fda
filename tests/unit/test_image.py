"""Dockerfile and what it needs agree with the rest of the tree; what is in an image is told as it is."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from image.sbom import NotLocked, describe

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MANIFESTS = ROOT / "charts" / "manifests"
# Continued lines are one; comments say nothing to the builder.
INSTRUCTIONS = [
    line.replace("\\\n", " ")
    for line in re.findall(
        r"^(?!#)\S(?:.*\\\n)*.*$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE
    )
]
SHIPPED = {"scope", "wireguard"}


def stages() -> dict[str, tuple[str, list[str]]]:
    """What each stage is made from, and its instructions, in order."""
    found: dict[str, tuple[str, list[str]]] = {}
    steps: list[str] = []
    for each in INSTRUCTIONS:
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", each):
            found[start[2]] = (start[1], steps := [])
        else:
            steps.append(each)
    return found


def copied(steps: list[str]) -> list[tuple[str | None, list[str]]]:
    """From which stage (None: the context), and what."""
    found = []
    for words in (each.split() for each in steps if each.startswith("COPY ")):
        source = words[1].removeprefix("--from=") if words[1].startswith("--from=") else None
        found.append((source, words[2 if source else 1 : -1]))
    return found


def test_an_image_without_a_target_is_the_one_with_all_programs() -> None:
    assert list(stages())[-1] == "scope"
    (install,) = [each for each in stages()["locked"][1] if "uv export" in each]
    assert "--all-extras" in install and "--no-dev" in install


def test_nothing_of_what_builds_is_shipped_but_the_environment() -> None:
    for name in SHIPPED:
        origin, steps = stages()[name]
        assert origin == "system"
        taken = [what for source, what in copied(steps) if source is not None]
        assert taken in ([], [["/opt/scope"], ["/layer/"]])
    assert stages()["system"][0] == "${BASE_IMAGE}"


def test_what_is_installed_is_what_was_locked() -> None:
    installs = [
        part
        for _, steps in stages().values()
        for step in steps
        for part in step.split("&&")
        if "pip install" in part
    ]
    assert len(installs) == 4
    for each in installs:
        assert "--require-hashes" in each or ("--no-deps" in each and "--no-index" in each)  # our own wheel


def test_the_context_holds_what_is_copied_from_it() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for _, steps in stages().values():
        for source, names in copied(steps):
            for name in names if source is None else []:
                assert (ROOT / name).exists()
                assert any(f"!{name}".startswith(let.rstrip("/")) for let in ignored if let[:1] == "!"), name


def test_the_image_of_user_space_wireguard_holds_all_that_its_program_imports() -> None:
    names = [name for _, each in copied(stages()["wireguard"][1]) for name in each]
    for name in names:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, ast.Import):
                imported = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [str(node.module)]
            else:
                continue
            for module in imported:
                path = f"{module.replace('.', '/')}.py"
                at_hand = path in names or f"nodeagent/{path}" in names
                assert at_hand or module.split(".")[0] in sys.stdlib_module_names, f"{name} imports {module}"


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_images_run_as_the_user_that_the_manifests_name(name: str) -> None:
    (user,) = [each for each in stages()[name][1] if each.startswith("USER ")]
    assert user == "USER 65532:65532"
    operator = next(
        each
        for each in yaml.safe_load_all((MANIFESTS / "50-operator.yaml").read_text())
        if each["kind"] == "Deployment"
    )
    context = operator["spec"]["template"]["spec"]["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"]) == (65532, 65532)


def test_every_program_that_the_manifests_start_is_one_of_the_image() -> None:
    for path in MANIFESTS.glob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            pod = document.get("spec", {}).get("template", {}).get("spec", {})
            for container in pod.get("containers", []):
                assert container["image"] == f"scope-mesh:{PROJECT['version']}"
                assert container["command"][0] in PROJECT["scripts"]


def test_the_chart_asks_for_the_version_that_user_space_wireguard_has() -> None:
    values = yaml.safe_load((ROOT / "charts" / "scope" / "values.yaml").read_text())
    (label,) = [each for each in stages()["wireguard"][1] if each.startswith("LABEL ")]
    assert f'image.version="{values["wireguard"]["image"]["tag"]}"' in label


LOCKED: dict[str, Any] = {
    "components": [
        {"bom-ref": "yarl-9@1.2", "name": "yarl", "version": "1.2", "purl": "pkg:pypi/yarl@1.2"},
        {"bom-ref": "idna-3@3.1", "name": "idna", "version": "3.1", "purl": "pkg:pypi/idna@3.1"},
        {"bom-ref": "win-4@1", "name": "win", "version": "1", "purl": "pkg:pypi/win@1"},
    ],
    "dependencies": [
        {"ref": "yarl-9@1.2", "dependsOn": ["idna-3@3.1", "win-4@1"]},
        {"ref": "idna-3@3.1"},
        {"ref": "win-4@1"},
    ],
}


def test_an_sbom_lists_what_is_installed_and_nothing_else() -> None:
    inventory = ["deb libc6 2.36-9+deb12u14 amd64", "pypi Yarl 1.2", "pypi idna 3.1", "pypi scope-mesh 0.1.0"]
    sbom = describe("scope-mesh", "0.1.0", inventory, LOCKED)
    assert [each["purl"] for each in sbom["components"]] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64",
        "pkg:pypi/idna@3.1",
        "pkg:pypi/yarl@1.2",
    ]
    assert {"ref": "yarl-9@1.2", "dependsOn": ["idna-3@3.1"]} in sbom["dependencies"]
    assert "win-4@1" not in str(sbom)
    assert sbom == describe("scope-mesh", "0.1.0", inventory, LOCKED)


def test_a_package_that_the_lock_does_not_name_is_refused() -> None:
    with pytest.raises(NotLocked, match=r"yarl 1\.3 is in scope-mesh and not in uv\.lock"):
        describe("scope-mesh", "0.1.0", ["pypi yarl 1.3"], LOCKED)
    with pytest.raises(ValueError, match="no line of an inventory"):
        describe("scope-mesh", "0.1.0", ["rpm yarl 1.3"], LOCKED)
