"""TCP through the mesh against TCP through a bare WireGuard device: the same program, the same path.

Both run in one lab, turn by turn; a sample is the ratio of one turn's two rates. The agents go on working
while the mesh carries; they are stopped (SIGSTOP) while the bare device does, so what they cost counts.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from lab import Host, Nat
from lab.netns import ip_batch
from meshlab import DEVICE

from bench.agents import BenchError, spawn, world
from bench.result import Benchmark, Sample, Target

BARE = "bare0"
BARE_PORT = 30000
BARE_ADDRESSES = ("10.99.0.1", "10.99.0.2")
SECONDS = 5.0  # of one transfer: enough for TCP to find its pace many times over
WARM_S = 1.0  # not counted
PORT = 5001


def _ratios(attempts: int) -> Iterator[Sample]:
    with world(delay_ms=0.0) as here:
        first, second = here.member("first", Nat.NONE), here.member("second", Nat.NONE)
        for member in (first, second):
            member.join(here.token, arguments=("--wireguard", "UserSpace"))
        here.settle()
        flow = here.flow(first, second)
        if here.await_ping(flow) is None:
            raise BenchError("the pair is direct, but no ping comes back")
        here.pinger.stop(flow)
        hosts = (first.machine, second.machine)
        mtu = mtu_of(hosts[0])
        bare_pair(*hosts, mtu=mtu)
        agents = [member.process for member in (first, second) if member.process is not None]
        target = here.addresses[second.name]
        before = _frozen_rate(agents, *hosts)
        for _ in range(attempts):
            through = rate(*hosts, target)
            after = _frozen_rate(agents, *hosts)
            # The bare device before and after: what drifts with the machine drifts out.
            yield through / ((before + after) / 2)
            before = after


def _frozen_rate(agents: Sequence[subprocess.Popen[str]], sender: Host, receiver: Host) -> float:
    """The bare device's rate, with the agents stopped."""
    for agent in agents:
        agent.send_signal(signal.SIGSTOP)
    try:
        return rate(sender, receiver, BARE_ADDRESSES[1])
    finally:
        for agent in agents:
            agent.send_signal(signal.SIGCONT)


def mtu_of(host: Host) -> int:
    """The MTU of the mesh's device."""
    (link,) = json.loads(host.run(["ip", "-json", "link", "show", "dev", DEVICE]).stdout)
    return int(link["mtu"])


def rate(sender: Host, receiver: Host, address: str, *, inside: Sequence[Sequence[str]] = ((), ())) -> float:
    """Bytes a second of one TCP connection, once it is warm; `inside` as `spawn` has it, of both ends."""
    log = receiver.directory / "transfer.log"
    log.unlink(missing_ok=True)
    arguments = (address, str(PORT), str(WARM_S), str(SECONDS))
    here = (Path(__file__).parents[1],)
    sink = spawn(receiver, "bench.transfer", "receive", *arguments, log=log, path=here, inside=inside[1])
    sent = sender.directory / "send.log"
    source = spawn(sender, "bench.transfer", "send", *arguments, log=sent, path=here, inside=inside[0])
    for child in (sink, source):
        try:
            child.wait(WARM_S + SECONDS + 20.0)
        except subprocess.TimeoutExpired:
            raise BenchError(f"the transfer to {address} did not end:\n{log.read_text()}") from None
    try:
        return float(log.read_text())
    except ValueError:
        raise BenchError(f"the transfer to {address} gave no rate:\n{log.read_text()}") from None


def bare_pair(first: Host, second: Host, *, mtu: int) -> None:
    """The mesh's WireGuard program on a device of its own in each host, configured once, with no agent."""
    program = shutil.which("wireguard-go")
    if program is None:
        raise BenchError("wireguard-go is not on the PATH: apt install wireguard-go")
    keys = [X25519PrivateKey.generate() for _ in range(2)]
    for number, (host, other) in enumerate(((first, second), (second, first))):
        with (host.directory / "bare.log").open("w") as log:
            host.popen([program, "--foreground", BARE], stdout=log, stderr=log)
        peer = keys[1 - number].public_key().public_bytes_raw().hex()
        _configure(
            host,
            f"private_key={keys[number].private_bytes_raw().hex()}\nlisten_port={BARE_PORT}\n"
            f"public_key={peer}\nendpoint={other.ipv4}:{BARE_PORT}\n"
            f"allowed_ip={BARE_ADDRESSES[1 - number]}/32\n",
        )
        own = BARE_ADDRESSES[number]
        ip_batch(
            [f"link set {BARE} mtu {mtu} up", f"addr add {own}/24 dev {BARE}"],
            inside=host.namespace,
        )


def _configure(host: Host, facts: str) -> None:
    # Resolved here: an absolute link below /proc/PID/root would lead out of it.
    directory = Path("/var/run/wireguard").resolve().relative_to("/")
    path = Path("/proc", str(host.holder_pid), "root", directory, f"{BARE}.sock")
    deadline = time.monotonic() + 10.0
    with socket.socket(socket.AF_UNIX) as control:
        while True:
            try:
                control.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise BenchError(f"{BARE} did not start") from None
                time.sleep(0.01)
        control.sendall(f"set=1\n{facts}\n".encode())
        if b"errno=0" not in control.recv(4096):
            raise BenchError(f"{BARE} refused its configuration")


BENCHMARKS = (
    Benchmark(
        "throughput",
        unit="ratio",
        what="TCP through the mesh, against a bare device of the same program on the same path",
        target=Target(median=0.97, more_is_better=True),
        attempts=10,
        run=_ratios,
    ),
)
