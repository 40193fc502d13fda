"""An edge's choice of its hub, and how it claims it: in virtual time, the test answering for hubs."""

from __future__ import annotations

from scope_agent.tree.attaching import (
    FIRST_PATIENCE,
    LEAVE_AFTER,
    NEARER_FOR,
    SILENT_FOR,
    Attaching,
    Claiming,
    Phase,
    Reach,
)

from scope.model import Attachment, PublicKey

OWN, NEAR, FAR, OTHER = (PublicKey(bytes([number]) * 32) for number in (1, 2, 3, 4))
WALL = 1_700_000_000.0


def _sign(hub: PublicKey, epoch: int) -> Attachment:
    return Attachment(OWN, hub, epoch, bytes(64))


class Edge:
    """An edge whose hubs answer when the test says so."""

    def __init__(self, claim: Attachment | None = None, *, wall: float = WALL) -> None:
        self.now = 100.0
        self.wall = wall - self.now
        self.said: list[Claiming] = []
        self.attaching = Attaching(own=OWN, sign=_sign)
        self.attaching.restore(claim)

    def configure(self, *hubs: PublicKey, tree: bool = True, was_full: bool = False) -> None:
        self.attaching.configure(
            set(hubs), wants_tree=tree, was_full=was_full, now=self.now, wall=self.wall + self.now
        )
        self.run(0.0)

    def reach(self, hub: PublicKey, rtt: float | None, *, in_doubt: bool = False) -> None:
        """`rtt` None: not at all."""
        reach = Reach(is_alive=rtt is not None, rtt=rtt, is_in_doubt=in_doubt)
        self.attaching.observe(hub, reach, now=self.now, wall=self.wall + self.now)
        self.run(0.0)

    def answer(self, held: Attachment | None = None, *, by: PublicKey | None = None) -> None:
        """The hub that was last told answers, with the claim that it was told."""
        last = self.said[-1]
        self.attaching.answered(by or last.hub, held or last.claim, now=self.now, wall=self.wall + self.now)
        self.run(0.0)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        for _ in range(1000):
            due = self.attaching.get_timer()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self.attaching.handle_timer(self.now, self.wall + self.now)
            self.said += self.attaching.outputs()
        else:
            raise AssertionError("its timer never moves on")
        self.now = end
        self.said += self.attaching.outputs()

    @property
    def home(self) -> PublicKey | None:
        return self.attaching.home

    def is_in(self, phase: Phase) -> bool:
        return self.attaching.phase is phase


def _attached(*others: PublicKey) -> Edge:
    """To NEAR, in a tree."""
    edge = Edge()
    edge.configure(NEAR, *others)
    edge.reach(NEAR, 0.02)
    edge.answer()
    assert edge.home == NEAR
    return edge


def test_the_first_hub_that_is_reached_is_claimed_at_once_and_is_home_with_its_answer() -> None:
    edge = Edge()
    edge.configure(NEAR, FAR)
    assert edge.is_in(Phase.TREE) and not edge.said
    edge.reach(NEAR, 0.02)
    assert edge.said == [Claiming(NEAR, _sign(NEAR, int(WALL * 1000)))]
    edge.answer()
    assert edge.home == NEAR and edge.attaching.claim == edge.said[-1].claim
    edge.run(60.0)
    assert len(edge.said) == 1


def test_a_claim_that_nobody_answers_is_said_again_and_then_to_another_hub() -> None:
    edge = Edge()
    edge.configure(NEAR, FAR)
    edge.reach(FAR, 0.2)
    edge.reach(NEAR, 0.02)
    edge.run(1.0)
    assert [each.hub for each in edge.said] == [FAR, FAR, NEAR]
    edge.answer()
    edge.run(SILENT_FOR + NEARER_FOR)
    assert edge.home == NEAR


def test_a_hub_that_is_silent_stays_claimed_where_there_is_no_other() -> None:
    edge = Edge()
    edge.configure(NEAR)
    edge.reach(NEAR, 0.02)
    edge.run(300.0)
    assert {each.hub for each in edge.said} == {NEAR} and 10 < len(edge.said) < 30
    assert edge.home == NEAR


def test_a_home_that_dies_is_left_at_once_for_the_nearest_that_lives() -> None:
    edge = _attached(FAR, OTHER)
    edge.reach(FAR, 0.2)
    edge.reach(OTHER, 0.1)
    edge.reach(NEAR, None)
    assert edge.said[-1].hub == OTHER and edge.home == OTHER  # nothing is lost by not waiting
    assert edge.said[-1].claim.epoch > edge.said[0].claim.epoch


def test_a_home_that_dies_is_kept_where_nobody_else_lives() -> None:
    edge = _attached(FAR)
    edge.reach(NEAR, None)
    edge.run(10.0)
    assert edge.home == NEAR and len(edge.said) == 1


def test_the_other_hubs_are_asked_once_the_home_is_in_doubt() -> None:
    edge = _attached(FAR)
    edge.reach(FAR, 0.2)
    assert edge.attaching.take_doubt() == frozenset()
    edge.reach(NEAR, 0.02, in_doubt=True)
    assert edge.attaching.take_doubt() == {FAR}
    edge.reach(NEAR, 0.02, in_doubt=True)
    assert edge.attaching.take_doubt() == frozenset()


def test_a_hub_that_stays_clearly_nearer_becomes_home_and_the_old_one_leads_until_it_answers() -> None:
    edge = _attached(OTHER)
    edge.reach(NEAR, 0.2)
    edge.reach(OTHER, 0.02)
    edge.run(NEARER_FOR / 2)
    edge.reach(OTHER, 0.3)  # a wobble
    edge.reach(OTHER, 0.02)
    edge.run(NEARER_FOR - 0.1)
    assert len(edge.said) == 1
    edge.run(0.2)
    assert edge.said[-1].hub == OTHER and edge.home == NEAR
    edge.answer()
    assert edge.home == OTHER


def test_the_wait_for_a_nearer_hub_ends_at_any_time_of_the_clock() -> None:
    """Where the difference of two times is not what their sum was, a timer would ask for the past."""
    for number in range(200):
        edge = _attached(OTHER)
        edge.run(number / 7)
        edge.reach(NEAR, 0.2)
        edge.reach(OTHER, 0.02)
        edge.run(NEARER_FOR + 0.1)
        assert edge.said[-1].hub == OTHER


def test_a_hub_that_is_no_hub_any_more_is_left() -> None:
    edge = _attached(FAR)
    edge.reach(FAR, 0.2)
    edge.configure(FAR)
    assert edge.home == FAR and edge.said[-1].hub == FAR


def test_after_a_restart_the_home_is_the_one_on_disk_and_has_time_to_be_reached() -> None:
    edge = Edge(_sign(NEAR, 7))
    edge.configure(NEAR, FAR, was_full=True)
    assert edge.is_in(Phase.TREE) and edge.home == NEAR
    edge.reach(FAR, 0.02)
    edge.run(FIRST_PATIENCE / 2)
    edge.reach(NEAR, 0.2)
    edge.run(0.4)
    assert edge.home == NEAR and edge.said[-1] == Claiming(NEAR, _sign(NEAR, 7))


def test_a_claim_is_above_the_last_one_although_the_clock_went_back() -> None:
    edge = Edge(_sign(FAR, 10**15))
    edge.configure(NEAR)
    edge.reach(NEAR, 0.02)
    assert edge.said[-1].claim == _sign(NEAR, 10**15 + 1)


def test_a_later_claim_that_a_hub_knows_and_we_forgot_is_topped() -> None:
    edge = Edge(wall=1000.0)
    edge.configure(NEAR)
    edge.reach(NEAR, 0.02)
    edge.answer(_sign(FAR, 10**15))
    assert edge.said[-1] == Claiming(NEAR, _sign(NEAR, 10**15 + 1))
    edge.answer()
    edge.run(60.0)
    assert edge.home == NEAR and edge.said[-1].claim.epoch == 10**15 + 1


def test_an_answer_with_an_older_claim_changes_nothing() -> None:
    edge = Edge()
    edge.configure(NEAR)
    edge.reach(NEAR, 0.02)
    edge.answer(_sign(NEAR, 5))
    assert edge.attaching.claim == _sign(NEAR, int(WALL * 1000))


def test_a_hub_that_starts_anew_is_told_again() -> None:
    edge = _attached()
    edge.attaching.greeted(NEAR, edge.now)
    edge.run(0.0)
    assert edge.said[-1] == edge.said[0] and len(edge.said) == 2 and edge.home == NEAR


# --- between topologies ----------------------------------------------------------------------------------


def test_from_a_full_mesh_the_links_stay_until_a_hub_has_answered() -> None:
    edge = Edge()
    edge.configure(NEAR, tree=False)
    edge.reach(NEAR, 0.02)
    assert edge.is_in(Phase.FULL) and not edge.said and not edge.attaching.watched()
    edge.configure(NEAR)
    assert edge.is_in(Phase.JOINING) and edge.home is None and edge.said[-1].hub == NEAR
    edge.answer()
    assert edge.is_in(Phase.TREE) and edge.home == NEAR


def test_in_a_tree_without_hubs_a_peer_keeps_what_it_has_also_over_a_restart() -> None:
    edge = Edge()
    edge.configure(tree=False)
    edge.configure()
    edge.run(3600.0)
    assert edge.is_in(Phase.JOINING)
    again = Edge(edge.attaching.claim)
    again.configure(was_full=True)
    assert again.is_in(Phase.JOINING)


def test_to_a_full_mesh_the_edge_stays_attached_for_a_minute_and_then_tells_every_hub() -> None:
    edge = _attached(FAR)
    edge.reach(FAR, 0.2)
    edge.configure(NEAR, FAR, tree=False)
    edge.run(LEAVE_AFTER - 1.0)
    assert edge.is_in(Phase.LEAVING) and edge.home == NEAR
    edge.run(1.1)
    assert edge.is_in(Phase.FULL) and edge.attaching.home is None
    released = edge.said[-2:]
    assert {each.hub for each in released} == {NEAR, FAR}
    assert {each.claim.hub for each in released} == {OWN}
    edge.answer(by=NEAR)
    edge.answer(by=FAR)
    count = len(edge.said)
    edge.run(600.0)
    assert len(edge.said) == count


def test_hubs_that_do_not_answer_a_release_are_let_be_in_the_end() -> None:
    edge = _attached()
    edge.configure(NEAR, tree=False)
    edge.run(LEAVE_AFTER + 600.0)
    assert edge.attaching.get_timer() is None and len(edge.said) < 40


def test_back_to_the_tree_within_the_minute_the_edge_is_attached_still() -> None:
    edge = _attached()
    edge.configure(NEAR, tree=False)
    edge.run(10.0)
    edge.configure(NEAR)
    edge.run(LEAVE_AFTER * 2)
    assert edge.is_in(Phase.TREE) and edge.home == NEAR and len(edge.said) == 1
