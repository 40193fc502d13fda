"""Which hubs are asked for which pair and when, what is kept of their answers, and where we knock."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

import pytest
from scope_agent.relay.asking import (
    ASK_BURST,
    ASKS_PER_SECOND,
    MAX_GRANTS,
    Ask,
    Asking,
    AskingOutput,
    HeldGrant,
    Hub,
    Knock,
    Knocked,
    Offered,
    Standing,
)

from scope.model import Endpoint, Family, IPAddress, PathKind, PublicKey
from scope.relay import knock
from scope.wire import Granted, Refused, RefusedBecause

PEER, OTHER = PublicKey(bytes([1] * 32)), PublicKey(bytes([2] * 32))
HUBS = tuple(PublicKey(bytes([number] * 32)) for number in range(10, 16))
ADDRESSES = tuple(IPv4Address(f"198.51.100.{number}") for number in range(10, 16))
TOKEN = bytes(range(8))
DAY = 86400
ALL = frozenset(Family)


class _Loop:
    """Drives the asking of one agent; its path to hub n takes n + 1 hundredths of a second."""

    def __init__(self, *, hubs: int = 2, peers: tuple[PublicKey, ...] = (PEER,)) -> None:
        self.now = 0.0
        self.log: list[tuple[float, AskingOutput]] = []
        self.asking = Asking(random=lambda: 0.5)
        self.hubs = {key: Hub(f"hub{number}", (ADDRESSES[number],)) for number, key in enumerate(HUBS[:hubs])}
        self.peers = (*peers, *HUBS[:hubs])
        self.asking.set_families(ALL, 0.0)
        self.asking.set_members(self.peers, self.hubs, 0.0)
        for number in range(hubs):
            self.reach(number)
        for peer in peers:
            self.stand(PathKind.NONE, peer)

    def take(self) -> None:
        self.log += [(round(self.now, 3), out) for out in self.asking.outputs()]

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.asking.get_timer()) is not None and due <= end:
            self.now = max(self.now, due)
            self.asking.handle_timer(self.now)
            self.take()
        self.now = end

    def reach(self, number: int, *, rtt: float | None = None, address: IPAddress | None = None) -> None:
        endpoint = Endpoint(address or ADDRESSES[number], 20000)
        standing = Standing(
            PathKind.DIRECT, since=self.now - 1000.0, endpoint=endpoint, rtt=rtt or 0.01 * (number + 1)
        )
        self.asking.observe(HUBS[number], standing, self.now)
        self.take()

    def stand(
        self, path: PathKind, peer: PublicKey = PEER, *, doubt: bool = False, here: bool = True
    ) -> None:
        standing = Standing(path, since=self.now, is_in_doubt=doubt, is_expected=here)
        self.asking.observe(peer, standing, self.now)
        self.take()

    def grant(self, number: int, peer: PublicKey = PEER, *, lifetime: int = DAY, port: int = 26000) -> None:
        granted = Granted(peer, bytes([number]) * 8, port, lifetime, user_space=False)
        self.asking.granted(HUBS[number], granted, self.now)
        self.take()

    def refuse(self, number: int, reason: RefusedBecause) -> None:
        self.asking.refused(HUBS[number], Refused(PEER, reason), self.now)
        self.take()

    def asked(self, number: int | None = None, peer: PublicKey = PEER) -> list[float]:
        return [
            at
            for at, out in self.log
            if isinstance(out, Ask) and out.peer == peer and (number is None or out.hub == HUBS[number])
        ]

    def knocks(self) -> list[tuple[float, Endpoint]]:
        return [(at, out.endpoint) for at, out in self.log if isinstance(out, Knock)]

    def offered(self, peer: PublicKey = PEER) -> dict[Endpoint, tuple[str, bool]]:
        found = [out.relays for _, out in self.log if isinstance(out, Offered) and out.peer == peer]
        return dict(found[-1]) if found else {}


def _at(number: int, port: int = 26000) -> Endpoint:
    return Endpoint(ADDRESSES[number], port)


# --- asking ------------------------------------------------------------------------------------------------


def test_the_two_nearest_hubs_are_asked_at_once_for_a_pair_without_a_path() -> None:
    loop = _Loop(hubs=4)
    assert loop.asked(0) == loop.asked(1) == [0.0]
    assert not loop.asked(2) and not loop.asked(3)


def test_a_hub_is_never_asked_to_relay_to_itself() -> None:
    loop = _Loop(hubs=3)
    loop.stand(PathKind.NONE, HUBS[0])
    loop.run(100.0)
    assert not loop.asked(0, HUBS[0])
    assert loop.asked(1, HUBS[0]) and loop.asked(2, HUBS[0])


def test_a_hub_that_we_do_not_reach_is_not_asked_until_we_do() -> None:
    loop = _Loop(hubs=0)
    loop.asking.set_members((PEER, HUBS[0]), {HUBS[0]: Hub("hub0", (ADDRESSES[0],))}, 0.0)
    loop.stand(PathKind.NONE)
    loop.run(50.0)
    assert not loop.asked()
    loop.reach(0)
    assert loop.asked() == [50.0]


def test_a_pair_with_a_direct_path_asks_nobody() -> None:
    loop = _Loop(peers=())
    loop.asking.set_members((PEER, *HUBS[:2]), loop.hubs, 0.0)
    loop.stand(PathKind.DIRECT)
    loop.run(100.0)
    assert not loop.asked()


def test_a_hub_that_does_not_answer_is_asked_ever_more_rarely_and_another_in_its_place() -> None:
    loop = _Loop(hubs=3)
    loop.grant(1)
    loop.stand(PathKind.RELAYED)
    loop.run(200.0)
    gaps = [round(b - a, 3) for a, b in pairwise(loop.asked(0))]
    assert gaps[:5] == [0.3, 0.6, 1.2, 2.4, 4.8]
    assert max(gaps) == 60.0
    assert loop.asked(2)[0] == 0.9  # when the second question had gone unanswered too
    assert loop.asked(1) == [0.0]


@pytest.mark.parametrize(
    ("reason", "again"),
    [
        (RefusedBecause.NO_HUB, 1.0),
        (RefusedBecause.UNKNOWN_PEER, 1.0),
        (RefusedBecause.NO_PORT_LEFT, 30.0),
        (RefusedBecause.NO_FORWARDING, 1.0),
    ],
)
def test_a_hub_that_refuses_is_asked_later_and_another_at_once(reason: RefusedBecause, again: float) -> None:
    loop = _Loop(hubs=3)
    loop.grant(1)
    loop.refuse(0, reason)
    assert loop.asked(2) == [0.0]
    loop.grant(2)
    loop.run(again - 0.1)
    assert loop.asked(0) == [0.0]
    loop.refuse(2, RefusedBecause.NO_PORT_LEFT)  # so the first one is wanted again
    loop.run(0.2)
    assert loop.asked(0) == [0.0, again]


def test_a_hub_that_goes_on_refusing_is_asked_every_ten_minutes_at_the_least() -> None:
    loop = _Loop(hubs=1)
    for _ in range(10):
        loop.refuse(0, RefusedBecause.NO_PORT_LEFT)
        before = len(loop.asked(0))
        loop.run(601.0)
        assert len(loop.asked(0)) > before


def test_a_grant_is_renewed_about_once_an_hour_while_it_is_in_use() -> None:
    loop = _Loop()
    loop.grant(0)
    loop.grant(1)
    loop.stand(PathKind.RELAYED)
    loop.run(3600.0)
    assert loop.asked(0) == [0.0, 3600.0]
    loop.grant(0)
    loop.run(3600.0)
    assert loop.asked(0) == [0.0, 3600.0, 7200.0]


def test_questions_for_many_pairs_are_spread_over_time() -> None:
    peers = tuple(PublicKey(number.to_bytes(32, "big")) for number in range(1, 301))
    loop = _Loop(hubs=1, peers=peers)
    assert sum(isinstance(out, Ask) for _, out in loop.log) <= ASK_BURST
    loop.run(1.0)
    asked = [out.peer for _, out in loop.log if isinstance(out, Ask)]
    assert len(asked) <= ASK_BURST + ASKS_PER_SECOND + 1
    for _ in range(10):
        for peer in sorted({out.peer for _, out in loop.log if isinstance(out, Ask)}):
            loop.grant(0, peer)
        loop.run(0.5)
    assert {out.peer for _, out in loop.log if isinstance(out, Ask)} == set(peers)


def test_a_pair_that_lost_its_direct_path_asks_again_so_that_the_hub_tells_the_other_side() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.stand(PathKind.DIRECT)
    loop.run(500.0)
    assert loop.asked(0) == [0.0]
    loop.stand(PathKind.NONE)
    assert loop.asked(0) == [0.0, 500.0]


def test_a_hub_that_lost_what_it_granted_is_asked_again_while_the_pair_has_no_path() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.run(61.0)
    assert loop.asked(0)[:2] == [0.0, 60.0]


def test_a_pair_that_lost_its_relay_asks_at_once() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.stand(PathKind.RELAYED)
    loop.run(500.0)
    loop.stand(PathKind.NONE)
    assert loop.asked(0) == [0.0, 500.0]


def test_a_much_nearer_hub_takes_the_place_of_the_farther_one_and_a_slightly_nearer_one_does_not() -> None:
    loop = _Loop(hubs=3)
    loop.grant(0)
    loop.grant(1)
    loop.stand(PathKind.RELAYED)
    loop.reach(2, rtt=0.018)  # hub 1 takes 0.02
    loop.run(100.0)
    assert not loop.asked(2)
    loop.reach(2, rtt=0.002)
    loop.run(100.0)
    assert loop.asked(2)


def test_hubs_that_refused_or_were_replaced_are_waited_for_without_haste() -> None:
    loop = _Loop(hubs=3)
    loop.refuse(0, RefusedBecause.NO_PORT_LEFT)
    loop.grant(1)
    loop.grant(2)
    for path in (PathKind.RELAYED, PathKind.DIRECT, PathKind.NONE, PathKind.RELAYED):
        loop.stand(path)
    loop.run(10.0)
    loop.grant(0)
    loop.run(8000.0)  # the farthest one's hour is over, too
    assert len(loop.asked()) < 300


# --- grants ------------------------------------------------------------------------------------------------


def test_a_grant_is_offered_as_a_way_to_the_peer_and_knocked_at() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0, port=26007)
    assert loop.offered() == {_at(0, 26007): ("hub0", False)}
    assert (0.0, Knock(_at(0, 26007), knock(bytes(8)))) in loop.log
    assert (0.0, Knocked(PEER)) in loop.log


def test_what_is_no_hub_grants_nothing() -> None:
    loop = _Loop(hubs=1)
    loop.asking.granted(OTHER, Granted(PEER, TOKEN, 26000, DAY, user_space=False), 0.0)
    loop.asking.granted(HUBS[0], Granted(OTHER, TOKEN, 26000, DAY, user_space=False), 0.0)
    loop.asking.granted(HUBS[0], Granted(HUBS[0], TOKEN, 26000, DAY, user_space=False), 0.0)
    loop.take()
    assert not loop.asking.held() and not loop.offered() and not loop.knocks()


def test_an_unasked_grant_is_knocked_at_at_once_and_for_a_while_though_the_path_is_direct() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.stand(PathKind.DIRECT)
    loop.run(100.0)
    before = len(loop.knocks())
    loop.grant(0)
    assert loop.knocks()[before:] == [(100.0, _at(0))]
    loop.run(200.0)
    assert len(loop.knocks()) <= before + 3


def test_a_grant_that_expires_is_dropped() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0, lifetime=100)
    loop.stand(PathKind.DIRECT)
    loop.run(101.0)
    assert loop.offered() == {} and not loop.asking.held()


def test_grants_of_hubs_and_peers_that_are_none_any_more_are_dropped() -> None:
    loop = _Loop(hubs=2, peers=(PEER, OTHER))
    for peer in (PEER, OTHER):
        loop.grant(0, peer)
        loop.grant(1, peer)
    loop.asking.set_members((PEER, *HUBS[:2]), {HUBS[1]: loop.hubs[HUBS[1]]}, 1.0)
    loop.take()
    assert [(grant.hub, grant.peer) for grant in loop.asking.held()] == [(HUBS[1], PEER)]
    assert loop.offered() == {_at(1): ("hub1", False)}


def test_a_hub_that_says_unasked_that_it_is_none_is_left() -> None:
    loop = _Loop(hubs=2)
    loop.grant(0)
    loop.grant(1)
    loop.refuse(0, RefusedBecause.NO_HUB)
    assert loop.offered() == {_at(1): ("hub1", False)}


def test_a_pair_holds_four_grants_at_most_and_those_of_its_own_hubs_before_others() -> None:
    loop = _Loop(hubs=6)
    for number in reversed(range(6)):
        loop.grant(number)
    held = [grant.hub for grant in loop.asking.held()]
    assert len(held) == MAX_GRANTS
    assert {HUBS[0], HUBS[1]} <= set(held)


def test_grants_come_back_from_the_disk_and_are_knocked_at_and_asked_for_again() -> None:
    grant = HeldGrant(HUBS[0], PEER, TOKEN, 26003, float(DAY), user_space=True)
    asking = Asking(random=lambda: 0.5)
    asking.restore([grant, replace(grant, peer=OTHER)])
    assert set(asking.held()) == {grant, replace(grant, peer=OTHER)}
    asking.set_members((), {}, 0.0)  # the mesh is not known yet
    assert set(asking.held()) == {grant, replace(grant, peer=OTHER)}
    asking.set_members((PEER, HUBS[0]), {HUBS[0]: Hub("hub0", (ADDRESSES[0],))}, 0.0)
    asking.set_families(ALL, 0.0)
    assert asking.held() == (grant,)
    asking.observe(PEER, Standing(PathKind.NONE, since=0.0), 0.0)
    outputs = asking.outputs()
    assert Knock(_at(0, 26003), knock(TOKEN)) in outputs
    assert Offered(PEER, {_at(0, 26003): ("hub0", True)}) in outputs
    way = Standing(PathKind.DIRECT, since=0.0, endpoint=Endpoint(ADDRESSES[0], 20000), rtt=0.01)
    asking.observe(HUBS[0], way, 1.0)
    assert Ask(HUBS[0], PEER) in asking.outputs()


def test_the_disk_is_told_of_new_grants_and_not_of_renewals() -> None:
    loop = _Loop(hubs=1)
    assert not loop.asking.take_change()
    loop.grant(0)
    assert loop.asking.take_change() and not loop.asking.take_change()
    loop.grant(0)
    assert not loop.asking.take_change()
    loop.grant(0, port=26001)
    assert loop.asking.take_change()
    loop.refuse(0, RefusedBecause.NO_HUB)
    assert loop.asking.take_change()


# --- knocking ----------------------------------------------------------------------------------------------


def test_a_relayed_pair_knocks_at_each_grant_every_twenty_seconds() -> None:
    loop = _Loop()
    loop.grant(0)
    loop.grant(1)
    loop.stand(PathKind.RELAYED)
    loop.log.clear()
    loop.run(200.0)
    for number in range(2):
        times = [at for at, endpoint in loop.knocks() if endpoint == _at(number)]
        assert all(18.0 <= b - a <= 20.0 for a, b in pairwise(times))
        assert len(times) >= 9


def test_a_stable_direct_path_turns_grants_cold_and_a_doubt_makes_them_warm_at_once() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.stand(PathKind.DIRECT)
    loop.run(40.0)
    loop.log.clear()
    loop.run(1000.0)
    assert not loop.log
    loop.stand(PathKind.DIRECT, doubt=True)
    assert loop.knocks() == [(1040.0, _at(0))] and not loop.asked()


def test_a_doubt_about_a_relayed_path_knocks_at_once() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.stand(PathKind.RELAYED)
    loop.run(5.0)
    loop.log.clear()
    asking = loop.asking
    asking.observe(PEER, Standing(PathKind.RELAYED, since=0.0, is_in_doubt=True), loop.now)
    loop.take()
    assert loop.knocks() == [(5.0, _at(0))]


def test_a_network_change_knocks_at_once_and_in_the_families_that_are_left() -> None:
    loop = _Loop(hubs=0)
    six = IPv6Address("2001:db8::10")
    loop.asking.set_members((PEER, HUBS[0]), {HUBS[0]: Hub("hub0", (ADDRESSES[0], six))}, 0.0)
    loop.grant(0)
    loop.stand(PathKind.RELAYED)
    loop.run(5.0)
    loop.log.clear()
    loop.asking.set_families(frozenset({Family.IPV6}), loop.now)
    loop.take()
    assert loop.knocks() == [(5.0, Endpoint(six, 26000))]
    assert loop.offered() == {Endpoint(six, 26000): ("hub0", False)}


def test_a_hub_is_knocked_at_where_we_reach_it_and_else_at_four_places_at_most() -> None:
    loop = _Loop(hubs=0)
    places: tuple[IPAddress, ...] = tuple(IPv4Address(f"203.0.113.{n}") for n in range(6))
    six = IPv6Address("2001:db8::10")
    loop.asking.set_members((PEER, HUBS[0]), {HUBS[0]: Hub("hub0", (*places, six))}, 0.0)
    loop.grant(0)
    assert [at.address for _, at in loop.knocks()] == list(reversed(places[:4]))  # the likeliest one counts
    loop.log.clear()
    loop.reach(0, address=IPv4Address("10.1.2.3"))
    assert {at.address for at in loop.offered()} == {IPv4Address("10.1.2.3"), six}


def test_a_peer_that_was_declared_and_that_nobody_sees_is_not_knocked_for() -> None:
    loop = _Loop(hubs=1)
    loop.grant(0)
    loop.run(100.0)
    loop.stand(PathKind.NONE, here=False)
    loop.run(50.0)
    loop.log.clear()
    loop.run(1000.0)
    assert not loop.knocks() and not loop.asked()
    loop.grant(0)
    assert loop.knocks()


def test_nothing_of_a_token_is_printable() -> None:
    token = bytes([0xAB] * 8)
    shown = repr(HeldGrant(HUBS[0], PEER, token, 26000, 1.0, user_space=False))
    shown += repr(Knock(_at(0), knock(token)))
    assert "\\xab" not in shown and "abab" not in shown
