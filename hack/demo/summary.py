"""What the demo came to: the pairs that are not direct and why, and the file for programs."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path

from lab import Nat
from meshlab import PairRecord, Watch


def document(watch: Watch) -> dict[str, object]:
    """The demo's file: who was there, and every ordered pair. Nulls where there is nothing."""
    return {
        "peers": [
            {"name": member.name, "site": member.machine.site.name, "nat": member.machine.site.nat.value}
            for member in watch.members
        ],
        "pairs": [_pair(pair) for pair in watch.pairs.values()],
    }


def write(path: Path, pairs: dict[str, object]) -> None:
    """Replace the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(pairs, indent=1, ensure_ascii=False) + "\n")


def obstacles(watch: Watch, *, relayed: bool) -> dict[str, list[str]]:
    """Reason -> the pairs, as `a - b`, that cannot be direct for it; `relayed`: those that hubs serve."""
    found: dict[str, list[str]] = defaultdict(list)
    for a, b in itertools.combinations([member.name for member in watch.members], 2):
        pair = watch.pairs.get((a, b))
        if pair is not None and pair.obstacle is not None and pair.is_possible is relayed:
            found[_obstacle(pair)].append(f"{a} - {b}")
    return dict(found)


def _obstacle(pair: PairRecord) -> str:
    places = (pair.source.machine, pair.target.machine)
    blocked = [machine.name for machine in places if machine.site.nat is Nat.UDP_BLOCKED]
    # All pairs of such a machine are one line: it has none.
    return f"{blocked[0]}: {pair.obstacle}" if blocked else str(pair.obstacle)


def _pair(pair: PairRecord) -> dict[str, object]:
    reach = pair.reach
    has_path = reach is not None and reach.path != "None"
    return {
        "from": pair.source.name,
        "to": pair.target.name,
        "path": reach.path.lower() if reach is not None else "none",
        "family": reach.family if reach is not None and has_path else None,
        "rtt_ms": _rounded(pair.rtt_ms, 1) if has_path else None,
        "first_ping_s": _rounded(pair.first_ping_s, 3),
        "direct_s": _rounded(pair.direct_s, 3),
        "reason": (reach.reason if reach is not None else "") or (None if has_path else pair.obstacle),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
