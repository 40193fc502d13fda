"""Which records of exported Services are written, and what stands for them in other clusters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from scope_operator.plan.exports import (
    Complaint,
    CreateRecord,
    DeleteRecord,
    LocalService,
    UpdateRecord,
    plan_export,
)
from scope_operator.plan.imports import (
    ChangePorts,
    ChangeSlice,
    CreateService,
    CreateSlice,
    DeleteService,
    DeleteSlice,
    HeldService,
    HeldSlice,
    ImportAction,
    ImportPlan,
    plan_import,
)

from scope import resources
from scope.model import (
    Backend,
    EndpointState,
    Family,
    MeshCluster,
    Meta,
    Service,
    ServiceEndpoint,
    ServicePort,
    ServiceSpec,
    Translation,
)
from tests.unit.registry_conformance import MESH

HTTP = ServicePort(80, name="http")
WEB = ServicePort(8080, name="http")
LOCAL = LocalService("shop", "web", "u1", "true", False, False, False, (Family.IPV4,), (HTTP,))
READY, DRAINING, NOT_READY = EndpointState


def pods(*numbers: int, state: EndpointState = READY, port: ServicePort = WEB) -> Backend:
    """Pods with addresses that tell their numbers."""
    ends = (ServiceEndpoint(ip_address("10.244.0.0") + number, state) for number in numbers)
    return Backend((port,), tuple(ends))


def exported(
    service: LocalService | None, *backends: Backend, stored: Service | None = None, cluster: str = "east"
) -> tuple[Sequence[object], Complaint | None]:
    return plan_export(service, backends, cluster=cluster, stored={"home": stored})


def record(*backends: Backend, service: LocalService = LOCAL, cluster: str = "east") -> Service:
    """The record that stands once a Service was exported."""
    [action], _ = exported(service, *backends, cluster=cluster)
    assert isinstance(action, CreateRecord)
    return replace(action.service, meta=replace(action.service.meta, uid="r1", revision=7))


# --- exports ------------------------------------------------------------------------------------------------


def test_an_exported_service_gets_a_record_in_each_mesh_of_its_cluster() -> None:
    actions, complaint = plan_export(LOCAL, [pods(1)], cluster="east", stored={"home": None, "lab": None})
    assert complaint is None
    names = [action.service.meta.name for action in actions]
    assert names == ["home.east.shop.web", "lab.east.shop.web"]
    [first, _] = actions
    assert first.service.spec == ServiceSpec(
        "home", "east", "shop", "web", families=(Family.IPV4,), ports=(HTTP,), backends=(pods(1),)
    )


def test_a_record_that_says_it_all_is_not_written_again() -> None:
    assert exported(LOCAL, pods(2, 1), stored=record(pods(1, 2))) == ((), None)


@pytest.mark.parametrize(
    "service",
    [None, replace(LOCAL, export=None), replace(LOCAL, export="false"), replace(LOCAL, is_external=True)],
    ids=["gone", "not asked for", "asked not to", "of another type"],
)
def test_a_service_that_is_exported_no_longer_loses_its_record(service: LocalService | None) -> None:
    stored = record(pods(1))
    assert exported(service, pods(1), stored=stored)[0] == (DeleteRecord(stored),)
    assert exported(service, pods(1))[0] == ()


def test_a_change_of_readiness_or_ports_changes_the_record() -> None:
    stored = record(pods(1))
    for changed in (pods(1, state=NOT_READY), pods(1, 2), pods(1, port=replace(WEB, port=9090))):
        [action], _ = exported(LOCAL, changed, stored=stored)
        assert isinstance(action, UpdateRecord)
        assert action.service == replace(stored, spec=replace(stored.spec, backends=(changed,)))


def test_pods_are_grouped_by_their_ports_whatever_slices_they_are_in() -> None:
    other = replace(WEB, port=9090)
    found = record(pods(3), pods(4, port=other), pods(1), pods(2, port=other)).spec.backends
    assert found == (pods(1, 3), pods(2, 4, port=other))


def test_a_pod_that_two_slices_name_is_as_good_as_the_better_one() -> None:
    for backends in ((pods(1, state=NOT_READY), pods(1)), (pods(1), pods(1, state=DRAINING))):
        assert record(*backends).spec.backends == (pods(1),)


@pytest.mark.parametrize(
    ("service", "sentence"),
    [
        (replace(LOCAL, export="yes"), "the annotation scope.ltgc.cc/export is"),
        (replace(LOCAL, is_import=True), "export it there"),
        (replace(LOCAL, is_external=True), "ExternalName"),
        (replace(LOCAL, ports=()), "it has no ports"),
        (replace(LOCAL, name="w" * 59), "give it one of at most 58"),
        (replace(LOCAL, ports=tuple(ServicePort(i, name=f"p{i}") for i in range(1, 66))), "it has 65 ports"),
    ],
    ids=["annotation", "import", "external", "no ports", "long name", "many ports"],
)
def test_what_cannot_be_exported_is_told_why(service: LocalService, sentence: str) -> None:
    actions, complaint = exported(service, pods(1))
    assert not actions
    assert complaint is not None
    assert complaint.reason == "NotExported"
    assert sentence in complaint.message


def test_a_headless_service_needs_no_ports() -> None:
    assert record(pods(1), service=replace(LOCAL, headless=True, ports=())).spec.headless


def test_of_too_many_endpoints_those_that_serve_stay() -> None:
    most = resources.MAX_SERVICE_ENDPOINTS
    backends = (pods(*range(10), state=NOT_READY), pods(*range(10, most + 5)), pods(2000, state=DRAINING))
    [action], complaint = exported(LOCAL, *backends)
    assert isinstance(action, CreateRecord)
    [kept] = action.service.spec.backends
    assert len(kept.endpoints) == most
    states = [end.state for end in kept.endpoints]
    assert (states.count(READY), states.count(DRAINING), states.count(NOT_READY)) == (most - 5, 1, 4)
    assert complaint is not None
    assert f"know {most} of {most + 6} endpoints" in complaint.message
    assert resources.parse(resources.to_dict(action.service)) == action.service


def test_pods_with_more_kinds_of_ports_than_a_record_holds_leave_the_smallest_out() -> None:
    kinds = [pods(i, port=replace(WEB, port=1000 + i)) for i in range(resources.MAX_BACKENDS)]
    [action], complaint = exported(LOCAL, *kinds, pods(100, 101))
    assert isinstance(action, CreateRecord)
    assert len(action.service.spec.backends) == resources.MAX_BACKENDS
    assert pods(100, 101) in action.service.spec.backends
    assert complaint is not None


# --- imports ------------------------------------------------------------------------------------------------


def held(of: Service, **changes: object) -> HeldService:
    """The Service that stands for a record."""
    spec = of.spec
    made = HeldService("s1", of.meta.name, spec.headless, spec.families, len(spec.families) > 1, spec.ports)
    return replace(made, **changes)  # type: ignore[arg-type]


def imported(
    offers: Sequence[Service], there: HeldService | None, slices: Sequence[HeldSlice], *clusters: MeshCluster
) -> ImportPlan:
    """What is to be done in a cluster of the mesh."""
    mesh = replace(MESH, spec=replace(MESH.spec, clusters=clusters))
    return plan_import(offers, there, slices, meshes={MESH.meta.name: mesh})


def slices_of(of: Service) -> list[HeldSlice]:
    """The slices that stand for a record."""
    made = imported([of], held(of), ()).actions
    return [HeldSlice(each.slice, f"u-{i}", "5", "s1") for i, each in enumerate(created(made))]


def created(actions: Sequence[ImportAction]) -> list[CreateSlice]:
    return [each for each in actions if isinstance(each, CreateSlice)]


def test_an_import_comes_service_first_and_then_its_slices() -> None:
    web = record(pods(1, 2))
    assert imported([web], None, ()).actions == (CreateService(web),)
    [made] = imported([web], held(web), ()).actions
    assert isinstance(made, CreateSlice)
    assert (made.slice.family, made.slice.ports, made.owner) == (Family.IPV4, (WEB,), "s1")
    assert set(made.slice.endpoints) == set(pods(1, 2).endpoints)
    assert made.slice.name.startswith("web-east-")
    assert imported([web], held(web), slices_of(web)).actions == ()


def test_pods_of_a_cluster_that_is_translated_are_reached_as_others_see_them() -> None:
    web = record(pods(1))
    [was] = pods(1).endpoints
    inside = ip_network(f"{was.address}/24", strict=False)
    east = MeshCluster("east", (Translation(inside, ip_network("10.192.7.0/24")),))
    west = MeshCluster("west", (Translation(inside, ip_network("10.192.8.0/24")),))
    [made] = created(imported([web], held(web), (), west, east).actions)
    [seen] = made.slice.endpoints
    assert seen == replace(was, address=ip_address("10.192.7.0") + (int(was.address) & 0xFF))


def test_readiness_changes_a_slice_and_other_ports_replace_it() -> None:
    web = record(pods(1))
    before = slices_of(web)
    drained = record(pods(1, state=DRAINING))
    assert imported([drained], held(web), before).actions == (
        ChangeSlice(before[0], pods(1, state=DRAINING).endpoints),
    )
    moved = record(pods(1, port=replace(WEB, port=9090)))
    made, gone = imported([moved], held(web), before).actions
    assert isinstance(made, CreateSlice)
    assert gone == DeleteSlice(before[0])


def test_ports_of_the_service_follow() -> None:
    other = record(pods(1), service=replace(LOCAL, ports=(replace(HTTP, port=81),)))
    assert imported([other], held(record(pods(1))), slices_of(other)).actions == (
        ChangePorts("s1", other.spec.ports),
    )


def test_an_import_goes_with_its_record_slices_first() -> None:
    web = record(pods(1))
    [one] = before = slices_of(web)
    assert imported([], held(web), before).actions == (DeleteSlice(one), DeleteService("s1"))
    assert imported([], None, ()).actions == ()


def test_a_service_of_somebody_else_is_left_alone_and_told() -> None:
    web = record(pods(1))
    foreign = held(web, source="")
    plan = imported([web], foreign, ())
    assert plan.actions == ()
    assert plan.complaint is not None
    assert plan.complaint.reason == "NameTaken"
    assert "a Service web-east that is not Scope's is in its place" in plan.complaint.message
    # What we made for it before it was somebody's goes.
    assert imported([web], foreign, slices_of(web)).actions == tuple(map(DeleteSlice, slices_of(web)))
    assert imported([], foreign, ()).complaint is None


def test_of_two_that_would_have_one_name_the_incumbent_keeps_it() -> None:
    one = record(pods(1), service=replace(LOCAL, name="a-b"), cluster="c")
    other = record(pods(2), service=replace(LOCAL, name="a"), cluster="b-c")
    first = imported([one, other], None, ())
    assert first.actions == (CreateService(other),)  # by the name of the record
    assert first.complaint is not None
    kept = imported([one, other], held(one), slices_of(one))
    assert kept.actions == ()
    assert kept.complaint is not None
    assert "Service a of cluster b-c cannot be offered here, since a-b of cluster c" in kept.complaint.message
    assert imported([other], held(one), ()).actions == (DeleteService("s1"),)


@pytest.mark.parametrize(
    "changes",
    [{"headless": True}, {"families": (Family.IPV6,)}, {"families": (Family.IPV4, Family.IPV6)}],
    ids=["headless", "another family", "both families"],
)
def test_what_a_service_cannot_change_makes_it_anew(changes: dict[str, object]) -> None:
    now = record(pods(1), service=replace(LOCAL, **changes))  # type: ignore[arg-type]
    was = record(pods(1))
    assert imported([now], held(was), slices_of(was)).actions[-1] == DeleteService("s1")


def test_addresses_of_both_families_stand_in_slices_of_their_own() -> None:
    ends = tuple(ServiceEndpoint(ip_address(text)) for text in ("10.244.0.1", "fd00::1"))
    both = record(Backend((WEB,), ends), service=replace(LOCAL, families=(Family.IPV4, Family.IPV6)))
    made = created(imported([both], held(both), ()).actions)
    assert {each.slice.family: each.slice.endpoints for each in made} == {
        Family.IPV4: ends[:1],
        Family.IPV6: ends[1:],
    }
    # On a cluster with one family the Service has only that one, and is as it should be.
    assert not imported([both], held(both, families=(Family.IPV4,)), slices_of(both)).actions


def test_one_pod_of_a_thousand_changes_one_slice() -> None:
    all_of_them = record(pods(*range(1, 1001)))
    before = slices_of(all_of_them)
    sizes = [len(each.slice.endpoints) for each in before]
    assert sum(sizes) == 1000
    assert max(sizes) <= 200
    without = record(pods(*range(1, 500), *range(501, 1001)))
    [change] = imported([without], held(without), before).actions
    assert isinstance(change, ChangeSlice)


def test_slices_of_an_earlier_service_make_way_before_their_names_are_needed() -> None:
    web = record(pods(1))
    earlier = [replace(each, owner="s0") for each in slices_of(web)]
    gone, made = imported([web], held(web), earlier).actions
    assert gone == DeleteSlice(earlier[0])
    assert isinstance(made, CreateSlice)


def test_a_slice_that_another_hand_changed_is_made_again() -> None:
    web = record(pods(1))
    [one] = slices_of(web)
    bent = replace(one, slice=replace(one.slice, ports=()))
    assert imported([web], held(web), [bent]).actions == (DeleteSlice(bent),)


def test_a_record_names_its_service_with_the_mesh() -> None:
    assert record(pods(1)).meta == Meta("home.east.shop.web", uid="r1", revision=7)
