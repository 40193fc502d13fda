"""Which peers of a mesh are hubs, and what is told of that.

    specs of mesh and peer, labels of its Node -> asked_of:   who asks that it be a hub
    who asks, and whom the registry chose      -> assign_role: Hub or Edge
    all peers of a mesh                        -> plan_hubs:  whom the registry chooses, and what is told

A peer is asked for where its own spec says Hub, its name stands in spec.hubs.names, or its Node is selected
by spec.hubs.selector. One whose spec says Edge never is a hub. That is judged of each peer by itself; in the
mode Auto `hubs` chooses others besides.

A mesh that needs hubs does not lose the last one by a typing error: where nobody is one any more by what is
asked, those stay that are (`are_kept`), until somebody else is, or nobody asks for any.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from scope.model import Forwarding, HubChoice, HubMode, Hubs, Mesh, Peer, Role, TopologyMode
from scope.resources import MAX_HUBS, MAX_REASON
from scope.selectors import selects
from scope_operator.plan.conditions import HubsState, why_not_forwarding
from scope_operator.plan.hubs import MAX_OTHERS, Choice, Trouble, Unfit, choose, trouble_of


class Asked(enum.StrEnum):
    """Who asks that a peer be a hub, in the words of the status."""

    SPEC = "its spec says Hub"
    NAME = "named in spec.hubs"
    SELECTOR = "its Node is selected by spec.hubs"


KEPT = "nobody asks for it any more; kept while nobody else is a hub"


@dataclass(frozen=True, slots=True)
class HubPlan:
    """Whom the registry chooses, beside those that are asked for, and what is told of all of them."""

    chosen: frozenset[str] = frozenset()
    told: tuple[HubChoice, ...] = ()


def asked_of(peer: Peer, *, hubs: Hubs, labels: Mapping[str, str] | None) -> Asked | None:
    """Who asks that `peer` be a hub, its own spec aside that says Edge; `labels` are its Node's, if known."""
    if peer.assignment.tombstone is not None:
        return None
    if peer.spec.role is Role.HUB:
        return Asked.SPEC
    if peer.meta.name in hubs.names:
        return Asked.NAME
    if hubs.selector is not None and labels is not None and selects(hubs.selector, labels):
        return Asked.SELECTOR
    return None


def assign_role(peer: Peer, *, asked: Asked | None, chosen: bool) -> Role:
    """Hub or Edge; `chosen` says whether the registry chose it."""
    if peer.spec.role is Role.EDGE:
        return Role.EDGE
    return Role.HUB if asked is not None or chosen else Role.EDGE


def may_stay(peer: Peer) -> bool:
    """Whether it is a hub, and one that may be kept."""
    assignment = peer.assignment
    return assignment.role is Role.HUB and peer.spec.role is not Role.EDGE and assignment.tombstone is None


def are_kept(mesh: Mesh, *, peers: Mapping[str, Peer], asked: Collection[str]) -> bool:
    """Whether those who are hubs stay it, though nobody asks for them; in the mode Auto `hubs` sees to that.

    So it is where nobody else is asked for who can be one, and the mesh is a tree or asks for some: edges of
    a tree without a hub reach nobody, and relayed pairs have no path.
    """
    hubs = mesh.spec.hubs
    if hubs.mode is not HubMode.DECLARED or any(peers[name].spec.role is not Role.EDGE for name in asked):
        return False
    return mesh.spec.topology is TopologyMode.TREE or bool(hubs.names) or hubs.selector is not None


def plan_hubs(
    mesh: Mesh, *, peers: Mapping[str, Peer], asked: Mapping[str, Asked], chosen: Collection[str], wall: float
) -> HubPlan:
    """Whom the registry chooses now, or keeps, and what is told.

    `peers` are all of the mesh, `asked` those that somebody asks for, `chosen` whom the registry chose last.
    """
    choice = Choice()
    if mesh.spec.hubs.mode is HubMode.AUTO:
        choice = choose(mesh, peers=peers, asked=asked, before=chosen, wall=wall)
    elif are_kept(mesh, peers=peers, asked=asked):
        kept = sorted(name for name, peer in peers.items() if may_stay(peer))
        choice = Choice(tuple(HubChoice(name, True, KEPT) for name in kept))
    named = [name for name in sorted(asked) if peers[name].spec.role is not Role.EDGE]
    room = MAX_HUBS - MAX_OTHERS - len(choice.hubs)
    hubs = [*(_tell_asked(peers[name], asked[name]) for name in named[:room]), *choice.hubs]
    others = [*_tell_missed(mesh.spec.hubs, peers=peers, asked=asked), *choice.others]
    others.sort(key=lambda each: not each.contested_since)  # these are to be remembered
    return HubPlan(
        frozenset(each.peer for each in choice.hubs),
        (*sorted(hubs[: MAX_HUBS - MAX_OTHERS], key=_by_name), *sorted(others[:MAX_OTHERS], key=_by_name)),
    )


def hubs_state(
    mesh: Mesh, *, peers: Mapping[str, Peer], asked: Mapping[str, Asked], chosen: Collection[str]
) -> HubsState | None:
    """How it stands with the hubs of a mesh, for its condition; None where nobody asks for or needs any."""
    hubs, is_tree = mesh.spec.hubs, mesh.spec.topology is TopologyMode.TREE
    is_declared = hubs.mode is HubMode.DECLARED
    if not is_tree and is_declared and not hubs.names and hubs.selector is None and not asked:
        return None
    excluded = {name for name in asked if peers[name].spec.role is Role.EDGE}
    serving = sorted((asked.keys() | set(chosen)) - excluded)
    kept = serving if is_declared and are_kept(mesh, peers=peers, asked=asked) else []
    troubles = {name: trouble_of(peers[name]) for name in serving}

    def those(trouble: Trouble) -> tuple[str, ...]:
        return tuple(name for name in serving if troubles[name] is trouble)

    return HubsState(
        hubs=tuple(serving),
        kept=tuple(kept),
        is_auto=not is_declared,
        is_tree=is_tree,
        ports=hubs.ports,
        selects_nobody=hubs.selector is not None and Asked.SELECTOR not in asked.values(),
        missing=tuple(sorted(name for name in hubs.names if name not in asked)),
        excluded=tuple(sorted(excluded)),
        offline=those(Trouble.OFFLINE),
        behind_nat=those(Trouble.BEHIND_NAT),
        not_forwarding=tuple((name, _why_not(peers[name])) for name in those(Trouble.NOT_FORWARDING)),
        without_port=tuple((name, _relay_reason(peers[name])) for name in those(Trouble.NO_PORT_LEFT)),
    )


def _tell_asked(peer: Peer, asked: Asked) -> HubChoice:
    trouble, relay = trouble_of(peer), peer.report.relay if peer.report is not None else None
    parts: list[str] = [asked]
    if trouble is not None:
        parts.append(trouble)
    elif relay is not None and relay.forwarding is Forwarding.USER_SPACE:
        parts.append("relays in user space")
    why = "; ".join(parts)
    reason = (why_not_forwarding(relay) or relay.reason) if relay is not None else ""
    if reason:
        why += f"{': ' if len(parts) > 1 else '; '}{reason}"
    return HubChoice(peer.meta.name, True, why[:MAX_REASON])


def _tell_missed(hubs: Hubs, *, peers: Mapping[str, Peer], asked: Mapping[str, Asked]) -> list[HubChoice]:
    """Of those that somebody asks for and that are no hubs all the same."""
    missing = [
        HubChoice(name, False, f"{Asked.NAME}, but the mesh has no such ScopePeer")
        for name in hubs.names
        if name not in asked
    ]
    return missing + [
        HubChoice(name, False, f"{asked[name]}, but {Unfit.EDGE}")
        for name in sorted(asked)
        if peers[name].spec.role is Role.EDGE
    ]


def _why_not(peer: Peer) -> str:
    """Why a hub does not forward, in its own words."""
    relay = peer.report.relay if peer.report is not None else None
    return (why_not_forwarding(relay) or "") if relay is not None else ""


def _relay_reason(peer: Peer) -> str:
    """What a hub that relays says is amiss."""
    relay = peer.report.relay if peer.report is not None else None
    return relay.reason if relay is not None else ""


def _by_name(choice: HubChoice) -> str:
    return choice.peer
