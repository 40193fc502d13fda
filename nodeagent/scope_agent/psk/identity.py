"""Who a peer is in the exchange: two signing keys of different kinds, of which both must hold.

A fingerprint stands for both public keys: it is all that a ScopePeer carries of them. The keys themselves
travel between the two agents, and are believed when they have the fingerprint that is expected.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from scope.model import Fingerprint, IdentityTrust, Secret
from scope_agent.psk.provider import (
    ED448_BYTES,
    MLDSA_PUBLIC_BYTES,
    MLDSA_SEED_BYTES,
    SUITES,
    Provider,
    RandomBytes,
    Suite,
)

_LABEL = b"scope identity 1"


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """Both public keys: ED448_BYTES and MLDSA_PUBLIC_BYTES."""

    ed448: bytes
    mldsa: bytes

    def __post_init__(self) -> None:
        if len(self.ed448) != ED448_BYTES or len(self.mldsa) != MLDSA_PUBLIC_BYTES:
            raise ValueError(f"an identity is {ED448_BYTES} and {MLDSA_PUBLIC_BYTES} bytes")

    def fingerprint(self) -> Fingerprint:
        """SHA3-256 over a label and both keys."""
        return Fingerprint(hashlib.sha3_256(_LABEL + self.ed448 + self.mldsa).digest())


@dataclass(frozen=True, slots=True)
class Succession:
    """What the holder of `old` signed with it: from now on I am `new`. `trust` makes and checks it."""

    old: PublicIdentity
    new: Fingerprint
    signatures: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class HybridIdentity:
    """Both signing keys, as seeds of ED448_BYTES and MLDSA_SEED_BYTES, with their public halves.

    Beside them what others may ask for: the signatures of a CA, none: empty, and how this identity followed
    from earlier ones, the oldest first.
    """

    ed448: Secret
    mldsa: Secret
    public: PublicIdentity
    certificate: bytes = field(default=b"", repr=False)
    successions: tuple[Succession, ...] = ()


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """By what this agent believes an identity. Raises ValueError for a CA that is missing, or of no use."""

    mode: IdentityTrust = IdentityTrust.REGISTRY
    ca: PublicIdentity | None = None

    def __post_init__(self) -> None:
        if (self.mode is IdentityTrust.CA) != (self.ca is not None):
            raise ValueError("trust in a CA needs the CA, and no other trust has a use for one")


FIRST_CONTACT = TrustPolicy()


@dataclass(frozen=True, slots=True)
class KeyMaker:
    """What an agent makes keys with, and the one suite that it makes and takes keys of."""

    identity: HybridIdentity
    provider: Provider
    random_bytes: RandomBytes
    suite: Suite = SUITES[1]
    trust: TrustPolicy = FIRST_CONTACT


def hybrid_identity(ed448: Secret, mldsa: Secret, provider: Provider) -> HybridIdentity:
    """The identity of two seeds. Raises ValueError for seeds of other lengths."""
    if len(ed448.raw) != ED448_BYTES or len(mldsa.raw) != MLDSA_SEED_BYTES:
        raise ValueError(f"an identity has seeds of {ED448_BYTES} and {MLDSA_SEED_BYTES} bytes")
    return HybridIdentity(ed448, mldsa, PublicIdentity(*provider.sign_public(ed448, mldsa)))


def make_hybrid_identity(random_bytes: RandomBytes, provider: Provider) -> HybridIdentity:
    """A fresh identity."""
    return hybrid_identity(
        Secret(random_bytes(ED448_BYTES)), Secret(random_bytes(MLDSA_SEED_BYTES)), provider
    )
