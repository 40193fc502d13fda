"""The demo as a process, the shape of the file that it leaves, and how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab.internet import LABS
from lab.netns import names_with

from tests.docs_fixture import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "hack")}
START_S = 120.0  # many times what it takes until peers join, or until all is taken down


class Demo:
    """One run of it, with these options; `directory` takes its output and its file."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._log = directory / "log"
        self._file = directory / "demo.json"
        argv = [sys.executable, "-m", "demo", "--output", str(self._file), *options]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(argv, env=ENVIRONMENT, stdout=log, stderr=log, text=True)
        self.lab = f"lab{self.process.pid}-1"

    @property
    def said(self) -> str:
        """What it told so far."""
        return self._log.read_text()

    def finish(self, *, within_s: float) -> None:
        """Return when it has ended well."""
        assert self.process.wait(within_s) == 0, self.said

    def interrupt(self, number: signal.Signals) -> int:
        """Send it a signal once peers join: its exit status."""
        deadline = time.monotonic() + START_S
        while "has joined" not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        self.process.send_signal(number)
        return self.process.wait(START_S)

    def document(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The peers and the pairs of its file, which are whole."""
        document = json.loads(self._file.read_text())
        assert set(document) == {"peers", "pairs"}
        peers, pairs = document["peers"], document["pairs"]
        assert all(set(peer) == {"name", "site", "nat"} for peer in peers)
        names = {peer["name"] for peer in peers}
        assert sorted((pair["from"], pair["to"]) for pair in pairs) == sorted(
            (a, b) for a in names for b in names if a != b
        )
        assert {pair["family"] for pair in pairs} == {"IPv4", "IPv6"}
        for pair in pairs:
            assert set(pair) == {
                "from", "to", "path", "family", "rtt_ms", "first_ping_s", "direct_s", "reason",
            }  # fmt: skip
            assert (pair["path"] == "direct") == (pair["reason"] is None)
        return peers, pairs

    def assert_nothing_is_left(self) -> None:
        """Neither namespaces, in which alone its programs run, nor files."""
        assert names_with(f"{self.lab}-") == []
        assert not (LABS / self.lab).exists()
