"""Who the peer of a pair is: what its ScopePeer names, what was pinned, what it showed, what may follow."""

from __future__ import annotations

from dataclasses import replace

from scope.model import Fingerprint, IdentityTrust, PskFailure, PublicKey
from scope_agent.psk.exchange import ExchangeError, Parties
from scope_agent.psk.identity import FIRST_CONTACT, PublicIdentity, Succession, TrustPolicy
from scope_agent.psk.kept import Kept
from scope_agent.psk.messages import Succeeded
from scope_agent.psk.pair_values import ANSWER_EVERY, Failure, Repeat, Tools
from scope_agent.psk.slots import Record
from scope_agent.psk.states import State
from scope_agent.psk.trust import Judgement, is_certified, is_signed_by_old, judge

UNCERTIFIED_AGAIN = 60.0  # a peer that showed no certificate is asked again: it costs it 2 KB


class Acquainted(Kept):
    """A side that knows whom it speaks to."""

    def __init__(self, *, own: PublicKey, peer: PublicKey, tools: Tools, record: Record, now: float) -> None:
        super().__init__(own=own, peer=peer, tools=tools, record=record, now=now)
        self._mesh_uid = ""
        self._named: Fingerprint | None = None
        self._name = ""
        self._judgement = Judgement()
        self._parties: Parties | None = None
        self._theirs: PublicIdentity | None = None
        self._keyed_with = record.pinned if record.current is not None else None  # if they differ: at once
        self._tell_at = self._check_at = now  # how an identity followed: ours, and theirs
        self._identity_failure: Failure | None = None
        self._ask = Repeat(now)
        self._may_hurry = True
        self._is_wanted = False  # by E: a new key
        self._is_stale = False  # the exchange under way is of an identity that was replaced

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
            self._ask = Repeat(now)
        if self._state is State.OFFERED:
            self._give_up(now)
        if parties is not None:
            before, self._keyed_with = self._keyed_with, expected
            if before not in (None, expected):
                self._key_anew(now)

    @property
    def _policy_of_trust(self) -> TrustPolicy:
        maker = self._tools.maker
        return maker.trust if maker is not None else FIRST_CONTACT

    def _of_identity(self, why: str) -> Failure | None:
        if not why:
            return None
        return Failure(PskFailure.NO_IDENTITY if self._named is None else PskFailure.UNTRUSTED, why)

    def _key_anew(self, at: float) -> None:
        """One of the two identities is another one: so the key is to be, too."""
        self._schedule.failures = 0
        self._schedule.at = at
        self._is_wanted = not self.is_decapsulator
        self._is_stale = self._state is not State.IDLE
        self._ask = Repeat(at)

    def _hurry(self, now: float) -> None:
        """The peer can make keys now: what it was asked or told before, it is asked and told again at once.

        Once, then in its time: where answers are lost, two sides would hurry each other for ever.
        """
        if self._may_hurry:
            self._may_hurry = False
            self._ask.at = now
            if self._state is State.OFFERED:
                self._repeat.at = now

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

    def _take_identity(self, keys: PublicIdentity, certificate: bytes, now: float) -> None:
        maker = self._tools.maker
        if self._parties is None or self._theirs is not None or maker is None:
            return
        fingerprint, ca, name = self._parties.peer_fingerprint, maker.trust.ca, self._name
        if keys.fingerprint() != fingerprint:
            why = "the peer has another identity than the one that is named here"
            self._failure = Failure(PskFailure.UNTRUSTED, why)
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

    def _say_succession(self) -> None:
        maker = self._tools.maker
        if maker is not None and maker.identity.successions and self._is_reached:
            self._say(Succeeded(maker.identity.successions[-1]))
