"""The sealed channel: who is believed, when, and what everyone else gets."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope import channel as channel_module
from scope.channel import (
    REPLAY_WINDOW,
    Channel,
    Confirmed,
    Hello,
    NotACorrespondent,
    Received,
    Replayed,
    key_id,
)
from scope.model import Endpoint, PublicKey, Secret
from scope.wire import (
    MIN_DATAGRAM,
    CallMeMaybe,
    DatagramType,
    Message,
    Ping,
    Pong,
    UnknownMessage,
    WireError,
    unpack_datagram,
)
from tests.fuzz import probe

CORPUS = Path(probe.__file__).parent / "corpus"
PING = Ping(transaction=7, has_session=False, received=0)
PONG = Pong(transaction=7, observed=Endpoint.parse("192.0.2.1:51820"), has_session=True, received=1)


def channel(side: int, boot: int = 0) -> Channel:
    return Channel(secret=Secret(bytes((side,)) * 32), boot_id=bytes((side, boot)) * 8)


def introduced(*channels: Channel) -> None:
    keys = frozenset(one.public_key for one in channels)
    for one in channels:
        one.set_correspondents(keys)


def strangers() -> tuple[Channel, Channel]:
    """Two channels that know each other's key and have not spoken."""
    a, b = channel(1), channel(2)
    introduced(a, b)
    return a, b


def friends() -> tuple[Channel, Channel]:
    """Two channels in one association."""
    a, b = strangers()
    greet(a, b)
    return a, b


def greet(a: Channel, b: Channel) -> None:
    """`a` speaks first, until both have confirmed the other."""
    hello = b.open(a.seal(b.public_key, PING))
    assert isinstance(hello, Hello)
    assert a.open(hello.cookie) == Confirmed(b.public_key)
    assert isinstance(b.open(a.seal(b.public_key, PING)), Received)


def message_of(opened: object) -> object:
    assert isinstance(opened, Received)
    return opened.message


def kind(data: bytes) -> DatagramType:
    return unpack_datagram(data).type


def test_the_first_datagram_earns_a_cookie_and_nothing_else() -> None:
    a, b = strangers()
    first = a.seal(b.public_key, PING)
    opened = b.open(first)
    assert kind(first) is DatagramType.INITIAL
    assert isinstance(opened, Hello)
    assert opened.sender == a.public_key
    assert kind(opened.cookie) is DatagramType.COOKIE
    assert not b.is_confirmed(a.public_key)


def test_a_message_is_believed_two_datagrams_after_the_first() -> None:
    a, b = strangers()
    hello = b.open(a.seal(b.public_key, PING))
    assert isinstance(hello, Hello)
    assert a.open(hello.cookie) == Confirmed(b.public_key)
    assert a.is_confirmed(b.public_key)
    ping = a.seal(b.public_key, PING)
    assert kind(ping) is DatagramType.SEALED
    received = b.open(ping)
    assert isinstance(received, Received)
    assert (received.sender, received.message) == (a.public_key, PING)
    assert b.is_confirmed(a.public_key)
    assert message_of(a.open(b.seal(a.public_key, PONG))) == PONG


def test_two_that_speak_at_once_end_in_one_association() -> None:
    a, b = strangers()
    from_a, from_b = a.seal(b.public_key, PING), b.seal(a.public_key, PING)
    to_a, to_b = b.open(from_a), a.open(from_b)
    assert isinstance(to_a, Hello)
    assert isinstance(to_b, Hello)
    assert a.open(to_a.cookie) == Confirmed(b.public_key)
    assert b.open(to_b.cookie) == Confirmed(a.public_key)
    assert message_of(a.open(b.seal(a.public_key, PING))) == PING
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_a_cookie_is_never_larger_than_what_earned_it() -> None:
    a, b = strangers()
    smallest = a.seal(b.public_key, CallMeMaybe(()))
    hello = b.open(smallest)
    assert isinstance(hello, Hello)
    assert len(hello.cookie) == MIN_DATAGRAM < len(smallest)


def test_only_the_first_of_several_cookies_confirms() -> None:
    a, b = strangers()
    cookies = []
    for _ in range(3):  # one ping for each candidate
        hello = b.open(a.seal(b.public_key, PING))
        assert isinstance(hello, Hello)
        cookies.append(hello.cookie)
    assert a.open(cookies[1]) == Confirmed(b.public_key)
    for cookie in cookies:
        with pytest.raises(Replayed):
            a.open(cookie)


def test_a_lost_cookie_is_made_good_by_the_next_one() -> None:
    a, b = strangers()
    hello = a.open(b.seal(a.public_key, PING))
    assert isinstance(hello, Hello)
    first = a.seal(b.public_key, PING)
    assert b.open(hello.cookie) == Confirmed(a.public_key)
    again = b.open(first)  # b is confirmed already, and tells a which association stands
    assert isinstance(again, Hello)
    assert a.open(again.cookie) == Confirmed(b.public_key)
    assert message_of(a.open(b.seal(a.public_key, PING))) == PING


def test_a_datagram_is_believed_once() -> None:
    a, b = friends()
    ping = a.seal(b.public_key, PING)
    assert message_of(b.open(ping)) == PING
    with pytest.raises(Replayed):
        b.open(ping)


def test_datagrams_out_of_order_are_each_believed_once() -> None:
    a, b = friends()
    sealed = [a.seal(b.public_key, PING) for _ in range(REPLAY_WINDOW)]
    random.Random(1).shuffle(sealed)
    for data in sealed:
        assert message_of(b.open(data)) == PING
    for data in sealed:
        with pytest.raises(Replayed):
            b.open(data)


def test_a_datagram_that_fell_out_of_the_window_is_refused() -> None:
    a, b = friends()
    late, last_in_time = a.seal(b.public_key, PING), a.seal(b.public_key, PING)
    for _ in range(REPLAY_WINDOW - 1):
        newest = a.seal(b.public_key, PING)
    assert message_of(b.open(newest)) == PING
    assert message_of(b.open(last_in_time)) == PING
    with pytest.raises(Replayed):
        b.open(late)


def test_a_forged_datagram_uses_up_no_counter() -> None:
    a, b = friends()
    ping = a.seal(b.public_key, PING)
    with pytest.raises(WireError):
        b.open(ping[:-1] + bytes((ping[-1] ^ 1,)))
    assert message_of(b.open(ping)) == PING


def test_a_peer_that_restarted_is_heard_after_one_cookie() -> None:
    _, b = friends()
    a = channel(1, boot=1)
    introduced(a, b)
    greet(a, b)
    assert message_of(a.open(b.seal(a.public_key, PONG))) == PONG


def test_a_peer_that_restarted_is_reached_after_one_cookie() -> None:
    a, _ = friends()
    b = channel(2, boot=1)
    introduced(a, b)
    for_the_old_boot = a.seal(b.public_key, PING)
    hello = b.open(for_the_old_boot)
    assert kind(for_the_old_boot) is DatagramType.SEALED
    assert isinstance(hello, Hello)
    assert a.open(hello.cookie) == Confirmed(b.public_key)
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_a_restart_shows_as_another_origin() -> None:
    a, b = friends()
    origins = []
    for boot in (1, 2):
        first, second = a.seal(b.public_key, PING), a.seal(b.public_key, PING)
        opened = [b.open(first), b.open(second)]
        assert all(isinstance(one, Received) for one in opened)
        origins.append({one.origin for one in opened if isinstance(one, Received)})
        a = channel(1, boot=boot)
        introduced(a, b)
        greet(a, b)
    assert [len(seen) for seen in origins] == [1, 1]
    assert origins[0] != origins[1]


def test_nothing_recorded_before_a_restart_is_believed_after_it() -> None:
    old_a, b = strangers()
    recorded = [old_a.seal(b.public_key, PING)]
    greet(old_a, b)
    recorded += [old_a.seal(b.public_key, PING) for _ in range(3)]
    b.open(recorded[1])
    a = channel(1, boot=1)
    introduced(a, b)
    greet(a, b)
    for data in recorded:  # sealed for this very boot of b
        assert isinstance(b.open(data), Hello)
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_a_recorded_first_datagram_changes_nothing() -> None:
    old_a, b = strangers()
    recorded = old_a.seal(b.public_key, PING)
    a = channel(1, boot=1)
    introduced(a, b)
    greet(a, b)
    before = b.seal(a.public_key, PING)
    assert isinstance(b.open(recorded), Hello)
    after = b.seal(a.public_key, PING)
    assert unpack_datagram(before).sender == unpack_datagram(after).sender
    assert message_of(a.open(after)) == PING


def test_a_recorded_cookie_of_an_earlier_boot_confirms_nothing() -> None:
    a, old_b = strangers()
    hello = old_b.open(a.seal(old_b.public_key, PING))
    assert isinstance(hello, Hello)
    a.open(hello.cookie)
    b = channel(2, boot=1)
    introduced(a, b)
    greet(b, a)
    with pytest.raises(Replayed):
        a.open(hello.cookie)
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_a_removed_correspondent_is_neither_heard_nor_written_to() -> None:
    a, b = friends()
    recorded = a.seal(b.public_key, PING)
    b.set_correspondents(frozenset())
    assert not b.is_confirmed(a.public_key)
    with pytest.raises(WireError, match="no correspondent"):
        b.open(recorded)
    with pytest.raises(NotACorrespondent):
        b.seal(a.public_key, PING)


def test_a_correspondent_that_comes_back_brings_no_recorded_datagram_with_it() -> None:
    a, b = friends()
    recorded = [a.seal(b.public_key, PING) for _ in range(2)]
    b.open(recorded[0])
    b.set_correspondents(frozenset())
    introduced(a, b)
    for data in recorded:
        assert isinstance(b.open(data), Hello)
    hello = b.open(a.seal(b.public_key, PING))
    assert isinstance(hello, Hello)
    assert a.open(hello.cookie) == Confirmed(b.public_key)
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_naming_the_same_correspondents_again_keeps_their_state() -> None:
    a, b = friends()
    introduced(a, b)
    b.set_correspondents(frozenset({a.public_key, channel(3).public_key}))
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_a_stranger_is_not_answered() -> None:
    _, b = friends()
    stranger = channel(3)
    stranger.set_correspondents(frozenset({b.public_key}))
    with pytest.raises(WireError, match="no correspondent"):
        b.open(stranger.seal(b.public_key, PING))


def test_a_datagram_for_someone_else_is_refused() -> None:
    a, b = friends()
    c = channel(3)
    introduced(a, b, c)
    for to in (b, c):  # one SEALED, one INITIAL
        data = a.seal(to.public_key, PING)
        with pytest.raises(WireError, match="did not seal for us"):
            (c if to is b else b).open(data)


def test_a_datagram_thrown_back_at_its_sender_is_refused() -> None:
    a, b = friends()
    a.set_correspondents(frozenset({a.public_key, b.public_key}))
    with pytest.raises(WireError):
        a.open(a.seal(b.public_key, PING))
    with pytest.raises(NotACorrespondent):
        a.seal(a.public_key, PING)


@pytest.mark.parametrize("kind_", list(DatagramType))
def test_every_bit_of_a_datagram_is_authenticated(kind_: DatagramType) -> None:
    a, b = strangers()
    initial = a.seal(b.public_key, PING)
    hello = b.open(initial)
    assert isinstance(hello, Hello)
    match kind_:
        case DatagramType.INITIAL:
            receiver, data = b, initial
        case DatagramType.COOKIE:
            receiver, data = a, hello.cookie
        case DatagramType.SEALED:
            a.open(hello.cookie)
            receiver, data = b, a.seal(b.public_key, PING)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            receiver.open(bytes(damaged))
    assert isinstance(receiver.open(data), (Hello, Confirmed, Received))


# RFC 7748, section 6.1: the points whose product with any secret is zero.
LOW_ORDER = (
    bytes(32),
    b"\x01" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    bytes.fromhex("eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
)


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
def test_a_low_order_point_is_no_correspondent(point: bytes) -> None:
    a, b = strangers()
    key = PublicKey(point)
    a.set_correspondents(frozenset({key}))
    with pytest.raises(NotACorrespondent, match="low-order"):
        a.seal(key, PING)
    data = b.seal(a.public_key, PING)
    with pytest.raises(WireError, match="low-order"):
        a.open(data[:8] + key_id(key) + data[16:])


def test_of_two_keys_with_one_key_id_the_first_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "key_id", lambda key: b"the same")
    a, b, c = channel(1), channel(2), channel(3)
    b.set_correspondents(frozenset({a.public_key}))
    b.set_correspondents(frozenset({a.public_key, c.public_key}))
    a.set_correspondents(frozenset({b.public_key}))
    greet(a, b)
    with pytest.raises(NotACorrespondent):
        b.seal(c.public_key, PING)
    b.set_correspondents(frozenset({c.public_key}))
    assert kind(b.seal(c.public_key, PING)) is DatagramType.INITIAL


def test_an_authentic_message_of_a_later_release_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = friends()
    with monkeypatch.context() as patch:
        patch.setattr(channel_module, "encode_message", lambda message: b"\xc8of a later release")
        data = a.seal(b.public_key, PING)
    with pytest.raises(UnknownMessage):
        b.open(data)
    assert message_of(b.open(a.seal(b.public_key, PING))) == PING


def test_secrets_have_no_printable_form() -> None:
    a, b = friends()
    printed = repr(a) + repr(vars(a)) + repr(list(a._by_key.values()))
    for side in (1, 2):
        assert repr(bytes((side,)) * 32) not in printed
    assert b.seal(a.public_key, PING)


def test_the_key_agreement_waits_for_the_first_datagram() -> None:
    a = channel(1)
    others = [channel(side) for side in range(2, 40)]
    a.set_correspondents(frozenset(other.public_key for other in others))
    assert all(one.shared is None for one in a._by_key.values())
    a.seal(others[0].public_key, PING)
    assert sum(one.shared is not None for one in a._by_key.values()) == 1


def test_a_boot_id_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, not 15"):
        Channel(secret=Secret(bytes(32)), boot_id=bytes(15))


def test_the_channel_imports_neither_clock_nor_network() -> None:
    code = "import sys, scope.channel; print(*(sys.modules.keys() & {'asyncio', 'socket', 'ssl', 'aiohttp'}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@given(st.binary(max_size=300))
def test_whatever_the_network_and_restarts_do_nothing_is_believed_twice(program: bytes) -> None:
    probe.check_program(program)


def test_the_corpus_reaches_every_message_and_every_answer() -> None:
    reached: Counter[str] = Counter()
    for path in sorted(CORPUS.iterdir()):
        data = path.read_bytes()
        probe.check(data)
        match data[0] % 3:
            case 0:
                reached[type(probe.check_body(data[1:])).__name__] += 1
            case 1:
                reached[type(probe.check_datagram(data[1:])).__name__] += 1
    messages = {each.__name__ for each in get_args(Message)}
    assert reached.keys() == messages | {"Received", "Hello", "Confirmed", "NoneType"}


def test_damaged_inputs_break_no_promise() -> None:
    seeds = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    rng = random.Random(20)
    for _ in range(4000):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            match rng.randrange(4):
                case 0:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                case 1:
                    del data[rng.randrange(1, len(data) + 1) :]
                case 2:
                    data += rng.randbytes(rng.randint(1, 40))
                case _:
                    other = rng.choice(seeds)
                    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]
            data = data or bytearray(1)
        probe.check(bytes(data))


def test_garbage_leaves_nothing_behind() -> None:
    a, b = friends()
    authentic = [a.seal(b.public_key, PING), channel_with(b).seal(b.public_key, PING)]
    rng = random.Random(4)

    def refused(data: bytes) -> bool:
        try:
            b.open(data)
        except WireError:
            return True
        return False

    def flood(count: int) -> None:
        for _ in range(count):
            data = bytearray(rng.choice(authentic))
            data[16 + rng.randrange(len(data) - 16)] ^= 1 + rng.randrange(255)
            assert refused(bytes(data))
            assert isinstance(b.open(authentic[1]), Hello)
        gc.collect()

    flood(200)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        flood(2000)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 16_384


def channel_with(other: Channel) -> Channel:
    """A later boot of side 1 that knows `other`."""
    one = channel(1, boot=9)
    one.set_correspondents(frozenset({other.public_key}))
    return one
