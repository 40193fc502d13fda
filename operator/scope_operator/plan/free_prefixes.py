"""Prefixes that nobody of a mesh uses, to be proposed where two peers claim one. Pure.

A mesh does not know what stands in the underlays of its peers, so a proposal comes from where few networks
are: the upper part of 10.0.0.0/8 first, and for IPv6 a unique local prefix that follows from the mesh's UID,
which hardly anybody else has.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from scope.model import IPNetwork

_POOLS_4: Final = tuple(
    map(IPv4Network, ("10.192.0.0/10", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"))
)
_LOCAL: Final = 0xFD << 120  # fd00::/8, RFC 4193
_GLOBAL_ID_BITS: Final = 40  # of a unique local prefix, behind its first byte


class FreePrefixes:
    """What is free beside `known`. What was proposed is proposed to nobody else."""

    def __init__(self, known: Iterable[IPNetwork], *, mesh_uid: str) -> None:
        self._mesh_uid = mesh_uid
        # Disjoint ranges of integers by version, in order; ranges that touch are one.
        self._firsts: dict[int, list[int]] = {4: [], 6: []}
        self._lasts: dict[int, list[int]] = {4: [], 6: []}
        for prefix in sorted(known, key=lambda each: (each.version, int(each.network_address))):
            self._take(prefix)

    def propose(self, like: IPNetwork) -> IPNetwork | None:
        """A free prefix of the same family and length; None where all are taken."""
        for pool in self._pools(like):
            found = self._first_in(pool, like)
            if found is not None:
                self._take(found)
                return found
        return None

    def _pools(self, like: IPNetwork) -> tuple[IPNetwork, ...]:
        if isinstance(like, IPv4Network):
            return _POOLS_4
        digest = hashlib.sha256(f"free prefixes of {self._mesh_uid}".encode()).digest()
        bits = _LOCAL | int.from_bytes(digest[: _GLOBAL_ID_BITS // 8]) << 80
        return (IPv6Network((bits, 48)), IPv6Network((bits >> 112 << 112, 16)), IPv6Network((_LOCAL, 8)))

    def _first_in(self, pool: IPNetwork, like: IPNetwork) -> IPNetwork | None:
        firsts, lasts = self._firsts[like.version], self._lasts[like.version]
        size, end = like.num_addresses, int(pool.broadcast_address)
        at = int(pool.network_address)
        while at + size - 1 <= end:
            after = bisect_right(firsts, at + size - 1)
            if after == 0 or lasts[after - 1] < at:
                return (
                    IPv4Network((at, like.prefixlen))
                    if like.version == 4
                    else IPv6Network((at, like.prefixlen))
                )
            at = (lasts[after - 1] // size + 1) * size
        return None

    def _take(self, prefix: IPNetwork) -> None:
        firsts, lasts = self._firsts[prefix.version], self._lasts[prefix.version]
        first, last = int(prefix.network_address), int(prefix.broadcast_address)
        # Those from `begin` up to `end` touch it, and become one with it.
        end = bisect_right(firsts, last + 1)
        begin = end
        while begin and lasts[begin - 1] >= first - 1:
            begin -= 1
        if begin < end:
            first, last = min(first, firsts[begin]), max(last, lasts[end - 1])
        firsts[begin:end] = [first]
        lasts[begin:end] = [last]
