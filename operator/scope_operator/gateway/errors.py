"""Refusals and how they look: a Kubernetes Status object with a sentence that says what to do."""

from __future__ import annotations

import math

from scope.registry.port import AlreadyExists, Conflict, Gone, NotFound, RegistryError, Unavailable

SECONDS_UNTIL_RETRY = 2.0  # for what only time mends


class Refusal(Exception):
    """An answer that is not what was asked for; `retry_after` in seconds, where waiting helps."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        retry_after: float | None = None,
        details: dict[str, str | float] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.details = details or {}

    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, and the scheme that a 401 has to name (RFC 9110, 11.6.1)."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.code == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="scope"'
        return headers

    def status(self) -> dict[str, object]:
        """The body."""
        body: dict[str, object] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        }
        if self.details:
            body["details"] = dict(self.details)
        return body


def refusal_of(error: RegistryError) -> Refusal:
    """How an error of the Registry port is answered."""
    match error:
        case NotFound():
            return Refusal(404, "NotFound", str(error))
        case AlreadyExists():
            return Refusal(409, "AlreadyExists", str(error))
        case Conflict():
            return Refusal(409, "Conflict", str(error))
        case Gone():
            return Refusal(410, "Expired", str(error))
        case Unavailable():
            return Refusal(503, "ServiceUnavailable", str(error), retry_after=SECONDS_UNTIL_RETRY)
        case _:
            return Refusal(422, "Invalid", str(error))
