"""A gateway over a memory registry on an ephemeral loopback port, as the gateway's tests use it.

The wall clock is real, since JWTs carry it; what a test decides about time it sets by `Clock.ahead`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scope_operator.gateway.app import Gateway
from scope_operator.gateway.authorisation import Authority
from scope_operator.gateway.feed import Feed
from scope_operator.gateway.joining import Joining
from scope_operator.gateway.limits import Limits

from scope.credentials import AdminCredential, PeerCredential
from scope.model import Kind, Meta, Peer, PeerKeys, PeerReport, PeerSpec, PublicKey, Secret
from scope.registry.http import HttpRegistry
from scope.registry.memory import MemoryRegistry
from scope.serving import Server, listening_socket
from tests.unit.registry_conformance import MESH

ADMIN = AdminCredential(Secret(b"administrator-of-the-test"))
REGISTRY = "memory"
REGISTRY_KEY = Secret(bytes([9]) * 32)


@dataclass
class Clock:
    """The wall clock, and how far the gateway's is ahead of it."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass(frozen=True)
class Running:
    """A gateway that serves."""

    registry: MemoryRegistry
    feed: Feed
    url: str
    clock: Clock

    @property
    def admin(self) -> HttpRegistry:
        """A client with the administrator's token; the caller closes it."""
        return HttpRegistry(self.url, pin=None, credential=ADMIN)

    def as_peer(self, peer: Peer) -> HttpRegistry:
        """A client that signs as a peer made by `enrolled`."""
        return HttpRegistry(self.url, pin=None, credential=credential_of(peer))


def memory_registry(clock: Clock, *, backlog: int = 64) -> MemoryRegistry:
    numbers = itertools.count(1)
    return MemoryRegistry(
        REGISTRY,
        wall=clock,
        now=time.monotonic,
        new_uid=lambda: f"uid-{next(numbers)}",
        new_signal=asyncio.Event,
        backlog=backlog,
    )


@asynccontextmanager
async def gateway(
    *, limits: Limits | None = None, backlog: int = 64, administrator: AdminCredential = ADMIN
) -> AsyncIterator[Running]:
    """A gateway over a fresh registry, plain HTTP on loopback."""
    limits = replace(limits or Limits(), backlog=backlog)
    clock = Clock()
    registry = memory_registry(clock, backlog=backlog)
    feed = Feed(registry, backlog=backlog, wall=clock)
    authority = Authority(
        registry,
        registry_id=REGISTRY,
        administrator=hashlib.sha256(administrator.token.raw).digest(),
        wall=clock,
        replays_per_peer=limits.replays_per_peer,
        replays_per_cluster=limits.replays_per_cluster,
    )
    joining = Joining(
        registry,
        signing=REGISTRY_KEY,
        url="https://registry.example:7443",
        pin=bytes(32),
        wall=clock,
        entropy=random.Random(7).randbytes,
    )
    app = Gateway(
        registry,
        registry_id=REGISTRY,
        feed=feed,
        authority=authority,
        joining=joining,
        limits=limits,
        now=time.monotonic,
    ).application()
    server = Server(app, limits=limits, context=None)
    following = asyncio.create_task(feed.run())
    listener = listening_socket("127.0.0.1", 0)
    await server.start([listener])
    try:
        async with asyncio.timeout(60):
            await feed.ready.wait()
        yield Running(registry, feed, "http://{}:{}".format(*listener.getsockname()), clock)
    finally:
        feed.end_all()
        await server.stop()
        following.cancel()
        await asyncio.wait([following])


def signing_seed(seed: int) -> Secret:
    """The private half of what `keys_of(seed)` signs with."""
    return Secret(seed.to_bytes(32, "big"))


def keys_of(seed: int) -> PeerKeys:
    """Distinct public keys for each seed; the signing key's private half is `signing_seed(seed)`."""
    private = Ed25519PrivateKey.from_private_bytes(signing_seed(seed).raw)
    wireguard, probe = (PublicKey(bytes([part]) + seed.to_bytes(31, "big")) for part in (1, 2))
    return PeerKeys(wireguard, probe, PublicKey(private.public_key().public_bytes_raw()))


async def enrolled(registry: MemoryRegistry, seed: int, *, mesh: str = "home") -> Peer:
    """A peer as a join leaves it, and its mesh where there is none yet."""
    if all(known.meta.name != mesh for known in (await registry.list(Kind.MESH)).resources):
        await registry.create(replace(MESH, meta=Meta(mesh)))
    peer = await registry.create(
        Peer(Meta(f"{mesh}.external.p{seed}"), PeerSpec(mesh), PeerReport(keys_of(seed)))
    )
    assert isinstance(peer, Peer)
    return peer


def credential_of(peer: Peer) -> PeerCredential:
    """What a peer made by `enrolled` signs with."""
    seed = int(peer.meta.name.rpartition(".p")[2])
    return PeerCredential(peer.meta.name, peer.meta.uid, REGISTRY, signing_seed(seed))
