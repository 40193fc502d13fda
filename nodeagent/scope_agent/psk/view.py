"""What the rest of the agent may know of a pair's key."""

from __future__ import annotations

from dataclasses import dataclass

from scope.model import Fingerprint, IdentityTrust, PskFailure, Secret


@dataclass(frozen=True, slots=True)
class PskPair:
    """How a pair is keyed. `psk` None: leave what the device has."""

    psk: Secret | None = None
    is_withheld: bool = False  # no traffic before a key is proved
    is_silent: bool = False  # nor a handshake before both devices have one,
    starts: bool = False  # and then it is for this side to start it
    epoch: int = 0  # of the proved key; 0: none
    suite: int = 0  # of its exchange
    confirmed: float = 0.0  # wall clock
    laid: int = 0  # epoch of a key that the device has and no handshake has proved; 0: none
    failed: PskFailure | None = None  # what stands against a key, or a newer one,
    failure: str = ""  # and in words
    trust: IdentityTrust | None = None  # by what the peer's identity is believed; None: it is not
    named: Fingerprint | None = None  # of the peer's identity, as its ScopePeer has it
    pinned: Fingerprint | None = None  # the one that is kept for it

    @property
    def conflict(self) -> bool:
        """Whether another program replaces the key again and again."""
        return self.failed is PskFailure.CONFLICT
