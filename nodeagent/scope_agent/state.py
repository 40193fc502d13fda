"""What an agent keeps on disk: its keys and where it enrolled, and its last good snapshot.

Files in one directory per mesh, all 0600 and replaced whole (written beside, synced, renamed), never
through a symbolic link:

- `enrolment.json`: keys, gateway, registry. Written at join and never again; losing it means joining anew.
- `snapshot.json`: what was last believed of the mesh, the last good endpoints, the port, what hubs granted,
  where edges are attached. A damaged one is put aside and the agent starts from the registry.
- `identity.json`: the keys that sign post-quantum keys, a CA's certificate of them, and how they followed
  earlier ones. Made when first asked for; losing it makes the peer another one to those that know it.
- `psk/KEY.json`: the pre-shared keys of the pair with the peer of that WireGuard key, in hexadecimal. A
  damaged one is put aside, and the pair agrees on a new key.
- `probe.json`: only where something else manages the device. The key that its agent is known by.
- `granted.json`, `settings.json`: of a hub. What it grants, and how the kernel's settings were before.
- `carrier.pem`: of a hub. The certificate that it shows to those whom it carries, and its key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import stat
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from scope import resources
from scope.model import (
    Attachment,
    ConfigError,
    Endpoint,
    Fingerprint,
    Peer,
    PeerKeys,
    PublicKey,
    RelayLimits,
    Revision,
    Secret,
    Snapshot,
)
from scope.relay import Grants, decode_grants, encode_grants
from scope.wire import SIGNATURE_BYTES, TOKEN_BYTES
from scope_agent.desired import Identity
from scope_agent.files import replace_file
from scope_agent.inputs import DiskState
from scope_agent.paths.birthday import Tried
from scope_agent.relay.asking import HeldGrant

if TYPE_CHECKING:  # imported where there are post-quantum keys, and not at every start
    from scope_agent.psk.identity import HybridIdentity, PublicIdentity, Succession
    from scope_agent.psk.provider import Provider
    from scope_agent.psk.slots import Keys, Record

STATE_ROOT = Path("/var/lib/scope")
T = TypeVar("T")

FORMAT = 1  # of all files; a newer one is refused, so that a downgrade loses nothing


class Held(ConfigError):
    """Another agent runs."""


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What joining gave: enough to speak to the registry and to be the same peer after a restart.

    A Kubernetes Node's peer has no gateway: `url` and `registry_id` are "", `pin` and `registry_key` None.
    """

    mesh: str
    device: str
    identity: Identity
    url: str
    pin: bytes | None
    registry_id: str
    registry_key: PublicKey | None
    peer_name: str
    peer_uid: str

    @property
    def is_foreign(self) -> bool:
        """Whether something else manages the device: it is not ours to take down."""
        return self.identity.wireguard is None


def make_identity(random_bytes: Callable[[int], bytes]) -> Identity:
    """Fresh keys; the private halves stay on this machine."""
    return identity_of(Secret(random_bytes(32)), Secret(random_bytes(32)), Secret(random_bytes(32)))


def identity_of(wireguard: Secret, probe: Secret, signing: Secret) -> Identity:
    """The identity of three raw private keys (X25519, X25519, Ed25519)."""
    public = PeerKeys(
        wireguard=_x25519_public(wireguard),
        probe=_x25519_public(probe),
        signing=PublicKey(Ed25519PrivateKey.from_private_bytes(signing.raw).public_key().public_bytes_raw()),
    )
    return Identity(wireguard=wireguard, probe=probe, signing=signing, public=public)


def identity_on(device: PublicKey, identity: Identity) -> Identity:
    """An identity with the key of a device that something else manages, in the place of our own."""
    return replace(identity, wireguard=None, public=replace(identity.public, wireguard=device))


class StateDir:
    """One mesh's directory. Raises ConfigError: what, where, what to do."""

    def __init__(self, mesh: str, root: Path = STATE_ROOT) -> None:
        self.path = root / mesh
        self.enrolment_file = self.path / "enrolment.json"
        self.snapshot_file = self.path / "snapshot.json"
        self.pending_file = self.path / "joining.json"
        self.granted_file = self.path / "granted.json"
        self.settings_file = self.path / "settings.json"
        self.carrier_file = self.path / "carrier.pem"
        self.identity_file = self.path / "identity.json"
        self.psk_dir = self.path / "psk"
        self.probe_file = self.path / "probe.json"

    def prepare(self) -> None:
        """Make the directory, 0700."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as error:
            raise ConfigError(f"cannot make {self.path}: {error.strerror}; {_next_move(error)}") from None

    def is_enrolled(self) -> bool:
        """Whether this machine has joined the mesh. Raises ConfigError when that may not be known."""
        try:
            self.enrolment_file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise ConfigError(
                f"cannot look at {self.enrolment_file}: {error.strerror}; {_next_move(error)}"
            ) from None
        return True

    def pending_identity(self, random_bytes: Callable[[int], bytes]) -> Identity:
        """The keys of a join under way: kept until it is answered, so that it can be asked again."""
        if self.pending_file.exists():
            return _read(self.pending_file, _parse_identity, "remove it and join again")
        identity = make_identity(random_bytes)
        _write(self.pending_file, _identity_dict(identity))
        return identity

    def save_enrolment(self, enrolment: Enrolment) -> None:
        """Keep what a join gave; the join is then no longer pending."""
        _write(
            self.enrolment_file,
            {
                "mesh": enrolment.mesh,
                "device": enrolment.device,
                "keys": _identity_dict(enrolment.identity),
                "url": enrolment.url,
                "pin": b64encode(enrolment.pin).decode() if enrolment.pin is not None else None,
                "registryID": enrolment.registry_id,
                "registryKey": str(enrolment.registry_key) if enrolment.registry_key is not None else None,
                "peer": {"name": enrolment.peer_name, "uid": enrolment.peer_uid},
            },
        )
        self.pending_file.unlink(missing_ok=True)

    def load_enrolment(self) -> Enrolment:
        """What a join gave. Raises ConfigError when there is none or it is damaged."""
        if not self.is_enrolled():
            raise ConfigError(
                f"this machine has not joined {self.path.name}: run `scope-agent join` with the string that "
                "`scopectl token create` prints on the registry's machine"
            )
        return _read(
            self.enrolment_file,
            _parse_enrolment,
            "restore it from a backup, or remove the directory and join again with a new token",
        )

    def save(self, state: DiskState) -> None:
        """Replace the snapshot. Raises ConfigError (a full disk, above all); the old one is then whole."""
        peers = (resources.to_dict(_without_links(peer)) for peer in state.snapshot.peers.values())
        _write(self.snapshot_file, _state_dict(state), peers=peers)

    def load(self) -> tuple[DiskState, str]:
        """The last good snapshot, and a sentence when there is none to be had from a damaged file."""
        if not self.snapshot_file.exists():
            return DiskState(Snapshot()), ""
        try:
            return _read(self.snapshot_file, _parse_state, "it was put aside"), ""
        except ConfigError as error:
            aside = self.snapshot_file.with_suffix(".damaged")
            with contextlib.suppress(OSError):
                self.snapshot_file.replace(aside)
            return DiskState(Snapshot()), f"{error}; starting from the registry, the file is now {aside}"

    def save_granted(self, grants: Grants | None) -> None:
        """Replace what we grant as a hub; None: nothing, as we are none. Raises ConfigError."""
        if grants is None:
            self.granted_file.unlink(missing_ok=True)
        else:
            _write(self.granted_file, json.loads(encode_grants(grants)))

    def load_granted(self) -> tuple[Grants | None, str]:
        """What we granted as a hub, None where we were none; and a sentence when the file is damaged.

        Whoever holds a grant of a damaged one asks again within the hour.
        """
        if not self.granted_file.exists():
            return None, ""
        try:
            return _read(self.granted_file, _parse_granted, "no grant was kept"), ""
        except ConfigError as error:
            return Grants(0, 0, RelayLimits(), ()), str(error)

    def hybrid_identity(self, random_bytes: Callable[[int], bytes], provider: Provider) -> HybridIdentity:
        """The identity for post-quantum keys, made at the first call. Raises ConfigError."""
        from scope_agent.psk.identity import make_hybrid_identity

        if self.identity_file.exists():
            return _read(
                self.identity_file,
                lambda document: _parse_hybrid(document, provider),
                "restore it from a backup; or remove it, and have each peer trust the new one",
            )
        identity = make_hybrid_identity(random_bytes, provider)
        self.save_hybrid_identity(identity)
        return identity

    def save_hybrid_identity(self, identity: HybridIdentity) -> None:
        """Replace the identity for post-quantum keys; the one before is gone. Raises ConfigError."""
        _write(self.identity_file, _hybrid_dict(identity))

    def probe_secret(self, random_bytes: Callable[[int], bytes]) -> Secret:
        """The probe key of an agent without a mesh, made at the first call. Raises ConfigError."""
        if self.probe_file.exists():
            todo = "restore it from a backup, or remove it and give other machines the new `psk show`"
            return _read(self.probe_file, lambda document: _parse_key(document["probe"]), todo)
        secret = Secret(random_bytes(32))
        _write(self.probe_file, {"probe": b64encode(secret.raw).decode()})
        return secret

    def forget_psk(self) -> None:
        """Forget all pairs' keys, not our own: for an agent that gave the manager's keys back."""
        for path in self.psk_dir.glob("*.json"):
            path.unlink(missing_ok=True)

    def save_psk(self, key: PublicKey, record: Record | None) -> None:
        """Replace what is kept of a pair's pre-shared keys, None: nothing. Raises ConfigError."""
        path = self._psk_file(key)
        if record is None:
            path.unlink(missing_ok=True)
            return
        try:
            self.psk_dir.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {self.psk_dir}: {error.strerror}; {_next_move(error)}") from None
        _write(path, _record_dict(record))

    def load_psk(self) -> tuple[dict[PublicKey, Record], list[str]]:
        """What is kept of all pairs' pre-shared keys, and a sentence for each file that is damaged."""
        records, troubles = {}, []
        for path in sorted(self.psk_dir.glob("*.json")) if self.psk_dir.is_dir() else ():
            try:
                key = PublicKey(bytes.fromhex(path.stem))
                records[key] = _read(path, _parse_record, "it was put aside")
            except (ConfigError, ValueError) as error:
                with contextlib.suppress(OSError):
                    path.replace(path.with_suffix(".damaged"))
                troubles.append(f"{error}; the pair agrees on a new key")
        return records, troubles

    def _psk_file(self, key: PublicKey) -> Path:
        return self.psk_dir / f"{key.raw.hex()}.json"

    def save_settings(self, noted: Mapping[str, str]) -> None:
        """Keep how the kernel's settings were, by path below /proc/sys, before a hub's agent changes them."""
        if noted:
            _write(self.settings_file, {"sysctls": dict(noted)})
        else:
            self.settings_file.unlink(missing_ok=True)

    def load_settings(self) -> dict[str, str]:
        """How the kernel's settings were before we were a hub. Raises ConfigError."""
        if not self.settings_file.exists():
            return {}
        return _read(self.settings_file, _parse_settings, "remove it; net.ipv4.ip_forward is yours to see to")

    def remove(self) -> None:
        """Forget the mesh: for `leave` alone."""
        self.granted_file.unlink(missing_ok=True)
        self.settings_file.unlink(missing_ok=True)
        for file in (*self.psk_dir.glob("*"), self.identity_file, self.carrier_file):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.psk_dir.rmdir()
        for file in (self.snapshot_file, self.pending_file, self.enrolment_file):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()


def make_ca(path: Path, random_bytes: Callable[[int], bytes], provider: Provider) -> tuple[Path, Fingerprint]:
    """Make the key of an offline CA at `path`, and its public half beside it: where, and its fingerprint.

    Raises ConfigError.
    """
    from scope_agent.psk.identity import make_hybrid_identity

    public_path = path.with_name(f"{path.name}.pub")
    if path.exists() or path.is_symlink():
        raise ConfigError(f"there is {path} already: a CA is made once; name another file")
    ca = make_hybrid_identity(random_bytes, provider)
    _write(path, _hybrid_dict(ca))
    _write(public_path, {"ed448": _text(ca.public.ed448), "mldsa": _text(ca.public.mldsa)})
    return public_path, ca.public.fingerprint()


def load_ca(path: Path, provider: Provider) -> HybridIdentity:
    """The key of an offline CA. Raises ConfigError."""
    return _read(path, lambda document: _parse_hybrid(document, provider), "restore it from a backup")


def load_public_ca(path: Path) -> PublicIdentity:
    """The public half of a CA. Raises ConfigError, also where others could put another in its place."""
    from scope_agent.psk.identity import PublicIdentity

    try:
        with path.open(encoding="utf-8") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o022:
                raise ConfigError(f"others can write {path}: chmod 644 {path}, once it is what it was")
            document = json.load(file)
        return PublicIdentity(_bytes(document["ed448"]), _bytes(document["mldsa"]))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; {_next_move(error)}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{path} is no public half of a CA: name the .pub file that `scope-agent ca init` wrote"
        ) from None


def enrolled_meshes(root: Path = STATE_ROOT) -> list[str]:
    """The meshes that this machine has joined, by name. Raises ConfigError when that may not be known."""
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"cannot look at {root}: {error.strerror}; {_next_move(error)}") from None
    return [name for name in names if StateDir(name, root).is_enrolled()]


@contextlib.contextmanager
def sole_agent(
    state: StateDir, run_dir: Path, *, keys: Path | None = None, interface: str = ""
) -> Iterator[None]:
    """Be the only agent with this mesh's keys, and with its socket. Raises Held, ConfigError.

    `keys` is the file that holds them, by default the enrolment; `interface` a device that something else
    manages, on which no two agents lay keys.
    """
    mesh = state.path.name
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {run_dir}: {error.strerror}; {_next_move(error)}") from None
    with contextlib.ExitStack() as held:
        # The keys' own file, as it stands: a new one could not be made on a full disk.
        held.callback(os.close, _lock(keys or state.enrolment_file, os.O_RDONLY, mesh))
        for name in {mesh, f"@{interface}" if interface else mesh}:
            held.callback(os.close, _lock(run_dir / f"{name}.lock", os.O_RDWR | os.O_CREAT, mesh))
        yield


def _lock(path: Path, flags: int, mesh: str) -> int:
    """The descriptor of the locked file: the lock ends with it, whatever ends the process."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {error.strerror}; {_next_move(error)}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Held(
            f"another scope-agent runs in mesh {mesh} on this machine and holds {path}: `scopectl status` "
            f"asks it, `systemctl stop scope-agent@{mesh}` stops it"
        ) from None
    return descriptor


# --- files --------------------------------------------------------------------------------------------------


def _write(
    path: Path, document: Mapping[str, object], *, peers: Iterable[Mapping[str, object]] | None = None
) -> None:
    """Replace `path` whole. Raises ConfigError; the old one is then there still.

    `peers` becomes the member of that name. Each is rendered by itself: ten thousand dictionaries at once
    would be half of what the agent holds.
    """
    text = _json({"format": FORMAT, **document})
    parts = [text] if peers is None else _with_peers(text, peers)
    try:
        replace_file(path, parts, durable=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; {_next_move(error)}. Nothing was lost"
        ) from None


def _with_peers(text: str, peers: Iterable[Mapping[str, object]]) -> Iterator[str]:
    yield text.removesuffix("}") + ',"peers":['
    for number, peer in enumerate(peers):
        yield ("," if number else "") + _json(peer)
    yield "]}"


def _json(value: Mapping[str, object]) -> str:
    """One line. By `dumps`, since `dump` renders in Python what this renders in C."""
    return json.dumps(value, separators=(",", ":"))


def _read(path: Path, parse: Callable[[Mapping[str, object]], T], todo: str) -> T:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(handle, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_IMODE(mode) & 0o077:
                raise ConfigError(f"{path} can be read by others: chmod 600 {path}, if you trust who could")
            document = json.load(file)
    except OSError as error:
        hint = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"cannot read {path}: {hint}; {_next_move(error)}") from None
    except ValueError:
        raise ConfigError(f"{path} is damaged (not JSON): {todo}") from None
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise ConfigError(f"{path} is damaged (no format): {todo}")
    if document["format"] > FORMAT:
        raise ConfigError(f"{path} was written by a newer scope-agent: upgrade this one")
    try:
        return parse(document)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {todo}") from None


def _next_move(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "free some space"
        case errno.EACCES | errno.EPERM:
            return "run as root, or name directories of yours with --state and --run-dir"
        case errno.EROFS:
            return "mount it for writing, or name another directory with --state or --run-dir"
        case errno.ELOOP:
            return "put the file itself in its place"
        case _:
            return "check its directory"


# --- documents ----------------------------------------------------------------------------------------------


def _identity_dict(identity: Identity) -> dict[str, object]:
    device, key = identity.public.wireguard, identity.wireguard
    return {
        **({"wireGuard": b64encode(key.raw).decode()} if key is not None else {"device": str(device)}),
        "probe": b64encode(identity.probe.raw).decode(),
        "signing": b64encode(identity.signing.raw).decode(),
    }


def _parse_identity(document: Mapping[str, object]) -> Identity:
    def secret(name: str) -> Secret:
        raw = b64decode(str(document[name]), validate=True)
        if len(raw) != 32:
            raise ValueError(f"{name} is not 32 bytes")
        return Secret(raw)

    if "device" in document:  # which something else manages
        stand_in = identity_of(secret("probe"), secret("probe"), secret("signing"))
        return identity_on(PublicKey.parse(str(document["device"])), stand_in)
    return identity_of(secret("wireGuard"), secret("probe"), secret("signing"))


def _parse_enrolment(document: Mapping[str, object]) -> Enrolment:
    keys, peer, pin, registry_key = (document[name] for name in ("keys", "peer", "pin", "registryKey"))
    if not isinstance(keys, dict) or not isinstance(peer, dict):
        raise ValueError("keys and peer are objects")  # noqa: TRY004 - damage, as any other
    return Enrolment(
        mesh=str(document["mesh"]),
        device=str(document["device"]),
        identity=_parse_identity(keys),
        url=str(document["url"]),
        pin=b64decode(str(pin), validate=True) if pin is not None else None,
        registry_id=str(document["registryID"]),
        registry_key=PublicKey.parse(str(registry_key)) if registry_key is not None else None,
        peer_name=str(peer["name"]),
        peer_uid=str(peer["uid"]),
    )


def _state_dict(state: DiskState) -> dict[str, object]:
    """All but the peers."""
    snapshot = state.snapshot
    return {
        "mesh": resources.to_dict(snapshot.mesh) if snapshot.mesh is not None else None,
        "own": resources.to_dict(snapshot.own) if snapshot.own is not None else None,
        "tombstones": [resources.tombstone_to_dict(tombstone) for tombstone in snapshot.tombstones],
        "revision": (
            {"registry": snapshot.revision.registry, "number": snapshot.revision.number}
            if snapshot.revision is not None
            else None
        ),
        "lastGood": {str(key): str(endpoint) for key, endpoint in state.last_good.items()},
        "listenPort": state.listen_port,
        "grants": [
            {
                "hub": str(grant.hub),
                "peer": str(grant.peer),
                "token": b64encode(grant.token).decode(),
                "port": grant.port,
                "lifetime": grant.lifetime,
                "userSpace": grant.user_space,
            }
            for grant in state.grants
        ],
        "attachments": [
            {
                "edge": str(attachment.edge),
                "hub": str(attachment.hub),
                "epoch": attachment.epoch,
                "signature": b64encode(attachment.signature).decode(),
            }
            for attachment in state.attachments
        ],
        "tries": [
            {
                "peer": str(each.peer),
                "here": str(each.here),
                "at": str(each.at),
                "tried": each.tried,
                "misses": each.misses,
                "hits": each.hits,
            }
            for each in state.tries
        ],
    }


def _parse_state(document: Mapping[str, object]) -> DiskState:
    mesh, own, revision = document["mesh"], document["own"], document["revision"]
    peers, tombstones, last_good = document["peers"], document["tombstones"], document["lastGood"]
    if not isinstance(peers, list) or not isinstance(tombstones, list) or not isinstance(last_good, dict):
        raise ValueError("peers, tombstones and lastGood have other types")  # noqa: TRY004
    parsed = [resources.parse_peer(peer, ignore_unknown=True) for peer in peers]
    return DiskState(
        Snapshot(
            mesh=resources.parse_mesh(mesh, ignore_unknown=True) if mesh is not None else None,
            own=resources.parse_peer(own, ignore_unknown=True) if own is not None else None,
            peers=_by_key(parsed),
            tombstones=tuple(resources.parse_tombstone(tombstone) for tombstone in tombstones),
            revision=(
                Revision(str(revision["registry"]), int(revision["number"]))
                if isinstance(revision, dict)
                else None
            ),
        ),
        last_good={PublicKey.parse(key): Endpoint.parse(value) for key, value in last_good.items()},
        listen_port=int(str(document["listenPort"])),
        grants=_parse_grants(document.get("grants", [])),  # earlier releases keep none
        attachments=_parse_attachments(document.get("attachments", [])),  # nor these
        tries=_parse_tries(document.get("tries", [])),
    )


def _parse_grants(documents: object) -> tuple[HeldGrant, ...]:
    if not isinstance(documents, list):
        raise ValueError("grants are a list")  # noqa: TRY004 - damage, as any other
    grants = []
    for document in documents:
        token, port = b64decode(str(document["token"]), validate=True), int(document["port"])
        if len(token) != TOKEN_BYTES or not 1 <= port <= 65535:
            raise ValueError(f"a grant has a token of {TOKEN_BYTES} bytes and a port")
        hub, peer = (PublicKey.parse(str(document[name])) for name in ("hub", "peer"))
        lifetime = float(document["lifetime"])
        grants.append(HeldGrant(hub, peer, token, port, lifetime, bool(document["userSpace"])))
    return tuple(grants)


def _parse_attachments(documents: object) -> tuple[Attachment, ...]:
    if not isinstance(documents, list):
        raise ValueError("attachments are a list")  # noqa: TRY004 - damage, as any other
    attachments = []
    for document in documents:
        signature, epoch = b64decode(str(document["signature"]), validate=True), int(document["epoch"])
        if len(signature) != SIGNATURE_BYTES or not 0 <= epoch < 2**64:
            raise ValueError(f"an attachment has a signature of {SIGNATURE_BYTES} bytes and an epoch")
        edge, hub = (PublicKey.parse(str(document[name])) for name in ("edge", "hub"))
        attachments.append(Attachment(edge, hub, epoch, signature))
    return tuple(attachments)


def _parse_tries(documents: object) -> tuple[Tried, ...]:
    if not isinstance(documents, list):
        raise ValueError("tries are a list")  # noqa: TRY004 - damage, as any other
    tries = []
    for document in documents:
        tried, misses, hits = float(document["tried"]), int(document["misses"]), int(document["hits"])
        if not math.isfinite(tried) or misses < 0 or hits < 0:
            raise ValueError("a try has a time and counts")
        here, at = ip_address(str(document["here"])), Endpoint.parse(str(document["at"]))
        tries.append(Tried(PublicKey.parse(str(document["peer"])), here, at, tried, misses, hits))
    return tuple(tries)


def _parse_granted(document: Mapping[str, object]) -> Grants:
    return decode_grants(json.dumps(document))


def _parse_settings(document: Mapping[str, object]) -> dict[str, str]:
    sysctls = document["sysctls"]
    if not isinstance(sysctls, dict):
        raise ValueError("sysctls is an object")  # noqa: TRY004 - damage, as any other
    # A path that leads elsewhere would have root write anywhere.
    if any(not str(path).startswith("net/ipv") or ".." in str(path) for path in sysctls):
        raise ValueError("sysctls are paths of net/ipv4 and net/ipv6")
    return {str(path): str(value) for path, value in sysctls.items()}


def _hybrid_dict(identity: HybridIdentity) -> dict[str, object]:
    return {
        "ed448": _text(identity.ed448.raw),
        "mldsa": _text(identity.mldsa.raw),
        "certificate": _text(identity.certificate),
        "successions": [
            {
                "ed448": _text(succession.old.ed448),
                "mldsa": _text(succession.old.mldsa),
                "new": str(succession.new),
                "signatures": _text(succession.signatures),
            }
            for succession in identity.successions
        ],
    }


def _parse_hybrid(document: Mapping[str, object], provider: Provider) -> HybridIdentity:
    from scope_agent.psk.identity import hybrid_identity
    from scope_agent.psk.messages import SIGNATURES_BYTES

    ed448, mldsa = (Secret(_bytes(document[name])) for name in ("ed448", "mldsa"))
    successions = document.get("successions", [])  # earlier releases keep neither
    certificate = _bytes(document.get("certificate", ""))
    if not isinstance(successions, list) or len(certificate) not in (0, SIGNATURES_BYTES):
        raise ValueError("its certificate or its list of successions is none")
    return replace(
        hybrid_identity(ed448, mldsa, provider),
        certificate=certificate,
        successions=tuple(_parse_succession(succession) for succession in successions),
    )


def _parse_succession(document: Mapping[str, object]) -> Succession:
    from scope_agent.psk.identity import PublicIdentity, Succession
    from scope_agent.psk.messages import SIGNATURES_BYTES

    old = PublicIdentity(_bytes(document["ed448"]), _bytes(document["mldsa"]))
    signatures = _bytes(document["signatures"])
    if len(signatures) != SIGNATURES_BYTES:
        raise ValueError("a succession has signatures of another length")
    return Succession(old, Fingerprint.parse(str(document["new"])), signatures)


def _text(value: bytes) -> str:
    return b64encode(value).decode()


def _bytes(value: object) -> bytes:
    return b64decode(str(value), validate=True)


def _record_dict(record: Record) -> dict[str, object]:
    return {
        "pinned": str(record.pinned) if record.pinned is not None else None,
        "former": str(record.former) if record.former is not None else None,
        "told": record.is_told,
        "counter": record.counter,
        "current": _keys_dict(record.current),
        "next": _keys_dict(record.next),
        "active": record.active,
        "confirmed": record.confirmed,
        "manager": b64encode(record.manager.raw).decode() if record.manager is not None else None,
    }


def _keys_dict(keys: Keys | None) -> dict[str, object] | None:
    if keys is None:
        return None
    secrets = {name: getattr(keys, name) for name in _KEY_SECRETS}
    return {
        "epoch": keys.epoch,
        "suite": keys.suite,
        "id": keys.id.hex(),
        **{name: b64encode(secret.raw).decode() for name, secret in secrets.items()},
    }


_KEY_SECRETS = ("psk", "chain", "confirm_d", "confirm_e")


def _parse_record(document: Mapping[str, object]) -> Record:
    from scope_agent.psk.slots import Record

    pinned, following = document["pinned"], _parse_keys(document["next"])
    former = document.get("former")  # earlier releases have none, and are told nothing
    manager = document.get("manager")  # earlier releases keep none
    return Record(
        pinned=Fingerprint.parse(str(pinned)) if pinned is not None else None,
        former=Fingerprint.parse(str(former)) if former is not None else None,
        is_told=document.get("told") is True,
        counter=int(str(document["counter"])),
        current=_parse_keys(document["current"]),
        next=following,
        active=document["active"] is True and following is not None,
        confirmed=float(str(document["confirmed"])),
        manager=_parse_key(manager) if manager is not None else None,
    )


def _parse_key(value: object) -> Secret:
    raw = b64decode(str(value), validate=True)
    if len(raw) != 32:
        raise ValueError("a key is 32 bytes")
    return Secret(raw)


def _parse_keys(document: object) -> Keys | None:
    if document is None:
        return None
    from scope_agent.psk.slots import Keys

    if not isinstance(document, dict):
        raise ValueError("current and next are objects")  # noqa: TRY004 - damage, as any other
    id_ = bytes.fromhex(str(document["id"]))
    secrets = [b64decode(str(document[name]), validate=True) for name in _KEY_SECRETS]
    if any(len(value) != 32 for value in (id_, *secrets)):
        raise ValueError("an id and a key are 32 bytes")
    psk, chain, confirm_d, confirm_e = (Secret(secret) for secret in secrets)
    return Keys(
        int(str(document["epoch"])),
        id_,
        psk,
        chain=chain,
        confirm_d=confirm_d,
        confirm_e=confirm_e,
        suite=int(str(document.get("suite", 1))),
    )


def _without_links(peer: Peer) -> Peer:
    """How a peer reaches others helps nobody at a start, and reading it would hold up the first ping."""
    if peer.report is None:
        return peer
    return replace(peer, report=replace(peer.report, links=()))


def _by_key(peers: list[Peer]) -> dict[PublicKey, Peer]:
    return {peer.report.keys.wireguard: peer for peer in peers if peer.report is not None}


def _x25519_public(secret: Secret) -> PublicKey:
    return PublicKey(X25519PrivateKey.from_private_bytes(secret.raw).public_key().public_bytes_raw())
