"""`scopectl rotate`: new post-quantum keys, followed until they are in use, or until a handshake proved them.

The agent is asked once, and then for its status. A pair is *laid in* when the device has its new key:
WireGuard takes it up at its next rekey, and that handshake *confirms* it. What the agent says against a pair
ends the wait for that pair; the agent itself goes on trying.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from scope.ctl.errors import CommandError
from scope.ctl.local import AgentStatus, PeerView

ASK_EVERY = 1.0
LAID_WITHIN = 430.0  # the agent gives a pair up that finds no young session for 400 s
CONFIRMED_WITHIN = (
    160.0  # of being laid in: it is taken back where no handshake came until a session is 145 s old
)


class Stage(enum.Enum):
    """How far a pair's new key is."""

    AWAITED = enum.auto()
    LAID = enum.auto()
    CONFIRMED = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far all pairs are, by the peers' names; `failed` has the reasons."""

    awaited: tuple[str, ...] = ()
    laid: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()

    def is_over(self, *, confirmed: bool) -> bool:
        """Whether nothing is waited for any more: being laid in or, with `confirmed`, its proof."""
        return not self.awaited and not (confirmed and self.laid)

    def text(self) -> str:
        """One line."""
        counts = (
            (len(self.awaited), "under way"),
            (len(self.laid), "laid in"),
            (len(self.confirmed), "confirmed"),
            (len(self.failed), "failed"),
        )
        return ", ".join(f"{count} {word}" for count, word in counts if count)


def choose(status: AgentStatus, name: str) -> dict[str, int]:
    """The proved epoch of each peer to be keyed anew, "" for all that are linked. Raises CommandError."""
    linked = {peer.name: peer.psk_epoch or 0 for peer in status.peers if peer.path in ("Direct", "Relayed")}
    if not name:
        if not linked:
            raise CommandError("no peer is linked now, so there is nobody to agree on a key with")
        return linked
    peer = next((peer for peer in status.peers if peer.name == name), None)
    if peer is None:
        raise CommandError(f"no peer {name!r} in the mesh: `scopectl status` names them")
    if name not in linked:
        why = (
            f"it is reached by {peer.hub}, whose link has the key"
            if peer.path == "Routed"
            else "no path to it"
        )
        raise CommandError(f"{name}: {why}")
    return {name: linked[name]}


def progress(status: AgentStatus, before: dict[str, int]) -> Progress:
    """How far the pairs are that had these epochs before."""
    peers = {peer.name: peer for peer in status.peers}
    stages = {name: _stage(peers.get(name), epoch) for name, epoch in before.items()}

    def at(stage: Stage) -> tuple[str, ...]:
        return tuple(name for name, (found, _) in stages.items() if found is stage)

    return Progress(
        at(Stage.AWAITED),
        at(Stage.LAID),
        at(Stage.CONFIRMED),
        tuple((name, why) for name, (found, why) in stages.items() if found is Stage.FAILED),
    )


def _stage(peer: PeerView | None, before: int) -> tuple[Stage, str]:
    if peer is None:
        return Stage.FAILED, "it left the mesh"
    if (peer.psk_epoch or 0) > before:
        return Stage.CONFIRMED, ""
    if (peer.psk_laid or 0) > before:
        return Stage.LAID, ""
    if peer.psk_reason:
        return Stage.FAILED, peer.psk_note
    return Stage.AWAITED, ""


def follow(
    look: Callable[[], AgentStatus],
    before: dict[str, int],
    *,
    confirmed: bool,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[Progress]:
    """Each change of the progress, the last one included, until it is over or takes too long."""
    end = clock() + LAID_WITHIN
    last: Progress | None = None
    while True:
        found = progress(look(), before)
        if last is None or found != last:
            if last is not None and found.laid != last.laid:
                end = max(end, clock() + CONFIRMED_WITHIN)
            last = found
            yield found
        if found.is_over(confirmed=confirmed) or clock() >= end:
            return
        sleep(ASK_EVERY)


def outcome(last: Progress) -> Iterable[str]:
    """What is to be said in the end, a line each."""
    done = len(last.laid) + len(last.confirmed)
    if last.laid:
        yield f"{done} laid in; confirmed at the next rekey, 2 minutes at most"
    elif done:
        yield f"{done} confirmed"
    for name, why in last.failed:
        yield f"{name}: {why}; the agent goes on trying"
    for name in last.awaited:
        yield f"{name}: nothing came of it in {LAID_WITHIN:.0f} s; `scopectl status` says how it stands"
