"""kopf watches meshes, peers, Nodes and, where asked to, Services, and hands every change on; nothing else is
asked of it.

kopf signs in, opens the watches, and opens them again when they end, fall silent or are too old. It keeps no
state in the cluster: no finalizers, annotations or Events. What it may lose (a deletion while a watch was too
old) the reconciler's own lists find.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import kopf

from scope import resources
from scope.model import Kind, Peer, Revision
from scope.registry.kube.access import Access, Kubeconfig, ServiceAccount
from scope.registry.kube.objects import is_at, read
from scope.registry.port import Deleted, Put, Unavailable
from scope.resources import InvalidResource
from scope_operator.kube.cluster import read_node
from scope_operator.kube.service_objects import ServiceNews, service_news
from scope_operator.plan.nodes import NodeDeleted, NodePut

log = logging.getLogger(__name__)

SERVER_SECONDS = 300  # a watch is ended by the server after so long, and resumed
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 90.0  # bookmarks come every minute: a watch without one for longer is frozen
SIGN_IN_SECONDS = 600.0  # a ServiceAccount's token is replaced by the kubelet well before it expires
MAX_RETRY = 4.0  # seconds between requests to an API server that fails: its return is noticed soon

Fact: TypeAlias = Put | Deleted | NodePut | NodeDeleted
Take: TypeAlias = Callable[[Fact], None]
Known: TypeAlias = Callable[[str], Peer | None]


@dataclass(frozen=True, slots=True)
class ServicesHeard:
    """Who is told of Services and what belongs to them: `take` of each change, `relist` after kopf listed."""

    take: Callable[[ServiceNews], None]
    relist: Callable[[], None]


def fact_of(
    kind: Kind, event: Mapping[str, Any], *, registry_id: str, known: Known = lambda _: None
) -> Put | Deleted | None:
    """What a watch event of a mesh or peer says; None where this version cannot read the object.

    A ScopePeer that is `known` as it stands there is not read anew.
    """
    document = event["object"]
    peer = known(str(_name(document))) if kind is Kind.PEER else None
    try:
        resource = peer if peer is not None and is_at(document, peer.meta) else read(kind, document)
    except InvalidResource as error:
        log.warning("resource.unreadable kind=%s name=%s error=%s", kind, _name(document), error)
        return None
    revision = Revision(registry_id, resource.meta.revision)
    return Deleted(resource, revision) if event.get("type") == "DELETED" else Put(resource, revision)


def node_fact(event: Mapping[str, Any]) -> NodePut | NodeDeleted | None:
    """What a watch event of a Node says."""
    try:
        node = read_node(event["object"])
    except Unavailable as error:
        log.warning("node.unreadable name=%s error=%s", _name(event["object"]), error)
        return None
    return NodeDeleted(node) if event.get("type") == "DELETED" else NodePut(node)


async def watch(
    access: Access,
    *,
    registry_id: str,
    take: Take,
    relisted: Callable[[], None],
    kinds: tuple[Kind, ...] = (Kind.MESH, Kind.PEER),
    known: Known = lambda _: None,
    services: ServicesHeard | None = None,
) -> None:
    """Watch Nodes, and `kinds`, until cancelled. Raises what kopf gives up on.

    `known` gives the ScopePeer of a name as it was last heard of; it is called in another thread.

    `relisted` is called for each resource that kopf lists: what was deleted before that list, and after ours,
    it does not tell.

    kopf runs in a thread and a loop of its own: it ends every task of its loop that is younger than itself,
    and takes over the signals of the main thread.
    """
    loop = asyncio.get_running_loop()
    stop = threading.Event()
    ended: asyncio.Future[None] = loop.create_future()

    def tell(fact: Fact, event: Mapping[str, Any]) -> None:
        if stop.is_set():
            return
        loop.call_soon_threadsafe(take, fact)
        if event.get("type") is None:
            loop.call_soon_threadsafe(relisted)

    def tell_service(event: Mapping[str, Any]) -> None:
        news = service_news(event["object"]) if services is not None and not stop.is_set() else None
        if services is None or news is None:
            return
        loop.call_soon_threadsafe(services.take, news)
        if event.get("type") is None:
            loop.call_soon_threadsafe(services.relist)

    def end(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            handlers = _handlers(access, kinds, registry_id=registry_id, known=known, tell=tell)
            if services is not None:
                _follow_services(handlers, tell_service)
            asyncio.run(_operator(handlers, stop=stop))
        except Exception as failure:  # noqa: BLE001 - raised in the loop that waits for it
            error = failure
        with suppress(RuntimeError):  # nobody waits any more, and their loop is closed
            loop.call_soon_threadsafe(end, error)

    thread = threading.Thread(target=run, name="kopf", daemon=True)
    thread.start()
    try:
        await asyncio.shield(ended)
    finally:
        stop.set()


Tell: TypeAlias = Callable[[Fact, Mapping[str, Any]], None]


async def _operator(handlers: kopf.OperatorRegistry, *, stop: threading.Event) -> None:
    await kopf.operator(
        registry=handlers,
        settings=_settings(),
        standalone=True,
        clusterwide=True,
        stop_flag=stop,
    )


def _handlers(
    access: Access, kinds: tuple[Kind, ...], *, registry_id: str, known: Known, tell: Tell
) -> kopf.OperatorRegistry:
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: object) -> kopf.ConnectionInfo:
        return await _signed_in(access)

    def followed(kind: Kind) -> None:
        @kopf.on.event(resources.GROUP, resources.VERSION, resources.PLURALS[kind], registry=handlers)
        async def changed(event: Mapping[str, Any], **_: object) -> None:
            fact = fact_of(kind, event, registry_id=registry_id, known=known)
            if fact is not None:
                tell(fact, event)

    for kind in kinds:
        followed(kind)

    @kopf.on.event("", "v1", "nodes", registry=handlers)
    async def node_changed(event: Mapping[str, Any], **_: object) -> None:
        fact = node_fact(event)
        if fact is not None:
            tell(fact, event)

    return handlers


def _follow_services(handlers: kopf.OperatorRegistry, tell: Callable[[Mapping[str, Any]], None]) -> None:
    def followed(group: str, plural: str) -> None:
        @kopf.on.event(group, "v1", plural, registry=handlers)
        async def changed(event: Mapping[str, Any], **_: object) -> None:
            tell(event)

    followed("", "services")
    followed("", "namespaces")
    followed("discovery.k8s.io", "endpointslices")


async def _signed_in(access: Access) -> kopf.ConnectionInfo:
    authorization = await access.authorization()
    token = authorization.removeprefix("Bearer ") if authorization else None
    expires = datetime.now(UTC) + timedelta(seconds=SIGN_IN_SECONDS) if token else None
    if isinstance(access, Kubeconfig):
        configuration = access.configuration
        return kopf.ConnectionInfo(
            server=access.url,
            ca_path=configuration.ssl_ca_cert or None,
            insecure=not configuration.verify_ssl,
            certificate_path=configuration.cert_file or None,
            private_key_path=configuration.key_file or None,
            scheme="Bearer" if token else None,
            token=token,
            expiration=expires,
        )
    authority = access.directory / "ca.crt" if isinstance(access, ServiceAccount) else None
    return kopf.ConnectionInfo(
        server=access.url, ca_path=authority, scheme="Bearer", token=token, expiration=expires
    )


class _Backoffs:
    """Delays between attempts, without end: an API server that is away for an hour comes back."""

    def __iter__(self) -> Iterator[float]:
        delay = 0.5
        while True:
            yield delay
            delay = min(MAX_RETRY, delay * 2)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = SERVER_SECONDS
    settings.watching.connect_timeout = CONNECT_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.networking.connect_timeout = CONNECT_SECONDS
    settings.networking.error_backoffs = _Backoffs()
    settings.process.ultimate_exiting_timeout = None
    return settings


def _name(document: Mapping[str, Any]) -> object:
    return document.get("metadata", {}).get("name")
