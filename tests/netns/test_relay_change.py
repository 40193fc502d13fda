"""A pair that a hub's kernel relays goes from the relay to the direct path and back under full streams.

Devices, rules of the hub, knocks and holds are those that agents work with; how two agents agree on when to
change is left out, so that the same test runs over kernel WireGuard in the virtual machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from bench.packets import Stream
from scope_agent.relay.shell import rules
from scope_agent.wireguard.device import HoldEndpoint, SetEndpoint
from scope_agent.wireguard.shell import EndpointHolds, SendResult, nft
from scope_agent.wireguard.shell.probe_socket import RawProbeSocket

from scope.model import DeviceKind, Endpoint, RelayLimits
from scope.relay import Grant, Grants, Side, knock
from tests.netns.change_fixture import assert_few_changes, traced, wait_until_steady
from tests.netns.device_fixture import (
    KIND,
    PATIENCE,
    Keys,
    Machine,
    Namespace,
    desired_device,
    echo,
    lost_while,
    machine,
    make_keys,
    peer_at,
    wait_until,
)

# Packets a second, each way. An emulated machine that shares its processors is not to be always behind with
# them: then they fill WireGuard's queues.
RATE = 1000.0 if KIND is DeviceKind.USER_SPACE else 250.0
PORT = 47001
STEADY = RATE  # so many packets each end sends over a path before and after a change
SETTINGS = 5  # so often an agent sets an endpoint that a pair has just agreed on
HOLD_S = PATIENCE / 20
HUB_PORTS = (26003, 26200)
TOKENS = (b"tokenofA", b"tokenofB")


@dataclass(frozen=True, slots=True)
class End:
    """One of the two: its device, and where it sends to for the other."""

    namespace: str  # as a path
    inside: Namespace
    machine: Machine
    other: Keys
    address: str  # in the mesh
    direct: Endpoint
    relay: Endpoint
    token: bytes

    def knock(self) -> None:
        with self.inside.entered(), contextlib.closing(RawProbeSocket(PORT)) as probes:
            assert probes.send(self.relay, knock(self.token)) is SendResult.SENT

    def change(self, *, to: Endpoint, was: Endpoint, is_set: threading.Event) -> None:
        """What an agent does when the pair agrees on another path; `is_set` tells when the other may."""

        async def act() -> None:
            with contextlib.closing(EndpointHolds()) as holds:
                hold = HoldEndpoint(self.other.public, to, frozenset({was}), HOLD_S)
                await holds.set(hold, port=PORT)
                for _ in range(SETTINGS):
                    await self.machine.device.apply(SetEndpoint(self.other.public, to))
                    is_set.set()
                    await asyncio.sleep(HOLD_S / SETTINGS)

        with self.inside.entered():
            asyncio.run(act())


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[End, End]]:
    """Two machines beside a hub that routes between them, with a session over its relay."""
    monkeypatch.setattr(nft, "PATIENCE_S", PATIENCE)  # a hub's table takes an emulated processor a while
    here, hub, there = Namespace(), Namespace(), Namespace()
    keys = make_keys(1), make_keys(2)
    outside = ("192.0.2.1", "198.51.100.1"), ("192.0.2.254", "198.51.100.254")
    with hub.entered():
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    for number, namespace in enumerate((here, there)):
        own, gateway = outside[0][number], outside[1][number]
        hub.ip(
            "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", namespace.path()
        )
        hub.ip("address", "add", f"{gateway}/24", "dev", f"to{number}")
        hub.ip("link", "set", f"to{number}", "up")
        namespace.ip("address", "add", f"{own}/24", "dev", "eth0")
        namespace.ip("link", "set", "eth0", "up")
        namespace.ip("route", "add", "default", "via", gateway)
    sides = [
        Side(2 + number, each.public, token, port)
        for number, (each, token, port) in enumerate(zip(keys, TOKENS, HUB_PORTS, strict=True))
    ]
    grants = Grants(26000, 26255, RelayLimits(), (Grant((sides[0], sides[1]), time.time() + 86400.0),))
    with (
        machine(here, tmp_path / "a") as a,
        machine(there, tmp_path / "b") as b,
        hub.entered(),
    ):
        relay = rules.KernelRelay("scope-t", seed=7)
        relay.apply(grants, time.time())
        found = []
        for number, (inside, each) in enumerate(((here, a), (there, b))):
            other = keys[1 - number]
            found.append(
                End(
                    inside.path(),
                    inside,
                    each,
                    other,
                    f"10.9.0.{number + 1}",
                    Endpoint.parse(f"{outside[0][1 - number]}:{PORT}"),
                    Endpoint.parse(f"{outside[1][number]}:{HUB_PORTS[number]}"),
                    TOKENS[number],
                )
            )
        for end, own_keys in zip(found, keys, strict=True):
            peer = peer_at(end.other, str(end.relay), "10.9.0.0/16")
            end.machine.agree(
                desired_device(
                    end.machine.device.name, own_keys, peer, port=PORT, addresses=(f"{end.address}/16",)
                )
            )
        for end in found:
            end.knock()
        with echo(there, ip_address(found[1].address), 9):
            wait_until(lambda: lost(here, found[1].address) == 0, "no session over the relay")
        yield found[0], found[1]
    for namespace in (here, hub, there):
        namespace.close()


def lost(inside: Namespace, address: str) -> int:
    return lost_while(inside, ip_address(address), 9, lambda _: None, steps=1)


def change(ends: tuple[End, End], *, to_direct: bool) -> None:
    """Both ends, one after the other."""
    threads = []
    for end in ends:
        to, was = (end.direct, end.relay) if to_direct else (end.relay, end.direct)
        is_set = threading.Event()
        threads.append(threading.Thread(target=end.change, kwargs={"to": to, "was": was, "is_set": is_set}))
        threads[-1].start()
        assert is_set.wait(PATIENCE)
    for thread in threads:
        thread.join()


def test_from_the_relay_to_the_direct_path_and_back_loses_nothing(ends: tuple[End, End]) -> None:
    first, second = ends
    with traced(first) as one, traced(second) as two:
        stream = Stream(first, second, (first.address, second.address), rate=RATE)
        ways = {end.relay.address for end in ends}, {end.direct.address for end in ends}
        wait_until_steady(one, two, on=lambda way: way in ways[0], packets=STEADY)
        change(ends, to_direct=True)
        wait_until_steady(one, two, on=lambda way: way in ways[1], packets=STEADY)
        change(ends, to_direct=False)
        wait_until_steady(one, two, on=lambda way: way in ways[0], packets=STEADY)
        sent, missing = stream.finish()
    assert missing == 0, f"of {sent}"
    assert_few_changes(one, two, paths=2)
