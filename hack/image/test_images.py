"""The images that `make image` has built, in containers as Kubernetes would start them.

Run by hack/image.sh, with the names of both in the environment. It takes a Docker daemon that starts
containers, which `make test` does not ask of a machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
IMAGE = os.environ["SCOPE_IMAGE"]
WIREGUARD_IMAGE = os.environ["SCOPE_WIREGUARD_IMAGE"]
# The restricted Pod Security Standard, as far as a container without a network shows it.
RESTRICTED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")
AGENT = ("--user=0:0", *RESTRICTED, "--cap-add=NET_ADMIN", "--cap-add=NET_RAW", "--device=/dev/net/tun")
PATIENCE = 60.0
MESH = {
    "apiVersion": "scope.ltgc.cc/v1alpha1",
    "kind": "ScopeMesh",
    "metadata": {"name": "home"},
    "spec": {"addressing": {"ipv4": "100.80.0.0/16"}},
}


def docker(*arguments: str, given: str = "") -> str:
    done = subprocess.run(
        ["docker", *arguments],
        input=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if arguments[0] == "logs" else subprocess.PIPE,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(image: str, *command: str, options: tuple[str, ...] = RESTRICTED, given: str = "") -> str:
    return docker("run", "--rm", "--interactive", "--network=none", *options, image, *command, given=given)


@contextlib.contextmanager
def container(image: str, *command: str, options: tuple[str, ...]) -> Iterator[str]:
    name = docker("run", "--detach", *options, image, *command).strip()
    try:
        yield name
    finally:
        print(docker("logs", name))
        docker("rm", "--force", "--volumes", name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_starts_without_root_and_without_writing(program: str) -> None:
    assert run(IMAGE, program, "--help").startswith(f"usage: {program} ")


def test_user_space_wireguard_has_a_program_and_a_supervisor_of_its_own() -> None:
    assert run(WIREGUARD_IMAGE).startswith("usage: scope-wireguard ")
    assert "wireguard-go" in run(WIREGUARD_IMAGE, "wireguard-go", "--version")


@pytest.mark.parametrize("image", [IMAGE, WIREGUARD_IMAGE])
def test_nobody_is_root_by_default_and_nothing_gives_more_than_asked(image: str) -> None:
    assert run(image, "id", "-u").strip() == "65532"
    tools = "for tool in gcc cc make pip pip3 uv git; do command -v $tool; done; true"
    assert run(image, "sh", "-c", tools) == ""
    assert (
        run(
            image, "sh", "-c", "ls /var/lib/apt/lists /var/cache/apt /root 2>/dev/null | grep -v : ; true"
        ).split()
        == []
    )


def test_what_the_agent_calls_is_there() -> None:
    assert run(IMAGE, "nft", "--version").startswith("nftables ")
    assert "wireguard-go" in run(IMAGE, "wireguard-go", "--version")


def test_kubeconfigs_are_read_with_what_is_left_of_the_client_for_kubernetes() -> None:
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    read = (
        "import asyncio, sys, pathlib; from scope.registry.kube.access import from_kubeconfig;"
        "pathlib.Path('/tmp/config').write_text(sys.stdin.read());"
        "print(asyncio.run(from_kubeconfig(pathlib.Path('/tmp/config'))).configuration.host)"
    )
    options = (*RESTRICTED, "--tmpfs=/tmp")
    server = run(
        IMAGE, "/opt/scope/bin/python", "-c", read, options=options, given=yaml.safe_dump(kubeconfig)
    )
    assert server.strip() == "https://127.0.0.1:1"


@pytest.mark.parametrize("mounts", [(), ("--volume=/proc/sys/net:/host/proc/sys/net",)])
def test_a_hubs_settings_are_set_where_those_of_the_machine_are_mounted(mounts: tuple[str, ...]) -> None:
    be_hub = (
        "from scope_agent.relay.shell.forwarding import *;"
        "wanted = plan_forwarding(); noted = read_sysctls(wanted);"
        "refused = write_sysctls(wanted); done = read_sysctls(wanted) == wanted;"
        "restore_sysctls(noted);"
        "print(bool(wanted), done, len(refused) == len(wanted), read_sysctls(noted) == noted)"
    )
    said = run(IMAGE, "/opt/scope/bin/python", "-c", be_hub, options=(*AGENT, *mounts))
    assert said.split() == ["True", str(bool(mounts)), str(not mounts), "True"]


def test_an_agent_in_a_container_joins_and_is_soon_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = ("scope-registry", "serve", "--advertise", "127.0.0.1")
    data = "--tmpfs=/var/lib/scope-registry:uid=65532,gid=65532,mode=0700"
    with container(IMAGE, *serve, options=("--network=none", *RESTRICTED, data)) as registry:
        until(lambda: "Next:" in docker("logs", registry))
        docker("exec", "--interactive", registry, "scopectl", "apply", "-f", "-", given=json.dumps(MESH))
        invitation = docker("exec", registry, "scopectl", "token", "create", "--mesh", "home").split()[0]
        for folder in ("state", "run", "wireguard"):
            (tmp_path / folder).mkdir(mode=0o700)
        options = (
            *AGENT,
            f"--network=container:{registry}",
            f"--volume={tmp_path}/state:/var/lib/scope",
            f"--volume={tmp_path}/run:/run/scope",
            f"--volume={tmp_path}/wireguard:/run/wireguard",
        )
        join = ("scope-agent", "join", "--name", "oslo", "-")
        docker("run", "--rm", "--interactive", *options, IMAGE, *join, given=invitation + "\n")
        with container(IMAGE, "scope-agent", "run", options=options) as agent:
            until(lambda: "registry.listed" in docker("logs", agent))
            until(lambda: "Online" in docker("exec", registry, "scopectl", "get", "peers"))
            assert json.loads(docker("exec", agent, "scopectl", "status", "-o", "json"))["registry"][
                "connected"
            ]
            capabilities = docker("exec", agent, "grep", "CapEff", "/proc/1/status").split()[1]
            assert int(capabilities, 16) == (1 << 12) | (1 << 13)  # NET_ADMIN and NET_RAW
            took = listed_at(agent) - started_at(agent)
        docker("run", "--rm", *options, IMAGE, "scope-agent", "leave")
        assert not any((tmp_path / "state").iterdir())
    with capsys.disabled():
        print(f"\n    an agent is ready {took.total_seconds():.2f} s after its container starts")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def started_at(name: str) -> datetime:
    return moment(docker("inspect", "--format", "{{.State.StartedAt}}", name).strip())


def listed_at(name: str) -> datetime:
    """When it was one of the mesh: device and probes are there before that."""
    lines = docker("logs", "--timestamps", name).splitlines()
    return moment(next(each for each in lines if "registry.listed" in each).split()[0])


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text[: len("2026-01-01T00:00:00.000000")] + "+00:00")
