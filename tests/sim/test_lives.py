"""A thousand meshes, each drawn from its number: join, leave, roam, partition, reboot, crash, and then calm.

Fifty more are of meshes that are trees, and twenty of meshes whose hubs come and go. A life that does not
converge prints its number; `python -m tests.sim --seed NUMBER --verbose` replays it, with `--tree` or
`--hubs` one of those.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.scenario import live, live_in_a_tree, live_with_hubs

LIVES = 1000
TREES = 50
HUBS = 20  # in half of the thousand there are some too
CHUNK = 50


@pytest.mark.parametrize("first", range(0, LIVES, CHUNK))
@pytest.mark.timeout(900)
def test_fifty_lives_end_converged(first: int) -> None:
    for seed in range(first, first + CHUNK):
        live(seed)


@pytest.mark.parametrize("first", range(0, TREES, CHUNK))
@pytest.mark.timeout(900)
def test_fifty_lives_of_trees_end_converged(first: int) -> None:
    for seed in range(first, first + CHUNK):
        live_in_a_tree(seed)


@pytest.mark.timeout(900)
def test_twenty_lives_of_hubs_that_come_and_go_end_converged() -> None:
    for seed in range(HUBS):
        live_with_hubs(seed)


def test_a_life_is_decided_by_its_number_alone() -> None:
    assert live(7) == live(7)


def test_a_life_is_the_same_in_a_process_that_hashes_otherwise() -> None:
    assert _told(21, hash_seed="0") == _told(21, hash_seed="1")


def _told(number: int, *, hash_seed: str) -> str:
    """The story of a life, but for how long its telling took."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seed", str(number), "--verbose"],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return re.sub(r"in [0-9.]+ s", "", done.stdout)
