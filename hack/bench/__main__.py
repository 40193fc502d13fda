"""`python -m bench [NAME ...]`: run benchmarks, write build/bench/NAME.json, print a table.

Exit status 0 when all of them ran, whether or not they reached their targets; 1 when one could not be run;
2 for wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from kubelab import KubeLabError
from lab import LabError
from meshlab import WatchError
from rich.console import Console
from rich.table import Table

from bench import (
    agents,
    birthday,
    carrier,
    cold,
    crowd,
    forwarder,
    hubs,
    keys,
    kube,
    moves,
    nat_grid,
    outage,
    plan,
    pods,
    relay,
    size,
    start,
    throughput,
    traffic,
    tree,
)
from bench.machine import describe
from bench.result import Benchmark, Result, Row, Sample

OUTPUT = Path("build/bench")
BENCHMARKS: tuple[Benchmark, ...] = (
    *start.BENCHMARKS,
    *nat_grid.BENCHMARKS,
    *moves.BENCHMARKS,
    *outage.BENCHMARKS,
    *hubs.BENCHMARKS,
    *birthday.BENCHMARKS,
    *cold.BENCHMARKS,
    *crowd.BENCHMARKS,
    *size.BENCHMARKS,
    *traffic.BENCHMARKS,
    *throughput.BENCHMARKS,
    *relay.BENCHMARKS,
    *forwarder.BENCHMARKS,
    *carrier.BENCHMARKS,
    *plan.BENCHMARKS,
    *pods.BENCHMARKS,
    *keys.BENCHMARKS,
    *tree.BENCHMARKS,
    *kube.BENCHMARKS,
)

console = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for."""
    options = _parser().parse_args(arguments)
    if options.list:
        for benchmark in BENCHMARKS:
            print(f"{benchmark.name:18} {benchmark.what} ({benchmark.unit}; {benchmark.target})")
        return 0
    wanted = [b for b in BENCHMARKS if not options.names or b.name in options.names]
    os.environ.setdefault("TERM", "dumb")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    results = []
    failed = False
    for benchmark in wanted:
        machine = describe()
        try:
            result = _run(benchmark, options.attempts or benchmark.attempts)
        except (agents.BenchError, KubeLabError, LabError, WatchError) as error:
            console.print(f"{benchmark.name}: could not be measured: {error}", style="red", markup=False)
            failed = True
            continue
        results.append(result)
        path = OUTPUT / f"{benchmark.name}.json"
        path.write_text(json.dumps(result.as_dict(machine), indent=1, ensure_ascii=False) + "\n")
    if results:
        shown = Console(width=None if sys.stdout.isatty() else 110)
        for result in results:
            if result.rows:
                shown.print(_growth(result))
        shown.print(_table(results))
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure, and compare with the targets."
    )
    parser.add_argument(
        "names", nargs="*", choices=[[], *names], metavar="NAME", help="default: all; see --list"
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--attempts", type=int, metavar="N", help="instead of each benchmark's own number")
    return parser


def _run(benchmark: Benchmark, attempts: int) -> Result:
    console.print(f"{benchmark.name}: {benchmark.what}", style="bold", markup=False)
    started = time.monotonic()
    samples: list[Sample] = []
    rows: list[Row] = []
    for sample in benchmark.run(attempts):
        if isinstance(sample, Mapping):
            rows.append(sample)
            continue
        samples.append(sample)
        console.print(f"  {len(samples):3}  {_text(sample, benchmark.unit)}", markup=False)
    console.print(f"  took {time.monotonic() - started:.0f} s", style="dim")
    return Result(benchmark, tuple(samples), tuple(rows))


def _growth(result: Result) -> Table:
    """The rows of a result, side by side: what grows, and how."""
    headings = list(dict.fromkeys(heading for row in result.rows for heading in row))
    table = Table(title=result.benchmark.name, show_header=False)
    table.add_column()
    for _ in result.rows:
        table.add_column(justify="right")
    for heading in headings:
        table.add_row(heading, *(_figure(row, heading) for row in result.rows))
    return table


def _figure(row: Row, heading: str) -> str:
    if heading not in row:
        return ""
    figure = row[heading]
    return "never" if figure is None else f"{figure:.4g}"


def _table(results: Sequence[Result]) -> Table:
    table = Table(title="Benchmarks")
    for heading in ("benchmark", "samples", "median", "p99", "target", "holds"):
        table.add_column(heading, justify="left" if heading in ("benchmark", "target") else "right")
    for result in results:
        unit = result.benchmark.unit
        table.add_row(
            result.benchmark.name,
            str(len(result.samples)),
            _text(result.median, unit),
            _text(result.p99, unit),
            f"{result.benchmark.target} {unit}",
            "yes" if result.holds else "no",
            style=None if result.holds else "yellow",
        )
    return table


def _text(sample: Sample, unit: str) -> str:
    return "never" if sample is None else f"{sample:.4g} {unit}"


if __name__ == "__main__":
    sys.exit(main())
