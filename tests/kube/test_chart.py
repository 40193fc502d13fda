"""The chart, by the real Helm against a real API server: what it refuses, installs, upgrades and leaves.

No kubelet runs here. Workloads are read back as objects, and the operator runs as a process with the
arguments, the ServiceAccount and the mesh that the installed Deployment gives it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import chart
import pytest
import yaml
from kubelab import MERGE, ApiError, ControlPlane, KubeLabError
from kubelab.programs import kubernetes_program

from tests.docs_fixture import blocks
from tests.kube.operator_fixture import MESHES, PEERS, Replica, addresses, end, eventually

NAMESPACE = "scope-system"
CORE, APPS = f"/api/v1/namespaces/{NAMESPACE}", f"/apis/apps/v1/namespaces/{NAMESPACE}"
BATCH = f"/apis/batch/v1/namespaces/{NAMESPACE}"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
PATIENCE_S = 180.0  # an operator starts in two seconds of processor time; the machine may be busy
SPEC = {"addressing": {"ipv4": "100.64.0.0/16"}}
MESH = {"name": "home", "spec": SPEC}


class Helm:
    """The real one, in front of one cluster, with nothing of the user's own."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self._env = {
            "PATH": os.defpath,
            "HOME": str(directory),
            "KUBECONFIG": str(plane.kubeconfig()),
            "HELM_NAMESPACE": NAMESPACE,
        }

    def __call__(self, *arguments: str, values: Mapping[str, object] | None = None) -> str:
        """What it prints; KubeLabError with its reason when it fails."""
        given = [] if values is None else ["--values=-"]
        done = subprocess.run(
            [kubernetes_program("helm"), *arguments, *given],
            env=self._env,
            input=json.dumps(values),
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        if done.returncode != 0:
            raise KubeLabError(done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    """A control plane that knows nothing of Scope: the chart brings the definitions."""
    made = ControlPlane()
    try:
        asyncio.run(made.start())
        asyncio.run(_make_namespace(made, NAMESPACE, level="privileged"))
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def helm(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(plane, tmp_path_factory.mktemp("helm"))


@pytest.fixture(scope="module")
def packaged(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The archive that users install."""
    directory = tmp_path_factory.mktemp("package")
    helm("package", str(chart.CHART), f"--destination={directory}")
    [archive] = directory.iterdir()
    return str(archive)


async def _make_namespace(plane: ControlPlane, name: str, *, level: str) -> None:
    """A namespace of that level of Pod Security, with the account that a controller makes elsewhere."""
    labels = {"pod-security.kubernetes.io/enforce": level}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "default", "namespace": name},
    }
    await plane.apply(namespace, account)


def rendered(helm: Helm, values: Mapping[str, object]) -> list[dict[str, Any]]:
    """Every object of the chart but the definitions."""
    text = helm("template", "scope", str(chart.CHART), "--set=crds.install=false", values=values)
    return [document for document in yaml.safe_load_all(text) if document]


def only(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    [found] = [each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod_of(workload: Mapping[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = workload["spec"]["template"]["spec"]
    return spec


# --- without a cluster --------------------------------------------------------------------------------------


def test_the_chart_is_lint_free(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(chart.CHART))


def test_the_plain_manifests_are_what_the_chart_makes() -> None:
    stale = [path.name for path, text in chart.manifests() if path.read_text() != text]
    assert not stale, "run .venv/bin/python hack/chart.py"


def test_the_readme_and_the_schema_are_what_values_and_definitions_say() -> None:
    assert chart.README.read_text() == chart.readme()
    assert chart.SCHEMA.read_text() == chart.schema()


def test_every_value_that_is_taken_is_described() -> None:
    described = {path for path, _ in chart.described(chart.VALUES.read_text())}

    def taken(schema: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        if path in described or "properties" not in schema:
            yield path
            return
        for name, inner in schema["properties"].items():
            yield from taken(inner, (*path, name))

    # Helm itself hands `global` to every chart.
    assert set(taken(json.loads(chart.SCHEMA.read_text()))) == described | {("global",)}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"clusterNam": "fra"}, "clusterNam"),
        ({"clusterName": "Fra"}, "/clusterName"),
        ({"gateway": {"service": {"type": "Loadbalancer"}}}, "/gateway/service/type"),
        ({"agent": {"maxUnavailable": "ten"}}, "/agent/maxUnavailable"),
        ({"registry": {"url": "registry.example.net"}}, "/registry/url"),
        ({"mesh": {"name": "home", "spec": {"addresing": {}}}}, "addresing"),
        ({"mesh": {"name": "home"}}, "spec"),
        ({"mesh": MESH, "registry": {"url": "https://registry.example.net"}}, "set mesh there"),
        ({"mesh": MESH, "operator": {"enabled": False}}, "enable the operator"),
        ({"gateway": {"tls": {"source": "CertManager"}}}, "gateway.tls.issuer.name"),
        ({"gateway": {"service": {"type": "NodePort"}}}, "gateway.service.nodePorts"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_a_wrong_value_is_refused_by_its_name(helm: Helm, values: dict[str, object], named: str) -> None:
    with pytest.raises(KubeLabError, match=re.escape(named)):
        rendered(helm, values)


def test_a_certificate_of_cert_manager_keeps_its_key_and_is_for_what_is_advertised(helm: Helm) -> None:
    advertise = ["scope.example.net:443", "2001:db8::1", "[2001:db8::2]:443", "192.0.2.7:443"]
    tls = {"source": "CertManager", "pinned": True, "issuer": {"name": "ours", "kind": "Issuer"}}
    documents = rendered(helm, {"gateway": {"advertise": advertise, "tls": tls}})
    certificate = only(documents, "Certificate", "scope-gateway")["spec"]
    assert certificate["privateKey"]["rotationPolicy"] == "Never"
    assert certificate["dnsNames"] == ["scope.example.net"]
    assert certificate["ipAddresses"] == ["2001:db8::1", "2001:db8::2", "192.0.2.7"]
    pod = pod_of(only(documents, "Deployment", "scope-operator"))
    assert {"--tls-cert=/etc/scope-tls/tls.crt", "--tls-pinned"} <= {*pod["containers"][0]["args"]}
    assert {"name": "tls", "secret": {"secretName": certificate["secretName"]}} in pod["volumes"]


def test_monitors_choose_what_the_chart_installs(helm: Helm) -> None:
    labels = {"release": "prometheus"}
    on = {"enabled": True, "labels": labels}
    documents = rendered(helm, {"metrics": {"serviceMonitor": on, "podMonitor": on}})
    pods = only(documents, "Deployment", "scope-operator")["spec"]["template"]
    ports = {port["name"] for port in pods["spec"]["containers"][0]["ports"]}
    service = only(documents, "Service", "scope-operator")
    by_pod = only(documents, "PodMonitor", "scope-operator")
    by_service = only(documents, "ServiceMonitor", "scope-operator")
    assert by_pod["spec"]["selector"]["matchLabels"].items() <= pods["metadata"]["labels"].items()
    assert by_service["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {each["port"] for each in by_pod["spec"]["podMetricsEndpoints"]} <= ports
    assert {each["port"] for each in by_service["spec"]["endpoints"]} <= {
        port["name"] for port in service["spec"]["ports"]
    }
    assert labels.items() <= by_service["metadata"]["labels"].items()


# --- what the API server says -------------------------------------------------------------------------------

NODE_PORTS = {"gateway": 30443, "reflector1": 30478, "reflector2": 30479}
VARIANTS: dict[str, dict[str, object]] = {
    "as it is": {},
    "everything": {
        "clusterName": "fra",
        "image": {"digest": f"sha256:{'0' * 64}"},
        "imagePullSecrets": [{"name": "pull"}],
        "gateway": {
            "advertise": ["scope.example.net"],
            "service": {"type": "NodePort", "nodePorts": NODE_PORTS},
            "tls": {"source": "Secret", "secretName": "own"},
        },
        "operator": {"affinity": {"nodeAffinity": {}}, "podLabels": {"team": "net"}},
        "agent": {"lowPorts": True, "tun": True, "apiServer": {"host": "2001:db8::1"}, "maxUnavailable": 2},
        "wireguard": {"enabled": True, "devices": ["scope0", "scope1"]},
        "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}]},
        "mesh": MESH,
        "services": {"export": True},
        "cleanup": {"onUninstall": True},
        "cni": "Scope",
    },
    "a cluster that joins": {
        "clusterName": "ams",
        "registry": {"url": "https://scope.example.net:7443"},
        "networkPolicy": {"enabled": True},
        "cleanup": {"onUninstall": True},
    },
    "agents alone": {"operator": {"enabled": False}, "crds": {"install": False}},
}


@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_the_api_server_takes_every_object_of_the_chart(
    plane: ControlPlane, helm: Helm, values: dict[str, object]
) -> None:
    text = helm("template", "scope", str(chart.CHART), values=values)
    how = ("--server-side", "--dry-run=server", "--validate=strict")
    taken = asyncio.run(plane.kubectl("apply", *how, "-f", "-", document=text))
    assert taken.count("serverside-applied") == len(re.findall(r"^kind: ", text, re.MULTILINE)) > 3


def _certificates() -> dict[str, Any]:
    """What the definition of cert-manager's Certificate says of the fields that the chart may use."""
    text: dict[str, Any] = {"type": "string"}
    texts = {"type": "array", "items": text}
    key = {
        "algorithm": {"type": "string", "enum": ["RSA", "ECDSA", "Ed25519"]},
        "size": {"type": "integer"},
        "encoding": {"type": "string", "enum": ["PKCS1", "PKCS8"]},
        "rotationPolicy": {"type": "string", "enum": ["Never", "Always"]},
    }
    issuer = {
        "type": "object",
        "properties": dict.fromkeys(("name", "kind", "group"), text),
        "required": ["name"],
    }
    spec = {
        "type": "object",
        "required": ["issuerRef", "secretName"],
        "properties": {
            "secretName": text,
            "dnsNames": texts,
            "ipAddresses": texts,
            "issuerRef": issuer,
            "privateKey": {"type": "object", "properties": key},
        },
    }
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "certificates.cert-manager.io"},
        "spec": {
            "group": "cert-manager.io",
            "scope": "Namespaced",
            "names": {"kind": "Certificate", "plural": "certificates", "singular": "certificate"},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }


def test_the_certificate_of_cert_manager_fits_its_definition(plane: ControlPlane, helm: Helm) -> None:
    tls = {"source": "CertManager", "issuer": {"name": "ours"}}
    gateway = {"advertise": ["scope.example.net", "192.0.2.7:443"], "tls": tls}
    text = json.dumps(only(rendered(helm, {"gateway": gateway}), "Certificate", "scope-gateway"))
    path = f"{DEFINITIONS}/certificates.cert-manager.io"
    how = ("--server-side", "--dry-run=server", "--validate=strict")

    async def body() -> None:
        async def taken() -> bool:
            try:
                return "serverside-applied" in await plane.kubectl("apply", *how, "-f", "-", document=text)
            except KubeLabError as error:
                if "no matches for kind" not in str(error):  # it is not served yet
                    raise
                return False

        async def is_gone() -> bool:
            try:
                await plane.request("GET", path)
            except ApiError as error:
                return error.status == 404
            return False

        await plane.apply(_certificates())
        try:
            await eventually(taken, within=PATIENCE_S)
        finally:
            await plane.request("DELETE", path)
            await eventually(is_gone, within=PATIENCE_S)

    asyncio.run(body())


def test_services_and_endpoints_are_the_operators_to_write_only_where_they_are_exported(helm: Helm) -> None:
    for export in (False, True):
        documents = rendered(helm, {"services": {"export": export}})
        ruled = {
            named
            for each in documents
            if each["kind"] in ("Role", "ClusterRole")
            for rule in each["rules"]
            for named in rule.get("resources", ())
        }
        assert ({"services", "endpointslices"} <= ruled) == export
        [operator] = pod_of(only(documents, "Deployment", "scope-operator"))["containers"]
        assert ("--export-services" in operator["args"]) == export


def test_a_joining_cluster_gets_no_gateway_and_no_rights_for_its_agents(helm: Helm) -> None:
    documents = rendered(helm, VARIANTS["a cluster that joins"])
    names = {(each["kind"], each["metadata"]["name"]) for each in documents}
    assert ("Service", "scope-gateway") not in names
    assert not {name for kind, name in names if kind == "ValidatingAdmissionPolicy"}
    assert ("ClusterRole", "scope-agent") not in names
    operator = pod_of(only(documents, "Deployment", "scope-operator"))
    assert "--join-string-file=/etc/scope-join/join-string" in operator["containers"][0]["args"]
    assert {"secretName": "scope-join", "optional": True} in [
        volume.get("secret") for volume in operator["volumes"]
    ]
    agent = pod_of(only(documents, "DaemonSet", "scope-agent"))
    assert "--gateway=/var/run/secrets/scope-gateway" in agent["containers"][0]["args"]
    [cleanup] = pod_of(only(documents, "Job", "scope-cleanup"))["containers"]
    assert "--registry-url=https://scope.example.net:7443" in cleanup["args"]
    [rule] = only(documents, "Role", "scope-cleanup")["rules"]
    assert (rule["resourceNames"], rule["verbs"]) == (["scope-cluster"], ["get"])
    [rule] = only(documents, "ClusterRole", "scope-cleanup")["rules"]
    assert rule["resources"] == ["namespaces"]


def test_behind_node_ports_the_reflector_listens_on_the_numbers_that_peers_are_told(helm: Helm) -> None:
    documents = rendered(helm, VARIANTS["everything"])
    [container] = pod_of(only(documents, "Deployment", "scope-operator"))["containers"]
    assert "--reflector-ports=30478,30479" in container["args"]
    listening = {port["name"]: port["containerPort"] for port in container["ports"]}
    service = only(documents, "Service", "scope-gateway")["spec"]
    for port in service["ports"]:
        if port["name"] != "gateway":
            assert port["port"] == port["nodePort"] == listening[port["targetPort"]]
    assert service["externalTrafficPolicy"] == "Local"


def test_a_cluster_that_is_too_old_is_refused(helm: Helm) -> None:
    with pytest.raises(KubeLabError, match=r"requires kubeVersion: >=1\.32\.0-0"):
        helm("template", "scope", str(chart.CHART), "--kube-version=1.31.9")


def test_the_chart_installs_the_version_that_this_tree_is(helm: Helm) -> None:
    project = tomllib.loads((chart.ROOT / "pyproject.toml").read_text())["project"]
    about = yaml.safe_load(helm("show", "chart", str(chart.CHART)))
    assert about["appVersion"] == project["version"]


def test_a_budget_for_disruptions_is_for_several_replicas(helm: Helm) -> None:
    kinds = {each["kind"] for each in rendered(helm, {"operator": {"replicas": 1}})}
    assert "PodDisruptionBudget" not in kinds
    assert "PodDisruptionBudget" in {each["kind"] for each in rendered(helm, {})}


def test_agent_and_user_space_wireguard_meet_on_the_node_and_the_agent_opens_no_tunnel_itself(
    helm: Helm,
) -> None:
    documents = rendered(helm, {"wireguard": {"enabled": True, "devices": ["scope0", "scope1"]}})

    def mounted(name: str) -> list[dict[str, str]]:
        pod = pod_of(only(documents, "DaemonSet", name))
        volumes = {each["name"]: each["hostPath"]["path"] for each in pod["volumes"] if "hostPath" in each}
        return [
            {
                volumes[mount["name"]]: mount["mountPath"]
                for mount in each["volumeMounts"]
                if mount["name"] in volumes
            }
            for each in pod["containers"]
        ]

    met = {path: path for path in ("/run/scope", "/run/wireguard")}
    assert mounted("scope-wireguard") == [met | {"/dev/net/tun": "/dev/net/tun"}] * 2
    assert mounted("scope-agent") == [
        met | {"/var/lib/scope": "/var/lib/scope", "/proc/sys/net": "/host/proc/sys/net"}
    ]
    containers = pod_of(only(documents, "DaemonSet", "scope-wireguard"))["containers"]
    assert [each["args"] for each in containers] == [
        [name, "--state", f"/run/scope/wireguard/{name}.json", "--take-over"] for name in ("scope0", "scope1")
    ]
    [agent] = pod_of(only(documents, "DaemonSet", "scope-agent"))["containers"]
    assert "--wireguard-beside" in agent["args"]


def test_user_space_wireguard_is_replaced_by_one_that_stands_by(helm: Helm) -> None:
    workload = only(rendered(helm, {"wireguard": {"enabled": True}}), "DaemonSet", "scope-wireguard")
    assert workload["spec"]["updateStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
    }


def test_low_ports_are_a_capability_of_their_own(helm: Helm) -> None:
    def added(values: Mapping[str, object]) -> list[str]:
        agent = pod_of(only(rendered(helm, values), "DaemonSet", "scope-agent"))
        capabilities: list[str] = agent["containers"][0]["securityContext"]["capabilities"]["add"]
        return capabilities

    assert added({}) == ["NET_ADMIN", "NET_RAW"]
    assert added({"agent": {"lowPorts": True}}) == ["NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE"]


def test_agents_are_given_what_is_said_of_their_environment(helm: Helm) -> None:
    given = {"SCOPE_IDENTITY_TRUST": "pinned", "SCOPE_KEY_SUITE": "2"}
    agent = pod_of(only(rendered(helm, {"agent": {"env": given}}), "DaemonSet", "scope-agent"))
    environment = agent["containers"][0]["env"]
    assert [each for each in environment if each["name"] in given] == [
        {"name": name, "value": value} for name, value in given.items()
    ]
    with pytest.raises(KubeLabError, match=r"agent.*env"):
        rendered(helm, {"agent": {"env": {"SCOPE_KEY_SUITE": 2}}})


def test_the_operator_runs_where_pod_security_is_restricted_and_an_agent_does_not(
    plane: ControlPlane, helm: Helm
) -> None:
    documents = rendered(helm, VARIANTS["everything"])

    async def admitted(spec: dict[str, Any]) -> None:
        spec = {key: value for key, value in spec.items() if key != "serviceAccountName"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"generateName": "tried-"}, "spec": spec}
        await plane.request("POST", "/api/v1/namespaces/restricted/pods?dryRun=All", pod)

    async def body() -> None:
        await _make_namespace(plane, "restricted", level="restricted")
        await admitted(pod_of(only(documents, "Deployment", "scope-operator")))
        await admitted(only(documents, "Pod", "scope-test")["spec"])
        await admitted(pod_of(only(documents, "Job", "scope-cleanup")))
        with pytest.raises(ApiError, match="PodSecurity"):
            await admitted(pod_of(only(documents, "DaemonSet", "scope-agent")))

    asyncio.run(body())


def test_the_commands_of_the_page_for_beginners_install_both_clusters(
    plane: ControlPlane, helm: Helm, tmp_path: Path
) -> None:
    """Those that need no kubelet, in their order; both clusters' on this one, one after the other."""
    programs = f"{Path(kubernetes_program('helm')).parent}:{Path(kubernetes_program('kubectl')).parent}"
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "KUBECONFIG": str(plane.kubeconfig()),
    }
    walked = [block for block in blocks(chart.ROOT / "docs" / "getting-started.md") if block.places]
    assert [block.places for block in walked] == [("fra",), ("ams",)]
    for block in walked:
        subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", block.text],
            env=environment,
            cwd=chart.ROOT,
            check=True,
            capture_output=True,
            timeout=180,
        )
        given = json.loads(helm("get", "values", "scope", "--output=json"))
        assert given["clusterName"] in block.places
        helm("uninstall", "scope")
    joining = asyncio.run(plane.request("GET", f"{CORE}/secrets/scope-join"))
    assert base64.b64decode(joining["data"]["join-string"]) == b"JOIN STRING\n"


# --- a release from its installation to its removal ---------------------------------------------------------


class Release:
    """An installed release, and what its Deployment runs."""

    def __init__(self, plane: ControlPlane, directory: Path) -> None:
        self.plane = plane
        self._directory = directory
        self._runs = 0
        self._jobs: set[str] = set()  # uids of those that ran

    async def get(self, path: str) -> Any:
        """An object; None where there is none."""
        try:
            return await self.plane.request("GET", path)
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Replica]:
        """The operator as the Deployment says, on ports of its own."""
        deployment = await self.plane.request("GET", f"{APPS}/deployments/scope-operator")
        pod = pod_of(deployment)
        [container] = pod["containers"]
        cluster = (await self.plane.request("GET", f"{CORE}/configmaps/scope-cluster"))["data"]["cluster"]
        arguments = [each.replace("$(SCOPE_CLUSTER)", cluster) for each in container["args"]]
        for mount in container.get("volumeMounts", ()):
            [volume] = [each for each in pod["volumes"] if each["name"] == mount["name"]]
            data = (await self.plane.request("GET", f"{CORE}/configmaps/{volume['configMap']['name']}"))[
                "data"
            ]
            place = self._directory / mount["name"]
            place.mkdir(exist_ok=True)
            for name, text in data.items():
                (place / name).write_text(text)
            arguments = [each.replace(mount["mountPath"], str(place)) for each in arguments]
        token = await self.plane.token(pod["serviceAccountName"], namespace=NAMESPACE)
        self._runs += 1
        log = self.plane.logs / f"operator-{self._runs}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                str(Path(sys.executable).parent / container["command"][0]),
                *arguments,
                f"--namespace={NAMESPACE}",
                f"--kubeconfig={self.plane.kubeconfig(token=token)}",
                "--metrics-address=127.0.0.1",
                "--metrics-port=0",
                "--listen=127.0.0.1:0",
                "--reflector-ports=0,0",
                stdout=output,
                stderr=output,
            )
        try:
            yield Replica(process, log)
        finally:
            if process.returncode is None:
                process.terminate()  # hands the Lease back: the next one need not wait for it
                try:
                    await asyncio.wait_for(process.wait(), PATIENCE_S)
                finally:
                    await end(process)

    async def address(self, peer: str) -> str:
        """The address of a peer, once it has one."""

        async def given() -> str | None:
            found = await self.get(f"{PEERS}/{peer}")
            return next(iter(addresses(found)), None) if found else None

        return await eventually(given, within=PATIENCE_S)

    async def report(self, peer: str, *, left: bool) -> None:
        """Write what the agent of a peer says."""
        keys = {name: base64.b64encode(bytes(32)).decode() for name in ("wireGuard", "probe", "signing")}
        status = {"status": {"keys": keys, "left": left}}
        await self.plane.request("PATCH", f"{PEERS}/{peer}/status", status, content_type=MERGE)

    async def comes_back(self, peer: str) -> None:
        """Return when a peer is no longer told to leave."""

        async def stays() -> bool:
            return "leaving" not in (await self.get(f"{PEERS}/{peer}"))["spec"]

        await eventually(stays, within=PATIENCE_S)

    async def cleans_up(self, *, code: int) -> str:
        """Run the one Job that has not run, as its kubelet does, and tell how it ended: what it said."""

        async def made() -> dict[str, Any] | None:
            job = await self.get(f"{BATCH}/jobs/scope-cleanup")
            return job if job and job["metadata"]["uid"] not in self._jobs else None

        job = await eventually(made, within=PATIENCE_S)
        self._jobs.add(job["metadata"]["uid"])
        pod = pod_of(job)
        [container] = pod["containers"]
        token = await self.plane.token(pod["serviceAccountName"], namespace=NAMESPACE)
        access = [f"--kubeconfig={self.plane.kubeconfig(token=token)}", f"--namespace={NAMESPACE}"]
        arguments = [each.replace("$(SCOPE_CLUSTER)", "fra") for each in container["args"]]
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).parent / container["command"][0]),
            *arguments,
            *access,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode == code, said.decode()
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ended = ("SuccessCriteriaMet", "Complete") if code == 0 else ("FailureTarget", "Failed")
        conditions = [
            {"type": each, "status": "True", "lastTransitionTime": now, "reason": "Ended"} for each in ended
        ]
        status = {"startTime": now, "conditions": conditions} | ({"completionTime": now} if code == 0 else {})
        await self.plane.request(
            "PATCH", f"{BATCH}/jobs/scope-cleanup/status", {"status": status}, content_type=MERGE
        )
        return said.decode()

    async def listen_port(self, wanted: int) -> None:
        """Return when the mesh has this port; 0 for none."""

        async def same() -> bool:
            return bool((await self.get(f"{MESHES}/home"))["spec"].get("listenPort", 0) == wanted)

        await eventually(same, within=PATIENCE_S)

    async def gateway_key(self) -> str:
        """The gateway's key, once the leader has made it."""

        async def made() -> str | None:
            secret = await self.get(f"{CORE}/secrets/scope-gateway")
            return secret and base64.b64decode(secret["data"]["tls.key"]).decode()

        return await eventually(made, within=PATIENCE_S)


async def passes_helm_test(replica: Replica, pod: Mapping[str, Any]) -> None:
    """Run the container of `helm test` here, with the operator's own ports in place of its Services'."""
    [container] = pod["spec"]["containers"]

    async def gateway() -> str | None:
        found = re.search(r"gateway\.serving .*listening=(\S+)", replica.text)
        return found and f"https://{found[1]}"

    at = {
        "SCOPE_OPERATOR": urlsplit(await replica.metrics_url()),
        "SCOPE_GATEWAY": urlsplit(await eventually(gateway, within=PATIENCE_S)),
    }
    told = {f"{name}_SERVICE_HOST": str(url.hostname) for name, url in at.items()}
    told |= {f"{name}_SERVICE_PORT": str(url.port) for name, url in at.items()}
    code, said = await _run_test(container, told)
    assert (code, said.count("answers")) == (0, 2), said
    # A kubelet tells no address of a Service that is not there.
    code, said = await _run_test(container, {})
    assert code == 1
    assert "Service scope-operator: this pod was told no address" in said


async def _run_test(container: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Its exit status, and what it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *container["command"][1:],
        *container["args"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    return process.returncode, printed.decode()


@pytest.fixture
def release(plane: ControlPlane, tmp_path: Path) -> Release:
    return Release(plane, tmp_path)


@pytest.fixture
def newer(tmp_path: Path) -> str:
    """The chart of a later version: another one of Scope, and a definition with a field more."""
    copy = tmp_path / "newer"
    shutil.copytree(chart.CHART, copy)
    about = copy / "Chart.yaml"
    about.write_text(about.read_text().replace("0.1.0", "0.2.0"))
    path = copy / "files" / "crds" / "scopemeshes.yaml"
    before = " " * 16 + "addressing:\n"
    first, found, rest = path.read_text().partition(before)
    assert found
    path.write_text(f"{first}{' ' * 16}later: {{type: string, maxLength: 63}}\n{before}{rest}")
    return str(copy)


def test_a_release_is_installed_upgraded_rolled_back_removed_and_installed_again_under_two_names(
    plane: ControlPlane, helm: Helm, packaged: str, newer: str, release: Release
) -> None:
    values: dict[str, object] = {
        "clusterName": "fra",
        "mesh": MESH,
        "wireguard": {"enabled": True},
        "gateway": {"service": {"type": "ClusterIP"}},
    }

    async def body() -> None:
        await plane.create_node("n1")

        notes = helm("install", "scope", packaged, values=values)
        assert "pod-security.kubernetes.io/enforce=privileged" in notes
        async with release.operator() as replica:
            address = await release.address("home.fra.n1")
            key = await release.gateway_key()
            [pod] = yaml.safe_load_all(helm("get", "hooks", "scope"))
            await passes_helm_test(replica, pod)

        # Agents are replaced, the pods that carry user-space WireGuard are not.
        agent, wireguard = f"{APPS}/daemonsets/scope-agent", f"{APPS}/daemonsets/scope-wireguard"
        before = [await plane.request("GET", path) for path in (agent, wireguard)]
        changed = {"name": "home", "spec": {**SPEC, "listenPort": 51820}}
        helm("upgrade", "scope", newer, values={**values, "mesh": changed})
        after = [await plane.request("GET", path) for path in (agent, wireguard)]
        assert pod_of(before[0])["containers"][0]["image"] == "scope-mesh:0.1.0"
        assert pod_of(after[0])["containers"][0]["image"] == "scope-mesh:0.2.0"
        assert after[1]["spec"] == before[1]["spec"]
        assert after[1]["metadata"]["generation"] == before[1]["metadata"]["generation"]
        async with release.operator():
            await release.listen_port(51820)
            assert await release.address("home.fra.n1") == address
            assert await release.gateway_key() == key

        # What only the newer definition knows is in the way of nothing.
        await plane.request("PATCH", f"{MESHES}/home", {"spec": {"later": "x"}}, content_type=MERGE)
        helm("rollback", "scope", "1")
        assert pod_of(await plane.request("GET", agent))["containers"][0]["image"] == "scope-mesh:0.1.0"
        async with release.operator():
            await release.listen_port(0)
            assert await release.address("home.fra.n1") == address

        # A mesh that the values name no more stays.
        helm("upgrade", "scope", packaged, values={"clusterName": "fra"})
        assert await release.get(f"{CORE}/configmaps/scope-mesh") is None
        assert await release.get(wireguard) is None
        assert await release.get(f"{MESHES}/home")

        helm("uninstall", "scope")
        assert await release.get(f"{APPS}/deployments/scope-operator") is None
        assert await release.get(agent) is None
        assert len((await plane.request("GET", DEFINITIONS))["items"]) == 3
        assert await release.address("home.fra.n1") == address

        helm("install", "scope", packaged, values={"clusterName": "fra"})
        helm("uninstall", "scope")
        with pytest.raises(KubeLabError, match="invalid ownership metadata"):
            helm("install", "other", packaged, values={"clusterName": "fra"})
        helm("install", "other", packaged, "--take-ownership", values={"clusterName": "fra"})
        await plane.create_node("n2")
        async with release.operator():
            assert await release.address("home.fra.n2") != address
            assert await release.address("home.fra.n1") == address
            assert await release.gateway_key() == key

        # Nodes leave before the release goes, or it stays; the next one lets them come back as they were.
        cleanup = {"onUninstall": True, "timeoutSeconds": 1}
        helm("upgrade", "other", packaged, values={"clusterName": "fra", "cleanup": cleanup})
        for name in ("home.fra.n1", "home.fra.n2"):
            await release.report(name, left=False)
        removing = asyncio.create_task(asyncio.to_thread(helm, "uninstall", "other"))
        assert "Node n1, mesh home: its agent" in await release.cleans_up(code=1)
        with pytest.raises(KubeLabError, match="scope-cleanup failed"):
            await removing
        assert await release.get(agent)
        for name in ("home.fra.n1", "home.fra.n2"):
            assert (await plane.request("GET", f"{PEERS}/{name}"))["spec"]["leaving"]
            await release.report(name, left=True)
        removing = asyncio.create_task(asyncio.to_thread(helm, "uninstall", "other"))
        assert "leaving.done left=2" in await release.cleans_up(code=0)
        await removing
        for path in (agent, f"{BATCH}/jobs/scope-cleanup", f"{CORE}/serviceaccounts/scope-cleanup"):
            assert await release.get(path) is None

        helm("install", "other", packaged, "--take-ownership", values={"clusterName": "fra"})
        async with release.operator():
            for name in ("home.fra.n1", "home.fra.n2"):
                await release.comes_back(name)
            assert await release.address("home.fra.n1") == address

    asyncio.run(body())
