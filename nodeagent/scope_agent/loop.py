"""The asyncio loop that any agent of ours runs in: it feeds the agent and performs what comes out.

The loop takes the inbox until the agent's timer, hands each input to the agent, and has each output
performed without waiting for it: datagrams leave at once; device and disk work in tasks that post their
result back. What an agent does besides, `run` and `psk_run` add.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from scope.model import ConfigError, IPAddress
from scope_agent.inbox import Inbox
from scope_agent.inputs import (
    Applied,
    CommandArrived,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    Failed,
    Input,
    Output,
    PskSaved,
    Reply,
    SavePsk,
    Socket,
    Target,
)
from scope_agent.psk.shell.nudging import nudge
from scope_agent.state import StateDir
from scope_agent.wireguard.device import ApplyError, HoldEndpoint, PortTaken
from scope_agent.wireguard.shell import Device, ProbeSocket
from scope_agent.wireguard.shell.probe_socket import READ_AT_ONCE

if TYPE_CHECKING:
    from scope_agent.relay.counting import Counted

log = logging.getLogger(__name__)

READ_AGAIN_AFTER = 0.02  # seconds of handling inputs: what arrives meanwhile is to be told its time
COMMAND_LINE = 16384  # bytes of one request on the local socket; the certificate of an identity has 4,564
SLOW_LOOP = 0.1  # an input that held the loop for so long is worth a line in the log


class SansIo(Protocol):
    """An agent as its loop sees it."""

    @property
    def listen_port(self) -> int:
        """WireGuard's UDP port."""

    def receive(self, event: Input, now: float) -> None:
        """Take one input."""

    def handle_timer(self, now: float) -> None:
        """Do what is due."""

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""

    def outputs(self) -> list[Output]:
        """What is to be performed now, in order."""


_Agent = TypeVar("_Agent", bound=SansIo)


class AgentLoop(abc.ABC, Generic[_Agent]):
    """One agent in its world. `socket` is where it answers commands."""

    def __init__(
        self, agent: _Agent, *, device: Device, probe: ProbeSocket, state: StateDir, socket: Path
    ) -> None:
        self._agent, self._device, self._probe, self._state = agent, device, probe, state
        self._socket = socket
        self._psk_lock = asyncio.Lock()  # records are written in the order in which they were decided
        self._inbox = Inbox()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._replies: dict[int, asyncio.Future[dict[str, object]]] = {}
        self._commands = 0
        self._unsent: dict[str, int] = {}
        self._failure: ConfigError | None = None
        self._stopping = False

    async def _run(self, *works: Awaitable[None]) -> None:
        """Run until `stop`, with what is to run beside. Raises ConfigError."""
        loop = asyncio.get_running_loop()
        for descriptor in self._probe.descriptors:
            loop.add_reader(descriptor, self._read_probes)
        for work in (self._observe(), *works, self._serve_commands()):
            self._spawn(work)
        try:
            await self._loop()
        finally:
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for descriptor in self._probe.descriptors:
                loop.remove_reader(descriptor)
            self._probe.close()
            await self._close()
            await self._device.close()
        if self._failure is not None:
            raise self._failure

    # --- what each agent adds ------------------------------------------------------------------------------

    @abc.abstractmethod
    def _perform(self, output: Output) -> None:
        """Perform one output."""

    def _performed(self) -> None:
        """Look at the agent after its outputs."""

    def _take(self, request: Mapping[str, object]) -> dict[str, object] | None:  # noqa: ARG002 - a hook
        """The answer to a command that is not for the agent. Raises KeyError, ConfigError for a wrong one."""
        return None

    async def _count(self) -> Counted | None:
        """What a hub relays, for its status."""
        return None

    def _add_losses(self, answer: Mapping[str, object]) -> dict[str, object]:
        """The agent's answer, with what the shell knows."""
        return dict(answer)

    async def _hold(self, hold: HoldEndpoint) -> None:
        """Hold an endpoint; who sets none has none to hold."""

    async def _close(self) -> None:
        """Give back what was added."""

    # --- the loop ------------------------------------------------------------------------------------------

    async def _loop(self) -> None:
        agent = self._agent
        while not self._stopping:
            now = time.monotonic()
            due = agent.get_timer()
            if due is not None and due <= now:
                agent.handle_timer(now)
                self._perform_all()
            self._take_inputs(until=time.monotonic() + READ_AGAIN_AFTER)
            due = agent.get_timer()
            delay = None if due is None else max(0.0, due - time.monotonic())
            self._wake.clear()
            if self._inbox or delay == 0.0:
                await asyncio.sleep(0)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._wake.wait()

    def _take_inputs(self, *, until: float) -> None:
        """Hand over what waits, one input at least."""
        while (event := self._inbox.take(now := time.monotonic())) is not None:
            self._agent.receive(event, now)
            self._perform_all()
            if (after := time.monotonic()) - now > SLOW_LOOP:
                log.debug("loop.slow seconds=%.3f", after - now)
            if after > until:
                return

    def _perform_all(self) -> None:
        for output in self._agent.outputs():
            self._perform(output)
        if self._agent.listen_port != self._probe.port:
            self._move_probe()
        self._performed()

    def _post(self, event: Input) -> None:
        """Queue an input."""
        self._inbox.put(event, time.monotonic())
        self._wake.set()

    def stop(self) -> None:
        """End `run`, soon."""
        log.info("agent.stopping device=%s it stays up", self._device.name)
        self._stopping = True
        self._wake.set()

    def _fail(self, error: ConfigError) -> None:
        """Stop: somebody must act."""
        self._failure = error
        self._stopping = True
        self._wake.set()

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        async def guarded() -> None:
            try:
                await work
            except ConfigError as error:
                self._fail(error)

        task = asyncio.ensure_future(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", exc_info=error)
            self._fail(
                ConfigError(f"scope-agent has a bug: {error!r}; the log has its trace, the device stays up")
            )

    # --- datagrams -----------------------------------------------------------------------------------------

    def _read_probes(self) -> None:
        """Read all there is: how long a datagram lay in the kernel's buffer, nobody could tell."""
        while self._inbox.has_room:
            own = self._probe.port
            arrived = [
                DatagramArrived(each.data, Socket(each.source, port=None if each.port == own else each.port))
                for each in self._probe.receive()
            ]
            for datagram in arrived:
                self._post(datagram)
            if len(arrived) < READ_AT_ONCE:
                return

    def _send_probe(self, leg: Socket, data: bytes) -> None:
        result = self._probe.send(leg.endpoint, data, ttl=leg.ttl, port=leg.port)
        if result.name != "SENT":
            self._unsent[result.name] = self._unsent.get(result.name, 0) + 1
            log.debug("probe.unsent endpoint=%s result=%s", leg.endpoint, result.name)

    def _move_probe(self) -> None:
        loop = asyncio.get_running_loop()
        for descriptor in self._probe.descriptors:
            loop.remove_reader(descriptor)
        self._probe.move(self._agent.listen_port)
        for descriptor in self._probe.descriptors:
            loop.add_reader(descriptor, self._read_probes)

    # --- device and disk -----------------------------------------------------------------------------------

    async def _apply(self, batch: DeviceBatch) -> None:
        try:
            if batch.desired is not None:
                await self._device.keep(batch.desired)
            for action in batch.actions:
                log.debug("device.apply action=%s", action)
                if isinstance(action, HoldEndpoint):
                    await self._hold(action)
                else:
                    await self._device.apply(action)
        except PortTaken as error:
            self._post(Failed(Target.DEVICE, str(error), port_taken=True))
            return
        except ApplyError as error:
            log.warning("device.failed error=%s", error)
            self._post(Failed(Target.DEVICE, str(error)))
            return
        self._post(Applied(Target.DEVICE))
        await self._observe()

    async def _observe(self) -> None:
        try:
            device = await self._device.observe()
        except ApplyError as error:
            log.warning("device.unreadable error=%s", error)
            self._post(Failed(Target.DEVICE, str(error)))
            return
        self._post(DeviceObserved(device, self._device.kind, time.time()))

    def _nudge(self, address: IPAddress) -> None:
        try:
            nudge(self._device.name, address)
        except OSError as error:
            log.debug("psk.nudge_unsent address=%s error=%s", address, error)

    async def _save_psk(self, save: SavePsk) -> None:
        async with self._psk_lock:
            error = ""
            try:
                await asyncio.to_thread(self._state.save_psk, save.peer, save.record)
            except ConfigError as failed:
                error = str(failed)
                log.warning("psk.unsaved peer=%s error=%s", save.peer, error)
        if save.record is not None:
            self._post(PskSaved(save.peer, error))

    # --- the local socket ----------------------------------------------------------------------------------

    async def _serve_commands(self) -> None:
        """Answer `scopectl status` and its like: one JSON object a line, root only."""
        path = self._socket
        before = os.umask(0o177)
        try:
            path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._serve_one, path, limit=COMMAND_LINE)
        except OSError as error:
            raise ConfigError(
                f"cannot answer `scopectl status` at {path}: {error.strerror or error}; name a directory "
                "with --run-dir where a socket can be made"
            ) from None
        finally:
            os.umask(before)
        try:
            await server.serve_forever()
        finally:
            path.unlink(missing_ok=True)

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                answer = await self._command(line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError, asyncio.CancelledError):
            pass  # the asker left, or sent a line beyond the limit; or the agent ends
        finally:
            writer.close()

    async def _command(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            command = str(request["command"])
            answer = self._take(request)
        except (ValueError, KeyError, TypeError, ConfigError):
            return {"ok": False, "error": 'one JSON object a line: {"command": "status"}'}
        if answer is not None:
            return answer
        counted = await self._count() if command == "status" else None
        self._commands += 1
        future: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()
        self._replies[self._commands] = future
        peer, argument = (str(request.get(name, "")) for name in ("peer", "argument"))
        self._post(CommandArrived(self._commands, command, peer, argument, counted))
        return await future

    def _reply(self, reply: Reply) -> None:
        future = self._replies.pop(reply.number, None)
        if future is not None and not future.done():
            future.set_result(self._add_losses(reply.value))
