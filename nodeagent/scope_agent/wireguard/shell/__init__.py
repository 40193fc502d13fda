"""The WireGuard room's shells: kernel and user-space devices, the probe socket on WireGuard's port, holds.

And the ports that WireGuard has beside its own.
"""

from scope_agent.wireguard.shell.device import Device, choose_device, existing_device
from scope_agent.wireguard.shell.hold import EndpointHolds
from scope_agent.wireguard.shell.port_rules import PortTable
from scope_agent.wireguard.shell.probe_socket import ProbeSocket, SendResult, open_probe_socket

__all__ = [
    "Device",
    "EndpointHolds",
    "PortTable",
    "ProbeSocket",
    "SendResult",
    "choose_device",
    "existing_device",
    "open_probe_socket",
]
