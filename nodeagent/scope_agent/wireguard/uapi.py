"""WireGuard's configuration protocol for user-space devices (UAPI) as text, and back to values: pure.

Also renders the file from which `scope-wireguard` puts a device back after its process crashed.

One operation a connection: `get=1` or `set=1`, lines of `key=value`, an empty line; the answer ends with
`errno=N` and an empty line. Keys are hexadecimal. Source: wireguard.com/xplatform.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from typing import assert_never

from scope.model import Endpoint, IPNetwork, PublicKey, Secret, endpoint_at
from scope_agent.wireguard.device import (
    NO_PSK,
    AddAllowedIps,
    AddPeer,
    DesiredDevice,
    ObservedDevice,
    ObservedPeer,
    RemovePeer,
    SetAllowedIps,
    SetEndpoint,
    SetFwmark,
    SetKeepalive,
    SetListenPort,
    SetPrivateKey,
    SetPsk,
)
from scope_agent.wireguard.plan import plan_device

GET = "get=1\n\n"
STATE_VERSION = 1
# For a device that is started before anything is known of it.
BLANK_STATE = json.dumps({"version": STATE_VERSION, "mtu": 1420, "uapi": "set=1\n\n"})

UapiAction = (
    SetPrivateKey
    | SetListenPort
    | SetFwmark
    | AddPeer
    | RemovePeer
    | SetEndpoint
    | SetPsk
    | AddAllowedIps
    | SetAllowedIps
    | SetKeepalive
)


class UapiError(Exception):
    """An answer that is not in the protocol; the message quotes no value, since values may be keys."""


@dataclass(frozen=True, slots=True)
class UapiDevice:
    """What `get=1` says: the device's own facts and its peers."""

    private_key: Secret | None
    listen_port: int
    fwmark: int
    peers: dict[PublicKey, ObservedPeer]
    # By the (keyed, 64 bits long) hash of what the answer says of each: no text is kept, it may hold a key.
    told: dict[int, ObservedPeer]


def render_action(action: UapiAction) -> str:
    """The `set=1` operation that performs one action. Holds secrets where the action does."""
    return "set=1\n" + "".join(f"{line}\n" for line in _lines(action)) + "\n"


def render_state(desired: DesiredDevice) -> str:
    """The state file of `scope-wireguard`: JSON with the MTU and one `set=1` operation. Holds every secret.

    The operation gives the process key, port, mark and all peers, whatever it knows. Addresses and routes
    belong to the TUN device, which outlives the process.
    """
    blank = ObservedDevice(name=desired.name, exists=True)
    lines = [
        *_lines(SetPrivateKey(desired.private_key)),
        *_lines(SetFwmark(desired.fwmark)),
        *_lines(SetListenPort(desired.listen_port)),
        "replace_peers=true",
    ]
    for action in plan_device(desired, blank):
        if isinstance(action, AddPeer):
            lines += _lines(action)
    operation = "set=1\n" + "".join(f"{line}\n" for line in lines) + "\n"
    return json.dumps({"version": STATE_VERSION, "mtu": desired.mtu, "uapi": operation})


def parse_errno(answer: str) -> int:
    """The positive errno that ends an answer; 0 when it was done. Raises UapiError."""
    last = answer.rstrip("\n").rpartition("\n")[2]
    key, _, value = last.partition("=")
    if key != "errno":
        raise UapiError("the answer does not end with an errno")
    return abs(_integer("errno", value))


def parse_device(answer: str, *, told: Mapping[int, ObservedPeer] | None = None) -> UapiDevice:
    """Read the answer to `get=1`, skipping keys that a newer WireGuard may add. Raises UapiError.

    `told` is what the last answer said: a peer of which this one says the same is the same object again. Most
    of a large mesh is idle, and is so neither read again nor compared further on.
    """
    body, errno, _ = f"\n{answer}".partition("\n\n")[0].rpartition("\nerrno=")
    if not errno:
        raise UapiError("the answer does not end with an errno")
    first, *others = body.split(_PEER)
    device = _section(first)
    private_key = device.facts.get("private_key")
    now_told: dict[int, ObservedPeer] = {}
    for text in others:
        number = hash(text)
        known = told.get(number) if told is not None else None
        now_told[number] = known or _parse_peer(_section(_PEER + text))
    return UapiDevice(
        private_key=None if private_key is None else Secret(_key_bytes("private_key", private_key)),
        listen_port=device.integer("listen_port"),
        fwmark=device.integer("fwmark"),
        peers={peer.key: peer for peer in now_told.values()},
        told=now_told,
    )


_PEER = "\npublic_key="  # begins what an answer says of one peer


def _section(text: str) -> _Section:
    section = _Section({}, [])
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if not line:
            continue
        if not equals:
            raise UapiError("a line without '='")
        if key == "allowed_ip":
            section.allowed_ips.append(value)
        else:
            section.facts[key] = value
    return section


@dataclass(frozen=True, slots=True, repr=False)
class _Section:
    """The lines of the device, or of one peer. May hold keys, so it has no printable form."""

    facts: dict[str, str]
    allowed_ips: list[str]

    def integer(self, name: str) -> int:
        value = self.facts.get(name)
        return 0 if value is None else _integer(name, value)


def _lines(action: UapiAction) -> list[str]:
    match action:
        case SetPrivateKey(private_key):
            return [f"private_key={private_key.raw.hex()}"]
        case SetListenPort(port):
            return [f"listen_port={port}"]
        case SetFwmark(mark):
            return [f"fwmark={mark}"]
        case RemovePeer(key):
            return [f"public_key={key.raw.hex()}", "remove=true"]
        case AddPeer(key, endpoint, allowed_ips, keepalive, psk):
            return [
                f"public_key={key.raw.hex()}",
                *([f"endpoint={endpoint}"] if endpoint else []),
                *([f"preshared_key={psk.raw.hex()}"] if psk else []),
                "replace_allowed_ips=true",
                *sorted(f"allowed_ip={prefix}" for prefix in allowed_ips),
                f"persistent_keepalive_interval={keepalive}",
            ]
        case SetEndpoint(key, endpoint):
            return [*_known(key), f"endpoint={endpoint}"]
        case SetPsk(key, psk):
            return [*_known(key), f"preshared_key={psk.raw.hex()}"]
        case AddAllowedIps(key, allowed_ips):
            return [*_known(key), *sorted(f"allowed_ip={prefix}" for prefix in allowed_ips)]
        case SetAllowedIps(key, allowed_ips):
            added = sorted(f"allowed_ip={prefix}" for prefix in allowed_ips)
            return [*_known(key), "replace_allowed_ips=true", *added]
        case SetKeepalive(key, keepalive):
            return [*_known(key), f"persistent_keepalive_interval={keepalive}"]
        case _:
            assert_never(action)


def _known(key: PublicKey) -> list[str]:
    """Address a peer that exists; one that was removed meanwhile is not made again."""
    return [f"public_key={key.raw.hex()}", "update_only=true"]


def _parse_peer(section: _Section) -> ObservedPeer:
    facts = section.facts
    psk = _key_bytes("preshared_key", facts.get("preshared_key", NO_PSK.raw.hex()))
    seconds = section.integer("last_handshake_time_sec")
    endpoint = facts.get("endpoint")
    return ObservedPeer(
        key=PublicKey(_key_bytes("public_key", facts["public_key"])),
        endpoint=None if endpoint is None else _endpoint(endpoint),
        allowed_ips=frozenset(map(_prefix, section.allowed_ips)),
        keepalive=section.integer("persistent_keepalive_interval"),
        psk=None if psk == NO_PSK.raw else Secret(psk),
        rx=section.integer("rx_bytes"),
        tx=section.integer("tx_bytes"),
        last_handshake=seconds + section.integer("last_handshake_time_nsec") / 1e9 if seconds else None,
    )


@lru_cache(maxsize=16384)  # a reading every second names the same prefixes and endpoints again
def _prefix(value: str) -> IPNetwork:
    try:
        return ip_network(value)
    except ValueError:
        raise UapiError("an allowed_ip that is no prefix") from None


@lru_cache(maxsize=4096)
def _endpoint(value: str) -> Endpoint:
    host, _, port = value.rpartition(":")
    try:
        return endpoint_at(host.strip("[]"), int(port))
    except ValueError:
        raise UapiError("an endpoint that is no endpoint") from None


def _key_bytes(name: str, value: str) -> bytes:
    try:
        raw = bytes.fromhex(value)
    except ValueError:
        raise UapiError(f"{name} is not hexadecimal") from None
    if len(raw) != 32:
        raise UapiError(f"{name} is {len(raw)} bytes, not 32")
    return raw


def _integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UapiError(f"{name} is no number") from None
