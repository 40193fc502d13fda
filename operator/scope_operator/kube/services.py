"""Exported Services, as the elected replica keeps them: its cluster's in the registry, others' here.

What kopf tells is a hint that something about one Service may have changed. Whatever is then decided, is
decided from the Service and its EndpointSlices as the API server has them at that moment, and from the
records of the registry, so a replica that was killed in between, or a change that was missed, leaves nothing
behind that the next look does not see. Everything is looked at when a replica is elected, whenever kopf
listed anew, and now and then.

A record that a list of the registry lacks may be one that a registry restored from a backup has lost, and its
cluster writes it again within seconds. So a Service goes when the deletion of its record was told, or when
the record is still missing ABSENCE_SECONDS later; and never while the registry is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from scope.model import Kind, Mesh, Service
from scope.names import imported_name, service_name
from scope.registry.follow import backoff, follow
from scope.registry.kube.client import MERGE, KubeClient, Object
from scope.registry.port import (
    Deleted,
    Disconnected,
    Fact,
    Listed,
    NotFound,
    Put,
    Refused,
    Registry,
    RegistryError,
)
from scope_operator.clusters import find_cluster
from scope_operator.kube.news import About, News
from scope_operator.kube.service_objects import (
    OWNER_LABEL,
    SERVICES,
    NamespaceHeard,
    ServiceHeard,
    ServiceNews,
    SliceHeard,
    endpoints_list,
    ports_list,
    read_backends,
    read_held,
    read_held_slices,
    read_local,
    service_document,
    service_news,
    service_path,
    services_path,
    slice_document,
    slice_path,
    slices_path,
)
from scope_operator.kube.watching import ServicesHeard
from scope_operator.plan.exports import (
    Complaint,
    CreateRecord,
    DeleteRecord,
    RecordAction,
    UpdateRecord,
    plan_export,
)
from scope_operator.plan.imports import (
    ChangePorts,
    ChangeSlice,
    CreateService,
    CreateSlice,
    DeleteService,
    DeleteSlice,
    ImportAction,
    plan_import,
)

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.1  # a rollout changes several pods at once: they are one write
PAUSE_SECONDS = 0.4  # between looks at one Service: a record of 100 KB is not written ten times a second
AT_ONCE = 8  # Services that are looked at at a time
SWEEP_SECONDS = (300.0, 600.0)  # between looks at all of them
ABSENCE_SECONDS = 10.0
REFUSED_SECONDS = 60.0  # before what was refused is tried again
PAGE = 500  # Services of a list's page
METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


@dataclass(frozen=True, slots=True)
class Export:
    """A Service of this cluster."""

    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Import:
    """The name under which a Service of another cluster is, or would be, in this one."""

    namespace: str
    name: str


Key: TypeAlias = Export | Import


class Services:
    """For one cluster, `cluster` with that `uid`. `now` is monotonic, `uniform` draws the jitter.

    `registry` may be this cluster's or another's; `tell` posts Events into this cluster.
    """

    def __init__(
        self,
        client: KubeClient,
        registry: Registry,
        *,
        cluster: str,
        uid: str,
        tell: Callable[[News], None],
        now: Callable[[], float],
        uniform: Callable[[float, float], float],
    ) -> None:
        self._client = client
        self._registry = registry
        self._cluster = cluster
        self._uid = uid
        self._tell = tell
        self._now = now
        self._uniform = uniform
        self._runs = False
        self._meshes: dict[str, Mesh] = {}
        self._records: dict[str, Service] = {}  # by name, of all clusters
        self._listed: set[Kind] = set()  # since the registry was last lost
        self._deleted: set[str] = set()  # names of records whose deletion was told
        self._missed: dict[Import, float] = {}  # since when a Service of ours has no record
        self._exported: set[Export] = set()
        self._due: dict[Key, float] = {}
        self._busy: dict[asyncio.Task[None], Key] = {}
        self._rests: dict[Key, float] = {}  # until when a Service is not looked at again
        self._failures: dict[Key, int] = {}
        self._complaints: dict[Key, Complaint] = {}
        self._wake = asyncio.Event()
        self._swept = asyncio.Event()

    @property
    def heard(self) -> ServicesHeard:
        """How a watch tells of Services."""
        return ServicesHeard(self._take, self._swept.set)

    async def run(self) -> None:
        """Keep them until cancelled."""
        self._runs = True
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(Kind.MESH))
                tasks.create_task(self._follow(Kind.SERVICE))
                tasks.create_task(self._sweep())
                tasks.create_task(self._work())
        finally:
            self._runs = False
            for task in self._busy:
                task.cancel()

    # --- what is heard ------------------------------------------------------------------------------------

    def _take(self, news: ServiceNews) -> None:
        """Look again at what a change may concern."""
        if not self._runs:
            return  # who is elected looks at everything
        match news:
            case ServiceHeard(namespace, name, exported, imported):
                self._note(namespace, name, exported=exported, imported=imported)
            case SliceHeard(namespace, name, ours):
                if ours:
                    self._mark(Import(namespace, name))
                elif Export(namespace, name) in self._exported:
                    self._mark(Export(namespace, name))
            case NamespaceHeard(name):
                for key in self._wanted():
                    if key.namespace == name:
                        self._mark(key)
            case _:
                assert_never(news)

    def _note(self, namespace: str, name: str, *, exported: bool, imported: bool) -> None:
        export = Export(namespace, name)
        if exported or export in self._exported:
            self._mark(export)
        if exported:
            self._exported.add(export)
        key = Import(namespace, name)
        if imported or key in self._wanted():
            self._mark(key)

    def _wanted(self) -> dict[Import, list[Service]]:
        """The records of other clusters that are to be here, by what each would be called."""
        found: dict[Import, list[Service]] = {}
        for record in self._records.values():
            spec = record.spec
            mesh = self._own_meshes().get(spec.mesh)
            if mesh is None or spec.cluster == self._cluster or find_cluster(mesh, spec.cluster) is None:
                continue
            found.setdefault(_key_of(record), []).append(record)
        return found

    def _own_meshes(self) -> dict[str, Mesh]:
        """The meshes that this very cluster is in."""
        return {
            name: mesh
            for name, mesh in self._meshes.items()
            if (own := find_cluster(mesh, self._cluster)) is not None and own.uid == self._uid
        }

    async def _follow(self, kind: Kind) -> None:
        async for fact in follow(self._registry, kind, sleep=asyncio.sleep, uniform=self._uniform):
            self._learn(kind, fact)
            self._wake.set()

    def _learn(self, kind: Kind, fact: Fact) -> None:
        match fact:
            case Disconnected(reason):
                log.warning("services.registry_lost kind=%s reason=%s", kind, reason)
                self._listed.discard(kind)
                self._missed.clear()  # absences count while the registry answers
            case Listed(resources=resources, complete=complete):
                if kind is Kind.MESH:
                    self._meshes = {each.meta.name: each for each in resources if isinstance(each, Mesh)}
                else:
                    self._records = {each.meta.name: each for each in resources if isinstance(each, Service)}
                if complete:
                    self._listed.add(kind)
                self._swept.set()
            case Put(Mesh() as mesh):
                before = self._meshes.get(mesh.meta.name)
                self._meshes[mesh.meta.name] = mesh
                if (
                    before is None
                    or before.status.clusters != mesh.status.clusters
                    or before.spec != mesh.spec
                ):
                    self._swept.set()
            case Deleted(Mesh(meta=meta)):
                self._meshes.pop(meta.name, None)
                self._swept.set()
            case Put(Service() as record):
                known = self._records.get(record.meta.name)
                if (
                    known is None or known.meta.revision <= record.meta.revision
                ):  # not older than what we wrote
                    self._records[record.meta.name] = record
                self._deleted.discard(record.meta.name)
                self._mark_record(record)
            case Deleted(Service() as record):
                self._records.pop(record.meta.name, None)
                self._deleted.add(record.meta.name)
                self._mark_record(record)

    def _mark_record(self, record: Service) -> None:
        if record.spec.cluster == self._cluster:
            self._mark(Export(record.spec.namespace, record.spec.service))
        else:
            self._mark(_key_of(record))

    # --- when ---------------------------------------------------------------------------------------------

    def _mark(self, key: Key, *, after: float = SETTLE_SECONDS) -> None:
        due = max(self._now() + after, self._rests.get(key, 0.0))
        self._due[key] = min(due, self._due.get(key, due))
        self._wake.set()

    async def _sweep(self) -> None:
        """Look at all of them: at the start, when told to, and now and then."""
        failures = 0
        while True:
            self._swept.clear()
            try:
                await self._mark_all()
                failures = 0
            except RegistryError as error:
                failures += 1
                log.warning("services.unlisted error=%s", error)
                await asyncio.sleep(backoff(failures, uniform=self._uniform))
                continue
            try:
                async with asyncio.timeout(self._uniform(*SWEEP_SECONDS)):
                    await self._swept.wait()
                    await asyncio.sleep(PAUSE_SECONDS)  # several lists are one look
            except TimeoutError:
                continue

    async def _mark_all(self) -> None:
        """Mark every Service that is exported or imported, and every record. Raises RegistryError."""
        exported: set[Export] = set()
        query = {"limit": str(PAGE)}
        while True:
            page = await self._client.ask("GET", SERVICES, query=query, accept=METADATA)
            for item in page.get("items") or ():
                match service_news({**item, "kind": "Service"}):
                    case ServiceHeard(namespace, name, exported=True):
                        exported.add(Export(namespace, name))
                    case ServiceHeard(namespace, name, imported=True):
                        self._mark(Import(namespace, name))
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                break
            query = {**query, "continue": str(token)}
        for key in exported | self._exported:
            self._mark(key)
        self._exported = exported
        for record in self._records.values():
            self._mark_record(record)

    async def _work(self) -> None:
        while True:
            self._wake.clear()
            now = self._now()
            if {Kind.MESH, Kind.SERVICE} <= self._listed:
                busy = set(self._busy.values())
                ready = [key for key, due in self._due.items() if due <= now and key not in busy]
                for key in ready[: AT_ONCE - len(busy)]:
                    del self._due[key]
                    task = asyncio.create_task(self._look(key))
                    self._busy[task] = key
                    task.add_done_callback(self._looked)
            later = [due for due in self._due.values() if due > now]
            try:
                async with asyncio.timeout(min(later) - now if later else None):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _looked(self, task: asyncio.Task[None]) -> None:
        key, rests = self._busy.pop(task), self._now() + PAUSE_SECONDS
        self._rests = {each: until for each, until in self._rests.items() if until > self._now()} | {
            key: rests
        }
        if key in self._due:  # it changed meanwhile
            self._due[key] = max(self._due[key], rests)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("services.failed key=%s", key, exc_info=error)
            self._mark(key, after=REFUSED_SECONDS)

    async def _look(self, key: Key) -> None:
        """Look at one Service, and do what is to be done."""
        try:
            match key:
                case Export():
                    complaint, subject = await self._keep_export(key)
                case Import():
                    complaint, subject = await self._keep_import(key)
                case _:
                    assert_never(key)
        except Refused as error:
            complaint, subject = Complaint("Refused", str(error)), _about(key)
            self._mark(key, after=REFUSED_SECONDS)
        except RegistryError as error:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            log.info("services.again key=%s error=%s", key, error)
            self._mark(key, after=backoff(failures, uniform=self._uniform))
            return
        self._failures.pop(key, None)
        if complaint is None:
            self._complaints.pop(key, None)
        elif self._complaints.get(key) != complaint:
            self._complaints[key] = complaint
            log.warning(
                "services.complaint key=%s reason=%s message=%s", key, complaint.reason, complaint.message
            )
            self._tell(News(subject, complaint.reason, complaint.message, is_warning=True))

    # --- this cluster's Services --------------------------------------------------------------------------

    async def _keep_export(self, key: Export) -> tuple[Complaint | None, About]:
        document = await self._service(key)
        service = read_local(document) if document is not None else None
        if service is None or service.export is None:
            self._exported.discard(key)
        slices = await self._slices(key) if service is not None and service.export is not None else []
        stored = {
            mesh: self._records.get(service_name(mesh, self._cluster, key.namespace, key.name))
            for mesh in self._own_meshes()
        }
        actions, complaint = plan_export(service, read_backends(slices), cluster=self._cluster, stored=stored)
        for action in actions:
            await self._write(action)
        return complaint, _about(key, uid=service.uid if service is not None else "")

    async def _write(self, action: RecordAction) -> None:
        """Write a record; what is stored is known at once, not only when it is told."""
        match action:
            case CreateRecord(service):
                stored = await self._registry.create(service)
                log.info("service.exported name=%s", service.meta.name)
            case UpdateRecord(service):
                stored = await self._registry.update(service, if_revision=service.meta.revision)
            case DeleteRecord(service):
                await self._registry.delete(Kind.SERVICE, service.meta.name, uid=service.meta.uid)
                self._records.pop(service.meta.name, None)
                log.info("service.withdrawn name=%s", service.meta.name)
                return
            case _:
                assert_never(action)
        known = self._records.get(stored.meta.name)
        if isinstance(stored, Service) and (known is None or known.meta.revision < stored.meta.revision):
            self._records[stored.meta.name] = stored

    # --- other clusters' Services -------------------------------------------------------------------------

    async def _keep_import(self, key: Import) -> tuple[Complaint | None, About]:
        document = await self._service(key)
        held = read_held(document) if document is not None else None
        offers = self._wanted().get(key, ())
        if offers:
            self._missed.pop(key, None)
        if not offers and held is not None and held.source and not self._is_gone(key, held.source):
            return None, _about(key)
        slices = read_held_slices(await self._slices(key))
        plan = plan_import(offers, held, slices, meshes=self._meshes)
        for action in plan.actions:
            try:
                await self._do(action, key)
            except NotFound:
                if isinstance(action, CreateService):
                    spec = action.record.spec
                    message = (
                        f"Service {spec.service} of cluster {spec.cluster} is not offered here, since there "
                        f"is no namespace {key.namespace}: create it"
                    )
                    return Complaint("NamespaceMissing", message), About(
                        "Namespace", key.namespace, "", api_version="v1"
                    )
                raise
            if isinstance(action, CreateService | DeleteService):
                self._mark(key, after=0.0)
        return plan.complaint, _about(key, uid=held.uid if held is not None else "")

    def _is_gone(self, key: Import, source: str) -> bool:
        """Whether to believe that a Service of ours has no record any more; looks again when that is due."""
        if source in self._deleted:
            self._deleted.remove(source)
            self._missed[key] = self._now() - ABSENCE_SECONDS  # also when it takes several attempts
            return True
        since = self._missed.setdefault(key, self._now())
        left = since + ABSENCE_SECONDS - self._now()
        if left > 0:
            self._mark(key, after=left)
        return left <= 0

    async def _do(self, action: ImportAction, key: Import) -> None:
        """Do one thing in this cluster. Raises RegistryError."""
        match action:
            case CreateService(record):
                await self._client.ask("POST", services_path(key.namespace), body=service_document(record))
                log.info("service.imported namespace=%s name=%s", key.namespace, key.name)
            case ChangePorts(uid, ports):
                body: Object = {"metadata": {"uid": uid}, "spec": {"ports": ports_list(ports)}}
                await self._patch(service_path(key.namespace, key.name), body)
            case DeleteService(uid):
                await self._delete(service_path(key.namespace, key.name), uid)
                log.info("service.removed namespace=%s name=%s", key.namespace, key.name)
            case CreateSlice(wanted, owner):
                body = slice_document(wanted, service=key.name, owner=owner)
                await self._client.ask("POST", slices_path(key.namespace), body=body)
            case ChangeSlice(held, endpoints):
                metadata = {"uid": held.uid, "resourceVersion": held.revision}
                body = {"metadata": metadata, "endpoints": endpoints_list(endpoints)}
                await self._patch(slice_path(key.namespace, held.slice.name), body)
            case DeleteSlice(held):
                await self._delete(slice_path(key.namespace, held.slice.name), held.uid)
            case _:
                assert_never(action)

    # --- requests -----------------------------------------------------------------------------------------

    async def _service(self, key: Key) -> Object | None:
        try:
            return await self._client.ask("GET", service_path(key.namespace, key.name))
        except NotFound:
            return None

    async def _slices(self, key: Key) -> Sequence[Object]:
        query = {"labelSelector": f"{OWNER_LABEL}={key.name}"}
        answer = await self._client.ask("GET", slices_path(key.namespace), query=query)
        return answer.get("items") or ()

    async def _patch(self, path: str, body: Object) -> None:
        await self._client.ask("PATCH", path, body=body, content_type=MERGE)

    async def _delete(self, path: str, uid: str) -> None:
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
        try:
            await self._client.ask("DELETE", path, body=options)
        except NotFound:
            return


def _key_of(record: Service) -> Import:
    spec = record.spec
    return Import(spec.namespace, imported_name(spec.service, spec.cluster))


def _about(key: Key, *, uid: str = "") -> About:
    return About("Service", key.name, uid, namespace=key.namespace, api_version="v1")
