"""A cluster joins a mesh with a token, keeps its name for good, and nobody takes its place."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest
from scope_operator.clusters import (
    find_cluster,
    join_cluster,
    remove_cluster,
    replace_tokens,
    verifying_key,
)

from scope.cluster_enrolment import (
    ClusterEnrolment,
    cluster_enrolment_to_dict,
    parse_cluster_enrolment,
    verify_cluster_enrolment,
)
from scope.model import (
    Cluster,
    ConfigError,
    Curve,
    EcKey,
    JoinToken,
    Kind,
    Mesh,
    Meta,
    PublicKey,
    Role,
    RsaKey,
    Secret,
)
from scope.registry.memory import MemoryRegistry
from scope.registry.port import Conflict, NotFound, Refused
from tests.unit.cluster_fixture import SECRET, ApiServer, JoiningCluster, invite, public_half
from tests.unit.registry_conformance import MESH
from tests.unit.test_enrolment import Interleaved

WALL = 1_700_000_000.0
REGISTRY = Secret(b"r" * 32)
WEST = JoiningCluster()
REINSTALLED = replace(WEST, seed=78)


def registry_with(*, single_use: bool = True, role: Role = Role.AUTO) -> MemoryRegistry:
    numbers = itertools.count(1)
    registry = MemoryRegistry(
        "memory",
        wall=lambda: WALL,
        now=lambda: 0.0,
        new_uid=lambda: f"uid-{next(numbers)}",
        new_signal=asyncio.Event,
    )

    async def fill() -> None:
        await registry.create(MESH)
        await invite(registry, wall=WALL, single_use=single_use, role=role)

    asyncio.run(fill())
    return registry


def join(
    registry: MemoryRegistry, cluster: JoiningCluster, *, token: str = "tk-1", wall: float = WALL
) -> tuple[Cluster, ...]:
    return ask(registry, cluster.request(registry=REGISTRY, token=token), wall=wall)


def ask(registry: MemoryRegistry, request: ClusterEnrolment, *, wall: float = WALL) -> tuple[Cluster, ...]:
    mesh = asyncio.run(join_cluster(registry, request, registry_key=public_half(REGISTRY), wall=wall))
    assert registry.store.get(Kind.MESH, "home") == mesh
    return mesh.status.clusters


def clusters_of(registry: MemoryRegistry) -> tuple[Cluster, ...]:
    mesh = registry.store.get(Kind.MESH, "home")
    assert isinstance(mesh, Mesh)
    return mesh.status.clusters


def token_of(registry: MemoryRegistry, name: str = "tk-1") -> JoinToken:
    token = registry.store.get(Kind.TOKEN, name)
    assert isinstance(token, JoinToken)
    return token


# --- joining ------------------------------------------------------------------------------------------------


def test_a_cluster_joins_with_a_token_and_stands_in_the_mesh() -> None:
    registry = registry_with()
    assert join(registry, WEST) == (WEST.cluster,)
    assert len(token_of(registry).spec.used_by) == 1


def test_a_lost_answer_can_be_asked_for_again_when_the_token_is_used_up_and_expired() -> None:
    registry = registry_with()
    join(registry, WEST)
    revision = registry.store.revision
    assert join(registry, WEST, wall=WALL + 7200) == (WEST.cluster,)
    assert registry.store.revision == revision


def test_the_same_cluster_may_say_anew_what_its_agents_are_known_by() -> None:
    registry = registry_with()
    join(registry, WEST)
    moved = replace(WEST, api=ApiServer(2, kid="key-2"))
    assert join(registry, moved) == (moved.cluster,)


def test_two_clusters_stand_beside_each_other() -> None:
    registry = registry_with(single_use=False)
    join(registry, WEST)
    east = replace(WEST, name="east", uid="kube-system-of-east", seed=79)
    assert join(registry, east) == (WEST.cluster, east.cluster)


def test_a_name_that_another_cluster_came_with_is_refused_with_both_uids_and_a_way_out() -> None:
    registry = registry_with(single_use=False)
    join(registry, WEST)
    with pytest.raises(Refused) as refused:
        join(registry, replace(REINSTALLED, uid="kube-system-of-a-stranger"))
    assert str(refused.value) == (
        "in mesh 'home' the name 'west' belongs to the cluster whose kube-system namespace has UID "
        "kube-system-of-west, and yours has kube-system-of-a-stranger: give yours another name; or, if that "
        "one is gone for good, `scopectl cluster remove --mesh home west`"
    )
    assert clusters_of(registry) == (WEST.cluster,)


def test_a_cluster_that_is_there_under_another_name_is_refused() -> None:
    registry = registry_with(single_use=False)
    join(registry, WEST)
    with pytest.raises(Refused, match="already, as 'west': keep that name"):
        join(registry, replace(WEST, name="east"))


def test_the_registrys_own_cluster_does_not_join_it() -> None:
    registry = registry_with()
    mesh = registry.store.get(Kind.MESH, "home")
    assert isinstance(mesh, Mesh)
    status = replace(mesh.status, clusters=(Cluster(WEST.name, WEST.uid),))
    asyncio.run(registry.update_status(Kind.MESH, "home", status, uid=mesh.meta.uid))
    with pytest.raises(Refused, match="the registry's own"):
        join(registry, WEST)


def test_another_key_needs_a_token_of_its_own() -> None:
    registry = registry_with(single_use=False)
    join(registry, WEST)
    with pytest.raises(Refused, match=r"joined mesh 'home' with another key: .* --single-use` makes"):
        join(registry, REINSTALLED)
    asyncio.run(invite(registry, "tk-2", wall=WALL))
    assert join(registry, REINSTALLED, token="tk-2") == (REINSTALLED.cluster,)


def test_a_token_that_let_in_one_key_lets_in_no_other() -> None:
    registry = registry_with()
    join(registry, WEST)
    with pytest.raises(Refused, match="was used by another machine"):
        join(registry, REINSTALLED)
    assert clusters_of(registry) == (WEST.cluster,)


def test_of_many_clusters_that_show_one_single_use_token_at_once_one_joins() -> None:
    registry = Interleaved(registry_with())
    many = [
        replace(WEST, name=f"c{number}", uid=f"uid-of-c{number}", seed=100 + number) for number in range(8)
    ]

    async def run() -> list[Mesh | BaseException]:
        asked = [
            join_cluster(
                registry, each.request(registry=REGISTRY), registry_key=public_half(REGISTRY), wall=WALL
            )
            for each in many
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(run())
    assert sum(isinstance(answer, Mesh) for answer in answers) == 1
    assert sum(isinstance(answer, Refused) for answer in answers) == 7
    assert len(clusters_of(registry)) == 1


def test_clusters_that_join_at_once_do_not_undo_each_other() -> None:
    registry = Interleaved(registry_with(single_use=False))
    many = [
        replace(WEST, name=f"c{number}", uid=f"uid-of-c{number}", seed=100 + number) for number in range(8)
    ]

    async def run() -> None:
        await asyncio.gather(
            *(
                join_cluster(
                    registry, each.request(registry=REGISTRY), registry_key=public_half(REGISTRY), wall=WALL
                )
                for each in many
            )
        )

    asyncio.run(run())
    assert {each.name for each in clusters_of(registry)} == {each.name for each in many}


def test_a_mesh_has_at_most_64_clusters() -> None:
    registry = registry_with(single_use=False)
    for number in range(64):
        join(registry, replace(WEST, name=f"c{number}", uid=f"uid-of-c{number}", seed=100 + number))
    with pytest.raises(Refused, match="has 64 clusters, the most it may have"):
        join(registry, WEST)


@pytest.mark.parametrize("role", [Role.HUB, Role.EDGE])
def test_a_token_for_peers_of_one_role_lets_in_no_cluster(role: Role) -> None:
    with pytest.raises(Refused, match=f"for peers of role {role}, not for a cluster"):
        join(registry_with(role=role), WEST)


def test_an_expired_token_lets_in_no_cluster() -> None:
    with pytest.raises(Refused, match="expired"):
        join(registry_with(), WEST, wall=WALL + 7200)


def test_a_token_of_an_earlier_mesh_lets_in_no_cluster() -> None:
    registry = registry_with()
    mesh = registry.store.get(Kind.MESH, "home")

    async def anew() -> None:
        await registry.delete(Kind.MESH, "home", uid=mesh.meta.uid)
        registry.store._wall = lambda: WALL + 1
        await registry.create(MESH)

    asyncio.run(anew())
    with pytest.raises(Refused, match="is older than ScopeMesh 'home'"):
        join(registry, WEST)


def test_what_was_signed_for_another_registry_or_changed_afterwards_is_refused() -> None:
    registry = registry_with()
    request = WEST.request(registry=REGISTRY)
    other = replace(WEST, api=ApiServer(9)).cluster
    for damaged in (
        WEST.request(registry=Secret(b"s" * 32)),
        replace(request, cluster=other),
        replace(request, cluster=replace(request.cluster, uid="another")),
        replace(request, signature=bytes(64)),
    ):
        with pytest.raises(Refused, match="is not signed by its signing key for this registry"):
            ask(registry, damaged)
    assert clusters_of(registry) == ()


def test_a_wrong_secret_says_nothing_of_what_there_is() -> None:
    registry = registry_with()
    for token, secret in (("tk-1", Secret(bytes(32))), ("nobody", SECRET)):
        with pytest.raises(Refused, match="no join token has this id and secret"):
            ask(registry, WEST.request(registry=REGISTRY, token=token, secret=secret))


def test_a_signing_key_that_anyone_can_sign_for_is_refused() -> None:
    registry = registry_with()
    one = PublicKey((1).to_bytes(32, "little"))  # the neutral element: every signature holds
    trust = WEST.cluster.trust
    assert trust is not None
    forged = replace(WEST.cluster, trust=replace(trust, signing_key=one))
    # R = the neutral element, S = 0 satisfies R = S*B - k*A for A of order 1, whatever is signed.
    request = ClusterEnrolment("home", "tk-1", SECRET, forged, (1).to_bytes(32, "little") + bytes(32))
    with pytest.raises(Refused):
        ask(registry, request)
    assert clusters_of(registry) == ()


@pytest.mark.parametrize("key", [EcKey("k", Curve.P256, 1, 1), EcKey("k", Curve.P384, 0, 0)])
def test_a_key_that_is_no_point_of_its_curve_is_refused(key: EcKey) -> None:
    with pytest.raises(Refused, match="key 'k' is no public key"):
        verifying_key(key)


# --- keys ---------------------------------------------------------------------------------------------------


def test_the_keys_of_a_cluster_are_replaced_and_nothing_else() -> None:
    registry = registry_with()
    join(registry, WEST)
    tokens = replace(WEST.tokens, keys=(ApiServer(2, "key-2", None).public,))
    mesh = asyncio.run(replace_tokens(registry, "home", WEST.cluster, tokens))
    (cluster,) = mesh.status.clusters
    assert cluster.trust is not None
    assert cluster.trust.tokens == tokens
    assert cluster.trust.signing_key == public_half(WEST.signing)


def test_whoever_was_replaced_replaces_no_keys() -> None:
    registry = registry_with(single_use=False)
    join(registry, WEST)
    asyncio.run(invite(registry, "tk-2", wall=WALL))
    join(registry, REINSTALLED, token="tk-2")
    with pytest.raises(Conflict, match="joined mesh 'home' anew"):
        asyncio.run(replace_tokens(registry, "home", WEST.cluster, WEST.tokens))
    assert clusters_of(registry) == (REINSTALLED.cluster,)


def test_unsound_keys_replace_none() -> None:
    registry = registry_with()
    join(registry, WEST)
    tokens = replace(WEST.tokens, keys=(EcKey("k", Curve.P256, 1, 1),))
    with pytest.raises(Refused, match="no public key"):
        asyncio.run(replace_tokens(registry, "home", WEST.cluster, tokens))
    assert clusters_of(registry) == (WEST.cluster,)


# --- leaving ------------------------------------------------------------------------------------------------


def test_a_removed_cluster_gives_its_name_back() -> None:
    registry = registry_with(single_use=False)
    join(registry, WEST)
    assert asyncio.run(remove_cluster(registry, "home", "west")) == WEST.cluster
    assert clusters_of(registry) == ()
    with pytest.raises(NotFound, match="has no cluster 'west'"):
        asyncio.run(remove_cluster(registry, "home", "west"))
    stranger = replace(REINSTALLED, uid="kube-system-of-a-stranger")
    assert join(registry, stranger) == (stranger.cluster,)


def test_the_registrys_own_cluster_is_not_removed() -> None:
    registry = registry_with()
    mesh = registry.store.get(Kind.MESH, "home")
    assert isinstance(mesh, Mesh)
    status = replace(mesh.status, clusters=(Cluster("home", "own"),))
    asyncio.run(registry.update_status(Kind.MESH, "home", status, uid=mesh.meta.uid))
    with pytest.raises(Refused, match="the registry's own"):
        asyncio.run(remove_cluster(registry, "home", "home"))


# --- the request --------------------------------------------------------------------------------------------


def test_a_request_is_read_as_it_was_written() -> None:
    for curve in (None, *Curve):
        request = replace(WEST, api=ApiServer(3, curve=curve)).request(registry=REGISTRY)
        read = parse_cluster_enrolment(cluster_enrolment_to_dict(request))
        assert (read, read.secret.raw) == (request, SECRET.raw)
        assert verify_cluster_enrolment(read, registry=public_half(REGISTRY))


def test_a_request_of_a_cluster_without_keys_is_refused() -> None:
    document = WEST.document(registry=REGISTRY)
    document["cluster"] = {"name": "west", "uid": "u"}
    with pytest.raises(ConfigError, match="signingKey, issuer, keys and serviceAccount beside name and uid"):
        parse_cluster_enrolment(document)


def test_a_request_shows_no_secret() -> None:
    assert SECRET.raw.hex() not in repr(WEST.request(registry=REGISTRY))


def test_a_cluster_is_found_by_its_name() -> None:
    mesh = replace(MESH, meta=Meta("home"), status=replace(MESH.status, clusters=(WEST.cluster,)))
    assert find_cluster(mesh, "west") == WEST.cluster
    assert find_cluster(mesh, "east") is None


def test_each_kind_of_key_goes_with_one_algorithm() -> None:
    algorithms = [verifying_key(ApiServer(1, curve=curve).public).algorithm for curve in (None, *Curve)]
    assert algorithms == ["RS256", "ES256", "ES384", "ES512"]
    assert isinstance(ApiServer(1, curve=None).public, RsaKey)
