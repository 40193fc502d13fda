"""Post-quantum keys between two real agents: real primitives, real WireGuard, real packets."""

from __future__ import annotations

import contextlib
import json
import re
import time
from pathlib import Path
from typing import Any

from lab import Lab, Nat
from lab.netns import processes_in
from meshlab import PRIVATE, Member, Pinger, Registry, Watch, mesh_document
from meshlab.programs import program

from tests.netns.secrets_fixture import forms, secrets_in

MESH = "keys"
CONVERGED_S = 180.0
LAID_S = 100.0  # of a new key: a session is young enough for it again after a rekey


def _files(member: Member) -> list[Path]:
    root = Path("/proc", str(member.machine.holder_pid), "root/var/lib/scope", MESH)
    return [path for path in sorted(root.rglob("*")) if path.is_file()]


def _records(member: Member) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in _files(member) if path.parent.name == "psk"]


def _current(member: Member) -> dict[str, Any]:
    (record,) = _records(member)
    current = record["current"]
    assert isinstance(current, dict)
    return current


def _await(member: Member, command: list[str], expected: str) -> str:
    """The first answer of the member's agent that holds what is expected."""
    deadline = time.monotonic() + CONVERGED_S
    while True:
        answer = member.machine.run([program("scopectl"), *command], check=False)
        if expected in answer.stdout:
            return answer.stdout
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


def _said(members: list[Member], registry: Registry) -> dict[str, str]:
    """All that others may read: logs, answers, resources, each process's arguments and environment."""
    said = {"the registry's log": registry.log.read_text()}
    for kind in ("meshes", "peers"):
        said[kind] = registry.scopectl("get", kind, "-o", "yaml")
    for member in members:
        said[f"the log of {member.name}"] = member.log.read_text()
        for command in (["status", "-o", "json"], ["identity", "show", "-o", "json"], ["metrics"]):
            said[f"{command[0]} of {member.name}"] = member.machine.run(
                [program("scopectl"), *command]
            ).stdout
    hosts = [registry.server, *(member.machine for member in members)]
    for pid in processes_in([host.namespace for host in hosts]):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                raw = Path("/proc", str(pid), name).read_bytes()
                said[f"{name} of {pid}"] = raw.decode(errors="replace")
    return said


def _may_dump(members: list[Member]) -> list[str]:
    """Processes that a core would be left of."""
    found = []
    for pid in processes_in([member.machine.namespace for member in members]):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            arguments = Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode()
            limits = Path("/proc", str(pid), "limits").read_text()
            is_ours = "scope-agent" in arguments or "wireguard" in arguments
            if is_ours and not re.search(r"^Max core file size +[01] ", limits, re.MULTILINE):
                found.append(arguments)
    return found


def _rotate_identity(member: Member, other: Member) -> str:
    """Be another one by one command, and have the other follow; the new fingerprint."""
    before = json.loads(_await(member, ["identity", "show", "-o", "json"], "fingerprint"))["fingerprint"]
    said = member.machine.run([program("scopectl"), "identity", "rotate"]).stdout
    fingerprint = said.split()[0]
    assert len(fingerprint) == 64 and fingerprint != before
    _await(other, ["identity", "show", "-o", "json"], f'"pinned": "{fingerprint}"')
    return fingerprint


def test_a_pair_that_requires_a_key_talks_once_a_handshake_has_proved_it() -> None:
    with Lab(delay_ms=10, private=PRIVATE) as lab, Pinger() as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document(MESH, postQuantum={"mode": "Required"}))
        token = registry.token(MESH)
        members = [
            Member(lab.site(site, nat=Nat.PORT_RESTRICTED).machine(name), mesh=MESH, registry=registry)
            for site, name in (("berlin", "anna"), ("lyon", "bert"))
        ]
        for member in members:
            member.join(token, wait=True)
        with Watch(members, pinger) as watch:
            watch.until(watch.is_complete, within_s=CONVERGED_S, missing=watch.describe_unfinished)
        deadline = time.monotonic() + CONVERGED_S
        tables = []
        for member in members:
            while "#1" not in (table := member.machine.run([program("scopectl"), "status"]).stdout):
                assert time.monotonic() < deadline, table
                time.sleep(0.2)
            tables.append(table)
        assert all("POST-QUANTUM KEY" in table for table in tables)
        first, second = (_current(member) for member in members)
        assert first == second and first["epoch"] == 1
        for member in members:
            assert all(path.stat().st_mode & 0o077 == 0 for path in _files(member))
            assert not re.search(r"Secret\((?!\.\.\.)", member.log.read_text())
        secrets = [secrets_in(_files(member)) for member in members]
        assert all(len(found) >= 9 for found in secrets) and len(secrets[0] & secrets[1]) >= 4
        known = {secret for found in secrets for secret in found}
        assert _may_dump(members) == []
        answer = members[0].machine.run([program("scopectl"), "rotate", "--all"], timeout=LAID_S).stdout
        assert answer.startswith(("1 laid in; confirmed at the next rekey", "1 confirmed"))
        known |= secrets_in(path for member in members for path in _files(member))
        fingerprint = _rotate_identity(*members)
        known |= secrets_in(path for member in members for path in _files(member))
        members[0].kill()
        (identity,) = [path for path in _files(members[0]) if path.name == "identity.json"]
        assert identity.stat().st_mode & 0o777 == 0o600
        identity.chmod(0o644)
        members[0].run_again()
        with Watch(members, pinger) as watch:  # with the key in use: it makes no other one
            watch.until(watch.is_complete, within_s=CONVERGED_S, missing=watch.describe_unfinished)
        _await(members[0], ["status"], "identity.json can be read by others: chmod 600")
        identity.chmod(0o600)
        members[0].kill()
        members[0].run_again()
        _await(members[0], ["identity", "show"], fingerprint)
        said = _said(members, registry)  # of all that happened: logs go back to the start
        assert sum(name.startswith("cmdline") for name in said) >= 3
        assert len(known) >= 20
        told = [token, *(form for secret in known for form in forms(secret))]
        assert [name for name, text in said.items() if any(form in text for form in told)] == []
        for member in members:
            member.leave()
            assert not [path for path in _files(member) if path.suffix == ".json"]
