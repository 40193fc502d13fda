"""What the operator says of itself: Prometheus metrics, and whether it is alive and ready.

/healthz  200 while it hears of the cluster: a watch event or a list of its own in the last `SILENT`
seconds /readyz   200 once everything was listed: then a replica can take over, and its gateway can answer
/metrics  Prometheus' text format
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from scope.model import ConfigError
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    NotFound,
    Refused,
    RegistryError,
)
from scope_operator.plan.planner import (
    CreatePeer,
    DeletePeer,
    RevivePeer,
    Write,
    WriteAssignment,
    WriteMeshStatus,
    WritePeer,
)
from scope_operator.reconcile import Done, ReconcileHealth

# Its own lists come every ten minutes at most: who heard nothing for longer than that is cut off.
SILENT = 900.0  # seconds
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


STARTING = ReconcileHealth(listed=False, event_age=None, queue=0, delayed=0, last_error="", error_age=None)


class Report:
    """The metrics of one process, from its start on; `watch` says whose."""

    def __init__(self) -> None:
        self._health: Callable[[], ReconcileHealth] = lambda: STARTING
        self._is_leader: Callable[[], bool] = lambda: False
        self._registry = CollectorRegistry()
        self._writes = Counter(
            "scope_operator_writes_total",
            "Writes to the API server, by what was written and how it ended.",
            ("kind", "result"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "scope_operator_reconcile_seconds",
            "From a plan to the end of its write.",
            ("kind",),
            buckets=BUCKETS,
            registry=self._registry,
        )
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            (
                "queue_depth",
                "Resources that wait to be planned or written, on the replica that writes.",
                lambda: self._health().queue if self._is_leader() else 0,
            ),
            (
                "delayed",
                "Resources that wait for a time, as meshes do for that of their counts' next write.",
                lambda: self._health().delayed if self._is_leader() else 0,
            ),
            (
                "watch_age_seconds",
                "Since the last watch event or list; NaN before the first.",
                lambda: _age(self._health().event_age),
            ),
            ("leader", "1 on the replica that writes.", lambda: float(self._is_leader())),
            ("ready", "1 once everything was listed.", lambda: float(self._health().listed)),
        )
        for name, text, value in gauges:
            Gauge(f"scope_operator_{name}", text, registry=self._registry).set_function(value)

    def watch(self, *, health: Callable[[], ReconcileHealth], is_leader: Callable[[], bool]) -> None:
        """Tell of this operator from now on."""
        self._health, self._is_leader = health, is_leader

    def tell(self, done: Done) -> None:
        """Count a write."""
        kind = kind_of_write(done.action)
        self._writes.labels(kind, result_of(done.error)).inc()
        self._seconds.labels(kind).observe(done.seconds)

    def application(self) -> web.Application:
        """The three pages."""
        application = web.Application()
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/metrics", self._metrics)
        return application

    async def _healthz(self, _: web.Request) -> web.Response:
        age = self._health().event_age
        if age is not None and age > SILENT:
            return web.Response(status=503, text=f"nothing heard of the cluster for {age:.0f} s\n")
        return web.Response(text="ok\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        health = self._health()
        if not health.listed:
            said = f": {health.last_error}" if health.last_error else ""
            return web.Response(status=503, text=f"not everything is listed yet{said}\n")
        return web.Response(text="ok\n")

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


@asynccontextmanager
async def site(application: web.Application, *, host: str, port: int) -> AsyncIterator[int]:
    """Serve it; gives the port, which the kernel picks for 0. Raises ConfigError."""
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, shutdown_timeout=1.0).start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror}; name another port with "
                "--metrics-port"
            ) from None
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def kind_of_write(action: Write) -> str:
    """The label of a write."""
    match action:
        case WriteAssignment():
            return "assignment"
        case WriteMeshStatus():
            return "mesh_status"
        case WritePeer():
            return "write_peer"
        case CreatePeer():
            return "create_peer"
        case RevivePeer():
            return "revive_peer"
        case DeletePeer():
            return "delete_peer"


def result_of(error: RegistryError | None) -> str:
    """The label of how a write ended."""
    match error:
        case None:
            return "ok"
        case Conflict() | AlreadyExists() | NotFound():
            return "outdated"
        case Refused():
            return "refused"
        case _:
            return "failed"


def _age(age: float | None) -> float:
    return float("nan") if age is None else age
