"""WireGuard in a process of its own (wireguard-go), over its configuration socket.

The process belongs to `scope-wireguard`, which outlives the agent and restarts it from the state file that
`keep` writes. That the supervisor runs shows by the lock it holds, and that the process is configured by the
word `ready` in the locked file: until then the device does not exist for us, or both would configure it at
once. The supervisor ends, with the process, once the state file is gone. A service manager may have started
it (it waits for the file); otherwise the agent does, unless it is told that one runs beside it: what an agent
starts in a container ends with that, and would keep the supervisor of the other container away.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

from scope.model import ConfigError, DeviceKind, PublicKey, Secret
from scope_agent.wireguard import uapi
from scope_agent.wireguard.device import (
    Action,
    AddAddress,
    AddGuard,
    AddRoute,
    ApplyError,
    CreateDevice,
    DesiredDevice,
    DesiredPeer,
    ObservedDevice,
    ObservedPeer,
    PortTaken,
    RemoveAddress,
    RemoveGuard,
    RemoveRoute,
    SetListenPort,
    SetMtu,
    SetUp,
)
from scope_agent.wireguard.shell.links import Links, failure
from scope_agent.wireguard.shell.process import DataplaneProcess, is_locked

PROGRAM = "wireguard-go"
CONTROL_SOCKETS = Path("/var/run/wireguard")  # fixed by the program

# A Python and a Go process start in a tenth of this, also on a loaded machine.
START_TIMEOUT = 10.0
ANSWER_TIMEOUT = 10.0
_POLL_INTERVAL = 0.005
# What is kept grows with the mesh, and while a large one forms it changes many times a second. The agent puts
# right what a crash brings back; the file is for when it is away. So after a write that took t seconds the
# next one waits KEEP_SHARE times t, unless it is short, or takes something away.
KEEP_SHARE = 25.0
KEEP_AT_ONCE = 64  # peers: rendering them takes a millisecond
_ANSWER_BYTES = 64 << 20  # 10,000 peers with routes are 6 MB; a process gone wrong must not fill our memory


class UserSpaceDevice:
    """A `scope_agent.wireguard.shell.device.Driver` on a user-space WireGuard process."""

    kind = DeviceKind.USER_SPACE

    def __init__(self, name: str, links: Links, run_dir: Path, *, beside: bool = False) -> None:
        self._name = name
        self._links = links
        self._beside = beside
        self._control = control_socket(name)
        state = state_path(run_dir, name)
        self._process = DataplaneProcess("wireguard", state, name, "--state", str(state))
        self._public_keys: tuple[Secret, PublicKey] | None = None
        self._told: dict[int, ObservedPeer] = {}
        self._kept: DesiredDevice | None = None  # what the state file holds
        self._to_keep: DesiredDevice | None = None  # what it is to hold once `_keep_after` has come
        self._keep_after = 0.0

    def observe(self) -> ObservedDevice:
        """Read everything; without its process the device does not exist. Raises ApplyError, ConfigError."""
        self._keep_due()
        facts = self._links.observe()
        observed = ObservedDevice(
            self._name, addresses=facts.addresses, routes=facts.routes, guarded=facts.guarded
        )
        answer = self._ask_if_running(uapi.GET) if facts.link is not None and self._is_ready() else None
        if facts.link is None or answer is None:
            return observed
        try:
            said = uapi.parse_device(answer, told=self._told)
        except uapi.UapiError as error:
            raise ApplyError(f"Reading peers of {self._name}: {error}") from None
        self._told = said.told
        return replace(
            observed,
            exists=True,
            up=facts.link.up,
            mtu=facts.link.mtu,
            public_key=None if said.private_key is None else self._public_key(said.private_key),
            listen_port=said.listen_port,
            fwmark=said.fwmark,
            peers=said.peers,
        )

    def apply(self, action: Action) -> None:
        """Perform one action. Raises ApplyError, ConfigError."""
        match action:
            case CreateDevice():
                self._start()
            case (
                SetMtu()
                | SetUp()
                | AddAddress()
                | RemoveAddress()
                | AddRoute()
                | RemoveRoute()
                | AddGuard()
                | RemoveGuard()
            ):
                self._links.apply(action)
            case _:
                if isinstance(action, SetListenPort):
                    if self._holds(action.port):
                        return
                    _refuse_taken_port(action.port)
                self._set(uapi.render_action(action), f"{type(action).__name__} on {self._name}")

    def keep(self, desired: DesiredDevice) -> None:
        """Write the state file, and see that a supervisor stands by to read it. Raises ApplyError.

        A long file that changes often is written less often: by a later `keep` or `observe`, or by `close`.
        """
        self._to_keep = desired
        self._keep_due(at_once=self._kept is None or _is_urgent(self._kept, desired))
        if self._links.find() is not None and not self._beside:
            self._process.ensure_running()

    def _keep_due(self, *, at_once: bool = False) -> None:
        desired, kept, began = self._to_keep, self._kept, time.monotonic()
        if desired is None:
            return
        is_there = self._process.file.exists()
        if kept is not None and is_there and _is_kept(kept, desired):
            self._to_keep = None
        elif at_once or not is_there or began >= self._keep_after:
            self._process.write(uapi.render_state(desired))
            self._kept, self._to_keep = desired, None
            ended = time.monotonic()
            self._keep_after = ended + KEEP_SHARE * (ended - began)

    def delete(self) -> None:
        """Remove the state file, wait for supervisor and process to end, remove the TUN."""
        self._kept = self._to_keep = None
        self._process.end(START_TIMEOUT, terminate=False)  # it ends the process behind the device first
        self._links.delete()
        self._process.forget()

    def close(self) -> None:
        """Give the descriptors back; device, process and supervisor stay."""
        try:
            self._keep_due(at_once=True)
        finally:
            self._links.close()

    def _start(self) -> None:
        """Start what is not running and wait until it answers and is configured."""
        if not self._process.file.exists():
            self._process.write(uapi.BLANK_STATE)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready() or self._ask_if_running(uapi.GET) is None:
            if not self._beside:
                self._process.ensure_running()
            if time.monotonic() > deadline:
                log = "the log of scope-wireguard, which runs beside" if self._beside else self._process.log
                raise ApplyError(f"{self._name} did not start in {START_TIMEOUT:.0f} s; see {log}")
            time.sleep(_POLL_INTERVAL)

    def _is_ready(self) -> bool:
        try:
            return self._process.lock.read_bytes().rstrip() == b"ready"
        except FileNotFoundError:
            return False

    def _set(self, operation: str, doing: str) -> None:
        answer = self._ask_if_running(operation)
        if answer is None:
            raise ApplyError(f"{doing}: the process behind {self._name} does not run")
        try:
            code = uapi.parse_errno(answer)
        except uapi.UapiError as error:
            raise ApplyError(f"{doing}: {error}") from None
        if code:
            raise failure(doing, OSError(code, os.strerror(code)))

    def _ask_if_running(self, operation: str) -> str | None:
        """One operation over a connection of its own; None where no process answers."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            try:
                connection.connect(str(self._control))
                connection.sendall(operation.encode())
                answer = bytearray()
                while not answer.endswith(b"\n\n"):
                    chunk = connection.recv(1 << 16)
                    if not chunk:
                        return None
                    answer += chunk
                    if len(answer) > _ANSWER_BYTES:
                        raise ApplyError(f"The process behind {self._name} answers without end")
            except TimeoutError:
                raise ApplyError(
                    f"The process behind {self._name} did not answer in {ANSWER_TIMEOUT:.0f} s"
                ) from None
            except OSError as error:
                if error.errno in {errno.EACCES, errno.EPERM}:
                    raise failure(f"Asking {self._control}", error) from None
                return None
        return answer.decode("ascii", "replace")

    def _holds(self, port: int) -> bool:
        """Whether the process has that port: the supervisor may have been first to set it."""
        answer = self._ask_if_running(uapi.GET)
        try:
            return answer is not None and uapi.parse_device(answer).listen_port == port
        except uapi.UapiError as error:
            raise ApplyError(f"Reading {self._name}: {error}") from None

    def _public_key(self, private: Secret) -> PublicKey:
        """The protocol tells the private half only; the public one is computed once a key."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        if self._public_keys is None or self._public_keys[0] != private:
            public = X25519PrivateKey.from_private_bytes(private.raw).public_key().public_bytes_raw()
            self._public_keys = (private, PublicKey(public))
        return self._public_keys[1]


class ForeignUserSpaceDevice(UserSpaceDevice):
    """A user-space device that something else made and manages: read, and given pre-shared keys."""

    def _is_ready(self) -> bool:
        return True


def control_socket(name: str) -> Path:
    """Where a user-space WireGuard of any maker is configured."""
    return CONTROL_SOCKETS / f"{name}.sock"


def _is_urgent(kept: DesiredDevice, desired: DesiredDevice) -> bool:
    """Whether the file of `kept` should be replaced at once: it is short, or brings back what is gone."""
    is_short = len(desired.peers) <= KEEP_AT_ONCE
    return is_short or bool(kept.peers.keys() - desired.peers.keys()) or _rest(kept) != _rest(desired)


def _is_kept(kept: DesiredDevice, desired: DesiredDevice) -> bool:
    """Whether both make the same file."""
    if kept.peers.keys() != desired.peers.keys() or _rest(kept) != _rest(desired):
        return False
    others = ((kept.peers[key], peer) for key, peer in desired.peers.items())
    return all(before is peer or _put_back(before) == _put_back(peer) for before, peer in others)


def _rest(device: DesiredDevice) -> DesiredDevice:
    return replace(device, peers={})


def _put_back(peer: DesiredPeer) -> tuple[object, ...]:
    """What of a peer a crash would bring back."""
    return peer.endpoint, peer.allowed_ips, peer.keepalive, peer.psk


def state_path(run_dir: Path, name: str) -> Path:
    """Where the state file of a device lies."""
    return run_dir / "wireguard" / f"{name}.json"


def lock_path(run_dir: Path, name: str) -> Path:
    """The file that a device's supervisor holds locked."""
    return run_dir / "wireguard" / f"{name}.lock"


def is_ours(run_dir: Path, name: str) -> bool:
    """Whether a TUN of that name was made by Scope in this run directory."""
    return state_path(run_dir, name).exists() or lock_path(run_dir, name).exists()


def require_program(run_dir: Path, name: str) -> None:
    """Raises ConfigError, naming the package, where no user-space WireGuard could run.

    What a `scope-wireguard` needs that waits for us already is its affair: it may be in another container.
    """
    if is_locked(lock_path(run_dir, name)):
        return
    if not any(_is_program(Path(folder) / PROGRAM) for folder in os.get_exec_path()):
        raise ConfigError(
            f"This kernel has no WireGuard, and {PROGRAM} is not on the PATH. Install it (Debian, Ubuntu: "
            "apt install wireguard-go), or a kernel with the module `wireguard`"
        )
    if not Path("/dev/net/tun").exists():
        raise ConfigError(
            "User-space WireGuard needs /dev/net/tun: load the module `tun` (modprobe tun), or pass the "
            "device into the container; on Kubernetes set wireguard.enabled of the chart"
        )


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _refuse_taken_port(port: int) -> None:
    """A process that is not up yet takes any port, fails later and tells nobody: try the port first."""
    if port == 0:
        return
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as trial:
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                trial.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(
                    f"UDP port {port} is held by another program; stop it (`ss -ulpn` names it) or choose "
                    "another port"
                ) from None
