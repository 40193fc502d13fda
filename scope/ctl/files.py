"""Files that scopectl reads: resources as YAML or JSON, and the registry's `admin.json`."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from scope.credentials import PIN_BYTES, AdminCredential, read_base64url
from scope.ctl.errors import CommandError
from scope.model import Mesh, Peer, Secret
from scope.resources import InvalidResource, parse

MAX_FILE = 16 * 1024 * 1024  # thousands of resources


@dataclass(frozen=True, slots=True)
class Admin:
    """How to reach the registry as its administrator."""

    url: str
    pin: bytes | None
    credential: AdminCredential


def read_resources(name: str) -> list[Mesh | Peer]:
    """All resources of a file, `-` for standard input. Raises CommandError with all their problems."""
    return parse_resources(_read_text(name), name="standard input" if name == "-" else name)


def parse_resources(text: str, *, name: str) -> list[Mesh | Peer]:
    """All resources of a text with one or more YAML (or JSON) documents. Raises CommandError."""
    resources: list[Mesh | Peer] = []
    problems: list[str] = []
    documents = list(_unfold(_load(text, name)))
    for number, document in enumerate(documents, start=1):
        where = f"{name}, document {number}" if len(documents) > 1 else name
        try:
            resource = parse(document)
        except InvalidResource as error:
            problems += [f"{where}: {line}" for line in str(error).splitlines()]
            continue
        if isinstance(resource, Mesh | Peer):
            resources.append(resource)
        else:
            problems.append(
                f"{where}: a JoinToken is made with `scopectl token create`, which shows its secret"
            )
    if problems:
        raise CommandError("\n".join([*problems, "nothing was applied"]))
    if not resources:
        raise CommandError(f"{name} holds no resource")
    return resources


def read_admin(path: Path) -> Admin:
    """The registry's `admin.json`. Raises CommandError."""
    try:
        mode = path.stat().st_mode
        text = path.read_text()
    except FileNotFoundError:
        raise CommandError(
            f"{path} does not exist: run this on the registry's machine, or copy its admin.json here and "
            "name it with --admin-file or SCOPE_ADMIN_FILE"
        ) from None
    except PermissionError:
        raise CommandError(f"{path} may be read by its owner alone: run this as root (sudo)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        print(f"scopectl: others may read the secret in {path}: chmod 600 {path}", file=sys.stderr)
    return parse_admin(text, name=str(path))


def parse_admin(text: str, *, name: str) -> Admin:
    """Read the text of an `admin.json`: {url, pin, registryKey, token}. Raises CommandError."""
    damaged = f"{name} is damaged: copy it again from the registry's data directory"
    try:
        document = json.loads(text)
    except ValueError as error:
        raise CommandError(f"{damaged} ({error})") from None
    if not isinstance(document, Mapping):
        raise CommandError(damaged)
    url, pin, token = document.get("url"), document.get("pin"), document.get("token")
    if not isinstance(url, str) or not url.startswith(("https://", "http://")):
        raise CommandError(f"{damaged} (url is missing)")
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or not token:
        raise CommandError(f"{damaged} (token is missing)")
    return Admin(url, _pin(pin, damaged), AdminCredential(Secret(token.encode())))


def _pin(pin: object, damaged: str) -> bytes | None:
    if pin in (None, "", "-"):
        return None
    try:
        raw = read_base64url(pin) if isinstance(pin, str) else b""
    except ValueError as error:
        raise CommandError(f"{damaged} (pin: {error})") from None
    if len(raw) != PIN_BYTES:
        raise CommandError(f"{damaged} (pin is not {PIN_BYTES} bytes in base64url)")
    return raw


def _read_text(name: str) -> str:
    try:
        if name == "-":
            text = sys.stdin.read(MAX_FILE + 1)
        else:
            with Path(name).open() as file:
                text = file.read(MAX_FILE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{name} cannot be read: {error}") from None
    if len(text) > MAX_FILE:
        raise CommandError(f"{name} is larger than {MAX_FILE >> 20} MiB: apply it in parts")
    return text


def _unfold(documents: list[object]) -> Iterator[object]:
    """Single documents: lists, as `get -o json` prints them, are taken apart, empty ones left out."""
    for document in documents:
        if isinstance(document, Mapping) and str(document.get("kind")).endswith("List"):
            items = document.get("items")
            yield from items if isinstance(items, list) else [document]
        elif document is not None:
            yield document


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: times stay text, and a key that stands twice is an error, not a choice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the loader's own way of being configured
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:  # noqa: FBT001, FBT002 - its signature
        """A mapping without doubles."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f'the field "{key_node.value}" stands here twice', key_node.start_mark
                    )
                seen.add(key_node.value)
        return dict(super().construct_mapping(node, deep=deep))


def _load(text: str, name: str) -> list[object]:
    try:
        return list(yaml.load_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise CommandError(f"{name}{where}: {error.problem or error.context}; nothing was applied") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise CommandError(f"{name} is not YAML: {error}; nothing was applied") from None
