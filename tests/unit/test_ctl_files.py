"""What scopectl reads: manifests with every problem at once, and the registry's admin.json."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from scope.credentials import base64url
from scope.ctl.errors import CommandError
from scope.ctl.files import parse_admin, parse_resources, read_admin, read_resources
from scope.model import Mesh, Peer

MESH = """
apiVersion: scope.ltgc.cc/v1alpha1
kind: ScopeMesh
metadata:
  name: home
spec:
  addressing:
    ipv6: fd5c:be1:7a30::/64
"""
PEER = """
apiVersion: scope.ltgc.cc/v1alpha1
kind: ScopePeer
metadata: {name: home.nas, creationTimestamp: 2026-01-31T12:00:00Z}
spec: {mesh: home, routes: [10.1.0.0/16], endpoints: ["192.0.2.1:51820"]}
"""


def test_several_documents_are_read_in_order() -> None:
    mesh, peer = parse_resources(f"---{MESH}---{PEER}---\n", name="m.yaml")
    assert isinstance(mesh, Mesh)
    assert isinstance(peer, Peer)
    assert (mesh.meta.name, peer.meta.name, peer.meta.created) == ("home", "home.nas", 1769860800.0)


def test_a_list_as_get_prints_it_is_read() -> None:
    text = json.dumps({"kind": "List", "items": [json.loads(json.dumps(_document("a"))), _document("b")]})
    assert [resource.meta.name for resource in parse_resources(text, name="m.json")] == ["a", "b"]


def _document(name: str) -> dict[str, object]:
    spec = {"addressing": {"ipv4": "10.0.0.0/16"}}
    return {
        "apiVersion": "scope.ltgc.cc/v1alpha1",
        "kind": "ScopeMesh",
        "metadata": {"name": name},
        "spec": spec,
    }


def test_the_problems_of_all_documents_are_told_with_their_places() -> None:
    with pytest.raises(CommandError) as caught:
        parse_resources(
            f"{MESH.replace('ipv6:', 'ipv66:')}---{PEER.replace('mesh: home', 'mesh: Home')}", name="m.yaml"
        )
    assert str(caught.value).splitlines() == [
        "m.yaml, document 1: spec.addressing: no prefix; allowed: ipv4, ipv6 or both; "
        'for example ipv6: "fd5c:0be1:7a30::/64"',
        'm.yaml, document 1: spec.addressing.ipv66: unknown field; allowed: ipv4, ipv6; did you mean "ipv6"?',
        'm.yaml, document 2: spec.mesh: "Home" is not allowed; '
        'allowed: a DNS label: a-z, 0-9 and -, at most 63; did you mean "home"?',
        "nothing was applied",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1", "m.yaml, line 1"),
        (
            MESH + "  prefer: IPv4\n  prefer: IPv6\n",
            'line 10, column 3: the field "prefer" stands here twice',
        ),
        ("", "m.yaml holds no resource"),
        ("kind: JoinToken", "m.yaml: apiVersion: missing"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("- 1", "document: a list is not allowed"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused_with_the_place(text: str, says: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_resources(text, name="m.yaml")
    assert says in str(caught.value)


def test_a_missing_file_and_standard_input_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot be read"):
        read_resources(str(tmp_path / "none.yaml"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("kind: Pod"))
    with pytest.raises(CommandError, match='standard input: kind: "Pod" is not allowed'):
        read_resources("-")


ADMIN = {"url": "https://192.0.2.1:7443", "pin": base64url(b"p" * 32), "registryKey": "k", "token": "secret"}


def test_admin_json_tells_where_the_registry_is_and_hides_its_secret() -> None:
    admin = parse_admin(json.dumps(ADMIN), name="admin.json")
    assert (admin.url, admin.pin, admin.credential.token.raw) == (
        "https://192.0.2.1:7443",
        b"p" * 32,
        b"secret",
    )
    assert "secret" not in repr(admin)
    assert parse_admin(json.dumps(ADMIN | {"pin": "-"}), name="admin.json").pin is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"url": "ftp://a"}, "url"),
        ({"token": ""}, "token"),
        ({"token": "a\nb"}, "token"),
        ({"pin": "AA"}, "pin"),
    ],
)
def test_a_damaged_admin_json_is_refused_without_its_secret(change: dict[str, object], says: str) -> None:
    with pytest.raises(CommandError, match=rf"admin\.json is damaged.*\({says}") as caught:
        parse_admin(json.dumps(ADMIN | change), name="admin.json")
    assert "secret" not in str(caught.value)


def test_a_missing_admin_json_says_where_it_is_to_be_found(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="run this on the registry's machine, or copy"):
        read_admin(tmp_path / "admin.json")


def test_an_admin_json_that_others_may_read_is_complained_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "admin.json"
    path.write_text(json.dumps(ADMIN))
    path.chmod(0o644)
    read_admin(path)
    assert f"chmod 600 {path}" in capsys.readouterr().err
    path.chmod(0o600)
    read_admin(path)
    assert capsys.readouterr().err == ""
