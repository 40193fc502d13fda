"""`scope-agent`: join a mesh, run as its peer, leave it.

Exit status 0 when done, 1 for what a person must mend (one sentence on stderr), 2 for wrong usage, 3 when the
peer was removed from its mesh: to start the agent again is of no use then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from scope.core_dumps import forbid_core_dumps
from scope.credentials import PIN_BYTES, read_base64url
from scope.model import (
    ConfigError,
    DeviceKind,
    Fingerprint,
    GatewayOrigin,
    IdentityTrust,
    Kind,
    Mesh,
    Peer,
    Snapshot,
    Tombstone,
)
from scope_agent.inputs import DiskState
from scope_agent.mesh_loop import RemovedFromMesh, RunConfig
from scope_agent.mesh_psk_run import device_key, give_back, open_runner
from scope_agent.psk.choice import CRYPTOGRAPHY, parse_choice
from scope_agent.run import be_no_hub, carry_nobody, close_ports, free_port, lead_to_no_pods
from scope_agent.state import (
    STATE_ROOT,
    Enrolment,
    Held,
    StateDir,
    enrolled_meshes,
    identity_on,
    load_ca,
    load_public_ca,
    make_ca,
    sole_agent,
)
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell import choose_device

if TYPE_CHECKING:
    from scope.join import JoinString
    from scope_agent.psk.identity import TrustPolicy

REMOVED = 3  # exit status; RestartPreventExitStatus of docs/systemd/scope-agent@.service
RUN_DIR = Path("/run/scope")
TRUSTS = {str(trust).lower(): trust for trust in IdentityTrust}
MAX_DEVICE_NAME = 15  # IFNAMSIZ less its zero
DISMISS_PATIENCE = 2.0  # for a running agent to take what it is told
LEAVE_PATIENCE = 30.0  # for a running agent to hear of its own leaving and end, on a machine that is busy


def main(arguments: list[str] | None = None) -> int:
    """Run one command."""
    options = _parser().parse_args(arguments)
    forbid_core_dumps()
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=form)
    if options.verbose:
        logging.getLogger("scope_agent").setLevel(logging.DEBUG)
    try:
        options.work(options)
    except (ConfigError, ApplyError) as error:
        print(f"scope-agent: {error}", file=sys.stderr)
        return REMOVED if isinstance(error, RemovedFromMesh) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--state", type=Path, default=STATE_ROOT, metavar="DIR", help="where keys and snapshots are"
    )
    common.add_argument("--run-dir", type=Path, default=RUN_DIR, metavar="DIR", help="where sockets are")
    common.add_argument("-v", "--verbose", action="store_true", help="log endpoints and single actions too")
    carrying = argparse.ArgumentParser(add_help=False)
    carrying.add_argument(
        "--wireguard",
        choices=[str(kind) for kind in DeviceKind],
        help="which WireGuard to use; by default the kernel's where it has one",
    )
    carrying.add_argument(
        "--wireguard-beside",
        action="store_true",
        help="start no scope-wireguard: one for each device runs in a container beside",
    )
    carrying.add_argument("--fwmark", type=int, default=0, help="mark of the device's own datagrams")
    keying = argparse.ArgumentParser(add_help=False)
    keying.add_argument(
        "--key-suite",
        default=os.environ.get("SCOPE_KEY_SUITE", "1"),
        metavar="NUMBER",
        help="how pairs agree on post-quantum keys: 1 by ML-KEM-1024 and X448, the default, 2 by ML-KEM-768 "
        "and X25519; the peers must be set to the same (SCOPE_KEY_SUITE)",
    )
    keying.add_argument(
        "--key-provider",
        default=os.environ.get("SCOPE_KEY_PROVIDER", CRYPTOGRAPHY),
        metavar="NAME",
        help="whose ML-KEM makes them: cryptography, the default, liboqs, or liboqs:FILE with the file of "
        "its shared library (SCOPE_KEY_PROVIDER)",
    )
    carrying.add_argument(
        "--identity-trust",
        choices=TRUSTS,
        default=os.environ.get("SCOPE_IDENTITY_TRUST", ""),
        help="by what others' identities for post-quantum keys are believed; by default the registry's word "
        "at first contact (SCOPE_IDENTITY_TRUST)",
    )
    carrying.add_argument(
        "--identity-ca",
        default=os.environ.get("SCOPE_IDENTITY_CA") or None,
        metavar="FILE",
        help="the public half of the CA that certified them (SCOPE_IDENTITY_CA)",
    )

    running = [common, carrying, keying]
    parser = argparse.ArgumentParser(prog="scope-agent", description="Make this machine a peer of a mesh.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    join = commands.add_parser("join", parents=running, help="join a mesh with a join string")
    join.add_argument(
        "url",
        metavar="STRING",
        help="what `scopectl token create` printed; - reads it from standard input, where no `ps` shows it",
    )
    join.add_argument("--name", default=socket.gethostname(), help="name of the peer, by default the host's")
    join.add_argument("--device", default="scope0", help="name of the WireGuard interface")
    join.add_argument("--run", action="store_true", help="go on as `run` does")
    join.set_defaults(work=_join)

    run = commands.add_parser("run", parents=running, help="be a peer of a mesh that was joined")
    run.add_argument("--mesh", help="needed where several meshes were joined")
    run.set_defaults(work=_run)
    on_node = run.add_argument_group(
        "on a Kubernetes Node",
        "be its peer in every mesh that selects it; each option has an environment variable",
    )
    on_node.add_argument("--kubernetes", action="store_true", help="follow the Node instead of a join")
    on_node.add_argument("--node", default=os.environ.get("NODE_NAME"), help="its name (NODE_NAME)")
    on_node.add_argument(
        "--cluster", default=os.environ.get("SCOPE_CLUSTER"), help="its cluster's name (SCOPE_CLUSTER)"
    )
    on_node.add_argument(
        "--namespace",
        default=os.environ.get("POD_NAMESPACE"),
        help="where Scope is installed: its Lease is there (POD_NAMESPACE)",
    )
    on_node.add_argument(
        "--api-server",
        default=os.environ.get("SCOPE_API_SERVER"),
        metavar="URL",
        help="where kube-proxy does not run yet; by default the Service `kubernetes` (SCOPE_API_SERVER)",
    )
    on_node.add_argument(
        "--service-account",
        type=Path,
        default=Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        metavar="DIR",
        help="where `token` and `ca.crt` are",
    )
    on_node.add_argument(
        "--cni",
        type=Path,
        metavar="DIR",
        help="give the Node's pods their network, by a CNI configuration in this directory",
    )
    on_node.add_argument(
        "--cni-plugins",
        type=Path,
        default=Path("/opt/cni/bin"),
        metavar="DIR",
        help="where the CNI's plugins must be for that (default: %(default)s)",
    )
    on_node.add_argument(
        "--gateway",
        type=Path,
        metavar="DIR",
        help="in a cluster that joined a mesh elsewhere: where `gateway.json` and `token` are mounted",
    )
    on_node.add_argument(
        "--gateway-url",
        default=os.environ.get("SCOPE_GATEWAY_URL", ""),
        metavar="URL",
        help="https://HOST:PORT at which this Node reaches its cluster's gateway, to which a hub leads peers "
        "that reach nothing but its TCP port, in place of the ScopeMesh's status.gateway (SCOPE_GATEWAY_URL)",
    )
    on_node.add_argument(
        "--gateway-pin",
        default=os.environ.get("SCOPE_GATEWAY_PIN", ""),
        metavar="PIN",
        help="of the gateway's certificate, where no public CA vouches for it (SCOPE_GATEWAY_PIN)",
    )

    ca = commands.add_parser("ca", help="be an offline CA for identities; needs no mesh and no network")
    actions = ca.add_subparsers(required=True, metavar="ACTION")
    init = actions.add_parser("init", help="make the CA's key, and its public half beside it for agents")
    init.set_defaults(work=_init_ca)
    sign = actions.add_parser("sign", help="certify that this peer has the identity of this fingerprint")
    sign.set_defaults(work=_sign)
    for action in (init, sign):
        action.add_argument("key", type=Path, metavar="KEY", help="the file with the CA's key")
        action.add_argument("-v", "--verbose", action="store_true", help=argparse.SUPPRESS)
    sign.add_argument("peer", metavar="PEER", help="the name of its ScopePeer")
    sign.add_argument("fingerprint", metavar="FINGERPRINT", help="as `scopectl identity show` prints there")

    psk = commands.add_parser(
        "psk",
        parents=[common, keying],
        help="lay post-quantum keys on an interface that something else manages",
    )
    psk.add_argument(
        "action",
        nargs="?",
        choices=["run", "show", "status", "rotate", "leave"],
        default="run",
        help="run (the default); show the line for the other machines' peers files; show the running agent's "
        "status; have it rotate now; have it give the manager's keys back, and end",
    )
    psk.add_argument("--interface", required=True, metavar="NAME", help="the WireGuard interface")
    psk.add_argument("--peers", type=Path, metavar="FILE", help="the peers file; needed to run")
    psk.add_argument("--force", action="store_true", help="leave although peers are out of reach")
    psk.set_defaults(work=_psk)

    leave = commands.add_parser("leave", parents=[common], help="leave a mesh and take its device down")
    leave.add_argument("--mesh", help="needed where several meshes were joined")
    leave.add_argument("--force", action="store_true", help="also when the registry cannot be told")
    leave.set_defaults(work=_leave)
    return parser


# --- join ---------------------------------------------------------------------------------------------------


def _join(options: argparse.Namespace) -> None:
    from scope.join import JoinString  # brings X.509, which the first ping need not wait for

    if options.url == "-" and sys.stdin.isatty():
        print("Paste the join string:", file=sys.stderr)
    text = sys.stdin.readline() if options.url == "-" else options.url
    invitation = JoinString.parse(text)
    if not 0 < len(options.device) <= MAX_DEVICE_NAME or "/" in options.device:
        raise ConfigError(f"--device {options.device}: an interface has 1 to {MAX_DEVICE_NAME} characters")
    state = StateDir(invitation.mesh, options.state)
    if state.is_enrolled():
        peer = state.load_enrolment().peer_name
        raise ConfigError(
            f"this machine already is {peer} in {invitation.mesh}: `scope-agent run` makes it work, "
            "`scope-agent leave` makes room for another join"
        )
    for mesh in enrolled_meshes(options.state):
        if StateDir(mesh, options.state).load_enrolment().device == (invitation.interface or options.device):
            raise ConfigError(
                f"mesh {mesh} is on {invitation.interface} already: leave it first"
                if invitation.interface
                else f"mesh {mesh} uses {options.device}: give this one another --device"
            )
    state.prepare()
    enrolment, lack = asyncio.run(_enrol(invitation, state, options))
    if lack and not options.run:
        raise ConfigError(f"{lack}; `scope-agent run` takes one as soon as there is one")
    if lack:
        print(f"scope-agent: {lack}; going on until there is one", file=sys.stderr)
    print(f"Joined {enrolment.mesh} as {enrolment.peer_name}.", file=sys.stderr)
    if options.run:
        _run_mesh(options, state, enrolment)
    else:
        print(
            f"Next: `systemctl enable --now scope-agent@{enrolment.mesh}`, or `scope-agent run`.",
            file=sys.stderr,
        )


async def _enrol(
    invitation: JoinString, state: StateDir, options: argparse.Namespace
) -> tuple[Enrolment, str]:
    """The enrolment, as it is on disk now, and what it still lacks ("": nothing). Raises ConfigError."""
    from scope.enrolment import Enrolment as Request
    from scope.enrolment import enrolment_to_dict, sign_enrolment
    from scope.registry.http import HttpRegistry
    from scope.registry.port import RegistryError, Unavailable

    identity = state.pending_identity(secrets.token_bytes)
    if invitation.interface:
        identity = identity_on(await device_key(invitation.interface, options.run_dir), identity)
    request = sign_enrolment(
        Request(
            mesh=invitation.mesh,
            token_id=invitation.token_id,
            secret=invitation.secret,
            hostname=options.name,
            keys=identity.public,
        ),
        registry=invitation.registry_key,
        signing=identity.signing,
    )
    async with HttpRegistry(
        invitation.url, pin=invitation.pin, credential=None, registry_key=invitation.registry_key
    ) as registry:
        try:
            joined = await registry.join(enrolment_to_dict(request))
        except Unavailable as error:
            raise ConfigError(
                f"cannot join {invitation.mesh}: {error}. See that the registry runs and that this machine "
                "reaches its port, then join again with the same string"
            ) from None
        except RegistryError as error:
            raise ConfigError(f"cannot join {invitation.mesh}: {error}") from None
    enrolment = Enrolment(
        mesh=invitation.mesh,
        device=invitation.interface or options.device,
        identity=identity,
        url=invitation.url,
        pin=invitation.pin,
        registry_id=joined.registry,
        registry_key=invitation.registry_key,
        peer_name=joined.peer.meta.name,
        peer_uid=joined.peer.meta.uid,
    )
    port = joined.mesh.spec.listen_port or free_port()
    try:
        state.save(DiskState(Snapshot(mesh=joined.mesh, own=joined.peer), listen_port=port))
        state.save_enrolment(enrolment)
    except ConfigError as error:
        raise ConfigError(f"{error}: join again with the same string, which knows this machine now") from None
    return enrolment, "" if enrolment.is_foreign else _without_address(joined.peer)


def _without_address(peer: Peer) -> str:
    """What to say when the registry gave the new peer no address; "" when it gave one."""
    if peer.assignment.addresses:
        return ""
    ready = next((each for each in peer.assignment.conditions if each.type == "Ready"), None)
    why = ready.message if ready is not None else "the registry has not assigned any yet"
    return f"{peer.meta.name} has joined, but has no address: {why}"


# --- run ----------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> None:
    if options.kubernetes:
        _run_node(options)
        return
    state = StateDir(_mesh_of(options), options.state)
    _run_mesh(options, state, state.load_enrolment())


def _run_mesh(options: argparse.Namespace, state: StateDir, enrolment: Enrolment) -> None:
    only = DeviceKind(options.wireguard) if options.wireguard else None
    config = RunConfig(
        state,
        options.run_dir,
        only=only,
        beside=options.wireguard_beside,
        fwmark=options.fwmark,
        keys=parse_choice(suite=options.key_suite, provider=options.key_provider),
        trust=_trust_of(options),
    )

    async def run() -> None:
        runner = await open_runner(config, enrolment)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, runner.stop)
        await runner.run()

    with sole_agent(state, options.run_dir, interface=enrolment.device if enrolment.is_foreign else ""):
        asyncio.run(run())


def _run_node(options: argparse.Namespace) -> None:
    from scope.registry.kube.objects import node_lease
    from scope_agent.node import NodeAgent, NodeConfig
    from scope_agent.pods.shell.cni import CniDirectories

    for name, variable in (
        ("node", "NODE_NAME"),
        ("cluster", "SCOPE_CLUSTER"),
        ("namespace", "POD_NAMESPACE"),
    ):
        if not getattr(options, name):
            raise ConfigError(f"--kubernetes needs --{name}: give it, or set {variable}")
    node_lease(options.node)  # refuse now what could never be renewed
    config = NodeConfig(
        node=options.node,
        cluster=options.cluster,
        namespace=options.namespace,
        state_root=options.state,
        run_dir=options.run_dir,
        api_server=options.api_server,
        service_account=options.service_account,
        gateway=options.gateway,
        upstream=_upstream_of(options),
        only=DeviceKind(options.wireguard) if options.wireguard else None,
        beside=options.wireguard_beside,
        fwmark=options.fwmark,
        keys=parse_choice(suite=options.key_suite, provider=options.key_provider),
        trust=_trust_of(options),
        cni=CniDirectories(options.cni, options.cni_plugins) if options.cni is not None else None,
    )

    async def run() -> None:
        await NodeAgent(config).run()

    asyncio.run(run())


def _upstream_of(options: argparse.Namespace) -> GatewayOrigin | None:
    """The cluster's own gateway, None where none is named. Raises ConfigError."""
    url, pin = options.gateway_url, options.gateway_pin
    if not url:
        if pin:
            raise ConfigError("--gateway-pin is of the gateway that --gateway-url names: give both")
        return None
    if options.gateway is not None:
        raise ConfigError(
            "--gateway-url is for a cluster that has its own registry: where it joined one elsewhere, hubs "
            "lead to the gateway there; leave it out (SCOPE_GATEWAY_URL)"
        )
    try:
        parts = urlsplit(url)
        is_origin = parts.scheme == "https" and parts.hostname and parts.port != 0
    except ValueError:
        is_origin = False
    if not is_origin or parts.path.strip("/") or parts.query or parts.fragment or parts.username:
        raise ConfigError(f"--gateway-url is {url!r}: it is like https://scope-gateway.scope-system.svc:7443")
    try:
        raw = read_base64url(pin) if pin else None
    except ValueError:
        raw = b""
    if raw is not None and len(raw) != PIN_BYTES:
        raise ConfigError("--gateway-pin is no pin: take that of admin.json in the Secret scope-gateway")
    return GatewayOrigin(url, raw)


def _trust_of(options: argparse.Namespace) -> TrustPolicy | None:
    """What the options say of trust in identities, None: nothing. Raises ConfigError."""
    word = options.identity_trust or ("ca" if options.identity_ca is not None else "registry")
    if word not in TRUSTS:
        raise ConfigError(f"SCOPE_IDENTITY_TRUST is {word!r}: it is one of {', '.join(TRUSTS)}")
    if (word == "ca") != (options.identity_ca is not None):
        raise ConfigError(
            "--identity-trust ca needs the CA: give its public half with --identity-ca"
            if word == "ca"
            else f"--identity-trust {word} has no use for a CA: leave out --identity-ca"
        )
    if word == "registry":
        return None
    from scope_agent.psk.identity import TrustPolicy

    ca = load_public_ca(Path(options.identity_ca)) if options.identity_ca is not None else None
    return TrustPolicy(TRUSTS[word], ca)


def _mesh_of(options: argparse.Namespace) -> str:
    meshes = enrolled_meshes(options.state)
    if options.mesh is not None:
        return str(options.mesh)
    if len(meshes) == 1:
        return meshes[0]
    if not meshes:
        raise ConfigError(
            "this machine has joined no mesh: run `scope-agent join` with the string that "
            "`scopectl token create` prints on the registry's machine"
        )
    raise ConfigError(f"this machine has joined {', '.join(meshes)}: say which with --mesh")


# --- the CA -------------------------------------------------------------------------------------------------


def _init_ca(options: argparse.Namespace) -> None:
    from scope_agent.psk.cryptography_provider import CryptographyProvider

    public, fingerprint = make_ca(options.key, secrets.token_bytes, CryptographyProvider())
    print(
        f"{options.key} is the CA's key: keep it off every network. {public} is for agents, with "
        f"`scope-agent run --identity-ca`; its fingerprint is\n{fingerprint}"
    )


def _sign(options: argparse.Namespace) -> None:
    from scope_agent.psk.cryptography_provider import CryptographyProvider
    from scope_agent.psk.trust import certify

    provider = CryptographyProvider()
    try:
        fingerprint = Fingerprint.parse(options.fingerprint)
    except ValueError as error:
        raise ConfigError(f"{options.fingerprint!r}: {error}") from None
    certificate = certify(load_ca(options.key, provider), options.peer, fingerprint, provider)
    print(b64encode(certificate).decode())


# --- psk ----------------------------------------------------------------------------------------------------


def _psk(options: argparse.Namespace) -> None:
    from scope_agent import psk_run  # of no use to an agent of a mesh

    name = options.interface
    if not 0 < len(name) <= MAX_DEVICE_NAME or "/" in name:
        raise ConfigError(f"--interface {name}: an interface has 1 to {MAX_DEVICE_NAME} characters")
    keys = parse_choice(suite=options.key_suite, provider=options.key_provider)
    config = psk_run.PskConfig(name, options.state, options.run_dir, keys)
    match options.action:
        case "show":
            print(psk_run.show_psk(config))
        case "status":
            print(psk_run.status_psk(config))
        case "rotate":
            print(psk_run.rotate_psk(config))
        case "leave":
            print(psk_run.leave_psk(config, is_forced=options.force))
        case _:
            if options.peers is None:
                raise ConfigError("--peers FILE names the peers file: its lines are what `psk show` prints")
            try:
                psk_run.run_psk(config, options.peers)
            except psk_run.Left as left:
                raise RemovedFromMesh(str(left)) from None


# --- leave --------------------------------------------------------------------------------------------------


def _leave(options: argparse.Namespace) -> None:
    mesh = _mesh_of(options)
    state = StateDir(mesh, options.state)
    enrolment = state.load_enrolment()
    if not enrolment.url and not options.force:
        raise ConfigError(
            f"this machine is in {mesh} as a Kubernetes Node: its agent leaves when its ScopePeer is told to "
            f'(kubectl patch speer {enrolment.peer_name} --type=merge -p \'{{"spec":{{"leaving":true}}}}\'). '
            "Where no agent runs here any more, --force takes down what it left"
        )
    stored, _ = state.load()
    if enrolment.is_foreign:
        away = give_back(RunConfig(state, options.run_dir), enrolment, is_forced=options.force)
        if away:
            print(f"scope-agent: on this side alone, their links end soon: {away}", file=sys.stderr)
    if enrolment.url:  # a Node's peer is its cluster's to take back
        try:
            asyncio.run(_tell(enrolment, stored))
        except ConfigError as error:
            if not options.force:
                raise ConfigError(
                    f"{error}. With --force it leaves unheard, and peers forget it in time"
                ) from None
            print(f"scope-agent: {error}; leaving all the same", file=sys.stderr)
        if stored.snapshot.mesh is not None:
            tombstone = _own_tombstone(enrolment, stored.snapshot.mesh)
            _dismiss(options.run_dir / f"{mesh}.sock", tombstone)
    with _sole(state, options.run_dir):
        if enrolment.is_foreign:
            state.remove()
            print(f"Left {mesh}: {enrolment.device} is its manager's alone again.", file=sys.stderr)
            return
        asyncio.run(_tear_down(enrolment, options))
        config = RunConfig(state, options.run_dir)
        for undo in (be_no_hub, lead_to_no_pods, close_ports, carry_nobody):
            for failed in undo(config, enrolment):
                print(f"scope-agent: {failed}", file=sys.stderr)
        state.remove()
    print(f"Left {mesh}: {enrolment.device} is gone, and so are this machine's keys.", file=sys.stderr)


async def _tell(enrolment: Enrolment, stored: DiskState) -> None:
    """Bury ourselves in the registry, so that every peer forgets us at once."""
    from scope import resources
    from scope.credentials import PeerCredential
    from scope.registry.http import HttpRegistry
    from scope.registry.port import PeerRemoved, RegistryError

    credential = PeerCredential(
        enrolment.peer_name, enrolment.peer_uid, enrolment.registry_id, enrolment.identity.signing
    )
    async with HttpRegistry(
        enrolment.url, pin=enrolment.pin, credential=credential, registry_key=enrolment.registry_key
    ) as registry:
        try:
            mesh = stored.snapshot.mesh or await registry.get(Kind.MESH, enrolment.mesh)
            if isinstance(mesh, Mesh):
                await registry.leave(resources.tombstone_to_dict(_own_tombstone(enrolment, mesh)))
        except PeerRemoved:
            return
        except RegistryError as error:
            raise ConfigError(f"the registry was not told: {error}") from None


def _own_tombstone(enrolment: Enrolment, mesh: Mesh) -> Tombstone:
    from scope.tombstones import sign_tombstone

    return sign_tombstone(
        mesh_uid=mesh.meta.uid,
        peer_uid=enrolment.peer_uid,
        key=enrolment.identity.public.wireguard,
        secret=enrolment.identity.signing,
    )


def _dismiss(path: Path, tombstone: Tombstone) -> None:
    """Have a running agent pass our tombstone on to the peers that it reaches, and end."""
    from scope import resources

    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(DISMISS_PATIENCE)
        with contextlib.suppress(OSError):  # none runs, or it hangs: who holds the lock is asked next
            agent.connect(os.fspath(path))
            request = {"command": "leave", "tombstone": resources.tombstone_to_dict(tombstone)}
            agent.sendall(json.dumps(request).encode() + b"\n")
            agent.recv(1)


@contextlib.contextmanager
def _sole(state: StateDir, run_dir: Path) -> Iterator[None]:
    """A running agent hears of its leaving from the registry and ends; a deaf one must be stopped first."""
    deadline = time.monotonic() + LEAVE_PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(sole_agent(state, run_dir))
                break
            except Held as error:
                if time.monotonic() > deadline:
                    raise ConfigError(f"{error}; then leave again") from None
            time.sleep(0.05)
        yield


async def _tear_down(enrolment: Enrolment, options: argparse.Namespace) -> None:
    device = choose_device(enrolment.device, run_dir=options.run_dir)
    try:
        await device.delete()
    except ApplyError as error:
        raise ConfigError(f"{enrolment.device} is still up: {error}; leave again") from None
    finally:
        await device.close()


if __name__ == "__main__":
    raise SystemExit(main())
