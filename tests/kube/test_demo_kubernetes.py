"""The demo with a cluster as its registry: the same story and file, and a cluster that stays if wanted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.demo_fixture import ENVIRONMENT, Demo
from tests.docs_fixture import ROOT

KUBERNETES = ("--registry", "kubernetes")
DEMO_S = 400.0  # a fifth of it is what it takes on a machine that does nothing else
EXTERNAL = {"phone", "six"}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Demo]:
    """A demo that leaves its lab standing, at its end."""
    demo = Demo(tmp_path, *KUBERNETES, "--keep")
    try:
        demo.finish(within_s=DEMO_S)
        yield demo
    finally:
        demo.process.kill()
        demo.process.wait()
        lab("clean", demo.lab)


def lab(*arguments: str) -> str:
    """What `python -m lab` prints."""
    argv = [sys.executable, "-m", "lab", *arguments]
    return subprocess.run(argv, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout


def test_the_demo_shows_nodes_and_external_peers_and_keeps_their_cluster(kept: Demo) -> None:
    names = {peer["name"] for peer in kept.document()[0]}
    kubectl = re.search(r"kubectl\(\) \{ enter cluster (\S+ \S+) ", kept.said)
    assert kubectl is not None, kept.said
    asked = [*kubectl[1].split(), "get", "nodes,scopepeers", "--output=json"]
    items = json.loads(lab("enter", f"{kept.lab}-cluster", *asked))["items"]
    found = {
        kind: {each["metadata"]["name"] for each in items if each["kind"] == kind}
        for kind in ("Node", "ScopePeer")
    }
    assert found["Node"] == names - EXTERNAL
    assert found["ScopePeer"] == {
        *(f"demo.default.{name}" for name in names - EXTERNAL),
        *(f"demo.external.{name}" for name in EXTERNAL),
    }

    lab("clean", kept.lab)
    kept.assert_nothing_is_left()


def test_an_interrupted_demo_leaves_nothing_of_its_cluster(tmp_path: Path) -> None:
    demo = Demo(tmp_path, *KUBERNETES)
    assert demo.interrupt(signal.SIGTERM) == 128 + signal.SIGTERM
    demo.assert_nothing_is_left()


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
