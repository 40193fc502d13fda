"""A registry killed at any moment keeps all that it acknowledged, and nothing by halves."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from scope.model import Kind, Peer
from scope.registry.port import Put
from tests.unit.registry_conformance import MESH, created, peer, watched
from tests.unit.registry_crash_writer import BACKLOG, opened, port_of, report_at

ROOT = Path(__file__).parents[2]
KILLS = 50
WRITERS = 8  # peers written side by side, so that batches hold several changes
SEED = 20260131


@contextmanager
def writing(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes until its block ends, at the latest."""
    command = [sys.executable, "-m", "tests.unit.registry_crash_writer", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def test_fifty_kills_during_writes_lose_nothing_acknowledged_and_leave_nothing_half_written(
    tmp_path: Path,
) -> None:
    chance = random.Random(SEED)
    path = tmp_path / "registry.db"
    acknowledged = asyncio.run(_fill(path))
    for _ in range(KILLS):
        # A number of acknowledgements, then some turns into the next commits: no clock decides when it dies.
        lines, turns = chance.randrange(1, 200), chance.randrange(20_000)
        with writing(path) as process:
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(lines)]
            for _ in range(turns):
                pass
            process.send_signal(signal.SIGKILL)
            said += process.stdout.readlines()
            assert process.wait() == -signal.SIGKILL
        for seed, port, revision in (map(int, line.split()) for line in said if line.endswith(b"\n")):
            assert revision > acknowledged[seed][1]
            acknowledged[seed] = (port, revision)
        acknowledged = asyncio.run(_checked(path, acknowledged))
    assert max(revision for _, revision in acknowledged.values()) > KILLS * WRITERS


async def _fill(path: Path) -> dict[int, tuple[int, int]]:
    """A mesh and its peers; for each seed the port and revision that were acknowledged."""
    registry = opened(path)
    await created(registry, MESH)
    acknowledged = {}
    for seed in range(1, WRITERS + 1):
        asked = peer(seed)
        member = await created(registry, replace(asked, report=report_at(asked, 1)))
        acknowledged[seed] = (1, member.meta.revision)
    await registry.close()
    return acknowledged


async def _checked(path: Path, acknowledged: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """See that each peer stands at what was acknowledged or at the one write after it, and that the backlog
    is whole. Returns where each stands now.
    """
    registry = opened(path)
    standing = {}
    listed = await registry.list(Kind.PEER)
    assert len(listed.resources) == WRITERS
    for seed, (port, revision) in acknowledged.items():
        stored = await registry.get(Kind.PEER, peer(seed).meta.name)
        assert isinstance(stored, Peer)
        assert stored.report == report_at(stored, port_of(stored))
        if stored.meta.revision == revision:
            assert port_of(stored) == port
        else:
            assert stored.meta.revision > revision
            assert port_of(stored) == port % 65535 + 1
        standing[seed] = (port_of(stored), stored.meta.revision)
    newest = max(revision for _, revision in standing.values())
    assert listed.revision.number == newest
    kept = min(BACKLOG, newest - WRITERS - 1)
    facts = await watched(registry, replace(listed.revision, number=newest - kept), count=kept)
    last = {fact.resource.meta.name: fact.resource for fact in facts if isinstance(fact, Put)}
    assert all(last.get(each.meta.name, each) == each for each in listed.resources)
    await registry.close()
    return standing
