"""What a process of the dataplane costs: found by its socket, read from /proc."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path


def pid_behind(path: Path) -> int:
    """The process that listens at a Unix socket."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(str(path))
        pid: int = struct.unpack("iII", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def processor_time(pid: int) -> float:
    """Processor time so far, user and system, in seconds."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """Resident memory in MiB."""
    lines = Path("/proc", str(pid), "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) / 1024
