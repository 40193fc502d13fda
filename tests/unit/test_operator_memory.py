"""Secrets in memory go with their process, or at the next start."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from scope_operator.kube.memory import private_directory

LEAVES = """
import os, sys
from pathlib import Path
from scope_operator.kube.memory import private_directory
with private_directory("keys-", parent=Path(sys.argv[1])) as made:
    (made / "key").write_text("secret")
    os._exit(9)
"""


def test_a_directory_is_ours_alone_and_goes_in_the_end(tmp_path: Path) -> None:
    with private_directory("keys-", parent=tmp_path) as made:
        assert made.parent == tmp_path
        assert made.name.startswith("keys-")
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
        (made / "key").write_text("secret")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES, str(tmp_path)], check=False)
    assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    with private_directory("keys-", parent=tmp_path) as made:
        assert not left.exists()
        assert [*tmp_path.iterdir()] == [made]


def test_what_a_living_process_holds_and_what_is_not_named_so_stays(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "keys-link").symlink_to(tmp_path / "target")
    with (
        private_directory("keys-", parent=tmp_path) as first,
        private_directory("keys-", parent=tmp_path) as second,
    ):
        assert first.is_dir() and second.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["keys-link", "other", "target"]
