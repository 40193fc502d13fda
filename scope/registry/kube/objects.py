"""What is written to the API server, as dictionaries, and what is read back. Pure.

A join token is a Secret of type `scope.ltgc.cc/join-token` in the release namespace, named
`scope-token-ID`. Its data, one field each, so that `kubectl get secret -o jsonpath` shows them and a person
can write one by hand with `stringData`:

    mesh        the mesh that it opens
    role        Hub, Edge or Auto
    secretHash  SHA-256 of the token's secret, base64 (and once more, as all of a Secret's data)
    expires     RFC 3339
    singleUse   true or false
    usedBy      the machines that joined with it, one a line

A heartbeat is a Lease in the release namespace, owned by the ScopePeers that it speaks for, so that it goes
with the last of them: `agent.NODE`, which the agent of that Node writes and an admission policy keeps others
from, or `peer.PEER` of a peer whose word the gateway takes. Owners are a claim: `speaks_for` judges it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from scope import resources
from scope.model import ConfigError, JoinToken, Kind, Meta, Peer, PeerReport, Resource, StatusPart
from scope.resources import InvalidResource, Problem

Object = dict[str, Any]

AGENT = "scope-agent"  # field managers: who writes which part of a peer's status
OPERATOR = "scope-operator"

TOKEN_TYPE = f"{resources.GROUP}/join-token"
TOKEN_PREFIX = "scope-token-"  # noqa: S105 - of a Secret's name
NODE_LEASE = "agent."  # as charts/manifests/40-policies.yaml has it
PEER_LEASE, HASHED_PEER_LEASE = "peer.", "peer-"
LEASE_SECONDS = 180  # two renewals of 60 s may be lost, and some


def collection(kind: Kind, namespace: str) -> str:
    """The path of all objects of a kind."""
    if kind is Kind.TOKEN:
        return secrets_path(namespace)
    return f"/apis/{resources.API_VERSION}/{resources.PLURALS[kind]}"


def object_path(kind: Kind, name: str, namespace: str) -> str:
    """The path of one object."""
    stored = TOKEN_PREFIX + name if kind is Kind.TOKEN else name
    return f"{collection(kind, namespace)}/{quote(stored, safe='')}"


def secret_path(name: str, namespace: str) -> str:
    """The path of a Secret."""
    return f"{secrets_path(namespace)}/{quote(name, safe='')}"


def secrets_path(namespace: str) -> str:
    """The path of all Secrets of a namespace."""
    return f"/api/v1/namespaces/{quote(namespace, safe='')}/secrets"


def lease_path(name: str, namespace: str) -> str:
    """The path of a Lease."""
    return f"{leases_path(namespace)}/{quote(name, safe='')}"


def leases_path(namespace: str) -> str:
    """The path of all Leases of a namespace."""
    return f"/apis/coordination.k8s.io/v1/namespaces/{quote(namespace, safe='')}/leases"


# --- resources ---------------------------------------------------------------------------------------------


def read(kind: Kind, document: Mapping[str, Any]) -> Resource:
    """A stored object as a resource; the server's own bookkeeping is dropped. Raises InvalidResource."""
    if kind is Kind.TOKEN:
        return resources.parse_token(_token_document(document), ignore_unknown=True)
    # Items of a list do not repeat these.
    whole = {**document, "apiVersion": resources.API_VERSION, "kind": str(kind)}
    return resources.parse(whole, ignore_unknown=True)


def is_at(document: Mapping[str, Any], meta: Meta) -> bool:
    """Whether a stored object is the very one, at the very revision."""
    metadata = document.get("metadata", {})
    return (metadata.get("uid"), metadata.get("resourceVersion")) == (meta.uid, str(meta.revision))


def new_object(resource: Resource, *, owner: Object | None = None) -> Object:
    """What to create: metadata and spec. A status is written by itself, whoever creates."""
    if isinstance(resource, JoinToken):
        return {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": TOKEN_PREFIX + resource.meta.name},
            "type": TOKEN_TYPE,
            "data": token_data(resource),
        }
    document = resources.to_dict(resource)
    metadata: Object = {"name": resource.meta.name}
    if owner is not None:
        metadata["ownerReferences"] = [owner]
    return {**{name: document[name] for name in ("apiVersion", "kind", "spec")}, "metadata": metadata}


def with_spec(stored: Mapping[str, Any], asked: Resource) -> Object:
    """The stored object with the spec that is asked for, and all else as it is."""
    if isinstance(asked, JoinToken):
        return {**stored, "data": token_data(asked)}
    return {**stored, "spec": resources.to_dict(asked)["spec"]}


def status_patch(kind: Kind, name: str, part: StatusPart, *, if_revision: int) -> Object:
    """A server-side apply of one writer's part: what it does not hold and that writer had set, goes."""
    return {
        "apiVersion": resources.API_VERSION,
        "kind": str(kind),
        "metadata": {"name": name, "resourceVersion": str(if_revision)},
        "status": resources.status_to_dict(part),
    }


def manager_of(part: StatusPart) -> str:
    """The field manager of a part."""
    return AGENT if isinstance(part, PeerReport) else OPERATOR


def owner_reference(kind: Kind, name: str, uid: str) -> Object:
    """The reference that an owned object carries: it is collected after its last owner."""
    return {"apiVersion": resources.API_VERSION, "kind": str(kind), "name": name, "uid": uid}


# --- join tokens -------------------------------------------------------------------------------------------


def token_data(token: JoinToken) -> dict[str, str]:
    """A Secret's `data`: each field's text, in base64."""
    spec = token.spec
    texts = {
        "mesh": spec.mesh,
        "role": str(spec.role),
        "secretHash": base64.b64encode(spec.secret_hash).decode(),
        "expires": resources.format_time(spec.expires),
        "singleUse": "true" if spec.single_use else "false",
        "usedBy": "\n".join(spec.used_by),
    }
    return {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}


def _token_document(secret: Mapping[str, Any]) -> Object:
    metadata = secret.get("metadata", {})
    name = str(metadata.get("name", ""))
    if not name.startswith(TOKEN_PREFIX):
        raise InvalidResource([Problem("metadata.name", name, f"{TOKEN_PREFIX}ID, of a join token")])
    data = secret.get("data") or {}
    try:
        texts = {field: base64.b64decode(value, validate=True).decode() for field, value in data.items()}
    except (binascii.Error, ValueError):
        raise InvalidResource([Problem("data", "what is not base64 of text", "text")]) from None
    # A hand-written file often ends in a newline.
    spec: Object = {field: text.strip() for field, text in texts.items()}
    if "singleUse" in spec:
        spec["singleUse"] = {"true": True, "false": False}.get(spec["singleUse"], spec["singleUse"])
    if "usedBy" in spec:
        spec["usedBy"] = spec["usedBy"].split()
    return {
        "apiVersion": resources.API_VERSION,
        "kind": str(Kind.TOKEN),
        "metadata": {**metadata, "name": name.removeprefix(TOKEN_PREFIX)},
        "spec": spec,
    }


# --- leases ------------------------------------------------------------------------------------------------


def node_lease(node: str) -> str:
    """The name of the Lease of a Node's agent. Raises ConfigError where the Node's name leaves no room."""
    name = NODE_LEASE + node
    if len(name) > resources.MAX_NAME:
        raise ConfigError(
            f"the Node's name has {len(node)} characters, and its agent's Lease, {NODE_LEASE}NODE, may have "
            f"{resources.MAX_NAME}: register the Node with a name of at most "
            f"{resources.MAX_NAME - len(NODE_LEASE)}, or exclude it by the nodeSelector of its ScopeMesh"
        )
    return name


def peer_lease(peer: str) -> str:
    """The name of the Lease of a peer that is no Node of this cluster; a hash where that is too long."""
    name = PEER_LEASE + peer
    if len(name) <= resources.MAX_NAME:
        return name
    return HASHED_PEER_LEASE + hashlib.sha256(peer.encode()).hexdigest()


def speaks_for(lease_name: str, peer: Peer, *, cluster: str) -> bool:
    """Whether a Lease in the cluster of that name may say that a peer is alive: its Node's, or the gateway's
    for it.
    """
    name, spec = peer.meta.name, peer.spec
    if lease_name == peer_lease(name):
        return True
    return bool(spec.node_name) and spec.cluster == cluster and lease_name == NODE_LEASE + spec.node_name


def lease(name: str, *, namespace: str, owners: Mapping[str, str], wall: float) -> Object:
    """The whole heartbeat of that name; `owners` are the UIDs of its ScopePeers, by name."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "ownerReferences": [
                owner_reference(Kind.PEER, peer, uid) for peer, uid in sorted(owners.items())
            ],
        },
        "spec": {
            "holderIdentity": name,
            "leaseDurationSeconds": LEASE_SECONDS,
            # MicroTime: always six digits.
            "renewTime": datetime.fromtimestamp(wall, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        },
    }


def peers_of_lease(document: Mapping[str, Any]) -> tuple[str, tuple[str, ...], str]:
    """The name of a heartbeat, those of the ScopePeers that it would speak for, and its time of renewal as it
    stands. Of another Lease: no ScopePeer.
    """
    metadata, spec = document.get("metadata", {}), document.get("spec", {})
    name = str(metadata.get("name", ""))
    if not name.startswith((NODE_LEASE, PEER_LEASE, HASHED_PEER_LEASE)):
        return name, (), ""
    owners = metadata.get("ownerReferences") or ()
    names = tuple(str(owner.get("name")) for owner in owners if owner.get("kind") == Kind.PEER)
    return name, names, str(spec.get("renewTime", ""))
