"""Which of a machine's interfaces may carry the underlay. Pure.

Addresses of containers, of virtual machines and of other tunnels are not where others reach this machine: a
mesh that takes them for candidates finds paths that lead back into itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from scope.model import IPInterface
from scope_agent.inputs import InterfacesChanged

# Bridges and links of container engines, of Kubernetes network plug-ins and of hypervisors.
_CONTAINERS = re.compile(
    r"(docker|podman|cni|cali|cilium|lxc|flannel|weave|kube|antrea|ovn|nodelocaldns|virbr|vnet|br-|tunl)"
)
_TUNNELS = frozenset({"wireguard", "tun", "ipip", "sit", "gre", "ip6tnl", "vxlan", "geneve", "vti", "xfrm"})
SMALLEST_MTU = 1280  # IPv6's own


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface as the kernel reports it; `kind` is that of a virtual one, "" for hardware."""

    name: str
    kind: str
    up: bool
    mtu: int
    addresses: frozenset[IPInterface]


def underlay_of(interfaces: Iterable[Interface], *, own: str) -> InterfacesChanged:
    """The addresses that may be candidates, and the MTU of the narrowest interface that holds one.

    `own` is the name of the mesh's device.
    """
    present = [i for i in interfaces if i.up and i.name not in {own, "lo"}]
    usable = [i for i in present if not is_virtual(i)]
    carrying = [
        (interface, frozenset(a for a in interface.addresses if not a.is_link_local and not a.is_loopback))
        for interface in usable
    ]
    return InterfacesChanged(
        addresses=frozenset(address for _, addresses in carrying for address in addresses),
        mtu=max(min((i.mtu for i, addresses in carrying if addresses), default=1500), SMALLEST_MTU),
        inner=frozenset(address.ip for i in present if is_virtual(i) for address in i.addresses),
    )


def is_virtual(interface: Interface) -> bool:
    """Whether the interface belongs to containers, virtual machines or another tunnel."""
    return interface.kind in _TUNNELS or _CONTAINERS.match(interface.name) is not None
