"""When the file from which a crashed WireGuard process comes back is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scope_agent.wireguard.device import DesiredDevice, DesiredPeer
from scope_agent.wireguard.shell import user_space
from scope_agent.wireguard.shell.user_space import KEEP_AT_ONCE, KEEP_SHARE, UserSpaceDevice, state_path

from scope.model import Endpoint, PublicKey, Secret

FIRST, SECOND = Endpoint.parse("192.0.2.1:1"), Endpoint.parse("192.0.2.2:2")
COST = 0.01


class _NoLinks:
    """Links of a machine on which the device is not there yet."""

    def find(self) -> None:
        return None

    def close(self) -> None:
        pass


class _Clock:
    """Each look takes COST seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += COST
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    found = _Clock()
    monkeypatch.setattr(user_space, "time", found)
    return found


def device_in(folder: Path) -> UserSpaceDevice:
    links: Any = _NoLinks()
    return UserSpaceDevice("scope0", links, folder)


def mesh_of(count: int, endpoint: Endpoint = FIRST) -> DesiredDevice:
    keys = [PublicKey(number.to_bytes(32, "big")) for number in range(1, count + 1)]
    return DesiredDevice(
        "scope0",
        Secret(bytes(32)),
        PublicKey(bytes(32)),
        7000,
        1420,
        peers={key: DesiredPeer(key, endpoint) for key in keys},
    )


def kept(folder: Path) -> str:
    text: str = json.loads(state_path(folder, "scope0").read_text())["uapi"]
    return text


def test_what_is_short_is_kept_at_every_change(tmp_path: Path, clock: _Clock) -> None:
    device = device_in(tmp_path)
    for endpoint in (FIRST, SECOND, FIRST):
        device.keep(mesh_of(KEEP_AT_ONCE, endpoint))
        assert kept(tmp_path).count(str(endpoint)) == KEEP_AT_ONCE


def test_what_is_long_is_kept_again_after_a_while(tmp_path: Path, clock: _Clock) -> None:
    device, count = device_in(tmp_path), KEEP_AT_ONCE + 1
    device.keep(mesh_of(count))
    device.keep(mesh_of(count, SECOND))
    assert str(SECOND) not in kept(tmp_path)
    clock.now += KEEP_SHARE * COST
    device.keep(mesh_of(count, SECOND))
    assert kept(tmp_path).count(str(SECOND)) == count


def test_an_agent_that_ends_keeps_what_waits(tmp_path: Path, clock: _Clock) -> None:
    device, count = device_in(tmp_path), KEEP_AT_ONCE + 1
    device.keep(mesh_of(count))
    device.keep(mesh_of(count, SECOND))
    device.close()
    assert kept(tmp_path).count(str(SECOND)) == count


def test_a_removed_peer_is_not_kept_for_an_instant(tmp_path: Path, clock: _Clock) -> None:
    device, desired = device_in(tmp_path), mesh_of(KEEP_AT_ONCE + 2)
    device.keep(desired)
    gone = next(iter(desired.peers))
    device.keep(replace(desired, peers={key: peer for key, peer in desired.peers.items() if key != gone}))
    assert gone.raw.hex() not in kept(tmp_path)


def test_what_says_the_same_is_not_written_again(tmp_path: Path, clock: _Clock) -> None:
    device, desired = device_in(tmp_path), mesh_of(2)
    device.keep(desired)
    before = state_path(tmp_path, "scope0").stat().st_ino
    peers = {key: replace(peer, settling=True) for key, peer in desired.peers.items()}
    device.keep(replace(desired, peers=peers))
    assert state_path(tmp_path, "scope0").stat().st_ino == before


def test_a_file_that_somebody_removed_is_written_again(tmp_path: Path, clock: _Clock) -> None:
    device, desired = device_in(tmp_path), mesh_of(KEEP_AT_ONCE + 1)
    device.keep(desired)
    state_path(tmp_path, "scope0").unlink()
    device.keep(desired)
    assert kept(tmp_path).count(str(FIRST)) == KEEP_AT_ONCE + 1
