"""`scopectl rotate`: until the keys are laid in or, with --wait, until a handshake has proved them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import pytest

from scope.ctl.__main__ import main


def _peer(name: str, *, path: str = "Direct", **psk: object) -> dict[str, object]:
    return {"name": name, "path": path, "hub": "home.hub", "psk": psk}


class _Agent:
    """Answers with one status after the other, the last one for ever; each sleep is a second."""

    def __init__(self, *statuses: list[dict[str, object]]) -> None:
        self.statuses = list(statuses)
        self.asked: list[object] = []
        self.now = 0.0

    def ask(self, path: Path, request: Mapping[str, object]) -> dict[str, object]:
        if request["command"] == "rotate":
            self.asked.append(request["peer"])
            return {"ok": True, "peers": 1}
        peers = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return {"ok": True, "status": {"mesh": "home", "peers": peers}}

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def socket(tmp_path: Path) -> str:
    path = tmp_path / "home.sock"
    path.touch()
    return str(path)


Run: TypeAlias = Callable[..., tuple[int, str]]


@pytest.fixture
def run(socket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def rotate(agent: _Agent, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr("scope.ctl.inspection.ask", agent.ask)
        monkeypatch.setattr("scope.ctl.inspection.time.sleep", agent.sleep)
        monkeypatch.setattr("scope.ctl.inspection.time.monotonic", lambda: agent.now)
        code = main(["rotate", *arguments, "--socket", socket])
        said = capsys.readouterr()
        return code, said.out + said.err

    return rotate


BEFORE = _peer("home.nas", epoch=6)
LAID = _peer("home.nas", epoch=6, laidEpoch=7)
CONFIRMED = _peer("home.nas", epoch=7)


def test_it_returns_when_the_key_is_laid_in(run: Run) -> None:
    agent = _Agent([BEFORE], [BEFORE], [LAID])
    code, said = run(agent, "home.nas")
    assert (code, agent.asked) == (0, ["home.nas"])
    assert said == "1 laid in; confirmed at the next rekey, 2 minutes at most\n"


def test_wait_shows_progress_until_a_handshake_confirms(run: Run) -> None:
    agent = _Agent([BEFORE], [BEFORE], [LAID], [LAID], [CONFIRMED])
    code, said = run(agent, "home.nas", "--wait")
    assert code == 0
    assert said.splitlines() == ["1 under way", "1 laid in", "1 confirmed", "1 confirmed"]


def test_all_means_those_with_a_path(run: Run) -> None:
    others = [_peer("home.off", path="None"), _peer("home.edge", path="Routed")]
    agent = _Agent([BEFORE, *others], [LAID, *others])
    code, said = run(agent, "--all")
    assert (code, agent.asked) == (0, [""])
    assert said.startswith("1 laid in;")


def test_what_stands_against_a_key_is_said_and_ends_the_wait(run: Run) -> None:
    failed = _peer("home.pi", epoch=2, reason="Untrusted", failure="its identity is another one")
    agent = _Agent([BEFORE, _peer("home.pi", epoch=2)], [LAID, failed], [CONFIRMED, failed])
    code, said = run(agent, "--all", "--wait")
    assert code == 1
    assert said.splitlines()[-2:] == [
        "1 confirmed",
        "home.pi: its identity is another one; the agent goes on trying",
    ]


def test_a_key_that_never_comes_ends_the_wait_in_time(run: Run) -> None:
    agent = _Agent([BEFORE])
    code, said = run(agent, "home.nas")
    assert code == 1 and agent.now <= 431.0
    assert "home.nas: nothing came of it in 430 s" in said


def test_a_key_that_is_never_confirmed_ends_the_wait_in_time(run: Run) -> None:
    agent = _Agent([BEFORE], [LAID])
    code, said = run(agent, "home.nas", "--wait")
    assert code == 1 and agent.now <= 431.0 + 160.0
    assert "1 laid in" in said


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("home.none", "no peer 'home.none' in the mesh"),
        ("home.off", "home.off: no path to it"),
        ("home.edge", "home.edge: it is reached by home.hub, whose link has the key"),
    ],
)
def test_a_peer_that_cannot_be_keyed_is_refused_before_the_agent_is_asked(
    run: Run, name: str, why: str
) -> None:
    agent = _Agent([BEFORE, _peer("home.off", path="None"), _peer("home.edge", path="Routed")])
    code, said = run(agent, name)
    assert (code, agent.asked) == (1, []) and why in said
