"""Writes what is made from charts/scope: its README, the mesh in its values' schema, and charts/manifests.

The README's table comes from the comments of values.yaml; the schema of the value `mesh` from the definition
of ScopeMesh, so that a typo in it is refused before anything is installed; the manifests are what Helm makes
of the templates with the values as they are, but for the namespace, which no chart makes, and for the rights
that exported Services take, which a file of their own gives. With --check nothing is written, and README and
schema are compared alone: the manifests need Helm, and a test holds them against the chart.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
CHART = ROOT / "charts" / "scope"
README, SCHEMA, VALUES = CHART / "README.md", CHART / "values.schema.json", CHART / "values.yaml"
MESHES = ROOT / "crds" / "scopemeshes.yaml"
MANIFESTS = ROOT / "charts" / "manifests"
HELM = ROOT / "build" / "helm" / "helm"
# What each file of charts/manifests is made of.
TEMPLATES = {
    "10-cluster.yaml": "cluster.yaml",
    "20-accounts.yaml": "accounts.yaml",
    "30-operator-rights.yaml": "operator-rights.yaml",
    "31-agent-rights.yaml": "agent-rights.yaml",
    "40-policies.yaml": "policies.yaml",
    "50-operator.yaml": "operator.yaml",
    "51-agent.yaml": "agent.yaml",
}
# What takes other values than those that stand.
OPTIONAL = {"32-service-rights.yaml": ("service-rights.yaml", "--set=services.export=true")}
NAMESPACE = "scope-system"

INTRODUCTION = """\
# The chart `scope`

    kubectl create namespace scope-system
    kubectl label namespace scope-system pod-security.kubernetes.io/enforce=privileged
    helm install scope charts/scope --namespace scope-system --set clusterName=fra

[docs/chart.md](../../docs/chart.md) says how to use it: certificates, joining clusters, upgrades, removal.

The table is made from `values.yaml` by `hack/chart.py`: change the comments there, and run that.

## Values

| value | default | |
|---|---|---|
"""

_KEY = re.compile(r"( *)([A-Za-z][A-Za-z0-9]*):( .*)?")
_SCHEMA_ONLY = ("description", "title", "default", "format")  # and what begins with x-kubernetes


def main() -> int:
    """Write all of it, or compare."""
    parser = argparse.ArgumentParser(description="Make what comes from charts/scope.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is stale")
    options = parser.parse_args()
    wanted = {README: readme(), SCHEMA: schema()}
    if not options.check:
        for path, text in (*wanted.items(), *manifests()):
            path.write_text(text)
        return 0
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale: run .venv/bin/python hack/chart.py", file=sys.stderr)
    return 1 if stale else 0


def readme() -> str:
    """The chart's README. Raises ValueError for a value that has no comment."""
    values = yaml.safe_load(VALUES.read_text())
    rows = [
        f"| `{'.'.join(path)}` | `{json.dumps(_at(values, path), separators=(', ', ': '))}` | {text} |\n"
        for path, text in described(VALUES.read_text())
    ]
    return INTRODUCTION + "".join(rows)


def described(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each value with what its comment says; one without a comment is a group of others.

    Raises ValueError for a value that is no group and has no comment.
    """
    path: list[str] = []
    comment: list[str] = []
    inside: int | None = None  # deeper lines are a default of several lines
    for line in text.splitlines():
        stripped = line.strip()
        depth = (len(line) - len(line.lstrip())) // 2
        if inside is not None and (depth > inside or not stripped):
            continue
        if stripped.startswith("#"):
            comment.append(stripped[1:].strip())
            inside = None
            continue
        match = _KEY.fullmatch(line)
        if match is None:
            if stripped:
                raise ValueError(f"values.yaml: {line!r} is neither a value nor a comment")
            comment = []
            continue
        path[depth:] = [match[2]]
        inside = None
        if comment:
            yield tuple(path), " ".join(comment)
            inside = depth
        elif match[3]:
            raise ValueError(f"values.yaml: {'.'.join(path)} has no comment")
        comment = []


def schema() -> str:
    """The values' schema, with the mesh as its definition has it."""
    document = json.loads(SCHEMA.read_text())
    [version] = yaml.safe_load(MESHES.read_text())["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    document["properties"]["mesh"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"},
            "spec": _strict(spec),
        },
        "dependencies": {"name": ["spec"], "spec": ["name"]},
    }
    return json.dumps(document, indent=2) + "\n"


def manifests() -> Iterator[tuple[Path, str]]:
    """Each generated manifest and its text. Raises FileNotFoundError without Helm, CalledProcessError."""
    objects = _rendered(*TEMPLATES.values())
    for name, template in TEMPLATES.items():
        yield MANIFESTS / name, "".join(f"---\n{text}" for source, text in objects if source == template)
    for name, (template, *settings) in OPTIONAL.items():
        shown = _rendered(template, settings=settings)
        yield MANIFESTS / name, "".join(f"---\n{text}" for _, text in shown)


def _rendered(*templates: str, settings: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What Helm makes of these, object by object, each with its template."""
    only = [f"--show-only=templates/{template}" for template in templates]
    shown = subprocess.run(
        [str(HELM), "template", "scope", str(CHART), f"--namespace={NAMESPACE}", *only, *settings],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    _, *parts = re.split(r"^---\n# Source: scope/templates/(.*)\n", shown, flags=re.MULTILINE)
    return list(zip(parts[::2], parts[1::2], strict=True))


def _strict(node: Any) -> Any:
    """A schema of Kubernetes as JSON Schema that refuses what it does not name."""
    if isinstance(node, list):
        return [_strict(each) for each in node]
    if not isinstance(node, Mapping):
        return node
    kept = {
        key: {name: _strict(each) for name, each in value.items()} if key == "properties" else _strict(value)
        for key, value in node.items()
        if key not in _SCHEMA_ONLY and not key.startswith("x-kubernetes")
    }
    if "properties" in kept:
        kept["additionalProperties"] = False
    return kept


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        values = values[name]
    return values


if __name__ == "__main__":
    sys.exit(main())
