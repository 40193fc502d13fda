"""What hubs believe of edges, and how they tell each other: hubs that speak over a net which may lose."""

from __future__ import annotations

from dataclasses import replace

from scope_agent.desired import Identity
from scope_agent.state import make_identity
from scope_agent.tree.holding import FORGET_AFTER, WINDOW, Holding, Telling

from scope.attachments import sign_attachment
from scope.model import (
    Addressing,
    Assignment,
    Attachment,
    Mesh,
    MeshSpec,
    Meta,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    Role,
    Snapshot,
)

MESH = Mesh(Meta("home", uid="mesh-1"), MeshSpec(Addressing()))
NAMES = ("one", "two", "three", "a", "b")


def _identity(number: int) -> Identity:
    return make_identity(lambda count: number.to_bytes(2, "big") * (count // 2))


IDENTITIES = {name: _identity(number) for number, name in enumerate(NAMES, 1)}
KEYS = {name: identity.public.wireguard for name, identity in IDENTITIES.items()}
ONE, TWO, THREE, A, B = (KEYS[name] for name in NAMES)
HUBS = frozenset((ONE, TWO, THREE))


def claim(edge: str, hub: PublicKey, epoch: int, *, mesh: str = "mesh-1", by: str = "") -> Attachment:
    signing = IDENTITIES[by or edge].signing
    return sign_attachment(mesh_uid=mesh, edge=KEYS[edge], hub=hub, epoch=epoch, secret=signing)


def _peers(*names: str) -> dict[PublicKey, Peer]:
    return {
        KEYS[name]: Peer(
            Meta(name),
            PeerSpec("home"),
            PeerReport(IDENTITIES[name].public),
            Assignment(role=Role.HUB if KEYS[name] in HUBS else Role.EDGE),
        )
        for name in names
    }


class Net:
    """Hubs, and what they say to each other."""

    def __init__(self, *hubs: str) -> None:
        self.now = 0.0
        self.hubs = {KEYS[name]: Holding(own=KEYS[name]) for name in hubs}
        self.cut: set[PublicKey] = set()
        self.sent = 0
        for key in self.hubs:
            self.configure(key)

    def configure(
        self, key: PublicKey, *, names: tuple[str, ...] = NAMES, tree: bool = True, is_hub: bool = True
    ) -> None:
        peers = {each: peer for each, peer in _peers(*names).items() if each != key}
        self.hubs[key].configure(
            Snapshot(mesh=MESH, peers=peers),
            (self.hubs.keys() - {key}),
            is_hub=is_hub,
            is_tree=tree,
            now=self.now,
        )

    def tell(
        self, hub: PublicKey, *claims: Attachment, sender: PublicKey | None = None
    ) -> tuple[Attachment, ...]:
        return self.hubs[hub].take(sender or claims[0].edge, claims, is_tree=True, now=self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        for _ in range(10_000):
            due = min((t for h in self.hubs.values() if (t := h.get_timer()) is not None), default=None)
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            for key, hub in self.hubs.items():
                for telling in hub.handle_timer(self.now):
                    self._carry(key, telling)
        else:
            raise AssertionError("timers never move on")
        self.now = end

    def _carry(self, sender: PublicKey, telling: Telling) -> None:
        self.sent += 1
        if {sender, telling.hub} & self.cut:
            return
        known = self.hubs[telling.hub].take(sender, telling.attachments, is_tree=True, now=self.now)
        if known:
            self.hubs[sender].answered(telling.hub, known, self.now)

    def held(self, edge: PublicKey) -> set[Attachment | None]:
        return {hub.held.get(edge) for hub in self.hubs.values()}


def test_a_claim_is_answered_and_known_to_all_hubs_at_once() -> None:
    net = Net("one", "two", "three")
    said = claim("a", ONE, 1)
    assert net.tell(ONE, said) == (said,)
    net.run(0.0)
    assert net.held(A) == {said} and net.sent == 2
    assert net.hubs[ONE].home_of(A) is None
    assert net.hubs[TWO].home_of(A) == net.hubs[THREE].home_of(A) == ONE
    assert net.hubs[TWO].take_moves() == {A: (None, ONE)}
    net.run(600.0)
    assert net.sent == 2


def test_the_later_claim_holds_whatever_comes_first() -> None:
    net = Net("one", "two")
    later, earlier = claim("a", TWO, 9), claim("a", ONE, 8)
    net.tell(TWO, later)
    assert net.tell(ONE, earlier) == (earlier,)  # which nobody has told it yet
    net.run(0.0)
    assert net.held(A) == {later}
    assert net.tell(ONE, earlier) == (later,)


def test_claims_that_are_foreign_forged_or_of_no_member_change_nothing() -> None:
    net = Net("one", "two")
    held = claim("a", ONE, 1)
    net.tell(ONE, held)
    for wrong in (
        claim("a", TWO, 2, by="b"),
        claim("a", TWO, 2, mesh="mesh-2"),
        replace(claim("a", TWO, 2), epoch=3),
        claim("a", PublicKey(bytes(32)), 2),
    ):
        assert net.tell(ONE, wrong, sender=A) == (held,)
    net.configure(ONE, names=("two", "three", "a"))
    assert net.tell(ONE, claim("b", ONE, 1)) == ()
    assert net.tell(ONE, claim("a", TWO, 5), sender=B) == ()  # nobody but the edge and hubs bring any
    assert net.hubs[ONE].held == {A: held}


def test_who_is_no_hub_holds_nothing() -> None:
    net = Net("one")
    net.configure(ONE, is_hub=False)
    assert net.tell(ONE, claim("a", ONE, 1)) == ()


def test_a_hub_that_was_cut_off_hears_of_it_when_it_is_back() -> None:
    net = Net("one", "two")
    net.cut.add(TWO)
    net.tell(ONE, claim("a", ONE, 1))
    net.run(3600.0)
    assert 10 < net.sent < 200 and not net.hubs[TWO].held
    net.cut.clear()
    net.hubs[ONE].reached(TWO, net.now)
    net.run(0.0)
    assert net.held(A) == {claim("a", ONE, 1)}


def test_a_hub_that_starts_without_its_disk_is_told_everything() -> None:
    net = Net("one", "two")
    for epoch, edge in enumerate(("a", "b")):
        net.tell(ONE, claim(edge, ONE, epoch))
    net.run(1.0)
    net.hubs[TWO] = Holding(own=TWO)
    net.configure(TWO)
    net.hubs[ONE].greeted(TWO, net.now)
    net.run(0.0)
    assert net.hubs[TWO].homes() == {A: ONE, B: ONE}


def test_what_was_kept_counts_again_but_for_who_is_no_member() -> None:
    net = Net("one", "two")
    kept = (claim("a", TWO, 1), claim("b", TWO, 1))
    again = Holding(own=ONE)
    again.restore(kept)
    net.hubs[ONE] = again
    net.configure(ONE, names=("two", "three", "b"))
    assert again.homes() == {B: TWO}


def test_a_hub_that_is_told_much_is_told_no_more_than_it_answers() -> None:
    one = Holding(own=ONE)
    identities = [_identity(number) for number in range(101, 501)]
    peers = _peers("two") | {
        each.public.wireguard: Peer(Meta(str(n)), PeerSpec("home"), PeerReport(each.public))
        for n, each in enumerate(identities)
    }
    one.configure(Snapshot(mesh=MESH, peers=peers), {TWO}, is_hub=True, is_tree=True, now=0.0)
    for each in identities:
        own = each.public.wireguard
        said = sign_attachment(mesh_uid="mesh-1", edge=own, hub=ONE, epoch=1, secret=each.signing)
        one.take(own, (said,), is_tree=True, now=0.0)
    first = one.handle_timer(0.0)
    assert sum(len(telling.attachments) for telling in first) == WINDOW
    assert one.handle_timer(0.1) == []
    rest: set[PublicKey] = set()
    while first:
        for telling in first:
            rest |= {each.edge for each in telling.attachments}
            one.answered(TWO, telling.attachments, 0.2)
        first = one.handle_timer(0.2)
    assert len(rest) == 400 and one.get_timer() is None


def test_an_edge_that_is_attached_no_more_is_reached_straight() -> None:
    net = Net("one", "two")
    net.tell(ONE, claim("a", ONE, 1))
    net.run(0.0)
    net.hubs[TWO].take_moves()
    net.tell(TWO, claim("a", A, 2))
    net.run(0.0)
    assert net.hubs[TWO].take_moves() == {A: (ONE, None)} and not net.hubs[TWO].homes()
    assert not net.hubs[TWO].has_attached and not net.hubs[ONE].has_attached


def test_in_a_full_mesh_what_is_left_is_forgotten() -> None:
    net = Net("one", "two")
    net.tell(ONE, claim("a", TWO, 1))
    net.run(1.0)
    net.hubs[ONE].take_moves()
    net.configure(ONE, tree=False)
    net.run(FORGET_AFTER - 1.0)
    assert net.hubs[ONE].homes() == {A: TWO}
    net.run(2.0)
    assert not net.hubs[ONE].held and net.hubs[ONE].take_moves() == {A: (TWO, None)}
