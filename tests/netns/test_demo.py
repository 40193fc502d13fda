"""The demo performs, sums up, leaves its file and nothing else, and cleans up when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab.netns import names_with

pytestmark = pytest.mark.timeout(240)
HACK = Path(__file__).parents[2] / "hack"
DEMO_S = 200.0  # half of it is what it takes on a machine that does nothing else
START_S = 60.0


def start(output: Path, log: Path) -> subprocess.Popen[str]:
    """The demo, its output in a file."""
    argv = [sys.executable, "-m", "demo", "--output", str(output)]
    with log.open("w") as out:
        return subprocess.Popen(
            argv, env={**os.environ, "PYTHONPATH": str(HACK)}, stdout=out, stderr=out, text=True
        )


def test_the_demo_shows_every_possible_pair_direct_and_says_why_others_are_not(tmp_path: Path) -> None:
    output, log = tmp_path / "demo.json", tmp_path / "log"
    process = start(output, log)
    assert process.wait(DEMO_S) == 0, log.read_text()
    document = json.loads(output.read_text())
    assert set(document) == {"peers", "pairs"}
    names = [peer["name"] for peer in document["peers"]]
    assert len(names) >= 8
    assert all(set(peer) == {"name", "site", "nat"} for peer in document["peers"])
    assert len({peer["site"] for peer in document["peers"]}) < len(names)
    ways = {(pair["from"], pair["to"]): pair for pair in document["pairs"]}
    assert set(ways) == {(a, b) for a in names for b in names if a != b}
    assert {pair["family"] for pair in ways.values()} == {"IPv4", "IPv6", None}
    for pair in ways.values():
        assert set(pair) == {
            "from", "to", "path", "family", "rtt_ms", "first_ping_s", "direct_s", "reason",
        }  # fmt: skip
        numbers = [pair[key] for key in ("rtt_ms", "first_ping_s", "direct_s")]
        if pair["path"] == "direct":
            assert all(number >= 0.0 for number in numbers)
            assert pair["reason"] is None
        else:
            assert pair["path"] == "none"
            assert pair["family"] is None
            assert pair["rtt_ms"] is None
            assert pair["reason"]
    assert names_with(f"lab{process.pid}-") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    process = start(tmp_path / "demo.json", log)
    deadline = time.monotonic() + START_S
    while "has joined" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(START_S) == (130 if number is signal.SIGINT else 128 + number)
    assert names_with(f"lab{process.pid}-") == []
