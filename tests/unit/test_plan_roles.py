"""Hubs are whom someone asks for and, in the mode Auto, the best that all can reach; and they stay hubs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scope_operator.plan.conditions import HUBS_AVAILABLE, mesh_conditions, peer_conditions
from scope_operator.plan.hubs import BETTER_AFTER, GRACE, MAX_OTHERS, STABLE, hubs_wanted
from scope_operator.plan.roles import Asked, HubPlan, asked_of, assign_role, hubs_state, plan_hubs

from scope.model import (
    Assignment,
    Candidate,
    CandidateKind,
    Condition,
    Endpoint,
    Forwarding,
    HubChoice,
    HubMode,
    Hubs,
    LabelSelector,
    Link,
    Mapping,
    Mesh,
    MeshStatus,
    Meta,
    PathKind,
    Peer,
    PeerReport,
    PeerSpec,
    PublicKey,
    RelayReport,
    Role,
    Tombstone,
    TopologyMode,
)
from scope.resources import MAX_HUBS, MAX_REASON, parse, to_dict
from tests.unit.registry_conformance import MESH, keys

DAY = 86400.0
NOW = 1_800_000_000.0
LONG_AGO = NOW - 30 * DAY
LABELS = LabelSelector((("hub", "yes"),))
TOMBSTONE = Tombstone("m", "u", PublicKey(bytes(32)), PublicKey(bytes(32)), bytes(64))


def a_peer(
    name: str,
    *,
    role: Role = Role.AUTO,
    mapping: Mapping = Mapping.NONE,
    hosts: Iterable[str] = ("192.0.2.1:51820",),
    static: Iterable[str] = (),
    online: bool = True,
    since: float = LONG_AGO,
    relay: RelayReport | None = None,
    seen: dict[str, float] | None = None,
) -> Peer:
    """A peer whose agent reported; `seen` are its round trips to others, in milliseconds."""
    links = tuple(
        Link(other, PathKind.DIRECT, latency=milliseconds / 1000)
        for other, milliseconds in (seen or {}).items()
    )
    endpoints = tuple(Candidate(Endpoint.parse(each), CandidateKind.HOST) for each in hosts)
    return Peer(
        Meta(name, uid=name, created=LONG_AGO),
        PeerSpec("home", role=role, endpoints=tuple(map(Endpoint.parse, static))),
        PeerReport(keys(1), endpoints, mapping, links=links, relay=relay),
        Assignment(online=online, last_seen=since),
    )


def natted(name: str, *, mapping: Mapping = Mapping.ENDPOINT_INDEPENDENT) -> Peer:
    return a_peer(name, mapping=mapping, hosts=("192.168.1.7:51820",))


def mesh_with(hubs: Hubs, *, told: tuple[HubChoice, ...] = ()) -> Mesh:
    return Mesh(Meta("home", uid="m", created=LONG_AGO), replace(MESH.spec, hubs=hubs), MeshStatus(hubs=told))


AUTO = Hubs(mode=HubMode.AUTO)


class Registry:
    """Plans hubs again and again, and remembers between two plans nothing but what is written."""

    def __init__(
        self, *peers: Peer, hubs: Hubs = AUTO, labels: dict[str, dict[str, str]] | None = None
    ) -> None:
        self.now = NOW
        self.hubs = hubs
        self.topology = TopologyMode.FULL
        self.labels = labels or {}
        self.peers = {peer.meta.name: peer for peer in peers}
        self.told: tuple[HubChoice, ...] = ()
        self.writes = 0

    def put(self, *peers: Peer) -> None:
        for peer in peers:
            had = self.peers.get(peer.meta.name, peer).assignment
            assignment = replace(peer.assignment, role=had.role, conditions=had.conditions)
            self.peers[peer.meta.name] = replace(peer, assignment=assignment)

    @property
    def mesh(self) -> Mesh:
        mesh = mesh_with(self.hubs, told=self.told)
        return replace(mesh, spec=replace(mesh.spec, topology=self.topology))

    @property
    def asked(self) -> dict[str, Asked]:
        found = {
            name: asked_of(peer, hubs=self.hubs, labels=self.labels.get(name))
            for name, peer in self.peers.items()
        }
        return {name: asked for name, asked in found.items() if asked is not None}

    @property
    def hub_names(self) -> list[str]:
        return sorted(name for name, peer in self.peers.items() if peer.assignment.role is Role.HUB)

    def plan(self) -> HubPlan:
        asked = self.asked
        before = {name for name in self.hub_names if name not in asked}
        plan = plan_hubs(self.mesh, peers=self.peers, asked=asked, chosen=before, wall=self.now)
        for name, peer in self.peers.items():
            role = assign_role(peer, asked=asked.get(name), chosen=name in plan.chosen)
            conditions = peer_conditions(
                peer, mesh=MESH, lacks_address=False, conflict=None, online=True, wall=self.now, role=role
            )
            self.peers[name] = replace(
                peer, assignment=replace(peer.assignment, role=role, conditions=conditions)
            )
        if plan.told != self.told:
            self.writes += 1
            # As it comes back from where it is stored.
            stored = parse(to_dict(mesh_with(self.hubs, told=plan.told)))
            assert isinstance(stored, Mesh)
            assert stored.status.hubs == plan.told
            self.told = stored.status.hubs
        return plan

    def later(self, seconds: float, *, step: float = 60.0) -> list[str]:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.plan()
        return self.hub_names

    def why(self, name: str) -> str:
        return next((each.reason for each in self.told if each.peer == name), "")

    def condition(self) -> Condition:
        found = self.condition_if_any()
        assert found is not None
        return found

    def condition_if_any(self) -> Condition | None:
        self.plan()
        asked = self.asked
        chosen = [name for name in self.hub_names if name not in asked]
        state = hubs_state(self.mesh, peers=self.peers, asked=asked, chosen=chosen)
        made = mesh_conditions(
            self.mesh, overlaps=None, without_address=(), conflicting=(), wall=self.now, hubs=state
        )
        assert next(each for each in made if each.type == "Ready").status == "True"
        return next((each for each in made if each.type == HUBS_AVAILABLE), None)


# --- who asks -----------------------------------------------------------------------------------------------


def test_a_hub_is_declared_by_name_by_the_labels_of_its_node_or_by_its_own_spec() -> None:
    hubs = Hubs(names=("home.a",), selector=LABELS)
    registry = Registry(
        a_peer("home.a"),
        a_peer("home.b"),
        a_peer("home.c", role=Role.HUB),
        a_peer("home.d"),
        hubs=hubs,
        labels={"home.b": {"hub": "yes"}, "home.d": {"hub": "no"}},
    )
    registry.plan()
    assert registry.hub_names == ["home.a", "home.b", "home.c"]
    assert [(each.peer, each.chosen, each.reason) for each in registry.told] == [
        ("home.a", True, "named in spec.hubs"),
        ("home.b", True, "its Node is selected by spec.hubs"),
        ("home.c", True, "its spec says Hub"),
    ]


def test_a_selector_without_requirements_means_every_node_and_no_machine_without_one() -> None:
    hubs = Hubs(selector=LabelSelector())
    registry = Registry(a_peer("home.node"), a_peer("home.nas"), hubs=hubs, labels={"home.node": {}})
    registry.plan()
    assert registry.hub_names == ["home.node"]


def test_whoever_is_declared_is_a_hub_also_while_it_cannot_serve() -> None:
    registry = Registry(
        a_peer("home.a", online=False), natted("home.b"), hubs=Hubs(names=("home.a", "home.b"))
    )
    registry.later(2 * DAY, step=600.0)
    assert registry.hub_names == ["home.a", "home.b"]
    assert registry.why("home.a") == "named in spec.hubs; offline"
    assert registry.why("home.b") == "named in spec.hubs; behind a NAT, without an endpoint in its spec"


@pytest.mark.parametrize("mode", HubMode)
def test_a_peer_whose_spec_says_edge_is_never_a_hub(mode: HubMode) -> None:
    hubs = Hubs(mode=mode, names=("home.a",), selector=LabelSelector())
    excluded = a_peer("home.a", role=Role.EDGE), a_peer("home.b", role=Role.EDGE)
    registry = Registry(*excluded, hubs=hubs, labels={"home.b": {}})
    assert registry.later(2 * DAY, step=600.0) == []
    assert registry.why("home.a") == "named in spec.hubs, but its spec says Edge"
    assert registry.why("home.b") == "its Node is selected by spec.hubs, but its spec says Edge"


def test_a_removed_peer_is_no_hub() -> None:
    gone = a_peer("home.a", role=Role.HUB)
    gone = replace(gone, assignment=replace(gone.assignment, tombstone=TOMBSTONE))
    registry = Registry(gone, hubs=Hubs(mode=HubMode.AUTO, names=("home.a",)))
    registry.plan()
    assert registry.hub_names == []
    assert registry.why("home.a") == "named in spec.hubs, but the mesh has no such ScopePeer"


def test_without_being_asked_nobody_is_a_hub() -> None:
    registry = Registry(a_peer("home.a"), hubs=Hubs())
    assert registry.later(DAY, step=600.0) == []
    assert registry.told == ()
    assert registry.condition_if_any() is None


# --- whom the registry chooses ------------------------------------------------------------------------------


def test_auto_chooses_whom_every_peer_can_reach_and_says_why_not_the_others() -> None:
    registry = Registry(
        a_peer("home.open"),
        a_peer("home.forwarded", mapping=Mapping.ENDPOINT_INDEPENDENT, hosts=(), static=("198.51.100.1:9",)),
        natted("home.nat"),
        natted("home.symmetric", mapping=Mapping.ENDPOINT_DEPENDENT),
        natted("home.unknown", mapping=Mapping.UNKNOWN),
        a_peer("home.lan", hosts=("10.0.0.7:51820", "[fd00::7]:51820", "100.64.0.9:51820")),
        a_peer("home.off", online=False),
        a_peer("home.edge", role=Role.EDGE),
    )
    registry.plan()
    assert registry.hub_names == ["home.forwarded", "home.open"]
    reasons = {each.peer: each.reason for each in registry.told}
    for name in registry.hub_names:
        assert reasons.pop(name).startswith("chosen: every peer can reach it, by IPv4, and nobody else ")
    assert reasons == {
        "home.edge": "its spec says Edge",
        "home.lan": "no public address, and no endpoint in its spec",
        "home.nat": "behind a NAT, without an endpoint in its spec",
        "home.off": "offline",
        "home.symmetric": "behind a NAT, without an endpoint in its spec",
        "home.unknown": "not known yet whether there is a NAT before it",
    }


def test_auto_chooses_who_is_reached_in_more_families_then_the_nearest_then_who_is_online_longest() -> None:
    both = ("192.0.2.1:51820", "[2001:db8::1]:51820")
    far = a_peer("home.both", hosts=both)
    near, newer, older = a_peer("home.near"), a_peer("home.newer", since=NOW - DAY), a_peer("home.older")
    who_sees = natted("home.nat")
    sees = {"home.both": 90.0, "home.near": 10.0, "home.newer": 40.0, "home.older": 40.0}
    who_sees = replace(who_sees, report=a_peer("x", mapping=Mapping.UNKNOWN, hosts=(), seen=sees).report)
    for present, chosen in (
        ((far, near, newer, older), ["home.both", "home.near"]),
        ((near, newer, older), ["home.near", "home.older"]),
        ((newer, older), ["home.newer", "home.older"]),
    ):
        registry = Registry(*present, who_sees)
        registry.plan()
        assert registry.hub_names == chosen
        assert all(registry.why(peer.meta.name) for peer in present)
    three = Registry(near, newer, older, who_sees)
    three.plan()
    assert three.why("home.newer").startswith("not needed: there are enough hubs")


def test_the_latency_is_the_median_of_what_those_online_report_of_their_direct_paths() -> None:
    def reporter(name: str, a: float, b: float, *, online: bool = True) -> Peer:
        seen = {"home.a": a, "home.b": b, "home.c": 30.0}
        made = a_peer(name, mapping=Mapping.UNKNOWN, hosts=(), seen=seen, online=online)
        assert made.report is not None
        relayed = Link("home.d", PathKind.RELAYED, latency=0.001)
        return replace(made, report=replace(made.report, links=(*made.report.links, relayed)))

    registry = Registry(
        *map(a_peer, ("home.a", "home.b", "home.c", "home.d")),
        *(reporter("home.r1", 10, 60), reporter("home.r2", 20, 50), reporter("home.r3", 500, 40)),
        *(reporter("home.r4", 400, 1, online=False), reporter("home.r5", 400, 1, online=False)),
    )
    registry.plan()
    assert registry.hub_names == ["home.a", "home.c"]


def test_the_number_of_hubs_grows_slowly_with_the_mesh() -> None:
    assert [hubs_wanted(n) for n in (1, 2, 32, 33, 64, 65, 128, 1000, 10_000)] == [2, 2, 2, 3, 3, 4, 4, 7, 11]
    registry = Registry(*(a_peer(f"home.p{n:03}") for n in range(100)))
    registry.plan()
    assert len(registry.hub_names) == hubs_wanted(100) == 4


def test_hubs_that_are_asked_for_count_in_auto_too() -> None:
    hubs = Hubs(mode=HubMode.AUTO, names=("home.z",))
    registry = Registry(a_peer("home.a"), a_peer("home.b"), a_peer("home.z"), hubs=hubs)
    registry.plan()
    assert registry.hub_names == ["home.a", "home.z"]


def test_the_first_hub_is_chosen_at_once_and_the_second_when_it_has_been_online_for_a_while() -> None:
    registry = Registry(a_peer("home.a", since=NOW - 1), a_peer("home.b", since=NOW - 1))
    registry.plan()
    assert registry.hub_names == ["home.a"]
    assert registry.why("home.b") == "online for less than 5 minutes"
    assert registry.later(STABLE - 60) == ["home.a"]
    assert registry.later(60) == ["home.a", "home.b"]


def test_a_hub_stays_one_though_others_are_somewhat_better() -> None:
    seen = {"home.a": 50.0, "home.b": 50.0, "home.c": 35.0}
    registry = Registry(a_peer("home.a"), a_peer("home.b"))
    registry.plan()
    registry.put(a_peer("home.c"), a_peer("home.nat", mapping=Mapping.UNKNOWN, hosts=(), seen=seen))
    assert registry.later(3 * DAY, step=600.0) == ["home.a", "home.b"]
    assert registry.why("home.c").startswith("not needed")


def test_a_hub_is_replaced_by_one_that_is_clearly_better_for_long_enough_and_goes_last() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"))
    registry.plan()
    seen = {"home.a": 50.0, "home.b": 90.0, "home.c": 20.0}
    registry.put(a_peer("home.c"), a_peer("home.nat", mapping=Mapping.UNKNOWN, hosts=(), seen=seen))
    registry.plan()
    assert registry.why("home.c") == "clearly better than a hub: becomes one if that lasts for 30 minutes"
    assert registry.later(BETTER_AFTER - 60) == ["home.a", "home.b"]
    assert registry.later(60) == ["home.a", "home.b", "home.c"]
    assert registry.why("home.b").startswith("one hub more than needed: an Edge again")
    assert registry.later(GRACE - 60) == ["home.a", "home.b", "home.c"]
    assert registry.later(60) == ["home.a", "home.c"]
    assert registry.later(3 * DAY, step=600.0) == ["home.a", "home.c"]


def test_the_hub_that_is_one_too_many_is_the_same_one_however_latencies_wobble() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"))
    registry.plan()
    seen = {"home.a": 89.0, "home.b": 90.0, "home.c": 20.0}
    registry.put(a_peer("home.c"), a_peer("home.nat", mapping=Mapping.UNKNOWN, hosts=(), seen=seen))
    registry.later(BETTER_AFTER)
    for turn in range(int(GRACE / 60)):
        wobbles = seen | {"home.a": 91.0 if turn % 2 else 89.0}
        registry.put(a_peer("home.nat", mapping=Mapping.UNKNOWN, hosts=(), seen=wobbles))
        registry.later(60)
    assert registry.later(60) == ["home.a", "home.c"]


def test_a_peer_that_is_better_for_a_while_only_replaces_nobody() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"), a_peer("home.c"))
    registry.plan()
    assert registry.hub_names == ["home.a", "home.b"]
    for _ in range(5):
        for near in (20.0, 80.0):
            seen = {"home.a": 90.0, "home.b": 90.0, "home.c": near}
            registry.put(a_peer("home.nat", mapping=Mapping.UNKNOWN, hosts=(), seen=seen))
            assert registry.later(BETTER_AFTER - 60) == ["home.a", "home.b"]


def test_a_hub_that_goes_is_replaced_after_a_grace_and_not_before() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"), a_peer("home.c"))
    registry.plan()
    registry.put(a_peer("home.b", online=False, since=NOW))
    assert registry.later(GRACE - 60) == ["home.a", "home.b"]
    assert registry.why("home.b") == "offline: replaced if that lasts for 10 minutes"
    registry.put(a_peer("home.b", since=registry.now))
    assert registry.later(DAY, step=600.0) == ["home.a", "home.b"]
    registry.put(a_peer("home.b", online=False, since=registry.now))
    assert registry.later(GRACE) == ["home.a", "home.c"]
    assert registry.why("home.b") == "offline"
    registry.put(a_peer("home.b", since=registry.now))
    assert registry.later(DAY, step=600.0) == ["home.a", "home.c"]


def test_the_last_hub_that_goes_is_replaced_at_once() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"))
    registry.plan()
    registry.put(
        *(a_peer(name, online=False, since=NOW) for name in ("home.a", "home.b")),
        a_peer("home.c", since=NOW - 1),
    )
    registry.plan()
    assert registry.hub_names == ["home.a", "home.b", "home.c"]


def test_a_hub_that_nobody_can_replace_stays_one() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"), natted("home.nat"))
    registry.plan()
    registry.put(a_peer("home.b", online=False, since=NOW))
    assert registry.later(DAY, step=600.0) == ["home.a", "home.b"]
    assert registry.why("home.b") == "offline: kept until another peer can take its place"


def test_a_hub_whose_agent_starts_again_and_does_not_know_its_nat_yet_stays_one() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.c"))
    registry.plan()
    registry.put(natted("home.a", mapping=Mapping.UNKNOWN), natted("home.c", mapping=Mapping.UNKNOWN))
    registry.put(a_peer("home.d"))
    assert registry.later(60) == ["home.a", "home.c"]


def test_a_hub_that_moves_behind_a_nat_is_replaced() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"), a_peer("home.c"))
    registry.plan()
    registry.put(natted("home.b"))
    registry.plan()
    assert registry.hub_names == ["home.a", "home.b"]
    assert registry.later(GRACE) == ["home.a", "home.c"]


def test_a_hub_that_does_not_forward_is_replaced_and_tried_again_a_day_later() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"), a_peer("home.c"))
    registry.plan()
    registry.put(a_peer("home.b", relay=RelayReport(Forwarding.NONE, reason="no tun")))
    registry.plan()
    assert registry.why("home.b") == "does not forward: replaced if that lasts for 10 minutes"
    [failed] = [each for each in registry.peers["home.b"].assignment.conditions if each.type == "RelayFailed"]
    assert (failed.status, failed.reason) == ("True", "NotForwarding")
    assert "no tun" in failed.message
    assert registry.later(GRACE) == ["home.a", "home.c"]
    # An Edge reports nothing of relaying. The others go: nothing but what is remembered speaks against it.
    registry.put(a_peer("home.b"), *(a_peer(f"home.{n}", online=False, since=registry.now) for n in "ac"))
    assert "home.b" not in registry.later(DAY - GRACE, step=600.0)
    assert registry.why("home.b") == "did not forward when it was a hub: not tried again for a day"
    assert "home.b" in registry.later(GRACE + 600, step=600.0)
    assert all(each.type != "RelayFailed" for each in registry.peers["home.b"].assignment.conditions)


def test_a_mesh_that_shrank_lets_a_hub_go_and_one_that_shrank_a_little_does_not() -> None:
    names = [f"home.p{n:03}" for n in range(34)]
    registry = Registry(*map(a_peer, names))
    registry.plan()
    assert len(registry.hub_names) == 3
    del registry.peers[names[-1]], registry.peers[names[-2]], registry.peers[names[-3]]
    assert len(registry.later(DAY, step=600.0)) == 3
    for name in names[20:-3]:
        del registry.peers[name]
    assert len(registry.later(GRACE, step=60.0)) == 3
    assert len(registry.later(GRACE, step=60.0)) == 2


def test_what_is_told_is_bounded_and_remembers_what_is_contested() -> None:
    named = tuple(f"home.absent{n}" for n in range(MAX_HUBS))
    registry = Registry(
        *(a_peer(f"home.p{n:03}", hosts=("192.0.2.1:1",)) for n in range(300)),
        *(a_peer(f"home.hub{n:03}", role=Role.HUB, hosts=("192.0.2.1:1",)) for n in range(100)),
        hubs=Hubs(mode=HubMode.AUTO, names=named),
    )
    registry.plan()
    assert len(registry.told) <= MAX_HUBS
    assert sum(not each.chosen for each in registry.told) == MAX_OTHERS
    assert [each.chosen for each in registry.told] == sorted(
        (each.chosen for each in registry.told), reverse=True
    )
    assert all(len(each.reason) <= MAX_REASON for each in registry.told)


def test_two_registries_that_know_the_same_choose_the_same() -> None:
    present = [a_peer(f"home.p{n}") for n in range(20)]
    one, other = Registry(*present), Registry(*reversed(present))
    assert one.plan() == other.plan()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_hubs_do_not_change_with_noise_of_latencies(data: st.DataObject) -> None:
    """Round trips that wobble by a fifth around their means change no role, and after a while no word."""
    size = data.draw(st.integers(3, 8), label="candidates")
    means = data.draw(st.lists(st.floats(1.0, 300.0), min_size=size, max_size=size), label="means")
    excluded = data.draw(st.sets(st.integers(0, size - 1), max_size=2), label="excluded")
    names = [f"home.p{n}" for n in range(size)]
    roles = [Role.EDGE if n in excluded else Role.AUTO for n in range(size)]
    noise = st.floats(0.9, 1.1)

    def measure(registry: Registry) -> None:
        seen = {name: mean * data.draw(noise) for name, mean in zip(names, means, strict=True)}
        registry.put(a_peer("home.nat", mapping=Mapping.UNKNOWN, hosts=(), seen=seen))

    registry = Registry(*(a_peer(name, role=role) for name, role in zip(names, roles, strict=True)))
    measure(registry)
    registry.plan()
    first = registry.hub_names
    for _ in range(8):
        measure(registry)
        registry.later(BETTER_AFTER, step=900.0)
        assert not {names[n] for n in excluded} & set(registry.hub_names)
        assert registry.hub_names == first


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_whatever_happens_the_excluded_are_no_hubs_and_there_is_one_where_there_can_be(
    data: st.DataObject,
) -> None:
    names = [f"home.p{n}" for n in range(6)]
    registry = Registry()
    for _ in range(8):
        name = data.draw(st.sampled_from(names))
        made = a_peer(
            name,
            role=data.draw(st.sampled_from((Role.AUTO, Role.AUTO, Role.EDGE, Role.HUB))),
            mapping=data.draw(st.sampled_from(Mapping)),
            online=data.draw(st.booleans()),
            since=registry.now - data.draw(st.sampled_from((0.0, STABLE))),
            relay=data.draw(
                st.sampled_from((None, RelayReport(Forwarding.NONE), RelayReport(Forwarding.KERNEL)))
            ),
            seen=dict.fromkeys(names, data.draw(st.floats(1.0, 300.0))),
        )
        registry.put(made)
        registry.later(data.draw(st.sampled_from((60.0, GRACE, BETTER_AFTER))), step=300.0)
        hubs = set(registry.hub_names)
        present = registry.peers.values()
        assert not hubs & {peer.meta.name for peer in present if peer.spec.role is Role.EDGE}
        assert {peer.meta.name for peer in present if peer.spec.role is Role.HUB} <= hubs
        could = [
            each
            for each in present
            if each.spec.role is Role.AUTO
            and each.assignment.online
            and each.report is not None
            and each.report.mapping is Mapping.NONE
            and each.report.relay in (None, RelayReport(Forwarding.KERNEL))
            and all(condition.type != "RelayFailed" for condition in each.assignment.conditions)
        ]
        assert hubs or not could
        before = registry.writes
        registry.plan()
        registry.plan()
        assert registry.writes == before, "the same facts at the same time say the same"


# --- what a person is told ----------------------------------------------------------------------------------


def test_hubs_that_serve_are_named() -> None:
    registry = Registry(a_peer("home.a"), hubs=Hubs(names=("home.a",)))
    condition = registry.condition()
    assert (condition.status, condition.reason, condition.message) == (
        "True",
        "HubsAvailable",
        "relayed by home.a",
    )


REFUSED = RelayReport(Forwarding.KERNEL, pairs=256, refused=3)


@pytest.mark.parametrize(
    ("registry", "reason", "words"),
    [
        (
            Registry(a_peer("home.a"), hubs=Hubs(names=("home.b",))),
            "NoSuchPeer",
            "the mesh has no ScopePeer home.b: correct spec.hubs.names",
        ),
        (
            Registry(a_peer("home.a"), hubs=Hubs(names=("home.a", "home.b"))),
            "NoSuchPeer",
            "no ScopePeer home.b",
        ),
        (
            Registry(a_peer("home.a"), hubs=Hubs(selector=LABELS), labels={"home.a": {}}),
            "NoSuchNode",
            "no peer's Node has the labels of spec.hubs.selector: label a Node",
        ),
        (
            Registry(a_peer("home.a", role=Role.EDGE), hubs=Hubs(names=("home.a",))),
            "SaysEdge",
            "spec.role of the ScopePeer says Edge: set that to Auto",
        ),
        (
            Registry(a_peer("home.a", online=False), hubs=Hubs(names=("home.a",))),
            "AllOffline",
            "no hub is online, of home.a: start scope-agent there, or name others (spec.hubs); "
            "pairs keep the paths they have",
        ),
        (
            Registry(natted("home.a"), hubs=Hubs(names=("home.a",))),
            "NotReachable",
            "hub home.a is behind a NAT: forward its WireGuard port and UDP ports 26000 to 26255 to it, and "
            "give its public endpoint in spec.endpoints of its ScopePeer",
        ),
        (
            Registry(
                a_peer("home.a", relay=RelayReport(Forwarding.NONE, reason="ports taken by dnsmasq")),
                hubs=Hubs(names=("home.a",)),
            ),
            "NotForwarding",
            "hub home.a does not forward: ports taken by dnsmasq; mend that there",
        ),
        (
            Registry(a_peer("home.a", relay=REFUSED), hubs=Hubs(names=("home.a",))),
            "NoPortLeft",
            "hub home.a has no port for some pairs: widen spec.hubs.ports, or add a hub",
        ),
        (
            Registry(
                a_peer("home.a", relay=replace(REFUSED, reason="UDP port 26000 is held by another program")),
                hubs=Hubs(names=("home.a",)),
            ),
            "NoPortLeft",
            "add a hub; it says: UDP port 26000 is held by another program",
        ),
        (
            Registry(natted("home.a")),
            "NobodyReachable",
            "no peer that is online can be reached by every other one",
        ),
    ],
)
def test_what_keeps_hubs_from_relaying_is_a_condition_that_says_what_to_do(
    registry: Registry, reason: str, words: str
) -> None:
    condition = registry.condition()
    assert (condition.status, condition.reason) == ("False", reason)
    assert words in condition.message


NAMED = "name some in spec.hubs.names, or set spec.hubs.mode to Auto"


@pytest.mark.parametrize(
    ("registry", "words"),
    [
        (Registry(a_peer("home.a"), hubs=Hubs()), NAMED),
        (Registry(), "forward UDP ports to one"),
        (Registry(a_peer("home.a"), hubs=Hubs(names=("home.b",))), "no ScopePeer home.b: correct"),
        (Registry(a_peer("home.a", role=Role.EDGE), hubs=Hubs(names=("home.a",))), "set that to Auto"),
        (Registry(a_peer("home.a"), hubs=Hubs(selector=LABELS)), "label a Node"),
    ],
)
def test_a_tree_without_hubs_says_what_to_do_and_that_peers_keep_their_links(
    registry: Registry, words: str
) -> None:
    registry.topology = TopologyMode.TREE
    condition = registry.condition()
    assert (condition.status, condition.reason) == ("False", "TreeWithoutHubs")
    assert condition.message.startswith(
        "spec.topology is Tree, and the mesh has no hub, so peers keep the links they have: "
    )
    assert words in condition.message
    assert condition.message.endswith("; or set spec.topology to Full")


def test_a_tree_whose_hubs_are_all_offline_says_that_edges_reach_nobody() -> None:
    registry = Registry(a_peer("home.a", online=False), hubs=Hubs(names=("home.a",)))
    registry.topology = TopologyMode.TREE
    condition = registry.condition()
    assert condition.reason == "AllOffline"
    assert condition.message.endswith("; edges reach nobody until then")


def test_hubs_of_a_tree_route() -> None:
    registry = Registry(a_peer("home.a"), hubs=Hubs(names=("home.a",)))
    registry.topology = TopologyMode.TREE
    assert registry.condition().message == "routed by home.a"


def test_a_static_endpoint_makes_a_hub_behind_a_nat_one_that_serves() -> None:
    hub = natted("home.a")
    hub = replace(hub, spec=replace(hub.spec, endpoints=(Endpoint.parse("198.51.100.1:51820"),)))
    condition = Registry(hub, hubs=Hubs(names=("home.a",))).condition()
    assert condition.status == "True"


def test_every_hub_that_goes_is_told_and_that_they_come_back_too() -> None:
    registry = Registry(a_peer("home.a"), a_peer("home.b"))
    assert registry.condition().status == "True"
    registry.put(*(a_peer(name, online=False, since=NOW) for name in ("home.a", "home.b")))
    gone = registry.condition()
    assert (gone.status, gone.reason) == ("False", "AllOffline")
    registry.peers.clear()
    assert registry.condition().reason == "NobodyReachable"
    registry.put(a_peer("home.c"))
    assert registry.condition().status == "True"


def test_the_words_about_a_hub_hold_no_figure_that_wobbles() -> None:
    registry = Registry(a_peer("home.a"), hubs=Hubs(names=("home.a",)))
    told = []
    for pairs in (1, 7, 250):
        registry.put(a_peer("home.a", relay=replace(REFUSED, pairs=pairs, refused=pairs)))
        told.append((registry.condition(), registry.told))
    assert told[0] == told[1] == told[2]


def test_a_hub_that_relays_in_user_space_says_why() -> None:
    relay = RelayReport(Forwarding.USER_SPACE, reason="no nftables")
    registry = Registry(a_peer("home.a", relay=relay), hubs=Hubs(names=("home.a",)))
    registry.plan()
    assert registry.why("home.a") == "named in spec.hubs; relays in user space: no nftables"


def test_a_hub_whose_kernel_relays_says_what_else_is_amiss() -> None:
    relay = RelayReport(Forwarding.KERNEL, reason="UDP port 26000 is held by another program")
    registry = Registry(a_peer("home.a", relay=relay), hubs=Hubs(names=("home.a",)))
    registry.plan()
    assert registry.why("home.a") == "named in spec.hubs; UDP port 26000 is held by another program"
