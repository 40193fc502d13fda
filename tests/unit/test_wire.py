"""The probe protocol's bytes: what is written, what is read back, and what is refused."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from scope import wire
from scope.model import Attachment, Candidate, CandidateKind, Endpoint, PublicKey, Tombstone
from scope.wire import (
    MAX_ATTACHMENTS,
    MAX_BODY,
    MAX_CANDIDATES,
    MAX_DATAGRAM,
    MAX_FORWARDED,
    AskRelay,
    Attach,
    Attached,
    CallMeMaybe,
    DatagramType,
    Forward,
    Forwarded,
    Granted,
    Guess,
    Guesses,
    Guessing,
    KeyPart,
    Message,
    Nominate,
    Nominated,
    Ping,
    Pong,
    Refused,
    RefusedBecause,
    Removed,
    UnknownMessage,
    UnknownVersion,
    WireError,
    decode_message,
    encode_message,
    is_datagram,
    pack_header,
    unpack_datagram,
)

KEY = PublicKey(bytes(range(32)))
HERE = Endpoint(IPv4Address("192.0.2.7"), 51820)
THERE = Endpoint(IPv6Address("2001:db8::7"), 443)
TOMBSTONE = Tombstone(mesh_uid="m", peer_uid="pé", key=KEY, signer=KEY, signature=bytes(64))


def datagram(body: bytes = b"", type_: DatagramType = DatagramType.SEALED) -> bytes:
    header = pack_header(
        type_, body_bytes=len(body), key_id=b"i" * 8, sender=b"s" * 12, receiver=b"r" * 12, counter=5
    )
    return header + body + bytes(16)


u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
keys = st.binary(min_size=32, max_size=32).map(PublicKey)
endpoints = st.builds(Endpoint, st.ip_addresses(), st.integers(1, 65535))
candidates = st.builds(Candidate, endpoints, st.sampled_from(CandidateKind))
datagrams = st.binary(max_size=MAX_FORWARDED - wire.MIN_DATAGRAM).map(datagram)
uids = st.text(min_size=1, max_size=63).filter(lambda text: len(text.encode()) <= 63)
signatures = st.binary(min_size=64, max_size=64)
attachments = st.lists(st.builds(Attachment, keys, keys, u64, signatures), max_size=MAX_ATTACHMENTS).map(
    tuple
)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Ping, u32, st.booleans(), u64, st.booleans()),
    st.builds(Pong, u32, endpoints, st.booleans(), u64),
    st.builds(Nominate, u32, endpoints, endpoints),
    st.builds(Nominated, u32),
    st.builds(
        CallMeMaybe,
        st.lists(candidates, max_size=MAX_CANDIDATES).map(tuple),
        opened=st.lists(endpoints, max_size=MAX_CANDIDATES).map(tuple),
    ),
    st.builds(Forward, keys, datagrams),
    st.builds(Forwarded, keys, datagrams),
    st.builds(Removed, st.builds(Tombstone, uids, uids, keys, keys, signatures)),
    st.builds(AskRelay, keys),
    st.builds(
        Granted,
        keys,
        token=st.binary(min_size=8, max_size=8),
        port=st.integers(1, 65535),
        lifetime=u32,
        user_space=st.booleans(),
    ),
    st.builds(Refused, keys, st.sampled_from(RefusedBecause)),
    st.builds(Attach, attachments),
    st.builds(Attached, attachments),
    st.builds(Guess, u32, endpoints, endpoints),
    st.builds(Guessing, u32, st.sampled_from(Guesses)),
    st.builds(KeyPart, u32, st.integers(0, 2), st.integers(3, 8), st.binary(min_size=1, max_size=1100)),
)


@given(messages)
def test_every_message_comes_back_from_its_bytes(message: Message) -> None:
    body = encode_message(message)
    assert len(body) <= MAX_BODY
    assert decode_message(body) == message


@example(CallMeMaybe(()), b"\x01")
@given(messages, st.binary(max_size=40))
def test_fields_that_a_later_release_appends_are_ignored(message: Message, appended: bytes) -> None:
    assert decode_message(encode_message(message) + appended) == message


@given(messages, st.data())
def test_a_message_cut_short_is_refused(message: Message, data: st.DataObject) -> None:
    body = encode_message(message)
    cut = data.draw(st.integers(0, len(body) - 1))
    if isinstance(message, CallMeMaybe):  # whose opened endpoints earlier releases leave out
        assume(cut != 2 + 19 * len(message.candidates))
    with pytest.raises(WireError):
        decode_message(body[:cut])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_wire_error(body: bytes) -> None:
    try:
        message = decode_message(body)
    except WireError:
        return
    assert decode_message(encode_message(message)) == message


@pytest.mark.parametrize(
    ("message", "body"),
    [
        (Ping(1, has_session=True, received=2), "01 00000001 01 0000000000000002" + " 00" * 18),
        (
            Ping(1, has_session=False, received=2, guessed=True),
            "01 00000001 00 0000000000000002 01" + " 00" * 17,
        ),
        (
            Guess(9, at=THERE, here=HERE),
            "0e 00000009 20010db8000000000000000000000007 01bb 00000000000000000000ffffc0000207 ca6c",
        ),
        (Guessing(9, Guesses.BUSY), "0f 00000009 02"),
        (
            Pong(1, HERE, has_session=False, received=2),
            "02 00000001 00 0000000000000002 00000000000000000000ffffc0000207 ca6c",
        ),
        (
            Nominate(9, there=THERE, here=HERE),
            "03 00000009 20010db8000000000000000000000007 01bb 00000000000000000000ffffc0000207 ca6c",
        ),
        (Nominated(9), "04 00000009"),
        (
            CallMeMaybe((Candidate(HERE, CandidateKind.MAPPED),)),
            "05 01 05 00000000000000000000ffffc0000207 ca6c 00",
        ),
        (
            CallMeMaybe((Candidate(HERE, CandidateKind.MAPPED),), opened=(THERE,)),
            "05 01 05 00000000000000000000ffffc0000207 ca6c 01 20010db8000000000000000000000007 01bb",
        ),
        (Forward(KEY, datagram()), f"06 {KEY.raw.hex()} 0040 {datagram().hex()}"),
        (Forwarded(KEY, datagram()), f"07 {KEY.raw.hex()} 0040 {datagram().hex()}"),
        (Removed(TOMBSTONE), f"08 01 6d 03 70c3a9 {KEY.raw.hex()} {KEY.raw.hex()}" + " 00" * 64),
        (
            Attach((Attachment(KEY, KEY, 2, bytes(64)),)),
            f"0c 01 {KEY.raw.hex()} {KEY.raw.hex()} 0000000000000002" + " 00" * 64,
        ),
        (Attached(()), "0d 00"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_the_bytes_of_a_message_are_those_of_the_layout(message: Message, body: str) -> None:
    assert encode_message(message) == bytes.fromhex(body)


def test_the_bytes_of_a_header_are_those_of_the_layout() -> None:
    header = pack_header(
        DatagramType.INITIAL,
        body_bytes=3,
        key_id=b"k" * 8,
        sender=b"s" * 12,
        receiver=bytes(12),
        counter=0x0102,
    )
    assert header == (
        b"SCop"
        + bytes.fromhex("01 01 0043")
        + b"k" * 8
        + b"s" * 12
        + bytes(12)
        + bytes.fromhex("0000000000000102")
    )


def test_a_datagram_comes_back_in_its_parts() -> None:
    data = datagram(b"body")
    parts = unpack_datagram(data)
    assert parts.type is DatagramType.SEALED
    assert (parts.key_id, parts.sender, parts.receiver, parts.counter) == (b"i" * 8, b"s" * 12, b"r" * 12, 5)
    assert parts.header + parts.sealed == data


def test_no_answer_is_larger_than_its_question() -> None:
    pong = encode_message(Pong(2**32 - 1, THERE, has_session=True, received=2**64 - 1))
    assert len(pong) <= len(encode_message(Ping(0, has_session=False, received=0)))
    assert len(encode_message(Nominated(2**32 - 1))) <= len(encode_message(Nominate(0, HERE, THERE)))
    assert len(encode_message(Guessing(0, Guesses.YES))) <= len(encode_message(Guess(0, HERE, THERE)))
    assert len(datagram(b"", DatagramType.COOKIE)) == wire.MIN_DATAGRAM


def test_a_datagram_is_never_taken_for_wireguard_or_stun() -> None:
    assert int.from_bytes(wire.MAGIC, "little") not in range(1, 5)
    assert wire.MAGIC[0] >> 6 != 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SCop",
        datagram()[:-1],
        datagram() + b"\0",
        b"SCoh" + datagram()[4:],
        b"\x01\0\0\0" + bytes(144),
        datagram()[:6] + b"\0\0" + datagram()[8:],
        datagram(bytes(MAX_BODY)) + b"\0",
    ],
    ids=["empty", "magic only", "cut", "longer", "hub's magic", "WireGuard", "length 0", "too long"],
)
def test_bytes_that_are_no_datagram_are_refused(data: bytes) -> None:
    assert not is_datagram(data)
    with pytest.raises(WireError):
        unpack_datagram(data)


def test_an_unknown_version_is_refused_by_naming_both() -> None:
    data = datagram()
    later = data[:4] + b"\x02" + data[5:]
    assert is_datagram(later)  # so it can still be forwarded by this release
    with pytest.raises(UnknownVersion, match="version 2, where this side speaks version 1"):
        unpack_datagram(later)


@pytest.mark.parametrize("number", [0, 4, 255])
def test_an_unknown_datagram_type_is_refused(number: int) -> None:
    data = datagram()
    with pytest.raises(WireError, match=f"no such datagram type: {number}"):
        unpack_datagram(data[:5] + bytes((number,)) + data[6:])


@pytest.mark.parametrize("number", [0, 99, 255])
def test_an_unknown_message_can_be_counted_apart(number: int) -> None:
    with pytest.raises(UnknownMessage, match=str(number)):
        decode_message(bytes((number,)) + b"later")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("01 00000001 02 0000000000000002" + " 00" * 18, "a flag is 0 or 1"),
        ("02 00000001 00 0000000000000002 00000000000000000000ffffc0000207 0000", "port 0"),
        ("05 11" + " 01 00000000000000000000ffffc0000207 ca6c" * 17, "17 candidates"),
        ("05 01 00 00000000000000000000ffffc0000207 ca6c", "no such kind of candidate: 0"),
        ("05 01 07 00000000000000000000ffffc0000207 ca6c", "no such kind of candidate: 7"),
        ("05 02 01 00000000000000000000ffffc0000207 ca6c", "inside a field"),
        (f"06 {KEY.raw.hex()} 0003 010203", "not a datagram"),
        (f"06 {KEY.raw.hex()} ffff {datagram().hex()}", "inside a field"),
        (f"08 00 01 70 {KEY.raw.hex()} {KEY.raw.hex()}" + " 00" * 64, "1 to 63 bytes, not 0"),
        ("08 40" + " 61" * 64 + f" 01 70 {KEY.raw.hex()} {KEY.raw.hex()}" + " 00" * 64, "not 64"),
        (f"08 01 ff 01 70 {KEY.raw.hex()} {KEY.raw.hex()}" + " 00" * 64, "not UTF-8"),
    ],
)
def test_a_field_out_of_bounds_is_refused(body: str, why: str) -> None:
    with pytest.raises(WireError, match=why):
        decode_message(bytes.fromhex(body))


@pytest.mark.parametrize(
    "message",
    [
        Ping(2**32, has_session=False, received=0),
        Ping(-1, has_session=False, received=0),
        Pong(0, HERE, has_session=False, received=2**64),
        Nominate(2**32, HERE, THERE),
        Nominated(-1),
        CallMeMaybe((Candidate(HERE, CandidateKind.HOST),) * (MAX_CANDIDATES + 1)),
        CallMeMaybe((), opened=(HERE,) * (MAX_CANDIDATES + 1)),
        Forward(KEY, b"not a datagram"),
        Forwarded(KEY, datagram(bytes(MAX_FORWARDED - wire.MIN_DATAGRAM + 1))),
        Removed(Tombstone("", "p", KEY, KEY, bytes(64))),
        Removed(Tombstone("m", "é" * 32, KEY, KEY, bytes(64))),
        Removed(Tombstone("m", "p", KEY, KEY, bytes(63))),
    ],
)
def test_what_would_be_refused_is_not_written(message: Message) -> None:
    with pytest.raises(ValueError, match=r"below|at most|forwarded|UID|signature"):
        encode_message(message)


def test_the_largest_messages_fit_into_one_datagram() -> None:
    forward = encode_message(Forward(KEY, datagram(bytes(MAX_FORWARDED - wire.MIN_DATAGRAM))))
    assert len(datagram(forward)) == MAX_DATAGRAM
    candidates = (Candidate(THERE, CandidateKind.HOST),) * MAX_CANDIDATES
    call = encode_message(CallMeMaybe(candidates, opened=(HERE,) * MAX_CANDIDATES))
    assert len(datagram(call)) <= MAX_FORWARDED  # it reaches its receiver over a third one
    with pytest.raises(ValueError, match="at most"):
        pack_header(
            DatagramType.SEALED,
            body_bytes=MAX_BODY + 1,
            key_id=bytes(8),
            sender=bytes(12),
            receiver=bytes(12),
            counter=0,
        )


def test_a_call_of_an_earlier_release_says_nothing_of_what_it_opened() -> None:
    body = encode_message(CallMeMaybe((Candidate(HERE, CandidateKind.HOST),), opened=(THERE,)))
    older = body[: -1 - 18]
    assert decode_message(older) == CallMeMaybe((Candidate(HERE, CandidateKind.HOST),))


@pytest.mark.parametrize(("index", "count"), [(3, 3), (0, 0), (0, 9), (8, 8)])
def test_parts_of_a_key_message_that_cannot_be_are_refused_on_both_sides(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="no part"):
        encode_message(KeyPart(1, index, count, b"a"))
    with pytest.raises(WireError, match="out of bounds"):
        decode_message(bytes((16, 0, 0, 0, 1, index, count, 0, 1)) + b"a")


@pytest.mark.parametrize("length", [0, 1101])
def test_a_part_of_a_key_message_has_a_bounded_length(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 1100 bytes"):
        encode_message(KeyPart(1, 0, 1, bytes(length)))
    with pytest.raises(WireError, match="out of bounds"):
        decode_message(bytes((16, 0, 0, 0, 1, 0, 1)) + length.to_bytes(2, "big") + bytes(length))
