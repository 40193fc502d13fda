"""The commands that ask this machine's agent: status, explain, rotate and ping."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from pathlib import Path

from scope.ctl import render
from scope.ctl.explaining import parse_candidates, peer_text
from scope.ctl.local import AgentStatus, ask, find_socket, parse_status
from scope.ctl.metrics import metrics_text, server
from scope.ctl.ping import INTERVAL, NONCE_BYTES, Pinger, choose_target, find_peer, named
from scope.ctl.rotating import Progress, choose, follow, outcome


def show_status(args: argparse.Namespace) -> None:
    """Print the agent's view. Raises CommandError."""
    status = ask(find_socket(args.socket), {"command": "status"}).get("status")
    if args.output == "json":
        print(render.json_text(status), end="")
    else:
        text = render.status_text(parse_status(status), color=render.in_color(sys.stdout))
        print(text, end="")


def explain(args: argparse.Namespace) -> None:
    """Print how a peer is reached, and every candidate. Raises CommandError."""
    path = find_socket(args.socket)
    peer = named(_status(path), args.peer)
    answer = ask(path, {"command": "explain", "peer": peer.name})
    print(peer_text(peer, parse_candidates(answer), color=render.in_color(sys.stdout)), end="")


def rotate(args: argparse.Namespace) -> bool:
    """Have new post-quantum keys made, and follow them. True when none failed. Raises CommandError."""
    path = find_socket(args.socket)
    name = "" if args.all else args.peer
    before = choose(_status(path), name)
    ask(path, {"command": "rotate", "peer": name})
    last = Progress()
    for last in follow(
        lambda: _status(path), before, confirmed=args.wait, clock=time.monotonic, sleep=time.sleep
    ):
        if args.wait:
            print(last.text(), flush=True)
    print("\n".join(outcome(last)))
    return not last.failed and not last.awaited and not (args.wait and last.laid)


def tell_metrics(args: argparse.Namespace) -> None:
    """Print the agent's view for Prometheus, or serve it for good. Raises CommandError."""
    path = find_socket(args.socket)
    if args.listen is None:
        print(metrics_text(_status(path)), end="")
        return
    with server(lambda: _status(path), args.listen) as serving:
        serving.serve_forever()


def ping(args: argparse.Namespace) -> bool:
    """Ping once a second, asking after each for the path, which may change. True when any was answered."""
    path = find_socket(args.socket)
    target = choose_target(_status(path), args.peer, version=args.version)
    results: list[float | str] = []
    with Pinger(target.address, nonce=secrets.token_bytes(NONCE_BYTES)) as pinger:
        try:
            for sequence in range(1, args.count + 1):
                started = time.monotonic()
                results.append(pinger.ping(sequence))
                peer = find_peer(_status(path), target.name)
                print(render.ping_line(target, sequence, results[-1], peer), flush=True)
                if sequence < args.count:
                    time.sleep(max(0.0, started + INTERVAL - time.monotonic()))
        except KeyboardInterrupt:
            print()
    print(render.ping_summary(target, results))
    return any(isinstance(result, float) for result in results)


def _status(path: Path) -> AgentStatus:
    return parse_status(ask(path, {"command": "status"}).get("status"))
