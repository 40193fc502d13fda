"""`scopectl metrics`: what this machine's agent says of its peers, for Prometheus.

Printed once, for a collector of text files, or served on the loopback address, asked anew at every scrape.
The agent answers `status` as to anybody: its start waits for none of this.
"""

from __future__ import annotations

import http.server
from collections.abc import Callable, Iterator

from scope.ctl.errors import CommandError
from scope.ctl.local import AgentStatus, PeerView

LOOPBACK = "127.0.0.1"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus' text format

# name, help, and the value with labels besides mesh and peer; None: nothing is to be said of this peer
_GAUGES: tuple[tuple[str, str, Callable[[PeerView], tuple[float | None, dict[str, str]]]], ...] = (
    ("path", "1 with the way to the peer.", lambda peer: (1.0, {"path": peer.path})),
    (
        "rtt_seconds",
        "The round trip on the path in use.",
        lambda peer: (peer.rtt / 1000.0 if peer.rtt is not None else None, {}),
    ),
    (
        "key_epoch",
        "The number of the proved post-quantum key; 0 without one.",
        lambda peer: (float(peer.psk_epoch or 0), {}),
    ),
    ("key_age_seconds", "Since a handshake proved that key.", lambda peer: (peer.psk_age, {})),
    (
        "key_info",
        "1 with the suite of that key, and by what the peer's identity is believed.",
        lambda peer: (
            1.0 if peer.psk_epoch else None,
            {"suite": str(peer.psk_suite or ""), "trust": peer.psk_trust},
        ),
    ),
    (
        "key_failure",
        "1 with what stands against a post-quantum key, or a newer one.",
        lambda peer: (1.0 if peer.psk_reason else None, {"reason": peer.psk_reason}),
    ),
)


def metrics_text(status: AgentStatus) -> str:
    """The agent's peers in Prometheus' text format."""
    lines: list[str] = []
    for name, what, value in _GAUGES:
        lines += (f"# HELP scope_peer_{name} {what}", f"# TYPE scope_peer_{name} gauge")
        lines += _samples(f"scope_peer_{name}", status, value)
    return "\n".join(lines) + "\n"


def _samples(
    name: str, status: AgentStatus, value: Callable[[PeerView], tuple[float | None, dict[str, str]]]
) -> Iterator[str]:
    for peer in status.peers:
        found, labels = value(peer)
        if found is not None:
            both = {"mesh": status.mesh, "peer": peer.name, **labels}
            told = ",".join(f'{key}="{_escaped(text)}"' for key, text in both.items())
            yield f"{name}{{{told}}} {found}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def server(look: Callable[[], AgentStatus], port: int) -> http.server.HTTPServer:
    """Serves them at /metrics on the loopback address, 503 while the agent does not answer.

    Raises CommandError where the port is taken.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 10.0  # one at a time: whoever connects and says nothing holds up the next one so long

        def do_GET(self) -> None:
            """One scrape."""
            if self.path != "/metrics":
                self.send_error(404)
                return
            try:
                body = metrics_text(look()).encode()
            except CommandError as error:
                self.send_error(503, str(error).partition(":")[0])
                return
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing: a scrape every few seconds is no news."""

    try:
        return http.server.HTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise CommandError(
            f"cannot listen on {LOOPBACK}:{port}: {error.strerror}; choose another --listen"
        ) from None
