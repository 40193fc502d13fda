"""Joining, leaving, removal and join tokens, from JSON to the functions that decide them.

The secret of a token is drawn here and stands in one answer, inside its join string; the registry keeps a
hash.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from scope import resources
from scope.admission import Refusal
from scope.cluster_enrolment import parse_cluster_enrolment
from scope.enrolment import parse_enrolment
from scope.join import JoinString
from scope.model import AgentTokens, Cluster, JoinToken, Kind, Mesh, Peer, PublicKey, Role, Secret, Service
from scope.registry.port import Conflict, NotFound, Refused, Registry
from scope_operator import clusters, enrolment, tokens

log = logging.getLogger(__name__)

DEFAULT_LIFETIME = (
    24 * 3600.0
)  # long enough to set up a few machines, short enough to be forgotten in a history
TOKEN_ID_BYTES = 5  # eight letters: 2**40 ids, of which a collision is refused
TOKEN_FIELDS = ("mesh", "role", "expiresIn", "singleUse")


class Joining:
    """Over `registry`, whose signing key's seed is `signing`; `url` and `pin` stand in the join strings.

    `wall` is the wall clock, `entropy` gives so many random bytes.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        signing: Secret,
        url: str,
        pin: bytes | None,
        wall: Callable[[], float],
        entropy: Callable[[int], bytes],
    ) -> None:
        self._registry = registry
        self._signing = signing
        self._key = public_half(signing)
        self._url = url
        self._pin = pin
        self._wall = wall
        self._entropy = entropy

    async def join(self, document: Mapping[str, Any]) -> Peer:
        """Enrol who asks. Raises Refusal (403 with the reason), ConfigError, Unavailable."""
        request = parse_enrolment(document)
        try:
            peer = await enrolment.enrol(self._registry, request, registry_key=self._key, wall=self._wall())
        except Refused as error:
            log.info("join.refused mesh=%s token=%s reason=%s", request.mesh, request.token_id, error)
            raise Refusal(403, "JoinRefused", str(error)) from None
        log.info("peer.joined name=%s uid=%s token=%s", peer.meta.name, peer.meta.uid, request.token_id)
        return peer

    async def leave(self, peer: Peer, document: Mapping[str, Any]) -> Peer:
        """Bury a peer under its own tombstone, `{"tombstone": {...}}`. Raises ConfigError, Refused."""
        if set(document) != {"tombstone"}:
            raise Refusal(422, "Invalid", "the body holds one field, `tombstone`")
        tombstone = resources.parse_tombstone(document["tombstone"])
        left = await enrolment.leave(
            self._registry, peer.meta.name, tombstone, registry_key=self._key, wall=self._wall()
        )
        log.info("peer.left name=%s uid=%s", peer.meta.name, peer.meta.uid)
        return left

    async def remove(self, name: str, *, uid: str) -> Peer:
        """Bury a peer under the registry's tombstone. Raises NotFound, Conflict, Refused, Unavailable."""
        removed = await enrolment.remove_peer(
            self._registry, name, uid=uid, signing=self._signing, wall=self._wall()
        )
        log.info("peer.removed name=%s uid=%s", name, uid)
        return removed

    async def join_cluster(self, document: Mapping[str, Any]) -> tuple[Cluster, Mesh]:
        """Bring in a cluster. Raises Refusal (403 with the reason), ConfigError, Unavailable."""
        request = parse_cluster_enrolment(document)
        name = request.cluster.name
        try:
            mesh = await clusters.join_cluster(
                self._registry, request, registry_key=self._key, wall=self._wall()
            )
        except Refused as error:
            log.info(
                "cluster.refused mesh=%s cluster=%s token=%s reason=%s",
                request.mesh,
                name,
                request.token_id,
                error,
            )
            raise Refusal(403, "JoinRefused", str(error)) from None
        log.info("cluster.joined mesh=%s name=%s uid=%s", mesh.meta.name, name, request.cluster.uid)
        return request.cluster, mesh

    async def replace_cluster_tokens(self, mesh: str, cluster: Cluster, tokens: AgentTokens) -> Cluster:
        """Know a joined cluster's agents by these from now on. Raises Conflict, Refused, Unavailable."""
        found = await clusters.replace_tokens(self._registry, mesh, cluster, tokens)
        changed = clusters.find_cluster(found, cluster.name)
        log.info("cluster.keys mesh=%s name=%s keys=%s", mesh, cluster.name, [key.id for key in tokens.keys])
        return changed or cluster

    async def remove_cluster(self, mesh: str, name: str) -> Cluster:
        """Trust a joined cluster no longer; delete its peers and what it exported. Raises NotFound, Refused,
        Unavailable.

        Their keys may come back: the cluster may join again.
        """
        cluster = await clusters.remove_cluster(self._registry, mesh, name)
        for kind in (Kind.SERVICE, Kind.PEER):
            for each in (await self._registry.list(kind)).resources:
                if isinstance(each, Service | Peer) and (each.spec.mesh, each.spec.cluster) == (mesh, name):
                    with suppress(NotFound, Conflict):
                        await self._registry.delete(kind, each.meta.name, uid=each.meta.uid)
        log.info("cluster.removed mesh=%s name=%s uid=%s", mesh, name, cluster.uid)
        return cluster

    async def tokens(self) -> list[dict[str, object]]:
        """What may be told of every token: not its secret, nor the hash of it."""
        listed = await self._registry.list(Kind.TOKEN)
        return [_shown(token) for token in listed.resources if isinstance(token, JoinToken)]

    async def create_token(self, document: Mapping[str, Any]) -> dict[str, object]:
        """Make a token; the answer holds its join string. Raises Refusal (422), NotFound, Refused."""
        mesh, role, lifetime, single_use = _token_request(document)
        found = await self._registry.get(Kind.MESH, mesh)
        if not isinstance(found, Mesh):
            raise NotFound(f"there is no ScopeMesh {mesh!r}")
        interface = found.spec.existing_interface
        if interface and role is Role.HUB:
            raise _invalid(
                f"role: Hub, and {mesh} on {interface} has no hubs; allowed: {Role.AUTO}, {Role.EDGE}"
            )
        secret = Secret(self._entropy(tokens.SECRET_BYTES))
        token_id = base64.b32encode(self._entropy(TOKEN_ID_BYTES)).decode().lower()
        token = tokens.make_token(
            token_id=token_id,
            secret=secret,
            mesh=mesh,
            role=role,
            wall=self._wall(),
            lifetime=lifetime,
            single_use=single_use,
        )
        stored = await self._registry.create(token)
        if not isinstance(stored, JoinToken):
            raise TypeError("a registry stores what it is given")
        log.info("token.created id=%s mesh=%s single_use=%s", token_id, mesh, single_use)
        join_string = JoinString(self._url, mesh, token_id, secret, self._pin, self._key, interface)
        return {**_shown(stored), "joinString": join_string.format()}

    async def delete_token(self, name: str) -> None:
        """Let nobody join with a token any more. Raises NotFound."""
        token = await self._registry.get(Kind.TOKEN, name)
        await self._registry.delete(Kind.TOKEN, name, uid=token.meta.uid)
        log.info("token.deleted id=%s", name)


def public_half(signing: Secret) -> PublicKey:
    """The public key of an Ed25519 seed."""
    return PublicKey(Ed25519PrivateKey.from_private_bytes(signing.raw).public_key().public_bytes_raw())


def _token_request(document: Mapping[str, Any]) -> tuple[str, Role, float, bool]:
    """Mesh, role, lifetime in seconds, single use. Raises Refusal."""
    for name in document:
        if name not in TOKEN_FIELDS:
            raise _invalid(f"{name[:60]}: unknown field; allowed: {', '.join(TOKEN_FIELDS)}")
    mesh, single_use = document.get("mesh"), document.get("singleUse", False)
    if not isinstance(mesh, str) or not mesh:
        raise _invalid("mesh: missing; allowed: the name of a ScopeMesh")
    if not isinstance(single_use, bool):
        raise _invalid("singleUse: allowed: true, false")
    try:
        role = Role(document.get("role", Role.AUTO))
    except ValueError:
        raise _invalid(f"role: allowed: {', '.join(Role)}") from None
    lifetime, text = DEFAULT_LIFETIME, document.get("expiresIn")
    if text is not None:
        try:
            lifetime = resources.parse_duration(text if isinstance(text, str) else "")
        except ValueError as error:
            raise _invalid(f"expiresIn: {error}") from None
    return mesh, role, lifetime, single_use


def _invalid(message: str) -> Refusal:
    return Refusal(422, "Invalid", message)


def _shown(token: JoinToken) -> dict[str, object]:
    spec = token.spec
    return {
        "id": token.meta.name,
        "mesh": spec.mesh,
        "role": str(spec.role),
        "expires": resources.format_time(spec.expires),
        "singleUse": spec.single_use,
        "used": len(spec.used_by),
    }
