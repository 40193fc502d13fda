"""Joining and leaving a mesh: functions over the Registry port, so that they are the same on every
registry.

`enrol` turns a token and a machine's keys into a ScopePeer. What makes it safe under parallel joins, in one
process or several, is the order of its writes: a single-use token is consumed by an update of the revision
that was read, and only then is the ScopePeer created. A machine that lost its answer asks again with the
same keys and gets its own peer, also when that used up the token; nobody else's peer or key is ever
replaced.

Keys must be canonical. WireGuard ignores the top bit of a key and reduces the rest, so one key has several
encodings, and a removed peer could come back under another one.

`remove_peer` and `leave` bury a peer under a signed tombstone. The ScopePeer stays listed with it, so that
the removal is heard by agents that were away, until `peerExpiry`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from scope.cluster_enrolment import ClusterEnrolment
from scope.enrolment import Enrolment, verify_enrolment
from scope.model import (
    Condition,
    JoinToken,
    Kind,
    Mesh,
    Meta,
    Peer,
    PeerKeys,
    PeerReport,
    PeerSpec,
    PublicKey,
    Secret,
    Tombstone,
)
from scope.registry.port import (
    AlreadyExists,
    Conflict,
    NotFound,
    Refused,
    Registry,
    Unavailable,
)
from scope.tombstones import sign_tombstone, verify_tombstone
from scope_operator.plan.conditions import REMOVED
from scope_operator.tokens import admit, authenticate, machine_of

MAX_PEERS = 10_000  # of a mesh: the most that Scope is measured with
MAX_NAME = 253  # a DNS subdomain, the longest name that Kubernetes takes
ATTEMPTS = (
    16  # at a write that others keep changing: each failure is another's success, so few are ever needed
)

FIELD = 2**255 - 19  # of Curve25519, shared by X25519 and Ed25519
_NEW_KEYS = "run `scope-agent leave`, which makes new keys at the next join, and join again"
_NEW_STATE = "delete the agent's state directory on this Node, and restart the agent, which makes new keys"

Invited: TypeAlias = Enrolment | ClusterEnrolment  # who shows a token


async def enrol(
    registry: Registry,
    request: Enrolment,
    *,
    registry_key: PublicKey,
    wall: float,
    max_peers: int = MAX_PEERS,
) -> Peer:
    """Make the machine a peer, or find the peer that it is.

    `registry_key` is the registry's signing key, for which the request was signed. Raises Refused when the
    machine may not join (the message says what to do), Unavailable.
    """
    token = await authenticated(registry, request)  # first: a stranger costs one hash
    require_sound(request.keys, remedy=_NEW_KEYS)
    if not verify_enrolment(request, registry=registry_key):
        raise Refused("the request is not signed by its signing key for this registry: check the join string")
    await require_mesh(registry, token)
    members = await _members(registry, request.mesh)
    known = _known(members, request.keys)
    if known is not None:
        return known
    machine = machine_of(request.keys)
    admit(token, machine=machine, wall=wall)
    if len(members) >= max_peers:
        raise Refused(
            f"mesh {request.mesh!r} has {len(members)} peers, the most it may have: `scopectl peer remove` "
            "those that are gone"
        )
    if token.spec.single_use:
        await consume(registry, request, token, machine=machine, wall=wall)
    peer = await _create(registry, request, token)
    return await _alone(registry, peer, request.keys)


async def require_bindable(registry: Registry, peer: Peer, keys: PeerKeys) -> None:
    """Raises Refused when the agent of a Node may not have these keys: unsound, or those of another peer."""
    require_sound(keys, remedy=_NEW_STATE)
    for other in await _members(registry, peer.spec.mesh):
        if other.meta.uid != peer.meta.uid and other.report is not None and _shares(other.report.keys, keys):
            raise Refused(
                f"one of these keys belongs to ScopePeer {other.meta.name!r} (a copied state directory?): "
                f"{_NEW_STATE}"
            )


async def remove_peer(registry: Registry, name: str, *, uid: str, signing: Secret, wall: float) -> Peer:
    """Remove a peer with a tombstone signed by the registry; `signing` is the seed of its key.

    A peer that is removed already stays as it is. Raises NotFound, Conflict (another uid), Refused (it has no
    key that a tombstone could name: delete it), Unavailable.
    """

    def signed(mesh: Mesh, peer: Peer, keys: PeerKeys) -> Tombstone:
        return sign_tombstone(
            mesh_uid=mesh.meta.uid, peer_uid=peer.meta.uid, key=keys.wireguard, secret=signing
        )

    removed = Condition(REMOVED, "True", "ByAdministrator", "removed; its keys cannot join again", wall)
    return await _bury(registry, name, uid=uid, tombstone=signed, condition=removed)


async def leave(
    registry: Registry, name: str, tombstone: Tombstone, *, registry_key: PublicKey, wall: float
) -> Peer:
    """Remove a peer with the tombstone that it, or the registry earlier, signed.

    Raises as `remove_peer`, and Refused when the tombstone does not remove this peer.
    """

    def checked(mesh: Mesh, peer: Peer, keys: PeerKeys) -> Tombstone:
        named = (tombstone.mesh_uid, tombstone.peer_uid, tombstone.key)
        if named != (mesh.meta.uid, peer.meta.uid, keys.wireguard):
            raise Refused(f"the tombstone names another mesh, peer or key than ScopePeer {name!r} has")
        if not verify_tombstone(tombstone, registry=registry_key, peer=keys.signing):
            raise Refused(f"the tombstone is signed neither by ScopePeer {name!r} nor by the registry")
        return tombstone

    left = Condition(REMOVED, "True", "Left", "left the mesh; its keys cannot join again", wall)
    return await _bury(registry, name, uid=tombstone.peer_uid, tombstone=checked, condition=left)


async def _bury(
    registry: Registry,
    name: str,
    *,
    uid: str,
    tombstone: Callable[[Mesh, Peer, PeerKeys], Tombstone],
    condition: Condition,
) -> Peer:
    for _ in range(ATTEMPTS):
        peer = await registry.get(Kind.PEER, name)
        assert isinstance(peer, Peer)  # noqa: S101 - the port's promise
        if peer.meta.uid != uid:
            raise Conflict(f"ScopePeer {name!r} has uid {peer.meta.uid}, not {uid!r}: read it again")
        if peer.assignment.tombstone is not None:
            return peer
        if peer.report is None:
            raise Refused(f"ScopePeer {name!r} has no keys, so nobody knows it yet: delete it instead")
        mesh = await registry.get(Kind.MESH, peer.spec.mesh)
        assert isinstance(mesh, Mesh)  # noqa: S101
        buried = replace(
            peer.assignment,
            online=False,
            last_seen=condition.changed if peer.assignment.online else peer.assignment.last_seen,
            conditions=(condition,),
            tombstone=tombstone(mesh, peer, peer.report.keys),
        )
        try:
            stored = await registry.update_status(
                Kind.PEER, name, buried, uid=uid, if_revision=peer.meta.revision
            )
        except Conflict:
            continue
        assert isinstance(stored, Peer)  # noqa: S101
        return stored
    raise Unavailable(f"ScopePeer {name!r} changes all the time: ask again")


# --- joining, step by step ----------------------------------------------------------------------------------


async def authenticated(registry: Registry, request: Invited) -> JoinToken:
    """The token that is shown, expired or used as it may be. Raises Refused."""
    try:
        found = await registry.get(Kind.TOKEN, request.token_id)
    except NotFound:
        found = None
    token = found if isinstance(found, JoinToken) else None
    return authenticate(token, secret=request.secret, mesh=request.mesh)


async def require_mesh(registry: Registry, token: JoinToken) -> None:
    """Raises Refused when the mesh is absent, or made anew since the token: a name alone grants nothing."""
    name = token.spec.mesh
    try:
        mesh = await registry.get(Kind.MESH, name)
    except NotFound:
        raise Refused(f"there is no ScopeMesh {name!r}: `scopectl apply -f` creates it") from None
    if token.meta.created < mesh.meta.created:
        raise Refused(
            f"join token {token.meta.name} is older than ScopeMesh {name!r}: "
            f"`scopectl token create --mesh {name}` makes a new one"
        )


async def _members(registry: Registry, mesh: str) -> list[Peer]:
    listed = await registry.list(Kind.PEER)
    return [peer for peer in listed.resources if isinstance(peer, Peer) and peer.spec.mesh == mesh]


def _known(members: Iterable[Peer], keys: PeerKeys) -> Peer | None:
    """The peer that has exactly these keys; None when none has any of them. Raises Refused."""
    for peer in members:
        if peer.report is None or not _shares(peer.report.keys, keys):
            continue
        if peer.assignment.tombstone is not None:
            raise Refused(f"this machine was removed from mesh {peer.spec.mesh!r}: {_NEW_KEYS}")
        if peer.report.keys != keys:
            raise Refused(
                f"one of these keys belongs to another peer of mesh {peer.spec.mesh!r} (a copied state "
                f"directory?): {_NEW_KEYS}"
            )
        return peer
    return None


def _shares(one: PeerKeys, other: PeerKeys) -> bool:
    return (  # raw bytes: every join looks at every peer
        one.wireguard.raw == other.wireguard.raw
        or one.probe.raw == other.probe.raw
        or one.signing.raw == other.signing.raw
    )


async def consume(
    registry: Registry, request: Invited, token: JoinToken, *, machine: str, wall: float
) -> None:
    """Mark a single-use token as used by this machine: of all who try, one succeeds. Raises Refused."""
    for _ in range(ATTEMPTS):
        admit(token, machine=machine, wall=wall)
        if token.spec.used_by:
            return
        used = replace(token, spec=replace(token.spec, used_by=(machine,)))
        try:
            await registry.update(used, if_revision=token.meta.revision)
        except (Conflict, NotFound):
            token = await authenticated(registry, request)
            continue
        return
    raise Unavailable(f"join token {token.meta.name} changes all the time: ask again")


async def _create(registry: Registry, request: Enrolment, token: JoinToken) -> Peer:
    for name in peer_names(request.mesh, request.hostname, request.keys.wireguard):
        asked = Peer(
            meta=Meta(name),
            spec=PeerSpec(mesh=request.mesh, role=token.spec.role),
            report=PeerReport(keys=request.keys, held_addresses=request.held_addresses),
        )
        try:
            created = await registry.create(asked)
        except AlreadyExists:
            known = _known(await _members(registry, request.mesh), request.keys)
            if known is not None:
                return known
            continue
        assert isinstance(created, Peer)  # noqa: S101
        return created
    raise Refused(f"every name for host {request.hostname!r} is taken: join under another hostname")


async def _alone(registry: Registry, peer: Peer, keys: PeerKeys) -> Peer:
    """The new peer, if nobody joined with one of its keys in the meantime; else it is withdrawn.

    Two such joins may both be withdrawn, which is safe: one key never has two peers. Raises Refused.
    """
    others = [
        other
        for other in await _members(registry, peer.spec.mesh)
        if other.meta.uid != peer.meta.uid and other.report is not None and _shares(other.report.keys, keys)
    ]
    if not others:
        return peer
    await registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid)
    raise Refused(f"another machine joined with one of these keys at the same moment: {_NEW_KEYS}")


# --- names --------------------------------------------------------------------------------------------------


def peer_names(mesh: str, hostname: str, key: PublicKey) -> tuple[str, ...]:
    """The names that a peer off Kubernetes may get, best first: later ones carry more of its key's hash."""
    digest = hashlib.sha256(key.raw).hexdigest()
    host = _dns_name(hostname)
    suffixes = ("", digest[:8], digest[:32]) if host else (digest[:8], digest[:32])
    return tuple(_shortened(f"{mesh}.external.", host, suffix) for suffix in suffixes)


def _dns_name(hostname: str) -> str:
    """The hostname in the letters of a DNS subdomain; "" when nothing is left."""
    labels = (re.sub(r"[^a-z0-9]+", "-", label).strip("-") for label in hostname.lower().split("."))
    return ".".join(label[:63].rstrip("-") for label in labels if label)


def _shortened(prefix: str, host: str, suffix: str) -> str:
    room = MAX_NAME - len(prefix) - len(suffix) - 1
    if len(host) > room:  # two hosts may share what is left: the suffix of the next try tells them apart
        host = host[:room].rstrip("-.")
    return prefix + ".".join(part for part in (host, suffix) if part)


# --- keys ---------------------------------------------------------------------------------------------------


def require_sound(keys: PeerKeys, *, remedy: str) -> None:
    """Raises Refused for a key that is not canonical, or with which any secret would be known to all."""
    named = {"WireGuard": keys.wireguard, "probe": keys.probe}
    for name, key in named.items():
        coordinate = int.from_bytes(key.raw, "little")
        if coordinate >= FIELD:
            raise Refused(f"the {name} key is not in canonical form: {remedy}")
        if _is_low_order(coordinate):
            raise Refused(f"the {name} key has a low order and protects nothing: {remedy}")
    require_sound_signing(keys.signing, remedy=remedy)
    if len({keys.wireguard, keys.probe, keys.signing}) < 3:
        raise Refused(f"the WireGuard, probe and signing keys must be three: {remedy}")


def require_sound_signing(key: PublicKey, *, remedy: str) -> None:
    """Raises Refused for an Ed25519 key that is not canonical, or that anyone could sign for."""
    edwards = int.from_bytes(key.raw, "little") & (2**255 - 1)  # the top bit is the sign of x
    if edwards >= FIELD:
        raise Refused(f"the signing key is not in canonical form: {remedy}")
    # RFC 7748, section 4.1: the same point on the Montgomery curve, u = (1 + y) / (1 - y).
    montgomery = (1 + edwards) * pow(1 - edwards, FIELD - 2, FIELD) % FIELD
    if edwards == 1 or _is_low_order(montgomery):
        raise Refused(f"the signing key has a low order: anyone could sign for it: {remedy}")


# Once clamped, every X25519 private key is a multiple of 8, the largest low order (RFC 7748): any will do.
_ANY_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))


def _is_low_order(coordinate: int) -> bool:
    key = X25519PublicKey.from_public_bytes(coordinate.to_bytes(32, "little"))
    try:
        return not any(_ANY_KEY.exchange(key))
    except ValueError:  # what the library raises for an all-zero secret (RFC 7748, section 6.1)
        return True
