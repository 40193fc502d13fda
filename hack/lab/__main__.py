"""`python -m lab`: look after labs from outside: list, enter, clean.

python -m lab list                  every namespace of every lab, and whether its owner lives
python -m lab enter NAME [COMMAND]  a shell (or a command) in a host or router of a lab
python -m lab clean [LAB...]        remove the labs (or these) whose owner is gone, and what runs in them
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.hosts import enter_argv
from lab.internet import LABS, started_at
from lab.netns import NETNS, LabError, kill_inside, names_with, remove, require_tools


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab", description="Look after network labs.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every namespace of every lab")
    clean_parser = commands.add_parser("clean", help="remove labs whose owner is gone")
    clean_parser.add_argument("only", nargs="*", metavar="LAB", help="default: all of them")
    enter = commands.add_parser("enter", help="run a shell or a command in a host or router")
    enter.add_argument("name", help="a namespace as listed, or the end of its name if only one ends so")
    enter.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND", help="default: your shell")
    options = parser.parse_args()
    try:
        require_tools()
        match options.command:
            case "list":
                for lab in _labs():
                    owner = "its owner lives" if _owner_lives(lab) else "its owner is gone"
                    print(f"{lab.name}: {owner}", *names_with(f"{lab.name}-"), sep="\n  ")
            case "clean":
                for removed in clean(options.only):
                    print(f"removed {removed}")
            case "enter":
                return _enter(options.name, options.argv)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


def clean(only: Sequence[str] = ()) -> list[str]:
    """Remove every lab (or each of these) whose owner is gone, and the processes inside; what it removed."""
    gone = [lab for lab in _labs() if not _owner_lives(lab) and (not only or lab.name in only)]
    for lab in gone:
        names = names_with(f"{lab.name}-")
        kill_inside(names)
        remove(names)
        shutil.rmtree(lab)
    return [lab.name for lab in gone]


def _labs() -> list[Path]:
    if not LABS.is_dir():
        return []
    # A name with a dot is a lab that is about to be made.
    return sorted(path for path in LABS.iterdir() if path.is_dir() and not path.name.startswith("."))


def _owner_lives(lab: Path) -> bool:
    try:
        pid, started = (lab / "owner").read_text().split()
    except (FileNotFoundError, ValueError):  # it goes just now
        return False
    return str(started_at(int(pid))) == started


def _enter(name: str, argv: list[str]) -> int:
    known = [namespace for lab in _labs() for namespace in names_with(f"{lab.name}-")]
    found = [name] if name in known else [namespace for namespace in known if namespace.endswith(f"-{name}")]
    if len(found) != 1:
        raise LabError(
            f"{len(found)} namespaces are or end in {name}; there are: {' '.join(known) or 'none'}"
        )
    (namespace,) = found
    command = argv or [os.environ.get("SHELL", "/bin/sh")]
    holders = list(LABS.glob(f"*/{namespace}.holder"))
    if holders:
        entering = enter_argv(namespace, int(holders[0].read_text()), cwd=Path.cwd())
    else:  # a router has no mount namespace
        entering = ["nsenter", f"--net={NETNS / namespace}", "--"]
    return subprocess.run([*entering, *command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
