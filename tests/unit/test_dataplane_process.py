"""How the agent starts a process of the dataplane, and how it replaces the file that programs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from scope_agent.files import replace_file
from scope_agent.wireguard.shell import process as processes
from scope_agent.wireguard.shell.process import FIRST_BACKOFF, LAST_BACKOFF, STABLE_AFTER, DataplaneProcess


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class _Machine:
    """Processes are started and die, by the clock."""

    def __init__(self, *, lives_for: float) -> None:
        self.clock = _Clock()
        self.started: list[float] = []
        self._lives_for = lives_for

    def spawn(self, *_: object, **__: object) -> int:
        self.started.append(self.clock.now)
        return 12345

    def wait(self, pid: int, _: int) -> tuple[int, int]:
        is_dead = self.clock.now >= self.started[-1] + self._lives_for
        return (pid, 256) if is_dead else (0, 0)


def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, lives_for: float) -> list[float]:
    """When it is started, over 100 seconds."""
    machine = _Machine(lives_for=lives_for)
    monkeypatch.setattr(processes, "time", machine.clock)
    monkeypatch.setattr(os, "posix_spawn", machine.spawn)
    monkeypatch.setattr(os, "waitpid", machine.wait)
    process = DataplaneProcess("some", tmp_path / "some.json")
    for _ in range(1000):
        process.ensure_running()
        machine.clock.now += 0.1
    return machine.started


def test_one_that_ends_at_once_is_started_ever_more_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = [later - earlier for earlier, later in pairwise(starts(tmp_path, monkeypatch, lives_for=0.0))]
    assert gaps[0] < FIRST_BACKOFF
    assert gaps[1] == pytest.approx(FIRST_BACKOFF, abs=0.2)
    assert all(later > earlier for earlier, later in pairwise(gaps[:6]))
    assert max(gaps) == pytest.approx(LAST_BACKOFF, abs=0.3)


def test_one_that_ran_for_a_while_is_started_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives_for = 2 * STABLE_AFTER
    gaps = [
        later - earlier for earlier, later in pairwise(starts(tmp_path, monkeypatch, lives_for=lives_for))
    ]
    assert gaps and all(gap == pytest.approx(lives_for, abs=0.2) for gap in gaps)


def test_a_file_that_could_not_be_replaced_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    replace_file(path, ["old"], durable=False)

    def breaking() -> Iterator[str]:
        yield "ne"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        replace_file(path, breaking(), durable=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, ["ne", "w"], durable=True)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_replaced_is_the_link_and_not_the_file_behind_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("theirs")
    path = tmp_path / "some.json"
    path.symlink_to(elsewhere)
    replace_file(path, ["ours"], durable=False)
    assert elsewhere.read_text() == "theirs"
    assert path.read_text() == "ours" and not path.is_symlink()
