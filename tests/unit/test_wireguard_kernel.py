"""Kernel WireGuard's driver without a kernel: pyroute2's import, arguments, messages, and its silence."""

from __future__ import annotations

import asyncio
import importlib
import logging
import subprocess
import sys
from base64 import b64encode
from ipaddress import ip_network
from typing import Any

import pytest
from pyroute2.netlink import ctrlmsg
from pyroute2.netlink.generic import AsyncGenericNetlinkSocket
from pyroute2.netlink.generic.wireguard import wgmsg
from scope_agent.wireguard.device import (
    NO_PSK,
    AddAllowedIps,
    AddPeer,
    RemovePeer,
    SetAllowedIps,
    SetEndpoint,
    SetFwmark,
    SetKeepalive,
    SetListenPort,
    SetPrivateKey,
    SetPsk,
)
from scope_agent.wireguard.shell.kernel import (
    ALLOWED_IPS_PER_CALL,
    DumpMessage,
    Reader,
    WireGuardAction,
    calls_for,
)

from scope.model import Endpoint, IPNetwork, PublicKey, Secret

KEY = PublicKey(bytes([0xAB]) * 32)
PSK = Secret(bytes([0xCD]) * 32)
TEXT = b64encode(KEY.raw)
MANY: list[IPNetwork] = [*ip_network("10.64.0.0/12").subnets(new_prefix=24)][:2500]
MODULE = "scope_agent.wireguard.shell.pyroute2_wireguard"


def message(*attributes: tuple[str, Any]) -> Any:
    """A message of a dump, by way of the bytes that the kernel would send."""
    written = wgmsg()
    written["attrs"] = [list(attribute) for attribute in attributes]
    written.encode()
    read = DumpMessage(written.data)
    read.decode()
    return read


def peer(*allowed_ips: IPNetwork, **facts: Any) -> dict[str, Any]:
    """One peer of a message; allowed IPs as (family, address, length)."""
    prefixes = [
        {
            "attrs": [
                ["WGALLOWEDIP_A_FAMILY", 2 if prefix.version == 4 else 10],
                ["WGALLOWEDIP_A_IPADDR", prefix.network_address.packed],
                ["WGALLOWEDIP_A_CIDR_MASK", prefix.prefixlen],
            ]
        }
        for prefix in allowed_ips
    ]
    named = [[f"WGPEER_A_{name}", value] for name, value in facts.items()]
    return {"attrs": [["WGPEER_A_PUBLIC_KEY", TEXT], *named, ["WGPEER_A_ALLOWEDIPS", prefixes]]}


def run_python(code: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the import ---------------------------------------------------------------------------------------------


def test_an_agent_without_a_kernel_device_does_not_load_pyroute2() -> None:
    assert run_python("import sys, scope_agent.run; print('pyroute2' in sys.modules)") == "False"


def test_only_wireguards_part_of_pyroute2_is_loaded() -> None:
    loaded = run_python(
        f"import sys, {MODULE}; print(*(n for n in sys.modules if n.startswith('pyroute2.')))"
    )
    assert "pyroute2.netlink.generic.wireguard" in loaded
    for part in ("ndb", "ipdb", "iproute", "conntrack", "ethtool", "nftables"):
        assert f"pyroute2.{part}" not in loaded


def test_who_needs_the_whole_of_pyroute2_afterwards_gets_it() -> None:
    said = run_python(
        f"import {MODULE} as ours, pyroute2\n"
        "from pyroute2 import NDB, WireGuard, netlink\n"
        "print(WireGuard.async_class is ours.AsyncWireGuard, pyroute2.netlink is netlink, NDB.__name__)"
    )
    assert said == "True True NDB"


def test_a_pyroute2_that_was_loaded_before_is_used_as_it_is() -> None:
    said = run_python(
        f"import pyroute2, {MODULE} as ours\nprint(pyroute2.AsyncWireGuard is ours.AsyncWireGuard)"
    )
    assert said == "True"


def test_a_pyroute2_whose_modules_need_its_init_is_loaded_whole() -> None:
    said = run_python(
        "import sys, importlib.abc\n"
        "refused = []\n"
        "class Needy(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        needy = name == 'pyroute2.netlink.generic'\n"
        "        if needy and '__version__' not in vars(sys.modules['pyroute2']):\n"
        "            refused.append(name)\n"
        "            raise ImportError('cannot import name')\n"
        "sys.meta_path.insert(0, Needy())\n"
        f"import {MODULE} as ours, pyroute2\n"
        "print(len(refused), pyroute2.AsyncWireGuard is ours.AsyncWireGuard)"
    )
    assert said == "1 True"


# --- secrets ------------------------------------------------------------------------------------------------


def converse() -> None:
    """One question to the kernel, which pyroute2 writes down in full where it is let."""

    async def ask() -> None:
        async with AsyncGenericNetlinkSocket() as socket:
            await socket.bind("nlctrl", ctrlmsg)

    asyncio.run(ask())


def test_pyroute2_logs_no_message_even_where_everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        importlib.import_module("pyroute2")
        converse()
        assert not [record for record in caplog.records if record.name.startswith("pyroute2")]
    with caplog.at_level(logging.DEBUG, "pyroute2.netlink"):
        converse()
        assert any("nlctrl" in record.getMessage() for record in caplog.records)


# --- actions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "call"),
    [
        (SetPrivateKey(PSK), {"private_key": b64encode(PSK.raw)}),
        (SetListenPort(47001), {"listen_port": 47001}),
        (SetFwmark(0), {"fwmark": 0}),
        (RemovePeer(KEY), {"peer": {"public_key": TEXT, "remove": True}}),
        (
            SetEndpoint(KEY, Endpoint.parse("[2001:db8::1]:7001")),
            {
                "peer": {
                    "public_key": TEXT,
                    "update_only": True,
                    "endpoint_addr": "2001:db8::1",
                    "endpoint_port": 7001,
                }
            },
        ),
        (
            SetPsk(KEY, NO_PSK),
            {"peer": {"public_key": TEXT, "update_only": True, "preshared_key": b64encode(bytes(32))}},
        ),
        (
            SetKeepalive(KEY, 0),
            {"peer": {"public_key": TEXT, "update_only": True, "persistent_keepalive": 0}},
        ),
        (
            SetAllowedIps(KEY, frozenset()),
            {
                "peer": {
                    "public_key": TEXT,
                    "update_only": True,
                    "replace_allowed_ips": True,
                    "allowed_ips": [],
                }
            },
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_action_is_one_call_with_its_one_fact(action: WireGuardAction, call: dict[str, Any]) -> None:
    assert calls_for(action) == [call]


def test_a_new_peer_comes_with_all_that_is_wanted_of_it() -> None:
    prefix = ip_network("10.9.0.0/24")
    (call,) = calls_for(AddPeer(KEY, Endpoint.parse("192.0.2.1:1"), frozenset({prefix}), 20, PSK))
    assert call["peer"] == {
        "public_key": TEXT,
        "endpoint_addr": "192.0.2.1",
        "endpoint_port": 1,
        "replace_allowed_ips": True,
        "allowed_ips": ["10.9.0.0/24"],
        "persistent_keepalive": 20,
        "preshared_key": b64encode(PSK.raw),
    }


@pytest.mark.parametrize("kind", [AddPeer, SetAllowedIps, AddAllowedIps])
def test_many_allowed_ips_are_several_calls_of_which_the_first_alone_replaces(kind: type) -> None:
    calls = [call["peer"] for call in calls_for(kind(KEY, allowed_ips=frozenset(MANY)))]
    assert len(calls) == 3
    assert sorted(text for call in calls for text in call["allowed_ips"]) == sorted(map(str, MANY))
    assert all(len(call["allowed_ips"]) <= ALLOWED_IPS_PER_CALL for call in calls)
    replacing = [call.get("replace_allowed_ips", False) for call in calls]
    assert replacing == [kind is not AddAllowedIps, False, False]
    bringing_back = [not call.get("update_only", False) for call in calls]
    assert bringing_back == [kind is AddPeer, False, False]


# --- observations -------------------------------------------------------------------------------------------


def test_a_device_is_read_to_the_last_fact() -> None:
    prefixes = (ip_network("10.9.0.0/24"), ip_network("fd09::/64"))
    device = Reader().read(
        "scope0",
        [
            message(
                ("WGDEVICE_A_PUBLIC_KEY", TEXT),
                ("WGDEVICE_A_LISTEN_PORT", 47001),
                ("WGDEVICE_A_FWMARK", 0x51),
                (
                    "WGDEVICE_A_PEERS",
                    [
                        peer(
                            *prefixes,
                            PRESHARED_KEY=b64encode(PSK.raw),
                            ENDPOINT={"addr": "2001:db8::1", "port": 7001},
                            PERSISTENT_KEEPALIVE_INTERVAL=25,
                            LAST_HANDSHAKE_TIME={"tv_sec": 1_700_000_000, "tv_nsec": 500_000_000},
                            RX_BYTES=7,
                            TX_BYTES=1 << 40,
                        )
                    ],
                ),
            )
        ],
    )
    assert (device.public_key, device.listen_port, device.fwmark) == (KEY, 47001, 0x51)
    read = device.peers[KEY]
    assert read.endpoint == Endpoint.parse("[2001:db8::1]:7001")
    assert read.allowed_ips == frozenset(prefixes)
    assert (read.keepalive, read.psk, read.rx, read.tx) == (25, PSK, 7, 1 << 40)
    assert read.last_handshake == 1_700_000_000.5


def test_zeros_and_absent_facts_are_read_as_none() -> None:
    empty = peer(PRESHARED_KEY=b64encode(bytes(32)), LAST_HANDSHAKE_TIME={"tv_sec": 0, "tv_nsec": 0})
    device = Reader().read("scope0", [message(("WGDEVICE_A_LISTEN_PORT", 0), ("WGDEVICE_A_PEERS", [empty]))])
    assert device.public_key is None
    read = device.peers[KEY]
    assert (read.psk, read.endpoint, read.last_handshake, read.allowed_ips) == (None, None, None, frozenset())


def test_a_peer_that_was_split_over_messages_is_put_together() -> None:
    first = peer(*MANY[:900], ENDPOINT={"addr": "192.0.2.1", "port": 1}, PRESHARED_KEY=b64encode(PSK.raw))
    device = Reader().read(
        "scope0",
        [
            message(("WGDEVICE_A_LISTEN_PORT", 47001), ("WGDEVICE_A_PEERS", [first])),
            message(("WGDEVICE_A_PEERS", [peer(*MANY[900:1800])])),
            message(("WGDEVICE_A_PEERS", [peer(*MANY[1800:])])),
        ],
    )
    assert device.listen_port == 47001
    assert device.peers[KEY].allowed_ips == frozenset(MANY)
    assert (device.peers[KEY].endpoint, device.peers[KEY].psk) == (Endpoint.parse("192.0.2.1:1"), PSK)


def test_only_a_peer_that_changed_is_read_again_and_a_removed_one_is_forgotten() -> None:
    other = {"attrs": [["WGPEER_A_PUBLIC_KEY", b64encode(bytes(32))]]}

    def dump(*entries: dict[str, Any]) -> list[Any]:
        return [message(("WGDEVICE_A_PEERS", list(entries)))]

    reader = Reader()
    before = reader.read("scope0", dump(peer(RX_BYTES=1), other)).peers
    after = reader.read("scope0", dump(peer(RX_BYTES=2), other)).peers
    assert [after[key] is before[key] for key in (KEY, PublicKey(bytes(32)))] == [False, True]
    assert after[KEY].rx == 2
    assert reader.read("scope0", dump(other)).peers.keys() == {PublicKey(bytes(32))}
