"""The entry point of scopectl: from the command line to one command, and from its end to an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from scope.ctl.arguments import build_parser, completion
from scope.ctl.errors import CommandError
from scope.model import ConfigError

DONE, FAILED = 0, 1
INTERRUPTED = 130  # 128 and SIGINT's number, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (argparse itself exits with 2 where it understands nothing)."""
    args = build_parser().parse_args(arguments)
    try:
        succeeded = _run(args)
        sys.stdout.flush()
    except (CommandError, ConfigError) as error:
        print(f"scopectl: {error}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:
        # Whoever read our output has seen enough; without this Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE if succeeded else FAILED


def _run(args: argparse.Namespace) -> bool:
    """Each side is imported by its own commands: the local ones do without an HTTP client."""
    match args.command:
        case "completion":
            print(completion(args.shell))
        case "status":
            from scope.ctl.inspection import show_status

            show_status(args)
        case "explain" if args.other is None:
            from scope.ctl.inspection import explain

            explain(args)
        case "rotate":
            from scope.ctl.inspection import rotate

            return rotate(args)
        case "identity":
            from scope.ctl.identity import run_identity

            run_identity(args)
        case "metrics":
            from scope.ctl.inspection import tell_metrics

            tell_metrics(args)
        case "ping":
            from scope.ctl.inspection import ping

            return ping(args)
        case _:
            from scope.ctl.administration import administer

            administer(args)
    return True


if __name__ == "__main__":
    sys.exit(main())
