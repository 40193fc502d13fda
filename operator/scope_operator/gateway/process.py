"""The whole embedded registry in one process: the database, the reconciler, the gateway and the reflector.

Everything is opened before anything is served, so that what is wrong is said at once and nothing half
works; and closed in the opposite order, streams first, so that nothing that was answered is lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import secrets
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from scope.channel import BOOT_ID_BYTES, Channel
from scope.credentials import base64url
from scope.model import ConfigError, Endpoint, Reflector, Secret, endpoint_at
from scope_operator.gateway import tls
from scope_operator.gateway.advertised import Advertised, own_addresses, reflector_at, resolve
from scope_operator.gateway.app import Gateway
from scope_operator.gateway.authorisation import Authority
from scope_operator.gateway.feed import Feed
from scope_operator.gateway.joining import Joining, public_half
from scope_operator.gateway.limits import Limits
from scope_operator.gateway.reflector import Reflector as Reflecting
from scope_operator.gateway.reflector import ReflectorSockets
from scope_operator.gateway.server import Server, bound_socket
from scope_operator.reconcile import Reconciler
from scope_operator.sqlite import Identity, SqliteRegistry, open_registry

log = logging.getLogger(__name__)

DATABASE_FILE = "registry.db"
ADMIN_FILE = "admin.json"
ADMIN_HASH_FILE = "admin-token.sha256"
ADMIN_SECRET_BYTES = 32

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
class ServeConfig:
    """What the command line said. Without `certificate` one is made, without `advertise` it is guessed."""

    data: Path
    listen: tuple[tuple[str, int], ...]
    reflector_ports: tuple[int, ...]
    advertise: tuple[Advertised, ...] = ()
    certificate: UsersCertificate | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Serving:
    """Where a registry serves. `failed` is done when a part of it ended, which none should."""

    url: str
    pin: bytes | None
    listening: tuple[Endpoint, ...]
    reflecting: tuple[Endpoint, ...]
    admin_file: Path | None  # None: written by an earlier start
    failed: asyncio.Future[None]


@asynccontextmanager
async def serving(config: ServeConfig) -> AsyncIterator[Serving]:
    """Serve until the block ends. Raises ConfigError, whose sentence says what to do."""
    async with AsyncExitStack() as stack:
        registry = _opened_registry(config.data)
        stack.push_async_callback(registry.close)
        identity = registry.identity
        listeners = [bound_socket(address, port) for address, port in config.listen]
        for listener in listeners:
            stack.callback(listener.close)
        listening = tuple(endpoint_at(*listener.getsockname()[:2]) for listener in listeners)
        hosts = config.advertise or own_addresses()
        url = hosts[0].url(listening[0].port)
        certificate = _certificate(config, hosts)
        context = tls.server_context(certificate)
        pinned = config.certificate is None or config.certificate.pinned
        pin = certificate.pin if pinned else None

        reflecting = Reflecting(Channel(secret=identity.probe, boot_id=secrets.token_bytes(BOOT_ID_BYTES)))
        sockets = ReflectorSockets(reflecting, now=time.monotonic)
        stack.callback(sockets.close)
        udp = sockets.open(
            (ip_address(address), port) for address, _ in config.listen for port in config.reflector_ports
        )

        administrator, token = _administrator(config.data)
        feed = Feed(registry, backlog=config.limits.backlog, wall=time.time)
        gateway = Gateway(
            registry,
            registry_id=identity.registry_id,
            feed=feed,
            authority=Authority(
                registry,
                registry_id=identity.registry_id,
                administrator=administrator,
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
        )

        def reconciler(reflectors: tuple[Reflector, ...]) -> Reconciler:
            return Reconciler(
                registry,
                liveness=registry,
                now=time.monotonic,
                wall=time.time,
                uniform=random.uniform,
                signing_key=public_half(identity.signing),
                reflectors=reflectors,
            )

        async def reflectors() -> tuple[Reflector, ...]:
            reflector = reflector_at(reflecting.probe_key, await resolve(hosts), udp)
            return (reflector,) if reflector.endpoints else ()

        server = Server(gateway.application(), limits=config.limits, context=context)

        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        works = [
            asyncio.create_task(work, name=name)
            for name, work in (
                ("feed", feed.run()),
                ("reconciler", _reconcile(reconciler, reflectors)),
                ("reflector.peers", _tell_peers(feed, reflecting)),
                ("certificate", _renew(config, hosts, context)),
            )
        ]
        stack.push_async_callback(_cancel, works)
        for work in works:
            work.add_done_callback(lambda work: _fail(failed, work))
        await _ready(feed, failed)
        await server.start(listeners)
        stack.push_async_callback(server.stop)
        stack.callback(feed.end_all)
        admin_file = None
        if token is not None:
            admin_file = config.data / ADMIN_FILE
            _write_admin(admin_file, url=url, pin=pin, identity=identity, token=token)
            tls.write_private(config.data / ADMIN_HASH_FILE, administrator.hex().encode() + b"\n")
        log.info("registry.serving url=%s registry=%s", url, identity.registry_id)
        yield Serving(url, pin, listening, udp, admin_file, failed)
        log.info("registry.stopping")


# --- opening ------------------------------------------------------------------------------------------------


def _opened_registry(data: Path) -> SqliteRegistry:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the data directory {data}: {error.strerror}; run as root, or name another with "
            "--data"
        ) from None
    database, trace = data / DATABASE_FILE, data / ADMIN_HASH_FILE
    if not _is_there(database) and _is_there(trace):
        raise ConfigError(
            f"{database} is missing or empty, but {trace.name} beside it says that a registry was "
            "here: restore it from a backup; or remove the directory, to begin a registry that no peer knows"
        )
    return open_registry(
        database,
        wall=time.time,
        now=time.monotonic,
        new_uid=lambda: str(uuid.uuid4()),
        new_identity=lambda: Identity(
            registry_id=str(uuid.uuid4()),
            signing=Secret(secrets.token_bytes(32)),
            probe=Secret(secrets.token_bytes(32)),
        ),
    )


def _is_there(file: Path) -> bool:
    """Whether it has any content. Raises ConfigError when that may not be known."""
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot look at {file}: {error.strerror}; run as whoever owns it") from None


def _certificate(config: ServeConfig, hosts: tuple[Advertised, ...]) -> tls.Certificate:
    own = config.certificate
    if own is not None:
        return tls.users_certificate(own.certificate, own.key)
    try:
        return tls.self_made(config.data, tuple(host.host for host in hosts), datetime.now(UTC))
    except OSError as error:
        raise ConfigError(
            f"cannot write the certificate in {config.data}: {error.strerror}; free space, make the "
            "directory writable, or name another with --data"
        ) from None


def _administrator(data: Path) -> tuple[bytes, str | None]:
    """The hash of the administrator's token, and the token where it is made now. Raises ConfigError."""
    path = data / ADMIN_HASH_FILE
    try:
        kept = bytes.fromhex(path.read_text().strip())
    except FileNotFoundError:
        token = base64url(secrets.token_bytes(ADMIN_SECRET_BYTES))
        return hashlib.sha256(token.encode()).digest(), token
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; delete it to have a new admin.json made") from None
    if len(kept) != hashlib.sha256().digest_size:
        raise ConfigError(f"{path} is damaged: delete it to have a new admin.json made")
    return kept, None


def _write_admin(path: Path, *, url: str, pin: bytes | None, identity: Identity, token: str) -> None:
    document = {
        "url": url,
        "pin": None if pin is None else base64url(pin),
        "registryKey": str(public_half(identity.signing)),
        "token": token,
    }
    try:
        tls.write_private(path, json.dumps(document, indent=2).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; free space, or make it writable") from None


# --- what goes on beside the gateway ------------------------------------------------------------------------


async def _reconcile(
    make: Callable[[tuple[Reflector, ...]], Reconciler], where: Callable[[], Awaitable[tuple[Reflector, ...]]]
) -> None:
    """Reconcile; where the reflectors are found elsewhere than before, by a new reconciler that says so."""
    reflectors = await where()
    while True:
        running = asyncio.create_task(make(reflectors).follow())
        try:
            before = reflectors
            while reflectors == before:
                await asyncio.wait([running], timeout=RESOLVE_SECONDS)
                if running.done():
                    running.result()
                    return
                # A resolver that is away for a while moves nothing.
                reflectors = await where() or before
        finally:
            running.cancel()
            await asyncio.wait([running])
        log.info("reflector.moved reflectors=%s", reflectors)


async def _tell_peers(feed: Feed, reflecting: Reflecting) -> None:
    """Keep the reflector's members those of the registry."""
    while True:
        changed = feed.changed
        reflecting.set_peers(feed.peers.values())
        await changed.wait()
        await asyncio.sleep(PEERS_SECONDS)


async def _renew(config: ServeConfig, hosts: tuple[Advertised, ...], context: ssl.SSLContext) -> None:
    """Serve a renewed certificate from the next connection on."""
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        try:
            tls.load_into(context, _certificate(config, hosts))
        except ConfigError as error:
            log.warning("certificate.unusable reason=%s", error)


async def _ready(feed: Feed, failed: asyncio.Future[None]) -> None:
    """Wait for the feed to have read the registry. Raises ConfigError when a part failed at its start."""
    reading = asyncio.create_task(feed.ready.wait())
    await asyncio.wait((reading, failed), return_when=asyncio.FIRST_COMPLETED)
    reading.cancel()
    if failed.done():
        raise ConfigError("the registry cannot start: its log says which part failed; please report it")


def _fail(failed: asyncio.Future[None], work: asyncio.Task[None]) -> None:
    if work.cancelled() or failed.done():
        return
    error = work.exception()
    log.critical("registry.failed part=%s reason=%r", work.get_name(), error, exc_info=error)
    failed.set_result(None)


async def _cancel(works: list[asyncio.Task[None]]) -> None:
    for work in works:
        work.cancel()
    await asyncio.wait(works)
