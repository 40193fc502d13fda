"""The local agent: its Unix socket, and what it answers as frozen values.

One JSON object per line each way. A request is {"command": "status"}; an answer {"ok": true, "status": {...}}
or {"ok": false, "error": "..."}. The agent may be of another version than scopectl, so fields that are
missing have a neutral value and others are passed over; `scopectl status -o json` shows all that was sent.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path

from scope.ctl.errors import CommandError
from scope.model import IPAddress

SOCKETS = Path("/run/scope")
ANSWER_SECONDS = 5.0  # the agent's loop answers in milliseconds, or hangs
MAX_ANSWER = 64 * 1024 * 1024  # the status of a mesh of 10,000 peers has about 5 MB


@dataclass(frozen=True, slots=True)
class PeerView:
    """How the agent reaches one other peer."""

    name: str
    addresses: tuple[str, ...] = ()
    path: str = ""
    endpoint: str = ""
    family: str = ""
    rtt: float | None = None  # milliseconds
    handshake: float | None = None  # seconds since the last one
    rx: int = 0
    tx: int = 0
    online: bool = False
    reason: str = ""
    hub: str = ""  # name of the ScopePeer that relays, or routes
    user_space: bool = False  # a process on the hub relays, not its kernel
    birthday: bool = False  # direct by a port of a symmetric NAT that was guessed
    carried: bool = False  # over TCP between the hub and one of the two
    psk_epoch: int | None = None  # of the post-quantum key that a handshake proved
    psk_age: float | None = None  # seconds since then
    psk_suite: int | None = None  # of its exchange
    psk_trust: str = ""  # why the other's identity is believed
    psk_laid: int | None = None  # epoch of a key that waits for its proof
    psk_reason: str = ""  # why there is none, or no newer one: in one word,
    psk_note: str = ""  # and in a sentence


@dataclass(frozen=True, slots=True)
class RelayedPairView:
    """Two peers that this hub relays for. `to_first`, `to_second`: bytes that each was sent."""

    first: str
    second: str
    to_first: int
    to_second: int
    by: tuple[str, ...] = ()  # Kernel, UserSpace: what relayed any of it
    capped: bool = False  # over a limit within the last minute


@dataclass(frozen=True, slots=True)
class RelayedView:
    """What this hub relays: in all, and for its busiest pairs."""

    pairs: int
    packets: int
    bytes: int
    error: str = ""  # why counts are missing
    busiest: tuple[RelayedPairView, ...] = ()


@dataclass(frozen=True, slots=True)
class ConditionView:
    """A condition that the agent knows of."""

    type: str
    status: str
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """What the agent says of itself and its mesh."""

    mesh: str
    peer: str
    addresses: tuple[str, ...] = ()
    device: str = ""
    device_kind: str = ""
    listen_port: int = 0
    connected: bool = False
    connected_since: float | None = None  # seconds since it changed
    registry_reason: str = ""
    mapping: str = ""
    endpoints: tuple[tuple[str, str], ...] = ()  # endpoint, kind
    reflector: str = ""
    hub: str = ""  # of an edge of a tree: name of the ScopePeer that it is attached to
    peers: tuple[PeerView, ...] = ()
    relayed: RelayedView | None = None  # of a hub
    conditions: tuple[ConditionView, ...] = ()
    unread: int = 0  # datagrams that were not for us, or not readable
    inbox_lost: int = 0  # datagrams that came faster than they were read
    courier_lost: int = 0  # calls that the registry's stream could not take
    unsent: tuple[tuple[str, int], ...] = ()  # why, and how many of our own datagrams


def find_socket(named: Path | None, directory: Path = SOCKETS) -> Path:
    """The socket to ask: the one named, or the only one there is. Raises CommandError.

    Those of agents that belong to no mesh begin with @, and are in the way of no mesh.
    """
    if named is not None:
        return named
    try:
        found = sorted(path for path in directory.iterdir() if path.suffix == ".sock" and path.is_socket())
    except FileNotFoundError:
        found = []
    except PermissionError:
        raise CommandError(f"{directory} may be read by root alone: run this with sudo") from None
    if not found:
        raise CommandError(
            f"no agent runs on this machine (there is no socket in {directory}): start it with "
            "`systemctl start scope-agent@MESH`, or join a mesh with `scope-agent join -`"
        )
    found = [path for path in found if not path.name.startswith("@")] or found
    if len(found) > 1:
        raise CommandError(
            f"this machine is in {len(found)} meshes: choose one with --socket "
            + " or --socket ".join(str(path) for path in found)
        )
    return found[0]


def ask(
    path: Path, request: Mapping[str, object], *, timeout: float = ANSWER_SECONDS
) -> Mapping[str, object]:
    """One request to the agent and its answer. Raises CommandError with what the agent said."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = _read_line(connection)
    except FileNotFoundError:
        raise CommandError(
            f"there is no socket {path}: is the agent running? `systemctl status {_unit(path)}`"
        ) from None
    except ConnectionRefusedError:
        raise CommandError(
            f"nobody answers at {path}: the agent has died; `journalctl -u {_unit(path)}` says why"
        ) from None
    except PermissionError:
        raise CommandError(f"{path} is for root alone: run this with sudo") from None
    except TimeoutError:
        raise CommandError(
            f"the agent took the request but gave no answer in {timeout:g} s: it hangs; "
            f"`systemctl restart {_unit(path)}` loses no packet"
        ) from None
    except OSError as error:
        raise CommandError(f"{path} cannot be used: {error.strerror or error}") from None
    return _parse_answer(line, path)


def parse_status(status: object) -> AgentStatus:
    """Read the agent's status. Raises CommandError when it is none at all."""
    if not isinstance(status, Mapping):
        raise CommandError(
            "the agent's answer holds no status: are scopectl and the agent of the same release?"
        )
    device, registry = _object(status, "device"), _object(status, "registry")
    lost = _object(status, "lost")
    unsent = _object(lost, "unsent")
    return AgentStatus(
        mesh=string(status, "mesh"),
        peer=string(status, "peer"),
        addresses=_strings(status, "addresses"),
        device=string(device, "name"),
        device_kind=string(device, "kind"),
        listen_port=_whole(device, "listenPort"),
        connected=registry.get("connected") is True,
        connected_since=number(registry, "since"),
        registry_reason=string(registry, "reason"),
        mapping=string(status, "mapping"),
        endpoints=tuple((string(e, "endpoint"), string(e, "kind")) for e in objects(status, "endpoints")),
        reflector=string(status, "reflector"),
        hub=string(status, "hub"),
        peers=tuple(_parse_peer(peer) for peer in objects(status, "peers")),
        relayed=_parse_relayed(status.get("relayed")),
        conditions=tuple(
            ConditionView(*(string(condition, name) for name in ("type", "status", "reason", "message")))
            for condition in objects(status, "conditions")
        ),
        unread=_whole(status, "dropped"),
        inbox_lost=_whole(lost, "inbox"),
        courier_lost=_whole(lost, "courier"),
        unsent=tuple((why, _whole(unsent, why)) for why in sorted(unsent)),
    )


def mesh_addresses(peer: PeerView) -> tuple[IPAddress, ...]:
    """The addresses of a peer inside the mesh, without the length of its prefix."""
    found = []
    for text in peer.addresses:
        try:
            found.append(ip_interface(text).ip)
        except ValueError:
            continue
    return tuple(found)


def _psk_note(psk: Mapping[str, object]) -> str:
    """What stands against the key, the gravest first."""
    if psk.get("conflict") is True:
        return "another program replaces it"
    failure = string(psk, "failure")
    return f"no traffic without a key: {failure or 'wait'}" if psk.get("withheld") is True else failure


def _parse_peer(peer: Mapping[str, object]) -> PeerView:
    psk = _object(peer, "psk")
    return PeerView(
        name=string(peer, "name"),
        addresses=_strings(peer, "addresses"),
        path=string(peer, "path"),
        endpoint=string(peer, "endpoint"),
        family=string(peer, "family"),
        rtt=number(peer, "rttMs"),
        handshake=number(peer, "lastHandshakeSeconds"),
        rx=_whole(peer, "rx"),
        tx=_whole(peer, "tx"),
        online=peer.get("online") is True,
        reason=string(peer, "reason"),
        hub=string(peer, "hub"),
        user_space=peer.get("userSpace") is True,
        birthday=peer.get("birthday") is True,
        carried=peer.get("carried") is True,
        psk_epoch=_whole(psk, "epoch") or None,
        psk_age=number(psk, "ageSeconds"),
        psk_suite=_whole(psk, "suite") or None,
        psk_trust=string(psk, "trust"),
        psk_laid=_whole(psk, "laidEpoch") or None,
        psk_reason=string(psk, "reason"),
        psk_note=_psk_note(psk),
    )


def _parse_relayed(relayed: object) -> RelayedView | None:
    if not isinstance(relayed, Mapping):
        return None
    return RelayedView(
        pairs=_whole(relayed, "pairs"),
        packets=_whole(relayed, "packets"),
        bytes=_whole(relayed, "bytes"),
        error=string(relayed, "error"),
        busiest=tuple(_parse_relayed_pair(pair) for pair in objects(relayed, "busiest")),
    )


def _parse_relayed_pair(pair: Mapping[str, object]) -> RelayedPairView:
    first, second, *_ = (*_strings(pair, "peers"), "", "")
    to_first, to_second, *_ = (*(_whole(sent, "bytes") for sent in objects(pair, "sent")), 0, 0)
    return RelayedPairView(
        first, second, to_first, to_second, by=_strings(pair, "by"), capped=pair.get("capped") is True
    )


def _read_line(connection: socket.socket) -> bytes:
    data = bytearray()
    while b"\n" not in data:
        chunk = connection.recv(65536)
        if not chunk or len(data) > MAX_ANSWER:
            break
        data += chunk
    return bytes(data.partition(b"\n")[0])


def _parse_answer(line: bytes, path: Path) -> Mapping[str, object]:
    if not line:
        raise CommandError(
            f"the agent at {path} closed the connection: `journalctl -u {_unit(path)}` says why"
        )
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, Mapping):
        raise CommandError(f"what answers at {path} is no agent: its line is not a JSON object")
    if answer.get("ok") is not True:
        raise CommandError(f"the agent refuses: {_clean(str(answer.get('error', 'it does not say why')))}")
    return answer


def _unit(path: Path) -> str:
    """The systemd unit behind a socket, which is named after its mesh, or after its interface."""
    return f"scope-psk{path.stem}" if path.stem.startswith("@") else f"scope-agent@{path.stem}"


def _clean(text: str) -> str:
    """Text for a terminal: nothing in it moves the cursor or changes the title."""
    return "".join(character if character.isprintable() else "?" for character in text)


def string(values: Mapping[str, object], name: str) -> str:
    """The text of a field, fit for a terminal; empty where there is none."""
    value = values.get(name)
    return "" if value is None else _clean(str(value))


def _strings(values: Mapping[str, object], name: str) -> tuple[str, ...]:
    found = values.get(name)
    return tuple(_clean(str(value)) for value in found) if isinstance(found, list) else ()


def number(values: Mapping[str, object], name: str) -> float | None:
    """The number of a field, None where there is none."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(values: Mapping[str, object], name: str) -> int:
    return int(number(values, name) or 0)


def _object(values: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def objects(values: Mapping[str, object], name: str) -> list[Mapping[str, object]]:
    """The objects of a list."""
    found = values.get(name)
    return [value for value in found if isinstance(value, Mapping)] if isinstance(found, list) else []
