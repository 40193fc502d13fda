"""The request to join a mesh: what a machine says of itself, signed with the signing key that it asks to
bind.

The signature (Ed25519) covers a label and then the registry's signing key, the mesh, the token's id, the
three keys, the hostname and the held addresses, each behind its length in two bytes (big endian): it proves
that the machine holds the private half of the signing key, for this registry, mesh and token alone. The
token's secret is not covered: it is checked by itself, and only its hash is kept.

As a dictionary, for HTTP:

    {"mesh", "tokenID", "secret": base64, "hostname", "keys": {"wireGuard", "probe", "signing": base64},
     "heldAddresses": [address], "signature": base64}
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from scope.model import ConfigError, IPAddress, PeerKeys, PublicKey, Secret

MAX_HOSTNAME = 253  # a DNS name
MAX_HELD = 4  # addresses: one of each family, and as many while a mesh moves to new prefixes
SECRET_BYTES = 32
SIGNATURE_BYTES = 64

_LABEL = b"scope enrolment 1"
_FIELDS = ("mesh", "tokenID", "secret", "hostname", "keys", "heldAddresses", "signature")
_KEYS = ("wireGuard", "probe", "signing")


@dataclass(frozen=True, slots=True)
class Enrolment:
    """A machine's request to become a peer of `mesh`; `sign_enrolment` fills in the signature."""

    mesh: str
    token_id: str
    secret: Secret  # of the token
    hostname: str
    keys: PeerKeys
    held_addresses: tuple[IPAddress, ...] = ()  # from an earlier registry of this mesh
    signature: bytes = b""


def sign_enrolment(request: Enrolment, *, registry: PublicKey, signing: Secret) -> Enrolment:
    """The request signed for the registry whose signing key is `registry`; `signing` is the 32-byte seed."""
    signature = Ed25519PrivateKey.from_private_bytes(signing.raw).sign(_statement(request, registry))
    return replace(request, signature=signature)


def verify_enrolment(request: Enrolment, *, registry: PublicKey) -> bool:
    """Whether the holder of the request's signing key made it for this registry."""
    try:
        key = Ed25519PublicKey.from_public_bytes(request.keys.signing.raw)
        key.verify(request.signature, _statement(request, registry))
    except (InvalidSignature, ValueError):
        return False
    return True


def enrolment_to_dict(request: Enrolment) -> dict[str, object]:
    """The request as a dictionary, secret included: for TLS and no log."""
    return {
        "mesh": request.mesh,
        "tokenID": request.token_id,
        "secret": base64.b64encode(request.secret.raw).decode(),
        "hostname": request.hostname,
        "keys": {name: str(key) for name, key in zip(_KEYS, _keys(request.keys), strict=True)},
        "heldAddresses": [str(address) for address in request.held_addresses],
        "signature": base64.b64encode(request.signature).decode(),
    }


def parse_enrolment(document: object) -> Enrolment:
    """Read a request. Raises ConfigError with the field's path and what is allowed, never with its value."""
    fields = read_object(document, "the request", _FIELDS)
    keys = read_object(fields.get("keys"), "keys", _KEYS)
    return Enrolment(
        mesh=read_text(fields, "mesh", 63),
        token_id=read_text(fields, "tokenID", 63),
        secret=Secret(read_bytes(fields, "secret", SECRET_BYTES)),
        hostname=read_text(fields, "hostname", MAX_HOSTNAME),
        keys=PeerKeys(*(_key(keys, name) for name in _KEYS)),
        held_addresses=_addresses(fields.get("heldAddresses", [])),
        signature=read_bytes(fields, "signature", SIGNATURE_BYTES),
    )


def _statement(request: Enrolment, registry: PublicKey) -> bytes:
    fields = (
        _LABEL,
        registry.raw,
        request.mesh.encode(),
        request.token_id.encode(),
        *(key.raw for key in _keys(request.keys)),
        request.hostname.encode(),
        *(address.packed for address in request.held_addresses),
    )
    return b"".join(len(field).to_bytes(2, "big") + field for field in fields)


def _keys(keys: PeerKeys) -> tuple[PublicKey, PublicKey, PublicKey]:
    return keys.wireguard, keys.probe, keys.signing


def read_object(value: object, where: str, allowed: tuple[str, ...]) -> Mapping[str, object]:
    """The object, if it has no other fields. Raises ConfigError."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: allowed: an object with {', '.join(allowed)}")
    unknown = sorted(str(name) for name in value if name not in allowed)
    if unknown:
        raise ConfigError(f"{where}: unknown field {unknown[0][:60]!r}; allowed: {', '.join(allowed)}")
    return value


def read_text(fields: Mapping[str, object], name: str, limit: int) -> str:
    """A text of a request. Raises ConfigError."""
    value = fields.get(name)
    if not isinstance(value, str) or not value or len(value) > limit or not value.isprintable():
        raise ConfigError(f"{name}: allowed: 1 to {limit} printable characters")
    return value


def read_bytes(fields: Mapping[str, object], name: str, size: int) -> bytes:
    """The bytes of a request that are written in base64. Raises ConfigError, which repeats none of them."""
    value, allowed = fields.get(name), ConfigError(f"{name}: allowed: {size} bytes in base64")
    if not isinstance(value, str) or len(value) > 2 * size:
        raise allowed
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise allowed from None
    if len(raw) != size:
        raise allowed
    return raw


def _key(keys: Mapping[str, object], name: str) -> PublicKey:
    value = keys.get(name)
    try:
        return PublicKey.parse(value if isinstance(value, str) else "")
    except ValueError:
        raise ConfigError(f"keys.{name}: allowed: a 32-byte key in canonical base64") from None


def _addresses(value: object) -> tuple[IPAddress, ...]:
    allowed = f"heldAddresses: allowed: at most {MAX_HELD} IP addresses"
    if not isinstance(value, list) or len(value) > MAX_HELD:
        raise ConfigError(allowed)
    try:
        addresses = tuple(ip_address(each if isinstance(each, str) else "") for each in value)
    except ValueError:
        raise ConfigError(allowed) from None
    if any(address.version == 6 and "%" in str(address) for address in addresses):
        raise ConfigError(f"{allowed}, without a zone")
    if any(getattr(address, "ipv4_mapped", None) for address in addresses):
        raise ConfigError(f"{allowed}, IPv4 as such")
    return addresses
