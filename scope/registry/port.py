"""The Registry port: what every registry can do, whatever stands behind it.

Adapters (memory, SQLite, HTTP, Kubernetes) implement `Registry` and pass one conformance suite. They yield
facts, never a merged view: what an absence means is for the reader to decide.

Errors say whose move is next: `NotFound`, `AlreadyExists`, `Conflict` (read again, then retry), `Refused`
(stop: the request is wrong or not allowed; the message says what to change), `Unavailable` (retry with
backoff).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from scope.model import Kind, Resource, Revision, StatusPart


class RegistryError(Exception):
    """Any failure of a registry; the message is for the person on call."""


class NotFound(RegistryError):
    """No resource of that kind and name."""


class AlreadyExists(RegistryError):
    """A resource of that kind and name exists."""


class Conflict(RegistryError):
    """The resource changed since the revision or uid that the caller named."""


class Refused(RegistryError):
    """The request is malformed or not allowed; asking again does not help."""


class PeerRemoved(Refused):
    """Our own ScopePeer was removed: nothing but a new join brings it back."""


class Unavailable(RegistryError):
    """The registry cannot be reached or cannot write now; ask again later.

    `retry_after` is what it asked for, in seconds; None where it did not say.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Gone(RegistryError):
    """The revision to watch from is no longer kept (or is of another registry): list again."""


@dataclass(frozen=True, slots=True)
class Listed:
    """All resources of a kind at one revision; `complete` is False when anything was left out."""

    kind: Kind
    revision: Revision
    resources: tuple[Resource, ...]
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Put:
    """A resource was created or changed."""

    resource: Resource
    revision: Revision


@dataclass(frozen=True, slots=True)
class Deleted:
    """A resource is gone. `last` is its last state."""

    last: Resource
    revision: Revision


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The adapter lost its registry; what follows once it is back is a Listed."""

    reason: str


Fact: TypeAlias = Listed | Put | Deleted | Disconnected


class Registry(Protocol):
    """Where resources live. All methods raise RegistryError subclasses."""

    async def list(self, kind: Kind) -> Listed:
        """Everything of `kind` at one revision. Raises Unavailable."""
        ...

    async def get(self, kind: Kind, name: str) -> Resource:
        """One resource. Raises NotFound."""
        ...

    def watch(self, kind: Kind, since: Revision) -> AsyncIterator[Put | Deleted]:
        """Changes of `kind` after `since`, in order, each once; ends when the registry closes.

        Raises Gone when `since` is no longer kept, Unavailable when the connection is lost.
        """
        ...

    async def create(self, resource: Resource) -> Resource:
        """Store a new resource; the stored one has uid, revision and creation time. Raises AlreadyExists."""
        ...

    async def update(self, resource: Resource, *, if_revision: int | None = None) -> Resource:
        """Replace the spec of the resource of that kind, name and uid; its status stays.

        `generation` rises when the spec differs; an equal spec writes nothing. Raises NotFound, Conflict (the
        uid is another, or `if_revision` is not the stored revision), Refused (a peer would get another mesh
        or Node).
        """
        ...

    async def update_status(
        self, kind: Kind, name: str, part: StatusPart, *, uid: str, if_revision: int | None = None
    ) -> Resource:
        """Replace one writer's part of the status; the rest stays; an equal part writes nothing.

        Raises NotFound, Conflict as for `update`.
        """
        ...

    async def delete(self, kind: Kind, name: str, *, uid: str) -> None:
        """Remove a resource. Raises NotFound, Conflict when the uid is another."""
        ...

    async def heartbeat(self, name: str) -> None:
        """The peer `name` is alive now. Cheap, not stored durably."""
        ...


class Liveness(Protocol):
    """What a registry that keeps heartbeats in its own process can tell besides."""

    def seconds_since_heartbeat(self) -> dict[str, float]:
        """Age of the last heartbeat of every peer that sent one to this process, by name."""
        ...
