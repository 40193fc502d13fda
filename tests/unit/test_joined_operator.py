"""What the operator of a joined cluster keeps, and what it tells the gateway of its API server's keys."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scope_operator.kube import joined, lease, replica
from scope_operator.kube.cluster import NODES
from scope_operator.kube.joined import JoinedConfig, JoinedOperator, Membership, read_secret
from scope_operator.kube.report import Report

from scope.join import JoinString
from scope.model import AgentTokens, ConfigError, PublicKey, Secret
from scope.registry.memory import MemoryRegistry
from scope.registry.port import NotFound, Refused, RegistryError, Unavailable
from scope.resources import tokens_to_dict
from tests.unit.cluster_fixture import (
    ACCOUNT,
    ISSUER,
    SECRET,
    ApiServer,
    JoiningCluster,
    invite,
    public_half,
)
from tests.unit.gateway_fixture import REGISTRY_KEY as GATEWAY_KEY
from tests.unit.gateway_fixture import enrolled, gateway
from tests.unit.test_gateway import until

SEED = bytes(range(32))
REGISTRY_KEY = PublicKey(bytes(range(1, 33)))
JOINED = {
    "url": "https://east:7443",
    "pin": None,
    "mesh": "home",
    "registry": "r",
    "registryKey": str(REGISTRY_KEY),
    "tokenID": "tk-1",
}
OLD, NEW = ApiServer(1, "old"), ApiServer(2, "new", None)


def encoded(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.b64encode(raw).decode()


def secret(**data: str) -> dict[str, object]:
    return {"data": {"signing": encoded(base64.b64encode(SEED)), **data}}


def test_a_secret_without_a_join_has_the_key_alone() -> None:
    signing, membership = read_secret(secret())
    assert (signing.raw, membership) == (SEED, None)


def test_a_secret_after_a_join_says_where() -> None:
    signing, membership = read_secret(secret(**{"joined.json": encoded(JOINED)}))
    assert membership == Membership("https://east:7443", None, "home", "r", REGISTRY_KEY, "tk-1", signing)


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"data": None},
        {"data": {"signing": "%%"}},
        {"data": {"signing": encoded(b"not base64")}},
        {"data": {"signing": encoded(base64.b64encode(b"short"))}},
        secret(**{"joined.json": encoded(b"{")}),
        secret(**{"joined.json": encoded([])}),
        secret(**{"joined.json": encoded({**JOINED, "pin": 7})}),
        secret(**{"joined.json": encoded({**JOINED, "registryKey": "short"})}),
        secret(**{"joined.json": encoded({"url": "https://east:7443"})}),
    ],
)
def test_a_damaged_secret_is_refused_and_its_key_not_shown(damaged: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the Secret scope-cluster is damaged") as refused:
        read_secret(damaged)
    assert encoded(SEED) not in str(refused.value)


class ApiServerStub:
    """An API server that shows its keys, each time the next ones; `None` is one that does not answer."""

    def __init__(self, *keys: ApiServer | None) -> None:
        self._keys: Iterator[ApiServer | None] = iter(keys)
        self._last: ApiServer | None = None

    async def ask(self, method: str, path: str, **_: object) -> dict[str, Any]:
        if path == joined.DISCOVERY:
            return {"issuer": ISSUER}
        assert (method, path) == ("GET", joined.JWKS)
        self._last = next(self._keys, self._last)
        if self._last is None:
            raise Unavailable("away")
        tokens = tokens_to_dict(JoiningCluster(api=self._last).tokens)
        return {"keys": tokens["keys"]}


class GatewayStub:
    """A gateway that is told keys; it does not answer the first `failures` times."""

    def __init__(self, failures: int = 0) -> None:
        self.told: list[tuple[str, AgentTokens]] = []
        self._failures = failures

    async def replace_cluster_tokens(self, cluster: str, tokens: AgentTokens) -> None:
        if self._failures:
            self._failures -= 1
            raise Refused("not now")
        self.told.append((cluster, tokens))


def operator(client: ApiServerStub, directory: Path, *, registry_url: str | None = None) -> JoinedOperator:
    config = JoinedConfig(
        cluster="west",
        namespace=ACCOUNT.namespace,
        join_string=directory / "join-string",
        agents=ACCOUNT.name,
        metrics_address="127.0.0.1",
        metrics_port=0,
        registry_url=registry_url,
    )
    access: Any = SimpleNamespace()
    kube: Any = client
    return JoinedOperator(kube, access, config, uid="u", report=Report())


def registered(
    client: ApiServerStub, gateway: GatewayStub, directory: Path, *, count: int
) -> list[tuple[str, AgentTokens]]:
    """What the gateway was told until there were `count` messages."""

    async def run() -> None:
        west = operator(client, directory)
        http: Any = gateway
        task = asyncio.create_task(west._register(http, await west._tokens()))
        async with asyncio.timeout(60):
            while len(gateway.told) < count:  # noqa: ASYNC110 - a stub has no event
                await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    return gateway.told


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "KEYS_SECONDS", 0.0)
    monkeypatch.setattr(replica, "backoff", lambda failures, *, uniform: 0.0)


@pytest.mark.usefixtures("hurried")
def test_keys_are_told_at_the_start_and_when_they_change(tmp_path: Path) -> None:
    told = registered(ApiServerStub(OLD, OLD, OLD, NEW, NEW), GatewayStub(), tmp_path, count=2)
    assert told == [("west", JoiningCluster(api=api).tokens) for api in (OLD, NEW)]


@pytest.mark.usefixtures("hurried")
def test_keys_are_told_once_whoever_was_away_is_back(tmp_path: Path) -> None:
    told = registered(ApiServerStub(OLD, None, None, NEW), GatewayStub(failures=3), tmp_path, count=2)
    assert [tokens.keys for _, tokens in told] == [(OLD.public,), (NEW.public,)]


class RestoredApiServer(ApiServerStub):
    """An API server with one Node and a Lease, whose revisions a restore sets back."""

    def __init__(self) -> None:
        super().__init__(OLD)
        self.revision = 100

    async def __aenter__(self) -> RestoredApiServer:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        if path == NODES:
            node = {"metadata": {"name": "n1", "uid": "u1", "resourceVersion": "7"}}
            return {"metadata": {"resourceVersion": str(self.revision)}, "items": [node]}
        if "/leases" in path:
            if method == "GET":
                raise NotFound("no Lease")
            self.revision += 1
            return {"metadata": {"resourceVersion": str(self.revision)}, "spec": options["body"]["spec"]}
        return await super().ask(method, path)


def test_nodes_of_a_joined_cluster_that_is_restored_are_watched_and_listed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    west = RestoredApiServer()
    elsewhere = MemoryRegistry(
        "r", wall=time.time, now=time.monotonic, new_uid=lambda: "u", new_signal=asyncio.Event
    )
    watches: list[int] = []  # at which revision each was opened

    async def watching(*_: object, **__: object) -> None:
        watches.append(west.revision)
        await asyncio.Event().wait()

    @asynccontextmanager
    async def gateway(*_: object, **__: object) -> AsyncIterator[MemoryRegistry]:
        yield elsewhere

    async def nothing(*_: object) -> None:
        await asyncio.Event().wait()

    async def member(*_: object) -> Membership:
        return Membership("https://east:7443", None, "home", "r", REGISTRY_KEY, "tk-1", Secret(SEED))

    monkeypatch.setattr(replica, "watch", watching)
    monkeypatch.setattr(replica, "KubeClient", lambda _: west)
    monkeypatch.setattr(joined, "HttpRegistry", gateway)
    monkeypatch.setattr(lease, "RENEW", 0.01)
    monkeypatch.setattr(JoinedOperator, "_register", nothing)
    monkeypatch.setattr(JoinedOperator, "_member", member)
    monkeypatch.setattr(JoinedOperator, "_tell_agents", member)

    async def run() -> None:
        leading = asyncio.create_task(operator(west, tmp_path).lead())
        async with asyncio.timeout(60):
            await until(lambda: len(watches) == 1 and west.revision > 110)
            west.revision = 50
            await until(lambda: len(watches) == 2)
        leading.cancel()
        await asyncio.wait([leading])

    asyncio.run(run())
    assert watches[1] < 100


def test_an_api_server_whose_keys_cannot_be_used_is_refused(tmp_path: Path) -> None:
    class Odd(ApiServerStub):
        async def ask(self, method: str, path: str, **_: object) -> dict[str, Any]:
            return {"keys": [{"kty": "OKP", "kid": "k"}]}

    with pytest.raises(Refused, match="cannot use the keys that the API server signs tokens with"):
        asyncio.run(operator(Odd(), tmp_path)._tokens())


class NoSecret(ApiServerStub):
    """An API server without the Secret."""

    async def ask(self, method: str, path: str, **_: object) -> dict[str, Any]:
        raise NotFound("there is none")


def test_without_a_join_string_a_cluster_that_never_joined_says_what_to_do(tmp_path: Path) -> None:
    west = operator(NoSecret(), tmp_path)
    for text in (None, "", "\n"):
        if text is not None:
            (tmp_path / "join-string").write_text(text)
        with pytest.raises(ConfigError, match=r"has no join string: .*scopectl token create"):
            asyncio.run(west._member(JoiningCluster().tokens))


def test_a_damaged_join_string_is_refused(tmp_path: Path) -> None:
    (tmp_path / "join-string").write_text("https://east:7443/home")
    with pytest.raises(ConfigError, match="after # is missing"):
        asyncio.run(operator(NoSecret(), tmp_path)._member(JoiningCluster().tokens))


def test_a_join_string_of_another_gateway_than_the_one_that_was_meant_is_refused(tmp_path: Path) -> None:
    invitation = JoinString("https://other:7443", "home", "tk-1", Secret(SEED), None, REGISTRY_KEY)
    (tmp_path / "join-string").write_text(invitation.format())
    west = operator(NoSecret(), tmp_path, registry_url="https://east:7443")
    with pytest.raises(ConfigError, match="is for the gateway https://other:7443, and this") as refused:
        asyncio.run(west._member(JoiningCluster().tokens))
    assert invitation.format().partition("#")[2] not in str(refused.value)


def test_what_is_wrong_with_the_invitation_or_the_way_is_said_with_what_to_do(tmp_path: Path) -> None:
    async def refusal(url: str, secret: Secret, token: str) -> str:
        west = operator(NoSecret(), tmp_path)
        invitation = JoinString(url, "home", token, secret, None, public_half(GATEWAY_KEY))
        with pytest.raises(RegistryError) as refused:
            await west._join(invitation, JoiningCluster().tokens, Secret(SEED))
        return str(refused.value)

    async def body() -> None:
        async with asyncio.timeout(60), gateway() as running:
            await enrolled(running.registry, 1)
            await invite(running.registry, "old", wall=running.clock() - 4000)
            await invite(running.registry, "good", wall=running.clock())
            assert "no join token has this id and secret: `scopectl token create" in await refusal(
                running.url, Secret(bytes(32)), "good"
            )
            assert "join token old expired 400 s ago: `scopectl token create" in await refusal(
                running.url, SECRET, "old"
            )
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
            nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
            said = await refusal(nowhere, SECRET, "good")
        assert f"cannot reach {nowhere}" in said
        assert "is it up, and is its port open?" in said

    asyncio.run(body())


def test_a_replica_that_waits_is_ready_and_one_that_joins_is_not_yet(tmp_path: Path) -> None:
    west = operator(ApiServerStub(OLD), tmp_path)
    assert west._health().listed
    west._replica._election.is_leader = True
    assert not west._health().listed


def test_a_membership_shows_no_key() -> None:
    assert SEED.hex() not in repr(Membership("u", None, "home", "r", REGISTRY_KEY, "t", Secret(SEED)))
