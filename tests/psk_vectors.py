"""Whole exchanges of a post-quantum key with fixed randomness, for whoever writes another implementation.

`python -m tests.psk_vectors` writes docs/vectors/psk-exchange.json anew: needed when the exchange itself
changes, which is another suite then. ML-DSA signatures are hedged, so they differ each time; all else comes
out as it was.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.exchange import Offered, Parties, control, make_answer, make_offer
from scope_agent.psk.identity import HybridIdentity, KeyMaker, hybrid_identity
from scope_agent.psk.messages import NONCE_BYTES, Answer, What, encode
from scope_agent.psk.provider import ED448_BYTES, KEM_SEED_BYTES, MLDSA_SEED_BYTES, SUITES, Suite
from scope_agent.psk.slots import Keys

from scope.model import PublicKey, Secret
from tests.mlkem_reference import PARAMETERS, encapsulate

FILE = Path(__file__).parents[1] / "docs/vectors/psk-exchange.json"
MESH = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
PROVIDER = CryptographyProvider()
BY_DECAPSULATOR = frozenset({What.COMMIT, What.ACTIVATE, What.ABORT, What.CONFIRM})


def draw(name: str, count: int) -> bytes:
    """The randomness of that name."""
    return hashlib.shake_256(b"scope vectors " + name.encode()).digest(count)


class FixedProvider(CryptographyProvider):
    """Encapsulates with given randomness."""

    def __init__(self, m: bytes) -> None:
        self._m = m

    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        secret, ciphertext = encapsulate(PARAMETERS[suite.kem], public, self._m)
        return Secret(secret), ciphertext


@dataclass(frozen=True, slots=True)
class Person:
    """One side: what it is known by."""

    key: PublicKey
    identity: HybridIdentity


def person(side: str, ed448: bytes, mldsa: bytes) -> Person:
    key = draw(f"{side} wireguard", 31)
    high = b"\xd0" if side == "D" else b"\x0e"  # D has the larger key
    return Person(PublicKey(high + key), hybrid_identity(Secret(ed448), Secret(mldsa), PROVIDER))


def exchange(
    suite: Suite, d: Person, e: Person, *, epoch: int, base: Keys | None, random: dict[str, bytes]
) -> tuple[Offered, Answer, Keys]:
    """One exchange with the randomness of these names."""
    d_print, e_print = d.identity.public.fingerprint(), e.identity.public.fingerprint()
    offered = make_offer(
        Parties(MESH, d.key, d_print, e.key, e_print, suite),
        KeyMaker(d.identity, PROVIDER, _in_turn(random["kemSeed"], random["dhPrivateD"], random["nonce"])),
        epoch=epoch,
        base=base,
    )
    answer, keys = make_answer(
        Parties(MESH, e.key, e_print, d.key, d_print, suite),
        KeyMaker(e.identity, FixedProvider(random["kemM"]), _in_turn(random["dhPrivateE"])),
        offered.offer,
        theirs=d.identity.public,
        base=base,
    )
    return offered, answer, keys


def randomness(suite: Suite, epoch: int) -> dict[str, bytes]:
    sizes = {
        "kemSeed": KEM_SEED_BYTES,
        "dhPrivateD": suite.dh_bytes,
        "nonce": NONCE_BYTES,
        "kemM": 32,
        "dhPrivateE": suite.dh_bytes,
    }
    return {name: draw(f"{suite.number} {epoch} {name}", size) for name, size in sizes.items()}


def steps(offered: Offered, answer: Answer, base: Keys | None) -> dict[str, bytes]:
    """What lies between messages and keys, by the description of the exchange, written out once more."""
    offer, suite = offered.offer, SUITES[offered.offer.header.suite]
    kem = PROVIDER.decapsulate(suite, offered.kem_seed, answer.ciphertext)
    dh = PROVIDER.dh(suite, offered.dh_private, answer.dh_public)
    parts = (offer.body(), answer.body())
    transcript = hashlib.sha3_512(b"".join(len(p).to_bytes(4, "big") + p for p in parts)).digest()
    label = b"scope psk " + str(suite.number).encode()
    material = kem.raw + dh.raw + answer.ciphertext + answer.dh_public
    material += offer.kem_public + offer.dh_public + label
    salt = base.chain.raw if base is not None else bytes(32)
    return {
        "kemSecret": kem.raw,
        "dhSecret": dh.raw,
        "transcriptHash": transcript,
        "prk": hmac.new(salt, material, "sha3_256").digest(),
    }


def signed(context: bytes, body: bytes) -> bytes:
    """What both signatures of a message are over."""
    parts = (b"scope psk signature 1", context)
    return b"".join(len(p).to_bytes(4, "big") + p for p in parts) + hashlib.sha3_512(body).digest()


def words(keys: Keys) -> dict[str, bytes]:
    return {what.name: encode(control(what, keys, by_decapsulator=what in BY_DECAPSULATOR)) for what in What}


def keys_of(keys: Keys) -> dict[str, bytes]:
    return {
        "id": keys.id,
        "psk": keys.psk.raw,
        "chain": keys.chain.raw,
        "confirmD": keys.confirm_d.raw,
        "confirmE": keys.confirm_e.raw,
    }


def _in_turn(*values: bytes) -> Callable[[int], bytes]:
    waiting = list(values)

    def take(count: int) -> bytes:
        value = waiting.pop(0)
        assert len(value) == count
        return value

    return take


def _hex(values: dict[str, bytes]) -> dict[str, str]:
    return {name: value.hex() for name, value in values.items()}


def _document() -> dict[str, Any]:
    sides, shown = {}, {}
    for side in ("D", "E"):
        seeds = draw(f"{side} ed448", ED448_BYTES), draw(f"{side} mldsa", MLDSA_SEED_BYTES)
        sides[side] = person(side, *seeds)
        public = sides[side].identity.public
        shown[side] = _hex(
            {
                "wireguardKey": sides[side].key.raw,
                "ed448Seed": seeds[0],
                "mldsaSeed": seeds[1],
                "ed448Public": public.ed448,
                "mldsaPublic": public.mldsa,
                "fingerprint": public.fingerprint().raw,
            }
        )
    exchanges = []
    for suite in SUITES.values():
        base = None
        for epoch in (1, 2):
            random = randomness(suite, epoch)
            offered, answer, keys = exchange(
                suite, sides["D"], sides["E"], epoch=epoch, base=base, random=random
            )
            exchanges.append(
                {
                    "suite": suite.number,
                    "epoch": epoch,
                    "base": _hex({"id": base.id, "chain": base.chain.raw}) if base is not None else None,
                    "random": _hex(random),
                    "offer": encode(offered.offer).hex(),
                    "answer": encode(answer).hex(),
                    "steps": _hex(steps(offered, answer, base)),
                    "keys": _hex(keys_of(keys)),
                    "words": _hex(words(keys)),
                }
            )
            base = keys
    return {"mesh": MESH, "sides": shown, "exchanges": exchanges}


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(_document(), indent=1) + "\n", encoding="utf-8")
