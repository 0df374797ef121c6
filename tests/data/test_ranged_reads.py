"""What an object store is asked for by images in archives: members and row groups, never the whole file an image."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pytest

from ray_diffsynth import storage
from ray_diffsynth.data import media
from ray_diffsynth.data.media import MediaError, bytes_hash, fetch
from ray_diffsynth.data.metadata import read_metadata, resolve_file
from ray_diffsynth.data.scan import scan_file
from ray_diffsynth.data.sources import verified_bytes
from ray_diffsynth.storage import members as storage_members
from ray_diffsynth.storage import parquet_member, ranged, raw
from ray_diffsynth.storage.ranged import RangedFile
from tests.data.dataset_files import hf_parquet, png, tar_of, zip_of
from tests.s3_server import s3_server

COUNT = 12
NOISE = [os.urandom(200_000) for _ in range(COUNT)]
"""Contents of images, which are not decoded here: 2.4 MB in all."""


@dataclass
class Asked:
    """Bytes that the server sent back, one entry a GET; and how often it was asked for a version alone."""

    sizes: list[int] = field(default_factory=list)
    heads: int = 0


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
        found.heads += method == "head_object"
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
    if kind == "parquet":  # its footer and columns of text
        assert sum(asked.sizes) < total / 4
    else:  # a directory and the captions; a tar's headers, and the captions that lie between two
        assert sum(asked.sizes) < 0.01 * total and len(asked.sizes) < 1.5 * COUNT
    asked.sizes.clear()
    asked.heads = 0
    for row, data in zip(rows, NOISE, strict=True):
        assert storage.read_bytes(resolve_file(base, row["image"])) == data
    if kind == "parquet":
        # A footer and a column chunk for each of four row groups, and the footer once more, each of an opened file.
        assert len(asked.sizes) <= 10 and sum(asked.sizes) < 1.5 * total and asked.heads <= 6
    else:
        assert len(asked.sizes) == COUNT and sum(asked.sizes) < 1.02 * total and asked.heads == 0
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


def test_a_parquet_file_that_is_replaced_is_never_taken_for_what_it_was() -> None:
    """Its version is asked for now and then; who knows it, or what the content must be, gets that content."""

    def written(seeds: Sequence[int], rows_per_group: int) -> None:
        cells = [{"bytes": png(seed), "path": None} for seed in seeds]
        columns = {"image": cells, "text": ["a caption"] * len(cells)}
        storage.write_bytes_atomic("memory://replaced/train.parquet", hf_parquet(columns, rows_per_group))

    written([0, 1, 2, 3], 2)
    *_, last = read_metadata("memory://replaced").rows()
    path = resolve_file("memory://replaced", last["image"])
    old = scan_file(path)
    assert old.digest == bytes_hash(png(3)) and old.stamp == storage.stamp(path)
    written([4, 5, 6, 7], 2)
    now = storage.stamp(path)
    # What is read without a version may be the old content, and is then told with the old version.
    assert scan_file(path) == old and now != old.stamp
    assert verified_bytes(path, bytes_hash(png(7))) == png(7)
    assert scan_file(path, stamp=now).digest == bytes_hash(png(7))
    # Places that are of no use in the new file are those of another one, not damage.
    assert storage.read_bytes(path) == png(3)
    raw._recent.clear()
    parquet_member._groups.clear()
    assert scan_file(path) == scan_file(path, stamp=now)
    written([8, 9, 10, 11] * 50, 200)
    parquet_member._groups.clear()
    assert fetch(path) == png(11)


def named(count: int, size: int, style: int, name: str) -> tuple[bytes, list[bytes]]:
    """A tar of so many images and captions in a style of `tarfile`, their names that long, and the images."""
    out, images = io.BytesIO(), [os.urandom(size) for _ in range(count)]
    with tarfile.open(fileobj=out, mode="w", format=style) as archive:
        for number, data in enumerate(images):
            for ending, content in (("png", data), ("txt", f"caption {number}".encode()), ("json", b'{"seed": 1}')):
                info = tarfile.TarInfo(f"{name}{number:03d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue(), images


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each range that is read, of any file."""
    found: list[int] = []
    real = ranged.read_range

    def read(path: str, start: int, size: int) -> bytes:
        data = real(path, start, size)
        found.append(len(data))
        return data

    monkeypatch.setattr(ranged, "read_range", read)
    return found


@pytest.mark.parametrize("size", [300, 5_000, 300_000])
@pytest.mark.parametrize(
    ("style", "name"),
    [
        (tarfile.USTAR_FORMAT, "a"),
        *((style, name) for style in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for name in ("a", "sub/" + "ü" * 130)),
    ],
)
def test_a_tar_is_read_by_its_headers(ranges: list[int], size: int, style: int, name: str) -> None:
    """Of large members hardly more than those, by a request a sample; of small ones all of it, by few requests."""
    count = 24
    archive, images = named(count, size, style, name)
    base = f"memory://headers/{size}-{style}-{len(name)}"
    storage.write_bytes_atomic(f"{base}/a.tar", archive)
    rows = list(read_metadata(base).rows())
    assert [(row["sample_id"], row["prompt"]) for row in rows] == [
        (f"a.tar/{name}{number:03d}.png", f"caption {number}") for number in range(count)
    ]
    read = list(ranges)
    if size == 300_000:
        assert sum(read) < (0.01 if len(name) < 100 else 0.02) * len(archive) and len(read) <= count + 6
    elif size == 300:
        assert sum(read) <= len(archive) and len(read) < 12
    else:
        assert sum(read) <= len(archive) and len(read) < count
    for row, data in zip(rows, images, strict=True):
        assert storage.read_bytes(resolve_file(base, row["image"])) == data


def test_reads_here_and_there_are_those_of_the_file() -> None:
    data, asked = os.urandom(100_000), []

    def read(start: int, count: int) -> bytes:
        asked.append(count)
        return data[start : start + count]

    file, random = RangedFile(read, len(data)), Random(0)
    plain = io.BytesIO(data)
    for _ in range(2000):
        place, count = random.randrange(110_000), random.choice([0, 1, 512, 20_000])
        assert file.seek(place) == plain.seek(place)
        assert file.read(count) == plain.read(count) and file.tell() == plain.tell()
    assert file.seek(-10, io.SEEK_END) == 99_990 and file.read() == data[-10:]
    with pytest.raises(ValueError, match="no byte"):
        file.seek(-1)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_store_that_fails_leaves_no_sample_of_an_archive_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that lie behind the failure, nor those whose captions cannot be read."""
    members: dict[str, bytes] = {}
    for number in range(8):
        members |= {f"{number}.png": NOISE[0][:50_000], f"{number}.txt": b"a caption"}
    base = f"memory://failing/{kind}"
    storage.write_bytes_atomic(f"{base}/a.{kind}", (tar_of if kind == "tar" else zip_of)(members))
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)
    real, left = raw.read_range, [0]

    def read(path: str, start: int, size: int) -> bytes:
        if start and left[0]:
            left[0] -= 1
            raise OSError("503 SlowDown")
        return real(path, start, size)

    monkeypatch.setattr(ranged, "read_range", read)
    monkeypatch.setattr(storage_members, "read_range", read)
    left[0] = media.READ_ATTEMPTS - 1
    assert len(list(read_metadata(base).rows())) == 8 and not left[0]
    left[0] = 10**6
    with pytest.raises(media.StoreFailure, match="503 SlowDown"):
        read_metadata(base)


def test_a_store_that_fails_leaves_no_caption_of_a_folder_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a caption")
    monkeypatch.setattr(media, "PAUSE_SECONDS", 0.0)
    real, left = storage.read_bytes, [media.READ_ATTEMPTS - 1]

    def read(path: str) -> bytes:
        if left[0]:
            left[0] -= 1
            raise OSError("503 SlowDown")
        return real(path)

    monkeypatch.setattr(storage, "read_bytes", read)
    assert [row["prompt"] for row in read_metadata(str(tmp_path)).rows()] == ["a caption"]
    left[0] = 10**6
    with pytest.raises(media.StoreFailure, match="503 SlowDown"):
        read_metadata(str(tmp_path))
