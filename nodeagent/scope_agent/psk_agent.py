"""The agent of a WireGuard device that something else manages: it changes pre-shared keys, and nothing else.

Sans-IO, with the verbs of `agent`. The device says which peers there are and where they are reached; whose
agents are spoken with, the peers file says, or a mesh (`mesh_psk_agent`). What is said about keys leaves by
the device's own port for the endpoint that the device has for the peer, or from which the peer's agent was
last heard: never by the tunnel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import assert_never

from scope.channel import Channel, Confirmed, Hello, NotACorrespondent, Received
from scope.model import Endpoint, IPAddress, IPNetwork, PathKind, PublicKey
from scope.wire import KeyPart, Message, Ping, Pong, WireError
from scope_agent.inputs import (
    Applied,
    CommandArrived,
    DatagramArrived,
    DeviceBatch,
    DeviceObserved,
    Failed,
    Input,
    NudgeTunnel,
    Observe,
    Output,
    PskSaved,
    Reply,
    SavePsk,
    Send,
    Socket,
)
from scope_agent.peers_file import ForeignPeer, PeersFile
from scope_agent.psk.core import NudgePeer, Psk, SayPart, WriteRecord
from scope_agent.psk.identity import KeyMaker
from scope_agent.psk.pair_values import SESSION_VALID, Reading
from scope_agent.psk.proved import NUDGE_FROM, QUIET, WAY_BACK
from scope_agent.psk.slots import Record
from scope_agent.status import psk_status
from scope_agent.wireguard.device import NO_PSK, ObservedDevice, ObservedPeer, SetPsk

SCOPE = "existing"  # what stands for the mesh in the exchange: both WireGuard keys say which pair is meant
MAX_BATCH = 64  # keys set between two looks at the device
OBSERVE_KEYS = 2.0  # while a new key waits for its time or its proof
OBSERVE_IDLE = 15.0  # a foreign change is noticed within so long
RETRY_MIN, RETRY_MAX = 1.0, 30.0  # after a device that could not be read or written
ASK_FIRST, ASK_LONGEST = 1.0, 60.0  # a peer without an agent gets one probe a minute
ASK_REACHED = 20.0  # one that answers: often enough for NATs on the way
REACHED_FOR = 50.0  # two probes may be lost
GOING_BACK = 3 * OBSERVE_KEYS + 4.0  # what it takes beside a young session: looks at both devices, and words
# A prefix of everything has no first address that can be sent to: these are for documentation alone.
_SOMEWHERE: Mapping[int, IPAddress] = {4: IPv4Address("192.0.2.1"), 6: IPv6Address("2001:db8::1")}


@dataclass(frozen=True, slots=True)
class ForeignDevice:
    """The device as it was found: with another key or mark it is another one to us."""

    name: str
    key: PublicKey
    listen_port: int
    fwmark: int


@dataclass(slots=True)
class _Contact:
    """How one peer's agent is reached."""

    peer: ForeignPeer
    since: float
    ask_at: float
    delay: float = ASK_FIRST
    heard_at: float = float("-inf")
    heard_from: Endpoint | None = None
    is_reached: bool = False

    def is_heard(self, now: float) -> bool:
        return now < self.heard_at + REACHED_FOR


@dataclass(frozen=True, slots=True)
class Standing:
    """How a peer's agent is reached: where, why not ("": it is), and since when it is so or not."""

    is_reached: bool
    endpoint: Endpoint | None
    reason: str
    since: float


@dataclass(frozen=True, slots=True)
class Awaited:
    """A peer with whom the way back is under way, how many seconds it takes at most, and what holds it up."""

    name: str
    seconds: float
    reason: str


class PskAgent:
    """`random` draws from [0, 1), `wall` is the wall clock at `now`; `channel` holds a fresh boot id.

    `mesh_uid` is "" where a peers file names the peers: it vouches for their identities.
    """

    def __init__(
        self,
        device: ForeignDevice,
        peers: PeersFile,
        *,
        channel: Channel,
        maker: KeyMaker | None,
        records: Mapping[PublicKey, Record],
        random: Callable[[], float],
        now: float,
        wall: float,
        mesh_uid: str = "",
    ) -> None:
        self._device, self._file, self._channel = device, peers, channel
        self._mesh_uid = mesh_uid
        self._offset = wall - now
        self._listen_port = device.listen_port
        self._known = set(records)  # peers that the device has, or had
        self._psk = Psk(own=device.key, random=random, records=records, offset=self._offset, is_managed=True)
        if maker is not None:
            self._psk.equip(maker, now)
        self._members: frozenset[PublicKey] = frozenset()
        self._contacts: dict[PublicKey, _Contact] = {}
        self._by_probe: dict[PublicKey, PublicKey] = {}
        self._take_contacts(now)
        self._transactions = itertools.count(1)
        self._observed: ObservedDevice | None = None
        self._sessions: dict[PublicKey, tuple[float, float]] = {}  # key -> (last handshake, since when, ours)
        self._is_observing = True  # the shell looks once at its start
        self._observe_at: float | None = None
        self._is_busy = False
        self._retry = RETRY_MIN
        self._plan_after = now
        self._error = self._disk_error = ""
        self._is_leaving = False
        self._led_back: frozenset[PublicKey] = frozenset()
        self._is_changed = False
        self._unwritten = 0  # records on their way to the disk
        self._dropped = 0
        self._out: list[Output] = []
        self.replaced = ""  # why this agent cannot go on: the device is another one now

    # --- the verbs -----------------------------------------------------------------------------------------

    def receive(self, event: Input, now: float) -> None:
        """Take one input."""
        match event:
            case DatagramArrived(data, Socket(source)):
                self._datagram(data, source, now)
            case DeviceObserved(device, wall=wall):
                self._device_observed(device, wall, now)
            case Applied():
                self._is_busy, self._retry, self._error = False, RETRY_MIN, ""
                self._is_observing = True  # the shell looks after each batch
            case Failed(error=error):
                self._is_busy = self._is_observing = False
                self._error = error
                self._plan_after = self._observe_at = now + self._retry
                self._retry = min(2 * self._retry, RETRY_MAX)
            case PskSaved(peer, error):
                self._unwritten -= 1
                self._disk_error = error
                self._psk.written(peer, error, now)
            case CommandArrived(number, command, peer_name):
                if command in ("leave", "leave-forced"):
                    self.give_back(number, is_forced=command == "leave-forced", now=now)
                else:
                    self._out.append(Reply(number, self._answer(command, peer_name, now)))
            case _:
                pass  # of meshes
        self._collect(now)

    def handle_timer(self, now: float) -> None:
        """Do what is due."""
        for key, contact in self._contacts.items():
            if now >= contact.ask_at:
                self._ask(key, contact, now)
            self._stand(key, contact, now)
        self._psk.handle_timer(now)
        self._collect(now)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to run next."""
        times = [contact.ask_at for contact in self._contacts.values()]
        times += [c.heard_at + REACHED_FOR for c in self._contacts.values() if c.is_reached]
        due = self._psk.get_timer()
        if due is not None:
            times.append(due)
        if self._observe_at is not None and not self._is_observing and not self._is_busy:
            times.append(self._observe_at)
        return min(times, default=None)

    def outputs(self) -> list[Output]:
        """What is to be performed now, in order."""
        out, self._out = self._out, []
        return out

    @property
    def listen_port(self) -> int:
        """WireGuard's UDP port, whoever chose it."""
        return self._listen_port

    @property
    def reaches_a_peer(self) -> bool:
        """Whether some peer's agent answers."""
        return any(contact.is_reached for contact in self._contacts.values())

    @property
    def error(self) -> str:
        """What stands against the device; "" for nothing."""
        return self._error

    @property
    def disk_error(self) -> str:
        """Why keys could not be written down; "" where they could."""
        return self._disk_error

    @property
    def dropped(self) -> int:
        """Datagrams that led nowhere."""
        return self._dropped + self._psk.dropped

    @property
    def psk(self) -> Psk:
        """All pairs' keys."""
        return self._psk

    @property
    def observed(self) -> ObservedDevice | None:
        """The device, as it was last read."""
        return self._observed

    @property
    def sessions(self) -> Mapping[PublicKey, tuple[float, float]]:
        """By peer: the last handshake as the device says it, and since when there is that session."""
        return self._sessions

    def take_change(self) -> bool:
        """Whether a pair stands otherwise than before; asked again, it does not."""
        changed, self._is_changed = self._is_changed, False
        return changed

    def stands(self, now: float) -> dict[PublicKey, Standing]:
        """How each peer's agent is reached."""
        return {
            key: Standing(
                contact.is_reached, self._where(key, contact, now), self._reason(key, contact), contact.since
            )
            for key, contact in self._contacts.items()
        }

    def set_peers(self, peers: PeersFile, mesh_uid: str, now: float) -> None:
        """Take with whom keys are agreed from now on."""
        before, self._file, self._mesh_uid = self._file, peers, mesh_uid
        told = {key for key, peer in peers.peers.items() if before.peers.get(key) != peer}
        self._take_contacts(now)
        if returned := before.leaving - peers.leaving:
            self._members -= returned  # who is back after it left is keyed anew
            self._configure(now)
        self._take_members(now, told=told)
        self._collect(now)

    def leave(self, now: float) -> None:
        """Have every pair go back to its manager's key."""
        self._is_leaving = True
        for key in sorted(self._members):
            self._psk.leave(key, now)
        self._collect(now)

    @property
    def has_left(self) -> bool:
        """Whether every pair has its manager's key again, as asked."""
        is_idle = not self._is_busy and not self._is_observing and not self._unwritten
        return (
            self._is_leaving
            and is_idle
            and self._observed is not None
            and not self._psk.keyed
            and not self._plan()
        )

    # --- datagrams -----------------------------------------------------------------------------------------

    def _datagram(self, data: bytes, source: Endpoint, now: float) -> None:
        try:
            opened = self._channel.open(data)
        except WireError:
            self._dropped += 1
            return
        match opened:
            case Hello(cookie=cookie):
                self._out.append(Send(Socket(source), cookie))
            case Confirmed(sender):
                contact = self._contacts[self._by_probe[sender]]
                contact.ask_at = now
            case Received(sender, message):
                self._message(self._by_probe[sender], message, source, now)
            case _:
                assert_never(opened)

    def _message(self, key: PublicKey, message: Message, source: Endpoint, now: float) -> None:
        contact = self._contacts[key]
        contact.heard_at, contact.heard_from = now, source
        if not contact.is_reached:
            contact.delay, contact.ask_at = ASK_FIRST, now
        self._stand(key, contact, now)
        match message:
            case Ping(transaction):
                received, has_session = self._seen(key, now)
                self._say(key, Pong(transaction, source, has_session, received), source)
            case KeyPart():
                self._psk.receive(key, message, now)
            case _:
                pass  # a Pong was worth that it came; the rest is of meshes

    def _ask(self, key: PublicKey, contact: _Contact, now: float) -> None:
        if contact.is_heard(now):
            contact.delay, contact.ask_at = ASK_FIRST, now + ASK_REACHED
        else:
            contact.ask_at = now + contact.delay
            contact.delay = min(2 * contact.delay, ASK_LONGEST)
        received, has_session = self._seen(key, now)
        question = Ping(next(self._transactions) % 2**32, has_session, received)
        for endpoint in {self._endpoint_of(key), contact.heard_from if contact.is_heard(now) else None}:
            if endpoint is not None:
                self._say(key, question, endpoint)

    def _say(self, key: PublicKey, message: Message, endpoint: Endpoint) -> None:
        try:
            data = self._channel.seal(self._contacts[key].peer.probe, message)
        except NotACorrespondent:
            self._dropped += 1
            return
        self._out.append(Send(Socket(endpoint), data))

    def _stand(self, key: PublicKey, contact: _Contact, now: float) -> None:
        before, contact.is_reached = contact.is_reached, contact.is_heard(now)
        if contact.is_reached is not before:
            self._is_changed, contact.since = True, now
        self._psk.reach(key, now, is_reached=contact.is_reached)

    def _where(self, key: PublicKey, contact: _Contact, now: float) -> Endpoint | None:
        """Where what is said to a peer is sent."""
        return contact.heard_from if contact.is_heard(now) else self._endpoint_of(key)

    def _endpoint_of(self, key: PublicKey) -> Endpoint | None:
        peer = self._observed.peers.get(key) if self._observed is not None else None
        return peer.endpoint if peer is not None else None

    def _seen(self, key: PublicKey, now: float) -> tuple[int, bool]:
        """Bytes that the device received from a peer, and whether it has a session with it."""
        peer = self._observed.peers.get(key) if self._observed is not None else None
        stamp, since = self._sessions.get(key, (0.0, 0.0))
        return (peer.rx if peer is not None else 0), stamp > 0.0 and now - since < SESSION_VALID

    # --- the device ----------------------------------------------------------------------------------------

    def _device_observed(self, device: ObservedDevice, wall: float, now: float) -> None:
        self._is_observing, self._observe_at = False, now + OBSERVE_IDLE
        if not device.exists or device.public_key is None:
            self._error = f"there is no interface {self._device.name}: bring it up; keys stay as they are"
            self._observed = None
            self._psk.forget_device()
            return
        if (device.public_key, device.fwmark) != (self._device.key, self._device.fwmark):
            self.replaced = f"{self._device.name} has another key or mark now: start this agent again"
            return
        self._error = ""
        self._listen_port = device.listen_port or self._listen_port
        is_first, self._observed = self._observed is None, device
        self._sessions = {key: self._session(key, peer, wall, now) for key, peer in device.peers.items()}
        self._known.update(device.peers)
        self._take_members(now)
        self._psk.observe(
            {
                key: Reading(device.peers[key].psk, stamp, since if stamp > 0.0 else None)
                for key, (stamp, since) in self._sessions.items()
            },
            now,
        )
        for contact in self._contacts.values() if is_first else ():
            contact.ask_at = now

    def _session(self, key: PublicKey, peer: ObservedPeer, wall: float, now: float) -> tuple[float, float]:
        known, stamp = self._sessions.get(key), peer.last_handshake or 0.0
        if known is None or stamp == 0.0:  # the device was made anew: its sessions are gone
            age = wall - stamp if stamp > 0.0 else SESSION_VALID
            return stamp, now - max(age, 0.0)
        return (stamp, now) if stamp != known[0] and stamp > 0.0 else known

    def _nudge(self, key: PublicKey) -> None:
        address = self._address_of(key)
        if address is not None:
            self._out.append(NudgeTunnel(key, address))

    def _take_contacts(self, now: float) -> None:
        peers = self._file.peers
        self._contacts = {
            key: self._contacts.get(key) or _Contact(peer, now, now) for key, peer in peers.items()
        }
        for key, contact in self._contacts.items():
            contact.peer = peers[key]
        self._by_probe = {peer.probe: key for key, peer in peers.items()}
        self._channel.set_correspondents(frozenset(self._by_probe))

    def _take_members(self, now: float, *, told: Set[PublicKey] | None = None) -> None:
        """Key those who are named and on the device; of `told` something else may be named than before."""
        members = frozenset(self._known & self._contacts.keys())
        if members == self._members and told is None:
            return
        self._members = members
        new = self._configure(now)
        for key in sorted(new | (members & told if told is not None else set())):
            contact = self._contacts[key]
            self._psk.identify(key, contact.peer.identity, contact.peer.name, now)
            if not self._mesh_uid and contact.peer.identity is not None:
                self._psk.trust(key, contact.peer.identity, now)  # the peers file is the operator's word
            self._stand(key, contact, now)
        for key in sorted(members if self._is_leaving else members & self._file.leaving):
            if key in new or key not in self._led_back:
                self._psk.leave(key, now)
        self._led_back = members & self._file.leaving

    def _configure(self, now: float) -> set[PublicKey]:
        """Have the members agree on keys; whom a mesh does not name now may be named again."""
        return self._psk.configure(
            self._file.policy,
            mesh_uid=self._mesh_uid or SCOPE,
            members=self._members,
            is_complete=not self._mesh_uid,
            now=now,
        )

    def _plan(self) -> list[SetPsk]:
        """What differs between the keys that are wanted and those that the device has."""
        peers = self._observed.peers if self._observed is not None else {}
        view = self._psk.view()
        return [
            SetPsk(key, wanted)
            for key in sorted(peers.keys() & view.keys())
            if (wanted := view[key].psk) is not None and wanted != (peers[key].psk or NO_PSK)
        ]

    def _collect(self, now: float) -> None:
        for output in self._psk.outputs():
            match output:
                case SayPart(key, part):
                    endpoint = self._where(key, self._contacts[key], now)
                    if endpoint is not None:
                        self._say(key, part, endpoint)
                case WriteRecord(key, record):
                    self._unwritten += record is not None
                    self._out.append(SavePsk(key, record))
                case NudgePeer(key):
                    self._nudge(key)
                case _:
                    assert_never(output)
        self._is_changed |= bool(self._psk.take_changes())
        if self._is_busy or self._is_observing or self.replaced:
            return
        batch = self._plan()[:MAX_BATCH]
        if batch and now >= self._plan_after:
            self._is_busy = True
            self._out.append(DeviceBatch(tuple(batch), None))
            return
        if self._psk.wants_look or self._is_leaving:
            self._observe_at = min(self._observe_at or now + OBSERVE_KEYS, now + OBSERVE_KEYS)
        if self._observe_at is not None and now >= self._observe_at:
            self._is_observing, self._observe_at = True, None
            self._out.append(Observe())

    def _address_of(self, key: PublicKey) -> IPAddress | None:
        """An address that the device sends to this peer and to no other."""
        peers = self._observed.peers if self._observed is not None else {}
        if key not in peers:
            return None
        for prefix in sorted(peers[key].allowed_ips, key=lambda p: (-p.prefixlen, p.version)):
            address = _address_in(prefix)
            others = (p for other, peer in peers.items() if other != key for p in peer.allowed_ips)
            if not any(p.prefixlen > prefix.prefixlen and address in p for p in others):
                return address
        return None

    # --- commands ------------------------------------------------------------------------------------------

    def _answer(self, command: str, name: str, now: float) -> dict[str, object]:
        match command:
            case "status":
                return {"ok": True, "status": self.status(now)}
            case "rotate":
                keys = [key for key in sorted(self._members) if name in ("", self._file.peers[key].name)]
                if not keys or self._is_leaving:
                    return {"ok": False, "error": f"no peer {name!r} to agree on a new key with"}
                for key in keys:
                    self._psk.rotate(key, now)
                return {"ok": True, "peers": len(keys)}
            case _:
                known = "status, rotate, leave, leave-forced"
                return {"ok": False, "error": f"unknown command {command!r}; this agent knows: {known}"}

    def give_back(self, number: int, *, is_forced: bool, now: float) -> bool:
        """Answer the command to leave: have every pair go back, unless that would end a link."""
        keyed = self._psk.keyed
        away = [key for key in keyed if not self._contacts[key].is_heard(now)]
        names = ", ".join(self._file.peers[key].name for key in away)
        if away and not is_forced:
            error = (
                f"out of reach: {names}. Nothing was changed: a link ends where its two sides hold different "
                "keys. With --force those get the earlier key back on this side alone"
            )
            self._out.append(Reply(number, {"ok": False, "error": error}))
            return self._is_leaving
        is_again = self._is_leaving
        self.leave(now)
        for key in keyed if is_again and is_forced else away:
            self._psk.abandon(key, now)
        self._collect(now)
        self._out.append(Reply(number, {"ok": True, "away": names}))
        return True

    def awaited(self, now: float) -> list[Awaited]:
        """With whom a pair is still on its way back to its manager's key, by name."""
        keys = self._psk.keyed if self._is_leaving else sorted(set(self._psk.keyed) & self._file.leaving)
        return [
            Awaited(
                self._file.peers[key].name, self._within(key, now), self._reason(key, self._contacts[key])
            )
            for key in keys
        ]

    def _within(self, key: PublicKey, now: float) -> float:
        """After how many seconds the pair is back at its manager's key, if nothing is lost, at most."""
        stamp, since = self._sessions.get(key, (0.0, 0.0))
        age = now - since if stamp > 0.0 else SESSION_VALID
        if age >= SESSION_VALID:
            return QUIET + GOING_BACK
        is_young = self._psk.view()[key].laid > 0 or age <= WAY_BACK.oldest
        return GOING_BACK if is_young else max(NUDGE_FROM - age, 0.0) + GOING_BACK

    def status(self, now: float) -> dict[str, object]:
        """What `scope-agent psk status` and `scopectl` show: plain JSON values, no key but public ones."""
        errors = {"Device": self._error, "Disk": self._disk_error}
        return {
            "mesh": f"@{self._device.name}",
            "publicKey": str(self._device.key),
            "device": {"name": self._device.name, "listenPort": self._listen_port},
            "leaving": self._is_leaving,
            "awaited": [asdict(each) for each in self.awaited(now)],
            "peers": [self._peer_status(key, contact, now) for key, contact in self._contacts.items()],
            "dropped": self.dropped,
            "conditions": [{"type": kind, "message": text} for kind, text in errors.items() if text],
        }

    def _peer_status(self, key: PublicKey, contact: _Contact, now: float) -> dict[str, object]:
        endpoint = self._where(key, contact, now)
        stamp, since = self._sessions.get(key, (0.0, 0.0))
        return {
            "name": contact.peer.name,
            "publicKey": str(key),
            "endpoint": str(endpoint) if endpoint is not None else None,
            "path": PathKind.DIRECT if contact.is_reached else PathKind.NONE,
            "reached": contact.is_reached,
            "lastHandshakeSeconds": round(now - since, 1) if stamp > 0.0 else None,
            "psk": psk_status(self._psk.view().get(key), now + self._offset),
            "reason": self._reason(key, contact),
        }

    def _reason(self, key: PublicKey, contact: _Contact) -> str:
        if self._observed is not None and key not in self._observed.peers:
            return f"{self._device.name} has no peer with this public key: see `wg show`, and the peers file"
        view = self._psk.view().get(key)
        if view is not None and view.conflict:
            return "another program replaces the key again and again: the pair goes back to that program's"
        if view is not None and view.failure:
            return view.failure
        if contact.is_reached:
            return ""
        if self._endpoint_of(key) is None:
            return "the device knows no endpoint of it yet"
        return "no agent answers there: it does not run, or probeKey in one of the two peers files is wrong"


def plan_alone(device: ObservedDevice, records: Mapping[PublicKey, Record]) -> tuple[SetPsk, ...]:
    """Where no agent runs: the manager's key for each peer that has one of ours."""
    return tuple(
        SetPsk(key, record.manager)
        for key, record in sorted(records.items())
        if record.manager is not None
        and (peer := device.peers.get(key)) is not None
        and peer.psk in [keys.psk for keys in (record.current, record.next) if keys is not None]
    )


def _address_in(prefix: IPNetwork) -> IPAddress:
    if prefix.prefixlen == 0:
        return _SOMEWHERE[prefix.version]
    return prefix.network_address + (1 if prefix.num_addresses > 1 else 0)
