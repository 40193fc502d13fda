"""Heartbeats as Leases: one for each Node, or peer without one, renewed by its agent, listed, never watched.

A thousand Leases renewed every minute are seventeen writes a second that nobody is told of. Whoever wants to
know lists them now and then from the API server's cache.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from scope.registry.kube.client import APPLY, KubeClient
from scope.registry.kube.objects import AGENT, lease, lease_path, leases_path, peers_of_lease
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
        self._owners: dict[str, dict[str, str]] = {}  # holder -> name -> uid of the peers that beat here
        self._renewed: dict[str, float] = {}
        self._heard: dict[str, tuple[str, float]] = {}  # peer -> time of renewal as written, when we saw it

    async def renew(self, holder: str, *, peer: str, uid: str) -> None:
        """The agent of `holder` is alive, a Node or a peer without one, and so is its ScopePeer `peer`.

        Raises RegistryError.
        """
        owners = self._owners.setdefault(holder, {})
        now = self._now()
        if owners.get(peer) == uid and now - self._renewed.get(holder, float("-inf")) < RENEWED_SECONDS:
            return
        owners[peer] = uid
        await self._client.ask(
            "PATCH",
            lease_path(holder, self._namespace),
            query={"fieldManager": AGENT, "force": "true"},
            body=lease(holder, namespace=self._namespace, owners=owners, wall=self._wall()),
            content_type=APPLY,
        )
        self._renewed[holder] = now

    def forget(self, holder: str, *, peer: str) -> None:
        """`peer` beats no more: the Lease is no longer its own, from the next renewal on."""
        self._owners.get(holder, {}).pop(peer, None)

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
        heard: dict[str, tuple[str, float]] = {}
        query = {"limit": str(PAGE), "resourceVersion": "0"}
        while True:
            page = await self._client.ask("GET", leases_path(self._namespace), query=query)
            for item in page.get("items", ()):
                names, renewed = peers_of_lease(item)
                for name in names:
                    heard[name] = self._aged(name, renewed, now=now, wall=wall)
            token = page.get("metadata", {}).get("continue")
            if not token:
                break
            query = {"limit": str(PAGE), "continue": token}
        self._heard = heard

    def _aged(self, name: str, renewed: str, *, now: float, wall: float) -> tuple[str, float]:
        """When a Lease was renewed, by our clock: agents' clocks differ, so a change is what counts."""
        before = self._heard.get(name)
        if before is not None:
            return before if before[0] == renewed else (renewed, now)
        try:
            age = max(0.0, wall - parse_time(renewed))
        except ValueError:
            age = float("inf")
        return renewed, now - age

    def ages(self) -> dict[str, float]:
        """Seconds since the last renewal of every ScopePeer that has a Lease, by name."""
        now = self._now()
        return {name: now - at for name, (_, at) in self._heard.items()}
