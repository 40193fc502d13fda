"""One pair end to end: registry, two agents behind port-restricted NATs, a direct path, real pings.

The same test runs over a WireGuard process here and over kernel WireGuard in the virtual machine.
"""

from __future__ import annotations

import meshlab.member
import meshlab.registry
import pytest
from lab import Host, Lab, Nat
from meshlab import PRIVATE, Member, Pinger, Registry, Watch, mesh_document

from tests.netns.device_fixture import KIND, PATIENCE


def test_two_agents_behind_port_restricted_nats_reach_each_other_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The lab's own patience is for real machines; an emulated one reads each program over a slow file system.
    monkeypatch.setattr(Host.run, "__kwdefaults__", {**(Host.run.__kwdefaults__ or {}), "timeout": PATIENCE})
    monkeypatch.setattr(meshlab.registry, "_START_S", PATIENCE)
    monkeypatch.setattr(meshlab.member, "_JOIN_S", PATIENCE)
    monkeypatch.setattr(meshlab.member, "_LEAVE_S", PATIENCE)
    with Lab(private=PRIVATE) as lab, Pinger() as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document("pair"))
        token = registry.token("pair")
        members = [
            Member(lab.site(site, nat=Nat.PORT_RESTRICTED).machine(name), mesh="pair", registry=registry)
            for site, name in (("berlin", "anna"), ("lyon", "bert"))
        ]
        for member in members:
            member.join(token, wait=True)
        watch = Watch(members, pinger)
        watch.until(watch.is_complete, within_s=2 * PATIENCE, missing=watch.describe_unfinished)
        for member in members:
            status = member.status()
            assert status is not None
            assert status.device == KIND.value
            (reach,) = status.peers.values()
            assert reach.endpoint is not None
        for member in members:
            member.leave()
