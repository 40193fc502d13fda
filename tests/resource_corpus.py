"""ScopeMeshes and ScopePeers, right and wrong, that every reader of them must judge alike.

Each wrong one has one fault, at `fault`: the path of the field, or of the smallest object that spans it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scope import resources

KEY = "A" * 43 + "="
KEYS: dict[str, Any] = {"wireGuard": KEY, "probe": "B" + "A" * 42 + "=", "signing": "C" + "A" * 42 + "="}
NODE: dict[str, Any] = {"cluster": "fra", "nodeName": "n1.example.net", "nodeUID": "0d3f-77"}
SIGNATURE = "A" * 86 + "=="
TOMBSTONE: dict[str, Any] = {
    "meshUID": "5d1c",
    "peerUID": "0d3f",
    "key": KEY,
    "signer": KEY,
    "signature": SIGNATURE,
}
MODULUS = "3" + "A" * 340 + "Q"  # of 2048 bits, odd
RSA: dict[str, Any] = {"kty": "RSA", "kid": "a", "n": MODULUS, "e": "AQAB"}
EC: dict[str, Any] = {"kty": "EC", "kid": "b", "crv": "P-256", "x": "A" * 42 + "E", "y": "B" * 42 + "E"}
JOINED: dict[str, Any] = {
    "name": "fra",
    "uid": "5d1c",
    "signingKey": KEY,
    "issuer": "https://kubernetes.default.svc.cluster.local",
    "keys": [RSA | {"use": "sig", "alg": "RS256"}, EC],
    "serviceAccount": {"namespace": "scope-system", "name": "scope-agent"},
}

Document = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One document, and where its fault is; "" where it has none."""

    what: str
    document: Document
    fault: str = ""

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Change:
    """A stored document and the one that is to replace it; `fault` as in Case."""

    what: str
    stored: Document
    asked: Document
    fault: str = ""

    def __str__(self) -> str:
        return self.what


def mesh(*, name: str = "home", status: object = None, **spec: Any) -> Document:
    """A ScopeMesh; with `addressing` unless the spec says otherwise. A field that is None is left out."""
    asked = {"addressing": {"ipv6": "fd5c:be1:7a30::/64"}} | spec
    return _document("ScopeMesh", name, asked, status)


BESIDE_AN_INTERFACE: dict[str, Any] = {
    "postQuantum": {"mode": "Preferred", "rotationInterval": "5m"},
    "nodeSelector": {"matchLabels": {"wg": "on"}},
    "timers": {"report": "8s"},
    "peerExpiry": "7d",
}


def managed(**spec: Any) -> Document:
    """A ScopeMesh on an interface that something else manages. A field that is None is left out."""
    usual = {"addressing": None, "existingInterface": "wg0", "postQuantum": {"mode": "Preferred"}}
    return mesh(**usual | spec)


def peer(*, name: str = "home.nas", status: object = None, **spec: Any) -> Document:
    """A ScopePeer; of mesh `home` unless the spec says otherwise. A field that is None is left out."""
    return _document("ScopePeer", name, {"mesh": "home"} | spec, status)


def service(*, name: str = "home.fra.shop.web", **spec: Any) -> Document:
    """A ScopeService; of the Service `web`, without ports, unless the spec says otherwise."""
    asked = {"mesh": "home", "cluster": "fra", "namespace": "shop", "service": "web"} | spec
    return _document("ScopeService", name, asked, None)


def _document(kind: str, name: str, spec: Mapping[str, Any], status: object) -> Document:
    document: Document = {
        "apiVersion": resources.API_VERSION,
        "kind": kind,
        "metadata": {"name": name},
        "spec": {field: value for field, value in spec.items() if value is not None},
    }
    return document if status is None else document | {"status": status}


def right() -> Iterator[Case]:
    """Documents that are taken."""
    yield Case("the shortest Service", service())
    yield Case("a Service with everything", everything_of_a_service())
    thousand = [{"address": f"10.1.{i // 250}.{i % 250 + 1}"} for i in range(1000)]
    yield Case("a Service of 1,000 pods", service(backends=[{"endpoints": thousand}]))
    yield Case("the shortest mesh", mesh())
    yield Case("a mesh with everything", everything_of_a_mesh())
    yield Case("the longest name of a mesh", mesh(name="a" * 63))
    for ipv4 in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/30", "100.64.0.0/10", "10.255.255.252/30"):
        yield Case(f"{ipv4}", mesh(addressing={"ipv4": ipv4}))
    for ipv6 in ("fd5c:0be1:7a30::/64", "FD00::/32", "fc00::/120", "fdff:ffff::/48", "fd00::10.0.0.0/120"):
        yield Case(f"{ipv6}", mesh(addressing={"ipv6": ipv6}))
    yield Case("both families", mesh(addressing={"ipv4": "10.9.0.0/16", "ipv6": "fd00:9::/64"}))
    for topology in ("Full", "Tree"):
        yield Case(f"topology {topology}", mesh(topology=topology))
    for interface in ("wg0", "_", "Wg.home=1+2-x_y"):
        yield Case(f"keys on {interface}", managed(existingInterface=interface))
    yield Case("an interface, and all that may go with it", managed(**BESIDE_AN_INTERFACE))
    yield Case("no timer named", mesh(timers={}))
    yield Case("timers in mixed units", mesh(timers={"probeInterval": "100ms", "hubFallback": "1m30s"}))
    yield Case("all timers at once", mesh(timers=dict.fromkeys(TIMERS, "1000ms")))
    yield Case("the latest timers", mesh(timers=dict.fromkeys(TIMERS[1:], "1h") | {"probeInterval": "60s"}))
    yield Case("a duration with leading zeros", mesh(peerExpiry="007d"))
    for expiry in ("1m", "3650d", "315360000000ms", "30s30s", "86400s0ms"):
        yield Case(f"expiry {expiry}", mesh(peerExpiry=expiry))
    for port in (0, 1, 65535):
        yield Case(f"port {port}", mesh(listenPort=port))
    for mtu in (1280, 9000, "Auto"):
        yield Case(f"MTU {mtu}", mesh(mtu=mtu))
    yield Case("post-quantum keys without a word", mesh(postQuantum={}))
    for interval in ("5m", "30d", "300s"):
        yield Case(f"keys rotated every {interval}", mesh(postQuantum={"rotationInterval": interval}))
    yield Case("a selector of nothing", mesh(nodeSelector={}))
    yield Case(
        "a selector of labels", mesh(nodeSelector={"matchLabels": {"a": "", "example.com/b.c_d": "E-1"}})
    )
    for operator, values in (("In", ["a", ""]), ("NotIn", ["a"]), ("Exists", []), ("DoesNotExist", None)):
        expression = {"key": "zone", "operator": operator} | ({} if values is None else {"values": values})
        yield Case(f"a selector with {operator}", mesh(nodeSelector={"matchExpressions": [expression]}))
    long = "a" * 61
    key = f"{long}.{long}.{long}.{long}/{'K' * 63}"
    yield Case("a long key of a label", mesh(nodeSelector={"matchLabels": {key: "v" * 63}}))
    for source, to in (("10.0.0.0/8", "100.0.0.0/8"), ("fd00:1::/56", "fd00:2::/56")):
        translate = [{"from": source, "to": to}]
        yield Case(f"pods of {source} seen as {to}", mesh(clusters=[{"name": "a", "translate": translate}]))
        yield Case(f"{source} seen as {to}", peer(podPrefixes=[_pods(source, seenAs=to)]))
    yield Case("clusters of which nothing is asked", mesh(clusters=[{"name": "a"}, {"name": "b"}]))
    yield from _right_hubs()

    yield Case("the shortest peer", peer())
    yield Case("a peer with everything", everything_of_a_peer())
    yield Case("a long name of a peer", peer(name=".".join(["a" * 62] * 4)))
    yield Case("a Node with a long label in its name", peer(**NODE | {"nodeName": "a" * 100}))
    yield Case("a hub", peer(role="Hub"))
    for route in (
        "10.0.0.0/8",
        "0.0.0.0/8",
        "203.0.113.7/32",
        "2001:db8::/16",
        "fd00::1/128",
        "169.254.0.0/15",
    ):
        taken = "2001::/16" if route == "2001:db8::/16" else route
        yield Case(f"route {taken}", peer(routes=[taken]))
    yield Case("as many routes as there may be", peer(routes=[f"10.{n}.0.0/16" for n in range(64)]))
    for endpoint in (
        *(
            "192.0.2.1:1",
            "[2001:db8::1]:65535",
            "[2001:DB8:0:0::1]:51820",
            "[fe80::1]:51820",
            "169.254.1.1:9",
        ),
        *("255.255.255.254:1", "[::192.0.2.1]:1"),
    ):
        yield Case(f"static endpoint {endpoint}", peer(endpoints=[endpoint]))
    yield Case("an operator's part alone", peer(status={"addresses": ["10.0.0.7/8"], "role": "Edge"}))
    yield Case("keys alone", peer(status={"keys": KEYS}))
    yield Case("a status of nothing", peer(status={}))
    yield Case("a latency in microseconds", peer(status=_links(latencyMs=0.125)))
    yield Case("a latency of a whole number", peer(status=_links(latencyMs=600000)))
    yield Case("a reason of 160 letters and 480 bytes", peer(status=_links(reason="路" * 160)))
    yield Case("a reason in any script", peer(status=_links(reason="kein Weg: прочее «é» 路 🙂 5 €")))
    yield Case("a condition without a reason", peer(status={"conditions": [{"type": "R", "status": "True"}]}))
    for time in ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00.123456789+01:00", "2024-02-29T23:59:59Z"):
        yield Case(f"seen at {time}", peer(status={"lastSeen": time}))
    yield Case("seen in the first second", peer(status={"lastSeen": "1970-01-01T00:00:00Z"}))
    yield Case("seen in the last second", peer(status={"lastSeen": "9999-12-31T23:59:59Z"}))


def _pods(prefix: str, **parts: str) -> Document:
    return {"prefix": prefix, "source": "Static", **parts}


def _right_hubs() -> Iterator[Case]:
    def hubs(**parts: Any) -> Document:
        return mesh(hubs=parts)

    yield Case("hubs of nothing", hubs())
    yield Case("hubs that the registry chooses", hubs(mode="Auto"))
    yield Case("hubs by name", hubs(names=["home.fra.n1", "home.external.nas"]))
    yield Case("as many hubs as may be named", hubs(names=[f"home.external.p{n}" for n in range(64)]))
    yield Case("every Node a hub", hubs(selector={}))
    yield Case("hubs by label", hubs(selector={"matchLabels": {"example.com/hub": ""}}))
    for first, last in ((1024, 1039), (65520, 65535), (29984, 29999), (32768, 32783), (1024, 29999)):
        yield Case(f"hubs at {first} to {last}", hubs(ports={"first": first, "last": last}))
    yield Case("hubs up to another port", hubs(ports={"last": 26015}))
    yield Case("hubs at ports of nothing", hubs(ports={}))
    for port in (25999, 26256):
        yield Case(f"WireGuard beside the hubs, at {port}", mesh(listenPort=port, hubs={}))
    yield Case("WireGuard where hubs would be, and none", mesh(listenPort=26100))
    yield Case("limits of nothing", hubs(limits={}))
    yield Case("a limit for pairs", hubs(limits={"pairBytesPerSecond": 1}))
    yield Case("the highest limits", hubs(limits=dict.fromkeys(LIMITS, 125_000_000_000)))


LIMITS = ("pairBytesPerSecond", "totalBytesPerSecond")
TIMERS = ("probeInterval", "addressFallback", "report", "connectBack", "hubFallback")


def everything_of_a_mesh() -> Document:
    """A ScopeMesh in which every object and list that there may be is there."""
    requirement = {"key": "zone", "operator": "In", "values": ["a", "b"]}
    return mesh(
        addressing={"ipv4": "100.80.0.0/16", "ipv6": "fd5c:be1:7a30::/64"},
        topology="Tree",
        prefer="IPv4",
        timers={"probeInterval": "1s", "addressFallback": "4s", "report": "8s", "connectBack": "10s"},
        listenPort=51820,
        mtu=1420,
        peerExpiry="7d",
        postQuantum={"mode": "Required", "rotationInterval": "30m"},
        nodeSelector={"matchLabels": {"scope": "on"}, "matchExpressions": [requirement]},
        birthday=True,
        podNetworking="All",
        clusters=[{"name": "ber", "translate": [{"from": "10.244.0.0/16", "to": "10.192.0.0/16"}]}],
        hubs={
            "mode": "Auto",
            "names": ["home.external.nas"],
            "selector": {"matchLabels": {"hub": "yes"}, "matchExpressions": [requirement]},
            "ports": {"first": 26000, "last": 26511},
            "limits": {"pairBytesPerSecond": 1_000_000, "totalBytesPerSecond": 100_000_000},
            "carrierPort": 8443,
        },
        status={
            "signingKey": KEY,
            "reflectors": [{"probeKey": KEY, "endpoints": ["192.0.2.1:51820", "[2001:db8::1]:51820"]}],
            "gateway": {"url": "https://registry.example.net:7443", "pin": KEY},
            "counts": {"peers": 3, "online": 3, "direct": 2, "relayed": 1, "unreachable": 0}
            | {"postQuantum": {"keyed": 2, "unkeyed": 1, "failed": 1}},
            "conditions": [_condition()],
            "observedGeneration": 7,
            "clusters": [JOINED, {"name": "ber", "uid": "77"}],
            "hubs": [
                {
                    "peer": "home.external.nas",
                    "chosen": True,
                    "reason": "offline",
                    "contestedSince": "2026-01-31T12:00:00Z",
                }
            ],
        },
    )


def everything_of_a_peer() -> Document:
    """A ScopePeer in which every field that there may be is there."""
    link = {"peer": "home.fra.n2", "path": "Relayed", "endpoint": "192.0.2.9:1", "latencyMs": 23.5}
    return peer(
        **NODE,
        role="Edge",
        routes=["10.9.0.0/24", "fd00:9::/64"],
        podPrefixes=[
            {"prefix": "10.244.1.0/24", "source": "Node", "seenAs": "10.192.1.0/24"},
            {"prefix": "fd00:1::/64", "source": "Static"},
        ],
        endpoints=["192.0.2.1:51820"],
        leaving=True,
        status={
            "keys": KEYS,
            "endpoints": [{"endpoint": "10.0.0.1:51820", "kind": "Host"}],
            "mapping": "EndpointIndependent",
            "device": "Kernel",
            "links": [
                link
                | {"observed": "[2001:db8::1]:9", "reason": "no echo"}
                | {"hub": "home.external.nas", "userSpace": True, "birthday": True, "carried": True}
                | {
                    "psk": {"epoch": 3, "since": "2026-01-31T12:00:00Z", "suite": 1}
                    | {"trust": "Registry", "failure": "Unanswered"}
                }
            ],
            "direct": 0,
            "relayed": 1,
            "unreachable": 0,
            "heldAddresses": ["100.80.0.7", "fd5c::7"],
            "protocol": 1,
            "relay": {"forwarding": "UserSpace", "pairs": 3, "refused": 1, "reason": "no nftables"}
            | {"carrier": {"port": 443, "pin": KEY, "reason": "port 443 is taken"}},
            "hub": "home.external.nas",
            "identity": "0f" * 32,
            "postQuantum": {"keyed": 2, "unkeyed": 1, "failed": 1},
            "left": True,
            "podsTrouble": "pods are cut off: net.ipv4.ip_forward = 0",
            "addresses": ["100.80.0.7/16", "fd5c::7/64"],
            "role": "Edge",
            "online": True,
            "lastSeen": "2026-01-31T12:00:00.5Z",
            "conditions": [_condition(), _condition(type="RouteConflict")],
            "tombstone": TOMBSTONE,
        },
    )


def everything_of_a_service() -> Document:
    """A ScopeService in which every field that there may be is there."""
    port = {"port": 80, "protocol": "TCP", "name": "http", "appProtocol": "kubernetes.io/h2c"}
    return service(
        headless=True,
        families=["IPv4", "IPv6"],
        ports=[port],
        backends=[
            {
                "ports": [port | {"port": 8080}],
                "endpoints": [{"address": "10.244.1.5", "state": "Draining", "hostname": "web-0"}],
            }
        ],
    )


def wrong() -> Iterator[Case]:
    """Documents that are refused."""
    yield from _wrong_services()
    yield from _wrong_meshes()
    yield from _wrong_selectors()
    yield from _wrong_hubs()
    yield from _wrong_mesh_statuses()
    yield from _wrong_peers()
    yield from _wrong_reports()
    yield from _wrong_assignments()


def _wrong_services() -> Iterator[Case]:
    for name in ("mesh", "cluster", "namespace", "service"):
        for value in ("a.b", "Web", "-a"):
            yield Case(f"a Service whose {name} is {value}", service(**{name: value}), f"spec.{name}")
    yield Case("a Service of the cluster external", service(cluster="external"), "spec.cluster")
    for port in (0, 65536):
        yield Case(f"a Service with port {port}", service(ports=[{"port": port}]), "spec.ports[0].port")
    yield Case(
        "a Service that speaks ICMP",
        service(ports=[{"port": 1, "protocol": "ICMP"}]),
        "spec.ports[0].protocol",
    )
    for address in ("web", "127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "fe80::1", "::1"):
        pods = service(backends=[{"endpoints": [{"address": address}]}])
        yield Case(f"a pod at {address}", pods, "spec.backends[0].endpoints[0].address")
    backends = [{"endpoints": [{"address": "10.0.0.1"}] * many} for many in (1000, 1)]
    yield Case("a Service of 1,001 pods", service(backends=backends), "spec")
    yield Case("a port called by a number", service(ports=[{"port": 1, "name": "A"}]), "spec.ports[0].name")


def _wrong_meshes() -> Iterator[Case]:
    for name in ("a.b", "a" * 64, "Home", "-a", "my_mesh"):
        yield Case(f"a mesh called {name}", mesh(name=name), "metadata.name")
    yield Case("no spec", {k: v for k, v in mesh().items() if k != "spec"}, "spec")
    yield Case("no addressing", mesh(addressing=None), "spec.addressing")
    yield Case("addressing of nothing", mesh(addressing={}), "spec.addressing")
    yield Case("addressing as a text", mesh(addressing="10.0.0.0/8"), "spec.addressing")
    for ipv4 in (
        *(
            "10.0.0.0",
            "10.0.0.0/255.0.0.0",
            "10.0.0.0/08",
            "10.0.0.1/24",
            "10.0.0.0/33",
            "010.0.0.0/8",
            "lan",
        ),
        *("203.0.113.0/24", "100.0.0.0/8", "172.0.0.0/8", "10.0.0.0/31", "fd00::/64", "", " 10.0.0.0/8"),
    ):
        yield Case(f"IPv4 {ipv4!r}", mesh(addressing={"ipv4": ipv4}), "spec.addressing.ipv4")
    for ipv6 in (
        *("fd00::", "fd00::1/64", "fd00::/16", "fd00::/121", "2001:db8::/64", "fe80::/64", "10.0.0.0/8"),
        *("fd00::%eth0/64", "fd00:::/64", "::ffff:10.0.0.0/104"),
    ):
        yield Case(f"IPv6 {ipv6!r}", mesh(addressing={"ipv6": ipv6}), "spec.addressing.ipv6")
    number = mesh(addressing={"ipv4": 10})
    yield Case("a prefix as a number", number, "spec.addressing.ipv4")
    yield Case("a third family", mesh(addressing={"ipv4": "10.0.0.0/8", "ipv5": "x"}), "spec.addressing.ipv5")
    yield Case("a family in small letters", mesh(prefer="ipv4"), "spec.prefer")
    for topology in ("tree", "", "Star"):
        yield Case(f"topology {topology!r}", mesh(topology=topology), "spec.topology")
    for duration in ("16", "16 s", "1.5s", "-2s", "2S", "", "soon", "1w", "9999999999s"):
        yield Case(f"duration {duration!r}", mesh(timers={"report": duration}), "spec.timers.report")
    yield Case("a duration as a number", mesh(timers={"report": 16}), "spec.timers.report")
    yield Case("a duration of 34 letters", mesh(timers={"report": "1s" * 17}), "spec.timers.report")
    for name, duration in (("probeInterval", "99ms"), ("probeInterval", "61s"), ("report", "0s")):
        yield Case(f"{name} {duration}", mesh(timers={name: duration}), f"spec.timers.{name}")
    yield Case("a timer of two hours", mesh(timers={"hubFallback": "2h"}), "spec.timers.hubFallback")
    yield Case("a timer before an earlier one", mesh(timers={"report": "30s"}), "spec.timers")
    yield Case("the last timer before the others", mesh(timers={"hubFallback": "19999ms"}), "spec.timers")
    yield Case("a misspelt timer", mesh(timers={"reprot": "16s"}), "spec.timers.reprot")
    for port in (-1, 65536, "51820"):
        yield Case(f"port {port!r}", mesh(listenPort=port), "spec.listenPort")
    yield Case("half a port", mesh(listenPort=1.5), "spec.listenPort")
    yield Case("a birthday that is no boolean", mesh(birthday="yes"), "spec.birthday")
    for mtu in (1279, 9001, "auto", "1420", ""):
        yield Case(f"MTU {mtu!r}", mesh(mtu=mtu), "spec.mtu")
    for expiry in ("59s", "3651d", "315360000001ms", "soon"):
        yield Case(f"expiry {expiry!r}", mesh(peerExpiry=expiry), "spec.peerExpiry")
    yield Case("a field that nobody knows", mesh(topologies="Full"), "spec.topologies")
    for interface in ("", "a/b", "-wg", ".", "wg 0", "w" * 16, "é", 0):
        at = "spec.existingInterface"
        yield Case(f"an interface {interface!r}", managed(existingInterface=interface), at)
    for field, value in (
        *(("addressing", {"ipv4": "10.9.0.0/16"}), ("topology", "Tree"), ("prefer", "IPv4")),
        *(("listenPort", 51820), ("mtu", 1420), ("birthday", True), ("hubs", {})),
        *(("podNetworking", "CrossCluster"), ("clusters", [{"name": "a"}])),
        *(("postQuantum", None), ("postQuantum", {"mode": "Required"}), ("postQuantum", {"mode": "Off"})),
    ):
        yield Case(f"an interface with {field} {value}", managed(**{field: value}), f"spec.{field}")
    for name, value in (
        *(("mode", "Always"), ("mode", False)),
        *(("rotationInterval", "299s"), ("rotationInterval", "31d"), ("rotationInterval", 60)),
    ):
        what = f"post-quantum keys with {name} {value!r}"
        yield Case(what, mesh(postQuantum={name: value}), f"spec.postQuantum.{name}")


def _wrong_selectors() -> Iterator[Case]:
    def labels(**matched: Any) -> Document:
        return mesh(nodeSelector={"matchLabels": matched})

    def expression(**parts: Any) -> Document:
        wanted = {"key": "zone", "operator": "Exists"} | parts
        kept = {name: value for name, value in wanted.items() if value is not None}
        return mesh(nodeSelector={"matchExpressions": [kept]})

    at = "spec.nodeSelector"
    yield Case("a selector as a list", mesh(nodeSelector=[]), at)
    for key in ("-", "a/b/c", "A.b/c", "/c", "k" * 64, f"{'a.' * 127}a/k"):
        yield Case(f"a label's key {key[:70]!r}", labels(**{key: "v"}), f"{at}.matchLabels")
    for value in ("-", "a b", "v" * 64, "a/b"):
        yield Case(f"a label's value {value!r}", labels(zone=value), f"{at}.matchLabels")
    yield Case("a label's value as a truth", labels(zone=True), f"{at}.matchLabels")
    yield Case("17 labels", labels(**{f"a{n}": "" for n in range(17)}), f"{at}.matchLabels")
    first = f"{at}.matchExpressions[0]"
    yield Case("an operator in small letters", expression(operator="exists"), f"{first}.operator")
    yield Case("an expression without a key", expression(key=None), f"{first}.key")
    yield Case("an expression with a wrong key", expression(key="a b"), f"{first}.key")
    yield Case("In without values", expression(operator="In"), first)
    yield Case("In with no values", expression(operator="In", values=[]), first)
    yield Case("Exists with a value", expression(values=["a"]), first)
    yield Case("NotIn with a wrong value", expression(operator="NotIn", values=["-"]), f"{first}.values[0]")
    many = expression(operator="In", values=[f"v{n}" for n in range(65)])
    yield Case("65 values", many, f"{first}.values")
    expressions = [{"key": "zone", "operator": "Exists"}] * 17
    yield Case(
        "17 expressions", mesh(nodeSelector={"matchExpressions": expressions}), f"{at}.matchExpressions"
    )


def _wrong_hubs() -> Iterator[Case]:
    def hubs(**parts: Any) -> Document:
        return mesh(hubs=parts)

    at = "spec.hubs"
    yield Case("hubs as a list", mesh(hubs=["home.external.nas"]), at)
    yield Case("hubs of no kind", hubs(mode="auto"), f"{at}.mode")
    yield Case("a hub of an odd name", hubs(names=["home.nas", "Home"]), f"{at}.names[1]")
    yield Case("a hub named twice", hubs(names=["home.nas", "home.nas"]), f"{at}.names[1]")
    yield Case("65 hubs", hubs(names=[f"home.p{n}" for n in range(65)]), f"{at}.names")
    yield Case("hubs by an odd label", hubs(selector={"matchLabels": {"-": ""}}), f"{at}.selector")
    yield Case("hubs as a text of ports", hubs(ports="26000-26255"), f"{at}.ports")
    for name, port in (("first", 1023), ("last", 65536), ("first", "26000"), ("last", 26255.5)):
        yield Case(f"hubs with {name} port {port!r}", hubs(ports={name: port}), f"{at}.ports.{name}")
    for first, last in (
        *((26000, 26014), (26255, 26000), (26256, 26255)),
        *((29985, 30000), (30000, 30015), (32767, 32782), (1024, 65535), (31000, 31100)),
    ):
        yield Case(f"hubs at {first} to {last}", hubs(ports={"first": first, "last": last}), f"{at}.ports")
    for port in (26000, 26255):
        yield Case(f"WireGuard among the hubs, at {port}", mesh(listenPort=port, hubs={}), f"{at}.ports")
    for name in LIMITS:
        for limit in (-1, 125_000_000_001, "1M"):
            yield Case(f"{name} {limit!r}", hubs(limits={name: limit}), f"{at}.limits.{name}")
    yield Case("a limit of no kind", hubs(limits={"pair": 1}), f"{at}.limits.pair")
    for port in (-1, 65536, "443"):
        yield Case(f"carrier port {port!r}", hubs(carrierPort=port), f"{at}.carrierPort")
    yield Case("hubs with a field that nobody knows", hubs(peers=[]), f"{at}.peers")


def _wrong_mesh_statuses() -> Iterator[Case]:
    def status(**parts: Any) -> Document:
        return mesh(status=parts)

    yield Case("a signing key that is short", status(signingKey="AAAA"), "status.signingKey")
    yield Case("a reflector without a key", status(reflectors=[{}]), "status.reflectors[0].probeKey")
    where = status(reflectors=[{"probeKey": KEY, "endpoints": ["192.0.2.1"]}])
    yield Case("a reflector nowhere", where, "status.reflectors[0].endpoints[0]")
    yield Case("17 reflectors", status(reflectors=[{"probeKey": KEY}] * 17), "status.reflectors")
    for url in (
        "http://r:7443",
        "https://r/path",
        "https://r:0",
        "https://r:65536",
        "https://",
        "https://a@r",
    ):
        yield Case(f"a gateway at {url}", status(gateway={"url": url}), "status.gateway.url")
    yield Case("a gateway nowhere", status(gateway={"pin": KEY}), "status.gateway.url")
    short = status(gateway={"url": "https://[2001:db8::1]", "pin": "AAAA"})
    yield Case("a gateway with half a pin", short, "status.gateway.pin")
    yield Case("fewer than no peers", status(counts={"peers": -1}), "status.counts.peers")
    yield Case("too many pairs", status(counts={"direct": 50_000_001}), "status.counts.direct")
    yield Case("a negative generation", status(observedGeneration=-1), "status.observedGeneration")
    yield Case("a cluster without a UID", status(clusters=[{"name": "a"}]), "status.clusters[0].uid")
    yield Case("a cluster with no UID", status(clusters=[{"name": "a", "uid": ""}]), "status.clusters[0].uid")
    called = status(clusters=[{"name": "external", "uid": "1"}])
    yield Case("a cluster called external", called, "status.clusters[0].name")
    twice = status(clusters=[{"name": "a", "uid": "1"}, {"name": "a", "uid": "2"}])
    yield Case("a cluster twice", twice, "status.clusters[1]")
    many = status(clusters=[{"name": f"c{n}", "uid": "1"} for n in range(65)])
    yield Case("65 clusters", many, "status.clusters")
    yield Case("a condition twice", status(conditions=[_condition()] * 2), "status.conditions[1]")
    choice: dict[str, object] = {"peer": "home.nas", "chosen": True}
    for name, value in (
        *(("peer", None), ("peer", "Home"), ("chosen", None), ("chosen", "yes"), ("reason", "r" * 161)),
        *(("reason", "two\nlines"), ("contestedSince", "now"), ("contestedSince", "1969-12-31T23:59:59Z")),
    ):
        chosen = {field: part for field, part in (choice | {name: value}).items() if part is not None}
        what = f"a choice of a hub with {name} {value!r}"[:60]
        yield Case(what, status(hubs=[chosen]), f"status.hubs[0].{name}")
    yield Case("65 choices of hubs", status(hubs=[choice] * 65), "status.hubs")

    def joined(**parts: Any) -> Document:
        entry = {name: part for name, part in (JOINED | parts).items() if part is not None}
        return status(clusters=[entry])

    at = "status.clusters[0]"
    for name in ("signingKey", "issuer", "keys", "serviceAccount"):
        yield Case(f"a joined cluster without {name}", joined(**{name: None}), at)
    yield Case("a joined cluster without a key", joined(keys=[]), f"{at}.keys")
    many = joined(keys=[RSA | {"kid": f"k{n}"} for n in range(5)])
    yield Case("a joined cluster with five keys", many, f"{at}.keys")
    yield Case("a key of a joined cluster twice", joined(keys=[RSA, RSA]), f"{at}.keys[1]")
    yield Case("an issuer of nothing", joined(issuer=""), f"{at}.issuer")
    yield Case("an issuer too long", joined(issuer="i" * 513), f"{at}.issuer")
    account = joined(serviceAccount={"namespace": "a.b", "name": "x"})
    yield Case("an account in no namespace", account, f"{at}.serviceAccount.namespace")
    for what, key in (
        *(
            ("an RSA key with a curve", RSA | {"crv": "P-256"}),
            ("an EC key with a modulus", EC | {"n": MODULUS}),
        ),
        *(
            ("a key of no kind", {"kty": "OKP", "kid": "a"}),
            ("an RSA key that encrypts", RSA | {"use": "enc"}),
        ),
        *(("an RSA key for ES256", RSA | {"alg": "ES256"}), ("a P-256 key for ES384", EC | {"alg": "ES384"})),
        *(("a short modulus", RSA | {"n": "AQAB"}), ("a modulus in base64", RSA | {"n": "+" * 342})),
        *(("a short coordinate", EC | {"x": "AQAB"}), ("a key without an id", RSA | {"kid": ""})),
        *(("an id too long", RSA | {"kid": "k" * 129}), ("a number in base64", RSA | {"e": "+/AB"})),
    ):
        yield Case(what, joined(keys=[key]), f"{at}.keys[0]")
    for name in ("kty", "kid", "n", "e"):
        lacking = {each: part for each, part in RSA.items() if each != name}
        if name == "kty":
            lacking = {"kid": "a"}
        yield Case(f"an RSA key without {name}", joined(keys=[lacking]), f"{at}.keys[0]")


def _wrong_peers() -> Iterator[Case]:
    for name in ("Home.nas", "home..nas", "home.nas-", "home_nas", "a" * 254):
        yield Case(f"a peer called {name[:20]}", peer(name=name), "metadata.name")
    yield Case("no mesh", peer(mesh=None), "spec.mesh")
    for name in ("a.b", "Home", "", "m" * 64):
        yield Case(f"of mesh {name[:10]!r}", peer(mesh=name), "spec.mesh")
    yield Case("a role of no kind", peer(role="hub"), "spec.role")
    yield Case("an external peer that is to leave", peer(leaving=True), "spec")
    yield Case("leaving tomorrow", peer(**NODE, leaving="tomorrow"), "spec.leaving")
    for missing in NODE:
        kept = {name: value for name, value in NODE.items() if name != missing}
        yield Case(f"a Node without {missing}", peer(**kept), "spec")
    for name in ("external", "a.b", ""):
        yield Case(f"of cluster {name!r}", peer(**NODE | {"cluster": name}), "spec.cluster")
    for name in ("Node1", "n1.", "a" * 254):
        yield Case(f"of Node {name[:10]!r}", peer(**NODE | {"nodeName": name}), "spec.nodeName")
    for uid in ("a b", "u" * 65):
        yield Case(f"of UID {uid[:10]!r}", peer(**NODE | {"nodeUID": uid}), "spec.nodeUID")
    for route in (
        *("10.1.2.3/16", "10.1.0.0", "10.1.0.0/255.255.0.0", "0.0.0.0/0", "8.0.0.0/7", "::/0", "2000::/15"),
        *(
            "127.0.0.0/8",
            "127.8.0.0/16",
            "::1/128",
            "224.0.0.0/24",
            "ff02::/16",
            "fe80::/64",
            "169.254.0.0/16",
        ),
        *("lan", "fe80::%eth0/64", "::ffff:10.1.0.0/112"),
    ):
        yield Case(f"route {route}", peer(routes=["10.9.0.0/16", route]), "spec.routes[1]")
    for prefix in ({"prefix": "10.0.0.0/8", "source": "Guess"}, {"prefix": "0.0.0.0/0", "source": "Node"}):
        yield Case(f"pods {prefix}", peer(podPrefixes=[prefix]), "spec.podPrefixes[0]")
    for source, to in (
        ("10.1.0.0/16", "10.2.0.0/17"),
        ("10.1.0.0/16", "fd00::/16"),
        ("fd00::/64", "fd00:1::/56"),
    ):
        translate = [{"from": source, "to": to}]
        clusters = mesh(clusters=[{"name": "a", "translate": translate}])
        yield Case(f"pods of {source} seen as {to}", clusters, "spec.clusters[0].translate[0].to")
        prefixes = peer(podPrefixes=[_pods(source, seenAs=to)])
        yield Case(f"{source} seen as {to}", prefixes, "spec.podPrefixes[0].seenAs")
    for to in ("0.0.0.0/0", "10.2.0.1/16", "lan"):
        translate = [{"from": "10.1.0.0/16", "to": to}]
        clusters = mesh(clusters=[{"name": "a", "translate": translate}])
        yield Case(f"pods of a /16 seen as {to}", clusters, "spec.clusters[0].translate[0].to")
    for names in (["A"], ["external"], ["a", "a"]):
        clusters = mesh(clusters=[{"name": name} for name in names])
        yield Case(f"clusters called {names}", clusters, "spec.clusters")
    yield Case("65 routes", peer(routes=[f"10.{n}.0.0/16" for n in range(65)]), "spec.routes")
    yield Case("a route that is no list", peer(routes="10.0.0.0/8"), "spec.routes")
    for endpoint in (
        *(
            "192.0.2.1",
            "192.0.2.1:",
            "192.0.2.1:0",
            "192.0.2.1:65536",
            "192.0.2.1:051820",
            "example.net:51820",
        ),
        *("2001:db8::1:51820", "[2001:db8::1]", "[192.0.2.1]:1", "[::ffff:192.0.2.1]:1", "[fe80::1%eth0]:1"),
        *("0.0.0.0:1", "127.0.0.1:1", "[::1]:1", "[::]:1", "224.0.0.1:1", "[ff02::1]:1", "255.255.255.255:1"),
    ):
        yield Case(f"static endpoint {endpoint}", peer(endpoints=[endpoint]), "spec.endpoints[0]")
    yield Case("17 endpoints", peer(endpoints=["192.0.2.1:1"] * 17), "spec.endpoints")
    yield Case("a field that nobody knows", peer(hub=True), "spec.hub")


def _wrong_reports() -> Iterator[Case]:
    def report(**parts: Any) -> Document:
        return peer(status={"keys": KEYS} | parts)

    yield Case("a report without keys", peer(status={"direct": 1}), "status")
    for name in KEYS:
        lacking = {each: key for each, key in KEYS.items() if each != name}
        yield Case(f"no {name} key", peer(status={"keys": lacking}), f"status.keys.{name}")
    crooked = "A" * 42 + "B="
    yield Case("a key with stray bits", report(keys=KEYS | {"probe": crooked}), "status.keys.probe")
    yield Case("a key too long", report(keys=KEYS | {"probe": "A" * 64}), "status.keys.probe")
    yield Case("a hub that no ScopePeer is called", report(hub="Home/nas"), "status.hub")
    yield Case("a mapping of no kind", report(mapping="Symmetric"), "status.mapping")
    yield Case("a device of no kind", report(device="Kern"), "status.device")
    yield Case("fewer than no links", report(direct=-1), "status.direct")
    yield Case("protocol 0", report(protocol=0), "status.protocol")
    yield Case("protocol 256", report(protocol=256), "status.protocol")
    candidate = {"endpoint": "192.0.2.1:1", "kind": "Host"}
    yield Case("17 endpoints", report(endpoints=[candidate] * 17), "status.endpoints")
    nowhere = report(endpoints=[candidate | {"endpoint": "host:1"}])
    yield Case("an endpoint nowhere", nowhere, "status.endpoints[0].endpoint")
    kindless = report(endpoints=[candidate | {"kind": "Guess"}])
    yield Case("an endpoint of no kind", kindless, "status.endpoints[0].kind")
    yield Case("left in part", report(left=0.5), "status.left")
    yield Case("five held addresses", report(heldAddresses=["10.0.0.1"] * 5), "status.heldAddresses")
    for address in ("10.0.0.1/8", "::ffff:10.0.0.1", "fe80::1%e", ""):
        yield Case(f"holding {address!r}", report(heldAddresses=[address]), "status.heldAddresses[0]")
    for name, value in (
        *(("peer", "Home"), ("path", "Guessed"), ("endpoint", "host:1"), ("observed", "[::1]")),
        *(("latencyMs", -1), ("latencyMs", 600001), ("latencyMs", "3"), ("reason", "r" * 161)),
        *(("reason", "red \x1b[31m"), ("reason", "two\nlines"), ("reason", "a\u00a0b"), ("reason", "\u200b")),
        *(("hub", "Home"), ("userSpace", "yes"), ("birthday", 1), ("carried", 1), ("psk", 1)),
    ):
        what = f"a link with {name} {value!r}"[:60]
        yield Case(what, peer(status=_links(**{name: value})), f"status.links[0].{name}")
    for name, relay in (
        *(("forwarding", {}), ("forwarding", {"forwarding": "Kern"})),
        *(
            ("pairs", {"forwarding": "None", "pairs": -1}),
            ("refused", {"forwarding": "None", "refused": "1"}),
        ),
        ("reason", {"forwarding": "None", "reason": "r" * 161}),
        ("reason", {"forwarding": "None", "reason": "\x07"}),
    ):
        yield Case(f"relaying as {relay}"[:60], report(relay=relay), f"status.relay.{name}")
    carrier: Document = {"port": 443, "pin": KEY}
    for name, value in (
        *(("port", 0), ("port", 65536), ("port", ""), ("pin", "")),
        *(("pin", "AAAA"), ("pin", "A" * 42 + "B="), ("reason", "r" * 161), ("reason", "two\nlines")),
    ):
        parts = {part: each for part, each in (carrier | {name: value}).items() if each != ""}
        odd = report(relay={"forwarding": "None", "carrier": parts})
        yield Case(f"a carrier with {name} {value!r}"[:60], odd, f"status.relay.carrier.{name}")
    proved = {"epoch": 1, "since": "2026-01-31T12:00:00Z", "suite": 1}
    for name, psk in (
        (".epoch", proved | {"epoch": 0}),
        (".since", proved | {"since": "today"}),
        (".suite", proved | {"suite": 256}),
        (".trust", {"trust": "Blind"}),
        (".failure", {"failure": "Bad luck"}),
        ("", {"epoch": 1, "suite": 1}),
        ("", {"since": "2026-01-31T12:00:00Z"}),
    ):
        yield Case(f"a link keyed as {psk}"[:60], peer(status=_links(psk=psk)), f"status.links[0].psk{name}")
    for identity in ("0f" * 31, "0F" * 32, "0f " * 21 + "0", 5):
        yield Case(f"identity {identity!r}"[:60], report(identity=identity), "status.identity")
    for name in ("keyed", "unkeyed", "failed"):
        counts = report(postQuantum={name: -1})
        yield Case(f"fewer than no peers {name}", counts, f"status.postQuantum.{name}")
    yield Case("an identity without keys", peer(status={"identity": "0f" * 32}), "status")
    yield Case("relaying without keys", peer(status={"relay": {"forwarding": "None"}}), "status")
    yield Case("17 links", report(links=[{"peer": "a", "path": "None"}] * 17), "status.links")


def _wrong_assignments() -> Iterator[Case]:
    def assigned(**parts: Any) -> Document:
        return peer(status=parts)

    for address in ("10.0.0.7", "10.0.0.7/255.0.0.0", "10.0.0.7/33", "::ffff:10.0.0.7/104", "nas/8"):
        yield Case(f"address {address}", assigned(addresses=[address]), "status.addresses[0]")
    yield Case("five addresses", assigned(addresses=["10.0.0.7/8"] * 5), "status.addresses")
    yield Case("a role of no kind", assigned(role="Boss"), "status.role")
    yield Case("online as a text", assigned(online="yes"), "status.online")
    for time in (
        *("2026-02-30T00:00:00Z", "2026-01-31", "2026-01-31 12:00:00Z", "2026-01-31T12:00:00"),
        *("1969-12-31T23:59:59Z", "2026-01-31T24:00:00Z", "2026-01-31T12:00:00.1234567891Z", "now"),
        *("2026-01-31t12:00:00Z", "2026-01-31T12:00:00z"),
    ):
        yield Case(f"seen at {time}", assigned(lastSeen=time), "status.lastSeen")
    at = "status.conditions[0]"
    for name, value in (
        *(("type", None), ("type", ""), ("type", "T" * 64), ("status", "Maybe"), ("status", None)),
        *(("reason", "r" * 161), ("message", "m" * 1025), ("message", "\x07"), ("lastTransitionTime", "now")),
    ):
        wrong = assigned(conditions=[_condition(**{name: value})])
        yield Case(f"a condition with {name} {value!r}"[:60], wrong, f"{at}.{name}")
    many = assigned(conditions=[_condition(type=f"T{n}") for n in range(17)])
    yield Case("17 conditions", many, "status.conditions")
    yield Case("a condition twice", assigned(conditions=[_condition()] * 2), "status.conditions[1]")
    at = "status.tombstone"
    for name in TOMBSTONE:
        lacking = assigned(tombstone={each: part for each, part in TOMBSTONE.items() if each != name})
        yield Case(f"a tombstone without {name}", lacking, f"{at}.{name}")
    for name, value in (("peerUID", "a b"), ("key", "AAAA"), ("signature", "A" * 85 + "B==")):
        crooked = assigned(tombstone=TOMBSTONE | {name: value})
        yield Case(f"a tombstone with {name} {value[:10]!r}", crooked, f"{at}.{name}")
    yield Case("a field that nobody knows", assigned(phase="Up"), "status.phase")


def changes() -> Iterator[Change]:
    """Specs that replace others."""
    node, external = peer(**NODE), peer()
    yield Change("one that is to leave", node, peer(**NODE, leaving=True))
    yield Change("another role and routes", node, peer(**NODE, role="Hub", routes=["10.1.0.0/16"]))
    yield Change("nothing", external, external)
    yield Change("another mesh", external, peer(mesh="away"), "spec.mesh")
    for name, value in (("cluster", "ber"), ("nodeName", "n2"), ("nodeUID", "77")):
        yield Change(f"another {name}", node, peer(**NODE | {name: value}), f"spec.{name}")
    yield Change("an external peer that becomes a Node's", external, node, "spec")
    yield Change("a Node's peer that becomes external", node, external, "spec")
    for name in ("mesh", "cluster", "namespace", "service"):
        yield Change(f"a Service's other {name}", service(), service(**{name: "other"}), f"spec.{name}")
    yield Change("a Service's other ports", service(), service(ports=[{"port": 80}]))
    own, interface = mesh(), "spec.existingInterface"
    yield Change("another interval on an interface", managed(), managed(**BESIDE_AN_INTERFACE))
    yield Change("another interface", managed(), managed(existingInterface="wg1"), interface)
    yield Change("an interface that becomes a mesh's own", managed(), own, interface)
    yield Change("a mesh's own that becomes an existing one", own, managed(), interface)
    narrow, wide = mesh(addressing={"ipv4": "10.9.0.0/24"}), mesh(addressing={"ipv4": "10.9.0.0/16"})
    yield Change("a wider prefix", narrow, wide)
    yield Change("a second family", narrow, mesh(addressing={"ipv4": "10.9.0.0/24", "ipv6": "fd00:9::/64"}))
    # Two meshes that overlap are put right by moving one; its peers get other addresses.
    yield Change("another prefix", narrow, mesh(addressing={"ipv4": "10.8.0.0/24"}))


def _links(**parts: Any) -> Document:
    return {"keys": KEYS, "links": [{"peer": "home.n2", "path": "Direct"} | parts]}


def _condition(**parts: Any) -> Document:
    usual = {"type": "Ready", "status": "True", "reason": "Ready", "message": "online, with an address"}
    condition = usual | {"lastTransitionTime": "2026-01-31T12:00:00Z"} | parts
    return {name: value for name, value in condition.items() if value is not None}
