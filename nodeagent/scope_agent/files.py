"""Replacing a file as a whole, for everything that the agent writes: its state, and what programs others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def replace_file(path: Path, parts: Iterable[str], *, durable: bool) -> None:
    """Write `parts` one after the other, 0600: a reader sees the old file or the new one. Raises OSError.

    The temporary file beside it is new, so nobody's symbolic link is followed; after an error it is gone and
    the old file whole. `durable`: it is on the disk when this returns, for what must outlive a power cut.
    """
    # By process: two of them may write the same file, and one that was killed leaves no more than one behind.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        handle = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        with open(handle, "w", encoding="utf-8") as file:
            file.writelines(parts)
            if durable:
                file.flush()
                os.fsync(handle)
        temporary.replace(path)
        if durable:
            _sync_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_directory(path: Path) -> None:
    """A rename lasts once its directory is on the disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
