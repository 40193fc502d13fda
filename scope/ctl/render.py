"""Values become text: tables for people, JSON and YAML for programs. Pure; the time is an argument."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import TextIO

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scope.ctl.local import AgentStatus, PeerView, RelayedPairView, RelayedView
from scope.ctl.ping import Target
from scope.model import Condition, KeyCounts, Mesh, Peer, Service
from scope.resources import API_VERSION, parse_time, to_dict

WIDE = 10_000  # columns: one row is one line, as in kubectl, also where the terminal then breaks it
NOTHING = "-"
HOLDING = ("Ready", "HubsAvailable", "PostQuantum")  # conditions that ought to be true
STYLES = {
    "Direct": "green",
    "Routed": "green",
    "Relayed": "yellow",
    "None": "red",
    "Offline": "dim",
    "Removed": "dim",
}

_FORWARDED_BY = {"Kernel": "kernel", "UserSpace": "user space"}

Row = Sequence[str]


def resources_document(resources: Sequence[Mesh | Peer | Service], *, output: str, single: bool) -> str:
    """Resources as JSON (one object, or a list as kubectl has it) or YAML (documents that `apply` takes)."""
    documents = [to_dict(resource) for resource in resources]
    if output == "yaml":
        return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=WIDE)
    whole: object = (
        documents[0] if single else {"apiVersion": API_VERSION, "kind": "List", "items": documents}
    )
    return json_text(whole)


def json_text(value: object) -> str:
    """Indented JSON with its last line ended."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def yaml_text(value: object) -> str:
    """YAML in the order of the value."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=WIDE)


def meshes_table(meshes: Sequence[Mesh], *, wall: float, color: bool) -> str:
    """One line per mesh, which answers whether it works."""
    are_hubs = any(mesh.status.hubs for mesh in meshes)
    are_keyed = any(mesh.status.counts.post_quantum is not None for mesh in meshes)
    rows = [
        (
            mesh.meta.name,
            str(mesh.spec.addressing.ipv6 or NOTHING),
            str(mesh.spec.addressing.ipv4 or NOTHING),
            f"{mesh.status.counts.online}/{mesh.status.counts.peers}",
            *((str(sum(each.chosen for each in mesh.status.hubs)),) if are_hubs else ()),
            str(mesh.status.counts.direct),
            str(mesh.status.counts.relayed),
            str(mesh.status.counts.unreachable),
            *((_key_counts(mesh.status.counts.post_quantum),) if are_keyed else ()),
            age(mesh.meta.created, wall),
            troubles(mesh.status.conditions),
        )
        for mesh in sorted(meshes, key=lambda mesh: mesh.meta.name)
    ]
    first = ("NAME", "IPV6", "IPV4", "ONLINE", *(("HUBS",) if are_hubs else ()))
    counts = ("DIRECT", "RELAYED", "UNREACHABLE", *(("POST-QUANTUM",) if are_keyed else ()))
    return table((*first, *counts, "AGE", "TROUBLE"), rows, color=color)


def peers_table(peers: Sequence[Peer], *, wall: float, color: bool) -> str:
    """One line per peer, which answers whether it is there and whom it reaches."""
    are_attached = any(peer.report is not None and peer.report.hub for peer in peers)
    are_keyed = any(peer.report is not None and peer.report.post_quantum is not None for peer in peers)
    rows = []
    for peer in sorted(peers, key=lambda peer: (peer.spec.mesh, peer.meta.name)):
        report, assignment = peer.report, peer.assignment
        rows.append(
            (
                peer.meta.name,
                peer.spec.mesh,
                str(assignment.role),
                ", ".join(str(interface.ip) for interface in assignment.addresses) or NOTHING,
                peer_state(peer, wall),
                str(report.mapping) if report else NOTHING,
                *(((report.hub if report else "") or NOTHING,) if are_attached else ()),
                *(
                    (str(report.direct), str(report.relayed), str(report.unreachable))
                    if report
                    else (NOTHING,) * 3
                ),
                *((_key_counts(report.post_quantum if report else None),) if are_keyed else ()),
                age(peer.meta.created, wall),
                troubles(assignment.conditions),
            )
        )
    header = (
        "NAME",
        "MESH",
        "ROLE",
        "ADDRESS",
        "STATE",
        "NAT",
        *(("HUB",) if are_attached else ()),
        "DIRECT",
        "RELAYED",
        "UNREACHABLE",
        *(("POST-QUANTUM",) if are_keyed else ()),
        "AGE",
        "TROUBLE",
    )
    return table(header, rows, color=color)


def tokens_table(tokens: Sequence[Mapping[str, object]], *, wall: float, color: bool) -> str:
    """One line per join token, never with its secret."""
    rows = [
        (
            printable(token.get("id")),
            printable(token.get("mesh")),
            printable(token.get("role")),
            _left(printable(token.get("expires")), wall),
            "yes" if token.get("singleUse") is True else "no",
            printable(token.get("used", 0)),
        )
        for token in tokens
    ]
    header = ("ID", "MESH", "ROLE", "EXPIRES", "SINGLE USE", "USED")
    return table(header, rows, color=color)


def status_text(status: AgentStatus, *, color: bool) -> str:
    """The agent's whole view: itself, what is wrong, then one line per peer."""
    endpoints = ", ".join(f"{endpoint} ({kind})" for endpoint, kind in status.endpoints)
    facts = [
        ("Mesh", status.mesh),
        ("Peer", f"{status.peer or 'not enrolled yet'}  {', '.join(status.addresses)}".rstrip()),
        ("Device", f"{status.device} ({status.device_kind or 'not there yet'}), port {status.listen_port}"),
        *((("Attached to", status.hub),) if status.hub else ()),
        ("Registry", _registry_text(status)),
        ("NAT", status.mapping or "Unknown"),
        ("Endpoints", endpoints or "none known yet"),
        ("Reflector", status.reflector or NOTHING),
        *(
            (condition.type, ": ".join(part for part in (condition.reason, condition.message) if part))
            for condition in status.conditions
        ),
        *((("Lost", lost),) if (lost := _lost_text(status)) else ()),
        *((("Relaying", _relayed_text(status.relayed)),) if status.relayed is not None else ()),
        ("Peers", _peers_summary(status.peers)),
    ]
    first = max(len(name) for name, _ in facts) + 3
    top = "".join(f"{name + ':':<{first}}{value}\n" for name, value in facts)
    tables = [_status_table(status.peers, color=color)] if status.peers else []
    if status.relayed is not None and status.relayed.busiest:
        tables.append(_relayed_table(status.relayed.busiest, color=color))
    return "\n".join((top, *tables))


def ping_line(target: Target, sequence: int, result: float | str, peer: PeerView | None) -> str:
    """One ping: how long it took or why it failed, and the path that is in use."""
    outcome = result if isinstance(result, str) else f"{result * 1000:.1f} ms"
    return f"{target.name} ({target.address}) #{sequence}: {outcome}, {path_text(peer)}"


def ping_summary(target: Target, results: Sequence[float | str]) -> str:
    """How many came back, and how fast."""
    times = [result * 1000 for result in results if isinstance(result, float)]
    line = f"{target.name}: {len(times)} of {len(results)} pings answered"
    if not times:
        return line
    average = sum(times) / len(times)
    return f"{line}; fastest {min(times):.1f} ms, average {average:.1f} ms, slowest {max(times):.1f} ms"


def path_text(peer: PeerView | None) -> str:
    """The path towards a peer in a few words, with the reason why it is not direct."""
    if peer is None:
        return "the agent no longer knows this peer"
    reason = f" ({peer.reason})" if peer.reason else ""
    match peer.path:
        case "Direct":
            return f"direct by {peer.endpoint}"
        case "Relayed":
            return f"relayed {_by_hub(peer)}{reason}"
        case "Routed":
            return f"routed by {peer.hub}"
        case _:
            return f"no path{reason}"


def peer_state(peer: Peer, wall: float) -> str:
    """Online, Offline and for how long, Removed, or Pending before the peer's agent ever reported."""
    assignment = peer.assignment
    if assignment.tombstone is not None:
        return "Removed"
    if assignment.online:
        return "Online"
    if peer.report is None:
        return "Pending"
    return f"Offline {age(assignment.last_seen, wall)}" if assignment.last_seen else "Offline"


def troubles(conditions: Sequence[Condition]) -> str:
    """What is wrong: conditions that ought to be true and are not, and those that name a fault."""
    return "; ".join(
        f"{condition.type}: {condition.message or condition.reason}"
        for condition in conditions
        if (condition.status == "False") == (condition.type in HOLDING) and condition.status != "Unknown"
    )


def age(since: float, wall: float) -> str:
    """Time passed since a wall-clock time, short; `-` where the time is not known."""
    return short_duration(max(0.0, wall - since)) if since else NOTHING


def short_duration(seconds: float) -> str:
    """A duration in its one or two largest units: 45s, 12m, 3h20m, 5d."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole}s"
    if whole < 7200:
        return f"{whole // 60}m"
    if whole < 172_800:
        minutes = whole % 3600 // 60
        return f"{whole // 3600}h{minutes}m" if minutes else f"{whole // 3600}h"
    return f"{whole // 86_400}d"


def byte_count(count: int) -> str:
    """Bytes in a unit that leaves at most four digits."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def table(header: Row, rows: Sequence[Row], *, color: bool) -> str:
    """Columns without lines, as kubectl has them. Empty last columns are left out; cells are never markup."""
    shown = len(header)
    while shown > 1 and all(not row[shown - 1] for row in rows):
        shown -= 1
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold" if color else "")
    for name in header[:shown]:
        grid.add_column(Text(name), no_wrap=True)
    for row in rows:
        grid.add_row(*(Text(cell, style=STYLES.get(cell.partition(" ")[0], "")) for cell in row[:shown]))
    out = io.StringIO()
    console = Console(
        file=out,
        width=WIDE,
        force_terminal=color,
        no_color=not color,
        color_system="standard" if color else None,
    )
    console.print(grid)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def in_color(out: TextIO) -> bool:
    """Whether `out` shows colours: a terminal does."""
    return out.isatty()


def printable(value: object) -> str:
    """Text of a value that came over the network, without what would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(value))


def _status_table(peers: Sequence[PeerView], *, color: bool) -> str:
    are_keyed = any(peer.psk_epoch is not None or peer.psk_note for peer in peers)
    rows = [
        (
            peer.name,
            _path(peer),
            peer.endpoint or NOTHING,
            NOTHING if peer.rtt is None else f"{peer.rtt:.1f} ms",
            NOTHING if peer.handshake is None else f"{short_duration(peer.handshake)} ago",
            byte_count(peer.rx),
            byte_count(peer.tx),
            *((_key(peer),) if are_keyed else ()),
            ", ".join(peer.addresses) or NOTHING,
            _why(peer),
        )
        for peer in peers
    ]
    first = ("PEER", "PATH", "ENDPOINT", "RTT", "HANDSHAKE", "RECEIVED", "SENT")
    keyed = ("POST-QUANTUM KEY",) if are_keyed else ()
    return table((*first, *keyed, "ADDRESS", "WHY NOT DIRECT"), rows, color=color)


def _relayed_table(pairs: Sequence[RelayedPairView], *, color: bool) -> str:
    rows = [
        (
            pair.first,
            pair.second,
            byte_count(pair.to_first),
            byte_count(pair.to_second),
            ", ".join(_FORWARDED_BY.get(by, by) for by in pair.by) or NOTHING,
            "over its limit" if pair.capped else "",
        )
        for pair in pairs
    ]
    return table(("RELAYED FOR", "AND", "TO THE FIRST", "TO THE SECOND", "BY", "OF LATE"), rows, color=color)


def _key(peer: PeerView) -> str:
    """The proved key by number, age, suite and trust, and what stands against a newer one; never the key."""
    notes = [
        note for note in (peer.psk_laid and f"#{peer.psk_laid} waits for its proof", peer.psk_note) if note
    ]
    note = f" ({'; '.join(notes)})" if notes else ""
    if peer.psk_epoch is None:
        return f"none{note}"
    age_ = "" if peer.psk_age is None else f" for {short_duration(peer.psk_age)}"
    suite = peer.psk_suite and f"suite {peer.psk_suite}"
    made = ", ".join(part for part in (suite, peer.psk_trust and f"trust {peer.psk_trust}") if part)
    return f"#{peer.psk_epoch}{age_}{f', {made}' if made else ''}{note}"


def _key_counts(counts: KeyCounts | None) -> str:
    """How many have a proved key, and what is not as it should be."""
    if counts is None:
        return NOTHING
    rest = [
        f"{count} {word}" for word, count in (("without", counts.unkeyed), ("failed", counts.failed)) if count
    ]
    return f"{counts.keyed} ({', '.join(rest)})" if rest else str(counts.keyed)


def _by_hub(peer: PeerView) -> str:
    """Who relays, or where to, of an agent that does not say who."""
    if not peer.hub:
        return f"by {peer.endpoint}"
    how = " (TCP)" if peer.carried else " (user space)" if peer.user_space else ""
    return f"via {peer.hub}{how}"


def _path(peer: PeerView) -> str:
    if peer.path == "Relayed" and peer.hub:
        return f"{peer.path} {_by_hub(peer)}"
    if peer.path == "Direct" and peer.birthday:
        return f"{peer.path} (birthday)"
    if peer.path == "Routed":
        return f"Routed by {peer.hub}"
    return peer.path or "None"


def _why(peer: PeerView) -> str:
    if peer.reason or peer.path in ("Direct", "Routed"):
        return peer.reason
    return "" if peer.online else "the registry does not hear from it either"


def _registry_text(status: AgentStatus) -> str:
    since = "" if status.connected_since is None else f" for {short_duration(status.connected_since)}"
    if status.connected:
        return f"connected{since}"
    reason = f": {status.registry_reason}" if status.registry_reason else ""
    return f"not connected{since}{reason} (the mesh goes on without it; new peers wait)"


def _relayed_text(relayed: RelayedView) -> str:
    pairs = "1 pair" if relayed.pairs == 1 else f"{relayed.pairs} pairs"
    error = f" ({relayed.error})" if relayed.error else ""
    rest = relayed.pairs - len(relayed.busiest)
    listed = f"; the busiest {len(relayed.busiest)} are below" if relayed.busiest and rest else ""
    return f"{pairs}, {byte_count(relayed.bytes)} in {relayed.packets} packets{error}{listed}"


def _lost_text(status: AgentStatus) -> str:
    unsent = ", ".join(f"{count} {why.lower().replace('_', ' ')}" for why, count in status.unsent)
    parts = [
        (status.unread, "not for us or not readable"),
        (status.inbox_lost, "came faster than they were read"),
        (status.courier_lost, "calls that the registry could not take"),
        (sum(count for _, count in status.unsent), f"not sent ({unsent})"),
    ]
    return ", ".join(f"{count} {what}" for count, what in parts if count)


def _peers_summary(peers: Sequence[PeerView]) -> str:
    if not peers:
        return "no other peer is known"
    kinds = [("direct", "Direct"), ("relayed", "Relayed"), ("routed", "Routed")]
    counts = [(word, sum(peer.path == path for peer in peers)) for word, path in kinds]
    counts = [(word, count) for word, count in counts if count or word != "routed"]
    rest = len(peers) - sum(count for _, count in counts)
    return f"{len(peers)}: " + ", ".join(
        f"{count} {word}" for word, count in [*counts, ("without a path", rest)]
    )


def _left(expires: str, wall: float) -> str:
    try:
        left = parse_time(expires) - wall
    except ValueError:
        return expires
    return f"in {short_duration(left)}" if left > 0 else "expired"
