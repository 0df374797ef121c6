"""Datasets of the hub (`hf://`), read where they lie by huggingface_hub's file system, from a hub on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.dataset_files import hf_parquet, png
from tests.data.hub_server import hub_server
from tests.data.test_layouts import HF_ROWS, IMAGES, SHARDS, jsonl, shard

LARGE = hf_parquet(
    {"image": [{"bytes": png(n, 256, 256), "path": f"{n}.png"} for n in range(8)], "text": ["a caption"] * 8}
)
READ = """
import hashlib, json, sys
from ray_diffsynth import storage
from ray_diffsynth.data.metadata import read_metadata, resolve_file
from ray_diffsynth.data.scan import scan_file
from ray_diffsynth.errors import UserError

found = []
for base, options in json.loads(sys.argv[1]):
    try:
        rows = list(read_metadata(base, **options).rows())
    except UserError as error:
        found.append(str(error))
        continue
    paths = [resolve_file(base, row["image"]) for row in rows]
    digests = [hashlib.sha256(storage.read_bytes(path)).hexdigest() for path in paths]
    scanned = [scan_file(path) for path in paths]
    assert all(file.stamp for file in scanned)
    found.append([[row["sample_id"], row["prompt"], digest] for row, digest in zip(rows, digests)])
print(json.dumps(found))
"""


def read_all(url: str, cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """In a process of its own, as the address of the hub is read at its start."""
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(cases)], env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def read() -> tuple[list[Any], list[tuple[str, int]]]:
    main = {SHARDS.format(0): shard(0, 1), "data/test-00000-of-00001.parquet": shard(2), "README.md": b"x"}
    folder = {"metadata.jsonl": jsonl(HF_ROWS).encode(), **IMAGES}
    revisions = {"main": main, "v1": folder, "refs/convert/parquet": main, "large": {"data/train.parquet": LARGE}}
    with hub_server("lab/set", revisions) as (url, asked):
        base = "hf://datasets/lab/set"
        cases: list[tuple[str, dict[str, Any]]] = [
            (base, {}),
            (base, {"split": "test"}),
            (f"{base}@v1", {}),
            (f"{base}@refs/convert/parquet", {}),
            (base, {"metadata_path": f"{base}/data/train-*.parquet"}),
            ("hf://datasets/lab/absent", {}),
            (f"{base}@v2", {}),
            (f"{base}@large", {}),
        ]
        return read_all(url, cases), asked


def digest(seed: int) -> str:
    import hashlib

    return hashlib.sha256(png(seed)).hexdigest()


def test_shards_splits_revisions_and_image_folders(read: tuple[list[Any], Any]) -> None:
    train, test, folder, converted, by_pattern, *_, large = read[0]
    assert len(large) == 8
    name = SHARDS.format(0)
    assert train == [[f"{name}/{n}.png", f"text {n}", digest(n)] for n in (0, 1)] == converted == by_pattern
    assert test == [["data/test-00000-of-00001.parquet/2.png", "text 2", digest(2)]]
    assert folder == [["0.png", "zero", digest(0)], ["sub/1.png", "one", digest(1)]]


def test_what_is_not_there_is_told_with_the_fix(read: tuple[list[Any], Any]) -> None:
    *_, absent, revision, _ = read[0]
    assert "the dataset folder hf://datasets/lab/absent does not exist" in absent
    assert "hf://datasets/ORGANISATION/NAME[@revision]" in absent and "HF_TOKEN" in absent
    assert "@v2 does not exist" in revision


def test_no_file_is_fetched_whole_where_a_part_is_enough(read: tuple[Any, list[tuple[str, int]]]) -> None:
    fetched = [size for request, size in read[1] if "/resolve/large/" in request and size]
    assert len(LARGE) > 1_500_000 and max(fetched) < len(LARGE) / 3 and sum(fetched) < 1.5 * len(LARGE)


def test_the_paths_of_this_test_are_real(tmp_path: Path) -> None:
    """Without a stand-in: the file system behind hf:// is huggingface_hub's own."""
    import fsspec

    assert fsspec.get_filesystem_class("hf").__module__.startswith("huggingface_hub")
