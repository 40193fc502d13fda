"""The commands that ask a registry as its administrator.

apply, plan, explain of two peers, get, token, peer, cluster, mesh, service.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scope.ctl import files, remote, render
from scope.ctl.arguments import ADMIN_FILE, ADMIN_FILE_VARIABLE
from scope.ctl.errors import CommandError
from scope.ctl.explaining import pair_text
from scope.ctl.foreseeing import foresee, plan_text, plan_values
from scope.ctl.services import choose, service_text
from scope.model import Kind, Mesh, Peer, Role, Service
from scope.registry.http import HttpRegistry


def administer(args: argparse.Namespace) -> None:
    """Run the command; files are checked before anything is sent. Raises CommandError, ConfigError."""
    wanted = files.read_resources(args.file) if args.command in ("apply", "plan") else []
    admin = files.read_admin(args.admin_file or Path(os.environ.get(ADMIN_FILE_VARIABLE) or ADMIN_FILE))
    asyncio.run(_administer(args, admin, wanted))


async def _administer(args: argparse.Namespace, admin: files.Admin, wanted: Sequence[Mesh | Peer]) -> None:
    async with remote.connected(admin) as registry:
        match args.command, getattr(args, "action", None):
            case "apply", _:
                await remote.apply(registry, wanted, say=print)
            case "plan", _:
                await _plan(args, registry, wanted)
            case "explain", _:
                await _explain(args, registry)
            case "get", _:
                await _get(args, registry)
            case "token", "create":
                await _create_token(args, registry)
            case "token", "list":
                await _list_tokens(args, registry)
            case "token", "delete":
                await registry.delete_token(args.name)
                print(f"token/{args.name} deleted: nobody joins with it any more")
            case "peer", "remove":
                print(await remote.remove_peer(registry, args.name))
            case "cluster", "remove":
                print(await remote.remove_cluster(registry, args.name, mesh=args.mesh))
            case "mesh", "delete":
                print(await remote.delete_mesh(registry, args.name))
            case "service", _:
                await _service(args, registry)
            case command:
                raise AssertionError(command)


async def _plan(args: argparse.Namespace, registry: HttpRegistry, wanted: Sequence[Mesh | Peer]) -> None:
    plans = await foresee(registry, wanted)
    if args.output == "json":
        print(render.json_text(plan_values(plans)), end="")
    else:
        print("\n".join(plan_text(each, color=render.in_color(sys.stdout)) for each in plans), end="")


async def _explain(args: argparse.Namespace, registry: HttpRegistry) -> None:
    one, other = [await remote.find(registry, Kind.PEER, name) for name in (args.peer, args.other)]
    if not isinstance(one, Peer) or not isinstance(other, Peer) or one.spec.mesh != other.spec.mesh:
        raise CommandError(f"{args.peer} and {args.other} are not in one mesh, so there is no link")
    mesh = await remote.find(registry, Kind.MESH, one.spec.mesh)
    if isinstance(mesh, Mesh):
        print(pair_text(one, other, mesh, wall=time.time(), color=render.in_color(sys.stdout)), end="")


async def _get(args: argparse.Namespace, registry: HttpRegistry) -> None:
    kind = Kind.MESH if args.kind.startswith("mesh") else Kind.PEER
    found = await remote.fetch(registry, kind, name=args.name, mesh=args.mesh)
    if args.output != "table":
        text = render.resources_document(found, output=args.output, single=args.name is not None)
        print(text, end="")
    elif not found:
        print("there are none", file=sys.stderr)
    elif kind is Kind.MESH:
        meshes = [mesh for mesh in found if isinstance(mesh, Mesh)]
        text = render.meshes_table(meshes, wall=time.time(), color=render.in_color(sys.stdout))
        print(text, end="")
    else:
        peers = [peer for peer in found if isinstance(peer, Peer)]
        text = render.peers_table(peers, wall=time.time(), color=render.in_color(sys.stdout))
        print(text, end="")


async def _service(args: argparse.Namespace, registry: HttpRegistry) -> None:
    listed = (await registry.list(Kind.SERVICE)).resources
    found = choose([each for each in listed if isinstance(each, Service)], args.name, cluster=args.cluster)
    if args.output != "table":
        print(render.resources_document(found, output=args.output, single=len(found) == 1), end="")
        return
    print("\n".join(map(service_text, found)), end="")


async def _create_token(args: argparse.Namespace, registry: HttpRegistry) -> None:
    """The join string alone goes to standard output, so that a script can take it."""
    join_string = await remote.create_token(
        registry,
        mesh=args.mesh,
        ttl=args.ttl,
        single_use=args.single_use,
        role=Role(args.role),
        hub=args.hub,
    )
    print(join_string)
    machines = "one machine" if args.single_use else "any number of machines"
    print(
        f"It lets {machines} join {args.mesh} for {render.short_duration(args.ttl)}. "
        "On each, with the string in single quotes:\n  sudo scope-agent join - <<< 'JOIN STRING'",
        file=sys.stderr,
    )


async def _list_tokens(args: argparse.Namespace, registry: HttpRegistry) -> None:
    tokens = [dict(token) for token in await registry.tokens()]
    if args.output == "json":
        print(render.json_text(tokens), end="")
    elif args.output == "yaml":
        print(render.yaml_text(tokens), end="")
    elif not tokens:
        print("there are none: `scopectl token create --mesh MESH` makes one", file=sys.stderr)
    else:
        text = render.tokens_table(tokens, wall=time.time(), color=render.in_color(sys.stdout))
        print(text, end="")
