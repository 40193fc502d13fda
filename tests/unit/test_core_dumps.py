"""No program that holds keys leaves a core dump: each is started, and asked before it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAMS = {
    "scope_agent.__main__": ["run", "--mesh", "nowhere", "--state", "{folder}/none"],
    "scope_dataplane.carrier": ["--file", "{folder}/carrier.json"],
    "scope_dataplane.forwarder": ["--grants", "{folder}/grants.json"],
    "scope_dataplane.wireguard": ["core0", "--state", "{folder}/state.json"],
}
# Each main returns at once: the agent has joined nothing, and the others are held to run already.
ASKED = """
import ctypes, fcntl, importlib, json, os, resource, subprocess, sys

def dumpable():
    return ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)

resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
before = [dumpable(), *resource.getrlimit(resource.RLIMIT_CORE)]
module, arguments, lock = json.loads(sys.argv[1])
with open(lock, "w") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    status = importlib.import_module(module).main(arguments)
child = subprocess.run(["grep", "Max core file size", "/proc/self/limits"], capture_output=True, text=True)
after = [dumpable(), *resource.getrlimit(resource.RLIMIT_CORE)]
print(json.dumps([status, before, after, child.stdout.split()[4]]))
"""


def test_no_program_that_holds_keys_nor_what_it_starts_leaves_a_core_dump(tmp_path: Path) -> None:
    for module, arguments in PROGRAMS.items():
        told = [argument.format(folder=tmp_path) for argument in arguments]
        lock = Path(told[-1]).with_suffix(".lock")
        asked = [sys.executable, "-c", ASKED, json.dumps([module, told, str(lock)])]
        ran = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
        status, before, after, childs = json.loads(ran.stdout.splitlines()[-1])
        assert status == 1, ran.stderr
        assert before[0] == 1 and after[0] == 0
        most = 0 if before[2] == 0 else 1
        assert after[1:] == [most, most] and childs == str(most)
