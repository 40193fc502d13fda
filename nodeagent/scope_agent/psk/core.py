"""All pairs' keys: who takes part, what arrives for whom, and how many exchanges run at once.

Sans-IO, in verbs: `equip`, `configure`, `identify`, `trust`, `renew`, `reach`, `receive`, `observe`,
`written`, `rotate`, `handle_timer`, `get_timer`, `outputs`. Peers are named by their WireGuard keys. Time is
monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never

from scope.model import Fingerprint, PostQuantum, PostQuantumMode, PublicKey
from scope.wire import KeyPart, WireError
from scope_agent.agenda import Agenda
from scope_agent.psk.exchange import ExchangeError
from scope_agent.psk.identity import HybridIdentity, KeyMaker
from scope_agent.psk.pair import Pair
from scope_agent.psk.pair_values import Nudge, Reading, Say, Tools, Write
from scope_agent.psk.parts import Joining, cut
from scope_agent.psk.slots import Record
from scope_agent.psk.view import PskPair

BEGIN_PER_SECOND, BEGIN_BURST = 20.0, 10  # an exchange costs two milliseconds of a processor on each side

_ABSENT = Reading(psk=None, stamp=0.0, since=None)


@dataclass(frozen=True, slots=True)
class SayPart:
    """Send a part of a message to the peer."""

    peer: PublicKey
    part: KeyPart = field(repr=False)


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Replace a pair's record on disk, None: remove it; a written one is answered by `written`."""

    peer: PublicKey
    record: Record | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class NudgePeer:
    """Send an empty packet to the peer through the tunnel."""

    peer: PublicKey


PskOutput: TypeAlias = SayPart | WriteRecord | NudgePeer


class Psk:
    """All pairs' keys. `random` draws from [0, 1), `offset` is the wall clock less the monotonic one.

    `is_managed`: something else manages the device, and may have given its pairs keys of its own.
    """

    def __init__(
        self,
        *,
        own: PublicKey,
        random: Callable[[], float],
        records: Mapping[PublicKey, Record],
        offset: float,
        is_managed: bool = False,
    ) -> None:
        self._own = own
        self._records = dict(records)  # of who is no member yet
        self._tools = Tools(random, self._may_begin, offset, is_managed)
        self._pairs: dict[PublicKey, Pair] = {}
        self._views: dict[PublicKey, PskPair] = {}
        self._joining: dict[PublicKey, Joining] = {}
        self._readings: Mapping[PublicKey, Reading] | None = None  # before the first: nothing is decided
        self._numbers = 0
        self._slot = float("-inf")
        self._policy, self._mesh_uid = PostQuantum(), ""
        self._out: list[PskOutput] = []
        self._changed: set[PublicKey] = set()
        self._looking: set[PublicKey] = set()
        self._expecting: set[PublicKey] = set()
        self._agenda: Agenda[PublicKey] = Agenda()
        self.dropped = 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a key, and nobody is to have one."""
        return not self._pairs and not self._records

    @property
    def maker(self) -> KeyMaker | None:
        """What keys are made with; None before `equip`."""
        return self._tools.maker

    @property
    def fingerprint(self) -> Fingerprint | None:
        """Of our own identity; None before `equip`."""
        maker = self._tools.maker
        return maker.identity.public.fingerprint() if maker is not None else None

    # --- what is known -------------------------------------------------------------------------------------

    def equip(self, maker: KeyMaker, now: float) -> None:
        """Take what keys are made with. Before that pairs keep what their records hold."""
        self._tools.maker = maker
        self._numbers = int.from_bytes(maker.random_bytes(4), "big")  # not those of an earlier run
        for key, pair in self._pairs.items():
            pair.equip(now)
            self._collect(key, now)

    def configure(
        self, policy: PostQuantum, *, mesh_uid: str, members: Set[PublicKey], is_complete: bool, now: float
    ) -> set[PublicKey]:
        """Take what the mesh asks, and who the other members are; the keys of those who are new here.

        Who is gone is forgotten, on disk too. Where no new keys are asked for, only those take part that have
        one: a mesh without keys costs nothing.
        """
        for key in self._pairs.keys() - members:
            del self._pairs[key], self._views[key]
            self._joining.pop(key, None)
            self._agenda.put(key, None)
            self._looking.discard(key)
            self._expecting.discard(key)
            self._out.append(WriteRecord(key, None))
        is_off = policy.mode is PostQuantumMode.OFF
        new = (members & self._records.keys() if is_off else members) - self._pairs.keys()
        for key in sorted(new):
            record = self._records.pop(key, None) or Record()
            pair = self._pairs[key] = Pair(own=self._own, peer=key, tools=self._tools, record=record, now=now)
            self._views[key] = PskPair()
            if self._readings is not None:
                pair.observe(self._readings.get(key, _ABSENT), now)
        if is_complete:
            self._out += [WriteRecord(key, None) for key in sorted(self._records)]
            self._records.clear()
        is_changed = (policy, mesh_uid) != (self._policy, self._mesh_uid)
        self._policy, self._mesh_uid = policy, mesh_uid
        for key in sorted(self._pairs) if is_changed else sorted(new):
            self._pairs[key].configure(policy, mesh_uid=mesh_uid, now=now)
            self._collect(key, now)
        return new

    def identify(self, key: PublicKey, fingerprint: Fingerprint | None, name: str, now: float) -> None:
        """What the peer's ScopePeer, which is called `name`, says of its identity."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.identify(fingerprint, name, now)
            self._collect(key, now)

    def trust(self, key: PublicKey, fingerprint: Fingerprint, now: float) -> None:
        """Take the operator's word for a peer's identity."""
        self._pairs[key].trust(fingerprint, now)
        self._collect(key, now)

    def renew(self, identity: HybridIdentity, now: float) -> None:
        """Be of another identity from now on, or of the same with another certificate: it is on disk."""
        maker = self._tools.maker
        if maker is None:
            return
        self._tools.maker = replace(maker, identity=identity)
        is_same = identity.public == maker.identity.public
        for key in sorted(self._pairs):
            self._pairs[key].renew(now, is_same=is_same)
            self._collect(key, now)

    def reach(self, key: PublicKey, now: float, *, is_reached: bool) -> None:
        """Whether the peer has a living path."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.reach(now, is_reached=is_reached)
            self._collect(key, now)

    def observe(self, readings: Mapping[PublicKey, Reading], now: float) -> None:
        """Take what the device says of its peers: all of them. Who is not in it is about to be added."""
        is_first = self._readings is None
        self._readings = readings
        for key, pair in self._pairs.items():
            if is_first or key in readings:
                pair.observe(readings.get(key, _ABSENT), now)
                self._collect(key, now)

    def forget_device(self) -> None:
        """The device is away: what it says when it is back is the first that is known of it."""
        self._readings = None
        for pair in self._pairs.values():
            pair.forget_device()

    def receive(self, key: PublicKey, part: KeyPart, now: float) -> None:
        """Take a part of a message."""
        pair = self._pairs.get(key)
        if pair is None:
            self.dropped += 1
            return
        try:
            message = self._joining.setdefault(key, Joining()).add(part)
            if message is not None:
                pair.receive(message, now)
        except (WireError, ExchangeError):
            self.dropped += 1
        self._collect(key, now)

    def written(self, key: PublicKey, error: str, now: float) -> None:
        """A record is on disk, or why not."""
        pair = self._pairs.get(key)
        if pair is not None:
            pair.written(error, now)
            self._collect(key, now)

    def rotate(self, key: PublicKey, now: float) -> None:
        """Make a new key with the peer, now."""
        self._pairs[key].rotate(now)
        self._collect(key, now)

    def leave(self, key: PublicKey, now: float) -> None:
        """Give a pair back the key of who manages the device, both sides of it together."""
        self._pairs[key].leave(now)
        self._collect(key, now)

    def abandon(self, key: PublicKey, now: float) -> None:
        """Give a pair back the manager's key on our side alone: its sessions end unless the peer follows."""
        self._pairs[key].abandon(now)
        self._collect(key, now)

    # --- what is shown -------------------------------------------------------------------------------------

    @property
    def keyed(self) -> list[PublicKey]:
        """Pairs that have a key of ours, or whose device may have one."""
        return [key for key, pair in sorted(self._pairs.items()) if pair.is_keyed]

    def view(self) -> Mapping[PublicKey, PskPair]:
        """All pairs."""
        return self._views

    def take_changes(self) -> set[PublicKey]:
        """Pairs that are shown otherwise than before; asked again, none."""
        changed, self._changed = self._changed, set()
        return changed

    @property
    def wants_look(self) -> bool:
        """Whether the device is to be read often."""
        return bool(self._looking)

    def expects_proof(self, now: float) -> bool:
        """Whether the device is to be read as soon as it can be: traffic waits for a first handshake."""
        self._expecting = {key for key in self._expecting if self._pairs[key].expects_proof(now)}
        return bool(self._expecting)

    # --- time ----------------------------------------------------------------------------------------------

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        return self._agenda.next()

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        while (key := self._agenda.take(now)) is not None:
            self._pairs[key].handle_timer(now)
            self._collect(key, now)

    def outputs(self) -> list[PskOutput]:
        """What is to be done now, in order."""
        out, self._out = self._out, []
        return out

    # --- within --------------------------------------------------------------------------------------------

    def _may_begin(self, now: float) -> float:
        slot = max(self._slot, now - BEGIN_BURST / BEGIN_PER_SECOND) + 1.0 / BEGIN_PER_SECOND
        if slot > now:
            return now + (slot - now) * (1.0 + self._tools.random())
        self._slot = slot
        return now

    def _collect(self, key: PublicKey, now: float) -> None:
        pair = self._pairs[key]
        for out in pair.outputs():
            match out:
                case Say(message):
                    self._numbers = (self._numbers + 1) % 2**32
                    self._out += [SayPart(key, part) for part in cut(self._numbers, message)]
                case Write(record):
                    self._out.append(WriteRecord(key, record))
                case Nudge():
                    self._out.append(NudgePeer(key))
                case _:
                    assert_never(out)
        if (view := pair.view()) != self._views[key]:
            self._views[key] = view
            self._changed.add(key)
        if pair.wants_look(now):
            self._looking.add(key)
        else:
            self._looking.discard(key)
        if pair.expects_proof(now):
            self._expecting.add(key)
        self._agenda.put(key, pair.get_timer(now))
