"""scopectl against a real gateway on loopback: whole commands, from the command line to what is printed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from scope.ctl.__main__ import main
from scope.join import JoinString
from scope.model import (
    Assignment,
    Backend,
    Candidate,
    CandidateKind,
    Endpoint,
    EndpointState,
    Family,
    Forwarding,
    HubCarrier,
    Kind,
    Link,
    Mesh,
    Meta,
    PathKind,
    Peer,
    RelayReport,
    Service,
    ServiceEndpoint,
    ServicePort,
    ServiceSpec,
)
from scope.registry.http import HttpRegistry
from tests.unit.cluster_fixture import JoiningCluster, invite
from tests.unit.gateway_fixture import ADMIN, REGISTRY_KEY, Running, enrolled, gateway

HOST = Candidate(Endpoint.parse("192.0.2.7:51820"), CandidateKind.HOST)
MESH = """
apiVersion: scope.ltgc.cc/v1alpha1
kind: ScopeMesh
metadata: {name: home}
spec: {addressing: {ipv6: "fd5c:be1:7a30::/64"}}
"""


class Terminal:
    """Runs commands against one gateway, and gives exit code, output and complaints."""

    def __init__(self, running: Running, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.running = running
        self.directory = directory
        self._capsys = capsys
        self._admin = directory / "admin.json"
        document = {"url": running.url, "pin": None, "registryKey": "", "token": ADMIN.token.raw.decode()}
        self._admin.write_text(json.dumps(document))
        self._admin.chmod(0o600)

    async def run(self, *command: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(main, [*command, "--admin-file", str(self._admin)])
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err

    async def apply(self, text: str) -> tuple[int, str, str]:
        manifest = self.directory / "mesh.yaml"
        manifest.write_text(text)
        return await self.run("apply", "-f", str(manifest))


@pytest.fixture
def play(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[Terminal], Awaitable[None]]], None]:
    """Plays a scene of commands at a terminal, against a gateway over an empty registry."""

    def play(scene: Callable[[Terminal], Awaitable[None]]) -> None:
        async def staged() -> None:
            async with gateway() as running, asyncio.timeout(30):
                await scene(Terminal(running, tmp_path, capsys))

        asyncio.run(staged())

    return play


Play = Callable[[Callable[[Terminal], Awaitable[None]]], None]


def test_a_mesh_is_created_once_changed_and_deleted(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        assert await terminal.apply(MESH) == (0, "scopemesh/home created\n", "")
        assert await terminal.apply(MESH) == (0, "scopemesh/home unchanged\n", "")
        assert await terminal.apply(MESH + "  \n") == (0, "scopemesh/home unchanged\n", "")
        changed = MESH.replace("spec: {", "spec: {listenPort: 51820, ")
        assert await terminal.apply(changed) == (0, "scopemesh/home configured\n", "")
        stored = await terminal.running.registry.get(Kind.MESH, "home")
        assert isinstance(stored, Mesh)
        assert (stored.spec.listen_port, stored.meta.generation) == (51820, 2)
        assert await terminal.run("mesh", "delete", "home") == (0, "scopemesh/home deleted\n", "")
        assert (await terminal.running.registry.list(Kind.MESH)).resources == ()

    play(scene)


def test_a_joined_cluster_is_taken_out_of_its_mesh(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        running, west = terminal.running, JoiningCluster()
        await terminal.apply(MESH)
        await invite(running.registry, wall=running.clock())
        async with HttpRegistry(running.url, pin=None, credential=None) as client:
            await client.join_cluster(west.document(registry=REGISTRY_KEY))
        await running.registry.create(west.peer("n1"))
        code, _, err = await terminal.run("cluster", "remove", "--mesh", "home", "east")
        assert code == 1
        assert "there is no cluster 'east' in mesh home; there is west" in err
        code, out, _ = await terminal.run("cluster", "remove", "--mesh", "home", "west")
        assert (code, out) == (
            0,
            "cluster/west removed from mesh home: to come back it joins with a new token\n",
        )
        stored = await running.registry.get(Kind.MESH, "home")
        assert isinstance(stored, Mesh)
        assert stored.status.clusters == ()
        assert (await running.registry.list(Kind.PEER)).resources == ()

    play(scene)


def test_a_typing_error_stops_everything_before_it_is_sent(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        code, out, err = await terminal.apply(MESH + "---" + MESH.replace("addressing", "adressing"))
        assert (code, out) == (1, "")
        assert "document 2: spec.adressing: unknown field" in err
        assert 'did you mean "addressing"?' in err
        assert err.endswith("nothing was applied\n")
        assert (await terminal.running.registry.list(Kind.MESH)).resources == ()

    play(scene)


def test_a_file_that_was_got_from_another_registry_does_not_overwrite(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        await terminal.apply(MESH)
        code, _, err = await terminal.apply(MESH.replace("name: home", "name: home, uid: other"))
        assert code == 1
        assert "the file is of another one of that name (its uid other" in err

    play(scene)


async def three_peers(terminal: Terminal) -> list[str]:
    """The names of three peers that are online."""
    registry = terminal.running.registry
    names = []
    for seed in (1, 2, 3):
        peer = await enrolled(registry, seed)
        await registry.update_status(Kind.PEER, peer.meta.name, Assignment(online=True), uid=peer.meta.uid)
        names.append(peer.meta.name)
    return names


async def reported(terminal: Terminal, name: str, *links: Link) -> None:
    """Have the peer say how it reaches others."""
    registry = terminal.running.registry
    peer = await registry.get(Kind.PEER, name)
    assert isinstance(peer, Peer) and peer.report is not None
    await registry.update_status(Kind.PEER, name, replace(peer.report, links=links), uid=peer.meta.uid)


def test_a_plan_says_what_applying_would_do_and_changes_nothing(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        first, second, _ = await three_peers(terminal)
        await reported(terminal, first, Link(second, PathKind.NONE, reason="UDP blocked towards it"))
        before = await terminal.running.registry.list(Kind.MESH)
        manifest = terminal.directory / "tree.yaml"
        manifest.write_text(MESH.replace("spec: {", f"spec: {{topology: Tree, hubs: {{names: [{second}]}}, "))
        code, out, complaints = await terminal.run("plan", "-f", str(manifest))
        assert (code, complaints) == (0, "")
        assert f"  spec.hubs.names: none -> {second}\n" in out
        assert "limits" not in out
        assert "  spec.topology: Full -> Tree\n" in out
        assert "Links: 3 now, 2 then; 0 made, 1 dropped" in out
        row = next(line for line in out.splitlines() if line.startswith(second))
        assert row.split() == [second, *["0", "1", "0", "0", "new"]]
        assert "Peers that would lose a path: 1\n" in out
        lost = f"{first} loses everybody: no path to {second} (UDP blocked towards it)"
        assert f"  {lost}\n" in out
        _, out, _ = await terminal.run("plan", "-f", str(manifest), "-o", "json")
        [plan] = json.loads(out)
        assert (plan["links_now"], plan["dropped"]) == (3, 1)
        assert await terminal.running.registry.list(Kind.MESH) == before

    play(scene)


def test_a_plan_for_a_mesh_that_is_not_there_yet_says_so_and_one_for_its_peers_needs_it(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        manifest = terminal.directory / "mesh.yaml"
        manifest.write_text(MESH.replace("home", "work").replace("7a30", "7a31"))
        _, out, _ = await terminal.run("plan", "-f", str(manifest))
        assert "  ScopeMesh work: new\n" in out
        manifest.write_text(
            "apiVersion: scope.ltgc.cc/v1alpha1\nkind: ScopePeer\n"
            "metadata: {name: work.nas}\nspec: {mesh: work}\n"
        )
        code, _, complaints = await terminal.run("plan", "-f", str(manifest))
        assert (code, "there is no mesh 'work'" in complaints) == (1, True)

    play(scene)


def test_two_peers_are_explained_by_what_both_report(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        first, second, third = await three_peers(terminal)
        await reported(
            terminal,
            first,
            Link(second, PathKind.RELAYED, reason="symmetric NAT on both sides", hub=third, latency=0.02),
        )
        code, out, _ = await terminal.run("explain", first, second)
        assert code == 0
        assert f"{first} and {second} are relayed by {third}: symmetric NAT on both sides\n" in out
        row = next(line for line in out.splitlines() if line.startswith(f"{first} ") and "Relayed" in line)
        assert f"Relayed via {third}" in row and "20.0 ms" in row
        await reported(terminal, first, Link(second, PathKind.DIRECT, birthday=True, latency=0.02))
        _, out, _ = await terminal.run("explain", first, second)
        assert "Direct (birthday)" in out
        _, out, _ = await terminal.run("explain", second, third)
        assert f"neither of {second} and {third} names the other" in out
        code, _, complaints = await terminal.run("explain", first, "nobody")
        assert (code, "there is no ScopePeer 'nobody'" in complaints) == (1, True)

    play(scene)


def test_what_get_prints_can_be_applied(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        await terminal.apply(MESH)
        _, text, _ = await terminal.run("get", "mesh", "home", "-o", "yaml")
        assert await terminal.apply(text) == (0, "scopemesh/home unchanged\n", "")
        _, text, _ = await terminal.run("get", "meshes", "-o", "json")
        assert json.loads(text)["items"][0]["spec"]["addressing"] == {"ipv6": "fd5c:be1:7a30::/64"}
        assert await terminal.apply(text) == (0, "scopemesh/home unchanged\n", "")
        _, table, _ = await terminal.run("get", "meshes")
        assert table.splitlines()[1].startswith("home  fd5c:be1:7a30::/64")

    play(scene)


def test_peers_are_listed_by_mesh_and_removed_for_good(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        peer = await enrolled(terminal.running.registry, 1)
        await enrolled(terminal.running.registry, 2, mesh="work")
        _, table, _ = await terminal.run("get", "peers", "--mesh", "home")
        assert [line.split()[0] for line in table.splitlines()] == ["NAME", peer.meta.name]
        code, out, _ = await terminal.run("peer", "remove", peer.meta.name)
        assert (code, out.split(":")[0]) == (0, f"scopepeer/{peer.meta.name} removed")
        stored = await terminal.running.registry.get(Kind.PEER, peer.meta.name)
        assert isinstance(stored, Peer)
        assert stored.assignment.tombstone is not None

    play(scene)


def test_a_name_that_is_none_gets_the_one_that_was_meant(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        await enrolled(terminal.running.registry, 1)
        for command in (("peer", "remove", "p1"), ("get", "peers", "home.externl.p1")):
            code, out, err = await terminal.run(*command)
            assert (code, out) == (1, "")
            assert err.endswith("did you mean home.external.p1?\n")
        _, _, err = await terminal.run("mesh", "delete", "zzz")
        assert err == "scopectl: there is no ScopeMesh 'zzz': `scopectl get meshes` lists what there is\n"
        _, _, err = await terminal.run("token", "create", "--mesh", "hom")
        assert err == "scopectl: there is no ScopeMesh 'hom': did you mean home?\n"

    play(scene)


def test_a_token_is_made_printed_alone_listed_without_secret_and_deleted(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        await terminal.apply(MESH)
        code, out, err = await terminal.run(
            "token", "create", "--mesh", "home", "--ttl", "30m", "--single-use", "--role", "Edge"
        )
        assert code == 0
        assert "lets one machine join home for 30m" in err
        string = JoinString.parse(out)
        assert out == string.format() + "\n"
        assert "#" not in err
        _, table, _ = await terminal.run("token", "list")
        assert table.splitlines()[1].split()[:3] == [string.token_id, "home", "Edge"]
        _, text, _ = await terminal.run("token", "list", "-o", "json")
        assert out.split(".")[-3] not in table + text
        code, _, _ = await terminal.run("token", "delete", string.token_id)
        assert code == 0
        assert await terminal.run("token", "list", "-o", "json") == (0, "[]\n", "")
        code, _, err = await terminal.run("token", "delete", string.token_id)
        assert code == 1
        assert string.token_id in err

    play(scene)


def test_an_empty_registry_says_so_on_standard_error(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        assert await terminal.run("get", "peers") == (0, "", "there are none\n")
        code, out, err = await terminal.run("token", "list")
        assert (code, out) == (0, "")
        assert "scopectl token create" in err

    play(scene)


def test_a_registry_that_is_away_or_refuses_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = tmp_path / "admin.json"
    admin.write_text(json.dumps({"url": "http://127.0.0.1:1", "token": "secret-of-the-test"}))
    admin.chmod(0o600)
    assert main(["get", "meshes", "--admin-file", str(admin)]) == 1
    err = capsys.readouterr().err
    assert "127.0.0.1:1" in err
    assert "`systemctl status scope-registry` on its machine says whether it runs" in err
    assert "Traceback" not in err
    assert "secret-of-the-test" not in err


def test_the_admin_file_may_come_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCOPE_ADMIN_FILE", str(tmp_path / "mine.json"))
    assert main(["get", "meshes"]) == 1
    assert "mine.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["get", "nodes"],
        ["apply"],
        ["token", "create"],
        ["token", "create", "--mesh", "a", "--ttl", "5"],
        ["ping", "nas", "-c", "0"],
        ["status", "-o", "yaml"],
    ],
)
def test_a_command_that_makes_no_sense_exits_with_2(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(command)
    assert exited.value.code == 2
    assert "usage: scopectl" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("token", "--single-use", "peers", "ping", "plan", "explain"))


def test_a_token_for_a_hub_leads_to_its_carrier_and_one_for_who_carries_nobody_is_refused(play: Play) -> None:
    async def scene(terminal: Terminal) -> None:
        await terminal.apply(MESH)
        peer = await enrolled(terminal.running.registry, 1)
        create = ("token", "create", "--mesh", "home", "--hub", peer.meta.name)
        code, out, err = await terminal.run(*create)
        assert (code, out) == (1, "") and f"{peer.meta.name} carries nobody" in err
        assert peer.report is not None
        pin = bytes(range(32))
        for reason in ("TCP port 443: Address already in use", ""):
            relay = RelayReport(Forwarding.KERNEL, carrier=HubCarrier(443, pin, reason))
            report = replace(peer.report, endpoints=(HOST,), relay=relay)
            await terminal.running.registry.update_status(
                Kind.PEER, peer.meta.name, report, uid=peer.meta.uid
            )
            code, out, err = await terminal.run(*create)
            assert (code == 1) == (reason in err if reason else False)
        string = JoinString.parse(out)
        assert (string.url, string.pin) == ("https://192.0.2.7:443", pin)

    play(scene)


def test_a_service_is_told_with_the_name_it_has_elsewhere_and_what_answers(play: Play) -> None:
    http = ServicePort(80, name="http")
    pods = tuple(
        ServiceEndpoint(IPv4Address("10.244.1.0") + i, state)
        for i, state in enumerate(EndpointState, start=5)
    )
    backend = Backend((replace(http, port=8080),), pods)
    spec = ServiceSpec("home", "east", "shop", "web", families=(Family.IPV4,), ports=(http,))
    full = Service(Meta("home.east.shop.web"), replace(spec, backends=(backend,)))

    async def scene(terminal: Terminal) -> None:
        code, _, err = await terminal.run("service", "web.shop", "--in", "east")
        assert code == 1 and "cluster east exports no Service; clusters that do: none" in err
        stored = await terminal.running.registry.create(full)
        code, out, _ = await terminal.run("service", "web.shop", "--in", "east")
        assert code == 0
        assert "web-east.shop.svc\n" in out
        assert "http 80/TCP" in out and "1 of 3 ready" in out
        assert "10.244.1.7  NotReady  http 8080/TCP" in out
        code, out, _ = await terminal.run("service", "web.shop", "--in", "east", "-o", "json")
        assert json.loads(out)["spec"]["service"] == "web"
        for wanted, said in (
            ("wib.shop", "did you mean web.shop?"),
            ("web", "web is no NAME.NAMESPACE"),
            ("db.shop", "`kubectl annotate service db --namespace shop scope.ltgc.cc/export=true`"),
        ):
            code, _, err = await terminal.run("service", wanted, "--in", "east")
            assert code == 1 and said in err
        await terminal.running.registry.update(replace(full, meta=stored.meta, spec=spec))
        assert "none: it has no pods" in (await terminal.run("service", "web.shop", "--in", "east"))[1]

    play(scene)
