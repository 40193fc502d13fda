"""What a hub relays: grants, and the knock that teaches a hub where a side of a grant is. Pure.

A *grant* lets two peers of a mesh reach each other through a hub that cannot read what they say. Each *side*
has a secret token and a port of the hub. The side knocks at the port with its token; the hub learns from the
knock where the side is, and passes on what comes from there to where the other side last knocked. It goes out
from the other side's port, so each side finds the peer at its own port of the hub, as at any other endpoint.

Two things forward by the same grants: rules in the hub's kernel, and the forwarder, a process, which serves
what the kernel does not. The forwarder reads a file that holds all grants, replaced as a whole.

A knock is the payload of a UDP datagram: the magic "SCok", then the token. Neither side's agent nor the hub's
is needed for it to be understood. Besides knocks only datagrams pass that look like WireGuard's (first word,
little endian, 1 to 4; 32 bytes of payload at least) or like a probe between the two sides (magic "SCop").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from scope.model import PublicKey, RelayLimits
from scope.wire import TOKEN_BYTES

KNOCK_MAGIC: Final = b"SCok"
KNOCK_BYTES: Final = len(KNOCK_MAGIC) + TOKEN_BYTES
WIREGUARD_TYPES: Final = (1, 2, 3, 4)  # the first word of its datagrams, little endian
MIN_WIREGUARD: Final = 32  # bytes of payload: a keepalive, its shortest datagram
MAPPING_VALID: Final = 120.0  # seconds that a hub believes a knock: six of them, and what NATs keep

_VERSION = 1


class GrantsFileError(ValueError):
    """The forwarder's file is not one: it is left as it was, and what was read before goes on."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two peers of a grant, at a hub. `id` is unique on the hub, from 1 on, and never printed."""

    id: int
    peer: PublicKey  # its WireGuard key
    token: bytes  # TOKEN_BYTES, secret
    port: int  # of the hub, where it knocks and finds the other side; unique for this peer

    def __repr__(self) -> str:
        return f"Side(id={self.id}, peer={self.peer}, port={self.port})"


@dataclass(frozen=True, slots=True)
class Grant:
    """The right of two peers to be relayed, the lower WireGuard key first. `expires`: wall clock, seconds."""

    sides: tuple[Side, Side]
    expires: float


@dataclass(frozen=True, slots=True)
class Grants:
    """All that a hub relays for one mesh: what both its kernel's rules and its forwarder are made of."""

    first_port: int
    last_port: int
    limits: RelayLimits
    grants: tuple[Grant, ...]


def knock(token: bytes) -> bytes:
    """The payload of a knock."""
    return KNOCK_MAGIC + token


def encode_grants(grants: Grants) -> str:
    """The file for the forwarder, and for the hub's own agent after a restart: JSON, one line."""
    return json.dumps(
        {
            "version": _VERSION,
            "ports": [grants.first_port, grants.last_port],
            "limits": {"pair": grants.limits.pair, "total": grants.limits.total},
            "grants": [
                {
                    "expires": grant.expires,
                    "sides": [
                        {
                            "id": side.id,
                            "peer": str(side.peer),
                            "token": side.token.hex(),
                            "port": side.port,
                        }
                        for side in grant.sides
                    ],
                }
                for grant in grants.grants
            ],
        }
    )


def decode_grants(text: str) -> Grants:
    """Read `encode_grants`' JSON. Raises GrantsFileError."""
    try:
        document = json.loads(text)
        _require_version(document["version"])
        first, last = map(int, document["ports"])
        limits = RelayLimits(pair=int(document["limits"]["pair"]), total=int(document["limits"]["total"]))
        return Grants(first, last, limits, tuple(_decode_grant(each) for each in document["grants"]))
    except GrantsFileError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise GrantsFileError(f"not a file of grants: {error!r}") from None


def _require_version(version: object) -> None:
    if version != _VERSION:
        raise GrantsFileError(f"version {version}, where this release reads {_VERSION}")


def _decode_grant(document: dict[str, object]) -> Grant:
    sides = document["sides"]
    if not isinstance(sides, list) or len(sides) != 2:
        raise GrantsFileError("a grant has two sides")
    first, second = (_decode_side(side) for side in sides)
    return Grant((first, second), float(str(document["expires"])))


def _decode_side(document: dict[str, str]) -> Side:
    token = bytes.fromhex(document["token"])
    if len(token) != TOKEN_BYTES:
        raise GrantsFileError(f"a token is {TOKEN_BYTES} bytes, not {len(token)}")
    return Side(int(document["id"]), PublicKey.parse(document["peer"]), token, int(document["port"]))
