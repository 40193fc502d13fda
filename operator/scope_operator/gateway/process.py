"""The whole embedded registry in one process: the database, the reconciler, the gateway and the reflector.

Everything is opened before anything is served, and closed in the opposite order (see `face`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from scope.credentials import base64url
from scope.model import ConfigError, Endpoint, Secret
from scope_operator.gateway import face, tls
from scope_operator.gateway.face import (
    Face,
    FaceConfig,
    UsersCertificate,
    Works,
    administrator_document,
    announce,
)
from scope_operator.gateway.joining import public_half
from scope_operator.reconcile import Reconciler
from scope_operator.sqlite import Identity, SqliteRegistry, open_registry

log = logging.getLogger(__name__)

DATABASE_FILE = "registry.db"
ADMIN_FILE = "admin.json"
ADMIN_HASH_FILE = "admin-token.sha256"
ADMIN_SECRET_BYTES = 32

ServeConfig = FaceConfig

__all__ = ["ServeConfig", "Serving", "UsersCertificate", "serving"]


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
async def serving(config: FaceConfig) -> AsyncIterator[Serving]:
    """Serve until the block ends. Raises ConfigError, whose sentence says what to do."""
    async with AsyncExitStack() as stack:
        registry = _opened_registry(config.data)
        stack.push_async_callback(registry.close)
        kept = registry.identity
        administrator, token = _administrator(config.data)
        identity = face.Identity(kept.registry_id, kept.signing, kept.probe, administrator)
        works = Works()
        served = await stack.enter_async_context(face.opened(registry, identity, config, works))
        reflectors = await served.reflectors()
        reconciler = Reconciler(
            registry,
            liveness=registry,
            now=time.monotonic,
            wall=time.time,
            uniform=random.uniform,
            signing_key=public_half(identity.signing),
            reflectors=reflectors,
            gateway=served.origin,
        )
        works.watched = lambda: reconciler.health.trouble
        works.start("reconciler", reconciler.follow())
        works.start("reflectors", announce(served, reconciler, reflectors))
        admin_file = None
        if token is not None:
            admin_file = config.data / ADMIN_FILE
            _write_admin(admin_file, served, identity=identity, token=token)
            tls.write_private(config.data / ADMIN_HASH_FILE, administrator.hex().encode() + b"\n")
        else:
            _update_admin(config.data / ADMIN_FILE, served, identity=identity)
        log.info("registry.serving url=%s registry=%s", served.url, identity.registry_id)
        yield Serving(served.url, served.pin, served.listening, served.reflecting, admin_file, works.failed)
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


def _update_admin(path: Path, served: Face, *, identity: face.Identity) -> None:
    """Let admin.json, where it is still kept here, name what is advertised now; its token stays."""
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        log.warning("admin.unreadable file=%s reason=%s", path, error)
        return
    token = kept.get("token") if isinstance(kept, dict) else None
    if not isinstance(token, str) or kept == administrator_document(served, identity, token=token):
        return
    try:
        _write_admin(path, served, identity=identity, token=token)
    except ConfigError as error:  # peers can be served all the same
        log.warning("admin.outdated file=%s reason=%s", path, error)
        return
    log.info("admin.updated file=%s url=%s", path, served.url)


def _write_admin(path: Path, served: Face, *, identity: face.Identity, token: str) -> None:
    document = administrator_document(served, identity, token=token)
    try:
        tls.write_private(path, json.dumps(document, indent=2).encode() + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; free space, or make it writable") from None
