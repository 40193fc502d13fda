"""Every exchange in docs/api.md happens as it is written, and every path of the API is there."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scope_operator.gateway.advertised import Advertised
from scope_operator.gateway.limits import Limits
from scope_operator.gateway.process import ServeConfig, Serving, serving

from scope.cluster_enrolment import ClusterEnrolment, cluster_enrolment_to_dict, sign_cluster_enrolment
from scope.credentials import AdminCredential, ClusterCredential, PeerCredential, authorization
from scope.enrolment import Enrolment, enrolment_to_dict, sign_enrolment
from scope.join import JoinString
from scope.model import (
    AgentTokens,
    Cluster,
    ClusterTrust,
    PeerKeys,
    PublicKey,
    RsaKey,
    Secret,
    ServiceAccount,
)
from scope.resources import tokens_to_dict, tombstone_to_dict
from scope.tombstones import sign_tombstone

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text()
DOCUMENT = yaml.safe_load((ROOT / "operator/scope_operator/gateway/openapi.yaml").read_text())


@dataclass(frozen=True)
class Exchange:
    """One request of the page and the answer that follows it."""

    method: str
    target: str
    role: str  # ADMIN, PEER-JWT, CLUSTER-JWT or ""
    body: str
    code: int
    answer: str


def exchanges() -> list[Exchange]:
    blocks = re.findall(r"^```http\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = []
    for request, answer in zip(blocks[::2], blocks[1::2], strict=True):
        head, _, body = request.partition("\n\n")
        line, *headers = head.strip().split("\n")
        method, target = line.split(" ")
        role = next((h.rpartition(" ")[2] for h in headers if h.startswith("Authorization")), "")
        head, _, expected = answer.partition("\n\n")
        code = int(re.match(r"HTTP/1\.1 (\d{3}) ", head)[1])  # type: ignore[index]
        found.append(Exchange(method, target, role, body.strip(), code, expected.strip()))
    return found


class Host:
    """A machine that joins under one name and signs as the peer that it became."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.signing = Secret(bytes([seed, 1]) * 16)
        wireguard, probe = (X25519PrivateKey.from_private_bytes(bytes([seed, n]) * 16) for n in (2, 3))
        signing = Ed25519PrivateKey.from_private_bytes(self.signing.raw)
        public = (private.public_key().public_bytes_raw() for private in (wireguard, probe, signing))
        self.keys = PeerKeys(*map(PublicKey, public))
        self.joined: dict[str, Any] = {}

    def request(self, join_string: str) -> dict[str, object]:
        invitation = JoinString.parse(join_string)
        asked = Enrolment(invitation.mesh, invitation.token_id, invitation.secret, self.name, self.keys)
        return enrolment_to_dict(
            sign_enrolment(asked, registry=invitation.registry_key, signing=self.signing)
        )

    @property
    def credential(self) -> PeerCredential:
        meta = self.joined["peer"]["metadata"]
        return PeerCredential(meta["name"], meta["uid"], self.joined["registry"], self.signing)

    def tombstone(self) -> dict[str, object]:
        signed = sign_tombstone(
            mesh_uid=self.joined["mesh"]["metadata"]["uid"],
            peer_uid=self.joined["peer"]["metadata"]["uid"],
            key=self.keys.wireguard,
            secret=self.signing,
        )
        return tombstone_to_dict(signed)


class West:
    """A cluster that joins, and what its operator signs as."""

    def __init__(self) -> None:
        self.signing = Secret(bytes([3, 1]) * 16)
        public = Ed25519PrivateKey.from_private_bytes(self.signing.raw).public_key()
        tokens = AgentTokens(
            issuer="https://kubernetes.default.svc.cluster.local",
            keys=(RsaKey("KEY-ID", 2**2047 + 1, 65537),),
            service_account=ServiceAccount("scope-system", "scope-agent"),
        )
        trust = ClusterTrust(PublicKey(public.public_bytes_raw()), tokens)
        self.cluster, self.tokens = Cluster("west", "7d0b7a52", trust), tokens
        self.registry = ""

    def request(self, join_string: str) -> dict[str, object]:
        invitation = JoinString.parse(join_string)
        asked = ClusterEnrolment(invitation.mesh, invitation.token_id, invitation.secret, self.cluster)
        return cluster_enrolment_to_dict(
            sign_cluster_enrolment(asked, registry=invitation.registry_key, signing=self.signing)
        )

    @property
    def credential(self) -> ClusterCredential:
        return ClusterCredential("home", "west", self.cluster.uid, self.registry, self.signing)


class Reader:
    """Follows the page against a running registry, filling in what only a registry or a key can know."""

    def __init__(self, running: Serving, data: Path) -> None:
        self.running = running
        self.admin = AdminCredential(Secret(json.loads((data / "admin.json").read_text())["token"].encode()))
        self.laptop, self.desktop, self.west = Host("laptop", 1), Host("desktop", 2), West()
        self.laptop_left = False
        self.answers: dict[str, Any] = {}
        self.nonce = 0

    async def follow(self, exchange: Exchange) -> None:
        if exchange.target == "/v1/join" and not self.desktop.joined:
            self.desktop.joined = await self.join(self.desktop)
        body = self.body_of(exchange)
        target = exchange.target.replace("TOKEN-ID", self.answers.get("/v1/tokens", {}).get("id", ""))
        code, content_type, raw = await self.ask(exchange, target, body)
        assert code == exchange.code, (exchange, raw)
        if content_type == "application/x-ndjson":
            lines = [json.loads(line) for line in raw.split(b"\n") if line.strip()]
            assert_shape(lines[0], json.loads(exchange.answer), exchange.target)
            return
        if not exchange.answer:
            assert raw == b""
            return
        answer = json.loads(raw)
        assert_shape(answer, json.loads(exchange.answer), exchange.target)
        if exchange.method == "POST":
            self.answers[exchange.target] = answer
        if exchange.target == "/v1/join":
            self.laptop.joined = answer
        if exchange.target == "/v1/clusters":
            self.west.registry = answer["registry"]
        self.laptop_left = self.laptop_left or exchange.target == "/v1/leave"

    async def join(self, host: Host) -> dict[str, Any]:
        body = json.dumps(host.request(self.answers["/v1/tokens"]["joinString"])).encode()
        code, _, raw = await self.ask(Exchange("POST", "/v1/join", "", "", 201, ""), "/v1/join", body)
        assert code == 201
        answer: dict[str, Any] = json.loads(raw)
        return answer

    def body_of(self, exchange: Exchange) -> bytes:
        """The body as it stands on the page, with real keys and signatures."""
        made: dict[str, object] | None = None
        if exchange.target == "/v1/join":
            made = self.laptop.request(self.answers["/v1/tokens"]["joinString"])
        elif exchange.target == "/v1/leave":
            made = {"tombstone": self.laptop.tombstone()}
        elif exchange.target == "/v1/clusters":
            made = self.west.request(self.answers["/v1/tokens"]["joinString"])
        elif exchange.target == "/v1/clusters/west/keys":
            made = tokens_to_dict(self.west.tokens)
        if made is not None:
            assert_shape(made, json.loads(exchange.body), exchange.target)
            assert_shape(json.loads(exchange.body), made, exchange.target)
            return json.dumps(made).encode()
        text = exchange.body
        for path, answer in self.answers.items():
            if path.endswith("scopemeshes"):
                text = text.replace("MESH-UID", answer["metadata"]["uid"])
        if self.desktop.joined:
            peer = self.desktop.joined["peer"]
            text = text.replace("PEER-UID", peer["metadata"]["uid"])
            text = text.replace("PEER-KEYS", json.dumps(peer["status"]["keys"]))
        return text.encode()

    def credential_of(self, role: str) -> AdminCredential | ClusterCredential | PeerCredential:
        if role == "ADMIN":
            return self.admin
        if role == "CLUSTER-JWT":
            return self.west.credential
        return self.desktop.credential if self.laptop_left else self.laptop.credential

    async def ask(self, exchange: Exchange, target: str, body: bytes) -> tuple[int, str, bytes]:
        headers = {}
        if exchange.role:
            self.nonce += 1
            headers["Authorization"] = authorization(
                self.credential_of(exchange.role),
                method=exchange.method,
                target=target,
                body=body,
                wall=time.time(),
                nonce=self.nonce.to_bytes(16, "big"),
            )
        async with (
            aiohttp.ClientSession() as session,
            # The pin is what other tests are about; this connection stays on loopback.
            session.request(
                exchange.method, self.running.url + target, data=body or None, headers=headers, ssl=False
            ) as response,
        ):
            assert response.headers["Scope-Registry"]
            return response.status, response.content_type, await response.read()


def assert_shape(actual: Any, documented: Any, where: str) -> None:
    """Everything documented is there, of the same type, and the same where it is no example's own value."""
    assert type(actual) is type(documented), (where, actual, documented)
    if isinstance(documented, dict):
        for name, value in documented.items():
            assert name in actual, (where, name, actual)
            assert_shape(actual[name], value, f"{where}.{name}")
            if name in ("kind", "apiVersion", "reason", "code", "status", "type", "specversion", "name"):
                assert actual[name] == value or isinstance(value, dict), (where, name, actual)
    elif isinstance(documented, list) and documented:
        assert actual, where
        assert_shape(actual[0], documented[0], where)


def test_every_exchange_on_the_page_happens_as_it_is_written(tmp_path: Path) -> None:
    async def run() -> None:
        config = ServeConfig(
            tmp_path, (("127.0.0.1", 0),), (0, 0), advertise=(Advertised("127.0.0.1"),), limits=Limits()
        )
        async with asyncio.timeout(60), serving(config) as running:
            reader = Reader(running, tmp_path)
            for exchange in exchanges():
                await reader.follow(exchange)

    asyncio.run(run())


def test_every_path_of_the_api_is_on_the_page() -> None:
    for path in DOCUMENT["paths"]:
        pattern = re.sub(r"\\\{\w+\\\}", r"[\\w.-]+", re.escape(path))
        assert re.search(rf"{pattern}(?![\w/])", PAGE), path


def test_the_limits_on_the_page_are_the_gateways() -> None:
    limits = Limits()
    for rate in (limits.source, limits.stranger, limits.peer, limits.cluster, limits.courier):
        assert f"| {rate.per_second:g} a second, {rate.burst:g} at once | 429 |" in PAGE
    assert f"| {limits.connections:,} and {limits.connections_per_source:,} | 503 |" in PAGE
    assert f"| {limits.streams:,}, 1, {limits.admin_streams} | 503;" in PAGE
    assert f"| body | {limits.body // 1024} KiB | 413 |" in PAGE
    assert f"| body of an exported Service | {limits.service_body // 1024} KiB | 413 |" in PAGE


def test_the_python_on_the_page_lists_peers(tmp_path: Path) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, "docs/api.md", "exec"), names)

    async def run() -> None:
        config = ServeConfig(tmp_path, (("127.0.0.1", 0),), (0, 0), advertise=(Advertised("127.0.0.1"),))
        async with asyncio.timeout(30), serving(config):
            assert await names["names"](tmp_path / "admin.json") == []

    asyncio.run(run())
