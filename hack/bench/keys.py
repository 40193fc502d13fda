"""What post-quantum keys cost: an exchange, a node with a thousand peers, a rotation, a first ping.

An exchange is measured with the primitives that agents use, from values to the parts that are sent and back;
times are of the processor. Of a node that rotates a thousand pairs in an hour, memory and bytes are measured,
and the share of the processor is the dearer side's time a thousand times over.
"""

from __future__ import annotations

import json
import random
import secrets
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping

from lab import Nat
from meshlab.programs import program
from scope_agent.psk.core import Psk
from scope_agent.psk.cryptography_provider import CryptographyProvider
from scope_agent.psk.exchange import Parties, make_answer, make_offer, take_answer
from scope_agent.psk.identity import KeyMaker, make_hybrid_identity
from scope_agent.psk.messages import Answer, Offer, PskMessage, decode, encode
from scope_agent.psk.parts import Joining, cut
from scope_agent.psk.slots import Keys

from bench.agents import REST_S, BenchError, World, world
from bench.result import Benchmark, Row, Sample, Target
from scope.model import PostQuantum, PostQuantumMode, PublicKey
from scope.wire import KeyPart

PEERS = 1000
HOUR = 3600.0
MEMBERS = 7  # 21 pairs side by side
ROTATION_PING_S = 0.042  # of 42 flows: a thousand packets a second
ROTATION_S = 900.0  # of all pairs at once, retries included
COLD = 20  # agents that join at once: 190 pairs
COLD_S = 600.0
REQUIRED: Mapping[str, object] = {"postQuantum": {"mode": "Required"}}
OFF: Mapping[str, object] = {"postQuantum": {"mode": "Off"}}


def _exchange(attempts: int) -> Iterator[Sample | Row]:
    provider = CryptographyProvider()
    makers = [
        KeyMaker(make_hybrid_identity(secrets.token_bytes, provider), provider, secrets.token_bytes)
        for _ in range(2)
    ]
    low, high = sorted(PublicKey(secrets.token_bytes(32)) for _ in range(2))
    fingerprints = [maker.identity.public.fingerprint() for maker in makers]
    d = Parties("mesh", high, fingerprints[0], low, fingerprints[1])
    e = Parties("mesh", low, fingerprints[1], high, fingerprints[0])
    base: Keys | None = None
    offering: list[float] = []
    answering: list[float] = []
    carried = 0
    for epoch in range(1, attempts + 1):
        began = time.thread_time()
        offered = make_offer(d, makers[0], epoch=epoch, base=base)
        parts = cut(2 * epoch, encode(offered.offer))
        spent = time.thread_time() - began
        carried = sum(len(part.data) for part in parts)

        began = time.thread_time()
        offer = _joined(parts)
        if not isinstance(offer, Offer):
            raise BenchError("an offer did not come back from its parts")
        answer, theirs = make_answer(e, makers[1], offer, theirs=makers[0].identity.public, base=base)
        parts = cut(2 * epoch + 1, encode(answer))
        answering.append(time.thread_time() - began)
        carried += sum(len(part.data) for part in parts)

        began = time.thread_time()
        taken = _joined(parts)
        if not isinstance(taken, Answer):
            raise BenchError("an answer did not come back from its parts")
        ours = take_answer(offered, taken, theirs=makers[1].identity.public, base=base, provider=provider)
        offering.append(spent + time.thread_time() - began)
        if ours != theirs:
            raise BenchError("the two sides derived different keys")
        base = ours
        yield 1e3 * max(offering[-1], answering[-1])
    memory = _memory()
    dearer = max(sum(offering), sum(answering)) / attempts
    yield {
        "side that offers, ms": 1e3 * sum(offering) / attempts,
        "side that answers, ms": 1e3 * sum(answering) / attempts,
        "offer and answer, bytes": float(carried),
        f"{PEERS} peers in an hour, share of a processor, %": 100.0 * dearer * PEERS / HOUR,
        f"{PEERS} peers in an hour, MB both ways": carried * PEERS / 1e6,
        f"{PEERS} pairs that wait for their keys, KiB each": memory / PEERS / 1024,
    }


def _joined(parts: Iterable[KeyPart]) -> PskMessage:
    joining = Joining()
    message = next((whole for part in parts if (whole := joining.add(part)) is not None), None)
    if message is None:
        raise BenchError("the parts of a message did not make one")
    return decode(message)


def _memory() -> float:
    """Bytes that the pairs of an agent with so many peers take."""
    keys = {PublicKey(secrets.token_bytes(32)) for _ in range(PEERS)}
    tracemalloc.start()
    room = Psk(own=PublicKey(secrets.token_bytes(32)), random=random.random, records={}, offset=0.0)
    policy = PostQuantum(PostQuantumMode.PREFERRED)
    room.configure(policy, mesh_uid="mesh", members=keys, is_complete=True, now=0.0)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return float(taken)


def _rotated(attempts: int) -> Iterator[Sample | Row]:
    with world(ping_s=ROTATION_PING_S, spec=dict(REQUIRED)) as here:
        members = [here.member(f"member-{number}", Nat.NONE) for number in range(MEMBERS)]
        for member in members:
            member.join(here.token)
        here.settle()
        _confirmed(here)
        for _ in range(attempts):
            flows = [here.flow(a, b) for a in members for b in members if a is not b]
            for flow in flows:
                if here.await_ping(flow) is None:
                    raise BenchError("the mesh is keyed, but a ping does not come back")
            rotating = [
                member.machine.popen(
                    [program("scopectl"), "rotate", "--all", "--wait"], stdout=subprocess.DEVNULL
                )
                for member in members
            ]
            ended = [process.wait(timeout=ROTATION_S) for process in rotating]
            for flow in flows:
                here.pinger.stop(flow)
            here.flows.clear()
            time.sleep(REST_S)  # for the last answers
            yield None if any(ended) else float(sum(flow.sent - flow.answered for flow in flows))


def _cold_mesh(attempts: int) -> Iterator[Sample]:
    for _ in range(attempts):
        with world(spec=dict(REQUIRED)) as here:
            members = [here.member(f"member-{number}", Nat.PORT_RESTRICTED) for number in range(COLD)]
            began = time.monotonic()
            for member in members:
                member.join(here.token)
            pending = list(members)
            while pending and time.monotonic() < began + COLD_S:
                pending = [member for member in pending if _keys_of(member.machine.run) < COLD - 1]
            yield time.monotonic() - began if not pending else None


def _keys_of(run: Callable[..., subprocess.CompletedProcess[str]]) -> int:
    """How many peers it has a proved key with; none while its agent does not answer."""
    answered = run([program("scopectl"), "status", "-o", "json"], check=False).stdout
    if not answered:
        return 0
    return sum(peer["psk"]["epoch"] is not None for peer in json.loads(answered)["peers"])


def _confirmed(here: World) -> None:
    deadline = time.monotonic() + ROTATION_S
    pending = list(here.members)
    while pending:
        if time.monotonic() > deadline:
            raise BenchError(f"{len(pending)} members have peers without a key")
        pending = [member for member in pending if not _is_keyed(member.machine.run)]
        time.sleep(0.2)


def _is_keyed(run: Callable[..., subprocess.CompletedProcess[str]]) -> bool:
    return "none (" not in run([program("scopectl"), "status"]).stdout


def _first_ping(attempts: int) -> Iterator[Sample | Row]:
    for _ in range(attempts):
        times = [_joining_takes(spec) for spec in (OFF, REQUIRED)]
        off, required = times
        yield required / off if required is not None and off else None
        yield {"Off, s": off, "Required, s": required}


def _joining_takes(spec: Mapping[str, object]) -> float | None:
    with world(spec=dict(spec)) as here:
        first, second = (here.member(name, Nat.PORT_RESTRICTED) for name in ("first", "second"))
        first.join(here.token, wait=True)
        return here.time_to_direct(first, second, lambda: second.join(here.token))


BENCHMARKS = (
    Benchmark(
        "key-exchange",
        unit="ms",
        what="processor time of one exchange of a post-quantum key, on the side that spends more",
        target=Target(median=10.0),
        attempts=200,
        run=_exchange,
    ),
    Benchmark(
        "key-rotations",
        unit="packets",
        what="lost of a thousand pings a second while 21 pairs get new keys, five times over",
        target=Target(worst=0.0),
        attempts=5,
        run=_rotated,
    ),
    Benchmark(
        "key-cold-mesh",
        unit="s",
        what="20 agents join a mesh that requires keys at once, to a proved key in each of 190 pairs",
        target=Target(median=60.0),
        attempts=2,
        run=_cold_mesh,
    ),
    Benchmark(
        "key-first-ping",
        unit="times",
        what="join to the first ping both ways where keys are required, against none",
        target=Target(median=2.0),
        attempts=5,
        run=_first_ping,
    ),
)
