"""The control plane of the tests is a real one, and does to its clients what they are tested against."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kubelab import ApiError, AuditLog, ControlPlane, FaultProxy, KubeLabError
from kubelab import programs as kubelab_programs
from lab import Lab

Make = Callable[..., ControlPlane]
NODES = "/api/v1/nodes"
DEFAULT = "/api/v1/namespaces/default"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"


async def node_names(plane: ControlPlane) -> list[str]:
    listed = await plane.request("GET", NODES)
    return sorted(item["metadata"]["name"] for item in listed["items"])


def test_it_is_kubernetes_1_34(control_plane: ControlPlane) -> None:
    version = asyncio.run(control_plane.request("GET", "/version"))
    assert (version["major"], version["minor"]) == ("1", "34")
    assert version["gitVersion"].startswith("v1.34.")


def test_kubectl_applies_a_manifest_and_reads_it_back(control_plane: ControlPlane) -> None:
    async def run() -> None:
        await control_plane.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "one", "namespace": "default"}}
        )
        assert "secret/one" in await control_plane.kubectl("get", "secrets", "-o", "name")
        with pytest.raises(KubeLabError, match="not found"):
            await control_plane.kubectl("get", "secret", "another")

    asyncio.run(run())


def test_a_definition_is_served_as_soon_as_it_is_applied(control_plane: ControlPlane) -> None:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "things.example.test"},
        "spec": {
            "group": "example.test",
            "scope": "Cluster",
            "names": {"plural": "things", "singular": "thing", "kind": "Thing"},
            "versions": [
                {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
            ],
        },
    }

    async def run() -> None:
        await control_plane.apply(definition)
        thing = {"apiVersion": "example.test/v1", "kind": "Thing", "metadata": {"name": "one"}}
        await control_plane.request("POST", "/apis/example.test/v1/things", thing)
        await control_plane.kubectl("delete", "crd", "things.example.test")

    asyncio.run(run())


@pytest.mark.parametrize("turn", [1, 2])
def test_what_one_test_leaves_behind_the_next_does_not_see(control_plane: ControlPlane, turn: int) -> None:
    async def run() -> None:
        assert await node_names(control_plane) == []
        await control_plane.create_node(f"n{turn}", address="192.0.2.1")

    asyncio.run(run())


def test_a_token_bound_to_a_node_names_it_and_dies_with_it(control_plane: ControlPlane) -> None:
    async def run() -> None:
        await control_plane.apply(
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {"name": "agent", "namespace": "default"},
            }
        )
        uid = await control_plane.create_node("n1")
        token = await control_plane.token("agent", node="n1")

        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        assert claims["kubernetes.io"]["node"] == {"name": "n1", "uid": uid}

        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
        who = await control_plane.request("POST", path, review, token=token)
        assert who["status"]["userInfo"]["username"] == "system:serviceaccount:default:agent"
        assert who["status"]["userInfo"]["extra"]["authentication.kubernetes.io/node-name"] == ["n1"]

        with pytest.raises(ApiError, match="cannot list resource") as refused:
            await control_plane.request("GET", NODES, token=token)
        assert refused.value.status == 403

        await control_plane.request("DELETE", f"{NODES}/n1")
        deadline = time.monotonic() + 30.0  # a token that was seen to be good stays so for ten seconds

        async def ask_until(deadline: float) -> None:
            while time.monotonic() < deadline:
                await control_plane.request("POST", path, review, token=token)
                await asyncio.sleep(0.2)

        with pytest.raises(ApiError) as refused:
            await ask_until(deadline)
        assert refused.value.status == 401

    asyncio.run(run())


def test_a_token_works_in_a_kubeconfig(control_plane: ControlPlane) -> None:
    async def run() -> None:
        file = control_plane.kubeconfig(token=await control_plane.admin_token())
        said = await control_plane.kubectl("auth", "whoami", "-o", "name", kubeconfig=file)
        assert said
        assert file.stat().st_mode & 0o077 == 0

    asyncio.run(run())


def test_the_audit_log_tells_who_wrote_what(control_plane: ControlPlane) -> None:
    async def run() -> None:
        mark = control_plane.audit.mark()
        await control_plane.create_node("n1")
        await node_names(control_plane)
        seen = [one for one in control_plane.audit.since(mark) if one.resource == "nodes"]
        assert [(one.verb, one.user, one.name, one.code, one.is_write) for one in seen] == [
            ("create", "kubernetes-admin", "n1", 201, True),
            ("list", "kubernetes-admin", "", 200, False),
        ]

    asyncio.run(run())


def test_a_line_that_is_still_being_written_is_no_entry_yet(tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    event = {
        "requestReceivedTimestamp": "2026-01-01T00:00:00.000000Z",
        "verb": "get",
        "user": {"username": "one"},
        "requestURI": "/version",
        "stage": "ResponseComplete",
    }
    log.write_text(json.dumps(event) + "\n" + json.dumps(event)[:40])
    assert [one.path for one in AuditLog(log).since()] == ["/version"]


def test_controllers_delete_what_belonged_to_a_deleted_object(own_control_plane: Make) -> None:
    plane = own_control_plane(controllers=True)

    async def run() -> None:
        uid = await plane.create_node("n1")
        owner = {"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": uid}
        lease = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "owned", "ownerReferences": [owner]},
        }
        await plane.request("POST", LEASES, lease)
        await plane.request("DELETE", f"{NODES}/n1")
        deadline = time.monotonic() + 60.0
        while (await plane.request("GET", LEASES))["items"]:
            assert time.monotonic() < deadline, "the garbage collector does not run"
            await asyncio.sleep(0.2)

    asyncio.run(run())


def test_controllers_give_each_node_a_range_of_pods(own_control_plane: Make) -> None:
    plane = own_control_plane(controllers=True)

    async def run() -> None:
        await plane.create_node("n1")
        deadline = time.monotonic() + 30.0
        while "podCIDR" not in (await plane.request("GET", f"{NODES}/n1"))["spec"]:
            assert time.monotonic() < deadline, "the Node got no podCIDR"
            await asyncio.sleep(0.2)

    asyncio.run(run())


def test_what_was_written_survives_an_orderly_end_and_a_kill(own_control_plane: Make) -> None:
    plane = own_control_plane()
    url = plane.url

    async def run() -> None:
        await plane.create_node("n1")
        await plane.stop()
        await plane.start()
        await plane.create_node("n2")
        plane.api_server.kill()
        plane.etcd.kill()
        await plane.start()
        assert await node_names(plane) == ["n1", "n2"]
        assert plane.url == url

    asyncio.run(run())


def test_a_frozen_api_server_keeps_its_connections_and_says_nothing(own_control_plane: Make) -> None:
    plane = own_control_plane()

    async def run() -> None:
        async with plane.session() as session:
            now = (await plane.request("GET", NODES))["metadata"]["resourceVersion"]
            asked = {"watch": "true", "timeoutSeconds": "60", "resourceVersion": now}
            async with session.get(plane.url + NODES, params=asked) as watch:
                plane.api_server.freeze()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(watch.content.readline(), 0.5)
                assert not watch.content.at_eof()
                plane.api_server.thaw()
                await plane.create_node("n1")
                event = json.loads(await asyncio.wait_for(watch.content.readline(), 20.0))
                assert event["object"]["metadata"]["name"] == "n1"
                # A watch that its client ends is a connection which the loop's end would find half closed.
                plane.api_server.kill()
                with contextlib.suppress(aiohttp.ClientError):
                    await watch.content.read()

    asyncio.run(run())


def test_a_restored_snapshot_forgets_what_came_after_it(own_control_plane: Make) -> None:
    plane = own_control_plane()

    async def run() -> None:
        await plane.create_node("before")
        then = (await plane.request("GET", NODES))["metadata"]["resourceVersion"]
        snapshot = await plane.snapshot()
        for number in range(20):
            await plane.create_node(f"after{number}")
        later = (await plane.request("GET", NODES))["metadata"]["resourceVersion"]
        await plane.restore(snapshot)
        assert await node_names(plane) == ["before"]
        restored = (await plane.request("GET", NODES))["metadata"]["resourceVersion"]
        assert int(then) <= int(restored) < int(later)

    asyncio.run(run())


def test_two_control_planes_run_at_once_and_know_nothing_of_each_other(own_control_plane: Make) -> None:
    one, another = own_control_plane(), own_control_plane()

    async def run() -> None:
        await one.create_node("n1")
        assert await node_names(another) == []
        uids = [
            (await plane.request("GET", "/api/v1/namespaces/kube-system"))["metadata"]["uid"]
            for plane in (one, another)
        ]
        assert uids[0] != uids[1]
        with pytest.raises(KubeLabError, match="certificate signed by unknown authority"):
            await one.kubectl("get", "nodes", "--server", another.url)

    asyncio.run(run())


def test_it_runs_on_a_server_of_the_lab() -> None:
    with Lab() as lab:
        server, client = lab.server("cluster"), lab.server("client")

        async def run() -> None:
            async with ControlPlane(host=server) as plane:
                assert plane.url.startswith(f"https://{server.ipv4}:")
                await plane.create_node("n1")
                assert await node_names(plane) == ["n1"]
                assert "n1" in await plane.kubectl("get", "nodes")
                fetch = [
                    "curl",
                    "--silent",
                    "--cacert",
                    str(plane.authority.certificate),
                    plane.url + "/healthz",
                ]
                assert client.run(fetch).stdout == "ok"

        asyncio.run(run())


def test_nothing_is_left_of_a_control_plane_that_was_closed() -> None:
    async def run() -> ControlPlane:
        async with ControlPlane() as plane:
            assert plane.directory.exists()
        return plane

    plane = asyncio.run(run())
    assert not plane.directory.exists()
    assert not plane.etcd.is_running
    assert not plane.api_server.is_running


def test_its_logs_outlive_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubelab.control_plane.KEPT_LOGS", tmp_path)

    async def run() -> None:
        async with ControlPlane() as plane:
            await plane.create_node("n1")
            raise KubeLabError("something failed")

    with pytest.raises(KubeLabError, match="something failed"):
        asyncio.run(run())
    (kept,) = tmp_path.iterdir()
    assert {"etcd.log", "kube-apiserver.log", "audit.log"} == {path.name for path in kept.iterdir()}


def test_missing_programs_are_an_error_that_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kubelab_programs, "BUILT", tmp_path)
    with pytest.raises(KubeLabError, match=r"run `hack/setup\.sh test`"):
        ControlPlane()


class Client:
    """Somebody who asks through a proxy, with a token, and may watch."""

    def __init__(self, session: aiohttp.ClientSession, proxy: FaultProxy, token: str) -> None:
        self.session = session
        self.proxy = proxy
        self.headers = {"Authorization": f"Bearer {token}"}

    async def get(self, path: str = NODES, **query: str) -> tuple[int, dict[str, Any]]:
        url = self.proxy.url + path
        async with self.session.get(url, params=query, headers=self.headers) as answer:
            return answer.status, await answer.json()

    @contextlib.asynccontextmanager
    async def watch(self, path: str = NODES) -> AsyncIterator[aiohttp.ClientResponse]:
        _, listed = await self.get(path)
        since = listed["metadata"]["resourceVersion"]
        asked = {"watch": "true", "resourceVersion": since}
        url = self.proxy.url + path
        async with self.session.get(url, params=asked, headers=self.headers) as answer:
            assert answer.status == 200
            try:
                yield answer
            finally:
                self.proxy.cut_watches()
                with contextlib.suppress(aiohttp.ClientError):
                    await answer.content.read()


@contextlib.asynccontextmanager
async def through_a_proxy(plane: ControlPlane) -> AsyncIterator[tuple[FaultProxy, Client]]:
    token = await plane.admin_token()
    async with FaultProxy(plane) as proxy, plane.session(as_admin=False) as session:
        yield proxy, Client(session, proxy, token)


async def event(watch: aiohttp.ClientResponse, *, within_s: float = 20.0) -> dict[str, Any]:
    return dict(json.loads(await asyncio.wait_for(watch.content.readline(), within_s)))


def name_in(seen: dict[str, Any]) -> str:
    return str(seen["object"]["metadata"]["name"])


def test_a_proxy_passes_requests_refusals_and_watches_on(control_plane: ControlPlane) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client):
            async with client.watch() as watch:
                file = control_plane.kubeconfig(token=await control_plane.admin_token(), url=proxy.url)
                node = json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}})
                await control_plane.kubectl("create", "-f", "-", document=node, kubeconfig=file)
                assert name_in(await event(watch)) == "n1"
                assert proxy.open_watches == 1
            status, said = await client.get(f"{NODES}/another")
            assert (status, said["reason"]) == (404, "NotFound")
            nobody = Client(client.session, proxy, "no token")
            assert (await nobody.get())[0] == 401

    asyncio.run(run())


def test_a_proxy_makes_the_api_server_slow(control_plane: ControlPlane) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client):
            proxy.affects, proxy.delay_s = "/nodes", 0.5
            started = time.monotonic()
            await client.get()
            assert time.monotonic() - started >= 0.5
            await client.get(DEFAULT)
            proxy.heal()
            assert (await client.get())[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize("status", [429, 500])
def test_a_proxy_answers_a_share_of_requests_with_an_error(control_plane: ControlPlane, status: int) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client):
            proxy.answer(status, share=0.5, retry_after_s=1)
            answers = [await client.get() for _ in range(6)]
            assert [code for code, _ in answers] == [200, status] * 3
            assert answers[1][1]["kind"] == "Status"
            proxy.answer(status)
            assert [(await client.get())[0] for _ in range(3)] == [status] * 3
            proxy.heal()
            assert (await client.get())[0] == 200

    asyncio.run(run())


def test_a_proxy_cuts_a_watch_in_the_middle(control_plane: ControlPlane) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client), client.watch() as watch:
            proxy.cut_watches()
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(watch.content.readline(), 20.0)

    asyncio.run(run())


def test_a_proxy_tells_a_watch_that_it_is_too_old(control_plane: ControlPlane) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client), client.watch() as watch:
            proxy.expire_watches()
            seen = await event(watch)
            assert (seen["type"], seen["object"]["code"]) == ("ERROR", 410)
            assert await watch.content.read() == b""

    asyncio.run(run())


def test_a_proxy_freezes_watches_without_a_word_and_lets_new_ones_through(
    control_plane: ControlPlane,
) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client), client.watch() as old:
            proxy.freeze_watches(new_ones=False)
            async with client.watch() as new:
                await control_plane.create_node("n1")
                assert name_in(await event(new)) == "n1"
                with pytest.raises(TimeoutError):
                    await event(old, within_s=0.3)
                assert proxy.open_watches == 2

    asyncio.run(run())


def test_a_frozen_watch_stays_so_when_the_proxy_is_healed(control_plane: ControlPlane) -> None:
    async def run() -> None:
        async with through_a_proxy(control_plane) as (proxy, client):
            proxy.freeze_watches()
            async with client.watch() as watch:
                proxy.heal()
                await control_plane.create_node("n1")
                async with client.watch() as healed:
                    await control_plane.create_node("n2")
                    assert name_in(await event(healed)) == "n2"
                with pytest.raises((TimeoutError, aiohttp.ClientError)):
                    await event(watch, within_s=0.3)

    asyncio.run(run())


def test_a_proxy_leaves_items_or_pages_out_of_lists(control_plane: ControlPlane) -> None:
    async def run() -> None:
        for number in range(5):
            await control_plane.create_node(f"n{number}")
        async with through_a_proxy(control_plane) as (proxy, client):
            proxy.truncate_lists(drop=2)
            assert [item["metadata"]["name"] for item in (await client.get())[1]["items"]] == [
                "n0",
                "n1",
                "n2",
            ]
            proxy.truncate_lists(lose_pages=True)
            page = (await client.get(limit="2"))[1]
            assert (len(page["items"]), page["metadata"].get("continue", "")) == (2, "")
            proxy.heal()
            page = (await client.get(limit="2"))[1]
            assert page["metadata"]["continue"]

    asyncio.run(run())


def test_a_client_of_a_proxy_loses_its_connection_with_the_api_server(own_control_plane: Make) -> None:
    plane = own_control_plane()

    async def run() -> None:
        async with through_a_proxy(plane) as (_, client), client.watch() as watch:
            plane.api_server.kill()
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(watch.content.readline(), 20.0)
            with pytest.raises(aiohttp.ClientError):
                await client.get()
            await plane.api_server.start()
            assert (await client.get())[0] == 200

    asyncio.run(run())
