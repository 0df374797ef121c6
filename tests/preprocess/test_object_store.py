"""Data and cache on an S3-compatible server: the same cache as on disk, found again, verified, repaired and pruned."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from ray_diffsynth import storage
from ray_diffsynth.cache.__main__ import main
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.lease import lease
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.store import GroupRow, read_shard_header, write_shard
from ray_diffsynth.data import media
from ray_diffsynth.data.media import READ_ATTEMPTS, MediaError, StoreFailure
from ray_diffsynth.preprocess import summary
from tests.faulty_proxy import FaultyProxy
from tests.preprocess.conftest import Stage1, files
from tests.preprocess.counting import build_model, calls
from tests.s3_server import s3_server
from tests.shard_names import shard_file, stem


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("lab")
        yield "s3://lab"
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()


@dataclass
class Requests:
    """What was asked of the server: operations, and bytes that were sent back."""

    operations: list[str]
    fetched: int = 0


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    import s3fs

    asked, real = Requests([]), s3fs.S3FileSystem._call_s3

    async def spy(self: Any, method: str, *args: Any, **options: Any) -> Any:
        asked.operations.append(method)
        answer = await real(self, method, *args, **options)
        asked.fetched += answer["ContentLength"] if method == "get_object" else 0
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", spy)
    return asked


@pytest.fixture
def proxy(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Between the clients and the server; without retries of the client itself, so that ours are seen."""
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(media, "PAUSE_SECONDS", 0.01)
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
        yield between


@pytest.mark.slow
def test_a_store_that_fails_is_asked_again_and_costs_no_row(
    bucket: str, proxy: FaultyProxy, few: Path, inline: Stage1, tmp_path: Path
) -> None:
    for path in few.iterdir():
        storage.write_bytes_atomic(f"{bucket}/data/{path.name}", path.read_bytes())
    image = f"{bucket}/data/0003.png"
    whole = storage.read_bytes(image)
    for fault in (429, 503, 500, "reset"):
        proxy.fail("0003.png", fault, READ_ATTEMPTS - 1)
        assert media.fetch(image) == whole and proxy.left == 0, fault
        proxy.fail("0003.png", fault, READ_ATTEMPTS - 1)
        assert media.source_stamp(image) and proxy.left == 0, fault
    # What is absent, or may not be read, is the file's or the user's own matter, and is not asked for again.
    with pytest.raises(MediaError, match="no such file"):
        media.fetch(f"{bucket}/data/absent.png")
    proxy.fail("0003.png", 403, 99)
    with pytest.raises(media.SourceUnavailable, match="may not be read"):
        media.fetch(image)
    assert proxy.left == 98
    # For good: the run ends, nothing is left out, and the next one goes on with what was scanned.
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    proxy.fail("0003.png", 503, 10**6)
    with pytest.raises(
        StoreFailure, match=r"s3://lab/data/0003\.png cannot be read now \(tried 5 times.*Service ?Unavailable"
    ):
        inline(model, f"{bucket}/data", cache)  # type: ignore[arg-type]
    assert not (cache / "manifest.json").exists()
    proxy.fail("", 503, 0)
    report = inline(model, f"{bucket}/data", cache)  # type: ignore[arg-type]
    assert (report["samples"], report["quarantined"]) == (12, 0)
    # It fails when it is asked whether a file has changed: its row stays as it was.
    proxy.fail("0003.png", 503, 10**6)
    report = inline(model, f"{bucket}/data", cache)  # type: ignore[arg-type]
    assert (report["samples"], report["quarantined"]) == (12, 0)


@pytest.mark.slow
def test_an_image_is_fetched_by_the_scan_and_by_the_decoder_and_listed_after(
    bucket: str, proxy: FaultyProxy, few: Path, inline: Stage1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in few.iterdir():
        storage.write_bytes_atomic(f"{bucket}/data/{path.name}", path.read_bytes())
    model, cache = build_model(tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(summary, "SHEET_IMAGES", 0)  # those that the report's page shows are opened once more
    counts = []
    for run in range(3):
        if run == 2:
            storage.write_bytes_atomic(f"{bucket}/data/0003.png", (few / "0004.png").read_bytes())
        proxy.seen.clear()
        assert inline(model, f"{bucket}/data", cache)["samples"] == 12  # type: ignore[arg-type]
        images = Counter(request for request in proxy.seen if request[1].endswith(".png"))
        counts.append(len(proxy.seen) - images.total())
        if run == 0:
            assert images == {("GET", f"/lab/data/{number:04d}.png"): 2 for number in range(12)}
        else:
            # The last is another one's image now: it is known by its content, and not decoded.
            assert images == ({("GET", "/lab/data/0003.png"): 1} if run == 2 else {})
    # A listing, and what finds the metadata file: as much for any number of images.
    assert max(counts) <= 15, counts


@pytest.mark.slow
def test_what_an_object_store_is_asked(bucket: str, requests: Requests) -> None:
    storage.write_bytes_atomic(f"{bucket}/a/x.json", b"1")
    assert requests.operations == ["put_object"]
    # A file that must not be there yet: one put, which the server refuses. (This server is not atomic; S3 is.)
    requests.operations.clear()
    assert [storage.create_new(f"{bucket}/a/new.json", content) for content in (b"0", b"1")] == [True, False]
    assert requests.operations == ["put_object"] * 2 and storage.read_bytes(f"{bucket}/a/new.json") == b"0"
    # The keys of a shard, without the values.
    rows = [GroupRow(f"k{n}", {"x": torch.randn(1, 16, 128, 128).bfloat16()}) for n in range(16)]
    shard = write_shard(bucket, "vae", stem("a"), "1024x1024", rows, codec="none")
    requests.operations.clear()
    requests.fetched = 0
    assert read_shard_header(bucket, "vae", shard_file("a")) == shard
    assert requests.fetched < shard.nbytes / 10 and len(requests.operations) < 8
    assert storage.file_sizes(f"{bucket}/vae") == {shard_file("a"): shard.nbytes}
    assert storage.stamp(f"{bucket}/vae/{shard_file('a')}").startswith(f"{shard.nbytes}-")


@pytest.mark.slow
def test_a_cache_on_s3(bucket: str, few: Path, inline: Stage1, tmp_path: Path) -> None:
    for path in few.iterdir():
        storage.write_bytes_atomic(f"{bucket}/data/{path.name}", path.read_bytes())
    model, cache = build_model(tmp_path / "model"), f"{bucket}/cache"
    inline(model, f"{bucket}/data", cache)  # type: ignore[arg-type]
    before = len(calls(model))
    report = inline(model, f"{bucket}/data", cache)  # type: ignore[arg-type]
    assert len(calls(model)) == before and report["samples"] == 12
    # Byte for byte what the same data gives on disk.
    inline(model, few, tmp_path / "disk")
    for name, content in files(tmp_path / "disk").items():
        assert storage.read_bytes(f"{cache}/{name}") == content, name
    mine, local = CacheReader(cache), CacheReader(str(tmp_path / "disk"))
    for a, b in zip(mine.read(range(12)), local.read(range(12)), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert main(["verify", cache]) == 0 and main(["inspect", cache]) == 0
    with lease(cache), pytest.raises(CacheError, match="is being written by process"), lease(cache):
        raise AssertionError("the lease was given twice")
    # Damage is found, taken away and made good.
    shard = f"{cache}/vae/{storage.list_files(f'{cache}/vae', suffix='.parquet')[0]}"
    storage.write_bytes_atomic(shard, storage.read_bytes(shard)[:-60])
    assert main(["verify", cache]) == 1 and main(["repair", cache]) == 0
    assert inline(model, f"{bucket}/data", cache)["parameters"]["input_latents"]["encoded"] == 12  # type: ignore[arg-type]
    storage.write_bytes_atomic(f"{cache}/vae/{shard_file('spare')}", storage.read_bytes(shard))
    assert main(["repair", cache, "--prune"]) == 0
    assert storage.list_files(f"{cache}/vae", suffix=".parquet") == [shard.rpartition("/")[2]]
    assert main(["verify", cache]) == 0
