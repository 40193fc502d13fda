"""The kernel's settings that let a hub forward: set where they are not, and put back when it leaves.

A machine that forwards IPv6 is a router, and stops listening to other routers where `accept_ra` is 1: it
would lose its default route some minutes later. So every interface that listens gets a 2 first, which means
"although it is a router". What was there before is noted, before anything is changed, by whoever calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from scope.model import Family

FORWARDING: Final = {Family.IPV4: "net/ipv4/ip_forward", Family.IPV6: "net/ipv6/conf/all/forwarding"}
_SYSCTLS = Path("/proc/sys")
_CONF6 = "net/ipv6/conf"


def is_on(family: Family) -> bool:
    """Whether the kernel forwards this family. Where it has none of it, it does not."""
    return _read(FORWARDING[family]) not in (None, "0")


def plan_forwarding() -> dict[str, str]:
    """What is to be set, in order: paths below /proc/sys with values. Nothing where all is set."""
    wanted: dict[str, str] = {}
    if _read(FORWARDING[Family.IPV6]) == "0":
        for each in sorted((_SYSCTLS / _CONF6).iterdir()):
            path = f"{_CONF6}/{each.name}/accept_ra"
            if each.name != "all" and _read(path) == "1":
                wanted[path] = "2"
        wanted[FORWARDING[Family.IPV6]] = "1"
    if _read(FORWARDING[Family.IPV4]) == "0":
        wanted[FORWARDING[Family.IPV4]] = "1"
    return wanted


def read_sysctls(paths: Mapping[str, str]) -> dict[str, str]:
    """What stands at these paths now, in their order; those that are not there are left out."""
    return {path: value for path in paths if (value := _read(path)) is not None}


def write_sysctls(values: Mapping[str, str]) -> list[str]:
    """Set what can be set; what was refused comes back, in words. What is gone is passed over."""
    refused = []
    for path, value in values.items():
        try:
            (_SYSCTLS / path).write_text(value)
        except FileNotFoundError:  # an interface that went
            continue
        except OSError as error:
            refused.append(f"{path.replace('/', '.')} cannot be set to {value}: {error.strerror}")
    return refused


def restore_sysctls(noted: Mapping[str, str]) -> list[str]:
    """Put back what was noted, the last first, where it still is as `plan_forwarding` would set it.

    What somebody changed since is theirs. What was refused comes back, in words.
    """
    ours = {path: "2" if path.endswith("/accept_ra") else "1" for path in noted}
    return write_sysctls({path: noted[path] for path in reversed(tuple(noted)) if _read(path) == ours[path]})


def _read(path: str) -> str | None:
    try:
        return (_SYSCTLS / path).read_text().strip()
    except OSError:
        return None
