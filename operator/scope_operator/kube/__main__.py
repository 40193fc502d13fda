"""The program `scope-operator`: serves the registry of a Kubernetes cluster."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from scope import resources
from scope.model import ConfigError, Kind
from scope.registry.kube.access import SERVICE_ACCOUNT, Access, from_kubeconfig, in_cluster
from scope.registry.port import RegistryError
from scope.resources import InvalidResource
from scope_operator.gateway.options import add_gateway_options, certificate_of, listen_of
from scope_operator.kube import joined, leaving
from scope_operator.kube.declared import read_mesh
from scope_operator.kube.lease import LeaseLost
from scope_operator.kube.process import GatewayConfig, OperatorConfig, operate

METRICS_PORT = 9187
METRICS_ADDRESS = "0.0.0.0"  # noqa: S104 - Prometheus and the kubelet ask from elsewhere
NAMESPACE = "scope-system"
MAX_PATIENCE = 3600.0  # seconds for Nodes to leave: whoever waits longer has a Node to look at


def main(arguments: list[str] | None = None) -> None:
    """Run the program; exits 1 with a sentence where it cannot go on."""
    options = build_parser().parse_args(arguments)
    time = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(
        level=options.log_level.upper(), format=f"{time}%(levelname)s %(message)s", stream=sys.stderr
    )
    # kopf tells each step of each object at INFO, and of signals, which are ours, at WARNING.
    logging.getLogger("kopf").setLevel(max(logging.ERROR, logging.getLogger().level))
    try:
        asyncio.run(_operate(options))
    except (ConfigError, LeaseLost, RegistryError) as error:
        print(f"scope-operator: {error}", file=sys.stderr)
        sys.exit(1)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="scope-operator", description="Makes the Nodes of a cluster the peers of a Scope mesh."
    )
    parser.add_argument(
        "--cluster-name",
        required=True,
        type=_cluster,
        metavar="NAME",
        help="what this cluster is called in its meshes; a DNS label, another in each cluster",
    )
    parser.add_argument(
        "--namespace",
        default=_own_namespace(),
        help="where Leases and Secrets are (default: the pod's own, here %(default)s)",
    )
    parser.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="sign in with this (default: as the pod that this is)"
    )
    parser.add_argument("--context", metavar="NAME", help="of the kubeconfig")
    parser.add_argument("--api-server", metavar="URL", help="in place of the one that the pod is told")
    parser.add_argument(
        "--metrics-address",
        default=METRICS_ADDRESS,
        metavar="ADDRESS",
        help="/metrics, /healthz and /readyz here (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics-port", type=int, default=METRICS_PORT, metavar="PORT", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--join-string-file",
        type=Path,
        metavar="FILE",
        help="the registry is elsewhere: join it once with the join string in FILE, and keep the peers of "
        "this cluster's Nodes there",
    )
    parser.add_argument(
        "--registry-url",
        metavar="URL",
        help="where the gateway of that registry is; a join string of another one is refused",
    )
    parser.add_argument(
        "--agent-service-account",
        default="scope-agent",
        metavar="NAME",
        help="of the agents, in the same namespace, for a registry elsewhere (default: %(default)s)",
    )
    parser.add_argument(
        "--no-gateway", action="store_true", help="serve no gateway: Nodes of this cluster alone are peers"
    )
    parser.add_argument(
        "--mesh-file",
        type=Path,
        metavar="FILE",
        help="a ScopeMesh to apply when this replica is elected: JSON with its `name` and `spec`",
    )
    parser.add_argument(
        "--leave",
        type=_seconds,
        metavar="SECONDS",
        help="serve nothing: have this cluster's Nodes leave their meshes, wait so long for their agents to "
        "take everything down, and name those that did not",
    )
    parser.add_argument(
        "--export-services",
        action="store_true",
        help="bring this cluster's Services with the annotation scope.ltgc.cc/export to the other clusters "
        "of its meshes, and theirs here",
    )
    add_gateway_options(parser)
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


async def _operate(options: argparse.Namespace) -> None:
    if options.leave is not None:
        await _leave(options)
        return
    if options.join_string_file is not None:
        await joined.operate(
            await _access(options),
            joined.JoinedConfig(
                cluster=options.cluster_name,
                namespace=options.namespace,
                join_string=options.join_string_file,
                registry_url=options.registry_url,
                agents=options.agent_service_account,
                metrics_address=options.metrics_address,
                metrics_port=options.metrics_port,
                services=options.export_services,
            ),
        )
        return
    await operate(
        await _access(options),
        OperatorConfig(
            cluster=options.cluster_name,
            namespace=options.namespace,
            metrics_address=options.metrics_address,
            metrics_port=options.metrics_port,
            gateway=None if options.no_gateway else _gateway(options),
            mesh=None if options.mesh_file is None else read_mesh(options.mesh_file),
            services=options.export_services,
        ),
    )


async def _leave(options: argparse.Namespace) -> None:
    """Raises ConfigError where a Node has not left, with its name."""
    config = leaving.LeaveConfig(
        cluster=options.cluster_name,
        namespace=options.namespace,
        patience=options.leave,
        is_joined=options.registry_url is not None or options.join_string_file is not None,
    )
    staying = await leaving.leave(await _access(options), config)
    if staying:
        raise ConfigError(
            f"not everything was taken down within {options.leave:g} s:\n{leaving.describe(staying)}\n"
            "look at the logs of these agents, and try again; or go on without them (helm uninstall "
            "--no-hooks), and take down by hand what stays on these Nodes"
        )


def _gateway(options: argparse.Namespace) -> GatewayConfig:
    return GatewayConfig(
        listen=listen_of(options),
        reflector_ports=options.reflector_ports,
        advertise=tuple(options.advertise or ()),
        certificate=certificate_of(options),
    )


async def _access(options: argparse.Namespace) -> Access:
    if options.kubeconfig is None and options.context is None and "KUBECONFIG" not in os.environ:
        return in_cluster(url=options.api_server)
    return await from_kubeconfig(options.kubeconfig, context=options.context)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_PATIENCE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {MAX_PATIENCE:.0f}")
    return seconds


def _cluster(text: str) -> str:
    try:
        resources.parse_status(Kind.MESH, {"clusters": [{"name": text, "uid": "any"}]})
    except InvalidResource as error:
        raise argparse.ArgumentTypeError(str(error.problems[0])) from None
    return text


def _own_namespace() -> str:
    try:
        return (SERVICE_ACCOUNT / "namespace").read_text().strip() or NAMESPACE
    except OSError:
        return NAMESPACE


if __name__ == "__main__":
    main()
