"""Which peers of a mesh are to be hubs and where they are reached, and what the registry made of it."""

from __future__ import annotations

from scope.model import HubChoice, HubMode, Hubs, RelayLimits
from scope.resources.fields import Fields, each_once, unless_empty
from scope.resources.limits import FIRST_PORT, MAX_HUBS, MAX_RATE, MAX_REASON, MIN_PORTS, NODE_PORTS
from scope.resources.selector import read_selector, selector_dict
from scope.resources.times import format_time
from scope.resources.values import (
    read_boolean,
    read_choice,
    read_integer,
    read_subdomain,
    read_text,
    read_time,
)


def read_hubs(fields: Fields, *, listen_port: int) -> Hubs:
    """Read `spec.hubs` of a mesh; `listen_port` is WireGuard's, 0 where each agent picks its own."""
    usual = Hubs()
    limits = fields.sub("limits")
    return Hubs(
        mode=fields.optional("mode", lambda value: read_choice(HubMode, value), usual.mode),
        names=each_once(
            fields,
            "names",
            fields.items("names", read_subdomain, limit=MAX_HUBS),
            key=lambda name: name,
        ),
        selector=read_selector(selector) if (selector := fields.sub_if_any("selector")) else None,
        ports=_read_ports(fields.sub("ports"), usual.ports, listen_port=listen_port),
        limits=RelayLimits(
            pair=limits.optional("pairBytesPerSecond", _read_rate, usual.limits.pair),
            total=limits.optional("totalBytesPerSecond", _read_rate, usual.limits.total),
        ),
        carrier_port=fields.optional(
            "carrierPort", lambda value: read_integer(value, 0, 65535), usual.carrier_port
        ),
    )


def _read_ports(fields: Fields, usual: tuple[int, int], *, listen_port: int) -> tuple[int, int]:
    first, last = (
        fields.optional(name, lambda value: read_integer(value, FIRST_PORT, 65535), default)
        for name, default in zip(("first", "last"), usual, strict=True)
    )
    if fields.refused("first", "last"):
        return usual
    found = f"{first} to {last}"
    if last - first + 1 < MIN_PORTS:
        fields.refuse(
            f"{found} is too short",
            f"{MIN_PORTS} ports or more, the last one not before the first",
            "each pair that is relayed takes a port that is unique for either of its peers",
        )
    elif first < NODE_PORTS.stop and last >= NODE_PORTS.start:
        fields.refuse(
            f"{found} overlaps {NODE_PORTS.start} to {NODE_PORTS.stop - 1}",
            f"ports below {NODE_PORTS.start} or above {NODE_PORTS.stop - 1}",
            "Kubernetes gives these to Services of type NodePort, and would take what is relayed there",
        )
    elif listen_port and first <= listen_port <= last:
        fields.refuse(
            f"{found} holds {listen_port}",
            "a range without spec.listenPort",
            "WireGuard of the hub itself listens there",
        )
    return first, last


def _read_rate(value: object) -> int:
    return read_integer(value, 0, MAX_RATE)


def hubs_dict(hubs: Hubs) -> dict[str, object]:
    """The document of `spec.hubs`."""
    return {
        "mode": str(hubs.mode),
        **unless_empty("names", hubs.names),
        **({"selector": selector_dict(hubs.selector)} if hubs.selector is not None else {}),
        "ports": {"first": hubs.ports[0], "last": hubs.ports[1]},
        "limits": {
            "pairBytesPerSecond": hubs.limits.pair,
            "totalBytesPerSecond": hubs.limits.total,
        },
        "carrierPort": hubs.carrier_port,
    }


def read_hub_choice(fields: Fields) -> HubChoice:
    """Read one entry of `status.hubs` of a mesh."""
    return HubChoice(
        peer=fields.required("peer", read_subdomain, ""),
        chosen=fields.required("chosen", read_boolean, False),
        reason=fields.optional("reason", lambda value: read_text(value, MAX_REASON), ""),
        contested_since=fields.optional("contestedSince", read_time, 0.0),
    )


def hub_choice_dict(choice: HubChoice) -> dict[str, object]:
    """The document of one entry of `status.hubs` of a mesh."""
    return {
        "peer": choice.peer,
        "chosen": choice.chosen,
        **({"reason": choice.reason} if choice.reason else {}),
        **({"contestedSince": format_time(choice.contested_since)} if choice.contested_since else {}),
    }
