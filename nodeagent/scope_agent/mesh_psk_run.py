"""The asyncio shell of a mesh's agent on a device that something else manages, and which shell a mesh needs.

Of the machine it touches nothing but pre-shared keys: no address, no route, no rule of the packet filter.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from scope.channel import BOOT_ID_BYTES, Channel
from scope.model import ConfigError, PublicKey
from scope_agent.inputs import (
    CommandArrived,
    DeviceBatch,
    ListAgain,
    NudgeTunnel,
    Observe,
    Output,
    Reply,
    SaveIdentity,
    SavePsk,
    SaveState,
    Send,
    SetUpKeys,
    Socket,
    WriteReport,
)
from scope_agent.mesh_loop import Connect, MeshLoop, RemovedFromMesh, RunConfig, read_records
from scope_agent.mesh_psk_agent import MeshPskAgent, MeshPskConfig
from scope_agent.psk_agent import ForeignDevice
from scope_agent.psk_run import (
    LEAVE_PATIENCE,
    NoAgent,
    ask_agent,
    await_managers_keys,
    find_device,
    take_back_alone,
)
from scope_agent.run import Runner
from scope_agent.state import Enrolment, sole_agent
from scope_agent.wireguard.shell import Device, existing_device, open_probe_socket

log = logging.getLogger(__name__)


class MeshPskRunner(MeshLoop[MeshPskAgent]):
    """One agent in its world. Raises ConfigError from `run` where a person must act."""

    def __init__(
        self,
        config: RunConfig,
        enrolment: Enrolment,
        *,
        device: Device,
        found: ForeignDevice,
        connect: Connect | None,
    ) -> None:
        state, trouble = config.state.load()
        if trouble:
            log.warning("state.damaged detail=%s", trouble)
        identity = enrolment.identity
        agent = MeshPskAgent(
            MeshPskConfig(enrolment.mesh, identity, enrolment.registry_key),
            found,
            channel=Channel(secret=identity.probe, boot_id=secrets.token_bytes(BOOT_ID_BYTES)),
            state=state,
            records=read_records(config.state),
            random=secrets.SystemRandom().random,
            now=time.monotonic(),
            wall=time.time(),
        )
        probe = open_probe_socket(found.listen_port, fwmark=found.fwmark)
        super().__init__(agent, config, enrolment, device=device, probe=probe, connect=connect)
        self._went_back = asyncio.Event()

    async def run(self) -> None:
        """Run until `stop`; the keys stay as they are. Raises ConfigError."""
        await self._run(self._follow_registry())

    async def go_back(self) -> None:
        """Have every pair go back to its manager's key, as far as the other sides answer, and end."""
        self._post(CommandArrived(0, "go-back"))
        try:
            async with asyncio.timeout(LEAVE_PATIENCE):
                await self._went_back.wait()
        except TimeoutError:
            log.warning("psk.keys_stay device=%s: their peers do not answer", self._device.name)

    async def _removed(self) -> None:
        await self.go_back()
        self._end_removed()

    def _performed(self) -> None:
        super()._performed()
        if self._agent.replaced:
            self._fail(ConfigError(self._agent.replaced))
        elif self._agent.has_left and not self._went_back.is_set():
            self._state.forget_psk()  # before the socket is gone: whoever asked to leave looks for this
            self._went_back.set()
            mesh = self._enrolment.mesh
            self._fail(
                RemovedFromMesh(
                    f"{self._device.name} has its manager's keys again: `scope-agent leave --mesh {mesh}` "
                    "ends what is left of its membership"
                )
            )

    def _perform(self, output: Output) -> None:
        match output:
            case Send(Socket() as leg, data):
                self._send_probe(leg, data)
            case DeviceBatch():
                self._spawn(self._apply(output))
            case Observe():
                self._spawn(self._observe())
            case WriteReport():
                self._spawn(self._write_report(output))
            case SaveState():
                self._spawn(self._save(output, removed=self._agent.removed))
            case SavePsk():
                self._spawn(self._save_psk(output))
            case SetUpKeys(is_awaited):
                self._spawn(self._set_up_keys(is_awaited=is_awaited))
            case SaveIdentity(identity):
                self._spawn(self._save_identity(identity))
            case NudgeTunnel(address=address):
                self._nudge(address)
            case Reply():
                self._reply(output)
            case ListAgain():
                self._list_again.set()
            case _:
                raise AssertionError(f"an output of meshes' own devices: {type(output).__name__}")


AnyRunner: TypeAlias = Runner | MeshPskRunner


async def open_runner(
    config: RunConfig, enrolment: Enrolment, *, connect: Connect | None = None
) -> AnyRunner:
    """What runs a mesh's agent here. Raises ConfigError, ApplyError."""
    if not enrolment.is_foreign:
        return Runner(config, enrolment, connect=connect)
    device = existing_device(enrolment.device, run_dir=config.run_dir)
    try:
        found = await find_device(device)
        _require_key(found, enrolment)
        return MeshPskRunner(config, enrolment, device=device, found=found, connect=connect)
    except BaseException:
        await device.close()
        raise


def _require_key(found: ForeignDevice, enrolment: Enrolment) -> None:
    if found.key != enrolment.identity.public.wireguard:
        raise ConfigError(
            f"{found.name} has another key than at the join to {enrolment.mesh}: leave, and join again"
        )


async def device_key(interface: str, run_dir: Path) -> PublicKey:
    """The public key of a device that something else manages. Raises ConfigError."""
    device = existing_device(interface, run_dir=run_dir)
    try:
        return (await find_device(device)).key
    finally:
        await device.close()


def give_back(config: RunConfig, enrolment: Enrolment, *, is_forced: bool) -> str:
    """Have the agent of a mesh give its manager's keys back: with whom only this side did.

    By force it is done without an agent, too. Raises ConfigError, ApplyError.
    """
    mesh = enrolment.mesh

    def ask(command: str) -> Mapping[str, Any]:
        return ask_agent(
            config.run_dir / f"{mesh}.sock", command, of=mesh, start=f"`scope-agent run --mesh {mesh}`"
        )

    if not config.state.load_psk()[0]:
        return ""
    command = "give-back-forced" if is_forced else "give-back"
    try:
        return await_managers_keys(ask, command=command, state=config.state)
    except NoAgent:
        if not is_forced:
            raise
    with sole_agent(config.state, config.run_dir, interface=enrolment.device):
        return take_back_alone(enrolment.device, config.state, config.run_dir)
