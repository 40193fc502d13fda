"""The libraries that keys are made by: known answers, each other's counterpart, and refused when they err."""

from __future__ import annotations

import importlib.resources
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM1024PrivateKey
from scope_agent.psk.choice import KeyChoice, parse_choice
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.exchange import Parties, make_answer, make_offer, take_answer
from scope_agent.psk.identity import KeyMaker, make_hybrid_identity
from scope_agent.psk.liboqs_provider import LiboqsProvider
from scope_agent.psk.provider import (
    ED448_SIGNATURE_BYTES,
    SUITES,
    Provider,
    ProviderError,
    Suite,
    self_test,
)
from scope_agent.psk.shell.making import load_liboqs, make_maker

from scope.model import ConfigError, PublicKey, Secret
from tests import mlkem_reference
from tests.mlkem_reference import LIBRARY, PARAMETERS

CRYPTOGRAPHY = CryptographyProvider()
LIBOQS = LiboqsProvider(LIBRARY)
KNOWN = importlib.resources.files("cryptography_vectors").joinpath("asymmetric")
ROOT = Path(__file__).parents[2]

each_suite = pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: f"suite {suite.number}")
each_provider = pytest.mark.parametrize("provider", [CRYPTOGRAPHY, LIBOQS], ids=["cryptography", "liboqs"])


def installed_liboqs() -> list[LiboqsProvider]:
    """The real liboqs, on machines that have one: no package registry offers it built."""
    try:
        return [LiboqsProvider(load_liboqs())]
    except ConfigError:
        return []


PAIRS = [(CRYPTOGRAPHY, LIBOQS), (LIBOQS, CRYPTOGRAPHY)]
for real in installed_liboqs():
    PAIRS += [(CRYPTOGRAPHY, real), (real, CRYPTOGRAPHY)]


def _answers(file: str, count: int, last: str) -> Iterator[dict[str, str]]:
    """The first records of a file of known answers; `last` is the name of a record's last field."""

    def records() -> Iterator[dict[str, str]]:
        record: dict[str, str] = {}
        with KNOWN.joinpath(file).open(encoding="ascii") as lines:
            for line in lines:
                name, equals, value = line.strip().partition(" =")
                if equals:
                    record[name] = value.strip()
                if name == last:
                    yield record
                    record = {}

    return islice(records(), count)


# --- known answers ------------------------------------------------------------------------------------------


@each_provider
@each_suite
def test_ml_kem_gives_the_known_answers(suite: Suite, provider: Provider) -> None:
    for known in _answers(f"MLKEM/kat_{suite.kem.replace('-', '', 1).replace('-', '_')}.rsp", 5, "ss"):
        seed = Secret(bytes.fromhex(known["d"] + known["z"]))
        assert provider.kem_public(suite, seed).hex() == known["pk"]
        assert provider.decapsulate(suite, seed, bytes.fromhex(known["ct"])).raw.hex() == known["ss"]
        rejected = provider.decapsulate(suite, seed, bytes.fromhex(known["ct_n"]))
        assert rejected.raw.hex() == known["ss_n"], "implicit rejection is a known answer, too"


@each_suite
def test_the_reference_encapsulates_the_known_answers(suite: Suite) -> None:
    for known in _answers(f"MLKEM/kat_{suite.kem.replace('-', '', 1).replace('-', '_')}.rsp", 3, "ss"):
        public, m = bytes.fromhex(known["pk"]), bytes.fromhex(known["msg"])
        secret, ciphertext = mlkem_reference.encapsulate(PARAMETERS[suite.kem], public, m)
        assert (secret.hex(), ciphertext.hex()) == (known["ss"], known["ct"])


@pytest.mark.parametrize(
    ("number", "file", "count"), [(1, "X448/rfc7748.txt", 2), (2, "X25519/rfc7748.txt", 2)]
)
def test_diffie_hellman_gives_the_known_answers(number: int, file: str, count: int) -> None:
    for known in _answers(file, count, "OUTPUT_U"):
        private, public = Secret(bytes.fromhex(known["INPUT_SCALAR"])), bytes.fromhex(known["INPUT_U"])
        assert CRYPTOGRAPHY.dh(SUITES[number], private, public).raw.hex() == known["OUTPUT_U"]


def test_both_signatures_give_the_known_answers() -> None:
    """Ed448 is deterministic; a hedged ML-DSA signs otherwise each time, and verifies the known ones."""
    pure = [known for known in _answers("Ed448/rfc8032.txt", 12, "SIGNATURE") if "CONTEXT" not in known]
    lattice = _answers("MLDSA/kat_MLDSA_65_det_pure.rsp", 3, "ctx")
    assert len(pure) >= 5
    for known in lattice:
        seed, message = Secret(bytes.fromhex(known["xi"])), bytes.fromhex(known["msg"])
        context = bytes.fromhex(known["ctx"])
        signature = bytes.fromhex(known["sm"])[: -len(message)]
        ed448 = Secret(bytes.fromhex(pure[0]["SECRET"]))
        keys = CRYPTOGRAPHY.sign_public(ed448, seed)
        assert keys[1].hex() == known["pk"]
        ours = CRYPTOGRAPHY.sign(ed448, seed, message, context)
        both = ours[:ED448_SIGNATURE_BYTES] + signature
        assert CRYPTOGRAPHY.verify(*keys, signatures=both, message=message, context=context)
        assert not CRYPTOGRAPHY.verify(*keys, signatures=both, message=message, context=context + b"x")
    for known in pure:
        ed448, message = Secret(bytes.fromhex(known["SECRET"])), bytes.fromhex(known["MESSAGE"])
        assert CRYPTOGRAPHY.sign_public(ed448, seed)[0].hex() == known["PUBLIC"]
        signed = CRYPTOGRAPHY.sign(ed448, seed, message, b"")
        assert signed[:ED448_SIGNATURE_BYTES].hex() == known["SIGNATURE"]


# --- what every provider must do ----------------------------------------------------------------------------


@each_provider
@each_suite
def test_a_provider_passes_its_test(suite: Suite, provider: Provider) -> None:
    self_test(provider, suite)


@pytest.mark.parametrize(("d", "e"), PAIRS)
@each_suite
def test_providers_agree_with_each_other_in_both_roles(suite: Suite, d: Provider, e: Provider) -> None:
    random = Random(3)
    identities = [make_hybrid_identity(random.randbytes, CRYPTOGRAPHY) for _ in range(2)]
    keys = [PublicKey(bytes([number] * 32)) for number in (9, 1)]
    fingerprints = [identity.public.fingerprint() for identity in identities]
    of_d = Parties("mesh", keys[0], fingerprints[0], keys[1], fingerprints[1], suite)
    of_e = Parties("mesh", keys[1], fingerprints[1], keys[0], fingerprints[0], suite)
    offered = make_offer(of_d, KeyMaker(identities[0], d, random.randbytes), epoch=1, base=None)
    answer, agreed = make_answer(
        of_e,
        KeyMaker(identities[1], e, random.randbytes),
        offered.offer,
        theirs=identities[0].public,
        base=None,
    )
    taken = take_answer(offered, answer, theirs=identities[1].public, base=None, provider=d)
    assert taken == agreed and agreed.suite == suite.number


LOW_ORDER = {  # RFC 7748, section 6: points that give everybody the same secret
    1: [bytes(56), b"\x01" + bytes(55), b"\xfe" + b"\xff" * 27 + b"\xfe" + b"\xff" * 27],
    2: [
        bytes(32),
        b"\x01" + bytes(31),
        b"\xec" + b"\xff" * 30 + b"\x7f",
        bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
        bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    ],
}


@each_suite
def test_low_order_points_are_refused(suite: Suite) -> None:
    private = Secret(bytes(range(suite.dh_bytes)))
    for point in LOW_ORDER[suite.number]:
        with pytest.raises(ProviderError, match="low order"):
            CRYPTOGRAPHY.dh(suite, private, point)
    with pytest.raises(ProviderError, match="bytes, not"):
        CRYPTOGRAPHY.dh(suite, private, bytes(suite.dh_bytes - 1))


@each_provider
@each_suite
def test_public_keys_with_one_coefficient_out_of_range_are_refused(suite: Suite, provider: Provider) -> None:
    public = bytearray(provider.kem_public(suite, Secret(bytes(64))))
    for at in (0, 3 * 64, len(public) - 32 - 3):
        for changed in ({0: 0x01, 1: 0x0D}, {1: 0x10, 2: 0xD0}):  # 3329 in either half of three bytes
            wrong = bytearray(public)
            if 0 in changed:
                wrong[at], wrong[at + 1] = 0x01, wrong[at + 1] & 0xF0 | 0x0D
            else:
                wrong[at + 1], wrong[at + 2] = wrong[at + 1] & 0x0F | 0x10, 0xD0
            with pytest.raises(ProviderError, match="out of range"):
                provider.encapsulate(suite, bytes(wrong))
    for length in (0, suite.kem_public_bytes - 1, suite.kem_public_bytes + 1):
        with pytest.raises(ProviderError, match="bytes, not"):
            provider.encapsulate(suite, bytes(length))


@each_provider
@each_suite
def test_a_tampered_ciphertext_gives_another_secret_and_a_short_one_none(
    suite: Suite, provider: Provider
) -> None:
    seed = Secret(bytes(range(64)))
    secret, ciphertext = provider.encapsulate(suite, provider.kem_public(suite, seed))
    seen = {secret.raw}
    for at in (0, len(ciphertext) // 2, len(ciphertext) - 1):
        changed = bytearray(ciphertext)
        changed[at] ^= 0x40
        seen.add(provider.decapsulate(suite, seed, bytes(changed)).raw)
    assert len(seen) == 4
    for length in (0, len(ciphertext) - 1, len(ciphertext) + 1):
        with pytest.raises(ProviderError, match="bytes, not"):
            provider.decapsulate(suite, seed, bytes(length))


# --- providers that err -------------------------------------------------------------------------------------


class _Swapped(CryptographyProvider):
    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        secret, ciphertext = super().encapsulate(suite, public)
        return Secret(ciphertext), secret.raw


class _Padding(CryptographyProvider):
    def decapsulate(self, suite: Suite, seed: Secret, ciphertext: bytes) -> Secret:
        return super().decapsulate(suite, seed, ciphertext.ljust(suite.kem_ciphertext_bytes, b"\0"))


class _Unlike(CryptographyProvider):
    def kem_public(self, suite: Suite, seed: Secret) -> bytes:
        return super().kem_public(suite, Secret(bytes(64)))


class _Unchecked(CryptographyProvider):
    def encapsulate(self, suite: Suite, public: bytes) -> tuple[Secret, bytes]:
        kind = MLKEM1024PrivateKey if suite.kem == "ML-KEM-1024" else MLKEM768PrivateKey
        good = kind.from_seed_bytes(bytes(range(64))).public_key().public_bytes_raw()
        return super().encapsulate(suite, public if len(public) != len(good) else good)


class _LowOrder(CryptographyProvider):
    def dh(self, suite: Suite, private: Secret, public: bytes) -> Secret:
        return Secret(bytes(32)) if not any(public) else super().dh(suite, private, public)


class _Lenient(CryptographyProvider):
    def verify(
        self, ed448: bytes, mldsa: bytes, *, signatures: bytes, message: bytes, context: bytes
    ) -> bool:
        return True


class _Absent(CryptographyProvider):
    def dh_public(self, suite: Suite, private: Secret) -> bytes:
        raise ProviderError(f"{suite.dh} is not supported")


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (_Swapped(), "bytes, not"),
        (_Padding(), "the check of ciphertexts"),
        (_Unlike(), "the public key"),
        (_Unchecked(), "the check of public keys"),
        (_LowOrder(), "low-order points"),
        (_Lenient(), "a false signature"),
        (_Absent(), "is not supported"),
    ],
)
@each_suite
def test_a_provider_with_wrong_answers_is_refused(
    suite: Suite, provider: CryptographyProvider, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"post-quantum keys cannot be made here.*{reason}"):
        self_test(provider, suite)


def _failing(*_: Any) -> int:
    return -1


def _idle(*_: Any) -> int:
    return 0  # and wrote nothing


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (replace(LIBRARY, new=lambda _: None), "built without ML-KEM"),
        (replace(LIBRARY, make_keys=_failing), "refused what it was given"),
        (replace(LIBRARY, encapsulate=_failing), "refused what it was given"),
        (replace(LIBRARY, decapsulate=_failing), "refused what it was given"),
        (replace(LIBRARY, make_keys=_idle), "the public key"),
        (replace(LIBRARY, encapsulate=_idle), "the encapsulation"),
        (replace(LIBRARY, decapsulate=_idle), "the encapsulation"),
    ],
)
@each_suite
def test_a_liboqs_that_errs_is_refused(suite: Suite, library: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be made here.*{reason}"):
        self_test(LiboqsProvider(library), suite)


# --- the configuration --------------------------------------------------------------------------------------


def _make(choice: KeyChoice) -> KeyMaker:
    random = Random(5)
    return make_maker(
        choice,
        identity=lambda provider: make_hybrid_identity(random.randbytes, provider),
        random_bytes=random.randbytes,
    )


def test_what_is_chosen_is_what_keys_are_made_by() -> None:
    assert parse_choice(suite="1", provider="cryptography") == KeyChoice()
    assert parse_choice(suite="2", provider="liboqs") == KeyChoice(2, "liboqs")
    assert parse_choice(suite="1", provider="liboqs:/a/b.so") == KeyChoice(1, "liboqs", "/a/b.so")
    for number in SUITES:
        maker = _make(KeyChoice(number))
        assert maker.suite is SUITES[number] and isinstance(maker.provider, CryptographyProvider)


@pytest.mark.parametrize(
    ("suite", "provider", "option"),
    [
        ("3", "cryptography", "--key-suite"),
        ("", "cryptography", "--key-suite"),
        ("1", "oqs", "--key-provider"),
        ("1", "liboqs:", "--key-provider"),
        ("1", "liboqs:liboqs.so", "--key-provider"),
        ("1", "cryptography:/x", "--key-provider"),
    ],
)
def test_a_choice_that_is_none_names_the_option(suite: str, provider: str, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        parse_choice(suite=suite, provider=provider)


def test_a_liboqs_that_is_not_there_or_another_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no liboqs at /nowhere/liboqs.so.*--key-provider"):
        _make(KeyChoice(1, "liboqs", "/nowhere/liboqs.so"))
    with pytest.raises(ConfigError, match="where the machine's loader looks"):
        load_liboqs(names=("libscope-is-no-library.so.1",))
    with pytest.raises(ConfigError, match=r"older than 0\.13"):
        load_liboqs(names=("libc.so.6",))


def test_a_liboqs_that_is_missing_starts_no_program_asks_no_network_and_ends_nothing(tmp_path: Path) -> None:
    """With the Python package of liboqs installed, which would do all three when it is imported."""
    (tmp_path / "oqs").mkdir()
    (tmp_path / "oqs" / "__init__.py").write_text("raise SystemExit('liboqs was imported')\n")
    code = """
import sys
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.")
def audit(event, arguments):
    if event.startswith(FORBIDDEN):
        print("did", event, flush=True)
sys.addaudithook(audit)
from scope.model import ConfigError
from scope_agent.psk.choice import KeyChoice
from scope_agent.psk.shell.making import load_liboqs
try:
    load_liboqs(names=("libscope-is-no-library.so.1",))
except ConfigError as error:
    print("refused:", error)
print("oqs" in sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    first, second = answer.stdout.splitlines()
    assert answer.returncode == 0, answer.stderr
    assert first.startswith("refused: post-quantum keys cannot be made here: there is no liboqs")
    assert second == "False"
