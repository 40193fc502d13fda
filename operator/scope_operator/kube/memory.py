"""Directories in memory for secrets, which do not outlive their process by much.

Each is locked for as long as its process lives, however that ends: the next to make one removes those that
nobody holds. A process is not known by its number, which others have in other containers.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

MEMORY = Path("/dev/shm")  # noqa: S108 - what is made there is nobody else's; writable in every container
UNHELD = "."  # stands before the name of one that is not locked yet, and holds nothing


@contextmanager
def private_directory(prefix: str, *, parent: Path = MEMORY) -> Iterator[Path]:
    """A directory of ours alone, removed in the end; what was left of ended processes is removed first."""
    _remove_left(prefix, parent)
    made = Path(tempfile.mkdtemp(prefix=UNHELD + prefix, dir=parent))
    held = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        made = made.rename(parent / made.name.removeprefix(UNHELD))
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        os.close(held)


def _remove_left(prefix: str, parent: Path) -> None:
    for left in parent.glob(f"{prefix}*"):
        try:
            opened = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another's, or gone
            continue
        try:
            if os.fstat(opened).st_uid == os.geteuid():
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
                log.info("memory.cleaned directory=%s", left)
        except BlockingIOError:  # its process lives
            continue
        finally:
            os.close(opened)
