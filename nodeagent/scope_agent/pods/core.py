"""When what leads to pods of other clusters is to be made, changed or undone. Pure.

It follows the snapshot: our own prefixes, those of others, the device's MTU. One application is under way at
a time; one that failed is tried again after a while.
"""

from __future__ import annotations

from operator import is_
from typing import Final

from scope.model import PeerSpec, PodNetworking, Snapshot, Translation
from scope.topology import Topology
from scope_agent.pods.rules import PodNetwork

AGAIN: Final = 5.0  # seconds after an application that failed


class Pods:
    """The pods room. `left`: an earlier run may have left something."""

    def __init__(self, *, left: bool) -> None:
        self._known: tuple[object, ...] = (None,) * 5  # what `configure` took last
        self._wanted: PodNetwork | None = None
        self._asked: PodNetwork | None = None  # last
        self._is_known = not left
        self._is_decided = False  # before that an earlier run's is left alone
        self._is_busy = False
        self._after: float | None = None  # when to try again
        self._error = ""
        self._seen = ""
        self._unplugged = ""

    @property
    def trouble(self) -> str:
        """What stands against it, in words."""
        seen = self._error or (self._seen if self._wanted is not None else "")
        return "; ".join(filter(None, (self._unplugged, seen)))

    def configure(self, snapshot: Snapshot, settled: Topology, *, mtu: int | None, is_removed: bool) -> None:
        """Take what is so. `mtu` is of the device as it is, None where nothing can be led into it."""
        mesh, own = snapshot.mesh, snapshot.own
        before, self._known = self._known, (mesh, own, settled, mtu, is_removed)
        if mesh is None or own is None or all(map(is_, before, self._known)):
            return
        is_off = is_removed or mesh.spec.pod_networking is PodNetworking.OFF
        if is_off:
            self._wanted = None
        elif mtu is not None:
            offered = frozenset(each.prefix for each in own.spec.pod_prefixes)
            is_nothing = not offered and not settled.pods
            network = PodNetwork(offered, settled.pods, mtu, settled.beside, _translated(own.spec))
            self._wanted = None if is_nothing else network
        else:
            return
        self._is_decided = True

    def take_apply(self, now: float) -> tuple[PodNetwork | None] | None:
        """What is to be applied now, in a tuple; None: nothing."""
        if not self._is_decided or self._is_busy or (self._after is not None and now < self._after):
            return None
        if self._is_known and self._wanted == self._asked and self._after is None:
            return None
        self._is_known, self._is_busy, self._after = True, True, None
        self._asked = self._wanted
        return (self._asked,)

    def applied(self) -> None:
        """It is so."""
        self._is_busy, self._error = False, ""

    def failed(self, error: str, now: float) -> None:
        """It is not, and is to be tried again."""
        self._is_busy, self._error, self._after = False, error, now + AGAIN

    def seen(self, trouble: str, *, unplugged: str) -> None:
        """Take what a look at the machine found; `unplugged`: why pods have no network of ours."""
        self._seen, self._unplugged = trouble, unplugged

    def get_timer(self) -> float | None:
        """When `take_apply` has something again, as time alone goes by."""
        return self._after


def _translated(spec: PeerSpec) -> frozenset[Translation]:
    return frozenset(
        Translation(each.prefix, each.seen_as) for each in spec.pod_prefixes if each.seen_as is not None
    )
