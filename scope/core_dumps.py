"""Keeps a process that holds keys out of core dumps, whatever the machine does with those of others.

Two locks, since each lacks something: a process that is not dumpable leaves no core but is dumpable again
once it executes another program; the limit goes on to whatever it starts, but can be raised again by root.
"""

from __future__ import annotations

import resource

_PR_SET_DUMPABLE = 4
# No core has room in one byte. Where /proc/sys/kernel/core_pattern names a program the kernel gives it the
# core whatever the limit is, 0 included, but for this one value.
_NO_CORE = 1


def forbid_core_dumps() -> None:
    """Have neither this process nor any that it starts leave a core. Raises OSError."""
    import ctypes  # a few milliseconds that `import scope_agent.run` need not wait for

    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    limit = _NO_CORE if most == resource.RLIM_INFINITY else min(most, _NO_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot be kept out of core dumps")
