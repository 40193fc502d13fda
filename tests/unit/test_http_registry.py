"""The HTTP adapter passes the conformance suite through a gateway, and raises what the port says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from scope.model import Kind
from scope.registry.port import Registry
from tests.unit.gateway_fixture import gateway
from tests.unit.registry_conformance import RegistryConformance


class TestHttpRegistry(RegistryConformance):
    kinds = (Kind.MESH, Kind.PEER)

    @asynccontextmanager
    async def opened(self, *, backlog: int) -> AsyncIterator[Registry]:
        async with gateway(backlog=backlog) as running, running.admin as registry:
            yield registry
