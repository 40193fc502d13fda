"""`scope-registry serve` on a server of the lab, and scopectl beside it."""

from __future__ import annotations

import json
import signal
import subprocess

from lab import Host, Server
from lab.hosts import end

from meshlab.names import NAME, Names
from meshlab.programs import await_line, program

# What programs of the mesh share machine-wide: each host of the lab needs its own.
PRIVATE = ("/var/run/wireguard", "/run/scope", "/var/lib/scope", "/var/lib/scope-registry")
# Imports, keys and a certificate, on a machine that does ten other things; an end is noticed at once.
_START_S = 180.0


class Registry:
    """The registry of a lab, serving. Made with `PRIVATE` directories it leaves nothing behind."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.log = server.directory / "registry.log"
        self._names = Names(server)
        self.introduce(server)
        self.process = self._serve()

    def introduce(self, host: Host) -> None:
        """Let a host find the registry by its name."""
        self._names.introduce(host)

    def start(self) -> None:
        """Serve again after `kill`."""
        self.process = self._serve()

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it in an orderly way."""
        end([self.process], grace_s=10.0)

    def scopectl(self, *arguments: str, document: str | None = None) -> str:
        """What scopectl prints; LabError with its reason when it fails. `document` is its standard input."""
        return self.server.run([program("scopectl"), *arguments], input=document).stdout

    def apply(self, document: str) -> None:
        """Create or update what a YAML or JSON document describes."""
        self.scopectl("apply", "-f", "-", document=document)

    def token(self, mesh: str, *, single_use: bool = False, hub: str | None = None) -> str:
        """A fresh join string; with `hub`, a ScopePeer, one that leads to its carrier."""
        options: tuple[str, ...] = ("--single-use",) if single_use else ()
        options = (*options, "--hub", hub) if hub is not None else options
        return self.scopectl("token", "create", "--mesh", mesh, *options).strip()

    def _serve(self) -> subprocess.Popen[str]:
        # A new file each time, so that an earlier start's lines are not taken for this one's.
        self.log.unlink(missing_ok=True)
        with self.log.open("w") as log:
            process = self.server.popen(
                [program("scope-registry"), "serve", "--advertise", NAME], stdout=log, stderr=log
            )
        await_line(process, self.log, "Join strings name", within_s=_START_S)
        return process


def mesh_document(name: str, **spec: object) -> str:
    """A ScopeMesh as JSON, which is YAML. `spec` adds or replaces fields of its spec."""
    return json.dumps(
        {
            "apiVersion": "scope.ltgc.cc/v1alpha1",
            "kind": "ScopeMesh",
            "metadata": {"name": name},
            "spec": {"addressing": {"ipv4": "100.80.0.0/16", "ipv6": "fd5c:09e0::/48"}, **spec},
        }
    )
