"""What every operator on a cluster is made of, whether its registry is there or elsewhere.

`operate` is the process around it: signals, pages, and one connection to the API server. A `Replica` is its
part in the election, and what it hears of the cluster: kopf watches, and a list of our own finds what kopf
missed, now and then and whenever kopf listed.

An etcd that was restored to an old snapshot counts its revisions from there again, and a watch that was open,
or resumes, waits in silence for a revision of the lost history. Such a cluster shows itself by a list, or a
write of our Lease, that is older than what is known; then everything is listed, and watched anew.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from scope.model import Kind
from scope.registry.follow import backoff
from scope.registry.kube.access import Access
from scope.registry.kube.client import KubeClient
from scope.registry.port import RegistryError, Unavailable
from scope_operator.kube.election_thread import lead_apart
from scope_operator.kube.lease import Election, Work
from scope_operator.kube.report import Report, site
from scope_operator.kube.watching import ServicesHeard, Take, watch
from scope_operator.reconcile import Reconciler

T = TypeVar("T")

log = logging.getLogger(__name__)

LEASE = "scope-operator"
SWEEP_SECONDS = (300.0, 600.0)  # between lists of everything, drawn anew each time, so replicas do not meet
RELIST_SECONDS = 2.0  # what the watch lists of several kinds is followed by one list of ours
HEAD_START = 1.0  # seconds in which a replica that is alone is elected, and lists what it writes from
REWATCH_SECONDS = 1.0  # between a watch that failed and the next


async def operate(
    access: Access,
    *,
    cluster: str,
    metrics_address: str,
    metrics_port: int,
    run: Callable[[KubeClient, Report], Awaitable[None]],
) -> None:
    """Do `run` until SIGTERM or SIGINT, then cancel it. Raises ConfigError, and what `run` raises."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    report = Report()
    pages = site(report.application(), host=metrics_address, port=metrics_port)
    async with KubeClient(access) as client, pages as port:
        log.info("operator.serving cluster=%s metrics_port=%d", cluster, port)
        running = asyncio.ensure_future(run(client, report))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((running, stopping), return_when=asyncio.FIRST_COMPLETED)
        await end(running, stopping)
        if not running.cancelled():
            running.result()


async def persist(ask: Callable[[], Awaitable[T]], *, through: type[RegistryError] = Unavailable) -> T:
    """The answer of a server that may be away for a while; errors of class `through` are waited out."""
    failures = 0
    while True:
        try:
            return await ask()
        except through as error:
            failures += 1
            log.warning("cluster.unanswered error=%s", error)
            await asyncio.sleep(backoff(failures, uniform=random.uniform))


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel these, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


class Replica:
    """One process of the operator, in the cluster whose kube-system namespace has the UID `uid`.

    `newest` is the newest revision of that cluster that is known here.
    """

    def __init__(self, access: Access, *, namespace: str, uid: str, newest: Callable[[], int]) -> None:
        self.name = f"{socket.gethostname()}-{secrets.token_hex(4)}"
        self._client = KubeClient(access)  # the election's own
        self._election = Election(
            self._client,
            namespace=namespace,
            name=LEASE,
            identity=self.name,
            now=time.monotonic,
            wall=time.time,
            newest=lambda: self._known,
            restored=self._tell_restored,
        )
        self._access = access
        self._uid = uid
        self._newest = newest
        self._known = 0  # `newest` as the election has it, who is in another thread
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restored = asyncio.Event()
        self._relisted = asyncio.Event()
        self._listing = asyncio.Event()

    @property
    def is_leader(self) -> bool:
        """Whether the Lease is ours."""
        return self._election.is_leader

    async def lead(self, work: Work) -> None:
        """Do `work` while elected; the Lease is handed back when cancelled. Raises LeaseLost, as `work`."""
        self._loop = asyncio.get_running_loop()
        await lead_apart(self._election, self._client, work, look=self._look)

    async def hear(
        self,
        reconciler: Reconciler,
        *,
        take: Take | None = None,
        kinds: tuple[Kind, ...] = (Kind.MESH, Kind.PEER),
        services: ServicesHeard | None = None,
    ) -> None:
        """Tell `reconciler` of Nodes and `kinds`, until cancelled; `take` is told of changes in its place.
        `services` hears of Services.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(reconciler, take or reconciler.take, kinds, services))
            tasks.create_task(self._sweep(reconciler))

    async def list_all(self, reconciler: Reconciler) -> None:
        """Let `reconciler` list everything, however long it takes until that is answered."""
        self._listing.set()
        before = self._newest()
        await persist(reconciler.list_all, through=RegistryError)
        self._look()
        if (revision := self._newest()) < before:
            self._note_restored(revision, before)

    async def _watch(
        self,
        reconciler: Reconciler,
        take: Take,
        kinds: tuple[Kind, ...],
        services: ServicesHeard | None,
    ) -> None:
        while True:
            watching = asyncio.create_task(
                watch(
                    self._access,
                    registry_id=self._uid,
                    take=take,
                    relisted=self._relisted.set,
                    kinds=kinds,
                    known=reconciler.peer,
                    services=services,
                )
            )
            restored = asyncio.create_task(self._restored.wait())
            try:
                await asyncio.wait((watching, restored), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end(watching, restored)
            if not self._restored.is_set():
                error = None if watching.cancelled() else watching.exception()
                log.warning("watch.ended reason=%r", error)
                await asyncio.sleep(REWATCH_SECONDS)
            await self.list_all(reconciler)
            if services is not None:
                services.relist()
            self._restored.clear()

    async def _sweep(self, reconciler: Reconciler) -> None:
        """List everything now and then, and after the watch did: what it missed is found."""
        with suppress(TimeoutError):  # who is elected at once lists by itself
            async with asyncio.timeout(0.0 if self.is_leader else HEAD_START):
                await self._listing.wait()
        if not self._listing.is_set():
            await self.list_all(reconciler)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(*SWEEP_SECONDS)):  # noqa: S311 - jitter
                    await self._relisted.wait()
                    await asyncio.sleep(RELIST_SECONDS)
            self._relisted.clear()
            await self.list_all(reconciler)

    def _look(self) -> None:
        self._known = self._newest()

    def _tell_restored(self, revision: int, before: int) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._note_restored, revision, before)

    def _note_restored(self, revision: int, before: int) -> None:
        log.warning("cluster.restored revision=%d before=%d", revision, before)
        self._restored.set()
