"""`python -m e2e`: run the story on clusters, and clean up, also when interrupted."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import aiohttp
from kubelab import KubeLabError
from kubelab.node import images_stamp, unpack_images
from kubelab.programs import ROOT
from lab import Lab, LabError

from e2e import bundle
from e2e.cluster import Cluster, Teller
from e2e.existing import existing, kind_clusters, public_node
from e2e.faults import Faults
from e2e.landscape import Landscape
from e2e.machines import Machines
from e2e.story import Story

OUTPUT = ROOT / "build" / "e2e"
DONE, FAILED, INTERRUPTED = 0, 1, 130
# What the chart runs unless it is told otherwise; it has a Python for the pods that make traffic.
IMAGE = f"scope-mesh:{version('scope-mesh')}"
# Longer than it takes a cluster to miss a Node's kubelet, and any lease that agents or operators hold.
OUTAGE_S = 120.0
_ERRORS = (KubeLabError, LabError, aiohttp.ClientError, TimeoutError)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e", description="Scope on clusters that really run.")
    parser.add_argument(
        "--keep", action="store_true", help="leave the clusters up, and say how to reach them"
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="with the archives of both images"
    )
    parser.add_argument(
        "--outage",
        type=float,
        default=OUTAGE_S,
        metavar="SECONDS",
        help="how long an API server is away (%(default)g)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--kubeconfigs",
        metavar="FILE,FILE",
        help="clusters that are there, which have the images; the first gets the registry",
    )
    which.add_argument("--kind", action="store_true", help="clusters that kind makes")
    options = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as made:
            work = Path(made)
            if options.kubeconfigs:
                files = [Path(file) for file in options.kubeconfigs.split(",")]
                asyncio.run(_try_existing(existing(files, home=work), work))
            elif options.kind:
                with kind_clusters(options.images, home=work, keep=options.keep) as files:
                    asyncio.run(_try_existing(existing(files, home=work), work))
            else:
                asyncio.run(_try_lab(work, options))
    except _ERRORS as error:
        print(f"e2e: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("e2e: interrupted; everything is cleaned up", file=sys.stderr)
        return INTERRUPTED
    print(f"e2e: passed in {time.monotonic() - began:.0f} s")
    return DONE


async def _try_lab(work: Path, options: argparse.Namespace) -> None:
    keep = options.keep
    unpacked = _unpacked(options.images)
    with contextlib.ExitStack() as stack:
        lab = Lab()
        disks = OUTPUT / lab.prefix
        landscape = Landscape(lab, disks=disks, images=unpacked, kept=keep)
        stack.callback(_clean, landscape, disks, keep=keep)
        async with bundle.of_failure(OUTPUT / "failed", landscape.clusters):
            await _tell_lab_story(landscape, work, options)


async def _tell_lab_story(landscape: Landscape, work: Path, options: argparse.Namespace) -> None:
    teller = Teller()
    west = landscape.west
    story = Story(
        landscape.clusters,
        hub=west.server.name,
        public=str(west.server.ipv4),
        work=work,
        image=IMAGE,
        teller=teller,
    )
    machines = Machines(landscape, teller=teller)
    await machines.start()
    await story.start_answering()
    machines.note_holdings()
    await landscape.answer_names()
    await story.install()
    await machines.ping()
    await story.call_pods()
    await story.call_much()
    await Faults(landscape, story, outage_s=options.outage, teller=teller).perform()
    await story.uninstall()
    await machines.await_clean()


async def _try_existing(clusters: Sequence[Cluster], work: Path) -> None:
    """All that takes no more than kubeconfigs."""
    teller = Teller()
    async with bundle.of_failure(OUTPUT / "failed", clusters):
        hub, public = await public_node(clusters[0])
        story = Story(clusters, hub=hub, public=public, work=work, image=IMAGE, teller=teller)
        await story.start_answering()
        await story.install()
        await story.call_pods()
        await story.call_much()
        await story.uninstall()
    teller.tell("what takes the machines themselves is tried on the lab's clusters alone: faults, holdings")


def _unpacked(images: Path) -> Path:
    """The images as Nodes have them, kept beside their archives."""
    unpacked = images / f"unpacked-{images_stamp()}"
    if not unpacked.is_dir():
        print("==> Unpacking the images for Nodes, once", flush=True)
        unpack_images(sorted(images.glob("*.tar")), unpacked)
    return unpacked


def _clean(landscape: Landscape, disks: Path, *, keep: bool) -> None:
    if keep:
        print(f"\n{landscape.lab.keep()}\n")
        for cluster in landscape.clusters:
            print(f"The cluster {cluster.name}, from its Node {cluster.server.name}:")
            print(f"  kubectl --kubeconfig={cluster.kubeconfig}")
        files = ",".join(str(cluster.kubeconfig) for cluster in landscape.clusters)
        print(f"Both, from {landscape.east.server.name}: make e2e KUBECONFIGS={files}")
        print(f"The Nodes' disks are in {disks}, to be removed after the lab.")
        return
    landscape.power_off()
    landscape.lab.close()
    landscape.remove()
    shutil.rmtree(disks, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
