"""Puts the CNI configuration of this Node into its directory, and takes it away again. It blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from scope.model import IPNetwork
from scope_agent.files import replace_file
from scope_agent.pods.cni import BRIDGE, FILE, PLUGINS, FoundCni, is_configuration, is_ours, plan_cni
from scope_agent.wireguard import netlink
from scope_agent.wireguard.shell.links import NetlinkSocket


@dataclass(frozen=True, slots=True)
class CniDirectories:
    """Where the kubelet's runtime finds networks, and the plugins that make them."""

    configurations: Path
    plugins: Path


def keep_cni(where: CniDirectories, pods: Sequence[IPNetwork]) -> str:
    """Have the configuration for these prefixes there. What stands against it, in words; "" for nothing."""
    try:
        plan = plan_cni(pods, _find(where))
        if plan.write is not None:
            replace_file(where.configurations / FILE, [plan.write], durable=True)
    except OSError as error:
        return f"no CNI configuration: {error}"
    return plan.trouble


def remove_cni(where: CniDirectories) -> list[str]:
    """Take our configuration away, and the bridge if no pod is on it; what stays comes back in words."""
    path = where.configurations / FILE
    try:
        if not is_ours(path.read_text()):
            return []
        path.unlink()
        with closing(NetlinkSocket()) as kernel:
            _remove_bridge(kernel)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, netlink.NetlinkError) as error:
        return [f"what gave pods their network may stay: {error}"]
    return []


def _remove_bridge(kernel: NetlinkSocket) -> None:
    """A pod that is still there has a port of it."""
    replies = kernel.ask(netlink.get_links())
    links = [netlink.parse_link(reply) for reply in replies if reply.kind == netlink.NEW_LINK]
    for bridge in links:
        if bridge.name == BRIDGE and all(link.master != bridge.index for link in links):
            kernel.ask(netlink.delete_link(bridge.index))


def _find(where: CniDirectories) -> FoundCni:
    """Raises OSError."""
    names = sorted(path.name for path in where.configurations.iterdir() if is_configuration(path.name))
    ours = where.configurations / FILE
    return FoundCni(
        ours.read_text(errors="replace") if FILE in names else None,
        tuple(name for name in names if name != FILE),
        tuple(plugin for plugin in PLUGINS if not (where.plugins / plugin).exists()),
    )
