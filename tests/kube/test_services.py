"""Services that one cluster exports, and the other offers: on the real API servers of two clusters.

No controller runs here: a test writes the EndpointSlices of a Service as Kubernetes' own controller would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kubelab import ApiError, ControlPlane

from tests.kube.operator_fixture import NAMESPACE, Cluster, Replica, eventually, mesh, operated
from tests.kube.test_operator_gateway import GATEWAY, administrator_file, served_by
from tests.kube.test_two_clusters import MANIFESTS, Two

pytestmark = pytest.mark.timeout(600)  # two control planes and an operator in each

DEFINITIONS = Path(__file__).parents[2] / "crds"
SERVICES = "/api/v1/namespaces/shop/services"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices"
RECORDS = "/apis/scope.ltgc.cc/v1alpha1/scopeservices"


def service(name: str, *, export: str | None = "true", **spec: object) -> dict[str, Any]:
    """A Service with one port, exported unless told otherwise."""
    annotations = {} if export is None else {"scope.ltgc.cc/export": export}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop", "annotations": annotations},
        "spec": {
            "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}],
            **spec,
        },
    }


def slice_of(name: str, *pods: tuple[str, bool], port: int = 8080) -> dict[str, Any]:
    """The EndpointSlice of a Service: addresses, and whether each is ready."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": port}],
        "endpoints": [
            {"addresses": [address], "conditions": {"ready": ready, "serving": ready}}
            for address, ready in pods
        ],
    }


async def found(cluster: Cluster, path: str) -> dict[str, Any] | None:
    """An object; None where there is none."""
    try:
        return await cluster.plane.request("GET", path)
    except ApiError as error:
        if error.status != 404:
            raise
        return None


async def endpoints(cluster: Cluster, name: str) -> dict[str, tuple[bool, int]]:
    """The endpoints that a Service has: whether each is ready, and on which port."""
    listed = await cluster.plane.request("GET", f"{SLICES}?labelSelector=kubernetes.io/service-name={name}")
    return {
        end["addresses"][0]: (end["conditions"]["ready"], each["ports"][0]["port"])
        for each in listed["items"]
        for end in each["endpoints"]
    }


async def offered(cluster: Cluster, name: str, wanted: dict[str, tuple[bool, int]]) -> dict[str, Any]:
    """A Service once it has exactly these endpoints."""

    async def there() -> dict[str, Any] | None:
        document = await found(cluster, f"{SERVICES}/{name}")
        return document if document is not None and await endpoints(cluster, name) == wanted else None

    return await eventually(there)


async def absent(cluster: Cluster, name: str) -> None:
    """Return once there is no such Service, and no endpoint of it."""

    async def gone() -> bool:
        return await found(cluster, f"{SERVICES}/{name}") is None and not await endpoints(cluster, name)

    await eventually(gone)


@dataclass
class Pair:
    """Both clusters with their operators, for all tests of this file: each has names of its own."""

    two: Two
    runner: asyncio.Runner
    western: Replica

    @property
    def east(self) -> Cluster:
        """Where the registry is."""
        return self.two.east

    @property
    def west(self) -> Cluster:
        """Which joined it."""
        return self.two.west

    async def join(self) -> None:
        """Start the western operator, with the rights that the manifests give."""
        self.western = await self.two.join(self.two.directory / "join-string", "--export-services")


RIGHTS = ("20-accounts", "30-operator-rights", "32-service-rights")


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two clusters, which both have the namespace `shop`."""
    failed = request.session.testsfailed
    planes = ControlPlane(), ControlPlane()
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            yield runner.run(start(runner, stack, planes, tmp_path_factory.mktemp("services")))
        finally:
            runner.run(stack.aclose())
            for plane in planes:
                plane.close(keep_logs=request.session.testsfailed > failed)


async def start(
    runner: asyncio.Runner, stack: AsyncExitStack, planes: tuple[ControlPlane, ...], directory: Path
) -> Pair:
    clusters = []
    for plane in planes:
        await plane.start()
        await plane.apply(DEFINITIONS)
        cluster = await stack.enter_async_context(operated(plane))
        clusters.append(cluster)
        for name in RIGHTS:
            await plane.apply(MANIFESTS / f"{name}.yaml")
        await plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
        await plane.create_node("n1")
    east, west = clusters
    await east.plane.apply(mesh())
    token = await east.plane.token("scope-operator", namespace=NAMESPACE)
    account = f"--kubeconfig={east.plane.kubeconfig(token=token)}"
    replica = await east.operator(*GATEWAY, account, "--export-services", gateway=True)
    admin = await administrator_file(east, directory, url=await served_by(replica))
    two = Two(east, west, replica, admin, directory)
    await two.invite()
    western = await two.join(directory / "join-string", "--export-services")
    await east.addressed("home.east.n1", "home.west.n1")
    return Pair(two, runner, western)


def test_a_service_is_offered_in_the_other_cluster_and_followed(pair: Pair) -> None:
    pair.runner.run(followed(pair.east, pair.west, "web-east"))
    pair.runner.run(followed(pair.west, pair.east, "web-west"))


async def followed(ours: Cluster, theirs: Cluster, name: str) -> None:
    await ours.plane.apply(service("web"), slice_of("web", ("10.244.1.5", True)))
    made = await offered(theirs, name, {"10.244.1.5": (True, 8080)})
    assert "selector" not in made["spec"]
    assert made["metadata"]["labels"] == {"scope.ltgc.cc/imported-from": name.removeprefix("web-")}
    assert made["spec"]["clusterIP"] not in ("", "None")
    [port] = made["spec"]["ports"]
    assert (port["name"], port["port"], port["protocol"]) == ("http", 80, "TCP")

    # A pod that is not ready any more, one that came, and another port.
    await ours.plane.apply(slice_of("web", ("10.244.1.5", False), ("10.244.2.6", True), port=9090))
    again = await offered(theirs, name, {"10.244.1.5": (False, 9090), "10.244.2.6": (True, 9090)})
    assert again["metadata"]["uid"] == made["metadata"]["uid"]

    await ours.plane.apply(service("web", ports=[{"name": "http", "port": 8000}]))

    async def follows() -> bool:
        document = await found(theirs, f"{SERVICES}/{name}")
        return document is not None and [each["port"] for each in document["spec"]["ports"]] == [8000]

    await eventually(follows)
    await ours.plane.request("DELETE", f"{SERVICES}/web")
    await absent(theirs, name)


def test_a_service_that_is_not_ours_is_left_alone_until_its_name_is_free(pair: Pair) -> None:
    async def body() -> None:
        foreign = service("db-east", export=None)
        await pair.west.plane.apply(foreign, slice_of("db-east", ("10.9.9.9", True)))
        before = await found(pair.west, f"{SERVICES}/db-east")
        await pair.east.plane.apply(service("db", clusterIP="None"), slice_of("db", ("10.244.1.7", True)))

        async def told() -> dict[str, Any] | None:
            events = await pair.west.events("NameTaken")
            return next((each for each in events if each["regarding"]["name"] == "db-east"), None)

        event = await eventually(told)
        assert "Service db of cluster east cannot be offered here" in event["note"]
        assert event["metadata"]["namespace"] == "shop"
        assert await found(pair.west, f"{SERVICES}/db-east") == before
        assert await endpoints(pair.west, "db-east") == {"10.9.9.9": (True, 8080)}

        await pair.west.plane.request("DELETE", f"{SERVICES}/db-east")
        await pair.west.plane.request("DELETE", f"{SLICES}/db-east-1")
        made = await offered(pair.west, "db-east", {"10.244.1.7": (True, 8080)})
        assert made["spec"]["clusterIP"] == "None"

    pair.runner.run(body())


def test_a_service_comes_as_soon_as_its_namespace_does(pair: Pair) -> None:
    async def body() -> None:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "later"}}
        exported = service("web")
        exported["metadata"]["namespace"] = "later"
        await pair.east.plane.apply(namespace)
        await pair.east.plane.apply(exported)
        [event] = await pair.west.events("NamespaceMissing")
        assert "there is no namespace later: create it" in event["note"]
        await pair.west.plane.apply(namespace)

        async def there() -> dict[str, Any] | None:
            return await found(pair.west, "/api/v1/namespaces/later/services/web-east")

        await eventually(there)

    pair.runner.run(body())


def test_an_operator_that_was_killed_misses_nothing(pair: Pair) -> None:
    async def body() -> None:
        for name in ("stays", "goes"):
            await pair.east.plane.apply(service(name), slice_of(name, ("10.244.1.8", True)))
            await offered(pair.west, f"{name}-east", {"10.244.1.8": (True, 8080)})
        pair.western.process.kill()
        await pair.western.ended()
        await pair.east.plane.apply(slice_of("stays", ("10.244.1.8", False)))
        await pair.east.plane.request("DELETE", f"{SERVICES}/goes")

        async def withdrawn() -> bool:
            listed = await pair.east.plane.request("GET", RECORDS)
            return all(each["spec"]["service"] != "goes" for each in listed["items"])

        await eventually(withdrawn)
        await pair.west.hand_over()
        await pair.join()
        await offered(pair.west, "stays-east", {"10.244.1.8": (False, 8080)})
        await absent(pair.west, "goes-east")

    pair.runner.run(body())
