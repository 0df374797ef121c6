"""Reading by index row: right values, each row group once, and every damage an error that names the file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_diffsynth.cache.codec import CODECS
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.schema import RowView
from tests.shard_names import shard_file

Sample = Callable[[int], dict[str, Any]]
FIRST = shard_file("32x64-0")


def check(values: list[dict[str, Any]], rows: list[int], sample: Sample) -> None:
    assert len(values) == len(rows)
    for value, row in zip(values, rows, strict=True):
        want = sample(row)
        assert value.keys() == want.keys()
        for name, tensor in want.items():
            assert value[name].dtype == tensor.dtype and torch.equal(value[name], tensor)


@pytest.mark.parametrize("codec", CODECS)
def test_read(tmp_path: Path, make_cache: Callable[..., Manifest], sample: Sample, codec: str) -> None:
    make_cache(str(tmp_path), codec=codec)
    reader = CacheReader(str(tmp_path))
    assert len(reader) == 12 and list(reader.sample_ids) == [f"s{i}" for i in range(12)]
    assert reader.sample_ids[-1] == "s11" and reader.sample_ids[2:4] == ["s2", "s3"]
    assert dict(reader.buckets) == {"32x64": range(0, 5), "64x64": range(5, 12)}
    check(reader.read(range(12)), list(range(12)), sample)
    assert reader.read([]) == []
    for row in (-1, 12):
        with pytest.raises(IndexError, match="outside the index of 12"):
            reader.read([row])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 11), max_size=6), max_size=6), st.sampled_from([0, 500, 1 << 20]))
def test_any_order_and_any_memory(cache: str, sample: Sample, batches: list[list[int]], memory: int) -> None:
    reader = CacheReader(cache, max_cached_bytes=memory)
    for rows in batches:
        check(reader.read(rows), rows, sample)
    assert len(reader._kept) <= 1 or reader._kept_bytes <= memory
    assert reader._kept_bytes == sum(part.nbytes for part in reader._kept.values())


def test_a_row_group_is_read_once_while_it_is_kept(cache: str) -> None:
    reader = CacheReader(cache)
    reader.read(range(12))
    # 12 latents and 3 texts, each once
    assert reader.rows_read == 15 and reader.rows_served == 12
    first = reader.bytes_read
    reader.read(range(12))
    assert reader.bytes_read == first and reader.rows_served == 24


def test_values_are_the_callers_own(cache: str, sample: Sample) -> None:
    reader = CacheReader(cache)
    one, two = reader.read([0, 3])  # the same caption
    one["prompt_embeds"] += 1
    one["input_latents"].zero_()
    check([two], [3], sample)
    check(reader.read([0]), [0], sample)


def test_threads_share_the_work(cache: str, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CacheReader(cache)
    gate = threading.Barrier(4)

    def read(rows: list[int]) -> list[dict[str, Any]]:
        gate.wait()
        return reader.read(rows)

    orders = [list(range(12)), list(reversed(range(12))), [5, 5, 5], list(range(0, 12, 2))]
    with ThreadPoolExecutor(4) as pool:
        for rows, values in zip(orders, pool.map(read, orders), strict=True):
            check(values, rows, sample)
    assert reader.rows_read == 15
    small = CacheReader(cache, max_cached_bytes=0)
    with ThreadPoolExecutor(4) as pool:
        for rows, values in zip(orders * 5, pool.map(small.read, orders * 5), strict=True):
            check(values, rows, sample)
    assert small._kept_bytes == sum(part.nbytes for part in small._kept.values())


def test_room_is_made_before_a_row_group_is_read(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = CacheReader(cache)
    everything.read(range(12))
    sizes = [part.nbytes for part in everything._kept.values()]
    # The sizes in the files are a little larger, by their headers.
    reader = CacheReader(cache, max_cached_bytes=2 * max(sizes))
    held: list[int] = []
    read = pq.ParquetFile.read_row_group

    def recorded(self: pq.ParquetFile, number: int, **options: Any) -> pa.Table:
        held.append(reader._kept_bytes)
        return read(self, number, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    for _ in range(2):
        reader.read(range(12))
    assert len(held) > len(sizes) and max(held) <= 2 * max(sizes) - min(sizes)


def test_the_empty_caption(tmp_path: Path, make_cache: Callable[..., Manifest], sample: Sample) -> None:
    make_cache(str(tmp_path / "a"))
    empty = CacheReader(str(tmp_path / "a")).read_empty()
    assert empty.keys() == {"prompt_embeds"} and torch.equal(empty["prompt_embeds"], sample(0)["prompt_embeds"])
    make_cache(str(tmp_path / "b"), empty=False)
    with pytest.raises(CacheError, match="holds no empty caption"):
        CacheReader(str(tmp_path / "b")).read_empty()


def test_shards_of_another_codec_stay_readable(cache: str, make_cache: Callable[..., Manifest], sample: Sample) -> None:
    vae = {path: path.read_bytes() for path in (Path(cache) / "vae").iterdir()}
    make_cache(cache, codec="zstd")
    for path, content in vae.items():
        path.write_bytes(content)
    check(CacheReader(cache).read(range(12)), list(range(12)), sample)


def damaged(cache: str, message: str, rows: list[int] = [0], **options: Any) -> None:  # noqa: B006
    with pytest.raises(CacheError, match=message) as caught:
        CacheReader(cache, **options).read(rows)
    assert FIRST in str(caught.value) and f"ray_diffsynth.cache repair {cache}" in str(caught.value)


def test_damage_names_the_file_and_the_remedy(cache: str, sample: Sample) -> None:
    path = Path(cache) / "vae" / FIRST
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        damaged(cache, "cannot be used")
    # the other files are as good as before
    check(CacheReader(cache).read([4, 11]), [4, 11], sample)
    path.unlink()
    damaged(cache, "it is absent")
    other = Path(cache) / "vae" / shard_file("32x64-3")
    path.write_bytes(other.read_bytes())
    damaged(cache, "row 0 has the key v3, the index says v0")
    damaged(cache, "has 2 rows, not the row 2", [2])


def test_every_flipped_byte_is_an_error_or_harmless(
    tmp_path: Path, make_cache: Callable[..., Manifest], sample: Sample
) -> None:
    cache = str(tmp_path)
    make_cache(cache, codec="none")
    path = tmp_path / "vae" / FIRST
    whole = path.read_bytes()
    for at in range(0, len(whole), 23):
        content = bytearray(whole)
        content[at] ^= 0x10
        path.write_bytes(content)
        try:
            values = CacheReader(cache).read([0, 1, 2])
        except CacheError as error:
            assert str(path) in str(error)
        else:
            check(values, [0, 1, 2], sample)


def test_each_row_is_checked_once_while_it_is_kept(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    intact = RowView.is_intact
    monkeypatch.setattr(RowView, "is_intact", lambda self, codec: bool(checked.append(self.key) or intact(self, codec)))
    reader = CacheReader(cache)
    for _ in range(2):
        reader.read(range(12))
    assert sorted(checked) == sorted({f"v{n}" for n in range(12)} | {"t0", "t1", "t2"})


def test_what_cannot_be_read_is_not_called_damage(cache: str) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    reader = CacheReader(cache)
    reader._open_file = refuse
    with pytest.raises(CacheError, match=f"{FIRST} cannot be read .*Permission denied") as caught:
        reader.read([0])
    assert "repair" not in str(caught.value)


def test_verify_can_be_turned_off(tmp_path: Path, make_cache: Callable[..., Manifest], sample: Sample) -> None:
    cache = str(tmp_path)
    make_cache(cache, codec="none")
    path = tmp_path / "vae" / FIRST
    content = bytearray(path.read_bytes())
    raw = sample(0)["input_latents"].view(torch.uint8).numpy().tobytes()
    content[content.find(raw)] ^= 1
    path.write_bytes(content)
    damaged(cache, r"row 0 \(v0\) does not match its checksum")
    (values,) = CacheReader(cache, verify=False).read([0])
    assert not torch.equal(values["input_latents"], sample(0)["input_latents"])


def test_on_an_object_store(make_cache: Callable[..., Manifest], sample: Sample) -> None:
    fsspec.filesystem("memory").store.clear()
    make_cache("memory://bucket/cache")
    check(CacheReader("memory://bucket/cache").read([11, 0]), [11, 0], sample)
    fsspec.filesystem("memory").rm(f"/bucket/cache/vae/{FIRST}")
    with pytest.raises(CacheError, match="it is absent"):
        CacheReader("memory://bucket/cache").read([0])


def test_a_partial_copy_is_told_at_open(cache: str) -> None:
    CacheReader(cache).check_files()
    gone = sorted(Path(cache, "vae").glob("*.parquet"))[:4]
    for path in gone:
        path.unlink()
    first = ", ".join(path.name for path in gone[:3])
    with pytest.raises(CacheError, match=rf"4 of the 5 files of .*cache/vae are absent: {first}, …\. If this"):
        CacheReader(cache).check_files()
    part = Path(cache, Manifest.load(cache).index_parts[0].file)
    part.unlink()
    with pytest.raises(CacheError, match=rf"1 of the 1 files of .*cache/index are absent: {part.name}\. If this"):
        CacheReader(cache)
