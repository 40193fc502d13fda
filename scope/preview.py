"""What a change of a mesh would do, before it is applied.

    a mesh and its peers, as they are and as they are to be -> preview

Which links are made and dropped follows from roles and topology alone. Who would lose the way, and how many
edges a hub would have, is read from what agents reported: of each peer the registry has its 16 most telling
links at most. So whoever is named has a reason that somebody measured, and what nobody measured is counted as
such.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from scope import model
from scope.model import HubMode, IPNetwork, Link, Mesh, MeshSpec, PathKind, Peer, Role, TopologyMode
from scope.resources import overlapping, prefixes_of, to_dict
from scope.resources.hubs import hubs_dict
from scope.topology import RefusalReason, offered, settle


@dataclass(frozen=True)
class State:
    """A mesh and its peers, the removed ones left out: as it is, or as it is to be."""

    mesh: Mesh
    peers: tuple[Peer, ...]
    hubs: frozenset[str]  # names of ScopePeers

    @property
    def spec(self) -> MeshSpec:
        """What is asked of the mesh."""
        return self.mesh.spec

    @property
    def is_tree(self) -> bool:
        """Whether edges have links to hubs alone: without a hub they keep the others."""
        return self.spec.topology is TopologyMode.TREE and bool(self.hubs)

    @cached_property
    def by_name(self) -> Mapping[str, Peer]:
        """The peers by their names."""
        return {peer.meta.name: peer for peer in self.peers}

    @cached_property
    def edges(self) -> tuple[Peer, ...]:
        """The peers that are no hubs."""
        return tuple(peer for peer in self.peers if peer.meta.name not in self.hubs)

    @cached_property
    def links(self) -> Mapping[tuple[str, str], Link]:
        """What peers report of each other, by the names of a pair in order; the worse of two reports."""
        found: dict[tuple[str, str], Link] = {}
        for peer in self.peers:
            for link in peer.report.links if peer.report is not None else ():
                pair = _pair(peer.meta.name, link.peer)
                known = found.get(pair)
                if link.peer in self.by_name and (known is None or _RANKS[link.path] > _RANKS[known.path]):
                    found[pair] = link
        return found


_RANKS = {PathKind.DIRECT: 0, PathKind.RELAYED: 1, PathKind.NONE: 2}


@dataclass(frozen=True, slots=True)
class HubLoad:
    """What a hub carries. `edges_then` counts those that are known to choose it."""

    hub: str
    edges_now: int
    edges_then: int
    pairs_now: int  # relayed by it, as far as reports name them
    pairs_then: int
    is_new: bool = False
    goes: bool = False  # it would be no hub any more


@dataclass(frozen=True, slots=True)
class Loss:
    """Something that a peer would lose, and why."""

    peer: str
    what: str


@dataclass(frozen=True, slots=True)
class Preview:
    """What a change would do. Links are pairs of peers, each counted once."""

    mesh: str
    changes: tuple[str, ...]  # fields, with what they are and what they are to be
    refused: tuple[str, ...]  # why the registry would not take it
    links_now: int
    links_then: int
    made: int
    dropped: int
    hubs: tuple[HubLoad, ...]
    undecided: int  # edges of a tree that choose their hub by what they are yet to measure
    paths_lost: tuple[Loss, ...]
    addresses_lost: tuple[Loss, ...]
    routes_lost: tuple[Loss, ...]
    notes: tuple[str, ...]


def state(mesh: Mesh, peers: Iterable[Peer]) -> State:
    """The mesh as it is, with its hubs as the registry assigned them."""
    members = _members(mesh, peers)
    return State(
        mesh, members, frozenset(peer.meta.name for peer in members if peer.assignment.role is Role.HUB)
    )


def changed(now: State, *, mesh: Mesh, peers: Iterable[Peer]) -> State:
    """The mesh as it is to be: hubs are whom specs name, and those that are ones and stay it."""
    members = _members(mesh, peers)
    hubs = frozenset(peer.meta.name for peer in members if _would_be_hub(peer, now, mesh))
    return State(mesh, members, hubs or _kept(members, now, mesh))


def preview(now: State, then: State, *, others: Sequence[Mesh] = ()) -> Preview:
    """What the change from one to the other would do; `others` are the registry's other meshes."""
    made, dropped = _made_and_dropped(now, then)
    places, undecided = _attached(then) if then.is_tree else ({}, 0)
    return Preview(
        mesh=then.mesh.meta.name,
        changes=tuple(_changes(now, then)),
        refused=tuple(str(problem) for problem in overlapping(then.mesh, others)),
        links_now=_count(now),
        links_then=_count(then),
        made=made,
        dropped=dropped,
        hubs=tuple(_loads(now, then, places)),
        undecided=undecided,
        paths_lost=tuple(_paths_lost(now, then)),
        addresses_lost=tuple(_addresses_lost(then)),
        routes_lost=tuple(_routes_lost(now, then)),
        notes=tuple(_notes(now, then)),
    )


# --- roles --------------------------------------------------------------------------------------------------


def _members(mesh: Mesh, peers: Iterable[Peer]) -> tuple[Peer, ...]:
    named = mesh.meta.name
    found = (peer for peer in peers if peer.spec.mesh == named and peer.assignment.tombstone is None)
    return tuple(sorted(found, key=lambda peer: peer.meta.name))


def _would_be_hub(peer: Peer, now: State, mesh: Mesh) -> bool:
    hubs, before = mesh.spec.hubs, now.spec.hubs
    if peer.spec.role is Role.EDGE:
        return False
    if peer.spec.role is Role.HUB or peer.meta.name in hubs.names:
        return True
    earlier = now.by_name.get(peer.meta.name)
    was_asked = earlier is not None and (earlier.spec.role is Role.HUB or earlier.meta.name in before.names)
    if peer.meta.name not in now.hubs or was_asked:
        return False
    is_selected = bool(peer.spec.node_name) and hubs.selector is not None and hubs.selector == before.selector
    return is_selected or hubs.mode is HubMode.AUTO


def _kept(members: Iterable[Peer], now: State, mesh: Mesh) -> frozenset[str]:
    """Who stays a hub because nobody else would be one, in a mesh that needs some."""
    hubs = mesh.spec.hubs
    if mesh.spec.topology is not TopologyMode.TREE and not hubs.names and hubs.selector is None:
        return frozenset()
    return frozenset(peer.meta.name for peer in members if peer.spec.role is not Role.EDGE) & now.hubs


# --- links --------------------------------------------------------------------------------------------------


def _count(state: State) -> int:
    peers, edges = len(state.peers), len(state.edges)
    return _pairs(peers) - (_pairs(edges) if state.is_tree else 0)


def _made_and_dropped(now: State, then: State) -> tuple[int, int]:
    """How many pairs have a link only then, and only now.

    Pairs without a link are those of two edges of a tree, so nobody need look at each of fifty million.
    """
    stay = now.by_name.keys() & then.by_name.keys()
    apart_now = {peer.meta.name for peer in now.edges if now.is_tree} & stay
    apart_then = {peer.meta.name for peer in then.edges if then.is_tree} & stay
    both = _pairs(len(apart_now & apart_then))
    made = _pairs(len(apart_now)) - both
    dropped = _pairs(len(apart_then)) - both
    linked_of_stay_now = _pairs(len(stay)) - _pairs(len(apart_now))
    linked_of_stay_then = _pairs(len(stay)) - _pairs(len(apart_then))
    return made + _count(then) - linked_of_stay_then, dropped + _count(now) - linked_of_stay_now


def _pairs(peers: int) -> int:
    return peers * (peers - 1) // 2


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


# --- who loses the way --------------------------------------------------------------------------------------


def _obstacle(then: State, edge: Peer, hub: str) -> str | None:
    """Why the edge would not reach the hub, in words; None where nothing is known to be in the way."""
    if not then.by_name[hub].assignment.online:
        return f"{hub} is offline"
    link = then.links.get(_pair(edge.meta.name, hub))
    if link is None or link.path is PathKind.DIRECT:
        return None
    if link.path is PathKind.NONE:
        return f"no path to {hub} ({link.reason or 'nobody says why'})"
    if link.hub not in then.hubs:
        return f"{hub} is reached by {link.hub or 'a relay'}, which would be no hub"
    return None


def _paths_lost(now: State, then: State) -> Iterator[Loss]:
    if then.is_tree:
        cut_off_now = {peer for peer, _ in _cut_off(now)} if now.is_tree else set()
        for edge, obstacles in _cut_off(then):
            if edge not in cut_off_now:
                yield Loss(edge, f"everybody: {obstacles}")
        return
    had_hubs, have_hubs = (
        any(each.by_name[hub].assignment.online for hub in each.hubs) for each in (now, then)
    )
    if have_hubs or not had_hubs:
        return  # pairs move to another hub, and need one only where they find no direct path
    for (one, other), link in sorted(then.links.items()):
        if link.path is PathKind.RELAYED:
            why = f" ({link.reason})" if link.reason else ""
            yield Loss(one, f"{other}: relayed by {link.hub or 'a hub'}, and no hub would be online{why}")
    hidden = [peer.meta.name for peer in then.peers if _is_hidden(peer)]
    for one in hidden:
        others = sum(_pair(one, other) not in then.links for other in hidden if other != one)
        if others:
            yield Loss(one, f"{others} others: symmetric NAT on both sides, and no hub would be online")


def _cut_off(tree: State) -> Iterator[tuple[str, str]]:
    """Edges that are online and reach no hub, and why not."""
    for edge in tree.edges:
        obstacles = [_obstacle(tree, edge, hub) for hub in sorted(tree.hubs)]
        if edge.assignment.online and all(obstacles):
            yield edge.meta.name, "; ".join(each for each in obstacles if each)


def _is_hidden(peer: Peer) -> bool:
    """Whether another one like it finds no direct path to it."""
    return (
        peer.report is not None
        and peer.report.mapping is model.Mapping.ENDPOINT_DEPENDENT
        and not peer.spec.endpoints
        and peer.assignment.online
    )


# --- hubs ---------------------------------------------------------------------------------------------------


def _attached(then: State) -> tuple[dict[str, str], int]:
    """By which hub each edge would be reached, as far as that is known, and of how many it is not."""
    places: dict[str, str] = {}
    undecided = 0
    for edge in then.edges:
        open_to = [hub for hub in sorted(then.hubs) if _obstacle(then, edge, hub) is None]
        if not edge.assignment.online or not open_to:
            continue
        name = edge.meta.name
        if edge.report is not None and edge.report.hub in open_to:
            places[name] = edge.report.hub
            continue
        latencies = {hub: _latency(then, name, hub) for hub in open_to}
        known = {hub: latency for hub, latency in latencies.items() if latency is not None}
        if len(open_to) == 1:
            places[name] = open_to[0]
        elif len(known) == len(open_to):
            places[name] = min(known, key=lambda hub: (known[hub], hub))
        else:
            undecided += 1
    return places, undecided


def _latency(state: State, one: str, other: str) -> float | None:
    link = state.links.get(_pair(one, other))
    return link.latency if link is not None else None


def _loads(now: State, then: State, places: Mapping[str, str]) -> Iterator[HubLoad]:
    attached_now = [peer.report.hub for peer in now.edges if peer.report is not None] if now.is_tree else []
    attached_then = list(places.values())
    relayed_now = [link.hub for link in now.links.values() if link.path is PathKind.RELAYED]
    relayed_then = [next(iter(open_to), "") for open_to in _relays_then(now, then) if len(open_to) == 1]
    for hub in sorted(now.hubs | then.hubs):
        yield HubLoad(
            hub,
            edges_now=attached_now.count(hub),
            edges_then=attached_then.count(hub),
            pairs_now=relayed_now.count(hub),
            pairs_then=relayed_then.count(hub),
            is_new=hub not in now.hubs,
            goes=hub not in then.hubs,
        )


def _relays_then(now: State, then: State) -> Iterator[frozenset[str]]:
    """Of each pair that is relayed now and then: by whom it may be, as now where that hub stays."""
    apart = {peer.meta.name for peer in then.edges if then.is_tree}
    alive = frozenset(hub for hub in then.hubs if then.by_name[hub].assignment.online)
    for pair, link in now.links.items():
        if link.path is PathKind.RELAYED and link.hub and not apart.issuperset(pair):
            yield frozenset((link.hub,)) if link.hub in then.hubs else alive.difference(pair)


# --- addresses and routes -----------------------------------------------------------------------------------


def _addresses_lost(then: State) -> Iterator[Loss]:
    space = {prefix.version: prefix for prefix in prefixes_of(then.spec.addressing)}
    for peer in then.peers:
        for interface in peer.assignment.addresses:
            prefix = space.get(interface.version)
            if prefix is None:
                yield Loss(peer.meta.name, f"{interface.ip}: the mesh would have no IPv{interface.version}")
            elif interface.ip not in prefix:
                yield Loss(
                    peer.meta.name, f"{interface.ip}: outside of {prefix}, so another one takes its place"
                )


def _routes_lost(now: State, then: State) -> Iterator[Loss]:
    """Routes that would be refused then and are not now."""
    before = _refused_routes(now)
    for (peer, route), why in _refused_routes(then).items():
        if (peer, route) not in before:
            yield Loss(peer, f"{route}: {why}")


def _refused_routes(state: State) -> dict[tuple[str, IPNetwork], str]:
    members = {peer.report.keys.wireguard: peer for peer in state.peers if peer.report is not None}
    pods = state.spec.pod_networking
    return {
        (claim.peer, claim.prefix): (
            "it overlaps the prefixes of the mesh"
            if claim.reason is RefusalReason.MESH
            else f"{claim.holder} has it"
        )
        for claim in settle(state.spec.addressing, members, pods=pods).refused
        if claim.prefix in offered(state.by_name[claim.peer].spec, pods)
    }


# --- in words -----------------------------------------------------------------------------------------------


def _changes(now: State, then: State) -> Iterator[str]:
    # What stands in spec.hubs by default is no change where there was none.
    before, after = (
        {"spec": to_dict(each.mesh)["spec"], "spec.hubs": hubs_dict(each.spec.hubs)} for each in (now, then)
    )
    yield from _differences(before, after)
    for peer in then.peers:
        earlier = now.by_name.get(peer.meta.name)
        if earlier is None:
            yield f"ScopePeer {peer.meta.name}: new"
            continue
        had, has = ({"spec": to_dict(each)["spec"]} for each in (earlier, peer))
        for difference in _differences(had, has):
            yield f"ScopePeer {peer.meta.name}, {difference}"


def _differences(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    had, has = (
        dict(pair for path, value in each.items() for pair in _flat(path, value)) for each in (before, after)
    )
    for field in sorted(had.keys() | has.keys()):
        if had.get(field) != has.get(field):
            yield f"{field}: {had.get(field, 'none')} -> {has.get(field, 'none')}"


def _flat(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{path}.{name}", inner)
    elif isinstance(value, list):
        yield path, ", ".join(map(str, value)) or "none"
    else:
        yield path, str(value)


def _notes(now: State, then: State) -> Iterator[str]:
    if then.spec.topology is TopologyMode.TREE and not then.hubs:
        yield (
            "a Tree without a hub changes nothing: peers keep the links they have until there is one; name "
            "some in spec.hubs.names, or set spec.hubs.mode to Auto"
        )
    if then.is_tree and not now.is_tree:
        yield "hubs would read what they route between edges, which no hub of a full mesh can"
    if then.is_tree and len(then.hubs) == 1:
        yield f"{next(iter(then.hubs))} would be the only hub: while it is away edges reach nobody"
    if then.spec.hubs.mode is HubMode.AUTO:
        yield "the registry may choose other hubs besides (spec.hubs.mode is Auto)"
    if then.spec.hubs.selector is not None and then.spec.hubs.selector != now.spec.hubs.selector:
        yield (
            "hubs that the new spec.hubs.selector makes are not counted here: the operator alone knows "
            "the labels of Nodes"
        )
    if then.hubs and not any(_would_be_hub(peer, now, then.mesh) for peer in then.peers):
        yield f"nobody that spec.hubs asks for is a hub, so {', '.join(sorted(then.hubs)[:3])} would stay"
    moving = sum(len(open_to) > 1 for open_to in _relays_then(now, then))
    if moving:
        yield f"relayed pairs that would change to the nearest of other hubs, and count for none: {moving}"
    if now.is_tree and not then.is_tree:
        hidden = sum(_is_hidden(peer) for peer in then.edges)
        if hidden > 1 and then.hubs:
            yield f"{hidden} edges are behind symmetric NATs: hubs would relay between any two of them"
    room = [prefix for prefix in prefixes_of(then.spec.addressing) if _room(prefix) < len(then.peers)]
    for prefix in room:
        yield f"{prefix} has room for {_room(prefix)} of {len(then.peers)} peers: take a wider one"


def _room(prefix: IPNetwork) -> int:
    """How many peers fit: not IPv4's first and last address, and not IPv6's first."""
    return prefix.num_addresses - (2 if prefix.version == 4 else 1)
