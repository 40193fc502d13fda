"""A real API server judges ScopeMeshes and ScopePeers as our own parser does, and says why in sentences."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from kubelab import MERGE, ApiError, ControlPlane

from scope import resources
from scope.model import Kind
from tests import resource_corpus as corpus
from tests.resource_corpus import Case, Document

# Each is a sentence that says what to do, or what is allowed: ours, and those of the API server itself.
SENTENCES = re.compile(
    r"must (be|not be|have|lie|stay|name) |has bits set beyond its length: write |need one value or more; "
    r"|cannot change|no earlier than the one before it: put |are bound to it: to change them, "
    r"|Required value|Unsupported value: .* supported values: |Too long: may not be more than "
    r"|Too many: \d+: must have at most |Duplicate value: |in body (must|should) (be|have) |unknown field "
    r"|a lowercase RFC 1123 subdomain must consist of "
)


def path_of(document: Document) -> str:
    return f"/apis/{resources.API_VERSION}/{resources.PLURALS[Kind(str(document['kind']))]}"


def name_of(document: Document) -> str:
    metadata = document["metadata"]
    assert isinstance(metadata, dict)
    return str(metadata["name"])


class Judge:
    """Asks the API server about documents, as kubectl does: a field nobody knows is refused."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    async def refusal(self, document: Document) -> str:
        """What the API server says against a document; "" when it takes it. Nothing is left behind."""
        spec = {name: value for name, value in document.items() if name != "status"}
        said = await self.write("POST", path_of(document), spec, dry_run=True)
        if said or "status" not in document:
            return said
        async with self.stored(spec):
            return await self.replace(document, subresource="/status")

    @asynccontextmanager
    async def stored(self, document: Document) -> AsyncIterator[None]:
        """The document, stored for as long as this lasts; its status with it."""
        path = path_of(document)
        assert not await self.write("POST", path, document)
        if "status" in document:
            assert not await self.replace(document, subresource="/status", dry_run=False)
        yield
        await self._plane.request("DELETE", f"{path}/{name_of(document)}")

    async def replace(self, document: Document, *, subresource: str = "", dry_run: bool = True) -> str:
        """What is said against a document in place of the stored one of its name."""
        path = f"{path_of(document)}/{name_of(document)}"
        stored = await self._plane.request("GET", path)
        metadata = {"name": name_of(document), "resourceVersion": stored["metadata"]["resourceVersion"]}
        return await self.write("PUT", path + subresource, document | {"metadata": metadata}, dry_run=dry_run)

    async def write(self, method: str, path: str, document: Document, *, dry_run: bool = False) -> str:
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        try:
            await self._plane.request(method, path + query, document)
        except ApiError as error:
            if error.status not in (400, 422):
                raise
            return str(error)
        return ""


def verdicts(plane: ControlPlane, cases: Iterable[Case]) -> list[tuple[Case, str]]:
    """What the API server says against each."""

    async def ask() -> list[tuple[Case, str]]:
        judge = Judge(plane)
        return [(case, await judge.refusal(case.document)) for case in cases]

    return asyncio.run(ask())


def test_the_api_server_takes_what_the_parser_takes(control_plane: ControlPlane) -> None:
    refused = [f"{case}: {said}" for case, said in verdicts(control_plane, corpus.right()) if said]
    assert not refused, "\n".join(refused)


def test_the_api_server_refuses_what_the_parser_refuses_at_the_same_field_with_a_sentence(
    control_plane: ControlPlane,
) -> None:
    odd = [
        f"{case}: {said or 'taken'}"
        for case, said in verdicts(control_plane, corpus.wrong())
        if case.fault not in said or not SENTENCES.search(said)
    ]
    assert not odd, "\n".join(odd)


ROUTES = (
    *("10.0.0.0/8", "192.168.7.0/24", "0.0.0.0/8", "127.0.0.1/32", "224.0.0.0/8", "169.254.0.0/16"),
    *("fd5c:be1:7a30::/64", "2001:db8::/32", "fe80::/64", "ff02::1/128", "::1/128", "1:2:3:4:5:6:7::/112"),
    *("::ffff:1.2.3.4/128", "64:ff9b::1.2.3.4/128"),
)
ENDPOINTS = (
    *("192.0.2.1:51820", "255.255.255.255:9", "0.0.0.0:1", "127.0.0.1:1", "[2001:db8::1]:51820", "[::]:1"),
    *("[::1.2.3.4]:1", "[fe80::1]:65535", "[ff0e::1]:3", "[::ffff:1.2.3.4]:5", "[1:2:3:4:5:6:7::]:80"),
)


def test_thousands_of_spellings_are_judged_alike(control_plane: ControlPlane) -> None:
    """One refusal names every wrong item of a list, so a request judges eighty spellings."""
    random = Random(1)
    refused_at = re.compile(r"spec\.(?:routes|endpoints)\[\d+\]")

    def spelling(right: tuple[str, ...], *, longest: int) -> str:
        text = list(random.choice(right))
        for _ in range(random.choice((0, 1, 1, 2, 3))):
            at = random.randrange(len(text))
            text[at : at + random.choice((0, 1))] = random.choice(("", *"0123456789abcdfAF:./[]%- \n\u0660"))
        return "".join(text)[:longest]

    async def differences() -> list[str]:
        judge = Judge(control_plane)
        odd: list[str] = []
        for _ in range(40):
            routes = [spelling(ROUTES, longest=resources.MAX_CIDR) for _ in range(resources.MAX_ROUTES)]
            endpoints = [spelling(ENDPOINTS, longest=resources.MAX_ENDPOINT) for _ in range(16)]
            theirs = set(
                refused_at.findall(await judge.refusal(corpus.peer(routes=routes, endpoints=endpoints)))
            )
            # Each by itself: the parser ends a long list of problems early.
            ours = {
                f"spec.routes[{i}]" for i, each in enumerate(routes) if is_refused(corpus.peer(routes=[each]))
            }
            ours |= {
                f"spec.endpoints[{i}]"
                for i, each in enumerate(endpoints)
                if is_refused(corpus.peer(endpoints=[each]))
            }
            assert 0 < len(ours) < len(routes) + len(endpoints)
            odd.extend(f"{at} of {routes} {endpoints}" for at in theirs ^ ours)
        return odd

    assert asyncio.run(differences()) == []


def is_refused(document: Document) -> bool:
    try:
        resources.parse(document)
    except resources.InvalidResource:
        return True
    return False


def test_the_api_server_fills_in_the_parsers_defaults(control_plane: ControlPlane) -> None:
    async def read_back(document: Document) -> Any:
        await control_plane.request("POST", path_of(document), document)
        return await control_plane.request("GET", f"{path_of(document)}/{name_of(document)}")

    for document in (corpus.mesh(), corpus.peer()):
        stored = asyncio.run(read_back(document))
        assert stored["spec"] == resources.to_dict(resources.parse(document))["spec"]


def test_whom_a_peer_is_cannot_change_and_everything_else_can(control_plane: ControlPlane) -> None:
    async def ask() -> list[str]:
        judge, odd = Judge(control_plane), []
        for change in corpus.changes():
            async with judge.stored(change.stored):
                said = await judge.replace(change.asked)
            if bool(said) != bool(change.fault) or change.fault not in said:
                odd.append(f"{change}: {said or 'taken'}")
            if said and not SENTENCES.search(said):
                odd.append(f"{change}: no sentence: {said}")
        return odd

    assert asyncio.run(ask()) == []


def test_the_keys_of_an_external_peer_are_bound_and_a_nodes_machine_may_come_with_new_ones(
    control_plane: ControlPlane,
) -> None:
    other = corpus.KEYS | {"wireGuard": "D" + "A" * 42 + "="}

    async def ask(**spec: Any) -> tuple[str, str]:
        judge, stored = Judge(control_plane), corpus.peer(**spec, status={"keys": corpus.KEYS})
        async with judge.stored(stored):
            same = stored | {"status": {"keys": corpus.KEYS, "direct": 1}}
            assert not await judge.replace(same, subresource="/status")
            changed = await judge.replace(stored | {"status": {"keys": other}}, subresource="/status")
            gone = await judge.replace(stored | {"status": {}}, subresource="/status")
        return changed, gone

    for said in asyncio.run(ask()):
        assert "the keys of an external peer are bound to it: to change them, run scope-agent leave" in said
    assert asyncio.run(ask(**corpus.NODE)) == ("", "")


def test_null_is_no_value_to_either(control_plane: ControlPlane) -> None:
    for name, fault in (("mtu", ""), ("nodeSelector", ""), ("timers", ""), ("addressing", "spec.addressing")):
        document = corpus.mesh()
        assert isinstance(document["spec"], dict)
        nulled = document | {"spec": document["spec"] | {name: None}}
        said = asyncio.run(Judge(control_plane).refusal(nulled))
        assert bool(said) == bool(fault) and fault in said
        if not fault:
            assert resources.parse(nulled) == resources.parse(document)


def test_what_kubectl_shows_says_whether_it_works_and_why_not(control_plane: ControlPlane) -> None:
    ready = {"type": "Ready", "status": "False", "reason": "NoAddressLeft", "message": "widen it"}
    counts = {"peers": 3, "online": 2, "direct": 0, "relayed": 1, "unreachable": 0} | {
        "postQuantum": {"keyed": 4}
    }
    mesh = corpus.mesh(status={"counts": counts, "conditions": [ready]})
    peer = corpus.everything_of_a_peer()

    async def show() -> tuple[str, str]:
        judge = Judge(control_plane)
        async with judge.stored(mesh), judge.stored(peer):
            return await control_plane.kubectl("get", "smesh"), await control_plane.kubectl("get", "speer")

    meshes, peers = (shown.splitlines() for shown in asyncio.run(show()))
    assert meshes[0].split() == [
        "NAME",
        "PEERS",
        "ONLINE",
        "DIRECT",
        "RELAYED",
        "UNREACHABLE",
        "PQ",
        "READY",
        "AGE",
    ]
    assert meshes[1].split()[:8] == ["home", "3", "2", "0", "1", "0", "4", "False"]
    columns = [
        "NAME",
        "ROLE",
        "ADDRESS",
        "NAT",
        "DIRECT",
        "RELAYED",
        "UNREACHABLE",
        "PQ",
        "READY",
        "REASON",
        "AGE",
    ]
    assert peers[0].split() == columns
    shown = ["home.nas", "Edge", "100.80.0.7/16", "EndpointIndependent", "0", "1", "0", "2", "True", "Ready"]
    assert peers[1].split()[:10] == shown


@pytest.mark.parametrize(
    ("selector", "found"), [("spec.mesh=home", ["a", "b"]), ("spec.nodeName=n1", ["b"]), ("spec.mesh=x", [])]
)
def test_peers_are_found_by_mesh_and_by_node(
    control_plane: ControlPlane, selector: str, found: list[str]
) -> None:
    async def find() -> list[str]:
        judge = Judge(control_plane)
        node = corpus.NODE | {"nodeName": "n1"}
        async with judge.stored(corpus.peer(name="a")), judge.stored(corpus.peer(name="b", **node)):
            shown = await control_plane.kubectl("get", "speer", "-o", "name", f"--field-selector={selector}")
        return [line.rpartition("/")[2] for line in shown.splitlines()]

    assert asyncio.run(find()) == found


def test_conditions_and_clusters_are_told_apart_by_who_writes_them(control_plane: ControlPlane) -> None:
    """Two writers, each with a condition of its own, leave each other's alone."""
    path = f"{path_of(corpus.mesh())}/home/status"

    async def apply(manager: str, condition: dict[str, str]) -> Any:
        body = {**corpus.mesh(), "status": {"conditions": [condition]}}
        query = f"?fieldManager={manager}&force=true"
        return await control_plane.request(
            "PATCH", path + query, body, content_type="application/apply-patch+yaml"
        )

    async def both() -> Any:
        async with Judge(control_plane).stored(corpus.mesh()):
            await apply("one", {"type": "Ready", "status": "True"})
            await apply("two", {"type": "RouteConflict", "status": "False"})
            cleared = {"status": {"observedGeneration": 1}}
            return await control_plane.request("PATCH", path, cleared, content_type=MERGE)

    stored = asyncio.run(both())
    assert [each["type"] for each in stored["status"]["conditions"]] == ["Ready", "RouteConflict"]
