"""The peers file: with whom pre-shared keys are agreed on a device that something else manages.

    rotationInterval: 1h
    peers:
    - {name: nas, publicKey: "…", probeKey: "…", identity: "…"}

The other machine's agent prints its own line. A refusal names field, value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from scope.model import Fingerprint, PostQuantum, PostQuantumMode, PublicKey
from scope.resources.fields import Fields
from scope.resources.keys import read_fingerprint
from scope.resources.limits import MAX_ROTATION, MIN_ROTATION
from scope.resources.values import read_duration, read_key, read_some_text

MAX_PEERS = 10_000  # what one device of a mesh is measured with
MAX_NAME = 63

_NO_KEY = PublicKey(bytes(32))
_NO_FINGERPRINT = Fingerprint(bytes(32))


@dataclass(frozen=True, slots=True)
class ForeignPeer:
    """One peer of the device, and what its agent is known by."""

    name: str
    wireguard: PublicKey
    probe: PublicKey
    identity: Fingerprint | None  # None: its agent publishes none


@dataclass(frozen=True, slots=True)
class PeersFile:
    """All peers with whom keys are agreed, by their WireGuard keys, whoever names them.

    `leaving` are those with whom the pair is to go back to its manager's key.
    """

    policy: PostQuantum
    peers: Mapping[PublicKey, ForeignPeer]
    leaving: frozenset[PublicKey] = frozenset()


def parse_peers(document: object) -> PeersFile:
    """Read a peers file. Raises InvalidResource with every problem of it."""
    root = Fields.of(document, ignore_unknown=False)
    interval = root.optional(
        "rotationInterval",
        lambda value: read_duration(value, MIN_ROTATION, MAX_ROTATION),
        PostQuantum().rotation_interval,
    )
    peers = root.parts("peers", _read_peer, limit=MAX_PEERS)
    for name, values in (
        ("name", [peer.name for peer in peers]),
        ("publicKey", [str(peer.wireguard) for peer in peers]),
        ("probeKey", [str(peer.probe) for peer in peers]),
    ):
        for i, value in enumerate(values):
            if value in values[:i]:
                root.refuse(f"a second {value}", "each one once", at=f"peers[{i}].{name}")
    if not peers:
        root.refuse("no peer", "one peer at least: `scope-agent psk show` prints its line there", at="peers")
    root.done()
    policy = PostQuantum(PostQuantumMode.PREFERRED, interval)
    return PeersFile(policy, {peer.wireguard: peer for peer in peers})


def render_line(peer: ForeignPeer) -> str:
    """The line of a peers file that stands for a peer."""
    name = peer.name.replace("\\", "\\\\").replace('"', '\\"')
    return (
        f'- {{name: "{name}", publicKey: "{peer.wireguard}", probeKey: "{peer.probe}", '
        f'identity: "{peer.identity}"}}'
    )


def _read_peer(fields: Fields) -> ForeignPeer:
    key = fields.required("publicKey", read_key, _NO_KEY)
    return ForeignPeer(
        name=fields.optional("name", _read_name, str(key)),
        wireguard=key,
        probe=fields.required("probeKey", read_key, _NO_KEY),
        identity=fields.required("identity", read_fingerprint, _NO_FINGERPRINT),
    )


def _read_name(value: object) -> str:
    return read_some_text(value, MAX_NAME)
