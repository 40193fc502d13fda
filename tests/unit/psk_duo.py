"""Two sides of a pair in virtual time: real `Psk` rooms, with a device, a disk and a network that are models.

The device knows what matters here: a session of 180 s, one initiator that rekeys from 120 s on when it sends,
a pre-shared key that is compared when the handshake is answered, and a handshake time that moves on success
alone. The provider is a toy, so that thousands of exchanges cost little; the real one has tests of its own.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable
from random import Random

from scope_agent.psk.core import NudgePeer, Psk, PskOutput, SayPart, WriteRecord
from scope_agent.psk.identity import FIRST_CONTACT, KeyMaker, make_hybrid_identity
from scope_agent.psk.pair_values import Reading
from scope_agent.psk.provider import SUITES
from scope_agent.psk.slots import Record
from scope_agent.psk.trust import succeed
from scope_agent.psk.view import PskPair
from scope_agent.wireguard.device import NO_PSK

from scope.model import Fingerprint, PostQuantum, PostQuantumMode, PublicKey, Secret
from scope.wire import KeyPart
from tests.toy_provider import ToyProvider

WALL = 1_800_000_000.0
LOOK_OFTEN, LOOK_SELDOM = 2.0, 15.0
KEEPALIVE = 20.0


class Side:
    """One machine: what survives its agent, and its agent."""

    def __init__(self, duo: Duo, key: PublicKey) -> None:
        self.duo, self.key = duo, key
        self.identity = make_hybrid_identity(duo.random.randbytes, duo.provider)
        self.trust = FIRST_CONTACT
        self.named: Fingerprint | None = None  # what the registry tells the other, where that is not so
        self.disk = Record()
        self.disk_fails = False
        self.suite = SUITES[1]
        self.psk: Secret | None = None  # of the device
        self.seen: Secret | None = None  # the device's, as the agent last saw it
        self.stamp = 0.0
        self.room: Psk | None = None
        self.generation = 0
        self.crash_after: int | None = None
        self.clock_offset = 0.0  # of the wall clock, as somebody may set it
        self.view = PskPair()
        self.armed: float | None = None
        self.looks = 0  # the looks that are due: only the last one counts
        self.spins, self.spun_at = 0, 0.0
        self.nudges = 0

    def start(self) -> None:
        duo = self.duo
        self.generation += 1
        self.crash_after = None
        self.armed = None
        self.looks = 0
        self.view = PskPair()
        self.room = Psk(
            own=self.key,
            random=duo.random.random,
            records={self.other.key: self.disk},
            offset=WALL + self.clock_offset,
            is_managed=duo.manager is not None,
        )
        self.configure()
        self.later(0.05, self.equip)
        self.later(0.002, self.look)
        self.later(0.3, self.tick_reach)

    def equip(self) -> None:
        if self.room is not None:
            maker = KeyMaker(
                self.identity, self.duo.provider, self.duo.random.randbytes, self.suite, self.trust
            )
            self.room.equip(maker, self.duo.now)
            self.perform()

    @property
    def name(self) -> str:
        return "mesh.external." + ("e", "d")[self.duo.sides.index(self)]

    def rotate_identity(self) -> None:
        """Be of a new identity, of which the registry has not heard yet."""
        assert self.room is not None
        self.named = self.identity.public.fingerprint()
        self.identity = succeed(self.identity, self.duo.random.randbytes, self.duo.provider)
        self.room.renew(self.identity, self.duo.now)
        self.perform()

    def rotate(self) -> None:
        """Ask for a new key."""
        assert self.room is not None
        self.room.rotate(self.other.key, self.duo.now)
        self.perform()

    def leave(self) -> None:
        """Have the pair go back to the manager's key."""
        assert self.room is not None
        self.room.leave(self.other.key, self.duo.now)
        self.perform()

    def configure(self) -> None:
        if self.room is not None:
            self.room.configure(
                self.duo.policy,
                mesh_uid="mesh-uid",
                members={self.other.key},
                is_complete=True,
                now=self.duo.now,
            )
            named = self.other.named or self.other.identity.public.fingerprint()
            self.room.identify(self.other.key, named, self.other.name, self.duo.now)
            self.perform()

    def crash(self) -> None:
        self.room = None
        self.generation += 1

    def lose_disk(self) -> None:
        self.disk = Record()

    def lose_device(self) -> None:
        """The agent cannot read its device for two seconds."""
        if self.room is not None:
            self.room.forget_device()
            self.looks += 1
            self.later(2.0, self.look)

    def reboot(self) -> None:
        """Power lost: the device is gone, its session with it."""
        self.crash()
        self.psk, self.stamp = self.duo.manager, 0.0
        self.duo.session = None

    @property
    def other(self) -> Side:
        return self.duo.sides[1 - self.duo.sides.index(self)]

    def later(self, delay: float, call: Callable[[], None]) -> None:
        generation = self.generation
        self.duo.at(self.duo.now + delay, lambda: call() if generation == self.generation else None)

    def tick_reach(self) -> None:
        if self.room is not None:
            self.room.reach(self.other.key, self.duo.now, is_reached=not (self.duo.is_cut or self.duo.mute))
            self.perform()
            self.later(0.5, self.tick_reach)

    def look(self) -> None:
        if self.room is None:
            return
        since = None
        self.seen = self.psk
        if self.duo.session is not None:
            known = self.duo.session if self.stamp else None
            since = None if known is None else known + self.duo.random.uniform(0.0, 0.1)
        self.room.observe({self.other.key: Reading(self.psk, self.stamp, since)}, self.duo.now)
        self.perform()
        self.looks += 1
        number = self.looks
        if self.room is not None:
            delay = LOOK_OFTEN if self.room.wants_look else LOOK_SELDOM
            self.later(delay, lambda: self.look() if self.looks == number else None)

    def receive(self, part: KeyPart) -> None:
        if self.room is not None:
            self.room.receive(self.other.key, part, self.duo.now)
            self.perform()

    def perform(self) -> None:
        room = self.room
        if room is None:
            return
        for output in room.outputs():
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after < 0:
                    self.crash()
                    self.duo.at(self.duo.now + self.duo.random.choice((0.2, 3.0, 40.0)), self.start_again)
                    return
            if self.duo.spoils(self, output):
                if self.room is None:
                    return
                continue
            match output:
                case SayPart(_, part):
                    self.duo.carry(self, part)
                case WriteRecord(_, record):
                    self.later(0.005, functools.partial(self.write, record))
                case NudgePeer():
                    self.nudges += 1
                    self.duo.sends(self)
        shown = room.view()[self.other.key]
        if shown.psk is not None and shown.psk != (self.seen or NO_PSK):
            self.later(self.duo.random.uniform(0.002, 0.05), self.program)
        speaks, self.view = self.view.is_silent and not shown.is_silent, shown
        if speaks:
            self.later(0.01, functools.partial(self.duo.sends, self))  # keepalive's rise sends
        due = room.get_timer()
        if due is not None and (self.armed is None or due < self.armed):
            self.armed = due
            self.later(max(0.0, due - self.duo.now), lambda: self.tick(due))

    def start_again(self) -> None:
        if self.room is None:
            self.start()

    @property
    def device_psk(self) -> Secret:
        return self.psk or NO_PSK

    def program(self) -> None:
        if self.room is None:
            return
        wanted = self.room.view()[self.other.key].psk
        if wanted is not None and wanted != self.device_psk:
            self.psk = None if wanted == NO_PSK else wanted
            self.look()

    def write(self, record: Record | None) -> None:
        if self.room is None:
            return
        if not self.disk_fails:
            self.disk = record or Record()
        self.room.written(self.other.key, "no space left on device" if self.disk_fails else "", self.duo.now)
        self.perform()

    def tick(self, due: float) -> None:
        if self.room is None or self.armed != due:
            return
        self.armed = None
        self.spins = self.spins + 1 if self.spun_at == self.duo.now else 0
        self.spun_at = self.duo.now
        assert self.spins < 50, f"seed {self.duo.seed}: a timer that never moves on, {self.duo.describe()}"
        self.room.handle_timer(self.duo.now)
        self.perform()


class Duo:
    """Both sides and what lies between them. `keepalive` says which devices send by themselves."""

    def __init__(
        self,
        seed: int,
        *,
        mode: PostQuantumMode = PostQuantumMode.PREFERRED,
        interval: float = 3600.0,
        keepalive: tuple[bool, bool] = (True, True),
        manager: Secret | None = None,
    ) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.provider = ToyProvider(self.random)
        self.policy = PostQuantum(mode, interval)
        self.keepalive = keepalive
        self.manager = manager  # the key that something else gives both devices; None: they are ours
        self.now = 1000.0
        self.loss = 0.0
        self.duplication = 0.0
        self.is_cut = False
        self.mute: set[Side] = set()  # of whom no word arrives, though packets of the tunnel do
        self.session: float | None = None  # when it began
        self.initiator = 0
        self.trying: float | None = None  # when the next initiation is sent
        self.deaths: list[float] = []
        self.downtime = 0.0
        self.heard: list[tuple[Side, KeyPart]] = []  # all that was ever said
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        keys = sorted(PublicKey(self.random.randbytes(32)) for _ in range(2))
        self.sides: list[Side] = []
        self.sides += [Side(self, key) for key in keys]
        for side in self.sides:
            side.psk = manager
        self.at(self.now, self.tick_device)

    @property
    def e(self) -> Side:
        return self.sides[0]

    @property
    def d(self) -> Side:
        return self.sides[1]

    def start(self) -> None:
        for side in self.sides:
            side.start()

    def at(self, when: float, call: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, call))

    def run(self, seconds: float) -> None:
        self.run_until(lambda: False, within=seconds)

    def run_until(self, holds: Callable[[], bool], *, within: float) -> bool:
        end = self.now + within
        while self._heap and self._heap[0][0] <= end:
            if holds():
                return True
            when, _, call = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            call()
        self.now = max(self.now, end)
        return holds()

    def until(self, holds: Callable[[], bool], *, within: float) -> float:
        start = self.now
        assert self.run_until(holds, within=within), f"seed {self.seed}: {self.describe()}"
        return self.now - start

    def describe(self) -> str:
        return "\n".join(
            f"{name}: {side.view.epoch} {side.view.failure!r} disk counter {side.disk.counter} current "
            f"{side.disk.current and side.disk.current.epoch} next {side.disk.next and side.disk.next.epoch} "
            f"active {side.disk.active} psk {side.device_psk.raw.hex()[:6]}"
            for name, side in (("D", self.d), ("E", self.e))
        )

    def is_agreed(self, epoch: int = 1) -> bool:
        """Whether both show the same proved key, from `epoch` on, and both devices have it."""
        d, e = self.d, self.e
        return (
            d.view.epoch == e.view.epoch >= epoch
            and d.disk.current is not None
            and e.disk.current is not None
            and d.disk.current == e.disk.current
            and not d.disk.active
            and not e.disk.active
            and d.device_psk == e.device_psk == d.disk.current.psk
        )

    def device_psks(self) -> set[bytes]:
        """What the two devices hold."""
        return {side.device_psk.raw for side in self.sides}

    def spoils(self, side: Side, output: PskOutput) -> bool:
        """Whether an output of the side comes to nothing: for who explores."""
        return False

    def carry(self, sender: Side, part: KeyPart) -> None:
        self.heard.append((sender, part))
        other = sender.other
        for _ in range(2 if self.random.random() < self.duplication else 1):
            if not self.is_cut and sender not in self.mute and self.random.random() >= self.loss:
                self.at(self.now + self.random.uniform(0.02, 0.06), lambda: other.receive(part))

    # --- the tunnel ----------------------------------------------------------------------------------------

    def tick_device(self) -> None:
        """Once a second: keepalives, retries, and the end of a session."""
        if self.session is not None and self.now - self.session >= 180.0:
            self.session = None
            self.deaths.append(self.now)
        if self.session is None:
            self.downtime += 1.0
        if int(self.now) % int(KEEPALIVE) == 0:
            for side, sends in zip(self.sides, self.keepalive, strict=True):
                if sends:
                    self.sends(side)
        if self.trying is not None and self.now >= self.trying:
            self.initiate()
        self.at(self.now + 1.0, self.tick_device)

    def sends(self, side: Side) -> None:
        """A packet of the side's enters the tunnel."""
        is_blocked = side.room is not None and side.view.is_silent
        if self.trying is not None or is_blocked:
            return
        if self.session is None:
            self.initiator = self.sides.index(side)
            self.initiate()
        elif self.sides[self.initiator] is side and self.now - self.session > 120.0:
            self.initiate()

    def initiate(self) -> None:
        self.trying = self.now + 5.2
        if not self.is_cut and self.random.random() >= self.loss:
            self.at(self.now + 0.08, self.finish)

    def finish(self) -> None:
        if self.trying is not None and self.d.device_psk == self.e.device_psk:
            self.trying = None
            self.session = self.now
            for side in self.sides:
                side.stamp = WALL + self.now + side.clock_offset
                side.later(self.random.uniform(0.0, 0.3), side.look)
