"""The command line of scopectl as argparse knows it; shell completion is made from the same description."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

from scope.model import Role
from scope.resources import parse_duration

ADMIN_FILE = Path("/var/lib/scope-registry/admin.json")
ADMIN_FILE_VARIABLE = "SCOPE_ADMIN_FILE"
FORMATS = ("table", "json", "yaml")
DEFAULT_TTL = "1h"  # long enough to walk to the other machine, too short to be found in a chat a week later
MAX_PINGS = 100_000  # more than a day of them


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="scopectl",
        description="Look after a Scope registry, and see what the agent on this machine does.",
        epilog="Exit codes: 0 done, 1 failed, 2 not understood.",
    )
    admin = _admin_options()
    local = _local_options()
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    apply = commands.add_parser("apply", parents=[admin], help="create or update resources from a file")
    file = apply.add_argument(
        "-f", "--file", required=True, metavar="FILE", help="YAML or JSON, one or more documents; - for stdin"
    )
    file.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told

    plan = commands.add_parser("plan", parents=[admin], help="what applying a file would do; changes nothing")
    file = plan.add_argument("-f", "--file", required=True, metavar="FILE", help="as for apply; - for stdin")
    file.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
    _add_format(plan, ("table", "json"))

    get = commands.add_parser("get", parents=[admin], help="show meshes or peers of the registry")
    get.add_argument("kind", choices=("meshes", "mesh", "peers", "peer"))
    get.add_argument("name", nargs="?", metavar="NAME")
    get.add_argument("--mesh", metavar="MESH", help="only the peers of this mesh")
    _add_format(get, FORMATS)

    _add_token(commands.add_parser("token", help="invite machines: make, list and delete join tokens"), admin)

    peer = commands.add_parser("peer", help="remove peers").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    remove = peer.add_parser(
        "remove", parents=[admin], help="remove a peer for good; every other peer cuts it off"
    )
    remove.add_argument("name", metavar="NAME")

    mesh = commands.add_parser("mesh", help="delete meshes").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    delete = mesh.add_parser("delete", parents=[admin], help="delete a mesh")
    delete.add_argument("name", metavar="NAME")

    cluster = commands.add_parser("cluster", help="take Kubernetes clusters out of a mesh").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    take_out = cluster.add_parser(
        "remove", parents=[admin], help="trust a joined cluster no longer, and delete the peers of its Nodes"
    )
    take_out.add_argument("name", metavar="NAME")
    take_out.add_argument("--mesh", required=True, metavar="MESH")

    service = commands.add_parser(
        "service",
        parents=[admin],
        help="by which name a Service of another cluster is reached, and what answers",
    )
    service.add_argument("name", metavar="NAME.NAMESPACE", help="as it is called in its own cluster")
    service.add_argument(
        "--in", dest="cluster", required=True, metavar="CLUSTER", help="the cluster that exports it"
    )
    _add_format(service, FORMATS)

    status = commands.add_parser("status", parents=[local], help="what this machine's agent sees")
    _add_format(status, ("table", "json"))

    explain = commands.add_parser(
        "explain",
        parents=[local, admin],
        help="why a peer is reached as it is: every candidate tried; or, of two peers, what both report",
    )
    explain.add_argument("peer", metavar="PEER", help="a peer's name or mesh address")
    explain.add_argument(
        "other", nargs="?", metavar="PEER", help="ask the registry about these two, in place of our agent"
    )

    rotate = commands.add_parser(
        "rotate", parents=[local], help="agree on new post-quantum keys with one peer, or with all"
    )
    whom = rotate.add_mutually_exclusive_group(required=True)
    whom.add_argument("peer", nargs="?", metavar="PEER", help="a peer's name, as `scopectl status` shows")
    whom.add_argument("--all", action="store_true", help="with every peer that we have a path to")
    rotate.add_argument(
        "--wait", action="store_true", help="until handshakes confirmed them, not just until they are laid in"
    )

    _add_identity(
        commands.add_parser("identity", help="whose identity for post-quantum keys this agent believes"),
        local,
    )

    metrics = commands.add_parser(
        "metrics", parents=[local], help="what the agent says of its peers and their keys, for Prometheus"
    )
    metrics.add_argument(
        "--listen",
        type=int,
        metavar="PORT",
        help="serve it at http://127.0.0.1:PORT/metrics, in place of printing it once",
    )

    ping = commands.add_parser("ping", parents=[local], help="ping a peer through the mesh, with its path")
    ping.add_argument(
        "peer", metavar="PEER", help="a peer's name or mesh address, as `scopectl status` shows"
    )
    ping.add_argument(
        "-c", "--count", type=_count, default=4, metavar="N", help="how many pings (default: %(default)s)"
    )
    family = ping.add_mutually_exclusive_group()
    family.add_argument("-4", dest="version", action="store_const", const=4, help="the peer's IPv4 address")
    family.add_argument("-6", dest="version", action="store_const", const=6, help="the peer's IPv6 address")

    completion = commands.add_parser("completion", help="print shell completion, to be sourced")
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser


def completion(shell: str) -> str:
    """The completion script for a shell."""
    return str(shtab.complete(build_parser(), shell=shell))


def _add_token(parser: argparse.ArgumentParser, admin: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", parents=[admin], help="print a fresh join string")
    create.add_argument("--mesh", required=True, metavar="MESH")
    create.add_argument(
        "--ttl", type=_ttl, default=DEFAULT_TTL, metavar="1h", help="its life (default: %(default)s)"
    )
    create.add_argument("--single-use", action="store_true", help="it lets one machine join, and no second")
    create.add_argument(
        "--role", choices=tuple(map(str, Role)), default=str(Role.AUTO), help="of those who join with it"
    )
    create.add_argument(
        "--hub", metavar="PEER", help="for a machine from which only this hub can be reached, by TCP"
    )
    listing = actions.add_parser("list", parents=[admin], help="show the tokens, without their secrets")
    _add_format(listing, FORMATS)
    delete = actions.add_parser(
        "delete", parents=[admin], help="delete a token: nobody joins with it any more"
    )
    delete.add_argument("name", metavar="ID")


def _add_identity(parser: argparse.ArgumentParser, local: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser(
        "show", parents=[local], help="this machine's fingerprint, and by what each peer's is believed"
    )
    _add_format(show, ("table", "json"))
    trust = actions.add_parser(
        "trust", parents=[local], help="believe a peer by this fingerprint from now on"
    )
    trust.add_argument("peer", metavar="PEER", help="a peer's name, as `scopectl status` shows")
    trust.add_argument(
        "fingerprint", metavar="FINGERPRINT", help="what `scopectl identity show` prints on its machine"
    )
    actions.add_parser(
        "rotate", parents=[local], help="make a new identity; peers follow, and agree on new keys"
    )
    certify = actions.add_parser(
        "certify", parents=[local], help="show others this certificate of the own identity"
    )
    certify.add_argument(
        "file", type=Path, metavar="FILE", help="what `scope-agent ca sign` printed; - for stdin"
    ).complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told


def _admin_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--admin-file",
        type=Path,
        metavar="FILE",
        help=f"the registry's admin.json (default: ${ADMIN_FILE_VARIABLE}, else {ADMIN_FILE})",
    ).complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
    return parser


def _local_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--socket", type=Path, metavar="PATH", help="the agent's socket (default: the one in /run/scope)"
    ).complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
    return parser


def _add_format(parser: argparse.ArgumentParser, formats: tuple[str, ...]) -> None:
    parser.add_argument("-o", "--output", choices=formats, default=formats[0])


def _ttl(text: str) -> float:
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    if seconds <= 0:
        raise argparse.ArgumentTypeError("a token's life is longer than nothing")
    return seconds


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_PINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_PINGS}")
    return int(text)
