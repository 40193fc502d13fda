"""One pair end to end: registry, two agents behind port-restricted NATs, a direct path, real pings.

The same test runs over a WireGuard process here and over kernel WireGuard in the virtual machine.
"""

from __future__ import annotations

import pytest
from lab import Host, Lab, Nat
from meshlab import PRIVATE, Member, Pinger, Registry, Watch, member, mesh_document, registry

from tests.netns.device_fixture import KIND, PATIENCE


def test_two_agents_behind_port_restricted_nats_reach_each_other_directly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The lab's own patience is for real machines; an emulated one reads each program over a slow file system.
    usual = Host.run.__kwdefaults__ or {}
    timeout = max(PATIENCE, usual["timeout"])
    monkeypatch.setattr(Host.run, "__kwdefaults__", {**usual, "timeout": timeout})
    for module, name in ((registry, "_START_S"), (member, "_JOIN_S"), (member, "_LEAVE_S")):
        monkeypatch.setattr(module, name, max(PATIENCE, getattr(module, name)))
    with Lab(private=PRIVATE) as lab, Pinger() as pinger:
        served = Registry(lab.server("registry"))
        served.apply(mesh_document("pair"))
        token = served.token("pair")
        members = [
            Member(lab.site(site, nat=Nat.PORT_RESTRICTED).machine(name), mesh="pair", registry=served)
            for site, name in (("berlin", "anna"), ("lyon", "bert"))
        ]
        for each in members:
            each.join(token, wait=True)
        watch = Watch(members, pinger)
        watch.until(watch.is_complete, within_s=2 * PATIENCE, missing=watch.describe_unfinished)
        for each in members:
            status = each.status()
            assert status is not None
            assert status.device == KIND.value
            (reach,) = status.peers.values()
            assert reach.endpoint is not None
        # The other ends with the lab: each start of Python takes an emulated machine long.
        members[0].leave()
        members[1].hang_up()
