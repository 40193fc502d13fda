"""Joining: a token joins whom it may, a machine is one peer, and no key is replaced or comes back."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scope_operator.enrolment import FIELD, enrol, leave, peer_names, remove_peer
from scope_operator.sqlite import Identity, open_registry
from scope_operator.tokens import authenticate, hash_secret, make_token

from scope.enrolment import Enrolment, enrolment_to_dict, parse_enrolment, sign_enrolment, verify_enrolment
from scope.model import ConfigError, JoinToken, Kind, Mesh, Peer, PeerKeys, PublicKey, Revision, Role, Secret
from scope.registry.memory import MemoryRegistry
from scope.registry.port import Conflict, Deleted, NotFound, Put, Refused
from scope.resources import parse, to_dict
from scope.tombstones import sign_tombstone, verify_tombstone
from tests.unit.registry_conformance import MESH

WALL = 1_700_000_000.0
SECRET = Secret(bytes(range(32)))


def signing_key(seed: Secret) -> PublicKey:
    return PublicKey(Ed25519PrivateKey.from_private_bytes(seed.raw).public_key().public_bytes_raw())


REGISTRY_SEED = Secret(b"r" * 32)
REGISTRY = signing_key(REGISTRY_SEED)


class Machine:
    """A machine with keys of its own."""

    def __init__(self, number: int, hostname: str = "") -> None:
        self.hostname = hostname or f"host{number}"
        self.signing = Secret(bytes([3]) + number.to_bytes(31, "big"))
        # The first and last byte of an X25519 key are clamped, so these tell no two apart.
        private = [bytes([part, part]) + number.to_bytes(29, "big") + bytes(1) for part in (8, 16)]
        public = [
            PublicKey(X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw())
            for raw in private
        ]
        self.keys = PeerKeys(public[0], public[1], signing_key(self.signing))

    def request(
        self,
        *,
        token: str = "tk-1",
        secret: Secret = SECRET,
        mesh: str = "home",
        keys: PeerKeys | None = None,
    ) -> Enrolment:
        asked = Enrolment(mesh, token, secret, self.hostname, keys or self.keys)
        return sign_enrolment(asked, registry=REGISTRY, signing=self.signing)


def registry_with(*, single_use: bool = False, role: Role = Role.AUTO, mesh: str = "home") -> MemoryRegistry:
    numbers = itertools.count(1)
    registry = MemoryRegistry(
        "memory",
        wall=lambda: WALL,
        now=lambda: 0.0,
        new_uid=lambda: f"uid-{next(numbers)}",
        new_signal=asyncio.Event,
    )
    token = make_token(
        token_id="tk-1",
        secret=SECRET,
        mesh=mesh,
        role=role,
        wall=WALL,
        lifetime=3600.0,
        single_use=single_use,
    )
    asyncio.run(_fill(registry, token))
    return registry


async def _fill(registry: MemoryRegistry, token: JoinToken) -> None:
    await registry.create(MESH)
    await registry.create(token)


def join(registry: MemoryRegistry, request: Enrolment, *, wall: float = WALL, max_peers: int = 100) -> Peer:
    return asyncio.run(enrol(registry, request, registry_key=REGISTRY, wall=wall, max_peers=max_peers))


def peers_of(registry: MemoryRegistry) -> list[Peer]:
    return [each for each in registry.store.list(Kind.PEER).resources if isinstance(each, Peer)]


class Interleaved(MemoryRegistry):
    """A registry that lets every other caller run before each of its answers, as a network would."""

    def __init__(self, inner: MemoryRegistry) -> None:
        self.__dict__ = inner.__dict__

    def __getattribute__(self, name: str) -> object:
        found = super().__getattribute__(name)
        if name not in ("list", "get", "create", "update", "update_status", "delete"):
            return found
        assert callable(found)
        verb: Callable[..., Awaitable[object]] = found

        async def later(*args: object, **kwargs: object) -> object:
            await asyncio.sleep(0)
            answer = await verb(*args, **kwargs)
            await asyncio.sleep(0)
            return answer

        return later


def test_a_machine_with_a_token_becomes_a_peer_with_its_keys() -> None:
    registry = registry_with(role=Role.HUB)
    machine = Machine(1, "Web-1.Example.COM")
    peer = join(registry, machine.request())
    assert peer.meta.name == "home.external.web-1.example.com"
    assert peer.report is not None
    assert peer.report.keys == machine.keys
    assert peer.spec.role is Role.HUB
    assert parse(to_dict(peer)) == peer


def test_the_same_machine_gets_its_own_peer_back() -> None:
    registry = registry_with()
    peer = join(registry, Machine(1).request())
    assert join(registry, Machine(1).request()) == peer
    assert join(registry, Machine(1, "renamed").request()) == peer
    assert (
        join(registry, Machine(1).request(), wall=WALL + 7200) == peer
    )  # its answer was lost past the expiry
    assert peers_of(registry) == [peer]


def test_a_lost_answer_does_not_lock_a_machine_out_of_its_single_use_token() -> None:
    registry = registry_with(single_use=True)
    peer = join(registry, Machine(1).request())
    assert join(registry, Machine(1).request()) == peer
    asyncio.run(registry.delete(Kind.PEER, peer.meta.name, uid=peer.meta.uid))  # it died before the creation
    assert join(registry, Machine(1).request()).report == peer.report


@pytest.mark.parametrize("interleaved", [False, True])
def test_fifty_parallel_joins_with_a_single_use_token_make_one_peer(interleaved: bool) -> None:
    memory = registry_with(single_use=True)
    registry = Interleaved(memory) if interleaved else memory

    async def body() -> list[Peer | BaseException]:
        return await asyncio.gather(
            *(
                enrol(registry, Machine(number).request(), registry_key=REGISTRY, wall=WALL)
                for number in range(50)
            ),
            return_exceptions=True,
        )

    answers = asyncio.run(body())
    joined = [answer for answer in answers if isinstance(answer, Peer)]
    assert joined == peers_of(memory)
    assert len(joined) == 1
    refusals = {str(answer) for answer in answers if isinstance(answer, Refused)}
    assert refusals == {
        "join token tk-1 was used by another machine: `scopectl token create --mesh home` makes a new one"
    }


@pytest.mark.parametrize("interleaved", [False, True])
def test_parallel_joins_of_one_machine_make_one_peer(interleaved: bool) -> None:
    memory = registry_with(single_use=True)
    registry = Interleaved(memory) if interleaved else memory

    async def body() -> list[Peer]:
        return await asyncio.gather(
            *(enrol(registry, Machine(1).request(), registry_key=REGISTRY, wall=WALL) for _ in range(8))
        )

    assert len({peer.meta.uid for peer in asyncio.run(body())}) == 1
    assert len(peers_of(memory)) == 1


def test_parallel_joins_with_one_key_under_two_names_never_leave_two_peers() -> None:
    memory = registry_with()

    async def body() -> None:
        await asyncio.gather(
            *(
                enrol(
                    Interleaved(memory),
                    Machine(1, f"name{number}").request(),
                    registry_key=REGISTRY,
                    wall=WALL,
                )
                for number in range(5)
            ),
            return_exceptions=True,
        )

    asyncio.run(body())
    assert len(peers_of(memory)) <= 1
    assert join(memory, Machine(1).request()) in peers_of(memory)


def test_colliding_hostnames_rename_nobody() -> None:
    registry = registry_with()
    first = join(registry, Machine(1, "web").request())
    second = join(registry, Machine(2, "WEB").request())
    assert first.meta.name == "home.external.web"
    assert second.meta.name.startswith("home.external.web.")
    assert second.meta.name == peer_names("home", "web", Machine(2).keys.wireguard)[1]
    assert peers_of(registry) == [first, second]


@pytest.mark.parametrize(
    "hostname", ["a", "-", "ÄÖ", "x" * 253, ".".join(["y" * 63] * 3), "a..b", "a_b c", "%"]
)
def test_every_hostname_gives_valid_and_distinct_names(hostname: str) -> None:
    names = peer_names("m" * 63, hostname, Machine(1).keys.wireguard)
    assert len(set(names)) == len(names) >= 2
    for name in names:
        assert parse(
            to_dict(replace(join(registry_with(), Machine(1).request()), meta=replace(MESH.meta, name=name)))
        )


def test_a_wrong_secret_and_an_unknown_token_are_refused_alike() -> None:
    registry = registry_with()
    answers = []
    for request in (
        Machine(1).request(secret=Secret(bytes(32))),
        Machine(1).request(token="tk-2"),
    ):
        with pytest.raises(Refused, match="scopectl token create --mesh home") as refused:
            join(registry, request)
        answers.append(str(refused.value))
    assert len(set(answers)) == 1
    assert peers_of(registry) == []


def test_an_absent_token_has_no_secret() -> None:
    with pytest.raises(Refused):
        authenticate(None, secret=Secret(bytes(32)), mesh="home")


def test_an_expired_or_foreign_token_is_refused() -> None:
    with pytest.raises(Refused, match="expired 1 s ago"):
        join(registry_with(), Machine(1).request(), wall=WALL + 3601)
    with pytest.raises(Refused, match="is for mesh 'other', not 'home'"):
        join(registry_with(mesh="other"), Machine(1).request())


def test_a_secret_is_kept_as_its_hash_alone() -> None:
    token = registry_with().store.get(Kind.TOKEN, "tk-1")
    assert isinstance(token, JoinToken)
    assert token.spec.secret_hash == hash_secret(SECRET) != SECRET.raw


@pytest.mark.parametrize("lifetime", [0.0, -1.0, 366 * 86400.0, float("nan"), float("inf")])
def test_a_token_lives_a_year_at_most(lifetime: float) -> None:
    with pytest.raises(Refused, match="365 days"):
        make_token(
            token_id="t",
            secret=SECRET,
            mesh="home",
            role=Role.AUTO,
            wall=WALL,
            lifetime=lifetime,
            single_use=False,
        )


def test_a_request_is_bound_to_its_keys_mesh_token_and_registry() -> None:
    registry, request = registry_with(), Machine(1).request()
    for changed in (
        replace(request, keys=replace(request.keys, wireguard=Machine(2).keys.wireguard)),
        replace(request, hostname="other"),
        replace(request, held_addresses=(ip_address("100.64.0.9"),)),
        replace(request, signature=bytes(64)),
        sign_enrolment(request, registry=Machine(9).keys.signing, signing=Machine(1).signing),
    ):
        with pytest.raises(Refused, match="not signed by its signing key"):
            join(registry, changed)
    assert not verify_enrolment(replace(request, mesh="other"), registry=REGISTRY)
    assert not verify_enrolment(replace(request, token_id="tk-9"), registry=REGISTRY)
    assert peers_of(registry) == []


@pytest.mark.parametrize("part", ["wireguard", "probe", "signing"])
def test_a_key_of_another_machine_is_never_taken(part: str) -> None:
    registry = registry_with()
    victim = join(registry, Machine(1).request())
    thief, stolen = Machine(2), getattr(Machine(1).keys, part)
    keys = PeerKeys(
        **{
            name: stolen if name == part else getattr(thief.keys, name)
            for name in ("wireguard", "probe", "signing")
        }
    )
    if part == "signing":
        thief.signing = Machine(1).signing
    with pytest.raises(Refused, match="belongs to another peer"):
        join(registry, thief.request(keys=keys))
    assert peers_of(registry) == [victim]


def low_order_points() -> list[bytes]:
    """Encodings of the points of low order on Curve25519 and its twist, canonical and not."""
    eight = [
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ]
    numbers = [0, 1, FIELD - 1, FIELD, FIELD + 1]
    return [n.to_bytes(32, "little") for n in numbers] + [bytes.fromhex(text) for text in eight]


@pytest.mark.parametrize("part", ["wireguard", "probe"])
@pytest.mark.parametrize("raw", low_order_points())
def test_a_key_of_low_order_is_refused(part: str, raw: bytes) -> None:
    keys = replace(Machine(1).keys, **{part: PublicKey(raw)})
    with pytest.raises(Refused, match=r"low order|canonical"):
        join(registry_with(), Machine(1).request(keys=keys))


@pytest.mark.parametrize("y", [0, 1, FIELD - 1, FIELD, FIELD + 1])
def test_a_signing_key_of_low_order_is_refused(y: int) -> None:
    for sign in (0, 1 << 255):
        key = PublicKey((y | sign).to_bytes(32, "little"))
        keys = replace(Machine(1).keys, signing=key)
        with pytest.raises(Refused, match=r"low order|canonical"):
            join(registry_with(), Machine(1).request(keys=keys))


def test_a_key_in_another_encoding_is_refused() -> None:
    raw = bytearray(Machine(1).keys.wireguard.raw)
    raw[31] |= 0x80  # WireGuard ignores this bit
    keys = replace(Machine(1).keys, wireguard=PublicKey(bytes(raw)))
    with pytest.raises(Refused, match="canonical"):
        join(registry_with(), Machine(1).request(keys=keys))


def test_a_mesh_has_a_bounded_number_of_peers() -> None:
    registry = registry_with()
    first = join(registry, Machine(1).request(), max_peers=2)
    join(registry, Machine(2).request(), max_peers=2)
    with pytest.raises(Refused, match="has 2 peers, the most it may have"):
        join(registry, Machine(3).request(), max_peers=2)
    assert join(registry, Machine(1).request(), max_peers=2) == first


def test_a_mesh_that_is_absent_is_refused_with_the_next_step() -> None:
    registry = registry_with()
    mesh = registry.store.get(Kind.MESH, "home")
    asyncio.run(registry.delete(Kind.MESH, "home", uid=mesh.meta.uid))
    with pytest.raises(Refused, match="scopectl apply"):
        join(registry, Machine(1).request())


def test_fifty_parallel_joins_with_a_single_use_token_make_one_peer_on_disk(tmp_path: Path) -> None:
    async def body() -> tuple[int, int]:
        registry = open_registry(
            tmp_path / "r.db",
            wall=lambda: WALL,
            now=lambda: 0.0,
            new_uid=lambda: os.urandom(8).hex(),
            new_identity=lambda: Identity("registry-1", REGISTRY_SEED, Secret(b"p" * 32)),
        )
        token = make_token(
            token_id="tk-1",
            secret=SECRET,
            mesh="home",
            role=Role.AUTO,
            wall=WALL,
            lifetime=3600.0,
            single_use=True,
        )
        await registry.create(MESH)
        await registry.create(token)
        answers = await asyncio.gather(
            *(enrol(registry, Machine(n).request(), registry_key=REGISTRY, wall=WALL) for n in range(50)),
            return_exceptions=True,
        )
        stored = (await registry.list(Kind.PEER)).resources
        await registry.close()
        return sum(isinstance(answer, Peer) for answer in answers), len(stored)

    assert asyncio.run(body()) == (1, 1)


def test_a_token_does_not_open_a_mesh_that_was_made_anew_under_its_name() -> None:
    registry = registry_with()
    mesh = registry.store.get(Kind.MESH, "home")
    registry.store.apply(Deleted(mesh, Revision("memory", registry.store.number + 1)))
    anew = replace(mesh, meta=replace(mesh.meta, uid="anew", created=WALL + 1))
    registry.store.apply(Put(anew, Revision("memory", registry.store.number + 1)))
    with pytest.raises(Refused, match="is older than ScopeMesh 'home': `scopectl token create"):
        join(registry, Machine(1).request(), wall=WALL + 2)


def test_a_removed_peer_stays_listed_with_a_tombstone_and_its_keys_do_not_come_back() -> None:
    registry = registry_with()
    peer = join(registry, Machine(1).request())
    removed = asyncio.run(
        remove_peer(registry, peer.meta.name, uid=peer.meta.uid, signing=REGISTRY_SEED, wall=WALL + 5)
    )
    tombstone, mesh = removed.assignment.tombstone, registry.store.get(Kind.MESH, "home")
    assert isinstance(mesh, Mesh)
    assert tombstone is not None
    assert (tombstone.mesh_uid, tombstone.peer_uid) == (mesh.meta.uid, peer.meta.uid)
    assert verify_tombstone(tombstone, registry=REGISTRY, peer=None)
    assert peers_of(registry) == [removed]
    assert [(each.type, each.reason, each.changed) for each in removed.assignment.conditions] == [
        ("Removed", "ByAdministrator", WALL + 5)
    ]
    with pytest.raises(Refused, match="was removed from mesh 'home': run `scope-agent leave`"):
        join(registry, Machine(1).request())
    one_key = replace(Machine(2).keys, wireguard=Machine(1).keys.wireguard)
    with pytest.raises(Refused, match="was removed"):
        join(registry, Machine(2).request(keys=one_key))


def test_a_removal_is_done_once_and_names_its_uid() -> None:
    registry = registry_with()
    peer = join(registry, Machine(1).request())
    name, uid = peer.meta.name, peer.meta.uid
    with pytest.raises(Conflict):
        asyncio.run(remove_peer(registry, name, uid="other", signing=REGISTRY_SEED, wall=WALL))
    first = asyncio.run(remove_peer(registry, name, uid=uid, signing=REGISTRY_SEED, wall=WALL))
    assert asyncio.run(remove_peer(registry, name, uid=uid, signing=REGISTRY_SEED, wall=WALL + 9)) == first
    with pytest.raises(NotFound):
        asyncio.run(remove_peer(registry, "home.external.x", uid=uid, signing=REGISTRY_SEED, wall=WALL))


def test_a_peer_leaves_with_a_tombstone_of_its_own_and_nobody_elses() -> None:
    registry = registry_with()
    machine, stranger = Machine(1), Machine(2)
    peer, other = join(registry, machine.request()), join(registry, stranger.request())
    mesh_uid = registry.store.get(Kind.MESH, "home").meta.uid

    def leaving(of: Peer, key: PublicKey, signer: Secret) -> Peer:
        tombstone = sign_tombstone(mesh_uid=mesh_uid, peer_uid=of.meta.uid, key=key, secret=signer)
        return asyncio.run(leave(registry, peer.meta.name, tombstone, registry_key=REGISTRY, wall=WALL))

    with pytest.raises(Refused, match="signed neither by"):
        leaving(peer, machine.keys.wireguard, stranger.signing)
    with pytest.raises(Refused, match="names another"):
        leaving(peer, stranger.keys.wireguard, machine.signing)
    with pytest.raises(Conflict):
        leaving(other, stranger.keys.wireguard, stranger.signing)
    left = leaving(peer, machine.keys.wireguard, machine.signing)
    assert left.assignment.tombstone is not None
    assert left.assignment.conditions[0].reason == "Left"
    assert leaving(peer, machine.keys.wireguard, machine.signing) == left


def test_a_removal_retries_when_the_peer_changed_in_the_meantime() -> None:
    registry = registry_with()
    peer = join(registry, Machine(1).request())

    async def body() -> tuple[Peer, Peer]:
        assert peer.report is not None
        slow = Interleaved(registry)
        removal = asyncio.ensure_future(
            remove_peer(slow, peer.meta.name, uid=peer.meta.uid, signing=REGISTRY_SEED, wall=WALL)
        )
        for direct in range(1, 4):
            await asyncio.sleep(0)
            await registry.update_status(
                Kind.PEER, peer.meta.name, replace(peer.report, direct=direct), uid=peer.meta.uid
            )
        await removal
        stored = await registry.get(Kind.PEER, peer.meta.name)
        assert isinstance(stored, Peer)
        return await removal, stored

    removed, stored = asyncio.run(body())
    assert removed.assignment.tombstone is not None
    assert stored.assignment == removed.assignment
    assert stored.report is not None
    assert stored.report.direct == 3


def test_a_request_comes_through_its_dictionary_unchanged() -> None:
    request = sign_enrolment(
        replace(Machine(1).request(), held_addresses=(ip_address("100.64.0.9"), ip_address("fd00:5c0::9"))),
        registry=REGISTRY,
        signing=Machine(1).signing,
    )
    assert parse_enrolment(enrolment_to_dict(request)) == request


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("mesh", 7, "mesh: allowed"),
        ("hostname", "x" * 254, "hostname: allowed: 1 to 253"),
        ("hostname", "a\nb", "hostname: allowed"),
        ("secret", "c2hvcnQ=", "secret: allowed: 32 bytes"),
        ("secret", None, "secret: allowed"),
        ("keys", [], "keys: allowed: an object"),
        ("keys", {"wireGuard": "x"}, "keys.wireGuard: allowed"),
        ("heldAddresses", ["1.2.3.4.5"], "heldAddresses: allowed"),
        ("heldAddresses", ["10.0.0.1"] * 5, "heldAddresses: allowed: at most 4"),
        ("heldAddresses", ["fe80::1%eth0"], "without a zone"),
        ("hostnam", "x", "unknown field 'hostnam'"),
    ],
)
def test_a_bad_request_is_refused_with_the_field_and_without_its_value(
    field: str, value: object, says: str
) -> None:
    document = enrolment_to_dict(Machine(1).request())
    document[field] = value
    with pytest.raises(ConfigError, match=says):
        parse_enrolment(document)
