"""The mesh that an installation declares: read from a file, applied, and refused without harm."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from scope_operator.kube import replica
from scope_operator.kube.declared import declare_mesh, read_mesh

from scope.model import ConfigError
from scope.registry.port import Refused, Unavailable

MESH: dict[str, object] = {"name": "home", "spec": {"addressing": {"ipv4": "100.64.0.0/16"}}}


class ApiServerStub:
    """Takes what is applied, after having raised each of `errors`."""

    def __init__(self, *errors: Exception) -> None:
        self.applied: list[Any] = []
        self._errors = list(errors)

    async def ask(self, method: str, path: str, *, query: Any, body: Any, content_type: str) -> None:
        assert (method, path) == ("PATCH", "/apis/scope.ltgc.cc/v1alpha1/scopemeshes/home")
        assert content_type == "application/apply-patch+yaml"
        assert query == {"fieldManager": "scope-chart", "force": "true", "fieldValidation": "Strict"}
        if self._errors:
            raise self._errors.pop(0)
        self.applied.append(body)


def declared(client: ApiServerStub, mesh: dict[str, object]) -> list[Any]:
    kube: Any = client
    asyncio.run(declare_mesh(kube, mesh))
    return client.applied


def test_a_mesh_is_applied_once_the_api_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "backoff", lambda failures, *, uniform: 0.0)
    (body,) = declared(ApiServerStub(Unavailable("away"), Unavailable("away")), MESH)
    assert (body["kind"], body["metadata"], body["spec"]) == ("ScopeMesh", {"name": "home"}, MESH["spec"])


@pytest.mark.parametrize(
    ("client", "mesh", "reason"),
    [
        (ApiServerStub(Refused("overlaps another")), MESH, "overlaps another"),
        (ApiServerStub(), {"name": "home", "spec": {"adressing": {}}}, "adressing"),
    ],
)
def test_a_mesh_that_is_refused_is_told_and_nothing_else_happens(
    client: ApiServerStub, mesh: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        assert declared(client, mesh) == []
    assert "mesh.refused name=home" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("text", [None, "{", "[]", '{"name": "home"}', json.dumps({**MESH, "more": 1})])
def test_a_file_that_holds_no_mesh_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "mesh.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        read_mesh(file)


def test_a_file_with_a_mesh_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mesh.json"
    file.write_text(json.dumps(MESH))
    assert read_mesh(file) == MESH
