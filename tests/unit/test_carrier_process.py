"""`scope-carrier` as a process: killed, started again, told by its file, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scope_agent.wireguard.shell.process import DataplaneProcess

from scope.carrier import Carrier, CarrierReport, decode_report, encode_carrier
from tests.unit.carrier_fixture import PATIENCE, Machine, machine

ONCE = 0.2  # seconds between two looks at what another process does


@pytest.fixture
def one() -> Iterator[Machine]:
    with machine() as made:
        yield made


class Process:
    """One carrier, as the agent starts it: it lives on beside us, so the test ends it."""

    def __init__(self, directory: Path, name: str) -> None:
        self.file = directory / f"{name}.json"
        self.process = DataplaneProcess("carrier", self.file, "--file", str(self.file))

    def start(self, carrier: Carrier) -> None:
        self.process.write(encode_carrier(carrier))
        self.process.ensure_running()
        wait_until(self.process.is_running, "it carries")

    def kill(self) -> None:
        os.kill(self.pid(), signal.SIGKILL)
        wait_until(lambda: not self.process.is_running(), "it is gone")

    def pid(self) -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.connect(str(self.file.with_suffix(".sock")))
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)

    def report(self) -> CarrierReport:
        answer = b""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(PATIENCE)
            asking.connect(str(self.file.with_suffix(".sock")))
            while chunk := asking.recv(1 << 16):
                answer += chunk
        return decode_report(answer.decode())


@contextlib.contextmanager
def process(directory: Path, name: str) -> Iterator[Process]:
    made = Process(directory, name)
    try:
        yield made
    finally:
        made.process.end(PATIENCE, terminate=True)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not in {PATIENCE:.0f} s: {what}"
        time.sleep(0.02)


def until_it_goes_both_ways(made: Machine) -> float:
    """Send until an answer comes; the seconds that it took."""
    peer, began = made.peers[0].wireguard, time.monotonic()
    text = os.urandom(16)
    for program in (made.wireguard, peer):
        program.settimeout(ONCE)
    while time.monotonic() < began + PATIENCE:
        peer.sendto(text, made.passage())
        with contextlib.suppress(TimeoutError):
            while made.wireguard.recv(100) != text:
                pass
            made.wireguard.sendto(text, made.member())
            while peer.recv(100) != text:
                pass
            return time.monotonic() - began
    pytest.fail("nothing goes both ways")


def test_whichever_carrier_is_killed_data_goes_on_once_it_is_back(one: Machine, tmp_path: Path) -> None:
    with process(tmp_path, "hub") as hub, process(tmp_path, "peer") as peer:
        hub.start(Carrier(hub=one.hub()))
        peer.start(Carrier(peer=one.peer()))
        until_it_goes_both_ways(one)
        assert [report.connected for report in hub.report().members] == [True]
        for which, carrier in ((hub, Carrier(hub=one.hub())), (peer, Carrier(peer=one.peer()))):
            which.kill()
            which.start(carrier)
            until_it_goes_both_ways(one)
        wait_until(lambda: hub.report().members[0].connected, "the hub counts it again")
        assert peer.report().hubs[0].carried.received_packets > 0


def test_one_program_may_be_both_and_follows_every_file_that_it_can_read(
    one: Machine, tmp_path: Path
) -> None:
    with process(tmp_path, "both") as both:
        both.start(Carrier(peer=one.peer(), hub=one.hub()))
        until_it_goes_both_ways(one)
        assert both.report().listening and both.report().hubs[0].address is not None
        both.process.write("{")
        log = both.file.with_suffix(".log")
        wait_until(lambda: "going on as before" in log.read_text(), "it says that it cannot read it")
        until_it_goes_both_ways(one)
        both.process.write(encode_carrier(Carrier(peer=one.peer(), hub=replace(one.hub(), members=()))))
        wait_until(lambda: "not a member" in both.report().hubs[0].reason, "nobody is a member")


def test_it_ends_when_its_file_is_gone_and_leaves_no_socket(one: Machine, tmp_path: Path) -> None:
    with process(tmp_path, "hub") as hub:
        hub.start(Carrier(hub=one.hub()))
        hub.file.unlink()
        wait_until(lambda: not hub.process.is_running(), "it has ended")
        assert not hub.file.with_suffix(".sock").exists()


def test_there_is_one_carrier_a_file_and_asked_to_end_it_does(one: Machine, tmp_path: Path) -> None:
    with process(tmp_path, "hub") as hub:
        hub.start(Carrier(hub=one.hub()))
        command = [sys.executable, "-m", "scope_dataplane.carrier", "--file", str(hub.file)]
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert second.returncode == 1 and "another scope-carrier runs" in second.stderr
        os.kill(hub.pid(), signal.SIGTERM)
        wait_until(lambda: not hub.process.is_running(), "it has ended")


def test_the_other_programs_of_the_dataplane_load_no_http() -> None:
    code = "import sys, scope_dataplane.forwarder, scope_dataplane.wireguard; print('aiohttp' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
