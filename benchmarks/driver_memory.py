"""One run of stage 1's driver over synthetic rows, in a process of its own: by this build or, by PYTHONPATH, another.

    python benchmarks/driver_memory.py FOLDER ROWS [FURTHER COLUMNS]

Metadata, keys, planning and commit are real. There is no file behind a row: what the scan would find is made up, and
the encoder writes nothing. Prints JSON: for each phase its seconds of CPU and the resident memory at its end above that
after imports, and the peak of all, in bytes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SIZES = ((1024, 1024), (832, 1216), (1216, 832), (896, 1152), (1152, 896))
CAPTION = 170


def write_dataset(folder: Path, rows: int, columns: int) -> Path:
    """`metadata.csv` of so many rows with a caption of 170 characters each, and so many further columns."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(4000)]
    further = [f"column_{number}" for number in range(columns)]
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt", *further])
        for number in range(rows):
            text = f"{number} {' '.join(chance.choices(words, k=40))}"[:CAPTION]
            writer.writerow([f"images/{number:09d}.jpg", text, *(f"{name} of {number}" for name in further)])
    return folder


def memory(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


class HereRay:
    """The part of Ray that the scan uses, as plain calls."""

    @staticmethod
    def remote(**_: Any) -> Any:
        return lambda function: SimpleNamespace(remote=function)

    @staticmethod
    def get(value: Any) -> Any:
        return value


def measure(folder: Path, rows: int, columns: int) -> dict[str, Any]:
    """Run stage 1 over the dataset; see the module."""
    from ray_diffsynth.config import PreprocessConfig
    from ray_diffsynth.data.scan import SourceFile
    from ray_diffsynth.preprocess import commit, job, scan
    from tests.preprocess.counting import FAMILY, build_model

    data, model, cache = write_dataset(folder / "data", rows, columns), build_model(folder / "model"), folder / "cache"
    written: dict[str, int] = {}

    def scan_file(path: str, **_: Any) -> SourceFile:
        digest = hashlib.blake2b(path.rpartition("/")[2].encode(), digest_size=16).hexdigest()
        height, width = SIZES[int(digest[:8], 16) % len(SIZES)]
        return SourceFile(path, "123456-1700000000000000000", width, height, digest, decode_bytes=width * height * 6)

    def encode(runs: Any, *_: Any, **__: Any) -> None:
        for run in runs:
            results = []
            for shard in run.shards:
                facts = {"group": run.name, "file": f"{shard.name}.parquet", "bucket": shard.bucket, "nbytes": 1}
                facts |= {"keys": list(shard.keys), "codec": "none", "rows_per_group": len(shard.keys), "failed": {}}
                results.append({"shard": facts, "transient": {}, "warnings": []})
                written[f"{shard.name}.parquet"] = 1
            run.add_results(results)

    phases: dict[str, dict[str, float]] = {}

    def timed(module: Any, name: str, phase: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            found = real(*args, **kwargs)
            before = phases.get(phase, {"seconds": 0.0})
            seconds = before["seconds"] + time.process_time() - began
            phases[phase] = {"seconds": round(seconds, 2), "bytes": memory("VmRSS") - start}
            return found

        setattr(module, name, call)

    here = SimpleNamespace(up=lambda: True, for_scan=lambda: SimpleNamespace(ray_options={}), for_encoding=lambda _: {})
    scan.ray, scan.scan_file, scan.source_stamp = HereRay, scan_file, lambda path: "123456-1700000000000000000"
    scan.resolve_file = lambda base, name: f"{base}/{name}"
    # What Ray and the machines are asked for is not there; what an earlier build calls otherwise neither.
    for name, stand_in in {"machines_of": lambda *_: nullcontext(here), "pool_sizes": lambda *_, **__: {}}.items():
        if hasattr(job, name):
            setattr(job, name, stand_in)
    job.ray_session = lambda *_, **__: nullcontext()
    job.encode_all = encode
    job.write_reports = lambda *_: None
    job.write_page = lambda *_, **__: None
    commit.file_sizes = lambda _: written
    for name, phase in {
        "read_dataset": "read",
        "read_metadata": "read",
        "_scan": "scan",
        "scan_dataset": "scan",
    }.items():
        if hasattr(job, name):
            timed(job, name, phase)
    timed(job, "encode_all", "encode")
    timed(job, "commit_cache", "commit")
    config = PreprocessConfig(
        model=str(model),
        family=FAMILY,
        dataset_base_path=str(data),
        output_path=str(cache),
    )
    start, began = memory("VmRSS"), time.process_time()
    job.run(config)
    seconds = time.process_time() - began
    manifest = json.loads((cache / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"]["samples"] == rows
    return {
        "rows": rows,
        "seconds": round(seconds, 2),
        "peak": memory("VmHWM") - start,
        "index": manifest.get("index_parts", manifest.get("index_hash")),
        "phases": phases,
    }


if __name__ == "__main__":
    place, count, further = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    print(json.dumps(measure(place, count, further)))
