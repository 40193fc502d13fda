"""Which replica writes: the holder of one Lease.

A replica that sees the Lease unchanged for as long as its holder said takes it; the holder renews it every
`RENEW` seconds, and leaves the process where it could not for `GIVE_UP` seconds, well before anyone else may
take it. A holder that stops hands it back, after its last write, so the next one need not wait. Every change
names the revision that was read, so of two who try one succeeds.

Clocks are not compared: what counts is for how long, by one's own clock, the Lease stood as it does.

With `LASTS` at 10 s and a look a second, a replica takes over within 12 s of its predecessor's sudden death.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from scope.registry.kube.client import KubeClient, Object
from scope.registry.kube.objects import lease_path, leases_path
from scope.registry.port import AlreadyExists, Conflict, NotFound, RegistryError

log = logging.getLogger(__name__)

LASTS = 10.0  # seconds that a Lease is good for after a renewal
RENEW = 2.0  # seconds between renewals
RENEWAL = 3.0  # seconds that one may take: an API server that is overrun by our own writes answers late
AGAIN = 0.2  # seconds between a renewal that failed and the next
GIVE_UP = 7.0  # seconds without one after which the holder stops; its last writes end before `LASTS` is over
LOOK = 1.0  # seconds between looks of who waits: a Lease that is handed back is taken within about so many
ASK = 2.0  # seconds that any other request may take
HAND_BACK = 1.0  # seconds that handing back may take: it is a courtesy


class LeaseLost(Exception):
    """Another replica may write now; this process must not."""


@dataclass(frozen=True, slots=True)
class Record:
    """The Lease as it stands. `holder` "": nobody holds it; `renewed` is RFC 3339, by the holder's clock."""

    holder: str
    renewed: str
    lasts: float
    revision: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A record, and since when it stood so by our clock (monotonic)."""

    record: Record
    since: float


@dataclass(frozen=True, slots=True)
class Take:
    """Make us the holder. Without `over` the Lease is to be created."""

    over: Record | None


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again after so many seconds."""

    seconds: float


def see(record: Record, before: Seen | None, *, now: float) -> Seen:
    """What is known after a look.

    What a restored cluster shows of the same holder is no renewal, but one that was seen long ago.
    """
    if before is None or before.record.holder != record.holder:
        return Seen(record, now)
    was = before.record
    if was.renewed == record.renewed or (was.renewed > record.renewed and was.revision > record.revision):
        return Seen(record, before.since)
    return Seen(record, now)


def decide(seen: Seen | None, *, now: float) -> Take | Wait:
    """What who waits does after a look; `seen` is None where there is no Lease."""
    if seen is None:
        return Take(None)
    record = seen.record
    if not record.holder or now >= seen.since + record.lasts:
        return Take(record)
    return Wait(min(LOOK, seen.since + record.lasts - now))


def is_lost(*, renewed_at: float, now: float) -> bool:
    """Whether a holder that renewed at `renewed_at` for the last time must stop."""
    return now >= renewed_at + GIVE_UP


Work: TypeAlias = Callable[[], Awaitable[None]]


class Election:
    """One replica's part in it. `identity` is of this process alone; `now` is monotonic, `wall` for people.

    `newest` is the newest revision of the cluster that is known here. Where a write gets an older one than
    was known when it was asked for, the cluster was restored: `restored` is told both.
    """

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str,
        name: str,
        identity: str,
        now: Callable[[], float],
        wall: Callable[[], float],
        newest: Callable[[], int] = lambda: 0,
        restored: Callable[[int, int], None] = lambda _revision, _newest: None,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._now = now
        self._wall = wall
        self._newest = newest
        self._restored = restored
        self._transitions = 0
        self._record: Record | None = None
        self._renewed_at = 0.0
        self.is_leader = False

    async def lead(self, work: Work) -> None:
        """Wait for the Lease, then do `work` while it is ours; hand it back when cancelled.

        Raises LeaseLost, and what `work` raises.
        """
        await self._acquire()
        self.is_leader = True
        log.info("leader.elected identity=%s", self._identity)
        working = asyncio.ensure_future(work())
        renewing = asyncio.ensure_future(self._renew())
        lost = False
        try:
            done, _ = await asyncio.wait((working, renewing), return_when=asyncio.FIRST_COMPLETED)
            lost = renewing in done
            for task in done:
                task.result()
        finally:
            self.is_leader = False
            working.cancel()
            await asyncio.wait((working,))
            renewing.cancel()
            await asyncio.wait((renewing,))
            if not lost:
                await self._hand_back()

    async def _acquire(self) -> None:
        seen: Seen | None = None
        while True:
            wait = LOOK
            try:
                async with asyncio.timeout(ASK):
                    record = await self._read()
                seen = see(record, seen, now=self._now()) if record is not None else None
                match decide(seen, now=self._now()):
                    case Take(over):
                        began = self._now()
                        async with asyncio.timeout(ASK):
                            self._record = await self._write(over, holder=self._identity)
                        self._renewed_at = began
                        return
                    case Wait(wait):
                        pass
            except (AlreadyExists, Conflict):
                log.debug("leader.outrun identity=%s", self._identity)
            except (RegistryError, TimeoutError) as error:
                log.warning("leader.unknown error=%s", str(error) or "the API server did not answer in time")
            await asyncio.sleep(wait)

    async def _renew(self) -> None:
        pause = RENEW
        while True:
            left = self._renewed_at + GIVE_UP - self._now()
            await asyncio.sleep(max(0.0, min(pause, left)))
            pause, began = AGAIN, self._now()
            if is_lost(renewed_at=self._renewed_at, now=began):
                raise LeaseLost(
                    f"the Lease {self._name} could not be renewed for {GIVE_UP:.0f} s: another replica may "
                    "take it, so this one stops"
                )
            try:
                async with asyncio.timeout(min(RENEWAL, self._renewed_at + GIVE_UP - began)):
                    self._record = await self._write(self._record, holder=self._identity)
                self._renewed_at, pause = began, RENEW
            except Conflict:
                await self._require_ours()
            except NotFound:
                raise LeaseLost(f"the Lease {self._name} was deleted, so this replica stops") from None
            except (RegistryError, TimeoutError) as error:
                log.warning(
                    "leader.unrenewed error=%s", str(error) or "the API server did not answer in time"
                )

    async def _require_ours(self) -> None:
        """A renewal whose answer was lost made the revision another: then the Lease is still ours."""
        try:
            async with asyncio.timeout(ASK):
                record = await self._read()
        except (RegistryError, TimeoutError):
            return
        if record is None or record.holder != self._identity:
            raise LeaseLost(f"another replica holds the Lease {self._name} now, so this one stops")
        self._record = record

    async def _hand_back(self) -> None:
        try:
            async with asyncio.timeout(HAND_BACK):
                await self._write(self._record, holder="")
            log.info("leader.handed_back identity=%s", self._identity)
        except (RegistryError, TimeoutError) as error:
            log.warning("leader.kept error=%s", str(error) or "the API server did not answer in time")

    async def _read(self) -> Record | None:
        try:
            answer = await self._client.ask("GET", lease_path(self._name, self._namespace))
        except NotFound:
            return None
        return self._taken(answer)

    async def _write(self, over: Record | None, *, holder: str) -> Record:
        moment = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if over is not None and holder and over.holder != holder:
            self._transitions += 1
        metadata: Object = {"name": self._name, "namespace": self._namespace}
        if over is not None:
            metadata["resourceVersion"] = str(over.revision)
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": int(LASTS),
                "renewTime": moment,
                "leaseTransitions": self._transitions,
            },
        }
        # Of what is asked for meanwhile, the answer to a later write may come first.
        newest = self._newest()
        if over is None:
            answer = await self._client.ask("POST", leases_path(self._namespace), body=body)
        else:
            answer = await self._client.ask("PUT", lease_path(self._name, self._namespace), body=body)
        record = self._taken(answer)
        if record.revision < newest:
            self._restored(record.revision, newest)
        return record

    def _taken(self, document: Object) -> Record:
        metadata, spec = document.get("metadata", {}), document.get("spec", {})
        revision = int(metadata["resourceVersion"])
        self._transitions = int(spec.get("leaseTransitions") or 0)
        return Record(
            holder=str(spec.get("holderIdentity") or ""),
            renewed=str(spec.get("renewTime") or ""),
            lasts=float(spec.get("leaseDurationSeconds") or LASTS),
            revision=revision,
        )
