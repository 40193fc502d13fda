"""Post-quantum keys on a network that wg-quick set up: real wg-quick, real agents, real packets."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scope_agent.__main__ import main

from tests.netns.device_fixture import Namespace, connect, unused_name
from tests.netns.secrets_fixture import forms, secrets_in

pytestmark = pytest.mark.timeout(1200)
# Half a minute is enough where the machine keeps up. Where it does not, a handshake may come too early to
# prove a key, and the next one comes after two minutes.
PATIENCE = 400.0
NO_KEY = "(none)"


class Machine:
    """A machine whose interface wg-quick made; Scope's agent is beside it."""

    def __init__(self, directory: Path, number: int, device: str) -> None:
        self.namespace = Namespace()
        self.device, self.number = device, number
        self.directory = directory / device
        self.directory.mkdir()
        self.config = self.directory / f"{device}.conf"
        self.peers = self.directory / "peers.yaml"
        self.log = self.directory / "agent.log"
        self.private = self.run("wg", "genkey").strip()
        self.public = self.run("wg", "pubkey", stdin=self.private).strip()
        self.agent: subprocess.Popen[bytes] | None = None

    def configure(self, other: Machine, psk: str) -> None:
        self.config.touch(0o600)
        self.config.write_text(
            f"[Interface]\nPrivateKey = {self.private}\nListenPort = {self.port}\n"
            f"Address = 10.77.0.{self.number}/24\nMTU = 1380\n"
            f"[Peer]\nPublicKey = {other.public}\nPresharedKey = {psk}\n"
            f"AllowedIPs = 10.77.0.{other.number}/32\nEndpoint = 192.0.2.{other.number}:{other.port}\n"
        )

    @property
    def port(self) -> int:
        return 51820 + self.number

    def run(self, *argv: str, stdin: str = "", check: bool = True) -> str:
        environment = {**os.environ, "WG_QUICK_USERSPACE_IMPLEMENTATION": "wireguard-go"}
        with self.namespace.entered():
            done = subprocess.run(
                argv,
                input=stdin,
                capture_output=True,
                text=True,
                env=environment,
                timeout=PATIENCE,
                check=False,
            )
        assert done.returncode == 0 or not check, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout + ("" if check else done.stderr)

    def quick(self, action: str) -> None:
        self.run("wg-quick", action, str(self.config))

    def reload(self) -> None:
        """As wg-quick's own unit does it: `systemctl reload`."""
        stripped = self.directory / "stripped"
        stripped.write_text(self.run("wg-quick", "strip", str(self.config)))
        self.run("wg", "syncconf", self.device, str(stripped))

    def psk(self) -> str:
        return self.run("wg", "show", self.device, "preshared-keys").split()[1]

    def _words(self, *words: str) -> list[str]:
        where = ["--state", str(self.directory / "state"), "--run-dir", str(self.directory / "run")]
        return ["psk", *words, "--interface", self.device, *where]

    def scope(self, *words: str, check: bool = True) -> str:
        """One command of `scope-agent psk`, in this process: to start another one takes a second."""
        said, complaint = io.StringIO(), io.StringIO()
        with (
            self.namespace.entered(),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(complaint),
        ):
            status = main(self._words(*words))
        assert status == 0 or not check, complaint.getvalue()
        return said.getvalue() + complaint.getvalue()

    def start(self) -> None:
        with self.log.open("ab") as log, self.namespace.entered():
            words = self._words("run", "--peers", str(self.peers))
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "scope_agent", *words], stdout=log, stderr=log
            )

    def kill(self) -> None:
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()

    def files(self) -> list[Path]:
        """What the agent keeps."""
        return [path for path in (self.directory / "state").rglob("*") if path.is_file()]

    def close(self) -> None:
        self.kill()
        with contextlib.suppress(AssertionError):
            self.quick("down")
        self.namespace.close()

    def described(self) -> str:
        status = self.scope("status", check=False)
        shown = self.run("wg", "show", self.device, check=False)
        return f"{self.device}\n{status}\n{shown}\n{self.log.read_text()[-2000:]}"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one wire, with a tunnel of wg-quick's that has a pre-shared key already."""
    with contextlib.ExitStack() as stack:
        machines = [Machine(tmp_path, number, unused_name()) for number in (1, 2)]
        first, second = machines
        for machine in machines:
            stack.callback(machine.close)
        connect(first.namespace, second.namespace, ["192.0.2.1/24"], ["192.0.2.2/24"])
        psk = first.run("wg", "genpsk").strip()
        first.configure(second, psk)
        second.configure(first, psk)
        for machine in machines:
            machine.quick("up")
        yield first, second


def _until(holds: Callable[[], bool], machines: tuple[Machine, Machine]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "\n".join(machine.described() for machine in machines)
        time.sleep(0.2)


def _introduce(first: Machine, second: Machine) -> None:
    first.peers.write_text("peers:\n" + second.scope("show"))
    second.peers.write_text("peers:\n" + first.scope("show"))


def _reaches(machine: Machine) -> bool:
    return "1 received" in machine.run("ping", "-c", "1", "-W", "2", "10.77.0.2", check=False)


def _proved(machine: Machine) -> int:
    found = re.search(r"#(\d+) for", machine.scope("status", check=False))
    return int(found[1]) if found else 0


def test_keys_are_laid_and_rotated_on_a_network_of_wg_quick(pair: tuple[Machine, Machine]) -> None:
    first, second = pair
    managers = first.psk()
    assert managers == second.psk() != NO_KEY
    _introduce(first, second)
    for machine in pair:
        machine.start()
    # No session yet: the first key is laid in at once, and the first handshake is its proof.
    _until(lambda: first.psk() == second.psk() != managers, pair)
    time.sleep(6.0)  # longer than a handshake may have been under way
    _until(lambda: _reaches(first), pair)
    _until(lambda: _proved(first) == _proved(second) > 0, pair)
    key = first.psk()

    with first.namespace.entered():
        flow = subprocess.Popen(
            ["ping", "-i", "0.02", "-w", "240", "10.77.0.2"], stdout=subprocess.PIPE, text=True
        )
    first.scope("rotate")
    _until(lambda: first.psk() == second.psk() != key, pair)
    rotated = first.psk()
    assert first.agent is not None
    first.agent.send_signal(signal.SIGSTOP)  # or it may be quicker than we look
    first.reload()  # wg-quick's own: its key is back, amid the rotation
    assert first.psk() == managers
    first.agent.send_signal(signal.SIGCONT)
    _until(lambda: first.psk() == second.psk() == rotated, pair)
    flow.send_signal(signal.SIGINT)
    came = {int(n) for n in re.findall(r"icmp_seq=(\d+) ttl", flow.communicate(timeout=PATIENCE)[0])}
    assert came == set(range(1, max(came) + 1))  # what was sent last may be under way

    # Both machines boot: wg-quick's keys, no session, agents that start again.
    for machine in pair:
        machine.kill()
        machine.quick("down")
        machine.quick("up")
        assert machine.psk() == managers
        machine.start()
    _until(lambda: first.psk() == second.psk() != managers, pair)
    _until(lambda: _reaches(first), pair)

    known = {secret for machine in pair for secret in secrets_in(machine.files())}
    assert len(known) >= 9
    told = [form for secret in known for form in forms(secret)]
    assert [name for name, text in _said(pair).items() if any(form in text for form in told)] == []

    # Where no agent runs, and by force alone, this side gets its manager's key back.
    first.kill()
    key = first.psk()
    assert "no agent answers" in first.scope("leave", check=False) and first.psk() == key
    assert f"On this side alone, their links end within minutes: {second.public}" in first.scope(
        "leave", "--force"
    )
    assert first.psk() == managers and second.psk() == key
    assert not [path for path in first.files() if path.parent.name == "psk"]


def _said(machines: tuple[Machine, Machine]) -> dict[str, str]:
    """All that others may read of the agents: logs, answers, arguments and environment."""
    said = {}
    for machine in machines:
        assert machine.agent is not None
        said[f"log of {machine.number}"] = machine.log.read_text()
        said[f"answers of {machine.number}"] = machine.scope("status") + machine.scope("show")
        for name in ("cmdline", "environ"):
            raw = Path("/proc", str(machine.agent.pid), name).read_bytes()
            said[f"{name} of {machine.number}"] = raw.decode(errors="replace")
    return said


def test_what_cannot_be_is_said(pair: tuple[Machine, Machine]) -> None:
    first, second = pair
    _introduce(first, second)
    line = first.peers.read_text()
    first.peers.write_text(line.replace("identity: ", "identity: 0"))
    assert "peers[0].identity" in (said := first.scope("run", "--peers", str(first.peers), check=False)), said
    first.peers.write_text(second.peers.read_text())
    assert "the lines of the other machines" in first.scope("run", "--peers", str(first.peers), check=False)
    assert "no agent answers" in first.scope("leave", check=False)
    (identity,) = [path for path in first.files() if path.name == "identity.json"]
    identity.chmod(0o644)
    first.peers.write_text(line)
    assert "identity.json can be read by others: chmod 600" in first.scope(
        "run", "--peers", str(first.peers), check=False
    )
    identity.chmod(0o600)
    managers = first.psk()
    stranger = first.run("wg", "pubkey", stdin=first.run("wg", "genkey")).strip()
    first.peers.write_text(line.replace(second.public, stranger))
    first.start()
    _until(lambda: "has no peer with this public key" in first.scope("status", check=False), pair)
    first.quick("down")
    _until(lambda: "there is no interface" in first.scope("status", check=False), pair)
    assert first.agent is not None and first.agent.poll() is None
    first.quick("up")
    _until(lambda: "there is no interface" not in first.scope("status", check=False), pair)
    assert first.psk() == managers
    first.kill()
    first.quick("down")
    assert "There is no interface" in first.scope("run", "--peers", str(first.peers), check=False)
    first.quick("up")
