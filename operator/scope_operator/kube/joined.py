"""The operator of a cluster whose registry is elsewhere: it joins once, then keeps its Nodes' peers there.

The elected replica alone speaks to the gateway. It joins with the token of a join string, once: the cluster's
key and where it joined are kept in the Secret `scope-cluster` of its namespace, the key before the first
question, so whatever is interrupted is asked again with the same key. A join string with another token is
a new invitation: to a registry made anew, or after the cluster was removed.

    signing      32-byte seed of the Ed25519 key that signs requests, base64
    joined.json  {"url", "pin", "mesh", "registry", "registryKey", "tokenID"}, once it has joined

What of that the agents need, nothing secret, it writes into the ConfigMap `scope-gateway`.
What the tokens of the agents are known by is told at the start and looked at every hour, and Nodes are
watched as at home, and so are Services where they are exported. No ScopeMesh or ScopePeer is in this cluster.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scope import gateway_file, resources
from scope.cluster_enrolment import ClusterEnrolment, cluster_enrolment_to_dict, sign_cluster_enrolment
from scope.credentials import ClusterCredential, base64url, read_base64url
from scope.gateway_file import GatewayFile
from scope.join import JoinString
from scope.model import AgentTokens, Cluster, ClusterTrust, ConfigError, PublicKey, Secret, ServiceAccount
from scope.registry.http import HttpRegistry
from scope.registry.kube.access import Access
from scope.registry.kube.client import APPLY, JSON, MERGE, KubeClient, Object
from scope.registry.kube.objects import OPERATOR, secret_path, secrets_path
from scope.registry.port import NotFound, Refused, RegistryError
from scope.resources import InvalidResource
from scope_operator.gateway.joining import public_half
from scope_operator.kube import replica
from scope_operator.kube.cluster import identity, list_nodes
from scope_operator.kube.news import Newsroom
from scope_operator.kube.replica import Replica, persist
from scope_operator.kube.report import STARTING, Report
from scope_operator.kube.services import Services
from scope_operator.plan.nodes import NodePeers
from scope_operator.reconcile import ReconcileHealth, Reconciler

log = logging.getLogger(__name__)

SECRET = "scope-cluster"  # noqa: S105 - its name
CONFIG_MAP = "scope-gateway"
JWKS, DISCOVERY = "/openid/v1/jwks", "/.well-known/openid-configuration"
KEYS_SECONDS = 3600.0  # between looks at the API server's keys: an old one signs for as long as a token lives


@dataclass(frozen=True, slots=True)
class JoinedConfig:
    """What the command line said. `join_string` is a file, which may be gone once the cluster has joined.

    A join string of a gateway other than that of `registry_url`, where there is one, is refused.
    """

    cluster: str
    namespace: str
    join_string: Path
    agents: str  # name of their ServiceAccount, in `namespace`
    metrics_address: str
    metrics_port: int
    registry_url: str | None = None
    services: bool = False  # keep exported Services


@dataclass(frozen=True, slots=True)
class Membership:
    """Where a cluster joined, and its key there."""

    url: str
    pin: bytes | None
    mesh: str
    registry: str
    registry_key: PublicKey
    token_id: str
    signing: Secret


class JoinedOperator:
    """One replica, in the cluster whose kube-system namespace has the UID `uid`."""

    def __init__(
        self, client: KubeClient, access: Access, config: JoinedConfig, *, uid: str, report: Report
    ) -> None:
        self._client = client
        self._config = config
        self._uid = uid
        self._nodes = NodePeers(cluster=config.cluster, uid=uid)
        self._reconciler: Reconciler | None = None
        self._report = report
        self._replica = Replica(
            access, namespace=config.namespace, uid=uid, newest=lambda: self._nodes.revision
        )
        report.watch(health=self._health, is_leader=lambda: self._replica.is_leader)

    async def lead(self) -> None:
        """Keep the peers while elected. Raises LeaseLost, ConfigError, Refused (it may not join)."""
        await self._replica.lead(self._keep)

    async def _keep(self) -> None:
        """What the leader does."""
        tokens = await persist(self._tokens)
        membership = await persist(lambda: self._member(tokens))
        await persist(lambda: self._tell_agents(membership))
        moved = asyncio.Event()
        pins: list[bytes] = []

        def follow(pin: bytes) -> None:
            pins.append(pin)
            moved.set()

        cluster, uid = self._config.cluster, self._uid
        with_services = self._config.services
        async with connect(
            membership, cluster=cluster, uid=uid, followed=follow, services=with_services
        ) as registry:
            reconciler = Reconciler(
                registry,
                liveness=None,
                now=time.monotonic,
                wall=time.time,
                uniform=random.uniform,
                nodes=self._nodes,
                list_nodes=lambda: list_nodes(self._client, self._nodes),
                assigns=False,
                told=self._report.tell,
            )
            self._reconciler = reconciler
            newsroom = Newsroom(self._client, identity=self._replica.name, wall=time.time)
            services = (
                Services(
                    self._client,
                    registry,
                    cluster=self._config.cluster,
                    uid=self._uid,
                    tell=newsroom.post,
                    now=time.monotonic,
                    uniform=random.uniform,
                )
                if with_services
                else None
            )
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._register(registry, tokens))
                tasks.create_task(self._keep_pin(membership, pins, moved))
                heard = services.heard if services is not None else None
                tasks.create_task(self._replica.hear(reconciler, kinds=(), services=heard))
                tasks.create_task(reconciler.follow())
                if services is not None:
                    tasks.create_task(newsroom.run())
                    tasks.create_task(services.run())

    async def _keep_pin(self, membership: Membership, pins: list[bytes], moved: asyncio.Event) -> None:
        """Know the gateway, and let the agents know it, by the newest pin that was followed."""
        while True:
            await moved.wait()
            moved.clear()
            membership = replace(membership, pin=pins[-1])
            log.warning("cluster.gateway_key_replaced pin=%s", base64url(pins[-1]))
            namespace = self._config.namespace
            await persist(partial(_keep, self._client, namespace, membership), through=RegistryError)
            await persist(partial(self._tell_agents, membership), through=RegistryError)

    async def _member(self, tokens: AgentTokens) -> Membership:
        """Where the cluster has joined; now, if it has not. Raises ConfigError, Refused, Unavailable."""
        invitation = _invitation(self._config.join_string)
        signing, membership = await _kept(self._client, self._config.namespace)
        if membership is not None and (invitation is None or invitation.token_id == membership.token_id):
            return membership
        if invitation is None:
            raise ConfigError(
                f"this cluster has not joined a mesh, and {self._config.join_string} has no join string: put "
                "there what `scopectl token create --mesh MESH --single-use` prints"
            )
        if self._config.registry_url not in (None, invitation.url):
            raise ConfigError(
                f"the join string in {self._config.join_string} is for the gateway {invitation.url}, and "
                f"this cluster is to join {self._config.registry_url}: put one there that was made at that "
                "gateway, or change the URL"
            )
        if signing is None:
            signing = await _new_key(self._client, self._config.namespace)
        joined = await self._join(invitation, tokens, signing)
        await _keep(self._client, self._config.namespace, joined)
        log.info("cluster.joined mesh=%s registry=%s url=%s", joined.mesh, joined.registry, joined.url)
        return joined

    async def _join(self, invitation: JoinString, tokens: AgentTokens, signing: Secret) -> Membership:
        cluster = Cluster(self._config.cluster, self._uid, ClusterTrust(public_half(signing), tokens))
        request = sign_cluster_enrolment(
            ClusterEnrolment(invitation.mesh, invitation.token_id, invitation.secret, cluster),
            registry=invitation.registry_key,
            signing=signing,
        )
        async with HttpRegistry(
            invitation.url, pin=invitation.pin, credential=None, registry_key=invitation.registry_key
        ) as gateway:
            answer = await gateway.join_cluster(cluster_enrolment_to_dict(request))
        return Membership(
            invitation.url,
            invitation.pin,
            invitation.mesh,
            answer.registry,
            invitation.registry_key,
            invitation.token_id,
            signing,
        )

    async def _tell_agents(self, membership: Membership) -> None:
        """Write where the registry is for the agents of this cluster. Raises Refused, Unavailable."""
        file = GatewayFile(membership.url, membership.pin, membership.mesh, membership.registry_key)
        namespace = self._config.namespace
        document = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": CONFIG_MAP, "namespace": namespace},
            "data": {gateway_file.NAME: file.format()},
        }
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/configmaps/{CONFIG_MAP}"
        query = {"fieldManager": OPERATOR, "force": "true"}
        try:
            await self._client.ask("PATCH", path, query=query, body=document, content_type=APPLY)
        except Refused as error:
            raise Refused(
                f"may not write the ConfigMap {CONFIG_MAP}, by which agents find the registry: {error}; "
                "apply the operator's Role"
            ) from None

    async def _tokens(self) -> AgentTokens:
        """What this cluster's agents are known by. Raises Refused, Unavailable."""
        jwks = await self._ask_issuer(JWKS, accept="application/jwk-set+json")
        try:
            keys = resources.parse_jwks(jwks)
        except InvalidResource as error:
            raise Refused(f"cannot use the keys that the API server signs tokens with: {error}") from None
        discovery = await self._ask_issuer(DISCOVERY)
        account = ServiceAccount(self._config.namespace, self._config.agents)
        return AgentTokens(str(discovery.get("issuer", "")), keys, account)

    async def _ask_issuer(self, path: str, *, accept: str = JSON) -> Object:
        try:
            return await self._client.ask("GET", path, accept=accept)
        except Refused as error:
            raise Refused(
                f"may not read {path}, by which agents are known: {error}; apply the operator's ClusterRole"
            ) from None

    async def _register(self, registry: HttpRegistry, tokens: AgentTokens) -> None:
        """Let the gateway know the API server's keys: those of now, and then each change."""
        while True:
            await persist(
                partial(registry.replace_cluster_tokens, self._config.cluster, tokens), through=RegistryError
            )
            log.info("cluster.keys keys=%s", [key.id for key in tokens.keys])
            told = tokens
            while tokens == told:
                await asyncio.sleep(KEYS_SECONDS)
                tokens = await persist(self._tokens, through=RegistryError)

    def _health(self) -> ReconcileHealth:
        if self._reconciler is not None:
            return self._reconciler.health
        # Who waits for the Lease has nothing to list, and takes over at once.
        return replace(STARTING, listed=not self._replica.is_leader)


async def operate(access: Access, config: JoinedConfig) -> None:
    """Run one replica until SIGTERM or SIGINT. Raises ConfigError, LeaseLost, Refused."""

    async def run(client: KubeClient, report: Report) -> None:
        uid = await persist(lambda: identity(client))
        await JoinedOperator(client, access, config, uid=uid, report=report).lead()

    await replica.operate(
        access,
        cluster=config.cluster,
        metrics_address=config.metrics_address,
        metrics_port=config.metrics_port,
        run=run,
    )


def connect(
    membership: Membership,
    *,
    cluster: str,
    uid: str,
    followed: Callable[[bytes], None] = lambda _: None,
    services: bool = False,
) -> HttpRegistry:
    """The gateway, as the operator of that cluster; `followed` is told a pin that replaces the known one.
    Exported Services may be watched with `services`.
    """
    return HttpRegistry(
        membership.url,
        pin=membership.pin,
        credential=ClusterCredential(membership.mesh, cluster, uid, membership.registry, membership.signing),
        registry_key=membership.registry_key,
        followed=followed,
        services=services,
    )


def _invitation(file: Path) -> JoinString | None:
    """The join string, if the file is there. Raises ConfigError."""
    try:
        text = file.read_text().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the join string in {file}: {error}") from None
    return JoinString.parse(text) if text else None


# --- the Secret ---------------------------------------------------------------------------------------------


async def _kept(client: KubeClient, namespace: str) -> tuple[Secret | None, Membership | None]:
    """The key and where it joined, as far as there are any. Raises ConfigError, RegistryError."""
    try:
        secret = await client.ask("GET", secret_path(SECRET, namespace))
    except NotFound:
        return None, None
    return read_secret(secret)


async def read_membership(client: KubeClient, namespace: str) -> Membership | None:
    """Where the cluster has joined; None where it has not. Raises ConfigError, RegistryError."""
    _, membership = await _kept(client, namespace)
    return membership


def read_secret(secret: Mapping[str, Any]) -> tuple[Secret, Membership | None]:
    """The key, and where it joined. Raises ConfigError."""
    data = secret.get("data") or {}
    try:
        signing = Secret(base64.b64decode(base64.b64decode(data["signing"]), validate=True))
        public_half(signing)
        if "joined.json" not in data:
            return signing, None
        joined = json.loads(base64.b64decode(data["joined.json"]))
        pin = None if joined["pin"] is None else read_base64url(joined["pin"])
        return signing, Membership(
            str(joined["url"]),
            pin,
            str(joined["mesh"]),
            str(joined["registry"]),
            PublicKey.parse(str(joined["registryKey"])),
            str(joined["tokenID"]),
            signing,
        )
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ConfigError(
            f"the Secret {SECRET} is damaged ({type(error).__name__} {error}): restore it; or delete it, and "
            "join again with a new single-use token"
        ) from None


async def _new_key(client: KubeClient, namespace: str) -> Secret:
    signing = Secret(secrets.token_bytes(32))
    text = base64.b64encode(base64.b64encode(signing.raw)).decode()
    body = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": SECRET, "namespace": namespace},
        "type": "scope.ltgc.cc/cluster",
        "data": {"signing": text},
    }
    await client.ask("POST", secrets_path(namespace), body=body)
    return signing


async def _keep(client: KubeClient, namespace: str, membership: Membership) -> None:
    document = {
        "url": membership.url,
        "pin": None if membership.pin is None else base64url(membership.pin),
        "mesh": membership.mesh,
        "registry": membership.registry,
        "registryKey": str(membership.registry_key),
        "tokenID": membership.token_id,
    }
    text = base64.b64encode(json.dumps(document).encode()).decode()
    await client.ask(
        "PATCH", secret_path(SECRET, namespace), body={"data": {"joined.json": text}}, content_type=MERGE
    )
