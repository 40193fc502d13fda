"""What is kept of a run that failed: what the clusters say, what the Nodes hold, and every log."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from kubelab import KubeLabError

from e2e.cluster import NAMESPACE, Cluster
from e2e.landscape import LabCluster

_ASKED = {
    "nodes": ("get", "nodes", "-o", "wide"),
    "pods": ("get", "pods", "--all-namespaces", "-o", "wide"),
    "events": ("get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"),
    "workloads": ("describe", "deployments,daemonsets,pods", "--namespace", NAMESPACE),
    "scope": ("get", "smesh,speer", "-o", "wide"),
    "scope-full": ("get", "smesh,speer", "-o", "yaml"),
    "services": ("get", "services,endpointslices", "--all-namespaces", "-o", "wide"),
}
_LOOKED_AT = {
    "addresses": ("ip", "addr"),
    "routes": ("ip", "route", "show", "table", "all"),
    "rules": ("ip", "rule"),
    "nftables": ("nft", "list", "ruleset"),
    "sockets": ("ss", "-tulpn"),
}


@contextlib.asynccontextmanager
async def of_failure(target: Path, clusters: Sequence[Cluster]) -> AsyncIterator[None]:
    """What fails inside leaves a bundle in `target`, and says so."""
    try:
        yield
    except Exception as error:
        print(f"e2e: {error}\ne2e: gathering logs and state", file=sys.stderr)
        await gather(target, clusters)
        print(f"e2e: logs and state are in {target}", file=sys.stderr)
        raise


async def gather(target: Path, clusters: Sequence[Cluster]) -> None:
    """Write it all below `target`, which is made anew; what cannot be asked any more says why."""
    shutil.rmtree(target, ignore_errors=True)
    for cluster in clusters:
        folder = target / cluster.name
        folder.mkdir(parents=True)
        for name, arguments in _ASKED.items():
            try:
                said = await cluster.kubectl(*arguments)
            except (KubeLabError, OSError, subprocess.SubprocessError) as error:
                said = f"{error}\n"
            (folder / f"{name}.txt").write_text(said)
        if not isinstance(cluster, LabCluster):
            continue
        _copy(cluster.plane.logs, folder / "control-plane")
        for node in cluster.nodes.values():
            _copy(node.logs, folder / node.name)
            for name, argv in _LOOKED_AT.items():
                done = await asyncio.to_thread(node.host.run, argv, check=False)
                (folder / node.name / f"{name}.txt").write_text(done.stdout + done.stderr)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for log in source.rglob("*.log"):
        # Named after pod and container; a log may go while it is copied.
        with contextlib.suppress(FileNotFoundError):
            if not log.is_symlink():
                shutil.copyfile(log, target / "_".join(log.relative_to(source).parts))
