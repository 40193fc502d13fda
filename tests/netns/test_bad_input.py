"""What people and machines get wrong, met as a user meets it: the installed programs, in a lab.

Each case asks for the same three things: one sentence that says what, where and what to do next (no trace, no
secret), an exit status of its own (1, or 2 for wrong usage), and that nothing was lost. Beside every case run
two agents of the same mesh, which must not notice.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab import Host, Lab, Server
from meshlab import PRIVATE, Registry, mesh_document
from meshlab.programs import program
from scope_agent.__main__ import REMOVED

from scope.join import JoinString

STATE = "/var/lib/scope/demo"
DATA = "/var/lib/scope-registry"
WITHIN_S = 120.0  # for what takes a second on a machine with nothing else to do
POLL_S = 0.05


class World:
    """A lab with a registry and its mesh `demo`; `host` gives fresh machines on its internet."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.registry = Registry(lab.server("registry"))
        self.registry.apply(mesh_document("demo"))
        self.token = self.registry.token("demo")
        self._hosts = 0

    def host(self) -> Server:
        """A machine that finds the registry by its name, and has nothing on its disk."""
        self._hosts += 1
        made = self.lab.server(f"host{self._hosts}")
        self.registry.introduce(made)
        return made

    def joined(self) -> Server:
        """A machine that has joined, whose agent does not run."""
        host = self.host()
        done = run(host, "scope-agent", "join", self.token, "--name", host.name)
        assert done.returncode == 0, done.stderr
        return host

    def peer(self, name: str) -> dict[str, Any]:
        """A ScopePeer as the registry has it."""
        found: dict[str, Any] = json.loads(self.registry.scopectl("get", "peers", name, "-o", "json"))
        return found


class Agent:
    """An agent in a host, started with any words before and arguments after the program."""

    def __init__(self, host: Server, *arguments: str, before: tuple[str, ...] = ()) -> None:
        self.host = host
        self.log = host.directory / f"agent{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            command = [*before, program("scope-agent"), *(arguments or ("run",))]
            self.process = host.popen(command, stdout=log, stderr=log)

    def status(self) -> dict[str, Any]:
        """Its answer to `status`; empty while it does not answer."""
        return status(self.host)

    def until(self, holds: Callable[[dict[str, Any]], bool], *, within_s: float = WITHIN_S) -> dict[str, Any]:
        """The first status for which something holds."""
        last: dict[str, Any] = {}

        def look() -> bool:
            nonlocal last
            assert self.process.poll() is None, self.log.read_text()
            last = self.status()
            return bool(last) and holds(last)

        wait(look, lambda: f"{last}\n{self.log.read_text()}", within_s=within_s)
        return last

    def refused(self, *said: str, status: int = 1) -> str:
        """It ends by itself with a refusal that says all this."""
        code = self.process.wait(WITHIN_S)
        return check_refusal("scope-agent", code, self.log.read_text(), *said, status=status)

    def stop(self) -> int:
        """Stop it as a service manager does; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WITHIN_S)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with Lab(private=PRIVATE) as lab:
        yield World(lab)


@pytest.fixture(scope="module")
def pair(world: World) -> tuple[Agent, Agent]:
    """Two agents of the mesh `demo` with a path between them."""
    both = [
        Agent(host, "join", world.token, "--name", host.name, "--run")
        for host in (world.host(), world.host())
    ]
    for agent in both:
        agent.until(lambda said: directs(said) == 1)
    return both[0], both[1]


@pytest.fixture(autouse=True)
def undisturbed(pair: tuple[Agent, Agent]) -> Iterator[None]:
    """Whatever a test does, these two go on: same process, same port, and pings pass."""
    before = [agent.status()["device"]["listenPort"] for agent in pair]
    yield
    assert [agent.process.poll() for agent in pair] == [None, None]
    assert [agent.status()["device"]["listenPort"] for agent in pair] == before
    await_ping(pair[0].host, pair[1].status()["addresses"][0])


# --- joining ------------------------------------------------------------------------------------------------


def test_a_registry_that_cannot_be_reached_is_named_and_the_string_stays_good(world: World) -> None:
    host = world.host()
    once = world.registry.token("demo", single_use=True)
    elsewhere = replace(JoinString.parse(once), url="https://registry.example:7444").format()
    said = refuse(host, "scope-agent", "join", elsewhere, secret=once)
    for part in ("cannot join demo", "https://registry.example:7444", "join again with the same string"):
        assert part in said
    run(host, "scope-agent", "join", once, check=True)


def test_a_registry_with_another_key_is_refused_before_it_hears_the_secret(world: World) -> None:
    host = world.host()
    once = world.registry.token("demo", single_use=True)
    wrong = replace(JoinString.parse(once), pin=bytes(32)).format()
    said = refuse(host, "scope-agent", "join", wrong, secret=once)
    for part in ("https://registry.example:7443", "certificate key with pin", "ask its administrator"):
        assert part in said
    run(host, "scope-agent", "join", once, check=True)


def test_an_expired_a_used_and_a_deleted_token_each_say_how_to_get_another(world: World) -> None:
    host = world.host()
    expiring = world.registry.scopectl("token", "create", "--mesh", "demo", "--ttl", "1s").strip()
    deadline = time.time() + 1.0
    used = world.registry.token("demo", single_use=True)
    run(world.host(), "scope-agent", "join", used, check=True)
    deleted = world.registry.token("demo")
    world.registry.scopectl("token", "delete", JoinString.parse(deleted).token_id)
    wait(lambda: time.time() > deadline, lambda: "time stands still")
    for token, reason in (
        (expiring, "expired"),
        (used, "was used by another"),
        (deleted, "no join token has"),
    ):
        said = refuse(host, "scope-agent", "join", token, secret=token)
        assert reason in said
        assert "`scopectl token create --mesh demo` makes a new one" in said
    assert not inside(host, f"{STATE}/enrolment.json").exists()


def test_a_second_join_of_a_machine_changes_nothing(world: World) -> None:
    host = world.joined()
    kept = files(host, STATE)
    said = refuse(host, "scope-agent", "join", world.token, secret=world.token)
    assert f"this machine already is demo.external.{host.name}" in said
    assert "`scope-agent run`" in said
    assert "`scope-agent leave`" in said
    assert files(host, STATE) == kept


def test_a_name_that_is_taken_goes_to_nobody_else(world: World) -> None:
    host = world.joined()
    before = world.peer(f"demo.external.{host.name}")
    done = run(world.host(), "scope-agent", "join", world.token, "--name", host.name)
    assert done.returncode == 0
    assert re.search(rf"Joined demo as demo\.external\.{host.name}\.[0-9a-f]{{8}}\.", done.stderr)
    assert world.peer(f"demo.external.{host.name}") == before


def test_a_join_string_that_lost_its_end_is_told_so(world: World) -> None:
    host = world.host()
    for text in (world.token.partition("#")[0], world.token[:-3], "https://registry.example"):
        said = refuse(host, "scope-agent", "join", text, secret=world.token)
        assert "after #" in said or "mesh is missing" in said
    assert not inside(host, STATE).exists()


def test_a_join_on_a_full_disk_uses_up_no_token(world: World) -> None:
    host = world.host()
    once = world.registry.token("demo", single_use=True)
    mount_small(host, "/var/lib/scope", size="16k")
    fill(host, "/var/lib/scope")
    said = refuse(host, "scope-agent", "join", once, secret=once)
    assert f"cannot write {STATE}/joining.json: No space left on device; free some space" in said
    assert token_uses(world, once) == 0
    # Room for the keys, not for the enrolment: the registry knows a machine that could not keep the answer.
    free(host, "/var/lib/scope")
    inside(host, "/var/lib/scope/blocker").write_bytes(bytes(8192))
    said = refuse(host, "scope-agent", "join", once, secret=once)
    assert "join again with the same string" in said
    assert token_uses(world, once) == 1
    inside(host, "/var/lib/scope/blocker").unlink()
    done = run(host, "scope-agent", "join", once, check=True)
    assert "Joined demo as" in done.stderr
    assert token_uses(world, once) == 1


def test_a_mesh_without_a_free_address_says_so_and_the_others_keep_theirs(world: World) -> None:
    world.registry.apply(mesh_document("tiny", addressing={"ipv4": "10.9.0.0/30"}))
    token = world.registry.token("tiny")
    hosts = [world.host() for _ in range(3)]
    for host in hosts[:2]:
        run(host, "scope-agent", "join", token, "--name", host.name, check=True)
    before = [world.peer(f"tiny.external.{host.name}") for host in hosts[:2]]
    last = hosts[2]
    said = refuse(last, "scope-agent", "join", token, "--name", last.name, secret=token)
    assert f"tiny.external.{last.name} has joined, but has no address" in said
    assert "widen spec.addressing" in said
    assert conditions(world.peer(f"tiny.external.{last.name}"))["Ready"]["reason"] == "NoAddressLeft"

    def exhausted() -> dict[str, Any]:
        mesh = json.loads(world.registry.scopectl("get", "meshes", "tiny", "-o", "json"))
        return conditions(mesh)["AddressesExhausted"]

    wait(lambda: exhausted()["status"] == "True", lambda: f"{exhausted()}")
    assert last.name in exhausted()["message"]
    assert [world.peer(f"tiny.external.{host.name}") for host in hosts[:2]] == before
    # What it says to do helps, without a further join.
    agent = Agent(last)
    assert agent.until(lambda said: said["registry"]["connected"])["addresses"] == []
    world.registry.apply(mesh_document("tiny", addressing={"ipv4": "10.9.0.0/29"}))
    agent.until(lambda said: bool(said["addresses"]))
    agent.stop()


def test_without_root_nothing_is_claimed_about_the_machine(world: World) -> None:
    host = world.joined()
    nobody = ("/usr/bin/setpriv", "--reuid=65534", "--clear-groups")
    for arguments in (("join", world.token), ("run",), ("run", "--mesh", "demo"), ("leave",)):
        said = refuse(host, "scope-agent", *arguments, before=nobody, secret=world.token)
        assert "/var/lib/scope" in said
        assert "run as root" in said


def test_what_has_not_joined_is_told_how_to(world: World) -> None:
    host = world.host()
    for command in ("run", "leave"):
        assert "`scopectl token create`" in refuse(host, "scope-agent", command)
    assert "has not joined other" in refuse(world.joined(), "scope-agent", "run", "--mesh", "other")
    assert "scope-agent join" in refuse(host, "scopectl", "status")


@pytest.mark.parametrize(
    "words",
    [
        ("scope-agent",),
        ("scope-agent", "join"),
        ("scope-agent", "fly"),
        ("scope-agent", "run", "--wireguard", "None"),
        ("scope-registry", "serve", "--listen", "7443"),
        ("scope-registry", "serve", "--reflector-ports", "a,b"),
        ("scopectl", "token", "create"),
    ],
)
def test_wrong_usage_is_status_2(words: tuple[str, ...], world: World) -> None:
    done = run(world.registry.server, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "usage: " in done.stderr


def test_a_clock_that_is_an_hour_off_joins_and_runs(world: World) -> None:
    host = world.host()
    late = (
        sys.executable,
        "-c",
        "import sys, time; real = time.time; time.time = lambda: real() - 3600.0; "
        "from scope_agent.__main__ import main; sys.argv[0:2] = ['scope-agent']; sys.exit(main())",
    )
    agent = Agent(host, "join", world.token, "--name", host.name, "--run", before=late)
    agent.until(lambda said: said["registry"]["connected"] and directs(said) >= 2)
    wait(
        lambda: "endpoints" in json.dumps(world.peer(f"demo.external.{host.name}")["status"]),
        lambda: "its report never arrived",
    )
    agent.stop()


# --- the agent ----------------------------------------------------------------------------------------------


def test_a_second_agent_leaves_the_first_its_socket_and_its_device(pair: tuple[Agent, Agent]) -> None:
    first = pair[0]
    before = files(first.host, STATE)
    for more in ((), ("--run-dir", "/run/scope/other")):
        said = refuse(first.host, "scope-agent", "run", *more)
        assert "another scope-agent runs in mesh demo on this machine" in said
        assert "`systemctl stop scope-agent@demo`" in said
    assert files(first.host, STATE).keys() == before.keys()
    assert first.status()["device"]["drift"] == 0
    # An agent that was killed holds nothing back.
    first.process.kill()
    first.process.wait()
    again = Agent(first.host)
    again.until(lambda said: directs(said) >= 1)
    first.process, first.log = again.process, again.log


def test_a_damaged_snapshot_is_put_aside_and_the_registry_gives_another(world: World) -> None:
    host = world.joined()
    inside(host, f"{STATE}/snapshot.json").write_text('{"format": 1, "mesh": nonsense')
    agent = Agent(host)
    said = agent.until(lambda said: directs(said) >= 2 and bool(said["addresses"]))
    assert f"{STATE}/snapshot.json is damaged" in agent.log.read_text()
    assert inside(host, f"{STATE}/snapshot.damaged").exists()
    assert said["device"]["listenPort"] >= 20000
    wait(lambda: stored(host)["listenPort"] == said["device"]["listenPort"], lambda: "never saved")
    agent.stop()


def test_a_damaged_enrolment_stops_the_agent_and_stays_as_it_is(world: World) -> None:
    host = world.joined()
    file = inside(host, f"{STATE}/enrolment.json")
    whole = file.read_text()
    file.write_text(whole[:100])
    for command in ("run", "leave", "join"):
        arguments = (command, world.token) if command == "join" else (command,)
        said = refuse(host, "scope-agent", *arguments, secret=world.token)
        assert f"{STATE}/enrolment.json is damaged" in said
        assert "restore it from a backup" in said
    assert file.read_text() == whole[:100]
    file.write_text(whole.replace('"format":1', '"format":9'))
    assert "upgrade this one" in refuse(host, "scope-agent", "run")
    file.write_text(whole)
    file.chmod(0o644)
    assert f"chmod 600 {STATE}/enrolment.json" in refuse(host, "scope-agent", "run")


def test_a_full_disk_is_said_in_status_and_the_agent_goes_on(world: World, pair: tuple[Agent, Agent]) -> None:
    host = world.host()
    mount_small(host, "/var/lib/scope", size="256k")
    agent = Agent(host, "join", world.token, "--name", host.name, "--run")
    agent.until(lambda said: directs(said) >= 2)
    wait(lambda: len(stored(host)["peers"]) >= 2, lambda: "the first snapshot was never saved")
    fill(host, "/var/lib/scope")
    kept = stored(host)  # from here on: until now the agent may still have saved something newer
    newcomer = world.joined()
    agent.until(
        lambda said: (
            any(each["type"] == "Disk" for each in said["conditions"])
            and newcomer.name in json.dumps(said["peers"])
        )
    )
    shown = run(host, "scopectl", "status", check=True).stdout
    shown = " ".join(shown.split())
    assert f"cannot write {STATE}/snapshot.json: No space left on device; free some space" in shown
    await_ping(host, pair[0].status()["addresses"][0])
    assert stored(host) == kept
    # A restart on the full disk starts from what is there.
    assert agent.stop() == 0
    agent = Agent(host)
    agent.until(lambda said: directs(said) >= 2)
    free(host, "/var/lib/scope")
    assert agent.stop() == 0


def test_a_fixed_port_that_is_taken_is_named_and_used_once_it_is_free(world: World) -> None:
    world.registry.apply(
        mesh_document("fixed", addressing={"ipv4": "10.77.0.0/24"}, listenPort=31234),
    )
    token = world.registry.token("fixed")
    host = world.host()
    run(host, "scope-agent", "join", token, "--name", host.name, check=True)
    with holding(host, 31234):
        agent = Agent(host)
        said = agent.until(lambda said: any("31234" in each["message"] for each in said["conditions"]))
        (message,) = (each["message"] for each in said["conditions"] if each["type"] == "Device")
        assert "UDP port 31234 is held by another program" in message
        assert "`ss -ulpn` names it" in message
    agent.until(lambda said: not said["conditions"])
    assert bound(host, 31234)
    agent.stop()


def test_a_port_of_the_agents_own_choice_that_is_taken_is_changed_for_good(world: World) -> None:
    host = world.joined()
    taken = stored(host)["listenPort"]
    with holding(host, taken):
        agent = Agent(host)
        # Paths may be found before the device is refused its port: the raw socket does not bind it.
        said = agent.until(lambda said: directs(said) >= 2 and said["device"]["listenPort"] != taken)
        port = said["device"]["listenPort"]
        wait(lambda: stored(host)["listenPort"] == port, lambda: "the new port was not kept")
        agent.stop()
    agent = Agent(host)
    assert agent.until(lambda said: directs(said) >= 2)["device"]["listenPort"] == port
    agent.stop()


def test_an_interface_of_somebody_else_is_left_alone(world: World) -> None:
    host = world.joined()
    host.run(["ip", "link", "add", "scope0", "type", "veth", "peer", "name", "other0"])
    kept = files(host, STATE)
    said = refuse(host, "scope-agent", "run")
    assert "The interface scope0 exists and is not Scope's WireGuard device (veth)" in said
    assert "rename or remove it" in said
    assert "other0" in host.run(["ip", "link", "show", "scope0"]).stdout
    assert files(host, STATE) == kept
    host.run(["ip", "link", "del", "scope0"])
    agent = Agent(host)
    agent.until(lambda said: directs(said) >= 2)
    agent.stop()


def test_without_cap_net_raw_probes_still_pass(world: World, pair: tuple[Agent, Agent]) -> None:
    host = world.joined()
    agent = Agent(host, before=("/usr/bin/setpriv", "--bounding-set=-net_raw"))
    agent.until(lambda said: directs(said) >= 2)
    await_ping(host, pair[0].status()["addresses"][0])
    assert agent.stop() == 0


def test_a_missing_capability_is_named(world: World) -> None:
    host = world.joined()
    kept = files(host, STATE)
    said = refuse(host, "scope-agent", "run", before=("/usr/bin/setpriv", "--bounding-set=-net_admin"))
    for part in ("scope0", "CAP_NET_ADMIN", "AmbientCapabilities"):
        assert part in said
    # Without nftables nothing takes the place of CAP_NET_RAW.
    programs = host.directory / "programs"
    programs.mkdir()
    wireguard = shutil.which("wireguard-go")
    assert wireguard is not None
    (programs / "wireguard-go").symlink_to(wireguard)
    bare = ("/usr/bin/setpriv", "--bounding-set=-net_raw", "/usr/bin/env", f"PATH={programs}")
    said = refuse(host, "scope-agent", "run", before=bare)
    for part in ("CAP_NET_RAW", "`nft` is not on the PATH", "AmbientCapabilities"):
        assert part in said
    assert kept.items() <= files(host, STATE).items()


def test_sigterm_leaves_the_device_up_and_is_no_failure(world: World, pair: tuple[Agent, Agent]) -> None:
    host = world.joined()
    agent = Agent(host)
    agent.until(lambda said: directs(said) >= 2)
    address = pair[0].status()["addresses"][0]
    await_ping(host, address)
    assert agent.stop() == 0
    assert host.run(["ping", "-c3", "-i0.1", "-W1", address], check=False).returncode == 0


def test_a_removed_machine_is_told_so_and_may_come_back_by_a_new_token(world: World) -> None:
    host = world.joined()
    agent = Agent(host)
    agent.until(lambda said: directs(said) >= 2)
    world.registry.scopectl("peer", "remove", f"demo.external.{host.name}")
    removed = "this peer was removed from demo"
    agent.refused(removed, "`scope-agent leave --mesh demo` cleans up", status=REMOVED)
    Agent(host).refused(removed, status=REMOVED)
    said = refuse(host, "scope-agent", "join", world.token, secret=world.token)
    assert "`scope-agent leave`" in said
    run(host, "scope-agent", "leave", "--mesh", "demo", check=True)
    assert host.run(["ip", "link", "show", "scope0"], check=False).returncode != 0
    assert not inside(host, STATE).exists()
    run(host, "scope-agent", "join", world.token, "--name", host.name, check=True)


def test_leaving_unheard_needs_force(world: World) -> None:
    host = world.joined()
    kept = files(host, STATE)
    host.run(["ip", "link", "set", "wan", "down"])
    said = refuse(host, "scope-agent", "leave")
    assert "the registry was not told" in said
    assert "--force" in said
    assert files(host, STATE) == kept
    done = run(host, "scope-agent", "leave", "--force", check=True)
    assert "Traceback" not in done.stderr
    assert not inside(host, STATE).exists()


# --- the registry -------------------------------------------------------------------------------------------


def test_a_second_registry_and_a_taken_port_leave_the_first_one_alone(world: World) -> None:
    server = world.registry.server
    assert f"{DATA}/registry.db is held by another process" in refuse(server, "scope-registry", "serve")
    elsewhere = ("serve", "--data", f"{DATA}/second")
    said = refuse(server, "scope-registry", *elsewhere)
    assert "cannot listen on" in said
    assert "port 7443" in said
    assert "--listen" in said
    said = refuse(server, "scope-registry", *elsewhere, "--listen", "127.0.0.1:7445")
    assert "UDP 127.0.0.1 port 7478" in said
    assert "--reflector-ports" in said
    world.registry.scopectl("get", "meshes")


def test_a_database_that_cannot_be_read_stays_as_it_is(world: World) -> None:
    host = world.host()
    registry = Serving(host)
    registry.scopectl("apply", "-f", "-", document=mesh_document("kept"))
    assert registry.stop() == 0
    file = inside(host, f"{DATA}/registry.db")
    whole = file.read_bytes()
    scrambled = whole[:4096] + bytes(reversed(whole[4096:]))
    for damaged, reason in (
        (b"no database at all" * 200, "cannot be read: file is not a database"),
        (scrambled, "cannot be read"),
        (whole[: len(whole) // 2], "cannot be read"),
        (b"", "is missing or empty"),
    ):
        file.write_bytes(damaged)
        said = refuse(host, "scope-registry", "serve")
        assert f"{DATA}/registry.db {reason}" in said
        assert "restore it from a backup" in said
        assert file.read_bytes() == damaged
    file.write_bytes(whole)
    write_version(host, f"{DATA}/registry.db", 99)
    assert "a newer scope-registry wrote it; install that one again" in refuse(
        host, "scope-registry", "serve"
    )
    file.write_bytes(whole)
    file.chmod(0o644)
    assert f"chmod 600 {DATA}/registry.db" in refuse(host, "scope-registry", "serve")
    file.chmod(0o600)
    nobody = ("/usr/bin/setpriv", "--reuid=65534", "--clear-groups")
    assert f"{DATA}/registry.db: Permission denied" in refuse(host, "scope-registry", "serve", before=nobody)
    registry = Serving(host)
    assert "kept" in registry.scopectl("get", "meshes").stdout
    assert registry.stop() == 0


def test_a_registry_on_a_full_disk_refuses_and_loses_nothing_that_it_answered(world: World) -> None:
    host = world.host()
    mount_small(host, DATA, size="512k")
    registry = Serving(host)
    registry.scopectl("apply", "-f", "-", document=mesh_document("full"))
    acknowledged = {registry.token("full")}
    fill(host, DATA)
    refused = registry.scopectl("token", "create", "--mesh", "full", check=False)
    said = check_refusal("scopectl", refused.returncode, refused.stderr)
    assert f"cannot write {DATA}/registry.db" in said
    assert "nothing that was answered is lost; free space" in said
    assert registry.process.poll() is None
    assert {each["id"] for each in registry.tokens()} == acknowledged  # reading goes on
    free(host, DATA)
    acknowledged.add(registry.token("full"))
    fill(host, DATA)
    registry.process.kill()
    registry.process.wait()
    check_start(host)
    free(host, DATA)
    registry = Serving(host)
    assert {each["id"] for each in registry.tokens()} == acknowledged
    assert registry.stop() == 0


# --- scopectl -----------------------------------------------------------------------------------------------


def test_a_typo_in_a_mesh_is_shown_by_its_path_and_nothing_is_applied(world: World) -> None:
    before = json.loads(world.registry.scopectl("get", "meshes", "demo", "-o", "json"))["spec"]
    wrong = (
        mesh_document("demo", listenPort=23456),  # a sound one among them is not applied either
        mesh_document("demo", adressing={}),
        mesh_document("demo", addressing={"ipv4": "10.9.0.0/33"}),
        mesh_document("demo", listenPort=70000),
        mesh_document("demo", timers={"probeInterval": "2 sheep"}),
    )
    shown = (
        "document 2: spec.adressing: unknown field; allowed: addressing, ",
        'did you mean "addressing"?',
        'document 3: spec.addressing.ipv4: "10.9.0.0/33" is not allowed',
        "document 4: spec.listenPort: 70000 is not allowed",
        'document 5: spec.timers.probeInterval: "2 sheep" is not allowed',
        "nothing was applied",
    )
    for document, parts in (
        ("\n---\n".join(wrong), shown),
        ("kind: ScopeMesh\n  x: [", ("standard input, line 2, column 4",)),
    ):
        done = run(world.registry.server, "scopectl", "apply", "-f", "-", input=document)
        check_refusal("scopectl", done.returncode, done.stderr, *parts)
    assert json.loads(world.registry.scopectl("get", "meshes", "demo", "-o", "json"))["spec"] == before


def test_overlapping_prefixes_are_refused_at_apply(world: World) -> None:
    overlapping = (
        mesh_document("lap"),
        mesh_document("lap4", addressing={"ipv4": "100.80.128.0/24"}),
        mesh_document("lap6", addressing={"ipv6": "fd5c:9e0:0:7::/64"}),
    )
    done = run(world.registry.server, "scopectl", "apply", "-f", "-", input="\n---\n".join(overlapping))
    check_refusal(
        "scopectl",
        done.returncode,
        done.stderr,
        "scopemesh/lap: spec.addressing.ipv4: 100.80.0.0/16 overlaps 100.80.0.0/16 of ScopeMesh demo",
        "scopemesh/lap4: spec.addressing.ipv4: 100.80.128.0/24 overlaps 100.80.0.0/16 of ScopeMesh demo",
        "scopemesh/lap6: spec.addressing.ipv6: fd5c:9e0:0:7::/64 overlaps fd5c:9e0::/48 of ScopeMesh demo",
    )
    assert "lap" not in world.registry.scopectl("get", "meshes", "-o", "json")


def test_what_is_not_there_is_named_with_what_is(world: World) -> None:
    server = world.registry.server
    assert "did you mean demo?" in refuse(server, "scopectl", "token", "create", "--mesh", "dema")
    assert "/nowhere.yaml cannot be read" in refuse(server, "scopectl", "apply", "-f", "/nowhere.yaml")
    assert "admin.json" in refuse(world.host(), "scopectl", "get", "peers")
    assert "there is no ScopePeer" in refuse(server, "scopectl", "peer", "remove", "nobody")


# --- programs -----------------------------------------------------------------------------------------------


class Serving:
    """A registry of its own on a host; commands go to it over loopback."""

    def __init__(self, host: Server) -> None:
        self.host = host
        self.log = host.directory / f"registry{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            arguments = ["serve", "--advertise", "127.0.0.1"]
            self.process = host.popen([program("scope-registry"), *arguments], stdout=log, stderr=log)
        wait(self._serves, self.log.read_text)

    def scopectl(
        self, *arguments: str, document: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return run(self.host, "scopectl", *arguments, input=document, check=check)

    def token(self, mesh: str) -> str:
        """Make a token; its id."""
        made = self.scopectl("token", "create", "--mesh", mesh).stdout.strip()
        return JoinString.parse(made).token_id

    def tokens(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self.scopectl("token", "list", "-o", "json").stdout)
        return listed

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WITHIN_S)

    def _serves(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "Next: scopectl apply" in self.log.read_text()


def run(
    host: Host,
    name: str,
    *arguments: str,
    input: str | None = None,
    before: tuple[str, ...] = (),
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run one of our programs to its end."""
    done = host.run([*before, program(name), *arguments], input=input, check=False, timeout=2 * WITHIN_S)
    assert not check or done.returncode == 0, done.stderr
    return done


def refuse(
    host: Host, name: str, *arguments: str, before: tuple[str, ...] = (), secret: str | None = None
) -> str:
    """Run a program that must refuse; its sentence. `secret` is a join string that it must not repeat."""
    done = run(host, name, *arguments, before=before)
    said = check_refusal(name, done.returncode, done.stderr)
    if secret is not None:
        hidden = secret.partition("#")[2].split(".")[1]
        assert hidden not in done.stdout + done.stderr
    return said


def check_refusal(name: str, code: int, stderr: str, *said: str, status: int = 1) -> str:
    """What the program said last, once it is known to be a refusal and no crash."""
    assert code == status, f"exit status {code}: {stderr}"
    assert "Traceback" not in stderr, stderr
    assert "bug" not in stderr, stderr
    *_, sentence = re.split(rf"(?m)^{name}: ", stderr)
    assert sentence != stderr, stderr
    for part in said:
        assert part in sentence, sentence
    return sentence.strip()


def wait(holds: Callable[[], bool], missing: Callable[[], str], *, within_s: float = WITHIN_S) -> None:
    """Return once something holds."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, missing()
        time.sleep(POLL_S)


# --- looking into hosts -------------------------------------------------------------------------------------


def inside(host: Host, path: str) -> Path:
    """A path of the host's own file systems, as this process reaches it."""
    return Path(f"/proc/{host.holder_pid}/root{path}")


def files(host: Host, directory: str) -> dict[str, bytes]:
    """Every file of a directory with what it holds."""
    return {path.name: path.read_bytes() for path in inside(host, directory).iterdir() if path.is_file()}


def stored(host: Host) -> dict[str, Any]:
    """The snapshot on a host's disk; one that knows nothing while there is none."""
    try:
        document: dict[str, Any] = json.loads(inside(host, f"{STATE}/snapshot.json").read_text())
    except FileNotFoundError:
        return {"peers": [], "listenPort": 0}
    return document


def status(host: Host) -> dict[str, Any]:
    """What the only agent of a host says of itself; empty while there is none."""
    for path in inside(host, "/run/scope").glob("*.sock"):
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(WITHIN_S)
            try:
                asking.connect(str(path))
                asking.sendall(b'{"command": "status"}\n')
                with asking.makefile() as answer:
                    line = answer.readline()
            except OSError:
                return {}
            return dict(json.loads(line)["status"]) if line else {}
    return {}


def directs(said: Mapping[str, Any]) -> int:
    """To how many peers there is a direct path."""
    return sum(peer["path"] == "Direct" for peer in said["peers"])


def conditions(resource: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The conditions of a resource by type."""
    return {each["type"]: each for each in resource["status"]["conditions"]}


def token_uses(world: World, token: str) -> int:
    """How many machines have used a token."""
    listed = json.loads(world.registry.scopectl("token", "list", "-o", "json"))
    (found,) = (each for each in listed if each["id"] == JoinString.parse(token).token_id)
    return int(found["used"])


def await_ping(host: Host, address: str) -> None:
    """Return once a ping through the mesh comes back."""
    wait(
        lambda: host.run(["ping", "-c1", "-W1", address], check=False).returncode == 0,
        lambda: f"no ping from {host.name} to {address}",
    )


def holding(host: Host, port: int) -> socket.socket:
    """Another program of the host that has a UDP port, for as long as the socket is open."""
    held = host.socket()
    held.bind(("0.0.0.0", port))
    return held


def bound(host: Host, port: int) -> bool:
    """Whether somebody on the host has a UDP port."""
    with host.socket() as trial:
        try:
            trial.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


def mount_small(host: Host, directory: str, *, size: str) -> None:
    """Give the host a small disk of its own in this place."""
    host.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "small", directory])


def fill(host: Host, directory: str) -> None:
    """Use up what is left of a disk."""
    filler = inside(host, f"{directory}/filler")
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


def free(host: Host, directory: str) -> None:
    """Give it back."""
    inside(host, f"{directory}/filler").unlink()


def write_version(host: Host, database: str, version: int) -> None:
    """Make a database look as another version leaves it. Within the host: SQLite reads links by itself."""
    write = (
        f"import sqlite3; database = sqlite3.connect('{database}'); "
        f"database.execute('PRAGMA user_version = {version}'); database.close()"
    )
    host.run([sys.executable, "-c", write])


def check_start(host: Server) -> str:
    """Start a registry on a full disk: it serves what it has, or says that the disk is full."""
    log = host.directory / "full.log"
    with log.open("w") as out:
        arguments = ["serve", "--advertise", "127.0.0.1"]
        process = host.popen([program("scope-registry"), *arguments], stdout=out, stderr=out)
    wait(
        lambda: process.poll() is not None or "Next: scopectl apply" in log.read_text(),
        log.read_text,
    )
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 0
        return ""
    return check_refusal("scope-registry", process.returncode, log.read_text(), "free space")
