"""Clusters that are there already, by their kubeconfigs, and clusters that kind makes for the occasion."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kubelab import KubeLabError

from e2e.cluster import Cluster

# kind's clusters, with prefixes of their own for pods: names in meshes, and of the containers that are Nodes.
_KIND = {"west": "10.244.0.0/16,fd00:244::/56", "east": "10.245.0.0/16,fd00:245::/56"}
_KIND_WAIT = "300s"


def run_here(
    argv: Sequence[str], *, check: bool, timeout: float, env: Mapping[str, str], input: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a program on this machine's own network."""
    return subprocess.run(
        argv, check=check, timeout=timeout, env=dict(env), input=input, capture_output=True, text=True
    )


def existing(kubeconfigs: Sequence[Path], *, home: Path) -> list[Cluster]:
    """A cluster for each, named after its place: `cluster-1` has the registry."""
    return [
        Cluster(f"cluster-{place}", kubeconfig=path.absolute(), home=home, run=run_here)
        for place, path in enumerate(kubeconfigs, 1)
    ]


async def public_node(cluster: Cluster) -> tuple[str, str]:
    """The name of the first Node, and by which address it is reached: an external one, if it has any."""
    nodes = await cluster.get("nodes")
    if not nodes:
        raise KubeLabError(f"{cluster.name} has no Nodes")
    node = min(nodes, key=lambda node: str(node["metadata"]["name"]))
    addresses = {each["type"]: each["address"] for each in node["status"]["addresses"]}
    for kind in ("ExternalIP", "InternalIP"):
        if kind in addresses:
            return node["metadata"]["name"], addresses[kind]
    raise KubeLabError(f"the Node {node['metadata']['name']} of {cluster.name} has no address")


@contextlib.contextmanager
def kind_clusters(images: Path, *, home: Path, keep: bool) -> Iterator[list[Path]]:
    """Two clusters of containers, with the images in them; their kubeconfigs."""
    for program in ("kind", "docker"):
        if shutil.which(program) is None:
            raise KubeLabError(f"{program} is missing: install it, or leave CLUSTERS out and use the lab")
    made: list[str] = []
    try:
        kubeconfigs = []
        for name, pods in _KIND.items():
            full = f"scope-e2e-{name}"
            made.append(full)
            kubeconfigs.append(home / f"{full}.kubeconfig")
            _kind(
                ["create", "cluster", f"--name={full}", "--config=-", f"--wait={_KIND_WAIT}"],
                kubeconfig=kubeconfigs[-1],
                document=json.dumps(_kind_settings(pods)),
            )
            for archive in sorted(images.glob("*.tar")):
                _kind(["load", "image-archive", str(archive), f"--name={full}"], kubeconfig=kubeconfigs[-1])
        yield kubeconfigs
    finally:
        if keep:
            print(f"kind's clusters stay: {' '.join(made)}; remove each with kind delete cluster --name")
        else:
            for full in made:
                subprocess.run(["kind", "delete", "cluster", f"--name={full}"], check=False)


def _kind_settings(pods: str) -> dict[str, object]:
    device = {"hostPath": "/dev/net/tun", "containerPath": "/dev/net/tun"}
    return {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": {"ipFamily": "dual", "podSubnet": pods},
        "nodes": [{"role": role, "extraMounts": [device]} for role in ("control-plane", "worker")],
    }


def _kind(arguments: Sequence[str], *, kubeconfig: Path, document: str | None = None) -> None:
    argv = ["kind", *arguments, *([f"--kubeconfig={kubeconfig}"] if arguments[0] == "create" else [])]
    done = subprocess.run(argv, input=document, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KubeLabError(f"{' '.join(argv)}: {done.stderr.strip()}")
