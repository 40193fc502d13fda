"""The election in a thread, with a loop and a connection of its own, so that a busy leader stays one.

The operator's loop does nothing else while it reads hundreds of resources, and on a machine without a
processor to spare such a while is seconds, in which the Lease would not be renewed. A loop that does not come
round for `STUCK` seconds does no work any more: its process ends, and the other replica takes over.

The work itself is done in the loop that asks. The Lease is handed back after its end, as ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from scope.registry.kube.client import KubeClient
from scope_operator.kube import lease
from scope_operator.kube.lease import Election, Work

log = logging.getLogger(__name__)

STUCK = 30.0  # seconds for one round of a loop: many times what the longest takes on a busy machine


async def lead_apart(election: Election, client: KubeClient, work: Work, *, look: Callable[[], None]) -> None:
    """`election.lead(work)` in a thread, over `client`, which is closed then; `work` is done in this loop.

    `look` is called in this loop every `RENEW` seconds. Raises what `lead` raises.
    """
    here, there = asyncio.get_running_loop(), asyncio.new_event_loop()
    ended: asyncio.Future[None] = here.create_future()

    async def lead() -> None:
        minding = asyncio.create_task(_mind(here, look))
        try:
            async with client:
                await election.lead(partial(_do_in, here, work))
        finally:
            minding.cancel()

    leading = there.create_task(lead())

    def run() -> None:
        try:
            there.run_until_complete(asyncio.wait((leading,)))
        finally:
            there.close()
            here.call_soon_threadsafe(_settle, ended, leading)

    threading.Thread(target=run, name="election", daemon=True).start()
    try:
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        with suppress(RuntimeError):  # it has ended, and its loop is closed
            there.call_soon_threadsafe(leading.cancel)
        await asyncio.wait((ended,))
        raise


async def _do_in(there: asyncio.AbstractEventLoop, work: Work) -> None:
    """Do the work in another loop; cancelled, it returns when the work has ended there."""
    here = asyncio.get_running_loop()
    ended: asyncio.Future[None] = here.create_future()
    tasks: list[asyncio.Future[None]] = []

    def begin() -> None:
        task = asyncio.ensure_future(work())
        task.add_done_callback(lambda done: here.call_soon_threadsafe(_settle, ended, done))
        tasks.append(task)

    def stop() -> None:
        tasks[0].cancel()

    there.call_soon_threadsafe(begin)
    try:
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        there.call_soon_threadsafe(stop)
        await asyncio.wait((ended,))
        raise


async def _mind(there: asyncio.AbstractEventLoop, look: Callable[[], None]) -> None:
    """Have `look` called in another loop again and again, and end the process where that is stuck."""
    here = asyncio.get_running_loop()
    while True:
        came_round = asyncio.Event()

        def come_round(told: Callable[[], None] = came_round.set) -> None:
            look()
            with suppress(RuntimeError):  # the election has ended, and its loop is closed
                here.call_soon_threadsafe(told)

        there.call_soon_threadsafe(come_round)
        try:
            async with asyncio.timeout(STUCK):
                await came_round.wait()
        except TimeoutError:
            log.critical("operator.stuck seconds=%.0f", STUCK)
            os._exit(1)  # nothing else ends a loop that does not come round
        await asyncio.sleep(lease.RENEW)


def _settle(ended: asyncio.Future[None], done: asyncio.Future[None]) -> None:
    """Let `ended` be as `done` is, which is another loop's."""
    if done.cancelled():
        ended.cancel()
    elif (error := done.exception()) is not None:
        ended.set_exception(error)
    else:
        ended.set_result(None)
