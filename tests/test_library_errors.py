"""What libraries raise beside their documented errors, for files and modules of others, is told in a line too."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import ray.exceptions
from PIL import Image

from ray_diffsynth.config import GenerateConfig, TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.data.archives.tars import read_tars
from ray_diffsynth.data.formats import DatasetError
from ray_diffsynth.data.formats.json_rows import read_json, read_jsonl
from ray_diffsynth.data.spec import file_list
from ray_diffsynth.models import folder, hub
from ray_diffsynth.models.fingerprint import file_digest
from ray_diffsynth.models.folder import ModelFolderError
from ray_diffsynth.models.locate import ModelSource, locate_model
from ray_diffsynth.pipelines.registry import FamilyError, family_of
from ray_diffsynth.plan.prompts import prompts_of
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.report.sample_grids import GridInfo, encode_grid, read_grid_info
from ray_diffsynth.training.report.trackers import TrackerError, _import

DEEP = "[" * 100_000 + "]" * 100_000
LONG_NUMBER = "1" * 5000


@pytest.mark.parametrize("value", [DEEP, LONG_NUMBER], ids=["deep", "long number"])
def test_a_metadata_row_that_python_cannot_read(value: str, tmp_path: Path) -> None:
    """RecursionError, and a ValueError that is no JSONDecodeError."""
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"image": "a.png", "prompt": "a"}}\n{{"image": "b.png", "extra": {value}}}\n')
    good, bad = read_jsonl(str(path)).rows
    assert good.values == {"image": "a.png", "prompt": "a"} and bad.values is None and "line 2 is not JSON" in bad.error
    path = tmp_path / "m.json"
    path.write_text(f"[{value}]")
    with pytest.raises(DatasetError, match=r"m\.json"):
        read_json(str(path))


def test_a_list_of_files_nested_without_end() -> None:
    assert file_list(DEEP) == DEEP


def tar(path: Path, members: dict[str, bytes], headers: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(data), (headers or {}) if name == "bad.txt" else {}
            archive.addfile(member, io.BytesIO(data))


def test_a_tar_whose_header_holds_no_number(tmp_path: Path) -> None:
    """The map of a sparse file: tarfile reads it with int(), whose ValueError is no TarError."""
    tar(tmp_path / "a.tar", {"a.png": b"1", "a.txt": b"one"})
    tar(tmp_path / "b.tar", {"bad.txt": b"x"}, {"GNU.sparse.size": "1", "GNU.sparse.map": "no,number"})
    raw = read_tars(str(tmp_path), ["a.tar", "b.tar"], "image", "prompt")
    assert [row.values["prompt"] for row in raw.rows if row.values] == ["one"]
    assert any("b.tar cannot be read to its end" in row.error for row in raw.rows if row.values is None)


def test_json_in_a_tar_nested_without_end(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"a.png": b"1", "a.json": f'{{"x": {DEEP}}}'.encode()})
    (row,) = read_tars(str(tmp_path), ["a.tar"], "image", "prompt").rows
    assert row.values is None and "a.json" in row.error


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"resources: {DEEP}\n", "cannot be read"),
        ("seed: 2024-13-45\n", "2024-13-45"),
        ("seed: 2024-01-01\n", "2024-01-01"),
        ("resources: &a {GPU: *a}\n", "run.yaml"),
        ("seed: !!set {a, b}\n", "which no option takes"),
    ],
    ids=["deep", "no date", "date", "itself", "set"],
)
def test_yaml_of_what_no_option_is(text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, ["--model", "m", "--dataset_base_path", "d", "--config", str(path)])
    assert stop.value.code == 2 and told in capsys.readouterr().err


def test_prompts_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").mkdir()
    with pytest.raises(DatasetError, match="cannot be read: .*Is a directory"):
        prompts_of(GenerateConfig(model="m", prompt_path=str(tmp_path / "prompts.txt")), {})


@pytest.mark.parametrize(
    "text", [DEEP, "{", "[]", "\ufeff{}", LONG_NUMBER], ids=["deep", "cut", "list", "mark", "long"]
)
def test_a_models_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFolderError, match="model_index.json"):
        folder.read_json_object(tmp_path / "model_index.json")
    with pytest.raises(FamilyError, match="model_index.json"):
        family_of(tmp_path)


@pytest.mark.parametrize("family", ["qwen_image", "flux", "wan"])
def test_a_parts_configuration_that_is_none(family: str, tmp_path: Path) -> None:
    from ray_diffsynth.pipelines.registry import get_pipeline_class

    for part in ("vae", "scheduler"):
        (tmp_path / part).mkdir()
        (tmp_path / part / ("config.json" if part == "vae" else "scheduler_config.json")).write_text("{")
    with pytest.raises(ModelFolderError, match="not JSON"):
        get_pipeline_class(family).configured(ModelSource(root=str(tmp_path), model_id="m"))


@pytest.mark.parametrize("error", [RuntimeError("Data processing error: CAS service"), KeyError("x"), TypeError("x")])
def test_whatever_the_hubs_client_raises(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelFolderError, match=rf"model 'owner/name' was not found.*{type(error).__name__}"):
        hub.find_repository("owner/name", [], base_path=str(tmp_path), complete=lambda root: True)
    error = OSError(28, "No space left on device", "/hub")
    with pytest.raises(OSError, match="No space left"):
        hub.find_repository("owner/name", [], base_path=str(tmp_path), complete=lambda root: True)


def test_a_damaged_index_in_the_hubs_cache_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text("{")
    asked: list[object] = []

    def download(*arguments: object, **options: object) -> str:
        asked.append(options.get("local_files_only"))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate_model("owner/name", base_path="/no_such_folder").root == str(tmp_path)
    assert asked == [True, None], "the hub is asked for what the cache holds damaged"


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container: no HOME, and a number that no account has."""
    (tmp_path / "weights").write_bytes(b"1")
    before = file_digest(tmp_path / "weights")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    monkeypatch.chdir(tmp_path)
    assert file_digest(tmp_path / "weights") == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"], "nothing is written into a folder named ~"
    with pytest.raises(ModelFolderError, match="cannot be looked up as a path"):
        hub.find_repository("~/model", [], complete=lambda root: True)


def test_a_tracker_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_tracker.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(TrackerError, match="TypeError: Descriptors cannot be created directly; install it"):
        _import("broken_tracker", "wandb")
    sys.modules.pop("broken_tracker", None)


def test_a_sample_grid_that_is_damaged() -> None:
    shown = GridInfo("Step 1", ["a cat"], {"seed": 1})
    data = encode_grid(Image.new("RGB", (64, 64), "red"), shown)
    assert read_grid_info(data) == shown
    for size in range(0, len(data), 7):
        assert read_grid_info(data[:size]) in (None, shown)
    for place in range(0, len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        read_grid_info(bytes(damaged))


def test_metrics_with_a_line_that_is_none(tmp_path: Path) -> None:
    lines = [json.dumps({"step": 1}), LONG_NUMBER, DEEP, '{"step": ', json.dumps({"step": 2})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(str(tmp_path)) == [{"step": 1}, {"step": 2}]


def test_an_actors_error_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_diffsynth.generate.pool import _Pool

    class Item:
        file, prompt, seed = "a.png", "a cat", 1

    pool = object.__new__(_Pool)
    pool._given, pool._failures, pool._on_done = [{"task": Item()}], {}, lambda count: None

    def lost(task: object) -> None:
        raise ray.exceptions.RaySystemError("Failed to unpickle\nserialized exception")

    monkeypatch.setattr("ray.get", lost)
    pool._settle(0, "task")
    assert pool._failures["a.png"].startswith("RaySystemError: ") and "\n" not in pool._failures["a.png"]
    assert pool._given == [{}]
