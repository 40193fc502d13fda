"""`scopectl metrics`: Prometheus' text format, printed or served, and never more than the agent says."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from scope.ctl.__main__ import main
from scope.ctl.errors import CommandError
from scope.ctl.local import AgentStatus, PeerView
from scope.ctl.metrics import metrics_text, server

STATUS = AgentStatus(
    mesh="home",
    peer="home.a",
    peers=(
        PeerView("home.b", path="Direct", rtt=12.5, psk_epoch=7, psk_age=34.0, psk_suite=1, psk_trust="CA"),
        PeerView('home."c"\\', path="None", psk_reason="Unanswered"),
    ),
)


def _samples(text: str) -> dict[tuple[str, str], tuple[float, dict[str, str]]]:
    return {
        (sample.name.removeprefix("scope_peer_"), sample.labels["peer"]): (sample.value, sample.labels)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_each_peer_is_told_with_its_key_and_what_stands_against_it() -> None:
    found = _samples(metrics_text(STATUS))
    assert found["key_epoch", "home.b"][0] == 7.0 and found["key_age_seconds", "home.b"][0] == 34.0
    labels = {"mesh": "home", "peer": "home.b", "suite": "1", "trust": "CA"}
    assert found["key_info", "home.b"] == (1.0, labels)
    assert found["rtt_seconds", "home.b"][0] == 0.0125
    other = 'home."c"\\'
    assert found["key_epoch", other][0] == 0.0 and found["path", other][1]["path"] == "None"
    assert found["key_failure", other][1]["reason"] == "Unanswered"
    absent = {
        ("key_info", other),
        ("key_age_seconds", other),
        ("rtt_seconds", other),
        ("key_failure", "home.b"),
    }
    assert not absent & found.keys()


def test_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = [{"name": "home.b", "path": "Direct", "psk": {"epoch": 2}}]
    answer = {"ok": True, "status": {"mesh": "home", "peers": peers}}
    monkeypatch.setattr("scope.ctl.inspection.ask", lambda path, request: answer)
    assert main(["metrics", "--socket", str(tmp_path)]) == 0
    assert _samples(capsys.readouterr().out)["key_epoch", "home.b"][0] == 2.0


def test_it_is_served_on_the_loopback_address_and_fails_while_the_agent_is_away() -> None:
    answers = [STATUS]

    def look() -> AgentStatus:
        if not answers:
            raise CommandError("nobody answers: the agent has died")
        return answers.pop()

    with server(look, 0) as serving:
        host, port = serving.server_address[:2]
        assert host == "127.0.0.1"
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                assert _samples(answer.read().decode()) == _samples(metrics_text(STATUS))
            for path, code in (("metrics", 503), ("other", 404)):
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60)
                assert refused.value.code == code
                refused.value.close()
        finally:
            serving.shutdown()
            thread.join()


def test_a_port_that_is_taken_is_said() -> None:
    with server(lambda: STATUS, 0) as serving, pytest.raises(CommandError, match="choose another --listen"):
        server(lambda: STATUS, int(serving.server_address[1]))
