"""`python -m demo`: perform the story, sum it up, and clean up, also when interrupted."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path

from lab import Lab, LabError
from meshlab import PRIVATE, Pinger
from meshlab.programs import program
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from demo import summary
from demo.cast import MESH
from demo.frame import Mood, rows_of, tally_of
from demo.origin import REGISTRIES, Origin, origin_of
from demo.screen import MOOD_STYLES, choose_screen, console, table
from demo.story import Story

OUTPUT = Path(__file__).parents[2] / "build" / "demo.json"
DONE, FAILED, INTERRUPTED = 0, 1, 130
# One way on each uplink: 40 ms from any site to any other and back, as across a continent.
DELAY_MS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description="A mesh comes up through real NATs.")
    parser.add_argument(
        "--registry",
        choices=REGISTRIES,
        default=REGISTRIES[0],
        help="what keeps the mesh (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the lab up at the end, and say how to look around"
    )
    parser.add_argument("--plain", action="store_true", help="tell it in lines, also on a terminal")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep detailed logs there")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args()
    try:
        return _perform(options)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("demo: interrupted; everything is cleaned up", file=sys.stderr)
        return INTERRUPTED


def _perform(options: argparse.Namespace) -> int:
    started = time.monotonic()
    out = console()
    origin = origin_of(options.registry)
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(delay_ms=DELAY_MS, private=PRIVATE))
        pinger = stack.enter_context(Pinger())
        story = Story(
            screen := choose_screen(out, plain=options.plain),
            lab,
            pinger,
            origin=origin,
            started=started,
            verbose=options.logs is not None,
        )
        stack.enter_context(story.watch)
        try:
            with screen:
                story.perform()
        finally:
            if story.watch.pairs:
                summary.write(options.output, story.as_full or summary.document(story.watch))
            if options.logs is not None:
                _save_logs(lab, options.logs)
        _sum_up(out, story, options.output)
        if options.keep:
            print(f"\n{lab.keep()}\n\n{_tour(lab, origin)}")
    return FAILED if story.failures else DONE


def _sum_up(out: Console, story: Story, path: Path) -> None:
    watch, tally = story.watch, tally_of(story.watch)
    if out.is_terminal:  # the live view is gone, and its events with it
        for event in story.events:
            if event.mood is not Mood.PLAIN:
                out.print(Text(f"{event.at:6.1f} s  {event.text}", style=MOOD_STYLES[event.mood]))
    out.print()
    out.print(table(rows_of(watch), now=0.0))
    out.print(Text("round trips in ms, ⁴ over IPv4, ⁶ over IPv6, ʰ through a hub, — no way", style="dim"))
    out.print()
    out.print(f"{tally.direct} of {tally.possible} pairs that can be direct are, and were pinged both ways.")
    out.print(f"From when both had joined to the path: {tally.direct_s or 'never'}.")
    out.print(f"From when both had joined to the first ping back: {tally.first_ping_s or 'never'}.")
    out.print(f"\n{tally.relayed} of {tally.relayable} pairs that cannot be direct talk through a hub:")
    _explain(out, summary.obstacles(watch, relayed=True))
    if tally.impossible:
        out.print(f"\n{tally.impossible} pairs have no way:")
        _explain(out, summary.obstacles(watch, relayed=False))
    out.print(f"\n{path} has every pair.")
    for failure in story.failures:
        out.print(Text(f"\nFAILED {failure}", style="bold red"))


def _explain(out: Console, obstacles: dict[str, list[str]]) -> None:
    for reason, pairs in obstacles.items():
        out.print(Padding(reason, (0, 0, 0, 2)))
        out.print(Padding(", ".join(pairs), (0, 0, 0, 4)))


def _save_logs(lab: Lab, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for host in lab.hosts():
        for log in host.directory.rglob("*.log"):
            shutil.copyfile(log, target / f"{host.name}-{log.name}")


def _tour(lab: Lab, origin: Origin) -> str:
    programs = Path(program("scopectl")).parent
    setting = f'PATH="{programs}:$PATH" PYTHONPATH={Path(__file__).parents[1]}'
    return "\n".join(
        (
            "Look around, for instance, after this line:",
            f'  enter() {{ sudo env {setting} {sys.executable} -m lab enter "$@"; }}',
            "  enter web scopectl status                 # what one agent sees",
            f"  enter web scopectl ping {MESH}.external.six   # through the mesh, and by which path",
            *(f"  {line}" for line in origin.tour()),
            f"  enter {lab.prefix}-oslo nft list ruleset    # a NAT",
            f"  enter {lab.prefix}-oslo tcpdump -ni wan udp # what leaves it",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
