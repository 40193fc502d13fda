"""etcd, kube-apiserver and, where asked for, controller manager and scheduler: a cluster without a kubelet.

What differs from a cluster in earnest, and why:

- etcd's data is in memory (a tmpfs), or with a kept lab in files: no write is flushed to a disk, so a start
  and a write take a tenth of the time. What survives here is the end of a process, not of the machine.
- etcd has no TLS and listens on loopback alone, for whoever is on this machine or in that host of the lab.
- The controllers for Nodes' health run only where Nodes have kubelets; elsewhere nobody renews a Node.

Nothing here belongs to an event loop: what one `asyncio.run` starts, the next may use.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import shutil
import socket as sockets
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from ssl import SSLContext, create_default_context
from types import TracebackType
from typing import Any, Self

import aiohttp
from lab import Host

from kubelab.audit import POLICY, AuditLog
from kubelab.certificates import Authority, make_token_keys
from kubelab.programs import (
    ROOT,
    KubeLabError,
    Program,
    ThisMachine,
    Where,
    kubernetes_program,
    node_program,
    system_program,
)

KEPT_LOGS = ROOT / "build" / "kubelab"
ISSUER = "https://kubernetes.default.svc.cluster.local"
ADMIN = "kubernetes-admin"
JSON = "application/json"
APPLY = "application/apply-patch+yaml"  # server-side apply; JSON is YAML
MERGE = "application/merge-patch+json"

_LOOPBACK = "127.0.0.1"
_SERVICES = "10.96.0.0/16"
_SERVICES_OF_BOTH_FAMILIES = f"{_SERVICES},fd00:96::/112"
_FIRST_SERVICE = "10.96.0.1"  # the API server's own, in the certificate as in every cluster
# Below what the kernel gives to outgoing connections (32768 on): a free port stays so across a restart.
_PORTS = range(20_000, 32_000)
_TOOL_S = 60.0  # kubectl and etcdctl do seconds of work; the machine may be busy
# A probe that is given up amid its TLS handshake leaves a transport unclosed (asyncio in Python 3.11), so it
# waits longer than any answer takes.
_PROBE_S = 30.0
_CLOSING_ROUNDS = 1000  # of a millisecond: a connection that was shut down is closed in the loop's next few
_MANAGER = "kubelab"  # the field manager of what is applied here
# Nobody here asks the cluster to sign a certificate.
_CONTROLLERS = "*,-certificatesigningrequest-signing-controller"
_HEALTH_CONTROLLERS = ",-node-lifecycle-controller,-taint-eviction-controller"
_numbers = itertools.count(1)


class ApiError(KubeLabError):
    """A refusal of the API server: its HTTP `status`, its `reason`, and its sentence as the message."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class ControlPlane:
    """One cluster's control plane; `async with` starts it, and ends it with everything it left behind.

    With a `host` of the lab it runs there, on the host's own address; otherwise on loopback. With
    `controllers` the controller manager runs as well: ServiceAccounts appear in namespaces, and what belongs
    to a deleted object is deleted. `pods` is the CIDR from which it gives each Node its own; two, with a
    comma between them, are one of each family. With `kubelets` it is ready for Nodes that run: controllers
    with those for Nodes' health, a scheduler, and the API server allowed to ask kubelets. With `kept`, which
    needs a host, it stays as long as the lab, also after this process, its files in the host's directory.

    `etcd`, `api_server`, `controllers` and `scheduler` are programs to stop, kill, freeze and start again, on
    the same data and ports.
    """

    def __init__(
        self,
        *,
        host: Host | None = None,
        controllers: bool = False,
        pods: str = "10.244.0.0/16",
        kubelets: bool = False,
        kept: bool = False,
    ) -> None:
        programs = {name: kubernetes_program(name) for name in ("kube-apiserver", "kube-controller-manager")}
        self._kubectl, self._etcdctl = kubernetes_program("kubectl"), system_program("etcdctl")
        self._where: Where = host or ThisMachine()
        self.address = _LOOPBACK if host is None else str(host.ipv4)
        self.name = f"control-plane-{os.getpid()}-{next(_numbers)}"
        if kept and host is None:
            raise ValueError("a control plane is kept with a lab, which ends it: give it a host")
        self._kept = kept
        self._kubelets = kubelets
        self.directory = host.directory / self.name if kept and host else _fresh_directory(self.name)
        self.logs = self.directory / "logs"
        self.logs.mkdir(parents=True)
        self._files = itertools.count(1)
        self._etcd_data = self.directory / "etcd"

        api_port, etcd_port, peer_port = _free_ports(self._where, self.address, count=3)
        self.url = f"https://{self.address}:{api_port}"
        self._etcd_url, self._etcd_peer_url = (
            f"http://{_LOOPBACK}:{port}" for port in (etcd_port, peer_port)
        )
        self.authority = Authority(self.directory / "pki", name=self.name)
        self.certificate, self.key = self.authority.issue("admin", user=ADMIN, groups=("system:masters",))
        self.audit = AuditLog(self.logs / "audit.log")

        etcd_argv = self._etcd_argv(system_program("etcd"))
        self.etcd = self._program("etcd", etcd_argv, is_ready=self._etcd_is_ready)
        api_argv = self._api_server_argv(programs["kube-apiserver"], port=api_port)
        self.api_server = self._program("kube-apiserver", api_argv, is_ready=self._api_server_is_ready)
        self.controllers: Program | None = None
        if controllers or kubelets:
            argv = self._controllers_argv(programs["kube-controller-manager"], pods=pods)
            self.controllers = self._program(
                "kube-controller-manager", argv, is_ready=self._controllers_are_ready
            )
        self.scheduler: Program | None = None
        if kubelets:
            argv = [
                node_program("kube-scheduler"),
                f"--kubeconfig={self.sign_in('scheduler', user='system:kube-scheduler')}",
                "--leader-elect=false",
                "--secure-port=0",
            ]
            self.scheduler = self._program("kube-scheduler", argv, is_ready=self._api_server_is_ready)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            self.close(keep_logs=True)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close(keep_logs=error is not None)

    async def start(self) -> None:
        """Start every program that does not run; each is ready when this returns."""
        for program in self._programs():
            if not program.is_running:
                await program.start()

    async def stop(self) -> None:
        """End every program in an orderly way, last started first; `start` goes on with the same data."""
        for program in reversed(self._programs()):
            await program.stop()

    def close(self, *, keep_logs: bool = False) -> Path | None:
        """End everything and remove the data. Where logs are kept, if they are. Idempotent."""
        for program in reversed(self._programs()):
            program.kill()
        kept = None
        if keep_logs and self.logs.exists():
            kept = KEPT_LOGS / self.name
            shutil.copytree(self.logs, kept, dirs_exist_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        return kept

    # Asking the API server.

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        content_type: str = JSON,
        token: str | None = None,
        timeout_s: float = 30.0,
    ) -> Any:
        """One request, as the administrator or with a token, and the JSON of its answer. Raises ApiError."""
        headers = {"Content-Type": content_type}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        async with (
            self.session(as_admin=token is None) as session,
            session.request(
                method,
                self.url + path,
                data=None if body is None else json.dumps(body),
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response,
        ):
            if not response.ok:
                raise _api_error(response.status, await response.text())
            return await response.json()

    def session(self, *, as_admin: bool = True) -> aiohttp.ClientSession:
        """A session that connects from where the control plane runs; use it with `async with`."""
        return aiohttp.ClientSession(connector=_Connector(self.socket, tls=self.tls(as_admin=as_admin)))

    def socket(self, family: int, kind: int) -> sockets.socket:
        """A socket of the network that the control plane runs in, for use in this very process."""
        return self._where.socket(family, kind)

    def tls(self, *, as_admin: bool = True) -> SSLContext:
        """A context that trusts the control plane and, as the administrator, shows his certificate."""
        context = create_default_context(cafile=self.authority.certificate)
        if as_admin:
            context.load_cert_chain(self.certificate, self.key)
        return context

    async def kubectl(
        self, *arguments: str, document: str | None = None, kubeconfig: Path | None = None
    ) -> str:
        """What kubectl prints, as the administrator unless a `kubeconfig` says otherwise.

        KubeLabError with its reason when it fails. `document` is its standard input.
        """
        env = {
            "PATH": os.defpath,
            "HOME": str(self.directory),
            "KUBECONFIG": str(kubeconfig or self.kubeconfig()),
        }
        return await asyncio.to_thread(self._run, [self._kubectl, *arguments], env, document)

    async def apply(self, *documents: Mapping[str, object] | str | Path) -> None:
        """Server-side apply mappings, YAML texts, files or directories; CRDs are served when it returns."""
        for document in documents:
            if isinstance(document, Path):
                source, text = str(document), None
            else:
                source, text = "-", document if isinstance(document, str) else json.dumps(document)
            await self.kubectl(
                "apply",
                "--server-side",
                "--force-conflicts",
                f"--field-manager={_MANAGER}",
                "-f",
                source,
                document=text,
            )
        await self._await_definitions()

    async def create_node(
        self,
        name: str,
        *,
        labels: Mapping[str, str] | None = None,
        address: str | None = None,
        pods: Sequence[str] = (),
    ) -> str:
        """Make a Node, with an InternalIP if there is an `address`, and prefixes for `pods`: its UID."""
        node = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
            **({"spec": {"podCIDR": pods[0], "podCIDRs": list(pods)}} if pods else {}),
        }
        made = await self.request("POST", "/api/v1/nodes", node)
        if address is not None:
            status = {"status": {"addresses": [{"type": "InternalIP", "address": address}]}}
            await self.request("PATCH", f"/api/v1/nodes/{name}/status", status, content_type=MERGE)
        return str(made["metadata"]["uid"])

    # Who one may be.

    async def token(
        self,
        account: str,
        *,
        namespace: str = "default",
        node: str | None = None,
        audience: str | None = None,
        seconds: int = 3600,
    ) -> str:
        """A token of a ServiceAccount, from TokenRequest; with `node` it is bound to that Node."""
        spec: dict[str, object] = {"expirationSeconds": seconds}
        if audience is not None:
            spec["audiences"] = [audience]
        if node is not None:
            found = await self.request("GET", f"/api/v1/nodes/{node}")
            uid = found["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid}
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        made = await self.request("POST", path, asked)
        return str(made["status"]["token"])

    async def admin_token(self) -> str:
        """A token with every right: for what goes through a proxy, which no client certificate does."""
        account = {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "admin", "namespace": "kube-system"},
        }
        path = f"/api/v1/namespaces/kube-system/serviceaccounts/admin?fieldManager={_MANAGER}"
        await self.request("PATCH", path, account, content_type=APPLY)
        binding = {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "kubelab-admin"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "admin", "namespace": "kube-system"}],
        }
        path = f"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/kubelab-admin?fieldManager={_MANAGER}"
        await self.request("PATCH", path, binding, content_type=APPLY)
        return await self.token("admin", namespace="kube-system")

    def kubeconfig(self, *, token: str | None = None, url: str | None = None) -> Path:
        """A file for kubectl and every other client: the administrator's, or for whoever has the `token`.

        `url` is another way to the API server, of which a certificate of the same authority is expected.
        """
        user: dict[str, str] = {"token": token} if token is not None else {}
        if token is None:
            user = {"client-certificate": str(self.certificate), "client-key": str(self.key)}
        return self._kubeconfig(user, url=url or self.url)

    def sign_in(self, file: str, *, user: str, groups: tuple[str, ...] = ()) -> Path:
        """A file for a program of the cluster's own, with a certificate by which it is `user` in `groups`.

        All is in it, so that it may be copied to where it is used.
        """
        certificate, key = self.authority.issue(file, user=user, groups=groups)
        return self._kubeconfig(
            {"client-certificate-data": _encoded(certificate), "client-key-data": _encoded(key)}, url=self.url
        )

    # Snapshots of everything the cluster knows.

    async def snapshot(self) -> Path:
        """Everything that etcd holds now, as a file."""
        path = self.directory / f"snapshot-{next(self._files)}.db"
        await asyncio.to_thread(self._run, self._etcdctl_argv("snapshot", "save", str(path)), _ETCD_ENV, None)
        return path

    async def restore(self, snapshot: Path) -> None:
        """Go back to a snapshot, as an administrator does: stop, replace etcd's data, start."""
        running = [program for program in self._programs() if program.is_running]
        for program in reversed(running):
            await program.stop()
        shutil.rmtree(self._etcd_data)
        argv = self._etcdctl_argv("snapshot", "restore", str(snapshot), *self._etcd_membership())
        await asyncio.to_thread(self._run, argv, _ETCD_ENV, None)
        for program in running:
            await program.start()

    def _programs(self) -> list[Program]:
        names = ("etcd", "api_server", "controllers", "scheduler")
        present = [getattr(self, name, None) for name in names]
        return [program for program in present if isinstance(program, Program)]

    def _program(self, name: str, argv: Sequence[str], *, is_ready: Callable[[], Any]) -> Program:
        return Program(
            name,
            argv,
            where=self._where,
            log=self.logs / f"{name}.log",
            is_ready=is_ready,
            outlives=self._kept,
        )

    def _etcd_argv(self, program: str) -> list[str]:
        return [
            program,
            *self._etcd_membership(),
            f"--listen-client-urls={self._etcd_url}",
            f"--advertise-client-urls={self._etcd_url}",
            f"--listen-peer-urls={self._etcd_peer_url}",
            # A member alone waits out an election before it leads: a second by default.
            "--heartbeat-interval=10",
            "--election-timeout=100",
            "--unsafe-no-fsync",
            "--log-level=warn",
            "--logger=zap",
        ]

    def _etcd_membership(self) -> list[str]:
        return [
            "--name=default",
            f"--data-dir={self._etcd_data}",
            f"--initial-advertise-peer-urls={self._etcd_peer_url}",
            f"--initial-cluster=default={self._etcd_peer_url}",
        ]

    def _api_server_argv(self, program: str, *, port: int) -> list[str]:
        names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
        certificate, key = self.authority.issue(
            "api-server", user="kube-apiserver", names=(*names, self.address, _LOOPBACK, _FIRST_SERVICE)
        )
        self._token_key, public = make_token_keys(self.directory)
        policy = self.directory / "audit-policy.json"
        policy.write_text(json.dumps(POLICY))
        # Kubernetes refuses to name a loopback address as an endpoint of its own Service.
        reconciler = ["--endpoint-reconciler-type=none"] if self.address == _LOOPBACK else []
        # As the administrator, whom kubelets let do everything.
        client = [f"--kubelet-client-certificate={self.certificate}", f"--kubelet-client-key={self.key}"]
        return [
            program,
            f"--etcd-servers={self._etcd_url}",
            f"--bind-address={self.address}",
            f"--advertise-address={self.address}",
            f"--secure-port={port}",
            f"--tls-cert-file={certificate}",
            f"--tls-private-key-file={key}",
            f"--client-ca-file={self.authority.certificate}",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={public}",
            f"--service-account-signing-key-file={self._token_key}",
            f"--service-cluster-ip-range={_SERVICES_OF_BOTH_FAMILIES if self._kubelets else _SERVICES}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.audit.path}",
            "--audit-log-mode=blocking-strict",
            "--profiling=false",
            *reconciler,
            *(client if self._kubelets else []),
        ]

    def _controllers_argv(self, program: str, *, pods: str) -> list[str]:
        return [
            program,
            f"--kubeconfig={self.sign_in('controllers', user='system:kube-controller-manager')}",
            f"--service-account-private-key-file={self._token_key}",
            f"--root-ca-file={self.authority.certificate}",
            "--use-service-account-credentials=true",
            f"--controllers={_CONTROLLERS}{'' if self._kubelets else _HEALTH_CONTROLLERS}",
            "--allocate-node-cidrs=true",
            f"--cluster-cidr={pods}",
            "--leader-elect=false",
            "--secure-port=0",
            "--profiling=false",
        ]

    def _kubeconfig(self, user: Mapping[str, str], *, url: str) -> Path:
        path = self.directory / f"kubeconfig-{next(self._files)}"
        path.touch(mode=0o600)
        cluster = {"server": url, "certificate-authority-data": _encoded(self.authority.certificate)}
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": self.name, "cluster": cluster}],
            "users": [{"name": "user", "user": user}],
            "contexts": [{"name": self.name, "context": {"cluster": self.name, "user": "user"}}],
            "current-context": self.name,
        }
        path.write_text(json.dumps(document))
        return path

    async def _etcd_is_ready(self) -> bool:
        return await self._answers(f"{self._etcd_url}/health")

    async def _api_server_is_ready(self) -> bool:
        return await self._answers(f"{self.url}/readyz")

    async def _controllers_are_ready(self) -> bool:
        # Made by a controller, from what another one made: both run.
        return await self._answers(f"{self.url}/api/v1/namespaces/default/serviceaccounts/default")

    async def _answers(self, url: str) -> bool:
        try:
            async with (
                self.session() as session,
                session.get(url, timeout=aiohttp.ClientTimeout(total=_PROBE_S)) as response,
            ):
                return response.ok
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _await_definitions(self) -> None:
        """Return when every CustomResourceDefinition is established, and its resources are served."""
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        deadline = time.monotonic() + _TOOL_S
        while True:
            listed = await self.request("GET", path)
            waiting = [item["metadata"]["name"] for item in listed["items"] if not _is_established(item)]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise KubeLabError(f"these are not established: {' '.join(waiting)}")
            await asyncio.sleep(0.05)

    def _etcdctl_argv(self, *arguments: str) -> list[str]:
        return [self._etcdctl, f"--endpoints={self._etcd_url}", *arguments]

    def _run(self, argv: Sequence[str], env: Mapping[str, str], document: str | None) -> str:
        stdin = subprocess.DEVNULL if document is None else subprocess.PIPE
        pipe = subprocess.PIPE
        child = self._where.popen(argv, env=env, stdin=stdin, stdout=pipe, stderr=pipe)
        try:
            out, err = child.communicate(document, timeout=_TOOL_S)
        except BaseException:
            child.kill()
            child.communicate()
            raise
        if child.returncode != 0:
            raise KubeLabError(f"{Path(argv[0]).name} {' '.join(argv[1:])}: {err.strip() or out.strip()}")
        return out


class _Connector(aiohttp.TCPConnector):
    """Makes its sockets in some network, and is closed only when every one of them is.

    A connection that is given up amid an answer says goodbye in TLS and waits for the other side's; an event
    loop that ends before that leaves its socket open.
    """

    def __init__(self, make: Callable[[int, int], sockets.socket], *, tls: SSLContext) -> None:
        super().__init__(ssl=tls, limit=0, socket_factory=self._socket)
        self._make = make
        self._open: list[sockets.socket] = []

    def _socket(self, info: Sequence[Any]) -> sockets.socket:
        sock = self._make(info[0], info[1])
        sock.setblocking(False)
        self._open = [known for known in self._open if known.fileno() != -1]
        self._open.append(sock)
        return sock

    async def close(self, *, abort_ssl: bool = False) -> None:
        await super().close(abort_ssl=abort_ssl)
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(sockets.SHUT_RDWR)
        for _ in range(_CLOSING_ROUNDS):
            if all(sock.fileno() == -1 for sock in self._open):
                return
            await asyncio.sleep(0.001)


_ETCD_ENV = {"ETCDCTL_API": "3", "PATH": os.defpath}


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _fresh_directory(name: str) -> Path:
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"scope-{name}-", dir=base))


def _free_ports(where: Where, address: str, *, count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if all(_is_free(where, interface, port) for interface in {address, _LOOPBACK}):
            found.append(port)
            if len(found) == count:
                return found
    raise KubeLabError(f"no {count} ports are free from {_PORTS.start} to {_PORTS.stop}")


def _is_free(where: Where, address: str, port: int) -> bool:
    with where.socket(sockets.AF_INET, sockets.SOCK_STREAM) as sock:
        try:
            sock.bind((address, port))
        except OSError:
            return False
        return True


def _is_established(definition: Mapping[str, Any]) -> bool:
    conditions = (definition.get("status") or {}).get("conditions") or []
    return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)


def _api_error(status: int, text: str) -> ApiError:
    try:
        said = json.loads(text)
    except ValueError:
        said = {}
    said = said if isinstance(said, dict) else {}
    return ApiError(status, str(said.get("reason", "")), str(said.get("message", text)))
