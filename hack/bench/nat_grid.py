"""Every pair of NAT kinds: two peers of each kind, joining one mesh one after another.

A pair's time runs from the start of the later one's join until both say that the path is direct.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from lab import GRID_KINDS, place_reason
from meshlab import Member

from bench.agents import World, world
from bench.result import Benchmark, Sample, Target

POLL_S = 0.05  # sixteen agents are asked, on the cores that they run on
PATIENCE_S = 60.0  # the ladder's last bound: a pair without a path is declared so then


def _grid(attempts: int) -> Iterator[Sample]:
    for _ in range(attempts):
        with world() as here:
            for number in (1, 2):
                for kind in GRID_KINDS:
                    name = f"{kind.name.lower().replace('_', '-')}-{number}"
                    newcomer = here.member(name, kind)
                    yield from _join(here, newcomer).values()


def _join(world: World, newcomer: Member) -> dict[str, Sample]:
    """Let one more peer join: by name of each earlier one that it can be direct with, the seconds it took."""
    began = time.monotonic()
    newcomer.join(world.token)
    place = newcomer.machine.place
    reachable = [
        other
        for other in world.members
        if other is not newcomer and place_reason(place, other.machine.place) is None
    ]
    found: dict[str, Sample] = {other.name: None for other in reachable}
    while reachable and time.monotonic() - began < PATIENCE_S:
        newcomer.check_alive()
        for other in list(reachable):
            # Both are asked only where the first says yes.
            if world.is_direct(newcomer, other) and world.is_direct(other, newcomer):
                found[other.name] = time.monotonic() - began
                reachable.remove(other)
        time.sleep(POLL_S)
    newcomer.await_joined()
    while newcomer.name not in world.addresses:
        world.ask(newcomer)
        time.sleep(POLL_S)
    return found


BENCHMARKS = (
    Benchmark(
        "nat-grid",
        unit="s",
        what="each traversable pair of nine NAT kinds, join to direct both ways",
        target=Target(worst=PATIENCE_S),
        attempts=1,
        run=_grid,
    ),
)
