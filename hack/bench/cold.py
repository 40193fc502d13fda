"""A machine comes up again while the registry is gone: its agent knows its mesh from disk alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

from lab import Nat

from bench.agents import PATIENCE_S, POLL_S, REST_S, SAVED_S, BenchError, world
from bench.result import Benchmark, Sample, Target

OTHERS = (Nat.PORT_RESTRICTED, Nat.ADDRESS_RESTRICTED, Nat.FULL_CONE, Nat.CGNAT, Nat.NONE)


def _cold(attempts: int) -> Iterator[Sample]:
    with world() as here:
        rebooted = here.member("rebooted", Nat.PORT_RESTRICTED)
        others = [here.member(f"other-{number}", nat) for number, nat in enumerate(OTHERS, 1)]
        for member in here.members:
            member.join(here.token)
        here.settle()
        flows = [here.flow(rebooted, other) for other in others]
        time.sleep(SAVED_S)
        here.registry.kill()
        for _ in range(attempts):
            rebooted.lose_power()
            for other in others:
                # The pings' answers have nowhere to go, so the others must notice.
                here.flow(other, rebooted)
                if here.await_path(other, rebooted, direct=False) is None:
                    raise BenchError(f"{other.name} did not notice that the machine was gone")
            time.sleep(REST_S)
            for flow in flows:
                here.pinger.restart(flow)
            began = time.monotonic()
            rebooted.run()
            names = {here.addresses[other.name] for other in others}
            direct_at: float | None = None
            while direct_at is None and time.monotonic() - began < PATIENCE_S:
                status = rebooted.status()
                reached = {r.address for r in status.peers.values() if r.is_direct} if status else set()
                direct_at = time.monotonic() if names <= reached else None
                time.sleep(POLL_S)
            answers = [here.await_ping(flow) for flow in flows]
            arrived = [answer for answer in answers if answer is not None]
            whole = direct_at is not None and len(arrived) == len(flows)
            yield max(direct_at or began, *arrived) - began if whole else None
            time.sleep(SAVED_S)


BENCHMARKS = (
    Benchmark(
        "cold-start",
        unit="s",
        what="agent started on a machine without a device, registry gone, to direct to all five peers",
        target=Target(median=1.0),
        attempts=10,
        run=_cold,
    ),
)
