"""The walk of docs/kubernetes.md, its commands taken from the page, on two real clusters.

The blocks marked `walk` run in their order, each in the cluster, or on the machine, that it names. What
differs from the page: no container runs here, so a stand-in for the kubelet reads Deployment and DaemonSet
back from the API server and runs what they say, with their arguments, environment, Secrets and
ServiceAccounts; and the gateway's name is an address, since the lab has no DNS.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kubelab import ApiError, ControlPlane
from kubelab.programs import BUILT
from lab import Host, Lab, LabError, Nat
from lab.hosts import end

from tests import walk_fixture
from tests.docs_fixture import ROOT

PAGE = ROOT / "docs" / "kubernetes.md"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
# What a pod, or a machine, has to itself.
PRIVATE = ("/var/run/wireguard", "/run/scope", "/var/lib", "/etc/default", ACCOUNT)
NAMESPACE = "scope-system"
APPS = f"/apis/apps/v1/namespaces/{NAMESPACE}"
CORE = f"/api/v1/namespaces/{NAMESPACE}"
PEERS = "/apis/scope.ltgc.cc/v1alpha1/scopepeers"
MESHES = "/apis/scope.ltgc.cc/v1alpha1/scopemeshes"
NODES = ("fra-1", "fra-2")


class Kubelet:
    """Runs the one container of a workload on a host of the lab, as that host's kubelet would."""

    def __init__(self, plane: ControlPlane, host: Host, *, workload: str, node: str = "") -> None:
        self.log = host.directory / f"{workload.rpartition('/')[2]}.log"
        self._plane = plane
        self._host = host
        self._workload = workload
        self._node = node
        self._template: Any = None
        self._process: subprocess.Popen[str] | None = None

    def sync(self) -> None:
        """Run what the workload says now; one whose template is as it was goes on."""
        template = self._get(f"{APPS}/{self._workload}")["spec"]["template"]["spec"]
        if template == self._template and self._process is not None and self._process.poll() is None:
            return
        self.stop()
        self._template = template
        (container,) = template["containers"]
        environment = {each["name"]: self._value(each) for each in container["env"]}
        words = [*container["command"], *container["args"]]
        words = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word) for word in words]
        for path, directory in self._secrets(template, container):
            words = [word.replace(path, str(directory)) for word in words]
        self._sign_in(str(template["serviceAccountName"]))
        address, _, port = self._plane.url.removeprefix("https://").rpartition(":")
        api_server = {"KUBERNETES_SERVICE_HOST": address, "KUBERNETES_SERVICE_PORT": port}
        with self.log.open("a") as log:
            self._process = self._host.popen(
                [str(Path(sys.executable).parent / words[0]), *words[1:]],
                env={"PATH": os.environ["PATH"], **environment, **api_server},
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """End the container as a kubelet does."""
        if self._process is not None:
            end([self._process], grace_s=20.0)

    def _get(self, path: str) -> Any:
        return asyncio.run(self._plane.request("GET", path))

    def _value(self, variable: Mapping[str, Any]) -> str:
        source = variable["valueFrom"]
        if "configMapKeyRef" in source:
            name, key = (source["configMapKeyRef"][field] for field in ("name", "key"))
            return str(self._get(f"{CORE}/configmaps/{name}")["data"][key])
        return {"spec.nodeName": self._node, "metadata.namespace": NAMESPACE}[source["fieldRef"]["fieldPath"]]

    def _secrets(
        self, template: Mapping[str, Any], container: Mapping[str, Any]
    ) -> Iterator[tuple[str, Path]]:
        """Each path at which a Secret is mounted, and where its files are."""
        volumes = {each["name"]: each["secret"] for each in template.get("volumes", ()) if "secret" in each}
        for mount in container.get("volumeMounts", ()):
            if mount["name"] not in volumes:
                continue
            directory = self._host.directory / mount["name"]
            directory.mkdir(exist_ok=True)
            name, optional = (volumes[mount["name"]].get(field) for field in ("secretName", "optional"))
            try:
                data = self._get(f"{CORE}/secrets/{name}")["data"]
            except ApiError as error:
                if error.status != 404 or not optional:
                    raise
                data = {}
            for file in set(os.listdir(directory)) - data.keys():
                (directory / file).unlink()
            for file, text in data.items():
                (directory / file).write_bytes(base64.b64decode(text))
            yield mount["mountPath"], directory

    def _sign_in(self, account: str) -> None:
        token = asyncio.run(
            self._plane.token(account, namespace=NAMESPACE, node=self._node or None, seconds=7200)
        )
        inside = Path(f"/proc/{self._host.holder_pid}/root{os.path.realpath(ACCOUNT)}")
        (inside / "token").write_text(token)
        (inside / "ca.crt").write_bytes(self._plane.authority.certificate.read_bytes())
        (inside / "namespace").write_text(NAMESPACE)


class Walk(walk_fixture.Walk):
    """The page, with two clusters, two Nodes and a machine."""

    passing = (LabError, ApiError)

    def __init__(self, lab: Lab, stack: ExitStack, directory: Path) -> None:
        hosts: dict[str, Host] = {
            "fra": lab.server("fra"),
            "ams": lab.server("ams"),
            "fra-1": lab.site("hosted", nat=Nat.NONE).machine("fra-1"),
            "fra-2": lab.site("office", nat=Nat.PORT_RESTRICTED).machine("fra-2"),
            "berlin": lab.site("home", nat=Nat.FULL_CONE).machine("berlin"),
        }
        super().__init__(PAGE, hosts, registry=hosts["fra"], directory=directory)
        self.planes: dict[str, ControlPlane] = {}
        for name in ("fra", "ams"):
            plane = ControlPlane(host=hosts[name], controllers=True)
            stack.callback(plane.close)
            asyncio.run(plane.start())
            self.planes[name] = plane
            asyncio.run(plane.create_node(f"{name}-1"))
        asyncio.run(self.planes["fra"].create_node("fra-2"))
        self.kubelets = [
            Kubelet(plane, hosts[name], workload="deployments/scope-operator")
            for name, plane in self.planes.items()
        ] + [
            Kubelet(self.planes["fra"], hosts[node], workload="daemonsets/scope-agent", node=node)
            for node in NODES
        ]
        for host in hosts.values():
            for name in ("crds", "charts", "docs"):
                (host.directory / name).symlink_to(ROOT / name)

    def environment(self, place: str) -> dict[str, str]:
        """Where kubectl is, and whose cluster it asks there."""
        found = {"PATH": f"{BUILT}:{os.environ['PATH']}", "HOME": str(self.hosts[place].directory)}
        if place in self.planes:
            found["KUBECONFIG"] = str(self.planes[place].kubeconfig())
        return found

    def ask(self, cluster: str, path: str) -> Any:
        """An object of a cluster; None where there is none."""
        try:
            return asyncio.run(self.planes[cluster].request("GET", path))
        except ApiError as error:
            if error.status != 404:
                raise
            return None

    def ready(self) -> set[str]:
        """The names of the ScopePeers that are ready."""
        listed = self.ask("fra", PEERS) or {"items": ()}
        return {
            peer["metadata"]["name"]
            for peer in listed["items"]
            for condition in peer.get("status", {}).get("conditions", ())
            if (condition["type"], condition["status"]) == ("Ready", "True")
        }

    def peers(self) -> set[str]:
        """The names of all ScopePeers."""
        return {peer["metadata"]["name"] for peer in self.ask("fra", PEERS)["items"]}

    def reaches(self, place: str, peer: str) -> bool:
        """Whether the agent of a place has a direct path to a peer."""
        return self.paths(place).get(peer) == "Direct"

    def tells_direct(self, peer: str, other: str) -> bool:
        """Whether the status of a peer says that its path to the other one is direct."""
        links = self.ask("fra", f"{PEERS}/{peer}")["status"].get("links", ())
        return any(link["peer"] == other and link["path"] == "Direct" for link in links)

    def gateway_serves(self) -> bool:
        """Whether scopectl would be answered; LabError while it is not."""
        self.run("fra", "bash", "-c", f"</dev/tcp/{self.hosts['fra'].ipv4}/7443")
        return True

    def has_left(self, node: str) -> bool:
        """Whether nothing of a mesh is on a Node any more."""
        links = json.loads(self.run(node, "ip", "-json", "link", "show"))
        return "scope0" not in {link["ifname"] for link in links} and not self.run(
            node, "ls", "/var/lib/scope"
        )

    def sync(self, *workloads: int) -> None:
        """Let the kubelets of these workloads look again."""
        for number in workloads:
            self.kubelets[number].sync()


OPERATOR, JOINED, *AGENTS = range(4)  # the kubelets of a walk


def test_the_walk_of_the_kubernetes_page_makes_a_mesh_of_two_clusters_and_a_machine_and_unmakes_it(
    tmp_path: Path,
) -> None:
    nodes = {f"home.fra.{node}" for node in NODES}
    with Lab(private=PRIVATE) as lab, ExitStack() as stack:
        walk = Walk(lab, stack, tmp_path)

        walk.on("charts/manifests/*.yaml")
        walk.sync(OPERATOR, *AGENTS)
        walk.on("docs/examples/mesh.yaml")
        walk.wait_for("both Nodes are peers", lambda: walk.ready() == nodes)
        walk.on("kubectl label node")
        for node, other in (NODES, NODES[::-1]):
            walk.wait_for("a direct path", partial(walk.reaches, node, f"home.fra.{other}"))
        told = partial(walk.tells_direct, *(f"home.fra.{node}" for node in NODES))
        walk.wait_for("its direct link is told", told)
        walk.on(".status.links[*]")
        assert walk.printed.startswith(f"home.fra.{NODES[1]}: Direct ")

        walk.on("--advertise=")
        walk.sync(OPERATOR)
        walk.wait_for("the gateway serves", walk.gateway_serves)
        walk.on("scope-agent join")
        walk.wait_for("berlin is a peer", lambda: walk.ready() == {*nodes, "home.external.berlin"})
        walk.wait_for("berlin reaches a Node", partial(walk.reaches, "berlin", f"home.fra.{NODES[0]}"))
        walk.on("peer remove home.external.berlin")
        walk.wait_for(
            "a Node cuts berlin off", lambda: walk.paths(NODES[0]).keys() == {f"home.fra.{NODES[1]}"}
        )

        walk.on("peer remove home.fra.fra-2")
        walk.wait_for("the removed Node's agent leaves", partial(walk.has_left, "fra-2"))
        walk.on("delete speer home.fra.fra-2")
        walk.wait_for("it comes back", partial(walk.reaches, "fra-2", "home.fra.fra-1"))
        walk.wait_for("and is let in", partial(walk.reaches, "fra-1", "home.fra.fra-2"))

        walk.on("delete service scope-gateway")
        walk.sync(JOINED)
        walk.on("kubectl label node ams-1")
        walk.wait_for("the second cluster has joined", lambda: "home.ams.ams-1" in walk.peers())
        walk.on("kubectl get speer -o wide")
        assert walk.printed.startswith("fra ams\n") and "home.ams.ams-1" in walk.printed
        walk.on("delete secret scope-join")
        walk.kubelets[JOINED].stop()
        walk.sync(JOINED)
        asyncio.run(walk.planes["ams"].create_node("ams-2", labels={"example.net/mesh": "home"}))
        walk.wait_for("it goes on without the token", lambda: "home.ams.ams-2" in walk.peers())
        walk.kubelets[JOINED].stop()
        walk.on("cluster remove")
        walk.wait_for("its peers are gone", lambda: walk.peers() == {*nodes, "home.external.berlin"})

        walk.on("--advertise=")
        walk.sync(OPERATOR, *AGENTS)
        walk.wait_for("all is as before the upgrade", lambda: walk.ready() == nodes)
        walk.on("delete smesh --all")
        for node in NODES:
            walk.wait_for("the agent has left", partial(walk.has_left, node))
        for kubelet in walk.kubelets:
            kubelet.stop()
        walk.on("kubectl delete -f crds/")
        assert walk.ask("fra", f"/api/v1/namespaces/{NAMESPACE}") is None
        assert walk.ask("fra", MESHES) is None
        walk.finish()
        assert "PeerAdded" in walk.printed
