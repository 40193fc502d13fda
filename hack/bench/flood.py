"""How much of a flood of datagrams arrives: `bench.datagrams` at both ends, for a few seconds."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab import Host

from bench.agents import BenchError, spawn

WARM_S = 1.0  # not counted
SECONDS = 3.0
ENDED_S = 20.0  # for a program to start and end on a busy machine
_HERE = (Path(__file__).parents[1],)


def rate(
    sender: Host, receiver: Host, *, sends: Sequence[str], receives: Sequence[str], batch: int = 1
) -> float:
    """Bytes a second that arrive. `sends` and `receives`: address, port, and a token where that is a hub's.

    `batch` datagrams are made with one call. BenchError where nothing arrives.
    """
    log = receiver.directory / "flood.log"
    log.unlink(missing_ok=True)
    listening = (*receives[:2], str(WARM_S), str(SECONDS), *receives[2:])
    sending = (*sends[:2], str(WARM_S + SECONDS + ENDED_S), str(batch), *sends[2:])
    sink = spawn(receiver, "bench.datagrams", "receive", *listening, log=log, path=_HERE)
    source = spawn(
        sender, "bench.datagrams", "send", *sending, log=sender.directory / "flood.log", path=_HERE
    )
    try:
        sink.wait(WARM_S + SECONDS + ENDED_S)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the flood to {sends[0]} did not end") from None
    finally:
        source.kill()
        source.wait()
    try:
        arrived = float(log.read_text())
    except ValueError:
        raise BenchError(f"the flood to {sends[0]} gave no rate:\n{log.read_text()}") from None
    if not arrived:
        raise BenchError(f"nothing of the flood to {sends[0]} arrived")
    return arrived
