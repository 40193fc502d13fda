"""A hub's forwarder against plain forwarding by the same machine: the same datagrams, the same way.

Two servers of the lab send through its middle, which forwards their packets as any router does, or relays
them with `scope-forwarder`, in user space. The flood is of full WireGuard datagrams, one by one, as they come
from a wire; that is what the target is about. The table also has them in batches, 44 with one call: through
the lab's virtual cables plain forwarding passes such a batch on in one piece, as no wire would bring it.

Sender, receiver and what is between them share the machine's processors.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lab import Host, Lab
from lab.netns import call_in
from lab.plan import CORE_IPV4, CORE_IPV6
from scope_agent.relay.shell.forwarder import ForwarderProcess

from bench.agents import BenchError
from bench.flood import rate
from bench.processes import memory, pid_behind, processor_time
from bench.result import Benchmark, Row, Sample, Target
from scope.model import PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side
from scope.wire import TOKEN_BYTES

PLAIN_PORT, FIRST_PORT = 5000, 26000
START_S = 20.0


@dataclass(frozen=True, slots=True)
class _Way:
    """A pair of sides: over which IP each speaks, and how many datagrams are sent with one call."""

    sender: int
    receiver: int
    batch: int


WAYS = (_Way(4, 4, 1), _Way(4, 6, 1), _Way(6, 4, 1), _Way(4, 4, 44), _Way(4, 6, 44))


def _ratios(attempts: int) -> Iterator[Sample | Row]:
    with Lab() as lab:
        sender, receiver = lab.server("sender"), lab.server("receiver")
        forwarder = ForwarderProcess(lab.directory / "grants.json")
        granted = tuple(_grant(number) for number in range(len(WAYS)))
        limits = RelayLimits()
        call_in(lab.core, lambda: forwarder.program(Grants(FIRST_PORT, FIRST_PORT + 255, limits, granted)))
        try:
            pid = _serving(forwarder, lab.directory / "grants.sock")
            for way, grant in zip(WAYS, granted, strict=True):
                yield from _measure(
                    way, grant, sender, receiver, forwarder=forwarder, pid=pid, attempts=attempts
                )
        finally:
            forwarder.stop()


def _measure(
    way: _Way,
    grant: Grant,
    sender: Host,
    receiver: Host,
    *,
    forwarder: ForwarderProcess,
    pid: int,
    attempts: int,
) -> Iterator[Sample | Row]:
    """A sample of each attempt where datagrams come one by one; then a row."""
    plain = [_plain(way, sender, receiver)]
    relayed: list[float] = []
    cpu, carried = processor_time(pid), _carried(forwarder)
    for _ in range(attempts):
        relayed.append(_relayed(way, grant, sender, receiver))
        plain.append(_plain(way, sender, receiver))
        if way.batch == 1:
            # Plain forwarding before and after: what drifts with the machine drifts out.
            yield relayed[-1] / fmean(plain[-2:])
    gigabits = (_carried(forwarder) - carried) * 8e-9
    yield {
        "sender's IP": way.sender,
        "receiver's IP": way.receiver,
        "datagrams with one call": way.batch,
        "plain (Gbit/s)": fmean(plain) * 8e-9,
        "relayed (Gbit/s)": fmean(relayed) * 8e-9,
        "ratio": fmean(relayed) / fmean(plain),
        "forwarder's processor time (s/Gbit)": (processor_time(pid) - cpu) / gigabits,
        "forwarder's memory (MiB)": memory(pid),
    }


def _plain(way: _Way, sender: Host, receiver: Host) -> float:
    """Bytes a second straight from one to the other, over the receiver's IP."""
    address = str(receiver.ipv4 if way.receiver == 4 else receiver.ipv6)
    end = [address, str(PLAIN_PORT)]
    return rate(sender, receiver, sends=end, receives=end, batch=way.batch)


def _relayed(way: _Way, grant: Grant, sender: Host, receiver: Host) -> float:
    """Bytes a second by way of the forwarder."""
    ends = [
        (str(CORE_IPV4 if version == 4 else CORE_IPV6), str(side.port), side.token.hex())
        for version, side in zip((way.sender, way.receiver), grant.sides, strict=True)
    ]
    return rate(sender, receiver, sends=ends[0], receives=ends[1], batch=way.batch)


def _grant(number: int) -> Grant:
    first, second = (
        Side(
            2 * number + each,
            PublicKey(secrets.token_bytes(32)),
            secrets.token_bytes(TOKEN_BYTES),
            FIRST_PORT + 2 * number + each,
        )
        for each in (1, 2)
    )
    return Grant((first, second), time.time() + 86400.0)


def _serving(forwarder: ForwarderProcess, path: Path) -> int:
    """The forwarder's pid, once it answers."""
    deadline = time.monotonic() + START_S
    while forwarder.counters() is None:
        if time.monotonic() > deadline:
            raise BenchError(f"scope-forwarder did not start; see {path.with_suffix('.log')}")
        time.sleep(0.02)
    return pid_behind(path)


def _carried(forwarder: ForwarderProcess) -> int:
    """Bytes passed on so far."""
    told = forwarder.counters()
    if told is None:
        raise BenchError("scope-forwarder ended")
    return sum(side.bytes for pair in told.pairs for side in pair)


BENCHMARKS = (
    Benchmark(
        "forwarder",
        unit="ratio",
        what="a hub's forwarder in user space, against plain forwarding by the same machine",
        target=Target(median=0.5, more_is_better=True),
        attempts=5,
        run=_ratios,
    ),
)
