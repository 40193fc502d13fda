"""The CRDs say what the parser says: field by field, without an API server.

`tests/kube/test_crds.py` asks a real one about the same documents. What an OpenAPI schema cannot say is there
in CEL, of which this test knows no more than that each rule has a sentence. Two things are the parser's
alone: an agent's part of a status is at most 2 KB; and of the numbers in a joined cluster's keys CEL knows
how long they are in base64url, not their values.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from scope import model, resources
from scope.model import Kind
from scope.resources import InvalidResource
from tests import resource_corpus as corpus
from tests.resource_corpus import Case, Change, Document

CRDS = Path(__file__).parents[2] / "crds"
EVERYTHING = {
    Kind.MESH: corpus.everything_of_a_mesh(),
    Kind.PEER: corpus.everything_of_a_peer(),
    Kind.SERVICE: corpus.everything_of_a_service(),
}
Schema = dict[str, Any]
Step = str | int


def definition(kind: Kind) -> Schema:
    loaded: Schema = yaml.safe_load((CRDS / f"{resources.PLURALS[kind]}.yaml").read_text())
    return loaded


def schema_of(kind: Kind) -> Schema:
    [version] = definition(kind)["spec"]["versions"]
    schema: Schema = version["schema"]["openAPIV3Schema"]
    return schema


# What it may hold depends on its kind, so it is looked at by itself.
TOKEN_KEY = ("status", "clusters", 0, "keys", 0)


def walk(schema: Schema, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Schema]]:
    """Every schema below this one, with the path of a value that it is for. Metadata is Kubernetes' own."""
    if path == TOKEN_KEY:
        return
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        if (*path, name) != ("metadata",):
            yield from walk(inner, (*path, name))
    if "items" in schema:
        yield from walk(schema["items"], (*path, 0))


def places(wanted: str) -> Any:
    """The places whose schema has this key."""
    chosen = [
        pytest.param(kind, path, schema, id=f"{kind}.{dotted(path)}")
        for kind in EVERYTHING
        for path, schema in walk(schema_of(kind))
        if wanted in schema
    ]
    return pytest.mark.parametrize(("kind", "path", "schema"), chosen)


def dotted(path: tuple[Step, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def with_value(kind: Kind, path: tuple[Step, ...], value: object) -> Document:
    document = copy.deepcopy(EVERYTHING[kind])
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return document


def value_at(kind: Kind, path: tuple[Step, ...]) -> Any:
    place: Any = EVERYTHING[kind]
    for step in path:
        place = place[step]
    return place


def refusals(document: object) -> dict[str, str]:
    """What the parser refuses, by path."""
    try:
        resources.parse(document)
    except InvalidResource as error:
        return {problem.path: str(problem) for problem in error.problems}
    return {}


@places("properties")
def test_an_object_has_the_fields_that_the_parser_knows(
    kind: Kind, path: tuple[Step, ...], schema: Schema
) -> None:
    odd = (*path, "nobodyKnows")
    [refusal] = [line for at, line in refusals(with_value(kind, odd, 1)).items() if at == dotted(odd)]
    known = re.search(r"allowed: ([^;]*)", refusal)
    assert known is not None
    assert sorted(schema["properties"]) == known[1].split(", ")


OPENAPI = Path(__file__).parents[2] / "operator/scope_operator/gateway/openapi.yaml"


@pytest.mark.parametrize("kind", EVERYTHING)
def test_the_http_api_describes_every_field_with_the_same_choices_and_lengths(kind: Kind) -> None:
    components = yaml.safe_load(OPENAPI.read_text())["components"]["schemas"]

    def resolved(schema: Schema) -> Schema:
        reference = schema.get("$ref", "")
        return components[reference.rpartition("/")[2]] if reference else schema

    def compare(path: tuple[Step, ...], ours: Schema, theirs: Schema) -> None:
        described = resolved(theirs)
        if "properties" in ours:
            assert sorted(described["properties"]) == sorted(ours["properties"]), dotted(path)
        for name, inner in ours.get("properties", {}).items():
            compare((*path, name), inner, described["properties"][name])
        for bound in ("maxItems", "minimum", "maximum"):
            if bound in described:
                assert described[bound] == ours[bound], f"{dotted(path)}: {bound}"
        choices = described.get("enum", [described["const"]] if "const" in described else [])
        assert sorted(choices) == sorted(ours.get("enum", ())), dotted(path)
        if "items" in ours:
            compare((*path, 0), ours["items"], described["items"])

    ours, theirs = schema_of(kind)["properties"], components[str(kind)]["properties"]
    assert ("status" in ours) == ("status" in theirs)
    for part in {"spec", "status"} & set(ours):
        compare((part,), ours[part], theirs[part])


def test_a_token_key_has_the_fields_that_the_parser_knows() -> None:
    clusters = schema_of(Kind.MESH)["properties"]["status"]["properties"]["clusters"]
    schema = clusters["items"]["properties"]["keys"]["items"]
    known: set[str] = set()
    for key in (corpus.RSA, corpus.EC):
        odd = refusals(with_value(Kind.MESH, TOKEN_KEY, key | {"nobodyKnows": 1}))
        found = re.search(r"allowed: ([^;]*)", odd[f"{dotted(TOKEN_KEY)}.nobodyKnows"])
        assert found is not None
        known |= set(found[1].split(", "))
    assert set(schema["properties"]) == known
    assert schema["properties"]["kid"]["maxLength"] == resources.MAX_KEY_ID
    # A number is as long as its base64url: four letters for three bytes.
    assert schema["properties"]["n"]["maxLength"] == -(-resources.RSA_BITS[-1] // 6)
    assert schema["properties"]["crv"]["enum"] == list(model.Curve)
    algorithms = {resources.RSA_ALGORITHM, *resources.ALGORITHMS.values()}
    assert set(schema["properties"]["alg"]["enum"]) == algorithms


# Of these a cluster has all or none, which takes a rule in CEL.
TOGETHER = {f"status.clusters[0].{name}" for name in ("signingKey", "issuer", "keys", "serviceAccount")}


@places("required")
def test_what_is_required_is_missed_by_the_parser(kind: Kind, path: tuple[Step, ...], schema: Schema) -> None:
    for name in schema["properties"] if path else ("spec",):
        at = dotted((*path, name))
        missed = "missing" in refusals(with_value(kind, (*path, name), None)).get(at, "")
        assert at in TOGETHER or missed == (name in schema["required"]), name


@places("enum")
def test_a_choice_is_the_parsers(kind: Kind, path: tuple[Step, ...], schema: Schema) -> None:
    refusal = refusals(with_value(kind, path, "nonsense"))[dotted(path)]
    assert f"allowed: {', '.join(schema['enum'])}" in refusal


@places("maxItems")
def test_a_list_is_as_long_as_the_parser_lets_it_be(
    kind: Kind, path: tuple[Step, ...], schema: Schema
) -> None:
    most, item = schema["maxItems"], value_at(kind, (*path, 0))
    assert f"at most {most}" in refusals(with_value(kind, path, [item] * (most + 1)))[dotted(path)]
    assert dotted(path) not in refusals(with_value(kind, path, [item] * most))


@places("minimum")
def test_a_number_has_the_parsers_bounds(kind: Kind, path: tuple[Step, ...], schema: Schema) -> None:
    lowest, highest = schema["minimum"], schema.get("maximum", 2**63 - 1)
    for allowed in (lowest, highest):
        said = refusals(with_value(kind, path, allowed))
        # Two bounds of one range: whether they fit each other is another question.
        assert not said.keys() - ({"spec.hubs.ports"} if "ports" in path else set())
    for refused in (lowest - 1, highest + 1):
        assert list(refusals(with_value(kind, path, refused))) == [dotted(path)]


@pytest.mark.parametrize("kind", EVERYTHING)
def test_everything_is_bounded_and_described(kind: Kind) -> None:
    for path, schema in walk(schema_of(kind)):
        at = dotted(path)
        match schema.get("type"):
            case "string":
                assert "enum" in schema or "maxLength" in schema or at in ("kind", "apiVersion"), at
            case "array":
                assert "maxItems" in schema and "x-kubernetes-list-type" in schema, at
            case "integer":
                assert {"minimum", "format"} <= set(schema), at
            case "object":
                assert "properties" in schema or "maxProperties" in schema, at
        if path and not isinstance(path[-1], int):
            assert schema["description"].endswith("."), at
        for rule in schema.get("x-kubernetes-validations", []):
            assert len(rule["message"].split()) > 3, at


SELECTORS = ("spec.nodeSelector", "spec.hubs.selector")
# Each bound of a text, by the constant of the parser that it is.
LENGTHS = {
    Kind.MESH: {
        resources.MAX_CIDR: {
            *("spec.addressing.ipv4", "spec.addressing.ipv6"),
            *(f"spec.clusters[0].translate[0].{name}" for name in ("from", "to")),
        },
        resources.MAX_DURATION_TEXT: {
            *(f"spec.timers.{name}" for name in corpus.TIMERS),
            *("spec.peerExpiry", "spec.postQuantum.rotationInterval"),
        },
        resources.MAX_LABEL_KEY: {f"{selector}.matchExpressions[0].key" for selector in SELECTORS},
        resources.MAX_LABEL: {
            *(f"{selector}.matchExpressions[0].values[0]" for selector in SELECTORS),
            "status.conditions[0].type",
            *("spec.clusters[0].name", "status.clusters[0].name"),
            "status.clusters[0].serviceAccount.namespace",
        },
        resources.MAX_NAME: {
            *("status.clusters[0].serviceAccount.name", "spec.hubs.names[0]", "status.hubs[0].peer"),
        },
        resources.MAX_INTERFACE: {"spec.existingInterface"},
        resources.MAX_ISSUER: {"status.clusters[0].issuer"},
        resources.MAX_UID: {"status.clusters[0].uid"},
        resources.MAX_ENDPOINT: {"status.reflectors[0].endpoints[0]"},
        resources.MAX_ORIGIN: {"status.gateway.url"},
        resources.MAX_REASON: {"status.conditions[0].reason", "status.hubs[0].reason"},
        resources.MAX_MESSAGE: {"status.conditions[0].message"},
    },
    Kind.PEER: {
        resources.MAX_LABEL: {"spec.mesh", "spec.cluster", "status.conditions[0].type"},
        resources.MAX_NAME: {"spec.nodeName", "status.links[0].peer", "status.links[0].hub", "status.hub"},
        resources.MAX_UID: {  # and as long as a fingerprint's digits
            *("spec.nodeUID", "status.tombstone.meshUID", "status.tombstone.peerUID", "status.identity"),
        },
        resources.MAX_CIDR: {
            *("spec.routes[0]", "spec.podPrefixes[0].prefix", "spec.podPrefixes[0].seenAs"),
            *("status.addresses[0]", "status.heldAddresses[0]"),
        },
        resources.MAX_ENDPOINT: {
            "spec.endpoints[0]",
            "status.endpoints[0].endpoint",
            "status.links[0].endpoint",
            "status.links[0].observed",
        },
        resources.MAX_REASON: {
            *("status.links[0].reason", "status.conditions[0].reason", "status.relay.reason"),
            *("status.relay.unrouted", "status.podsTrouble"),
            "status.relay.carrier.reason",
        },
        resources.MAX_MESSAGE: {"status.conditions[0].message"},
    },
    Kind.SERVICE: {
        resources.MAX_LABEL: {
            *(f"spec.{name}" for name in ("mesh", "cluster", "namespace", "service", "ports[0].name")),
            *("spec.backends[0].ports[0].name", "spec.backends[0].endpoints[0].hostname"),
        },
        resources.MAX_LABEL_KEY: {
            *("spec.ports[0].appProtocol", "spec.backends[0].ports[0].appProtocol"),
        },
        resources.MAX_CIDR: {"spec.backends[0].endpoints[0].address"},
    },
}
# Of these texts each is as long as the next, so that a bound only saves the server work.
ALIKE = (
    {"signingKey", "probeKey", "wireGuard", "probe", "signing", "key", "signer", "pin"},
    {"signature"},
    {"lastSeen", "lastTransitionTime", "contestedSince", "since"},
)


@pytest.mark.parametrize("kind", EVERYTHING)
def test_every_text_is_as_long_as_the_parser_lets_it_be(kind: Kind) -> None:
    lengths = {
        dotted(path): schema["maxLength"] for path, schema in walk(schema_of(kind)) if "maxLength" in schema
    }
    expected = {path: length for length, paths in LENGTHS[kind].items() for path in paths}
    rest = lengths.keys() - expected.keys()
    assert all(any(path.rpartition(".")[2] in alike for alike in ALIKE) for path in rest), rest
    assert expected == {path: length for path, length in lengths.items() if path not in rest}
    for path in rest:
        place = re.sub(r"\[0\]", ".0", path).split(".")
        longest = value_at(kind, tuple(int(step) if step == "0" else step for step in place))
        assert len(longest) <= lengths[path]


def test_a_name_is_as_long_as_the_parser_lets_it_be() -> None:
    assert (
        schema_of(Kind.MESH)["properties"]["metadata"]["properties"]["name"]["maxLength"]
        == resources.MAX_LABEL
    )
    selectors = [schema for at, schema in walk(schema_of(Kind.MESH)) if dotted(at) in SELECTORS]
    for labels in (selector["properties"]["matchLabels"] for selector in selectors):
        assert labels["maxProperties"] == resources.MAX_REQUIREMENTS
        assert labels["additionalProperties"]["maxLength"] == resources.MAX_LABEL
    assert len(selectors) == len(SELECTORS)


@pytest.mark.parametrize(
    "shortest",
    [corpus.mesh(), corpus.peer(), corpus.service()],
    ids=["ScopeMesh", "ScopePeer", "ScopeService"],
)
def test_the_defaults_are_the_models(shortest: Document) -> None:
    parsed = resources.parse(shortest)
    kind, written = model.kind_of(parsed), resources.to_dict(parsed)["spec"]

    def defaults(schema: Schema, value: object) -> object:
        if not isinstance(value, dict):
            assert "default" in schema
            return schema["default"]
        return {name: defaults(schema["properties"][name], inner) for name, inner in value.items()}

    assert isinstance(written, dict) and isinstance(shortest["spec"], dict)
    left_out = {name: value for name, value in written.items() if name not in shortest["spec"]}
    spec = schema_of(kind)["properties"]["spec"]
    assert defaults(spec, left_out) == left_out
    defaulted = {name for name, schema in spec["properties"].items() if "default" in schema}
    assert defaulted == set(left_out)
    timers = spec["properties"].get("timers")
    if timers is not None:
        assert timers["default"] == left_out["timers"]
    status = schema_of(kind)["properties"].get("status", {})
    assert not [path for path, schema in walk(status) if "default" in schema], (
        "a status says what was written"
    )


def test_whoever_asks_for_hubs_gets_the_models_defaults() -> None:
    written = resources.to_dict(resources.parse(corpus.mesh(hubs={"mode": "Auto"})))["spec"]
    assert isinstance(written, dict)
    properties = schema_of(Kind.MESH)["properties"]["spec"]["properties"]["hubs"]["properties"]
    defaulted = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    assert defaulted | {"mode": "Auto"} == written["hubs"]
    assert defaulted["mode"] == model.Hubs().mode
    for name in ("ports", "limits"):
        inner = {each: schema["default"] for each, schema in properties[name]["properties"].items()}
        assert inner == defaulted[name]


OTHERWISE_CALLED = {
    "wireguard": "wireGuard",
    "node_uid": "nodeUID",
    "mesh_uid": "meshUID",
    "peer_uid": "peerUID",
    "latency": "latencyMs",
    "pair": "pairBytesPerSecond",
    "total": "totalBytesPerSecond",
    "changed": "lastTransitionTime",
    "inside": "from",
    "outside": "to",
}


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return OTHERWISE_CALLED.get(name, first + "".join(map(str.capitalize, rest)))


@pytest.mark.parametrize(
    ("values", "kind", "path"),
    [
        ((model.MeshSpec,), Kind.MESH, "spec"),
        ((model.Addressing,), Kind.MESH, "spec.addressing"),
        ((model.Timers,), Kind.MESH, "spec.timers"),
        ((model.LabelSelector,), Kind.MESH, "spec.nodeSelector"),
        ((model.Requirement,), Kind.MESH, "spec.nodeSelector.matchExpressions[0]"),
        ((model.Hubs,), Kind.MESH, "spec.hubs"),
        ((model.LabelSelector,), Kind.MESH, "spec.hubs.selector"),
        ((model.RelayLimits,), Kind.MESH, "spec.hubs.limits"),
        ((model.MeshCluster,), Kind.MESH, "spec.clusters[0]"),
        ((model.Translation,), Kind.MESH, "spec.clusters[0].translate[0]"),
        ((model.HubChoice,), Kind.MESH, "status.hubs[0]"),
        ((model.MeshStatus,), Kind.MESH, "status"),
        ((model.Reflector,), Kind.MESH, "status.reflectors[0]"),
        ((model.MeshCounts,), Kind.MESH, "status.counts"),
        ((model.ServiceAccount,), Kind.MESH, "status.clusters[0].serviceAccount"),
        ((model.PeerSpec,), Kind.PEER, "spec"),
        ((model.PodPrefix,), Kind.PEER, "spec.podPrefixes[0]"),
        ((model.PeerReport, model.Assignment), Kind.PEER, "status"),
        ((model.PeerKeys,), Kind.PEER, "status.keys"),
        ((model.Candidate,), Kind.PEER, "status.endpoints[0]"),
        ((model.Link,), Kind.PEER, "status.links[0]"),
        ((model.RelayReport,), Kind.PEER, "status.relay"),
        ((model.HubCarrier,), Kind.PEER, "status.relay.carrier"),
        ((model.Condition,), Kind.PEER, "status.conditions[0]"),
        ((model.Tombstone,), Kind.PEER, "status.tombstone"),
        ((model.ServiceSpec,), Kind.SERVICE, "spec"),
        ((model.ServicePort,), Kind.SERVICE, "spec.ports[0]"),
        ((model.Backend,), Kind.SERVICE, "spec.backends[0]"),
        ((model.ServicePort,), Kind.SERVICE, "spec.backends[0].ports[0]"),
        ((model.ServiceEndpoint,), Kind.SERVICE, "spec.backends[0].endpoints[0]"),
    ],
)
def test_every_field_of_the_model_is_a_field_of_the_schema(
    values: tuple[Any, ...], kind: Kind, path: str
) -> None:
    [schema] = [schema for place, schema in walk(schema_of(kind)) if dotted(place) == path]
    assert sorted(schema["properties"]) == sorted(
        camel(field.name) for value in values for field in fields(value)
    )


@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_definition_is_named_as_the_parser_names_its_kind(kind: Kind) -> None:
    spec = definition(kind)["spec"]
    assert definition(kind)["metadata"]["name"] == f"{resources.PLURALS[kind]}.{resources.GROUP}"
    assert (spec["group"], spec["names"]["plural"], spec["names"]["kind"]) == (
        resources.GROUP,
        resources.PLURALS[kind],
        str(kind),
    )
    assert [version["name"] for version in spec["versions"]] == [resources.VERSION]


@pytest.mark.parametrize("case", list(corpus.right()), ids=str)
def test_the_parser_takes_what_is_right(case: Case) -> None:
    assert resources.parse(resources.to_dict(resources.parse(case.document)))


@pytest.mark.parametrize("case", list(corpus.wrong()), ids=str)
def test_the_parser_names_the_one_fault(case: Case) -> None:
    [path] = refusals(case.document)
    assert path.startswith(case.fault)


@pytest.mark.parametrize("change", list(corpus.changes()), ids=str)
def test_the_parser_knows_what_may_change(change: Change) -> None:
    stored, asked = resources.parse(change.stored), resources.parse(change.asked)
    problems = resources.forbidden_changes(stored, asked)
    assert bool(problems) == bool(change.fault)
    assert all(problem.path.startswith(change.fault) for problem in problems)
