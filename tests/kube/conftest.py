"""A real API server for the tests of this folder: one for all, emptied between them, or a test's own.

The programs are built by `hack/setup.sh test`; without them these tests fail, and say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kubelab import ApiError, ControlPlane

DEFINITIONS = Path(__file__).parents[2] / "crds"
# What goes after each test.
_SCOPE = "/apis/scope.ltgc.cc/v1alpha1"
_EMPTIED = (f"{_SCOPE}/scopeservices", f"{_SCOPE}/scopepeers", f"{_SCOPE}/scopemeshes", "/api/v1/nodes")
_EMPTIED_IN_NAMESPACE = (
    "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "/api/v1/namespaces/{}/secrets",
    "/api/v1/namespaces/{}/events",
)
_GONE_S = 60.0  # a deletion is at once, unless a finalizer is left: then its name belongs in the error


@pytest.fixture(scope="session")
def shared_control_plane(request: pytest.FixtureRequest) -> Iterator[ControlPlane]:
    """The control plane of the whole run, with Scope's definitions; `control_plane` is for tests."""
    plane = ControlPlane()
    try:
        asyncio.run(_start(plane))
        yield plane
    finally:
        if kept := plane.close(keep_logs=request.session.testsfailed > 0):
            print(f"the logs of the control plane are in {kept}")  # noqa: T201 - pytest shows it


@pytest.fixture
def control_plane(shared_control_plane: ControlPlane) -> Iterator[ControlPlane]:
    """The shared API server, without any object of Scope, Node or Lease. Leave its programs as they are."""
    yield shared_control_plane
    asyncio.run(_empty(shared_control_plane))


@pytest.fixture
def own_control_plane(request: pytest.FixtureRequest) -> Iterator[Callable[..., ControlPlane]]:
    """Makes control planes of a test's own, started, with Scope's definitions: to kill, freeze and restore.

    Each takes three seconds, and four more with `controllers`.
    """
    made: list[ControlPlane] = []

    def make(*, controllers: bool = False) -> ControlPlane:
        plane = ControlPlane(controllers=controllers)
        made.append(plane)
        asyncio.run(_start(plane))
        return plane

    failed = request.session.testsfailed
    try:
        yield make
    finally:
        for plane in made:
            plane.close(keep_logs=request.session.testsfailed > failed)


async def _start(plane: ControlPlane) -> None:
    await plane.start()
    if any(DEFINITIONS.glob("*.yaml")):
        await plane.apply(DEFINITIONS)


async def _empty(plane: ControlPlane) -> None:
    listed = await plane.request("GET", "/api/v1/namespaces")
    namespaces = [item["metadata"]["name"] for item in listed["items"]]
    inside = [path.format(name) for name in namespaces for path in _EMPTIED_IN_NAMESPACE]
    for path in (*_EMPTIED, *inside):
        with contextlib.suppress(_NotServed):
            await _delete_all(plane, path)


class _NotServed(Exception):
    """The API server does not know this kind: its definition is not applied."""


async def _delete_all(plane: ControlPlane, path: str) -> None:
    deadline = time.monotonic() + _GONE_S
    while True:
        try:
            listed = await plane.request("GET", path)
        except ApiError as error:
            if error.status == 404:
                raise _NotServed from None
            raise
        if not listed["items"]:
            return
        if time.monotonic() > deadline:
            names = [item["metadata"]["name"] for item in listed["items"]]
            raise AssertionError(f"these do not go away: {path} {names}")
        await plane.request("DELETE", path)
