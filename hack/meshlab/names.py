"""The name under which a lab's registry is found, by whoever is introduced to it.

It has an address of each family, so that one join string serves machines with IPv4 alone and with IPv6 alone.
The lab has no DNS: each host gets a hosts file of its own.
"""

from __future__ import annotations

from typing import Protocol

from lab import Host, Server

NAME = "registry.example"


class Introduces(Protocol):
    """What hosts can be introduced to."""

    def introduce(self, host: Host) -> None:
        """Let a host find it by its name."""


class Names:
    """A server as `registry.example`."""

    def __init__(self, server: Server) -> None:
        self._hosts = server.directory / "hosts"
        names = [f"{address} {NAME}" for address in server.addresses()]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *names, ""]))

    def introduce(self, host: Host) -> None:
        """Let a host find the server by that name."""
        host.run(["mount", "--bind", str(self._hosts), "/etc/hosts"])
