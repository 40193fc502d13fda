"""One conformance test for every carrier of a device: a process here, the kernel in a virtual machine."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
from scope_agent.wireguard.device import (
    NO_PSK,
    Action,
    AddAllowedIps,
    DesiredDevice,
    PortTaken,
    RemoveGuard,
    RemovePeer,
    RemoveRoute,
    SetEndpoint,
    SetListenPort,
)
from scope_agent.wireguard.plan import count_drift, plan_device
from scope_agent.wireguard.shell import choose_device

from scope.model import ConfigError, Endpoint, IPNetwork, Secret
from tests.netns.device_fixture import (
    KIND,
    Machine,
    Namespace,
    connect,
    desired_device,
    echo,
    lost_while,
    machine,
    make_keys,
    peer_at,
    run,
    unused_name,
    wait_until,
)

A, B, C = make_keys(1), make_keys(2), make_keys(3)
PSK = bytes(range(32))
UNPRIVILEGED = ["setpriv", "--bounding-set=-net_admin,-net_raw", "--inh-caps=-net_admin,-net_raw"]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def here(namespace: Namespace, tmp_path: Path) -> Iterator[Machine]:
    with machine(namespace, tmp_path) as made:
        yield made


def full(name: str) -> DesiredDevice:
    return desired_device(
        name,
        A,
        peer_at(B, "192.0.2.2:7000", "10.9.0.2/32", "fd09::2/128", keepalive=20, psk=PSK),
        peer_at(C, "[2001:db8::3]:7001", "10.9.0.3/32"),
        port=47001,
        addresses=("10.9.0.1/16", "fd09::1/64"),
    )


def test_a_new_device_becomes_what_is_desired_to_the_last_fact(here: Machine) -> None:
    desired = full(here.device.name)
    observed = here.agree(desired)
    assert here.device.kind is KIND
    assert observed.exists
    assert observed.up
    assert observed.public_key == A.public
    assert (observed.listen_port, observed.mtu, observed.fwmark) == (47001, 1380, 0)
    assert observed.addresses == desired.addresses
    assert observed.routes == observed.guarded == desired.routes
    assert observed.peers.keys() == desired.peers.keys()
    peer = observed.peers[B.public]
    assert peer.endpoint == Endpoint.parse("192.0.2.2:7000")
    assert peer.allowed_ips == {ip_network("10.9.0.2/32"), ip_network("fd09::2/128")}
    assert peer.keepalive == 20
    assert peer.psk == Secret(PSK)
    assert peer.last_handshake is None
    assert observed.peers[C.public].endpoint == Endpoint.parse("[2001:db8::3]:7001")
    assert observed.peers[C.public].psk is None


def changes() -> dict[str, DesiredDevice]:
    base = full("any")
    b, c = base.peers[B.public], base.peers[C.public]

    def with_b(**facts: object) -> DesiredDevice:
        return replace(base, peers={**base.peers, B.public: replace(b, **facts)})  # type: ignore[arg-type]

    return {
        "key": replace(base, private_key=make_keys(9).private, public_key=make_keys(9).public),
        "port": replace(base, listen_port=47002),
        "mark": replace(base, fwmark=0x51),
        "mtu": replace(base, mtu=1300),
        "one address more": replace(base, addresses=base.addresses | {ip_interface("10.9.8.7/32")}),
        "one address less": replace(base, addresses=frozenset({ip_interface("10.9.0.1/16")})),
        "one route more": replace(base, routes=base.routes | {ip_network("10.77.0.0/24")}),
        "one route less": replace(base, routes=frozenset({ip_network("10.9.0.0/16")})),
        "one guard more": replace(base, guarded=base.guarded | {ip_network("fd77::/64")}),
        "one guard less": replace(base, guarded=frozenset({ip_network("fd09::/64")})),
        "one peer more": replace(
            base, peers={**base.peers, make_keys(7).public: peer_at(make_keys(7), None, "10.9.0.7/32")}
        ),
        "one peer less": replace(base, peers={B.public: b}),
        "endpoint": with_b(endpoint=Endpoint.parse("192.0.2.9:7009")),
        "endpoint of the other family": with_b(endpoint=Endpoint.parse("[2001:db8::9]:7009")),
        "keepalive": with_b(keepalive=25),
        "keepalive off": with_b(keepalive=0),
        "psk": with_b(psk=Secret(bytes(reversed(PSK)))),
        "psk off": with_b(psk=NO_PSK),
        "one allowed IP more": with_b(allowed_ips=b.allowed_ips | {ip_network("10.9.1.0/24")}),
        "one allowed IP less": with_b(allowed_ips=frozenset({ip_network("fd09::2/128")})),
        "no allowed IPs": with_b(allowed_ips=frozenset()),
        "an allowed IP of another peer": replace(
            base,
            peers={
                B.public: replace(b, allowed_ips=b.allowed_ips | c.allowed_ips),
                C.public: replace(c, allowed_ips=frozenset()),
            },
        ),
    }


@pytest.mark.parametrize("change", changes())
def test_one_change_leaves_everything_else_as_it_is(here: Machine, change: str) -> None:
    before = full(here.device.name)
    after = replace(changes()[change], name=here.device.name)
    here.agree(before)
    assert len(plan_device(after, run(here.device.observe()))) == 1
    here.agree(after)
    assert len(plan_device(before, run(here.device.observe()))) >= 1
    here.agree(before)


def test_performing_every_action_twice_is_the_same_as_once(here: Machine) -> None:
    desired = full(here.device.name)
    run(here.device.keep(desired))
    for action in plan_device(desired, run(here.device.observe())):
        run(here.device.apply(action))
        run(here.device.apply(action))
    here.agree(desired)
    gone: list[Action] = [
        RemovePeer(C.public),
        RemoveRoute(ip_network("fd09::/64")),
        RemoveGuard(ip_network("fd09::/64")),
    ]
    for action in gone:
        run(here.device.apply(action))
        run(here.device.apply(action))
    assert C.public not in run(here.device.observe()).peers


def test_an_action_on_a_removed_peer_does_not_bring_it_back(here: Machine) -> None:
    here.agree(full(here.device.name))
    run(here.device.apply(RemovePeer(C.public)))
    run(here.device.apply(SetEndpoint(C.public, Endpoint.parse("192.0.2.3:7003"))))
    run(here.device.apply(AddAllowedIps(C.public, frozenset({ip_network("10.9.3.0/24")}))))
    assert run(here.device.observe()).peers.keys() == {B.public}


def test_foreign_changes_are_counted_and_put_right(here: Machine) -> None:
    desired = full(here.device.name)
    here.agree(desired)
    here.namespace.ip("link", "set", here.device.name, "mtu", "1290")
    here.namespace.ip("address", "del", "fd09::1/64", "dev", here.device.name)
    run(here.device.apply(RemovePeer(C.public)))
    assert count_drift(desired, run(here.device.observe())) == 3
    assert count_drift(desired, here.agree(desired)) == 0


def test_a_device_that_somebody_deleted_is_made_anew(here: Machine) -> None:
    desired = full(here.device.name)
    here.agree(desired)
    here.namespace.ip("link", "del", here.device.name)
    here.agree(desired)


def test_without_the_device_the_guards_keep_packets_from_leaving(here: Machine) -> None:
    here.agree(full(here.device.name))
    here.namespace.ip("link", "set", here.device.name, "down")
    for address in ("10.9.0.2", "fd09::2"):
        with pytest.raises(subprocess.CalledProcessError) as refusal:
            here.namespace.ip("route", "get", address)
        assert refusal.value.returncode == 2


def test_thousands_of_allowed_ips_arrive_and_are_read_whole(here: Machine) -> None:
    many: list[IPNetwork] = [*ip_network("10.64.0.0/12").subnets(new_prefix=24)]
    many = many[:2300]
    peer = replace(peer_at(B, None), allowed_ips=frozenset(many))
    desired = desired_device(here.device.name, A, peer, port=47003)
    assert here.agree(desired).peers[B.public].allowed_ips == frozenset(many)
    fewer = replace(desired, peers={B.public: replace(peer, allowed_ips=frozenset(many[:1500]))})
    assert here.agree(fewer).peers[B.public].allowed_ips == frozenset(many[:1500])
    assert here.agree(desired).peers[B.public].allowed_ips == frozenset(many)


def test_a_taken_port_is_an_error_of_its_own(here: Machine) -> None:
    desired = full(here.device.name)
    here.agree(desired)
    with here.namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("", 47009))
        with pytest.raises(PortTaken):
            run(here.device.apply(SetListenPort(47009)))
    here.agree(desired)


def test_an_interface_that_is_not_wireguard_is_refused(namespace: Namespace, tmp_path: Path) -> None:
    name = unused_name()
    namespace.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}p")
    with namespace.entered(), pytest.raises(ConfigError, match="veth"):
        choose_device(name, run_dir=tmp_path)


def test_a_missing_capability_is_named(namespace: Namespace, tmp_path: Path) -> None:
    name = unused_name()
    script = (
        "import asyncio, pathlib, sys\n"
        "from scope.model import DeviceKind\n"
        "from scope_agent.wireguard.shell import choose_device\n"
        "from scope_agent.wireguard.device import AddGuard\n"
        "from ipaddress import ip_network\n"
        "name, run_dir, kind = sys.argv[1:]\n"
        "device = choose_device(name, run_dir=pathlib.Path(run_dir), only=DeviceKind(kind))\n"
        "asyncio.run(device.apply(AddGuard(ip_network('10.9.0.0/16'))))\n"
    )
    with namespace.entered():
        done = subprocess.run(
            [*UNPRIVILEGED, sys.executable, "-c", script, name, str(tmp_path), KIND.value],
            capture_output=True,
            text=True,
            check=False,
        )
    assert "ConfigError" in done.stderr
    assert "CAP_NET_ADMIN" in done.stderr


def test_deleting_leaves_nothing_behind(namespace: Namespace, tmp_path: Path) -> None:
    with machine(namespace, tmp_path) as made:
        made.agree(full(made.device.name))
        run(made.device.delete())
        assert made.device.name not in namespace.ip("link")
        assert "proto 83" not in namespace.ip("route", "show", "table", "all")
        assert "proto 83" not in namespace.ip("-6", "route", "show", "table", "all")
        assert not list(tmp_path.rglob("*.json"))
        assert not run(made.device.observe()).exists


def test_the_repr_of_a_device_and_of_its_plan_holds_no_secret(here: Machine) -> None:
    desired = full(here.device.name)
    observed = here.agree(desired)
    text = repr((desired, observed, plan_device(desired, replace(observed, exists=False, peers={}))))
    for secret in (A.private.raw, PSK):
        assert secret.hex() not in text
        assert repr(secret) not in text
        assert repr(secret)[2:-1] not in text


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    left, right = Namespace(), Namespace()
    connect(
        left,
        right,
        ["192.0.2.1/24", "2001:db8::1/64"],
        ["192.0.2.2/24", "198.51.100.2/24", "2001:db8::2/64"],
    )
    left.ip("route", "add", "198.51.100.0/24", "dev", "up0")
    right.ip("route", "replace", "192.0.2.1/32", "dev", "up0")
    with machine(left, tmp_path / "left") as a, machine(right, tmp_path / "right") as b:
        yield a, b
    left.close()
    right.close()


def left_device(name: str, endpoint: str, *, keepalive: int = 0, psk: bytes | None = None) -> DesiredDevice:
    peer = peer_at(B, endpoint, "10.9.0.2/32", keepalive=keepalive, psk=psk)
    return desired_device(name, A, peer, port=47001)


def right_device(name: str, *, psk: bytes | None = None) -> DesiredDevice:
    peer = peer_at(A, None, "10.9.0.1/32", psk=psk)
    return desired_device(name, B, peer, port=47002, addresses=("10.9.0.2/16",))


def shake_hands(pair: tuple[Machine, Machine], left: DesiredDevice, right: DesiredDevice) -> None:
    a, b = pair
    b.agree(right)
    a.agree(left)
    wait_until(
        lambda: run(a.device.observe()).peers[B.public].last_handshake is not None, "there is no handshake"
    )


def test_a_keepalive_that_is_switched_on_starts_the_handshake(pair: tuple[Machine, Machine]) -> None:
    a, b = pair
    staged = left_device(a.device.name, "[2001:db8::2]:47002")
    b.agree(right_device(b.device.name))
    assert a.agree(staged).peers[B.public].last_handshake is None
    shake_hands(
        pair, left_device(a.device.name, "[2001:db8::2]:47002", keepalive=20), right_device(b.device.name)
    )
    seen = run(b.device.observe()).peers[A.public]
    assert seen.endpoint == Endpoint.parse("[2001:db8::1]:47001")
    assert seen.rx > 0


def test_endpoints_psks_and_allowed_ips_of_a_live_session_change_without_loss(
    pair: tuple[Machine, Machine],
) -> None:
    a, b = pair
    endpoints = ["192.0.2.2:47002", "198.51.100.2:47002", "[2001:db8::2]:47002"]
    right = right_device(b.device.name)
    shake_hands(pair, left_device(a.device.name, endpoints[0], keepalive=20), right)

    def change(step: int) -> None:
        psk = bytes([step + 1] * 32)
        b.agree(right_device(b.device.name, psk=psk))
        desired = left_device(a.device.name, endpoints[step % 3], keepalive=20, psk=psk)
        more = frozenset({ip_network(f"10.9.{step}.0/24")})
        peer = desired.peers[B.public]
        a.agree(replace(desired, peers={B.public: replace(peer, allowed_ips=peer.allowed_ips | more)}))

    with echo(b.namespace, ip_address("10.9.0.2"), 9):
        assert lost_while(a.namespace, ip_address("10.9.0.2"), 9, change) == 0


def test_an_endpoint_that_wireguard_moved_is_reported_and_no_drift_if_verified(
    pair: tuple[Machine, Machine],
) -> None:
    a, b = pair
    right = right_device(b.device.name)
    shake_hands(pair, left_device(a.device.name, "192.0.2.2:47002", keepalive=20), right)
    run(a.device.apply(SetListenPort(47003)))
    moved = Endpoint.parse("192.0.2.1:47003")
    with echo(b.namespace, ip_address("10.9.0.2"), 9):
        lost_while(a.namespace, ip_address("10.9.0.2"), 9, lambda _: None, steps=2)
    wait_until(lambda: run(b.device.observe()).peers[A.public].endpoint == moved, "it does not roam")
    observed = run(b.device.observe())
    known = right.peers[A.public]
    old = replace(known, endpoint=Endpoint.parse("192.0.2.1:47001"))
    trusting = replace(old, verified=frozenset({moved}))
    assert plan_device(replace(right, peers={A.public: trusting}), observed) == ()
    assert count_drift(replace(right, peers={A.public: trusting}), observed) == 0
    assert count_drift(replace(right, peers={A.public: old}), observed) == 1


def test_counters_stand_still_without_payload_and_move_with_it(pair: tuple[Machine, Machine]) -> None:
    a, b = pair
    shake_hands(
        pair, left_device(a.device.name, "192.0.2.2:47002", keepalive=20), right_device(b.device.name)
    )
    with a.namespace.entered():
        before = a.device.read_counters()
        with echo(b.namespace, ip_address("10.9.0.2"), 9):
            lost_while(a.namespace, ip_address("10.9.0.2"), 9, lambda _: None, steps=2)
        after = a.device.read_counters()
    assert before is not None
    assert after is not None
    assert after.rx > before.rx
    assert after.tx > before.tx
