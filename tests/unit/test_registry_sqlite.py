"""The SQLite registry passes the conformance suite, outlives its process, and says what ails a file."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import pytest
from scope_operator import sqlite as embedded
from scope_operator.sqlite import Identity, SqliteRegistry, open_registry

from scope.model import Assignment, Condition, ConfigError, Kind, Peer, Secret
from scope.registry.memory import Change
from scope.registry.port import Gone, Refused, Registry, Unavailable
from tests.unit.registry_conformance import (
    MESH,
    TOKEN,
    RegistryConformance,
    created,
    peer,
    report,
    resource_of,
    watched,
)

IDENTITY = Identity("registry-1", Secret(b"s" * 32), Secret(b"p" * 32))


def opened(path: Path, *, backlog: int = 64, make: bool = True) -> SqliteRegistry:
    numbers = itertools.count(1)
    return open_registry(
        path,
        wall=lambda: 1_700_000_000.0,
        now=lambda: 5.0,
        new_uid=lambda: f"uid-{os.urandom(8).hex()}-{next(numbers)}",
        new_identity=(lambda: IDENTITY) if make else None,
        backlog=backlog,
    )


@asynccontextmanager
async def running(path: Path, *, backlog: int = 64) -> AsyncIterator[SqliteRegistry]:
    registry = opened(path, backlog=backlog)
    try:
        yield registry
    finally:
        await registry.close()


def asked(path: Path, statement: str) -> list[tuple[object, ...]]:
    """What another program sees in the file, or does to it, while no registry runs on it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        return database.execute(statement).fetchall()


class TestSqliteRegistry(RegistryConformance):
    @asynccontextmanager
    async def opened(self, *, backlog: int) -> AsyncIterator[Registry]:
        with tempfile.TemporaryDirectory() as directory:
            async with running(Path(directory) / "registry.db", backlog=backlog) as registry:
                yield registry


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db") as registry:
            await created(registry, MESH)
            await created(registry, TOKEN)
            member = await created(registry, peer(1))
            gone = await created(registry, peer(2))
            await registry.update_status(Kind.PEER, member.meta.name, report(1, port=9), uid=member.meta.uid)
            await registry.delete(Kind.PEER, gone.meta.name, uid=gone.meta.uid)
            before = [await registry.list(kind) for kind in Kind]
        async with running(tmp_path / "r.db") as registry:
            assert [await registry.list(kind) for kind in Kind] == before
            assert registry.identity == IDENTITY
            later = await created(registry, peer(3))
            assert later.meta.revision == before[0].revision.number + 1

    asyncio.run(body())


def test_a_watch_resumes_over_a_restart_within_the_backlog_and_not_beyond_it(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db", backlog=4) as registry:
            await created(registry, MESH)
            start = (await registry.list(Kind.PEER)).revision
            made = [await created(registry, peer(seed)) for seed in range(1, 5)]
            await registry.delete(Kind.PEER, made[0].meta.name, uid=made[0].meta.uid)
            live = await watched(registry, replace(start, number=start.number + 1), count=4)
        async with running(tmp_path / "r.db", backlog=4) as registry:
            again = await watched(registry, replace(start, number=start.number + 1), count=4)
            assert again == live
            assert [resource_of(fact) for fact in again] == [*made[1:], made[0]]
            with pytest.raises(Gone):
                await watched(registry, start, count=1)

    asyncio.run(body())


def test_the_backlog_on_disk_is_bounded(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db", backlog=8) as registry:
            await created(registry, MESH)
            member = await created(registry, peer(1))
            for port in range(1, 60):
                await registry.update_status(
                    Kind.PEER, member.meta.name, report(1, port=port), uid=member.meta.uid
                )

    asyncio.run(body())
    assert asked(tmp_path / "r.db", "SELECT count(*) FROM changes") == [(8,)]


def test_writes_that_wait_together_are_one_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db") as registry:
            await created(registry, MESH)
            commits: list[int] = []
            commit = registry._commit

            def counted(changes: Sequence[Change]) -> None:
                commits.append(len(changes))
                commit(changes)

            monkeypatch.setattr(registry, "_commit", counted)
            made = await asyncio.gather(*(created(registry, peer(seed)) for seed in range(1, 101)))
            assert sum(commits) == 100
            assert len(commits) <= 3
            assert sorted(each.meta.revision for each in made) == list(range(2, 102))

    asyncio.run(body())


def test_a_full_disk_refuses_the_write_loses_nothing_and_heals(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db") as registry:
            await created(registry, MESH)
            first = await created(registry, peer(1))
            (pages,) = registry._database.execute("PRAGMA page_count").fetchone()
            registry._database.execute(f"PRAGMA max_page_count = {pages}")
            made: list[Peer] = []
            refused: Unavailable | None = None
            for seed in range(2, 200):
                try:
                    made.append(await created(registry, peer(seed)))
                except Unavailable as error:
                    refused = error
                    break
            assert re.search(r"r\.db.*full.*free space", str(refused))
            assert (await registry.list(Kind.PEER)).resources == (first, *made)
            registry._database.execute("PRAGMA max_page_count = 1000000")
            made.append(await created(registry, peer(900)))
        async with running(tmp_path / "r.db") as registry:
            assert set((await registry.list(Kind.PEER)).resources) == {first, *made}

    asyncio.run(body())


def test_a_second_process_is_told_that_the_file_is_held(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    script = (
        "import sys, pathlib, time\n"
        "from scope_operator.sqlite import open_registry\n"
        "from scope.model import ConfigError\n"
        "try:\n"
        f"    open_registry(pathlib.Path({str(path)!r}), wall=time.time, now=time.monotonic, new_uid=str)\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )

    async def body() -> str:
        async with running(path) as registry:
            await created(registry, MESH)
            with pytest.raises(ConfigError, match="held by another process"):
                opened(path)
            done = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", script], capture_output=True, text=True, check=True
            )
            await created(registry, peer(1))
            return done.stdout

    said = asyncio.run(body())
    assert str(path) in said
    assert "held by another process" in said


def test_a_file_that_is_absent_is_made_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no registry at"):
        opened(tmp_path / "r.db", make=False)
    assert not (tmp_path / "r.db").exists()


def test_a_directory_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot make .*absent/r\.db: No such file.*make its directory"):
        opened(tmp_path / "absent" / "r.db")


def test_the_file_and_its_journal_are_for_their_owner_alone(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db") as registry:
            await created(registry, MESH)
            names = os.listdir(tmp_path)
            assert {name: os.stat(tmp_path / name).st_mode & 0o777 for name in names} == dict.fromkeys(
                names, 0o600
            )
            assert len(names) >= 2

    asyncio.run(body())
    (tmp_path / "r.db").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        opened(tmp_path / "r.db")


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "r.db").symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(ConfigError, match="not a regular file"):
        opened(tmp_path / "r.db")
    assert not (tmp_path / "elsewhere.db").exists()


def test_the_keys_have_no_printable_form() -> None:
    assert "ssss" not in repr(IDENTITY)
    assert "pppp" not in f"{IDENTITY}"


@pytest.mark.parametrize("damage", ["noise", "middle", "body", "revision"])
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "r.db"

    async def fill() -> None:
        async with running(path) as registry:
            await created(registry, MESH)
            for seed in range(1, 60):
                await created(registry, peer(seed))

    asyncio.run(fill())
    match damage:
        case "noise":
            path.write_bytes(b"not a database, whatever its name says" * 100)
        case "middle":
            whole = bytearray(path.read_bytes())
            whole[4096:12288] = bytes(8192)
            path.write_bytes(whole)
        case "body":
            asked(path, "UPDATE resources SET body = '{\"kind\":' WHERE name = 'home'")
        case "revision":
            asked(path, "UPDATE registry SET revision = revision + 7")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"r\.db cannot be read: .*restore it from a backup"):
        opened(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    asked(tmp_path / "r.db", "CREATE TABLE theirs (x)")
    (tmp_path / "r.db").chmod(0o600)
    with pytest.raises(ConfigError, match="of another program"):
        opened(tmp_path / "r.db")


def test_a_file_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    asyncio.run(_made(tmp_path / "r.db"))
    asked(tmp_path / "r.db", f"PRAGMA user_version = {len(embedded.MIGRATIONS) + 1}")
    with pytest.raises(ConfigError, match=r"has version 2 and this program knows 1: a newer scope-registry"):
        opened(tmp_path / "r.db")


def test_an_older_file_is_brought_up_and_a_migration_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.db"
    asyncio.run(_made(path))
    first = embedded.MIGRATIONS
    monkeypatch.setattr(embedded, "MIGRATIONS", (*first, ("CREATE TABLE added (x) STRICT", "NONSENSE")))
    with pytest.raises(ConfigError):
        opened(path)
    assert asked(path, "PRAGMA user_version") == [(1,)]
    assert asked(path, "SELECT 1 FROM sqlite_schema WHERE name = 'added'") == []
    monkeypatch.setattr(embedded, "MIGRATIONS", (*first, ("CREATE TABLE added (x TEXT) STRICT",)))

    async def body() -> None:
        async with running(path) as registry:
            assert [each.meta.name for each in (await registry.list(Kind.MESH)).resources] == ["home"]
            assert registry._database.execute("PRAGMA user_version").fetchone() == (2,)

    asyncio.run(body())


def test_what_could_not_be_read_back_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        async with running(tmp_path / "r.db") as registry:
            await created(registry, MESH)
            member = await created(registry, peer(1))
            name, uid = member.meta.name, member.meta.uid
            endless = Condition("Ready", "True", "Reason", "m" * 100_000)
            with pytest.raises(Refused, match="message"):
                await registry.update_status(Kind.PEER, name, Assignment(conditions=(endless,)), uid=uid)
            with pytest.raises(Refused, match="name"):
                await registry.create(replace(MESH, meta=replace(MESH.meta, name="Not a name")))
        async with running(tmp_path / "r.db") as registry:
            assert await registry.get(Kind.PEER, name) == member

    asyncio.run(body())


def test_a_closed_registry_writes_no_more_but_finishes_what_it_took(tmp_path: Path) -> None:
    async def body() -> None:
        registry = opened(tmp_path / "r.db")
        taken = [asyncio.ensure_future(created(registry, each)) for each in (peer(1), peer(2))]
        await asyncio.sleep(0)
        await registry.close()
        assert [(await each).meta.revision for each in taken] == [1, 2]
        with pytest.raises(Unavailable, match="is closed"):
            await registry.create(peer(3))

    asyncio.run(body())


async def _made(path: Path) -> None:
    async with running(path) as registry:
        await created(registry, MESH)
