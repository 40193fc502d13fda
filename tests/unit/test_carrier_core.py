"""What this machine's carrier is to do: one application at a time, the same endpoints always."""

from __future__ import annotations

from dataclasses import replace

from scope_agent.carrier.boarding import PATIENCE, ListeningHub, Surroundings
from scope_agent.carrier.core import APPLY_AGAIN, Carriage, CarrierSeen
from scope_agent.state import make_identity

from scope.carrier import (
    TICKET_LIFETIME,
    TICKET_RENEWAL,
    Carried,
    Carrier,
    CarrierReport,
    HubReport,
    is_carried,
    verify_ticket,
)
from scope.model import Endpoint, GatewayOrigin, Hubs, PublicKey

IDENTITY = make_identity(lambda count: bytes(range(1, count + 1)))
OWN = IDENTITY.public.wireguard
HUB, OTHER = PublicKey(bytes([1]) * 32), PublicKey(bytes([2]) * 32)
PIN = bytes(range(32))
WALL = 1_800_000_000.0
MEMBERS = {HUB: PublicKey(bytes([3]) * 32), OTHER: PublicKey(bytes([4]) * 32)}
LISTENING = {HUB: ListeningHub((Endpoint.parse("192.0.2.1:443"),), PIN, 51820)}
USUAL = Hubs()
SILENT = Surroundings(0.0, is_used=False, distances={}, wanted=frozenset())


def _carriage(earlier: Carrier | None = None, *, upstream: GatewayOrigin | None = None) -> Carriage:
    return Carriage(own=OWN, signing=IDENTITY.signing, upstream=upstream, earlier=earlier, now=0.0, wall=WALL)


def _configure(
    carriage: Carriage,
    *,
    is_hub: bool = False,
    hubs: Hubs = USUAL,
    listen_port: int = 20001,
    gateway: GatewayOrigin | None = None,
) -> None:
    carriage.configure(
        mesh_uid="uid-1",
        hubs=hubs,
        is_hub=is_hub,
        listen_port=listen_port,
        members=MEMBERS,
        listening={} if is_hub else LISTENING,
        gateway=gateway,
    )


def _asked(carriage: Carriage, now: float) -> Carrier:
    apply = carriage.take_apply(now)
    assert apply is not None and apply.carrier is not None
    return apply.carrier


def _report(*, connected: bool = True, listening: bool = False, reason: str = "") -> CarrierReport:
    address = Endpoint.parse("192.0.2.1:443") if connected else None
    hubs = (HubReport(HUB, address, "" if connected else "no answer", Carried()),)
    return CarrierReport(hubs, (), listening=listening, reason=reason, refused=0, file="")


def _answer(carriage: Carriage, now: float, *, is_in_effect: bool = True, **said: object) -> None:
    report = _report(**said)  # type: ignore[arg-type]
    carriage.seen(CarrierSeen(report, pin=PIN, answers=True, is_in_effect=is_in_effect), now)


def _carried() -> tuple[Carriage, Carrier]:
    carriage = _carriage()
    _configure(carriage)
    assert carriage.observe(SILENT, PATIENCE)
    return carriage, _asked(carriage, PATIENCE)


def test_a_passage_is_told_of_once_the_carrier_has_it() -> None:
    carriage, carrier = _carried()
    assert carrier.peer is not None and carrier.hub is None
    (hub,) = carrier.peer.hubs
    (passage,) = hub.passages
    assert (hub.hub, passage.port, hub.pin) == (HUB, 51820, PIN) and is_carried(passage.endpoint)
    assert carriage.passages() == {} and carriage.take_apply(PATIENCE) is None
    _answer(carriage, PATIENCE)
    assert carriage.passages() == {(HUB, 51820): passage.endpoint}
    assert carriage.ways_to_hubs() == {HUB: passage.endpoint}
    assert carriage.take_connected() == [HUB] and carriage.take_connected() == []


def test_a_port_that_is_granted_gets_a_passage_of_its_own_and_the_others_stay() -> None:
    carriage, _ = _carried()
    _answer(carriage, PATIENCE)
    before = carriage.passages()
    carriage.set_granted({HUB: {26000}, OTHER: {26001}})
    _asked(carriage, 5.0)
    _answer(carriage, 5.0)
    after = carriage.passages()
    assert after.keys() == {(HUB, 51820), (HUB, 26000)} and after.items() > before.items()
    assert len(set(after.values())) == 2


def test_a_ticket_is_for_that_hub_and_renewed_every_hour() -> None:
    carriage, carrier = _carried()
    _answer(carriage, PATIENCE)
    assert carrier.peer is not None
    ticket = carrier.peer.hubs[0].ticket
    signing = {OWN: IDENTITY.public.signing}
    found = verify_ticket(ticket, mesh_uid="uid-1", hub=HUB, signing=signing, wall=WALL)
    assert found.peer == OWN and found.expires == round(WALL + PATIENCE) + TICKET_LIFETIME
    assert carriage.take_apply(PATIENCE + TICKET_RENEWAL - 1.0) is None
    carriage.observe(SILENT, PATIENCE)
    due = carriage.get_timer()
    assert due == PATIENCE + TICKET_RENEWAL
    renewed = _asked(carriage, due)
    assert renewed.peer is not None and renewed.peer.hubs[0].ticket != ticket
    assert renewed.peer.hubs[0].passages == carrier.peer.hubs[0].passages


def test_what_did_not_take_effect_is_asked_for_again() -> None:
    carriage, carrier = _carried()
    _answer(carriage, PATIENCE, is_in_effect=False)
    assert carriage.passages() == {} and carriage.take_apply(PATIENCE) is None
    assert carriage.get_timer() == PATIENCE + APPLY_AGAIN
    assert _asked(carriage, PATIENCE + APPLY_AGAIN) == carrier


def test_the_next_run_of_the_agent_goes_on_with_the_same_endpoints() -> None:
    first, carrier = _carried()
    _answer(first, PATIENCE)
    again = _carriage(earlier=carrier)
    _configure(again)
    assert again.passages() == first.passages() and again.ways_to_hubs() == first.ways_to_hubs()
    again.observe(Surroundings(0.0, is_used=True, distances={}, wanted=frozenset()), 0.1)
    assert again.is_carried
    wanted = again.take_apply(0.1)
    assert wanted is None or wanted.carrier is not None
    if wanted is not None and wanted.carrier is not None and wanted.carrier.peer is not None:
        assert carrier.peer is not None
        assert wanted.carrier.peer.hubs[0].passages == carrier.peer.hubs[0].passages


def test_a_hub_has_each_member_at_an_endpoint_of_its_own_also_after_others_joined() -> None:
    carriage = _carriage()
    _configure(carriage, is_hub=True)
    part = _asked(carriage, 0.0).hub
    assert part is not None and part.port == 443
    endpoints = {member.peer: member.endpoint for member in part.members}
    assert endpoints.keys() == MEMBERS.keys() and len(set(endpoints.values())) == 2
    assert all(map(is_carried, endpoints.values()))
    _answer(carriage, 0.0, listening=True)
    assert carriage.members() == endpoints
    report = carriage.report()
    assert report is not None and (report.port, report.pin, report.reason) == (443, PIN, "")


def test_a_hub_leads_to_the_gateway_that_it_joined_by_or_else_to_the_one_that_its_mesh_names() -> None:
    own, named, moved = [GatewayOrigin(f"https://{host}:7443", PIN) for host in ("own", "named", "moved")]
    for upstream, led in ((own, [own, own]), (None, [named, moved])):
        carriage = _carriage(upstream=upstream)
        found = []
        for gateway in (named, moved):
            _configure(carriage, is_hub=True, gateway=gateway)
            apply = carriage.take_apply(0.0)
            if apply is not None:
                assert apply.carrier is not None
                asked = apply.carrier
                _answer(carriage, 0.0, listening=True)
            assert asked.hub is not None
            found.append(asked.hub.upstream)
        assert found == led


def test_endpoints_lie_beside_the_ports_at_which_hubs_relay() -> None:
    for first in range(26000, 29000, 100):
        carriage = _carriage()
        hubs = replace(Hubs(), ports=(first, first + 600))
        _configure(carriage, is_hub=True, hubs=hubs, listen_port=20000 + first % 1024)
        part = _asked(carriage, 0.0).hub
        assert part is not None
        assert not any(first <= member.endpoint.port <= first + 600 for member in part.members)


def test_a_hub_says_why_it_does_not_listen() -> None:
    carriage = _carriage()
    _configure(carriage, is_hub=True)
    assert carriage.report() is None
    _asked(carriage, 0.0)
    _answer(carriage, 0.0, reason="TCP port 443: Address already in use")
    report = carriage.report()
    assert report is not None and report.reason == "TCP port 443: Address already in use"
    assert "Address already in use" in carriage.trouble({})
    carriage.seen(CarrierSeen(None, "scope-carrier does not answer"), 1.0)
    report = carriage.report()
    assert report is not None and report.reason == "scope-carrier does not answer"


def test_who_is_no_hub_any_more_and_has_udp_runs_no_carrier() -> None:
    carriage = _carriage()
    _configure(carriage, is_hub=True)
    _asked(carriage, 0.0)
    _answer(carriage, 0.0, listening=True)
    _configure(carriage, is_hub=True, hubs=replace(Hubs(), carrier_port=0))
    apply = carriage.take_apply(1.0)
    assert apply is not None and apply.carrier is None
    carriage.seen(CarrierSeen(None, answers=True, is_in_effect=True), 1.0)
    assert carriage.members() == {} and carriage.report() is None and carriage.trouble({}) == ""


def test_a_hub_that_does_not_carry_us_is_named_with_its_reason() -> None:
    carriage, _ = _carried()
    _answer(carriage, PATIENCE, connected=False)
    assert carriage.trouble({HUB: "home.berlin"}) == "home.berlin does not carry us: no answer"
