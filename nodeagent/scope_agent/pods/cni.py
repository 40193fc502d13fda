"""The network of a Node's own pods, where Scope is asked to give it: what its CNI configuration says. Pure.

The kubelet's runtime takes the first configuration of a directory. Scope's has a bridge with the addresses of
the Node's own prefixes; the plugins that do the work are the CNI project's. It is written from what the Node
says of itself, so a Node becomes ready before it is a peer of any mesh. What somebody else has put there is
their network: nothing is written beside it, and nothing of theirs is ever changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from scope.model import IPNetwork

FILE: Final = "10-scope.conflist"
BRIDGE: Final = "cni-scope"
PLUGINS: Final = ("bridge", "host-local", "portmap")
_NETWORK: Final = "scope"
_VERSION: Final = "0.4.0"  # of the CNI's specification: what runtimes and plugins of years all read
_CONFIGURATIONS: Final = (
    ".conf",
    ".conflist",
    ".json",
)  # what containerd and CRI-O look at


@dataclass(frozen=True, slots=True)
class FoundCni:
    """What there is on the Node: `ours` is the text of our file, None without one.

    `others` are the names of other files in its directory, `missing` those of PLUGINS that are not installed.
    """

    ours: str | None
    others: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CniPlan:
    """What to write, None for nothing, and what stands against it, in words."""

    write: str | None = None
    trouble: str = ""


def configuration(pods: Sequence[IPNetwork]) -> str:
    """The file for a Node whose pods have these prefixes."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isDefaultGateway": True,
        "forceAddress": True,  # of a Node that was made anew, and got another prefix
        "ipMasq": True,
        "hairpinMode": True,  # a pod that reaches itself by its Service
        "ipam": {"type": "host-local", "ranges": [[{"subnet": str(prefix)}] for prefix in pods]},
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    document = {"cniVersion": _VERSION, "name": _NETWORK, "plugins": [bridge, portmap]}
    return json.dumps(document, indent=2) + "\n"


def is_ours(text: str) -> bool:
    """Whether `configuration` made a file, of whatever version."""
    try:
        document = json.loads(text)
        return bool(document["name"] == _NETWORK and document["plugins"][0]["bridge"] == BRIDGE)
    except (ValueError, LookupError, TypeError):
        return False


def is_configuration(name: str) -> bool:
    """Whether a runtime would take a file of that name for a network."""
    return name.endswith(_CONFIGURATIONS) and not name.startswith(".")


def plan_cni(pods: Sequence[IPNetwork], found: FoundCni) -> CniPlan:
    """What is to be done for pods with these prefixes."""
    if found.others:
        return CniPlan(
            trouble=f"another CNI's {found.others[0]} is there, and Scope writes none beside it: remove that "
            "file, or set cni: None"
        )
    if found.ours is not None and not is_ours(found.ours):
        return CniPlan(trouble=f"{FILE} is not Scope's: rename or remove it, or set cni: None")
    if not pods:
        return CniPlan(
            trouble="the Node has no spec.podCIDRs: give the controller manager --allocate-node-cidrs"
        )
    if found.missing:
        return CniPlan(trouble=f"CNI plugins are missing: {', '.join(found.missing)}; install them")
    text = configuration(pods)
    return CniPlan(None if text == found.ours else text)
