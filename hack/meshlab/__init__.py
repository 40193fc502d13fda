"""A mesh on a lab: its registry on a server, agents on machines, what they say, and real pings between them.

    with Lab(delay_ms=10, private=PRIVATE) as lab, Pinger() as pinger:
        registry = Registry(lab.server("registry"))
        registry.apply(mesh_document("demo"))
        token = registry.token("demo")
        members = [Member(machine, mesh="demo", registry=registry) for machine in machines]
        for member in members:
            member.join(token)
        with Watch(members, pinger) as watch:
            watch.until(watch.is_complete, within_s=10.0, missing=watch.describe_unfinished)

Everything runs as it does for users: the installed programs, each in its own namespaces. Demo, tests and
benchmarks build on it alike.

    names     the name under which a registry is found
    registry  `scope-registry serve` on a server of the lab, and scopectl beside it
    cluster   a Kubernetes cluster instead: its API server, the operator and its gateway
    member    one machine's agent: join, run, kill, leave, and its status
    pinger    ICMP echo through the mesh, from within this process
    watch     every ordered pair of members: path, family, RTT, and when each thing first happened
"""

from meshlab.member import DEVICE, Member, Reach, Status
from meshlab.pinger import Flow, Pinger
from meshlab.registry import PRIVATE, Registry, mesh_document
from meshlab.watch import PairRecord, Watch, WatchError

__all__ = [
    "DEVICE",
    "PRIVATE",
    "Flow",
    "Member",
    "PairRecord",
    "Pinger",
    "Reach",
    "Registry",
    "Status",
    "Watch",
    "WatchError",
    "mesh_document",
]
