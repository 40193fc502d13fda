"""The agent of a mesh on a device that something else manages: the mesh says with whom keys are agreed.

Sans-IO, with the verbs of `agent`. Who is a member is `membership`'s to say, what the registry is told
`reporting`'s. Candidates, paths and addresses are the manager's business: what is shown of a link is whether
the peer's agent answers, and the key.

Who is no member any more, and with whom the device still has a key of ours, is spoken with until the pair is
back at its manager's key; and so is everybody, where it is we who left. Where the other side does not answer
the key stays: different keys on the two sides of a link would end it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from scope.channel import Channel
from scope.model import (
    ConfigError,
    DeviceKind,
    Fingerprint,
    PathKind,
    Peer,
    PostQuantum,
    PublicKey,
    Snapshot,
)
from scope.resources import as_reason
from scope_agent.desired import Identity, report
from scope_agent.inputs import (
    Applied,
    CommandArrived,
    DeviceObserved,
    DiskState,
    FactArrived,
    Failed,
    IdentitySaved,
    Input,
    KeysSetUp,
    Leaving,
    ListAgain,
    Output,
    Reply,
    SaveIdentity,
    SaveState,
    SetUpKeys,
    Target,
    WriteReport,
)
from scope_agent.keying import certified, key_of, read_certificate, read_fingerprint, refuse_beside_ca
from scope_agent.membership import Membership
from scope_agent.paths.core import Changes, PathsView
from scope_agent.paths.view import PairView
from scope_agent.peers_file import ForeignPeer, PeersFile
from scope_agent.psk_agent import Awaited, ForeignDevice, PskAgent
from scope_agent.reporting import Reporting
from scope_agent.status import DeviceStatus, identities, status

if TYPE_CHECKING:
    from scope_agent.psk.core import Psk
    from scope_agent.psk.identity import HybridIdentity, KeyMaker
    from scope_agent.psk.slots import Record

# The disk gets one write for a burst of changes; what is missing after a crash the registry tells again.
SAVE_AFTER, SAVE_AGAIN = 1.0, 30.0
NO_CHANGES = Changes()


@dataclass(frozen=True, slots=True)
class MeshPskConfig:
    """What the agent is from its start."""

    mesh: str
    identity: Identity
    registry_key: PublicKey | None  # None: the one that the ScopeMesh's status names


class MeshPskAgent:
    """One peer. `random` draws from [0, 1), `wall` is the clock at `now`; `channel` holds a fresh boot id."""

    def __init__(
        self,
        config: MeshPskConfig,
        device: ForeignDevice,
        *,
        channel: Channel,
        state: DiskState,
        records: Mapping[PublicKey, Record],
        random: Callable[[], float],
        now: float,
        wall: float,
    ) -> None:
        self._config, self._device = config, device
        self._wall_offset = wall - now
        snapshot = state.snapshot
        own = config.identity.public.wireguard
        self._membership = Membership(own=own, mesh=config.mesh, registry_key=config.registry_key, now=now)
        self._membership.restore(snapshot)
        written = snapshot.own.report if snapshot.own is not None else None
        self._reporting = Reporting(own=own, written=written, random=random)
        self._snapshot = Snapshot()
        self._file = PeersFile(_policy(snapshot), {})
        self._gone: dict[PublicKey, ForeignPeer] = {}  # no members any more, and led back
        self._kept = frozenset(records)  # with whom an earlier run had keys
        self._keys = PskAgent(
            device,
            self._file,
            channel=channel,
            maker=None,
            records=records,
            random=random,
            now=now,
            wall=wall,
            mesh_uid=_uid(snapshot) or config.mesh,
        )
        self._kind: DeviceKind | None = None
        self._trouble = ""  # why no keys can be made
        self._renewing: tuple[int, HybridIdentity] | None = None  # for which command, what is being written
        self._is_leaving = False
        self._saved = state
        self._saving: DiskState | None = None
        self._save_at: float | None = None
        self._disk_error = ""
        self._out: list[Output] = [SetUpKeys(is_awaited=False)]
        self._snapshot_changed(now)

    # --- the verbs -----------------------------------------------------------------------------------------

    def receive(self, event: Input, now: float) -> None:
        """Take one input."""
        match event:
            case FactArrived(fact):
                self._membership.receive(fact, now)
                self._reporting.receive(fact)
                self._snapshot_changed(now)
            case Leaving(tombstone):
                if self._membership.bury(tombstone):
                    self._snapshot_changed(now)
            case Applied(Target.REGISTRY):
                self._reporting.applied()
            case Failed(Target.REGISTRY, error):
                self._reporting.failed(error, now)
            case Applied(Target.DISK):
                self._saved, self._saving = self._saving or self._saved, None
                self._disk_error = ""
            case Failed(Target.DISK, error):
                self._saving, self._disk_error, self._save_at = None, error, now + SAVE_AGAIN
            case KeysSetUp(maker):
                self._take_maker(maker, now)
            case IdentitySaved(error):
                self._identity_saved(error, now)
            case CommandArrived():
                self._command(event, now)
            case _:
                if isinstance(event, DeviceObserved):
                    self._kind = event.kind
                self._keys.receive(event, now)
        self._collect(now)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self._keys.handle_timer(now)
        if self._membership.wants_list(now):
            self._out.append(ListAgain())
        self._collect(now)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        times = (
            self._keys.get_timer(),
            self._membership.get_timer(),
            self._reporting.get_timer(),
            self._save_at if self._saving is None else None,
        )
        return min((each for each in times if each is not None), default=None)

    def outputs(self) -> list[Output]:
        """What is to be performed now, in order."""
        out, self._out = self._out, []
        return out

    # --- what the shell may ask ----------------------------------------------------------------------------

    @property
    def listen_port(self) -> int:
        """WireGuard's UDP port, whoever chose it."""
        return self._keys.listen_port

    @property
    def removed(self) -> bool:
        """Whether our own ScopePeer was deliberately removed."""
        return self._membership.removed_self()

    @property
    def reaches_a_peer(self) -> bool:
        """Whether some peer's agent answers."""
        return self._keys.reaches_a_peer

    @property
    def replaced(self) -> str:
        """Why this agent cannot go on: the mesh or the device is another one now."""
        mesh = self._snapshot.mesh
        if mesh is not None and mesh.spec.existing_interface != self._device.name:
            now = mesh.spec.existing_interface or "devices of its own"
            return f"the mesh is on {now}, and this peer on {self._device.name}: leave, and join again"
        return self._keys.replaced

    @property
    def has_left(self) -> bool:
        """Whether every pair has its manager's key again, as asked."""
        return self._keys.has_left

    def snapshot(self) -> Snapshot:
        """What is believed of the mesh."""
        return self._snapshot

    def view(self, now: float) -> PathsView:
        """How each member is reached, in the terms of paths."""
        bound = self._snapshot.mesh.spec.timers.hub_fallback if self._snapshot.mesh is not None else 0.0
        pairs = {
            key: PairView(
                endpoint=stands.endpoint,
                ready=True,
                settling=False,
                hold=None,
                verified=frozenset(),
                path=PathKind.DIRECT if stands.is_reached else PathKind.NONE,
                rtt=None,
                observed=None,
                declared=not stands.is_reached and now >= stands.since + bound,
                reason=as_reason(stands.reason) if not stands.is_reached else "",
                since=stands.since,
            )
            for key, stands in self._keys.stands(now).items()
            if key in self._snapshot.peers
        }
        return PathsView(pairs)

    # --- members -------------------------------------------------------------------------------------------

    def _snapshot_changed(self, now: float) -> None:
        before, self._snapshot = self._snapshot, self._membership.snapshot()
        if self._snapshot is before:
            return
        members = {key: _named(key, peer) for key, peer in self._snapshot.peers.items() if peer.report}
        keyed = frozenset(self._keys.psk.keyed)
        for key, peer in self._file.peers.items():
            if key not in members and key in keyed:
                self._gone.setdefault(key, peer)
        for key, removed in self._membership.removed().items():
            if key in keyed | self._kept and key != self._config.identity.public.wireguard:
                self._gone.setdefault(key, _named(key, removed))
        self._set_peers(members, now)
        if self.removed:
            self._leave(now)
        self._reporting.expect()
        if self._save_at is None:
            self._save_at = now + SAVE_AFTER

    def _set_peers(self, members: Mapping[PublicKey, ForeignPeer], now: float) -> None:
        """Whoever is back is first led back, as the other side was told to do too, and keyed anew then."""
        self._file = PeersFile(
            _policy(self._snapshot), {**self._gone, **members}, leaving=frozenset(self._gone)
        )
        self._keys.set_peers(self._file, _uid(self._snapshot) or self._config.mesh, now)

    def _forget_led_back(self, now: float) -> None:
        if not self._gone:
            return
        done = self._gone.keys() - set(self._keys.psk.keyed)
        if not done:
            return
        self._kept -= done
        for key in done:
            del self._gone[key]
        members = {key: _named(key, peer) for key, peer in self._snapshot.peers.items() if peer.report}
        self._set_peers(members, now)

    def _leave(self, now: float) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            self._keys.leave(now)

    # --- keys ----------------------------------------------------------------------------------------------

    def _take_maker(self, maker: KeyMaker | str, now: float) -> None:
        if isinstance(maker, str):
            self._trouble = maker
        else:
            self._keys.psk.equip(maker, now)
        self._reporting.expect()  # of our identity

    def _working(self) -> tuple[Psk, KeyMaker]:
        psk = self._keys.psk
        if psk.maker is None:
            raise ConfigError(self._trouble or "post-quantum keys are being set up: ask again in a second")
        return psk, psk.maker

    @property
    def _fingerprint(self) -> Fingerprint | None:
        if self._trouble or self._keys.psk.fingerprint is not None:
            return None if self._trouble else self._keys.psk.fingerprint
        own = self._snapshot.own  # a start takes nothing back that an earlier run has published
        return own.report.identity if own is not None and own.report is not None else None

    # --- outputs -------------------------------------------------------------------------------------------

    def _collect(self, now: float) -> None:
        self._forget_led_back(now)
        self._out += self._keys.outputs()
        if self._keys.take_change():
            self._reporting.expect()
        self._plan_report(now)
        self._plan_save(now)

    def _plan_report(self, now: float) -> None:
        self._reporting.observe(NO_CHANGES, paths=self, snapshot=self._snapshot, now=now)
        if not self._reporting.handle_timer(now):
            return
        own = self._snapshot.own
        if own is None or self._kind is None or not self._membership.registration().connected:
            return  # whatever brings these makes a report due
        wanted = report(
            self._snapshot,
            self.view(now),
            identity=self._config.identity,
            device=self._kind,
            fingerprint=self._fingerprint,
            keyed=self._keys.psk.view(),
        )
        if self._reporting.take(wanted):
            self._out.append(WriteReport(own.meta.name, own.meta.uid, wanted))

    def _plan_save(self, now: float) -> None:
        if self._saving is not None or self._save_at is None or now < self._save_at:
            return
        self._save_at = None
        state = replace(self._saved, snapshot=self._snapshot, listen_port=self.listen_port)
        if state != self._saved:
            self._saving = state
            self._out.append(SaveState(state))

    # --- commands ------------------------------------------------------------------------------------------

    def _command(self, asked: CommandArrived, now: float) -> None:
        try:
            match asked.command:
                case "status":
                    answer: dict[str, object] = {"status": self.status(now)}
                case "rotate":
                    answer = {"peers": self._rotate(asked.peer, now)}
                case "identity show":
                    _, maker = self._working()
                    answer = {"identity": identities(self._snapshot, maker, self._keys.psk.view())}
                case "identity trust":
                    answer = {"named": self._trust(asked, now)}
                case "identity rotate" | "identity certify":
                    self._renew(asked)
                    return
                case "give-back" | "give-back-forced":
                    is_forced = asked.command == "give-back-forced"
                    self._is_leaving = self._keys.give_back(asked.number, is_forced=is_forced, now=now)
                    return
                case "go-back":
                    self._leave(now)
                    answer = {}
                case _:
                    answer = {
                        "ok": False,
                        "error": f"not on {self._device.name}, which is not this mesh's own",
                    }
        except ConfigError as error:
            answer = {"ok": False, "error": str(error)}
        self._out.append(Reply(asked.number, {"ok": True, **answer}))

    def _rotate(self, name: str, now: float) -> int:
        psk, _ = self._working()
        keys = sorted(psk.view().keys() & self._snapshot.peers) if not name else [self._key_of(name)]
        for key in keys:
            psk.rotate(key, now)
        return len(keys)

    def _trust(self, asked: CommandArrived, now: float) -> str | None:
        (psk, maker), key = self._working(), self._key_of(asked.peer)
        refuse_beside_ca(maker, asked.peer)
        psk.trust(key, read_fingerprint(asked.argument), now)
        named = psk.view()[key].named
        return str(named) if named is not None else None

    def _key_of(self, name: str) -> PublicKey:
        key = key_of(self._snapshot, name)
        if key not in self._keys.psk.view():
            raise ConfigError(f"{self._device.name} has no peer with the public key of {name}: see `wg show`")
        return key

    def _renew(self, asked: CommandArrived) -> None:
        from scope_agent.psk.trust import succeed

        _, maker = self._working()
        if self._renewing is not None:
            raise ConfigError("another identity is being written: ask again")
        if asked.command == "identity rotate":
            identity = succeed(maker.identity, maker.random_bytes, maker.provider)
        else:
            identity = certified(maker, self._snapshot.own, read_certificate(asked.argument))
        self._renewing = (asked.number, identity)
        self._out.append(SaveIdentity(identity))

    def _identity_saved(self, error: str, now: float) -> None:
        if self._renewing is None:
            return
        (number, identity), self._renewing = self._renewing, None
        if error:
            self._out.append(Reply(number, {"ok": False, "error": error}))
            return
        self._keys.psk.renew(identity, now)
        self._reporting.expect()
        self._out.append(Reply(number, {"ok": True, "fingerprint": str(identity.public.fingerprint())}))

    def status(self, now: float) -> dict[str, object]:
        """What `scopectl status` shows: plain JSON values, and no key but public ones."""
        awaited = self._keys.awaited(now)
        return {
            **status(
                self._snapshot,
                self.view(now),
                mesh=self._config.mesh,
                device=DeviceStatus(
                    self._device.name,
                    kind=self._kind,
                    listen_port=self.listen_port,
                    drift=0,
                    observed=self._keys.observed,
                    sessions=self._keys.sessions,
                ),
                registration=self._membership.registration(),
                errors={
                    "Device": self._keys.error,
                    "Registry": self._reporting.error,
                    "Disk": self._disk_error or self._keys.disk_error,
                    "PostQuantum": self._trouble,
                    "Removed": "this peer was removed from the mesh" if self.removed else "",
                    "ManagersKey": _going_back(awaited),
                },
                keyed=self._keys.psk.view(),
                wall=now + self._wall_offset,
                dropped=self._keys.dropped,
                home="",
                now=now,
            ),
            "leaving": self._is_leaving,
            "awaited": [asdict(each) for each in awaited],
        }


def _named(key: PublicKey, peer: Peer) -> ForeignPeer:
    """A member as its ScopePeer names it, which has a report."""
    assert peer.report is not None  # noqa: S101 - `membership` holds no other
    return ForeignPeer(peer.meta.name, key, peer.report.keys.probe, peer.report.identity)


def _going_back(awaited: list[Awaited]) -> str:
    named = ", ".join(each.name for each in awaited)
    return f"the pairs with {named} are going back to their manager's key" if named else ""


def _policy(snapshot: Snapshot) -> PostQuantum:
    return snapshot.mesh.spec.post_quantum if snapshot.mesh is not None else PostQuantum()


def _uid(snapshot: Snapshot) -> str:
    return snapshot.mesh.meta.uid if snapshot.mesh is not None else ""
