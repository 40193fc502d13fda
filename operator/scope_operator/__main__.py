"""The program `scope-registry`: serves an embedded registry from one directory."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from scope.credentials import base64url
from scope.model import ConfigError
from scope_operator.gateway.advertised import Advertised
from scope_operator.gateway.process import ServeConfig, Serving, UsersCertificate, serving

DATA = Path("/var/lib/scope-registry")
PORT = 7443
REFLECTOR_PORTS = (7478, 7479)  # two: a NAT's mapping class needs two endpoints to be told
ANY = (("0.0.0.0", PORT), ("::", PORT))  # noqa: S104 - a registry is there to be reached


def main(arguments: list[str] | None = None) -> None:
    """Run the program; exits 1 with a sentence where something has to be changed first."""
    options = build_parser().parse_args(arguments)
    _log(options.log_level)
    try:
        failed = asyncio.run(_serve(_config(options)))
    except ConfigError as error:
        print(f"scope-registry: {error}", file=sys.stderr)
        sys.exit(1)
    if failed:
        print("scope-registry: a part of the registry failed; the log above says which", file=sys.stderr)
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="scope-registry", description="The registry of a Scope mesh.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve the registry: HTTPS for agents and scopectl, UDP reflectors"
    )
    serve.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="DIR",
        help="database, keys, admin.json (default: %(default)s)",
    )
    serve.add_argument(
        "--listen",
        type=_listen,
        action="append",
        metavar="ADDRESS:PORT",
        help=f"HTTPS here, repeatable (default: every address, port {PORT})",
    )
    serve.add_argument(
        "--advertise",
        type=_advertised,
        action="append",
        metavar="HOST[:PORT]",
        help="where peers reach this machine, repeatable: join strings name the first, reflectors all "
        "(default: the addresses that this machine sends from)",
    )
    serve.add_argument(
        "--reflector-ports",
        type=_ports,
        default=REFLECTOR_PORTS,
        metavar="PORT,PORT",
        help="UDP ports of the reflector (default: {},{})".format(*REFLECTOR_PORTS),
    )
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="your own certificate chain, PEM")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="its key, PEM")
    serve.add_argument(
        "--tls-pinned",
        action="store_true",
        help="join strings carry the pin of --tls-key: for a certificate that no public CA signed",
    )
    serve.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


async def _serve(config: ServeConfig) -> bool:
    """Serve until SIGTERM or SIGINT (False), or until a part fails (True)."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(config) as running:
        _say(running, config)
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((stopping, running.failed), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        return running.failed.done()


def _say(running: Serving, config: ServeConfig) -> None:
    https = ", ".join(map(str, running.listening))
    udp = ", ".join(map(str, running.reflecting))
    pin = "the system's certificate authorities" if running.pin is None else f"pin {base64url(running.pin)}"
    print(f"scope-registry: serving https on {https}; reflecting on UDP {udp}")
    print(f"Join strings name {running.url}, known by {pin}.")
    if running.admin_file is not None:
        print(f"The administrator's token is in {running.admin_file}: keep it to yourself.")
    admin = config.data / "admin.json"
    option = "" if config.data == DATA else f" --admin-file {admin}"
    print(
        f"Next: scopectl apply{option} -f mesh.yaml, then scopectl token create{option} --mesh NAME",
        flush=True,
    )


def _config(options: argparse.Namespace) -> ServeConfig:
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigError(
            "--tls-cert and --tls-key go together: give both, or neither for a self-made certificate"
        )
    own = None
    if options.tls_cert is not None:
        own = UsersCertificate(options.tls_cert, options.tls_key, pinned=options.tls_pinned)
    elif options.tls_pinned:
        raise ConfigError("--tls-pinned is about --tls-cert and --tls-key: a self-made certificate always is")
    return ServeConfig(
        data=options.data,
        listen=tuple(options.listen) if options.listen else _everywhere(),
        reflector_ports=options.reflector_ports,
        advertise=tuple(options.advertise or ()),
        certificate=own,
    )


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


def _log(level: str) -> None:
    """Events to standard error; the journal adds the time itself."""
    time = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(level=level.upper(), format=f"{time}%(levelname)s %(message)s", stream=sys.stderr)


if __name__ == "__main__":
    main()
