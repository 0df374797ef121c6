"""What an object store is asked for by images in archives: members and row groups, never the whole file an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import fsspec
import pytest

from ray_diffsynth import storage
from ray_diffsynth.data import media
from ray_diffsynth.data.media import MediaError
from ray_diffsynth.data.metadata import read_metadata, resolve_file
from tests.data.dataset_files import hf_parquet, tar_of, zip_of
from tests.s3_server import s3_server

COUNT = 12
NOISE = [os.urandom(200_000) for _ in range(COUNT)]
"""Contents of images, which are not decoded here: 2.4 MB in all."""


@dataclass
class Asked:
    """Bytes that the server sent back, one entry a GET."""

    sizes: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    with s3_server() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
        fsspec.filesystem("s3", use_listings_cache=False).mkdir("ranges")
        members: dict[str, bytes] = {}
        for number, data in enumerate(NOISE):
            members |= {f"{number:02d}.png": data, f"{number:02d}.txt": b"a caption"}
        cells = [{"bytes": data, "path": f"{number:02d}.png"} for number, data in enumerate(NOISE)]
        parquet = hf_parquet({"image": cells, "text": ["a caption"] * COUNT}, rows_per_group=3)
        storage.write_bytes_atomic("s3://ranges/zip/a.zip", zip_of(members))
        storage.write_bytes_atomic("s3://ranges/tar/a.tar", tar_of(members))
        storage.write_bytes_atomic("s3://ranges/parquet/train.parquet", parquet)
        yield "s3://ranges"
        fsspec.filesystem("s3", use_listings_cache=False).clear_instance_cache()
    patch.undo()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    import s3fs

    found, real = Asked(), s3fs.S3FileSystem._call_s3

    async def spy(self: Any, method: str, *args: Any, **options: Any) -> Any:
        answer = await real(self, method, *args, **options)
        if method == "get_object":
            found.sizes.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", spy)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "parquet", "tar"])
def test_members_are_fetched_by_their_place(bucket: str, asked: Asked, kind: str) -> None:
    base = f"{bucket}/{kind}"
    rows = list(read_metadata(base).rows())
    assert len(rows) == COUNT
    total = sum(map(len, NOISE))
    if kind != "tar":  # whose headers lie between its members
        # A zip's directory and captions, a Parquet file's footer and columns of text.
        assert sum(asked.sizes) < total / (1.5 if kind == "zip" else 4)
    asked.sizes.clear()
    for row, data in zip(rows, NOISE, strict=True):
        assert storage.read_bytes(resolve_file(base, row["image"])) == data
    if kind == "parquet":
        # A footer and a column chunk for each of four row groups, and the footer once more.
        assert len(asked.sizes) <= 10 and sum(asked.sizes) < 1.5 * total
    else:
        assert len(asked.sizes) == COUNT and sum(asked.sizes) < 1.02 * total
    asked.sizes.clear()
    assert storage.read_bytes(resolve_file(base, rows[-1]["image"])) == NOISE[-1]
    assert sum(asked.sizes) < (0 if kind == "parquet" else 1.1) * len(NOISE[-1]) + 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_behind_the_end_of_its_archive_is_no_failure_of_the_store(
    bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server refuses such a range with 416, which is tried again as any other failure of its own."""
    archive = f"{bucket}/short.{kind}"
    storage.write_bytes_atomic(archive, b"x" * 100)
    monkeypatch.setattr(media.time, "sleep", lambda seconds: pytest.fail("it was tried again"))
    with pytest.raises(MediaError, match="it ends within the member at 1000"):
        media.fetch(storage.member_path(archive, (1000, 10, 10) if kind == "zip" else (1000, 10), "a.png"))
