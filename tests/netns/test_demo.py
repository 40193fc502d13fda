"""The demo performs, sums up, leaves its file and nothing else, and cleans up when it is interrupted."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.demo_fixture import Demo

DEMO_S = 400.0  # a sixth of it is what it takes on a machine that does nothing else


def test_the_demo_shows_every_pair_direct_or_relayed_and_says_why_not_direct(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.finish(within_s=DEMO_S)
    peers, pairs = demo.document()
    assert len(peers) >= 8
    assert len({peer["site"] for peer in peers}) < len(peers)
    assert {pair["path"] for pair in pairs} == {"direct", "relayed"}
    for pair in pairs:
        if pair["path"] == "direct":
            assert all(pair[key] >= 0.0 for key in ("rtt_ms", "first_ping_s", "direct_s"))
        else:
            assert all(pair[key] >= 0.0 for key in ("rtt_ms", "first_ping_s"))
            assert pair["reason"]
    for changed in (
        r"edges are attached to hub \w.*; to web \w",
        r"it is Tree \d.* pings",
        r"it is Full \d.* pings",
    ):
        assert re.search(changed, demo.said), demo.said
    demo.assert_nothing_is_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    demo = Demo(tmp_path)
    assert demo.interrupt(number) == (130 if number is signal.SIGINT else 128 + number)
    demo.assert_nothing_is_left()
