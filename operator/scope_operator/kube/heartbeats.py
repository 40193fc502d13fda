"""Who of a cluster's registry is alive: the ages of its Leases, of those that may speak for whom they name.

An agent writes the whole Lease of its Node, owners included, so it can name any ScopePeer there; only those
of its own Node are made alive by it. What a peer says through the gateway is in a Lease of that peer's own,
which no agent may write.
"""

from __future__ import annotations

from collections.abc import Callable

from scope.model import Peer
from scope.registry.kube.leases import Leases
from scope.registry.kube.objects import speaks_for


class Heartbeats:
    """The Liveness of the registry in the cluster of that name; `peer_of` gives a ScopePeer by its name."""

    def __init__(self, leases: Leases, *, cluster: str, peer_of: Callable[[str], Peer | None]) -> None:
        self._leases = leases
        self._cluster = cluster
        self._peer_of = peer_of

    def seconds_since_heartbeat(self) -> dict[str, float]:
        """Age of the last heartbeat of every peer that has one, by name."""
        ages: dict[str, float] = {}
        for (lease, name), age in self._leases.beats().items():
            peer = self._peer_of(name)
            if peer is not None and speaks_for(lease, peer, cluster=self._cluster):
                ages[name] = min(age, ages.get(name, age))
        return ages
