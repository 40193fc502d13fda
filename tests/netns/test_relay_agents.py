"""A hub with its agent: two symmetric NATs are relayed in its kernel, counted, and no trace is left."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lab import Lab, Nat
from meshlab import PRIVATE, Member, Registry, mesh_document

from scope.ctl.local import ask
from tests.netns.device_fixture import wait_until

MESH = "relays"


def test_agents_relay_through_a_hubs_kernel_and_the_hub_leaves_nothing_behind() -> None:
    with Lab(private=PRIVATE) as lab:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, hubs={"names": [f"{MESH}.external.hub"]}))
        token = registry.token(MESH)
        hub = Member(lab.site("vienna", nat=Nat.NONE).machine("hub"), mesh=MESH, registry=registry)
        # A namespace begins with what its machine has, which forwards where containers run.
        hub.machine.run(["sysctl", "-q", "-w", "net.ipv4.ip_forward=0"])
        sites = [lab.site(name, nat=Nat.SYMMETRIC) for name in ("berlin", "lyon")]
        members = [
            Member(site.machine(name), mesh=MESH, registry=registry)
            for site, name in zip(sites, ("anna", "bert"), strict=True)
        ]
        for member in (hub, *members):
            member.join(token, wait=True)
        for member, other in zip(members, ("bert", "anna"), strict=True):
            wait_until(partial(is_relayed, member, f"{MESH}.external.{other}"), f"{other} is not relayed")
        names = [f"{MESH}.external.{member.name}" for member in members]
        wait_until(lambda: is_counted(hub, names), "nothing is counted")
        assert forwarding(hub) == "1"
        assert "scope_relay_scope0" in hub.machine.run(["nft", "list", "tables"]).stdout
        hub.leave()
        assert hub.machine.run(["nft", "list", "ruleset"]).stdout == ""
        assert forwarding(hub) == "0"
        for member in members:
            member.leave()


def is_relayed(member: Member, other: str) -> bool:
    status = member.status()
    return status is not None and other in status.peers and status.peers[other].path == "Relayed"


def is_counted(hub: Member, names: list[str]) -> bool:
    """Whether the hub shows both ways of the pair: probes at least."""
    socket = Path("/proc", str(hub.machine.holder_pid), "root/run/scope", f"{MESH}.sock")
    answer: Any = ask(socket, {"command": "status"}, timeout=30.0)
    relayed = answer["status"]["relayed"]
    assert relayed["error"] in ("", "not counted yet: ask again")
    pairs = [pair for pair in relayed["busiest"] if sorted(pair["peers"]) == names]
    return (
        relayed["pairs"] == len(pairs) == 1
        and pairs[0]["by"] == ["Kernel"]
        and not pairs[0]["capped"]
        and all(sent["packets"] > 0 and sent["bytes"] >= 60 * sent["packets"] for sent in pairs[0]["sent"])
    )


def forwarding(member: Member) -> str:
    return member.machine.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout.strip()
