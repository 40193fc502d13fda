"""The command line's options of a gateway, the same for every program that serves one."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from scope.model import ConfigError
from scope_operator.gateway.advertised import Advertised
from scope_operator.gateway.face import UsersCertificate

PORT = 7443
REFLECTOR_PORTS = (7478, 7479)  # two: a NAT's mapping class needs two endpoints to be told
ANY = (("0.0.0.0", PORT), ("::", PORT))  # noqa: S104 - a registry is there to be reached


def add_gateway_options(parser: argparse.ArgumentParser) -> None:
    """Where it listens, where peers find it, and its certificate."""
    parser.add_argument(
        "--listen",
        type=_listen,
        action="append",
        metavar="ADDRESS:PORT",
        help=f"HTTPS here, repeatable (default: every address, port {PORT})",
    )
    parser.add_argument(
        "--advertise",
        type=_advertised,
        action="append",
        metavar="HOST[:PORT]",
        help="where peers reach this machine, repeatable: join strings name the first, reflectors all "
        "(default: the addresses that this machine sends from)",
    )
    parser.add_argument(
        "--reflector-ports",
        type=_ports,
        default=REFLECTOR_PORTS,
        metavar="PORT,PORT",
        help="UDP ports of the reflector (default: {},{})".format(*REFLECTOR_PORTS),
    )
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="your own certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    parser.add_argument(
        "--tls-pinned",
        action="store_true",
        help="join strings carry the pin of --tls-key: for a certificate that no public CA signed",
    )


def certificate_of(options: argparse.Namespace) -> UsersCertificate | None:
    """The user's own certificate; None for a self-made one. Raises ConfigError."""
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError(
            "--tls-cert and --tls-key go together: give both, or neither for a self-made certificate"
        )
    if options.tls_cert is not None:
        return UsersCertificate(options.tls_cert, options.tls_key, pinned=options.tls_pinned)
    if options.tls_pinned:
        raise ConfigError("--tls-pinned is about --tls-cert and --tls-key: a self-made certificate always is")
    return None


def listen_of(options: argparse.Namespace) -> tuple[tuple[str, int], ...]:
    """Addresses and ports to listen on."""
    return tuple(options.listen) if options.listen else _everywhere()


def _everywhere() -> tuple[tuple[str, int], ...]:
    """Every address of the families that this machine speaks."""
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        return ANY[:1]
    return ANY


def _listen(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    except OSError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT, IPv6 as [ADDRESS]:PORT") from None
    if not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} does not end with a port of 0 to 65535")
    return host, int(port)


def _advertised(text: str) -> Advertised:
    try:
        return Advertised.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def _ports(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) <= 65535 for part in parts) or not 1 <= len(parts) <= 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not one to four ports with commas, as 7478,7479")
    return tuple(int(part) for part in parts)
