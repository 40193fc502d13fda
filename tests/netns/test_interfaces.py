"""Reading the machine's interfaces, and waking up when they change."""

from __future__ import annotations

from ipaddress import ip_interface

from scope_agent.wireguard.shell.interfaces import InterfaceFacts, Interfaces

from tests.netns.device_fixture import PATIENCE, Namespace


def test_interfaces_are_read_and_every_change_wakes_the_reader() -> None:
    namespace = Namespace()
    with namespace.entered():
        interfaces = Interfaces()
    assert [facts.link.name for facts in interfaces.read()] == ["lo"]
    assert not interfaces.wait(0.01)
    namespace.ip("link", "add", "up0", "mtu", "1400", "type", "veth", "peer", "name", "up1")
    assert interfaces.wait(PATIENCE)
    namespace.ip("address", "add", "192.0.2.1/24", "dev", "up0")
    namespace.ip("address", "add", "2001:db8::1/64", "dev", "up0")
    namespace.ip("link", "set", "up0", "up")
    assert interfaces.wait(PATIENCE)
    found = by_name(interfaces, "up0")
    assert (found.link.kind, found.link.mtu, found.link.up) == ("veth", 1400, True)
    assert found.addresses == {ip_interface("192.0.2.1/24"), ip_interface("2001:db8::1/64")}
    namespace.ip("address", "del", "192.0.2.1/24", "dev", "up0")
    assert interfaces.wait(PATIENCE)
    assert by_name(interfaces, "up0").addresses == {ip_interface("2001:db8::1/64")}
    interfaces.close()
    namespace.close()


def by_name(interfaces: Interfaces, name: str) -> InterfaceFacts:
    (found,) = (facts for facts in interfaces.read() if facts.link.name == name)
    return found
