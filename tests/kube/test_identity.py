"""What an agent may write on a real API server: its own part of its own Node's ScopePeers, and its own Lease.

The tokens are bound to a Node, as the kubelet's are; the rights and policies are those of `charts/manifests`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scope_agent.__main__ as agent_program
import yaml
from kubelab import APPLY, MERGE, ApiError, ControlPlane
from scope_operator.kube import __main__ as operator_program
from scope_operator.kube.cluster import list_nodes
from scope_operator.plan.nodes import NodePeers

from scope import resources
from scope.model import (
    Assignment,
    Candidate,
    CandidateKind,
    Endpoint,
    JoinToken,
    Kind,
    Mesh,
    MeshStatus,
    Meta,
    Peer,
    PeerKeys,
    PeerReport,
    PublicKey,
    Role,
    TokenSpec,
)
from scope.registry.kube.access import from_kubeconfig
from scope.registry.kube.client import KubeClient
from scope.registry.kube.registry import KubeRegistry
from scope.registry.port import Put
from scope.resources import parse_peer
from tests import resource_corpus as corpus

MANIFESTS = Path(__file__).parents[2] / "charts" / "manifests"
NAMESPACE = "scope-system"
CLUSTER = "default"  # as 10-cluster.yaml has it
PEERS = f"/apis/{resources.API_VERSION}/scopepeers"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
ACTIVE_S = 120.0  # policies take seconds to become active; the machine may be busy

KEYS = PeerKeys(*(PublicKey.parse(corpus.KEYS[name]) for name in ("wireGuard", "probe", "signing")))
REPORT = PeerReport(KEYS, (Candidate(Endpoint.parse("192.0.2.1:51820"), CandidateKind.HOST),))
ASSIGNED = {
    "addresses": ["100.80.0.7/16"],
    "role": "Edge",
    "online": True,
    "lastSeen": "2026-01-31T12:00:00Z",
    "conditions": [{"type": "Ready", "status": "True", "reason": "Ready", "message": "online"}],
}


class Cluster:
    """A cluster with Nodes n1 and n2, and a ScopePeer for n1; Scope's rights and policies are in force."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.uids: dict[str, str] = {}

    async def prepare(self) -> None:
        """Make the objects."""
        for node in ("n1", "n2"):
            self.uids[node] = await self.plane.create_node(node)
        await self.make_peer("home.default.n1", node="n1")

    async def make_peer(
        self, name: str, *, node: str = "", cluster: str = CLUSTER, uid: str | None = None
    ) -> None:
        """What the operator makes: a ScopePeer with an assignment; without a Node it is an external one."""
        of_node = {"cluster": cluster, "nodeName": node, "nodeUID": uid or self.uids.get(node, "u")}
        peer = corpus.peer(name=name, **of_node if node else {})
        await self.plane.request("POST", PEERS, peer)
        status = {**peer, "status": ASSIGNED}
        path = f"{PEERS}/{name}/status?fieldManager=scope-operator&force=true"
        await self.plane.request("PATCH", path, status, content_type=APPLY)

    async def token(self, node: str | None) -> str:
        """The token of the agent on a Node."""
        return await self.plane.token("scope-agent", namespace=NAMESPACE, node=node)

    async def report(
        self, name: str, *, token: str, more: Mapping[str, object] | None = None, report: object = None
    ) -> Any:
        """Write an agent's part of a status as its adapter does, with fields of the operator's `more`."""
        part = resources.status_to_dict(REPORT) if report is None else report
        assert isinstance(part, dict)
        body = {
            "apiVersion": resources.API_VERSION,
            "kind": "ScopePeer",
            "metadata": {"name": name},
            "status": {**part, **(more or {})},
        }
        path = f"{PEERS}/{name}/status?fieldManager=scope-agent&force=true"
        return await self.plane.request("PATCH", path, body, content_type=APPLY, token=token)

    async def lease(self, name: str, *, token: str, namespace: str = NAMESPACE) -> Any:
        """Renew a Lease."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"holderIdentity": "x", "leaseDurationSeconds": 180},
        }
        path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{name}?fieldManager=scope-agent"
        return await self.plane.request("PATCH", path, body, content_type=APPLY, token=token)

    async def refusal(self, attempt: Awaitable[object]) -> str:
        """What the API server says against it; "" when it lets it pass."""
        try:
            await attempt
        except ApiError as error:
            if error.status not in (403, 422):
                raise
            return str(error)
        return ""


@pytest.fixture(scope="module")
def rights(shared_control_plane: ControlPlane) -> Iterator[None]:
    """Scope's rights and policies; they go with the tests of this file."""
    try:
        asyncio.run(_apply(shared_control_plane))
        yield
    finally:
        asyncio.run(_remove(shared_control_plane))


@pytest.fixture
def cluster(rights: None, control_plane: ControlPlane) -> Cluster:
    """A cluster of this test's own objects."""
    made = Cluster(control_plane)
    asyncio.run(made.prepare())
    return made


async def _apply(plane: ControlPlane) -> None:
    """Apply the manifests, and wait until each policy refuses what it is to refuse."""
    await plane.apply(*sorted(MANIFESTS.glob("[0-4]*.yaml")))
    probe = Cluster(plane)
    # A stranger to every Node: nothing that the tests make is needed to refuse him.
    nobody = await probe.token(None)
    with suppress(ApiError):
        await plane.request("POST", PEERS, corpus.peer(name="probe"))
    deadline = time.monotonic() + ACTIVE_S
    for attempt in (probe.report, probe.lease):
        while (
            not (said := await probe.refusal(attempt("probe", token=nobody))) or "denied request" not in said
        ):
            assert time.monotonic() < deadline, f"no policy is active: {attempt.__name__} {said}"
            await asyncio.sleep(0.2)
    await plane.request("DELETE", f"{PEERS}/probe")


async def _remove(plane: ControlPlane, which: str = "[1-4]*.yaml") -> None:
    """What the manifests made, but the namespace, which nothing would empty here."""
    for path in sorted(MANIFESTS.glob(which), reverse=True):
        await plane.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", str(path))


def sentence(said: str) -> str:
    """What the policy says in a refusal."""
    found = re.search(r"denied request: (.*)", said)
    assert found is not None, said or "it was allowed"
    return found[1]


Attempt = Callable[[Cluster], Coroutine[Any, Any, str]]


def run(cluster: Cluster, attempt: Attempt) -> str:
    return asyncio.run(attempt(cluster))


def test_an_agent_writes_its_own_part_of_its_own_scopepeer_and_nothing_else_changes(cluster: Cluster) -> None:
    async def write() -> Any:
        token = await cluster.token("n1")
        await cluster.report("home.default.n1", token=token)
        again = replace(REPORT, direct=3)
        stored = await cluster.report("home.default.n1", token=token, report=resources.status_to_dict(again))
        return parse_peer(stored)

    peer = asyncio.run(write())
    assert peer.report == replace(REPORT, direct=3)
    assert resources.status_to_dict(peer.assignment) == ASSIGNED


def test_an_agent_renews_its_own_lease(cluster: Cluster) -> None:
    async def renew() -> Any:
        token = await cluster.token("n1")
        await cluster.lease("agent.n1", token=token)
        return await cluster.lease("agent.n1", token=token)

    assert asyncio.run(renew())["metadata"]["name"] == "agent.n1"


def test_an_agent_reads_what_it_needs_and_no_secret(cluster: Cluster) -> None:
    async def read(path: str) -> None:
        await cluster.plane.request("GET", path, token=await cluster.token("n1"))

    for path in (PEERS, f"/apis/{resources.API_VERSION}/scopemeshes", "/api/v1/namespaces/kube-system"):
        asyncio.run(read(path))
    for path in (f"/api/v1/namespaces/{NAMESPACE}/secrets", "/api/v1/nodes", LEASES, "/api/v1/namespaces"):
        with pytest.raises(ApiError, match="is forbidden"):
            asyncio.run(read(path))


def test_another_nodes_agent_is_refused(cluster: Cluster) -> None:
    async def attempt(cluster: Cluster) -> str:
        return await cluster.refusal(cluster.report("home.default.n1", token=await cluster.token("n2")))

    assert sentence(run(cluster, attempt)) == (
        "the agent of Node n2 may write only the ScopePeers of its own Node: "
        "leave this one to the agent of Node n1"
    )


def test_the_agent_of_a_node_of_the_same_name_in_another_cluster_is_refused(cluster: Cluster) -> None:
    async def attempt(cluster: Cluster) -> str:
        await cluster.make_peer("home.ber.n1", node="n1", cluster="ber")
        return await cluster.refusal(cluster.report("home.ber.n1", token=await cluster.token("n1")))

    assert sentence(run(cluster, attempt)) == (
        "this ScopePeer is not of cluster default, whose agents write here: leave it to its own"
    )


def test_a_name_gives_no_right_to_a_scopepeer(cluster: Cluster) -> None:
    """Names are read by nobody: an external peer, or another Node's, may have a name that looks like ours."""

    async def external(cluster: Cluster) -> str:
        await cluster.make_peer("away.default.n1")
        return await cluster.refusal(cluster.report("away.default.n1", token=await cluster.token("n1")))

    async def other(cluster: Cluster) -> str:
        await cluster.make_peer("work.default.n1", node="n2")
        return await cluster.refusal(cluster.report("work.default.n1", token=await cluster.token("n1")))

    assert sentence(run(cluster, external)).startswith("this ScopePeer is not of cluster default")
    assert sentence(run(cluster, other)).endswith("leave this one to the agent of Node n2")


def test_the_agent_of_an_earlier_node_of_the_same_name_is_refused(cluster: Cluster) -> None:
    async def attempt(cluster: Cluster) -> str:
        await cluster.make_peer("work.default.n1", node="n1", uid="another-uid")
        return await cluster.refusal(cluster.report("work.default.n1", token=await cluster.token("n1")))

    assert sentence(run(cluster, attempt)) == (
        "this ScopePeer and this token are of two Nodes that were called n1 one after the other: "
        "restart the agent, and it gets a new token"
    )


def test_a_token_without_a_node_is_refused(cluster: Cluster) -> None:
    async def peer(cluster: Cluster) -> str:
        return await cluster.refusal(cluster.report("home.default.n1", token=await cluster.token(None)))

    async def lease(cluster: Cluster) -> str:
        return await cluster.refusal(cluster.lease("agent.n1", token=await cluster.token(None)))

    for attempt in (peer, lease):
        assert sentence(run(cluster, attempt)) == (
            "this token names no Node, so nobody can say whose agent it is: "
            "use the token of a pod that runs on the Node"
        )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("addresses", ["100.80.0.1/16"], "the operator gives a peer its addresses: an agent must leave"),
        ("role", "Hub", "the operator gives a peer its role: an agent must leave status.role as it is"),
        (
            "conditions",
            [{"type": "Ready", "status": "False", "reason": "Down", "message": ""}],
            "the operator judges a peer: an agent must leave status.conditions as they are",
        ),
        ("online", False, "the operator says whether a peer is online: an agent must leave"),
        (
            "lastSeen",
            "2026-02-01T12:00:00Z",
            "the operator says whether a peer is online: an agent must leave",
        ),
        ("tombstone", corpus.TOMBSTONE, "the operator removes peers: an agent must leave status.tombstone"),
    ],
)
def test_an_agent_cannot_write_what_is_the_operators(
    cluster: Cluster, field: str, value: object, said: str
) -> None:
    async def attempt(cluster: Cluster) -> str:
        token = await cluster.token("n1")
        return await cluster.refusal(cluster.report("home.default.n1", token=token, more={field: value}))

    assert sentence(run(cluster, attempt)).startswith(said)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("addresses", "an agent must leave status.addresses as they are"),
        ("role", "an agent must leave status.role as it is"),
        ("conditions", "an agent must leave status.conditions as they are"),
    ],
)
def test_an_agent_cannot_take_away_what_stands_there(cluster: Cluster, field: str, said: str) -> None:
    async def attempt(cluster: Cluster) -> str:
        token = await cluster.token("n1")
        await cluster.report("home.default.n1", token=token)
        taken = cluster.plane.request(
            "PATCH",
            f"{PEERS}/home.default.n1/status",
            {"status": {field: None}},
            content_type=MERGE,
            token=token,
        )
        return await cluster.refusal(taken)

    assert said in run(cluster, attempt)


def test_an_agent_cannot_take_its_whole_report_back(cluster: Cluster) -> None:
    async def attempt(cluster: Cluster) -> str:
        token = await cluster.token("n1")
        await cluster.report("home.default.n1", token=token)
        return await cluster.refusal(cluster.report("home.default.n1", token=token, report={}))

    assert sentence(run(cluster, attempt)) == (
        "an agent reports its keys with everything else: report keys too"
    )


def test_a_spec_that_is_sent_with_a_status_changes_nothing(cluster: Cluster) -> None:
    async def attempt() -> Any:
        body = {"spec": {"nodeName": "n2", "role": "Hub"}, "status": resources.status_to_dict(REPORT)}
        return await cluster.plane.request(
            "PATCH",
            f"{PEERS}/home.default.n1/status",
            body,
            content_type=MERGE,
            token=await cluster.token("n1"),
        )

    spec = parse_peer(asyncio.run(attempt())).spec
    assert (spec.node_name, str(spec.role)) == ("n1", "Auto")


def test_an_agent_makes_changes_and_deletes_no_scopepeer(cluster: Cluster) -> None:
    async def attempts() -> list[str]:
        token, peer = await cluster.token("n1"), corpus.peer(name="mine")
        own = f"{PEERS}/home.default.n1"
        ask = cluster.plane.request
        return [
            await cluster.refusal(ask("POST", PEERS, peer, token=token)),
            await cluster.refusal(
                ask("PATCH", own, {"spec": {"role": "Hub"}}, content_type=MERGE, token=token)
            ),
            await cluster.refusal(ask("DELETE", own, token=token)),
        ]

    for said in asyncio.run(attempts()):
        assert re.search(
            r'scopepeers.* is forbidden: User ".*scope-agent" cannot (create|patch|delete)', said
        )


@pytest.mark.parametrize("name", ["agent.n2", "scope-operator", "n1", "agent.n1.example", "peer.n1"])
def test_an_agent_writes_no_lease_but_its_own(cluster: Cluster, name: str) -> None:
    async def attempt(cluster: Cluster) -> str:
        return await cluster.refusal(cluster.lease(name, token=await cluster.token("n1")))

    assert sentence(run(cluster, attempt)) == (
        "the agent of Node n1 may write one Lease only: use scope-system/agent.n1"
    )


def test_an_agent_does_not_take_over_a_lease_that_stands(cluster: Cluster) -> None:
    async def attempt(cluster: Cluster) -> str:
        await cluster.lease("agent.n2", token=await cluster.token("n2"))
        return await cluster.refusal(cluster.lease("agent.n2", token=await cluster.token("n1")))

    assert sentence(run(cluster, attempt)).startswith("the agent of Node n1 may write one Lease only")


def test_an_agent_writes_no_lease_in_another_namespace(cluster: Cluster) -> None:
    async def attempt(cluster: Cluster) -> str:
        token = await cluster.token("n1")
        return await cluster.refusal(cluster.lease("agent.n1", token=token, namespace="default"))

    assert "is forbidden" in run(cluster, attempt)


def test_the_clusters_name_is_set_with_one_command(cluster: Cluster) -> None:
    """Last of those that a policy refuses: it changes the policy."""
    page = (MANIFESTS.parents[1] / "docs" / "kubernetes.md").read_text()
    # At the installation and at an upgrade.
    [command] = set(re.findall(r"^(sed .*/\*\.yaml) \| kubectl apply -f -$", page, re.MULTILINE))
    named = subprocess.run(
        ["bash", "-c", command], cwd=MANIFESTS.parents[1], capture_output=True, check=True, text=True
    ).stdout
    documents = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(named)}
    assert documents["ConfigMap", "scope-cluster"]["data"] == {"cluster": "fra"}
    policy = documents["ValidatingAdmissionPolicy", "scope-agent-own-peer"]

    async def attempts() -> str:
        token = await cluster.token("n1")
        await cluster.plane.apply(policy)
        deadline = time.monotonic() + ACTIVE_S
        while not (said := await cluster.refusal(cluster.report("home.default.n1", token=token))):
            assert time.monotonic() < deadline, "the policy has its old name"
            await asyncio.sleep(0.2)
        await cluster.make_peer("home.fra.n1", node="n1", cluster="fra")
        await cluster.report("home.fra.n1", token=token)
        return said

    async def restore() -> None:
        await _apply(cluster.plane)
        token = await cluster.token("n1")
        deadline = time.monotonic() + ACTIVE_S
        while await cluster.refusal(cluster.report("home.default.n1", token=token)):
            assert time.monotonic() < deadline, "the policy has its new name"
            await asyncio.sleep(0.2)

    try:
        said = asyncio.run(attempts())
    finally:
        asyncio.run(restore())
    assert sentence(said).startswith("this ScopePeer is not of cluster fra")


def test_the_operators_writes_are_nobodys_policy(cluster: Cluster) -> None:
    async def write() -> Any:
        token = await cluster.plane.token("scope-operator", namespace=NAMESPACE)
        path = f"{PEERS}/home.default.n1/status?fieldManager=scope-operator&force=true"
        body = {**corpus.peer(name="home.default.n1"), "status": {**ASSIGNED, "role": "Hub"}}
        del body["spec"]
        return await cluster.plane.request("PATCH", path, body, content_type=APPLY, token=token)

    assert parse_peer(asyncio.run(write())).assignment.role == "Hub"


# --- the adapters work with these rights, and need no more -------------------------------------------------


async def _registry(cluster: Cluster, stack: AsyncExitStack, *, token: str) -> KubeRegistry:
    access = await from_kubeconfig(cluster.plane.kubeconfig(token=token))
    client = await stack.enter_async_context(KubeClient(access))
    return KubeRegistry(client, namespace=NAMESPACE)


def test_an_agents_adapter_does_its_work_with_its_rights(cluster: Cluster) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            registry = await _registry(cluster, stack, token=await cluster.token("n1"))
            await registry.list(Kind.MESH)
            listed = await registry.list(Kind.PEER)
            [peer] = listed.resources
            name, uid = peer.meta.name, peer.meta.uid
            await registry.update_status(Kind.PEER, name, REPORT, uid=uid)
            await registry.heartbeat(name)
            changes = registry.watch(Kind.PEER, listed.revision)
            assert isinstance(changes, AsyncGenerator)
            change = await anext(await stack.enter_async_context(aclosing(changes)))
            assert isinstance(change, Put) and isinstance(change.resource, Peer)
            assert change.resource.report == REPORT

    asyncio.run(work())


def test_the_operators_adapter_does_its_work_with_its_rights(cluster: Cluster) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            token = await cluster.plane.token("scope-operator", namespace=NAMESPACE)
            registry = await _registry(cluster, stack, token=token)
            mesh = await registry.create(resources.parse_mesh(corpus.mesh()))
            assert isinstance(mesh, Mesh)
            wider = replace(mesh.spec, listen_port=51820)
            await registry.update(replace(mesh, spec=wider), if_revision=mesh.meta.revision)
            await registry.update_status(
                Kind.MESH, "home", MeshStatus(observed_generation=2), uid=mesh.meta.uid
            )
            peer = await registry.create(parse_peer(corpus.peer(**corpus.NODE)))
            assert isinstance(peer, Peer)
            name, uid = peer.meta.name, peer.meta.uid
            await registry.update_status(Kind.PEER, name, Assignment(role=Role.HUB), uid=uid)
            await registry.heartbeat(name)
            secret = JoinToken(Meta("abc"), TokenSpec(mesh="home", secret_hash=bytes(32), expires=2.0**31))
            made = await registry.create(secret)
            assert isinstance(made, JoinToken)
            await registry.update(replace(made, spec=replace(made.spec, used_by=("m",))))
            for kind in Kind:
                await registry.list(kind)
            await registry.delete(Kind.TOKEN, "abc", uid=made.meta.uid)
            await registry.delete(Kind.PEER, name, uid=uid)
            await registry.delete(Kind.MESH, "home", uid=mesh.meta.uid)
            client = await stack.enter_async_context(
                KubeClient(await from_kubeconfig(cluster.plane.kubeconfig(token=token)))
            )
            listed = await list_nodes(client, NodePeers(cluster=CLUSTER, uid="any"))
            assert {node.name for node in listed.nodes} == {"n1", "n2"}

    asyncio.run(work())


def test_no_right_is_a_wildcard() -> None:
    documents = [each for path in MANIFESTS.glob("*.yaml") for each in yaml.safe_load_all(path.read_text())]
    roles = [each for each in documents if each["kind"] in ("Role", "ClusterRole")]
    assert len(roles) == 6
    for rule in (rule for role in roles for rule in role["rules"]):
        assert not any("*" in value for values in rule.values() for value in values), rule


def test_what_runs_is_taken_by_the_api_server(cluster: Cluster) -> None:
    """The pods too: a namespace of a stricter level would refuse the agent's."""

    async def create() -> dict[str, Any]:
        await cluster.plane.apply(*sorted(MANIFESTS.glob("5*.yaml")))
        apps = f"/apis/apps/v1/namespaces/{NAMESPACE}"
        agent = await cluster.plane.request("GET", f"{apps}/daemonsets/scope-agent")
        operator = await cluster.plane.request("GET", f"{apps}/deployments/scope-operator")
        for made in (agent, operator):
            template = made["spec"]["template"]
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": template["spec"]}
            await cluster.plane.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", pod)
        return {"agent": agent, "operator": operator}

    try:
        made = asyncio.run(create())
    finally:
        for path in sorted(MANIFESTS.glob("5*.yaml")):
            asyncio.run(
                cluster.plane.kubectl("delete", "--wait=false", "--ignore-not-found", "-f", str(path))
            )
    assert made["operator"]["spec"]["replicas"] == 2
    [agent] = made["agent"]["spec"]["template"]["spec"]["containers"]
    assert agent["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}
    assert not agent["securityContext"].get("privileged")


@pytest.mark.parametrize(
    ("manifest", "main"), [("50-operator.yaml", operator_program.main), ("51-agent.yaml", agent_program.main)]
)
def test_the_programs_understand_what_the_manifests_tell_them(
    monkeypatch: pytest.MonkeyPatch, manifest: str, main: Callable[[list[str]], object]
) -> None:
    class Understood(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        parse(parser, arguments)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    [workload] = [
        each
        for each in yaml.safe_load_all((MANIFESTS / manifest).read_text())
        if each["kind"] in {"Deployment", "DaemonSet"}
    ]
    [container] = workload["spec"]["template"]["spec"]["containers"]
    assert container["command"] in (["scope-operator"], ["scope-agent"])
    with pytest.raises(Understood):
        main([argument.replace("$(SCOPE_CLUSTER)", "fra") for argument in container["args"]])
