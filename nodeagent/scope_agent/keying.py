"""Where the pairs' post-quantum keys meet the rest of the agent: what goes in, what comes out, what is shown.

`psk` knows neither paths nor the channel. Here its parts are sealed and sent where the peer is reached, its
records go to the disk, and its view becomes what the device is to hold.

An agent that has no such keys, in a mesh that asks for none, does not even import `psk`. Where the mesh asks,
the shell is asked once for a maker of keys, and brings the room with it. Until then the records of earlier
runs say what the device is to hold, so that the first ping after a start waits for no import; where no maker
can be had, pairs keep the keys that they have, and those without stay without.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from scope.model import (
    ConfigError,
    Fingerprint,
    IdentityTrust,
    PathKind,
    Peer,
    PostQuantum,
    PostQuantumMode,
    PublicKey,
    Snapshot,
)
from scope.wire import KeyPart
from scope_agent.carrying import Carrying
from scope_agent.inputs import NudgeTunnel, Output, SavePsk, SetUpKeys, Socket
from scope_agent.paths.core import Paths
from scope_agent.psk.view import PskPair
from scope_agent.wireguard.device import ObservedDevice

if TYPE_CHECKING:
    from scope_agent.psk.core import Psk
    from scope_agent.psk.identity import HybridIdentity, KeyMaker
    from scope_agent.psk.slots import Record

_UNKEYED = PskPair()


class Keying:
    """`records` are those of earlier runs; `offset` is the wall clock less the monotonic one."""

    def __init__(
        self,
        records: Mapping[PublicKey, Record],
        *,
        own: PublicKey,
        random: Callable[[], float],
        offset: float,
        carrying: Carrying,
        paths: Paths,
    ) -> None:
        self._own, self._random, self._offset = own, random, offset
        self._carrying, self._paths = carrying, paths
        self._policy = PostQuantum()
        self._snapshot = Snapshot()
        self._is_complete = False
        self._is_asked = False  # for a maker: once in a run
        self._trouble = ""
        self._out: list[Output] = []
        self._records = records  # until there is the room
        self._psk: Psk | None = None

    def _make_psk(self) -> Psk:
        from scope_agent.psk.core import Psk

        records, self._records = self._records, {}
        return Psk(own=self._own, random=self._random, records=records, offset=self._offset)

    # --- what is known -------------------------------------------------------------------------------------

    def set_snapshot(self, snapshot: Snapshot, *, is_complete: bool, now: float) -> None:
        """Take the mesh and its members."""
        before, self._snapshot, self._is_complete = self._snapshot, snapshot, is_complete
        if snapshot.mesh is None:
            return
        self._policy = snapshot.mesh.spec.post_quantum
        if not self._is_asked and self._policy.mode is not PostQuantumMode.OFF:
            self._is_asked = True
            is_awaited = not self._records and self._policy.mode is PostQuantumMode.REQUIRED
            self._out.append(SetUpKeys(is_awaited))
        if not self._is_asked and self._records and self._psk is None:
            self._psk = self._make_psk()  # who only keeps keys needs no maker
        self._configure(before, now)

    def equip(self, maker: KeyMaker | str, now: float) -> None:
        """Take what keys are made with, or in words why none can be made."""
        if isinstance(maker, str):
            self._trouble = maker
            if not self._records:
                return
        if self._psk is None:
            self._psk = self._make_psk()
        if not isinstance(maker, str):
            self._psk.equip(maker, now)
        self._configure(self._snapshot, now)

    def _configure(self, before: Snapshot, now: float) -> None:
        snapshot = self._snapshot
        if self._psk is None or snapshot.mesh is None:
            return
        if self._psk.is_idle and self._policy.mode is PostQuantumMode.OFF:
            return
        new = self._psk.configure(
            self._policy,
            mesh_uid=snapshot.mesh.meta.uid,
            members=snapshot.peers.keys(),
            is_complete=self._is_complete,
            now=now,
        )
        for key, peer in snapshot.peers.items():
            if key in new or before.peers.get(key) is not peer:
                identity = peer.report.identity if peer.report is not None else None
                self._psk.identify(key, identity, peer.meta.name, now)
        for key in sorted(new):
            self.stand(key, now)

    def stand(self, key: PublicKey, now: float) -> None:
        """Look how the pair's path stands."""
        if self._psk is not None:
            view = self._paths.view(now).pairs.get(key)
            is_reached = view is not None and view.path is not PathKind.NONE
            self._psk.reach(key, now, is_reached=is_reached)

    def observe(
        self, device: ObservedDevice, sessions: Mapping[PublicKey, tuple[float, float]], now: float
    ) -> None:
        """Take what the device says; `sessions` are (last handshake, since when, ours) by peer."""
        if self._psk is None or self._psk.is_idle:
            return
        from scope_agent.psk.pair_values import Reading

        readings = {}
        for key, peer in device.peers.items():
            stamp, since = sessions[key]
            readings[key] = Reading(peer.psk, stamp, since if stamp > 0.0 else None)
        self._psk.observe(readings, now)

    def receive(self, key: PublicKey, part: KeyPart, now: float) -> None:
        """Take a part of a message of a peer."""
        if self._psk is not None:
            self._psk.receive(key, part, now)

    def saved(self, key: PublicKey, error: str, now: float) -> None:
        """A record is on disk, or why not."""
        if self._psk is not None:
            self._psk.written(key, error, now)

    def rotate(self, name: str, now: float) -> int:
        """Make a new key with the peer of that name, "" for all; how many. Raises ConfigError."""
        psk, _ = self._working()
        keys = sorted(self._snapshot.peers) if not name else [self._key_of(name)]
        for key in keys:
            psk.rotate(key, now)
        return len(keys)

    # --- identities ----------------------------------------------------------------------------------------

    def trust(self, name: str, fingerprint: Fingerprint, now: float) -> Fingerprint | None:
        """Take the operator's word for a peer's identity; what the registry names. Raises ConfigError."""
        (psk, maker), key = self._working(), self._key_of(name)
        refuse_beside_ca(maker, name)
        psk.trust(key, fingerprint, now)
        return psk.view()[key].named

    def make_successor(self) -> HybridIdentity:
        """A fresh identity to follow ours: ours by `renew`, once it is on disk. Raises ConfigError."""
        from scope_agent.psk.trust import succeed

        _, maker = self._working()
        return succeed(maker.identity, maker.random_bytes, maker.provider)

    def make_certified(self, certificate: bytes) -> HybridIdentity:
        """Our identity with a CA's certificate: by `renew`, as above. Raises ConfigError."""
        _, maker = self._working()
        return certified(maker, self._snapshot.own, certificate)

    def renew(self, identity: HybridIdentity, now: float) -> None:
        """Be of this identity: it is on disk."""
        if self._psk is not None:
            self._psk.renew(identity, now)

    def maker(self) -> KeyMaker:
        """What keys are made with. Raises ConfigError."""
        return self._working()[1]

    def _working(self) -> tuple[Psk, KeyMaker]:
        if self._policy.mode is PostQuantumMode.OFF:
            raise ConfigError("the mesh makes no post-quantum keys: set spec.postQuantum.mode to Preferred")
        if self._psk is None or self._psk.maker is None:
            raise ConfigError(self._trouble or "post-quantum keys are being set up: ask again in a second")
        return self._psk, self._psk.maker

    def _key_of(self, name: str) -> PublicKey:
        return key_of(self._snapshot, name)

    # --- what is shown -------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> Fingerprint | None:
        """What our report says of our identity."""
        if self._policy.mode is PostQuantumMode.OFF or self._trouble:
            return None
        if self._psk is not None and self._psk.fingerprint is not None:
            return self._psk.fingerprint
        own = self._snapshot.own  # a start takes nothing back that an earlier run has published
        return own.report.identity if own is not None and own.report is not None else None

    @property
    def trouble(self) -> str:
        """Why this agent makes no keys though the mesh asks for them."""
        return "" if self._policy.mode is PostQuantumMode.OFF else self._trouble

    @property
    def is_required(self) -> bool:
        """Whether no pair talks before it has a key."""
        return self._policy.mode is PostQuantumMode.REQUIRED

    @property
    def dropped(self) -> int:
        """Messages that were not what they should be."""
        return self._psk.dropped if self._psk is not None else 0

    @property
    def wants_look(self) -> bool:
        """Whether the device is to be read often."""
        return self._psk is not None and self._psk.wants_look

    def expects_proof(self, now: float) -> bool:
        """Whether the device is to be read as soon as it can be."""
        return self._psk is not None and self._psk.expects_proof(now)

    def pairs(self) -> Mapping[PublicKey, PskPair]:
        """How each pair is keyed."""
        if self._psk is not None:
            return self._psk.view()
        return {key: self._kept(record) for key, record in self._records.items()}

    def _kept(self, record: Record) -> PskPair:
        """What its record says of a pair before there is a room that knows more."""
        current, following = record.current, record.next if record.active else None
        device = following or current
        is_withheld = current is None and self._policy.mode is PostQuantumMode.REQUIRED
        return PskPair(
            psk=device.psk if device is not None else None,
            is_withheld=is_withheld,
            is_silent=is_withheld,
            epoch=current.epoch if current is not None else 0,
            suite=current.suite if current is not None else 0,
            confirmed=record.confirmed,
            laid=following.epoch if following is not None else 0,
            pinned=record.pinned,
        )

    def pair(self, key: PublicKey) -> PskPair:
        """How one pair is keyed."""
        if self._psk is not None and (found := self._psk.view().get(key)) is not None:
            return found
        if self._psk is None and (record := self._records.get(key)) is not None:
            return self._kept(record)
        if self._policy.mode is not PostQuantumMode.REQUIRED:
            return _UNKEYED
        return PskPair(is_withheld=True, is_silent=True, failure=self.trouble)

    def take_changes(self) -> set[PublicKey]:
        """Pairs that are keyed otherwise than before; asked again, none."""
        return self._psk.take_changes() if self._psk is not None else set()

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return self._psk.get_timer() if self._psk is not None else None

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        if self._psk is not None:
            self._psk.handle_timer(now)

    def outputs(self, now: float) -> list[Output]:
        """What is to be performed now, in order."""
        out, self._out = self._out, []
        if self._psk is None or not (said := self._psk.outputs()):
            return out
        from scope_agent.psk.core import NudgePeer, SayPart, WriteRecord

        for output in said:
            match output:
                case SayPart(key, part):
                    out += self._say(key, part, now)
                case WriteRecord(key, record):
                    out.append(SavePsk(key, record))
                case NudgePeer(key):
                    peer = self._snapshot.peers.get(key)
                    if peer is not None and peer.assignment.addresses:
                        out.append(NudgeTunnel(key, peer.assignment.addresses[0].ip))
                case _:
                    assert_never(output)
        return out

    def _say(self, key: PublicKey, part: KeyPart, now: float) -> list[Output]:
        """Straight to the peer or by a hub, never through the tunnel: so a dead one is keyed again."""
        peer = self._snapshot.peers.get(key)
        if peer is None or peer.report is None:
            return []
        probe = peer.report.keys.probe
        endpoint = self._paths.endpoint_of(probe, now)
        if endpoint is None:
            return []
        return [*self._carrying.seal(probe, part, Socket(endpoint), now)]


def key_of(snapshot: Snapshot, name: str) -> PublicKey:
    """The WireGuard key of the peer of that name. Raises ConfigError."""
    for key, peer in snapshot.peers.items():
        if peer.meta.name == name:
            return key
    raise ConfigError(f"no peer {name!r} in the mesh: `scopectl status` names them")


def refuse_beside_ca(maker: KeyMaker, name: str) -> None:
    """Raises ConfigError where the operator's word for the identity of that peer counts nothing."""
    if maker.trust.mode is IdentityTrust.CA:
        raise ConfigError(
            "this agent believes its CA and nobody else: sign with `scope-agent ca sign`, and give the "
            f"certificate to `scopectl identity certify` on the machine of {name}"
        )


def certified(maker: KeyMaker, own: Peer | None, certificate: bytes) -> HybridIdentity:
    """Our identity with a CA's certificate. Raises ConfigError."""
    from scope_agent.psk.messages import SIGNATURES_BYTES
    from scope_agent.psk.trust import is_certified

    if own is None:
        raise ConfigError("this agent does not know its own ScopePeer yet: wait for the registry")
    if len(certificate) != SIGNATURES_BYTES:
        raise ConfigError("that is no certificate: give the line that `scope-agent ca sign` printed")
    ca, fingerprint = maker.trust.ca, maker.identity.public.fingerprint()
    if ca is not None and not is_certified(
        certificate, by=ca, name=own.meta.name, fingerprint=fingerprint, provider=maker.provider
    ):
        raise ConfigError(
            f"that is no certificate of this agent's CA for {own.meta.name} and {fingerprint}: sign "
            "exactly these"
        )
    return replace(maker.identity, certificate=certificate)


def read_fingerprint(text: str) -> Fingerprint:
    """A fingerprint as a person types it. Raises ConfigError."""
    try:
        return Fingerprint.parse(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no fingerprint: give the 64 lowercase hexadecimal digits that "
            "`scopectl identity show` prints"
        ) from None


def read_certificate(text: str) -> bytes:
    """A certificate as a person types it. Raises ConfigError."""
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise ConfigError(
            "that is no certificate: give the line that `scope-agent ca sign` printed"
        ) from None
