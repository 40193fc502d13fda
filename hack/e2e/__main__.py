"""`python -m e2e`: run the story on clusters of the lab, and clean up, also when interrupted."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from kubelab import KubeLabError
from kubelab.node import unpack_images
from kubelab.programs import ROOT, node_program
from lab import Lab, LabError, Nat

from e2e import bundle
from e2e.cluster import Cluster
from e2e.story import Story

OUTPUT = ROOT / "build" / "e2e"
DONE, FAILED, INTERRUPTED = 0, 1, 130
# One way on each uplink: 8 ms between any two sites and back, as within a country.
DELAY_MS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e", description="Scope on clusters that really run.")
    parser.add_argument(
        "--keep", action="store_true", help="leave the clusters up, and say how to reach them"
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="with the archives of both images"
    )
    options = parser.parse_args()
    try:
        return asyncio.run(_perform(options.images, keep=options.keep))
    except LabError as error:
        print(f"e2e: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("e2e: interrupted; everything is cleaned up", file=sys.stderr)
        return INTERRUPTED


async def _perform(images: Path, *, keep: bool) -> int:
    began = time.monotonic()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    unpacked = _unpacked(images)
    with contextlib.ExitStack() as stack:
        lab = Lab(delay_ms=DELAY_MS)
        disks = OUTPUT / lab.prefix
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = _cluster(lab, disks=disks, images=unpacked, kept=keep)
        stack.callback(_clean, lab, cluster, disks, keep=keep)
        try:
            await Story(cluster, work=work).perform()
        except (KubeLabError, LabError, aiohttp.ClientError, TimeoutError) as error:
            print(f"e2e: {error}", file=sys.stderr)
            target = OUTPUT / "failed"
            await bundle.gather(target, [cluster])
            print(f"e2e: logs and state are in {target}", file=sys.stderr)
            return FAILED
    print(f"e2e: passed in {time.monotonic() - began:.0f} s")
    return DONE


def _cluster(lab: Lab, *, disks: Path, images: Path, kept: bool) -> Cluster:
    """A cluster with a Node on the internet and two behind NATs that no datagram passes unasked."""
    home = lab.site("home", nat=Nat.PORT_RESTRICTED)
    office = lab.site("office", nat=Nat.SYMMETRIC)
    return Cluster(
        "west",
        hub=lab.server("west-1"),
        machines=[home.machine("west-2"), office.machine("west-3")],
        disks=disks,
        images=images,
        kept=kept,
    )


def _unpacked(images: Path) -> Path:
    """The images as Nodes have them, kept beside their archives."""
    pause = hashlib.sha256(Path(node_program("pause")).read_bytes()).hexdigest()[:12]
    unpacked = images / f"unpacked-{pause}"
    if not unpacked.is_dir():
        print("==> Unpacking the images for Nodes, once", flush=True)
        unpack_images(sorted(images.glob("*.tar")), unpacked)
    return unpacked


def _clean(lab: Lab, cluster: Cluster, disks: Path, *, keep: bool) -> None:
    if keep:
        print(f"\n{lab.keep()}\n\nThe cluster {cluster.name}, from its Node {cluster.server.name}:")
        print(f"  kubectl --kubeconfig={cluster.kubeconfig}")
        print(f"Its Nodes' disks are in {disks}, to be removed after the lab.")
        return
    cluster.power_off()
    lab.close()
    cluster.plane.close()
    cluster.remove()
    shutil.rmtree(disks, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
