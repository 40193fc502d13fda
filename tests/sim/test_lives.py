"""A thousand meshes, each drawn from its number: join, leave, roam, partition, reboot, crash, and then calm.

A life that does not converge prints its number; `python -m tests.sim --seed NUMBER --verbose` replays it.
"""

from __future__ import annotations

import pytest

from tests.sim.scenario import live

LIVES = 1000
CHUNK = 50


@pytest.mark.parametrize("first", range(0, LIVES, CHUNK))
@pytest.mark.timeout(300)
def test_fifty_lives_end_converged(first: int) -> None:
    for seed in range(first, first + CHUNK):
        live(seed)


def test_a_life_is_decided_by_its_number_alone() -> None:
    assert live(7) == live(7)
