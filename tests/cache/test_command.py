"""`python -m ray_diffsynth.cache`: inspect, verify, repair and export on a cache with known contents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ray_diffsynth.cache.__main__ import main
from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cache.reader import CacheReader
from ray_diffsynth.cache.store import GroupRow, write_shard
from ray_diffsynth.cache.verify import is_finite, verify_cache
from ray_diffsynth.preview import contact_sheet
from tests.shard_names import shard_file, stem

Sample = Callable[[int], dict[str, Any]]


def test_inspect_counts(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", cache, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["duplicates"], facts["quarantined"], facts["texts"]) == (12, 0, 1, 3)
    assert facts["buckets"] == {"32x64": 5, "64x64": 7} and set(facts["parameters"]) == {
        "input_latents",
        "prompt_embeds",
    }
    assert facts["bytes"] == sum(
        path.stat().st_size for name in ("vae", "text_encoder") for path in Path(cache, name).iterdir()
    )
    assert facts["reasons"] == {"MediaError": 1}
    assert main(["inspect", cache]) == 0
    assert "64x64         7  ####" in capsys.readouterr().out


def test_a_cache_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["verify"], ["repair"]):
        assert main([*command, str(tmp_path / "none")]) == 1
        assert "none is not there" in capsys.readouterr().err


def test_verify_is_silent_on_a_whole_cache(cache: str) -> None:
    assert verify_cache(cache) == [] and main(["verify", cache]) == 0


def damage_checksum(path: Path) -> None:
    data = path.read_bytes()
    table = pq.read_table(path)
    payload = table.column("input_latents")[0].as_py()
    at = data.index(payload)
    path.write_bytes(data[:at] + bytes([payload[0] ^ 1]) + data[at + 1 :])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "checksum": (damage_checksum, "checksum"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-50]), "cannot be read"),
    "absent": (lambda path: path.unlink(), "absent"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_damage_and_repair_leaves_what_stage_1_completes(cache: str, kind: str) -> None:
    path = next(Path(cache, "vae").iterdir())
    DAMAGE[kind][0](path)
    (finding,) = verify_cache(cache)
    assert finding.kind == "damage" and finding.path == str(path) and DAMAGE[kind][1] in finding.problem
    others = sorted(p for p in Path(cache, "vae").iterdir() if p != path)
    assert main(["verify", cache]) == 1 and main(["repair", cache]) == 0
    # Nobody trains on half a cache: it is open until stage 1 has run again.
    with pytest.raises(CacheError, match="no committed cache"):
        Manifest.load(cache)
    assert sorted(Path(cache, "vae").iterdir()) == others and len(list(Path(cache, "text_encoder").iterdir())) == 1


def test_nan_is_found(tmp_path: Path, make_cache: Callable[..., Manifest]) -> None:
    cache = str(tmp_path / "nan")
    manifest = make_cache(cache)
    index, quarantine = manifest.read_index(cache), manifest.read_quarantine(cache)
    bad = torch.full((1, 4, 2, 2), float("nan"))
    rows = [GroupRow(f"v{i}", {"input_latents": bad}) for i in range(3)]
    write_shard(cache, "vae", stem("32x64-0"), "32x64", rows, codec="planes-zstd")
    commit(cache, manifest, index, quarantine)
    (finding,) = verify_cache(cache)
    assert "input_latents holds NaN" in finding.problem
    assert is_finite({"a": [torch.zeros(2), 1, None]}) and not is_finite((torch.tensor(float("inf")),))


def test_orphans_and_unfinished_writes_are_told_and_pruned(cache: str, sample: Sample) -> None:
    write_shard(
        cache, "vae", stem("spare"), "64x64", [GroupRow("v99", {"input_latents": torch.zeros(1)})], codec="none"
    )
    half = Path(cache, "vae", ".x.parquet.tmp-12-0af3")
    half.write_bytes(b"half")
    before = Path(cache, "manifest.json").read_bytes()
    assert {finding.kind for finding in verify_cache(cache)} == {"orphan", "unfinished"} and main(
        ["verify", cache]
    ) == 0
    assert main(["repair", cache]) == 0
    assert not half.exists() and Path(cache, "vae", shard_file("spare")).exists()
    assert main(["repair", cache, "--prune"]) == 0
    assert verify_cache(cache) == [] and Path(cache, "manifest.json").read_bytes() == before
    assert torch.equal(CacheReader(cache).read([3])[0]["input_latents"], sample(3)["input_latents"])


def test_prune_drops_rows_that_no_sample_has(cache: str, sample: Sample) -> None:
    manifest = Manifest.load(cache)
    index = manifest.read_index(cache).filter([i not in (1, 6) for i in range(12)])
    counts = {"samples": 10, "quarantined": 1, "total": 11, "texts": 3}
    small = Manifest(**{**vars(manifest), "buckets": {"32x64": 4, "64x64": 6}, "counts": counts})
    captions = [f"caption {i}" for i in range(10)]
    commit(cache, small, index, manifest.read_quarantine(cache), captions)
    assert main(["repair", cache, "--prune"]) == 0
    pruned = Manifest.load(cache)
    assert verify_cache(cache) == [] and pruned.read_captions(cache) == captions
    keys = [
        key for path in Path(cache, "vae").iterdir() for key in pq.read_table(path, columns=["key"])["key"].to_pylist()
    ]
    assert sorted(keys) == sorted(f"v{i}" for i in range(12) if i not in (1, 6))
    assert pruned.group("vae").nbytes == sum(path.stat().st_size for path in Path(cache, "vae").iterdir())
    reader = CacheReader(cache)
    kept = [i for i in range(12) if i not in (1, 6)]
    for row, values in zip(kept, reader.read(range(10)), strict=True):
        assert all(torch.equal(values[name], value) for name, value in sample(row).items())
    assert torch.equal(reader.read_empty()["prompt_embeds"], sample(0)["prompt_embeds"])


def test_a_damaged_manifest_is_taken_away_and_a_newer_one_is_left(cache: str) -> None:
    path = Path(cache, "manifest.json")
    newer = path.read_text().replace('"version": 4', '"version": 99')
    path.write_text(newer)
    assert main(["repair", cache]) == 1 and path.read_text() == newer
    path.write_text(newer[:40])
    assert main(["repair", cache]) == 0 and not path.exists()
    assert len(list(Path(cache, "vae").glob("*.parquet"))) == 5


def test_export_is_plain_safetensors(cache: str, tmp_path: Path, sample: Sample) -> None:
    assert main(["export", cache, str(tmp_path / "out"), "--limit", "5"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["sample_id"] for line in lines] == [f"s{i}" for i in range(5)]
    for number, line in enumerate(lines):
        file = tmp_path / "out" / line["file"]
        tensors = load_file(file)
        assert all(torch.equal(tensors[name], value) for name, value in sample(number).items())
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"sample_id": line["sample_id"], "bucket": "32x64"}


def test_the_contact_sheet_has_a_line_a_sample() -> None:
    from PIL import Image

    entries = [(Image.new("RGB", (64, 32), "red"), "a.png", "a caption"), (Image.new("RGB", (32, 64), "blue"), "b", "")]
    sheet = contact_sheet(entries, side=64)
    assert sheet.getpixel((10, 10)) == (255, 0, 0) and sheet.width > 64 and sheet.height > 100


def test_verify_says_first_what_a_copy_lacks(cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in sorted(Path(cache, "vae").glob("*.parquet"))[1:]:
        path.unlink()
    assert main(["verify", cache]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "4 of the 5 files of" in lines[0] and sum("it is absent" in line for line in lines) == 4
