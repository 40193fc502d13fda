"""The demo with a cluster as its registry: the same story and file, and a cluster that stays if wanted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.internet import LABS
from lab.netns import names_with

pytestmark = pytest.mark.timeout(400)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "hack")}
DEMO_S = 300.0  # a quarter of it is what it takes on a machine that does nothing else
START_S = 120.0
EXTERNAL = {"phone", "six"}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that leaves its lab standing, at its end; its output is in `log`, its file is `demo.json`."""
    process = start(tmp_path, "--keep")
    try:
        assert process.wait(DEMO_S) == 0, (tmp_path / "log").read_text()
        yield process
    finally:
        process.kill()
        process.wait()
        lab("clean", lab_of(process))


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    """The demo, its output in a file."""
    argv = [
        sys.executable,
        "-m",
        "demo",
        "--registry",
        "kubernetes",
        "--output",
        str(directory / "demo.json"),
    ]
    with (directory / "log").open("w") as log:
        return subprocess.Popen([*argv, *options], env=ENVIRONMENT, stdout=log, stderr=log, text=True)


def lab_of(process: subprocess.Popen[str]) -> str:
    """The name of the lab of a demo."""
    return f"lab{process.pid}-1"


def lab(*arguments: str) -> str:
    """What `python -m lab` prints."""
    argv = [sys.executable, "-m", "lab", *arguments]
    return subprocess.run(argv, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout


def assert_nothing_is_left(process: subprocess.Popen[str]) -> None:
    """Neither namespaces, in which alone its programs run, nor files."""
    assert names_with(f"{lab_of(process)}-") == []
    assert not (LABS / lab_of(process)).exists()


def test_the_demo_shows_nodes_and_external_peers_and_keeps_their_cluster(
    kept: subprocess.Popen[str], tmp_path: Path
) -> None:
    document = json.loads((tmp_path / "demo.json").read_text())
    assert set(document) == {"peers", "pairs"}
    assert all(set(peer) == {"name", "site", "nat"} for peer in document["peers"])
    names = {peer["name"] for peer in document["peers"]}
    ways = {(pair["from"], pair["to"]): pair for pair in document["pairs"]}
    assert set(ways) == {(a, b) for a in names for b in names if a != b}
    assert {pair["family"] for pair in ways.values()} == {"IPv4", "IPv6", None}
    for pair in ways.values():
        assert set(pair) == {
            "from", "to", "path", "family", "rtt_ms", "first_ping_s", "direct_s", "reason",
        }  # fmt: skip
        assert (pair["path"] == "direct") == (pair["reason"] is None)

    told = (tmp_path / "log").read_text()
    kubectl = re.search(r"kubectl\(\) \{ enter cluster (\S+ \S+) ", told)
    assert kubectl is not None, told
    asked = [*kubectl[1].split(), "get", "nodes,scopepeers", "--output=json"]
    items = json.loads(lab("enter", f"{lab_of(kept)}-cluster", *asked))["items"]
    found = {
        kind: {each["metadata"]["name"] for each in items if each["kind"] == kind}
        for kind in ("Node", "ScopePeer")
    }
    assert found["Node"] == names - EXTERNAL
    assert found["ScopePeer"] == {
        *(f"demo.default.{name}" for name in names - EXTERNAL),
        *(f"demo.external.{name}" for name in EXTERNAL),
    }

    lab("clean", lab_of(kept))
    assert_nothing_is_left(kept)


def test_an_interrupted_demo_leaves_nothing_of_its_cluster(tmp_path: Path) -> None:
    process, log = start(tmp_path), tmp_path / "log"
    deadline = time.monotonic() + START_S
    while "has joined" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(START_S) == 128 + signal.SIGTERM
    assert_nothing_is_left(process)


def test_an_unknown_registry_is_refused_before_anything_is_set_up() -> None:
    environment = {**os.environ, "REGISTRY": "etcd"}
    done = subprocess.run(
        [ROOT / "hack" / "demo.sh"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=10.0,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "demo: there is no registry 'etcd': say REGISTRY=embedded or REGISTRY=kubernetes\n"
    )
