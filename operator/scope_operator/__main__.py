"""The program `scope-registry`: serves an embedded registry from one directory."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from scope.credentials import base64url
from scope.model import ConfigError
from scope_operator.gateway.options import add_gateway_options, certificate_of, listen_of
from scope_operator.gateway.process import ServeConfig, Serving, serving

DATA = Path("/var/lib/scope-registry")


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
    add_gateway_options(serve)
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
    return ServeConfig(
        data=options.data,
        listen=listen_of(options),
        reflector_ports=options.reflector_ports,
        advertise=tuple(options.advertise or ()),
        certificate=certificate_of(options),
    )


def _log(level: str) -> None:
    """Events to standard error; the journal adds the time itself."""
    time = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(level=level.upper(), format=f"{time}%(levelname)s %(message)s", stream=sys.stderr)


if __name__ == "__main__":
    main()
