"""The Registry port over an API server.

Revisions are numbered by etcd and belong to the cluster's identity, the UID of its kube-system namespace: it
survives every restart and restore of the cluster, and a cluster made anew has another one. Each list asks for
it, which takes the right to get that one namespace; `registry_id` tells it where even that is too much.

A list is of one revision and whole, or it fails: no page of it is ever missing. `complete` is False when an
object of it could not be read. A watch resumes where the server ended it in time, and is opened anew when it
falls silent; where a server may have lost what we saw, it is asked before a watch goes on from there.

A custom resource takes its status by a request of its own, so a resource that is created with a status is
written twice, and watchers see both.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from scope.model import (
    Assignment,
    JoinToken,
    Kind,
    Mesh,
    MeshStatus,
    Peer,
    PeerReport,
    Resource,
    Revision,
    Service,
    StatusPart,
    kind_of,
)
from scope.projection import projected
from scope.registry.kube.client import APPLY, WATCH_SECONDS, KubeClient, Object, Silent
from scope.registry.kube.leases import Leases
from scope.registry.kube.objects import (
    TOKEN_TYPE,
    collection,
    is_at,
    manager_of,
    new_object,
    node_lease,
    object_path,
    owner_reference,
    peer_lease,
    read,
    status_patch,
    with_spec,
)
from scope.registry.port import Conflict, Deleted, Gone, Listed, NotFound, Put, Refused, Unavailable
from scope.resources import InvalidResource

log = logging.getLogger(__name__)

AT_A_TIME = 10  # objects that are read in one go: some milliseconds, then others have a turn
PAGE = 500  # objects of a list's page: 1.5 MB of ScopePeers, as kubectl asks for
ATTEMPTS = 5  # at a write that names no revision and meets other writers
# A watch that ends earlier than the server was asked to end it was cut short; one that ends at once would be
# opened again and again.
CUT_SECONDS, AT_ONCE_SECONDS = WATCH_SECONDS[0] - 10.0, 1.0
OWNER_SECONDS = 1.0  # peers that are created together ask for their mesh once a second, not one by one
IDENTITY = "/api/v1/namespaces/kube-system"

STATUS_PARTS: Mapping[Kind, tuple[type[StatusPart], ...]] = {
    Kind.MESH: (MeshStatus,),
    Kind.PEER: (PeerReport, Assignment),
    Kind.SERVICE: (),
    Kind.TOKEN: (),
}


class KubeRegistry:
    """The port by way of `client`. Secrets and Leases are of `namespace`.

    With `mesh`, lists and watches give that ScopeMesh and its ScopePeers; with `node`, the ScopePeers of
    Nodes of that name. With `own`, the name of the ScopePeer whose agent asks, they give of all others what
    an agent acts on, and watches tell of no change in the rest. `leases` is shared by the registries of one
    process. `known` gives the ScopePeer of a name as whoever asks knows it, where what was known is no newer
    than the revision of a list: one that did not change since is not read anew.
    """

    def __init__(
        self,
        client: KubeClient,
        *,
        namespace: str,
        mesh: str | None = None,
        node: str | None = None,
        own: str | None = None,
        registry_id: str | None = None,
        leases: Leases | None = None,
        known: Callable[[str, int], Peer | None] = lambda _name, _revision: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._mesh = mesh
        self._node = node
        self._own = own
        self._known = known
        self._told: dict[tuple[Kind, str], Resource] = {}  # what was last told, where that is not everything
        self._configured_id = registry_id
        self._id = registry_id
        self._now = now
        self._leases = leases if leases is not None else Leases(client, namespace, now=now)
        self._seen: dict[Kind, int] = {}  # the newest revision that a list or watch of ours told
        self._owners: dict[str, tuple[float, Object]] = {}  # mesh -> when it was read, its owner reference
        self._beating: dict[str, tuple[str, str]] = {}  # peer -> (uid, Lease): whose heartbeat we are

    @property
    def leases(self) -> Leases:
        """Heartbeats: `listen` must run where `beats` is to tell of any."""
        return self._leases

    async def close(self) -> None:
        """End every watch and connection."""
        await self._client.close()

    async def reconnect(self) -> None:
        """End every watch as lost, and open new connections from now on: our network has changed."""
        await self._client.reconnect()

    # --- reading ------------------------------------------------------------------------------------------

    async def list(self, kind: Kind) -> Listed:
        """Everything of `kind` at one revision. Raises Refused, Unavailable, Gone (it took too long)."""
        registry_id = await self._identify()
        query = {"limit": str(PAGE), **self._selector(kind)}
        found: list[Resource] = []
        complete = True
        while True:
            page = await self._client.ask("GET", collection(kind, self._namespace), query=query)
            number, token = _list_meta(page)
            for count, item in enumerate(page.get("items") or (), start=1):
                if count % AT_A_TIME == 0:
                    await asyncio.sleep(0)
                resource = self._unchanged(kind, item, number) or self._readable(kind, item)
                if resource is None:
                    complete = False
                else:
                    found.append(self._as_told(resource))
            if not token:
                break
            query = {**query, "continue": token}
        self._seen[kind] = number
        if self._own is not None:
            self._told = {key: told for key, told in self._told.items() if key[0] is not kind}
            self._told |= {(kind, told.meta.name): told for told in found}
        return Listed(kind, Revision(registry_id, number), tuple(found), complete)

    async def get(self, kind: Kind, name: str) -> Resource:
        """One resource. Raises NotFound, Refused, Unavailable."""
        return self._read(kind, await self._get(kind, name))

    async def watch(self, kind: Kind, since: Revision) -> AsyncIterator[Put | Deleted]:
        """Changes of `kind` after `since`, until `close`. Raises Gone, Refused, Unavailable."""
        here = self._id or await self._identify()
        if since.registry != here:
            raise Gone(f"revision {since.number} is of registry {since.registry}, not {here}: list again")
        position = since.number
        if position > self._seen.get(kind, 0):
            await self._require_not_ahead(kind, position)
        path, query = collection(kind, self._namespace), self._selector(kind)
        while True:
            started = self._now()
            try:
                async with aclosing(self._client.watch(path, query=query, since=position)) as events:
                    count = 0
                    async for event in events:
                        count += 1
                        if count % AT_A_TIME == 0:  # events that came together are there without a wait
                            await asyncio.sleep(0)
                        position, fact = self._fact(kind, event, registry_id=here)
                        self._seen[kind] = position
                        if fact is not None:
                            yield fact
            except Silent:
                log.debug("watch.silent kind=%s revision=%d", kind, position)
                await self._require_not_ahead(kind, position)
                continue
            except Unavailable:
                if self._client.is_closed:
                    return
                raise
            lasted = self._now() - started
            if lasted < AT_ONCE_SECONDS:
                raise Unavailable(f"{self._client.url} ended a watch as soon as it was opened")
            if lasted < CUT_SECONDS:
                await self._require_not_ahead(kind, position)

    # --- writing ------------------------------------------------------------------------------------------

    async def create(self, resource: Resource) -> Resource:
        """Store a new resource, as its ScopeMesh's own where it is of one. Raises AlreadyExists, Refused,
        Unavailable: then its status may not be written yet.
        """
        kind = kind_of(resource)
        owner = await self._owner(resource)
        answer = await self._client.ask(
            "POST", collection(kind, self._namespace), body=new_object(resource, owner=owner)
        )
        stored = self._read(kind, answer)
        for part in _status_of(resource):
            stored = await self.update_status(kind, stored.meta.name, part, uid=stored.meta.uid)
        return stored

    async def update(self, resource: Resource, *, if_revision: int | None = None) -> Resource:
        """Replace the spec; labels, owners and what else stands in metadata stays. Raises NotFound, Conflict,
        Refused, Unavailable.
        """
        kind, meta = kind_of(resource), resource.meta
        for last in _attempts():
            document = await self._get(kind, meta.name)
            stored = self._read(kind, document)
            _require(stored, uid=meta.uid, if_revision=if_revision)
            if stored.spec == resource.spec:
                return stored
            try:
                answer = await self._client.ask(
                    "PUT",
                    object_path(kind, meta.name, self._namespace),
                    body=with_spec(document, resource),
                )
            except Conflict:
                if last or if_revision is not None:
                    raise
                continue
            return self._read(kind, answer)
        raise AssertionError("the last attempt returns or raises")

    async def update_status(
        self, kind: Kind, name: str, part: StatusPart, *, uid: str, if_revision: int | None = None
    ) -> Resource:
        """Apply one writer's part of the status. Raises NotFound, Conflict, Refused, Unavailable."""
        if not isinstance(part, STATUS_PARTS[kind]):
            raise Refused(f"a {kind} has no status part {type(part).__name__}")
        if if_revision is not None:  # no two resources ever have one revision, so it stands for the uid, too
            return await self._apply(kind, name, part, if_revision=if_revision)
        # Through /status the API server takes another uid for granted, but not another revision.
        for last in _attempts():
            stored = await self.get(kind, name)
            _require(stored, uid=uid, if_revision=None)
            if part in _status_of(stored):
                return stored
            try:
                return await self._apply(kind, name, part, if_revision=stored.meta.revision)
            except Conflict:
                if last:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _apply(self, kind: Kind, name: str, part: StatusPart, *, if_revision: int) -> Resource:
        answer = await self._client.ask(
            "PATCH",
            f"{object_path(kind, name, self._namespace)}/status",
            query={"fieldManager": manager_of(part), "force": "true"},
            body=status_patch(kind, name, part, if_revision=if_revision),
            content_type=APPLY,
        )
        return self._read(kind, answer)

    async def delete(self, kind: Kind, name: str, *, uid: str) -> None:
        """Remove a resource. Raises NotFound, Conflict, Refused, Unavailable."""
        await self._client.ask(
            "DELETE",
            object_path(kind, name, self._namespace),
            body={"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}},
        )

    # --- heartbeats ---------------------------------------------------------------------------------------

    async def heartbeat(self, name: str) -> None:
        """The peer `name` is alive now: the Lease of its Node is renewed, or its own where it has no Node.

        Raises NotFound, Refused, Unavailable.
        """
        known = self._beating.get(name)
        if known is None:
            peer = await self.get(Kind.PEER, name)
            node = peer.spec.node_name if isinstance(peer, Peer) else ""
            known = self._beating[name] = (peer.meta.uid, node_lease(node) if node else peer_lease(name))
        uid, lease = known
        await self._leases.renew(lease, peer=name, uid=uid)

    def _note(self, fact: Put | Deleted) -> None:
        """A peer that is gone, or was made anew, is asked for again before it beats."""
        resource = fact.last if isinstance(fact, Deleted) else fact.resource
        name = resource.meta.name
        if isinstance(resource, Peer) and name in self._beating:
            uid, lease = self._beating[name]
            if isinstance(fact, Deleted) or uid != resource.meta.uid:
                del self._beating[name]
                self._leases.forget(lease, peer=name)

    # --- requests -----------------------------------------------------------------------------------------

    async def _identify(self) -> str:
        """The id of this registry, asked for anew unless it was given. Raises Refused, Unavailable."""
        if self._configured_id is None:
            namespace = await self._client.ask("GET", IDENTITY)
            self._id = str(namespace.get("metadata", {}).get("uid", ""))
        if not self._id:
            raise Unavailable(f"{self._client.url} told no UID of its kube-system namespace")
        return self._id

    def _selector(self, kind: Kind) -> dict[str, str]:
        terms: list[str] = []
        if kind is Kind.TOKEN:
            terms.append(f"type={TOKEN_TYPE}")
        if self._mesh is not None and kind is Kind.MESH:
            terms.append(f"metadata.name={self._mesh}")
        if self._mesh is not None and kind is Kind.PEER:
            terms.append(f"spec.mesh={self._mesh}")
        if self._node is not None and kind is Kind.PEER:
            terms.append(f"spec.nodeName={self._node}")
        return {"fieldSelector": ",".join(terms)} if terms else {}

    async def _require_not_ahead(self, kind: Kind, number: int) -> None:
        """A server that was restored knows nothing of `number`, and a watch from there would hear nothing
        until it got so far again. Raises Gone.
        """
        query = {"limit": "1", **self._selector(kind)}
        newest, _ = _list_meta(await self._client.ask("GET", collection(kind, self._namespace), query=query))
        if newest < number:
            raise Gone(f"revision {number} is newer than the newest, {newest}: list again")

    async def _get(self, kind: Kind, name: str) -> Object:
        return await self._client.ask("GET", object_path(kind, name, self._namespace))

    async def _owner(self, resource: Resource) -> Object | None:
        """The mesh that a peer or an exported Service goes with; None where there is none to go with."""
        if not isinstance(resource, Peer | Service):
            return None
        name = resource.spec.mesh
        read_at, owner = self._owners.get(name, (float("-inf"), {}))
        if self._now() - read_at < OWNER_SECONDS:
            return owner
        self._owners.pop(name, None)
        try:
            mesh = await self.get(Kind.MESH, name)
        except NotFound:
            return None
        owner = owner_reference(Kind.MESH, name, mesh.meta.uid)
        self._owners[name] = self._now(), owner
        return owner

    def _fact(self, kind: Kind, event: Object, *, registry_id: str) -> tuple[int, Put | Deleted | None]:
        """The revision of a watch event, and the change; None for a bookmark or what cannot be read."""
        document = event.get("object")
        if not isinstance(document, dict):
            raise Unavailable("the API server sent a watch event without an object")
        number = _number(document.get("metadata", {}).get("resourceVersion"))
        revision = Revision(registry_id, number)
        if event.get("type") == "BOOKMARK":
            return number, None
        resource = self._readable(kind, document)
        if resource is None:
            return number, None
        told = self._as_told(resource)
        fact = Deleted(told, revision) if event.get("type") == "DELETED" else Put(told, revision)
        self._note(fact)
        return number, fact if self._is_news(kind, fact) else None

    def _as_told(self, resource: Resource) -> Resource:
        if self._own in (None, resource.meta.name) or isinstance(resource, Service | JoinToken):
            return resource
        return projected(resource)

    def _is_news(self, kind: Kind, fact: Put | Deleted) -> bool:
        """Whether a change is one to whoever asks."""
        if self._own is None:
            return True
        if isinstance(fact, Deleted):
            self._told.pop((kind, fact.last.meta.name), None)
            return True
        told = fact.resource
        before = self._told.get((kind, told.meta.name))
        self._told[kind, told.meta.name] = told
        if before is None or told.meta.name == self._own:
            return True
        return replace(before, meta=replace(before.meta, revision=told.meta.revision)) != told

    def _unchanged(self, kind: Kind, document: Object, number: int) -> Peer | None:
        """The ScopePeer of a list at that revision, if it is known as it stands there."""
        name = document.get("metadata", {}).get("name")
        known = self._known(name, number) if kind is Kind.PEER and isinstance(name, str) else None
        return known if known is not None and is_at(document, known.meta) else None

    def _readable(self, kind: Kind, document: Object) -> Resource | None:
        """A resource; None for one that this version cannot read, which must not hide all others."""
        try:
            return read(kind, document)
        except InvalidResource as error:
            name = document.get("metadata", {}).get("name")
            log.warning("resource.unreadable kind=%s name=%s error=%s", kind, name, error)
            return None

    def _read(self, kind: Kind, document: Object) -> Resource:
        try:
            return read(kind, document)
        except InvalidResource as error:
            raise Unavailable(
                f"{kind} {document.get('metadata', {}).get('name')!r} is stored as what this version cannot "
                f"read: {error}"
            ) from None


def _list_meta(page: Mapping[str, Any]) -> tuple[int, str]:
    """The revision of a list, and the token of its next page ("": it was the last)."""
    meta = page.get("metadata")
    if not isinstance(meta, dict):
        raise Unavailable("the API server answered a list without metadata")
    return _number(meta.get("resourceVersion")), str(meta.get("continue") or "")


def _number(text: object) -> int:
    if not isinstance(text, str) or not text.isdigit():
        raise Unavailable(f"the API server gave the revision {text!r}, which is no number")
    return int(text)


def _status_of(resource: Resource) -> tuple[StatusPart, ...]:
    """The parts of a status that say something."""
    match resource:
        case Mesh(status=status) if status != MeshStatus():
            return (status,)
        case Peer(report=report, assignment=assignment):
            parts: tuple[StatusPart, ...] = (report,) if report is not None else ()
            return (*parts, assignment) if assignment != Assignment() else parts
        case _:
            return ()


def _attempts() -> tuple[bool, ...]:
    """Whether it is the last one, for each attempt at a write."""
    return (False,) * (ATTEMPTS - 1) + (True,)


def _require(stored: Resource, *, uid: str, if_revision: int | None) -> None:
    kind, meta = kind_of(stored), stored.meta
    if uid != meta.uid:
        raise Conflict(f"{kind} {meta.name!r} has uid {meta.uid}, not {uid!r}: read it again")
    if if_revision is not None and if_revision != meta.revision:
        raise Conflict(
            f"{kind} {meta.name!r} is at revision {meta.revision}, not {if_revision}: read it again"
        )
