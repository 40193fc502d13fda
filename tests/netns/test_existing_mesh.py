"""A mesh on an interface that wg-quick set up: the embedded registry, real agents, real packets."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, Server
from lab.hosts import end
from meshlab import PRIVATE, Registry
from meshlab.programs import program, tail

pytestmark = pytest.mark.timeout(1200)
# Half a minute is enough where the machine keeps up. Where it does not, a handshake may come too early to
# prove a key, and the next one comes after two minutes.
PATIENCE = 400.0
MESH = {
    "apiVersion": "scope.ltgc.cc/v1alpha1",
    "kind": "ScopeMesh",
    "metadata": {"name": "home"},
    "spec": {"existingInterface": "wg0", "postQuantum": {"mode": "Preferred"}},
}


class Machine:
    """A machine with an interface of wg-quick's, and an agent of the mesh on it."""

    def __init__(self, server: Server, number: int) -> None:
        self.server, self.number = server, number
        self.log = server.directory / "agent.log"
        self.config = server.directory / "wg0.conf"
        self.private = server.run(["wg", "genkey"]).stdout.strip()
        self.public = server.run(["wg", "pubkey"], input=self.private).stdout.strip()
        self.agent: subprocess.Popen[str] | None = None

    def configure(self, other: Machine, psk: str) -> None:
        address = next(each for each in other.server.addresses() if each.version == 4)
        self.config.touch(0o600)
        self.config.write_text(
            f"[Interface]\nPrivateKey = {self.private}\nListenPort = 51820\n"
            f"Address = 10.77.0.{self.number}/24\nMTU = 1380\n"
            f"[Peer]\nPublicKey = {other.public}\nPresharedKey = {psk}\n"
            f"AllowedIPs = 10.77.0.{other.number}/32\nEndpoint = {address}:51820\n"
        )

    def quick(self, action: str) -> None:
        go = "WG_QUICK_USERSPACE_IMPLEMENTATION=wireguard-go"
        self.server.run(["env", go, "wg-quick", action, str(self.config)])

    def show(self, what: str) -> str:
        return self.server.run(["wg", what, "wg0"]).stdout

    def psk(self) -> str:
        return self.server.run(["wg", "show", "wg0", "preshared-keys"]).stdout.split()[1]

    def start(self, *words: str, said: str = "") -> None:
        with self.log.open("a") as log:
            self.agent = self.server.popen(
                [program("scope-agent"), *words], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        assert self.agent.stdin is not None
        self.agent.stdin.write(said + "\n")
        self.agent.stdin.close()

    def kill(self) -> None:
        assert self.agent is not None
        self.agent.kill()
        self.agent.wait()

    def status(self) -> dict[str, Any]:
        """What the agent says; empty while there is none."""
        path = Path("/proc", str(self.server.holder_pid), "root/run/scope/home.sock")
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(30.0)
            try:
                agent.connect(str(path))
                agent.sendall(b'{"command": "status"}\n')
                said = agent.makefile().readline()
            except OSError:
                return {}
        return dict(json.loads(said)["status"]) if said else {}

    def epoch(self) -> int:
        """Of the proved key; 0 where there is none."""
        peers = self.status().get("peers") or []
        return int(peers[0]["psk"]["epoch"] or 0) if peers else 0

    def close(self) -> None:
        if self.agent is not None:
            end([self.agent])
        with contextlib.suppress(Exception):
            self.quick("down")

    def described(self) -> str:
        shown = self.server.run(["wg", "show", "wg0"], check=False).stdout
        return f"{self.status()}\n{shown}\n{tail(self.log)}"


@pytest.fixture
def network() -> Iterator[tuple[Registry, Machine, Machine]]:
    """Two machines with a tunnel of wg-quick's that has a pre-shared key already, and a registry."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(private=PRIVATE))
        registry = Registry(lab.server("registry"))
        first, second = (Machine(lab.server(f"m{number}"), number) for number in (1, 2))
        psk = first.server.run(["wg", "genpsk"]).stdout.strip()
        first.configure(second, psk)
        second.configure(first, psk)
        for machine in (first, second):
            registry.introduce(machine.server)
            stack.callback(machine.close)
            machine.quick("up")
        yield registry, first, second


def _until(holds: Callable[[], bool], *machines: Machine) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, "\n".join(machine.described() for machine in machines)
        time.sleep(0.2)


def _reaches(machine: Machine) -> bool:
    argv = ["ping", "-c", "1", "-W", "2", "10.77.0.2"]
    return "1 received" in machine.server.run(argv, check=False).stdout


def test_a_mesh_on_an_existing_interface_keys_it_and_gives_its_managers_key_back(
    network: tuple[Registry, Machine, Machine],
) -> None:
    registry, first, second = network
    managers = first.psk()
    before = [machine.show("showconf") for machine in (first, second)]
    registry.apply(json.dumps(MESH))
    string = registry.token("home")
    assert "/home/wg0#" in string
    for machine in (first, second):
        machine.start("join", "-", "--name", machine.server.name, "--run", said=string)
    # No session yet: the first key is laid in at once, and the first handshake is its proof.
    _until(lambda: first.psk() == second.psk() != managers, first, second)
    time.sleep(6.0)  # longer than a handshake may have been under way
    _until(lambda: _reaches(first), first, second)
    _until(lambda: first.epoch() == second.epoch() > 0, first, second)

    def is_told() -> bool:
        peers = json.loads(registry.scopectl("get", "peers", "-o", "json"))["items"]
        keys = {peer["status"]["keys"]["wireGuard"] for peer in peers}
        links = [link for peer in peers for link in peer["status"].get("links", ())]
        return (
            keys == {first.public, second.public}
            and [link.get("psk", {}).get("epoch") for link in links] == [first.epoch()] * 2
        )

    _until(is_told, first, second)
    # Nothing but the key has changed. The process remembers its peers' endpoints as it hears them.
    key, after = first.psk(), [machine.show("showconf") for machine in (first, second)]
    assert [text.replace(key, managers) for text in after] == before

    # Both machines boot: wg-quick's key, no session, agents that start again.
    for machine in (first, second):
        machine.kill()
        machine.quick("down")
        machine.quick("up")
        assert machine.psk() == managers
        machine.start("run")
    _until(lambda: first.psk() == second.psk() == key, first, second)

    # Nobody sends anything: the handshakes that this takes are begun by the agent that leaves.
    said = first.server.run([program("scope-agent"), "leave"], timeout=PATIENCE)
    assert "is its manager's alone again" in said.stderr
    _until(lambda: first.psk() == second.psk() == managers, first, second)
    _until(lambda: _reaches(first), first, second)
    _until(lambda: not second.status().get("peers"), first, second)
