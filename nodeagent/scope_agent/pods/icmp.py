"""Rules of the packet filter that `nft` has no words for, as messages for the kernel. Pure.

They change an address of the packet that a message of ICMP is about, and with it the checksum that it
counts for: the kernel can, wherever that checksum lies, and `nft` names those of known fields only.

Layouts and numbers: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h. Numbers inside of attributes
are big-endian there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from scope_agent.pods.rules import Quoted, Way, quoted_at, table
from scope_agent.wireguard.netlink import ACK, CREATE, REQUEST, Request, attribute

_BATCH_BEGIN, _BATCH_END = 16, 17
_NFTABLES: Final = 10
_NEW_RULE: Final = _NFTABLES << 8 | 6
_APPEND: Final = 0x800
_INET, _UNSPECIFIED = 1, 0
_NESTED: Final = 0x8000

_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_ELEMENT: Final = 1
_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_VALUE: Final = 1
_TO, _BASE, _OFFSET, _LENGTH, _FROM, _CHECKSUM_TYPE, _CHECKSUM_OFFSET = range(1, 8)
_TRANSPORT_HEADER: Final = 2
_INTERNET_CHECKSUM: Final = 1
_BITS_FROM, _BITS_TO, _BITS_LENGTH, _BITS_MASK, _BITS_XOR = range(1, 6)
_REGISTER: Final = 1  # of 16 bytes


def quoted_rules(device: str, quoted: Sequence[Quoted]) -> tuple[Request, ...]:
    """All rules, as one batch that is done as a whole or not at all."""
    begin, end = (
        Request(kind, REQUEST, struct.pack("=BB", _UNSPECIFIED, 0) + struct.pack(">H", _NFTABLES))
        for kind in (_BATCH_BEGIN, _BATCH_END)
    )
    return (begin, *(_rule(device, each) for each in quoted), end)


def _rule(device: str, quoted: Quoted) -> Request:
    place = quoted_at(quoted)
    inside, outside = quoted.translation.inside, quoted.translation.outside
    after = inside if quoted.way is Way.IN else outside
    load = _number(_TO, _REGISTER) + _place(place.offset, place.size)
    turn = (
        _number(_BITS_FROM, _REGISTER)
        + _number(_BITS_TO, _REGISTER)
        + _number(_BITS_LENGTH, place.size)
        + _value(_BITS_MASK, inside.hostmask.packed)
        + _value(_BITS_XOR, after.network_address.packed)
    )
    store = (
        _number(_FROM, _REGISTER)
        + _place(place.offset, place.size)
        + _number(_CHECKSUM_TYPE, _INTERNET_CHECKSUM)
        + _number(_CHECKSUM_OFFSET, place.checksum)
    )
    expressions = (("payload", load), ("bitwise", turn), ("payload", store))
    body = struct.pack("=BBH", _INET, 0, 0)
    body += attribute(_RULE_TABLE, _text(table(device))) + attribute(_RULE_CHAIN, _text(quoted.chain))
    body += _nested(_RULE_EXPRESSIONS, b"".join(_expression(name, data) for name, data in expressions))
    return Request(_NEW_RULE, REQUEST | ACK | CREATE | _APPEND, body)


def _expression(name: str, data: bytes) -> bytes:
    return _nested(_ELEMENT, attribute(_EXPRESSION_NAME, _text(name)) + _nested(_EXPRESSION_DATA, data))


def _place(offset: int, size: int) -> bytes:
    return _number(_BASE, _TRANSPORT_HEADER) + _number(_OFFSET, offset) + _number(_LENGTH, size)


def _value(kind: int, raw: bytes) -> bytes:
    return _nested(kind, attribute(_VALUE, raw))


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def _nested(kind: int, data: bytes) -> bytes:
    return attribute(kind | _NESTED, data)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"
