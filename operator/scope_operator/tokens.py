"""Join tokens: making them, and saying whether one lets a machine join. Pure.

A token is an id, which is public, and a secret of 32 random bytes, of which only the SHA-256 is kept: with
so much randomness a slow hash would protect nothing more. Secrets are compared in constant time, and a
token that does not exist is compared too, so that neither answer nor time tells which ids exist.
"""

from __future__ import annotations

import hashlib
import hmac

from scope.model import JoinToken, Meta, PeerKeys, Role, Secret, TokenSpec
from scope.registry.port import Refused

SECRET_BYTES = 32
MAX_LIFETIME = 365 * 86400.0  # a token that nobody remembers should not open a mesh for ever


def make_token(
    *, token_id: str, secret: Secret, mesh: str, role: Role, wall: float, lifetime: float, single_use: bool
) -> JoinToken:
    """A token to be created in a registry; `lifetime` is in seconds from `wall`. Raises Refused."""
    if len(secret.raw) != SECRET_BYTES:
        raise Refused(f"the secret of a join token is {SECRET_BYTES} random bytes, not {len(secret.raw)}")
    if not 0 < lifetime <= MAX_LIFETIME:
        raise Refused(f"a join token lives up to {MAX_LIFETIME / 86400:.0f} days, not {lifetime:.0f} seconds")
    spec = TokenSpec(
        mesh=mesh, secret_hash=hash_secret(secret), role=role, expires=wall + lifetime, single_use=single_use
    )
    return JoinToken(Meta(token_id), spec)


def hash_secret(secret: Secret) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.raw).digest()


def machine_of(keys: PeerKeys) -> str:
    """The name of a machine in `used_by`: the hash of its three keys, in hexadecimal."""
    return hashlib.sha256(keys.wireguard.raw + keys.probe.raw + keys.signing.raw).hexdigest()


def authenticate(token: JoinToken | None, *, secret: Secret, mesh: str) -> JoinToken:
    """The token, when `secret` is its own and it is for `mesh`. Raises Refused. Expiry is for `admit`."""
    kept = token.spec.secret_hash if token is not None else bytes(32)
    matches = hmac.compare_digest(kept, hash_secret(secret))
    if token is None or not matches:
        raise Refused(f"no join token has this id and secret: {_new(mesh)}")
    if token.spec.mesh != mesh:
        raise Refused(f"the join token is for mesh {token.spec.mesh!r}, not {mesh!r}: {_new(mesh)}")
    return token


def admit(token: JoinToken, *, machine: str, wall: float) -> None:
    """Raises Refused when an authenticated token does not let `machine` join now."""
    spec = token.spec
    if wall >= spec.expires:
        raise Refused(
            f"join token {token.meta.name} expired {wall - spec.expires:.0f} s ago: {_new(spec.mesh)}"
        )
    if spec.single_use and spec.used_by and machine not in spec.used_by:
        raise Refused(f"join token {token.meta.name} was used by another machine: {_new(spec.mesh)}")


def _new(mesh: str) -> str:
    return f"`scopectl token create --mesh {mesh}` makes a new one"
