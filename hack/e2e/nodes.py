"""What a Node's network and file system hold that Scope could have left there."""

from __future__ import annotations

import json
from pathlib import Path

from lab import Host

# Of pods and Services: they come and go with pods, and none of it is Scope's.
_OTHERS = ("cni0", "veth")
_OTHERS_TABLES = ("kube-proxy", "nat", "filter", "mangle")
_FOLDERS = ("var/lib/scope", "run/scope", "run/wireguard")


def holdings(host: Host, disk: Path) -> list[str]:
    """Links, addresses, rules, routes, packet filters and files, one a line, sorted.

    Those of pods and Services are left out, and so are empty folders and locks, of which the latter go with
    the next boot.
    """
    found: list[str] = []
    for link in json.loads(host.run(["ip", "-j", "addr", "show"]).stdout):
        if not link["ifname"].startswith(_OTHERS):
            found.append(f"link {link['ifname']}")
            found += [f"address {each['local']} of {link['ifname']}" for each in link["addr_info"]]
    for family in ("-4", "-6"):
        rules = host.run(["ip", family, "rule", "show"]).stdout
        found += [f"rule {family} {line}" for line in rules.splitlines()]
        routes = host.run(["ip", family, "route", "show", "table", "all"], check=False).stdout
        found += [f"route {family} {line.strip()}" for line in routes.splitlines() if not _is_of_others(line)]
    tables = json.loads(host.run(["nft", "-j", "list", "tables"]).stdout)["nftables"]
    for each in tables:
        table = each.get("table")
        if table is not None and table["name"] not in _OTHERS_TABLES:
            found.append(f"table {table['family']} {table['name']}")
    for folder in _FOLDERS:
        paths = [path for path in (disk / folder).rglob("*") if not path.is_dir() and path.suffix != ".lock"]
        found += [f"file /{path.relative_to(disk)}" for path in paths]
    return sorted(found)


def _is_of_others(route: str) -> bool:
    # What is told of pods' interfaces; and what the kernel keeps of IPv6 for a while by itself.
    return any(f"dev {name}" in route for name in _OTHERS) or "expires" in route
