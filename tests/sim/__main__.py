"""Replay one life, or run many: `python -m tests.sim --seed 17`, `python -m tests.sim --count 99 --tree`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in ("hack", "operator", "nodeagent", "."):
    sys.path.insert(0, str(ROOT / folder))

from tests.sim.scenario import HubLife, Life, TreeLife  # noqa: E402


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="the first life's number")
    parser.add_argument("--count", type=int, default=1, help="how many lives")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--tree", action="store_true", help="of meshes that are trees")
    kinds.add_argument("--hubs", action="store_true", help="of meshes whose hubs come and go")
    parser.add_argument("--verbose", action="store_true", help="tell the story and the end of each")
    arguments = parser.parse_args()
    failed = []
    started = time.monotonic()
    slowest: list[tuple[float, int]] = []
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        life = (TreeLife if arguments.tree else HubLife if arguments.hubs else Life)(seed)
        begun = time.monotonic()
        try:
            outcome = life.live()
        except Exception as error:
            failed.append(seed)
            say(
                f"seed {seed}: {type(error).__name__} {error}" if arguments.verbose else f"seed {seed} failed"
            )
            if arguments.verbose and not isinstance(error, AssertionError):
                raise
        else:
            slowest.append((outcome.converged_after, seed))
            if arguments.verbose:
                say("\n".join(outcome.story) + f"\nconverged after {outcome.converged_after:.0f} s,")
                say(f"{outcome.events} events in {time.monotonic() - begun:.2f} s\n{life.world.describe()}")
    say(f"{arguments.count} lives in {time.monotonic() - started:.1f} s; failed: {failed or 'none'}")
    say("slowest to converge: " + ", ".join(f"seed {s}: {t:.0f} s" for t, s in sorted(slowest)[-10:]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
