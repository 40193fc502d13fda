"""What an agent costs with many peers: memory, and processor while nothing happens.

One real agent with a real WireGuard device; its peers are stand-ins (`stand_ins`) that answer its probes and
hold a WireGuard session each. It starts from a snapshot on disk, with the registry gone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

from lab import Nat
from meshlab import Member
from meshlab.programs import await_line
from scope_agent.inputs import DiskState
from scope_agent.state import Enrolment, StateDir

from bench.agents import MESH, BenchError, spawn, world
from bench.result import Benchmark, Sample, Target
from bench.stand_ins import FIRST_PORT, agent_identity, stand_in_identity
from scope.model import (
    Addressing,
    Assignment,
    Candidate,
    CandidateKind,
    Endpoint,
    Mapping,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Snapshot,
)

PREFIX = IPv4Network("100.80.0.0/16")
AGENT_PORT = 25000
FORMING_S = 900.0  # for the agent to be direct with all
LOOK_S = 5.0  # between two questions while it forms: an answer about ten thousand peers is work too
REST_S = 30.0  # then nothing new is watched closely any more
WINDOW_S = 60.0  # of processor time: three thousand clock ticks a core
MEMORY_S = 10.0  # between two looks at the memory


def _memory(peers: int, attempts: int) -> Iterator[Sample]:
    with _one_among(peers) as pid:
        for _ in range(attempts):
            time.sleep(MEMORY_S)
            yield resident_mib(pid)


def _processor(peers: int, attempts: int) -> Iterator[Sample]:
    with _one_among(peers) as pid:
        for _ in range(attempts):
            began, before = time.monotonic(), _processor_s(pid)
            time.sleep(WINDOW_S)
            yield 100.0 * (_processor_s(pid) - before) / (time.monotonic() - began)


@contextlib.contextmanager
def _one_among(peers: int) -> Iterator[int]:
    """The process of an agent that is direct with so many stand-ins and has come to rest."""
    with world(delay_ms=0.0) as here:
        here.registry.kill()
        crowd = here.lab.site("crowd", nat=Nat.NONE).machine("stand-ins")
        member = here.member("agent", Nat.NONE)
        address = crowd.ipv4
        if address is None:
            raise BenchError("the stand-ins have no address")
        keys = agent_identity().public
        arguments = (str(address), str(peers), str(keys.wireguard), str(keys.probe))
        log = crowd.directory / "stand-ins.log"
        process = spawn(crowd, "bench.stand_ins", *arguments, log=log, path=(Path(__file__).parents[1],))
        await_line(process, log, "ready", within_s=120.0)
        _enrol(member, address, peers)
        member.run()
        _await_direct(member, peers)
        time.sleep(REST_S)
        if member.process is None:
            raise BenchError("the agent was not started")
        yield member.process.pid


def _enrol(member: Member, address: IPv4Address, peers: int) -> None:
    """Write what joining and a minute of membership would have left on the machine's disk."""
    identity = agent_identity()
    mesh = Mesh(Meta(MESH, uid="mesh", revision=1), MeshSpec(Addressing(PREFIX)))
    own = Peer(
        Meta("agent", uid="agent"),
        PeerSpec(MESH),
        PeerReport(keys=identity.public),
        Assignment(addresses=(IPv4Interface(f"{PREFIX[1]}/{PREFIX.prefixlen}"),), online=True),
    )
    others = (_stand_in(number, address) for number in range(peers))
    by_key = {peer.report.keys.wireguard: peer for peer in others if peer.report is not None}
    state = StateDir(MESH, Path("/proc", str(member.machine.holder_pid), "root/var/lib/scope"))
    state.prepare()
    state.save_enrolment(
        Enrolment(
            mesh=MESH,
            device="scope0",
            identity=identity,
            url="https://registry.example:7443",
            pin=bytes(32),
            registry_id="registry",
            registry_key=PublicKey(bytes(32)),
            peer_name="agent",
            peer_uid="agent",
        )
    )
    state.save(DiskState(Snapshot(mesh=mesh, own=own, peers=by_key), listen_port=AGENT_PORT))


def _stand_in(number: int, address: IPv4Address) -> Peer:
    endpoint = Candidate(Endpoint(address, FIRST_PORT + number), CandidateKind.HOST)
    return Peer(
        Meta(f"stand-in-{number}", uid=f"uid-{number}"),
        PeerSpec(MESH),
        # Without a NAT, for nobody calls the agent on their behalf; and not known to be online, or a few
        # would be asked as reflectors too.
        PeerReport(keys=stand_in_identity(number).public, endpoints=(endpoint,), mapping=Mapping.NONE),
        Assignment(addresses=(IPv4Interface(f"{PREFIX[2 + number]}/{PREFIX.prefixlen}"),)),
    )


def _await_direct(member: Member, peers: int) -> None:
    deadline = time.monotonic() + FORMING_S
    direct = 0
    while direct < peers:
        if time.monotonic() > deadline:
            raise BenchError(f"direct with {direct} of {peers} stand-ins after {FORMING_S:.0f} s")
        time.sleep(LOOK_S)
        member.check_alive()
        status = member.status()
        direct = sum(reach.is_direct for reach in status.peers.values()) if status is not None else direct


def resident_mib(pid: int | str) -> float:
    """What a process holds in memory: its id, or `self`."""
    for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Rss":
            return int(value.split()[0]) / 1024
    raise BenchError(f"the kernel does not say how much memory process {pid} holds")


def _processor_s(pid: int) -> float:
    """Seconds on a processor so far, of all its threads, in user space and in the kernel."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


BENCHMARKS = (
    Benchmark(
        "memory-100",
        unit="MiB",
        what="resident memory of an agent with 100 stand-ins",
        target=Target(worst=75.0),
        attempts=3,
        run=lambda attempts: _memory(100, attempts),
    ),
    Benchmark(
        "memory-10000",
        unit="MiB",
        what="resident memory of an agent with 10,000 stand-ins",
        target=Target(worst=150.0),
        attempts=3,
        run=lambda attempts: _memory(10_000, attempts),
    ),
    Benchmark(
        "idle-processor",
        unit="% of a core",
        what="processor time of an idle agent with 1,000 stand-ins",
        target=Target(median=0.5),
        attempts=3,
        run=lambda attempts: _processor(1_000, attempts),
    ),
)
