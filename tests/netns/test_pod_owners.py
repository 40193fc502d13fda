"""A cluster's own network beside the mesh: its routes stay in force, and the bridge of Scope's own goes."""

from __future__ import annotations

import subprocess
from ipaddress import ip_network
from pathlib import Path

import pytest
from scope_agent.pods.cni import BRIDGE, PLUGINS
from scope_agent.pods.rules import PodNetwork
from scope_agent.pods.shell.cni import CniDirectories, keep_cni, remove_cni
from scope_agent.pods.shell.network import PodRoutes

from tests.netns.device_fixture import Namespace

OURS, THEIRS, FAR = "10.244.2.0/24", "10.244.3.0/24", "10.245.1.0/24"


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


def led() -> set[str]:
    """Prefixes that the Node leads into the mesh's device."""
    return {line.split()[0] for line in ip("-4 route show table 83 type unicast").splitlines()}


@pytest.mark.timeout(120)
def test_what_another_network_leads_to_is_not_led_into_the_mesh_for_as_long_as_it_does() -> None:
    machine = Namespace()
    try:
        with machine.entered():
            for device in ("scope0", "flannel.1"):
                ip(f"link add {device} type bridge")
                ip(f"link set {device} up")
            ip(f"-4 route add {THEIRS} dev flannel.1 proto boot")
            beside = frozenset({ip_network(OURS), ip_network(THEIRS)})
            reached = beside | {ip_network(FAR)}
            pods = PodRoutes("scope0")
            pods.apply(PodNetwork(frozenset({ip_network("10.244.1.0/24")}), reached, 1420, beside))
            assert led() == {OURS, FAR}
            assert f"leads to {THEIRS}, by flannel.1 (protocol boot)" in pods.check()
            ip(f"-4 route del {THEIRS} dev flannel.1")
            assert "another network" not in pods.check()
            assert led() == {OURS, THEIRS, FAR}
            ip(f"-4 route add {FAR} dev flannel.1 proto boot")  # of another cluster: ours before theirs
            ip(f"-4 route add {OURS} dev flannel.1 proto 77")
            assert f"leads to {OURS}, by flannel.1 (protocol 77)" in pods.check()
            assert led() == {THEIRS, FAR}
            pods.remove()
            assert f"{OURS} dev flannel.1" in ip("-4 route")
            assert "83" not in ip("-4 rule")
    finally:
        machine.close()


def test_the_bridge_of_pods_goes_with_its_configuration_unless_a_pod_is_on_it(tmp_path: Path) -> None:
    where = CniDirectories(tmp_path / "net.d", tmp_path / "bin")
    for directory, names in ((where.configurations, ()), (where.plugins, PLUGINS)):
        directory.mkdir()
        for name in names:
            (directory / name).touch()
    machine = Namespace()
    try:
        with machine.entered():
            ip(f"link add {BRIDGE} type bridge")
            ip("link add pod type veth peer name inside")
            ip(f"link set pod master {BRIDGE}")
            assert keep_cni(where, [ip_network(OURS)]) == ""
            assert remove_cni(where) == []
            assert BRIDGE in ip("-o link")
            ip("link delete pod")
            assert keep_cni(where, [ip_network(OURS)]) == ""
            assert remove_cni(where) == []
            assert BRIDGE not in ip("-o link")
    finally:
        machine.close()
