"""The agent's command line: what it refuses before it asks anybody, and what a full disk does to an agent."""

from __future__ import annotations

import contextlib
import io
import secrets
import socket
import stat
from base64 import b64decode
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from scope_agent import __main__ as command
from scope_agent import mesh_loop
from scope_agent import run as shell
from scope_agent.__main__ import main
from scope_agent.agent import Agent, AgentConfig
from scope_agent.inputs import Applied, DiskState, FactArrived, Failed, SaveState, Target
from scope_agent.node import NodeConfig
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.trust import is_certified
from scope_agent.state import (
    Enrolment,
    Held,
    StateDir,
    enrolled_meshes,
    load_public_ca,
    make_identity,
    sole_agent,
)

from scope.channel import BOOT_ID_BYTES, Channel
from scope.join import JoinString
from scope.model import (
    Addressing,
    Assignment,
    Condition,
    ConfigError,
    Fingerprint,
    GatewayOrigin,
    Kind,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerSpec,
    PublicKey,
    Revision,
    Secret,
    Snapshot,
)
from scope.registry.http import HttpRegistry, Joined
from scope.registry.port import Listed, Unavailable

INVITATION = JoinString(
    "https://192.0.2.1:7443", "home", "abcdefgh", Secret(bytes(range(32))), bytes(32), PublicKey(bytes(32))
).format()
MESH = Mesh(Meta("home", uid="mesh", revision=1), MeshSpec(Addressing(IPv4Network("10.9.0.0/30"), None)))


@pytest.fixture
def joining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that keep a join in this test's own directory; the registry is not to be asked."""

    async def unasked(*_: object) -> Joined:
        raise AssertionError("the registry was asked")

    monkeypatch.setattr(HttpRegistry, "join", unasked)
    return ["--state", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]


def enrol(root: Path, mesh: str, device: str) -> StateDir:
    state = StateDir(mesh, root)
    state.prepare()
    state.save_enrolment(
        Enrolment(
            mesh=mesh,
            device=device,
            identity=make_identity(secrets.token_bytes),
            url="https://192.0.2.1:7443",
            pin=bytes(32),
            registry_id="registry",
            registry_key=PublicKey(bytes(32)),
            peer_name=f"{mesh}.external.me",
            peer_uid="uid",
        )
    )
    return state


def answering(monkeypatch: pytest.MonkeyPatch, answer: Joined | Exception) -> None:
    """Have the registry answer each join so."""

    async def join(*_: object) -> Joined:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(HttpRegistry, "join", join)


def joined(assignment: Assignment) -> Joined:
    peer = Peer(Meta("home.external.me", uid="uid"), PeerSpec("home"), None, assignment)
    return Joined("registry", peer, MESH)


WITH_ADDRESS = Assignment(addresses=(IPv4Interface("10.9.0.1/30"),))


# --- join ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["", "a-name-beyond-15", "sub/dir"])
def test_a_device_name_that_linux_would_refuse_is_refused_first(
    device: str, joining: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["join", INVITATION, "--device", device, *joining]) == 1
    assert "an interface has 1 to 15 characters" in capsys.readouterr().err


def test_two_meshes_do_not_share_a_device(
    joining: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol(tmp_path / "state", "work", "scope0")
    assert main(["join", INVITATION, *joining]) == 1
    assert "mesh work uses scope0: give this one another --device" in capsys.readouterr().err


def test_a_join_string_may_come_from_standard_input(
    joining: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, joined(WITH_ADDRESS))
    monkeypatch.setattr("sys.stdin", io.StringIO(INVITATION + "\n"))
    assert main(["join", "-", *joining]) == 0
    assert enrolled_meshes(tmp_path / "state") == ["home"]


def test_a_join_without_an_answer_may_be_repeated_with_the_same_keys(
    joining: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, Unavailable("cannot reach https://192.0.2.1:7443"))
    assert main(["join", INVITATION, *joining]) == 1
    said = capsys.readouterr().err
    assert "cannot join home: cannot reach https://192.0.2.1:7443" in said
    assert "join again with the same string" in said
    state = StateDir("home", tmp_path / "state")
    kept = state.pending_identity(secrets.token_bytes)
    answering(monkeypatch, joined(WITH_ADDRESS))
    assert main(["join", INVITATION, *joining]) == 0
    assert state.load_enrolment().identity.public == kept.public


def test_an_answer_that_the_disk_does_not_take_may_be_asked_for_again(
    joining: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, joined(WITH_ADDRESS))

    def refuse(*_: object) -> None:
        raise ConfigError("cannot write it: No space left on device")

    with monkeypatch.context() as full:
        full.setattr(StateDir, "save_enrolment", refuse)
        assert main(["join", INVITATION, *joining]) == 1
    assert "No space left on device: join again with the same string" in capsys.readouterr().err
    assert enrolled_meshes(tmp_path / "state") == []
    assert main(["join", INVITATION, *joining]) == 0


def test_a_peer_without_an_address_has_joined_and_is_told_why_it_has_none(
    joining: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    why = Condition("Ready", "False", "NoAddressLeft", "no address is left: widen spec.addressing")
    answering(monkeypatch, joined(Assignment(conditions=(why,))))
    assert main(["join", INVITATION, *joining]) == 1
    assert "has no address: no address is left: widen spec.addressing" in capsys.readouterr().err
    assert enrolled_meshes(tmp_path / "state") == ["home"]


def test_nothing_of_a_join_string_is_repeated(joining: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    damaged = INVITATION.replace(".", "!", 1)
    assert main(["join", damaged, *joining]) == 1
    printed = capsys.readouterr()
    assert INVITATION.partition("#")[2].split(".")[1] not in printed.out + printed.err


# --- run, leave ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "leave"])
def test_with_several_meshes_one_is_to_be_named(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol(tmp_path, "home", "scope0")
    enrol(tmp_path, "work", "scope1")
    assert main([command, "--state", str(tmp_path)]) == 1
    assert "has joined home, work: say which with --mesh" in capsys.readouterr().err


def test_what_else_lies_in_the_state_directory_is_no_mesh(tmp_path: Path) -> None:
    enrol(tmp_path, "home", "scope0")
    (tmp_path / "a file").write_text("x")
    (tmp_path / "empty").mkdir()
    assert enrolled_meshes(tmp_path) == ["home"]
    assert enrolled_meshes(tmp_path / "absent") == []


def test_a_link_to_nowhere_in_the_place_of_the_keys_is_not_taken_for_room(
    joining: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = StateDir("home", tmp_path / "state")
    state.prepare()
    state.enrolment_file.symlink_to(tmp_path / "nowhere")
    assert main(["join", INVITATION, *joining]) == 1
    assert "it is a symbolic link; put the file itself in its place" in capsys.readouterr().err


def test_one_agent_runs_a_mesh_whatever_directory_it_shares_with_the_other(tmp_path: Path) -> None:
    first, copy = enrol(tmp_path / "a", "home", "scope0"), enrol(tmp_path / "b", "home", "scope0")
    with sole_agent(first, tmp_path / "run"):
        with (
            pytest.raises(Held, match="another scope-agent runs in mesh home"),
            sole_agent(first, tmp_path / "other"),
        ):
            pass
        with pytest.raises(Held, match=r"home\.lock"), sole_agent(copy, tmp_path / "run"):
            pass
        with sole_agent(enrol(tmp_path / "a", "work", "scope1"), tmp_path / "run"):
            pass
    with sole_agent(first, tmp_path / "run"):
        assert stat.S_IMODE((tmp_path / "run" / "home.lock").stat().st_mode) == 0o600


def test_leaving_waits_for_the_running_agent_and_then_says_how_to_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = enrol(tmp_path / "state", "home", "scope0")
    answering_never = Unavailable("cannot reach https://192.0.2.1:7443")

    async def get(*_: object) -> Mesh:
        raise answering_never

    monkeypatch.setattr(HttpRegistry, "get", get)
    monkeypatch.setattr("scope_agent.__main__.LEAVE_PATIENCE", 0.0)
    options = ["--state", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]
    assert main(["leave", *options]) == 1
    assert "the registry was not told: cannot reach" in capsys.readouterr().err
    with sole_agent(state, tmp_path / "run"):
        assert main(["leave", "--force", *options]) == 1
    assert "`systemctl stop scope-agent@home` stops it; then leave again" in capsys.readouterr().err
    assert state.is_enrolled()


def test_a_node_is_left_by_its_scopepeer_and_by_hand_where_no_agent_runs_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = enrol(tmp_path / "state", "home", "scope0")
    state.save_enrolment(replace(state.load_enrolment(), url="", peer_name="home.fra.n1"))
    undone: list[str] = []

    class Device:
        def __init__(self, name: str, **_: object) -> None:
            self.name = name

        async def delete(self) -> None:
            undone.append(self.name)

        async def close(self) -> None:
            pass

    monkeypatch.setattr("scope_agent.__main__.choose_device", Device)

    def undo(name: str, *_: object) -> list[str]:
        undone.append(name)
        return []

    for name in ("be_no_hub", "lead_to_no_pods", "close_ports", "carry_nobody"):
        monkeypatch.setattr(f"scope_agent.__main__.{name}", partial(undo, name))
    options = ["--state", str(tmp_path / "state"), "--run-dir", str(tmp_path / "run")]
    assert main(["leave", *options]) == 1
    assert "kubectl patch speer home.fra.n1 --type=merge" in capsys.readouterr().err
    assert undone == []
    assert main(["leave", "--force", *options]) == 0
    assert undone == ["scope0", "be_no_hub", "lead_to_no_pods", "close_ports", "carry_nobody"]
    assert not state.is_enrolled()


def test_a_port_that_somebody_has_is_not_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        free = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        taken.bind(("127.0.0.1", 0))
        free.bind(("127.0.0.1", 0))
        ports = [taken.getsockname()[1], free.getsockname()[1]]
        free.close()
        monkeypatch.setattr(shell, "pick_port", lambda _: ports.pop(0))
        expected = ports[1]
        assert shell.free_port() == expected


def test_where_every_port_is_taken_the_mesh_may_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(shell, "pick_port", lambda _: taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"set spec\.listenPort"):
            shell.free_port()


# --- a full disk --------------------------------------------------------------------------------------------


def test_a_snapshot_that_was_not_saved_is_a_condition_until_it_is() -> None:
    identity = make_identity(secrets.token_bytes)
    agent = Agent(
        AgentConfig("home", "scope0", identity, registry_key=PublicKey(bytes(32))),
        channel=Channel(secret=identity.probe, boot_id=bytes(BOOT_ID_BYTES)),
        state=DiskState(Snapshot(), listen_port=20001),
        random=lambda: 0.5,
        now=0.0,
    )

    def saves(until: float) -> list[SaveState]:
        """What the agent wants on disk by that time."""
        found: list[SaveState] = []
        while (due := agent.get_timer()) is not None and due <= until and not found:
            agent.handle_timer(due)
            found += [out for out in agent.outputs() if isinstance(out, SaveState)]
        return found

    agent.receive(FactArrived(Listed(Kind.MESH, Revision("registry", 1), (MESH,))), 1.0)
    assert [save.state.snapshot.mesh for save in saves(5.0)] == [MESH]
    agent.receive(Failed(Target.DISK, "No space left on device; free some space"), 5.0)
    assert agent.status(5.0)["conditions"] == [
        {"type": "Disk", "message": "No space left on device; free some space"}
    ]
    assert [save.state.snapshot.mesh for save in saves(40.0)] == [MESH]
    agent.receive(Applied(Target.DISK), 40.0)
    assert agent.status(40.0)["conditions"] == []


def test_a_status_says_what_the_shell_lost_and_another_answer_does_not() -> None:
    counters = mesh_loop._Counters(inbox_dropped=1, couriers_dropped=2, unsent={"BUSY": 3})
    status = counters.added_to({"ok": True, "status": {"mesh": "home"}})["status"]
    assert status == {"mesh": "home", "lost": {"inbox": 1, "courier": 2, "unsent": {"BUSY": 3}}}
    assert counters.added_to({"ok": False, "error": "no"}) == {"ok": False, "error": "no"}


def test_an_agent_that_was_removed_ends_with_a_status_at_which_systemd_leaves_it_alone(
    joining: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrol(tmp_path / "state", "home", "scope0")

    def removed(*_: object) -> None:
        raise mesh_loop.RemovedFromMesh("this peer was removed from home")

    monkeypatch.setattr(command, "_run_mesh", removed)
    status = main(["run", *joining])
    unit = (Path(__file__).parents[2] / "docs" / "systemd" / "scope-agent@.service").read_text()
    assert status == command.REMOVED
    assert f"\nRestartPreventExitStatus={status}\n" in unit


def test_a_ca_signs_what_agents_that_have_its_public_half_believe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, fingerprint = tmp_path / "ca.json", Fingerprint(bytes([7] * 32))
    assert main(["ca", "init", str(key)]) == 0
    assert main(["ca", "init", str(key)]) == 1
    assert "made once" in capsys.readouterr().err
    assert main(["ca", "sign", str(key), "home.nas", str(fingerprint)]) == 0
    certificate = b64decode(capsys.readouterr().out)
    ca = load_public_ca(tmp_path / "ca.json.pub")
    provider = CryptographyProvider()
    assert is_certified(certificate, by=ca, name="home.nas", fingerprint=fingerprint, provider=provider)
    assert main(["ca", "sign", str(key), "home.nas", "07"]) == 1
    assert "'07'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--identity-trust", "ca"], "give its public half with --identity-ca"),
        (["--identity-trust", "pinned", "--identity-ca", "x"], "has no use for a CA"),
        (["--identity-ca", "/nowhere/ca.pub"], "cannot read /nowhere/ca.pub"),
        (["--key-suite", "3"], "no suite '3' of post-quantum keys: --key-suite is one of 1 and 2"),
        (["--key-provider", "oqs"], "--key-provider is cryptography, liboqs, or liboqs:FILE"),
    ],
)
def test_trust_and_keys_that_cannot_be_had_are_refused_before_the_agent_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    state = StateDir("home", tmp_path)
    state.prepare()
    peer = {"peer_name": "home.nas", "peer_uid": "u"}
    identity = make_identity(secrets.token_bytes)
    state.save_enrolment(Enrolment("home", "scope0", identity, "", None, "", None, **peer))
    assert main(["run", "--state", str(tmp_path), "--run-dir", str(tmp_path / "run"), *options]) == 1
    assert said in capsys.readouterr().err


_PIN = "A" * 43


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gateway-pin", _PIN], "give both"),
        (["--gateway-url", "http://gateway:7443"], "it is like https://"),
        (["--gateway-url", "https://gateway:7443/path"], "it is like https://"),
        (["--gateway-url", "https://gateway:no"], "it is like https://"),
        (["--gateway-url", "https://gateway:7443", "--gateway-pin", "AAAA"], "is no pin"),
        (["--gateway-url", "https://gateway:7443", "--gateway", "/nowhere"], "leave it out"),
    ],
)
def test_a_gateway_to_which_no_hub_can_lead_is_refused_before_the_agent_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    node = ["--kubernetes", "--node", "n1", "--cluster", "here", "--namespace", "scope-system"]
    where = ["--state", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    assert main(["run", *node, *where, *options]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("pin", "raw"), [("", None), (_PIN, bytes(32))])
def test_the_agent_of_a_node_is_told_to_which_gateway_its_hubs_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin: str, raw: bytes | None
) -> None:
    started: list[NodeConfig] = []

    class Agent:
        def __init__(self, config: NodeConfig) -> None:
            started.append(config)

        async def run(self) -> None:
            pass

    monkeypatch.setattr("scope_agent.node.NodeAgent", Agent)
    monkeypatch.setenv("SCOPE_GATEWAY_URL", "https://gateway:7443")
    monkeypatch.setenv("SCOPE_GATEWAY_PIN", pin)
    node = ["--kubernetes", "--node", "n1", "--cluster", "here", "--namespace", "scope-system"]
    assert main(["run", *node, "--state", str(tmp_path), "--run-dir", str(tmp_path / "run")]) == 0
    assert [config.upstream for config in started] == [GatewayOrigin("https://gateway:7443", raw)]


def test_the_pin_of_a_key_that_replaced_the_gateways_is_kept_on_disk(tmp_path: Path) -> None:
    state = StateDir("home", tmp_path / "state")
    state.prepare()
    before = Enrolment(
        mesh="home",
        device="scope0",
        identity=make_identity(bytes),
        url="https://192.0.2.1:7443",
        pin=bytes(32),
        registry_id="r",
        registry_key=PublicKey(bytes(32)),
        peer_name="home.external.nas",
        peer_uid="uid",
    )
    state.save_enrolment(before)
    runner = shell.Runner.__new__(shell.Runner)  # without its sockets and its device
    runner._enrolment, runner._config = before, mesh_loop.RunConfig(state, tmp_path / "run")
    runner._keep_pin(bytes([7]) * 32)
    assert state.load_enrolment() == runner._enrolment == replace(before, pin=bytes([7]) * 32)
