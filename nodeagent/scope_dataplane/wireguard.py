"""`scope-wireguard NAME --state FILE`: keeps a user-space WireGuard process running, whatever the agent does.

The agent writes the state file and configures the running process itself; this supervisor only starts the
process and, when it has crashed, starts it again and puts the file's configuration back. The TUN device is
persistent: addresses and routes stay on it while no process is attached, and what is sent into it is dropped,
not sent elsewhere.

- It waits for the state file, so a service manager may start it before the agent.
- When it is stopped or killed the process goes on, and the next supervisor adopts it: nothing is lost.
- When the state file is removed, it ends the process and itself, with status 0. Nothing else ends them.
- It holds a lock beside the state file for as long as it runs: one supervisor a device. With --take-over a
  second one waits until the first has ended, and goes on in its place at once. The locked file says what to
  expect: nothing (it waits for the state file), `starting` (the process is not there, or not configured yet:
  leave it alone) or `ready`.

The state file is JSON: `version` (1), `mtu` (bytes) and `uapi`, one configuration operation in WireGuard's
own protocol. Secrets go from the file into the socket and nowhere else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import time

from scope.core_dumps import forbid_core_dumps
from scope_dataplane.process import await_lock, log, take_lock

CONTROL_SOCKETS = "/var/run/wireguard"  # fixed by the program

# boringtun-cli (0.7) is no choice: it ends at the first change to a peer that it knows, tells the age of a
# handshake where its time is asked for, and does not tell its key.
PROGRAM = "wireguard-go"

LOOK_INTERVAL = 0.25  # how soon the removal of the state file is noticed
WAIT_INTERVAL = 0.05  # how soon its appearance is
START_TIMEOUT = 10.0
ANSWER_TIMEOUT = 10.0
STOP_TIMEOUT = 5.0

# The first restart is immediate; a process that dies at once is then given ever more time.
STABLE_AFTER = 5.0
FIRST_BACKOFF, LAST_BACKOFF = 0.1, 5.0

# What the lock file says, of one length, so that a reader sees one or the other.
STARTING, READY = b"starting", b"ready   "

_TUNSETIFF, _TUNSETPERSIST = 0x400454CA, 0x400454CB
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_SIOCSIFMTU = 0x8922


class Failed(Exception):
    """One attempt to start or configure the process failed; the next may not."""


def main(arguments: list[str] | None = None) -> int:
    """Supervise until the state file is removed. Exit status 0 then, 1 for what a person must mend."""
    parser = argparse.ArgumentParser(
        prog="scope-wireguard", description="Keep a user-space WireGuard process running for scope-agent."
    )
    parser.add_argument("name", metavar="NAME", help="the network interface")
    parser.add_argument("--state", required=True, metavar="FILE", help="the state file that the agent writes")
    parser.add_argument(
        "--take-over", action="store_true", help="wait for the end of one that runs for NAME already"
    )
    options = parser.parse_args(arguments)
    forbid_core_dumps()  # nor does wireguard-go leave one, which has the limit from here
    program = _find_program()
    if program is None:
        return _complain(f"{PROGRAM} is not on the PATH: install the package of that name")
    path = os.path.splitext(options.state)[0] + ".lock"
    lock = take_lock(path)
    if lock is None:
        if not options.take_over:
            return _complain(f"another scope-wireguard runs for {options.name}")
        _log(f"another scope-wireguard runs for {options.name}: waiting for its end")
        lock = await_lock(path)
    if not os.path.exists(options.state):
        os.ftruncate(lock, 0)
        while not os.path.exists(options.state):
            time.sleep(WAIT_INTERVAL)
    _supervise(options.name, options.state, lock=lock, program=program)
    return 0


def _supervise(name: str, state: str, *, lock: int, program: str) -> None:
    backoff = 0.0
    while os.path.exists(state):
        started = time.monotonic()
        try:
            pid = _running_pid(name)
            if pid is None:
                os.pwrite(lock, STARTING, 0)
                pid = _start(name, program)
            if os.pread(lock, len(READY), 0) != READY:
                _configure(name, state)
                os.pwrite(lock, READY, 0)
            _log(f"process {pid} carries {name}")
            _wait(pid, state)
            _log(f"process {pid} ended")
        except Failed as error:
            _log(str(error))
        if time.monotonic() - started > STABLE_AFTER:
            backoff = 0.0
            continue
        time.sleep(backoff)
        backoff = min(max(FIRST_BACKOFF, 2 * backoff), LAST_BACKOFF)


def _start(name: str, program: str) -> int:
    """Start the process on the persistent TUN and return its pid."""
    _make_tun(name)
    environment = {**os.environ, "LOG_LEVEL": "error"}
    # In a session of its own: what is sent to our process group does not reach it.
    pid = os.posix_spawn(program, [program, "--foreground", name], environment, setsid=True)
    deadline = time.monotonic() + START_TIMEOUT
    while _running_pid(name) is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            raise Failed(f"{program} ended at its start with status {os.waitstatus_to_exitcode(status)}")
        if time.monotonic() > deadline:
            _stop(pid)
            raise Failed(f"{program} did not open its control socket")
        time.sleep(0.005)
    return pid


def _configure(name: str, state: str) -> None:
    """Put the file's configuration into the process. One that is refused leaves the process as it is."""
    try:
        with open(state, encoding="utf-8") as file:
            content = json.load(file)
        version, operation, mtu = content["version"], str(content["uapi"]), int(content["mtu"])
    except (OSError, ValueError, KeyError, TypeError):
        _log(f"{state} cannot be read; the agent writes it anew")
        return
    if version != 1:
        _log(f"{state} is of version {version}, and this program reads 1: upgrade it with the agent")
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SIOCSIFMTU, struct.pack("16sI12x", name.encode(), mtu))
        answer = _ask(name, operation)
    except OSError as error:
        raise Failed(f"{name} cannot be configured: {error.strerror}") from None
    if not answer.endswith("errno=0\n\n"):
        _log(f"{name} refused the configuration in {state}: {answer.strip()[-20:]}")


def _wait(pid: int, state: str) -> None:
    """Return when the process has ended; end it when the state file is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(LOOK_INTERVAL * 1000):
            if not os.path.exists(state):
                _log("the state file is gone: ending")
                _stop(pid)
                return
    finally:
        os.close(descriptor)
        _reap(pid)


def _stop(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        if not poll.poll(STOP_TIMEOUT * 1000):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            poll.poll(STOP_TIMEOUT * 1000)
    except ProcessLookupError:
        pass  # it ended by itself
    finally:
        os.close(descriptor)
        _reap(pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # an adopted one is for init to reap
        os.waitpid(pid, os.WNOHANG)


def _make_tun(name: str) -> None:
    """Make the TUN device, or find it; it stays when nobody holds it."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
            fcntl.ioctl(descriptor, _TUNSETPERSIST, 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failed(f"the TUN device {name} cannot be made: {error.strerror}") from None


def _running_pid(name: str) -> int | None:
    """The process behind the control socket, ours or an earlier supervisor's."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(_control(name))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return None
    pid: int = struct.unpack("iII", credentials)[0]
    return pid or None


def _ask(name: str, operation: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_TIMEOUT)
        connection.connect(_control(name))
        connection.sendall(operation.encode())
        answer = b""
        while not answer.endswith(b"\n\n") and len(answer) < 4096 and (chunk := connection.recv(4096)):
            answer += chunk
    return answer.decode("ascii", "replace")


def _control(name: str) -> str:
    return f"{CONTROL_SOCKETS}/{name}.sock"


def _find_program() -> str | None:
    paths = (os.path.join(folder, PROGRAM) for folder in os.get_exec_path())
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), None)


def _log(event: str) -> None:
    log("scope-wireguard", event)


def _complain(sentence: str) -> int:
    _log(sentence)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
