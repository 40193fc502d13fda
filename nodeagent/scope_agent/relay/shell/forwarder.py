"""The forwarder as the agent sees it: the file of grants that programs it, and a socket that tells.

The process is `scope-forwarder`, which outlives the agent. Everything here takes milliseconds, but `stop`,
which waits for its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from scope.relay import Grants, encode_grants
from scope_agent.wireguard.device import ApplyError
from scope_agent.wireguard.shell.process import DataplaneProcess

STOP_TIMEOUT = 5.0  # it looks four times a second, on a loaded machine less often
ANSWER_TIMEOUT = 10.0  # it answers between two batches; a machine may be busy
_ANSWER_BYTES = 64 << 20  # 10,000 pairs are 2 MB; a process gone wrong must not fill our memory


@dataclass(frozen=True, slots=True)
class SideCounters:
    """What came from one side since its grant was made, or the forwarder started."""

    id: int
    families: tuple[int, ...]  # versions of IP over which it is found now
    bytes: int  # of payload, passed on
    packets: int  # datagrams, passed on
    dropped: int  # datagrams, for whatever reason
    is_capped: bool  # some of these, within the last minute, for being over a limit


@dataclass(frozen=True, slots=True)
class TakenPort:
    """A granted port at which the forwarder cannot listen."""

    port: int
    version: int  # of IP
    reason: str


@dataclass(frozen=True, slots=True)
class ForwarderCounters:
    """All that a forwarder tells. Counts start anew with its process."""

    pairs: tuple[tuple[SideCounters, SideCounters], ...]
    taken: tuple[TakenPort, ...]
    # Datagrams by why they were dropped: `knock` (no such token there), `stranger` (from where nobody
    # knocked), `shape` (neither WireGuard's nor a probe), `unknown` (the other side is nowhere), `rate` (over
    # the limit), `unbound` (the other side's port is taken), `unsent` (the machine did not take it).
    drops: Mapping[str, int]
    sent: Mapping[str, int]  # `batches` of as many `segments` in all, and `singles`


class ForwarderProcess:
    """The forwarder of one file of grants. `mark`: of the packets that it sends, 0 for none."""

    def __init__(self, grants_file: Path, *, mark: int = 0) -> None:
        self._process = DataplaneProcess(
            "forwarder", grants_file, "--grants", str(grants_file), "--mark", str(mark)
        )
        self._written: str | None = None

    def program(self, grants: Grants) -> None:
        """Relay these grants and no others, and see that somebody does. Raises ApplyError."""
        text = encode_grants(grants)
        if text != self._written or not self._process.file.exists():
            self._process.write(text)
            self._written = text
        self._process.ensure_running()

    def is_running(self) -> bool:
        """Whether it serves."""
        return self._process.is_running()

    def counters(self) -> ForwarderCounters | None:
        """What it relayed and dropped; None where none serves. Raises ApplyError."""
        try:
            return parse_counters(self._process.ask(ANSWER_TIMEOUT, most=_ANSWER_BYTES))
        except (FileNotFoundError, ConnectionError):
            return None
        except OSError as error:
            raise ApplyError(f"Asking {self._process.socket}: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ApplyError(
                f"{self._process.socket} answers what is no list of counters: {error!r}"
            ) from None

    def stop(self) -> None:
        """Remove the file, and wait until nobody serves it any more. Raises ApplyError."""
        self._written = None
        self._process.end(STOP_TIMEOUT, terminate=True)
        self._process.forget()


def parse_counters(text: str) -> ForwarderCounters:
    """Read what the forwarder's socket says. Raises ValueError, KeyError, TypeError."""
    document = json.loads(text)
    if document["version"] != 1:
        raise ValueError(f"version {document['version']}, where this release reads 1")
    pairs = []
    for pair in document["pairs"]:
        first, second = (
            SideCounters(
                id=int(side["id"]),
                families=tuple(map(int, side["families"])),
                bytes=int(side["bytes"]),
                packets=int(side["packets"]),
                dropped=int(side["dropped"]),
                is_capped=bool(side.get("capped")),  # a process of an earlier release does not say
            )
            for side in pair["sides"]
        )
        pairs.append((first, second))
    taken = tuple(
        TakenPort(int(each["port"]), int(each["family"]), str(each["reason"])) for each in document["taken"]
    )
    return ForwarderCounters(
        tuple(pairs),
        taken,
        drops={str(name): int(number) for name, number in document["drops"].items()},
        sent={str(name): int(number) for name, number in document["sent"].items()},
    )


def grants_path(run_dir: Path, device: str) -> Path:
    """Where the forwarder's file of a mesh's grants lies; the unit `scope-forwarder@` says the same."""
    return run_dir / "relay" / f"{device}.json"
