"""A Node that runs: kubelet, containerd and kube-proxy in a host of the lab, as on a machine of their own.

Each has a process and a mount namespace besides its network, so that `/run`, `/var` and `/etc` are its own
and every path is where it is on real Nodes. The first process of the Node holds them; with its end the kernel
ends every container and takes down every mount, whatever state they are in. That is also what a reboot is.

What differs from a machine in earnest, and why:

- The kernel's settings that a kubelet wants for the whole machine are files: the machine is not ours to set.
- Where the privilege is missing to spare a process when memory is short, containerd is told to do without.
- Its CNI is the bridge plugin, configured once the cluster has given the Node its pod CIDR. It leads to no
  other Node.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket as sockets
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lab import Host

from kubelab.control_plane import ApiError, ControlPlane
from kubelab.programs import KubeLabError, Program, node_program, system_program, tail

CGROUPS = Path("/sys/fs/cgroup")
# Images of one program each, made here of what is built here.
PAUSE, COREDNS = "local.test/pause:1", "local.test/coredns:1"
_MADE = {PAUSE: "pause", COREDNS: "coredns"}
# Where a cluster's DNS is, in every lab.
DNS_ADDRESS, DNS_DOMAIN = "10.96.0.10", "cluster.local"
POD_NETWORKS = "/etc/cni/net.d"
# Where the CNI's programs of Debian are.
_PLUGINS = "/usr/lib/cni"
_KUBELET_HEALTH, _PROXY_HEALTH = 10248, 10256  # their defaults, on loopback
# Its programs answer within seconds; unpacking an image takes longer on a busy machine.
_START_S, _IMPORT_S = 120.0, 300.0
_POLL_S = 0.1
# What a kubelet sets in its kernel, or refuses to run without.
_KERNEL = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TMPDIR": "/var/tmp"}
# What the first process does before it sleeps; $1 is the Node's disk, $2 that program.
_BOOT = """set -e
mount --make-rshared /
cd "$1"
for setting in $(cd kernel && find . -type f); do mount --bind "kernel/$setting" "/proc/sys/$setting"; done
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/etc-work" /etc
mount --bind var /var
mount --bind run /run
cd /
echo booted
exec "$2" >/dev/null
"""
# A kubelet is told its address, which may be another one at its next start.
_KUBELET = 'exec "$0" "$@" --node-ip="$(cat /etc/kubernetes/address)"'
# What a host of the lab has of itself.
_OWN_LINKS = ("lo", "eth0", "wan")


class KubeNode:
    """One Node of a cluster with `kubelets`; `start` boots it and waits until it is Ready.

    `disk` is a folder, on a disk that can hold overlays, for all it writes; `images` is a folder from
    `unpack_images`, with all that it ever runs. With `kept` it stays as long as the lab.
    """

    def __init__(
        self,
        name: str,
        *,
        host: Host,
        plane: ControlPlane,
        disk: Path,
        images: Path,
        kept: bool = False,
    ) -> None:
        self.name = name
        self.host = host
        self.plane = plane
        self.disk = disk
        self.cgroup = f"{host.namespace}-{name}"
        self._images = images
        self._kept = kept
        self._first: subprocess.Popen[str] | None = None
        self.logs = disk / "var/log"
        programs = {
            "containerd": (["--config=/etc/containerd/config.toml"], self._containerd_is_ready),
            "kubelet": (self._kubelet_arguments(), self._kubelet_is_ready),
            "kube-proxy": (["--config=/etc/kubernetes/proxy.json"], self._proxy_is_ready),
        }
        starts = {
            "containerd": [system_program("containerd")],
            "kubelet": ["sh", "-c", _KUBELET, node_program("kubelet")],
            "kube-proxy": [node_program("kube-proxy")],
        }
        self.containerd, self.kubelet, self.proxy = (
            Program(
                program,
                [*starts[program], *arguments],
                where=self,
                log=self.logs / f"{program}.log",
                is_ready=is_ready,
                env=_ENV,
                outlives=kept,
            )
            for program, (arguments, is_ready) in programs.items()
        )

    async def start(self) -> None:
        """Boot it for the first time; the Node is Ready when this returns."""
        await asyncio.to_thread(self._write_disk)
        await self.boot()
        await self._join_pods()
        await self.await_ready()

    async def boot(self) -> None:
        """Start its first process and its programs, on what the disk holds."""
        await asyncio.to_thread(self._begin)
        await self.containerd.start(within_s=_START_S)
        await self.kubelet.start(within_s=_START_S)
        await self.proxy.start(within_s=_START_S)

    def power_off(self) -> None:
        """End everything in it at once, as a machine does whose power is cut; `boot` starts it again."""
        if self._first is not None:
            # Once the first process can be waited for, the kernel has ended all the others.
            with contextlib.suppress(KubeLabError, ProcessLookupError):
                os.kill(self.first_pid, signal.SIGKILL)
            self._first.wait()
            self._first = None
        for program in (self.containerd, self.kubelet, self.proxy):
            program.kill()

    async def reboot(self) -> None:
        """End everything at once and start again, with nothing but what is on the disk."""
        await asyncio.to_thread(self.power_off)
        await asyncio.to_thread(self._forget)
        await self.boot()

    async def readdress(self) -> None:
        """Tell the kubelet which address its host has now."""
        # Through the Node's own view, as in `_join_pods`.
        target = Path(f"/proc/{self.first_pid}/root/etc/kubernetes/address")
        await asyncio.to_thread(target.write_text, f"{self.host.ipv4}")
        # What was started is nsenter, and the kubelet its child.
        for child in _children(self.kubelet.pid):
            os.kill(child, signal.SIGKILL)
        self.kubelet.kill()
        await self.kubelet.start(within_s=_START_S)

    def remove(self) -> None:
        """Take away what it left on this machine, once its processes have ended: disk and cgroups."""
        for hierarchy in CGROUPS.iterdir():
            _remove_cgroup(hierarchy / self.cgroup)
        shutil.rmtree(self.disk, ignore_errors=True)

    async def run(
        self, *argv: str, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in it to its end. KubeLabError with its output when it fails and `check` is set."""
        return await asyncio.to_thread(self._run, argv, timeout_s=timeout_s, check=check)

    async def await_ready(self, *, within_s: float = _START_S) -> None:
        """Return when the cluster says that the Node is Ready."""
        deadline = time.monotonic() + within_s
        while True:
            found = await self._node()
            conditions = (
                {} if found is None else {each["type"]: each for each in found["status"]["conditions"]}
            )
            ready = conditions.get("Ready", {"status": "Unknown", "message": "it has not registered"})
            if ready["status"] == "True":
                return
            if time.monotonic() > deadline:
                raise KubeLabError(f"{self.name} is not ready within {within_s:g} s: {ready['message']}")
            await asyncio.sleep(_POLL_S)

    # Where its programs run.

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: int | IO[str] | IO[bytes] | None = subprocess.DEVNULL,
        stdout: int | IO[str] | IO[bytes] | None = None,
        stderr: int | IO[str] | IO[bytes] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in it. Pipes are text."""
        spaces = f"/proc/{self.first_pid}/ns"
        # The program is a child of nsenter's, and dies with it.
        inside = ["nsenter", f"--mount={spaces}/mnt", f"--pid={spaces}/pid", "--", "env", "--chdir=/"]
        return self.host.popen([*inside, *argv], env=env, cwd="/", stdin=stdin, stdout=stdout, stderr=stderr)

    def socket(self, family: int = sockets.AF_INET, kind: int = sockets.SOCK_STREAM, /) -> sockets.socket:
        """A socket of its network, for use in this very process."""
        return self.host.socket(family, kind)

    @property
    def first_pid(self) -> int:
        """The process that is its first, as this machine numbers it; KubeLabError when it is off."""
        if self._first is None or self._first.poll() is not None:
            raise KubeLabError(f"{self.name} is off")
        children = _children(self._first.pid)
        if not children:
            raise KubeLabError(f"{self.name} is off")
        return children[0]

    def _begin(self) -> None:
        if self._first is not None:
            raise KubeLabError(f"{self.name} is on already")
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        bound = [] if self._kept else ["setpriv", "--pdeathsig", "KILL", "--"]
        boot = ["sh", "-c", _BOOT, "sh", str(self.disk), node_program("pause")]
        with (self.logs / "boot.log").open("a") as log:
            self._first = self.host.popen(
                [*bound, *spaces, *boot], env=_ENV, cwd="/", stdout=subprocess.PIPE, stderr=log
            )
        assert self._first.stdout is not None
        if self._first.stdout.readline() != "booted\n":
            raise KubeLabError(f"{self.name} does not boot:\n{(self.logs / 'boot.log').read_text()}")
        for hierarchy in CGROUPS.iterdir():
            if (hierarchy / "tasks").exists():
                _make_cgroup(hierarchy, self.cgroup)

    def _forget(self) -> None:
        """Take away what a machine has in memory: its network, but for what it is plugged into, and /run."""
        for each in (self.disk / "run").iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        for link in json.loads(self.host.run(["ip", "-j", "link", "show"]).stdout):
            if link["ifname"] not in _OWN_LINKS:
                # With a bridge or a peer its other end is gone already.
                self.host.run(["ip", "link", "delete", link["ifname"]], check=False)
        self.host.run(["nft", "flush", "ruleset"])
        for family in ("-4", "-6"):
            self.host.run(["ip", family, "rule", "flush"])
            for priority, table in (("32766", "main"), ("32767", "default")):
                # The second table is one of IPv4's.
                lookup = ["rule", "add", "priority", priority, "lookup", table]
                if family == "-4" or table == "main":
                    self.host.run(["ip", family, *lookup])
            listing = ["ip", "-j", family, "route", "show", "table", "all", "type", "blackhole"]
            for route in json.loads(self.host.run(listing, check=False).stdout or "[]"):
                where = ["table", str(route.get("table", "main")), "metric", str(route.get("metric", 0))]
                self.host.run(["ip", family, "route", "delete", "blackhole", route["dst"], *where])

    def _write_disk(self) -> None:
        """All that an administrator puts on a Node: programs' settings, and who it is."""
        for folder in (
            "etc-work",
            "run",
            "var/lib",
            "var/tmp",
            "var/log/pods",
            "var/log/containers",
            "var/cache",
        ):
            (self.disk / folder).mkdir(parents=True)
        (self.disk / "var/run").symlink_to("/run")
        _link_tree(self._images, self.disk / "var/lib/containerd")
        for setting, value in _KERNEL.items():
            self._write(f"kernel/{setting}", f"{value}\n")
        kubelet = self.plane.sign_in(
            f"kubelet-{self.name}", user=f"system:node:{self.name}", groups=("system:nodes",)
        )
        proxy = self.plane.sign_in(f"proxy-{self.name}", user="system:kube-proxy")
        self._write("etc/kubernetes/kubelet.kubeconfig", kubelet.read_text())
        self._write("etc/kubernetes/proxy.kubeconfig", proxy.read_text())
        self._write("etc/kubernetes/ca.crt", self.plane.authority.certificate.read_text())
        self._write("etc/kubernetes/kubelet.json", json.dumps(self._kubelet_settings()))
        self._write("etc/kubernetes/proxy.json", json.dumps(self._proxy_settings()))
        self._write("etc/kubernetes/resolv.conf", "")
        self._write("etc/kubernetes/address", f"{self.host.ipv4}")
        self._write("etc/containerd/config.toml", _containerd_settings())
        (self.disk / f"etc/{POD_NETWORKS.removeprefix('/etc/')}").mkdir(parents=True)

    def _write(self, path: str, text: str) -> None:
        target = self.disk / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch(mode=0o600)
        target.write_text(text)

    def _kubelet_arguments(self) -> list[str]:
        return [
            "--config=/etc/kubernetes/kubelet.json",
            "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig",
            f"--hostname-override={self.name}",
        ]

    def _kubelet_settings(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            # It reads the quotas of a disk, which is not always one that has them.
            "localStorageCapacityIsolation": False,
            "resolvConf": "/etc/kubernetes/resolv.conf",
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": DNS_DOMAIN,
            # The disk is the machine's, and as full as it is.
            "evictionHard": {
                "memory.available": "50Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "protectKernelDefaults": True,
        }

    def _proxy_settings(self) -> dict[str, object]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": self.name,
            "clientConnection": {"kubeconfig": "/etc/kubernetes/proxy.kubeconfig"},
            # How many connections a kernel tracks is the machine's to say.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }

    async def _join_pods(self) -> None:
        """Give pods their network, once the cluster has said which prefix is this Node's."""
        deadline = time.monotonic() + _START_S
        while not (prefixes := await self._pod_prefixes()):
            if time.monotonic() > deadline:
                raise KubeLabError(f"{self.name} has no pod CIDR within {_START_S:g} s")
            await asyncio.sleep(_POLL_S)
        document = {
            "cniVersion": "0.4.0",
            "name": "pods",
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": True,
                    "ipMasq": True,
                    "ipam": {
                        "type": "host-local",
                        "ranges": [[{"subnet": prefix}] for prefix in prefixes],
                        "routes": [{"dst": "::/0" if ":" in prefix else "0.0.0.0/0"} for prefix in prefixes],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
        # Through its own view: the folder is an overlay, which does not notice what is written below it.
        target = Path(f"/proc/{self.first_pid}/root{POD_NETWORKS}/10-pods.conflist")
        await asyncio.to_thread(target.write_text, json.dumps(document))

    async def _pod_prefixes(self) -> list[str]:
        found = await self._node()
        return [] if found is None else list(found["spec"].get("podCIDRs", []))

    async def _node(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = await self.plane.request("GET", f"/api/v1/nodes/{self.name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    async def _containerd_is_ready(self) -> bool:
        return (await self.run("ctr", "version", check=False)).returncode == 0

    async def _kubelet_is_ready(self) -> bool:
        return self._listens(_KUBELET_HEALTH)

    async def _proxy_is_ready(self) -> bool:
        return self._listens(_PROXY_HEALTH)

    def _listens(self, port: int) -> bool:
        with self.socket() as sock:
            sock.settimeout(1.0)
            return sock.connect_ex(("127.0.0.1", port)) == 0

    def _run(self, argv: Sequence[str], *, timeout_s: float, check: bool) -> subprocess.CompletedProcess[str]:
        pipe = subprocess.PIPE
        child = self.popen(argv, env=_ENV, stdout=pipe, stderr=pipe)
        try:
            out, err = child.communicate(timeout=timeout_s)
        except BaseException:
            child.kill()
            child.communicate()
            raise
        if check and child.returncode != 0:
            raise KubeLabError(f"{' '.join(argv)} on {self.name} ended with {child.returncode}:\n{out}{err}")
        return subprocess.CompletedProcess(list(argv), child.returncode, out, err)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def unpack_images(archives: Sequence[Path], target: Path) -> None:
    """Make a folder, whole or not at all: what containerd keeps once it has these images and those made here.

    Every Node shares its files. KubeLabError with containerd's reason when it does not work.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as folder:
        work = Path(folder)
        made = []
        for image, program in _MADE.items():
            made.append(work / f"{program}.tar")
            _make_image(image, program, made[-1])
        (work / "config.toml").write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
        address = f"--address={work}/containerd.sock"
        folders = [f"--root={work}/root", f"--state={work}/state", f"--config={work}/config.toml"]
        # Nothing that it mounts is seen outside, or stays.
        alone = ["unshare", "--mount", "setpriv", "--pdeathsig", "KILL", "--"]
        with (work / "log").open("w") as log:
            containerd = subprocess.Popen(
                [*alone, system_program("containerd"), address, *folders], stdout=log, stderr=log
            )
        try:
            ctr = [system_program("ctr"), address, "--namespace=k8s.io"]
            deadline = time.monotonic() + _START_S
            while subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode != 0:
                if containerd.poll() is not None or time.monotonic() > deadline:
                    raise KubeLabError(f"containerd does not answer:\n{tail(work / 'log')}")
                time.sleep(_POLL_S)
            for archive in (*made, *archives):
                importing = [*ctr, "images", "import", str(archive)]
                done = subprocess.run(
                    importing, capture_output=True, text=True, check=False, timeout=_IMPORT_S
                )
                if done.returncode != 0:
                    raise KubeLabError(f"{archive} was not imported: {done.stderr.strip()}")
        finally:
            containerd.terminate()
            containerd.wait()
        # Another run may have made it meanwhile.
        with contextlib.suppress(OSError):
            (work / "root").rename(target)


def _link_tree(source: Path, target: Path) -> None:
    """Copy what containerd keeps: of images, which never change, by further names of the same files."""
    linking = ["cp", "--archive", "--link", str(source), str(target)]
    if subprocess.run(linking, capture_output=True, check=False).returncode != 0:
        # They are on different disks.
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "--archive", str(source), str(target)], check=True)
        return
    for database in target.rglob("*.db"):
        database.unlink()
        shutil.copy2(source / database.relative_to(target), database)


def images_stamp() -> str:
    """A name for what is in the images that are made here."""
    digests = (_digest(Path(node_program(program))) for program in _MADE.values())
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def _make_image(image: str, program: str, target: Path) -> None:
    """Write an image with one program of Nodes, as an archive for `ctr images import`."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with tarfile.open(folder / "layer.tar", "w") as layer:
            layer.add(node_program(program), program)
        config = {"architecture": _architecture(), "os": "linux", "config": {"Entrypoint": [f"/{program}"]}}
        config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{_digest(folder / 'layer.tar')}"]}
        (folder / "config.json").write_text(json.dumps(config))
        manifest = [{"Config": "config.json", "RepoTags": [image], "Layers": ["layer.tar"]}]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with tarfile.open(target, "w") as archive:
            for name in ("manifest.json", "config.json", "layer.tar"):
                archive.add(folder / name, name)


def _containerd_settings() -> str:
    return f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = {str(not _may_protect_from_shortage()).lower()}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_PLUGINS}"
    conf_dir = "{POD_NETWORKS}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _may_protect_from_shortage() -> bool:
    """Whether this process has CAP_SYS_RESOURCE (bit 24)."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")
    )
    return bool(int(line.split()[1], 16) >> 24 & 1)


def _make_cgroup(hierarchy: Path, name: str) -> None:
    made = hierarchy / name
    made.mkdir(exist_ok=True)
    # A cpuset has neither processors nor memory until it is given some.
    for setting in ("cpuset.cpus", "cpuset.mems"):
        if (hierarchy / setting).exists():
            (made / setting).write_text((hierarchy / setting).read_text())


def _remove_cgroup(root: Path) -> None:
    """Remove a cgroup with all below it, which its last processes leave a moment after their end."""
    deadline = time.monotonic() + 10.0
    while root.exists():
        for folder, _, _ in os.walk(root, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        if time.monotonic() > deadline:
            raise KubeLabError(f"{root} cannot be removed: look at its cgroup.procs")
        time.sleep(_POLL_S)
