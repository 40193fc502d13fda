"""Our own mapping as reflectors see it: which class, how often they are asked, what is published."""

from __future__ import annotations

import itertools
from dataclasses import replace
from ipaddress import ip_address

import pytest
from scope_agent.paths.reflexive import REFRESH, ReflectorTarget, Reflexive

from scope.model import Endpoint, Mapping, PublicKey

REGISTRY = PublicKey(bytes([1] * 32))
TARGETS = tuple(
    ReflectorTarget(REGISTRY, Endpoint.parse(text)) for text in ("192.0.2.1:3478", "192.0.2.1:3479")
)
HERE = Endpoint.parse("198.51.100.7:41641")


class _Loop:
    """Drives a Reflexive whose reflectors see what `seen` says, None for silence."""

    def __init__(self, targets: tuple[ReflectorTarget, ...] = TARGETS) -> None:
        self.now = 0.0
        self.seen: dict[ReflectorTarget, Endpoint | None] = dict.fromkeys(targets, HERE)
        self.asked: list[float] = []
        self.machine = Reflexive()
        self._numbers = itertools.count(1)
        self.machine.set_targets(targets, 0.0)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.machine.get_timer()) is not None and due <= end:
            self.now = max(due, self.now)
            for question in self.machine.handle_timer(self.now, lambda: next(self._numbers)):
                self.asked.append(self.now)
                seen = self.seen[question.target]
                if seen is not None:
                    self.machine.answer(
                        question.target.probe_key, question.transaction, seen, self.now + 0.02
                    )
        self.now = end

    def mapping(self, *own: str) -> Mapping:
        return self.machine.mapping(frozenset(map(ip_address, own)), self.now)


def test_two_views_that_agree_are_an_endpoint_independent_mapping() -> None:
    loop = _Loop()
    loop.run(1.0)
    assert loop.mapping("10.0.0.5") is Mapping.ENDPOINT_INDEPENDENT


def test_two_views_that_differ_are_a_dependent_mapping_which_publishes_one_port() -> None:
    loop = _Loop()
    loop.seen[TARGETS[1]] = Endpoint.parse("198.51.100.7:50000")
    loop.run(1.0)
    assert loop.mapping("10.0.0.5") is Mapping.ENDPOINT_DEPENDENT
    first = loop.machine.published(loop.now)
    assert len(first) == 1
    loop.seen = {target: Endpoint.parse(f"198.51.100.7:{50001 + n}") for n, target in enumerate(TARGETS)}
    loop.run(100.0)
    assert loop.machine.published(loop.now) == first  # the address is what counts


def test_a_port_that_a_nat_moved_for_a_peer_that_came_first_does_not_make_the_mapping_dependent() -> None:
    registry = tuple(replace(target, only_answers=True) for target in TARGETS)
    peer = ReflectorTarget(PublicKey(bytes([2] * 32)), Endpoint.parse("203.0.113.9:41641"))
    loop = _Loop((*registry, peer))
    loop.seen[peer] = Endpoint.parse("198.51.100.7:50000")
    loop.run(1.0)
    assert loop.mapping("10.0.0.5") is Mapping.ENDPOINT_INDEPENDENT


def test_one_view_is_an_unknown_mapping_and_an_own_address_is_none() -> None:
    loop = _Loop(TARGETS[:1])
    loop.run(1.0)
    assert loop.mapping("10.0.0.5") is Mapping.UNKNOWN
    assert loop.mapping("198.51.100.7") is Mapping.NONE


def test_at_rest_one_question_every_twenty_seconds_keeps_mapping_and_class() -> None:
    loop = _Loop()
    loop.run(5.0)
    loop.asked.clear()
    loop.run(3600.0)
    assert 3600 / REFRESH <= len(loop.asked) + 1 <= 3600 / REFRESH * 1.5
    assert loop.mapping("10.0.0.5") is Mapping.ENDPOINT_INDEPENDENT


def test_a_mapping_that_moved_is_seen_at_the_next_refresh_or_as_soon_as_a_path_is_in_doubt() -> None:
    for doubt in (False, True):
        loop = _Loop()
        loop.run(5.0)
        moved = Endpoint.parse("198.51.100.7:61000")
        loop.seen = dict.fromkeys(TARGETS, moved)
        if doubt:
            loop.machine.check(loop.now)
        loop.run(0.5 if doubt else REFRESH + 0.5)
        assert loop.machine.endpoints(loop.now) == {moved}


def test_silent_reflectors_are_said_to_be_silent_and_not_asked_without_end() -> None:
    loop = _Loop()
    loop.run(5.0)
    assert loop.machine.silent_since() is None
    loop.seen = dict.fromkeys(TARGETS)
    loop.asked.clear()
    loop.run(3600.0)
    assert loop.machine.silent_since() == pytest.approx(20.0, abs=6.0)
    assert len(loop.asked) < 2 * 3600 / REFRESH + 30
    loop.seen = dict.fromkeys(TARGETS, HERE)
    loop.run(REFRESH + 1.0)
    assert loop.machine.silent_since() is None


def test_a_mapping_that_moved_is_asked_of_every_reflector_at_once() -> None:
    loop = _Loop()
    loop.run(30.0)
    elsewhere = Endpoint.parse("198.51.100.7:50000")
    loop.seen = dict.fromkeys(TARGETS, elsewhere)
    loop.machine.check(loop.now)
    loop.run(1.0)
    assert loop.machine.endpoints(loop.now) == {elsewhere}
    assert loop.mapping("10.0.0.5") is Mapping.ENDPOINT_INDEPENDENT


def test_a_refresher_that_falls_silent_makes_us_ask_those_that_answered_lately() -> None:
    peer = ReflectorTarget(PublicKey(bytes([2] * 32)), Endpoint.parse("203.0.113.9:41641"))
    loop = _Loop((*TARGETS, peer))
    loop.run(1.0)
    elsewhere = Endpoint.parse("198.51.100.7:50000")
    loop.seen = {TARGETS[0]: None, TARGETS[1]: None, peer: elsewhere}
    loop.machine.check(loop.now)
    loop.run(4.0)
    assert elsewhere in loop.machine.endpoints(loop.now)


def test_what_a_silent_reflector_saw_before_is_no_sign_of_a_dependent_mapping() -> None:
    peer = ReflectorTarget(PublicKey(bytes([2] * 32)), Endpoint.parse("203.0.113.9:41641"))
    loop = _Loop((TARGETS[0], peer))
    loop.seen[peer] = None
    loop.run(30.0)
    elsewhere = Endpoint.parse("198.51.100.7:50000")
    loop.seen = {TARGETS[0]: None, peer: elsewhere}
    loop.machine.check(loop.now)
    loop.run(4.0)
    assert loop.machine.endpoints(loop.now) == {elsewhere}
    assert loop.mapping("10.0.0.5") is Mapping.UNKNOWN
