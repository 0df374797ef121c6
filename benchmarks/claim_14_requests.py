"""Claim 14: what an S3 store is asked for by stage 1, by this build and by an earlier one; counted at the server.

A server on loopback behind a proxy that counts. Each build runs stage 1 with an encoder that does nothing, on images
with a metadata.csv, again on the same, and on a tar of images with captions.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import ROOT, Row, earlier_build, main
from benchmarks.stage1 import draw

BEFORE = "dc813ee"
"""Commit of the earlier build."""
IMAGES, IN_TAR, SIDE = 2000, 60, 256
"""Images beside metadata.csv; images in the tar, of noise, and their side: 190 KB each."""
PHASES = ("new", "again", "rows of the tar", "tar")

STAGE1 = """
import sys
from pathlib import Path
from benchmarks.stage1 import local_ray, preprocess
from ray_diffsynth.data.metadata import read_metadata
from tests.preprocess.counting import FAMILY, build_model

def wait(phase):
    print(phase, flush=True)
    sys.stdin.readline()

root = Path(sys.argv[1])
model = build_model(root / "model")
with local_ray():
    run = lambda data, cache: preprocess(model, data, root / cache, family=FAMILY, batch_size=8, num_workers=1)
    wait("started")
    run("s3://lab/images", "cache")
    wait("new")
    run("s3://lab/images", "cache")
    wait("again")
    read_metadata("s3://lab/tar")
    wait("rows of the tar")
    run("s3://lab/tar", "cache-tar")
    wait("tar")
"""


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for number in range(IN_TAR):
            pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, format="PNG")
            for ending, data in (("png", image.getvalue()), ("txt", f"caption {number}".encode())):
                info = tarfile.TarInfo(f"{number:05d}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def counted(build: Path, proxy: Any, environment: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Phase -> requests by method and kind of object, and bytes of the tar that were sent."""
    root = Path(tempfile.mkdtemp(prefix="claim-14-run-"))
    command = [sys.executable, "-W", "ignore", "-c", STAGE1, str(root)]
    with open(root / "log", "wb") as log:
        # Another build has its modules in its own folder.
        env = {**os.environ, **environment, "PYTHONPATH": str(build)}
        run = subprocess.Popen(
            command, cwd=build, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        assert run.stdin is not None and run.stdout is not None
        found: dict[str, dict[str, Any]] = {}
        for line in run.stdout:
            if (phase := line.strip()) not in ("started", *PHASES):
                continue
            requests = Counter(f"{_operation(*request)} {_kind(request[1])}" for request in proxy.seen)
            found[phase] = {**requests, "tar_bytes": sum(size for path, size in proxy.sent if path.endswith(".tar"))}
            proxy.seen.clear()
            proxy.sent.clear()
            run.stdin.write("\n")
            run.stdin.flush()
    if run.wait() or not found.keys() >= set(PHASES):
        raise RuntimeError((root / "log").read_text(encoding="utf-8", errors="replace")[-3000:])
    return found


def _kind(path: str) -> str:
    return "image" if path.endswith(".png") else "tar" if path.endswith(".tar") else "other"


def _operation(method: str, path: str) -> str:
    return "LIST" if method == "GET" and path.strip("/") == "lab" else method


def of(counts: dict[str, Any], wanted: Callable[[str], bool]) -> int:
    """How many requests of these kinds."""
    return sum(count for name, count in counts.items() if name != "tar_bytes" and wanted(name))


def measure() -> list[Row]:
    import fsspec

    from tests.faulty_proxy import FaultyProxy
    from tests.s3_server import s3_server

    root = Path(tempfile.mkdtemp(prefix="claim-14-"))
    with earlier_build(BEFORE) as old, s3_server() as server, FaultyProxy(server["AWS_ENDPOINT_URL"]) as proxy:
        os.environ.update(server)
        fs = fsspec.filesystem("s3")
        fs.mkdir("lab")
        folder = draw(root / "images", IMAGES, 64, captions=50)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda p: fs.pipe_file(f"lab/images/{p.name}", p.read_bytes()), folder.iterdir()))
        archive = tar()
        fs.pipe_file("lab/tar/a.tar", archive)
        behind = {**server, "AWS_ENDPOINT_URL": proxy.url}
        before, now = (counted(build, proxy, behind) for build in (old, ROOT))
    details = {"images": IMAGES, "tar_bytes": len(archive), "before": before, "now": now}

    def fetched(run: dict[str, dict[str, Any]], phase: str) -> float:
        return run[phase]["tar_bytes"] / len(archive)

    every = [of(run["new"], lambda name: "image" in name) / IMAGES for run in (before, now)]
    lists = of(now["new"], lambda name: name.startswith("LIST")) / IMAGES
    heads = of(now["new"], lambda name: name == "HEAD image")
    again = of(now["again"], lambda name: True)
    return [
        Row("14", f"requests for a new image (before: {every[0]:.2f})", every[1], "<=", 2.01, details),
        Row("14", "of them HEAD", heads, "<=", 0, {}),
        Row("14", "listings a new image, those of the dataset's folder too", lists, "<=", 0.01, {}),
        Row(
            "14",
            f"requests of a rerun on {IMAGES} images (before: {of(before['again'], lambda name: True)})",
            again,
            "<=",
            IMAGES / 1000 + 20,
            {},
        ),
        Row(
            "14",
            f"bytes of a tar read for its rows, of its size (before: {fetched(before, 'rows of the tar'):.2f})",
            fetched(now, "rows of the tar"),
            "<=",
            0.01,
            {},
        ),
        Row(
            "14",
            f"and by the whole run (before: {fetched(before, 'tar'):.2f})",
            fetched(now, "tar"),
            "<=",
            1.1,
            {},
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(__file__, measure))
