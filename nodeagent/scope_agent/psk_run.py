"""`scope-agent psk`: lay rotated pre-shared keys on a WireGuard device that something else manages.

The asyncio shell of `psk_agent`, and what is asked of it: the line for other machines' peers files, its
status, and its leaving. What it keeps is in a directory named after the interface; no mesh has such a name.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scope.channel import BOOT_ID_BYTES, Channel
from scope.model import ConfigError, Secret
from scope.resources.problems import InvalidResource
from scope_agent.inputs import DeviceBatch, NudgeTunnel, Observe, Output, Reply, SavePsk, Send, Socket
from scope_agent.loop import AgentLoop
from scope_agent.mesh_loop import RunConfig, read_records, set_up_keys
from scope_agent.peers_file import ForeignPeer, PeersFile, parse_peers, render_line
from scope_agent.psk.choice import KeyChoice
from scope_agent.psk.identity import KeyMaker
from scope_agent.psk_agent import ForeignDevice, PskAgent, plan_alone
from scope_agent.state import StateDir, sole_agent
from scope_agent.wireguard.device import SetPsk
from scope_agent.wireguard.shell import Device, existing_device, open_probe_socket

log = logging.getLogger(__name__)

LEAVE_PATIENCE = 900.0  # seconds: a rotation that is under way ends first, and what is lost is tried again
POLL = 1.0
ANSWER_SECONDS = 10.0
MAX_ANSWER = 16 << 20


class NoAgent(ConfigError):
    """None answers: none runs, or it hangs."""


class Left(ConfigError):
    """Every pair has its manager's key again: to start the agent again would key them anew."""


@dataclass(frozen=True, slots=True)
class PskConfig:
    """Which device, where things are kept, and what keys are made by."""

    interface: str
    root: Path
    run_dir: Path
    keys: KeyChoice

    @property
    def state(self) -> StateDir:
        """Its directory."""
        return StateDir(f"@{self.interface}", self.root)

    @property
    def socket(self) -> Path:
        """Where the agent answers."""
        return self.run_dir / f"@{self.interface}.sock"


class PskRunner(AgentLoop[PskAgent]):
    """The agent of one device in its world. Raises ConfigError from `run` where a person must act."""

    def __init__(
        self, config: PskConfig, agent: PskAgent, device: Device, *, listen_port: int, fwmark: int
    ) -> None:
        super().__init__(
            agent,
            device=device,
            probe=open_probe_socket(listen_port, fwmark=fwmark),
            state=config.state,
            socket=config.socket,
        )

    async def run(self) -> None:
        """Run until `stop`; the keys stay as they are. Raises ConfigError."""
        await self._run()

    def _perform(self, output: Output) -> None:
        match output:
            case Send(Socket() as leg, data):
                self._send_probe(leg, data)
            case DeviceBatch():
                self._spawn(self._apply(output))
            case Observe():
                self._spawn(self._observe())
            case SavePsk():
                self._spawn(self._save_psk(output))
            case NudgeTunnel(address=address):
                self._nudge(address)
            case Reply():
                self._reply(output)
            case _:
                raise AssertionError(f"an output of meshes: {type(output).__name__}")

    def _performed(self) -> None:
        if self._agent.replaced:
            self._fail(ConfigError(self._agent.replaced))
        elif self._agent.has_left:
            self._state.forget_psk()  # before the socket is gone: whoever asked to leave looks for this
            self._fail(
                Left(
                    f"{self._device.name} has its manager's keys again: to start this agent again lays new "
                    "ones on it"
                )
            )


def run_psk(config: PskConfig, peers_path: Path) -> None:
    """Be the agent of a device until a signal. Raises ConfigError, ApplyError."""
    peers = read_peers(peers_path)

    async def run() -> None:
        device = existing_device(config.interface, run_dir=config.run_dir)
        try:
            found = await find_device(device)
            refuse_own_line(peers_path, peers, found)
            agent = PskAgent(
                found,
                peers,
                channel=Channel(secret=probe, boot_id=secrets.token_bytes(BOOT_ID_BYTES)),
                maker=maker,
                records=read_records(state),
                random=secrets.SystemRandom().random,
                now=time.monotonic(),
                wall=time.time(),
            )
            runner = PskRunner(config, agent, device, listen_port=found.listen_port, fwmark=found.fwmark)
        except BaseException:
            await device.close()
            raise
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, runner.stop)
        await runner.run()

    state = config.state
    probe, maker = _own_keys(config)
    with sole_agent(state, config.run_dir, keys=state.probe_file):  # its name is that of the interface
        asyncio.run(run())


def refuse_own_line(path: Path, peers: PeersFile, device: ForeignDevice) -> None:
    """Raises ConfigError where a peers file names the very device that it is for."""
    if device.key in peers.peers:
        raise ConfigError(
            f"{path}: {peers.peers[device.key].name} has the public key of {device.name} itself: the file "
            "holds the lines of the other machines"
        )


def show_psk(config: PskConfig) -> str:
    """The line that stands for this machine in another's peers file. Raises ConfigError, ApplyError."""

    async def find() -> ForeignDevice:
        device = existing_device(config.interface, run_dir=config.run_dir)
        try:
            return await find_device(device)
        finally:
            await device.close()

    found = asyncio.run(find())
    probe, maker = _own_keys(config)
    public = Channel(secret=probe, boot_id=bytes(BOOT_ID_BYTES)).public_key
    identity = maker.identity.public.fingerprint()
    return render_line(ForeignPeer(socket.gethostname(), found.key, public, identity))


def status_psk(config: PskConfig) -> str:
    """A table of what the running agent says. Raises ConfigError."""
    status = _ask(config, "status")["status"]
    rows = [("PEER", "AGENT", "ENDPOINT", "POST-QUANTUM KEY", "")]
    rows += [
        (
            peer["name"],
            "answers" if peer["reached"] else "silent",
            peer["endpoint"] or "-",
            _shown_key(peer["psk"]),
            peer["reason"],
        )
        for peer in status["peers"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(f"{row[i]:{widths[i]}}" for i in range(4)), row[4]]).rstrip() for row in rows]
    lines += [f"{each['type']}: {each['message']}" for each in status["conditions"]]
    return "\n".join(lines)


def rotate_psk(config: PskConfig) -> str:
    """Have new keys made now. Raises ConfigError."""
    count = _ask(config, "rotate")["peers"]
    return f"Agreeing on new keys with {count} peers; each is proved by WireGuard's next handshake."


def leave_psk(config: PskConfig, *, is_forced: bool) -> str:
    """Have every pair go back to its manager's key; ends the agent. Raises ConfigError."""
    try:
        away = await_managers_keys(
            lambda command: _ask(config, command),
            command="leave-forced" if is_forced else "leave",
            state=config.state,
        )
    except NoAgent:
        if not is_forced:
            raise
        with sole_agent(config.state, config.run_dir, keys=config.state.probe_file):
            away = take_back_alone(config.interface, config.state, config.run_dir)
    alone = f" On this side alone, their links end within minutes: {away}." if away else ""
    return f"{config.interface} has its manager's pre-shared keys again, and its agent has ended.{alone}"


def await_managers_keys(ask: Callable[[str], Mapping[str, Any]], *, command: str, state: StateDir) -> str:
    """Have an agent give the manager's keys back, and say meanwhile on stderr whom that waits for.

    The peers with whom only this side went back. Raises ConfigError.
    """
    away = str(ask(command)["away"])
    deadline, said = time.monotonic() + LEAVE_PATIENCE, ""
    while state.load_psk()[0]:
        time.sleep(POLL)
        try:
            awaited = ask("status")["status"]["awaited"]
        except ConfigError:
            if not state.load_psk()[0]:
                break
            raise
        names = ", ".join(each["name"] for each in awaited)
        if time.monotonic() > deadline:
            reasons = "; ".join(f"{each['name']}: {each['reason']}" for each in awaited if each["reason"])
            raise ConfigError(
                f"still keyed: {names} ({reasons}). The agent goes on trying; --force gives the earlier key "
                "back on this side alone"
            )
        if awaited and names != said:
            said, longest = names, max(each["seconds"] for each in awaited)
            within = f"{longest:.0f} s at most if nothing is lost"
            print(f"Going back to the manager's key, {within}, with {names}", file=sys.stderr)
    return away


def take_back_alone(interface: str, state: StateDir, run_dir: Path) -> str:
    """Give the manager's keys back where no agent runs: the public keys of the peers that this was for.

    For who holds the lock of `sole_agent`. Raises ConfigError, ApplyError.
    """

    async def take_back() -> tuple[SetPsk, ...]:
        device = existing_device(interface, run_dir=run_dir)
        try:
            planned = plan_alone(await device.observe(), read_records(state))
            for action in planned:
                await device.apply(action)
        finally:
            await device.close()
        return planned

    alone = asyncio.run(take_back())
    state.forget_psk()
    return ", ".join(str(action.key) for action in alone)


def read_peers(path: Path) -> PeersFile:
    """Read a peers file. Raises ConfigError."""
    import yaml  # of no use to an agent of a mesh

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    try:
        return parse_peers(document)
    except InvalidResource as error:
        raise ConfigError(f"{path}: {error}") from None


async def find_device(device: Device) -> ForeignDevice:
    """What identifies the device. Raises ConfigError, ApplyError."""
    seen = await device.observe()
    if not seen.exists or seen.public_key is None or not seen.listen_port:
        raise ConfigError(f"{device.name} has no key or no port: bring it up first")
    return ForeignDevice(device.name, seen.public_key, seen.listen_port, seen.fwmark)


def _own_keys(config: PskConfig) -> tuple[Secret, KeyMaker]:
    """The keys of this device's agent, made at the first call. Raises ConfigError."""
    state = config.state
    state.prepare()
    maker = set_up_keys(RunConfig(state, run_dir=config.run_dir, keys=config.keys))
    return state.probe_secret(secrets.token_bytes), maker


def _ask(config: PskConfig, command: str) -> Mapping[str, Any]:
    """One command and its answer. Raises ConfigError."""
    start = f"`scope-agent psk --interface {config.interface}`"
    return ask_agent(config.socket, command, of=config.interface, start=start)


def ask_agent(path: Path, command: str, *, of: str, start: str) -> Mapping[str, Any]:
    """A command to the agent of a device or mesh, and its answer; `start` starts one.

    Raises NoAgent, ConfigError.
    """
    answer = bytearray()
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(ANSWER_SECONDS)
            agent.connect(os.fspath(path))
            agent.sendall(json.dumps({"command": command}).encode() + b"\n")
            while not answer.endswith(b"\n") and len(answer) < MAX_ANSWER:
                chunk = agent.recv(1 << 16)
                if not chunk:
                    break
                answer += chunk
        said = json.loads(answer)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it ended"
        raise NoAgent(f"no agent answers for {of} at {path} ({reason}): is {start} running?") from None
    if not said.get("ok"):
        raise ConfigError(str(said.get("error")))
    return dict(said)


def _shown_key(psk: Mapping[str, Any]) -> str:
    if not psk["epoch"]:
        return "-"
    return f"#{psk['epoch']} for {_age(psk['ageSeconds'])}, suite {psk['suite']}, trust {psk['trust'] or '-'}"


def _age(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{minutes}m" if minutes < 120 else f"{hours:.0f}h" if hours < 48 else f"{hours / 24:.0f}d"
