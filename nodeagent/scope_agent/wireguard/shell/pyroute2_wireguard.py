"""pyroute2's WireGuard socket, imported without the rest of pyroute2.

`import pyroute2`, which an import of any of its modules runs first, loads every protocol that it speaks and a
database of the whole network: 0.35 s and 16 MB for 0.07 s and 6 MB of WireGuard. So the package is put in
place with its `__init__` not yet run. Whoever asks for a name of that `__init__` later has it run then.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

__all__ = ["AsyncWireGuard", "NetlinkDecodeError", "NetlinkError", "genlmsg", "wgmsg"]


def _put_bare_package() -> ModuleType | None:
    """Register pyroute2 with its `__init__` not run; None where it ran already or pyroute2 is missing."""
    spec = None if "pyroute2" in sys.modules else importlib.util.find_spec("pyroute2")
    if spec is None:
        return None
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    return package


def _run_init(package: ModuleType) -> None:
    vars(package).pop("__getattr__", None)
    spec = package.__spec__
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(package)


def _run_init_when_asked(package: ModuleType) -> None:
    def complete(name: str) -> Any:
        _run_init(package)
        return getattr(package, name)

    vars(package)["__getattr__"] = complete


_bare = _put_bare_package()
try:
    from pyroute2.netlink import genlmsg
    from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError
    from pyroute2.netlink.generic.wireguard import AsyncWireGuard, wgmsg
except (ImportError, AttributeError):
    if _bare is None:
        raise
    _run_init(_bare)  # a pyroute2 whose modules need its `__init__`
    _bare = None
    from pyroute2.netlink import genlmsg
    from pyroute2.netlink.exceptions import NetlinkDecodeError, NetlinkError
    from pyroute2.netlink.generic.wireguard import AsyncWireGuard, wgmsg
if _bare is not None:
    _run_init_when_asked(_bare)

# At DEBUG it writes whole messages, keys among them. The logger above this one is reset by `__init__`.
logging.getLogger("pyroute2.netlink").setLevel(logging.WARNING)
