"""`scope-registry serve` from an empty directory to a mesh: joining, leaving, restarts, and bad starts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from scope_operator.gateway import tls
from scope_operator.gateway.advertised import Advertised
from scope_operator.gateway.process import ServeConfig, Serving, UsersCertificate, serving

from scope.channel import Channel, Confirmed, Opened, Received
from scope.credentials import AdminCredential, PeerCredential, base64url, pin_of, read_base64url
from scope.enrolment import Enrolment, enrolment_to_dict, sign_enrolment
from scope.join import JoinString
from scope.model import (
    Addressing,
    ConfigError,
    GatewayOrigin,
    Kind,
    Mesh,
    MeshSpec,
    Peer,
    PeerKeys,
    PostQuantum,
    PostQuantumMode,
    PublicKey,
    Role,
    Secret,
)
from scope.registry.http import HttpRegistry, Joined
from scope.registry.port import Conflict, NotFound, PeerRemoved, Refused, Unavailable
from scope.resources import tombstone_to_dict
from scope.tombstones import sign_tombstone, verify_tombstone
from scope.vouching import replaces
from scope.wire import Ping, Pong
from tests.unit.registry_conformance import MESH

LOOPBACK = (Advertised("127.0.0.1"),)


def config_in(directory: Path) -> ServeConfig:
    return ServeConfig(directory, (("127.0.0.1", 0),), (0, 0), advertise=LOOPBACK)


def serve(body: Callable[[Serving, HttpRegistry], Awaitable[None]], config: ServeConfig) -> None:
    """Run `body` beside a registry, with a client of its administrator."""

    async def run() -> None:
        async with asyncio.timeout(30), serving(config) as running:
            credential = admin_credential(config.data)
            async with HttpRegistry(running.url, pin=running.pin, credential=credential) as admin:
                await body(running, admin)

    asyncio.run(run())


def admin_credential(data: Path) -> AdminCredential:
    return AdminCredential(Secret(json.loads((data / "admin.json").read_text())["token"].encode()))


def contents_of(directory: Path) -> bytes:
    return b"".join(file.read_bytes() for file in directory.iterdir())


class Machine:
    """A machine with keys of its own."""

    def __init__(self, seed: int) -> None:
        self.hostname = f"host{seed}"
        self.signing = Secret(bytes([seed, 1]) * 16)
        self.probe = Secret(bytes([seed, 2]) * 16)
        wireguard = X25519PrivateKey.from_private_bytes(bytes([seed, 3]) * 16)
        probe = X25519PrivateKey.from_private_bytes(self.probe.raw)
        signing = Ed25519PrivateKey.from_private_bytes(self.signing.raw)
        public = (private.public_key().public_bytes_raw() for private in (wireguard, probe, signing))
        self.keys = PeerKeys(*map(PublicKey, public))

    async def join(self, join_string: str) -> Joined:
        invitation = JoinString.parse(join_string)
        request = Enrolment(invitation.mesh, invitation.token_id, invitation.secret, self.hostname, self.keys)
        signed = sign_enrolment(request, registry=invitation.registry_key, signing=self.signing)
        async with HttpRegistry(invitation.url, pin=invitation.pin, credential=None) as client:
            return await client.join(enrolment_to_dict(signed))

    def client(self, running: Serving, joined: Joined) -> HttpRegistry:
        meta = joined.peer.meta
        credential = PeerCredential(meta.name, meta.uid, joined.registry, self.signing)
        return HttpRegistry(running.url, pin=running.pin, credential=credential)


def test_a_machine_joins_with_one_string_and_gets_its_addresses(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        joined = await Machine(1).join(await admin.create_token("home"))
        assert joined.mesh.meta.name == "home"
        assert joined.peer.meta.name == "home.external.host1"
        assert {address.version for address in joined.peer.assignment.addresses} == {4, 6}
        async with Machine(1).client(running, joined) as client:
            assert (await client.list(Kind.PEER)).resources == (joined.peer,)
            await client.heartbeat(joined.peer.meta.name)

    serve(body, config_in(tmp_path))


def test_a_machine_that_asks_twice_is_one_peer(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        token = await admin.create_token("home", single_use=True)
        first, second = await Machine(1).join(token), await Machine(1).join(token)
        assert first.peer.meta.uid == second.peer.meta.uid

    serve(body, config_in(tmp_path))


def test_of_fifty_parallel_joins_with_a_one_time_token_one_succeeds(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        token = await admin.create_token("home", single_use=True)
        answers = await asyncio.gather(
            *(Machine(seed).join(token) for seed in range(1, 51)), return_exceptions=True
        )
        assert sum(isinstance(answer, Joined) for answer in answers) == 1
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert len(refused) == 49
        assert all("used by another machine" in str(error) for error in refused)
        assert len((await admin.list(Kind.PEER)).resources) == 1

    serve(body, config_in(tmp_path))


def test_bad_tokens_are_refused_and_say_what_to_do(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        expired = await admin.create_token("home", lifetime=0.001)
        good = JoinString.parse(await admin.create_token("home"))
        foreign = replace(good, secret=Secret(bytes(32)))
        unknown = replace(good, token_id="unknown")
        elsewhere = replace(good, mesh="elsewhere")
        other_registry = replace(good, registry_key=PublicKey(bytes(32)))
        for join_string, sentence in (
            (expired, "expired"),
            (foreign.format(), "no join token"),
            (unknown.format(), "no join token"),
            (elsewhere.format(), "for mesh 'home'"),
            (other_registry.format(), "not signed"),
        ):
            with pytest.raises(Refused, match=sentence):
                await Machine(1).join(join_string)
        deleted = await admin.create_token("home")
        await admin.delete_token(JoinString.parse(deleted).token_id)
        with pytest.raises(Refused, match="scopectl token create"):
            await Machine(1).join(deleted)
        assert (await admin.list(Kind.PEER)).resources == ()

    serve(body, config_in(tmp_path))


def test_tokens_are_listed_without_their_secrets(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        token = JoinString.parse(await admin.create_token("home", single_use=True))
        (shown,) = await admin.tokens()
        assert (shown["id"], shown["mesh"], shown["singleUse"]) == (token.token_id, "home", True)
        assert set(shown) == {"id", "mesh", "role", "expires", "singleUse", "used"}
        kept = contents_of(tmp_path)
        assert token.secret.raw not in kept
        assert base64url(token.secret.raw).encode() not in kept

    serve(body, config_in(tmp_path))


def test_a_token_for_no_mesh_is_not_made(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        with pytest.raises(NotFound, match="home"):
            await admin.create_token("home")

    serve(body, config_in(tmp_path))


def test_a_mesh_on_an_existing_interface_has_no_token_for_hubs(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        policy = PostQuantum(PostQuantumMode.PREFERRED)
        spec = MeshSpec(Addressing(), existing_interface="wg0", post_quantum=policy)
        await admin.create(replace(MESH, spec=spec))
        with pytest.raises(Refused, match="home on wg0 has no hubs"):
            await admin.create_token("home", role=Role.HUB)
        assert "/home/wg0#" in await admin.create_token("home")

    serve(body, config_in(tmp_path))


def test_overlapping_meshes_are_refused(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        with pytest.raises(Refused, match=r"100\.64\.0\.0/16 overlaps"):
            await admin.create(replace(MESH, meta=replace(MESH.meta, name="other")))

    serve(body, config_in(tmp_path))


def test_a_removed_peer_is_cut_off_and_cannot_join_again(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        token = await admin.create_token("home")
        machine = Machine(1)
        joined = await machine.join(token)
        removed = await admin.remove_peer(joined.peer.meta.name)
        tombstone = removed.assignment.tombstone
        assert tombstone is not None
        assert verify_tombstone(tombstone, registry=JoinString.parse(token).registry_key, peer=None)
        async with machine.client(running, joined) as client:
            with pytest.raises(PeerRemoved):
                await client.list(Kind.PEER)
        with pytest.raises(Refused, match="was removed"):
            await machine.join(token)

    serve(body, config_in(tmp_path))


def test_a_peer_leaves_by_its_own_tombstone_and_nobody_elses(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        token = await admin.create_token("home")
        machine, other = Machine(1), Machine(2)
        joined, kept = await machine.join(token), await other.join(token)

        def signed(whom: Joined, by: Machine) -> dict[str, object]:
            assert whom.peer.report is not None
            return tombstone_to_dict(
                sign_tombstone(
                    mesh_uid=whom.mesh.meta.uid,
                    peer_uid=whom.peer.meta.uid,
                    key=whom.peer.report.keys.wireguard,
                    secret=by.signing,
                )
            )

        async with machine.client(running, joined) as client:
            for tombstone in (signed(kept, machine), signed(kept, other), signed(joined, other)):
                with pytest.raises((Refused, Conflict)):
                    await client.leave(tombstone)
            left = await client.leave(signed(joined, machine))
            assert left.assignment.tombstone is not None
            with pytest.raises(PeerRemoved):
                await client.list(Kind.PEER)
        still = await admin.get(Kind.PEER, kept.peer.meta.name)
        assert isinstance(still, Peer)
        assert still.assignment.tombstone is None

    serve(body, config_in(tmp_path))


def test_a_joined_machine_is_told_its_endpoint_by_the_reflector_that_its_mesh_names(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        machine = Machine(1)
        joined = await machine.join(await admin.create_token("home"))
        mesh = await admin.get(Kind.MESH, "home")
        assert isinstance(mesh, Mesh)
        (reflector,) = mesh.status.reflectors
        assert mesh.status.gateway == GatewayOrigin(running.url, running.pin)
        assert reflector.endpoints == running.reflecting
        assert len({endpoint.port for endpoint in reflector.endpoints}) == 2
        channel = Channel(secret=machine.probe, boot_id=bytes(16))
        channel.set_correspondents(frozenset({reflector.probe_key}))
        assert joined.peer.report is not None
        assert channel.public_key == joined.peer.report.keys.probe
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.setblocking(False)
            own.bind(("127.0.0.1", 0))
            answers: list[Opened] = []
            target = reflector.endpoints[0]
            while len(answers) < 2:
                ping = channel.seal(reflector.probe_key, Ping(1, has_session=False, received=0))
                await loop.sock_sendto(own, ping, (str(target.address), target.port))
                try:
                    async with asyncio.timeout(0.2):  # the reflector hears of a new peer within 50 ms
                        answers.append(channel.open(await loop.sock_recv(own, 2048)))
                except TimeoutError:
                    continue
            assert isinstance(answers[0], Confirmed)
            assert isinstance(answers[1], Received)
            assert isinstance(answers[1].message, Pong)
            assert answers[1].message.observed.port == own.getsockname()[1]

    serve(body, config_in(tmp_path))


# --- restarts and files -------------------------------------------------------------------------------------


def test_a_restart_keeps_everything_and_a_watch_resumes(tmp_path: Path) -> None:
    machine = Machine(1)
    kept: list[tuple[Serving, Joined, Mesh]] = []

    async def first(running: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        joined = await machine.join(await admin.create_token("home"))
        mesh = await admin.get(Kind.MESH, "home")
        assert isinstance(mesh, Mesh)
        kept.append((running, joined, mesh))

    async def second(running: Serving, admin: HttpRegistry) -> None:
        before, joined, mesh = kept[0]
        assert running.pin == before.pin
        assert running.admin_file is None
        async with machine.client(running, joined) as client:
            listed = await client.list(Kind.PEER)
            assert listed.resources == (await admin.get(Kind.PEER, joined.peer.meta.name),)
            assert listed.revision.registry == joined.registry
            facts = client.watch(Kind.PEER, listed.revision)
            arriving = asyncio.ensure_future(anext(facts))
            other = await Machine(2).join(await admin.create_token("home"))
            fact = await arriving
            assert fact.resource.meta.uid == other.peer.meta.uid  # type: ignore[union-attr]
            assert (await admin.get(Kind.MESH, "home")).meta.uid == mesh.meta.uid
            await facts.aclose()  # type: ignore[attr-defined]

    serve(first, config_in(tmp_path))
    serve(second, config_in(tmp_path))


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"

    async def body(running: Serving, admin: HttpRegistry) -> None:
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in data.iterdir()}
        assert set(modes.values()) == {0o600}
        assert {"admin.json", "registry.db", "tls-key.pem"} <= set(modes)
        token = json.loads((data / "admin.json").read_text())["token"]
        others = [file for file in data.iterdir() if file.name != "admin.json"]
        assert all(token.encode() not in file.read_bytes() for file in others)

    serve(body, config_in(data))


# --- TLS ----------------------------------------------------------------------------------------------------


def test_a_wrong_pin_is_refused_and_both_are_named(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        assert running.pin is not None
        async with HttpRegistry(running.url, pin=bytes(32), credential=None) as client:
            with pytest.raises(Refused) as raised:
                await client.list(Kind.PEER)
        assert base64url(running.pin) in str(raised.value)
        assert base64url(bytes(32)) in str(raised.value)

    serve(body, config_in(tmp_path))


def test_without_a_pin_a_self_made_certificate_is_not_trusted(tmp_path: Path) -> None:
    async def body(running: Serving, admin: HttpRegistry) -> None:
        async with HttpRegistry(running.url, pin=None, credential=None) as client:
            with pytest.raises(Refused, match="does not trust"):
                await client.list(Kind.PEER)

    serve(body, config_in(tmp_path))


def test_a_registry_that_is_not_there_is_unavailable() -> None:
    async def body() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
            url = f"https://127.0.0.1:{taken.getsockname()[1]}"
            async with HttpRegistry(url, pin=bytes(32), credential=None) as client:
                with pytest.raises(Unavailable, match="cannot reach"):
                    await client.list(Kind.PEER)

    asyncio.run(body())


def test_a_renewed_certificate_keeps_its_pin(tmp_path: Path) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    first = tls.self_made(tmp_path, ("127.0.0.1",), now)
    before = x509.load_pem_x509_certificate(first.certificate.read_bytes())
    tls.self_made(tmp_path, ("127.0.0.1",), now + timedelta(days=300))
    assert x509.load_pem_x509_certificate(first.certificate.read_bytes()) == before
    renewed = tls.self_made(tmp_path, ("127.0.0.1",), now + timedelta(days=310))
    after = x509.load_pem_x509_certificate(renewed.certificate.read_bytes())
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert renewed.pin == first.pin
    assert tls.self_made(tmp_path, ("other.example",), now + timedelta(days=311)).pin == first.pin


def test_whoever_knows_the_registry_follows_another_key_of_its_gateway_and_never_goes_back(
    tmp_path: Path,
) -> None:
    certificate = tmp_path / tls.CERTIFICATE_FILE
    invited: list[JoinString] = []
    following: list[bytes] = []

    def shown() -> bytes:
        return x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)

    async def first(_: Serving, admin: HttpRegistry) -> None:
        await admin.create(MESH)
        invited.append(JoinString.parse(await admin.create_token("home")))

    async def second(running: Serving, _: HttpRegistry) -> None:
        pin, key = invited[0].pin, invited[0].registry_key
        assert running.pin not in (None, pin)
        asking = partial(HttpRegistry, running.url, credential=admin_credential(tmp_path))
        async with asking(pin=pin, registry_key=key, followed=following.append) as client:
            await client.list(Kind.PEER)
            await client.reconnect()
            await client.list(Kind.PEER)
        assert following == [running.pin]
        stranger = Machine(1).keys.signing
        for known, vouching in ((bytes(32), key), (pin, stranger), (pin, None)):
            async with asking(pin=known, registry_key=vouching) as client:
                with pytest.raises(Refused, match="does not vouch"):
                    await client.list(Kind.PEER)

    serve(first, config_in(tmp_path))
    old = shown()
    (tmp_path / tls.KEY_FILE).unlink()
    serve(second, config_in(tmp_path))
    new, key = shown(), invited[0].registry_key
    assert replaces(new, pin=pin_of(old), registry=key)
    assert not replaces(old, pin=pin_of(new), registry=key)
    following.clear()
    serve(second, config_in(tmp_path))  # started again: nothing is replaced
    assert shown() == new
    (tmp_path / tls.KEY_FILE).unlink()
    following.clear()
    serve(second, config_in(tmp_path))  # whoever was away meanwhile follows as well
    assert pin_of(shown()) != pin_of(new)


def test_a_certificate_of_the_users_own_is_served(tmp_path: Path) -> None:
    own = tls.self_made(tmp_path, ("127.0.0.1",), datetime.now(UTC))
    data = tmp_path / "data"
    for pinned in (False, True):
        users = UsersCertificate(own.certificate, own.key, pinned=pinned)

        async def body(running: Serving, admin: HttpRegistry, pinned: bool = pinned) -> None:
            assert running.pin == (own.pin if pinned else None)
            async with HttpRegistry(running.url, pin=own.pin, credential=admin_credential(data)) as client:
                assert (await client.list(Kind.MESH)).complete

        serve(body, replace(config_in(data), certificate=users))


# --- the program --------------------------------------------------------------------------------------------


@contextmanager
def program(data: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`scope-registry serve` in a process of its own."""
    command = [sys.executable, "-m", "scope_operator", "serve", "--data", str(data)]
    command += ["--listen", "127.0.0.1:0", "--advertise", "127.0.0.1", "--reflector-ports", "0,0", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def said(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The first line of output that matches; fails when the program ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found
    raise AssertionError(f"the program ended without saying {pattern!r}")


def test_the_program_says_where_it_listens_and_stops_on_sigterm(tmp_path: Path) -> None:
    with program(tmp_path / "data") as process:
        url = said(process, r"Join strings name (\S+),")[1]
        said(process, "Next: scopectl apply")
        document = json.loads((tmp_path / "data" / "admin.json").read_text())
        assert document["url"] == url

        async def streams() -> None:
            async with HttpRegistry(
                url, pin=read_base64url(document["pin"]), credential=admin_credential(tmp_path / "data")
            ) as client:
                mesh = await client.create(MESH)
                facts = client.watch(Kind.MESH, (await client.list(Kind.MESH)).revision)
                async with asyncio.timeout(60):
                    await admin_wrote(client, mesh)
                    process.send_signal(signal.SIGTERM)
                    with pytest.raises(Unavailable):
                        async for _ in facts:
                            pass

        asyncio.run(streams())
        assert process.wait(timeout=10) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    with program(tmp_path / "data") as process:
        said(process, "Next")


async def admin_wrote(client: HttpRegistry, mesh: object) -> None:
    assert isinstance(mesh, Mesh)
    await client.update(replace(mesh, spec=replace(mesh.spec, listen_port=7)))


def failure(data: Path, *options: str) -> str:
    """What the program says when it cannot start."""
    with program(data, *options) as process:
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 1
        assert "Traceback" not in errors
        return errors.splitlines()[-1]


def test_a_second_process_on_one_directory_is_refused(tmp_path: Path) -> None:
    with program(tmp_path) as process:
        said(process, "Next")
        assert "held by another process" in failure(tmp_path)


def test_a_taken_port_is_said_with_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        assert "name another with --listen" in failure(tmp_path, "--listen", taken)


def test_a_corrupt_database_is_said_and_left_alone(tmp_path: Path) -> None:
    database = tmp_path / "registry.db"
    database.write_bytes(b"not a database" * 100)
    database.chmod(0o600)
    assert "restore it" in failure(tmp_path)
    assert database.read_bytes() == b"not a database" * 100


def test_a_data_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--data" in failure(tmp_path / "file" / "data")


def test_a_key_without_its_certificate_is_said(tmp_path: Path) -> None:
    assert "go together" in failure(tmp_path, "--tls-key", "key.pem")
    assert "cannot read cert.pem" in failure(tmp_path, "--tls-key", "key.pem", "--tls-cert", "cert.pem")


def test_a_damaged_tls_key_is_said(tmp_path: Path) -> None:
    own = tls.self_made(tmp_path, ("127.0.0.1",), datetime.now(UTC))
    own.key.write_text("damaged")
    with pytest.raises(ConfigError, match="restore it from a backup"):
        tls.self_made(tmp_path, ("127.0.0.1",), datetime.now(UTC))


def test_admin_json_follows_what_is_advertised_and_keeps_its_token(tmp_path: Path) -> None:
    async def nothing(_: Serving, __: HttpRegistry) -> None:
        pass

    config = config_in(tmp_path)
    serve(nothing, config)
    file = tmp_path / "admin.json"
    before = json.loads(file.read_text())
    serve(nothing, replace(config, advertise=(Advertised("localhost"), *LOOPBACK)))
    after = json.loads(file.read_text())
    assert after["url"].startswith("https://localhost:")
    assert after | {"url": before["url"]} == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("{")
    serve_without_admin(config)
    assert file.read_text() == "{"  # whatever it was to be, it is not ours to mend
    file.unlink()
    serve_without_admin(config)
    assert not file.exists()  # its administrator keeps it elsewhere


def serve_without_admin(config: ServeConfig) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), serving(config):
            pass

    asyncio.run(run())


def test_a_registry_is_ready_once_its_reconciler_has_listed_it(tmp_path: Path) -> None:
    async def ready(running: Serving, _: HttpRegistry) -> None:
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(60):
                while (status := await _readiness(session, running)) == 503:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert status == 200

    serve(ready, config_in(tmp_path))


async def _readiness(session: aiohttp.ClientSession, running: Serving) -> int:
    async with session.get(f"{running.url}/readyz", ssl=False) as response:
        return response.status
