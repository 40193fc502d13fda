"""Guessing a port of a symmetric NAT: how often it hits, how soon, and how many packets a try takes.

One pair, a symmetric NAT against a port-restricted one, and a hub. Between two tries the symmetric NAT
forgets all it knew, so that the port of the last try leads nowhere; and the agent that guesses is started
anew, since it does not guess for one peer all day.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator

from lab import Nat
from meshlab import Member

from bench.agents import MESH, BenchError, World, world
from bench.result import Benchmark, Row, Sample, Target

TRIED_S = 120.0  # within so long a pair that lost its path tries again, and again after a miss
POLL_S = 0.1


def _tries(attempts: int) -> Iterator[Sample | Row]:
    hits, pings, guesses = 0, [], []
    with _pair() as (here, symmetric, guesser):
        for number in range(attempts):
            before = _spent(here, symmetric)
            if number:
                symmetric.machine.site.reboot()
                guesser.kill()
                guesser.run_again()
            tried, guessed = _await_try(here, symmetric, guesser, before)
            is_hit = tried["hits"] > before.get("hits", 0.0)
            yield tried["seconds"] if is_hit else None
            hits += is_hit
            pings.append(tried["pings"] - before.get("pings", 0.0))
            guesses.append(guessed.get("guesses", 0.0))
    yield {
        "tries": float(attempts),
        "hits": float(hits),
        "pings of the symmetric side, most": max(pings),
        "guesses, median": statistics.median(guesses),
        "guesses, most": max(guesses),
    }


def _await_try(
    here: World, symmetric: Member, guesser: Member, before: dict[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """What both sides have spent once the next try is over."""
    deadline = time.monotonic() + TRIED_S
    while time.monotonic() < deadline:
        tried = _spent(here, symmetric)
        if _ended(tried) > _ended(before):
            return tried, _spent(here, guesser)
        time.sleep(POLL_S)
    raise BenchError(f"the pair did not try again within {TRIED_S:g} s")


def _ended(spent: dict[str, float]) -> float:
    return spent.get("hits", 0.0) + spent.get("misses", 0.0)


def _spent(here: World, member: Member) -> dict[str, float]:
    status = here.ask(member)
    spent = status.birthday if status is not None else {}
    return {name: float(value) for name, value in spent.items() if isinstance(value, int | float)}


@contextlib.contextmanager
def _pair() -> Iterator[tuple[World, Member, Member]]:
    """The side behind the symmetric NAT, the one that guesses, and a hub."""
    with world(spec={"hubs": {"names": [f"{MESH}.external.hub"]}, "birthday": True}) as here:
        here.member("hub", Nat.NONE).join(here.token, wait=True)
        symmetric, guesser = here.member("first", Nat.SYMMETRIC), here.member("second", Nat.PORT_RESTRICTED)
        for member in (symmetric, guesser):
            member.join(here.token, wait=True)
        here.settle()
        flows = [here.flow(symmetric, guesser), here.flow(guesser, symmetric)]
        if any(here.await_ping(flow) is None for flow in flows):
            raise BenchError("no ping comes back")
        yield here, symmetric, guesser


BENCHMARKS = (
    Benchmark(
        "birthday",
        unit="s",
        what="symmetric NAT against a port-restricted one, from the agreement to guess to a hit",
        target=Target(median=1.0, p99=4.5),
        attempts=30,
        run=_tries,
    ),
)
