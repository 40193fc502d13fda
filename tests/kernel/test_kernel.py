"""Kernel WireGuard: the tests of `tests/netns` again, inside a virtual machine with a distribution's kernel.

The machine shares this one's files (read-only, but for one folder that takes the results), so it runs the
same checkout with the same Python. It is emulated, which needs no /dev/kvm and some patience. One boot serves
all tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "tests/netns/test_device.py",
    "tests/netns/test_raw_socket.py",
    "tests/netns/test_hold.py",
    "tests/netns/test_relay_change.py",
    "tests/netns/test_punched_pair.py",
)
# What Python reads at every start, unless it is the system's; and how to mount it so that it is read once.
CACHED = sorted(
    ({ROOT, Path(sys.base_prefix)} | ({Path(sys.prefix)} if ROOT not in Path(sys.prefix).parents else set()))
    - {Path("/usr")}
)
REMOUNT = """
tag=$(awk '$2 == "{folder}" {{ print $1 }}' /proc/mounts)
umount {folder} &&
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,access=any,cache=loose,ro "$tag" {folder}
"""
# Booting takes 20 s and the tests two minutes on idle cores; beside all other tests half an hour was seen.
LONGEST_S = 3600  # only what hangs for good is ended

pytestmark = pytest.mark.timeout(LONGEST_S + 60)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one test did inside the machine: "passed", or what its report says."""

    file: str
    name: str
    said: str


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("machine")
    kernel = _kernel()
    vng = _program("vng", "the locked environment's dev group (uv sync)", Path(sys.executable).parent)
    _program("qemu-system-x86_64", "the Debian package qemu-system-x86")
    _program("busybox", "the Debian package busybox-static")
    script = folder / "inside.sh"
    script.write_text(
        "".join(REMOUNT.format(folder=each) for each in CACHED) + f"cd {ROOT}\n"
        "export SCOPE_TEST_DEVICE=Kernel PYTHONDONTWRITEBYTECODE=1 TMPDIR=/dev/shm\n"
        # What other tests use of pytest's plugins takes an emulated processor half a minute to load.
        "export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1\n"
        # Ends the machine also where nobody is left to end it.
        f"timeout {LONGEST_S} {sys.executable} -m pytest -q -p pytest_timeout -o timeout=600 "
        "-p no:cacheprovider --basetemp=/dev/shm/pytest "
        f"--junitxml={folder}/report.xml {' '.join(FILES)} > {folder}/output.txt 2>&1\n"
    )
    command = [
        *(vng, "--disable-kvm", "--run", str(kernel), "--user", "root", "--cpus", "2", "--memory", "1G"),
        *(f"--rodir={each}" for each in CACHED),
        *(f"--rwdir={folder}", "--exec", f"sh {script}"),
    ]
    console = _boot(command, folder)
    report = folder / "report.xml"
    if not report.exists():
        output = folder / "output.txt"
        inside = output.read_text() if output.exists() else ""
        pytest.fail(
            f"the virtual machine left no report. Console:\n{console[-3000:]}\nInside:\n{inside[-3000:]}"
        )
    return list(_read(report))


@pytest.mark.parametrize("file", FILES)
def test_every_test_of_a_file_passes_on_kernel_wireguard(outcomes: list[Outcome], file: str) -> None:
    of_file = [outcome for outcome in outcomes if outcome.file == Path(file).stem]
    assert of_file, f"nothing of {file} ran inside the machine"
    failed = [f"{outcome.name}: {outcome.said}" for outcome in of_file if outcome.said != "passed"]
    assert not failed, "\n\n".join(failed)


def _boot(command: list[str], folder: Path) -> str:
    """Run the machine to its end and return what it wrote to its console."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    machine = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        cwd=folder,  # the machine starts where we are, and what is to be mounted anew must not be in use
        env={**os.environ, "PATH": path},
    )
    with machine:
        try:
            return machine.communicate(timeout=LONGEST_S)[0]
        except subprocess.TimeoutExpired:
            pytest.fail(f"the virtual machine did not end within {LONGEST_S} s")
        finally:
            with contextlib.suppress(ProcessLookupError):  # its own session: the emulator and nothing else
                os.killpg(machine.pid, signal.SIGKILL)


def _read(report: Path) -> Iterator[Outcome]:
    for case in ET.parse(report).getroot().iter("testcase"):
        faults = [child for child in case if child.tag in {"failure", "error", "skipped"}]
        said = "passed" if not faults else f"{faults[0].tag}: {(faults[0].text or '')[-2000:]}"
        yield Outcome(case.get("classname", "").rpartition(".")[2], case.get("name", ""), said)


def _kernel() -> Path:
    """The newest kernel here that has its modules, WireGuard's among them."""
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        modules = Path("/lib/modules", image.name.removeprefix("vmlinuz-"))
        if any(modules.glob("kernel/drivers/net/wireguard/wireguard.ko*")):
            return image
    pytest.fail("no kernel with WireGuard lies in /boot: install the Debian package linux-image-amd64")


def _program(name: str, source: str, *folders: Path) -> str:
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if found is None:
        pytest.fail(f"{name} is not on the PATH: it comes with {source}")
    return found
