"""What an agent keeps on disk survives what disks do, and nobody else reads it."""

from __future__ import annotations

import errno
import json
import os
import stat
from base64 import b64encode
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from scope_agent.inputs import DiskState
from scope_agent.paths.birthday import Tried
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.slots import Keys, Record
from scope_agent.psk.trust import succeed
from scope_agent.relay.asking import HeldGrant
from scope_agent.state import (
    Enrolment,
    StateDir,
    enrolled_meshes,
    identity_on,
    load_ca,
    load_public_ca,
    make_ca,
    make_identity,
)

from scope.model import (
    Addressing,
    Assignment,
    Attachment,
    Candidate,
    CandidateKind,
    ConfigError,
    Endpoint,
    Fingerprint,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Revision,
    Secret,
    Snapshot,
)
from scope.tombstones import sign_tombstone

PREFIXES = Addressing(IPv4Network("10.86.0.0/16"))


def numbers(seed: int = 1) -> object:
    state = [seed]

    def draw(count: int) -> bytes:
        state[0] += 1
        return bytes([state[0]]) * count

    return draw


@pytest.fixture
def directory(tmp_path: Path) -> StateDir:
    made = StateDir("home", tmp_path)
    made.prepare()
    return made


@pytest.fixture
def enrolment() -> Enrolment:
    return Enrolment(
        mesh="home",
        device="scope0",
        identity=make_identity(numbers()),  # type: ignore[arg-type]
        url="https://192.0.2.1:7443",
        pin=bytes(32),
        registry_id="registry-1",
        registry_key=PublicKey(bytes(range(32))),
        peer_name="home.external.a",
        peer_uid="uid-a",
    )


@pytest.fixture
def state(enrolment: Enrolment) -> DiskState:
    keys = make_identity(numbers(9)).public  # type: ignore[arg-type]
    report = PeerReport(keys=keys, endpoints=(Candidate(Endpoint.parse("192.0.2.7:1"), CandidateKind.HOST),))
    peer = Peer(
        Meta("home.external.b", uid="uid-b", revision=4, created=12.0),
        PeerSpec("home"),
        report,
        Assignment(addresses=(IPv4Interface("10.86.0.2/16"),)),
    )
    tombstone = sign_tombstone(
        mesh_uid="mesh-uid", peer_uid="uid-c", key=PublicKey(bytes(32)), secret=enrolment.identity.signing
    )
    return DiskState(
        Snapshot(
            mesh=Mesh(Meta("home", uid="mesh-uid", created=1.0), MeshSpec(PREFIXES)),
            peers={keys.wireguard: peer},
            tombstones=(tombstone,),
            revision=Revision("registry-1", 17),
        ),
        last_good={keys.wireguard: Endpoint.parse("[2001:db8::7]:21000")},
        listen_port=21000,
        grants=(
            HeldGrant(
                hub=PublicKey(bytes([1] * 32)),
                peer=keys.wireguard,
                token=bytes(range(8)),
                port=26003,
                lifetime=86400.0,
                user_space=True,
            ),
        ),
        attachments=(Attachment(keys.wireguard, PublicKey(bytes([1] * 32)), 2**64 - 1, bytes(range(64))),),
        tries=(
            Tried(
                keys.wireguard,
                IPv4Address("198.51.100.1"),
                Endpoint.parse("198.51.100.2:22000"),
                tried=1_800_000_000.0,
                misses=2,
                hits=1,
            ),
        ),
    )


def test_a_snapshot_comes_back_as_it_was(directory: StateDir, state: DiskState) -> None:
    directory.save(state)
    assert directory.load() == (state, "")


def test_a_snapshot_of_an_earlier_release_holds_no_grants_attachments_and_tries(
    directory: StateDir, state: DiskState
) -> None:
    directory.save(state)
    document = json.loads(directory.snapshot_file.read_text())
    del document["grants"], document["attachments"], document["tries"]
    directory.snapshot_file.write_text(json.dumps(document))
    assert directory.load() == (replace(state, grants=(), attachments=(), tries=()), "")


def test_a_token_has_no_printable_form(state: DiskState) -> None:
    (grant,) = state.grants
    assert "26003" in repr(grant)
    assert str(grant.token) not in repr(grant) and grant.token.hex() not in repr(grant)


@pytest.mark.parametrize("damage", [{"token": "AAAA"}, {"port": 0}, {"hub": "x"}, {"lifetime": "soon"}])
def test_a_damaged_grant_damages_the_snapshot(
    directory: StateDir, state: DiskState, damage: dict[str, object]
) -> None:
    directory.save(state)
    document = json.loads(directory.snapshot_file.read_text())
    document["grants"][0] |= damage
    directory.snapshot_file.write_text(json.dumps(document))
    loaded, trouble = directory.load()
    assert loaded == DiskState(Snapshot()) and "damaged" in trouble


@pytest.mark.parametrize("damage", [{"signature": "AAAA"}, {"epoch": -1}, {"edge": "x"}, {"hub": 1}])
def test_a_damaged_attachment_damages_the_snapshot(
    directory: StateDir, state: DiskState, damage: dict[str, object]
) -> None:
    directory.save(state)
    document = json.loads(directory.snapshot_file.read_text())
    document["attachments"][0] |= damage
    directory.snapshot_file.write_text(json.dumps(document))
    loaded, trouble = directory.load()
    assert loaded == DiskState(Snapshot()) and "damaged" in trouble


def test_an_enrolment_comes_back_as_it_was(directory: StateDir, enrolment: Enrolment) -> None:
    directory.save_enrolment(enrolment)
    assert directory.load_enrolment() == enrolment
    assert enrolled_meshes(directory.path.parent) == ["home"]


def test_files_and_directory_are_for_their_owner_alone(
    directory: StateDir, enrolment: Enrolment, state: DiskState
) -> None:
    directory.save_enrolment(enrolment)
    directory.save(state)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in sorted(directory.path.iterdir())]
    assert modes == [0o600, 0o600]
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_keys_that_others_could_read_are_refused(directory: StateDir, enrolment: Enrolment) -> None:
    directory.save_enrolment(enrolment)
    directory.enrolment_file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        directory.load_enrolment()


def test_a_link_in_the_place_of_a_file_is_not_followed(
    directory: StateDir, enrolment: Enrolment, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    directory.enrolment_file.symlink_to(victim)
    with pytest.raises(ConfigError, match="symbolic link"):
        directory.load_enrolment()
    directory.save_enrolment(enrolment)
    assert victim.read_text() == "untouched"
    assert not directory.enrolment_file.is_symlink()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format":1}', '{"format":"1"}', '{"format":1,"mesh":7}']
)
def test_a_damaged_snapshot_is_put_aside_and_named(directory: StateDir, content: str) -> None:
    directory.snapshot_file.write_text(content)
    directory.snapshot_file.chmod(0o600)
    loaded, trouble = directory.load()
    assert loaded == DiskState(Snapshot())
    assert str(directory.snapshot_file) in trouble
    assert directory.snapshot_file.with_suffix(".damaged").read_text() == content


def test_a_file_of_a_newer_agent_is_left_alone(directory: StateDir, enrolment: Enrolment) -> None:
    directory.save_enrolment(enrolment)
    document = json.loads(directory.enrolment_file.read_text()) | {"format": 2}
    directory.enrolment_file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="newer scope-agent"):
        directory.load_enrolment()


def test_a_full_disk_keeps_the_old_snapshot_whole(
    directory: StateDir, state: DiskState, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.save(state)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="free some space"):
        directory.save(DiskState(Snapshot()))
    assert directory.load() == (state, "")
    assert [path.name for path in directory.path.iterdir()] == ["snapshot.json"]


def test_a_join_under_way_keeps_its_keys_until_it_is_answered(
    directory: StateDir, enrolment: Enrolment
) -> None:
    first = directory.pending_identity(numbers(3))  # type: ignore[arg-type]
    assert directory.pending_identity(numbers(5)) == first  # type: ignore[arg-type]
    directory.save_enrolment(enrolment)
    assert not directory.pending_file.exists()


def test_no_key_shows_in_what_is_printed(enrolment: Enrolment) -> None:
    secrets = (enrolment.identity.wireguard, enrolment.identity.probe, enrolment.identity.signing)
    for secret in secrets:
        assert secret is not None
        assert repr(secret.raw) not in repr(enrolment)
        assert str(secret) == "Secret(...)"


def test_an_identity_on_a_device_of_anothers_keeps_that_devices_key(
    directory: StateDir, enrolment: Enrolment
) -> None:
    device = PublicKey(bytes([7] * 32))
    foreign = replace(enrolment, device="wg0", identity=identity_on(device, enrolment.identity))
    assert foreign.is_foreign and not enrolment.is_foreign
    directory.save_enrolment(foreign)
    assert directory.load_enrolment() == foreign
    assert foreign.identity.public.wireguard == device
    assert foreign.identity.public.probe == enrolment.identity.public.probe


def test_leaving_forgets_everything(directory: StateDir, enrolment: Enrolment, state: DiskState) -> None:
    directory.save_enrolment(enrolment)
    directory.save(state)
    directory.remove()
    assert not directory.path.exists()


def test_keys_of_pairs_come_back_from_the_disk_and_a_damaged_file_is_put_aside(directory: StateDir) -> None:
    psk, chain, confirm_d, confirm_e = (Secret(bytes([number] * 32)) for number in (2, 3, 4, 5))
    keys = Keys(7, bytes([1] * 32), psk, chain=chain, confirm_d=confirm_d, confirm_e=confirm_e, suite=2)
    record = Record(Fingerprint(bytes(32)), counter=8, current=keys, next=keys, active=True, confirmed=12.5)
    one, other = PublicKey(bytes([1] * 32)), PublicKey(bytes([2] * 32))
    directory.save_psk(one, record)
    directory.save_psk(other, Record(counter=3))
    assert directory.load_psk() == ({one: record, other: Record(counter=3)}, [])
    files = sorted(directory.psk_dir.iterdir())
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    files[0].write_text("{")
    files[0].chmod(0o600)
    loaded, (trouble,) = directory.load_psk()
    assert loaded == {other: Record(counter=3)} and "agrees on a new key" in trouble
    directory.save_psk(other, None)
    assert directory.load_psk() == ({}, [])


def test_what_the_operator_said_of_an_identity_is_kept_with_the_keys(directory: StateDir) -> None:
    record = Record(pinned=Fingerprint(bytes([1] * 32)), former=Fingerprint(bytes([2] * 32)), is_told=True)
    key = PublicKey(bytes([3] * 32))
    directory.prepare()
    directory.save_psk(key, record)
    assert directory.load_psk() == ({key: record}, [])


def test_an_identity_is_made_once_and_refused_where_others_can_read_it(directory: StateDir) -> None:
    provider = CryptographyProvider()
    made = directory.hybrid_identity(numbers(), provider)  # type: ignore[arg-type]
    assert directory.hybrid_identity(numbers(5), provider) == made  # type: ignore[arg-type]
    directory.identity_file.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        directory.hybrid_identity(numbers(), provider)  # type: ignore[arg-type]
    directory.remove()
    assert not directory.identity_file.exists() and not directory.psk_dir.exists()


def test_a_rotated_identity_takes_the_place_of_the_old_one_whose_keys_are_gone(directory: StateDir) -> None:
    provider, draw = CryptographyProvider(), numbers()
    old = directory.hybrid_identity(draw, provider)  # type: ignore[arg-type]
    new = replace(succeed(old, draw, provider), certificate=bytes([7]) * 3423)  # type: ignore[arg-type]
    directory.save_hybrid_identity(new)
    assert directory.hybrid_identity(draw, provider) == new  # type: ignore[arg-type]
    assert stat.S_IMODE(directory.identity_file.stat().st_mode) == 0o600
    on_disk = b"".join(path.read_bytes() for path in directory.path.iterdir() if path.is_file())
    assert b64encode(old.mldsa.raw) not in on_disk and b64encode(new.mldsa.raw) in on_disk


def test_an_identity_of_an_earlier_release_has_neither_certificate_nor_successions(
    directory: StateDir,
) -> None:
    provider = CryptographyProvider()
    made = directory.hybrid_identity(numbers(), provider)  # type: ignore[arg-type]
    document = json.loads(directory.identity_file.read_text())
    del document["certificate"], document["successions"]
    directory.identity_file.write_text(json.dumps(document))
    assert directory.hybrid_identity(numbers(), provider) == made  # type: ignore[arg-type]
    document["successions"] = [{"ed448": "", "mldsa": "", "new": "", "signatures": ""}]
    directory.identity_file.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="is damaged"):
        directory.hybrid_identity(numbers(), provider)  # type: ignore[arg-type]


def test_a_ca_is_made_once_and_its_public_half_is_what_agents_read(tmp_path: Path) -> None:
    provider, key = CryptographyProvider(), tmp_path / "ca.json"
    public, fingerprint = make_ca(key, numbers(), provider)  # type: ignore[arg-type]
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert load_public_ca(public) == load_ca(key, provider).public
    assert load_public_ca(public).fingerprint() == fingerprint
    with pytest.raises(ConfigError, match="already"):
        make_ca(key, numbers(), provider)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"name the \.pub file"):
        load_public_ca(key)
    public.chmod(0o666)
    with pytest.raises(ConfigError, match="others can write"):
        load_public_ca(public)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        load_ca(key, provider)
    with pytest.raises(ConfigError, match="cannot read"):
        load_public_ca(tmp_path / "none.pub")
