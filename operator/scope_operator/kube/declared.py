"""The ScopeMesh that the installation declares, applied by whoever is elected.

A chart cannot hold a ScopeMesh beside the definition of its kind, so it hands the mesh in as a file. It is
applied server-side under a field manager of its own at every election: fields that the file names are as it
has them, those that it does not name belong to whoever set them, and what it named once and names no more
goes. Without the file the mesh stays as it is. One that is refused disturbs nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from scope import resources
from scope.model import ConfigError, Kind
from scope.registry.kube.client import APPLY, KubeClient
from scope.registry.kube.objects import object_path
from scope.registry.port import Refused
from scope.resources import InvalidResource
from scope_operator.kube.replica import persist

log = logging.getLogger(__name__)

MANAGER = "scope-chart"


def read_mesh(file: Path) -> Mapping[str, object]:
    """The JSON object `{"name", "spec"}` in `file`. Raises ConfigError where it is none."""
    try:
        document = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the mesh in {file}: {error}") from None
    if not isinstance(document, dict) or document.keys() != {"name", "spec"}:
        raise ConfigError(f"{file} must hold a JSON object with name and spec, and nothing else")
    return document


async def declare_mesh(client: KubeClient, mesh: Mapping[str, object]) -> None:
    """Apply it, however long the API server takes; one that is refused is told in the log."""
    document = {
        "apiVersion": resources.API_VERSION,
        "kind": str(Kind.MESH),
        "metadata": {"name": mesh["name"]},
        "spec": mesh["spec"],
    }
    name = str(mesh["name"])
    query = {"fieldManager": MANAGER, "force": "true", "fieldValidation": "Strict"}
    path = object_path(Kind.MESH, name, "")
    try:
        resources.parse(document)  # its sentences name the field
        await persist(lambda: client.ask("PATCH", path, query=query, body=document, content_type=APPLY))
    except (InvalidResource, Refused) as error:
        log.error("mesh.refused name=%s error=%s", name, error)  # noqa: TRY400 - it is a sentence
        return
    log.info("mesh.declared name=%s", name)
