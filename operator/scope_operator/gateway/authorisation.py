"""Who is asking: an administrator by a secret, a peer by its signature, the operator of a joined cluster by
its own, an agent of such a cluster by the token of its API server, or nobody known.

A peer is known by name and uid together, and believed when the key bound at its enrolment signed exactly this
request for this registry within the last minute, once. A cluster's operator is known by mesh, name and UID
and believed in the same way; `typ` in the token's header says which of the two is meant, and each is looked
for only among its own kind, so one named as the other is nobody.

An agent of a joined cluster names mesh and cluster in headers, since what API servers call themselves is
alike everywhere, and is believed under the keys which that very cluster registered. The algorithm is the
key's, never the token's. It is the peer of the Node that the token is bound to, by name and UID.

Everything that a refusal says is said after the signature holds, but for what anyone may know: that there is
no such peer or cluster.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jwt.types import Options

from scope.admission import Refusal
from scope.credentials import AUDIENCE, CLUSTER_TYPE, MAX_LIFETIME, PEER_TYPE, request_digest
from scope.model import (
    AgentTokens,
    Cluster,
    ClusterTrust,
    Kind,
    Mesh,
    Peer,
    PublicKey,
    Resource,
)
from scope.names import peer_name
from scope.registry.port import NotFound, Registry
from scope_operator.clusters import find_cluster, verifying_key
from scope_operator.gateway.feed import removed

LEEWAY = (
    5.0  # seconds a clock may be ahead: what an NTP step leaves; a clock that is off more is told the time
)
# Seconds that a cluster's clock may be off: an agent cannot sign anew, and its kubelet has its token replaced
# long before it expires.
TOKEN_LEEWAY = 60.0
JTI_CHARACTERS = 64  # a nonce of 16 bytes needs 22

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")  # of what a registry holds

CLAIMS = ("iss", "sub", "aud", "iat", "exp", "jti", "req")
TOKEN_CLAIMS = ("iss", "sub", "aud", "exp")
# Times are checked by the gateway's own clock, after the signature.
_UNTIMED: Options = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}


@dataclass(frozen=True, slots=True)
class Administrator:
    """Whoever holds the administrator's secret."""


@dataclass(frozen=True, slots=True)
class Member:
    """A peer, as the registry knows it now. `by_node`: its cluster's API server vouches for it."""

    peer: Peer
    by_node: bool = False


@dataclass(frozen=True, slots=True)
class ClusterOperator:
    """The operator of a joined cluster of `mesh`, as the registry knows it now."""

    mesh: str
    cluster: Cluster


@dataclass(frozen=True, slots=True)
class Stranger:
    """A request without a credential."""


Caller: TypeAlias = Administrator | Member | ClusterOperator | Stranger


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a request says of its sender: the Authorization header, and those that say whose token it is."""

    authorization: str | None
    mesh: str | None = None
    cluster: str | None = None


class Authority:
    """Tells callers apart. `administrator` is the SHA-256 of the administrator's secret."""

    def __init__(
        self,
        registry: Registry,
        *,
        registry_id: str,
        administrator: bytes,
        wall: Callable[[], float],
        replays_per_peer: int,
        replays_per_cluster: int,
    ) -> None:
        self._registry = registry
        self._registry_id = registry_id
        self._administrator = administrator
        self._wall = wall
        self._started = wall()  # the replays seen by an earlier process are not known to this one
        self._replays = Replays(replays_per_peer)
        self._cluster_replays = Replays(replays_per_cluster)

    async def caller(self, claimed: Claimed, *, method: str, target: str, body: bytes) -> Caller:
        """The caller of a request. Raises Refusal (401, 403, 404, 429)."""
        if claimed.authorization is None:
            return Stranger()
        scheme, _, credential = claimed.authorization.partition(" ")
        if scheme.lower() != "bearer" or not credential:
            raise _unauthorized("the Authorization header is `Bearer ` and a token")
        if claimed.mesh is not None or claimed.cluster is not None:
            return await self._agent(credential, mesh=claimed.mesh or "", cluster=claimed.cluster or "")
        if credential.count(".") == 2:
            kind, digest = _header(credential).get("typ", PEER_TYPE), request_digest(method, target, body)
            if kind == CLUSTER_TYPE:
                return await self._operator(credential, digest)
            if kind != PEER_TYPE:
                raise _unauthorized(f"the header of the token says typ {PEER_TYPE} or {CLUSTER_TYPE}")
            return await self._member(credential, digest)
        digest_of_secret = hashlib.sha256(credential.encode(errors="replace")).digest()
        if not hmac.compare_digest(digest_of_secret, self._administrator):
            raise _unauthorized(
                "this is not the administrator's token: take it from the registry's admin.json"
            )
        return Administrator()

    # --- who signs each request ---------------------------------------------------------------------------

    async def _member(self, token: str, digest: str) -> Member:
        claimed = _unverified(token)
        peer = await self._peer(claimed.get("iss"), claimed.get("sub"))
        if peer.report is None:
            raise _unauthorized("this peer has no keys: join again with a token")
        claims = self._signed(token, peer.report.keys.signing, digest)
        if peer.assignment.tombstone is not None:
            raise removed(peer.meta.name)
        self._replays.take(
            peer.meta.uid, str(claims["jti"]), expires=float(claims["exp"]), now=self._wall(), who="peer"
        )
        return Member(peer)

    async def _find(self, kind: Kind, name: object) -> Resource | None:
        """A resource that a stranger names: what cannot be a name is not asked for."""
        if not isinstance(name, str) or not NAME.fullmatch(name):
            return None
        try:
            return await self._registry.get(kind, name)
        except NotFound:
            return None

    async def _peer(self, name: object, uid: object) -> Peer:
        found = await self._find(Kind.PEER, name)
        if not isinstance(found, Peer) or found.meta.uid != uid or found.report is None:
            raise _unauthorized(
                f"this registry knows no ScopePeer {name!r} of that uid: join again with a token"
            )
        return found

    async def _operator(self, token: str, digest: str) -> ClusterOperator:
        claimed = _unverified(token)
        named = (claimed.get("mesh"), claimed.get("iss"))
        mesh, name = (each if isinstance(each, str) else "" for each in named)
        cluster, trust = await self._joined(mesh, name)
        if cluster.uid != claimed.get("sub"):
            raise _unauthorized(
                f"cluster {name!r} of mesh {mesh!r} has another kube-system UID: join under another name"
            )
        claims = self._signed(token, trust.signing_key, digest)
        self._cluster_replays.take(
            f"{mesh}/{cluster.uid}",
            str(claims["jti"]),
            expires=float(claims["exp"]),
            now=self._wall(),
            who="cluster",
        )
        return ClusterOperator(mesh, cluster)

    async def _joined(self, mesh: str, name: str) -> tuple[Cluster, ClusterTrust]:
        found = await self._find(Kind.MESH, mesh)
        cluster = find_cluster(found, name) if isinstance(found, Mesh) else None
        if cluster is None or cluster.trust is None:
            raise _unauthorized(
                f"no cluster {name!r} has joined mesh {mesh!r}: its operator joins with a token"
            )
        return cluster, cluster.trust

    def _signed(self, token: str, signing: PublicKey, digest: str) -> Mapping[str, Any]:
        """The claims, once signature, audience, request and times hold."""
        key = Ed25519PublicKey.from_public_bytes(signing.raw)
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=["EdDSA"],
                audience=self._registry_id,
                options={**_UNTIMED, "require": list(CLAIMS)},
            )
        except jwt.InvalidAudienceError:
            raise _unauthorized(f"the token is for another registry: this is {self._registry_id}") from None
        except jwt.InvalidTokenError as error:
            raise _unauthorized(f"the token does not hold: {error}") from None
        if (
            not _are_numbers(claims, "iat", "exp")
            or not isinstance(claims["jti"], str)
            or not 0 < len(claims["jti"]) <= JTI_CHARACTERS
        ):
            raise _unauthorized(
                f"iat and exp are numbers, jti is a text of at most {JTI_CHARACTERS} characters"
            )
        if not hmac.compare_digest(str(claims["req"]), digest):
            raise _unauthorized(
                "the token was signed for another request: sign method, path, query and body anew"
            )
        now, issued, expires = self._wall(), float(claims["iat"]), float(claims["exp"])
        if expires - issued > MAX_LIFETIME:
            raise _unauthorized(f"the token lives longer than {MAX_LIFETIME:.0f} seconds: sign a shorter one")
        if issued > now + LEEWAY or expires <= now or issued < self._started:
            raise Refusal(
                401,
                "ClockSkew",
                "the token is expired, from the future or from before the gateway started: "
                "sign with the time in `details.now`",
                details={"now": now},
            )
        return claims

    # --- whom an API server vouches for -------------------------------------------------------------------

    async def _agent(self, token: str, *, mesh: str, cluster: str) -> Member:
        registered, trust = await self._joined(mesh, cluster)
        claims = self._vouched(token, trust.tokens, cluster=cluster)
        account = trust.tokens.service_account
        subject = f"system:serviceaccount:{account.namespace}:{account.name}"
        if claims["sub"] != subject:
            raise _forbidden(
                f"the token is of {str(claims['sub'])!r}; agents of cluster {cluster!r} are {subject!r}"
            )
        name, uid = _node(claims)
        return Member(await self._peer_of(mesh, registered, name, uid), by_node=True)

    def _vouched(self, token: str, tokens: AgentTokens, *, cluster: str) -> Mapping[str, Any]:
        """The claims, once signature, issuer, audience and times hold."""
        kid = _header(token).get("kid")
        key = next((each for each in tokens.keys if each.id == kid), None)
        if key is None:
            raise _unauthorized(
                f"the token is signed by a key that cluster {cluster!r} has not registered: is the token "
                "this cluster's? Its operator registers new keys at its start, and every hour"
            )
        verifying = verifying_key(key)
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                verifying.key,
                algorithms=[verifying.algorithm],
                audience=AUDIENCE,
                issuer=tokens.issuer,
                options={**_UNTIMED, "require": list(TOKEN_CLAIMS)},
            )
        except jwt.InvalidAudienceError:
            raise _unauthorized(
                f"the token is not for the audience {AUDIENCE}: project a ServiceAccount token for it"
            ) from None
        except jwt.InvalidIssuerError:
            raise _unauthorized(
                f"the token is not issued by {tokens.issuer!r}, the issuer of cluster {cluster!r}"
            ) from None
        except (jwt.InvalidTokenError, ValueError) as error:
            raise _unauthorized(f"the token does not hold: {error}") from None
        if not _are_numbers(claims, *(name for name in ("exp", "iat", "nbf") if name in claims)):
            raise _unauthorized("the token does not hold: exp, iat and nbf are numbers")
        now = self._wall()
        late = now - float(claims["exp"])
        if late >= TOKEN_LEEWAY:
            raise _unauthorized(
                f"the token expired {late:.0f} s ago: read its file anew; if its kubelet does not replace "
                "it, look at the clocks of this Node and of the gateway"
            )
        if max(float(claims.get("iat", 0)), float(claims.get("nbf", 0))) > now + TOKEN_LEEWAY:
            raise _unauthorized(
                "the token is from the future: look at the clocks of its API server and of the gateway"
            )
        return claims

    async def _peer_of(self, mesh: str, cluster: Cluster, node: str, uid: str) -> Peer:
        peer = await self._find(Kind.PEER, peer_name(mesh, cluster.name, node))
        if not isinstance(peer, Peer) or (peer.spec.mesh, peer.spec.cluster, peer.spec.node_name) != (
            mesh,
            cluster.name,
            node,
        ):
            raise Refusal(
                404,
                "NotFound",
                f"Node {node!r} of cluster {cluster.name!r} has no ScopePeer in mesh {mesh!r}: its cluster's "
                "operator makes one once the mesh's nodeSelector selects the Node",
            )
        if peer.spec.node_uid != uid:
            raise Refusal(
                404,
                "NotFound",
                f"ScopePeer {peer.meta.name!r} is of an earlier Node {node!r} (UID {peer.spec.node_uid}, not "
                f"{uid}): its cluster's operator makes a new one within seconds",
            )
        if peer.assignment.tombstone is not None:
            raise removed(peer.meta.name)
        return peer


class Replays:
    """The nonces seen, until their requests expire. Bounded per sender, so one cannot crowd out another."""

    def __init__(self, per_sender: int) -> None:
        self._per_sender = per_sender
        self._seen: dict[str, OrderedDict[str, float]] = {}

    def take(self, sender: str, jti: str, *, expires: float, now: float, who: str) -> None:
        """Remember a nonce. Raises Refusal when it was seen, or when there are too many to remember."""
        seen = self._seen.setdefault(sender, OrderedDict())
        # Oldest first, though lifetimes differ: what outlives its place costs memory for a minute at most.
        while seen and next(iter(seen.values())) <= now:
            seen.popitem(last=False)
        if jti in seen:
            raise _unauthorized("this request was made before: sign each with a fresh jti")
        if len(seen) >= self._per_sender:
            raise Refusal(
                429, "TooManyRequests", f"too many requests of this {who} within a minute", retry_after=5.0
            )
        seen[jti] = expires


# --- reading tokens -----------------------------------------------------------------------------------------


def _header(token: str) -> Mapping[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except (jwt.InvalidTokenError, ValueError):
        raise _unauthorized("the token is not a JWT") from None


def _unverified(token: str) -> Mapping[str, Any]:
    try:
        claims: Mapping[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except (jwt.InvalidTokenError, ValueError):
        raise _unauthorized("the token is not a JWT that names its sender as `iss`") from None
    return claims


def _node(claims: Mapping[str, Any]) -> tuple[str, str]:
    """Name and UID of the Node that an API server bound the token to. Raises Refusal."""
    bound: object = claims.get("kubernetes.io")
    node = bound.get("node") if isinstance(bound, Mapping) else None
    name, uid = (node.get("name"), node.get("uid")) if isinstance(node, Mapping) else (None, None)
    if not isinstance(name, str) or not isinstance(uid, str) or not name or not uid:
        raise _forbidden(
            "the token names no Node: use the one that a kubelet of Kubernetes 1.32 or later projects into "
            "the agent's pod"
        )
    return name, uid


def _are_numbers(claims: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(claims[name], int | float) and not isinstance(claims[name], bool) for name in names)


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, "Unauthorized", message)


def _forbidden(message: str) -> Refusal:
    return Refusal(403, "Forbidden", message)
