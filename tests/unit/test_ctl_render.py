"""What scopectl prints: tables and lines made from values, without a terminal."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_interface

import pytest

from scope import model
from scope.ctl import render
from scope.ctl.files import parse_resources
from scope.ctl.local import AgentStatus, ConditionView, PeerView, parse_status
from scope.ctl.ping import Target
from scope.model import (
    Addressing,
    Assignment,
    Condition,
    HubChoice,
    Mesh,
    MeshCounts,
    MeshSpec,
    MeshStatus,
    Meta,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    PublicKey,
    Role,
    Tombstone,
)

WALL = 1_800_000_000.0
KEY = PublicKey(bytes(32))
MESH = Mesh(
    Meta("home", uid="u", created=WALL - 7200),
    MeshSpec(Addressing(IPv4Network("100.64.0.0/16"), IPv6Network("fd5c:be1:7a30::/64"))),
    MeshStatus(counts=MeshCounts(3, 2, 2, 0, 1)),
)
NAS = Peer(
    Meta("home.na", created=WALL - 90),
    PeerSpec("home"),
    PeerReport(PeerKeys(KEY, KEY, KEY), mapping=model.Mapping.ENDPOINT_INDEPENDENT, direct=2, unreachable=1),
    Assignment((ip_interface("100.64.0.7/16"),), Role.EDGE, online=True),
)
PEERS = (
    PeerView(
        "home.nas",
        ("fd00::1", "100.64.0.7"),
        "Direct",
        "[2001:db8::1]:51820",
        "IPv6",
        12.34,
        65,
        2048,
        10,
        True,
    ),
    PeerView("home.tv", (), "None", reason="both NATs map by destination"),
)
STATUS = AgentStatus(
    mesh="home",
    peer="home.me",
    addresses=("100.64.0.9",),
    device="scope0",
    device_kind="Kernel",
    listen_port=21000,
    connected=True,
    connected_since=7500.0,
    mapping="EndpointIndependent",
    endpoints=(("198.51.100.1:21000", "Reflexive"),),
    reflector="answering",
    peers=PEERS,
)


def test_the_table_of_meshes_answers_whether_they_work() -> None:
    text = render.meshes_table([MESH], wall=WALL, color=False)
    assert text.splitlines() == [
        "NAME  IPV6                IPV4           ONLINE  DIRECT  RELAYED  UNREACHABLE  AGE",
        "home  fd5c:be1:7a30::/64  100.64.0.0/16  2/3     2       0        1            2h",
    ]


def test_trouble_gets_a_column_when_there_is_any() -> None:
    conditions = (
        Condition("Ready", "False", "AddressesExhausted", "no address is left in 10.0.0.0/30"),
        Condition("RouteConflict", "False", "NoProblem", ""),
    )
    mesh = replace(MESH, status=MeshStatus(conditions=conditions))
    header, row = render.meshes_table([mesh], wall=WALL, color=False).splitlines()
    assert header.endswith("TROUBLE")
    assert row.endswith("Ready: no address is left in 10.0.0.0/30")


def test_the_table_of_peers_says_who_is_there_and_who_was_removed() -> None:
    gone = replace(
        NAS, meta=Meta("home.tv"), assignment=Assignment(tombstone=Tombstone("m", "p", KEY, KEY, bytes(64)))
    )
    new = Peer(Meta("home.ne"), PeerSpec("home"))
    off = replace(NAS, meta=Meta("home.of"), assignment=Assignment(last_seen=WALL - 300))
    text = render.peers_table([gone, NAS, new, off], wall=WALL, color=False)
    assert text.splitlines() == [
        "NAME     MESH  ROLE  ADDRESS     STATE       NAT                  DIRECT  RELAYED  UNREACHABLE  AGE",
        "home.na  home  Edge  100.64.0.7  Online      EndpointIndependent  2       0        1            90s",
        "home.ne  home  Edge  -           Pending     -                    -       -        -            -",
        "home.of  home  Edge  -           Offline 5m  EndpointIndependent  2       0        1            -",
        "home.tv  home  Edge  -           Removed     EndpointIndependent  2       0        1            -",
    ]


def test_what_get_prints_as_yaml_can_be_applied_again() -> None:
    text = render.resources_document([MESH, NAS], output="yaml", single=False)
    assert parse_resources(text, name="x") == [MESH, NAS]


def test_one_resource_is_an_object_and_several_are_a_list() -> None:
    assert (
        json.loads(render.resources_document([MESH], output="json", single=True))["metadata"]["name"]
        == "home"
    )
    several = json.loads(render.resources_document([MESH], output="json", single=False))
    assert (several["kind"], len(several["items"])) == ("List", 1)


def test_tokens_are_shown_with_what_is_left_of_their_life() -> None:
    tokens = [
        {
            "id": "abc",
            "mesh": "home",
            "role": "Auto",
            "expires": "2027-01-15T09:00:00Z",
            "singleUse": True,
            "used": 0,
        },
        {
            "id": "b\x1b[2J",
            "mesh": "home",
            "role": "Hub",
            "expires": "2027-01-15T07:00:00Z",
            "singleUse": False,
        },
    ]
    assert render.tokens_table(tokens, wall=WALL, color=False).splitlines() == [
        "ID     MESH  ROLE  EXPIRES  SINGLE USE  USED",
        "abc    home  Auto  in 60m   yes         0",
        "b?[2J  home  Hub   expired  no          0",
    ]


def test_the_status_shows_the_agent_and_every_peer_with_its_path() -> None:
    assert render.status_text(STATUS, color=False).splitlines() == [
        "Mesh:       home",
        "Peer:       home.me  100.64.0.9",
        "Device:     scope0 (Kernel), port 21000",
        "Registry:   connected for 2h5m",
        "NAT:        EndpointIndependent",
        "Endpoints:  198.51.100.1:21000 (Reflexive)",
        "Reflector:  answering",
        "Peers:      2: 1 direct, 0 relayed, 1 without a path",
        "",
        "PEER      PATH    ENDPOINT             RTT      HANDSHAKE  RECEIVED  SENT  ADDRESS              "
        "WHY NOT DIRECT",
        "home.nas  Direct  [2001:db8::1]:51820  12.3 ms  65s ago    2.0 KiB   10 B  fd00::1, 100.64.0.7",
        "home.tv   None    -                    -        -          0 B       0 B   -                    "
        "both NATs map by destination",
    ]


def test_the_status_says_that_a_direct_path_was_guessed() -> None:
    peers = [
        {"name": "home.tv", "path": "Direct", "birthday": True},
        {"name": "home.pi", "path": "Direct", "birthday": False},
    ]
    text = render.status_text(parse_status({"mesh": "home", "peers": peers}), color=False)
    assert [line.partition("  -  ")[0].rstrip() for line in text.splitlines()[-2:]] == [
        "home.tv  Direct (birthday)",
        "home.pi  Direct",
    ]


def test_the_status_names_the_hub_of_each_relayed_peer() -> None:
    told = {"path": "Relayed", "endpoint": None}
    relayed = [
        {"name": "home.tv", "hub": "home.berlin", "userSpace": False} | told,
        {"name": "home.pi", "hub": "home.lima", "userSpace": True} | told,
        {"name": "home.pc", "hub": "home.lima", "userSpace": True, "carried": True} | told,
    ]
    text = render.status_text(parse_status({"mesh": "home", "peers": relayed}), color=False)
    assert "Peers:      3: 0 direct, 3 relayed, 0 without a path\n" in text
    assert [line.partition("  -  ")[0].rstrip() for line in text.splitlines()[-3:]] == [
        "home.tv  Relayed via home.berlin",
        "home.pi  Relayed via home.lima (user space)",
        "home.pc  Relayed via home.lima (TCP)",
    ]


def test_the_status_of_a_hub_says_for_whom_it_relays_and_how_much() -> None:
    told = {
        "pairs": 3,
        "packets": 2050,
        "bytes": 2_099_000,
        "error": "",
        "busiest": [
            {
                "peers": ["home.nas", "home.tv"],
                "sent": [{"packets": 2000, "bytes": 2_097_152}, {"packets": 40, "bytes": 1536}],
                "by": ["Kernel", "UserSpace"],
                "capped": True,
            },
            {"peers": ["home.pi", "home.tv"], "sent": [{"bytes": 312}], "by": ["Kernel"], "capped": False},
        ],
    }
    status = {"mesh": "home", "peers": [{"name": "home.tv", "path": "Direct"}], "relayed": told}
    text = render.status_text(parse_status(status), color=False)
    assert "Relaying:   3 pairs, 2.0 MiB in 2050 packets; the busiest 2 are below\n" in text
    assert text.splitlines()[-4:] == [
        "",
        "RELAYED FOR  AND      TO THE FIRST  TO THE SECOND  BY                  OF LATE",
        "home.nas     home.tv  2.0 MiB       1.5 KiB        kernel, user space  over its limit",
        "home.pi      home.tv  312 B         0 B            kernel",
    ]
    idle = {"pairs": 1, "error": "nft does not answer"}
    text = render.status_text(parse_status(status | {"relayed": idle}), color=False)
    assert "Relaying:   1 pair, 0 B in 0 packets (nft does not answer)\n" in text.partition("PEER ")[0]
    assert "RELAYED FOR" not in text
    assert "Relaying" not in render.status_text(parse_status(status | {"relayed": None}), color=False)


def test_a_mesh_with_hubs_says_how_many_there_are() -> None:
    hubs = (HubChoice("home.a", True, ""), HubChoice("home.b", True, ""), HubChoice("home.c", False, ""))
    lost = Condition("HubsAvailable", "False", "AllOffline", "no hub is online, of home.a, home.b: start")
    held = Condition("HubsAvailable", "True", "HubsAvailable", "relayed by home.a, home.b")
    mesh = replace(MESH, status=replace(MESH.status, hubs=hubs, conditions=(lost,)))
    well = replace(mesh, meta=Meta("work"), status=replace(mesh.status, conditions=(held,)))
    header, *rows = render.meshes_table([mesh, well], wall=WALL, color=False).splitlines()
    at = header.index("HUBS")
    assert [row[at : at + 6].strip() for row in rows] == ["2", "2"]
    assert rows[0].endswith("HubsAvailable: no hub is online, of home.a, home.b: start")
    assert "HubsAvailable" not in rows[1]


def test_the_status_tells_what_is_wrong() -> None:
    status = replace(
        STATUS,
        connected=False,
        connected_since=12.0,
        registry_reason="connection refused",
        peers=(),
        conditions=(ConditionView("Disk", "", "", "no space left"),),
    )
    text = render.status_text(status, color=False)
    assert "Registry:   not connected for 12s: connection refused (the mesh goes on without it" in text
    assert "Disk:       no space left\n" in text
    assert "Peers:      no other peer is known\n" in text


def test_the_status_tells_what_the_agent_lost_and_nothing_where_it_lost_nothing() -> None:
    status = replace(
        STATUS, unread=2, inbox_lost=3, courier_lost=1, unsent=(("TOO_LARGE", 4), ("UNREACHABLE", 5))
    )
    assert (
        "Lost:       2 not for us or not readable, 3 came faster than they were read, 1 calls that the "
        "registry could not take, 9 not sent (4 too large, 5 unreachable)\n"
    ) in render.status_text(status, color=False)
    assert "Lost" not in render.status_text(STATUS, color=False)


def test_a_peer_that_nobody_hears_from_is_told_apart() -> None:
    lonely = replace(STATUS, peers=(PeerView("home.tv", path="None"),))
    assert render.status_text(lonely, color=False).endswith("the registry does not hear from it either\n")


def test_a_row_is_one_line_however_long() -> None:
    long = replace(STATUS, peers=(replace(PEERS[1], reason="w" * 500),))
    assert render.status_text(long, color=False).splitlines()[-1].endswith("w" * 500)


def test_colours_are_only_where_they_are_wanted() -> None:
    assert "\x1b[" not in render.status_text(STATUS, color=False)
    assert "\x1b[32mDirect" in render.status_text(STATUS, color=True)


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        (PEERS[0], "direct by [2001:db8::1]:51820"),
        (
            replace(PEERS[0], path="Relayed", reason="UDP is blocked"),
            "relayed by [2001:db8::1]:51820 (UDP is blocked)",
        ),
        (
            replace(PEERS[0], path="Relayed", reason="UDP is blocked", hub="home.berlin"),
            "relayed via home.berlin (UDP is blocked)",
        ),
        (
            replace(PEERS[0], path="Relayed", hub="home.berlin", user_space=True),
            "relayed via home.berlin (user space)",
        ),
        (
            replace(PEERS[0], path="Relayed", hub="home.berlin", user_space=True, carried=True),
            "relayed via home.berlin (TCP)",
        ),
        (PEERS[1], "no path (both NATs map by destination)"),
        (None, "the agent no longer knows this peer"),
    ],
)
def test_each_ping_tells_the_path_in_use(peer: PeerView | None, text: str) -> None:
    target = Target("home.nas", ip_interface("fd00::1/64").ip)
    assert render.ping_line(target, 3, 0.0123, peer) == f"home.nas (fd00::1) #3: 12.3 ms, {text}"


def test_the_summary_of_pings_counts_the_lost_ones() -> None:
    target = Target("home.nas", ip_interface("fd00::1/64").ip)
    summary = render.ping_summary(target, [0.010, "no reply within 2 s", 0.030])
    assert summary == "home.nas: 2 of 3 pings answered; fastest 10.0 ms, average 20.0 ms, slowest 30.0 ms"
    assert render.ping_summary(target, ["no reply"]) == "home.nas: 0 of 1 pings answered"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (12_000, "3h20m"),
        (172_800, "2d"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert render.short_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (200 << 20, "200 MiB"), (3 << 40, "3.0 TiB")],
)
def test_bytes_have_units(count: int, text: str) -> None:
    assert render.byte_count(count) == text


def test_the_status_shows_the_key_of_each_pair_where_a_mesh_has_keys() -> None:
    def peer(name: str, **psk: object) -> dict[str, object]:
        return {"name": name, "path": "Direct", "psk": psk}

    peers = [
        peer("home.nas", epoch=7, ageSeconds=2040, suite=2, trust="CA", laidEpoch=8, failure=""),
        peer("home.pi", epoch=None, ageSeconds=None, withheld=True, conflict=False, failure="no answer"),
        peer("home.tv", epoch=2, ageSeconds=5, withheld=False, conflict=True, failure="too late"),
    ]
    header, *rows = render.status_text(
        parse_status({"mesh": "home", "peers": peers}), color=False
    ).splitlines()[-4:]
    at = header.index("POST-QUANTUM KEY")
    assert [row[at:].partition("  ")[0] for row in rows] == [
        "#7 for 34m, suite 2, trust CA (#8 waits for its proof)",
        "none (no traffic without a key: no answer)",
        "#2 for 5s (another program replaces it)",
    ]


def test_a_mesh_without_keys_has_no_column_for_them() -> None:
    none = {"epoch": None, "ageSeconds": None, "withheld": False, "conflict": False, "failure": ""}
    peers = [{"name": "home.nas", "path": "Direct", "psk": none}]
    text = render.status_text(parse_status({"mesh": "home", "peers": peers}), color=False)
    assert "QUANTUM" not in text
