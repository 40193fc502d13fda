"""Who is asking: an administrator by a secret, a peer by its signature, or nobody known.

A peer is known by name and uid together, and believed when the key bound at its enrolment signed exactly this
request for this registry within the last minute, once. Everything that a refusal says is said after the
signature holds, but for what anyone may know: that there is no such peer.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from scope.credentials import MAX_LIFETIME, request_digest
from scope.model import Kind, Peer
from scope.registry.port import NotFound, Registry
from scope_operator.gateway.errors import Refusal
from scope_operator.gateway.feed import removed

LEEWAY = (
    5.0  # seconds a clock may be ahead: what an NTP step leaves; a clock that is off more is told the time
)
JTI_CHARACTERS = 64  # a nonce of 16 bytes needs 22

CLAIMS = ("iss", "sub", "aud", "iat", "exp", "jti", "req")


@dataclass(frozen=True, slots=True)
class Administrator:
    """Whoever holds the administrator's secret."""


@dataclass(frozen=True, slots=True)
class Member:
    """A peer, as the registry knows it now."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Stranger:
    """A request without a credential."""


Caller: TypeAlias = Administrator | Member | Stranger


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
    ) -> None:
        self._registry = registry
        self._registry_id = registry_id
        self._administrator = administrator
        self._wall = wall
        self._started = wall()  # the replays seen by an earlier process are not known to this one
        self._replays = Replays(replays_per_peer)

    async def caller(self, header: str | None, *, method: str, target: str, body: bytes) -> Caller:
        """The caller of a request with this Authorization header. Raises Refusal (401, 403, 429)."""
        if header is None:
            return Stranger()
        scheme, _, credential = header.partition(" ")
        if scheme.lower() != "bearer" or not credential:
            raise _unauthorized("the Authorization header is `Bearer ` and a token")
        if credential.count(".") == 2:
            return await self._member(credential, request_digest(method, target, body))
        digest = hashlib.sha256(credential.encode(errors="replace")).digest()
        if not hmac.compare_digest(digest, self._administrator):
            raise _unauthorized(
                "this is not the administrator's token: take it from the registry's admin.json"
            )
        return Administrator()

    async def _member(self, token: str, digest: str) -> Member:
        try:
            claimed = jwt.decode(token, options={"verify_signature": False})
            name = claimed["iss"]
        except (jwt.InvalidTokenError, KeyError, TypeError, ValueError):
            raise _unauthorized("the token is not a JWT that names its peer as `iss`") from None
        peer = await self._peer(name, claimed.get("sub"))
        claims = self._verified(token, peer)
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
        if peer.assignment.tombstone is not None:
            raise removed(peer.meta.name)
        self._replays.take(peer.meta.uid, str(claims["jti"]), expires=expires, now=now)
        return Member(peer)

    async def _peer(self, name: object, uid: object) -> Peer:
        try:
            found = await self._registry.get(Kind.PEER, str(name))
        except NotFound:
            found = None
        if not isinstance(found, Peer) or found.meta.uid != uid or found.report is None:
            raise _unauthorized(
                f"this registry knows no ScopePeer {name!r} of that uid: join again with a token"
            )
        return found

    def _verified(self, token: str, peer: Peer) -> dict[str, str | float]:
        """The claims, once the signature of the peer's own key and the audience hold."""
        if peer.report is None:
            raise _unauthorized("this peer has no keys: join again with a token")
        key = Ed25519PublicKey.from_public_bytes(peer.report.keys.signing.raw)
        try:
            # Times are checked by the gateway's own clock, after the signature.
            claims: dict[str, str | float] = jwt.decode(
                token,
                key,
                algorithms=["EdDSA"],
                audience=self._registry_id,
                options={
                    "require": list(CLAIMS),
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except jwt.InvalidAudienceError:
            raise _unauthorized(f"the token is for another registry: this is {self._registry_id}") from None
        except jwt.InvalidTokenError as error:
            raise _unauthorized(f"the token does not hold: {error}") from None
        numbers = all(isinstance(claims[name], int | float) for name in ("iat", "exp"))
        if not numbers or not isinstance(claims["jti"], str) or not 0 < len(claims["jti"]) <= JTI_CHARACTERS:
            raise _unauthorized(
                f"iat and exp are numbers, jti is a text of at most {JTI_CHARACTERS} characters"
            )
        return claims


class Replays:
    """The nonces seen, until their requests expire. Bounded per peer, so one cannot crowd out another."""

    def __init__(self, per_peer: int) -> None:
        self._per_peer = per_peer
        self._seen: dict[str, OrderedDict[str, float]] = {}

    def take(self, uid: str, jti: str, *, expires: float, now: float) -> None:
        """Remember a nonce. Raises Refusal when it was seen, or when there are too many to remember."""
        seen = self._seen.setdefault(uid, OrderedDict())
        # Oldest first, though lifetimes differ: what outlives its place costs memory for a minute at most.
        while seen and next(iter(seen.values())) <= now:
            seen.popitem(last=False)
        if jti in seen:
            raise _unauthorized("this request was made before: sign each with a fresh jti")
        if len(seen) >= self._per_peer:
            raise Refusal(
                429, "TooManyRequests", "too many requests of this peer within a minute", retry_after=5.0
            )
        seen[jti] = expires


def _unauthorized(message: str) -> Refusal:
    return Refusal(401, "Unauthorized", message)
