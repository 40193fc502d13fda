"""A registry in memory: the rules of every registry as plain functions, a store without a clock or a loop,
and the asynchronous face of the port over it.

`plan_write` is where the rules of the port stand, once: what a write changes, or whose move is next.
`Store` keeps resources and the newest changes; it is synchronous, so the simulation uses it without an
event loop, and the SQLite registry keeps one as its cache and its backlog. `StoreRegistry` is the reading
half of the port over a Store, and `MemoryRegistry` a whole registry that forgets everything with its
process.

Each change takes the next number of its registry, so changes are contiguous and found by index. A watcher
holds nothing but the number it has seen; one that falls behind the backlog is told `Gone` and lists again,
so a slow reader costs the registry no memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, assert_never

from scope.model import (
    Assignment,
    JoinToken,
    Kind,
    Mesh,
    MeshStatus,
    Peer,
    PeerReport,
    Resource,
    Revision,
    Service,
    StatusPart,
    kind_of,
)
from scope.registry.port import AlreadyExists, Conflict, Deleted, Gone, Listed, NotFound, Put, Refused
from scope.resources import forbidden_changes

# A thousand peers that join at once make about four changes each: who missed all that still resumes.
BACKLOG = 4096

Change: TypeAlias = Put | Deleted
Key: TypeAlias = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class Create:
    """Store `resource`, which is new."""

    resource: Resource


@dataclass(frozen=True, slots=True)
class Update:
    """Replace the spec."""

    resource: Resource
    if_revision: int | None = None


@dataclass(frozen=True, slots=True)
class UpdateStatus:
    """Replace one writer's part of the status."""

    kind: Kind
    name: str
    part: StatusPart
    uid: str
    if_revision: int | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the resource."""

    kind: Kind
    name: str
    uid: str


Write: TypeAlias = Create | Update | UpdateStatus | Delete


def key_of(write: Write) -> Key:
    """Kind and name of the resource that a write is about."""
    match write:
        case Create(resource) | Update(resource):
            return kind_of(resource), resource.meta.name
        case UpdateStatus(kind, name) | Delete(kind, name):
            return kind, name


def plan_write(
    write: Write, stored: Resource | None, *, revision: Revision, wall: float, new_uid: Callable[[], str]
) -> Change | None:
    """What `write` changes, given the resource `stored` under its kind and name; None when nothing.

    The change carries `revision`; `wall` is the time of a creation. Raises as the port says.
    """
    kind, name = key_of(write)
    if isinstance(write, Create):
        if stored is not None:
            raise AlreadyExists(f"{kind} {name!r} exists already: update it, or delete it first")
        meta = replace(
            write.resource.meta, uid=new_uid(), revision=revision.number, generation=1, created=wall
        )
        return Put(replace(write.resource, meta=meta), revision)
    if stored is None:
        raise NotFound(f"there is no {kind} {name!r}")
    match write:
        case Update(resource, if_revision):
            _require(stored, uid=resource.meta.uid, if_revision=if_revision)
            changed = _with_spec(stored, resource)
        case UpdateStatus(part=part, uid=uid, if_revision=if_revision):
            _require(stored, uid=uid, if_revision=if_revision)
            changed = _with_status(stored, part)
        case Delete(uid=uid):
            _require(stored, uid=uid, if_revision=None)
            return Deleted(stored, revision)
        case _:
            assert_never(write)
    if changed == stored:
        return None
    return Put(replace(changed, meta=replace(changed.meta, revision=revision.number)), revision)


def _require(stored: Resource, *, uid: str, if_revision: int | None) -> None:
    kind, meta = kind_of(stored), stored.meta
    if uid != meta.uid:
        raise Conflict(f"{kind} {meta.name!r} has uid {meta.uid}, not {uid!r}: read it again")
    if if_revision is not None and if_revision != meta.revision:
        raise Conflict(
            f"{kind} {meta.name!r} is at revision {meta.revision}, not {if_revision}: read it again"
        )


def _with_spec(stored: Resource, asked: Resource) -> Resource:
    if stored.spec == asked.spec:
        return stored
    problems = forbidden_changes(stored, asked)
    if problems:
        raise Refused("\n".join(map(str, problems)))
    meta = replace(stored.meta, generation=stored.meta.generation + 1)
    match stored, asked:
        case Mesh(), Mesh():
            return replace(stored, meta=meta, spec=asked.spec)
        case Peer(), Peer():
            return replace(stored, meta=meta, spec=asked.spec)
        case Service(), Service():
            return replace(stored, meta=meta, spec=asked.spec)
        case JoinToken(), JoinToken():
            return replace(stored, meta=meta, spec=asked.spec)
    raise AssertionError("stored and asked are of one kind, by their key")


def _with_status(stored: Resource, part: StatusPart) -> Resource:
    match stored, part:
        case Mesh(), MeshStatus():
            return replace(stored, status=part)
        case Peer(), Assignment():
            return replace(stored, assignment=part)
        case Peer(), PeerReport():
            # A Node that was imaged anew has new keys: that it is that Node is for the caller to check.
            if not stored.spec.node_name and stored.report is not None and stored.report.keys != part.keys:
                raise Refused(
                    f"the keys of ScopePeer {stored.meta.name!r} are bound to it: to change them, "
                    "`scope-agent leave` and join anew"
                )
            return replace(stored, report=part)
    raise Refused(f"a {kind_of(stored)} has no status part {type(part).__name__}")


class Store:
    """Resources and the newest changes of one registry, synchronous. Not durable, not thread-safe.

    `number` is the newest change's. `listeners` are called after each change, and must not write.
    """

    def __init__(
        self,
        registry_id: str,
        *,
        wall: Callable[[], float],
        new_uid: Callable[[], str],
        backlog: int = BACKLOG,
    ) -> None:
        self.registry_id = registry_id
        self.number = 0
        self.listeners: set[Callable[[], None]] = set()
        self._wall = wall
        self._new_uid = new_uid
        self._backlog = backlog
        self._resources: dict[Kind, dict[str, Resource]] = {kind: {} for kind in Kind}
        self._changes: list[Change] = []

    @property
    def revision(self) -> Revision:
        """Where this registry is now."""
        return Revision(self.registry_id, self.number)

    def restore(self, resources: Iterable[Resource], changes: Iterable[Change], *, number: int) -> None:
        """Take the state of a registry that ran before: `changes` are its newest, ending at `number`."""
        for resource in resources:
            self._resources[kind_of(resource)][resource.meta.name] = resource
        self._changes = list(changes)
        self.number = number

    def list(self, kind: Kind) -> Listed:
        """Everything of `kind`, in the order of creation."""
        return Listed(kind, self.revision, tuple(self._resources[kind].values()))

    def find(self, kind: Kind, name: str) -> Resource | None:
        """One resource, or None."""
        return self._resources[kind].get(name)

    def get(self, kind: Kind, name: str) -> Resource:
        """One resource. Raises NotFound."""
        resource = self.find(kind, name)
        if resource is None:
            raise NotFound(f"there is no {kind} {name!r}")
        return resource

    def write(self, write: Write) -> Resource:
        """Plan and apply one write. Returns the resource as it stands then (a deleted one: as it was)."""
        change = self.plan(write, self.find(*key_of(write)), number=self.number + 1)
        if change is None:
            return self.get(*key_of(write))
        self.apply(change)
        return change.last if isinstance(change, Deleted) else change.resource

    def plan(self, write: Write, stored: Resource | None, *, number: int) -> Change | None:
        """What `write` would change as the change numbered `number`; nothing is changed yet."""
        return plan_write(
            write,
            stored,
            revision=Revision(self.registry_id, number),
            wall=self._wall(),
            new_uid=self._new_uid,
        )

    def apply(self, change: Change) -> None:
        """Take a planned change, whose number is the next."""
        match change:
            case Put(resource):
                self._resources[kind_of(resource)][resource.meta.name] = resource
            case Deleted(last):
                del self._resources[kind_of(last)][last.meta.name]
        self.number = change.revision.number
        self._changes.append(change)
        if len(self._changes) > 2 * self._backlog:  # half at a time: each cut copies the list
            del self._changes[: -self._backlog]
        for listener in tuple(self.listeners):
            listener()

    def changes_since(self, kind: Kind, since: Revision) -> tuple[Change, ...]:
        """The changes of `kind` after `since`, in order. Raises Gone."""
        if since.registry != self.registry_id:
            raise Gone(
                f"revision {since.number} is of registry {since.registry}, not {self.registry_id}: list again"
            )
        missed = self.number - since.number
        if missed < 0:
            raise Gone(f"revision {since.number} is newer than the newest, {self.number}: list again")
        if missed > min(len(self._changes), self._backlog):
            raise Gone(
                f"revision {since.number} is older than the {self._backlog} changes that are kept: list again"
            )
        newer = self._changes[len(self._changes) - missed :]
        return tuple(change for change in newer if _kind_of_change(change) is kind)


def _kind_of_change(change: Change) -> Kind:
    return kind_of(change.last if isinstance(change, Deleted) else change.resource)


class Signal(Protocol):
    """What a watcher sleeps on; `asyncio.Event` is one."""

    def set(self) -> None:
        """Wake whoever waits."""
        ...

    def clear(self) -> None:
        """Let the next `wait` sleep."""
        ...

    async def wait(self) -> object:
        """Sleep until set."""
        ...


class StoreRegistry:
    """The reading half of the port, and heartbeats, over a Store.

    `now` is a monotonic clock in seconds; `new_signal` makes what a watcher sleeps on (`asyncio.Event`).
    """

    def __init__(self, store: Store, *, now: Callable[[], float], new_signal: Callable[[], Signal]) -> None:
        self.store = store
        self._now = now
        self._new_signal = new_signal
        self._heartbeats: dict[str, float] = {}
        self._closed = False
        self._signals: set[Signal] = set()

    async def list(self, kind: Kind) -> Listed:
        """Everything of `kind` at one revision."""
        return self.store.list(kind)

    async def get(self, kind: Kind, name: str) -> Resource:
        """One resource. Raises NotFound."""
        return self.store.get(kind, name)

    async def watch(self, kind: Kind, since: Revision) -> AsyncIterator[Change]:
        """Changes of `kind` after `since`, in order, each once, until the registry closes. Raises Gone."""
        signal = self._new_signal()
        self.store.listeners.add(signal.set)
        self._signals.add(signal)
        try:
            while not self._closed:
                signal.clear()
                changes = self.store.changes_since(kind, since)
                since = self.store.revision
                for change in changes:
                    yield change
                if since == self.store.revision:
                    await signal.wait()
        finally:
            self.store.listeners.discard(signal.set)
            self._signals.discard(signal)

    async def heartbeat(self, name: str) -> None:
        """The peer `name` is alive now. Raises NotFound."""
        self.store.get(Kind.PEER, name)
        self._heartbeats[name] = self._now()

    def seconds_since_heartbeat(self) -> dict[str, float]:
        """Age of the last heartbeat of every peer that sent one to this process, by name."""
        now = self._now()
        gone = [name for name in self._heartbeats if self.store.find(Kind.PEER, name) is None]
        for name in gone:
            del self._heartbeats[name]
        return {name: now - at for name, at in self._heartbeats.items()}

    def close_watches(self) -> None:
        """End every watch, those to come included."""
        self._closed = True
        for signal in tuple(self._signals):
            signal.set()


class MemoryRegistry(StoreRegistry):
    """A whole registry in memory. `wall` is the wall clock; `new_uid` makes the uid of each new resource."""

    def __init__(
        self,
        registry_id: str,
        *,
        wall: Callable[[], float],
        now: Callable[[], float],
        new_uid: Callable[[], str],
        new_signal: Callable[[], Signal],
        backlog: int = BACKLOG,
    ) -> None:
        store = Store(registry_id, wall=wall, new_uid=new_uid, backlog=backlog)
        super().__init__(store, now=now, new_signal=new_signal)

    async def create(self, resource: Resource) -> Resource:
        """Store a new resource, its status included. Raises AlreadyExists."""
        return self.store.write(Create(resource))

    async def update(self, resource: Resource, *, if_revision: int | None = None) -> Resource:
        """Replace the spec. Raises NotFound, Conflict."""
        return self.store.write(Update(resource, if_revision))

    async def update_status(
        self, kind: Kind, name: str, part: StatusPart, *, uid: str, if_revision: int | None = None
    ) -> Resource:
        """Replace one writer's part of the status. Raises NotFound, Conflict, Refused."""
        return self.store.write(UpdateStatus(kind, name, part, uid, if_revision))

    async def delete(self, kind: Kind, name: str, *, uid: str) -> None:
        """Remove a resource. Raises NotFound, Conflict."""
        self.store.write(Delete(kind, name, uid))
