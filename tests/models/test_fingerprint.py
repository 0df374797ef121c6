from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_diffsynth.models.fingerprint import file_digest, part_fingerprint
from ray_diffsynth.models.locate import ModelFolderError, locate_model

MakeModel = Callable[[Path], Path]


def age(path: Path, seconds: float = 60.0) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def memos(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "xdg/ray_diffsynth/fingerprints").glob("*"))


def test_equal_for_a_copy_and_another_for_other_weights(tmp_path: Path, make_model: MakeModel) -> None:
    a, b = locate_model(str(make_model(tmp_path / "a"))), locate_model(str(make_model(tmp_path / "b")))
    for part in ("vae", "transformer", "text_encoder", "tokenizer"):
        assert part_fingerprint(a, part) == part_fingerprint(b, part)
    assert part_fingerprint(a, "vae") != part_fingerprint(a, "text_encoder")
    (tmp_path / "b/vae/diffusion_pytorch_model.safetensors").write_text("other weight")
    assert part_fingerprint(a, "vae") != part_fingerprint(b, "vae")
    (tmp_path / "b/tokenizer/tokenizer_config.json").write_text('{"x": 1}')
    assert part_fingerprint(a, "tokenizer") != part_fingerprint(b, "tokenizer")


def test_the_config_counts_but_not_who_saved_it(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "a")
    source = locate_model(str(root))
    before = part_fingerprint(source, "vae")
    config = json.loads((root / "vae/config.json").read_text())
    (root / "vae/config.json").write_text(json.dumps({"_diffusers_version": "9.9", **config}, indent=4))
    assert part_fingerprint(source, "vae") == before
    (root / "vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.5]}))
    assert part_fingerprint(source, "vae") != before


def test_only_the_weights_that_are_loaded_count(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "a")
    source = locate_model(str(root))
    before = part_fingerprint(source, "vae")
    (root / "vae/diffusion_pytorch_model.fp16.safetensors").write_text("half")
    assert part_fingerprint(source, "vae") == before
    half = locate_model(None, model_id_with_origin_paths=f"{root}:vae/*fp16*")
    assert part_fingerprint(half, "vae") != before


def test_a_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_text("weights")
    age(file)
    file_digest(file)
    (memo,) = memos(tmp_path)
    memo.write_text(memo.read_text().replace(file_digest(file), "remembered"))
    assert file_digest(file) == "remembered"


def test_a_change_is_noticed_even_with_the_old_time_and_size(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_text("weights")
    age(file)
    stat = file.stat()
    first = file_digest(file)
    file.write_text("WEIGHTS")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(file) != first


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_text("weights")
    file_digest(file)
    assert memos(tmp_path) == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stamp": 1}', "\x00\xff"])
def test_a_damaged_memo_is_replaced(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_text("weights")
    age(file)
    first = file_digest(file)
    (memo,) = memos(tmp_path)
    memo.write_text(damage)
    assert file_digest(file) == first
    assert json.loads(memo.read_text())["digest"] == first
    assert memos(tmp_path) == [memo]  # no temporary file is left


def test_a_cache_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    file = tmp_path / "w.safetensors"
    file.write_text("weights")
    age(file)
    assert file_digest(file) == file_digest(file)
    assert "not remembered" in caplog.text


def test_a_missing_part_is_an_error(tmp_path: Path, make_model: MakeModel) -> None:
    source = locate_model(str(make_model(tmp_path / "a")))
    with pytest.raises(ModelFolderError, match="image_encoder"):
        part_fingerprint(source, "image_encoder")
