"""What a manifest or an index names is read and removed: so it is a file of the cache, or it is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_diffsynth import storage
from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.export import export_cache
from ray_diffsynth.cache.inspection import inspect_cache
from ray_diffsynth.cache.local_copy import LocalCopies
from ray_diffsynth.cache.manifest import GroupSpec, Manifest
from ray_diffsynth.cache.names import UnsafeNameError, check_group, check_shard, inside, is_group
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.repair import repair_cache
from ray_diffsynth.cache.store import GroupRow, list_shards, read_shard_header, write_shard
from ray_diffsynth.cache.tables import table_hash
from ray_diffsynth.cache.verify import verify_cache
from ray_diffsynth.preview import write_preview
from tests.shard_names import shard_file, stem

SHARD, TABLE = "0" * 24 + ".parquet", "1" * 32 + ".parquet"


def snapshot(folder: Path) -> dict[str, str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture
def victim(tmp_path: Path, cache: str) -> Path:
    """A folder beside the cache, with files that are named as a cache's are and hold what a cache's hold."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / SHARD).write_bytes(next(Path(cache, "vae").iterdir()).read_bytes())
    (folder / TABLE).write_bytes(next(Path(cache, "index").iterdir()).read_bytes())
    (folder / f".{SHARD}.tmp-1-ab").write_bytes(b"half")
    (folder / "notes.parquet").write_bytes(b"damaged")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened, or removed."""
    found: list[str] = []
    for name in ("read_bytes", "open_input", "remove"):
        real = getattr(storage, name)

        def recorded(path: str, *args: Any, real: Callable[..., Any] = real, **options: Any) -> Any:
            found.append(os.path.realpath(path))
            return real(path, *args, **options)

        monkeypatch.setattr(storage, name, recorded)
    return found


ROUTES: dict[str, Callable[[str, Path], object]] = {
    "repair": lambda cache, out: repair_cache(cache),
    "prune": lambda cache, out: repair_cache(cache, prune=True),
    "verify": lambda cache, out: verify_cache(cache),
    "inspect": lambda cache, out: inspect_cache(cache),
    "export": lambda cache, out: export_cache(cache, str(out)),
    "preview": lambda cache, out: write_preview(cache, str(out), str(out / "p.png")),
    "reader": lambda cache, out: [CacheReader(cache).read(range(12)), CacheReader(cache).read_empty()],
    "copies": lambda cache, out: CacheReader(cache, copies=LocalCopies(str(out), 1 << 20)).read(range(12)),
}


def refused(cache: str, victim: Path, reads: list[str], named: str, routes: Any = ROUTES) -> None:
    before, root = snapshot(victim.parent), os.path.realpath(cache)
    for name in routes:
        out = victim.parent / "out"
        with pytest.raises(CacheError) as caught:
            ROUTES[name](cache, out)
        assert repr(named)[1:-1] in str(caught.value), name
        assert name not in ("repair", "prune") or str(caught.value).startswith("nothing was removed")
    assert {path: content for path, content in snapshot(victim.parent).items() if path[:3] != "out"} == before
    assert [path for path in reads if not path.startswith(root + os.sep)] == []


def bad_files(victim: Path, name: str, folder: str = "") -> list[str]:
    return [
        str(victim / name),
        f"../victim/{name}",
        f"{folder}../victim/{name}",
        f"file://{victim / name}",
        f"memory://victim/{name}",
        f"s3://victim/{name}",
        f"simplecache::s3://victim/{name}",
        f"{folder}..\\victim\\{name}",
        f"{folder}./{name}",
        f"{folder}/{name}",
        f"{folder}{name.upper()}",
        f"{folder}{name}\n",
        f"{folder}notes.parquet",
        f"{folder}{name}/..",
        f"{folder}.{name}",
        "manifest.json",
        "..",
    ]


@pytest.mark.parametrize("table", ["index", "quarantine"])
def test_tables(cache: str, victim: Path, reads: list[str], table: str) -> None:
    path = Path(cache, "manifest.json")
    content = json.loads(path.read_text())
    other = "quarantine" if table == "index" else "index"
    for name in [*bad_files(victim, TABLE, f"{table}/"), f"{other}/{TABLE}", TABLE]:
        named = [{"file": name, "rows": 1}]
        for parts in (named, [*content[f"{table}_parts"], *named]):
            path.write_text(json.dumps({**content, f"{table}_parts": parts}))
            refused(cache, victim, reads, name)
        older = replace(Manifest.from_dict(content), version=3).to_dict()
        path.write_text(json.dumps({**older, f"{table}_file": name}))
        refused(cache, victim, reads, name)


def test_groups(cache: str, victim: Path, reads: list[str]) -> None:
    path = Path(cache, "manifest.json")
    content = json.loads(path.read_text())
    vae, text = content["groups"]
    for name in [
        str(victim),
        "../victim",
        "..",
        ".",
        "vae/../../victim",
        "a\\b",
        "memory://x",
        "index",
        ".git",
        "Index",
    ]:
        path.write_text(json.dumps({**content, "groups": [{**vae, "name": name}, text]}))
        refused(cache, victim, reads, name)
    for name in bad_files(victim, SHARD):
        path.write_text(json.dumps({**content, "groups": [vae, {**text, "empty_at": [name, 0, 0]}]}))
        refused(cache, victim, reads, name)


def with_files(cache: str, name: str | None) -> None:
    """Commit, past the checks, an index whose second sample's latents lie in the file of this name."""
    path = Path(cache, "manifest.json")
    content = json.loads(path.read_text())
    (part,) = content["index_parts"]
    table = pq.read_table(Path(cache, part["file"]))
    files = table["vae_file"].to_pylist()
    files[1] = name
    table = table.set_column(table.schema.get_field_index("vae_file"), "vae_file", pa.array(files, pa.string()))
    out = pa.BufferOutputStream()
    pq.write_table(table, out)
    data = out.getvalue()
    part["file"] = f"index/{table_hash(data)}.parquet"
    Path(cache, part["file"]).write_bytes(data)
    path.write_text(json.dumps(content))


def test_files_that_the_index_names(cache: str, victim: Path, reads: list[str]) -> None:
    for name in bad_files(victim, SHARD):
        with_files(cache, name)
        refused(cache, victim, reads, name)
    with_files(cache, None)
    with pytest.raises(CacheError, match="has no vae_file for some sample"):
        CacheReader(cache)


def test_a_remote_cache(cache: str, victim: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in (str(victim / SHARD), "../victim.parquet", f"memory://names/victim/{SHARD}"):
        with_files(cache, name)
        fs.put(cache, "/names/cache", recursive=True)
        before = snapshot(victim)
        for act in (
            lambda: CacheReader("memory://names/cache", copies=LocalCopies(str(tmp_path / "c"), 9999)).read([1]),
            lambda: repair_cache("memory://names/cache", prune=True),
        ):
            with pytest.raises(CacheError, match=r"is not the name of a file of a group"):
                act()
        assert snapshot(victim) == before and list((tmp_path / "c").glob("*.copy")) == []
        fs.rm("/names/cache", recursive=True)


def test_a_commit_writes_no_such_names(cache: str, victim: Path) -> None:
    manifest = Manifest.load(cache)
    index, quarantine = manifest.read_index(cache), manifest.read_quarantine(cache)
    before = snapshot(victim.parent)
    for name in bad_files(victim, SHARD):
        files = pa.array([name] * 12, pa.string())
        wrong = index.set_column(index.column_names.index("vae_file"), "vae_file", files)
        with pytest.raises(UnsafeNameError):
            commit(cache, manifest, wrong, quarantine)
    for name in (str(victim), "..", "index"):
        renamed = index.rename_columns([column.replace("vae", name) for column in index.column_names])
        groups = (GroupSpec(name=name, parameters=("input_latents",), fingerprint="f"), manifest.groups[1])
        with pytest.raises(UnsafeNameError):
            commit(cache, Manifest(**{**vars(manifest), "groups": groups}), renamed, quarantine)
    for name in ("texts", "../x", str(victim / "x")):
        with pytest.raises(UnsafeNameError):
            write_shard(cache, "vae", name, "all", [GroupRow("k", {"x": torch.ones(1)})], codec="none")
    with pytest.raises(UnsafeNameError):
        write_shard(cache, "../victim", "0" * 24, "all", [GroupRow("k", {"x": torch.ones(1)})], codec="none")
    assert snapshot(victim.parent) == before


def test_a_commit_touches_nothing_that_the_manifest_before_it_names(cache: str, victim: Path) -> None:
    manifest = Manifest.load(cache)
    index, quarantine = manifest.read_index(cache), manifest.read_quarantine(cache)
    path = Path(cache, "manifest.json")
    content = json.loads(path.read_text())
    index_parts, quarantine_parts = (
        [{"file": file, "rows": 1}] for file in (str(victim / TABLE), f"../victim/{TABLE}")
    )
    path.write_text(json.dumps({**content, "index_parts": index_parts, "quarantine_parts": quarantine_parts}))
    before = snapshot(victim)
    assert commit(cache, manifest, index, quarantine) == manifest and snapshot(victim) == before


def test_what_an_interrupted_commit_left_goes_with_the_next(cache: str) -> None:
    manifest = Manifest.load(cache)
    index, quarantine = manifest.read_index(cache), manifest.read_quarantine(cache)
    for folder in ("index", "quarantine"):
        Path(cache, folder, TABLE).write_bytes(b"of a commit that never ended")
        Path(cache, folder, "mine.parquet").write_bytes(b"another program's")
    commit(cache, manifest, index, quarantine)
    for folder in ("index", "quarantine"):
        assert not Path(cache, folder, TABLE).exists() and Path(cache, folder, "mine.parquet").exists()


def move_out(path: Path, to: Path) -> None:
    """Put a link where a file or folder of the cache was."""
    path.rename(to)
    path.symlink_to(to)


LINKS = {
    "index": ROUTES.keys(),
    "quarantine": ["repair", "prune", "verify", "inspect"],
    "vae": ["repair", "prune", "verify", "inspect", "export", "reader", "copies"],
    f"vae/{shard_file('32x64-0')}": ["repair", "prune", "verify", "export", "reader", "copies"],
    "manifest.json": ROUTES.keys(),
}


@pytest.mark.parametrize("place", LINKS)
def test_links_out_of_the_cache(cache: str, victim: Path, place: str) -> None:
    target = victim / Path(place).name
    move_out(Path(cache, place), target)
    refused(cache, victim, [], place, LINKS[place])
    manifest = Path(cache, "manifest.json")
    if place in ("index", "quarantine"):
        whole = Manifest.load(cache)
        table = pq.read_table(Path(cache, whole.index_parts[0].file)).drop_columns(["caption"])
        before = snapshot(victim)
        with pytest.raises(UnsafeNameError, match="is a link out of the cache"):
            commit(cache, whole, table, pq.read_table(Path(cache, whole.quarantine_parts[0].file)))
        assert snapshot(victim) == before
    elif place == "vae":
        for act in (lambda: list_shards(cache, "vae"), lambda: read_shard_header(cache, "vae", SHARD)):
            with pytest.raises(UnsafeNameError, match="is a link out of the cache"):
                act()
    assert manifest.exists()


@pytest.mark.parametrize("committed", [True, False])
def test_a_linked_folder_that_the_manifest_does_not_name_is_left_alone(
    cache: str, victim: Path, committed: bool
) -> None:
    Path(cache, "pictures").symlink_to(victim)
    if not committed:
        Path(cache, "manifest.json").unlink()
    before = snapshot(victim)
    repair_cache(cache, prune=True)
    assert snapshot(victim) == before


def test_a_cache_behind_a_link_and_links_within_it_are_used(cache: str, tmp_path: Path) -> None:
    file = Path(cache, "vae", shard_file("32x64-0"))
    move_out(file, Path(cache, "moved"))
    (tmp_path / "link").symlink_to(cache)
    reader = CacheReader(str(tmp_path / "link"))
    assert len(reader.read(range(12))) == 12 and verify_cache(str(tmp_path / "link")) == []


def test_forms() -> None:
    for name in ("vae", "text_encoder", "text_encoder+vae", "my.model-2", "größe"):
        assert is_group(name)
        check_group(name, "here")
    check_shard(f"{stem('x')}.parquet", "here")
    assert inside("s3://bucket/cache", "vae", SHARD) == f"s3://bucket/cache/vae/{SHARD}"
