"""Frames, tickets, loopback endpoints and files of the carrier: what is taken, what is refused and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from scope.carrier import (
    CLOCK_AHEAD,
    HEADER_BYTES,
    LOOPBACKS,
    MAX_BATCH,
    MAX_FRAME,
    MAX_SEGMENTS,
    MEMBER_PORT,
    PASSAGE_PORT,
    TICKET_LIFETIME,
    Carried,
    Carrier,
    CarrierFileError,
    CarrierReport,
    CarryingHub,
    FrameError,
    HubPart,
    HubReport,
    Member,
    MemberReport,
    Passage,
    PeerPart,
    TicketError,
    assign_loopbacks,
    decode_carrier,
    decode_frame,
    decode_report,
    encode_carrier,
    encode_frame,
    encode_report,
    is_carried,
    sign_ticket,
    verify_ticket,
)
from scope.credentials import base64url, read_base64url
from scope.model import Endpoint, GatewayOrigin, PublicKey, RelayLimits, Secret

WALL = 1_800_000_000
SEED = Secret(bytes(range(32)))
SIGNING = PublicKey(Ed25519PrivateKey.from_private_bytes(SEED.raw).public_key().public_bytes_raw())
PEER, HUB, OTHER = (PublicKey(bytes([number]) * 32) for number in (1, 2, 3))
MEMBERS: Mapping[PublicKey, PublicKey] = {PEER: SIGNING}


def ticket(
    *,
    mesh_uid: str = "mesh",
    peer: PublicKey = PEER,
    hub: PublicKey = HUB,
    expires: int = WALL + TICKET_LIFETIME,
    secret: Secret = SEED,
) -> str:
    return sign_ticket(mesh_uid=mesh_uid, peer=peer, hub=hub, expires=expires, secret=secret)


def refusal(text: str, *, wall: float = WALL, members: Mapping[PublicKey, PublicKey] = MEMBERS) -> str:
    with pytest.raises(TicketError) as refused:
        verify_ticket(text, mesh_uid="mesh", hub=HUB, signing=members, wall=wall)
    return str(refused.value)


# --- frames -------------------------------------------------------------------------------------------------


@given(st.integers(1, 65535), st.binary(min_size=1, max_size=2000))
def test_a_frame_of_one_datagram_comes_back_as_it_was(port: int, datagram: bytes) -> None:
    frame = encode_frame(port, len(datagram), datagram)
    assert decode_frame(frame) == (port, len(datagram))
    assert frame[HEADER_BYTES:] == datagram


def test_a_batch_may_be_as_long_as_udp_lets_it() -> None:
    assert decode_frame(encode_frame(26000, 1452, bytes(MAX_BATCH))) == (26000, 1452)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        bytes(HEADER_BYTES - 1),
        encode_frame(26000, 1, b""),
        encode_frame(0, 1, b"x"),
        encode_frame(26000, 0, b"x"),
        encode_frame(26000, 1, bytes(MAX_SEGMENTS + 1)),
        encode_frame(26000, 1452, bytes(MAX_BATCH + 1)),
    ],
    ids=["empty", "short", "no batch", "port 0", "segment 0", "too many", "too long"],
)
def test_what_is_no_frame_is_refused(message: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(message)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_an_error_and_never_many_datagrams(message: bytes) -> None:
    try:
        port, segment = decode_frame(message)
    except FrameError:
        return
    assert port and len(message) <= MAX_FRAME
    assert -(-(len(message) - HEADER_BYTES) // segment) <= MAX_SEGMENTS


# --- tickets ------------------------------------------------------------------------------------------------


def test_a_members_ticket_opens_the_hub_it_is_for() -> None:
    believed = verify_ticket(ticket(), mesh_uid="mesh", hub=HUB, signing=MEMBERS, wall=WALL)
    assert (believed.peer, believed.expires) == (PEER, WALL + TICKET_LIFETIME)


@pytest.mark.parametrize(
    "text",
    [
        ticket(mesh_uid="another"),
        ticket(hub=OTHER),
        ticket(secret=Secret(bytes(32))),
    ],
    ids=["mesh", "hub", "key"],
)
def test_a_ticket_signed_for_something_else_opens_nothing(text: str) -> None:
    assert "not signed" in refusal(text)


def test_a_stranger_is_told_that_it_is_none_of_us() -> None:
    assert "not a member" in refusal(ticket(peer=OTHER))


def test_a_members_signature_does_not_vouch_for_another_member() -> None:
    assert "not signed" in refusal(ticket(peer=OTHER), members={PEER: SIGNING, OTHER: OTHER})


def test_a_ticket_ends() -> None:
    assert refusal(ticket(expires=WALL)) == "expired"


def test_a_clock_may_be_a_day_ahead_and_no_more() -> None:
    latest = WALL + TICKET_LIFETIME + CLOCK_AHEAD
    text = ticket(expires=latest)
    assert verify_ticket(text, mesh_uid="mesh", hub=HUB, signing=MEMBERS, wall=WALL).expires == latest
    assert "clock" in refusal(ticket(expires=latest + 1))


@given(st.integers(0, 103), st.integers(1, 255))
def test_a_ticket_with_one_byte_changed_opens_nothing(at: int, change: int) -> None:
    raw = bytearray(read_base64url(ticket()))
    raw[at] ^= change
    refusal(base64url(bytes(raw)))


@pytest.mark.parametrize("text", ["", "!", "AAAA", "ä" * 200, "A" * 10_000, ticket() + "A", ticket()[:-1]])
def test_what_is_no_ticket_is_refused(text: str) -> None:
    assert refusal(text) == "not a ticket"


# --- loopback endpoints -------------------------------------------------------------------------------------


def test_every_name_has_an_endpoint_of_its_own_wherever_the_hashes_lead() -> None:
    names = [number.to_bytes(4, "big") for number in range(3000)]  # about 70 pairs of them collide
    given_ = assign_loopbacks(names, port=MEMBER_PORT, held={})
    assert len(set(given_.values())) == len(names)
    assert all(is_carried(endpoint) and endpoint.port == MEMBER_PORT for endpoint in given_.values())


def test_the_same_names_have_the_same_endpoints_in_any_order() -> None:
    names = [bytes([number]) for number in range(200)]
    first = assign_loopbacks(names, port=MEMBER_PORT, held={})
    assert assign_loopbacks(reversed(names), port=MEMBER_PORT, held={}) == first


def test_whoever_has_an_endpoint_keeps_it_when_others_come_and_go() -> None:
    names = [number.to_bytes(4, "big") for number in range(3000)]
    before = assign_loopbacks(names[1000:], port=MEMBER_PORT, held={})
    after = assign_loopbacks(names[:2000], port=MEMBER_PORT, held=before)
    assert all(after[name] == before[name] for name in names[1000:2000])
    assert len(set(after.values())) == 2000


def test_more_than_there_are_addresses_is_refused_before_it_is_searched() -> None:
    names = (number.to_bytes(4, "big") for number in range(LOOPBACKS.num_addresses))
    with pytest.raises(ValueError, match="more than"):
        assign_loopbacks(names, port=MEMBER_PORT, held={})


@pytest.mark.parametrize("text", ["127.0.0.1:5", "127.84.0.1:5", "10.83.0.1:5", "[::1]:5"])
def test_only_our_part_of_loopback_is_carried(text: str) -> None:
    assert not is_carried(Endpoint.parse(text))


# --- the file -----------------------------------------------------------------------------------------------

PASSAGES = (
    Passage(Endpoint.parse(f"127.83.1.1:{PASSAGE_PORT}"), 51820),
    Passage(Endpoint.parse(f"127.83.1.2:{PASSAGE_PORT}"), 26007),
)
WAY = CarryingHub(
    HUB,
    (Endpoint.parse("192.0.2.1:443"), Endpoint.parse("[2001:db8::1]:443")),
    b"\x07" * 32,
    ticket(),
    PASSAGES,
)
PEER_PART = PeerPart(51820, (WAY,))
HUB_PART = HubPart(
    mesh_uid="mesh",
    hub=HUB,
    port=443,
    certificate="-----BEGIN CERTIFICATE-----",
    key=Secret(b"-----BEGIN PRIVATE KEY-----"),
    wireguard_port=51820,
    first_port=26000,
    last_port=26255,
    limits=RelayLimits(pair=1000, total=0),
    members=(Member(PEER, SIGNING, Endpoint.parse(f"127.83.9.9:{MEMBER_PORT}")),),
    upstream=GatewayOrigin("https://registry.example:8443", b"\x08" * 32),
)


@pytest.mark.parametrize(
    "carrier",
    [
        Carrier(),
        Carrier(peer=PEER_PART),
        Carrier(hub=HUB_PART),
        Carrier(peer=PEER_PART, hub=HUB_PART),
        Carrier(hub=replace(HUB_PART, upstream=None)),
    ],
    ids=["nothing", "peer", "hub", "both", "no gateway"],
)
def test_a_file_is_read_as_it_was_written(carrier: Carrier) -> None:
    assert decode_carrier(encode_carrier(carrier)) == carrier


def changed(*path: str | int, to: object) -> str:
    document = json.loads(encode_carrier(Carrier(peer=PEER_PART, hub=HUB_PART)))
    here = document
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = to
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not a carrier's file"),
        ("[]", "not a carrier's file"),
        ("{}", "not a carrier's file"),
        (changed("version", to=2), "version 2"),
        (changed("peer", to=3), "not a carrier's file"),
        (changed("peer", "hubs", 0, "pin", to="00"), "32 bytes"),
        (changed("peer", "hubs", 0, "hub", to="short"), "not a carrier's file"),
        (changed("peer", "hubs", 0, "ticket", to=5), "text is expected"),
        (changed("peer", "hubs", 0, "passages", 0, "port", to=0), "1 to 65535"),
        (changed("peer", "hubs", 0, "passages", 0, "endpoint", to="10.0.0.1:80"), "outside of"),
        (changed("hub", "members", 0, "endpoint", to="127.0.0.1:80"), "outside of"),
        (changed("hub", "port", to=65536), "1 to 65535"),
        (changed("hub", "upstream", "pin", to="xy"), "not a carrier's file"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(CarrierFileError, match=reason):
        decode_carrier(text)


def test_neither_keys_nor_tickets_have_a_printed_form() -> None:
    printed = repr(Carrier(peer=PEER_PART, hub=HUB_PART))
    assert "PRIVATE" not in printed
    assert WAY.ticket not in printed


def test_a_hub_carries_to_its_wireguard_and_its_relays_and_nowhere_else() -> None:
    reached = [port for port in range(1, 65536) if HUB_PART.carries_to(port)]
    assert reached == [*range(26000, 26256), 51820]


# --- what it tells ------------------------------------------------------------------------------------------


def test_a_report_is_read_as_it_was_written() -> None:
    counted = Carried(1, 2, 3, 4, 5)
    report = CarrierReport(
        hubs=(
            HubReport(HUB, Endpoint.parse("192.0.2.1:443"), "", counted),
            HubReport(OTHER, None, "connection refused", Carried()),
        ),
        members=(MemberReport(PEER, True, counted),),
        listening=False,
        reason="port 443 is taken",
        refused=7,
        file="ab" * 32,
    )
    assert decode_report(encode_report(report)) == report
