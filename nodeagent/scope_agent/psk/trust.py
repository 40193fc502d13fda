"""By what a peer's identity is believed: the registry's word, the operator's, or a CA's. Pure functions.

The agent's own configuration says which of these it asks for, never the registry: how far that is trusted is
not its to say.

- Registry: the first fingerprint that the registry names is believed, and kept once a key was agreed on.
- Pinned: only a fingerprint that the operator told this agent.
- CA: only an identity that an offline hybrid key, of which the agent has the public half, certified for the
  peer of that name.

A kept or told fingerprint gives way to another one by what its holder signed with the old identity (a
Succession), or by the operator's word. Under a CA its certificate alone counts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from scope.model import Fingerprint, IdentityTrust
from scope_agent.psk.identity import (
    HybridIdentity,
    PublicIdentity,
    Succession,
    TrustPolicy,
    make_hybrid_identity,
)
from scope_agent.psk.provider import Provider, RandomBytes

MAX_SUCCESSIONS = 8  # a peer that missed more rotations of an identity is to be told; 5.5 KB each on disk

_PREFIX = b"scope identity statement 1"
_CERTIFICATE, _SUCCESSION = b"certificate", b"succession"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whose signatures are believed: the holder's of `expected`. None: nobody's, for the reason `why`."""

    expected: Fingerprint | None = None
    by: IdentityTrust | None = None
    why: str = ""
    is_changed: bool = False  # a Succession from the one before would do


def judge(
    policy: TrustPolicy,
    *,
    name: str,
    named: Fingerprint | None,
    pinned: Fingerprint | None,
    former: Fingerprint | None,
    is_told: bool,
) -> Judgement:
    """Judge what the registry names as the identity of the peer `name`.

    `pinned` is the one kept for it, by the operator's word if `is_told`; `former` the one that it followed:
    a registry that still names that is late, no more.
    """
    if named is None:
        return Judgement(why="its agent publishes no identity for post-quantum keys")
    if policy.mode is IdentityTrust.CA:
        return Judgement(named, IdentityTrust.CA)
    way_out = f"`scopectl identity trust {name} FINGERPRINT`, with what `scopectl identity show` prints there"
    if policy.mode is IdentityTrust.PINNED and not is_told:
        return Judgement(why=f"its identity is not trusted yet: {way_out}")
    if pinned is None:
        return Judgement(named, IdentityTrust.REGISTRY)
    if named in (pinned, former):
        return Judgement(pinned, IdentityTrust.PINNED if is_told else IdentityTrust.REGISTRY)
    why = f"its identity is another one than before: the key in use stays; if that is meant, {way_out}"
    return Judgement(why=why, is_changed=True)


# --- statements ---------------------------------------------------------------------------------------------


def certify(ca: HybridIdentity, name: str, fingerprint: Fingerprint, provider: Provider) -> bytes:
    """The CA's signatures on it that the peer `name` has the identity with this fingerprint."""
    message = _message(_CERTIFICATE, _certified(name, fingerprint))
    return provider.sign(ca.ed448, ca.mldsa, message, _CERTIFICATE)


def is_certified(
    certificate: bytes, *, by: PublicIdentity, name: str, fingerprint: Fingerprint, provider: Provider
) -> bool:
    """Whether this CA says so."""
    message = _message(_CERTIFICATE, _certified(name, fingerprint))
    return provider.verify(by.ed448, by.mldsa, signatures=certificate, message=message, context=_CERTIFICATE)


def succeed(old: HybridIdentity, random_bytes: RandomBytes, provider: Provider) -> HybridIdentity:
    """A fresh identity that the old one says it will be."""
    new = make_hybrid_identity(random_bytes, provider)
    fingerprint = new.public.fingerprint()
    message = _message(_SUCCESSION, _succeeding(old.public, fingerprint))
    signatures = provider.sign(old.ed448, old.mldsa, message, _SUCCESSION)
    successions = (*old.successions, Succession(old.public, fingerprint, signatures))
    return replace(new, successions=successions[-MAX_SUCCESSIONS:])


def is_signed_by_old(succession: Succession, provider: Provider) -> bool:
    """Whether the old identity says so."""
    old = succession.old
    message = _message(_SUCCESSION, _succeeding(old, succession.new))
    return provider.verify(
        old.ed448, old.mldsa, signatures=succession.signatures, message=message, context=_SUCCESSION
    )


def _certified(name: str, fingerprint: Fingerprint) -> bytes:
    return fingerprint.raw + name.encode()


def _succeeding(old: PublicIdentity, new: Fingerprint) -> bytes:
    return old.fingerprint().raw + new.raw


def _message(context: bytes, body: bytes) -> bytes:
    """All that is signed is of a length of its own, and never what an exchange signs."""
    return _PREFIX + len(context).to_bytes(1, "big") + context + hashlib.sha3_512(body).digest()
