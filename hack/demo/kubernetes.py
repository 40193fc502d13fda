"""Members that are Nodes of a cluster, and two off the cluster that join through its gateway with a token."""

from __future__ import annotations

from collections.abc import Sequence

from kubelab.programs import kubernetes_program
from lab import Lab, Machine
from meshlab import Member, mesh_document
from meshlab.cluster import CLUSTER, Cluster

from demo.cast import HUBS, MESH, OFF_CLUSTER, ROLES


class Kubernetes:
    """A cluster with the operator; one token for whoever is off it."""

    served = "a cluster's API server, and the operator with its gateway, serve on the internet"
    joining = (
        f"{len(ROLES) - len(OFF_CLUSTER)} machines become Nodes of the cluster, "
        f"{' and '.join(sorted(OFF_CLUSTER))} run `scope-agent join` with a token"
    )
    leaving = "leaves: its Node is deleted"
    joins_late = "becomes a Node of the cluster"
    # A router that has just rebooted lets nothing of a watch through until the kernel of the Node behind it
    # asks, after 15 s of silence; a connection that does not answer it gives up after 30 s.
    gone_within_s = 45.0

    def serve(self, lab: Lab) -> None:
        self._cluster = Cluster(lab.server("cluster"))
        self.reshape("Full")
        self._token = self._cluster.token(MESH)

    def join(self, machine: Machine, *, arguments: Sequence[str]) -> Member:
        member = Member(machine, mesh=MESH, registry=self._cluster)
        if machine.name in OFF_CLUSTER:
            member.join(self._token, arguments=arguments)
        else:
            member.run(*self._cluster.add_node(machine), *arguments)
        return member

    def leave(self, member: Member) -> None:
        self._cluster.remove_node(member)

    def reshape(self, topology: str) -> None:
        hubs = {"names": [f"{MESH}.{CLUSTER}.{name}" for name in HUBS]}
        self._cluster.apply(mesh_document(MESH, hubs=hubs, topology=topology))

    def tour(self) -> Sequence[str]:
        kubectl = f"{kubernetes_program('kubectl')} --kubeconfig={self._cluster.kubeconfig}"
        return (
            f'kubectl() {{ enter cluster {kubectl} "$@"; }}',
            "kubectl get nodes,smesh,speer             # what the cluster holds",
            "enter cluster scopectl get peers          # the same, by way of the gateway",
        )
