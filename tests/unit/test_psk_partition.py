"""A thousand rotations under partition: what is said is lost, or all is, at any moment and for any time.

A life is one pair with ten rotations; each of them is asked for by either side, and then disturbed. Where
only what the agents say is lost, no session may die, whatever becomes of the rotation: both have the new key
in time, or both the old one. From the first proved key on no device
holds anything but a key of the pair.
"""

from __future__ import annotations

import functools

import pytest

from scope.model import Secret
from tests.unit.psk_duo import Duo

ROTATIONS = 10  # of each of a hundred lives


class _Watched(Duo):
    """Notes every second which keys the devices hold."""

    known: frozenset[Secret] = frozenset()
    strangers = 0

    def tick_device(self) -> None:
        super().tick_device()
        slots = (keys for side in self.sides for keys in (side.disk.current, side.disk.next))
        self.known |= {keys.psk for keys in slots if keys is not None}
        if any(side.view.epoch for side in self.sides):
            self.strangers += sum(side.device_psk not in self.known for side in self.sides)


def _disturb(duo: Duo) -> bool:
    """Begin something that ends by itself; whether it may cost a session."""
    random = duo.random
    lasts = random.choice((0.5, 5.0, 20.0, 70.0, 160.0, 400.0))
    match random.randrange(6):
        case 0:
            duo.is_cut = True
            duo.at(duo.now + lasts, lambda: setattr(duo, "is_cut", False))
            return True
        case 1:
            side = random.choice(duo.sides)  # the other way still works
            duo.mute = {side}
        case 2 | 3:
            duo.mute = set(duo.sides)
        case 4:
            side = random.choice(duo.sides)
            side.crash()
            duo.at(duo.now + lasts, side.start_again)
            return False
        case _:
            side = random.choice(duo.sides)
            side.disk_fails = True
            duo.at(duo.now + lasts, functools.partial(setattr, side, "disk_fails", False))
            return False
    duo.at(duo.now + lasts, functools.partial(setattr, duo, "mute", set()))
    return False


@pytest.mark.parametrize("seed", range(100))
def test_ten_rotations_under_partition_agree_and_only_a_cut_wire_costs_a_session(
    seed: int,
) -> None:
    duo = _Watched(seed)
    duo.start()
    duo.until(duo.is_agreed, within=300.0)
    for _ in range(ROTATIONS):
        before = duo.d.view.epoch
        deaths = len(duo.deaths)
        asking = duo.random.choice(duo.sides)
        asking.rotate()
        duo.run(duo.random.choice((0.0, 0.05, 0.1, 0.2, 1.0, 30.0, 100.0)))
        may_cost = _disturb(duo)
        duo.until(functools.partial(_is_over, duo, before), within=2500.0)
        assert may_cost or len(duo.deaths) == deaths, duo.describe()
        assert duo.strangers == 0
        if duo.d.view.epoch == before:
            duo.d.rotate()
            duo.until(functools.partial(duo.is_agreed, before + 1), within=900.0)


def _is_over(duo: Duo, epoch: int) -> bool:
    """Whether what disturbed is over, no key waits for its proof, and both have one of `epoch` or later."""
    if duo.is_cut or duo.mute or duo.session is None or not duo.is_agreed(epoch):
        return False
    return all(side.room is not None and not side.disk_fails and not side.view.laid for side in duo.sides)
