"""What scopectl asks of a registry: each function is one command over an open connection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from difflib import get_close_matches

from scope.ctl.errors import CommandError
from scope.ctl.files import Admin
from scope.join import JoinString
from scope.model import CandidateKind, Kind, Mesh, Meta, Peer, Role, kind_of
from scope.registry.http import HttpRegistry
from scope.registry.port import AlreadyExists, Conflict, NotFound, Registry, RegistryError, Unavailable
from scope.resources import PLURALS


@asynccontextmanager
async def connected(admin: Admin) -> AsyncIterator[HttpRegistry]:
    """The registry of an `admin.json`; its errors become the command's. Raises CommandError."""
    try:
        async with HttpRegistry(admin.url, pin=admin.pin, credential=admin.credential) as registry:
            yield registry
    except Unavailable as error:
        raise CommandError(
            f"{error}; `systemctl status scope-registry` on its machine says whether it runs"
        ) from None
    except RegistryError as error:
        raise CommandError(str(error)) from None


async def apply(registry: Registry, wanted: Sequence[Mesh | Peer], *, say: Callable[[str], None]) -> None:
    """Create or update each resource, telling what became of it. Raises CommandError when any failed."""
    failures = []
    for resource in wanted:
        name = full_name(resource)
        try:
            say(f"{name} {await _apply_one(registry, resource)}")
        except Conflict:
            failures.append(
                f"{name}: somebody changed it just now: look at it with `scopectl get`, then apply again"
            )
        except (RegistryError, CommandError) as error:
            failures.append(f"{name}: {error}")
    if failures:
        raise CommandError("\n".join(failures))


async def fetch(registry: Registry, kind: Kind, *, name: str | None, mesh: str | None) -> list[Mesh | Peer]:
    """One by name, or all of a kind, perhaps of one mesh only. Raises CommandError, RegistryError."""
    if name is not None:
        return [await find(registry, kind, name)]
    listed = await registry.list(kind)
    found = [resource for resource in listed.resources if isinstance(resource, Mesh | Peer)]
    return [resource for resource in found if mesh is None or _mesh_of(resource) == mesh]


async def find(registry: Registry, kind: Kind, name: str) -> Mesh | Peer:
    """One by name; where there is none, the error names what there is. Raises CommandError, RegistryError."""
    try:
        resource = await registry.get(kind, name)
    except NotFound:
        names = sorted(resource.meta.name for resource in (await registry.list(kind)).resources)
        raise CommandError(_unknown(kind, name, names)) from None
    if isinstance(resource, Mesh | Peer):
        return resource
    raise CommandError(f"the registry answered with a {kind_of(resource)}: update scopectl")


async def remove_peer(registry: HttpRegistry, name: str) -> str:
    """Remove a peer for good, by a tombstone. Raises CommandError, RegistryError."""
    peer = await find(registry, Kind.PEER, name)
    await registry.remove_peer(name, uid=peer.meta.uid)
    return (
        f"{full_name(peer)} removed: peers that hear of it cut it off at once; "
        "to come back it must leave and join with a new token"
    )


async def remove_cluster(registry: HttpRegistry, name: str, *, mesh: str) -> str:
    """Take a joined cluster out of a mesh. Raises CommandError, RegistryError."""
    found = await find(registry, Kind.MESH, mesh)
    joined = [each.name for each in found.status.clusters] if isinstance(found, Mesh) else []
    if name not in joined:
        there = ", ".join(joined) or "none"
        raise CommandError(f"there is no cluster {name!r} in mesh {mesh}; there is {there}")
    await registry.remove_cluster(mesh, name)
    return f"cluster/{name} removed from mesh {mesh}: to come back it joins with a new token"


async def delete_mesh(registry: Registry, name: str) -> str:
    """Delete a mesh. Raises CommandError, RegistryError."""
    mesh = await find(registry, Kind.MESH, name)
    await registry.delete(Kind.MESH, name, uid=mesh.meta.uid)
    return f"{full_name(mesh)} deleted"


async def create_token(
    registry: HttpRegistry, *, mesh: str, ttl: float, single_use: bool, role: Role, hub: str | None = None
) -> str:
    """A fresh join string, checked; with `hub` one that leads to that peer's carrier.

    Raises CommandError, ConfigError, RegistryError.
    """
    way = _way_to(await find(registry, Kind.PEER, hub), mesh) if hub is not None else None
    try:
        text = await registry.create_token(mesh, role=role, lifetime=ttl, single_use=single_use)
    except NotFound:
        await find(registry, Kind.MESH, mesh)
        raise
    found = JoinString.parse(text)
    return (replace(found, url=way[0], pin=way[1]) if way is not None else found).format()


def _way_to(hub: Mesh | Peer, mesh: str) -> tuple[str, bytes]:
    """URL and pin of a hub's carrier, which leads to the registry. Raises CommandError."""
    name = hub.meta.name
    report = hub.report if isinstance(hub, Peer) else None
    carrier = report.relay.carrier if report is not None and report.relay is not None else None
    if not isinstance(hub, Peer) or report is None or carrier is None:
        raise CommandError(
            f"{name} carries nobody: it is no hub, or spec.hubs.carrierPort of {mesh} is 0; "
            "`scopectl get peers` shows which peers are hubs"
        )
    if carrier.reason:
        raise CommandError(f"{name} carries nobody: {carrier.reason}")
    kinds = (CandidateKind.STATIC, CandidateKind.REFLEXIVE, CandidateKind.HOST)
    endpoints = list(hub.spec.endpoints)
    endpoints += [each.endpoint for kind in kinds for each in report.endpoints if each.kind is kind]
    if not endpoints:
        raise CommandError(f"{name} publishes no address: give its public one in spec.endpoints")
    address = endpoints[0].address
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"https://{host}:{carrier.port}", carrier.pin


def full_name(resource: Mesh | Peer) -> str:
    """The kind and name of a resource, as kubectl prints them."""
    return f"{str(kind_of(resource)).lower()}/{resource.meta.name}"


async def _apply_one(registry: Registry, wanted: Mesh | Peer) -> str:
    kind, name = kind_of(wanted), wanted.meta.name
    try:
        stored = await registry.get(kind, name)
    except NotFound:
        try:
            await registry.create(_bare(wanted))
        except AlreadyExists:
            raise Conflict(f"{name} appeared meanwhile") from None
        return "created"
    if wanted.meta.uid not in ("", stored.meta.uid):
        raise CommandError(
            f"the file is of another one of that name (its uid {wanted.meta.uid}, in the registry "
            f"{stored.meta.uid}): take metadata.uid out of the file to change the one in the registry"
        )
    match wanted, stored:
        case (Mesh(), Mesh()):
            changed: Mesh | Peer = replace(stored, spec=wanted.spec)
        case (Peer(), Peer()):
            changed = replace(stored, spec=wanted.spec)
        case _:
            raise CommandError(f"the registry answered with a {kind_of(stored)}: update scopectl")
    if changed == stored:
        return "unchanged"
    await registry.update(changed, if_revision=stored.meta.revision)
    return "configured"


def _bare(resource: Mesh | Peer) -> Mesh | Peer:
    """What a file asks for, without the status and bookkeeping it may have been copied with."""
    match resource:
        case Mesh(meta, spec):
            return Mesh(Meta(meta.name), spec)
        case Peer(meta, peer_spec):
            return Peer(Meta(meta.name), peer_spec)


def _mesh_of(resource: Mesh | Peer) -> str:
    return resource.spec.mesh if isinstance(resource, Peer) else resource.meta.name


def _unknown(kind: Kind, name: str, names: Sequence[str]) -> str:
    ends = [known for known in names if known.rpartition(".")[2] == name]
    close = ends or get_close_matches(name, names, n=3)
    meant = (
        f"did you mean {' or '.join(close)}?"
        if close
        else f"`scopectl get {_word(kind)}` lists what there is"
    )
    return f"there is no {kind} {name!r}: {meant}"


def _word(kind: Kind) -> str:
    return PLURALS[kind].removeprefix("scope")
