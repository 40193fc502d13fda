"""Which peers the registry chooses as hubs in the mode Auto, among those that every peer can reach.

    reports, who is online, what was chosen before -> Choice: who is a hub, and why others are not

Peers are added until there are as many hubs as the mesh needs (`hubs_wanted`). Fit is who is online and has
an endpoint that every peer can reach: a public address without a NAT, or a static endpoint. Of these come
first those that can be reached in more families, then the nearest, by the median of the round trips that
other peers report towards them, then those that have been online for longest. In a large mesh latencies are
compared among the `CONTENDERS` that have been online for longest.

A hub stays one. What speaks against a choice must do so without a break: a hub that is offline, cannot be
reached any more or does not forward is replaced after `GRACE`, at once where it was the last one; a peer that
is clearly better than a hub becomes one after `BETTER_AFTER`, and the worst hub, one more than needed now,
goes `GRACE` later, when pairs have moved. Since when a choice is contested stands in the mesh's status, and
who is a hub in the peers': so whoever plans next, on whatever registry, decides the same. Latencies that
wobble change nothing, and are not told.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from heapq import nsmallest
from ipaddress import IPv4Network, IPv6Network
from typing import TypeAlias

from scope import model
from scope.model import (
    CandidateKind,
    Family,
    HubChoice,
    IPAddress,
    IPNetwork,
    Mesh,
    PathKind,
    Peer,
    Role,
)
from scope.resources import IPV4_RANGES, IPV6_RANGE
from scope_operator.plan.conditions import RELAY_FAILED, REMEMBERED, why_not_forwarding

GRACE = 600.0  # seconds: a reboot, an upgrade or a move to another address is over by then
STABLE = 300.0  # seconds online before a peer is trusted to stay, while there is another hub
BETTER_AFTER = 1800.0  # seconds: longer than a backup or a download that slows down a line
CLEARLY, STILL = 0.6, 0.75  # of a hub's latency: what contests it, and what goes on to
MARGIN = 0.01  # seconds: a pair does not notice less
CONTENDERS = 64  # peers that are measured against each other; more do not make the best of them much better
MAX_OTHERS = 16  # peers that are no hubs and are told of: as many as a person reads
SMALL = 32  # peers up to which two hubs do: one that relays, and another that is warm

UNMEASURED = float("inf")  # the latency of a peer that nobody reports one of

Rank: TypeAlias = tuple[int, float, float, str]  # lower is better: -families, seconds, online since, name


class Trouble(enum.StrEnum):
    """Why a hub does not serve as it should, in the words of the status."""

    OFFLINE = "offline"
    BEHIND_NAT = "behind a NAT, without an endpoint in its spec"
    NOT_FORWARDING = "does not forward"
    NO_PORT_LEFT = "has no port left for some pairs"


class Unfit(enum.StrEnum):
    """Why a peer cannot be chosen as a hub, in the words of the status."""

    EDGE = "its spec says Edge"
    OFFLINE = "offline"
    BEHIND_NAT = "behind a NAT, without an endpoint in its spec"
    MAPPING_UNKNOWN = "not known yet whether there is a NAT before it"
    PRIVATE = "no public address, and no endpoint in its spec"
    NOT_FORWARDING = "does not forward"
    HELD_BACK = "did not forward when it was a hub: not tried again for a day"


@dataclass(frozen=True, slots=True)
class Choice:
    """Whom the registry chooses, and some others, those first that are nearest to being chosen; each told."""

    hubs: tuple[HubChoice, ...] = ()
    others: tuple[HubChoice, ...] = ()


def hubs_wanted(members: int) -> int:
    """How many hubs a mesh of so many peers needs: 2 up to 32, and one more with every doubling.

    Each pair takes a port of its hub that is unique for either peer, so more hubs are more pairs.
    """
    return 2 + ((members - 1) // SMALL).bit_length() if members > SMALL else 2


def trouble_of(peer: Peer) -> Trouble | None:
    """Why a hub does not serve as it should; the first that is."""
    report = peer.report
    if not peer.assignment.online or report is None:
        return Trouble.OFFLINE
    if _is_behind_nat(peer):
        return Trouble.BEHIND_NAT
    if report.relay is not None and why_not_forwarding(report.relay) is not None:
        return Trouble.NOT_FORWARDING
    if report.relay is not None and report.relay.refused:
        return Trouble.NO_PORT_LEFT
    return None


def choose(
    mesh: Mesh, *, peers: Mapping[str, Peer], asked: Collection[str], before: Collection[str], wall: float
) -> Choice:
    """Whom the registry chooses beside `asked`, whom somebody asks for; `before` is whom it chose last.

    `peers` are all of the mesh, by name.
    """
    field = _look(mesh, peers=peers, asked=asked, before=before, wall=wall)
    added = _missing(field)
    better = _better(field, added)
    ripe = [name for name in field.settled if name in better and wall >= better[name] + BETTER_AFTER]
    if ripe and not added and field.serving <= field.wanted:
        added = ripe[:1]
    leaving, since = _surplus(field, added)
    dropped = field.given_up if field.serving + len(added) >= field.wanted else frozenset()
    if leaving and wall >= since + GRACE:
        dropped |= {leaving}
    hubs = (field.well | field.ailing.keys() | set(added)) - dropped
    surplus = {leaving: since}
    return Choice(
        tuple(_tell_hub(field, name, surplus_since=surplus.get(name, 0.0)) for name in sorted(hubs)),
        (
            *(HubChoice(name, False, _BETTER, better[name]) for name in sorted(better.keys() - hubs)),
            *_tell_others(field, field.ranks.keys() - hubs - better.keys(), dropped),
            *(HubChoice(name, False, field.unfit[name]) for name in _first(field.unfit.keys() - hubs)),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """What a choice is made from; sets and maps by name."""

    reach: Mapping[str, frozenset[Family]]  # of all that nobody asks for
    unfit: Mapping[str, Unfit]  # nobody of these is chosen anew
    well: frozenset[str]  # hubs of ours, as they should be
    ailing: Mapping[str, float]  # hubs of ours that are not, and since when
    given_up: frozenset[str]  # of these: for too long
    ranks: Mapping[str, Rank]  # of hubs that are well, and of candidates
    candidates: tuple[str, ...]  # best first
    settled: tuple[str, ...]  # of these: online for long enough
    serving: int  # hubs that relay now, those that are asked for included
    wanted: int
    most: int  # hubs that there may be before one goes
    contested: Mapping[str, float]  # since when, as the status has it
    wall: float


def _look(
    mesh: Mesh, *, peers: Mapping[str, Peer], asked: Collection[str], before: Collection[str], wall: float
) -> _Field:
    # What was told of a peer while it was the other one of hub and Edge is over.
    contested = {
        each.peer: each.contested_since
        for each in mesh.status.hubs
        if each.contested_since and each.chosen == (each.peer in before)
    }
    members = {name: peer for name, peer in peers.items() if peer.assignment.tombstone is None}
    free = {name: peer for name, peer in members.items() if name not in asked}
    reach = {name: _reach(peer) for name, peer in free.items()}
    unfit = {
        name: why for name, peer in free.items() if (why := _unfit(peer, reach[name], wall=wall)) is not None
    }
    ours = {name for name in before if name in free and unfit.get(name) is not Unfit.EDGE}
    for name in ours:
        if unfit.get(name) is Unfit.MAPPING_UNKNOWN:  # as for a moment whenever an agent starts
            del unfit[name]
    well = ours - unfit.keys()

    def rank(name: str, latency: float = UNMEASURED) -> Rank:
        return -len(reach[name]), latency, _online_since(peers[name]), name

    contenders = nsmallest(CONTENDERS, free.keys() - unfit.keys() - ours, key=rank)
    latencies = _latencies(peers.values(), of=well.union(contenders))
    ranks = {name: rank(name, near) for name, near in latencies.items()}
    candidates = tuple(sorted(contenders, key=ranks.__getitem__))
    ailing = {
        name: contested.get(name) or _offline_since(peers[name]) or wall for name in ours & unfit.keys()
    }
    named = [peers[name] for name in asked if peers[name].spec.role is not Role.EDGE]
    return _Field(
        reach=reach,
        unfit=unfit,
        well=frozenset(well),
        ailing=ailing,
        given_up=frozenset(name for name, since in ailing.items() if wall >= since + GRACE),
        ranks=ranks,
        candidates=candidates,
        settled=tuple(name for name in candidates if wall >= _online_since(peers[name]) + STABLE),
        serving=len(well) + sum(trouble_of(peer) in (None, Trouble.NO_PORT_LEFT) for peer in named),
        wanted=hubs_wanted(len(members)),
        # A mesh that shrank a little may grow again.
        most=hubs_wanted(len(members) + len(members) // 4),
        contested=contested,
        wall=wall,
    )


def _missing(field: _Field) -> list[str]:
    """Who becomes a hub because there are too few."""
    awaited = len(field.ailing) - len(field.given_up)
    if field.serving:
        return list(field.settled[: max(0, field.wanted - field.serving - awaited)])
    # Nobody relays: nothing is waited for, and a hub that may go soon is better than none.
    return list(field.settled[: field.wanted] or field.candidates[:1])


def _better(field: _Field, added: Collection[str]) -> dict[str, float]:
    """Who is clearly better than the worst hub, and since when."""
    worst = max((field.ranks[name] for name in field.well), default=None)
    if worst is None:
        return {}
    return {
        name: field.contested.get(name, field.wall)
        for name in field.settled
        if name not in added
        and _is_better(field.ranks[name], worst, share=STILL if name in field.contested else CLEARLY)
    }


def _surplus(field: _Field, added: Collection[str]) -> tuple[str, float]:
    """The hub that is one more than needed, and since when; "" where there is none."""
    if field.serving + len(added) <= field.most or not field.well:
        return "", 0.0
    # Whoever was found superfluous first goes, however latencies wobble.
    leaving = max(field.well, key=lambda name: (name in field.contested, field.ranks[name]))
    return leaving, field.contested.get(leaving, field.wall)


def _tell_hub(field: _Field, name: str, *, surplus_since: float) -> HubChoice:
    if name in field.ailing:
        so = _KEPT if name in field.given_up else _REPLACED
        return HubChoice(name, True, f"{field.unfit[name]}: {so}", field.ailing[name])
    if surplus_since:
        return HubChoice(name, True, _SURPLUS, surplus_since)
    families = " and ".join(sorted(field.reach[name])) or "what it said last"
    return HubChoice(name, True, f"chosen: every peer can reach it, by {families}, {_NO_BETTER}")


def _tell_others(field: _Field, names: Iterable[str], dropped: Collection[str]) -> Iterable[HubChoice]:
    settled = {*field.settled, *dropped}
    return [HubChoice(name, False, _ENOUGH if name in settled else _YOUNG) for name in _first(names)]


def _first(names: Iterable[str]) -> list[str]:
    """As many as are told, and the same ones whatever their latencies are."""
    return nsmallest(MAX_OTHERS, names)


_NO_BETTER = "and nobody else who could be one is clearly nearer"
_REPLACED = f"replaced if that lasts for {GRACE / 60:.0f} minutes"
_KEPT = "kept until another peer can take its place"
_SURPLUS = f"one hub more than needed: an Edge again if that lasts for {GRACE / 60:.0f} minutes"
_BETTER = f"clearly better than a hub: becomes one if that lasts for {BETTER_AFTER / 60:.0f} minutes"
_ENOUGH = "not needed: there are enough hubs, and it is not clearly nearer than one of them"
_YOUNG = f"online for less than {STABLE / 60:.0f} minutes"


# --- what is known of one peer ------------------------------------------------------------------------------


def _unfit(peer: Peer, reach: frozenset[Family], *, wall: float) -> Unfit | None:
    """Why a peer that has this reach cannot be chosen, or a hub does not stay one."""
    report = peer.report
    if peer.spec.role is Role.EDGE:
        return Unfit.EDGE
    if not peer.assignment.online or report is None:
        return Unfit.OFFLINE
    if not reach:
        if report.mapping is model.Mapping.NONE:
            return Unfit.PRIVATE
        return Unfit.MAPPING_UNKNOWN if report.mapping is model.Mapping.UNKNOWN else Unfit.BEHIND_NAT
    if report.relay is not None and why_not_forwarding(report.relay) is not None:
        return Unfit.NOT_FORWARDING
    if any(
        each.type == RELAY_FAILED and each.status == "False" and wall < each.changed + REMEMBERED
        for each in peer.assignment.conditions
    ):
        return Unfit.HELD_BACK
    return None


def _reach(peer: Peer) -> frozenset[Family]:
    """The families in which every peer can reach this one, also at ports that it did not send from."""
    families = [endpoint.family for endpoint in peer.spec.endpoints]
    if peer.report is not None and peer.report.mapping is model.Mapping.NONE:
        families.extend(
            candidate.endpoint.family
            for candidate in peer.report.endpoints
            if candidate.kind is CandidateKind.HOST and _is_public(candidate.endpoint.address)
        )
    return frozenset(families)


def _is_behind_nat(peer: Peer) -> bool:
    """Whether nobody can send to a port of this peer's that it did not send from before."""
    report = peer.report
    if report is None or peer.spec.endpoints:
        return False
    behind = (model.Mapping.ENDPOINT_INDEPENDENT, model.Mapping.ENDPOINT_DEPENDENT)
    return report.mapping in behind and not any(
        candidate.kind is CandidateKind.HOST and _is_public(candidate.endpoint.address)
        for candidate in report.endpoints
    )


def _is_public(address: IPAddress) -> bool:
    """Whether the address is none of a site's own, nor of a carrier's customers (RFC 1918, 4193, 6598)."""
    number, length = int(address), address.max_prefixlen
    return not any(first <= number <= last for first, last in _OWN[length])


def _bounds(prefixes: Iterable[IPNetwork]) -> tuple[tuple[int, int], ...]:
    """The first and last address of each as numbers: to ask prefixes themselves takes five times as long."""
    return tuple((int(prefix.network_address), int(prefix.broadcast_address)) for prefix in prefixes)


_OWN = {
    32: _bounds((*IPV4_RANGES, IPv4Network("127.0.0.0/8"), IPv4Network("169.254.0.0/16"))),
    128: _bounds((IPV6_RANGE, IPv6Network("::1/128"), IPv6Network("fe80::/10"))),
}


def _online_since(peer: Peer) -> float:
    return max(peer.assignment.last_seen, peer.meta.created)


def _offline_since(peer: Peer) -> float:
    """Wall clock; 0 of a peer that is online, or that was not seen to go."""
    return 0.0 if peer.assignment.online else peer.assignment.last_seen


def _is_better(one: Rank, other: Rank, *, share: float) -> bool:
    """Whether `one` is clearly better: more families, or a latency of at most this share of the other's."""
    if one[0] != other[0]:
        return one[0] < other[0]
    near, far = one[1], other[1]
    return far != UNMEASURED and near <= share * far and far - near >= MARGIN


def _latencies(peers: Iterable[Peer], *, of: Collection[str]) -> dict[str, float]:
    """The median round trip from others to each of `of`, in seconds, as those who are online report it."""
    seen: dict[str, list[float]] = {name: [] for name in of}
    for peer in peers:
        if peer.report is None or not peer.assignment.online:
            continue
        for link in peer.report.links:
            times = seen.get(link.peer)
            if times is not None and link.latency is not None and link.path is PathKind.DIRECT:
                times.append(link.latency)
    return {
        name: sorted(times)[(len(times) - 1) // 2] if times else UNMEASURED for name, times in seen.items()
    }
