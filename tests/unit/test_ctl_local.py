"""scopectl and the local agent: status and ping over the Unix socket of an agent that the test plays."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from scope.ctl.__main__ import main
from scope.ctl.errors import CommandError
from scope.ctl.local import AgentStatus, PeerView, ask, find_socket, parse_status
from scope.ctl.ping import Pinger, Target, choose_target, encode_echo, is_reply, strip_header

STATUS: dict[str, object] = {
    "mesh": "home",
    "peer": "home.me",
    "addresses": ["100.64.0.9"],
    "device": {"name": "scope0", "kind": "Kernel", "listenPort": 21000, "drift": 0},
    "registry": {"connected": True, "since": 3.2, "reason": ""},
    "mapping": "None",
    "endpoints": [{"endpoint": "192.0.2.9:21000", "kind": "Host"}],
    "reflector": "answering",
    "peers": [
        {
            "name": "home.nas",
            "addresses": ["127.0.0.1", "::1"],
            "path": "Direct",
            "endpoint": "192.0.2.1:21000",
            "family": "IPv4",
            "rttMs": 1.5,
            "lastHandshakeSeconds": 4,
            "rx": 10,
            "tx": 20,
            "online": True,
            "reason": "",
        },
        {"name": "home.tv", "addresses": [], "path": "None", "endpoint": None, "reason": "offline"},
    ],
    "conditions": [],
    "dropped": 7,
    "lost": {"inbox": 1, "courier": 2, "unsent": {"UNREACHABLE": 3, "BUSY": 4}},
}


CANDIDATES: list[dict[str, object]] = [
    {
        "endpoint": "192.0.2.1:21000",
        "kind": "Host",
        "result": "InUse",
        "pings": 3,
        "rttMs": 1.5,
        "pingedSeconds": 4.2,
        "answeredSeconds": 4.1,
        "heardSeconds": None,
    },
    {"endpoint": "192.0.2.7:26001", "kind": "Relay", "result": "NotAsked", "hub": "home.hub"},
    {"endpoint": "127.0.0.1:9", "kind": "Host", "result": "Refused", "why": "loop\x1bback"},
]


def _answer(request: dict[str, object]) -> bytes:
    if request == {"command": "explain", "peer": "home.nas"}:
        return json.dumps({"ok": True, "candidates": CANDIDATES}).encode() + b"\n"
    if request == {"command": "explain", "peer": "home.tv"}:
        return json.dumps({"ok": True, "candidates": []}).encode() + b"\n"
    if request == {"command": "status"}:
        return json.dumps({"ok": True, "status": STATUS}).encode() + b"\n"
    return json.dumps({"ok": False, "error": f"unknown command {request.get('command')}"}).encode() + b"\n"


@contextmanager
def agent_at(path: Path, answer: Callable[[dict[str, object]], bytes | None] = _answer) -> Iterator[None]:
    """An agent that answers each line; None keeps it silent until the asker leaves."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                connection, _ = server.accept()
                with connection, connection.makefile("rb") as lines:
                    line = lines.readline()
                    if not line:
                        return
                    said = answer(json.loads(line))
                    if said is None:
                        lines.readline()
                    else:
                        connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(path))
            thread.join(timeout=10)


def test_status_is_printed_as_a_table_and_as_it_was_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "home.sock"
    with agent_at(path):
        assert main(["status", "--socket", str(path)]) == 0
        table = capsys.readouterr().out
        assert main(["status", "--socket", str(path), "-o", "json"]) == 0
        printed = json.loads(capsys.readouterr().out)
    assert "home.nas  Direct  192.0.2.1:21000  1.5 ms  4s ago     10 B      20 B  127.0.0.1, ::1" in table
    assert table.splitlines()[-1].endswith("offline")
    assert printed == STATUS


def test_every_candidate_is_explained_with_its_result_and_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "home.sock"
    with agent_at(path):
        assert main(["explain", "nas", "--socket", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert main(["explain", "home.tv", "--socket", str(path)]) == 0
        nothing = capsys.readouterr().out
        assert main(["explain", "home.nobody", "--socket", str(path)]) == 1
    assert lines[0] == "home.nas: direct by 192.0.2.1:21000"
    assert " ".join(lines[3].split()) == "192.0.2.1:21000 Host in use 1.5 ms 3 4s ago 4s ago -"
    assert " ".join(lines[4].split()) == "192.0.2.7:26001 Relay (home.hub) not asked yet - 0 - - -"
    assert "not tried: loop?back" in lines[5]
    assert nothing == "home.tv: no path (offline)\nno candidate: nothing was tried\n"
    assert "home.nobody" in capsys.readouterr().err


def test_a_status_of_another_release_is_read_as_far_as_it_goes() -> None:
    status = parse_status(
        {"mesh": "home", "peer": None, "peers": [{"name": "a\x1b[2J", "rttMs": "soon"}, 7], "new": 1}
    )
    assert status == AgentStatus(mesh="home", peer="", peers=(PeerView("a?[2J"),))


def test_what_goes_wrong_with_the_agent_names_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "home.sock"
    with pytest.raises(CommandError, match=r"is the agent running.*scope-agent@home"):
        ask(path, {"command": "status"})
    with agent_at(path), pytest.raises(CommandError, match="the agent refuses: unknown command dance"):
        ask(path, {"command": "dance"})
    with pytest.raises(CommandError, match="the agent has died"):
        ask(path, {"command": "status"})


@pytest.mark.parametrize(
    ("said", "says"),
    [
        (b"", "closed the connection"),
        (b"hello\n", "is no agent"),
        (b"[]\n", "is no agent"),
        (b'{"ok": false, "error": "\\u001b[2J"}\n', r"refuses: \?\[2J"),
        (None, "gave no answer in 0.05 s"),
    ],
)
def test_an_answer_that_is_none_is_told_apart(tmp_path: Path, said: bytes | None, says: str) -> None:
    path = tmp_path / "home.sock"
    with agent_at(path, lambda _: said), pytest.raises(CommandError, match=says):
        # Only who is to run out of time has little of it.
        ask(path, {"command": "status"}, timeout=0.05 if said is None else 20.0)


def test_the_only_socket_is_taken_and_of_several_one_must_be_named(tmp_path: Path) -> None:
    named = tmp_path / "elsewhere.sock"
    assert find_socket(named, tmp_path) == named
    with pytest.raises(CommandError, match="no agent runs on this machine"):
        find_socket(None, tmp_path)
    with pytest.raises(CommandError, match="no agent runs on this machine"):
        find_socket(None, tmp_path / "missing")
    (tmp_path / "notes.sock").write_text("not a socket")
    with agent_at(tmp_path / "@wg0.sock"):
        assert find_socket(None, tmp_path) == tmp_path / "@wg0.sock"
    with agent_at(tmp_path / "home.sock"):
        assert find_socket(None, tmp_path) == tmp_path / "home.sock"
        with agent_at(tmp_path / "work.sock"), pytest.raises(CommandError, match="in 2 meshes: choose one"):
            find_socket(None, tmp_path)


# --- ping --------------------------------------------------------------------------------------------------


def test_pings_are_real_and_name_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scope.ctl.inspection.INTERVAL", 0.0)
    path = tmp_path / "home.sock"
    with agent_at(path):
        assert main(["ping", "nas", "-c", "2", "-4", "--socket", str(path)]) == 0
    first, second, summary = capsys.readouterr().out.splitlines()
    assert first.startswith("home.nas (127.0.0.1) #1: ")
    assert first.endswith(" ms, direct by 192.0.2.1:21000")
    assert second.startswith("home.nas (127.0.0.1) #2: ")
    assert summary.startswith("home.nas: 2 of 2 pings answered; fastest ")


ECHO = """
import sys
from ipaddress import ip_address
from scope.ctl.ping import Pinger
for address in ("127.0.0.1", "::1"):
    with Pinger(ip_address(address), nonce=b"0123456789abcdef") as pinger:
        assert pinger._is_raw == (sys.argv[1] == "raw"), "another kind of socket"
        for sequence in (1, 65_536):
            assert isinstance(pinger.ping(sequence), float), "no reply"
"""


ALLOW = "echo 0 0 > /proc/sys/net/ipv4/ping_group_range"


@pytest.mark.parametrize(("kind", "first"), [("raw", "true"), ("unprivileged", ALLOW)])
def test_each_kind_of_socket_hears_its_own_reply(kind: str, first: str) -> None:
    """In a network namespace of its own, where unprivileged pings are forbidden until they are allowed."""
    inside = f'ip link set lo up && {first} && exec "$@"'
    namespace = ["unshare", "--map-root-user", "--net", "sh", "-c", inside, "sh"]
    command = [*namespace, sys.executable, "-c", ECHO, kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_right_to_ping_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> socket.socket:
        raise PermissionError

    monkeypatch.setattr("scope.ctl.ping.socket.socket", refused)
    with pytest.raises(CommandError, match="run this with sudo, or allow it with `sysctl"):
        Pinger(ip_address("127.0.0.1"), nonce=bytes(16))


@pytest.mark.parametrize(
    ("wanted", "version", "target"),
    [
        ("home.nas", None, "::1"),
        ("home.nas", 4, "127.0.0.1"),
        ("nas", 6, "::1"),
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", 6, "::1"),
    ],
)
def test_a_peer_is_found_by_name_short_name_or_address(wanted: str, version: int | None, target: str) -> None:
    assert choose_target(parse_status(STATUS), wanted, version=version) == Target(
        "home.nas", ip_address(target)
    )


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("nix", "knows no peer 'nix'; it knows home.nas, home.tv"),
        ("home.me", "is this machine"),
        ("tv", "home.tv has no mesh address yet"),
    ],
)
def test_a_peer_that_cannot_be_pinged_is_told_apart(wanted: str, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        choose_target(parse_status(STATUS), wanted, version=None)


def test_a_short_name_of_two_peers_is_none() -> None:
    status = AgentStatus("home", "home.me", peers=(PeerView("a.nas", ("::1",)), PeerView("b.nas", ("::1",))))
    with pytest.raises(CommandError, match=r"not one peer but 2: a.nas, b.nas"):
        choose_target(status, "nas", version=None)


def test_an_echo_is_what_rfc_792_draws() -> None:
    packet = encode_echo(4, 0x1234, 1, b"abc")
    assert packet[:2] == bytes([8, 0])
    words = struct.unpack("!6H", packet + b"\0")
    total = sum(words)
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF


def test_only_our_own_reply_counts() -> None:
    reply = bytes([0, 0, 9, 9, 7, 7, 0, 3]) + b"payload"
    assert is_reply(reply, 4, 3, b"payload")
    assert not is_reply(reply, 4, 4, b"payload")
    assert not is_reply(reply, 4, 3, b"another")
    assert not is_reply(reply, 6, 3, b"payload")
    assert not is_reply(reply[:4], 4, 3, b"payload")
    assert is_reply(strip_header(bytes([0x46]) + bytes(23) + reply), 4, 3, b"payload")


def test_what_the_agent_lost_is_read_and_an_older_agent_lost_nothing() -> None:
    status = parse_status(STATUS)
    assert (status.unread, status.inbox_lost, status.courier_lost) == (7, 1, 2)
    assert status.unsent == (("BUSY", 4), ("UNREACHABLE", 3))
    assert parse_status({"mesh": "home"}).unsent == ()


SHOWN = {
    "peer": "home.nas",
    "fingerprint": "ab" * 32,
    "trust": "Pinned",
    "ca": None,
    "certified": False,
    "peers": [
        {"name": "home.a", "named": "11" * 32, "pinned": "11" * 32, "trust": "Pinned", "reason": ""},
        {"name": "home.b", "named": "22" * 32, "pinned": "33" * 32, "trust": None, "reason": "is another"},
        {"name": "home.c", "named": None, "pinned": None, "trust": None, "reason": "publishes none"},
    ],
}


def test_identities_are_shown_with_what_is_kept_of_each_and_why_one_is_not_believed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("scope.ctl.identity.ask", lambda path, request: {"ok": True, "identity": SHOWN})
    assert main(["identity", "show", "--socket", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Fingerprint:", "ab" * 32] in lines and ["Trust:", "Pinned"] in lines
    assert ["home.a", "11" * 32, "yes", "Pinned"] in lines
    assert ["home.b", "22" * 32, "33" * 32, "None", "is", "another"] in lines
    assert ["home.c", "-", "no", "None", "publishes", "none"] in lines
    assert main(["identity", "show", "-o", "json", "--socket", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == SHOWN


def test_identity_commands_ask_for_what_they_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, str]] = []

    def answer(path: Path, request: dict[str, str], **_: float) -> dict[str, object]:
        asked.append(request)
        return {"ok": True, "fingerprint": "cd" * 32, "named": "22" * 32}

    monkeypatch.setattr("scope.ctl.identity.ask", answer)
    socket, certificate = ["--socket", str(tmp_path)], tmp_path / "certificate"
    certificate.write_text("QUJD\n")
    assert main(["identity", "trust", "home.b", "22" * 32, *socket]) == 0
    assert main(["identity", "trust", "home.b", "33" * 32, *socket]) == 0
    out = capsys.readouterr().out
    assert "a key is agreed on" in out and f"the registry names {'22' * 32}" in out
    assert main(["identity", "rotate", *socket]) == 0
    assert "cd" * 32 in capsys.readouterr().out
    assert main(["identity", "certify", str(certificate), *socket]) == 0
    assert main(["identity", "certify", str(tmp_path / "none"), *socket]) == 1
    assert asked == [
        {"command": "identity trust", "peer": "home.b", "argument": "22" * 32},
        {"command": "identity trust", "peer": "home.b", "argument": "33" * 32},
        {"command": "identity rotate"},
        {"command": "identity certify", "argument": "QUJD"},
    ]
