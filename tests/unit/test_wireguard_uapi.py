"""WireGuard's user-space configuration protocol: what is written, what is read, and that junk is refused."""

from __future__ import annotations

import json
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scope_agent.wireguard.device import (
    AddAllowedIps,
    AddPeer,
    DesiredDevice,
    DesiredPeer,
    RemovePeer,
    SetAllowedIps,
    SetEndpoint,
    SetFwmark,
    SetKeepalive,
    SetListenPort,
    SetPrivateKey,
    SetPsk,
)
from scope_agent.wireguard.uapi import (
    UapiAction,
    UapiError,
    parse_device,
    parse_errno,
    render_action,
    render_state,
)

from scope.model import Endpoint, PublicKey, Secret

KEY = PublicKey(bytes([0xAB]) * 32)
HEX = "ab" * 32
PSK = Secret(bytes([0xCD]) * 32)
X, Y = ip_network("10.9.0.1/32"), ip_network("fd09::1/128")

ANSWER = f"""private_key={"11" * 32}
listen_port=7000
fwmark=81
something_new=1
public_key={HEX}
preshared_key={"cd" * 32}
protocol_version=1
endpoint=[2001:db8::1]:7001
last_handshake_time_sec=1700000000
last_handshake_time_nsec=250000000
tx_bytes=20
rx_bytes=10
persistent_keepalive_interval=25
allowed_ip=10.9.0.1/32
allowed_ip=fd09::1/128
public_key={"ef" * 32}
preshared_key={"00" * 32}
last_handshake_time_sec=0
last_handshake_time_nsec=0
errno=0

"""


def test_everything_that_a_device_says_is_read() -> None:
    device = parse_device(ANSWER)
    assert device.private_key == Secret(bytes([0x11]) * 32)
    assert (device.listen_port, device.fwmark) == (7000, 81)
    first, second = device.peers.values()
    assert first.key == KEY
    assert first.endpoint == Endpoint.parse("[2001:db8::1]:7001")
    assert first.allowed_ips == {X, Y}
    assert first.psk == PSK
    assert (first.keepalive, first.rx, first.tx) == (25, 10, 20)
    assert first.last_handshake == 1700000000.25
    assert (second.endpoint, second.psk, second.last_handshake) == (None, None, None)


def test_a_peer_of_which_nothing_new_is_said_is_the_same_object_again() -> None:
    before = parse_device(ANSWER)
    after = parse_device(ANSWER.replace("rx_bytes=10", "rx_bytes=11"), told=before.told)
    other = PublicKey(bytes([0xEF]) * 32)
    assert after.peers[other] is before.peers[other]
    assert (before.peers[KEY].rx, after.peers[KEY].rx) == (10, 11)
    assert after.peers == parse_device(ANSWER.replace("rx_bytes=10", "rx_bytes=11")).peers
    assert len(after.told) == 2  # what was said before is forgotten


def test_a_reading_that_was_cut_short_is_refused() -> None:
    for cut in (ANSWER.rpartition("errno=0")[0] + "\n", "listen_port=1\n\n", ""):
        with pytest.raises(UapiError, match="errno"):
            parse_device(cut)
    assert parse_device("errno=0\n\n").peers == {}


@pytest.mark.parametrize(
    ("action", "lines"),
    [
        (SetPrivateKey(PSK), ["private_key=" + "cd" * 32]),
        (SetListenPort(7000), ["listen_port=7000"]),
        (SetFwmark(81), ["fwmark=81"]),
        (RemovePeer(KEY), [f"public_key={HEX}", "remove=true"]),
        (
            AddPeer(KEY, Endpoint.parse("192.0.2.1:7"), frozenset({X, Y}), 20, PSK),
            [
                f"public_key={HEX}",
                "endpoint=192.0.2.1:7",
                "preshared_key=" + "cd" * 32,
                "replace_allowed_ips=true",
                "allowed_ip=10.9.0.1/32",
                "allowed_ip=fd09::1/128",
                "persistent_keepalive_interval=20",
            ],
        ),
        (
            SetEndpoint(KEY, Endpoint.parse("[2001:db8::1]:7")),
            [f"public_key={HEX}", "update_only=true", "endpoint=[2001:db8::1]:7"],
        ),
        (SetPsk(KEY, PSK), [f"public_key={HEX}", "update_only=true", "preshared_key=" + "cd" * 32]),
        (
            AddAllowedIps(KEY, frozenset({X})),
            [f"public_key={HEX}", "update_only=true", "allowed_ip=10.9.0.1/32"],
        ),
        (
            SetAllowedIps(KEY, frozenset()),
            [f"public_key={HEX}", "update_only=true", "replace_allowed_ips=true"],
        ),
        (
            SetKeepalive(KEY, 0),
            [f"public_key={HEX}", "update_only=true", "persistent_keepalive_interval=0"],
        ),
    ],
)
def test_each_action_is_one_operation(action: UapiAction, lines: list[str]) -> None:
    assert render_action(action).splitlines() == ["set=1", *lines, ""]


def test_the_state_file_holds_the_whole_device_and_each_prefix_once() -> None:
    desired = DesiredDevice(
        name="scope0",
        private_key=PSK,
        public_key=KEY,
        listen_port=7000,
        mtu=1300,
        peers={
            key: DesiredPeer(key, allowed_ips=frozenset({X})) for key in (KEY, PublicKey(bytes([0xFF]) * 32))
        },
    )
    state = json.loads(render_state(desired))
    assert (state["version"], state["mtu"]) == (1, 1300)
    lines = state["uapi"].splitlines()
    assert lines[:5] == [
        "set=1",
        "private_key=" + "cd" * 32,
        "fwmark=0",
        "listen_port=7000",
        "replace_peers=true",
    ]
    assert lines.count("allowed_ip=10.9.0.1/32") == 1
    assert lines.index("allowed_ip=10.9.0.1/32") < lines.index("public_key=" + "ff" * 32)
    assert state["uapi"].endswith("\n\n")


@pytest.mark.parametrize(
    ("answer", "code"), [("errno=0\n\n", 0), ("errno=-98\n\n", 98), ("a=b\nerrno=5\n\n", 5)]
)
def test_the_errno_is_read_without_its_sign(answer: str, code: int) -> None:
    assert parse_errno(answer) == code


@pytest.mark.parametrize("answer", ["", "\n\n", "listen_port=1\n\n", "errno=many\n\n"])
def test_an_answer_without_an_errno_is_refused(answer: str) -> None:
    with pytest.raises(UapiError):
        parse_errno(answer)


def test_an_error_quotes_no_value() -> None:
    with pytest.raises(UapiError) as refusal:
        parse_device("private_key=0123456789abcdefg\nerrno=0\n\n")
    assert "0123" not in str(refusal.value)


def test_what_was_read_shows_no_secret() -> None:
    text = repr(parse_device(ANSWER))
    assert "11" * 32 not in text
    assert "cd" * 32 not in text


known = st.sampled_from([line.partition("=")[0] for line in ANSWER.splitlines() if line])
values = (
    st.text(max_size=70) | st.integers().map(str) | st.just(HEX) | st.just("10.9.0.0/16") | st.just("[::1]:0")
)


@given(st.lists(st.tuples(known, values), max_size=12))
def test_junk_is_read_or_refused_but_never_breaks_the_reader(lines: list[tuple[str, str]]) -> None:
    text = "".join(f"{key}={value}\n" for key, value in lines) + "errno=0\n\n"
    try:
        parse_device(text)
        parse_errno(text)
    except UapiError:
        pass
