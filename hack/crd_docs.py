"""Writes docs/crds.md from crds/*.yaml, or says with --check that it is not what they say.

For each kind: what `kubectl get` shows, the fields of spec and status, and what is refused, in the words.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
SOURCES = ("scopemeshes.yaml", "scopepeers.yaml", "scopeservices.yaml")
PAGE = ROOT / "docs" / "crds.md"

INTRODUCTION = """\
# ScopeMesh, ScopePeer and ScopeService

Every field of the resources, as Kubernetes checks them; the embedded registry takes and refuses the same
documents. `kubectl explain smesh.spec` says the same at a terminal.

This page is made from `crds/` by `hack/crd_docs.py`: change the definitions, and run that.
"""


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="Make docs/crds.md from crds/*.yaml.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is stale")
    options = parser.parse_args()
    text = "".join(page(yaml.safe_load((ROOT / "crds" / name).read_text()) for name in SOURCES))
    if not options.check:
        PAGE.write_text(text)
        return 0
    if not PAGE.exists() or PAGE.read_text() != text:
        print("docs/crds.md is not what crds/ says: run .venv/bin/python hack/crd_docs.py", file=sys.stderr)
        return 1
    return 0


def page(definitions: Iterator[dict[str, Any]]) -> Iterator[str]:
    """The page, in pieces."""
    yield INTRODUCTION
    for definition in definitions:
        spec = definition["spec"]
        [version] = spec["versions"]
        schema = version["schema"]["openAPIV3Schema"]
        names = spec["names"]
        yield f"\n## {names['kind']}\n\n{schema['description']}\n\n"
        [short], [category] = names["shortNames"], names["categories"]
        yield f"`{spec['group']}/{version['name']}`, {spec['scope'].lower()}-scoped; `kubectl get {short}`, "
        yield f"and with the others `kubectl get {category}`.\n"
        selectable = [f"`{field['jsonPath'][1:]}`" for field in version.get("selectableFields", ())]
        if selectable:
            yield f"Field selectors: {', '.join(selectable)}.\n"
        yield from columns_table(version["additionalPrinterColumns"])
        for part in [each for each in ("spec", "status") if each in schema["properties"]]:
            yield f"\n### {names['kind']} {part}\n\n{schema['properties'][part]['description']}\n"
            yield from fields_table(schema["properties"][part])
        yield from rules_list(names["kind"], schema)


def columns_table(columns: list[dict[str, Any]]) -> Iterator[str]:
    """What `kubectl get` shows; columns of a priority above 0 with `-o wide` only."""
    yield "\n| column | |\n|---|---|\n"
    for column in columns:
        wide = " With `-o wide`." if column.get("priority") else ""
        yield f"| {column['name']} | {column.get('description', 'Since when it is there.')}{wide} |\n"


def fields_table(schema: dict[str, Any]) -> Iterator[str]:
    """Every field below a schema; one that must be there is bold."""
    yield "\n| field | type | default | |\n|---|---|---|---|\n"
    for path, field, required in fields(schema):
        default = field.get("default", "")
        shown = "" if default == "" or isinstance(default, dict) else f"`{default}`"
        name = f"**`{path}`**" if required else f"`{path}`"
        yield f"| {name} | {type_of(field)} | {shown} | {field.get('description', '')} |\n"


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any], bool]]:
    """The fields below a schema, depth first, with their paths and whether they must be there."""
    if "items" in schema:
        yield from fields(schema["items"], f"{path}[]")
    for name, field in schema.get("properties", {}).items():
        at = f"{path}.{name}" if path else name
        yield at, field, name in schema.get("required", ())
        yield from fields(field, at)


def type_of(schema: dict[str, Any]) -> str:
    """What a value is, and within which bounds."""
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    match schema["type"]:
        case "array":
            least = schema.get("minItems")
            bounds = f"{least} to {schema['maxItems']}" if least else f"at most {schema['maxItems']}"
            return f"list of {bounds}"
        case "integer" | "number" as kind:
            highest = schema.get("maximum")
            return (
                f"{kind}, {schema['minimum']} to {highest}"
                if highest
                else f"{kind}, {schema['minimum']} or more"
            )
        case "object" if "additionalProperties" in schema:
            return f"map of at most {schema['maxProperties']}"
        case "string":
            return f"string, at most {schema['maxLength']}"
        case kind:
            return str(kind)


def rules_list(kind: str, schema: dict[str, Any]) -> Iterator[str]:
    """What is refused besides, in the words of the refusal."""
    yield f"\n### What is refused of a {kind}\n\n"
    yield "Each refusal names the field; what is said of it:\n\n"
    for path, rules in sorted(all_rules(schema).items()):
        for rule in rules:
            yield f"- {f'`{path}` ' if path else ''}{rule}\n"


def all_rules(schema: dict[str, Any], path: str = "") -> dict[str, list[str]]:
    """The messages of every rule, by the path of what it is about."""
    found: dict[str, list[str]] = {}
    for rule in schema.get("x-kubernetes-validations", ()):
        at = path + rule.get("fieldPath", "")
        found.setdefault(at.lstrip("."), []).append(rule["message"])
    inner = [(f"{path}.{name}", field) for name, field in schema.get("properties", {}).items()]
    if "items" in schema:
        inner.append((f"{path}[]", schema["items"]))
    if "additionalProperties" in schema:
        inner.append((f"{path}.*", schema["additionalProperties"]))
    for at, field in inner:
        for where, messages in all_rules(field, at).items():
            found.setdefault(where, []).extend(messages)
    return found


if __name__ == "__main__":
    sys.exit(main())
