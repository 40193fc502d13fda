"""By which hubs a peer is carried, and when."""

from __future__ import annotations

from scope_agent.carrier.boarding import (
    CONNECTS_WITHIN,
    HUBS,
    LET_GO,
    MAX_HUBS,
    PATIENCE,
    Boarding,
    ListeningHub,
    Surroundings,
)

from scope.model import Endpoint, PublicKey

OWN = PublicKey(bytes([255]) * 32)
KEYS = [PublicKey(bytes([number]) * 32) for number in range(1, 13)]


def _listening(count: int) -> dict[PublicKey, ListeningHub]:
    return {
        key: ListeningHub((Endpoint.parse(f"192.0.2.{number}:443"),), bytes(32), 51820)
        for number, key in enumerate(KEYS[:count], start=1)
    }


def _boarding(count: int = 4) -> Boarding:
    boarding = Boarding(own=OWN, is_carried=False)
    boarding.set_hubs(_listening(count), members=set(KEYS))
    return boarding


def _around(
    silent_since: float | None = 0.0,
    *,
    is_used: bool = False,
    distances: dict[PublicKey, float] | None = None,
    wanted: frozenset[PublicKey] = frozenset(),
) -> Surroundings:
    return Surroundings(silent_since, is_used=is_used, distances=distances or {}, wanted=wanted)


def test_silence_is_borne_for_some_seconds_and_looked_at_again_in_time() -> None:
    boarding = _boarding()
    boarding.observe(_around(), PATIENCE - 0.1)
    assert boarding.chosen == () and boarding.get_timer() == PATIENCE
    boarding.observe(_around(), PATIENCE)
    assert len(boarding.chosen) == HUBS


def test_nobody_is_asked_for_while_somebody_answers_or_no_hub_listens() -> None:
    boarding = _boarding()
    boarding.observe(_around(None), 1000.0)
    assert boarding.chosen == () and boarding.get_timer() is None
    alone = _boarding(0)
    alone.observe(_around(), 1000.0)
    assert alone.chosen == () and alone.get_timer() is None


def test_the_nearest_hubs_are_first_and_unknown_ones_are_drawn_otherwise_by_each_peer() -> None:
    boarding = _boarding(12)
    boarding.observe(_around(distances={KEYS[7]: 0.02, KEYS[3]: 0.01}), PATIENCE)
    assert boarding.chosen == (KEYS[3], KEYS[7])
    drawn = set()
    for number in range(20):
        other = Boarding(own=PublicKey(bytes([100 + number]) * 32), is_carried=False)
        other.set_hubs(_listening(12), members=set(KEYS))
        other.observe(_around(), PATIENCE)
        drawn |= set(other.chosen)
    assert len(drawn) > 6


def test_a_hub_that_cannot_be_reached_has_another_one_tried_and_keeps_none_that_works() -> None:
    boarding = _boarding()
    boarding.observe(_around(), PATIENCE)
    good, bad = boarding.chosen
    boarding.connected({good}, PATIENCE)
    at = PATIENCE + CONNECTS_WITHIN
    boarding.observe(_around(), at)
    assert boarding.chosen[0] == good and bad in boarding.chosen and len(boarding.chosen) == 3
    third = boarding.chosen[1]
    boarding.connected({good, third}, at)
    boarding.observe(_around(distances={good: 0.01, third: 0.02}), at + 60.0)
    assert set(boarding.chosen) >= {good, third}


def test_hubs_that_relay_to_us_are_kept_besides_and_never_too_many() -> None:
    boarding = _boarding(12)
    wanted = frozenset(KEYS)
    boarding.observe(_around(wanted=wanted), PATIENCE)
    assert len(boarding.chosen) == MAX_HUBS
    boarding.observe(_around(wanted=frozenset({KEYS[0]})), PATIENCE)
    assert KEYS[0] in boarding.chosen and len(boarding.chosen) <= HUBS + 1


def test_a_hub_whose_agent_starts_anew_and_says_nothing_yet_goes_on_carrying() -> None:
    boarding = _boarding(2)
    boarding.observe(_around(), PATIENCE)
    boarding.connected(set(KEYS[:2]), PATIENCE)
    boarding.set_hubs({}, members=set(KEYS))
    boarding.observe(_around(), PATIENCE)
    assert set(boarding.chosen) == set(KEYS[:2])
    boarding.connected({KEYS[0]}, PATIENCE)
    boarding.observe(_around(), PATIENCE)
    assert boarding.chosen == (KEYS[0],), "one that neither listens nor carries is kept"
    boarding.set_hubs({}, members={KEYS[1]})
    boarding.observe(_around(), PATIENCE)
    assert not boarding.chosen, "who is no member carries nobody"


def test_the_carrier_is_let_go_a_minute_after_udp_answers_unless_it_is_still_used() -> None:
    boarding = _boarding()
    boarding.observe(_around(), PATIENCE)
    boarding.observe(_around(None, is_used=True), 10.0)
    boarding.observe(_around(None, is_used=True), 10.0 + LET_GO + 1.0)
    assert boarding.chosen
    boarding.observe(_around(None), 10.0 + LET_GO + 2.0)
    assert boarding.chosen == ()


def test_udp_that_falls_silent_again_meanwhile_begins_the_minute_anew() -> None:
    boarding = _boarding()
    boarding.observe(_around(), PATIENCE)
    boarding.connected(set(boarding.chosen), PATIENCE)
    boarding.observe(_around(None), 10.0)
    assert boarding.get_timer() == 10.0 + LET_GO
    boarding.observe(_around(20.0), 20.0 + PATIENCE)
    boarding.observe(_around(None), 30.0)
    boarding.observe(_around(None), 10.0 + LET_GO + 1.0)
    assert boarding.chosen
    boarding.observe(_around(None), 30.0 + LET_GO)
    assert boarding.chosen == ()


def test_an_agent_that_starts_while_it_is_carried_goes_on_so() -> None:
    boarding = Boarding(own=OWN, is_carried=True)
    boarding.set_hubs(_listening(2), members=set(KEYS))
    boarding.observe(_around(0.0), 0.1)
    assert len(boarding.chosen) == HUBS
