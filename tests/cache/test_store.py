"""Shards: whole or absent, the same bytes for the same rows, readable by plain pyarrow."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_diffsynth.cache.codec import CODECS, CodecError, decode_value
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.schema import row_views, rows_from_table, table_from_rows, table_parameters, table_schema
from ray_diffsynth.cache.store import GroupRow, Shard, list_shards, read_shard_header, write_shard
from tests.shard_names import shard_file, stem

N = shard_file("n")
ROWS = [
    GroupRow("k0", {"latents": torch.arange(6, dtype=torch.bfloat16).reshape(1, 6), "prompt": "a cat", "extra": None}),
    GroupRow("k1", {"latents": torch.zeros(1, 2, 3), "prompt": ""}),
    GroupRow("k2", {"latents": torch.ones(1, 1, dtype=torch.bool), "prompt": ["x", 1]}),
]


def write(cache: Path, rows: Any = ROWS, name: str = stem("n"), **options: Any) -> Shard:
    return write_shard(str(cache), "vae", name, "64x64", rows, **({"codec": "planes-zstd"} | options))


def same(rows: list[tuple[str, dict[str, Any]]]) -> None:
    assert [key for key, _ in rows] == [row.key for row in ROWS]
    for (_, values), row in zip(rows, ROWS, strict=True):
        assert values.keys() == row.values.keys()
        assert torch.equal(values["latents"], row.values["latents"]) and values["prompt"] == row.values["prompt"]


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip_and_header(tmp_path: Path, codec: str) -> None:
    shard = write(tmp_path, codec=codec, rows_per_group=2)
    assert (shard.group, shard.file, shard.bucket, shard.keys) == ("vae", N, "64x64", ("k0", "k1", "k2"))
    path = tmp_path / "vae" / N
    assert shard.nbytes == path.stat().st_size and [shard.locate(i) for i in range(3)] == [(0, 0), (0, 1), (1, 0)]
    assert read_shard_header(str(tmp_path), "vae", N, verify=True) == shard
    assert Shard.from_dict(shard.to_dict()) == shard
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 2 and file.metadata.row_group(0).num_rows == 2
    same(rows_from_table(pq.read_table(path), codec))


def test_plain_pyarrow_reads_it(tmp_path: Path) -> None:
    write(tmp_path)
    table = pq.read_table(tmp_path / "vae" / N)
    assert table.schema.field("latents").type == pa.large_binary()
    assert table.schema.field("latents_shape").type.value_type == pa.int32()
    row = table.to_pylist()[0]
    assert row["latents_dtype"] == "bfloat16" and row["latents_shape"] == [1, 6]
    assert decode_value(row["latents"], row["latents_shape"], "bfloat16", "planes-zstd").tolist() == [
        [0, 1, 2, 3, 4, 5]
    ]


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", failed={"k9": ("MediaError", "why")})
    write(tmp_path / "c", failed={"k9": ("MediaError", "why")})
    one, two, three = ((tmp_path / c / "vae" / N).read_bytes() for c in "abc")
    assert one != two == three


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from ray_diffsynth.cache.store import GroupRow, write_shard\n"
        "rows = [GroupRow('k', {'x': torch.arange(40).bfloat16(), 'p': 'text'})]\n"
        "write_shard(sys.argv[1], 'vae', sys.argv[2], '64x64', rows, codec='planes-zstd', "
        "failed={'b': ('E', 'm'), 'a': ('E', 'm')})\n"
    )
    there, here = tmp_path / "there", tmp_path / "here"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(there), stem("n")], check=True, cwd=root, env=environment)
    rows = [GroupRow("k", {"x": torch.arange(40).bfloat16(), "p": "text"})]
    write(here, rows, failed={"a": ("E", "m"), "b": ("E", "m")})
    assert (here / "vae" / N).read_bytes() == (there / "vae" / N).read_bytes()


def test_a_table_is_written_as_its_rows_are(tmp_path: Path) -> None:
    parameters = ("latents", "prompt", "extra")
    table = table_from_rows([r.key for r in ROWS], [r.values for r in ROWS], parameters, "planes-zstd")
    assert table_parameters(table.schema) == parameters
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    write(tmp_path / "a", chunked)
    write(tmp_path / "b")
    assert (tmp_path / "a/vae" / N).read_bytes() == (tmp_path / "b/vae" / N).read_bytes()
    with pytest.raises(CacheError, match="not encoded with zstd"):
        write(tmp_path / "c", table, codec="zstd")
    assert not (tmp_path / "c").exists()
    same(rows_from_table(chunked, "planes-zstd"))


def test_failures_are_kept(tmp_path: Path) -> None:
    failed = {"k7": ("MediaError", "why"), "k8": ("ValueError", "ü")}
    shard = write(tmp_path, [], failed=failed, parameters=("latents",))
    assert shard.keys == () and shard.failed == failed
    assert read_shard_header(str(tmp_path), "vae", N, verify=True) == shard == Shard.from_dict(shard.to_dict())


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="at least one row"):
        write(tmp_path, [])
    with pytest.raises(CacheError, match="k0 comes twice"):
        write(tmp_path, [ROWS[0], ROWS[0]])
    with pytest.raises(CacheError, match="k0 comes twice"):
        write(tmp_path, [ROWS[0]], failed={"k0": ("E", "m")})
    with pytest.raises(CacheError, match="has the parameter 'extra', the table only latents, prompt"):
        write(tmp_path, parameters=("latents", "prompt"))
    with pytest.raises(CodecError, match="parameter 'x': a builtins.set"):
        write(tmp_path, [GroupRow("k", {"x": {1}})])
    for names in (("key",), ("x", "x_shape"), ("x", "x")):
        with pytest.raises(CacheError, match="rename one"):
            table_schema(names)
    assert list_shards(str(tmp_path), "vae") == []


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    for part, replace in (
        ("latents", b"\x00" * 12),
        ("latents_shape", [1, 3, 2]),
        ("prompt_dtype", "png"),
        ("key", "k9"),
    ):
        table = table_from_rows(
            ["k0"], [{"latents": torch.ones(1, 6).half(), "prompt": "x"}], ("latents", "prompt"), "none"
        )
        at = table.column_names.index(part)
        damaged = table.set_column(at, table.schema.field(at), pa.array([replace], table.schema.field(at).type))
        assert not row_views(damaged)[0].is_intact("none")
        with pytest.raises(CacheError, match="does not match its checksum"):
            rows_from_table(damaged, "none")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "vae" / N
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CacheError, match=str(path)):
            read_shard_header(str(tmp_path), "vae", N)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(CacheError, match="of another program"):
        read_shard_header(str(tmp_path), "vae", N)
    path.write_bytes(whole)
    (tmp_path / "te").mkdir()
    (tmp_path / "te" / N).write_bytes(whole)
    with pytest.raises(CacheError, match="belongs to the group vae, not te"):
        read_shard_header(str(tmp_path), "te", N)
    with pytest.raises(CacheError, match=shard_file("absent")):
        read_shard_header(str(tmp_path), "vae", shard_file("absent"))


def test_verify_finds_damaged_data(tmp_path: Path) -> None:
    data = torch.arange(1000, dtype=torch.uint8).repeat(4)
    write(tmp_path, [GroupRow("k0", {"x": data})], codec="none")
    path = tmp_path / "vae" / N
    content = bytearray(path.read_bytes())
    at = content.find(data.numpy().tobytes())
    content[at + 5] ^= 1
    path.write_bytes(content)
    read_shard_header(str(tmp_path), "vae", N)
    with pytest.raises(CacheError, match="1 of 1 rows do not match"):
        read_shard_header(str(tmp_path), "vae", N, verify=True)


def write_for_ever(cache: Path) -> None:
    """Replace five shards over and over."""
    rows = [GroupRow(f"k{i}", {"x": torch.full((1 << 16,), i)}) for i in range(16)]
    for n in itertools.count():
        write(cache, rows, name=stem(f"n{n % 5}"), codec="none")


def test_a_writer_killed_at_any_moment_leaves_whole_files_only(tmp_path: Path) -> None:
    for delay in (0.05, 0.11, 0.17, 0.2):
        # fork: a fresh interpreter would spend ten seconds on importing torch
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,), daemon=True)
        process.start()
        wait_for_a_shard(tmp_path)
        process.join(delay)
        assert process.is_alive()
        process.kill()
        process.join()
        for file in list_shards(str(tmp_path), "vae"):
            assert len(read_shard_header(str(tmp_path), "vae", file, verify=True).keys) == 16


def wait_for_a_shard(cache: Path) -> None:
    while not list_shards(str(cache), "vae"):  # as long as the test may last
        time.sleep(0.01)
