"""The operator as a program whose time runs ahead, that hears more often, or that dies at a certain write.

altered_operator.py ahead SECONDS -- OPTIONS        its wall clock is; who is silent is offline after 1 s
altered_operator.py hears SECONDS -- OPTIONS        it lists heartbeats that often
altered_operator.py dies before|after N -- OPTIONS  it kills itself around its Nth write that is no Lease's
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from scope_operator import reconcile
from scope_operator.kube import __main__ as program
from scope_operator.plan import planner

from scope.registry.kube import leases
from scope.registry.kube.client import KubeClient


def run_ahead(seconds: float) -> None:
    """Let the operator live in the future, and believe silence soon."""
    now = time.time
    patch.multiple(planner, ALIVE=1.0).start()
    patch.multiple(reconcile, SWEEP_INTERVAL=1.0, HEAR_INTERVAL=0.5).start()
    patch("time.time", lambda: now() + seconds).start()


def die(at: int, *, after: bool) -> None:
    """Kill this process before, or after, its `at`th write; it does one at a time."""
    patch.multiple(planner, MAX_IN_FLIGHT=1).start()
    asked = KubeClient.ask
    count = 0

    async def ask(self: KubeClient, method: str, path: str, **options: Any) -> Mapping[str, Any]:
        nonlocal count
        writes = method != "GET" and "/leases" not in path
        count += writes
        if writes and count == at and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = await asked(self, method, path, **options)
        if writes and count >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    KubeClient.ask = ask  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    split = sys.argv.index("--")
    match sys.argv[1:split]:
        case ["ahead", ahead]:
            run_ahead(float(ahead))
        case ["hears", often]:
            patch.multiple(leases, LIST_SECONDS=float(often)).start()
        case ["dies", when, number]:
            die(int(number), after=when == "after")
        case other:
            sys.exit(f"cannot alter by {other}")
    program.main(sys.argv[split + 1 :])
