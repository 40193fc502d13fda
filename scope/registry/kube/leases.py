"""Heartbeats as Leases: one for each Node, renewed by its agent, and for each peer of the gateway, by that.

A thousand Leases renewed every minute are seventeen writes a second that nobody is told of. Whoever wants to
know lists them now and then from the API server's cache; they are never watched. A Lease that a list lacks
is a silent one, no more.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from scope.registry.kube.client import APPLY, KubeClient
from scope.registry.kube.objects import (
    AGENT,
    LEASE_SECONDS,
    lease,
    lease_path,
    leases_path,
    peers_of_lease,
)
from scope.registry.port import RegistryError
from scope.resources import parse_time

log = logging.getLogger(__name__)

LIST_SECONDS = 30.0  # a sixth of what a heartbeat is good for
PAGE = 500
# Two meshes on one Node beat by themselves; the second beat within so many seconds is the first one.
RENEWED_SECONDS = 30.0


class Leases:
    """The Leases of one namespace. `now` is monotonic, `wall` the wall clock."""

    def __init__(
        self,
        client: KubeClient,
        namespace: str,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._now = now
        self._wall = wall
        self._owners: dict[str, dict[str, str]] = {}  # Lease -> name -> uid of the peers that beat here
        self._renewed: dict[str, float] = {}
        # Lease and peer -> time of renewal as written, when we saw it
        self._heard: dict[tuple[str, str], tuple[str, float]] = {}

    async def renew(self, name: str, *, peer: str, uid: str) -> None:
        """The Lease `name` says that its ScopePeer `peer` is alive. Raises RegistryError."""
        owners = self._owners.setdefault(name, {})
        now = self._now()
        if owners.get(peer) == uid and now - self._renewed.get(name, float("-inf")) < RENEWED_SECONDS:
            return
        owners[peer] = uid
        await self._client.ask(
            "PATCH",
            lease_path(name, self._namespace),
            query={"fieldManager": AGENT, "force": "true"},
            body=lease(name, namespace=self._namespace, owners=owners, wall=self._wall()),
            content_type=APPLY,
        )
        self._renewed[name] = now

    def forget(self, name: str, *, peer: str) -> None:
        """`peer` beats no more: the Lease `name` is no longer its own, from the next renewal on."""
        self._owners.get(name, {}).pop(peer, None)

    async def listen(self) -> None:
        """List all Leases again and again, until cancelled; what fails is tried again at the next time."""
        while True:
            try:
                await self.hear()
            except RegistryError as error:
                log.warning("leases.unheard error=%s", error)
            await asyncio.sleep(LIST_SECONDS * random.uniform(0.9, 1.1))  # noqa: S311 - jitter

    async def hear(self) -> None:
        """List all Leases once, from the API server's cache. Raises RegistryError."""
        now, wall = self._now(), self._wall()
        heard = {key: beat for key, beat in self._heard.items() if now - beat[1] < LEASE_SECONDS}
        query = {"limit": str(PAGE), "resourceVersion": "0"}
        while True:
            page = await self._client.ask("GET", leases_path(self._namespace), query=query)
            for item in page.get("items", ()):
                name, peers, renewed = peers_of_lease(item)
                for peer in peers:
                    heard[name, peer] = self._aged((name, peer), renewed, now=now, wall=wall)
            token = page.get("metadata", {}).get("continue")
            if not token:
                break
            query = {"limit": str(PAGE), "continue": token}
        self._heard = heard

    def _aged(self, key: tuple[str, str], renewed: str, *, now: float, wall: float) -> tuple[str, float]:
        """When a Lease was renewed, by our clock: agents' clocks differ, so a change is what counts."""
        before = self._heard.get(key)
        if before is not None:
            return before if before[0] == renewed else (renewed, now)
        try:
            age = max(0.0, wall - parse_time(renewed))
        except ValueError:
            age = float("inf")
        return renewed, now - age

    def beats(self) -> dict[tuple[str, str], float]:
        """Seconds since the last renewal, by the names of the Lease and of a ScopePeer that it names.

        Whether it may speak for that one is for `speaks_for`.
        """
        now = self._now()
        return {key: now - at for key, (_, at) in self._heard.items()}
