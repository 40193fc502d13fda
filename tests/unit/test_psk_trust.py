"""By what a peer's identity is believed: kept, told, certified, replaced; else the old key stays."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.identity import HybridIdentity, Succession, TrustPolicy, make_hybrid_identity
from scope_agent.psk.messages import Identity, Succeeded, decode, encode
from scope_agent.psk.parts import Joining, cut
from scope_agent.psk.trust import (
    MAX_SUCCESSIONS,
    certify,
    is_certified,
    is_signed_by_old,
    judge,
    succeed,
)

from scope.model import Fingerprint, IdentityTrust, PostQuantumMode
from tests.unit.psk_duo import Duo, Side

A, B, C = (Fingerprint(bytes([n] * 32)) for n in range(3))


def _agreed(seed: int) -> Duo:
    duo = Duo(seed)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    return duo


def _swap(side: Side) -> None:
    """Another machine takes the peer's place: it has its WireGuard key and disk, and another identity."""
    side.crash()
    side.identity = make_hybrid_identity(Random(99).randbytes, side.duo.provider)
    side.start()
    side.other.configure()


def _tell(side: Side, fingerprint: Fingerprint) -> None:
    assert side.room is not None
    side.room.trust(side.other.key, fingerprint, side.duo.now)
    side.perform()


def test_the_first_fingerprint_that_the_registry_names_is_kept_from_the_first_key_on() -> None:
    duo = Duo(1)
    duo.start()
    duo.run(0.32)  # reached, and nothing agreed yet
    assert duo.d.view.trust is IdentityTrust.REGISTRY and duo.d.view.pinned is None
    duo.until(duo.is_agreed, within=200.0)
    assert duo.d.view.pinned == duo.e.identity.public.fingerprint()


@pytest.mark.parametrize("victim", [0, 1])
def test_an_identity_that_was_swapped_is_refused_until_it_is_trusted(victim: int) -> None:
    duo = _agreed(2 + victim)
    swapped, other = duo.sides[victim], duo.sides[1 - victim]
    old = other.device_psk
    _swap(swapped)
    duo.until(lambda: "another one than before" in other.view.failure, within=5.0)
    assert f"scopectl identity trust {swapped.name}" in other.view.failure
    duo.d.rotate()
    duo.run(600.0)
    assert other.device_psk == swapped.device_psk == old and duo.deaths == []
    _tell(other, swapped.identity.public.fingerprint())
    duo.until(lambda: duo.is_agreed(2), within=300.0)
    assert other.view.trust is IdentityTrust.PINNED and other.device_psk != old and duo.deaths == []


def test_pinned_makes_no_key_before_both_sides_were_told_and_then_makes_one() -> None:
    duo = Duo(4)
    for side in duo.sides:
        side.trust = TrustPolicy(IdentityTrust.PINNED)
    duo.start()
    duo.run(300.0)
    assert duo.d.view.epoch == 0 and "is not trusted yet" in duo.d.view.failure
    _tell(duo.d, duo.e.identity.public.fingerprint())
    duo.run(300.0)
    assert duo.d.view.epoch == 0
    _tell(duo.e, duo.d.identity.public.fingerprint())
    duo.until(duo.is_agreed, within=200.0)
    assert duo.d.view.trust is IdentityTrust.PINNED


def test_where_the_registry_names_another_than_the_one_told_nobody_is_believed() -> None:
    duo = Duo(5, mode=PostQuantumMode.REQUIRED)
    for side in duo.sides:
        side.trust = TrustPolicy(IdentityTrust.PINNED)
    duo.start()
    _tell(duo.d, C)
    _tell(duo.e, duo.d.identity.public.fingerprint())
    duo.run(300.0)
    assert duo.d.view.epoch == 0 and duo.d.view.is_withheld and duo.d.view.trust is None


def test_what_was_told_is_kept_over_a_restart() -> None:
    duo = Duo(6)
    for side in duo.sides:
        side.trust = TrustPolicy(IdentityTrust.PINNED)
    duo.start()
    for side in duo.sides:
        _tell(side, side.other.identity.public.fingerprint())
    duo.until(duo.is_agreed, within=300.0)
    duo.d.crash()
    duo.d.start()
    duo.d.rotate()
    duo.until(lambda: duo.is_agreed(2), within=1000.0)


@pytest.mark.parametrize("who", [0, 1])
def test_a_rotated_identity_is_followed_at_once_and_the_key_made_anew(who: int) -> None:
    """Also while the registry still names the old one: what the old one signed is enough."""
    duo = _agreed(7 + who)
    side = duo.sides[who]
    old = side.identity.public.fingerprint()
    side.rotate_identity()
    duo.until(lambda: duo.is_agreed(2), within=200.0)
    assert duo.deaths == [] and duo.downtime < 60.0
    assert side.other.disk.pinned == side.identity.public.fingerprint() != old
    side.named = None
    side.other.configure()  # now it names the new one
    side.rotate()
    duo.until(lambda: duo.is_agreed(3), within=1000.0)


@pytest.mark.parametrize("who", [0, 1])
def test_an_agent_that_died_before_it_told_of_its_new_identity_is_followed_when_it_is_back(who: int) -> None:
    duo = _agreed(30 + who)
    side = duo.sides[who]
    side.crash()
    side.named = side.identity.public.fingerprint()  # the registry has not heard either
    side.identity = succeed(side.identity, duo.random.randbytes, duo.provider)
    side.start()
    duo.run(5.0)
    side.rotate()
    duo.until(lambda: duo.is_agreed(2), within=400.0)
    assert side.other.disk.pinned == side.identity.public.fingerprint() and duo.deaths == []


def test_whoever_was_away_for_several_rotations_follows_them_one_by_one() -> None:
    duo = _agreed(9)
    duo.is_cut = True
    duo.run(1.0)
    for _ in range(3):
        duo.e.rotate_identity()
    duo.e.named = None
    duo.d.configure()
    duo.run(20.0)
    assert "another one than before" in duo.d.view.failure
    duo.is_cut = False
    duo.until(lambda: duo.d.disk.pinned == duo.e.identity.public.fingerprint(), within=60.0)
    duo.until(lambda: duo.is_agreed(2), within=400.0)


@pytest.mark.parametrize("seed", [40, 44, 45])
def test_two_sides_that_both_changed_while_apart_lead_each_other_on(seed: int) -> None:
    """They ask at the same moments: to answer must not keep either from hearing the answer."""
    duo = _agreed(seed)
    duo.is_cut = True
    duo.run(1.0)
    for side in duo.sides:
        side.rotate_identity()
    duo.d.named = duo.e.named = None
    for side in duo.sides:
        side.configure()
    duo.is_cut = False
    duo.until(
        lambda: all(side.disk.pinned == side.other.identity.public.fingerprint() for side in duo.sides),
        within=60.0,
    )
    duo.until(lambda: duo.is_agreed(2), within=400.0)


def test_an_identity_rotated_amid_a_rotation_is_followed_by_another_key() -> None:
    for seconds in (0.0, 0.05, 0.15, 1.0, 100.0):
        for who in (0, 1):
            duo = _agreed(20 + int(seconds * 10) + who)
            duo.d.rotate()
            duo.run(seconds)
            side = duo.sides[who]
            side.rotate_identity()
            fingerprint = side.identity.public.fingerprint()
            duo.until(
                lambda duo=duo, side=side, fingerprint=fingerprint: (  # type: ignore[misc]
                    duo.is_agreed(2) and side.other.disk.pinned == fingerprint
                ),
                within=400.0,
            )
            assert duo.deaths == [], duo.describe()


def test_a_succession_that_the_old_identity_did_not_sign_moves_nothing() -> None:
    duo = _agreed(10)
    thief = make_hybrid_identity(Random(5).randbytes, duo.provider)
    genuine = succeed(duo.e.identity, duo.random.randbytes, duo.provider).successions[-1]
    forged = replace(genuine, new=thief.public.fingerprint())
    assert duo.d.room is not None
    before = duo.d.room.dropped
    _say(duo.d, Succeeded(forged))
    assert duo.d.room.dropped == before + 1
    assert duo.d.view.pinned == duo.e.identity.public.fingerprint()


def test_a_succession_from_another_identity_than_the_kept_one_moves_nothing() -> None:
    duo = _agreed(11)
    stranger = succeed(
        make_hybrid_identity(Random(5).randbytes, duo.provider), Random(6).randbytes, duo.provider
    )
    _say(duo.d, Succeeded(stranger.successions[-1]))
    assert duo.d.view.pinned == duo.e.identity.public.fingerprint()


def _say(side: Side, message: Succeeded) -> None:
    """As the other side would."""
    for part in cut(123456, encode(message)):
        side.receive(part)


def _certified_duo(seed: int) -> tuple[Duo, HybridIdentity]:
    duo = Duo(seed)
    ca = make_hybrid_identity(Random(1000).randbytes, duo.provider)
    for side in duo.sides:
        side.trust = TrustPolicy(IdentityTrust.CA, ca.public)
    return duo, ca


def _certify(side: Side, ca: HybridIdentity, name: str) -> None:
    certificate = certify(ca, name, side.identity.public.fingerprint(), side.duo.provider)
    side.identity = replace(side.identity, certificate=certificate)


def test_a_ca_is_believed_about_those_whom_it_certified() -> None:
    duo, ca = _certified_duo(12)
    for side in duo.sides:
        _certify(side, ca, side.name)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    assert duo.d.view.trust is duo.e.view.trust is IdentityTrust.CA


@pytest.mark.parametrize("name", ["", "mesh.external.somebody-else"])
def test_who_was_not_certified_under_its_own_name_gets_no_key_until_it_is(name: str) -> None:
    duo, ca = _certified_duo(13)
    _certify(duo.d, ca, duo.d.name)
    if name:
        _certify(duo.e, ca, name)
    duo.start()
    duo.run(300.0)
    assert duo.d.view.epoch == 0 and duo.d.view.trust is None
    assert "certificate" in duo.d.view.failure
    _certify(duo.e, ca, duo.e.name)
    assert duo.e.room is not None
    duo.e.room.renew(duo.e.identity, duo.now)
    duo.e.perform()
    duo.until(duo.is_agreed, within=900.0)


def test_under_a_ca_a_rotated_identity_needs_a_certificate_and_no_statement_is_enough() -> None:
    duo, ca = _certified_duo(14)
    for side in duo.sides:
        _certify(side, ca, side.name)
    duo.start()
    duo.until(duo.is_agreed, within=200.0)
    duo.e.rotate_identity()
    duo.e.named = None
    duo.d.configure()
    duo.run(600.0)
    assert duo.d.view.epoch == 1 and "no certificate" in duo.d.view.failure and duo.deaths == []
    _certify(duo.e, ca, duo.e.name)
    assert duo.e.room is not None
    duo.e.room.renew(duo.e.identity, duo.now)
    duo.e.perform()
    duo.until(lambda: duo.is_agreed(2), within=1000.0)


@pytest.mark.parametrize(
    ("mode", "named", "pinned", "former", "is_told", "expected", "by"),
    [
        (IdentityTrust.REGISTRY, None, A, None, True, None, None),
        (IdentityTrust.REGISTRY, A, None, None, False, A, IdentityTrust.REGISTRY),
        (IdentityTrust.REGISTRY, A, A, None, False, A, IdentityTrust.REGISTRY),
        (IdentityTrust.REGISTRY, A, A, None, True, A, IdentityTrust.PINNED),
        (IdentityTrust.REGISTRY, B, A, B, False, A, IdentityTrust.REGISTRY),
        (IdentityTrust.REGISTRY, C, A, B, False, None, None),
        (IdentityTrust.PINNED, A, None, None, False, None, None),
        (IdentityTrust.PINNED, A, A, None, False, None, None),
        (IdentityTrust.PINNED, A, A, None, True, A, IdentityTrust.PINNED),
        (IdentityTrust.PINNED, B, A, B, True, A, IdentityTrust.PINNED),
        (IdentityTrust.PINNED, B, A, None, True, None, None),
        (IdentityTrust.CA, B, A, None, True, B, IdentityTrust.CA),
    ],
)
def test_each_trust_by_what_is_named_kept_and_told(
    mode: IdentityTrust,
    named: Fingerprint | None,
    pinned: Fingerprint | None,
    former: Fingerprint | None,
    is_told: bool,
    expected: Fingerprint | None,
    by: IdentityTrust | None,
) -> None:
    ca = (
        make_hybrid_identity(Random(1).randbytes, Duo(1).provider).public
        if mode is IdentityTrust.CA
        else None
    )
    judged = judge(
        TrustPolicy(mode, ca), name="nas", named=named, pinned=pinned, former=former, is_told=is_told
    )
    assert (judged.expected, judged.by) == (expected, by)
    assert bool(judged.why) == (expected is None)


def test_trust_in_a_ca_without_one_is_refused_and_so_is_a_ca_of_no_use() -> None:
    ca = make_hybrid_identity(Random(1).randbytes, Duo(1).provider).public
    with pytest.raises(ValueError, match="needs the CA"):
        TrustPolicy(IdentityTrust.CA)
    with pytest.raises(ValueError, match="needs the CA"):
        TrustPolicy(IdentityTrust.PINNED, ca)


def test_signed_statements_hold_with_real_keys_and_for_nothing_else() -> None:
    provider, random = CryptographyProvider(), Random(3)
    ca, own = (make_hybrid_identity(random.randbytes, provider) for _ in range(2))
    fingerprint = own.public.fingerprint()
    certificate = certify(ca, "home.nas", fingerprint, provider)
    for by, name, of, holds in (
        (ca.public, "home.nas", fingerprint, True),
        (own.public, "home.nas", fingerprint, False),
        (ca.public, "home.nas2", fingerprint, False),
        (ca.public, "home.nas", A, False),
    ):
        assert is_certified(certificate, by=by, name=name, fingerprint=of, provider=provider) is holds
    assert not is_certified(b"", by=ca.public, name="home.nas", fingerprint=fingerprint, provider=provider)

    new = succeed(own, random.randbytes, provider)
    (succession,) = new.successions
    assert succession.new == new.public.fingerprint() and is_signed_by_old(succession, provider)
    assert not is_signed_by_old(replace(succession, new=A), provider)
    assert not is_signed_by_old(replace(succession, old=ca.public), provider)
    assert not is_signed_by_old(Succession(own.public, succession.new, certificate), provider)
    half = bytearray(succession.signatures)
    half[0] ^= 1  # one of the two signatures alone does not do
    assert not is_signed_by_old(replace(succession, signatures=bytes(half)), provider)


def test_no_more_than_the_last_successions_are_kept_and_no_certificate_of_another_key() -> None:
    provider = Duo(1).provider
    identity = replace(make_hybrid_identity(Random(1).randbytes, provider), certificate=bytes(3423))
    for _ in range(MAX_SUCCESSIONS + 2):
        before, identity = identity, succeed(identity, Random(len(identity.successions)).randbytes, provider)
    assert len(identity.successions) == MAX_SUCCESSIONS and identity.certificate == b""
    assert identity.successions[-1].old == before.public


def test_the_longest_messages_of_identities_fit_and_come_back_as_they_were() -> None:
    provider = Duo(1).provider
    identity = succeed(make_hybrid_identity(Random(1).randbytes, provider), Random(2).randbytes, provider)
    for message in (
        Identity(identity.public, bytes(3423)),
        Identity(identity.public),
        Succeeded(identity.successions[-1]),
    ):
        joining = Joining()
        joined = [joining.add(part) for part in cut(1, encode(message))][-1]
        assert joined is not None and decode(joined) == message
