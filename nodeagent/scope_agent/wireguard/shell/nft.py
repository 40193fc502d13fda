"""The packet filter by its own program, `nft`: the library under it has no stable interface.

The kernel numbers its rulesets: one small netlink message tells the number, some microseconds each time. Only
where it has moved need `nft` show a table, which takes some milliseconds, to see whether it is as it was.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from scope_agent.wireguard import netlink

PATIENCE_S = 5  # a table of ours takes some 10 ms; what else the device needs may wait for it
_NETLINK_NETFILTER = 12
_GETGEN = 10 << 8 | 16  # linux/netfilter/nfnetlink.h: NFNL_SUBSYS_NFTABLES; nf_tables.h: NFT_MSG_GETGEN
_NEWGEN = 10 << 8 | 15
_NLM_F_REQUEST = 1
_NFTA_GEN_ID = 1
_HEADER = struct.Struct("=IHHII")
_NFGENMSG = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")


class NftError(Exception):
    """`nft` is missing, or refused the rules; the message says which."""


@dataclass(frozen=True, slots=True)
class ForwardChain:
    """A chain, whoever's, that sees what is forwarded."""

    family: str
    table: str
    name: str
    drops: bool  # what none of its rules accepts

    def __str__(self) -> str:
        """As `nft` names it."""
        return f"{self.family} {self.table} {self.name}"


def run_nft(rules: str) -> None:
    """Load rules: all of them, or none. Blocks. Raises NftError."""
    refused = _nft(["-f", "-"], rules=rules)[1]
    if refused is not None:
        raise NftError(f"nft says: {refused[:200]}")


def load_messages(batch: Sequence[netlink.Request]) -> None:
    """Load what `nft` has no words for: all of the batch, or nothing. Blocks. Raises NftError."""
    waiting = {number for number, each in enumerate(batch, start=1) if each.flags & netlink.ACK}
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        ) as kernel:
            kernel.settimeout(PATIENCE_S)
            kernel.sendto(b"".join(each.encoded(number) for number, each in enumerate(batch, 1)), (0, 0))
            while waiting:
                for reply in netlink.replies(kernel.recv(1 << 16)):
                    code, text = netlink.error_of(reply)
                    if code:
                        raise NftError(f"the kernel refuses a rule: {text or os.strerror(code)}")
                    waiting.discard(reply.sequence)
    except (OSError, netlink.NetlinkError) as error:
        raise NftError(f"the kernel did not take a rule: {error}") from None


def ask_nft(arguments: list[str]) -> str | None:
    """What `nft` shows; None where there is no such thing. Blocks. Raises NftError."""
    shown, refused = _nft(arguments)
    if refused is None:
        return shown
    if "No such file or directory" in refused:
        return None
    raise NftError(f"nft says: {refused[:200]}")


def list_forward_chains() -> list[ForwardChain]:
    """Blocks. Raises NftError."""
    import json  # rarely wanted, as `subprocess`

    shown = ask_nft(["--json", "list", "chains"]) or '{"nftables": []}'
    chains = [entry["chain"] for entry in json.loads(shown)["nftables"] if "chain" in entry]
    return [
        ForwardChain(chain["family"], chain["table"], chain["name"], chain.get("policy") == "drop")
        for chain in chains
        if chain.get("hook") == "forward"
    ]


def _nft(arguments: list[str], *, rules: str = "") -> tuple[str, str | None]:
    """What it said, and why it refused, None where it did not. Raises NftError."""
    import subprocess  # half as dear to import as the whole probe socket, and rarely wanted

    try:
        done = subprocess.run(
            ["nft", *arguments], input=rules, text=True, capture_output=True, check=False, timeout=PATIENCE_S
        )
    except FileNotFoundError:
        raise NftError(f"`nft` is not on the PATH {os.environ.get('PATH', '')}") from None
    except subprocess.TimeoutExpired:
        raise NftError(f"`nft` did not answer in {PATIENCE_S} s") from None
    return done.stdout, done.stderr.strip() if done.returncode else None


def read_generation() -> int | None:
    """The number of the ruleset; None where the kernel does not tell it."""
    try:
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        ) as kernel:
            kernel.settimeout(PATIENCE_S)
            body = _NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)
            size = _HEADER.size + len(body)
            kernel.sendto(_HEADER.pack(size, _GETGEN, _NLM_F_REQUEST, 1, 0) + body, (0, 0))
            return _parse_generation(kernel.recv(4096))
    except OSError:
        return None


def _parse_generation(answer: bytes) -> int | None:
    """The attribute NFTA_GEN_ID of a NEWGEN message."""
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _NEWGEN:
        return None
    offset = _HEADER.size + _NFGENMSG.size
    while offset + _ATTRIBUTE.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, offset)
        if kind == _NFTA_GEN_ID:
            return int.from_bytes(answer[offset + _ATTRIBUTE.size : offset + length], "big")
        offset += max(length + 3 & ~3, _ATTRIBUTE.size)
    return None
