"""What is read of the cluster itself: who it is, its Nodes, and whether it knows Scope's resources."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from scope import resources
from scope.model import ConfigError, IPNetwork, Kind, PodPrefix, PodSource
from scope.registry.kube.client import KubeClient
from scope.registry.kube.objects import collection
from scope.registry.port import NotFound, Refused, Unavailable
from scope_operator.plan.nodes import Node, NodePeers, NodesListed

log = logging.getLogger(__name__)

NODES = "/api/v1/nodes"
IDENTITY = "/api/v1/namespaces/kube-system"
PAGE = 500  # Nodes of a list's page


def read_node(document: Mapping[str, Any]) -> Node:
    """What matters of a Node. Raises Unavailable for what no API server sends."""
    metadata = document.get("metadata") or {}
    name, uid, revision = (metadata.get(field) for field in ("name", "uid", "resourceVersion"))
    if not isinstance(name, str) or not isinstance(uid, str) or not str(revision).isdigit():
        raise Unavailable("the API server sent a Node without name, uid or resourceVersion")
    labels = metadata.get("labels") or {}
    return Node(
        name,
        uid,
        {str(key): str(value) for key, value in labels.items()},
        int(str(revision)),
        tuple(
            PodPrefix(prefix, PodSource.NODE) for prefix in _pod_prefixes(name, document.get("spec") or {})
        ),
    )


def _pod_prefixes(node: str, spec: Mapping[str, Any]) -> Iterator[IPNetwork]:
    """The prefixes that the cluster gave a Node for its pods, as far as a peer may offer them."""
    for text in spec.get("podCIDRs") or ():
        prefix = resources.parse_route(text)
        if prefix is None:
            log.warning("node.pods_unusable node=%s prefix=%s", node, text)
        else:
            yield prefix


async def list_nodes(client: KubeClient, known: NodePeers) -> NodesListed:
    """All Nodes at one revision, to compare with what is `known` now. Raises RegistryError."""
    asked_at, after = time.monotonic(), known.revision
    query = {"limit": str(PAGE)}
    found: list[Node] = []
    while True:
        page = await client.ask("GET", NODES, query=query)
        metadata = page.get("metadata") or {}
        found.extend(read_node(item) for item in page.get("items") or ())
        token = metadata.get("continue")
        if not token:
            return NodesListed(tuple(found), int(metadata["resourceVersion"]), asked_at, after)
        query = {**query, "continue": str(token)}


async def identity(client: KubeClient) -> str:
    """The UID of the kube-system namespace. Raises ConfigError, Unavailable."""
    try:
        namespace = await client.ask("GET", IDENTITY)
    except Refused as error:
        raise ConfigError(
            f"may not read the namespace kube-system, whose UID tells clusters apart: {error}; give the "
            "operator's ServiceAccount the right to get it"
        ) from None
    return str(namespace["metadata"]["uid"])


async def require_resources(client: KubeClient, *, namespace: str) -> None:
    """Raises ConfigError where a kind of Scope's is unknown or closed to us, Unavailable."""
    for kind in (Kind.MESH, Kind.PEER, Kind.SERVICE):
        try:
            await client.ask("GET", collection(kind, namespace), query={"limit": "1"})
        except NotFound:
            raise ConfigError(
                f"the cluster does not know {kind}: `kubectl apply -f crds/` first, then start the operator"
            ) from None
        except Refused as error:
            raise ConfigError(f"may not list {kind}: {error}; apply the operator's ClusterRole") from None
