"""The gateway and the reflector over any Registry, opened and closed as one.

Sockets are bound and keys are read before anything is served, so that what is wrong is said at once and
nothing half works; what was opened closes in the opposite order, streams first, so that nothing that was
answered is lost.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from scope.channel import BOOT_ID_BYTES, Channel
from scope.credentials import base64url
from scope.model import ConfigError, Endpoint, GatewayOrigin, Reflector, Secret, endpoint_at
from scope.registry.port import Registry
from scope.serving import Server, listening_socket
from scope_operator.gateway import tls
from scope_operator.gateway.advertised import Advertised, own_addresses, reflector_at, resolve
from scope_operator.gateway.app import Gateway
from scope_operator.gateway.authorisation import Authority
from scope_operator.gateway.feed import Feed
from scope_operator.gateway.joining import Joining, public_half
from scope_operator.gateway.limits import Limits
from scope_operator.gateway.reflector import Reflector as Reflecting
from scope_operator.gateway.reflector import ReflectorSockets
from scope_operator.reconcile import Reconciler

log = logging.getLogger(__name__)

RESOLVE_SECONDS = 600.0  # a dynamic name moves within minutes
RENEW_SECONDS = 3600.0  # a certificate that the user's own tool renewed is served within the hour
PEERS_SECONDS = 0.05  # changes that come together reach the reflector together


@dataclass(frozen=True, slots=True)
class UsersCertificate:
    """A certificate of the user's own; join strings carry its pin only where no public CA vouches for it."""

    certificate: Path
    key: Path
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class FaceConfig:
    """Without `certificate` one is made in `data`, around the key there; `advertise` is guessed as well."""

    data: Path
    listen: tuple[tuple[str, int], ...]
    reflector_ports: tuple[int, ...]
    advertise: tuple[Advertised, ...] = ()
    certificate: UsersCertificate | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a registry is."""

    registry_id: str
    signing: Secret  # 32-byte seed of the Ed25519 key that signs tombstones
    probe: Secret  # 32-byte X25519 private key of its reflector
    administrator: bytes  # SHA-256 of the administrator's token
    replaced: tuple[bytes, ...] = ()  # pins of TLS keys of its gateway before the present one


@dataclass(frozen=True, slots=True)
class Face:
    """Where a gateway serves."""

    url: str
    pin: bytes | None
    listening: tuple[Endpoint, ...]
    reflecting: tuple[Endpoint, ...]
    feed: Feed
    _hosts: tuple[Advertised, ...]
    _reflector: Reflecting

    @property
    def origin(self) -> GatewayOrigin:
        """What a mesh says of it."""
        return GatewayOrigin(self.url, self.pin)

    async def reflectors(self) -> tuple[Reflector, ...]:
        """Where the reflector is found, as its advertised names resolve now."""
        reflector = reflector_at(self._reflector.probe_key, await resolve(self._hosts), self.reflecting)
        return (reflector,) if reflector.endpoints else ()


class Works:
    """Tasks that run as long as a registry serves. `failed` is done when one of them ended, which none
    should.
    """

    def __init__(self) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.watched: Callable[[], str] | None = None  # says what keeps the registry from its work
        self._tasks: list[asyncio.Task[None]] = []

    def trouble(self) -> str:
        """What keeps the registry from its work; "" where nothing is known to."""
        return self.watched() if self.watched is not None else ""

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Let it run beside the others."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    async def close(self) -> None:
        """Cancel all."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self.failed.done():
            return
        error = task.exception()
        log.critical("registry.failed part=%s reason=%r", task.get_name(), error, exc_info=error)
        self.failed.set_result(None)


@asynccontextmanager
async def opened(
    registry: Registry, identity: Identity, config: FaceConfig, works: Works
) -> AsyncIterator[Face]:
    """Serve until the block ends. Raises ConfigError, whose sentence says what to do."""
    async with AsyncExitStack() as stack:
        listeners = [_listener(address, port) for address, port in config.listen]
        for listener in listeners:
            stack.callback(listener.close)
        listening = tuple(endpoint_at(*listener.getsockname()[:2]) for listener in listeners)
        hosts = config.advertise or own_addresses()
        url = hosts[0].url(listening[0].port)
        certificate = _certificate(config, hosts, identity)
        context = tls.server_context(certificate)
        pinned = config.certificate is None or config.certificate.pinned
        pin = certificate.pin if pinned else None

        reflecting = Reflecting(Channel(secret=identity.probe, boot_id=secrets.token_bytes(BOOT_ID_BYTES)))
        sockets = ReflectorSockets(reflecting, now=time.monotonic)
        stack.callback(sockets.close)
        udp = sockets.open(
            (ip_address(address), port) for address, _ in config.listen for port in config.reflector_ports
        )

        stack.push_async_callback(works.close)
        feed = Feed(registry, backlog=config.limits.backlog, wall=time.time)
        gateway = Gateway(
            registry,
            registry_id=identity.registry_id,
            feed=feed,
            authority=Authority(
                registry,
                registry_id=identity.registry_id,
                administrator=identity.administrator,
                wall=time.time,
                replays_per_peer=config.limits.replays_per_peer,
                replays_per_cluster=config.limits.replays_per_cluster,
            ),
            joining=Joining(
                registry,
                signing=identity.signing,
                url=url,
                pin=pin,
                wall=time.time,
                entropy=secrets.token_bytes,
            ),
            limits=config.limits,
            now=time.monotonic,
            trouble=works.trouble,
        )
        server = Server(gateway.application(), limits=config.limits, context=context)
        works.start("feed", feed.run())
        works.start("reflector.peers", _tell_peers(feed, reflecting))
        works.start("certificate", _renew(config, hosts, identity, context))
        await _ready(feed, works.failed)
        await server.start(listeners)
        stack.push_async_callback(server.stop)
        stack.callback(feed.end_all)
        yield Face(url, pin, listening, udp, feed, hosts, reflecting)


def _listener(address: str, port: int) -> socket.socket:
    """Where connections arrive. Raises ConfigError."""
    try:
        return listening_socket(address, port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        move = "stop what uses it, or name another with --listen" if taken else "name another with --listen"
        raise ConfigError(f"cannot listen on {address} port {port}: {error.strerror}; {move}") from None


def administrator_document(served: Face, identity: Identity, *, token: str) -> dict[str, object]:
    """What `scopectl` needs to speak to this gateway as its administrator: the content of admin.json."""
    return {
        "url": served.url,
        "pin": None if served.pin is None else base64url(served.pin),
        "registryKey": str(public_half(identity.signing)),
        "token": token,
    }


async def announce(served: Face, reconciler: Reconciler, reflectors: tuple[Reflector, ...]) -> None:
    """Say where the reflector is found whenever its names resolve otherwise than `reflectors`, as said
    before.
    """
    while True:
        await asyncio.sleep(RESOLVE_SECONDS)
        found = await served.reflectors() or reflectors  # a resolver that is away for a while moves nothing
        if found != reflectors:
            log.info("reflector.moved reflectors=%s", found)
            reflectors = found
            reconciler.announce(reflectors=reflectors)


def _certificate(config: FaceConfig, hosts: tuple[Advertised, ...], identity: Identity) -> tls.Certificate:
    own = config.certificate
    if own is not None:
        return tls.users_certificate(own.certificate, own.key)
    try:
        names = tuple(host.host for host in hosts)
        vouching = tls.Vouching(identity.signing, identity.replaced)
        return tls.self_made(config.data, names, datetime.now(UTC), vouching=vouching)
    except OSError as error:
        raise ConfigError(
            f"cannot write the certificate in {config.data}: {error.strerror}; free space, make the "
            "directory writable, or name another with --data"
        ) from None


async def _tell_peers(feed: Feed, reflecting: Reflecting) -> None:
    """Keep the reflector's members those of the registry."""
    while True:
        changed = feed.changed
        reflecting.set_peers(feed.peers.values())
        await changed.wait()
        await asyncio.sleep(PEERS_SECONDS)


async def _renew(
    config: FaceConfig, hosts: tuple[Advertised, ...], identity: Identity, context: ssl.SSLContext
) -> None:
    """Serve a renewed certificate from the next connection on."""
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        try:
            tls.load_into(context, _certificate(config, hosts, identity))
        except ConfigError as error:
            log.warning("certificate.unusable reason=%s", error)


async def _ready(feed: Feed, failed: asyncio.Future[None]) -> None:
    """Wait for the feed to have read the registry. Raises ConfigError when a part failed at its start."""
    reading = asyncio.create_task(feed.ready.wait())
    await asyncio.wait((reading, failed), return_when=asyncio.FIRST_COMPLETED)
    reading.cancel()
    if failed.done():
        raise ConfigError("the registry cannot start: its log says which part failed; please report it")
