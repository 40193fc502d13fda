"""What user-space WireGuard needs, and of whom: the agent, or a supervisor that waits for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scope_agent.wireguard.shell.user_space import require_program
from scope_dataplane.process import take_lock

from scope.model import ConfigError


def test_an_agent_needs_the_program_unless_a_supervisor_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "get_exec_path", lambda: [str(tmp_path)])
    with pytest.raises(ConfigError, match="wireguard-go is not on the PATH"):
        require_program(tmp_path, "scope0")
    lock = take_lock(str(tmp_path / "wireguard" / "scope0.lock"))
    assert lock is not None
    require_program(tmp_path, "scope0")
    os.close(lock)
    with pytest.raises(ConfigError, match="wireguard-go is not on the PATH"):
        require_program(tmp_path, "scope0")
