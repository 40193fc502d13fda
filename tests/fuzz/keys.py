"""What any bytes may do to the messages about post-quantum keys, for the fuzzer and for the unit tests.

The first byte of an input chooses how the rest is read: as a message, or as a program of parts that come in
any order, twice, of several messages at once, and contradicting each other. A broken promise is an
AssertionError.
"""

from __future__ import annotations

import time

from scope_agent.psk.messages import PskMessage, decode, encode
from scope_agent.psk.parts import MAX_OPEN, Joining, cut

from scope.wire import MAX_KEY_PART, MAX_KEY_PARTS, KeyPart, WireError

MAX_INPUT = 8192  # the longest message, an Answer, is 5.4 KB
MAX_SECONDS = 1.0  # of this process's own time for one input
NUMBERS = MAX_OPEN + 2  # messages that a program speaks of: some must give way


def check(data: bytes) -> None:
    """Feed one input, at most MAX_INPUT bytes of it, to what its first byte names."""
    data = data[:MAX_INPUT]
    if not data:
        return
    began = time.process_time()
    if data[0] % 2 == 0:
        check_message(data[1:])
    else:
        check_program(data[1:])
    spent = time.process_time() - began
    assert spent < MAX_SECONDS, f"{len(data)} bytes took {spent:.3f} s"


def check_message(data: bytes) -> PskMessage | None:
    """Any bytes are refused with a WireError, or are one message and no other, which survives its parts."""
    try:
        message = decode(data)
    except WireError:
        return None
    assert encode(message) == data, "two readings of one message"
    if len(data) <= MAX_KEY_PART * MAX_KEY_PARTS:
        joining = Joining()
        whole = [joining.add(part) for part in reversed(cut(7, data))]
        assert whole[-1] == data and not any(whole[:-1])
    return message


def check_program(program: bytes) -> list[bytes]:
    """Whatever parts come, what is put together is made of the newest ones given, in bounded memory."""
    joining, newest = Joining(), dict[tuple[int, int, int], bytes]()
    messages = []
    for at in range(0, len(program) - 2, 3):
        number, shape, fill = program[at] % NUMBERS, program[at + 1], program[at + 2]
        count = 1 + shape % MAX_KEY_PARTS
        part = KeyPart(number, shape // MAX_KEY_PARTS % count, count, bytes((fill,)) * (1 + fill % 5))
        newest[number, count, part.index] = part.data
        try:
            message = joining.add(part)
        except WireError:
            message = None
        if message is not None:
            assert message == b"".join(newest[number, count, index] for index in range(count))
            messages.append(message)
        assert joining._open.keys() == joining._counts.keys() and len(joining._open) <= MAX_OPEN
        assert all(len(pieces) < MAX_KEY_PARTS for pieces in joining._open.values())
    return messages
