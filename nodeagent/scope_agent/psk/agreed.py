"""How the two sides of a pair come to one key: offer and answer, the words about it, and the way back."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import assert_never

from scope.model import PostQuantumMode, PskFailure, PublicKey
from scope_agent.psk.exchange import ExchangeError, is_genuine, make_answer, make_offer, take_answer
from scope_agent.psk.messages import NO_ID, Answer, Control, Offer, Refusal, RefusedFor, What, encode
from scope_agent.psk.pair_values import (
    ACTIVATE_EVERY,
    ANSWER_EVERY,
    AT_ONCE,
    ATTEMPT,
    DISK_AGAIN,
    Nudge,
    Tools,
)
from scope_agent.psk.proved import NUDGE_EVERY, NUDGE_FROM, WAY_BACK, Proved
from scope_agent.psk.slots import Keys, Record, find
from scope_agent.psk.states import Move, State

NO_SESSION = 20.0  # a living path, and no session for so long: perhaps the two sides hold different keys
WAIT_READY = 400.0  # for a young session: two rekeys


class Agreed(Proved):
    """A side that agrees with the other on a key."""

    def __init__(self, *, own: PublicKey, peer: PublicKey, tools: Tools, record: Record, now: float) -> None:
        super().__init__(own=own, peer=peer, tools=tools, record=record, now=now)
        self._turn_at = now  # of D: others' exchanges come first
        self._is_distrusted = False  # D's last offer was refused for its identity
        self._answered: tuple[bytes, Answer, Keys] | None = None  # by E
        self._answer_at = now
        self._look_until = now

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
        if self._is_bound:
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
                if keys is not self._record.next or (self._state is State.IDLE and self._is_going_back):
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
                if self._is_bound:
                    self._say_of(What.CONFIRM, keys)
                elif self._is_active:
                    self._revert("no handshake proved the key in time", now, tell=False)
            case What.CONFIRM | What.CONFIRMED:
                if keys is self._record.next:
                    self._take_confirmed(word.what, keys, now)
            case _:
                assert_never(word.what)

    def _take_confirmed(self, what: What, keys: Keys, now: float) -> None:
        """The other side has `next` for good."""
        if self._is_going_back and self._state is not State.SET:
            self._is_assured = True
            if not self._is_active:
                self._lay_in(now)  # or the device would be left with a key that nobody knows any more
            return
        self._promote(now)
        if what is What.CONFIRM:
            self._say_of(What.CONFIRMED, keys)
        self._confirm = None

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
        if self._is_bound:
            self._say_of(What.CONFIRM, keys)
        if keys is not self._record.next or self._is_active:
            return
        if self._is_young_enough(now):
            self._lay_in(now)
        else:
            self._say_of(What.ABORT, keys)

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

    def _have_rekeyed(self, now: float) -> None:
        """Where nobody sends, have WireGuard begin a session young enough for the way back."""
        at = self._rekeys_at(now)
        if at is not None and now >= at:
            self._nudge_at = now + NUDGE_EVERY
            self._out.append(Nudge())

    def _rekeys_at(self, now: float) -> float | None:
        """When to have WireGuard rekey for the way back; None where nothing waits for that."""
        is_awaited = self._state is State.READY if self.is_decapsulator else now < self._look_until
        since, age = self._reading.since if self._reading is not None else None, self._age(now)
        if not is_awaited or since is None or age is None or age <= WAY_BACK.oldest:
            return None
        if self._is_active or not self._is_going_back:
            return None
        return max(self._nudge_at, since + NUDGE_FROM)

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
