"""The process behind a user-space device: what it and its supervisor survive, and what packets survive."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from scope_agent.wireguard.device import DesiredDevice
from scope_agent.wireguard.shell import choose_device

from scope.model import DeviceKind
from tests.netns.device_fixture import (
    Machine,
    Namespace,
    connect,
    desired_device,
    echo,
    lost_while,
    machine,
    make_keys,
    peer_at,
    run,
    unused_name,
    wait_until,
)

A, B = make_keys(1), make_keys(2)
THERE = ip_address("10.9.0.2")
UAPI = Path("/var/run/wireguard")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two machines with a session, and the run directory of the left one."""

    left: Machine
    right: Machine
    run_dir: Path

    def lost_while(self, act: signal.Signals | None, pid: int) -> int:
        """Datagrams lost around one signal to a process."""

        def once(step: int) -> None:
            if step == 3 and act is not None:
                os.kill(pid, act)

        return lost_while(self.left.namespace, THERE, 9, once)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    a, b = Namespace(), Namespace()
    connect(a, b, ["192.0.2.1/24"], ["192.0.2.2/24"])
    with machine(a, tmp_path / "left") as left, machine(b, tmp_path / "right") as right:
        there = peer_at(A, None, "10.9.0.1/32")
        right.agree(desired_device(right.device.name, B, there, port=47002, addresses=("10.9.0.2/16",)))
        here = peer_at(B, "192.0.2.2:47002", "10.9.0.2/32", keepalive=20)
        left.agree(desired_device(left.device.name, A, here, port=47001))
        with echo(b, THERE, 9):
            wait_until(lambda: lost_while(a, THERE, 9, lambda _: None, steps=1) == 0, "no session")
            yield Pair(left, right, tmp_path / "left")
    a.close()
    b.close()


def process_of(device: str) -> int:
    """The WireGuard process: the owner of the control socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(UAPI / f"{device}.sock"))
        pid: int = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid


def supervisor_of(device: str) -> int | None:
    """The supervisor: the process with the device's name among its arguments, once it runs."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        arguments: list[bytes] = []
        with contextlib.suppress(OSError):  # it has ended meanwhile
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        if b"scope_dataplane.wireguard" in arguments and device.encode() in arguments:
            return int(entry.name)
    return None


def is_replaced(device: str, earlier: int) -> bool:
    """Whether another process than that one answers now."""
    try:
        return process_of(device) != earlier
    except OSError:
        return False


def test_a_killed_process_is_back_with_keys_peers_addresses_and_routes(pair: Pair) -> None:
    name = pair.left.device.name
    before = run(pair.left.device.observe())
    killed = process_of(name)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: is_replaced(name, killed), "it is not restarted")
    wait_until(
        lambda: run(pair.left.device.observe()).peers.keys() == before.peers.keys(), "its peers are not back"
    )
    wait_until(lambda: run(pair.left.device.observe()).mtu == before.mtu, "its MTU is not back")
    after = run(pair.left.device.observe())
    assert (after.addresses, after.routes, after.public_key) == (
        before.addresses,
        before.routes,
        before.public_key,
    )
    assert after.listen_port == before.listen_port
    wait_until(
        lambda: lost_while(pair.left.namespace, THERE, 9, lambda _: None, steps=1) == 0, "no traffic again"
    )


def test_killing_the_supervisor_loses_nothing_and_the_next_adopts_the_process(pair: Pair) -> None:
    name = pair.left.device.name
    process, supervisor = process_of(name), supervisor_of(name)
    assert supervisor is not None
    assert pair.lost_while(signal.SIGKILL, supervisor) == 0
    observed = run(pair.left.device.observe())
    assert observed.exists
    pair.left.agree(desired_device(name, A, peer_at(B, "192.0.2.2:47002", "10.9.0.2/32"), port=47001))
    # The lock still says "ready", so nobody waited until the next one runs.
    wait_until(lambda: supervisor_of(name) not in {None, supervisor}, "no supervisor is started")
    assert process_of(name) == process
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: is_replaced(name, process), "the adopted process is not restarted")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_agent_that_dies_or_is_upgraded_loses_no_packet(
    tmp_path: Path, how: signal.Signals, pair: Pair
) -> None:
    """The agent is a process of its own here, and all it started must outlive it."""
    name = unused_name()
    pair.left.namespace.ip("link", "set", pair.left.device.name, "down")
    pair.left.namespace.ip("address", "del", "10.9.0.1/16", "dev", pair.left.device.name)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from scope_agent.wireguard.shell import choose_device\n"
        "from tests.netns import test_user_space_device as test\n"
        "device = choose_device(sys.argv[1], run_dir=Path(sys.argv[2]))\n"
        "test.Machine(None, device).agree(test.desired_device(\n"
        "    device.name, test.A, test.peer_at(test.B, '192.0.2.2:47002', '10.9.0.2/32', keepalive=20),\n"
        "    port=47003))\n"
        "print('agreed', flush=True)\n"
        "time.sleep(600)\n"
    )
    with pair.left.namespace.entered():
        agent = subprocess.Popen(
            [sys.executable, "-c", script, name, str(tmp_path / "agent")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert agent.stdout is not None
    assert agent.stdout.readline() == "agreed\n"
    # The same device by another hand: what the agent's next start would be.
    with machine(pair.left.namespace, tmp_path / "agent", name=name) as next_start:
        wait_until(
            lambda: lost_while(pair.left.namespace, THERE, 9, lambda _: None, steps=1) == 0, "no session"
        )
        process = process_of(name)
        assert pair.lost_while(how, agent.pid) == 0
        assert agent.wait() == -how
        agent.stdout.close()
        here = peer_at(B, "192.0.2.2:47002", "10.9.0.2/32", keepalive=20)
        wanted = desired_device(name, A, here, port=47003)
        assert lost_while(pair.left.namespace, THERE, 9, lambda _: agree(next_start, wanted)) == 0
        assert process_of(name) == process


@contextlib.contextmanager
def supervisor(namespace: Namespace, device: str, state: Path) -> Iterator[subprocess.Popen[str]]:
    """What a container runs; with all it started, it ends as one."""
    argv = [sys.executable, "-m", "scope_dataplane.wireguard", device, f"--state={state}", "--take-over"]
    with namespace.entered():
        process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


class Stream:
    """One TCP connection through the tunnel, by which one side sends as fast as the other takes it."""

    def __init__(self, left: Namespace, right: Namespace) -> None:
        with right.entered():
            listening = socket.create_server((str(THERE), 10))
        with left.entered():
            self._sending = socket.create_connection((str(THERE), 10), timeout=60.0)
        self._taking, _ = listening.accept()
        self._taking.settimeout(60.0)
        listening.close()
        self.taken = 0
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=each) for each in (self._send, self._take)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        sent = hashlib.sha256()
        number = 0
        while not self._ended.is_set():
            block = number.to_bytes(8, "big") * 128
            self._sending.sendall(block)
            sent.update(block)
            number += 1
        self._sending.shutdown(socket.SHUT_WR)
        self.sent_hash = sent.digest()

    def _take(self) -> None:
        taken = hashlib.sha256()
        while block := self._taking.recv(1 << 16):
            taken.update(block)
            self.taken += len(block)
        self.taken_hash = taken.digest()

    def end(self) -> None:
        """Send no more; returns when the other side has taken everything, or its minute is over."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._sending.close()
        self._taking.close()


def test_a_supervisor_that_stands_by_takes_over_and_no_connection_breaks(pair: Pair, tmp_path: Path) -> None:
    """As when the pods of user-space WireGuard are replaced, and an agent beside them starts none itself."""
    left, name = pair.left.namespace, unused_name()
    left.ip("link", "set", pair.left.device.name, "down")
    left.ip("address", "del", "10.9.0.1/16", "dev", pair.left.device.name)
    run_dir = tmp_path / "beside"
    state = run_dir / "wireguard" / f"{name}.json"
    wanted = desired_device(name, A, peer_at(B, "192.0.2.2:47002", "10.9.0.2/32", keepalive=20), port=47003)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(supervisor(left, name, state))
        with left.entered():
            device = choose_device(name, run_dir=run_dir, only=DeviceKind.USER_SPACE, beside=True)
            run(device.observe())
        stack.callback(run, device.close())
        machine = Machine(left, device)
        machine.agree(wanted)
        assert supervisor_of(name) == first.pid
        stream = Stream(left, pair.right.namespace)
        stack.callback(stream.end)
        second = stack.enter_context(supervisor(left, name, state))
        assert second.stderr is not None
        assert "waiting for its end" in second.stderr.readline()
        wait_until(lambda: stream.taken > 1 << 20, "nothing flows")

        process = process_of(name)
        first.kill()
        os.kill(process, signal.SIGKILL)
        wait_until(lambda: is_replaced(name, process), "nobody takes over")
        flowed = stream.taken
        machine.agree(wanted)
        wait_until(lambda: stream.taken > flowed + (1 << 20), "nothing flows any more")
        stream.end()
        assert stream.taken_hash == stream.sent_hash

        # With no supervisor there the agent waits for the next container, instead of taking its place.
        process = process_of(name)
        second.kill()
        second.wait()
        os.kill(process, signal.SIGKILL)
        run(device.keep(wanted))
        assert supervisor_of(name) is None
        third = stack.enter_context(supervisor(left, name, state))
        machine.agree(wanted)
        assert supervisor_of(name) == third.pid
        run(device.delete())
        assert third.wait(timeout=60) == 0


def agree(machine: Machine, wanted: DesiredDevice) -> None:
    machine.agree(wanted)


def test_secrets_are_in_a_private_file_and_on_no_command_line(pair: Pair) -> None:
    name = pair.left.device.name
    state = pair.run_dir / "wireguard" / f"{name}.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.parent.stat().st_mode) == 0o700
    assert A.private.raw.hex() in json.loads(state.read_text())["uapi"]
    for pid in (process_of(name), supervisor_of(name)):
        for where in ("cmdline", "environ"):
            assert A.private.raw.hex().encode() not in Path(f"/proc/{pid}/{where}").read_bytes()
    assert A.private.raw.hex() not in (state.parent / f"{name}.log").read_text()


def test_a_supervisor_that_waits_serves_one_device_after_another(tmp_path: Path) -> None:
    """What a service manager started before the agent, and starts again after each leave."""
    namespace, name, run_dir = Namespace(), unused_name(), tmp_path / "waited"
    state = run_dir / "wireguard" / f"{name}.json"
    command = [sys.executable, "-m", "scope_dataplane.wireguard", name, "--state", str(state)]
    wanted = desired_device(name, A, peer_at(B, None, "10.9.0.2/32"), port=47001)
    for _ in range(2):
        with namespace.entered():
            supervisor = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: (state.with_suffix(".lock")).exists(), "it does not start")
        with machine(namespace, run_dir, name=name) as made:
            made.agree(wanted)
            assert supervisor_of(name) == supervisor.pid
        assert supervisor.wait(timeout=20) == 0
    with namespace.entered():
        supervisor = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: (state.with_suffix(".lock")).exists(), "it does not start")
    with machine(namespace, run_dir, name=name):
        pass  # a leave without a device is done at once, though a supervisor waits
    supervisor.kill()
    supervisor.wait()
    namespace.close()


def test_a_second_supervisor_refuses_and_disturbs_nothing(pair: Pair) -> None:
    name = pair.left.device.name
    state = pair.run_dir / "wireguard" / f"{name}.json"
    done = subprocess.run(
        [sys.executable, "-m", "scope_dataplane.wireguard", name, "--state", str(state)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "another scope-wireguard" in done.stderr
    assert pair.lost_while(None, 0) == 0


def test_a_state_file_that_cannot_be_read_leaves_the_device_to_the_agent(pair: Pair) -> None:
    name = pair.left.device.name
    state = pair.run_dir / "wireguard" / f"{name}.json"
    state.write_text("{")
    killed = process_of(name)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: is_replaced(name, killed), "it is not restarted")
    here = peer_at(B, "192.0.2.2:47002", "10.9.0.2/32", keepalive=20)
    pair.left.agree(desired_device(name, A, here, port=47001))
    assert pair.left.device.kind is DeviceKind.USER_SPACE


def test_the_supervisor_keeps_a_small_memory(pair: Pair) -> None:
    status = Path(f"/proc/{supervisor_of(pair.left.device.name)}/status").read_text()
    (resident,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    assert resident < 20 << 10  # kB
