"""Rules about the tree itself, which no other test would notice being broken."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
# The agent's way to its first ping has no time for these: aiohttp alone doubles its start.
LATE = (
    "aiohttp", "kubernetes", "prometheus_client", "rich", "cryptography.hazmat.primitives.asymmetric.mlkem",
    "scope_agent.psk.core", "scope_agent.psk.messages", "scope_agent.psk.provider", "scope_agent.psk.slots",
)  # fmt: skip
# Folders of whoever wrote a line, and package hosts other than the public ones, mean nothing to a reader.
MACHINE_PATH = re.compile(r"(?<![\w.~$}*-])/(?:work|root|Users)/")


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_operator_folder_does_not_shadow_pythons_operator_module() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    answer = run_python("import operator; operator.itemgetter; print(operator.__file__)")
    assert answer.returncode == 0, answer.stderr
    assert not Path(answer.stdout.strip()).is_relative_to(ROOT / "operator")


def test_the_agents_start_loads_no_library_that_its_first_ping_does_not_need() -> None:
    answer = run_python(
        f"import sys, scope_agent.run; print([name for name in {LATE!r} if name in sys.modules])"
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("script", sorted(PROJECT["project"]["scripts"]))
def test_every_console_script_has_the_function_it_names(script: str) -> None:
    module, function = PROJECT["project"]["scripts"][script].split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, (
        f"{script} names the module {module}, which is missing"
    )
    tree = ast.parse(Path(spec.origin).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_locked_package_comes_from_the_public_index_with_a_hash() -> None:
    for package in LOCK["package"]:
        source = package["source"]
        if source == {"editable": "."}:
            continue
        assert source == {"registry": "https://pypi.org/simple"}, f"{package['name']} is locked to {source}"
        files = [*package.get("wheels", []), *([package["sdist"]] if "sdist" in package else [])]
        assert files, f"{package['name']} has no file"
        for file in files:
            assert file["url"].startswith("https://files.pythonhosted.org/"), (
                f"{package['name']}: {file['url']}"
            )
            assert file["hash"].startswith("sha256:"), f"{package['name']}: {file['url']} has no hash"


def test_every_package_that_an_extra_brings_is_imported_by_the_product() -> None:
    declared = {
        normalised(re.split(r"[\[<>=;~! ]", requirement)[0])
        for extra in PROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
    }
    distributions = packages_distributions()
    imported = {
        normalised(distribution)
        for folder in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        for path in (ROOT / folder).rglob("*.py")
        for name in imported_roots(path)
        for distribution in distributions.get(name, [])
    }
    assert not declared - imported


def normalised(distribution: str) -> str:
    """A distribution's name in the one spelling of PyPA's name normalisation (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def test_no_tracked_file_names_a_folder_of_one_persons_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue  # a binary file: a fuzzing seed
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(lines, start=1)
            if MACHINE_PATH.search(line)
        ]
    assert not found, "\n".join(found)


def test_every_python_file_opens_by_saying_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if path.suffix == ".py" and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_every_script_of_the_makefile_exists_and_can_be_run() -> None:
    called = re.findall(r"hack/[\w-]+\.sh", (ROOT / "Makefile").read_text())
    assert called
    for script in called:
        assert (ROOT / script).stat().st_mode & 0o111, f"{script} is not executable"
