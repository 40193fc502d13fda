"""Every change of meshes, peers and exported Services, kept for a while, and the streams that read it.

One feed follows the registry for all streams: it lists, watches each kind, turns each change into one
event (the type needs the state before, which the feed keeps) and holds the newest in memory. A stream is a
cursor into them, so a slow reader costs no memory: once what it has not read is no longer kept it is told
to list again. An agent's stream leaves out what agents do not act on (`scope.projection`), and says at times
how far it is. Exported Services are told to who asks for them. Each stream besides has a short queue of
sealed datagrams that the courier brings.

In-process registries wake all watches in one pass of the event loop, and the feed takes all that has arrived
before it appends, in the order of revisions: a reader may resume from the last revision that it saw.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice

from scope.admission import Refusal
from scope.model import Cluster, Kind, Mesh, Peer, PublicKey, Revision, Service
from scope.registry.port import Deleted, Gone, Put, Registry, RegistryError, Unavailable
from scope_operator.clusters import is_same_holder
from scope_operator.gateway.events import Event, bookmark_line, courier_line, event_of

log = logging.getLogger(__name__)

RELIST_SECONDS = 1.0  # between attempts to follow a registry that fails
COURIER_QUEUE = 64  # datagrams that wait for one stream: half a second of a hundred peers calling
HISTORY_BYTES = (
    64 * 1024 * 1024
)  # of events: as many as `backlog` of peers, fewer of Services with 100 KB each
TAKE = 256  # events written at once, so that a long replay does not starve the loop


@dataclass(slots=True, eq=False)
class Stream:
    """One reader: a peer, a joined cluster's operator, or an administrator; of one mesh, or of all (None)."""

    peer: Peer | None
    mesh: str | None
    since: int
    cursor: int
    cluster: Cluster | None = None
    for_agent: bool = False  # leave out what an agent does not act on
    services: bool = False  # tell of exported Services
    told: int = 0  # the revision that its reader knows to have reached
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    datagrams: deque[bytes] = field(default_factory=deque)
    ended: Refusal | None = None

    @property
    def name(self) -> str:
        """Who reads, for the log."""
        if self.cluster is not None:
            return f"cluster {self.cluster.name}"
        return self.peer.meta.name if self.peer is not None else "administrator"

    @property
    def owner(self) -> str | None:
        """Who has no other stream; None for an administrator, who may have several."""
        if self.cluster is not None and self.mesh is not None:
            return owner_of_cluster(self.mesh, self.cluster.name)
        return self.peer.meta.uid if self.peer is not None else None

    def end(self, reason: Refusal) -> None:
        """Nothing more is sent but `reason`."""
        self.ended = self.ended or reason
        self.wake.set()


class Feed:
    """Follows `registry`; `wall` is the wall clock. `run` until cancelled."""

    def __init__(self, registry: Registry, *, backlog: int, wall: Callable[[], float]) -> None:
        self.peers: dict[str, Peer] = {}
        self.meshes: dict[str, Mesh] = {}
        self.ready = asyncio.Event()
        self._registry = registry
        self._backlog = backlog
        self._wall = wall
        self._registry_id = ""
        self._base = 0  # everything after this revision is kept
        self._newest = 0
        self._history: deque[Event] = deque()
        self._history_bytes = 0
        self._first = 0  # the position of the oldest kept event among all there were
        self._streams: set[Stream] = set()
        self._owned: dict[str, Stream] = {}
        self._of_probe: dict[tuple[str | None, PublicKey], Stream] = {}
        self._couriered = 0
        self.changed = asyncio.Event()  # set, and replaced, at the next change

    async def run(self) -> None:
        """List and watch, again and again."""
        while True:
            try:
                overtaken = await self._follow()
            except RegistryError as error:
                log.warning("registry.lost reason=%s", error)
                overtaken = False
            self.ready.clear()
            self._end_all(Refusal(410, "Expired", "the gateway lost track of its registry: list again"))
            if not overtaken:
                await asyncio.sleep(RELIST_SECONDS)

    async def _follow(self) -> bool:
        """List and watch until a watch ends. True: changes came faster than they were read."""
        meshes = await self._registry.list(Kind.MESH)
        peers = await self._registry.list(Kind.PEER)
        services = await self._registry.list(Kind.SERVICE)
        self._registry_id = peers.revision.registry
        self.meshes = {mesh.meta.name: mesh for mesh in meshes.resources if isinstance(mesh, Mesh)}
        self.peers = {peer.meta.name: peer for peer in peers.resources if isinstance(peer, Peer)}
        self._first += len(self._history)
        self._history.clear()
        self._history_bytes = 0
        self._base = self._newest = services.revision.number
        arrived: asyncio.Queue[Put | Deleted | None] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            watches = [
                group.create_task(self._watch(Kind.MESH, meshes.revision, arrived)),
                group.create_task(self._watch(Kind.PEER, peers.revision, arrived)),
                group.create_task(self._watch(Kind.SERVICE, services.revision, arrived)),
            ]
            self.ready.set()
            while (first := await arrived.get()) is not None:
                batch = [first]
                while not arrived.empty() and (more := arrived.get_nowait()) is not None:
                    batch.append(more)
                for change in sorted(batch, key=lambda change: change.revision.number):
                    self._append(change)
            for watch in watches:
                watch.cancel()
        return any(not watch.cancelled() and watch.result() for watch in watches)

    async def _watch(self, kind: Kind, since: Revision, arrived: asyncio.Queue[Put | Deleted | None]) -> bool:
        """Put every change into `arrived`, and None at the end; whether the watch was overtaken."""
        try:
            async for change in self._registry.watch(kind, since):
                arrived.put_nowait(change)
        except RegistryError as error:
            log.warning("registry.watch_ended kind=%s reason=%s", kind, error)
            return isinstance(error, Gone)
        finally:
            arrived.put_nowait(None)
        return False

    def _append(self, change: Put | Deleted) -> None:
        resource = change.last if isinstance(change, Deleted) else change.resource
        before: Peer | Mesh | None = None
        if isinstance(resource, Peer):
            before = self.peers.pop(resource.meta.name, None)
            if isinstance(change, Put):
                self.peers[resource.meta.name] = resource
                self._rename(resource)
        elif isinstance(resource, Mesh):
            before = self.meshes.pop(resource.meta.name, None)
            if isinstance(change, Put):
                self.meshes[resource.meta.name] = resource
            self._end_untrusted(resource)
        elif not isinstance(resource, Service):
            return
        self._newest = change.revision.number
        event = event_of(change, before, time=self._time())
        self._history.append(event)
        self._history_bytes += len(event.line)
        while self._is_overfull():
            oldest = self._history.popleft()
            self._history_bytes -= len(oldest.line)
            self._base = oldest.revision
            self._first += 1
        for stream in self._streams:
            stream.wake.set()
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def _is_overfull(self) -> bool:
        """The newest event stays, however large: who watches has to hear of it."""
        kept = len(self._history)
        return kept > self._backlog or (kept > 1 and self._history_bytes > HISTORY_BYTES)

    # --- streams ------------------------------------------------------------------------------------------

    async def open(
        self,
        peer: Peer | None,
        mesh: str | None,
        since: Revision,
        *,
        cluster: Cluster | None = None,
        for_agent: bool = False,
        services: bool = False,
    ) -> Stream:
        """A stream of what changed in `mesh` (None: in all) after `since`, for `peer`, for the operator of
        `cluster`, which sees of the peers its own, or for an administrator.

        `for_agent`: of what an agent acts on, and of all that concerns `peer` itself; `services`: of exported
        Services too. An older stream of the
        same peer or cluster ends. Raises Gone, Unavailable.
        """
        if not self.ready.is_set():
            raise Unavailable("the gateway is reading its registry: try again in a second")
        if since.registry != self._registry_id:
            raise Gone(
                f"revision {since.number} is of registry {since.registry}, this is {self._registry_id}: "
                "list again"
            )
        if since.number < self._base:
            raise Gone(
                f"changes up to revision {self._base} are no longer kept: list again, then watch from there"
            )
        if since.number > self._newest:
            newest = (await self._registry.list(Kind.MESH)).revision.number
            if since.number > newest:
                raise Gone(f"revision {since.number} is newer than the newest, {newest}: list again")
        stream = Stream(
            peer,
            mesh,
            since.number,
            self._first,
            cluster=cluster,
            for_agent=for_agent,
            services=services,
            told=since.number,
        )
        owner = stream.owner
        older = self._owned.get(owner) if owner is not None else None
        if older is not None:
            who = "cluster" if older.cluster is not None else "peer"
            older.end(Refusal(409, "Conflict", f"a newer stream of the same {who} took this one's place"))
            self.close(older)
        self._streams.add(stream)
        if owner is not None:
            self._owned[owner] = stream
        if peer is not None and peer.report is not None:
            self._of_probe[mesh, peer.report.keys.probe] = stream
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream; once more does nothing."""
        self._streams.discard(stream)
        owner, peer = stream.owner, stream.peer
        if owner is None or self._owned.get(owner) is not stream:
            return
        del self._owned[owner]
        if peer is not None and peer.report is not None:
            self._of_probe.pop((stream.mesh, peer.report.keys.probe), None)

    def _rename(self, peer: Peer) -> None:
        """Let the courier find the peer's stream by the probe key that it has now."""
        stream = self._owned.get(peer.meta.uid)
        if stream is None or stream.peer is None or stream.peer.report == peer.report:
            return
        if stream.peer.report is not None:
            self._of_probe.pop((stream.mesh, stream.peer.report.keys.probe), None)
        if peer.report is not None:
            self._of_probe[stream.mesh, peer.report.keys.probe] = stream
        stream.peer = peer

    def _end_untrusted(self, mesh: Mesh) -> None:
        """End the streams of clusters that the mesh trusts no more, or under another key."""
        known = self.meshes.get(mesh.meta.name)
        trusted = {each.name: each for each in known.status.clusters} if known is not None else {}
        for stream in self._owned.values():
            if stream.cluster is None or stream.mesh != mesh.meta.name:
                continue
            now = trusted.get(stream.cluster.name)
            if now is None or not is_same_holder(now, stream.cluster):
                stream.end(
                    Refusal(
                        401,
                        "Unauthorized",
                        f"cluster {stream.cluster.name!r} was removed from mesh {stream.mesh!r}, or joined "
                        "anew: its operator joins with a token",
                    )
                )

    def take(self, stream: Stream) -> list[bytes]:
        """The next lines of a stream, none when it has read all. Sets `ended` where these are the last."""
        lines = list(stream.datagrams)
        stream.datagrams.clear()
        if stream.ended is not None:
            return lines
        if stream.cursor < self._first and stream.since < self._base:
            stream.ended = Refusal(410, "Expired", "this stream was read too slowly: list again, then watch")
            return lines
        skipped = max(0, stream.cursor - self._first)
        for event in islice(self._history, skipped, skipped + TAKE):
            skipped += 1
            if event.revision <= stream.since:
                continue
            line = _line_for(stream, event)
            if line is not None:
                lines.append(line)
                stream.told = event.revision
            if event.removes and stream.peer is not None and event.uid == stream.peer.meta.uid:
                stream.ended = removed(event.name)
                break
        stream.cursor = self._first + skipped
        if stream.cursor < self._first + len(self._history):
            stream.wake.set()
        return lines

    def bookmark(self, stream: Stream) -> bytes | None:
        """The line that tells how far an agent's stream is; None where its last line told that."""
        if not stream.for_agent or stream.cursor < self._first + len(self._history):
            return None  # what is left out of an administrator's stream is another mesh's
        if stream.told >= self._newest:
            return None
        stream.told = self._newest
        return bookmark_line(self._registry_id, self._newest, time=self._time())

    def counts(self) -> tuple[int, int]:
        """How many streams are open: of peers and joined clusters, of administrators."""
        return len(self._owned), len(self._streams) - len(self._owned)

    def has_stream(self, owner: str) -> bool:
        """Whether this owner (a peer's uid, `owner_of_cluster`) has a stream that a new one would replace."""
        return owner in self._owned

    def end_all(self) -> None:
        """The gateway stops."""
        self._end_all(Refusal(503, "ServiceUnavailable", "the gateway is stopping: connect again"))

    def _end_all(self, reason: Refusal) -> None:
        for stream in self._streams:
            stream.end(reason)

    # --- the courier and joins ----------------------------------------------------------------------------

    def carry(self, mesh: str, *, sender: PublicKey, to: PublicKey, datagram: bytes) -> bool:
        """Bring a sealed datagram to the stream of the peer with probe key `to`. False: it has none.

        Raises Refusal when too many wait for it.
        """
        stream = self._of_probe.get((mesh, to))
        if stream is None or stream.ended is not None:
            return False
        if len(stream.datagrams) >= COURIER_QUEUE:
            raise Refusal(429, "TooManyRequests", "too many datagrams wait for that peer", retry_after=1.0)
        self._couriered += 1
        line = courier_line(self._registry_id, sender, datagram, number=self._couriered, time=self._time())
        stream.datagrams.append(line)
        stream.wake.set()
        return True

    def _time(self) -> str:
        """The wall clock in RFC 3339."""
        return (
            datetime.fromtimestamp(self._wall(), UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )

    async def settled(self, name: str, uid: str, *, seconds: float) -> Peer | None:
        """The peer once it has an address, or was denied one, or `seconds` have passed; None: unknown."""
        try:
            async with asyncio.timeout(seconds):
                while not (
                    (peer := self.peers.get(name))
                    and peer.meta.uid == uid
                    and (peer.assignment.addresses or peer.assignment.conditions)
                ):
                    await self.changed.wait()
        except TimeoutError:
            pass
        peer = self.peers.get(name)
        return peer if peer is not None and peer.meta.uid == uid else None


def _line_for(stream: Stream, event: Event) -> bytes | None:
    """What the reader is told of a change; None: nothing."""
    if stream.mesh is not None and event.mesh != stream.mesh:
        return None
    if event.kind is Kind.SERVICE and not stream.services:
        return None
    if stream.cluster is not None and event.kind is Kind.PEER and event.cluster != stream.cluster.name:
        return None
    is_own = stream.peer is not None and event.uid == stream.peer.meta.uid
    return event.agent_line if stream.for_agent and not is_own else event.line


def owner_of_cluster(mesh: str, name: str) -> str:
    """The owner of the stream of a joined cluster's operator; no uid has a space."""
    return f"cluster {mesh}/{name}"


def removed(name: str) -> Refusal:
    """What a removed peer is told."""
    return Refusal(
        403,
        "PeerRemoved",
        f"ScopePeer {name!r} was removed from its mesh; to come back: `scope-agent leave`, then join "
        "with a new token",
    )
