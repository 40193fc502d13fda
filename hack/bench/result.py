"""What a benchmark is, and what came of one: pure.

A sample of None is an attempt that never got there; it counts as worse than every number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Sample = float | None
# Figures that are measured besides, under headings with their units: one line of a benchmark's table, which
# shows how they grow.
Row: TypeAlias = Mapping[str, Sample]


@dataclass(frozen=True, slots=True)
class Target:
    """Bounds that the samples should keep to, in the benchmark's unit; those left None are not asked for.

    At most so much, or with `more_is_better` at least. `worst` bounds every single sample.
    """

    median: float | None = None
    p99: float | None = None
    worst: float | None = None
    more_is_better: bool = False

    def holds(self, samples: Sequence[Sample]) -> bool:
        """Whether samples keep to every bound; none at all never do."""
        if not samples:
            return False
        bounds = ((self.median, 0.5), (self.p99, 0.99), (self.worst, 1.0))
        return all(
            self._keeps(self.quantile(samples, share), bound) for bound, share in bounds if bound is not None
        )

    def quantile(self, samples: Sequence[Sample], share: float) -> Sample:
        """The value that `share` of the samples are no worse than.

        The median is the usual one; any other share is the nearest rank, so a p99 of fewer than a hundred
        samples is the worst of them.
        """
        missing = -math.inf if self.more_is_better else math.inf
        ordered = sorted((missing if s is None else s for s in samples), reverse=self.more_is_better)
        if not ordered:
            return None
        if share == 0.5:
            value = statistics.median(ordered)
        else:
            value = ordered[max(0, math.ceil(share * len(ordered)) - 1)]
        return value if math.isfinite(value) else None

    def as_dict(self) -> dict[str, Any]:
        """The bounds that are asked for, and in which direction."""
        bounds = {"median": self.median, "p99": self.p99, "worst": self.worst}
        return {
            "bound": "at least" if self.more_is_better else "at most",
            **{name: bound for name, bound in bounds.items() if bound is not None},
        }

    def __str__(self) -> str:
        sign = "≥" if self.more_is_better else "≤"
        bounds = {"median": self.median, "p99": self.p99, "each": self.worst}
        return ", ".join(f"{name} {sign} {bound:g}" for name, bound in bounds.items() if bound is not None)

    def _keeps(self, value: Sample, bound: float) -> bool:
        if value is None:
            return False
        return value >= bound if self.more_is_better else value <= bound


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One thing to measure.

    `run` takes how many samples are wanted and yields each as soon as it is there; it may yield more where
    one attempt gives several (`attempts` is then the number of attempts), and rows of a table in between.
    """

    name: str
    unit: str
    what: str
    target: Target
    attempts: int
    run: Callable[[int], Iterator[Sample] | Iterator[Sample | Row]]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one benchmark."""

    benchmark: Benchmark
    samples: tuple[Sample, ...]
    rows: tuple[Row, ...] = ()

    @property
    def median(self) -> Sample:
        return self.benchmark.target.quantile(self.samples, 0.5)

    @property
    def p99(self) -> Sample:
        return self.benchmark.target.quantile(self.samples, 0.99)

    @property
    def holds(self) -> bool:
        return self.benchmark.target.holds(self.samples)

    def as_dict(self, machine: dict[str, Any]) -> dict[str, Any]:
        """The content of the benchmark's file."""
        return {
            "name": self.benchmark.name,
            "unit": self.benchmark.unit,
            "samples": [None if s is None else round(s, 6) for s in self.samples],
            "median": None if self.median is None else round(self.median, 6),
            "p99": None if self.p99 is None else round(self.p99, 6),
            "target": self.benchmark.target.as_dict(),
            "holds": self.holds,
            **({"table": [_rounded(row) for row in self.rows]} if self.rows else {}),
            "machine": machine,
        }


def _rounded(row: Row) -> dict[str, Sample]:
    return {heading: None if figure is None else round(figure, 6) for heading, figure in row.items()}
