"""Which role a peer gets: the one that was asked for; `Auto` is an edge, since a hub must be wanted."""

from __future__ import annotations

from scope.model import Role


def assign_role(asked: Role) -> Role:
    """Hub or Edge, for what the peer's spec asks."""
    match asked:
        case Role.HUB:
            return Role.HUB
        case Role.EDGE | Role.AUTO:
            return Role.EDGE
