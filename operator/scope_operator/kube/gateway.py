"""The gateway beside the operator: its keys in one Secret, its peers' heartbeats as Leases.

The leader makes the Secret `scope-gateway` once, before the gateway of any replica serves; every replica then
serves with the same keys, so a join string holds at each of them. It is never made anew while a mesh names a
registry key: all that was signed with the lost key would be void.

    tls.key     PEM, P-256: its pin is in join strings. Where somebody took it out, to replace it, the leader
                makes another, for which the registry vouches towards those who know the earlier one
    replaced    pins of earlier such keys, a JSON list of base64url
    signing     32-byte seed of the Ed25519 key that signs tombstones, base64
    probe       32-byte X25519 key of the reflector, base64
    admin.json  what `scopectl --admin-file` takes, with the administrator's token
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from scope.credentials import base64url, read_base64url
from scope.model import ConfigError, Mesh, Secret
from scope.registry.kube.client import MERGE, KubeClient, Object
from scope.registry.kube.objects import peer_lease, secret_path, secrets_path
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import AlreadyExists, NotFound
from scope.vouching import MAX_REPLACED
from scope_operator.gateway.face import Face, Identity, administrator_document
from scope_operator.gateway.joining import public_half

NAME = "scope-gateway"
TYPE = "scope.ltgc.cc/gateway"
ADMIN = "admin.json"
REPLACED = "replaced"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GatewayKeys:
    """What the Secret holds."""

    tls_key: Secret  # PEM
    signing: Secret
    probe: Secret
    token: Secret  # the administrator's, as text
    replaced: tuple[bytes, ...] = ()  # pins of TLS keys before this one

    def identity(self, registry_id: str) -> Identity:
        """Who the gateway is."""
        administrator = hashlib.sha256(self.token.raw).digest()
        return Identity(registry_id, self.signing, self.probe, administrator, self.replaced)


def new_keys(entropy: Callable[[int], bytes]) -> GatewayKeys:
    """Fresh keys; `entropy` gives so many random bytes."""
    return GatewayKeys(
        tls_key=_new_tls_key(),
        signing=Secret(entropy(32)),
        probe=Secret(entropy(32)),
        token=Secret(base64url(entropy(32)).encode()),
    )


def _new_tls_key() -> Secret:
    key = ec.generate_private_key(ec.SECP256R1())
    return Secret(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def secret_of(keys: GatewayKeys, *, namespace: str) -> Object:
    """The Secret to create; where the gateway serves is added by `tell_administrator`."""
    texts = {
        "tls.key": keys.tls_key.raw,
        "signing": base64.b64encode(keys.signing.raw),
        "probe": base64.b64encode(keys.probe.raw),
        ADMIN: json.dumps({"token": keys.token.raw.decode()}).encode(),
    }
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": NAME, "namespace": namespace},
        "type": TYPE,
        "data": {name: base64.b64encode(text).decode() for name, text in texts.items()},
    }


def keys_of(secret: Mapping[str, Any]) -> GatewayKeys:
    """The keys in a Secret. Raises ConfigError."""
    data = secret.get("data") or {}
    try:
        texts = {name: base64.b64decode(value, validate=True) for name, value in data.items()}
        keys = GatewayKeys(
            tls_key=Secret(texts["tls.key"]),
            signing=Secret(base64.b64decode(texts["signing"], validate=True)),
            probe=Secret(base64.b64decode(texts["probe"], validate=True)),
            token=Secret(str(json.loads(texts[ADMIN])["token"]).encode()),
            replaced=tuple(map(read_base64url, json.loads(texts.get(REPLACED, b"[]")))),
        )
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ConfigError(
            f"the Secret {NAME} is damaged ({type(error).__name__} {error}): restore it from a backup"
        ) from None
    if len(keys.signing.raw) != 32 or len(keys.probe.raw) != 32 or not keys.token.raw:
        raise ConfigError(f"a key in the Secret {NAME} has the wrong length: restore it from a backup")
    return keys


async def find_keys(client: KubeClient, *, namespace: str) -> GatewayKeys | None:
    """The gateway's keys; None while there are none, or no TLS key. Raises ConfigError, RegistryError."""
    try:
        secret = await client.ask("GET", secret_path(NAME, namespace))
    except NotFound:
        return None
    return None if _is_to_be_replaced(secret) else keys_of(secret)


async def ensure_keys(
    client: KubeClient, *, namespace: str, meshes: Iterable[Mesh], entropy: Callable[[int], bytes]
) -> GatewayKeys:
    """The gateway's keys, made if they never were; for the leader. Raises ConfigError, RegistryError."""
    try:
        secret = await client.ask("GET", secret_path(NAME, namespace))
    except NotFound:
        return await _make_keys(client, namespace=namespace, meshes=meshes, entropy=entropy)
    if _is_to_be_replaced(secret):
        secret = await _replace_tls_key(client, secret, namespace=namespace)
    found = keys_of(secret)
    _require_own(found, meshes)
    return found


async def _make_keys(
    client: KubeClient, *, namespace: str, meshes: Iterable[Mesh], entropy: Callable[[int], bytes]
) -> GatewayKeys:
    named = [mesh.meta.name for mesh in meshes if mesh.status.signing_key is not None]
    if named:
        raise ConfigError(
            f"the Secret {namespace}/{NAME} is missing, but ScopeMesh {named[0]} names a registry key: "
            "restore the Secret from a backup; or, to begin anew, remove status.signingKey of every "
            "ScopeMesh, and let every external peer join again"
        )
    keys = new_keys(entropy)
    try:
        await client.ask("POST", secrets_path(namespace), body=secret_of(keys, namespace=namespace))
    except AlreadyExists:
        return keys_of(await client.ask("GET", secret_path(NAME, namespace)))
    return keys


def _is_to_be_replaced(secret: Mapping[str, Any]) -> bool:
    """Whether the TLS key, and nothing but that, was taken out."""
    data = secret.get("data") or {}
    return "tls.key" not in data and {"signing", "probe", ADMIN} <= data.keys()


async def _replace_tls_key(client: KubeClient, secret: Mapping[str, Any], *, namespace: str) -> Object:
    """Another TLS key in place of the one that was taken out. Raises ConfigError, RegistryError."""
    keys = keys_of({"data": {**secret["data"], "tls.key": ""}})
    pin = json.loads(base64.b64decode(secret["data"][ADMIN])).get("pin")
    replaced = [*map(base64url, keys.replaced), *([pin] if isinstance(pin, str) else [])]
    texts = {"tls.key": _new_tls_key().raw, REPLACED: json.dumps(replaced[-MAX_REPLACED:]).encode()}
    body = {"data": {name: base64.b64encode(text).decode() for name, text in texts.items()}}
    log.warning("gateway.key_replaced before=%s", pin)
    return await client.ask("PATCH", secret_path(NAME, namespace), body=body, content_type=MERGE)


async def tell_administrator(
    client: KubeClient, face: Face, keys: GatewayKeys, *, namespace: str, registry_id: str
) -> None:
    """Let the Secret say where the gateway serves, if it says otherwise. Raises RegistryError."""
    document = administrator_document(face, keys.identity(registry_id), token=keys.token.raw.decode())
    text = base64.b64encode(json.dumps(document, indent=2).encode() + b"\n").decode()
    stored = await client.ask("GET", secret_path(NAME, namespace))
    if (stored.get("data") or {}).get(ADMIN) != text:
        await client.ask(
            "PATCH", secret_path(NAME, namespace), body={"data": {ADMIN: text}}, content_type=MERGE
        )


class GatewayRegistry(KubeRegistry):
    """The registry as the gateway's peers see it: each of their heartbeats renews a Lease of that peer's own.

    Among them are Nodes of other clusters, whose names may be those of Nodes of this one. `uid_of` tells a
    ScopePeer's UID by its name, "" where there is none.
    """

    uid_of: Callable[[str], str]

    async def heartbeat(self, name: str) -> None:
        """The peer `name` is alive now. Raises NotFound, Refused, Unavailable."""
        uid = self.uid_of(name)
        if not uid:
            raise NotFound(f"there is no ScopePeer {name!r}")
        await self.leases.renew(peer_lease(name), peer=name, uid=uid)


def _require_own(keys: GatewayKeys, meshes: Iterable[Mesh]) -> None:
    key = public_half(keys.signing)
    for mesh in meshes:
        if mesh.status.signing_key not in (None, key):
            raise ConfigError(
                f"ScopeMesh {mesh.meta.name} names another registry key than the Secret {NAME} holds: "
                "restore the Secret that belongs to it"
            )
