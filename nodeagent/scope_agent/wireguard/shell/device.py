"""The device as the agent's loop sees it: asynchronous, whatever carries it.

Drivers block; each device has one thread, which also keeps its calls in order and apart: the kernel answers
EBUSY to two dumps at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from scope.model import ConfigError, DeviceKind
from scope_agent.wireguard.device import Action, Counters, DesiredDevice, ObservedDevice
from scope_agent.wireguard.shell.links import Links
from scope_agent.wireguard.shell.user_space import (
    ForeignUserSpaceDevice,
    UserSpaceDevice,
    control_socket,
    is_ours,
    require_program,
)

RUN_DIR = Path("/run/scope")

_T = TypeVar("_T")


class Driver(Protocol):
    """What carries a device. Every call may block, and raises ApplyError or ConfigError."""

    kind: DeviceKind

    def observe(self) -> ObservedDevice: ...

    def apply(self, action: Action) -> None: ...

    def keep(self, desired: DesiredDevice) -> None: ...

    def delete(self) -> None: ...

    def close(self) -> None: ...


class Device:
    """One WireGuard device. Calls run one after the other, in the order in which they were made."""

    def __init__(self, name: str, driver: Driver) -> None:
        self.name = name
        self.kind = driver.kind
        self._driver = driver
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"device-{name}")

    async def observe(self) -> ObservedDevice:
        """Read the whole device. Raises ApplyError, ConfigError."""
        return await self._run(self._driver.observe)

    def read_counters(self) -> Counters | None:
        """The device's totals: one small file, so it does not wait for its turn. None without a device.

        While they stand still no payload passed and, in the kernel, no keepalive and no handshake either.
        """
        with open("/proc/thread-self/net/dev", encoding="ascii") as file:
            for line in file:
                name, colon, figures = line.partition(":")
                if colon and name.strip() == self.name:
                    fields = figures.split()
                    return Counters(rx=int(fields[0]), tx=int(fields[8]))
        return None

    async def apply(self, action: Action) -> None:
        """Perform one action; performing it again changes nothing. Raises ApplyError, ConfigError."""
        await self._run(lambda: self._driver.apply(action))

    async def keep(self, desired: DesiredDevice) -> None:
        """Lay down what is to be put back should the device's process crash while no agent runs.

        Call at start, before the first action, and after each change. Raises ApplyError.
        """
        await self._run(lambda: self._driver.keep(desired))

    async def delete(self) -> None:
        """Tear everything down: for `leave` alone. Raises ApplyError."""
        await self._run(self._driver.delete)

    async def close(self) -> None:
        """Give descriptors and thread back; the device stays and carries on."""
        await self._run(self._driver.close)
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def choose_device(
    name: str, *, run_dir: Path = RUN_DIR, only: DeviceKind | None = None, beside: bool = False
) -> Device:
    """The device of that name, carried by what the machine offers: the kernel, else a user-space process.

    A WireGuard device that is there is kept, whoever made it. On a kernel with WireGuard one that is missing
    is made. `only` narrows the choice; `beside`: a user-space process is somebody else's to run. Raises
    ConfigError: no WireGuard (names the packages), a missing capability, or an interface of that name that is
    not WireGuard.
    """
    links = Links(name)
    try:
        return Device(name, _choose_driver(name, links, run_dir, only=only, beside=beside))
    except BaseException:
        links.close()
        raise


def existing_device(name: str, *, run_dir: Path = RUN_DIR) -> Device:
    """A WireGuard device that something else made and manages: nothing but pre-shared keys is for us to set.

    Raises ConfigError: there is none of that name, it is not WireGuard, or it is a mesh's own.
    """
    links = Links(name)
    try:
        return Device(name, _existing_driver(name, links, run_dir))
    except BaseException:
        links.close()
        raise


def _existing_driver(name: str, links: Links, run_dir: Path) -> Driver:
    link = links.find()
    if link is None:
        raise ConfigError(
            f"There is no interface {name}: bring it up first (`wg show interfaces` lists them)"
        )
    if link.kind == "wireguard":
        from scope_agent.wireguard.shell.kernel import KernelDevice  # loads pyroute2, of no use elsewhere

        return KernelDevice(name, links)
    if is_ours(run_dir, name):
        raise ConfigError(f"{name} is the device of a mesh, whose own agent keys it")
    if link.kind != "tun" or not control_socket(name).exists():
        raise ConfigError(f"The interface {name} is no WireGuard device: `wg show interfaces` lists those")
    return ForeignUserSpaceDevice(name, links, run_dir)


def _choose_driver(
    name: str, links: Links, run_dir: Path, *, only: DeviceKind | None, beside: bool
) -> Driver:
    link = links.find()
    if link is not None:
        kind = _kind_of_existing(name, link.kind, run_dir)
        if only not in {None, kind}:
            raise ConfigError(f"{name} exists and is carried by {kind.value}, not by {only}; remove it first")
    elif only is DeviceKind.USER_SPACE or not links.create_wireguard():
        kind = DeviceKind.USER_SPACE
        if only is DeviceKind.KERNEL:
            raise ConfigError("This kernel has no WireGuard: load the module `wireguard`")
        if not beside:
            require_program(run_dir, name)
    else:
        kind = DeviceKind.KERNEL
    if kind is DeviceKind.KERNEL:
        from scope_agent.wireguard.shell.kernel import KernelDevice  # loads pyroute2, of no use elsewhere

        return KernelDevice(name, links)
    return UserSpaceDevice(name, links, run_dir, beside=beside)


def _kind_of_existing(name: str, link_kind: str, run_dir: Path) -> DeviceKind:
    if link_kind == "wireguard":
        return DeviceKind.KERNEL
    if link_kind == "tun" and is_ours(run_dir, name):
        return DeviceKind.USER_SPACE
    described = link_kind or "hardware"
    raise ConfigError(
        f"The interface {name} exists and is not Scope's WireGuard device ({described}): rename or remove "
        "it, or give the mesh another device name"
    )
