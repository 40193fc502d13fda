"""How much a resource may hold, and between which bounds its values lie."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

MAX_NAME = 253  # a DNS subdomain, the longest name that Kubernetes takes
MAX_LABEL = 63  # a DNS label; a mesh's name is part of a socket path, which holds 107 bytes
MAX_LABEL_KEY = MAX_NAME + 1 + MAX_LABEL  # a DNS subdomain, a slash and a name
MAX_INTERFACE = 15  # IFNAMSIZ less its zero
MAX_UID = 64  # a UUID has 36 characters, a hash in hexadecimal 64
MAX_LINKS = 16  # with MAX_CANDIDATES, what a status of MAX_STATUS_BYTES holds of ordinary names
MAX_CANDIDATES = 16  # as many as one call-me-maybe carries
MAX_ROUTES = 64  # the site prefixes of one node, and as many of its pods; each is an allowed IP on every peer
MAX_ADDRESSES = 4  # one of each family, and as many while a mesh moves to new prefixes
MAX_REFLECTORS = 16  # a mapping class needs two; more than a few add nothing
MAX_CONDITIONS = 16  # one of each type; the design names five
MAX_CLUSTERS = 64  # in one mesh; each is a line of its status, one that joined some kilobytes
MAX_TRANSLATIONS = 8  # of one cluster: two families, and room for clusters that grew by further prefixes
MAX_TOKEN_KEYS = 4  # of one cluster: the one in use, the one before it, and room for another change of keys
MAX_KEY_ID = 128  # API servers name a key by 43 characters
MAX_ISSUER = 512  # a URL
RSA_BITS = range(2048, 8193)  # what is broken soon, to what costs more to check than a request is worth
MAX_EXPONENT = 2**32 - 1  # 65537 everywhere; libraries take no larger one
MAX_REQUIREMENTS = 16  # of a selector, labels and expressions each; nobody reads a longer one
MAX_HUBS = 64  # named in a mesh, and told of in its status; the largest measured tree has 20
MIN_PORTS = 16  # of a hub's range: a peer that is relayed to more others than that takes a second hub
FIRST_PORT = 1024  # of a hub's range: below it stand the ports that programs are known by
NODE_PORTS = range(30000, 32768)  # Kubernetes gives these to Services, and takes what arrives there
MAX_RATE = 125_000_000_000  # bytes per second: a terabit, which no machine relays
MAX_VALUES = 64  # of one requirement: as many Nodes as a person lists by name
MAX_USED_BY = 10_000  # machines joined with one token: the largest mesh that Scope is measured with
MAX_COUNT = 50_000_000  # pairs in a mesh of 10,000 peers
MAX_REASON = 160  # a line on a terminal, beside the peer's name
MAX_MESSAGE = 1024  # a paragraph for a condition
MAX_ENDPOINT = 47  # "[" 39 characters of IPv6 "]:65535"
MAX_ORIGIN = 8 + MAX_NAME + 6  # "https://", a name, ":65535"
MAX_CIDR = 43  # 39 characters of IPv6 and "/128"
MAX_DURATION_TEXT = 32  # "365d23h59m59s999ms" and then some
MAX_STATUS_BYTES = 2048  # an agent's part of a status as compact JSON: 10,000 peers are 20 MB in etcd
MAX_SERVICES = 256  # of one cluster in one mesh: each is watched by every other cluster's operator
MAX_SERVICE_PORTS = 64  # of a Service, and of the pods behind it
MAX_BACKENDS = 16  # pods of one Service that listen on other ports than the rest: a rollout makes two kinds
MAX_SERVICE_ENDPOINTS = 1000  # of one Service: as many as Kubernetes lets one EndpointSlice hold
MAX_PROBLEMS = 20  # more help nobody, and a hostile document must not buy a long answer
SHOWN_VALUE = 60  # characters of a refused value that are repeated in the refusal

FINGERPRINT_DIGITS = 64  # of 32 bytes
MIN_ROTATION = 300.0  # a key is proved by WireGuard's next rekey, two minutes after it was laid in
MAX_ROTATION = 30 * 86400.0
MAX_SUITE = 255  # a byte on the wire

MIN_PROBE = 0.1  # ten pings a second towards every peer is the most that is polite
MAX_PROBE = 60.0  # NAT mappings for UDP may last no longer than two minutes (RFC 4787, REQ-5)
MAX_TIMER = 3600.0  # a peer that is unreachable for an hour has been so for long enough to say it
MIN_EXPIRY = 60.0  # below this a reboot would make a peer expire
MAX_EXPIRY = 3650 * 86400.0
MIN_MTU = 1280  # IPv6 needs it (RFC 8200, section 5)
MAX_MTU = 9000  # jumbo frames
MAX_TIME = 253_402_300_799  # the last second that RFC 3339 can write
MAX_LATENCY = 600.0  # seconds; a link slower than ten minutes is not one

# Where a mesh's addresses may come from: ranges that are nobody's on the Internet. 100.64.0.0/10 is shared
# address space (RFC 6598), which overlays use because sites rarely do.
IPV4_RANGES = tuple(
    IPv4Network(prefix) for prefix in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")
)
IPV6_RANGE = IPv6Network("fc00::/7")
IPV4_LENGTHS = range(8, 31)  # /30 is the smallest that two peers fit in
IPV6_LENGTHS = range(32, 121)  # /48 is what RFC 4193 hands out; /120 still holds 255 peers
# A route shorter than these would pull the underlay, and with it WireGuard's own datagrams, into the mesh.
MIN_ROUTE_LENGTH = {4: 8, 6: 16}
