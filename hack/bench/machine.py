"""What the figures were measured on: they mean nothing without it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any


def describe() -> dict[str, Any]:
    """CPU, memory, kernel, Python, the WireGuard that carries the packets, and the load before."""
    return {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(_field(Path("/proc/meminfo"), "MemTotal").split()[0]) >> 10,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "wireguard": _wireguard(),
        "load": round(os.getloadavg()[0], 2),
    }


def _field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _wireguard() -> str:
    if Path("/sys/module/wireguard").exists():
        return f"kernel {platform.release()}"
    for program in ("wireguard-go", "boringtun-cli"):
        if shutil.which(program):
            said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
            words = said.stdout.split()
            return f"{program} {words[1]}" if len(words) > 1 else program
    return "none"
