"""How errors of the Registry port are answered: with a sentence that says what to do."""

from __future__ import annotations

from scope.admission import Refusal
from scope.registry.port import AlreadyExists, Conflict, Gone, NotFound, RegistryError, Unavailable

SECONDS_UNTIL_RETRY = 2.0  # for what only time mends


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
