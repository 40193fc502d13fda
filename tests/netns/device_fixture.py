"""What tests of real WireGuard devices share: namespaces, devices in them, a convergence loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scope_agent.wireguard.device import ApplyError, DesiredDevice, DesiredPeer, ObservedDevice
from scope_agent.wireguard.plan import plan_device
from scope_agent.wireguard.shell import Device, choose_device

from scope.model import DeviceKind, Endpoint, IPAddress, PublicKey, Secret

# The virtual machine with kernel WireGuard sets this to "Kernel"; elsewhere the process is what there is.
KIND = DeviceKind(os.environ.get("SCOPE_TEST_DEVICE", DeviceKind.USER_SPACE.value))
# An emulated machine is some twenty times slower.
PATIENCE = 120.0 if KIND is DeviceKind.KERNEL else 60.0

_CLONE_NEWNET = 0x4000_0000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()

T = TypeVar("T")


def run(awaitable: Coroutine[Any, Any, T]) -> T:
    """Wait for one call of a device."""
    return asyncio.run(awaitable)


class Namespace:
    """A network namespace without a name, which lasts as long as this object."""

    def __init__(self) -> None:
        with _back_afterwards():
            _check(_libc.unshare(_CLONE_NEWNET))
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Run a block, and whatever threads and programs it starts, inside."""
        with _back_afterwards():
            _check(_libc.setns(self._descriptor, _CLONE_NEWNET))
            yield

    def ip(self, *arguments: str) -> str:
        """Run one `ip` command inside and return what it prints."""
        with self.entered():
            return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout

    def path(self) -> str:
        """A path by which another program of this machine can name it."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Let the kernel take it down once nobody is inside."""
        os.close(self._descriptor)


def connect(left: Namespace, right: Namespace, left_addresses: list[str], right_addresses: list[str]) -> None:
    """Join two namespaces by a veth pair, `up0` on both sides, with addresses usable at once."""
    left.ip("link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", right.path())
    for namespace, addresses in ((left, left_addresses), (right, right_addresses)):
        for address in addresses:
            flags = ["nodad"] if ":" in address else []
            namespace.ip("address", "add", address, "dev", "up0", *flags)
        namespace.ip("link", "set", "up0", "up")


@dataclass(frozen=True, slots=True)
class Machine:
    """A namespace with a device in it."""

    namespace: Namespace
    device: Device

    def agree(self, desired: DesiredDevice) -> ObservedDevice:
        """Plan and apply until nothing is left to do; what fails is tried again, as the agent does."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                run(self.device.keep(desired))
                observed = run(self.device.observe())
                actions = plan_device(desired, observed)
                if not actions:
                    return observed
                for action in actions:
                    run(self.device.apply(action))
            except ApplyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            assert time.monotonic() < deadline, "the device does not become what is desired"


@contextlib.contextmanager
def machine(namespace: Namespace, run_dir: Path, *, name: str | None = None) -> Iterator[Machine]:
    """A device of a name that no other test uses; torn down afterwards."""
    with namespace.entered():
        device = choose_device(name or unused_name(), run_dir=run_dir, only=KIND)
        run(device.observe())  # its thread starts here, inside
    try:
        yield Machine(namespace, device)
    finally:
        run(device.delete())
        run(device.close())


def unused_name() -> str:
    """A device name: control sockets of user-space WireGuard are shared by all namespaces."""
    return f"sct{os.getpid()}n{next(_numbers)}"


@dataclass(frozen=True, slots=True)
class Keys:
    """A key pair."""

    private: Secret
    public: PublicKey


def make_keys(seed: int) -> Keys:
    """The key pair of a number: tests are the same every time."""
    raw = seed.to_bytes(32, "big")
    public = X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()
    return Keys(Secret(raw), PublicKey(public))


def desired_device(
    name: str, keys: Keys, *peers: DesiredPeer, port: int, addresses: tuple[str, ...] = ("10.9.0.1/16",)
) -> DesiredDevice:
    """A device with the routes and guards of its addresses' prefixes."""
    interfaces = frozenset(ip_interface(address) for address in addresses)
    prefixes = frozenset(interface.network for interface in interfaces)
    return DesiredDevice(
        name=name,
        private_key=keys.private,
        public_key=keys.public,
        listen_port=port,
        mtu=1380,
        addresses=interfaces,
        routes=prefixes,
        guarded=prefixes,
        peers={peer.key: peer for peer in peers},
    )


def peer_at(
    keys: Keys, endpoint: str | None, *allowed_ips: str, keepalive: int = 0, psk: bytes | None = None
) -> DesiredPeer:
    """A desired peer, from text."""
    return DesiredPeer(
        keys.public,
        endpoint=None if endpoint is None else Endpoint.parse(endpoint),
        allowed_ips=frozenset(ip_network(prefix) for prefix in allowed_ips),
        keepalive=keepalive,
        psk=None if psk is None else Secret(psk),
    )


@contextlib.contextmanager
def echo(namespace: Namespace, address: IPAddress, port: int) -> Iterator[None]:
    """Answer every UDP datagram to an address with itself."""
    with namespace.entered():
        server = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        server.bind((str(address), port))
    server.settimeout(0.05)
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                data, sender = server.recvfrom(2048)
                server.sendto(data, sender)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        server.close()


def lost_while(
    namespace: Namespace, address: IPAddress, port: int, act: Callable[[int], None], *, steps: int = 20
) -> int:
    """How many of `steps` x 10 numbered datagrams found no echo; `act(step)` runs amid each ten."""
    with namespace.entered():
        client = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
        client.connect((str(address), port))
    client.settimeout(0.002)
    missing = set(range(steps * 10))

    def collect() -> None:
        with contextlib.suppress(TimeoutError, ConnectionRefusedError):
            while True:
                missing.discard(int(client.recv(64)))

    for step in range(steps):
        for number in range(10):
            client.send(str(step * 10 + number).encode())
            if number == 5:
                act(step)
            collect()
    deadline = time.monotonic() + PATIENCE / 10
    while missing and time.monotonic() < deadline:
        collect()
    client.close()
    return len(missing)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Return once `holds`; fail after a time that no working device needs."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@contextlib.contextmanager
def one_processor() -> Iterator[None]:
    """Send within: what passes virtual links waits at the sender's processor, and else may overtake there."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def _back_afterwards() -> Iterator[None]:
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _check(_libc.setns(home, _CLONE_NEWNET))
        os.close(home)


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
