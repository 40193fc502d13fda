"""Loading rules into the packet filter, by its own program: the library under it has no stable interface."""

from __future__ import annotations

import os

PATIENCE_S = 5  # a table of ours takes some 10 ms; what else the device needs may wait for it


class NftError(Exception):
    """`nft` is missing, or refused the rules; the message says which."""


def run_nft(rules: str) -> None:
    """Load rules: all of them, or none. Blocks. Raises NftError."""
    import subprocess  # half as dear to import as the whole probe socket, and rarely wanted

    try:
        done = subprocess.run(
            ["nft", "-f", "-"], input=rules, text=True, capture_output=True, check=False, timeout=PATIENCE_S
        )
    except FileNotFoundError:
        raise NftError(f"`nft` is not on the PATH {os.environ.get('PATH', '')}") from None
    except subprocess.TimeoutExpired:
        raise NftError(f"`nft` did not answer in {PATIENCE_S} s") from None
    if done.returncode:
        raise NftError(f"nft says: {done.stderr.strip()[:200]}")
