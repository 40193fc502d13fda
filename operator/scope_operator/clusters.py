"""Clusters that join a mesh from elsewhere: functions over the Registry port, the same on every registry.

A cluster is its name together with the UID of its kube-system namespace, which no other cluster has. It
stands in the status of the mesh with its operator's signing key and what its agents' tokens are known by.
`join_cluster` puts it there for a join token. Whoever comes again with the same name, UID and key finds it
done, so a lost answer can be asked for again, also when the first question used up the token. Another key
means another holder: only a single-use token that nobody used replaces a key.

As in a peer's enrolment the token is consumed before anything else is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import assert_never

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from scope.cluster_enrolment import ClusterEnrolment, verify_cluster_enrolment
from scope.model import (
    AgentTokens,
    Cluster,
    ClusterTrust,
    Curve,
    EcKey,
    Kind,
    Mesh,
    PublicKey,
    Role,
    RsaKey,
    TokenKey,
)
from scope.registry.port import Conflict, NotFound, Refused, Registry, Unavailable
from scope.resources import ALGORITHMS, MAX_CLUSTERS, RSA_ALGORITHM
from scope_operator.enrolment import ATTEMPTS, authenticated, consume, require_mesh, require_sound_signing
from scope_operator.tokens import admit

CURVES = {Curve.P256: ec.SECP256R1(), Curve.P384: ec.SECP384R1(), Curve.P521: ec.SECP521R1()}
KEYS_KEPT = 1024  # parsed keys of joined clusters: more than MAX_CLUSTERS clusters have in use


@dataclass(frozen=True, slots=True)
class VerifyingKey:
    """A key of an API server, ready to verify with, and the algorithm (RFC 7518) that it signs by."""

    algorithm: str
    key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey


async def join_cluster(
    registry: Registry, request: ClusterEnrolment, *, registry_key: PublicKey, wall: float
) -> Mesh:
    """Make the cluster one of the mesh's, or find that it is; gives the mesh with it.

    `registry_key` is the registry's signing key, for which the request was signed. Raises Refused when the
    cluster may not join (the message says what to do), Unavailable.
    """
    token = await authenticated(registry, request)  # first: a stranger costs one hash
    cluster, trust = request.cluster, request.cluster.trust
    if trust is None or not verify_cluster_enrolment(request, registry=registry_key):
        raise Refused("the request is not signed by its signing key for this registry: check the join string")
    require_sound_signing(
        trust.signing_key, remedy="delete the Secret with the operator's key, and restart it with a new token"
    )
    for key in trust.tokens.keys:
        verifying_key(key)
    await require_mesh(registry, token)
    if token.spec.role is not Role.AUTO:
        raise Refused(
            f"join token {token.meta.name} is for peers of role {token.spec.role}, not for a cluster: "
            f"`scopectl token create --mesh {token.spec.mesh} --single-use` makes one for it"
        )
    holder = _holder_of(cluster, trust)

    async def admitted(mesh: Mesh) -> tuple[Cluster, ...]:
        known = _known(mesh, cluster)
        if known is None or known.trust is None or known.trust.signing_key != trust.signing_key:
            admit(token, machine=holder, wall=wall)
            if known is not None and not token.spec.single_use:
                raise Refused(
                    f"cluster {cluster.name!r} joined mesh {mesh.meta.name!r} with another key: to give it "
                    "a new one, show a token that "
                    f"`scopectl token create --mesh {mesh.meta.name} --single-use` makes"
                )
            if known is None and len(mesh.status.clusters) >= MAX_CLUSTERS:
                raise Refused(
                    f"mesh {mesh.meta.name!r} has {MAX_CLUSTERS} clusters, the most it may have: "
                    f"`scopectl cluster remove --mesh {mesh.meta.name} NAME` those that are gone"
                )
            if token.spec.single_use:
                await consume(registry, request, token, machine=holder, wall=wall)
        return _with(mesh, cluster)

    return await _rewritten(registry, request.mesh, admitted)


async def replace_tokens(registry: Registry, mesh: str, cluster: Cluster, tokens: AgentTokens) -> Mesh:
    """Know the agents of a joined cluster by `tokens` from now on; `cluster` is as its caller was known by.

    Raises Refused (the keys are unsound), Conflict (it joined anew in the meantime), NotFound, Unavailable.
    """
    for key in tokens.keys:
        verifying_key(key)

    async def replaced(found: Mesh) -> tuple[Cluster, ...]:
        known = find_cluster(found, cluster.name)
        if known is None or known.trust is None or not is_same_holder(known, cluster):
            raise Conflict(f"cluster {cluster.name!r} joined mesh {mesh!r} anew: sign with its new key")
        return _with(found, replace(known, trust=replace(known.trust, tokens=tokens)))

    return await _rewritten(registry, mesh, replaced)


async def remove_cluster(registry: Registry, mesh: str, name: str) -> Cluster:
    """Trust a joined cluster no longer; its peers stay until they are removed too.

    Raises NotFound, Refused (it is the registry's own), Unavailable.
    """
    gone: list[Cluster] = []

    async def without(found: Mesh) -> tuple[Cluster, ...]:
        known = find_cluster(found, name)
        if known is None:
            raise NotFound(f"mesh {mesh!r} has no cluster {name!r}")
        if known.trust is None:
            raise Refused(f"cluster {name!r} is the registry's own: uninstall its operator instead")
        gone[:] = [known]
        return tuple(each for each in found.status.clusters if each.name != name)

    await _rewritten(registry, mesh, without)
    return gone[0]


def find_cluster(mesh: Mesh, name: str) -> Cluster | None:
    """The cluster of that name in a mesh."""
    return next((each for each in mesh.status.clusters if each.name == name), None)


@lru_cache(maxsize=KEYS_KEPT)
def verifying_key(key: TokenKey) -> VerifyingKey:
    """The key, with the one algorithm that goes with it. Raises Refused when it is no public key."""
    try:
        match key:
            case RsaKey(_, modulus, exponent):
                return VerifyingKey(RSA_ALGORITHM, rsa.RSAPublicNumbers(exponent, modulus).public_key())
            case EcKey(_, curve, x, y):
                point = ec.EllipticCurvePublicNumbers(x, y, CURVES[curve])
                return VerifyingKey(ALGORITHMS[curve], point.public_key())
    except ValueError:
        raise Refused(
            f"key {key.id!r} is no public key: register those of `kubectl get --raw /openid/v1/jwks`"
        ) from None
    assert_never(key)


# --- steps --------------------------------------------------------------------------------------------------


def _known(mesh: Mesh, cluster: Cluster) -> Cluster | None:
    """The entry of this very cluster. Raises Refused where its name or its UID is another's."""
    named = find_cluster(mesh, cluster.name)
    if named is not None and named.uid != cluster.uid:
        raise Refused(
            f"in mesh {mesh.meta.name!r} the name {cluster.name!r} belongs to the cluster whose kube-system "
            f"namespace has UID {named.uid}, and yours has {cluster.uid}: give yours another name; or, if "
            f"that one is gone for good, `scopectl cluster remove --mesh {mesh.meta.name} {cluster.name}`"
        )
    if named is not None and named.trust is None:
        raise Refused(f"cluster {cluster.name!r} is the registry's own: its operator needs no registry URL")
    other = next((each for each in mesh.status.clusters if each.uid == cluster.uid), None)
    if named is None and other is not None:
        raise Refused(
            f"this cluster is in mesh {mesh.meta.name!r} already, as {other.name!r}: keep that name; or "
            f"`scopectl cluster remove --mesh {mesh.meta.name} {other.name}`, and join again"
        )
    return named


def _holder_of(cluster: Cluster, trust: ClusterTrust) -> str:
    """The name of a cluster and its key in a token's `used_by`: a hash in hexadecimal."""
    return hashlib.sha256(cluster.uid.encode() + b"\0" + trust.signing_key.raw).hexdigest()


def is_same_holder(one: Cluster, other: Cluster) -> bool:
    """Whether both are one joined cluster under one key."""
    return (
        one.uid == other.uid
        and one.trust is not None
        and other.trust is not None
        and one.trust.signing_key == other.trust.signing_key
    )


def _with(mesh: Mesh, cluster: Cluster) -> tuple[Cluster, ...]:
    """The mesh's clusters with this one in the place of what has its name, or last."""
    before = mesh.status.clusters
    if find_cluster(mesh, cluster.name) is None:
        return (*before, cluster)
    return tuple(cluster if each.name == cluster.name else each for each in before)


async def _rewritten(
    registry: Registry, name: str, decide: Callable[[Mesh], Awaitable[tuple[Cluster, ...]]]
) -> Mesh:
    """The mesh with the clusters that `decide` gives for it, written from the revision that it was shown."""
    for _ in range(ATTEMPTS):
        mesh = await registry.get(Kind.MESH, name)
        assert isinstance(mesh, Mesh)  # noqa: S101 - the port's promise
        clusters = await decide(mesh)
        if clusters == mesh.status.clusters:
            return mesh
        try:
            stored = await registry.update_status(
                Kind.MESH,
                name,
                replace(mesh.status, clusters=clusters),
                uid=mesh.meta.uid,
                if_revision=mesh.meta.revision,
            )
        except Conflict:
            continue
        assert isinstance(stored, Mesh)  # noqa: S101
        return stored
    raise Unavailable(f"ScopeMesh {name!r} changes all the time: ask again")
