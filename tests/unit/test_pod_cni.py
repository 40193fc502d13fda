"""The CNI configuration of a Node that has no other, and what is left alone for it."""

from __future__ import annotations

import json
from ipaddress import ip_network
from pathlib import Path

import pytest
from scope_agent.pods.cni import FILE, PLUGINS, FoundCni, configuration, plan_cni
from scope_agent.pods.shell.cni import CniDirectories, keep_cni, remove_cni

from scope.resources import as_reason

PODS = (ip_network("10.244.1.0/24"), ip_network("fd00:10:1::/64"))
NOTHING = FoundCni(None, (), ())


@pytest.fixture
def where(tmp_path: Path) -> CniDirectories:
    """A Node with plugins and without a CNI."""
    found = CniDirectories(tmp_path / "net.d", tmp_path / "bin")
    for directory in (found.configurations, found.plugins):
        directory.mkdir()
    for name in PLUGINS:
        (found.plugins / name).touch()
    return found


def test_a_node_without_a_cni_gets_a_bridge_with_addresses_of_each_of_its_prefixes() -> None:
    plan = plan_cni(PODS, NOTHING)
    assert plan.trouble == ""
    bridge, portmap = json.loads(plan.write or "")["plugins"]
    assert bridge["ipam"]["ranges"] == [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:10:1::/64"}]]
    assert {bridge["type"], bridge["ipam"]["type"], portmap["type"]} == set(PLUGINS)


@pytest.mark.parametrize(
    ("pods", "found", "said"),
    [
        (PODS, FoundCni(None, ("10-calico.conflist", "99-loopback.conf"), ()), "10-calico.conflist is there"),
        (PODS, FoundCni(configuration(PODS), ("05-cilium.conflist",), ()), "05-cilium.conflist is there"),
        (PODS, FoundCni('{"name": "mine", "plugins": []}', (), ()), f"{FILE} is not Scope's"),
        (PODS, FoundCni("not even JSON", (), ()), f"{FILE} is not Scope's"),
        ((), NOTHING, "--allocate-node-cidrs"),
        (PODS, FoundCni(None, (), ("bridge", "portmap")), "bridge, portmap"),
    ],
)
def test_nothing_is_written_where_it_is_not_ours_to_write_or_would_not_work(
    pods: tuple[object, ...], found: FoundCni, said: str
) -> None:
    plan = plan_cni(pods, found)  # type: ignore[arg-type]
    assert plan.write is None
    assert said in plan.trouble
    assert as_reason(plan.trouble) == plan.trouble  # fits a status


def test_a_file_of_ours_is_written_again_only_when_it_would_differ(where: CniDirectories) -> None:
    assert keep_cni(where, PODS) == ""
    file = where.configurations / FILE
    written = file.stat().st_mtime_ns, file.read_text()
    assert keep_cni(where, PODS) == ""
    assert (file.stat().st_mtime_ns, file.read_text()) == written
    assert keep_cni(where, PODS[:1]) == ""
    assert file.read_text() == configuration(PODS[:1])


def test_a_foreign_file_stays_as_it_is_and_so_does_ours_beside_it(where: CniDirectories) -> None:
    foreign = where.configurations / "10-flannel.conflist"
    foreign.write_text("{}")
    assert "10-flannel.conflist" in keep_cni(where, PODS)
    assert [path.name for path in where.configurations.iterdir()] == [foreign.name]
    assert remove_cni(where) == []
    assert foreign.read_text() == "{}"


def test_what_was_written_is_taken_away_and_a_file_of_its_name_that_is_not_ours_is_not(
    where: CniDirectories,
) -> None:
    assert keep_cni(where, PODS) == ""
    assert remove_cni(where) == []
    assert list(where.configurations.iterdir()) == []
    (where.configurations / FILE).write_text("mine")
    assert remove_cni(where) == []
    assert (where.configurations / FILE).read_text() == "mine"


def test_a_directory_that_is_not_there_is_told(where: CniDirectories, tmp_path: Path) -> None:
    gone = CniDirectories(tmp_path / "nowhere", where.plugins)
    assert "No such file or directory" in keep_cni(gone, PODS)
    assert remove_cni(gone) == []
