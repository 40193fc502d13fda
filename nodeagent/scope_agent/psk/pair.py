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
COMMIT, E by READY; both need the key in use to say it.

Sans-IO. Time is monotonic seconds; `offset` makes it the wall clock, which is for people.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never

from scope.model import (
    Fingerprint,
    IdentityTrust,
    PostQuantum,
    PostQuantumMode,
    PskFailure,
    PublicKey,
    Secret,
)
from scope_agent.psk.exchange import (
    ExchangeError,
    Offered,
    Parties,
    control,
    is_genuine,
    make_answer,
    make_offer,
    manager_keys,
    take_answer,
)
from scope_agent.psk.identity import FIRST_CONTACT, KeyMaker, PublicIdentity, Succession, TrustPolicy
from scope_agent.psk.messages import (
    NO_ID,
    Answer,
    Control,
    Identity,
    Offer,
    PskMessage,
    Refusal,
    RefusedFor,
    StrangeOffer,
    Succeeded,
    Wanted,
    What,
    Whence,
    Who,
    decode,
    encode,
)
from scope_agent.psk.schedule import Schedule
from scope_agent.psk.slots import Keys, Record, find
from scope_agent.psk.states import Move, Standing, State
from scope_agent.psk.trust import Judgement, is_certified, is_signed_by_old, judge
from scope_agent.psk.view import PskPair
from scope_agent.wireguard.device import NO_PSK

SESSION_VALID = 180.0  # WireGuard's REJECT_AFTER_TIME
YOUNGEST, OLDEST = 1.0, 60.0  # the age of a session at which a key is laid in
LATEST = 75.0  # the side that hears of it later follows up to here
UNSET = 90.0  # a key that is not in the device by then is not laid in any more
NUDGE_FROM, NUDGE_EVERY = 120.0, 1.0  # WireGuard rekeys at 120 s when it sends: four tries before the revert
REVERT_AT = 145.0  # at 180 s the session ends; the rekey with the old key takes its time, too
HOLD_BACK = 3.0  # E's first word to a device without the key is one that WireGuard repeats only 5 s later
EXPECT_PROOF = 6.0  # so long a first key is looked after closely: one repeated handshake is in it
IN_FLIGHT = 5.0  # a handshake that began before the key was laid in may end so much later
QUIET = 10.0  # without a session for so long: no handshake is under way that a new key would spoil
NO_SESSION = 20.0  # a living path, and no session for so long: perhaps the two sides hold different keys
SAY_FIRST, SAY_LONGEST = 1.0, 16.0  # what is not answered is said again
ACTIVATE_EVERY, REMIND_EVERY = 1.0, 5.0
ATTEMPT = 60.0  # an exchange without an answer for so long has failed
WAIT_READY = 400.0  # for a young session: two rekeys
AT_ONCE = 1.0  # after a refusal that says what to do better
CONFIRM_TRIES = 6
ANSWER_EVERY = 1.0  # an answer costs two milliseconds of a processor: one peer gets so much of it
UNCERTIFIED_AGAIN = 60.0  # a peer that showed no certificate is asked again: it costs it 2 KB
DISK_AGAIN = 30.0
FOREIGN_MAX, FOREIGN_WINDOW = 3, 3600.0  # a key that another program replaced is put back so often


@dataclass(slots=True)
class Tools:
    """What all pairs of an agent share. `may_begin` gives the time from which an exchange may start."""

    random: Callable[[], float]
    may_begin: Callable[[float], float]
    offset: float  # wall clock less monotonic clock
    is_managed: bool = False  # something else manages the device
    maker: KeyMaker | None = None  # until it is there a pair keeps the keys that it has, and makes none


@dataclass(frozen=True, slots=True)
class Reading:
    """What the device says of the peer. `stamp` only compares; `since` is when the session began, ours."""

    psk: Secret | None
    stamp: float
    since: float | None


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why there is no key, or no newer one."""

    kind: PskFailure
    why: str


_CONFLICT = _Failure(PskFailure.CONFLICT, "another program replaces it: find out which, and stop it")


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the peer."""

    message: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Write:
    """Replace the pair's record on disk; answered by `written`."""

    record: Record


@dataclass(frozen=True, slots=True)
class Nudge:
    """Send an empty packet through the tunnel: WireGuard rekeys when it sends."""


PairOutput: TypeAlias = Say | Write | Nudge


@dataclass(slots=True)
class _Repeat:
    """When something is said again, ever more rarely."""

    at: float
    delay: float = SAY_FIRST

    def due(self, now: float) -> bool:
        """Whether it is time, and if so, when the next time is."""
        if now < self.at:
            return False
        self.at = now + self.delay
        self.delay = min(2 * self.delay, SAY_LONGEST)
        return True


class Pair:
    """The key between us and one peer."""

    def __init__(self, *, own: PublicKey, peer: PublicKey, tools: Tools, record: Record, now: float) -> None:
        self._own, self._peer, self._tools = own, peer, tools
        self.is_decapsulator = own.raw > peer.raw
        self._record = record
        self._standing = Standing(record, is_decapsulator=self.is_decapsulator)
        self._writing: Record | None = None  # in flight
        self._pending: tuple[Record, Callable[[float], None] | None] | None = None
        self._write_at = now
        self._policy = PostQuantum()
        self._is_configured = False
        self._mesh_uid = ""
        self._named: Fingerprint | None = None
        self._name = ""
        self._judgement = Judgement()
        self._parties: Parties | None = None
        self._theirs: PublicIdentity | None = None
        self._keyed_with = record.pinned if record.current is not None else None  # if they differ: at once
        self._told: Fingerprint | None = None  # what waits for the disk
        self._tell_at = self._check_at = now  # how an identity followed: ours, and theirs
        self._is_reached = False
        self._may_hurry = True
        self._reading: Reading | None = None
        self._unsessioned_since: float | None = None
        self._out: list[PairOutput] = []
        self._failure: _Failure | None = None  # the last one, until a key is proved
        self._identity_failure: _Failure | None = None
        # D
        self._offered: Offered | None = None
        self._offered_base: Keys | None = None
        self._builds_on_none = False
        current = record.current
        self._schedule = Schedule(
            now,
            random=tools.random,
            proved=record.confirmed - tools.offset if current is not None else None,
            resumes=current is None or record.counter > current.epoch,
        )
        self._turn_at = now  # others' exchanges come first
        self._is_stale = False  # the exchange under way is of an identity that was replaced
        self._is_distrusted = False  # the last one was refused for our identity
        self._deadline = now + ATTEMPT
        self._repeat = _Repeat(now)
        # E
        self._answered: tuple[bytes, Answer, Keys] | None = None
        self._answer_at = now
        self._is_wanted = False
        # either
        self._ask = _Repeat(now)
        self._confirm: _Repeat | None = None
        self._confirm_tries = 0
        self._set_at: float | None = None  # since when the device has `next`
        self._is_speaking = False  # the first key: whether our device may start a handshake with it
        self._base_stamp = 0.0
        self._is_fresh = False  # there was no handshake before the key: the first one is its proof
        self._look_until = now
        self._nudge_at = now
        self._foreign: list[float] = []
        # where something else manages the device
        self._is_told_to_leave = False
        self._is_abandoned = False  # on our side alone
        self._returned: Keys | None = None  # the way back, once it was gone

    # --- what is known -------------------------------------------------------------------------------------

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

    def _set_parties(self, now: float) -> None:
        record, maker = self._record, self._tools.maker
        judgement = judge(
            self._policy_of_trust,
            name=self._name,
            named=self._named,
            pinned=record.pinned,
            former=record.former,
            is_told=record.is_told,
        )
        if judgement != self._judgement:
            self._judgement = judgement
            self._identity_failure = self._of_identity(judgement.why)
        expected, parties = judgement.expected, None
        if expected is not None and maker is not None:
            own = maker.identity.public.fingerprint()
            parties = Parties(self._mesh_uid, self._own, own, self._peer, expected, maker.suite)
        if parties == self._parties:
            return
        self._parties = parties
        if self._theirs is not None and self._theirs.fingerprint() != expected:
            self._theirs = None
        if self._theirs is None:
            self._ask = _Repeat(now)
        if self._state is State.OFFERED:
            self._give_up(now)
        if parties is not None:
            before, self._keyed_with = self._keyed_with, expected
            if before not in (None, expected):
                self._key_anew(now)

    def _of_identity(self, why: str) -> _Failure | None:
        if not why:
            return None
        return _Failure(PskFailure.NO_IDENTITY if self._named is None else PskFailure.UNTRUSTED, why)

    @property
    def _policy_of_trust(self) -> TrustPolicy:
        maker = self._tools.maker
        return maker.trust if maker is not None else FIRST_CONTACT

    def _key_anew(self, at: float) -> None:
        """One of the two identities is another one: so the key is to be, too."""
        self._schedule.failures = 0
        self._schedule.at = at
        self._is_wanted = not self.is_decapsulator
        self._is_stale = self._state is not State.IDLE
        self._ask = _Repeat(at)

    def reach(self, now: float, *, is_reached: bool) -> None:
        """Whether what is said now arrives, as far as is known."""
        if is_reached == self._is_reached:
            return
        self._is_reached = is_reached
        if is_reached:
            self._may_hurry = True
            self._ask = _Repeat(now)
            self._repeat = _Repeat(now)
            self._deadline = max(self._deadline, now + ATTEMPT)
            if self._record.current is not None:
                self._confirm, self._confirm_tries = _Repeat(now), 0
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
                self._schedule.at, self._ask = now, _Repeat(now)
        self._take_manager(reading, now)
        self._drive(now)

    def _take_manager(self, reading: Reading, now: float) -> None:
        """Before there is a key of ours, what the device has is its manager's."""
        record = self._record
        if not self._tools.is_managed or self._is_active or not self._may_note:
            return
        psk = reading.psk
        if self._is_abandoned and psk == record.manager:
            self._note(replace(record, current=None, next=None, active=False, confirmed=0.0))
            self._give_up(now)
            self._schedule.forget(now)
            self._failure = None
        elif record.current is None and not self._is_left and psk != record.manager:
            self._note(replace(record, manager=psk))

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
        self._ask = _Repeat(now)
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
        self._ask = _Repeat(now)
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

    # --- messages ------------------------------------------------------------------------------------------

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

    def _hurry(self, now: float) -> None:
        """The peer can make keys now: what it was asked or told before, it is asked and told again at once.

        Once, then in its time: where answers are lost, two sides would hurry each other for ever.
        """
        if self._may_hurry:
            self._may_hurry = False
            self._ask.at = now
            if self._state is State.OFFERED:
                self._repeat.at = now

    def _take_identity(self, keys: PublicIdentity, certificate: bytes, now: float) -> None:
        maker = self._tools.maker
        if self._parties is None or self._theirs is not None or maker is None:
            return
        fingerprint, ca, name = self._parties.peer_fingerprint, maker.trust.ca, self._name
        if keys.fingerprint() != fingerprint:
            why = "the peer has another identity than the one that is named here"
            self._failure = _Failure(PskFailure.UNTRUSTED, why)
            raise ExchangeError("an identity with another fingerprint than the expected one")
        if ca is not None and not is_certified(
            certificate, by=ca, name=name, fingerprint=fingerprint, provider=maker.provider
        ):
            shown = "another certificate than one" if certificate else "no certificate"
            self._identity_failure = self._of_identity(
                f"it shows {shown} of this agent's CA for {name} and its identity"
            )
            self._ask.at = now + UNCERTIFIED_AGAIN
            return
        self._identity_failure = None
        self._theirs = keys

    def _take_whence(self, known: Fingerprint, now: float) -> None:
        maker = self._tools.maker
        if maker is None or now < self._tell_at:
            return
        self._tell_at = now + ANSWER_EVERY
        for succession in maker.identity.successions:
            if succession.old.fingerprint() == known:
                self._say(Succeeded(succession))

    def _take_succession(self, succession: Succession, now: float) -> None:
        pinned, maker = self._record.pinned, self._tools.maker
        if maker is None or pinned is None or now < self._check_at:
            return
        if succession.old.fingerprint() != pinned:
            return
        self._check_at = now + ANSWER_EVERY
        if not is_signed_by_old(succession, maker.provider):
            raise ExchangeError("a new identity that the old one did not sign")
        self._pin(replace(self._record, pinned=succession.new, former=pinned), now)

    def _pin(self, record: Record, now: float) -> None:
        self._note(record)
        self._set_parties(now)

    def _take_wanted(self, epoch: int, id_: bytes, now: float) -> None:
        if not self.is_decapsulator or self._state is not State.IDLE:
            return
        current = self._record.current
        if epoch and current is not None and (epoch, id_) != (current.epoch, current.id):
            self._builds_on_none = True
        if self._schedule.failures == 0:
            self._schedule.at = min(self._schedule.at, now)
        elif self._is_distrusted:
            self._is_distrusted = False  # whoever wants a key believes us now
            self._schedule.at = min(self._schedule.at, now + AT_ONCE)

    def _take_offer(self, offer: Offer, now: float) -> None:
        parties, theirs, maker, header = self._parties, self._theirs, self._tools.maker, offer.header
        if self.is_decapsulator or maker is None:
            return
        if parties is not None and theirs is None:
            self._hurry(now)
            return
        if self._knows_no_manager or (self._named is None and not self._is_off):
            return  # the device, or the registry, will tell; what costs nothing is not counted as an answer
        digest = hashlib.sha3_256(encode(offer)).digest()
        if self._answered is not None and self._answered[0] == digest:
            self._say(self._answered[1])
            return
        if now < self._answer_at:
            return
        self._answer_at = now + ANSWER_EVERY
        if self._is_off or self._is_leaving:
            self._say(Refusal(RefusedFor.OFF, self._record.counter))
            return
        if parties is None or theirs is None:
            self._say(Refusal(RefusedFor.IDENTITY, self._record.counter))
            return
        expected = parties.header(epoch=header.epoch, base=header.base, nonce=header.nonce)
        if header != expected:
            reason = RefusedFor.SUITE if header.suite != expected.suite else RefusedFor.IDENTITY
            self._say(Refusal(reason, self._record.counter))
            if reason is RefusedFor.IDENTITY:
                self._say_succession()
            return
        if header.epoch <= self._record.counter:
            self._say(Refusal(RefusedFor.EPOCH, self._record.counter))
            return
        base = self._find_base(header.base)
        if header.base != NO_ID and base is None:
            self._say_current()
            self._say(Refusal(RefusedFor.BASE, self._record.counter))
            return
        answer, keys = make_answer(parties, maker, offer, theirs=theirs, base=base)
        self._is_wanted = False
        if base is not None and base is self._record.next:
            self._promote(now)  # it is signed that D builds on it
        self._answered = (digest, answer, keys)
        self._say(answer)

    def _take_strange_offer(self, now: float) -> None:
        if not self.is_decapsulator and self._parties is not None and now >= self._answer_at:
            self._answer_at = now + ANSWER_EVERY
            self._say(Refusal(RefusedFor.SUITE, self._record.counter))

    def _take_answer(self, answer: Answer) -> None:
        offered, theirs, maker = self._offered, self._theirs, self._tools.maker
        if self._state is not State.OFFERED or offered is None or theirs is None or maker is None:
            return
        keys = take_answer(offered, answer, theirs=theirs, base=self._offered_base, provider=maker.provider)
        self._offered = self._offered_base = None
        pinned = self._parties.peer_fingerprint if self._parties is not None else self._record.pinned
        self._write(
            replace(self._record, next=keys, active=False, pinned=pinned),
            lambda now: self._enter(Move.AGREE, now, within=ATTEMPT),
        )

    def _take_refusal(self, reason: RefusedFor, epoch: int, now: float) -> None:
        if not self.is_decapsulator:
            return
        if self._is_active and reason is RefusedFor.EPOCH and self._age(now) is None:
            self._revert("the peer holds the key no longer", now, tell=False)
            self._give_up(now + AT_ONCE)
            return
        if self._is_active or self._state is State.IDLE:
            return
        match reason:
            case RefusedFor.EPOCH if self._is_way_back(self._record.next) and self._offered is None:
                why = "the peer knows no way back: it holds another key, or had another one before"
                self._fail(PskFailure.REFUSED, why, now)
            case RefusedFor.EPOCH:
                if self._record.counter < epoch < 2**63:
                    self._note(replace(self._record, counter=epoch))
                self._give_up(now + AT_ONCE)
            case RefusedFor.BASE:
                self._builds_on_none = True
                self._give_up(now + AT_ONCE)
            case RefusedFor.OFF if self._tools.is_managed:
                self._fail(PskFailure.REFUSED, "the peer leaves: it takes no new key", now)
            case RefusedFor.OFF:
                self._fail(PskFailure.REFUSED, "the peer's mesh asks for no post-quantum keys yet", now)
            case RefusedFor.SUITE:
                self._fail(PskFailure.REFUSED, "the peer is set to another suite of post-quantum keys", now)
            case RefusedFor.IDENTITY:
                self._say_succession()
                self._is_distrusted = True
                self._fail(PskFailure.REFUSED, "the peer expects another identity of ours, or of itself", now)
            case _:
                assert_never(reason)

    # --- words about an epoch ------------------------------------------------------------------------------

    def _take_control(self, word: Control, now: float) -> None:
        keys = find(self._record, word.id)
        if keys is None and self._answered is not None and self._answered[2].id == word.id:
            keys = self._answered[2]
        if keys is None:
            keys = self._find_way_back(word)
        if keys is None:
            if word.what in (What.COMMIT, What.ACTIVATE) and not self.is_decapsulator:
                self._say(Refusal(RefusedFor.EPOCH, self._record.counter))
            return
        if not is_genuine(word, keys, by_decapsulator=not self.is_decapsulator):
            raise ExchangeError("a word about an epoch that its holder did not say")
        is_for_e = word.what in (What.COMMIT, What.ACTIVATE, What.ABORT)
        is_for_d = word.what in (What.READY, What.ACTIVE, What.REVERTED)
        if (is_for_e and self.is_decapsulator) or (is_for_d and not self.is_decapsulator):
            raise ExchangeError("a word of the other role")
        if keys is self._record.current or keys is self._returned:
            self._about_current(word.what, keys)
            return
        match word.what:
            case What.COMMIT:
                self._committed(keys, now)
            case What.READY:
                if keys is not self._record.next:
                    self._begin_back(keys)
                elif self._standing.allows(Move.HEAR_READY):
                    self._enter(Move.HEAR_READY, now, within=WAIT_READY)
            case What.ACTIVATE:
                self._activate(keys, now)
            case What.ACTIVE:
                self._follow(keys, now)
            case What.ABORT:
                if self._is_active:
                    self._revert("the other side could not follow in time", now, tell=False)
                self._say_of(What.READY, keys)
            case What.REVERTED:
                if self._is_active:
                    self._revert("no handshake proved the key in time", now, tell=False)
            case What.CONFIRM | What.CONFIRMED:
                if keys is self._record.next:
                    self._promote(now)
                    if word.what is What.CONFIRM:
                        self._say_of(What.CONFIRMED, keys)
                    self._confirm = None
            case _:
                assert_never(word.what)

    def _about_current(self, what: What, keys: Keys) -> None:
        """The other side speaks of a key that is proved here: it is to know."""
        match what:
            case What.CONFIRM:
                self._confirm = None
                self._say_of(What.CONFIRMED, keys)
            case What.CONFIRMED:
                self._confirm = None
            case _:
                self._say_of(What.CONFIRM, keys)

    def _committed(self, keys: Keys, now: float) -> None:
        if keys is self._record.next:
            self._say_of(What.ACTIVE if self._state is State.SET else What.READY, keys)
            return
        if self._is_active:
            self._revert("the other side gave the key up", now, tell=False)
        if self._is_left:
            return  # the device first gives back the key that is replaced; COMMIT is said again
        pinned = self._parties.peer_fingerprint if self._parties is not None else self._record.pinned
        counter = max(self._record.counter, keys.epoch)
        record = replace(self._record, next=keys, active=False, pinned=pinned, counter=counter)

        def ready(now: float) -> None:
            self._standing.go(Move.AGREE)
            self._answered = None
            self._look_until = now + WAIT_READY
            self._say_of(What.READY, keys)

        self._write(record, ready)

    def _activate(self, keys: Keys, now: float) -> None:
        if keys is not self._record.next:
            return
        if self._is_active:
            if self._state is State.SET:
                self._say_of(What.ACTIVE, keys)
        elif self._is_young_enough(now):
            self._lay_in(now)
        else:
            self._say_of(What.READY, keys)

    def _follow(self, keys: Keys, now: float) -> None:
        """E's device has the key: ours gets it, too, or E's gives it back."""
        if keys is not self._record.next or self._is_active:
            return
        if self._is_young_enough(now):
            self._lay_in(now)
        else:
            self._say_of(What.ABORT, keys)

    def _is_young_enough(self, now: float) -> bool:
        age = self._age(now)
        return self._reading is not None and (age is None or age <= LATEST)

    def _lay_in(self, now: float) -> None:
        self._is_fresh = self._is_withheld and self._age(now) is None
        self._base_stamp = self._reading.stamp if self._reading is not None else 0.0

        def laid(_: float) -> None:
            self._standing.go(Move.LAY)
            self._offered = self._offered_base = None

        self._write(replace(self._record, active=True), laid)

    # --- moving forward and back ---------------------------------------------------------------------------

    def _promote(self, now: float) -> None:
        """`next` is proved. The device has it already, or gets it now."""
        record = self._record
        self._returned = record.next if self._is_way_back(record.next) else None
        current = record.next if self._returned is None else None
        self._note(
            replace(record, current=current, next=None, active=False, confirmed=now + self._tools.offset)
        )
        self._set_at, self._is_fresh = None, False
        self._failure, self._builds_on_none = None, False
        self._standing.go(Move.PROVE)
        self._offered = self._offered_base = None
        if current is None or self._is_leaving:
            self._schedule.forget(now)
        else:
            self._schedule.proved(self._policy.rotation_interval, now)
        if self._is_stale:
            self._schedule.at = now
        self._confirm, self._confirm_tries = _Repeat(now), 0

    def _revert(self, why: str, now: float, *, tell: bool) -> None:
        """Put the old key back; `next` is kept, in case the other side has the proof."""
        keys = self._record.next
        self._take_back()
        self._fail(PskFailure.UNCONFIRMED, why, now)
        if tell and keys is not None:
            self._say_of(What.ABORT if self.is_decapsulator else What.REVERTED, keys)

    def _take_back(self) -> None:
        self._note(replace(self._record, active=False))
        self._set_at, self._is_fresh, self._is_speaking = None, False, False
        if self._is_active:
            self._standing.go(Move.REVERT)

    def _fail(self, kind: PskFailure, why: str, now: float) -> None:
        self._failure = _Failure(kind, why)
        self._give_up(now + self._schedule.fail())

    def _give_up(self, again: float) -> None:
        if self._standing.allows(Move.GIVE_UP) and (self.is_decapsulator or self._record.next is None):
            self._standing.go(Move.GIVE_UP)
        self._offered = self._offered_base = None
        self._schedule.at = again

    # --- what is due ---------------------------------------------------------------------------------------

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

    def _wants_offer(self) -> bool:
        if self.is_decapsulator or self._parties is None or self._is_off or self._is_leaving:
            return False
        return self._is_wanted or (self._record.current is None and self._record.next is None)

    def _lead(self, now: float) -> None:
        """D's part, before the key is in a device."""
        match self._state:
            case State.IDLE:
                self._begin(now)
            case State.OFFERED:
                if now >= self._deadline:
                    self._fail(PskFailure.UNANSWERED, "the peer does not answer", now)
                elif self._offered is not None and self._repeat.due(now):
                    self._say(self._offered.offer)
            case State.AGREED:
                if now >= self._deadline:
                    self._fail(PskFailure.UNANSWERED, "the peer does not answer", now)
                elif self._record.next is not None and self._repeat.due(now):
                    self._say_of(What.COMMIT, self._record.next)
            case State.READY:
                if now >= self._deadline:
                    self._fail(PskFailure.NO_SESSION, "no young session to lay the key into", now)
                elif self._record.next is not None and self._may_activate(now) and now >= self._repeat.at:
                    self._repeat.at = now + ACTIVATE_EVERY
                    self._say_of(What.ACTIVATE, self._record.next)
            case State.LAID | State.SET:
                pass  # the device decides
            case _:
                assert_never(self._state)

    def _begin(self, now: float) -> None:
        parties, maker = self._parties, self._tools.maker
        if self._is_leaving:
            back = self._way_back()
            if back is not None and now >= self._schedule.at:
                self._begin_back(back)
            return
        if (
            parties is None
            or maker is None
            or self._knows_no_manager
            or self._theirs is None
            or self._policy.mode is PostQuantumMode.OFF
            or self._is_left
        ):
            return
        if now < self._begins_at:
            return
        self._turn_at = self._tools.may_begin(now)
        if now < self._turn_at:
            return
        epoch = self._record.counter + 1
        base = None if self._builds_on_none else self._record.current or self._first_base()

        def offer(now: float) -> None:
            if parties != self._parties:
                self._give_up(now)
                return
            self._offered_base = base
            self._is_stale = False
            self._offered = make_offer(parties, maker, epoch=epoch, base=base)
            self._enter(Move.OFFER, now, within=ATTEMPT)

        self._write(replace(self._record, counter=epoch), offer)

    @property
    def _begins_at(self) -> float:
        """When D's next exchange is due: sooner than planned where the tunnel is dead over a living path."""
        quiet, at = self._unsessioned_since, self._schedule.at
        if self._record.current is not None and quiet is not None and self._schedule.failures == 0:
            at = min(at, quiet + NO_SESSION)
        return max(at, self._turn_at)

    def _enter(self, move: Move, now: float, *, within: float) -> None:
        self._standing.go(move)
        self._deadline, self._repeat = now + within, _Repeat(now)

    def _may_activate(self, now: float) -> bool:
        if self._reading is None:
            return False
        age = self._age(now)
        if age is not None:
            return YOUNGEST <= age <= OLDEST
        if self._is_withheld:
            return True  # nobody tries a handshake before there is a key
        return self._unsessioned_since is not None and now - self._unsessioned_since >= QUIET

    def _prove(self, now: float) -> None:
        """The key is in the device, or on its way there: wait for a handshake, or revert in time."""
        keys, reading = self._record.next, self._reading
        if keys is None or reading is None:
            return
        # A session's age is compared as its timer is computed, or rounding would make them disagree.
        since = reading.since if self._age(now) is not None else None
        if self._set_at is None:
            if reading.psk == keys.psk:
                self._standing.go(Move.SET)
                self._set_at = self._nudge_at = now
                self._repeat = _Repeat(now + REMIND_EVERY)
                if not self.is_decapsulator:
                    self._say_of(What.ACTIVE, keys)
                if not self._is_fresh:
                    self._base_stamp = reading.stamp
                self._speak(now)
            elif since is not None and now >= since + UNSET:
                self._revert("the key did not get into the device in time", now, tell=True)
            return
        self._speak(now)
        if now < self._set_at + IN_FLIGHT and not self._is_fresh:
            self._base_stamp = reading.stamp
        elif reading.stamp not in (0.0, self._base_stamp):
            self._promote(now)
            return
        if since is not None and now >= since + REVERT_AT:
            self._revert("no handshake proved the key in time", now, tell=True)
            return
        if since is not None and now >= max(self._nudge_at, since + NUDGE_FROM):
            self._nudge_at = now + NUDGE_EVERY
            self._out.append(Nudge())
        if since is None and self.is_decapsulator and self._is_reached and now >= self._repeat.at:
            self._repeat.at = now + REMIND_EVERY
            self._say_of(What.ACTIVATE, keys)

    def _speak(self, now: float) -> None:
        """Let our device start the first handshake, once the other one has the key, too.

        D's gets it second, so D's begins. A handshake that fails for want of the key keeps both devices from
        the next one for 5 s; so E's only answers, unless D's does not come.
        """
        if self._is_withheld and self._set_at is not None:
            self._is_speaking |= self.is_decapsulator or now >= self._set_at + HOLD_BACK

    # --- back to the key of who manages the device ---------------------------------------------------------

    @property
    def _is_leaving(self) -> bool:
        """Whether the pair is to go back: we leave, or the manager insists on its key."""
        insists = self._tools.is_managed and len(self._foreign) > FOREIGN_MAX
        return self._is_told_to_leave or insists

    @property
    def _knows_no_manager(self) -> bool:
        return self._tools.is_managed and self._record.manager is None

    @property
    def _may_note(self) -> bool:
        """Whether nothing is being written that decides what comes next."""
        return self._pending is None or self._pending[1] is None

    def _first_base(self) -> Keys | None:
        manager = self._record.manager
        return manager_keys(manager, None) if manager is not None else None

    def _find_base(self, id_: bytes) -> Keys | None:
        if id_ == NO_ID:
            return None
        first = self._first_base()
        return first if first is not None and first.id == id_ else find(self._record, id_)

    def _way_back(self) -> Keys | None:
        record = self._record
        if record.manager is None or record.current is None:
            return None
        return manager_keys(record.manager, record.current)

    def _is_way_back(self, keys: Keys | None) -> bool:
        back = self._way_back()
        return keys is not None and back is not None and keys.id == back.id

    def _find_way_back(self, word: Control) -> Keys | None:
        """What a word that no slot knows may be about: the other side wants to go back, or we have."""
        if self._returned is not None and word.id == self._returned.id:
            return self._returned
        back = self._way_back()
        if back is None or word.id != back.id or word.what not in (What.COMMIT, What.READY):
            return None
        return back

    def _begin_back(self, keys: Keys) -> None:
        """D's part: from here on it is a key like another, agreed on already."""
        if self._state is not State.IDLE or not self._may_note:
            return
        self._write(
            replace(self._record, next=keys, active=False),
            lambda now: self._enter(Move.AGREE, now, within=ATTEMPT),
        )

    @property
    def _asks_back(self) -> bool:
        """Whether we are E, and want to go back."""
        is_free = not self.is_decapsulator and not self._is_active
        return is_free and self._is_leaving and self._way_back() is not None

    def _ask_back(self, now: float) -> None:
        back, following = self._way_back(), self._record.next
        if back is None or not self._may_note:
            return
        if following is None or following.id != back.id:
            if now >= self._schedule.at:
                self._schedule.at = now + DISK_AGAIN
                self._write(replace(self._record, next=back), self._agreed_back)
        elif self._ask.due(now):
            self._look_for_activation(now)
            self._say_of(What.READY, following)

    def _agreed_back(self, now: float) -> None:
        self._standing.go(Move.AGREE)
        self._look_for_activation(now)

    def _look_for_activation(self, now: float) -> None:
        self._look_until = now + WAIT_READY

    # --- what is shown -------------------------------------------------------------------------------------

    @property
    def is_keyed(self) -> bool:
        """Whether the device has a key of ours, or may have one."""
        return self._record.current is not None or self._is_active or self._is_left

    @property
    def _is_off(self) -> bool:
        return self._policy.mode is PostQuantumMode.OFF

    @property
    def _needs_identity(self) -> bool:
        return self._parties is not None and self._theirs is None and not self._is_off

    @property
    def _needs_succession(self) -> bool:
        return self._judgement.is_changed and not self._is_off

    @property
    def _trust(self) -> IdentityTrust | None:
        """By what the peer's identity is believed; what a CA certified is not before it was shown."""
        by = self._judgement.by
        return None if by is IdentityTrust.CA and self._theirs is None else by

    @property
    def _is_withheld(self) -> bool:
        return self._policy.mode is PostQuantumMode.REQUIRED and self._record.current is None

    @property
    def _is_left(self) -> bool:
        """Whether the device still has the first key ever, which was reverted."""
        record, reading = self._record, self._reading
        return (
            record.current is None
            and record.next is not None
            and not self._is_active
            and reading is not None
            and reading.psk == record.next.psk
        )

    @property
    def _goes_back_now(self) -> bool:
        return self._tools.is_managed and (self._is_active or self._is_abandoned)

    @property
    def _state(self) -> State:
        return self._standing.state

    @property
    def _is_active(self) -> bool:
        return self._standing.is_active

    def _age(self, now: float) -> float | None:
        """Of the session; None without one."""
        if self._reading is None or self._reading.since is None:
            return None
        return now - self._reading.since if now < self._reading.since + SESSION_VALID else None

    def _psk(self) -> Secret | None:
        """What the device is to hold; None until it was read, and where we have no say."""
        record, reading = self._record, self._reading
        if reading is None:
            return None
        if self._is_abandoned:
            return record.manager
        if self._is_active and record.next is not None:
            return record.next.psk
        if record.current is not None:
            return record.current.psk
        return record.manager or NO_PSK if self._is_left else None

    def view(self) -> PskPair:
        """What the rest of the agent may know."""
        record, failure = self._record, self._shown_failure
        return PskPair(
            psk=None if failure is _CONFLICT and not self._goes_back_now else self._psk(),
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
    def _shown_failure(self) -> _Failure | None:
        if len(self._foreign) > FOREIGN_MAX:
            return _CONFLICT
        return None if self._is_off else self._identity_failure or self._failure

    def wants_look(self, now: float) -> bool:
        """Whether the device is to be read often: a key waits for its time, or for its proof."""
        if self._is_active:
            return self._is_reached or self._age(now) is not None
        return self._state is State.READY or now < self._look_until

    def expects_proof(self, now: float) -> bool:
        """Whether a first key is about to be proved, and traffic waits for that."""
        return self._is_withheld and self._set_at is not None and now < self._set_at + EXPECT_PROOF

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
            if self._asks_back:
                times.append(self._ask.at if self._is_way_back(self._record.next) else self._schedule.at)
            elif self._needs_identity or self._needs_succession or self._wants_offer():
                times.append(self._ask.at)
            if self._confirm is not None:
                times.append(self._confirm.at)
        return min(times, default=None)

    def _lead_times(self, now: float) -> list[float]:
        match self._state:
            case State.IDLE:
                if self._is_leaving:
                    return [self._schedule.at] if self._way_back() is not None else []
                if self._parties is None or self._theirs is None or self._is_off or self._is_left:
                    return []
                if self._knows_no_manager:
                    return []
                return [self._begins_at]
            case State.READY:
                return [self._deadline, *([self._repeat.at] if self._may_activate(now) else [])]
            case State.OFFERED | State.AGREED:
                return [self._deadline, self._repeat.at]
            case State.LAID | State.SET:
                return []
            case _:
                assert_never(self._state)

    def _prove_times(self, now: float) -> list[float]:
        since = self._reading.since if self._reading is not None else None
        if self._set_at is None:
            return [since + UNSET] if since is not None and self._age(now) is not None else []
        speaking = [self._set_at + HOLD_BACK] if self._is_withheld and not self._is_speaking else []
        if since is None or self._age(now) is None:
            return [*speaking, *([self._repeat.at] if self.is_decapsulator and self._is_reached else [])]
        return [*speaking, since + REVERT_AT, max(self._nudge_at, since + NUDGE_FROM)]

    def outputs(self) -> list[PairOutput]:
        """What is to be done now, in order."""
        out, self._out = self._out, []
        return out

    # --- saying and writing --------------------------------------------------------------------------------

    def _say(self, message: PskMessage) -> None:
        self._out.append(Say(encode(message)))

    def _say_succession(self) -> None:
        maker = self._tools.maker
        if maker is not None and maker.identity.successions and self._is_reached:
            self._say(Succeeded(maker.identity.successions[-1]))

    def _say_of(self, what: What, keys: Keys) -> None:
        self._say(control(what, keys, by_decapsulator=self.is_decapsulator))

    def _say_current(self) -> None:
        proved = self._record.current or self._returned
        if proved is not None:
            self._say_of(What.CONFIRM, proved)

    def _write(self, record: Record, then: Callable[[float], None]) -> None:
        """Write down first: nothing holds before the disk has it."""
        self._pending = (record, then)

    def _note(self, record: Record) -> None:
        """What is so already: the disk hears of it as soon as it can."""
        self._record = record
        self._pending = (record, None)
