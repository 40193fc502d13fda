"""What a hub keeps on disk: its grants, and how the kernel's settings were."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from scope_agent.state import StateDir

from scope.model import ConfigError, PublicKey, RelayLimits
from scope.relay import Grant, Grants, Side

FIRST, SECOND = (Side(2 + n, PublicKey(bytes([n + 1]) * 32), bytes([n]) * 8, 26000 + n) for n in (0, 1))
GRANTS = Grants(26000, 26255, RelayLimits(pair=5, total=9), (Grant((FIRST, SECOND), 1_700_000_000.5),))


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    made = StateDir("net", tmp_path)
    made.prepare()
    return made


def test_grants_are_kept_for_the_owner_alone_and_read_again(state: StateDir) -> None:
    assert state.load_granted() == (None, "")
    state.save_granted(GRANTS)
    assert state.load_granted() == (GRANTS, "")
    assert stat.S_IMODE(state.granted_file.stat().st_mode) == 0o600


def test_who_is_no_hub_keeps_no_grants(state: StateDir) -> None:
    state.save_granted(GRANTS)
    state.save_granted(None)
    assert state.load_granted() == (None, "")
    state.save_granted(None)


def test_damaged_grants_are_said_and_none_is_kept_but_that_there_was_a_hub(state: StateDir) -> None:
    state.save_granted(GRANTS)
    text = state.granted_file.read_text()
    state.granted_file.write_text(text.replace(FIRST.token.hex(), "00"))
    granted, trouble = state.load_granted()
    assert granted is not None and granted.grants == ()
    assert "a token is 8 bytes" in trouble


def test_settings_are_kept_and_forgotten(state: StateDir) -> None:
    state.save_settings({"net/ipv4/ip_forward": "0"})
    assert state.load_settings() == {"net/ipv4/ip_forward": "0"}
    state.save_settings({})
    assert state.load_settings() == {}
    assert not state.settings_file.exists()


@pytest.mark.parametrize("path", ["kernel/core_pattern", "net/ipv4/../../kernel/core_pattern", "/etc/passwd"])
def test_settings_that_lead_elsewhere_are_refused(state: StateDir, path: str) -> None:
    state.save_settings({path: "0"})
    with pytest.raises(ConfigError, match="paths of net/ipv4"):
        state.load_settings()


def test_leaving_removes_them_and_the_certificate_for_those_whom_it_carries(state: StateDir) -> None:
    state.save_granted(GRANTS)
    state.save_settings({"net/ipv4/ip_forward": "0"})
    state.carrier_file.write_text("its key")
    state.remove()
    assert not state.path.exists()
