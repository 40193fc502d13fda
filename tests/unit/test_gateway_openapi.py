"""The running gateway keeps what its OpenAPI document promises."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
import schemathesis
import yaml
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from scope_operator.gateway.limits import Limits

from scope.admission import Rate
from tests.unit.gateway_fixture import enrolled, gateway

DOCUMENT = yaml.safe_load(files("scope_operator.gateway").joinpath("openapi.yaml").read_text())
UNLIMITED = Rate(1e6, 1e6)
# A join of 5 s for each accepted example would be all that this test does.
LIMITS = Limits(source=UNLIMITED, stranger=UNLIMITED, peer=UNLIMITED, join_wait=0.01)
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A gateway with one mesh and one peer, on a loop of its own."""
    loop = asyncio.new_event_loop()
    started: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with gateway(limits=LIMITS, backlog=8192) as running:
            await enrolled(running.registry, 1)
            started.append(running.url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    assert ready.wait(10)
    yield started[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


def seeded(examples: int, *phases: Phase) -> settings:
    """The same examples in every run; in the explicit phase come those that cover the schema's own bounds."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )


@schema.exclude(path="/v1/events").parametrize()
@seeded(6, Phase.explicit, Phase.generate)
def test_every_answer_is_as_the_document_says(case: Any, url: str) -> None:
    validate(case, url)


@schema.include(path="/v1/events").parametrize()
@seeded(3, Phase.generate)  # each may stream for a second
def test_every_stream_is_as_the_document_says(case: Any, url: str) -> None:
    case.query = {**(case.query or {}), "timeoutSeconds": "1"}
    validate(case, url)


def validate(case: Any, url: str) -> None:
    """Make the request that `case` is, as an administrator, and check the answer."""
    case.call_and_validate(
        base_url=url,
        headers={"Authorization": "Bearer administrator-of-the-test"},
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_headers_conformance,
            response_schema_conformance,
            ignored_auth,
        ],
        timeout=60,  # on a busy machine
    )


def test_the_served_document_is_the_one_in_the_repository(url: str) -> None:
    with urllib.request.urlopen(f"{url}/openapi.json") as response:
        assert json.load(response) == DOCUMENT
