"""All that a hub's agent does to its machine: settings, rules and forwarder, and a look at each now and then.

The kernel relays the families of which `selftest` has seen that it can; the forwarder has all grants and
serves what the kernel leaves. The test is repeated when a setting or anybody's rules have changed, and every
TEST_AT_LEAST, since not every firewall numbers its changes. Everything here blocks, up to some seconds where
the kernel fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from scope.model import Family, Forwarding
from scope.relay import Grants
from scope_agent.relay.counting import Counted, Sent
from scope_agent.relay.shell.forwarder import ForwarderCounters, ForwarderProcess, grants_path
from scope_agent.relay.shell.forwarding import (
    is_on,
    plan_forwarding,
    read_sysctls,
    restore_sysctls,
    write_sysctls,
)
from scope_agent.relay.shell.rules import KernelRelay
from scope_agent.relay.shell.selftest import has_family, why_not
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.nft import NftError

TEST_AGAIN: Final = 30.0  # seconds: where programs change rules all day a test costs a tenth of a second each
TEST_AT_LEAST: Final = 600.0
# The forwarder tells which ports it could not have with all that it counts: 0.2 MB for a thousand pairs. It
# reads new grants four times a second.
TAKEN_AFTER: Final = 1.0
TAKEN_AGAIN: Final = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What forwards now, and why not the kernel. `forgot`: no place is known, so all sides are to knock.

    `taken`: granted ports that another program holds.
    """

    forwarding: Forwarding
    reason: str
    forgot: bool
    taken: frozenset[int] = frozenset()


class HubMachine:
    """One mesh's relaying on this machine.

    `note` keeps settings as they were (paths below /proc/sys, values) before they are changed; `noted` are
    those that an earlier run kept. `seed`: 32 secret bits, the same at each start. `mark`: of the forwarder's
    own packets.
    """

    def __init__(
        self,
        device: str,
        *,
        run_dir: Path,
        seed: int,
        mark: int,
        noted: Mapping[str, str],
        note: Callable[[Mapping[str, str]], None],
    ) -> None:
        self._kernel = KernelRelay(device, seed=seed)
        self._forwarder = ForwarderProcess(grants_path(run_dir, device), mark=mark)
        self._noted = dict(noted)
        self._note = note
        self._grants: Grants | None = None
        self._reasons: dict[Family, str] = {}  # of families that the kernel does not relay; tested ones only
        self._tested: float | None = None
        self._on: set[Family] = set()  # of which forwarding was on then
        self._is_stale = False  # something changed since the test
        self._taken: frozenset[int] = frozenset()
        self._taken_at = 0.0  # when to ask for them again
        self._outcome: Outcome | None = None

    def apply(self, grants: Grants, wall: float) -> Outcome:
        """Relay these grants and no others. Raises whatever `note` does, before anything is changed."""
        if self._tested is None:
            self.turn_on()
            self._test()
        self._grants = grants
        self._outcome = self._relay(grants, wall)
        self._taken_at = min(self._taken_at, time.monotonic() + TAKEN_AFTER)
        return self._outcome

    def turn_on(self) -> list[Family]:
        """Have the kernel forward. The families that it does not; raises whatever `note` does."""
        wanted = plan_forwarding()
        if wanted:
            self._noted = read_sysctls(wanted) | self._noted
            self._note(self._noted)
            write_sysctls(wanted)
        return [family for family in _present() if not is_on(family)]

    def check(self, wall: float) -> Outcome | None:
        """Put right what others did. The outcome, where it is another one, or where sides are to knock."""
        grants, tested = self._grants, self._tested
        if grants is None or tested is None:
            return None
        is_whole = self._look()
        since = time.monotonic() - tested
        if self._is_set_otherwise() or since > TEST_AT_LEAST or (self._is_stale and since > TEST_AGAIN):
            reasons = dict(self._reasons)
            self._test()
            is_whole = is_whole and reasons == self._reasons
        if is_whole and self._forwarder.is_running() and not self._finds_others_taken():
            return None
        before, after = self._outcome, self._relay(grants, wall)
        self._outcome = after
        is_news = before is None or replace(before, forgot=after.forgot) != after
        return after if is_news or after.forgot else None

    def counters(self) -> Counted | None:
        """What was relayed, and for whom too much; None where nothing is to be."""
        if self._grants is None:
            return None
        kernel: Mapping[int, Sent] = {}
        capped: frozenset[int] = frozenset()
        told: ForwarderCounters | None = None
        errors = []
        try:
            kernel, capped = self._kernel.counters(), self._kernel.capped()
        except NftError as error:
            errors.append(str(error))
        try:
            told = self._forwarder.counters()
        except ApplyError as error:
            errors.append(str(error))
        sent, also_capped = what_was_sent(told) if told is not None else ({}, frozenset())
        return Counted(kernel, sent, capped | also_capped, "; ".join(errors))

    def stop(self) -> list[str]:
        """Be no hub: nothing stays behind. What could not be undone comes back, in words."""
        failed = []
        for act in (self._kernel.remove, self._forwarder.stop):
            try:
                act()
            except (NftError, ApplyError) as error:
                failed.append(str(error))
        failed += restore_sysctls(self._noted)
        self._noted = {}
        self._note({})
        self._grants = self._tested = self._outcome = None
        self._taken, self._taken_at = frozenset(), 0.0
        return failed

    def _test(self) -> None:
        self._tested, self._is_stale = time.monotonic(), False
        self._on = {family for family in _present() if is_on(family)}
        self._reasons = {family: why for family in _present() if (why := why_not(family))}

    def _is_set_otherwise(self) -> bool:
        """Whether forwarding was turned on or off since the test."""
        return {family for family in _present() if is_on(family)} != self._on

    def _look(self) -> bool:
        try:
            was_moved = self._kernel.has_moved()
            is_whole = not was_moved or self._kernel.is_whole()
        except NftError:
            return False
        self._is_stale |= was_moved
        return is_whole

    def _finds_others_taken(self) -> bool:
        """Whether the forwarder says, when it is time to ask, that other ports are taken than before."""
        now = time.monotonic()
        if now < self._taken_at:
            return False
        try:
            counters = self._forwarder.counters()
        except ApplyError:
            return False
        if counters is None:
            return False
        self._taken_at = now + TAKEN_AGAIN
        before, self._taken = self._taken, frozenset(each.port for each in counters.taken)
        return self._taken != before

    def _relay(self, grants: Grants, wall: float) -> Outcome:
        families = frozenset(_present()) - self._reasons.keys()
        reasons = _in_words(self._reasons)
        forgot = False
        try:
            if families:
                forgot = self._kernel.apply(grants, wall, families=families)
            else:
                self._kernel.remove()
        except NftError as error:
            families, reasons = frozenset(), str(error)
        by = Forwarding.KERNEL if families else Forwarding.USER_SPACE
        try:
            self._forwarder.program(grants)
        except ApplyError as error:
            reasons = "; ".join(filter(None, (reasons, str(error))))
            by = Forwarding.KERNEL if families else Forwarding.NONE
        return Outcome(by, reasons, forgot, self._taken)


def what_was_sent(told: ForwarderCounters) -> tuple[dict[int, Sent], frozenset[int]]:
    """What each side was sent by the forwarder, by its id; and the sides that were over a limit."""
    sides = [both for pair in told.pairs for both in (pair, pair[::-1])]
    # It counts what came from a side and was passed on, to the other one.
    sent = {side.id: Sent(other.packets, other.bytes) for side, other in sides}
    return sent, frozenset(side.id for side, _ in sides if side.is_capped)


def _present() -> list[Family]:
    return [family for family in Family if has_family(family)]


def _in_words(reasons: Mapping[Family, str]) -> str:
    if len(reasons) > 1 and len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{family}: {reason}" for family, reason in reasons.items())
