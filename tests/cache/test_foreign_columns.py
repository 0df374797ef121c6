"""A cache's files with columns that are no plain data: refused on every way that reads them; no code is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.export import export_cache
from ray_diffsynth.cache.inspection import inspect_cache
from ray_diffsynth.cache.local_copy import LocalCopies
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.repair import repair_cache
from ray_diffsynth.cache.store import list_shards, read_shard_header
from ray_diffsynth.cache.tables import table_hash
from ray_diffsynth.cache.verify import verify_cache
from tests.arrow_types import NAME, Plain, known_to_pyarrow, plain


@pytest.fixture(params=[True, False], ids=["registered", "unregistered"])
def registered(request: pytest.FixtureRequest) -> Iterator[None]:
    with known_to_pyarrow(request.param):
        yield


def with_extension(path: Path, column: str) -> bytes:
    """The file as it is, but for one column of the extension type."""
    table = pq.read_table(path)
    at = table.schema.get_field_index(column)
    return parquet(table.set_column(at, column, plain(table.column(column).combine_chunks())))


def parquet(table: pa.Table) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    return bytes(out.getvalue())


def shard(cache: str) -> tuple[Path, str]:
    """The file of the first sample's latents."""
    file = Manifest.load(cache).read_index(cache)["vae_file"][0].as_py()
    return Path(cache, "vae", file), file


@pytest.mark.parametrize("column", ["key", "checksum", "input_latents", "input_latents_shape", "input_latents_dtype"])
def test_a_shard(cache: str, registered: None, column: str, tmp_path: Path) -> None:
    path, file = shard(cache)
    path.write_bytes(with_extension(path, column))
    refused = rf"{file}.* the column '{column}' holds .*'{NAME}'"
    for act in (
        lambda: CacheReader(cache).read([0]),
        lambda: CacheReader(cache, verify=False).read([0]),
        lambda: export_cache(cache, str(tmp_path / "out")),
        lambda: read_shard_header(cache, "vae", file),
        lambda: read_shard_header(cache, "vae", file, verify=True),
    ):
        with pytest.raises(CacheError, match=refused):
            act()
    (finding,) = verify_cache(cache)
    assert finding.kind == "damage" and NAME in finding.problem
    done = repair_cache(cache, prune=True)
    assert not done.committed and not path.exists() and Plain.asked == 0


def test_a_shard_of_an_interrupted_run(cache: str, registered: None) -> None:
    path, file = shard(cache)
    spare = "0" * 24 + ".parquet"
    path.with_name(spare).write_bytes(with_extension(path, "input_latents"))
    with pytest.raises(CacheError, match=NAME):
        read_shard_header(cache, "vae", spare)
    assert [removed for removed, _ in repair_cache(cache).removed] == [str(path.with_name(spare))]
    assert file in list_shards(cache, "vae") and Plain.asked == 0


@pytest.mark.parametrize("table", ["index", "quarantine"])
def test_index_and_quarantine(cache: str, registered: None, table: str) -> None:
    manifest_path = Path(cache, "manifest.json")
    content = json.loads(manifest_path.read_text())
    (part,) = content[f"{table}_parts"]
    data = with_extension(Path(cache, part["file"]), "source")
    part["file"] = f"{table}/{table_hash(data)}.parquet"
    Path(cache, part["file"]).write_bytes(data)
    manifest_path.write_text(json.dumps(content))
    reads: list[Callable[[], object]] = [lambda: verify_cache(cache), lambda: inspect_cache(cache)]
    if table == "index":
        reads += [lambda: CacheReader(cache), lambda: Manifest.load(cache).read_captions(cache)]
    for act in reads:
        with pytest.raises(CacheError, match=rf"the column 'source' holds .*'{NAME}'"):
            act()
    assert not repair_cache(cache).committed and Plain.asked == 0


def test_a_local_copy_of_a_remote_shard(cache: str, registered: None, tmp_path: Path) -> None:
    path, file = shard(cache)
    path.write_bytes(with_extension(path, "input_latents"))
    fs = fsspec.filesystem("memory")
    fs.put(cache, "/foreign-columns/cache", recursive=True)
    reader = CacheReader("memory://foreign-columns/cache", copies=LocalCopies(str(tmp_path / "copies"), 1 << 20))
    for _ in range(2):
        with pytest.raises(CacheError, match=rf"{file}.*{NAME}"):
            reader.read([0])
    assert Plain.asked == 0


def test_a_shard_with_other_columns(cache: str) -> None:
    """Also plain ones: a file of this cache has exactly those of its group."""
    path, _ = shard(cache)
    table = pq.read_table(path)
    number = pa.array([1] * table.num_rows)
    further = table
    for name in ("noise", "noise_shape", "noise_dtype"):
        further = further.append_column(
            name, pa.nulls(table.num_rows, table.schema.field(f"input_latents{name[5:]}").type)
        )
    wrong = {
        "the columns": table.append_column("more", number),
        r"is int64, not list": table.set_column(3, "input_latents_shape", number),
        "holds the parameters input_latents, noise, not input_latents": further,
    }
    for message, other in wrong.items():
        path.write_bytes(parquet(other))
        with pytest.raises(CacheError, match=message):
            CacheReader(cache).read([0])
        assert len(verify_cache(cache)) == 1
