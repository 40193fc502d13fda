"""One pair's pre-shared key: agreed, written down, given to the device, proved by a handshake, or taken back.

WireGuard mixes the key in at the next handshake only, and nothing forces one: a session lives on whatever the
device is given, for 180 s, and dies then if the two sides hold different keys. So a new key is laid in early
in a session's life, and is proved when the device's handshake time moves: that happens only where both sides
hold the same key. Where it did not move until the session is 145 s old, both put the old key back, and the
rekey that is due then succeeds with that one.

    D (larger key)                    E
    OFFER n               ----->
                          <-----      ANSWER n
    writes n down
    COMMIT n              ----->      writes n down
                          <-----      READY n
    waits for a young session
    ACTIVATE n            ----->      writes "active", device has n
                          <-----      ACTIVE n
    writes "active", device has n
              a handshake: each side sees it in its own device
    n is current, the old key is gone; CONFIRM n, answered by CONFIRMED n

What keeps the two together, whatever is lost and whoever dies:

- A side that proved n knows that the other wrote n down before its device got it. So "n is current", from
  either side (CONFIRM, or an offer that builds on n), makes n current on the other, too.
- Nothing else moves a key forward. A side that is not told goes by its own device: proved, or reverted.
- A side that reverts says so, and the other reverts with it unless it has the proof.
- After a crash the device is read before anything is decided: it says which slot it holds.
- A side without any key, or one whose base the other does not know, is given a new key that builds on none:
  the exchange is signed, so that is no weaker against anybody but who broke both signature schemes.
- E asks for an offer while it holds no key; D offers by itself, and again, ever more rarely, what failed.
- A side whose identity is replaced says so to the other, signed with the old one, whenever that may not know.

Where something else manages the device, the key that it gave the pair is remembered: the first exchange
builds on it, and whoever leaves has the pair go back to it in the same steps, from COMMIT on. D begins by
COMMIT, E by READY; both need the key in use to say it. When both devices have it, D says CONFIRM, and reverts
no more: what E answers is proof enough, and a handshake is where E has gone without an answer.

Sans-IO. Time is monotonic seconds; `offset` makes it the wall clock, which is for people.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from scope.model import Fingerprint, PostQuantum, PskFailure, PublicKey
from scope_agent.psk.agreed import Agreed
from scope_agent.psk.messages import (
    NO_ID,
    Answer,
    Control,
    Identity,
    Offer,
    Refusal,
    StrangeOffer,
    Succeeded,
    Wanted,
    Whence,
    Who,
    decode,
)
from scope_agent.psk.pair_values import (
    AT_ONCE,
    ATTEMPT,
    CONFLICT,
    DISK_AGAIN,
    FOREIGN_MAX,
    FOREIGN_WINDOW,
    Failure,
    PairOutput,
    Reading,
    Repeat,
    Tools,
    Write,
)
from scope_agent.psk.slots import Record
from scope_agent.psk.states import Move, State
from scope_agent.psk.view import PskPair
from scope_agent.wireguard.device import NO_PSK

CONFIRM_TRIES = 6


class Pair(Agreed):
    """The key between us and one peer."""

    def __init__(self, *, own: PublicKey, peer: PublicKey, tools: Tools, record: Record, now: float) -> None:
        super().__init__(own=own, peer=peer, tools=tools, record=record, now=now)
        self._is_configured = False
        self._told: Fingerprint | None = None  # what waits for the disk

    def configure(self, policy: PostQuantum, *, mesh_uid: str, now: float) -> None:
        """Take what the mesh asks."""
        self._mesh_uid = mesh_uid
        if policy != self._policy or not self._is_configured:
            self._policy, self._is_configured = policy, True
            self._schedule.plan(policy.rotation_interval, now)
        self._set_parties(now)
        self._drive(now)

    def identify(self, fingerprint: Fingerprint | None, name: str, now: float) -> None:
        """Take what the peer's ScopePeer, which is called `name`, says of its identity."""
        self._named, self._name = fingerprint, name
        self._set_parties(now)
        self._drive(now)

    def equip(self, now: float) -> None:
        """The tools have a maker of keys now."""
        self._set_parties(now)
        self._drive(now)

    def trust(self, fingerprint: Fingerprint, now: float) -> None:
        """Take the operator's word for the peer's identity."""
        self._told = fingerprint
        self._drive(now)

    def renew(self, now: float, *, is_same: bool) -> None:
        """The maker's identity is another one now; `is_same`: only its certificate is."""
        maker = self._tools.maker
        if is_same and maker is not None and self._is_reached:
            self._say(Identity(maker.identity.public, maker.identity.certificate))
        elif not is_same:
            self._set_parties(now)
            self._say_succession()
            self._key_anew(now + AT_ONCE)  # not before the peer knows of it
        self._drive(now)

    def reach(self, now: float, *, is_reached: bool) -> None:
        """Whether what is said now arrives, as far as is known."""
        if is_reached == self._is_reached:
            return
        self._is_reached = is_reached
        if is_reached:
            self._may_hurry = True
            self._ask = Repeat(now)
            self._repeat = Repeat(now)
            self._deadline = max(self._deadline, now + ATTEMPT)
            if self._record.current is not None:
                self._confirm, self._confirm_tries = Repeat(now), 0
        self._drive(now)

    def observe(self, reading: Reading, now: float) -> None:
        """Take what the device says."""
        if reading.psk is None:
            reading = replace(reading, psk=NO_PSK)
        before, self._reading = self._reading, reading
        if self._age(now) is not None:
            self._unsessioned_since = None
        elif self._unsessioned_since is None:
            self._unsessioned_since = now
        wanted = self._psk()
        if (
            before is not None
            and wanted is not None
            and before.psk == wanted
            and reading.psk != wanted
            and self._record.current is not None
        ):
            self._foreign.append(now)
            if self._is_leaving:
                self._schedule.at, self._ask = now, Repeat(now)
        self._take_manager(reading, now)
        self._drive(now)

    def forget_device(self) -> None:
        """The device is away."""
        self._reading, self._set_at, self._unsessioned_since = None, None, None
        self._is_speaking = False
        if self._standing.allows(Move.LOSE):
            self._standing.go(Move.LOSE)

    def leave(self, now: float) -> None:
        """Go back to the key of who manages the device."""
        self._is_told_to_leave = True
        self._schedule.at, self._schedule.failures = now, 0
        self._ask = Repeat(now)
        self._drive(now)

    def abandon(self, now: float) -> None:
        """Take the manager's key, whatever the peer does."""
        self._is_abandoned = self._record.manager is not None
        if self._may_note:
            self._take_back()
        self._give_up(now)
        self._drive(now)

    def rotate(self, now: float) -> None:
        """Make a new key now."""
        self._schedule.at = now
        self._schedule.failures, self._failure = 0, None
        self._is_wanted = not self.is_decapsulator
        self._ask = Repeat(now)
        self._drive(now)

    def written(self, error: str, now: float) -> None:
        """The record in flight is on disk, or why not."""
        record, self._writing = self._writing, None
        pending = self._pending
        if record is not None and pending is not None and pending[0] is record:
            self._pending = None
            if not error:
                self._record = record
                if pending[1] is not None:
                    pending[1](now)
            elif pending[1] is not None:
                self._fail(PskFailure.DISK, f"the disk: {error}", now)
            else:
                self._pending = pending
                self._write_at = now + DISK_AGAIN
        self._drive(now)

    def receive(self, data: bytes, now: float) -> None:
        """Take a message of the peer. Raises WireError, ExchangeError: dropped, and nothing changed."""
        message = decode(data)
        if self._pending is not None and self._pending[1] is not None:
            return  # what is being written decides; it is said again
        match message:
            case Who():
                if self._tools.maker is not None:
                    identity = self._tools.maker.identity
                    self._say(Identity(identity.public, identity.certificate))
                    self._hurry(now)
            case Identity(keys, certificate):
                self._take_identity(keys, certificate, now)
            case Whence(known):
                self._take_whence(known, now)
            case Succeeded(succession):
                self._take_succession(succession, now)
            case Wanted(epoch, id_):
                self._take_wanted(epoch, id_, now)
            case Offer():
                self._take_offer(message, now)
            case StrangeOffer():
                self._take_strange_offer(now)
            case Answer():
                self._take_answer(message)
            case Control():
                self._take_control(message, now)
            case Refusal(reason, epoch):
                self._take_refusal(reason, epoch, now)
            case _:
                assert_never(message)
        self._drive(now)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        self._drive(now)

    def _drive(self, now: float) -> None:
        self._foreign = [at for at in self._foreign if now < at + FOREIGN_WINDOW]
        if self._pending is None or self._pending[1] is None:
            if self._told is not None:
                told, self._told = self._told, None
                self._pin(replace(self._record, pinned=told, former=None, is_told=True), now)
            self._decide(now)
        if self._pending is not None and self._writing is None and now >= self._write_at:
            self._writing = self._pending[0]
            self._out.append(Write(self._writing))

    def _decide(self, now: float) -> None:
        if self._is_active:
            self._prove(now)
        elif self.is_decapsulator and self._is_reached:
            self._lead(now)
        if not self._is_reached:
            return
        self._have_rekeyed(now)
        if self._asks_back:
            self._ask_back(now)
        elif self._needs_identity:
            if self._ask.due(now):
                self._say(Who())
        elif self._needs_succession:
            if self._ask.due(now) and self._record.pinned is not None:
                self._say(Whence(self._record.pinned))
        elif self._wants_offer() and self._ask.due(now):
            current = self._record.current
            self._say(Wanted(current.epoch, current.id) if current is not None else Wanted(0, NO_ID))
        if self._confirm is not None and self._confirm.due(now):
            self._confirm_tries += 1
            self._say_current()
            if self._confirm_tries >= CONFIRM_TRIES:
                self._confirm = None

    @property
    def is_keyed(self) -> bool:
        """Whether the device has a key of ours, or may have one."""
        return self._record.current is not None or self._is_active or self._is_left

    @property
    def _goes_back_now(self) -> bool:
        return self._tools.is_managed and (self._is_active or self._is_abandoned)

    def view(self) -> PskPair:
        """What the rest of the agent may know."""
        record, failure = self._record, self._shown_failure
        return PskPair(
            psk=None if failure is CONFLICT and not self._goes_back_now else self._psk(),
            is_withheld=self._is_withheld,
            is_silent=self._is_withheld and not self._is_speaking,
            starts=self._is_speaking,
            epoch=record.current.epoch if record.current is not None else 0,
            suite=record.current.suite if record.current is not None else 0,
            confirmed=record.confirmed,
            laid=record.next.epoch if record.next is not None and self._state is State.SET else 0,
            failed=failure.kind if failure is not None else None,
            failure=failure.why if failure is not None else "",
            trust=None if self._is_off else self._trust,
            named=self._named,
            pinned=record.pinned,
        )

    @property
    def _shown_failure(self) -> Failure | None:
        if len(self._foreign) > FOREIGN_MAX:
            return CONFLICT
        return None if self._is_off else self._identity_failure or self._failure

    def wants_look(self, now: float) -> bool:
        """Whether the device is to be read often: a key waits for its time, or for its proof."""
        if self._is_active:
            return self._is_reached or self._age(now) is not None
        return self._state is State.READY or now < self._look_until

    def get_timer(self, now: float) -> float | None:
        """When `handle_timer` wants to run next."""
        times: list[float] = []
        if len(self._foreign) > FOREIGN_MAX:
            times.append(self._foreign[0] + FOREIGN_WINDOW)
        if self._pending is not None:
            if self._writing is None:
                times.append(self._write_at)
            if self._pending[1] is not None:
                return min(times, default=None)
        if self._is_active:
            times += self._prove_times(now)
        elif self.is_decapsulator and self._is_reached:
            times += self._lead_times(now)
        if now < self._look_until:
            times.append(self._look_until)
        if self._is_reached:
            if (rekeys_at := self._rekeys_at(now)) is not None:
                times.append(rekeys_at)
            if self._asks_back:
                times.append(self._ask.at if self._is_way_back(self._record.next) else self._schedule.at)
            elif self._needs_identity or self._needs_succession or self._wants_offer():
                times.append(self._ask.at)
            if self._confirm is not None:
                times.append(self._confirm.at)
        return min(times, default=None)

    def outputs(self) -> list[PairOutput]:
        """What is to be done now, in order."""
        out, self._out = self._out, []
        return out
