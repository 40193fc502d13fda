"""The routes of the gateway: what each path takes, who may ask, and what is answered.

Every request passes the same steps: the limits of its source, its body within bounds, its caller, the
caller's limits, and the route. A peer sees its own mesh and the peers in it, and writes its own report;
everything else is an administrator's. `GET` answers what `kubectl get -o json` would show. `docs/api.md`
and `openapi.yaml` describe it all; the tests hold this file against the latter.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeAlias

import yaml
from aiohttp import web

from scope import resources
from scope.admission import Buckets, Refusal, source_of
from scope.credentials import CLUSTER_HEADER, MESH_HEADER, base64url, read_base64url
from scope.model import (
    Assignment,
    ConfigError,
    Kind,
    Mesh,
    Peer,
    PeerReport,
    PublicKey,
    Resource,
    Revision,
    Service,
    StatusPart,
)
from scope.names import peer_name, service_name
from scope.projection import projected
from scope.registry.http import AGENT, AGENT_VIEW, API, OPERATOR, REGISTRY_HEADER
from scope.registry.port import Conflict, Listed, NotFound, Registry, RegistryError
from scope.wire import MAX_DATAGRAM
from scope_operator.enrolment import MAX_PEERS, require_bindable
from scope_operator.gateway.authorisation import (
    Administrator,
    Authority,
    Caller,
    Claimed,
    ClusterOperator,
    Member,
    Stranger,
)
from scope_operator.gateway.errors import refusal_of
from scope_operator.gateway.feed import Feed, Stream, owner_of_cluster
from scope_operator.gateway.joining import Joining
from scope_operator.gateway.limits import Limits

log = logging.getLogger(__name__)

MAX_STREAM_SECONDS = 86400  # of `timeoutSeconds`

KINDS = {resources.PLURALS[kind]: kind for kind in (Kind.MESH, Kind.PEER, Kind.SERVICE)}
TYPES: dict[Kind, type[Mesh | Peer | Service]] = {Kind.MESH: Mesh, Kind.PEER: Peer, Kind.SERVICE: Service}

_FAILED = Refusal(500, "InternalError", "the gateway failed; its log says how", retry_after=5.0)

SERVICES = f"{API}/{resources.PLURALS[Kind.SERVICE]}"

Handler: TypeAlias = Callable[["Asked"], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that passed the limits, with its caller."""

    request: web.Request
    caller: Caller
    body: bytes

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query

    def administrator(self) -> None:
        """Raises Refusal when the caller is not one."""
        match self.caller:
            case Administrator():
                return
            case Stranger():
                raise Refusal(
                    401, "Unauthorized", "this needs the administrator's token: take it from admin.json"
                )
            case Member():
                raise Refusal(403, "Forbidden", "this is for the registry's administrator, not for peers")
            case ClusterOperator():
                raise Refusal(403, "Forbidden", "this is for the registry's administrator, not for clusters")

    def mesh(self) -> str | None:
        """The mesh that the caller may see; None for all. Raises Refusal for strangers."""
        match self.caller:
            case Administrator():
                return None
            case Member(peer):
                return peer.spec.mesh
            case ClusterOperator(mesh):
                return mesh
            case Stranger():
                raise Refusal(
                    401, "Unauthorized", "sign the request as a peer, or send the administrator's token"
                )

    def cluster(self) -> str | None:
        """The cluster whose peers alone the caller may see; None where it is not bound to one."""
        return self.caller.cluster.name if isinstance(self.caller, ClusterOperator) else None

    def operator(self) -> ClusterOperator:
        """The cluster whose operator asks. Raises Refusal when it is none."""
        if isinstance(self.caller, ClusterOperator):
            return self.caller
        code, reason = (401, "Unauthorized") if isinstance(self.caller, Stranger) else (403, "Forbidden")
        raise Refusal(
            code,
            reason,
            "this is for the operator of a joined cluster: sign the request with the cluster's key",
        )

    def author(self, kind: Kind) -> ClusterOperator | None:
        """Who asks to create, change or delete a resource; None for an administrator. Raises Refusal."""
        if kind in (Kind.PEER, Kind.SERVICE) and isinstance(self.caller, ClusterOperator):
            return self.caller
        self.administrator()
        return None

    def reader(self, kind: Kind) -> None:
        """Raises Refusal for who has no use for a kind: an agent for Services."""
        if kind is Kind.SERVICE and isinstance(self.caller, Member):
            raise Refusal(403, "Forbidden", "exported Services are for operators, not for peers")

    def member(self) -> Peer:
        """The peer that asks. Raises Refusal when it is not one."""
        if isinstance(self.caller, Member):
            return self.caller.peer
        if isinstance(self.caller, Stranger):
            raise Refusal(401, "Unauthorized", "this is for peers: sign the request with the peer's key")
        raise Refusal(403, "Forbidden", "this is for peers: sign the request with the peer's key")

    def json(self) -> dict[str, Any]:
        """The body as a JSON object. Raises Refusal."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, "BadRequest", f"the body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise Refusal(400, "BadRequest", "the body is a JSON object")
        return value


class Gateway:
    """The application over `registry`; `now` is monotonic.

    `trouble` says what keeps the registry from its work, "" where nothing does.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        registry_id: str,
        feed: Feed,
        authority: Authority,
        joining: Joining,
        limits: Limits,
        now: Callable[[], float],
        trouble: Callable[[], str] = lambda: "",
    ) -> None:
        self._trouble = trouble
        self._registry = registry
        self._registry_id = registry_id
        self._feed = feed
        self._authority = authority
        self._joining = joining
        self._limits = limits
        self._now = now
        self._sources = Buckets[str](limits.source)
        self._strangers = Buckets[str](limits.stranger)
        self._peers = Buckets[str](limits.peer)
        self._clusters = Buckets[str](limits.cluster)
        self._couriers = Buckets[str](limits.courier)
        self._joins = 0
        # By uid and revision: what of each resource the last list held.
        self._rendered: dict[Kind, dict[tuple[str, int], _Rendered]] = {kind: {} for kind in Kind}
        document = yaml.safe_load(files(__package__).joinpath("openapi.yaml").read_text())
        self._openapi = json.dumps(document).encode()

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._answer], client_max_size=self._limits.body)
        route = app.router.add_route
        for plural, kind in KINDS.items():
            route("GET", f"{API}/{plural}", self._route(self._list(kind)), name=f"list-{plural}")
            route("POST", f"{API}/{plural}", self._route(self._create(kind)))
            one = f"{API}/{plural}/{{name}}"
            route("GET", one, self._route(self._get(kind)))
            route("PUT", one, self._route(self._update(kind)))
            route("DELETE", one, self._route(self._delete(kind)))
            if kind is not Kind.SERVICE:
                route("PUT", f"{one}/status", self._route(self._update_status(kind)))
        route("POST", "/v1/join", self._route(self._join))
        route("POST", "/v1/leave", self._route(self._leave))
        route("POST", "/v1/clusters", self._route(self._join_cluster))
        route("PUT", "/v1/clusters/{name}/keys", self._route(self._replace_cluster_keys))
        route("DELETE", "/v1/clusters/{name}", self._route(self._remove_cluster))
        route("GET", "/v1/events", self._route(self._events))
        route("POST", "/v1/courier/{key}", self._route(self._courier))
        route("POST", "/v1/heartbeat", self._route(self._heartbeat))
        route("GET", "/v1/tokens", self._route(self._list_tokens))
        route("POST", "/v1/tokens", self._route(self._create_token))
        route("DELETE", "/v1/tokens/{name}", self._route(self._delete_token))
        route("GET", "/healthz", self._route(self._health))
        route("GET", "/readyz", self._route(self._ready))
        route("GET", "/openapi.json", self._route(self._document))
        return app

    # --- the steps of every request -----------------------------------------------------------------------

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Turn whatever is raised into a Status, and name the registry in every answer."""
        try:
            response = await handler(request)
        except Refusal as refusal:
            response = self._refused(refusal)
        except RegistryError as error:
            response = self._refused(refusal_of(error))
        except ConfigError as error:
            response = self._refused(Refusal(422, "Invalid", str(error)))
        except web.HTTPException as error:
            response = self._refused(_refusal_of_http(error, limit=self._limits.body))
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            log.exception("request.failed method=%s path=%s", request.method, request.path)
            response = self._refused(_FAILED)
        if not response.prepared:
            response.headers[REGISTRY_HEADER] = self._registry_id
        return response

    def _refused(self, refusal: Refusal) -> web.Response:
        log.debug(
            "request.refused code=%d reason=%s message=%r", refusal.code, refusal.reason, refusal.message
        )
        response = _json(refusal.status(), code=refusal.code)
        response.headers.update(refusal.headers())
        return response

    def _route(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def run(request: web.Request) -> web.StreamResponse:
            source, now = source_of(request.remote), self._now()
            _hold(self._sources, source, now, "this address asks too often")
            header = request.headers.get("Authorization")
            if header is None:
                _hold(
                    self._strangers,
                    source,
                    now,
                    "requests without a credential come too often from this address",
                )
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    body = await self._body(request)
            except TimeoutError:
                raise Refusal(408, "Timeout", "the body arrived too slowly: send it again") from None
            try:
                caller = await self._authority.caller(
                    Claimed(header, request.headers.get(MESH_HEADER), request.headers.get(CLUSTER_HEADER)),
                    method=request.method,
                    target=request.raw_path,
                    body=body,
                )
            except Refusal as refusal:
                # A guess at a credential costs as much as having none.
                if refusal.code == 401:
                    _hold(self._strangers, source, now, "too many refused credentials from this address")
                raise
            if isinstance(caller, Member):
                _hold(self._peers, caller.peer.meta.uid, now, "this peer asks too often")
            elif isinstance(caller, ClusterOperator):
                owner = owner_of_cluster(caller.mesh, caller.cluster.name)
                _hold(self._clusters, owner, now, "this cluster's operator asks too often")
            return await handler(Asked(request, caller, body))

        return run

    async def _body(self, request: web.Request) -> bytes:
        """The body within bounds, which are wider where a Service may have a thousand endpoints."""
        if request.method in ("POST", "PUT") and request.path.startswith(SERVICES):
            request = request.clone(client_max_size=self._limits.service_body)
        return await request.read()

    # --- meshes and peers ---------------------------------------------------------------------------------

    def _list(self, kind: Kind) -> Handler:
        async def handle(asked: Asked) -> web.Response:
            mesh = asked.mesh()
            asked.reader(kind)
            for_agent = _for_agent(asked.query)
            listed = await self._registry.list(kind)
            whole = asked.caller.peer.meta.uid if isinstance(asked.caller, Member) else None
            body = self._list_body(listed, mesh, cluster=asked.cluster(), for_agent=for_agent, whole=whole)
            return web.Response(body=body, content_type="application/json")

        return handle

    def _list_body(
        self,
        listed: Listed,
        mesh: str | None,
        *,
        cluster: str | None,
        for_agent: bool,
        whole: str | None,
    ) -> bytes:
        """The list as JSON; `whole`: the uid of what is whole in an agent's list, too.

        Only what changed since the last list is rendered: agents list all at once.
        """
        known, rendered = self._rendered[listed.kind], {}
        for resource in listed.resources:
            if isinstance(resource, Mesh | Peer | Service):
                key = (resource.meta.uid, resource.meta.revision)
                rendered[key] = known.get(key) or _rendered(resource)
        self._rendered[listed.kind] = rendered
        head = {
            "apiVersion": resources.API_VERSION,
            "kind": f"{listed.kind}List",
            "metadata": {"resourceVersion": str(listed.revision.number)},
        }
        items = b",".join(
            item.for_agent if for_agent and uid != whole else item.whole
            for (uid, _), item in rendered.items()
            if mesh in (None, item.mesh) and (cluster is None or item.cluster in (None, cluster))
        )
        return _bytes(head)[:-1] + b',"items":[' + items + b"]}"

    def _get(self, kind: Kind) -> Handler:
        async def handle(asked: Asked) -> web.Response:
            return _resource(await self._visible(asked, kind))

        return handle

    def _create(self, kind: Kind) -> Handler:
        async def handle(asked: Asked) -> web.Response:
            author = asked.author(kind)
            resource = _parsed(asked, kind)
            if isinstance(resource, Peer):
                _require_own(author, resource)
                if author is not None:
                    self._require_room(author.mesh)
                await self._require_mesh(resource.spec.mesh)
            elif isinstance(resource, Service):
                _require_own_service(author, resource)
                await self._require_mesh(resource.spec.mesh)
                await self._require_room_for(resource)
            else:
                await self._require_free_prefixes(resource)
            return _resource(await self._registry.create(resource), code=201)

        return handle

    def _update(self, kind: Kind) -> Handler:
        async def handle(asked: Asked) -> web.Response:
            author = asked.author(kind)
            resource = _parsed(asked, kind)
            if isinstance(resource, Service):
                _require_own_service(author, resource)
            if isinstance(resource, Mesh):
                await self._require_free_prefixes(resource)
            else:
                _require_unchanged(await self._visible(asked, kind), resource)
            if_revision = resource.meta.revision or None
            return _resource(await self._registry.update(resource, if_revision=if_revision))

        return handle

    def _update_status(self, kind: Kind) -> Handler:
        async def handle(asked: Asked) -> web.Response:
            asked.mesh()
            stored = await self._visible(asked, kind)
            resource = _parsed(asked, kind, spec_of=stored)
            part = _part(asked, stored, resource)
            meta = resource.meta
            if isinstance(stored, Peer) and isinstance(part, PeerReport) and _is_renewed(stored, part):
                await require_bindable(self._registry, stored, part.keys)
            written = await self._registry.update_status(
                kind, meta.name, part, uid=meta.uid, if_revision=meta.revision or None
            )
            _log_new_keys(stored, part)
            return _resource(written)

        return handle

    def _delete(self, kind: Kind) -> Handler:
        async def handle(asked: Asked) -> web.Response:
            author = asked.author(kind)
            stored = await self._visible(asked, kind)
            if isinstance(stored, Service):
                _require_own_service(author, stored)
            uid = asked.query.get("uid", stored.meta.uid)
            if isinstance(stored, Peer) and not _flag(asked.query, "purge"):
                return _resource(await self._joining.remove(stored.meta.name, uid=uid))
            if isinstance(stored, Mesh):
                await self._require_no_members(stored)
            await self._registry.delete(kind, stored.meta.name, uid=uid)
            if isinstance(stored, Mesh):
                await self._delete_services_of(stored)
            log.info("resource.deleted kind=%s name=%s uid=%s", kind, stored.meta.name, uid)
            return _resource(stored)

        return handle

    async def _visible(self, asked: Asked, kind: Kind) -> Mesh | Peer | Service:
        """The resource that the path names, if the caller may see it; what it may not see is not there."""
        asked.reader(kind)
        mesh, cluster, name = asked.mesh(), asked.cluster(), asked.request.match_info["name"]
        resource = await self._registry.get(kind, name)
        if (
            not isinstance(resource, Mesh | Peer | Service)
            or mesh not in (None, _mesh_of(resource))
            or (cluster is not None and _cluster_of(resource) not in (None, cluster))
        ):
            raise NotFound(f"there is no {kind} {name!r}")
        return resource

    async def _require_mesh(self, name: str) -> None:
        try:
            await self._registry.get(Kind.MESH, name)
        except NotFound:
            raise Refusal(
                422, "Invalid", f"spec.mesh: there is no ScopeMesh {name!r}: create it first"
            ) from None

    async def _require_room_for(self, service: Service) -> None:
        """Raises Refusal when a cluster has as many exported Services in a mesh as it may have."""
        whose = (service.spec.mesh, service.spec.cluster)
        listed = (await self._registry.list(Kind.SERVICE)).resources
        found = [each for each in listed if isinstance(each, Service)]
        if sum((each.spec.mesh, each.spec.cluster) == whose for each in found) >= resources.MAX_SERVICES:
            raise Refusal(
                422,
                "Invalid",
                f"cluster {service.spec.cluster!r} exports {resources.MAX_SERVICES} Services to mesh "
                f"{service.spec.mesh!r}, the most it may: take the annotation from some",
            )

    def _require_room(self, mesh: str) -> None:
        """Raises Refusal when a mesh has as many peers as it may have."""
        members = sum(peer.spec.mesh == mesh for peer in self._feed.peers.values())
        if members >= MAX_PEERS:
            raise Refusal(
                422,
                "Invalid",
                f"mesh {mesh!r} has {members} peers, the most it may have: select fewer Nodes, or "
                "`scopectl peer remove` those that are gone",
            )

    async def _require_no_members(self, mesh: Mesh) -> None:
        """A mesh that goes leaves its peers running with nobody to remove one of them."""
        peers = [p for p in (await self._registry.list(Kind.PEER)).resources if isinstance(p, Peer)]
        members = [
            p.meta.name for p in peers if p.spec.mesh == mesh.meta.name and p.assignment.tombstone is None
        ]
        if members:
            raise Conflict(
                f"ScopeMesh {mesh.meta.name!r} has {len(members)} peers, {members[0]} among them: "
                "`scopectl peer remove` each, then delete the mesh"
            )

    async def _delete_services_of(self, mesh: Mesh) -> None:
        """What was exported to a mesh goes with it."""
        for each in (await self._registry.list(Kind.SERVICE)).resources:
            if isinstance(each, Service) and each.spec.mesh == mesh.meta.name:
                with suppress(NotFound, Conflict):
                    await self._registry.delete(Kind.SERVICE, each.meta.name, uid=each.meta.uid)

    async def _require_free_prefixes(self, mesh: Mesh) -> None:
        others = (await self._registry.list(Kind.MESH)).resources
        problems = resources.overlapping(mesh, [other for other in others if isinstance(other, Mesh)])
        if problems:
            raise Refusal(422, "Invalid", "\n".join(map(str, problems)))

    # --- joining and leaving ------------------------------------------------------------------------------

    async def _join(self, asked: Asked) -> web.Response:
        if self._joins >= self._limits.joins_waiting:
            raise Refusal(503, "ServiceUnavailable", "too many peers join at once", retry_after=5.0)
        self._joins += 1
        try:
            peer = await self._joining.join(asked.json())
            settled = await self._feed.settled(peer.meta.name, peer.meta.uid, seconds=self._limits.join_wait)
            mesh = await self._registry.get(Kind.MESH, peer.spec.mesh)
        finally:
            self._joins -= 1
        answer = {
            "registry": self._registry_id,
            "peer": resources.to_dict(settled or peer),
            "mesh": resources.to_dict(mesh),
        }
        return _json(answer, code=201)

    async def _leave(self, asked: Asked) -> web.Response:
        peer = asked.member()
        return _resource(await self._joining.leave(peer, asked.json()))

    # --- clusters from elsewhere --------------------------------------------------------------------------

    async def _join_cluster(self, asked: Asked) -> web.Response:
        cluster, mesh = await self._joining.join_cluster(asked.json())
        answer = {
            "registry": self._registry_id,
            "cluster": resources.cluster_to_dict(cluster),
            "mesh": resources.to_dict(mesh),
        }
        return _json(answer, code=201)

    async def _replace_cluster_keys(self, asked: Asked) -> web.Response:
        operator = asked.operator()
        if asked.request.match_info["name"] != operator.cluster.name:
            raise Refusal(
                403, "Forbidden", f"this is the operator of cluster {operator.cluster.name!r} alone"
            )
        tokens = resources.parse_tokens(asked.json())
        cluster = await self._joining.replace_cluster_tokens(operator.mesh, operator.cluster, tokens)
        return _json(resources.cluster_to_dict(cluster))

    async def _remove_cluster(self, asked: Asked) -> web.Response:
        asked.administrator()
        mesh = asked.query.get("mesh", "")
        cluster = await self._joining.remove_cluster(mesh, asked.request.match_info["name"])
        return _json(resources.cluster_to_dict(cluster))

    # --- the stream, the courier, heartbeats --------------------------------------------------------------

    async def _events(self, asked: Asked) -> web.StreamResponse:
        visible, wanted = asked.mesh(), asked.query.get("mesh")
        if visible is not None and wanted not in (None, visible):
            raise NotFound(f"there is no ScopeMesh {wanted!r}")
        since = Revision(asked.query.get("registry", self._registry_id), _number(asked.query, "since"))
        seconds, for_agent = _seconds(asked.query), _for_agent(asked.query)
        services = _flag(asked.query, "services")
        if services:
            asked.reader(Kind.SERVICE)
        of_peers, of_administrators = self._feed.counts()
        peer, cluster, owner = None, None, None
        if isinstance(asked.caller, Member):
            peer, owner = asked.caller.peer, asked.caller.peer.meta.uid
        elif isinstance(asked.caller, ClusterOperator):
            cluster = asked.caller.cluster
            owner = owner_of_cluster(asked.caller.mesh, cluster.name)
        if owner is None:
            full = of_administrators >= self._limits.admin_streams
        else:
            full = of_peers >= self._limits.streams and not self._feed.has_stream(owner)
        if full:
            raise Refusal(503, "ServiceUnavailable", "too many event streams are open", retry_after=10.0)
        stream = await self._feed.open(
            peer, visible or wanted, since, cluster=cluster, for_agent=for_agent, services=services
        )
        response = web.StreamResponse(
            headers={"Content-Type": "application/x-ndjson", REGISTRY_HEADER: self._registry_id}
        )
        try:
            await response.prepare(asked.request)
            await self._write_stream(
                stream, response, until=None if seconds is None else self._now() + seconds
            )
        except ConnectionError:
            log.debug("stream.lost peer=%s", stream.name)
        except TimeoutError:
            log.info("stream.stalled peer=%s", stream.name)
            if asked.request.transport is not None:
                asked.request.transport.abort()  # what waits to be sent would keep the connection
        finally:
            self._feed.close(stream)
        return response

    async def _write_stream(
        self, stream: Stream, response: web.StreamResponse, *, until: float | None
    ) -> None:
        """Write until the stream ends or it is `until`. Raises TimeoutError when the reader takes nothing."""
        await self._write(response, b"\n")  # tells the reader that its stream stands
        while until is None or self._now() < until:
            stream.wake.clear()
            lines = self._feed.take(stream)
            if stream.ended is not None:
                lines.append(_bytes(stream.ended.status()) + b"\n")
            if lines:
                await self._write(response, b"".join(lines))
            if stream.ended is not None:
                return
            wait = self._limits.heartbeat
            try:
                async with asyncio.timeout(wait if until is None else min(wait, until - self._now())):
                    await stream.wake.wait()
                continue
            except TimeoutError:
                pass  # quiet for so long
            await self._write(response, self._feed.bookmark(stream) or b"\n")

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        async with asyncio.timeout(self._limits.stall):
            await response.write(data)

    async def _courier(self, asked: Asked) -> web.Response:
        peer = asked.member()
        try:
            to = PublicKey(read_base64url(asked.request.match_info["key"]))
        except ValueError as error:
            raise Refusal(404, "NotFound", f"the path ends with a probe key in base64url: {error}") from None
        if not 0 < len(asked.body) <= MAX_DATAGRAM:
            raise Refusal(
                413, "RequestEntityTooLarge", f"the body is a datagram of 1 to {MAX_DATAGRAM} bytes"
            )
        _hold(self._couriers, peer.meta.uid, self._now(), "this peer sends too many datagrams")
        if peer.report is None or not self._feed.carry(
            peer.spec.mesh, sender=peer.report.keys.probe, to=to, datagram=asked.body
        ):
            raise Refusal(
                404, "NotFound", f"no peer with probe key {base64url(to.raw)} has an event stream now"
            )
        return web.Response(status=204)

    async def _heartbeat(self, asked: Asked) -> web.Response:
        if isinstance(asked.caller, Administrator):
            name = asked.query.get("peer", "")
        else:
            name = asked.member().meta.name
            if asked.query.get("peer", name) != name:
                raise Refusal(403, "Forbidden", "a peer sends heartbeats for itself alone")
        await self._registry.heartbeat(name)
        return web.Response(status=204)

    # --- tokens -------------------------------------------------------------------------------------------

    async def _list_tokens(self, asked: Asked) -> web.Response:
        asked.administrator()
        return _json({"tokens": await self._joining.tokens()})

    async def _create_token(self, asked: Asked) -> web.Response:
        asked.administrator()
        return _json(await self._joining.create_token(asked.json()), code=201)

    async def _delete_token(self, asked: Asked) -> web.Response:
        asked.administrator()
        await self._joining.delete_token(asked.request.match_info["name"])
        return web.Response(status=204)

    # --- about the gateway itself -------------------------------------------------------------------------

    async def _health(self, asked: Asked) -> web.Response:
        del asked
        return _json({"status": "ok"})

    async def _ready(self, asked: Asked) -> web.Response:
        del asked
        if not self._feed.ready.is_set():
            raise Refusal(503, "ServiceUnavailable", "the gateway is reading its registry", retry_after=1.0)
        await self._registry.list(Kind.MESH)
        if trouble := self._trouble():
            raise Refusal(503, "ServiceUnavailable", trouble, retry_after=1.0)
        return _json({"status": "ok"})

    async def _document(self, asked: Asked) -> web.Response:
        del asked
        return web.Response(body=self._openapi, content_type="application/json")


# --- reading requests ---------------------------------------------------------------------------------------


def _hold(buckets: Buckets[str], key: str, now: float, message: str) -> None:
    wait = buckets.take(key, now)
    if wait > 0:
        raise Refusal(429, "TooManyRequests", f"{message}: wait as Retry-After says", retry_after=wait)


def _parsed(
    asked: Asked, kind: Kind, *, spec_of: Mesh | Peer | Service | None = None
) -> Mesh | Peer | Service:
    """The body as a resource of `kind`, of the name in the path. Raises Refusal, InvalidResource.

    Who writes a status need not send the spec, which is taken from `spec_of`.
    """
    document = asked.json()
    if spec_of is not None:
        document["spec"] = resources.to_dict(spec_of)["spec"]
    # A peer may be newer than its registry and report what this one does not know.
    resource = resources.parse(document, ignore_unknown=isinstance(asked.caller, Member))
    if not isinstance(resource, Mesh | Peer | Service) or not isinstance(resource, TYPES[kind]):
        raise Refusal(422, "Invalid", f"kind: this path takes a {kind}")
    name = asked.request.match_info.get("name", resource.meta.name)
    if resource.meta.name != name:
        raise Refusal(
            422, "Invalid", f"metadata.name: {resource.meta.name!r} is not the {name!r} of the path"
        )
    return resource


def _require_own(author: ClusterOperator | None, peer: Peer) -> None:
    """Raises Refusal when a cluster's operator asks for what is not the spec of a peer of its own Nodes."""
    if author is None:
        return
    spec, cluster = peer.spec, author.cluster.name
    if (spec.mesh, spec.cluster) != (author.mesh, cluster):
        raise Refusal(
            403,
            "Forbidden",
            f"spec: the operator of cluster {cluster!r} writes peers of its Nodes in mesh {author.mesh!r}",
        )
    name = peer_name(spec.mesh, spec.cluster, spec.node_name)
    if peer.meta.name != name:
        raise Refusal(
            422, "Invalid", f"metadata.name: the peer of Node {spec.node_name!r} is called {name!r}"
        )
    if peer.report is not None or peer.assignment != Assignment():
        raise Refusal(403, "Forbidden", "status: it is the agent's and the registry's to write; leave it out")


def _require_own_service(author: ClusterOperator | None, service: Service) -> None:
    """Raises Refusal when a cluster's operator writes of another cluster, or under a name that is not its."""
    if author is None:
        return
    spec, cluster = service.spec, author.cluster.name
    if (spec.mesh, spec.cluster) != (author.mesh, cluster):
        raise Refusal(
            403,
            "Forbidden",
            f"spec: the operator of cluster {cluster!r} writes of its own Services in mesh {author.mesh!r}",
        )
    name = service_name(spec.mesh, spec.cluster, spec.namespace, spec.service)
    if service.meta.name != name:
        raise Refusal(
            422,
            "Invalid",
            f"metadata.name: the record of Service {spec.namespace}/{spec.service} is called {name!r}",
        )


def _require_unchanged(stored: Mesh | Peer | Service, asked: Peer | Service) -> None:
    """Raises Refusal where a peer would become that of another mesh or Node, a record another Service's."""
    problems = resources.forbidden_changes(stored, asked) if stored.meta.uid == asked.meta.uid else ()
    if problems:
        raise Refusal(422, "Invalid", "\n".join(map(str, problems)))


def _is_renewed(stored: Peer, part: PeerReport) -> bool:
    """Whether a report brings keys that the peer did not have."""
    return stored.report is None or stored.report.keys != part.keys


def _log_new_keys(stored: Mesh | Peer | Service, part: StatusPart) -> None:
    """Tell that a machine came back with other keys than it had."""
    if not isinstance(stored, Peer) or not isinstance(part, PeerReport) or stored.report is None:
        return
    before, now = stored.report.keys.wireguard, part.keys.wireguard
    if _is_renewed(stored, part):
        log.info(
            "peer.keys_replaced name=%s node=%s before=%s now=%s",
            stored.meta.name,
            stored.spec.node_name,
            before,
            now,
        )


def _part(asked: Asked, stored: Mesh | Peer | Service, resource: Mesh | Peer | Service) -> StatusPart:
    """The part of the status that the caller writes. Raises Refusal for what is not the caller's to write."""
    manager = asked.query.get("fieldManager")
    if isinstance(asked.caller, ClusterOperator):
        raise Refusal(
            403, "Forbidden", "status: it is the agents' and the registry's to write, not a cluster's"
        )
    if isinstance(resource, Service) or isinstance(stored, Service):
        raise Refusal(422, "Invalid", "status: a ScopeService has none")
    if isinstance(resource, Mesh):
        asked.administrator()
        return resource.status
    if isinstance(asked.caller, Administrator) and manager == OPERATOR:
        return resource.assignment
    if manager not in (None, AGENT):
        raise Refusal(
            403,
            "Forbidden",
            f"fieldManager: this caller writes as {AGENT}, not as {manager!r}",
        )
    if isinstance(asked.caller, Member) and asked.caller.peer.meta.uid != stored.meta.uid:
        raise Refusal(403, "Forbidden", "a peer writes its own status alone")
    if resource.report is None or not isinstance(stored, Peer):
        raise Refusal(422, "Invalid", "status: the report lacks its keys")
    if resource.assignment not in (Assignment(), stored.assignment):
        raise Refusal(
            403, "Forbidden", "status: addresses, role, conditions and the like are the registry's to write"
        )
    # A Node may be imaged anew: its cluster's API server says who it is. Nobody says so of an external peer.
    by_node = isinstance(asked.caller, Member) and asked.caller.by_node
    if not by_node and stored.report is not None and _is_renewed(stored, resource.report):
        raise Refusal(
            403,
            "Forbidden",
            "status: keys are bound at the join: to change them, leave and join with a new token",
        )
    return resource.report


def _flag(query: Mapping[str, str], name: str) -> bool:
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise Refusal(400, "BadRequest", f"{name} is true or false, not {text!r}")
    return text == "true"


def _for_agent(query: Mapping[str, str]) -> bool:
    text = query.get("view", "whole")
    if text not in ("whole", AGENT_VIEW):
        raise Refusal(400, "BadRequest", f"view is whole or {AGENT_VIEW}, not {text!r}")
    return text == AGENT_VIEW


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise Refusal(400, "BadRequest", f"{name} is the resourceVersion of a list, not {text!r}")
    return int(text)


def _seconds(query: Mapping[str, str]) -> float | None:
    if "timeoutSeconds" not in query:
        return None
    seconds = _number(query, "timeoutSeconds")
    if not 1 <= seconds <= MAX_STREAM_SECONDS:
        raise Refusal(400, "BadRequest", f"timeoutSeconds is 1 to {MAX_STREAM_SECONDS}, not {seconds}")
    return float(seconds)


# --- making answers -----------------------------------------------------------------------------------------


def _bytes(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A listed resource as JSON."""

    mesh: str
    cluster: str | None
    whole: bytes
    for_agent: bytes


def _rendered(resource: Mesh | Peer | Service) -> _Rendered:
    whole = _bytes(resources.to_dict(resource))
    less = resource if isinstance(resource, Service) else projected(resource)
    return _Rendered(
        mesh=_mesh_of(resource),
        cluster=_cluster_of(resource),
        whole=whole,
        for_agent=whole if less == resource else _bytes(resources.to_dict(less)),
    )


def _json(value: object, *, code: int = 200) -> web.Response:
    return web.Response(body=_bytes(value), status=code, content_type="application/json")


def _resource(resource: Resource, *, code: int = 200) -> web.Response:
    return _json(resources.to_dict(resource), code=code)


def _mesh_of(resource: Mesh | Peer | Service) -> str:
    return resource.meta.name if isinstance(resource, Mesh) else resource.spec.mesh


def _cluster_of(resource: Mesh | Peer | Service) -> str | None:
    """Whose Node a peer is, "" for an external one; None for what every cluster of its mesh sees."""
    return resource.spec.cluster if isinstance(resource, Peer) else None


def _refusal_of_http(error: web.HTTPException, *, limit: int) -> Refusal:
    """What aiohttp itself refuses."""
    match error:
        case web.HTTPRequestEntityTooLarge():
            return Refusal(413, "RequestEntityTooLarge", f"the body is larger than {limit} bytes: send less")
        case web.HTTPNotFound():
            return Refusal(404, "NotFound", "there is no such path: /openapi.json lists them")
        case web.HTTPMethodNotAllowed():
            return Refusal(
                405, "MethodNotAllowed", "this path does not take that method: see the Allow header"
            )
        case _:
            return Refusal(error.status, "BadRequest", error.reason)
