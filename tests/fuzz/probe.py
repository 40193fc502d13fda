"""What any bytes may do to the probe protocol, as one function for the fuzzer and for the unit tests.

The first byte of an input chooses how the rest is read: as the body of a message, as a datagram, or as a
program for two channels and a network that loses, repeats, reorders, withholds and damages datagrams while
both sides restart and forget each other. A broken promise is an AssertionError.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from scope.channel import Channel, Confirmed, Hello, Opened, Received
from scope.model import PublicKey, Secret
from scope.wire import (
    MAX_DATAGRAM,
    MAX_FORWARDED,
    DatagramType,
    Forward,
    Message,
    Ping,
    WireError,
    decode_message,
    encode_message,
    unpack_datagram,
)

MAX_INPUT = 2048
MAX_SECONDS = 1.0  # of this process's own time for one input; a slow one takes 0.05 s with coverage on
MAX_OPERATIONS = 256
MAX_ROUNDS = 4  # after which two sides that can speak again must have heard each other
_NAMES = (0, 1)  # the two sides of a program
_SECRETS = (Secret(b"\x01" * 32), Secret(b"\x02" * 32))


def check(data: bytes) -> None:
    """Feed one input, at most MAX_INPUT bytes of it, to what its first byte names."""
    data = data[:MAX_INPUT]
    if not data:
        return
    began = time.process_time()
    match data[0] % 3:
        case 0:
            check_body(data[1:])
        case 1:
            check_datagram(data[1:])
        case _:
            check_program(data[1:])
    spent = time.process_time() - began
    assert spent < MAX_SECONDS, f"{len(data)} bytes took {spent:.3f} s"


def check_body(body: bytes) -> Message | None:
    """Any body is refused with a WireError, or is a message that comes back from its own encoding."""
    try:
        message = decode_message(body)
    except WireError:
        return None
    encoded = encode_message(message)
    assert len(encoded) <= len(body) + 1  # a call of an earlier release does not count what it opened
    assert decode_message(encoded) == message
    if isinstance(message, Forward):
        assert len(message.datagram) <= MAX_FORWARDED
    return message


def check_datagram(data: bytes) -> Opened | None:
    """Any datagram is refused with a WireError, or answered with no more bytes than it has."""
    pair = Pair()
    pair.meet()
    try:
        opened = pair.channels[1].open(data)
    except WireError:
        return None
    finally:
        pair.assert_bounded()
    if isinstance(opened, Hello):
        assert len(opened.cookie) <= len(data)
    return opened


def check_program(program: bytes) -> None:
    """Whatever the network and restarts did: nothing is believed twice or late, and both sides meet again."""
    pair = Pair()
    for offset in range(0, min(len(program) - 1, 2 * MAX_OPERATIONS), 2):
        pair.perform(program[offset], program[offset + 1])
        pair.assert_bounded()
    pair.meet()


@dataclass(slots=True)
class Pair:
    """Two channels that know each other, and all that an attacker on the path has recorded.

    Every ping carries a number of its own. `boots` and `recorded` let each delivery be judged by what the
    sealing side was at the time.
    """

    channels: list[Channel] = field(default_factory=list)
    boots: list[int] = field(default_factory=lambda: [0, 0])
    recorded: list[tuple[int, bytes]] = field(default_factory=list)  # (who sent it, datagram)
    sealed: dict[int, tuple[int, int, int]] = field(default_factory=dict)  # ping: sender, both boots then
    received: set[int] = field(default_factory=set)
    newest: dict[tuple[int, int], int] = field(default_factory=dict)  # (side, its boot): other's boot heard
    nonces: dict[tuple[int, DatagramType, bytes, bytes, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.channels = [self._new_channel(side) for side in _NAMES]
        for side in _NAMES:
            self._introduce(side)

    def perform(self, operation: int, argument: int) -> None:
        """One step of a program."""
        match operation % 8:
            case 0 | 1 as side:
                self.seal(side)
            case 2 | 3 as choice:
                if self.recorded:
                    self.deliver(choice - 2, self.recorded[argument % len(self.recorded)][1])
            case 4:
                if self.recorded:
                    sender, data = self.recorded[-1]
                    self.deliver(1 - sender, data)
            case 5:
                self.restart(argument & 1)
            case 6:
                self.channels[argument & 1].set_correspondents(frozenset())
                self._introduce(argument & 1)
            case _:
                if self.recorded:
                    self.deliver_damaged(argument)

    def seal(self, side: int) -> int:
        """Let `side` ping the other one: recorded, not delivered. Returns the ping's number."""
        number = len(self.sealed)
        self.sealed[number] = (side, self.boots[0], self.boots[1])
        ping = Ping(transaction=number, has_session=False, received=0)
        self._record(side, self.channels[side].seal(self._key(1 - side), ping))
        return number

    def deliver(self, side: int, data: bytes) -> None:
        """Hand `data` to `side`, which answers as an agent would; answers are recorded."""
        kind = unpack_datagram(data).type
        try:
            opened = self.channels[side].open(data)
        except WireError:
            return
        assert opened.sender == self._key(1 - side)
        match opened:
            case Hello():
                assert kind is not DatagramType.COOKIE
                assert len(opened.cookie) <= len(data)
                self._record(side, opened.cookie)
            case Confirmed():
                assert kind is DatagramType.COOKIE
                self.seal(side)
            case Received():
                assert kind is DatagramType.SEALED
                self._judge(side, opened.message)

    def deliver_damaged(self, argument: int) -> None:
        """Hand a recorded datagram with one bit flipped to both sides: nobody takes it for anything."""
        sender, data = self.recorded[-1 - argument % min(len(self.recorded), 4)]
        damaged = bytearray(data)
        damaged[argument * 7919 % len(data)] ^= 1 << argument % 8
        for side in (1 - sender, sender):
            try:
                opened = self.channels[side].open(bytes(damaged))
            except WireError:
                continue
            raise AssertionError(f"a damaged datagram was taken for {opened}")

    def restart(self, side: int) -> None:
        """`side` starts anew with the same key and a fresh boot id."""
        self.boots[side] += 1
        self.channels[side] = self._new_channel(side)
        self._introduce(side)

    def meet(self) -> None:
        """On a network that delivers, each side's next few pings reach the other one."""
        waiting = set(_NAMES)
        for _ in range(MAX_ROUNDS):
            numbers = {}
            for side in _NAMES:
                numbers[side] = self.seal(side)
            cursor = len(self.recorded) - 2
            while cursor < len(self.recorded):
                sender, data = self.recorded[cursor]
                cursor += 1
                self.deliver(1 - sender, data)
                assert len(self.recorded) < 10_000, "both sides answer each other without end"
            waiting -= {side for side in _NAMES if numbers[side] in self.received}
            if not waiting:
                return
        raise AssertionError(f"no ping of {waiting} arrived in {MAX_ROUNDS} rounds")

    def assert_bounded(self) -> None:
        """Whatever arrived, a channel keeps what one correspondent takes."""
        for channel in self.channels:
            assert len(channel._by_key) == len(channel._by_id) == 1
            for correspondent in channel._by_key.values():
                association = correspondent.association
                assert association is None or association.window._used.bit_length() <= 1024

    def _judge(self, side: int, message: Message) -> None:
        assert isinstance(message, Ping)
        number = message.transaction
        sender, *boots = self.sealed[number]
        assert sender == 1 - side, "a side took its own ping for the other's"
        assert number not in self.received, "a ping was believed twice"
        assert boots[side] == self.boots[side], "a ping for an earlier boot was believed"
        heard = self.newest.get((side, self.boots[side]), 0)
        assert boots[sender] >= heard, "an earlier boot was believed after a later one"
        self.newest[side, self.boots[side]] = boots[sender]
        self.received.add(number)

    def _record(self, side: int, data: bytes) -> None:
        assert len(data) <= MAX_DATAGRAM
        parts = unpack_datagram(data)
        nonce = (side, parts.type, parts.sender, parts.receiver, parts.counter)
        same = self.nonces.setdefault(nonce, data)
        assert same == data, "one key and nonce sealed two texts"
        assert same is data or parts.type is DatagramType.COOKIE, "a datagram was sealed twice"
        self.recorded.append((side, data))

    def _new_channel(self, side: int) -> Channel:
        return Channel(secret=_SECRETS[side], boot_id=bytes((side,)) + self.boots[side].to_bytes(15, "big"))

    def _key(self, side: int) -> PublicKey:
        return self.channels[side].public_key

    def _introduce(self, side: int) -> None:
        self.channels[side].set_correspondents(frozenset({self._key(1 - side)}))
