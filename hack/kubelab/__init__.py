"""A real Kubernetes control plane for tests, demo and benchmarks, Nodes for it, and faults in front of it.

    async with ControlPlane(controllers=True) as plane:
        await plane.apply(Path("crds"))
        await plane.create_node("n1")
        token = await plane.token("scope-agent", node="n1")
        print(await plane.kubectl("get", "nodes"))
        await plane.api_server.stop()

hack/setup.sh builds the programs; here they are only run.

    programs       where the programs are, and one process that may be started many times
    certificates   the certificate authority of one control plane
    control_plane  etcd, kube-apiserver, kube-controller-manager, kube-scheduler: started, asked, snapshotted
    node           kubelet, containerd and kube-proxy in a host of the lab
    audit          what the API server was asked, by whom
    faults         a proxy that delays, refuses, cuts, freezes and truncates
"""

from kubelab.audit import Audited, AuditLog
from kubelab.control_plane import APPLY, JSON, MERGE, ApiError, ControlPlane
from kubelab.faults import FaultProxy
from kubelab.node import KubeNode
from kubelab.programs import KubeLabError, Program

__all__ = [
    "APPLY",
    "JSON",
    "MERGE",
    "ApiError",
    "AuditLog",
    "Audited",
    "ControlPlane",
    "FaultProxy",
    "KubeLabError",
    "KubeNode",
    "Program",
]
