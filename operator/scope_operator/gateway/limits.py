"""How much one caller may ask of the gateway: every bound with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from scope.admission import Doors, Rate


@dataclass(frozen=True, slots=True)
class Limits(Doors):
    """What the gateway lets through."""

    body: int = 64 * 1024  # a report of 2 KB, a mesh of a few: far above both
    service_body: int = (
        256 * 1024
    )  # an exported Service: 150 bytes for each of a thousand endpoints, and room
    body_seconds: float = 10.0  # 64 KiB over a 64 kbit/s uplink
    source: Rate = Rate(100, 600)  # a hundred agents behind one NAT start at once with six requests each
    stranger: Rate = Rate(20, 200)  # requests without a credential: joins, health checks, guesses at tokens
    peer: Rate = Rate(10, 60)  # a report each second and a re-list, with room
    cluster: Rate = Rate(50, 500)  # a cluster of a thousand Nodes that joins has its peers within 20 s
    courier: Rate = Rate(20, 100)  # a call-me-maybe to each of a hundred peers at once
    streams: int = 4096
    admin_streams: int = 16
    joins_waiting: int = 256  # joins that wait for their address at once
    join_wait: float = 5.0  # seconds that a join waits for its address
    stall: float = 30.0  # a stream that takes nothing for so long is cut
    heartbeat: float = 15.0  # seconds between heartbeat lines: under the usual 30 s of idle middle boxes
    backlog: int = 8192  # events that a stream can resume from: minutes of a busy mesh of a thousand
    replays_per_peer: int = (
        1024  # jti of one peer within MAX_LIFETIME: 60 s at the peer's rate, and its burst
    )
    replays_per_cluster: int = 4096  # the same at a cluster's rate
