"""Keys on a device that something else manages: they build on its key, and the way back leads to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scope_agent.psk.core import PskOutput, SayPart
from scope_agent.psk.exchange import manager_keys
from scope_agent.wireguard.device import NO_PSK

from scope.model import PskFailure, Secret
from tests.unit.psk_duo import Duo, Side

MANAGER = Secret(bytes([9] * 32))


def _agreed(seed: int = 1, manager: Secret = MANAGER) -> Duo:
    duo = Duo(seed, manager=manager)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    return duo


def _is_back(duo: Duo) -> bool:
    sides = (duo.d, duo.e)
    return all(side.device_psk == duo.manager and side.view.epoch == 0 for side in sides) and not any(
        side.disk.current or side.disk.active for side in sides
    )


def _leaving(duo: Duo, which: str) -> tuple[Side, Side]:
    return (duo.d, duo.e) if which == "D" else (duo.e, duo.d)


def test_the_first_key_builds_on_that_of_the_manager() -> None:
    """The same seed with another key of the manager leads to another key, all else being equal."""
    duo, other = _agreed(1), _agreed(1, NO_PSK)
    assert duo.d.disk.manager == duo.e.disk.manager == MANAGER
    assert duo.device_psks() != other.device_psks() and duo.deaths == other.deaths == []


def test_two_sides_with_different_keys_of_the_manager_agree_on_one_that_builds_on_none() -> None:
    duo = Duo(2, manager=MANAGER)
    duo.e.psk = Secret(bytes([8] * 32))
    duo.start()
    duo.until(duo.is_agreed, within=300.0)


@pytest.mark.parametrize("which", ["D", "E"])
@pytest.mark.parametrize("manager", [MANAGER, NO_PSK], ids=["a key", "no key"])
def test_leaving_brings_both_sides_back_without_a_session_lost(which: str, manager: Secret) -> None:
    duo = _agreed(3, manager)
    leaving, other = _leaving(duo, which)
    leaving.leave()
    duo.until(lambda: _is_back(duo), within=400.0)
    duo.run(600.0)
    assert _is_back(duo) and duo.deaths == []
    assert "leaves" in other.view.failure or other.view.failure == ""


@pytest.mark.parametrize("which", ["D", "E"])
def test_leaving_amid_a_rotation_waits_for_its_end(which: str) -> None:
    duo = _agreed(4)
    duo.d.rotate()
    duo.until(lambda: duo.d.disk.active and duo.e.disk.active, within=200.0)
    _leaving(duo, which)[0].leave()
    duo.until(lambda: _is_back(duo), within=600.0)
    assert duo.deaths == []


@pytest.mark.parametrize("which", ["D", "E"])
def test_leaving_survives_a_crash_of_the_other_side_at_every_step(which: str) -> None:
    for step in range(0, 24, 2):
        duo = _agreed(40 + step)
        leaving, other = _leaving(duo, which)
        other.crash_after = step
        leaving.leave()
        duo.until(lambda duo=duo: _is_back(duo), within=3000.0)  # type: ignore[misc]


@pytest.mark.parametrize("which", ["D", "E"])
@pytest.mark.parametrize(
    ("age", "within"), [(2.0, 10.0), (90.0, 10.0), (101.0, 35.0), (150.0, 20.0), (None, 25.0)]
)
def test_leaving_waits_for_no_rekey_of_an_idle_pair(which: str, age: float | None, within: float) -> None:
    duo = _agreed(12)
    duo.keepalive = (False, False)
    duo.session = None if age is None else duo.now - age
    for side in duo.sides:
        side.look()
    _leaving(duo, which)[0].leave()
    duo.until(lambda: _is_back(duo), within=within)
    if age is not None:
        assert duo.deaths == []
        duo.e.nudges = duo.d.nudges = 0
        duo.run(600.0)
        assert _is_back(duo) and duo.e.nudges == duo.d.nudges == 0


@pytest.mark.parametrize("which", ["D", "E"])
@pytest.mark.parametrize("seconds", [0.0, 180.0], ids=["one word", "all words for three minutes"])
def test_leaving_loses_no_session_where_words_are_lost(which: str, seconds: float) -> None:
    for number in range(14):
        duo = _Deaf(13, number, seconds)
        duo.start()
        duo.until(duo.is_agreed, within=200.0)
        duo.count = 0
        _leaving(duo, which)[0].leave()
        duo.until(lambda duo=duo: _is_back(duo), within=900.0)  # type: ignore[misc]
        duo.run(200.0)
        assert duo.deaths == [], number


class _Deaf(Duo):
    """Of what is said from `count` 0 on the part of this number is lost, and all for so many seconds."""

    def __init__(self, seed: int, number: int, seconds: float) -> None:
        super().__init__(seed, manager=MANAGER)
        self.number, self.seconds = number, seconds
        self.count: int | None = None

    def spoils(self, side: Side, output: PskOutput) -> bool:
        if self.count is None or not isinstance(output, SayPart):
            return False
        self.count += 1
        if self.count - 1 != self.number:
            return False
        if self.seconds:
            self.mute = set(self.sides)
            self.at(self.now + self.seconds, self.mute.clear)
        return True


@pytest.mark.parametrize("is_used", [True, False], ids=["used", "idle"])
def test_a_side_that_left_and_ended_before_its_last_word_arrived_is_followed_by_a_handshake(
    is_used: bool,
) -> None:
    duo = _agreed(14)
    duo.keepalive = (is_used, is_used)
    duo.e.leave()
    duo.until(lambda: duo.d.view.laid > 0, within=20.0)
    duo.mute = {duo.e}
    duo.until(lambda: duo.e.disk.current is None, within=20.0)
    duo.e.crash()
    duo.until(lambda: _is_back(duo), within=400.0)
    assert not is_used or duo.deaths == []


@pytest.mark.parametrize("which", ["D", "E"])
def test_who_leaves_and_dies_at_any_step_may_leave_again(which: str) -> None:
    for step in range(0, 24, 2):
        duo = _agreed(80 + step)
        leaving, other = _leaving(duo, which)
        leaving.crash_after = step
        leaving.leave()
        duo.run(300.0)
        leaving.crash_after = None
        leaving.leave()
        duo.until(lambda duo=duo: _is_back(duo), within=3000.0)  # type: ignore[misc]
        assert duo.deaths == [], (step, other.view)


def test_a_way_back_that_was_given_up_is_begun_again_when_the_other_side_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    duo = _agreed(15)
    assert duo.d.room is not None
    duo.d.room.forget_device()
    with monkeypatch.context() as unreadable:
        unreadable.setattr(duo.d, "look", lambda: None)
        duo.e.leave()
        duo.until(lambda: duo.d.view.failed is PskFailure.NO_SESSION, within=600.0)
    duo.d.look()
    duo.until(lambda: _is_back(duo), within=60.0)


def test_a_side_that_reverted_unheard_gets_the_managers_key_into_its_device_all_the_same() -> None:
    duo = _agreed(16)
    duo.e.leave()
    duo.until(lambda: duo.e.view.laid > 0, within=20.0)
    duo.mute = {duo.d}  # it hears that E's device has the key, and cannot say that its own has it
    duo.until(lambda: duo.d.view.laid > 0, within=5.0)
    duo.is_cut = True
    duo.until(lambda: not duo.e.disk.active and duo.e.psk != MANAGER, within=200.0)
    assert duo.d.disk.active and duo.d.psk == MANAGER
    duo.is_cut, duo.mute = False, set()
    duo.until(lambda: _is_back(duo), within=60.0)
    duo.run(300.0)
    assert _is_back(duo)


def test_leaving_gets_through_a_network_that_loses_and_doubles() -> None:
    duo = _agreed(5)
    duo.loss, duo.duplication = 0.3, 0.3
    duo.d.leave()
    duo.until(lambda: _is_back(duo), within=3000.0)


@pytest.mark.parametrize("which", ["D", "E", "both"])
def test_a_reboot_that_brings_the_managers_key_back_is_repaired_without_the_tunnel(which: str) -> None:
    duo = _agreed(6)
    rebooted = [duo.d, duo.e] if which == "both" else [_leaving(duo, which)[0]]
    for side in rebooted:
        side.reboot()
    duo.run(5.0)
    for side in rebooted:
        side.start()
    duo.until(lambda: duo.session is not None, within=60.0)
    duo.until(duo.is_agreed, within=300.0)
    assert not duo.d.view.conflict and not duo.e.view.conflict


@pytest.mark.parametrize("which", ["D", "E"])
def test_a_reload_amid_a_rotation_is_put_back_and_the_rotation_goes_on(which: str) -> None:
    duo = _agreed(7)
    duo.d.rotate()
    duo.until(lambda: duo.d.disk.active and duo.e.disk.active, within=200.0)
    _leaving(duo, which)[0].psk = MANAGER
    duo.until(lambda: duo.is_agreed(2), within=900.0)
    assert duo.deaths == []


@pytest.mark.parametrize("which", ["D", "E"])
def test_a_manager_that_insists_gets_its_key_on_both_sides(which: str) -> None:
    duo = _agreed(8)
    insists, _ = _leaving(duo, which)
    for _ in range(3):
        insists.psk = MANAGER
        duo.run(20.0)
        assert duo.is_agreed()
    insists.psk = MANAGER
    duo.until(lambda: _is_back(duo) and duo.session is not None, within=600.0)
    assert insists.view.conflict
    duo.until(duo.is_agreed, within=2 * 3600.0)


def test_a_device_that_was_away_comes_back_without_a_conflict() -> None:
    duo = _agreed(9)
    for _ in range(5):
        assert duo.d.room is not None
        duo.d.room.forget_device()
        duo.d.psk = MANAGER
        duo.run(30.0)
    assert duo.is_agreed() and not duo.d.view.conflict


def test_a_side_alone_gets_the_managers_key_at_once() -> None:
    duo = _agreed(10)
    duo.is_cut = True
    duo.run(2.0)
    assert duo.d.room is not None
    duo.d.leave()
    duo.d.room.abandon(duo.e.key, duo.now)
    duo.d.perform()
    duo.until(lambda: duo.d.device_psk == MANAGER and duo.d.disk.current is None, within=30.0)
    assert duo.d.room.keyed == []


def test_words_about_the_way_back_need_the_key_in_use() -> None:
    duo = _agreed(11)
    current = duo.d.disk.current
    assert current is not None
    back, without = manager_keys(MANAGER, current), manager_keys(MANAGER, None)
    other = manager_keys(MANAGER, replace(current, chain=Secret(bytes([1] * 32))))
    assert back.psk == without.psk == MANAGER
    assert len({back.id, without.id, other.id}) == len({back.confirm_d, back.confirm_e, other.confirm_d}) == 3
