"""Which of a machine's interfaces carry the underlay, and which addresses only its own containers know."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface

from scope_agent.underlay.core import Interface, underlay_of


def _interface(name: str, *addresses: str, kind: str = "", up: bool = True) -> Interface:
    return Interface(name, kind, up, 1500, frozenset(map(ip_interface, addresses)))


def test_addresses_of_bridges_and_tunnels_are_inner_and_no_candidates() -> None:
    found = underlay_of(
        [
            _interface("lo", "127.0.0.1/8"),
            _interface("eth0", "203.0.113.5/24"),
            _interface("cni0", "10.244.0.1/24", kind="bridge"),
            _interface("wg7", "10.7.0.1/24", kind="wireguard"),
            _interface("scope0", "100.80.0.1/16", kind="wireguard"),
            _interface("docker0", "172.17.0.1/16", kind="bridge", up=False),
        ],
        own="scope0",
    )
    assert found.addresses == {ip_interface("203.0.113.5/24")}
    assert found.inner == {ip_address("10.244.0.1"), ip_address("10.7.0.1")}
