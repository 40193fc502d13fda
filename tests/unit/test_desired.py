"""When a report is worth a write, and what of the links it keeps."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from scope_agent.desired import is_news
from scope_agent.state import make_identity

from scope.model import Candidate, CandidateKind, Endpoint, Link, Mapping, PathKind, PeerReport

KEYS = make_identity(Random(1).randbytes).public
HERE = Endpoint.parse("198.51.100.7:20000")
LINK = Link("other", PathKind.DIRECT, endpoint=HERE, latency=0.04)
WRITTEN = PeerReport(KEYS, (Candidate(HERE, CandidateKind.HOST),), links=(LINK,), direct=1)


@pytest.mark.parametrize(
    "change",
    [
        {"endpoints": ()},
        {"mapping": Mapping.NONE},
        {"direct": 0, "unreachable": 1},
        {"links": ()},
        {"links": (replace(LINK, path=PathKind.NONE, endpoint=None, reason="no answer"),)},
        {"links": (replace(LINK, observed=HERE),)},
        {"links": (replace(LINK, latency=0.1),)},
        {"links": (replace(LINK, latency=None),)},
    ],
    ids=str,
)
def test_what_others_would_act_on_is_news(change: dict[str, object]) -> None:
    assert is_news(replace(WRITTEN, **change), WRITTEN)  # type: ignore[arg-type]


@pytest.mark.parametrize("latency", [0.04, 0.03, 0.055])
def test_a_latency_that_wobbles_is_not(latency: float) -> None:
    assert not is_news(replace(WRITTEN, links=(replace(LINK, latency=latency),)), WRITTEN)


def test_on_a_lan_a_latency_that_doubles_is_not() -> None:
    near = replace(WRITTEN, links=(replace(LINK, latency=0.001),))
    assert not is_news(replace(WRITTEN, links=(replace(LINK, latency=0.003),)), near)


def test_the_first_report_is_news() -> None:
    assert is_news(WRITTEN, None)
