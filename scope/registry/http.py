"""The Registry port over a gateway: what an agent, or scopectl, speaks.

One HTTP session and, however many watches there are, one event stream per process. The gateway is known by
the pin of its certificate's key (or, without one, by the machine's certificate authorities). Requests are
signed as `scope.credentials` says; where the gateway finds our clock wrong it tells the time, and the
request is made once more with that. What is lost is raised, as the port says: to connect again, and when,
is the caller's move.

aiohttp is imported here and, on the agent's side, nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
from yarl import URL

from scope import resources
from scope.credentials import (
    CLUSTER_HEADER,
    MESH_HEADER,
    PIN_BYTES,
    Credential,
    ProjectedToken,
    authorization,
    base64url,
    pin_of,
    read_base64url,
)
from scope.model import (
    AgentTokens,
    ConfigError,
    Kind,
    Mesh,
    Peer,
    PeerReport,
    PublicKey,
    Resource,
    Revision,
    Role,
    StatusPart,
    kind_of,
)
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    Deleted,
    Gone,
    Listed,
    NotFound,
    PeerRemoved,
    Put,
    Refused,
    RegistryError,
    Unavailable,
)
from scope.vouching import replaces

API = f"/apis/{resources.API_VERSION}"
REGISTRY_HEADER = "Scope-Registry"  # in every answer: the registry's id, within which revisions are compared
AGENT = "scope-agent"  # field managers: who writes which part of a peer's status
OPERATOR = "scope-operator"
COURIER = "cc.ltgc.scope:courier"  # the type of the events that carry sealed datagrams
BOOKMARK = "cc.ltgc.scope:bookmark"  # the type of the events that only say how far the stream is
AGENT_VIEW = "agent"  # lists and streams that hold no more than an agent acts on; one's own peer is whole

CONNECT_SECONDS = 5.0  # three SYN retransmissions
REQUEST_SECONDS = 20.0  # a join waits up to 5 s for its address, behind a slow uplink
STREAM_IDLE_SECONDS = 40.0  # two heartbeats of 15 s may be lost on the way
# A NAT that restarted lets nothing in until something goes out, and a machine that roamed hears nothing more:
# the kernel asks after so many silent seconds, at this interval, and so often before it gives the stream up.
KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 4, 2, 3
MAX_ANSWER = 64 * 1024 * 1024  # a list of 10,000 peers of at most 4 KB, and room
MAX_TOKEN = 8 * 1024  # bytes of a ServiceAccount token: one signed with RSA of 4,096 bits has 2,000
WAITING_FACTS = 1024  # facts that wait for a watch; then the stream waits, and the gateway cuts it in the end
WAITING_DATAGRAMS = 64  # sealed datagrams that wait for the agent; more are dropped, as on any network


@dataclass(frozen=True, slots=True)
class Couriered:
    """A sealed datagram that the gateway passed on for the holder of probe key `sender`."""

    sender: PublicKey
    datagram: bytes


@dataclass(frozen=True, slots=True)
class Joined:
    """What a join gives: the peer (with addresses, where the registry was quick), its mesh, the registry."""

    registry: str
    peer: Peer
    mesh: Mesh


@dataclass(frozen=True, slots=True)
class ClusterJoined:
    """What the join of a cluster gives: the registry's id, and the mesh as its operator sees it."""

    registry: str
    mesh: Mesh


class PinnedKey(aiohttp.Fingerprint):
    """Checks a server by the SHA-256 of its certificate's SubjectPublicKeyInfo.

    A key that the registry vouches for, with `registry_key`, takes the place of the pinned one: `follow` is
    told its pin, and the earlier one holds no longer.
    """

    def __init__(
        self,
        pin: bytes,
        *,
        registry_key: PublicKey | None = None,
        follow: Callable[[bytes], None] = lambda _: None,
    ) -> None:
        if len(pin) != PIN_BYTES:
            raise ConfigError(f"a pin is {PIN_BYTES} bytes, not {len(pin)}")
        super().__init__(pin)
        self._pin = pin
        self._registry_key = registry_key
        self._follow = follow

    def check(self, transport: asyncio.Transport) -> None:
        """Raises aiohttp.ServerFingerprintMismatch unless the connection is TLS with the pinned key."""
        tls = transport.get_extra_info("ssl_object")
        certificate = tls.getpeercert(binary_form=True) if tls is not None else None
        seen = pin_of(certificate) if certificate else b""
        if secrets.compare_digest(seen, self._pin):
            return
        if (
            certificate
            and self._registry_key is not None
            and replaces(certificate, pin=self._pin, registry=self._registry_key)
        ):
            self._pin = seen
            self._follow(seen)
            return
        host, port, *_ = transport.get_extra_info("peername")
        raise aiohttp.ServerFingerprintMismatch(self._pin, seen, host, port)


class HttpRegistry:
    """The port at `url` (https://HOST:PORT). Use it from one event loop; `close` it, or use `async with`.

    `pin` is the 32-byte pin of the gateway's key, None to trust the machine's certificate authorities (or for
    http, which a test may use). A gateway that got another key is followed where the registry vouches for it,
    with `registry_key`; `followed` is then told the new pin, to keep it in place of the earlier one.
    `credential` None is for joining. `wall` is the wall clock. With `for_agent`, lists and watches give of
    others what an agent acts on, and no change in anything else. With `services` exported Services
    may be watched, too.
    """

    def __init__(
        self,
        url: str,
        *,
        pin: bytes | None,
        credential: Credential | None,
        wall: Callable[[], float] = time.time,
        stream_idle: float = STREAM_IDLE_SECONDS,
        for_agent: bool = False,
        registry_key: PublicKey | None = None,
        followed: Callable[[bytes], None] = lambda _: None,
        services: bool = False,
    ) -> None:
        self._url = url.rstrip("/")
        if not self._url.startswith(("https://", "http://")):
            raise ConfigError(f"a registry's URL starts with https://, not {url!r}")
        if pin is not None and not self._url.startswith("https://"):
            raise ConfigError(f"{url} has a pin, which only https can hold to")
        self._pin = pin
        self._registry_key = registry_key
        self._followed = followed
        self._credential = credential
        self._wall = wall
        self._offset = 0.0  # what the gateway's clock is ahead of ours
        self._stream_idle = stream_idle
        self._view = {"view": AGENT_VIEW} if for_agent else {}
        self._services = {"services": "true"} if services else {}
        self._session: aiohttp.ClientSession | None = None
        self._stream: _Stream | None = None
        self._watchers: set[_Watcher] = set()
        self._couriered: asyncio.Queue[Couriered] = asyncio.Queue(WAITING_DATAGRAMS)
        self._closed = False

    async def __aenter__(self) -> HttpRegistry:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every watch and connection."""
        self._closed = True
        await self._stop_stream()
        for watcher in self._watchers:
            watcher.lose(None)
        if self._session is not None:
            await self._session.close()

    async def reconnect(self) -> None:
        """End every watch as lost, and open new connections from now on: our network has changed."""
        await self._stop_stream()
        watchers, self._watchers = self._watchers, set()
        for watcher in watchers:
            watcher.lose(Unavailable("our own network changed: connecting again"))
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    # --- the port -----------------------------------------------------------------------------------------

    async def list(self, kind: Kind) -> Listed:
        """Everything of `kind` that the credential may see. Raises Refused, Unavailable."""
        view = f"?{urlencode(self._view)}" if self._view else ""
        answer = await self._ask("GET", f"{_path(kind)}{view}")
        try:
            items = tuple(_read(kind, item) for item in answer.document["items"])
            number = int(answer.document["metadata"]["resourceVersion"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._unreadable(error) from None
        return Listed(kind, Revision(answer.registry, number), items)

    async def get(self, kind: Kind, name: str) -> Resource:
        """One resource. Raises NotFound, Refused, Unavailable."""
        return self._resource(kind, await self._ask("GET", _path(kind, name)))

    async def watch(self, kind: Kind, since: Revision) -> AsyncIterator[Put | Deleted]:
        """Changes of `kind` after `since`. Raises Gone, Unavailable, Refused (PeerRemoved once we are)."""
        _path(kind)
        if kind is Kind.SERVICE and not self._services:
            raise Refused("this connection does not watch exported Services: open it with services=True")
        watcher = _Watcher(kind, since)
        await self._attach(watcher)
        try:
            while (fact := await watcher.next()) is not None:
                yield fact
        finally:
            await self._detach(watcher)

    async def create(self, resource: Resource) -> Resource:
        """Store a new resource. Raises AlreadyExists, Refused, Unavailable."""
        kind = kind_of(resource)
        return self._resource(kind, await self._ask("POST", _path(kind), body=resources.to_dict(resource)))

    async def update(self, resource: Resource, *, if_revision: int | None = None) -> Resource:
        """Replace the spec. Raises NotFound, Conflict, Refused, Unavailable."""
        kind, meta = kind_of(resource), resource.meta
        document = resources.to_dict(resource)
        document["metadata"] = _condition(meta.name, meta.uid, if_revision)
        return self._resource(kind, await self._ask("PUT", _path(kind, meta.name), body=document))

    async def update_status(
        self, kind: Kind, name: str, part: StatusPart, *, uid: str, if_revision: int | None = None
    ) -> Resource:
        """Replace one writer's part of the status. Raises NotFound, Conflict, Refused, Unavailable."""
        document: dict[str, object] = {
            "apiVersion": resources.API_VERSION,
            "kind": str(kind),
            "metadata": _condition(name, uid, if_revision),
            "status": resources.status_to_dict(part),
        }
        manager = AGENT if isinstance(part, PeerReport) else OPERATOR
        target = f"{_path(kind, name)}/status?{urlencode({'fieldManager': manager})}"
        return self._resource(kind, await self._ask("PUT", target, body=document))

    async def delete(self, kind: Kind, name: str, *, uid: str) -> None:
        """Remove a resource, with no tombstone. Raises NotFound, Conflict, Refused, Unavailable."""
        await self._ask("DELETE", f"{_path(kind, name)}?{urlencode({'uid': uid, 'purge': 'true'})}")

    async def heartbeat(self, name: str) -> None:
        """The peer `name` is alive now. Raises NotFound, Refused, Unavailable."""
        await self._ask("POST", f"/v1/heartbeat?{urlencode({'peer': name})}")

    # --- besides the port ---------------------------------------------------------------------------------

    async def remove_peer(self, name: str, *, uid: str | None = None) -> Peer:
        """Remove a peer for good, by a signed tombstone. Raises NotFound, Conflict, Refused, Unavailable."""
        condition = f"?{urlencode({'uid': uid})}" if uid is not None else ""
        removed = self._resource(Kind.PEER, await self._ask("DELETE", f"{_path(Kind.PEER, name)}{condition}"))
        if not isinstance(removed, Peer):
            raise self._unreadable(ValueError("not a ScopePeer"))
        return removed

    async def courier(self, to: PublicKey, datagram: bytes) -> None:
        """Have a sealed datagram brought to the holder of probe key `to`. Raises NotFound: it has no
        stream.
        """
        await self._ask("POST", f"/v1/courier/{base64url(to.raw)}", body=datagram)

    async def couriered(self) -> AsyncIterator[Couriered]:
        """Sealed datagrams that the courier brings while a watch is open; the oldest of too many are
        dropped.
        """
        while True:
            yield await self._couriered.get()

    async def create_token(
        self, mesh: str, *, role: Role = Role.AUTO, lifetime: float | None = None, single_use: bool = False
    ) -> str:
        """Make a join token for `lifetime` seconds (None: a day); gives its join string, shown once."""
        request: dict[str, object] = {"mesh": mesh, "role": str(role), "singleUse": single_use}
        if lifetime is not None:
            request["expiresIn"] = resources.format_duration(lifetime)
        answer = await self._ask("POST", "/v1/tokens", body=request)
        return str(answer.document.get("joinString", ""))

    async def tokens(self) -> Sequence[Mapping[str, object]]:
        """What may be told of every join token: id, mesh, role, expires, singleUse, used."""
        return tuple((await self._ask("GET", "/v1/tokens")).document.get("tokens", []))

    async def delete_token(self, token_id: str) -> None:
        """Let nobody join with a token any more. Raises NotFound, Refused, Unavailable."""
        await self._ask("DELETE", f"/v1/tokens/{quote(token_id, safe='')}")

    async def join(self, request: Mapping[str, object]) -> Joined:
        """Join a mesh; `request` as `scope.enrolment` writes it. Raises Refused (it says why),
        Unavailable.
        """
        answer = await self._ask("POST", "/v1/join", body=request)
        try:
            peer = resources.parse_peer(answer.document["peer"], ignore_unknown=True)
            mesh = resources.parse_mesh(answer.document["mesh"], ignore_unknown=True)
            return Joined(str(answer.document["registry"]), peer, mesh)
        except (KeyError, TypeError, ConfigError) as error:
            raise self._unreadable(error) from None

    async def leave(self, tombstone: Mapping[str, object]) -> Peer:
        """Leave by a tombstone of our own, as `scope.resources` writes it. Raises Refused, Unavailable."""
        answer = await self._ask("POST", "/v1/leave", body={"tombstone": tombstone})
        peer = self._resource(Kind.PEER, answer)
        if not isinstance(peer, Peer):
            raise self._unreadable(ValueError("not a ScopePeer"))
        return peer

    async def join_cluster(self, request: Mapping[str, object]) -> ClusterJoined:
        """Bring a cluster into a mesh; `request` as `scope.cluster_enrolment` writes it.

        Raises Refused (it says why), Unavailable.
        """
        answer = await self._ask("POST", "/v1/clusters", body=request)
        try:
            mesh = resources.parse_mesh(answer.document["mesh"], ignore_unknown=True)
            return ClusterJoined(str(answer.document["registry"]), mesh)
        except (KeyError, TypeError, ConfigError) as error:
            raise self._unreadable(error) from None

    async def replace_cluster_tokens(self, cluster: str, tokens: AgentTokens) -> None:
        """Have our cluster's agents known by these from now on. Raises Refused, Conflict, Unavailable."""
        target = f"/v1/clusters/{quote(cluster, safe='')}/keys"
        await self._ask("PUT", target, body=resources.tokens_to_dict(tokens))

    async def remove_cluster(self, mesh: str, name: str) -> None:
        """Trust a joined cluster no longer, and delete its peers. Raises NotFound, Refused, Unavailable."""
        await self._ask("DELETE", f"/v1/clusters/{quote(name, safe='')}?{urlencode({'mesh': mesh})}")

    # --- requests -----------------------------------------------------------------------------------------

    async def _ask(
        self, method: str, target: str, *, body: Mapping[str, object] | bytes | None = None
    ) -> _Answer:
        """One request and its answer, asked again once with the gateway's time where our clock is wrong."""
        raw, headers = _encoded(body)
        limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS, sock_connect=CONNECT_SECONDS)
        for last in (False, True):
            async with self._request(method, target, body=raw, headers=headers, limits=limits) as response:
                answer = await self._answered(response)
            if answer.code < 400:
                return answer
            if last or not self._learn_time(answer):
                raise self._error(answer)
        raise AssertionError("the second attempt returns or raises")

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        target: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A signed request; what the connection raises, also while it is read, becomes the port's error."""
        signed = dict(headers) | self._identification(method, target, body)
        url = URL(self._url + target, encoded=True)
        try:
            async with self._opened().request(
                method, url, data=body or None, headers=signed, timeout=limits, allow_redirects=False
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._lost(error) from error

    def _identification(self, method: str, target: str, body: bytes) -> dict[str, str]:
        """The headers that say who asks. Raises Unavailable while the token's file cannot be read."""
        match self._credential:
            case None:
                return {}
            case ProjectedToken(mesh, cluster, path):
                return {
                    "Authorization": f"Bearer {_projected(path)}",
                    MESH_HEADER: mesh,
                    CLUSTER_HEADER: cluster,
                }
            case credential:
                header = authorization(
                    credential,
                    method=method,
                    target=target,
                    body=body,
                    wall=self._wall() + self._offset,
                    nonce=secrets.token_bytes(16),
                )
                return {"Authorization": header}

    def _opened(self) -> aiohttp.ClientSession:
        """The one session, made when it is first needed."""
        if self._closed:
            raise Unavailable("this connection to the registry was closed")
        if self._session is None:
            check: ssl.SSLContext | aiohttp.Fingerprint | bool = True
            if self._pin is not None:
                check = PinnedKey(self._pin, registry_key=self._registry_key, follow=self._note_pin)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=check),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _note_pin(self, pin: bytes) -> None:
        """The registry vouches for another key of its gateway: from now on that one alone is right."""
        self._pin = pin
        self._followed(pin)

    async def _answered(self, response: aiohttp.ClientResponse) -> _Answer:
        raw = bytearray()
        async for chunk in response.content.iter_any():
            raw += chunk
            if len(raw) > MAX_ANSWER:
                raise Unavailable(f"{self._url} answered more than {MAX_ANSWER} bytes")
        document: object = {}
        if raw:
            try:
                document = json.loads(raw)
            except ValueError:
                if response.status < 400:
                    raise self._unreadable(ValueError("not JSON")) from None
        retry_after = response.headers.get("Retry-After", "")
        return _Answer(
            code=response.status,
            registry=response.headers.get(REGISTRY_HEADER, ""),
            document=document if isinstance(document, dict) else {},
            retry_after=float(retry_after) if retry_after.isdigit() else None,
        )

    def _learn_time(self, answer: _Answer) -> bool:
        """Whether the gateway refused our clock and told its own."""
        details = answer.document.get("details")
        if answer.document.get("reason") != "ClockSkew" or not isinstance(details, dict):
            return False
        now = details.get("now")
        if not isinstance(now, int | float):
            return False
        self._offset = now - self._wall()
        return True

    def _error(self, answer: _Answer) -> RegistryError:
        """The port's error for an answer of 400 or more."""
        message = str(answer.document.get("message") or f"{self._url} answered HTTP {answer.code}")
        reason = answer.document.get("reason")
        match answer.code:
            case 404:
                return NotFound(message)
            case 409:
                return AlreadyExists(message) if reason == "AlreadyExists" else Conflict(message)
            case 410:
                return Gone(message)
            case 408 | 425 | 429:
                return _later(message, answer.retry_after)
            case code if code >= 500:
                return _later(message, answer.retry_after)
            case _:
                return PeerRemoved(message) if reason == "PeerRemoved" else Refused(message)

    def _resource(self, kind: Kind, answer: _Answer) -> Resource:
        try:
            return _read(kind, answer.document)
        except ValueError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> Unavailable:
        return Unavailable(f"{self._url} answered what this version cannot read: {error!s}")

    def _lost(self, error: Exception) -> RegistryError:
        """The port's error for a failed connection."""
        match error:
            case aiohttp.ServerFingerprintMismatch():
                seen = base64url(error.got) if error.got else "none"
                return Refused(
                    f"{self._url} shows a certificate key with pin {seen}, expected "
                    f"{base64url(error.expected)}, and the registry does not vouch for it: someone is in "
                    "between, or the registry was made anew; ask its administrator for a new join string"
                )
            case aiohttp.ClientConnectorCertificateError():
                return Refused(
                    f"{self._url} shows a certificate that this machine does not trust: add its authority, "
                    "or start the registry with --tls-pinned and join with a new string"
                )
            case aiohttp.InvalidURL():
                return Refused(f"{self._url} is not a URL of a registry")
            case TimeoutError():
                return Unavailable(f"{self._url} did not answer in time")
            case aiohttp.ClientConnectorError():
                reason = error.os_error.strerror or str(error.os_error)
                return Unavailable(f"cannot reach {self._url}: {reason}; is it up, and is its port open?")
            case _:
                return Unavailable(f"cannot reach {self._url}: {error}")

    # --- the stream ---------------------------------------------------------------------------------------

    async def _attach(self, watcher: _Watcher) -> None:
        """Feed `watcher` from its revision on: by the open stream where it has not passed there, or a
        new one.
        """
        if self._stream is not None and self._stream.can_feed(watcher):
            self._watchers.add(watcher)
            return
        if any(other.position.registry != watcher.position.registry for other in self._watchers):
            raise Gone(
                f"revision {watcher.position.number} is of another registry than is watched: list again"
            )
        self._watchers.add(watcher)
        await self._stop_stream()
        since = min(other.position for other in self._watchers)
        self._stream = _Stream(since, {})
        self._stream.task = asyncio.create_task(self._read_stream(self._stream))

    async def _detach(self, watcher: _Watcher) -> None:
        self._watchers.discard(watcher)
        if not self._watchers:
            await self._stop_stream()

    async def _stop_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None and stream.task is not None:
            stream.task.cancel()
            await asyncio.wait([stream.task])

    async def _read_stream(self, stream: _Stream) -> None:
        """Read until the stream is lost, and tell all watchers why."""
        error: RegistryError | None = None
        try:
            await self._follow(stream)
        except RegistryError as raised:
            error = raised
        except (ValueError, KeyError, TypeError) as raised:
            error = self._unreadable(raised)
        error = error or Unavailable(f"{self._url} ended the event stream")
        if self._stream is stream:
            self._stream = None
            watchers, self._watchers = self._watchers, set()
            for watcher in watchers:
                watcher.lose(error)

    async def _follow(self, stream: _Stream) -> None:
        query = {"since": str(stream.since.number), "registry": stream.since.registry, **self._view}
        query |= self._services
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=self._stream_idle)
        for last in (False, True):
            async with self._request(
                "GET", f"/v1/events?{urlencode(query)}", headers={}, limits=limits
            ) as response:
                if response.status == 200:
                    _keep_alive(response)
                    async for line in response.content:
                        if line.strip():
                            await self._take(stream, json.loads(line))
                    return
                answer = await self._answered(response)
            if last or not self._learn_time(answer):
                raise self._error(answer)

    async def _take(self, stream: _Stream, event: object) -> None:
        """One line of the stream: a change, a datagram, or the reason why it ends. Raises ValueError."""
        if not isinstance(event, dict):
            raise ValueError("an event is a JSON object")  # noqa: TRY004 - as for every other damage
        if event.get("kind") == "Status":
            raise self._error(_Answer(int(event["code"]), "", event, None))
        if event["type"] == COURIER:
            data = event["data"]
            sender = PublicKey(read_base64url(data["sender"]))
            self._arrived(Couriered(sender, read_base64url(data["datagram"])))
            return
        if event["type"] == BOOKMARK:
            here = Revision(stream.since.registry, int(event["scoperevision"]))
            for watcher in self._watchers:
                watcher.position = max(watcher.position, here)
            return
        kind = Kind(event["data"]["kind"])
        resource = _read(kind, event["data"])
        revision = Revision(stream.since.registry, int(event["scoperevision"]))
        fact = Deleted(resource, revision) if event.get("scopedeleted") else Put(resource, revision)
        stream.passed[kind] = revision.number
        for watcher in tuple(self._watchers):
            if watcher.kind is kind and watcher.position < revision:
                watcher.position = revision
                await watcher.facts.put(fact)

    def _arrived(self, couriered: Couriered) -> None:
        """Keep a datagram for `couriered`, in place of the oldest where too many wait."""
        if self._couriered.full():
            self._couriered.get_nowait()
        self._couriered.put_nowait(couriered)


@dataclass(slots=True, eq=False)
class _Watcher:
    """One watch: what it has been given up to `position`, and what waits for it."""

    kind: Kind
    position: Revision
    facts: asyncio.Queue[Put | Deleted] = field(default_factory=lambda: asyncio.Queue(WAITING_FACTS))
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    error: RegistryError | None = None

    def lose(self, error: RegistryError | None) -> None:
        """The stream is gone: after what waits, raise `error`, or end where there is none."""
        self.error = error
        self.lost.set()

    async def next(self) -> Put | Deleted | None:
        """The next fact; None at the end. Raises RegistryError."""
        if self.facts.empty() and not self.lost.is_set():
            arrived = asyncio.ensure_future(self.facts.get())
            lost = asyncio.ensure_future(self.lost.wait())
            try:
                await asyncio.wait((arrived, lost), return_when=asyncio.FIRST_COMPLETED)
                if arrived.done():
                    return arrived.result()
            finally:
                arrived.cancel()
                lost.cancel()
        if not self.facts.empty():
            return self.facts.get_nowait()
        if self.error is not None:
            raise self.error
        return None


@dataclass(slots=True, eq=False)
class _Stream:
    """The open event stream: from where, and the newest revision of each kind that it brought."""

    since: Revision
    passed: dict[Kind, int]
    task: asyncio.Task[None] | None = None

    def can_feed(self, watcher: _Watcher) -> bool:
        """Whether everything after the watcher's position is still to come."""
        here = watcher.position
        return (
            here.registry == self.since.registry
            and self.since.number <= here.number
            and self.passed.get(watcher.kind, 0) <= here.number
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    """A whole answer; `document` is empty where there was no JSON object."""

    code: int
    registry: str
    document: dict[str, Any]
    retry_after: float | None


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    """Let the kernel find out soon when the connection of a stream leads nowhere any more."""
    transport = response.connection.transport if response.connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


def _path(kind: Kind, name: str | None = None) -> str:
    """The path of a kind, or of one resource. Raises Refused for tokens, which are never served."""
    if kind is Kind.TOKEN:
        raise Refused("join tokens are not read over HTTP: make them with `scopectl token create`")
    return f"{API}/{resources.PLURALS[kind]}" + (f"/{quote(name, safe='')}" if name is not None else "")


def _condition(name: str, uid: str, if_revision: int | None) -> dict[str, object]:
    """Metadata that names what a write is about."""
    condition = {} if if_revision is None else {"resourceVersion": str(if_revision)}
    return {"name": name, "uid": uid, **condition}


def _projected(path: str) -> str:
    """The token in a projected volume, read for each request: its kubelet replaces it before it expires.

    Raises Unavailable.
    """
    try:
        with Path(path).open("rb") as file:
            token = file.read(MAX_TOKEN + 1).strip()
    except OSError as error:
        raise Unavailable(
            f"cannot read the ServiceAccount token {path}: {error.strerror}; is the projected volume "
            "mounted there?"
        ) from None
    if not token or len(token) > MAX_TOKEN or not token.isascii():
        raise Unavailable(f"{path} holds no ServiceAccount token: is it the projected volume's?")
    return token.decode()


def _encoded(body: Mapping[str, object] | bytes | None) -> tuple[bytes, dict[str, str]]:
    match body:
        case None:
            return b"", {}
        case bytes():
            return body, {"Content-Type": "application/octet-stream"}
        case _:
            return json.dumps(body, separators=(",", ":")).encode(), {"Content-Type": "application/json"}


def _read(kind: Kind, document: object) -> Resource:
    """A resource, perhaps of a newer registry. Raises ValueError."""
    try:
        resource = resources.parse(document, ignore_unknown=True)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    if kind_of(resource) is not kind:
        raise ValueError(f"a {kind_of(resource)} instead of a {kind}")
    return resource


def _later(message: str, retry_after: float | None) -> Unavailable:
    text = message if retry_after is None else f"{message} (in {retry_after:.0f} s)"
    return Unavailable(text, retry_after=retry_after)
