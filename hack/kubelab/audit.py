"""What the API server was asked, by whom, and what it answered: its audit log.

The log is written before the answer is sent, so what a client has seen answered can be read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Everything, but no bodies. A watch has two entries: when it starts to answer, and when it ends.
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}
WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True, slots=True)
class Audited:
    """One request. What a request does not have (a name, a resource) is empty."""

    at: str  # RFC 3339, UTC, with microseconds: when it came in
    verb: str
    user: str
    user_agent: str
    resource: str  # plural
    subresource: str
    namespace: str
    name: str
    path: str  # with its query
    code: int
    stage: str  # ResponseStarted (watches alone), ResponseComplete, Panic

    @property
    def is_write(self) -> bool:
        return self.verb in WRITES


class AuditLog:
    """The log as it grows. `mark` now, and read later what came `since`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mark(self) -> int:
        """Where the log ends now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def since(self, mark: int = 0) -> list[Audited]:
        """Every request after the mark, in the order of their answers."""
        return list(self._read(mark))

    def _read(self, mark: int) -> Iterator[Audited]:
        if not self.path.exists():
            return
        with self.path.open("rb") as log:
            log.seek(mark)
            for line in log:
                if line.endswith(b"\n"):
                    yield _audited(json.loads(line))


def _audited(event: dict[str, dict[str, str]]) -> Audited:
    target = event.get("objectRef") or {}
    status = event.get("responseStatus") or {}
    return Audited(
        at=str(event["requestReceivedTimestamp"]),
        verb=str(event["verb"]),
        user=event["user"].get("username", ""),
        user_agent=str(event.get("userAgent", "")),
        resource=target.get("resource", ""),
        subresource=target.get("subresource", ""),
        namespace=target.get("namespace", ""),
        name=target.get("name", ""),
        path=str(event["requestURI"]),
        code=int(status.get("code", 0)),
        stage=str(event["stage"]),
    )
