"""`scopectl plan`: what applying a file would do, from what the registry holds and peers reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from scope.ctl.errors import CommandError
from scope.ctl.render import table
from scope.model import Kind, Mesh, Meta, Peer
from scope.preview import HubLoad, Loss, Preview, State, changed, preview, state
from scope.registry.port import Registry

SHOWN = 10  # of what is lost, of each kind: what one fixes first; -o json has all


async def foresee(registry: Registry, wanted: Sequence[Mesh | Peer]) -> list[Preview]:
    """What applying `wanted` would do to each mesh that it touches. Raises CommandError, RegistryError."""
    meshes = {
        each.meta.name: each for each in (await registry.list(Kind.MESH)).resources if isinstance(each, Mesh)
    }
    peers = {
        each.meta.name: each for each in (await registry.list(Kind.PEER)).resources if isinstance(each, Peer)
    }
    named = dict.fromkeys(each.spec.mesh if isinstance(each, Peer) else each.meta.name for each in wanted)
    asked = {each.meta.name: each for each in wanted if isinstance(each, Mesh)}
    asked_peers = {each.meta.name: each for each in wanted if isinstance(each, Peer)}
    return [
        _foresee_one(
            name,
            stored=meshes.get(name),
            asked=asked.get(name),
            peers=peers,
            asked_peers=asked_peers,
            others=[mesh for mesh in meshes.values() if mesh.meta.name != name],
        )
        for name in named
    ]


def _foresee_one(
    name: str,
    *,
    stored: Mesh | None,
    asked: Mesh | None,
    peers: dict[str, Peer],
    asked_peers: dict[str, Peer],
    others: Sequence[Mesh],
) -> Preview:
    if stored is None and asked is None:
        raise CommandError(f"there is no mesh {name!r}, and the file has none: put the ScopeMesh into it")
    base = stored if stored is not None else Mesh(Meta(name), asked.spec) if asked is not None else None
    if base is None:
        raise AssertionError(name)
    now: State = state(base, peers.values())
    after = replace(base, spec=asked.spec) if asked is not None else base
    merged = peers | {
        each: replace(peers[each], spec=peer.spec) if each in peers else Peer(Meta(each), peer.spec)
        for each, peer in asked_peers.items()
    }
    found = preview(now, changed(now, mesh=after, peers=merged.values()), others=others)
    return found if stored is not None else replace(found, changes=(f"ScopeMesh {name}: new", *found.changes))


def plan_values(found: Sequence[Preview]) -> list[dict[str, object]]:
    """The plans as plain values, for programs."""
    return [asdict(each) for each in found]


def plan_text(found: Preview, *, color: bool) -> str:
    """A plan for people: paragraphs, each with its lines."""
    counts = (found.links_now, found.links_then, found.made, found.dropped)
    parts = [
        _paragraph(f"Mesh {found.mesh}", found.changes or ("nothing changes: this is what there is",)),
        *([_paragraph("The registry would refuse this", found.refused)] if found.refused else []),
        "Links: {} now, {} then; {} made, {} dropped\n".format(*counts),
        *([_hubs_text(found, color=color)] if found.hubs else []),
        *_losses("Peers that would lose a path", found.paths_lost),
        *_losses("Addresses that would be lost", found.addresses_lost),
        *_losses("Routes that would not be used any more", found.routes_lost),
        *([_paragraph("Mind", found.notes)] if found.notes else []),
    ]
    return "\n".join(parts)


def _hubs_text(found: Preview, *, color: bool) -> str:
    header = ("HUB", "EDGES NOW", "EDGES THEN", "RELAYED NOW", "RELAYED THEN", "")
    text = table(header, [_hub_row(hub) for hub in found.hubs], color=color)
    if not found.undecided:
        return text
    return f"{text}{found.undecided} more edges choose among these by what they measure then\n"


def _hub_row(load: HubLoad) -> tuple[str, ...]:
    numbers = (load.edges_now, load.edges_then, load.pairs_now, load.pairs_then)
    note = "new" if load.is_new else "hub no more" if load.goes else ""
    return (load.hub, *map(str, numbers), note)


def _losses(title: str, losses: Sequence[Loss]) -> list[str]:
    if not losses:
        return []
    more = len(losses) - SHOWN
    lines = [f"{loss.peer} loses {loss.what}" for loss in losses[:SHOWN]]
    return [_paragraph(f"{title}: {len(losses)}", [*lines, *([f"and {more} more"] if more > 0 else [])])]


def _paragraph(title: str, lines: Sequence[str]) -> str:
    return "".join([f"{title}\n", *(f"  {line}\n" for line in lines)])
