"""Datagrams of the probe protocol: bytes to messages and back.

(The byte layout goes here.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from scope.model import Candidate, Endpoint, PublicKey, Tombstone

MAX_CANDIDATES = 16  # what one call-me-maybe carries: host, reflexive and static of two families, with room
MAX_DATAGRAM = 1232  # IPv6's minimum MTU of 1280 less IPv6 and UDP headers: never fragmented by us


class WireError(Exception):
    """A datagram that is not ours, is damaged, or breaks a bound: drop and count it."""


@dataclass(frozen=True, slots=True)
class Ping:
    """"Do you hear me?" Padded so that no answer is larger than its question."""

    transaction: int  # u32, chosen by the asker
    has_session: bool  # the asker's WireGuard holds a live session with the receiver
    received: int  # u64, bytes that the asker's WireGuard has received from the receiver


@dataclass(frozen=True, slots=True)
class Pong:
    """The echo of one ping, with the endpoint that the ping was seen from."""

    transaction: int
    observed: Endpoint
    has_session: bool
    received: int  # u64, bytes that the answerer's WireGuard has received from the asker


@dataclass(frozen=True, slots=True)
class Nominate:
    """The lower key's choice of path: it sends to `there`; the receiver is to send to `here`."""

    sequence: int  # u32, rises with each nomination of the pair in one boot of the nominator
    there: Endpoint  # the receiver's endpoint
    here: Endpoint  # the nominator's endpoint, as the receiver saw it in a ping over this path


@dataclass(frozen=True, slots=True)
class Nominated:
    """The receiver follows nomination `sequence`."""

    sequence: int


@dataclass(frozen=True, slots=True)
class CallMeMaybe:
    """"Punch towards me now": the sender's candidates, at most MAX_CANDIDATES."""

    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Forward:
    """Ask a peer or reflector to pass a sealed datagram, unread, to the holder of probe key `to`."""

    to: PublicKey
    datagram: bytes


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A datagram that the holder of probe key `sender` asked to pass on."""

    sender: PublicKey
    datagram: bytes


@dataclass(frozen=True, slots=True)
class Removed:
    """A tombstone, passed on from peer to peer."""

    tombstone: Tombstone


Message: TypeAlias = Ping | Pong | Nominate | Nominated | CallMeMaybe | Forward | Forwarded | Removed
