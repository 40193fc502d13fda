"""The gateway beside the operator: peers off the cluster join through any replica, and a token once."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from kubelab import ControlPlane

from scope.credentials import PeerCredential
from scope.enrolment import Enrolment, enrolment_to_dict, sign_enrolment
from scope.join import JoinString
from scope.model import PeerKeys, PublicKey, Secret
from scope.registry.http import HttpRegistry
from tests.kube.operator_fixture import NAMESPACE, PEERS, Cluster, Replica, addresses, eventually, mesh, run

SECRET = f"/api/v1/namespaces/{NAMESPACE}/secrets/scope-gateway"
ALTERED = str(Path(__file__).with_name("altered_operator.py"))
GATEWAY = ("--listen=127.0.0.1:0", "--reflector-ports=0,0", "--advertise=127.0.0.1")


async def served_by(replica: Replica) -> str:
    """Where a replica's gateway listens."""

    async def found() -> str | None:
        assert replica.process.returncode is None, replica.text
        for line in replica.text.splitlines():
            if "gateway.serving" in line:
                return "https://" + line.rpartition("listening=")[2]
        return None

    return await eventually(found)


async def administrator_file(east: Cluster, directory: Path, *, url: str) -> Path:
    """What `kubectl get secret` gives for scopectl, for the gateway of a certain replica."""

    async def told() -> dict[str, Any] | None:
        secret = await east.plane.request("GET", SECRET)
        document: dict[str, Any] = json.loads(base64.b64decode(secret["data"]["admin.json"]))
        return document if "url" in document else None

    path = directory / "admin.json"
    path.write_text(json.dumps({**await eventually(told), "url": url}))
    path.chmod(0o600)
    return path


async def scopectl(*arguments: str, admin: Path) -> str:
    """What scopectl prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "scope.ctl",
        *arguments,
        f"--admin-file={admin}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1"},
    )
    said, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return said.decode()


def seeds_of(number: int) -> list[Secret]:
    """The WireGuard, probe and signing keys of a machine of that number."""
    return [Secret(bytes([number + 1, kind]) * 16) for kind in range(3)]


def enrolment(number: int, join: JoinString) -> dict[str, object]:
    """The request of a machine of that number."""
    seeds = seeds_of(number)
    signing = Ed25519PrivateKey.from_private_bytes(seeds[2].raw).public_key().public_bytes_raw()
    wireguard, probe = (
        X25519PrivateKey.from_private_bytes(seed.raw).public_key().public_bytes_raw() for seed in seeds[:2]
    )
    keys = PeerKeys(PublicKey(wireguard), PublicKey(probe), PublicKey(signing))
    request = Enrolment(join.mesh, join.token_id, join.secret, f"machine-{number}", keys)
    return enrolment_to_dict(sign_enrolment(request, registry=join.registry_key, signing=seeds[2]))


async def joined(session: aiohttp.ClientSession, url: str, request: Mapping[str, object]) -> int:
    """The status of the answer to a join, asked again where the gateway says to wait."""
    while True:
        async with session.post(f"{url}/v1/join", json=request) as answer:
            if answer.status in {429, 503}:
                await asyncio.sleep(float(answer.headers.get("Retry-After", "1")))
                continue
            return answer.status


async def token_of(admin: Path, *options: str) -> JoinString:
    """The join string of a fresh token."""
    said = await scopectl("token", "create", "--mesh", "home", *options, admin=admin)
    (line,) = [line for line in said.split() if line.strip("'").startswith("https://")]
    return JoinString.parse(line.strip("'"))


def test_of_fifty_joins_at_two_replicas_with_a_one_time_token_one_succeeds(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.apply(mesh())
        replicas = [await east.operator(*GATEWAY, gateway=True) for _ in range(2)]
        urls = [await served_by(replica) for replica in replicas]
        admin = await administrator_file(east, tmp_path, url=urls[0])
        join = await token_of(admin, "--single-use")
        connector = aiohttp.TCPConnector(ssl=False, limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            answers = await asyncio.gather(
                *(joined(session, urls[number % 2], enrolment(number, join)) for number in range(50))
            )
        assert sorted(answers) == [201, *[403] * 49]
        (name,) = await east.peers()
        peer = (await east.addressed(name))[name]
        assert name.startswith("home.external.machine-")
        assert len(addresses(peer)) == 1
        (owner,) = peer["metadata"]["ownerReferences"]
        assert owner["name"] == "home"

    run(control_plane, body)


def test_replicas_share_their_keys_and_the_mesh_names_them(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.apply(mesh())
        first = await east.operator(*GATEWAY, gateway=True)
        second = await east.operator(*GATEWAY, gateway=True)
        urls = [await served_by(replica) for replica in (first, second)]

        async def named() -> dict[str, Any] | None:
            found = await east.plane.request("GET", "/apis/scope.ltgc.cc/v1alpha1/scopemeshes/home")
            status: dict[str, Any] = found.get("status", {})
            return status if status.get("signingKey") and status.get("reflectors") else None

        status = await eventually(named)
        assert len(status["reflectors"][0]["endpoints"]) == 2
        assert status["gateway"]["url"] in urls
        for url in urls:  # scopectl checks the pin: both replicas have the key that it names
            admin = await administrator_file(east, tmp_path, url=url)
            assert "home" in await scopectl("get", "meshes", admin=admin)
            pin = base64.b64decode(status["gateway"]["pin"])
            assert base64.urlsafe_b64encode(pin).decode().rstrip("=") == json.loads(admin.read_text())["pin"]
        asked = tmp_path / "tree.json"
        asked.write_text(json.dumps(mesh(topology="Tree")))
        plan = await scopectl("plan", f"--file={asked}", admin=admin)
        assert "  spec.topology: Full -> Tree\n" in plan
        assert "a Tree without a hub changes nothing" in plan

    run(control_plane, body)


def test_the_leader_knows_who_is_alive_at_another_replica(
    control_plane: ControlPlane, tmp_path: Path
) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.apply(mesh())
        hears = (ALTERED, "hears", "1", "--")
        leader = await east.operator(*GATEWAY, gateway=True, program=hears)
        await served_by(leader)
        other = await east.operator(*GATEWAY, gateway=True, program=hears)
        url = await served_by(other)
        assert "leader.elected" not in other.text
        join = await token_of(await administrator_file(east, tmp_path, url=url))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False)) as session:
            assert await joined(session, url, enrolment(1, join)) == 201
        (name,) = await east.peers()
        peer = (await east.addressed(name))[name]
        assert not peer["status"]["online"]
        identity = (await east.plane.request("GET", "/api/v1/namespaces/kube-system"))["metadata"]["uid"]
        credential = PeerCredential(name, peer["metadata"]["uid"], identity, seeds_of(1)[2])
        async with HttpRegistry(url, pin=join.pin, credential=credential) as registry:
            await registry.heartbeat(name)
        await east.condition(name, "Ready", path=PEERS, status="True")
        assert (await east.peers())[name]["status"]["online"]

    run(control_plane, body)


def test_without_its_secret_an_operator_does_not_forge_a_registry(control_plane: ControlPlane) -> None:
    async def body(east: Cluster) -> None:
        await east.plane.apply(mesh())
        first = await east.operator(*GATEWAY, gateway=True)
        await east.condition("home", "Ready", status="True")
        first.process.kill()
        await first.process.wait()
        await east.hand_over()
        await east.plane.request("DELETE", SECRET)
        second = await east.operator(*GATEWAY, gateway=True)
        assert await second.ended() == 1
        assert "restore the Secret from a backup" in second.text
        assert "Traceback" not in second.text

    run(control_plane, body)
