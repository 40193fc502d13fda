"""The commands about identities for post-quantum keys: whose fingerprint this machine's agent believes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from scope.ctl import render
from scope.ctl.errors import CommandError
from scope.ctl.local import ask, find_socket, objects, string

DISK_SECONDS = 60.0  # a new identity is answered once it is on the disk


def run_identity(args: argparse.Namespace) -> None:
    """Perform one of them. Raises CommandError."""
    path = find_socket(args.socket)
    match args.action:
        case "show":
            _show(path, output=args.output)
        case "trust":
            _trust(path, args.peer, args.fingerprint)
        case "rotate":
            fingerprint = string(
                ask(path, {"command": "identity rotate"}, timeout=DISK_SECONDS), "fingerprint"
            )
            print(
                f"{fingerprint}\n"
                "is the identity from now on; the one before is gone, and signed that this follows it. Peers "
                "that are reached agree on a new key now, others when they are back; those that ask for a "
                "CA's certificate wait for `scopectl identity certify`"
            )
        case _:
            certificate = _read_line(args.file)
            ask(path, {"command": "identity certify", "argument": certificate}, timeout=DISK_SECONDS)
            print("the certificate is kept, and shown to whoever asks")


def identity_text(shown: Mapping[str, object], *, color: bool) -> str:
    """The own fingerprint, what is asked for, then one line per peer."""
    ca = string(shown, "ca")
    certified = "certified" if shown.get("certified") is True else "not certified"
    facts = [
        ("Peer", string(shown, "peer") or "not enrolled yet"),
        ("Fingerprint", string(shown, "fingerprint")),
        ("Trust", f"{string(shown, 'trust')} {ca}, itself {certified}" if ca else string(shown, "trust")),
    ]
    first = max(len(name) for name, _ in facts) + 3
    top = "".join(f"{name + ':':<{first}}{value}\n" for name, value in facts)
    rows = [
        (
            string(peer, "name"),
            string(peer, "named") or render.NOTHING,
            _kept(peer),
            string(peer, "trust") or "None",
            string(peer, "reason"),
        )
        for peer in objects(shown, "peers")
    ]
    header = ("PEER", "FINGERPRINT", "KEPT", "TRUST", "WHY NO KEY")
    return f"{top}\n{render.table(header, rows, color=color)}" if rows else top


def _show(path: Path, *, output: str) -> None:
    shown = ask(path, {"command": "identity show"}).get("identity")
    if not isinstance(shown, Mapping):
        raise CommandError("the agent shows no identity: are scopectl and the agent of the same release?")
    text = identity_text(shown, color=render.in_color(sys.stdout))
    print(render.json_text(shown) if output == "json" else text, end="")


def _trust(path: Path, peer: str, fingerprint: str) -> None:
    answer = ask(path, {"command": "identity trust", "peer": peer, "argument": fingerprint})
    named = string(answer, "named")
    if named == fingerprint:
        print(f"{peer} is trusted by this fingerprint, and a key is agreed on")
    elif named:
        print(
            f"{peer} is trusted by this fingerprint, but the registry names {named}: no new key before it "
            f"names the one you gave. Look at `scopectl identity show` on {peer}: one of the two is wrong"
        )
    else:
        print(f"{peer} is trusted by this fingerprint, once its agent publishes one")


def _kept(peer: Mapping[str, object]) -> str:
    """The fingerprint that is kept for a peer, where it is not the one that the registry names."""
    pinned = string(peer, "pinned")
    if not pinned:
        return "no"
    return "yes" if pinned == string(peer, "named") else pinned


def _read_line(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.readline().strip()
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
