"""Conditions of meshes and peers: what a person reads when something is not as it should be.

Each condition is an ordered chain of checks. The first check that fails gives the reason, one word, and the
message, a sentence that says what to do; when none fails the condition holds. `changed` is the wall-clock
time of the last change of the status, so an unchanged condition is an equal value, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from scope.model import (
    Condition,
    Forwarding,
    IPAddress,
    IPNetwork,
    Mesh,
    Peer,
    PostQuantumMode,
    PskFailure,
    RelayReport,
    Role,
)

READY = "Ready"
ADDRESSES_EXHAUSTED = "AddressesExhausted"
ROUTE_CONFLICT = "RouteConflict"
PORT_CONFLICT = "PortConflict"
ADDRESS_CONFLICT = "AddressConflict"
HUBS_AVAILABLE = "HubsAvailable"
RELAY_FAILED = "RelayFailed"  # False: it did, of a peer that is no hub any more; told to whoever chooses hubs
POST_QUANTUM = "PostQuantum"  # of a mesh
POST_QUANTUM_FAILED = "PostQuantumFailed"  # of a peer
POD_NETWORKING = "PodNetworking"  # False: not as the mesh asks for it, as the peer's agent says
REMOVED = "Removed"  # its `changed` is the time of the removal

REMEMBERED = 86400.0  # seconds after which a former hub that did not forward may be chosen again
SHOWN = 3  # names in a message: enough to start looking, short enough for a terminal


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a check fails."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Remedy:
    """What to put in the place of a prefix: `free`, as long, is nobody's in the mesh; None: there is none.

    Of pods it may stay what it is for its own cluster, or external peer; `whose` names that.
    """

    prefix: IPNetwork
    free: IPNetwork | None
    whose: str
    are_pods: bool


@dataclass(frozen=True, slots=True)
class RouteConflict:
    """A route of a peer that overlaps one of `holder`, who had it first; `holder` is a peer or a mesh.

    `is_shadowed`: the holder's pods have it in their own cluster only, where they cannot reach both.
    """

    route: IPNetwork
    holder: str
    remedies: tuple[Remedy, ...]
    is_shadowed: bool = False


@dataclass(frozen=True, slots=True)
class AddressConflict:
    """An address of a peer that `holder` had first, so that the peer has another one now."""

    address: IPAddress
    holder: str


@dataclass(frozen=True, slots=True)
class PortConflict:
    """A fixed port that an older mesh, `holder`, has on the same Nodes."""

    port: int
    holder: str
    nodes: tuple[str, ...]  # names, sorted


@dataclass(frozen=True, slots=True)
class HubsState:
    """How it stands with the hubs of a mesh that asks for some, or is a tree; names of ScopePeers, sorted."""

    hubs: tuple[str, ...]
    kept: tuple[str, ...]  # of these, whom nobody asks for: all of them, where nobody else is a hub
    is_auto: bool
    is_tree: bool
    ports: tuple[int, int]
    selects_nobody: bool  # there is a selector, and no peer that it selects
    missing: tuple[str, ...]  # named, and no peer
    excluded: tuple[str, ...]  # asked for, and their specs say Edge
    offline: tuple[str, ...]
    behind_nat: tuple[str, ...]
    not_forwarding: tuple[tuple[str, str], ...]  # with the reason
    without_port: tuple[tuple[str, str], ...]  # some pair found none; and what the hub says is amiss


@dataclass(frozen=True, slots=True)
class KeysFailed:
    """A pair whose post-quantum key, or a newer one, has something against it, as `peer` reports."""

    peer: str
    other: str
    failure: PskFailure
    is_keyed: bool  # an earlier key is in use


def mesh_conditions(
    mesh: Mesh,
    *,
    overlaps: Mesh | None,
    without_address: Iterable[str],
    conflicting: Iterable[str],
    wall: float,
    ports: PortConflict | None = None,
    impostor: str = "",
    hubs: HubsState | None = None,
    keys: tuple[KeysFailed, ...] = (),
) -> tuple[Condition, ...]:
    """The conditions of a mesh; those of its hubs and of its post-quantum keys only where it asks for some.

    `overlaps` is an older mesh whose address space this one overlaps, `without_address` the peers for which
    no address was left, `conflicting` those with a route that another has. `impostor` is this cluster's name
    where another cluster has it in the mesh.
    """
    lacking, disputed = tuple(without_address), tuple(conflicting)
    exhausted = Failure(
        "NoAddressLeft",
        f"no address is left for {_some(lacking)}: widen spec.addressing (peers keep theirs), or remove "
        "peers; a removed peer's address is free after a day",
    )
    conflict = Failure(
        "RoutesOverlap",
        f"routes of {_some(disputed)} overlap others' and are not used: see the peers' conditions",
    )
    chain = (
        _impostor(impostor) if impostor else None,
        _overlap(overlaps) if overlaps else None,
        exhausted if lacking else None,
        _port_taken(ports) if ports else None,
    )
    earlier = mesh.status.conditions
    told = (
        _holds(earlier, READY, chain, "every peer has its addresses", wall),
        _problem(earlier, ADDRESSES_EXHAUSTED, exhausted if lacking else None, wall),
        _problem(earlier, ROUTE_CONFLICT, conflict if disputed else None, wall),
        *((_hubs_available(earlier, hubs, wall),) if hubs is not None else ()),
        *((_post_quantum(mesh, keys, wall),) if _asks_for_keys(mesh) else ()),
    )
    # Only where there are Nodes, and two meshes, can this be: elsewhere it is left out.
    if ports is None and all(each.type != PORT_CONFLICT for each in earlier):
        return told
    return (*told, _problem(earlier, PORT_CONFLICT, _port_taken(ports) if ports else None, wall))


def peer_conditions(
    peer: Peer,
    *,
    mesh: Mesh | None,
    lacks_address: bool,
    conflict: RouteConflict | None,
    online: bool,
    wall: float,
    moved: AddressConflict | None = None,
    displaced: str = "",
    role: Role = Role.EDGE,
) -> tuple[Condition, ...]:
    """The conditions of a peer that is not removed; what is no problem is left out, for the sake of etcd.

    An address that was claimed twice is put right by the write that says so: that condition is False and
    stays, to tell why the peer has another address than it had.
    """
    chain = (
        None if mesh else _no_mesh(peer),
        _asks_of_manager(peer) if mesh is not None and mesh.spec.existing_interface else None,
        _displaces(displaced) if displaced else None,
        Failure("NoKeys", "its agent has not reported keys: start scope-agent there")
        if not peer.report
        else None,
        Failure("NoAddressLeft", "no address is left: widen spec.addressing of its ScopeMesh")
        if lacks_address
        else None,
        _leaving(peer) if peer.spec.leaving else None,
        None
        if online
        else Failure("Offline", "nothing heard for 180 s: does scope-agent run there, and what does it log?"),
    )
    earlier = peer.assignment.conditions
    is_addressed = mesh is None or not mesh.spec.existing_interface
    ready = "online, with an address" if is_addressed else "online"
    told = [_holds(earlier, READY, chain, ready, wall)]
    if conflict is not None:
        told.append(_problem(earlier, ROUTE_CONFLICT, _routes_overlap(peer, conflict), wall))
    if moved is not None:
        message = f"{moved.address} is {moved.holder}'s, which had it first: this peer was given another"
        told.append(Condition(ADDRESS_CONFLICT, "False", "GivenAnother", message, wall))
    else:
        told.extend(each for each in earlier if each.type == ADDRESS_CONFLICT)
    told.extend(_relay_failed(peer, role=role, wall=wall))
    if mesh is not None and online and (failed := keys_failed(mesh, (peer,))):
        told.append(_problem(earlier, POST_QUANTUM_FAILED, _keys_failed(mesh, failed), wall))
    if online and peer.report is not None and (trouble := peer.report.pods_trouble):
        hindered = Condition(POD_NETWORKING, "False", "Hindered", trouble, wall)
        told.append(_since(earlier, hindered, wall))
    return tuple(told)


def _asks_of_manager(peer: Peer) -> Failure | None:
    """What the mesh of an existing interface does nothing about, and its manager may."""
    asked = {
        "role Hub": peer.spec.role is Role.HUB,
        "routes": bool(peer.spec.routes),
        "endpoints": bool(peer.spec.endpoints),
    }
    named = " and ".join(f"spec.{name}" for name, is_asked in asked.items() if is_asked)
    if not named:
        return None
    return Failure(
        "ManagedElsewhere",
        f"{named}: not with existingInterface, whose own manager sees to that: leave it out",
    )


def _routes_overlap(peer: Peer, conflict: RouteConflict) -> Failure:
    """It names both: an Event, which repeats it, may be read without its object."""
    route = f"route {conflict.route} of ScopePeer {peer.meta.name}"
    translated = [each for each in conflict.remedies if each.are_pods and each.free is not None]
    plain = [each for each in conflict.remedies if not each.are_pods and each.free is not None]
    if translated:
        moves = ", ".join(f"of {each.whose} {each.prefix} to {each.free}" for each in translated)
        mend = f"translate pods (spec.clusters, seenAs): {moves}"
    else:
        mend = "remove one" + (f", or give one another prefix: {plain[0].free} is free" if plain else "")
    if conflict.is_shadowed:
        return Failure(
            "RoutesOverlap",
            f"{route} is, where {conflict.holder} is, that of its own cluster's pods, which cannot reach "
            f"these: {mend}",
        )
    return Failure(
        "RoutesOverlap",
        f"{route} overlaps one of {conflict.holder}, which had it first and keeps it: {mend}",
    )


def _leaving(peer: Peer) -> Failure:
    if peer.report is not None and peer.report.left:
        return Failure(
            "Left",
            "its agent has taken its device down, as it was told (spec.leaving); it comes back when this "
            "cluster's operator starts anew",
        )
    return Failure(
        "Leaving", "it is to leave (spec.leaving), and its agent has not said yet that it has: see its log"
    )


def why_not_forwarding(relay: RelayReport) -> str | None:
    """Why a hub does not relay, or not route for the edges of a tree, in its own words; None: it does."""
    if relay.forwarding is Forwarding.NONE:
        return relay.reason
    return relay.unrouted or None


def _relay_failed(peer: Peer, *, role: Role, wall: float) -> Iterable[Condition]:
    """What a hub says that does not forward; of a former hub it stays for `REMEMBERED` seconds."""
    earlier = peer.assignment.conditions
    relay = peer.report.relay if peer.report is not None else None
    before = next((each for each in earlier if each.type == RELAY_FAILED), None)
    if role is not Role.HUB:
        if before is not None and before.status == "True":
            return [_since(earlier, replace(before, status="False"), wall)]
        return [before] if before is not None and wall < before.changed + REMEMBERED else []
    why = why_not_forwarding(relay) if relay is not None else None
    if why is None:
        return []
    return [_problem(earlier, RELAY_FAILED, _not_forwarding(((peer.meta.name, why),)), wall)]


def _hubs_available(earlier: Iterable[Condition], hubs: HubsState, wall: float) -> Condition:
    chain = (
        _all_offline(hubs) if hubs.hubs and hubs.offline == hubs.hubs else None,
        _tree_without_hubs(hubs) if hubs.is_tree and not hubs.hubs else None,
        _nobody_else(hubs) if hubs.kept else None,
        _no_such_peer(hubs.missing) if hubs.missing else None,
        _says_edge(hubs.excluded) if hubs.excluded else None,
        _no_such_node() if hubs.selects_nobody else None,
        _nobody_reachable() if not hubs.hubs and hubs.is_auto else None,
        _not_reachable(hubs) if hubs.behind_nat else None,
        _not_forwarding(hubs.not_forwarding) if hubs.not_forwarding else None,
        _no_port_left(hubs.without_port) if hubs.without_port else None,
    )
    holds = f"{'routed' if hubs.is_tree else 'relayed'} by {_some(hubs.hubs)}"
    return _holds(earlier, HUBS_AVAILABLE, chain, holds, wall)


def keys_failed(mesh: Mesh, peers: Iterable[Peer]) -> tuple[KeysFailed, ...]:
    """What these peers say of keys, as far as their bounded links tell; nothing where none are asked for."""
    if not _asks_for_keys(mesh):
        return ()
    return tuple(
        KeysFailed(peer.meta.name, link.peer, link.psk.failure, is_keyed=link.psk.epoch > 0)
        for peer in peers
        if peer.report is not None and peer.report.post_quantum is not None
        if peer.report.post_quantum.failed
        for link in peer.report.links
        if link.psk is not None and link.psk.failure is not None
    )


def _asks_for_keys(mesh: Mesh) -> bool:
    return mesh.spec.post_quantum.mode is not PostQuantumMode.OFF


def _post_quantum(mesh: Mesh, keys: tuple[KeysFailed, ...], wall: float) -> Condition:
    failure = _keys_failed(mesh, keys) if keys else None
    return _holds(mesh.status.conditions, POST_QUANTUM, (failure,), "nothing stands against a key", wall)


def _keys_failed(mesh: Mesh, keys: tuple[KeysFailed, ...]) -> Failure:
    """The gravest first; what holds traffic up is graver than what holds up a newer key."""

    def pairs(failure: PskFailure) -> str:
        return _some(
            tuple(sorted(f"{each.peer} with {each.other}" for each in keys if each.failure is failure))
        )

    present = {each.failure for each in keys}
    for kind in (PskFailure.CONFLICT, PskFailure.UNTRUSTED):
        if kind in present:
            return Failure(str(kind), f"{pairs(kind)}: {_MEND[kind]}")
    if mesh.spec.post_quantum.mode is PostQuantumMode.REQUIRED:
        waiting = [each for each in keys if not each.is_keyed]
        if waiting:
            names = _some(tuple(sorted(f"{each.peer} with {each.other}" for each in waiting)))
            why = min((each.failure for each in waiting), key=list(PskFailure).index)
            return Failure(
                str(PskFailure.UNCONFIRMED), f"{names}: no traffic before a key is proved; {_MEND[why]}"
            )
    kind = min(present, key=list(PskFailure).index)
    return Failure(str(kind), f"{pairs(kind)}: {_MEND[kind]}")


_MEND = {
    PskFailure.CONFLICT: "another program replaces the key in the device: find out which, and stop it",
    PskFailure.UNTRUSTED: "the other's identity is not trusted, and the key in use stays: `scopectl identity "
    "show` on both says why",
    PskFailure.UNCONFIRMED: "no handshake proved a key in time: see `scopectl status` on both",
    PskFailure.DISK: "a key could not be written down: make room on the disk",
    PskFailure.REFUSED: "the other one refuses: bring both to the same release and settings",
    PskFailure.NO_IDENTITY: "the other one makes no post-quantum keys: update scope-agent there; its own "
    "`scopectl status` says why",
    PskFailure.UNANSWERED: "the other one does not answer: do datagrams of 1,164 bytes arrive?",
    PskFailure.NO_SESSION: "WireGuard has not rekeyed for six minutes: does anything pass between the two?",
}


def _all_offline(hubs: HubsState) -> Failure:
    mend = "start scope-agent there, or " + ("let another peer be reached" if hubs.is_auto else "name others")
    meanwhile = "edges reach nobody until then" if hubs.is_tree else "pairs keep the paths they have"
    return Failure(
        "AllOffline", f"no hub is online, of {_some(hubs.offline)}: {mend} (spec.hubs); {meanwhile}"
    )


def _tree_without_hubs(hubs: HubsState) -> Failure:
    return Failure(
        "TreeWithoutHubs",
        "spec.topology is Tree, and the mesh has no hub, so peers keep the links they have: "
        f"{_why_nobody(hubs)}; or set spec.topology to Full",
    )


def _nobody_else(hubs: HubsState) -> Failure:
    stays = "stays one" if len(hubs.kept) == 1 else "stay hubs"
    return Failure(
        "NobodyElse",
        f"nobody that spec.hubs asks for is a hub, so {_some(hubs.kept)} {stays}: {_why_nobody(hubs)}",
    )


def _why_nobody(hubs: HubsState) -> str:
    """What keeps those from being hubs that are asked for, and what to do: one condition has one message."""
    asked = (
        _no_such_peer(hubs.missing) if hubs.missing else None,
        _says_edge(hubs.excluded) if hubs.excluded else None,
        _no_such_node() if hubs.selects_nobody else None,
        _nobody_reachable() if hubs.is_auto else None,
    )
    why = next((failure.message for failure in asked if failure is not None), None)
    return why or "name some in spec.hubs.names, or set spec.hubs.mode to Auto"


def _no_such_peer(names: tuple[str, ...]) -> Failure:
    return Failure(
        "NoSuchPeer",
        f"the mesh has no ScopePeer {_some(names)}: correct spec.hubs.names; `scopectl get peers` has names",
    )


def _says_edge(names: tuple[str, ...]) -> Failure:
    return Failure(
        "SaysEdge",
        f"{_some(names)} cannot be a hub, because spec.role of the ScopePeer says Edge: set that to Auto, or "
        "take it out of spec.hubs",
    )


def _no_such_node() -> Failure:
    return Failure(
        "NoSuchNode",
        "no peer's Node has the labels of spec.hubs.selector: label a Node, or correct it; a selector means "
        "Nodes of the registry's own cluster, and other peers are named in spec.hubs.names",
    )


def _nobody_reachable() -> Failure:
    return Failure(
        "NobodyReachable",
        "no peer that is online can be reached by every other one: forward UDP ports to one and give "
        "spec.endpoints of its ScopePeer, or name a hub in spec.hubs.names",
    )


def _not_reachable(hubs: HubsState) -> Failure:
    first, last = hubs.ports
    return Failure(
        "NotReachable",
        f"hub {_some(hubs.behind_nat)} is behind a NAT: forward its WireGuard port and UDP ports {first} to "
        f"{last} to it, and give its public endpoint in spec.endpoints of its ScopePeer",
    )


def _not_forwarding(hubs: tuple[tuple[str, str], ...]) -> Failure:
    (name, reason), *more = hubs
    others = f" (and {len(more)} more)" if more else ""
    why = f": {reason}" if reason else ""
    return Failure(
        "NotForwarding",
        f"hub {name}{others} does not forward{why}; mend that there, or have another hub (spec.hubs)",
    )


def _no_port_left(hubs: tuple[tuple[str, str], ...]) -> Failure:
    reason = next((reason for _, reason in hubs if reason), "")
    said = f"; it says: {reason}" if reason else ""
    names = _some(tuple(name for name, _ in hubs))
    return Failure(
        "NoPortLeft",
        f"hub {names} has no port for some pairs: widen spec.hubs.ports, or add a hub{said}",
    )


def _displaces(node: str) -> Failure:
    return Failure(
        "NameOfNode",
        f"Node {node} is no peer, because this ScopePeer has the name of its: make this one anew under "
        "another name",
    )


def _impostor(cluster: str) -> Failure:
    return Failure(
        "ClusterNameTaken",
        f"another cluster is called {cluster} in this mesh: start this cluster's operator with another "
        "--cluster-name; its Nodes are no peers until then",
    )


def _port_taken(conflict: PortConflict) -> Failure:
    return Failure(
        "PortTaken",
        f"UDP port {conflict.port} is ScopeMesh {conflict.holder}'s on {_some(conflict.nodes)}: change "
        "spec.listenPort, or leave it out and each agent picks a free one",
    )


def _overlap(older: Mesh) -> Failure:
    return Failure(
        "AddressesOverlap",
        f"spec.addressing overlaps that of ScopeMesh {older.meta.name}, which is older: change them",
    )


def _no_mesh(peer: Peer) -> Failure:
    return Failure(
        "NoMesh", f"there is no ScopeMesh {peer.spec.mesh}: create it, or delete this peer with `scopectl`"
    )


def _holds(
    earlier: Iterable[Condition], kind: str, chain: Iterable[Failure | None], holds: str, wall: float
) -> Condition:
    """A condition that ought to hold: it does where no check fails, and its reason then is its own name."""
    failure = next((failure for failure in chain if failure is not None), None)
    if failure is None:
        return _since(earlier, Condition(kind, "True", kind, holds), wall)
    return _since(earlier, Condition(kind, "False", failure.reason, failure.message), wall)


def _problem(earlier: Iterable[Condition], kind: str, failure: Failure | None, wall: float) -> Condition:
    if failure is None:
        return _since(earlier, Condition(kind, "False", "NoProblem", ""), wall)
    return _since(earlier, Condition(kind, "True", failure.reason, failure.message), wall)


def _since(earlier: Iterable[Condition], condition: Condition, wall: float) -> Condition:
    """The condition with the time of its last change of status."""
    before = next((each for each in earlier if each.type == condition.type), None)
    changed = before.changed if before is not None and before.status == condition.status else wall
    return Condition(condition.type, condition.status, condition.reason, condition.message, changed)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:SHOWN])
    more = len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
