"""The process that the crash test kills: `python -m tests.unit.registry_crash_writer FILE`.

Each of its writers raises its peer's port by one, for ever, and says so on standard output, unbuffered, once
the registry has answered: `SEED PORT REVISION`. A module of its own, so that fifty starts load no test tools.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from scope_operator.sqlite import Identity, SqliteRegistry, open_registry

from scope.model import Candidate, CandidateKind, Endpoint, Kind, Peer, PeerReport, Secret

BACKLOG = 100


def opened(path: Path) -> SqliteRegistry:
    """The registry under test."""
    return open_registry(
        path,
        wall=lambda: 1_700_000_000.0,
        now=lambda: 0.0,
        new_uid=lambda: os.urandom(8).hex(),
        new_identity=lambda: Identity("registry-1", Secret(b"s" * 32), Secret(b"p" * 32)),
        backlog=BACKLOG,
    )


def report_at(member: Peer, port: int) -> PeerReport:
    """What `member` reports with its one endpoint at `port`."""
    assert member.report is not None
    endpoint = Endpoint.parse(f"192.0.2.1:{port}")
    return PeerReport(keys=member.report.keys, endpoints=(Candidate(endpoint, CandidateKind.REFLEXIVE),))


def port_of(member: Peer) -> int:
    """The port of a member's one endpoint."""
    assert member.report is not None
    return member.report.endpoints[0].endpoint.port


async def write_for_ever(path: Path) -> None:
    """One writer for each peer of the registry, side by side."""
    registry = opened(path)

    async def writer(seed: int, member: Peer) -> None:
        name, uid, port = member.meta.name, member.meta.uid, port_of(member)
        while True:
            port = port % 65535 + 1
            stored = await registry.update_status(Kind.PEER, name, report_at(member, port), uid=uid)
            os.write(1, f"{seed} {port} {stored.meta.revision}\n".encode())

    members = (await registry.list(Kind.PEER)).resources
    async with asyncio.TaskGroup() as writers:
        for seed, member in enumerate(members, start=1):
            assert isinstance(member, Peer)
            writers.create_task(writer(seed, member))


if __name__ == "__main__":
    asyncio.run(write_for_ever(Path(sys.argv[1])))
