"""When a pair's next exchange may begin: by the key's age, sooner after a failure, at once when asked.

The age survives a restart by the clock that people set. Where that says nonsense the age counts as unknown,
and the rotation is near. An exchange that was under way when the agent ended is taken up at once.
"""

from __future__ import annotations

from collections.abc import Callable

AGAIN_FIRST, AGAIN_LONGEST = 30.0, 600.0  # after a failure
MOST_FAILURES = 16  # that are counted: the delay has long been the longest
SPREAD = 600.0  # overdue keys are rotated over so many seconds, not at once


class Schedule:
    """One pair's. `random` draws from [0, 1); `proved`: when the key in use was, None without one.

    `resumes`: the last run left an exchange unfinished. Times are monotonic seconds.
    """

    def __init__(
        self, now: float, *, random: Callable[[], float], proved: float | None, resumes: bool
    ) -> None:
        self._random = random
        self._proved_at = proved
        self._is_planned = resumes
        self.at = now
        self.failures = 0

    def plan(self, interval: float, now: float) -> None:
        """Take the interval, at a start or when it changes: then it puts nothing off that is nearer."""
        at = self._by_age(interval, now)
        self.at = min(self.at, at) if self._is_planned else at
        self._is_planned = True

    def proved(self, interval: float, now: float) -> None:
        """A key was proved now."""
        self._proved_at, self.failures = now, 0
        self.at = self._by_age(interval, now)

    def forget(self, now: float) -> None:
        """There is no key any more."""
        self._proved_at, self.failures, self.at = None, 0, now

    def fail(self) -> float:
        """Count a failure: seconds to wait, the longer the more there were."""
        delay = min(AGAIN_FIRST * 2.0**self.failures, AGAIN_LONGEST)
        self.failures = min(self.failures + 1, MOST_FAILURES)
        return delay * self._jitter()

    def _by_age(self, interval: float, now: float) -> float:
        if self._proved_at is None:
            return now
        if not 0.0 <= now - self._proved_at < interval:
            return now + min(interval, SPREAD) * self._random()
        return max(now, self._proved_at + interval * self._jitter())

    def _jitter(self) -> float:
        return 0.9 + 0.2 * self._random()
