"""The embedded registry: the Registry port on one SQLite file, for machines without Kubernetes.

The file is the whole registry: its id, its private keys, every resource, and the newest changes, from which
a watcher resumes across a restart. It is mode 0600, and one process at a time holds it.

A `Store` in memory answers every read. A write is planned on the event loop against that store and the
writes before it in the same batch; one thread commits the batch as one transaction (WAL, synchronous=FULL:
on the disk before it is answered), and then the store takes the changes and the callers get their answers.
While a batch is being committed the next one gathers, so a thousand joins cost a few dozen fsyncs. A batch
whose commit fails changes nothing, and each of its callers is told `Unavailable`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from scope import resources
from scope.model import ConfigError, Kind, Resource, Revision, Secret, StatusPart, kind_of
from scope.registry.memory import (
    BACKLOG,
    Change,
    Create,
    Delete,
    Key,
    Signal,
    Store,
    StoreRegistry,
    Update,
    UpdateStatus,
    Write,
    key_of,
)
from scope.registry.port import Deleted, Put, Refused, RegistryError, Unavailable

APPLICATION_ID = 0x53436F70  # "SCop", in the header of the file: tells our databases from other programs'
MAX_BATCH = 256  # writes in one transaction: milliseconds, so that no caller waits for thousands
MAX_WAITING = 4096  # writes that may wait for the disk: what a thousand joins at once make

# One entry per version of the file, oldest first, each a tuple of statements; `user_version` counts them.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE registry (id TEXT NOT NULL, revision INTEGER NOT NULL, signing BLOB NOT NULL, "
        "probe BLOB NOT NULL) STRICT",
        "CREATE TABLE resources (kind TEXT NOT NULL, name TEXT NOT NULL, body TEXT NOT NULL, "
        "PRIMARY KEY (kind, name)) STRICT, WITHOUT ROWID",
        "CREATE TABLE changes (number INTEGER PRIMARY KEY, deleted INTEGER NOT NULL, body TEXT NOT NULL) "
        "STRICT",
    ),
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a registry is: made once, with its file."""

    registry_id: str
    signing: Secret  # 32-byte seed of the Ed25519 key that signs tombstones
    probe: Secret  # 32-byte X25519 private key of its reflector


def open_registry(
    path: Path,
    *,
    wall: Callable[[], float],
    now: Callable[[], float],
    new_uid: Callable[[], str],
    new_identity: Callable[[], Identity] | None = None,
    new_signal: Callable[[], Signal] = asyncio.Event,
    backlog: int = BACKLOG,
) -> SqliteRegistry:
    """Open the registry in the file `path`, bringing an older file to this version.

    A file that is absent is made when `new_identity` is given. Raises ConfigError, having changed nothing,
    when there is none to open, when another process holds it, when it is damaged, of another program or of a
    newer version, when others may read it, or when it cannot be written.
    """
    _prepare_file(path, may_create=new_identity is not None)
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        _hold(database, path)
        _migrate(database, path, new_identity)
        identity, number = _read_identity(database, path)
        store = Store(identity.registry_id, wall=wall, new_uid=new_uid, backlog=backlog)
        _load(database, store, number)
    except (sqlite3.Error, ValueError) as error:
        database.close()
        raise ConfigError(_damaged(path, str(error))) from error
    except ConfigError:
        database.close()
        raise
    return SqliteRegistry(
        database, path, identity=identity, store=store, backlog=backlog, now=now, new_signal=new_signal
    )


class SqliteRegistry(StoreRegistry):
    """The port over one open file; made by `open_registry`. Use it from one event loop, and `close` it."""

    def __init__(
        self,
        database: sqlite3.Connection,
        path: Path,
        *,
        identity: Identity,
        store: Store,
        backlog: int,
        now: Callable[[], float],
        new_signal: Callable[[], Signal],
    ) -> None:
        super().__init__(store, now=now, new_signal=new_signal)
        self.identity = identity
        self._database = database
        self._path = path
        self._backlog = backlog
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scope-sqlite")
        self._waiting: list[tuple[Write, asyncio.Future[Resource]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._open = True

    async def create(self, resource: Resource) -> Resource:
        """Store a new resource, its status included. Raises AlreadyExists, Unavailable."""
        return await self._write(Create(resource))

    async def update(self, resource: Resource, *, if_revision: int | None = None) -> Resource:
        """Replace the spec. Raises NotFound, Conflict, Unavailable."""
        return await self._write(Update(resource, if_revision))

    async def update_status(
        self, kind: Kind, name: str, part: StatusPart, *, uid: str, if_revision: int | None = None
    ) -> Resource:
        """Replace one writer's part of the status. Raises NotFound, Conflict, Refused, Unavailable."""
        return await self._write(UpdateStatus(kind, name, part, uid, if_revision))

    async def delete(self, kind: Kind, name: str, *, uid: str) -> None:
        """Remove a resource. Raises NotFound, Conflict, Unavailable."""
        await self._write(Delete(kind, name, uid))

    async def close(self) -> None:
        """Commit what waits, end every watch, and let go of the file."""
        self._open = False
        if self._writer is not None:
            await self._writer
        self.close_watches()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
        self._thread.shutdown()

    async def _write(self, write: Write) -> Resource:
        if not self._open:
            raise Unavailable(f"the registry in {self._path} is closed: start it again")
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable(f"{MAX_WAITING} writes wait for the disk of {self._path}: ask again later")
        readable = _canonical(write)
        answer: asyncio.Future[Resource] = asyncio.get_running_loop().create_future()
        self._waiting.append((readable, answer))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_batches())
        return await answer

    async def _write_batches(self) -> None:
        try:
            while self._waiting:
                batch = self._waiting[:MAX_BATCH]
                del self._waiting[:MAX_BATCH]
                await self._write_batch(batch)
        finally:
            self._writer = None

    async def _write_batch(self, batch: Sequence[tuple[Write, asyncio.Future[Resource]]]) -> None:
        changes, outcomes = self._plan([write for write, _ in batch])
        try:
            if changes:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._thread, self._commit, changes)
        except sqlite3.Error as error:
            outcomes = [Unavailable(_unwritable(self._path, error))] * len(batch)
        except BaseException as error:
            for _, answer in batch:
                _settle(answer, Unavailable(f"the registry failed to write {self._path}: {error!r}"))
            raise
        else:
            for change in changes:
                self.store.apply(change)
        for (_, answer), outcome in zip(batch, outcomes, strict=True):
            _settle(answer, outcome)

    def _plan(self, writes: Sequence[Write]) -> tuple[list[Change], list[Resource | RegistryError]]:
        """The changes of a batch, and each write's answer once they are on the disk."""
        staged: dict[Key, Resource | None] = {}
        changes: list[Change] = []
        outcomes: list[Resource | RegistryError] = []
        for write in writes:
            key = key_of(write)
            stored = staged[key] if key in staged else self.store.find(*key)
            try:
                change = self.store.plan(write, stored, number=self.store.number + len(changes) + 1)
            except RegistryError as error:
                outcomes.append(error)
                continue
            match change:
                case None:
                    assert stored is not None  # a creation is always a change  # noqa: S101
                    outcomes.append(stored)
                    continue
                case Put(resource):
                    staged[key] = resource
                    outcomes.append(resource)
                case Deleted(last):
                    staged[key] = None
                    outcomes.append(last)
            changes.append(change)
        return changes, outcomes

    def _commit(self, changes: Sequence[Change]) -> None:
        """Write a batch as one transaction, in the writer's thread. Raises sqlite3.Error, nothing changed."""
        run = self._database.execute
        run("BEGIN IMMEDIATE")
        try:
            for change in changes:
                match change:
                    case Put(resource, revision):
                        body = _body(resource)
                        run(
                            "INSERT OR REPLACE INTO resources VALUES (?, ?, ?)",
                            (kind_of(resource), resource.meta.name, body),
                        )
                        run("INSERT INTO changes VALUES (?, 0, ?)", (revision.number, body))
                    case Deleted(last, revision):
                        run(
                            "DELETE FROM resources WHERE kind = ? AND name = ?",
                            (kind_of(last), last.meta.name),
                        )
                        run("INSERT INTO changes VALUES (?, 1, ?)", (revision.number, _body(last)))
            newest = changes[-1].revision.number
            run("DELETE FROM changes WHERE number <= ?", (newest - self._backlog,))
            run("UPDATE registry SET revision = ?", (newest,))
            run("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                run("ROLLBACK")
            raise


def _canonical(write: Write) -> Write:
    """The write with its values as the file gives them back: a restart changes nothing. Raises Refused."""
    try:
        match write:
            case Create(resource):
                return Create(resources.parse(resources.to_dict(resource)))
            case Update(resource, if_revision):
                return Update(resources.parse(resources.to_dict(resource)), if_revision)
            case UpdateStatus(kind=kind, part=part):
                written = resources.status_to_dict(part)
                return replace(write, part=resources.parse_status(kind, written))
            case Delete():
                return write
    except resources.InvalidResource as error:
        raise Refused(f"{key_of(write)[0]} {key_of(write)[1]!r} is not valid: {error}") from error


def _settle(answer: asyncio.Future[Resource], outcome: Resource | RegistryError) -> None:
    if answer.done():  # its caller was cancelled
        return
    if isinstance(outcome, RegistryError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


# --- opening ------------------------------------------------------------------------------------------------


def _prepare_file(path: Path, *, may_create: bool) -> None:
    """See that the file is there and that nobody else may read it; its secrets are never in an open file."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        if not may_create:
            raise ConfigError(f"there is no registry at {path}: `scope-registry serve` makes one") from None
        _create_file(path)
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path}: {error.strerror}: check its directory") from error
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is not a regular file: name the registry's database itself")
    if found.st_mode & 0o077:
        raise ConfigError(f"{path} holds private keys and others may read it: `chmod 600 {path}`")


def _create_file(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(
            f"cannot make {path}: {error.strerror}: make its directory, owned by whoever runs the registry"
        ) from error


def _hold(database: sqlite3.Connection, path: Path) -> None:
    """Take the file for this process alone, and see that it is sound and can be written."""
    run = database.execute
    run("PRAGMA locking_mode = EXCLUSIVE")
    try:
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("BEGIN IMMEDIATE")
        run("ROLLBACK")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise ConfigError(
                f"{path} is held by another process: one `scope-registry serve` runs on a file, stop it"
            ) from error
        raise ConfigError(_unwritable(path, error)) from error
    application = run("PRAGMA application_id").fetchone()[0]
    if application not in (0, APPLICATION_ID) or (application == 0 and _tables(database)):
        raise ConfigError(f"{path} is a database of another program: name the registry's own file")
    (verdict,) = run("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise ConfigError(_damaged(path, verdict.replace("\n", " ")))


def _tables(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])


def _migrate(database: sqlite3.Connection, path: Path, new_identity: Callable[[], Identity] | None) -> None:
    """Apply the migrations that the file lacks, each whole or not at all; a new file gets its identity."""
    run = database.execute
    version = int(run("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"{path} has version {version} and this program knows {len(MIGRATIONS)}: a newer scope-registry "
            "wrote it; install that one again, or restore the copy made before the upgrade"
        )
    if version == 0 and new_identity is None:
        raise ConfigError(f"{path} is empty: remove it, and `scope-registry serve` makes a registry")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        run("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                run(statement)
            if number == 1 and new_identity is not None:
                made = new_identity()
                run(
                    "INSERT INTO registry VALUES (?, 0, ?, ?)",
                    (made.registry_id, made.signing.raw, made.probe.raw),
                )
                run(f"PRAGMA application_id = {APPLICATION_ID}")
            run(f"PRAGMA user_version = {number}")
            run("COMMIT")
        except BaseException:
            if database.in_transaction:
                run("ROLLBACK")
            raise


def _read_identity(database: sqlite3.Connection, path: Path) -> tuple[Identity, int]:
    rows = database.execute("SELECT id, revision, signing, probe FROM registry").fetchall()
    if len(rows) != 1:
        raise ConfigError(_damaged(path, f"{len(rows)} identities instead of one"))
    registry_id, number, signing, probe = rows[0]
    return Identity(registry_id, Secret(signing), Secret(probe)), number


def _load(database: sqlite3.Connection, store: Store, number: int) -> None:
    """Fill the store. Raises ValueError for a body that cannot be read."""
    # The newest change of a resource has the very body that is stored, and reading one is what takes time.
    read: dict[str, Resource] = {}
    for (body,) in database.execute("SELECT body FROM resources"):
        read[body] = _resource(body)
    stored = list(read.values())
    stored.sort(key=lambda resource: (resource.meta.created, resource.meta.name))
    changes: list[Change] = []
    for at, deleted, body in database.execute("SELECT number, deleted, body FROM changes ORDER BY number"):
        resource, revision = read.get(body) or _resource(body), Revision(store.registry_id, at)
        changes.append(Deleted(resource, revision) if deleted else Put(resource, revision))
    numbers = [change.revision.number for change in changes]
    if numbers != list(range(number - len(numbers) + 1, number + 1)):
        raise ValueError(f"the changes kept do not end at revision {number}")
    store.restore(stored, changes, number=number)


def _body(resource: Resource) -> str:
    return json.dumps(resources.to_dict(resource), separators=(",", ":"))


def _resource(body: str) -> Resource:
    try:
        return resources.parse(json.loads(body))
    except resources.InvalidResource as error:
        raise ValueError(str(error)) from error


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} cannot be read: {reason}: nothing was changed; restore it from a backup, or keep a copy and "
        "try `sqlite3 FILE .recover`"
    )


def _unwritable(path: Path, error: sqlite3.Error) -> str:
    return (
        f"cannot write {path}: {error}: nothing that was answered is lost; free space on its disk, or make "
        "the file and its directory writable for whoever runs the registry"
    )
