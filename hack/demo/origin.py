"""Where members come from: what the story asks of whatever keeps the mesh, and the registry that they join.

The texts are what the story tells of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lab import Lab, Machine
from meshlab import Member, Registry, mesh_document

from demo.cast import HUBS, MESH, ROLES

REGISTRIES = ("embedded", "kubernetes")


class Origin(Protocol):
    """Serves the mesh, and makes machines members of it."""

    served: str  # a sentence, once it serves
    joining: str  # a sentence: what the first members do
    leaving: str  # what a member does
    joins_late: str  # what a newcomer does
    gone_within_s: float  # far above what is seen until nobody knows a member that left

    def serve(self, lab: Lab) -> None:
        """Keep the mesh, ready for members."""

    def join(self, machine: Machine, *, arguments: Sequence[str]) -> Member:
        """Start an agent that becomes a member, with further arguments of its command."""

    def leave(self, member: Member) -> None:
        """Make a member none."""

    def reshape(self, topology: str) -> None:
        """Apply the mesh with this topology, `Full` or `Tree`."""

    def tour(self) -> Sequence[str]:
        """Commands that show what is kept, where `enter HOST COMMAND` runs one in a host."""


class Embedded:
    """`scope-registry`, and one token for everybody."""

    served = "the registry serves on the internet; one token is made, for everybody"
    joining = f"{len(ROLES)} machines run `scope-agent join` at once"
    leaving = "leaves the mesh"
    joins_late = "joins with the same token"
    gone_within_s = 30.0

    def serve(self, lab: Lab) -> None:
        self._registry = Registry(lab.server("registry"))
        self.reshape("Full")
        self._token = self._registry.token(MESH)

    def join(self, machine: Machine, *, arguments: Sequence[str]) -> Member:
        member = Member(machine, mesh=MESH, registry=self._registry)
        member.join(self._token, arguments=arguments)
        return member

    def leave(self, member: Member) -> None:
        member.leave()

    def reshape(self, topology: str) -> None:
        hubs = {"names": [f"{MESH}.external.{name}" for name in HUBS]}
        self._registry.apply(mesh_document(MESH, hubs=hubs, topology=topology))

    def tour(self) -> Sequence[str]:
        return ("enter registry scopectl get peers         # what the registry holds",)


def origin_of(registry: str) -> Origin:
    """The one of that name."""
    if registry == "kubernetes":
        from demo.kubernetes import Kubernetes  # brings an HTTP client, which the other does without

        return Kubernetes()
    return Embedded()
