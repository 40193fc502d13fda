"""The kernel's settings that let a hub forward: set where they are not, and put back when it leaves.

A machine that forwards IPv6 is a router, and stops listening to other routers where `accept_ra` is 1: it
would lose its default route some minutes later. So every interface that listens gets a 2 first, which means
"although it is a router". What was there before is noted, before anything is changed, by whoever calls.

The kernel takes the switch of a family as word for all its interfaces, and sets `accept_redirects` with it
(Linux, `inet_forward_change` and `addrconf_forward_change`), in both directions. What was otherwise is
planned with the switch, before it, so that it is noted too and put back after it.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from scope.model import Family

FORWARDING: Final = {Family.IPV4: "net/ipv4/ip_forward", Family.IPV6: "net/ipv6/conf/all/forwarding"}
_SYSCTLS = Path("/proc/sys")
# In a container /proc/sys is read-only; the machine's own net/ may be mounted below this.
_MOUNTED = Path("/host/proc/sys")
_CONF = {Family.IPV4: "net/ipv4/conf", Family.IPV6: "net/ipv6/conf"}
_REDIRECTS = "net/ipv4/conf/all/accept_redirects"
_OURS = {"accept_ra": "2", "accept_redirects": "0"}  # what is set, by the setting; 1 for all others


def is_on(family: Family) -> bool:
    """Whether the kernel forwards this family. Where it has none of it, it does not."""
    return _read(FORWARDING[family]) not in (None, "0")


def plan_forwarding() -> dict[str, str]:
    """What is to be set, in order: paths below /proc/sys with values. Nothing where all is set."""
    wanted: dict[str, str] = {}
    if _read(FORWARDING[Family.IPV6]) == "0":
        for path in _each_interface(Family.IPV6, "accept_ra"):
            if _read(path) == "1":
                wanted[path] = "2"
        wanted |= _forwarding_alone(Family.IPV6) | {FORWARDING[Family.IPV6]: "1"}
    if _read(FORWARDING[Family.IPV4]) == "0":
        wanted |= {_REDIRECTS: "0"} | _forwarding_alone(Family.IPV4) | {FORWARDING[Family.IPV4]: "1"}
    return wanted


def read_sysctls(paths: Mapping[str, str]) -> dict[str, str]:
    """What stands at these paths now, in their order; those that are not there are left out."""
    return {path: value for path in paths if (value := _read(path)) is not None}


def write_sysctls(values: Mapping[str, str]) -> list[str]:
    """Set what can be set; what was refused comes back, in words. What is gone is passed over."""
    refused = []
    for path, value in values.items():
        try:
            _write(path, value)
        except FileNotFoundError:  # an interface that went
            continue
        except OSError as error:
            refused.append(f"{path.replace('/', '.')} cannot be set to {value}: {error.strerror}")
    return refused


def restore_sysctls(noted: Mapping[str, str]) -> list[str]:
    """Put back what was noted, the last first, where it still is as `plan_forwarding` would set it.

    What somebody changed since is theirs. What was refused comes back, in words.
    """
    ours = {path: _OURS.get(path.rpartition("/")[2], "1") for path in noted}
    return write_sysctls({path: noted[path] for path in reversed(tuple(noted)) if _read(path) == ours[path]})


def _each_interface(family: Family, setting: str) -> list[str]:
    interfaces = sorted(each.name for each in (_SYSCTLS / _CONF[family]).iterdir())
    return [f"{_CONF[family]}/{name}/{setting}" for name in interfaces if name != "all"]


def _forwarding_alone(family: Family) -> dict[str, str]:
    """Interfaces that forward although the family does not: noted, they do so again afterwards."""
    return {path: "1" for path in _each_interface(family, "forwarding") if _read(path) not in (None, "0")}


def _write(path: str, value: str) -> None:
    try:
        (_SYSCTLS / path).write_text(value)
    except OSError as error:
        if error.errno != errno.EROFS or not (_MOUNTED / path).exists():
            raise
        (_MOUNTED / path).write_text(value)


def _read(path: str) -> str | None:
    try:
        return (_SYSCTLS / path).read_text().strip()
    except OSError:
        return None
