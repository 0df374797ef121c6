from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_diffsynth.errors import UserError
from ray_diffsynth.models.locate import ModelFolderError, locate_model

MakeModel = Callable[[Path], Path]
STAGE_1 = "text_encoder/model*.safetensors", "vae/diffusion_pytorch_model.safetensors"
STAGE_2 = "transformer/diffusion_pytorch_model*.safetensors"


def test_a_local_folder(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "my model")
    source = locate_model(str(root))
    assert source.root == str(root)
    assert source.parts is None
    assert source.has("vae") and not source.has("image_encoder") and not source.has("tokenizer")
    assert [p.name for p in source.weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]
    assert len(source.weight_files("transformer")) == 2
    assert source.companion("tokenizer") == root / "tokenizer"


def test_a_relative_folder_becomes_absolute(make_model: MakeModel) -> None:
    make_model(Path("qwen"))
    assert Path(locate_model("qwen").root).is_absolute()


@pytest.mark.parametrize("where", ["env", "default", "argument"])
def test_the_base_path(where: str, tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"env": tmp_path / "e", "default": Path("models"), "argument": tmp_path / "a"}[where]
    if where == "env":
        monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(base))
    root = make_model(base / "Qwen/Qwen-Image")
    source = locate_model("Qwen/Qwen-Image", base_path=str(base) if where == "argument" else None)
    assert Path(source.root) == root.absolute()
    assert source.model_id == "Qwen/Qwen-Image"


def hub_snapshot(hub: Path, make_model: MakeModel, *, without: tuple[str, ...] = ()) -> Path:
    repository = hub / "models--Qwen--Qwen-Image"
    snapshot = repository / "snapshots" / ("0" * 40)
    staged = make_model(hub / "staged")
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in staged.rglob("*") if p.is_file())):
        name = file.relative_to(staged)
        if name.as_posix() in without:
            continue
        blob = repository / "blobs" / f"{number:040x}"
        shutil.move(file, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    shutil.rmtree(staged)
    return snapshot


def test_the_hugging_face_cache(isolated: Path, make_model: MakeModel) -> None:
    snapshot = hub_snapshot(isolated, make_model)
    source = locate_model("Qwen/Qwen-Image")
    assert Path(source.root) == snapshot
    assert source.has("transformer") and source.weight_files("text_encoder")
    by_pattern = locate_model(None, model_id_with_origin_paths=f"Qwen/Qwen-Image:{STAGE_2}")
    assert Path(by_pattern.root) == snapshot


def test_a_cache_that_is_not_complete_is_used_when_offline_and_says_what_is_missing(
    isolated: Path, make_model: MakeModel
) -> None:
    hub_snapshot(isolated, make_model, without=("transformer/diffusion_pytorch_model-00002-of-00002.safetensors",))
    source = locate_model("Qwen/Qwen-Image")
    assert source.weight_files("vae")
    with pytest.raises(ModelFolderError, match="00002-of-00002"):
        source.weight_files("transformer")
    with pytest.raises(ModelFolderError, match="00002-of-00002"):
        locate_model(None, model_id_with_origin_paths=f"Qwen/Qwen-Image:{STAGE_2}")


def test_a_download_asks_for_configs_tokenizers_and_the_wanted_weights_only(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(model: str, **options: object) -> str:
        if options.get("local_files_only"):
            raise FileNotFoundError(model)
        patterns = options["allow_patterns"]
        assert isinstance(patterns, list)
        asked.append(patterns)
        return str(make_model(tmp_path / "download"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate_model("Qwen/Qwen-Image", wanted=["vae"])
    locate_model("Qwen/Qwen-Image")
    locate_model(None, model_id_with_origin_paths=f"Qwen/Qwen-Image:{STAGE_2}")
    locate_model(None, model_id_with_origin_paths="Qwen/Qwen-Image:vae/")
    for patterns in asked:
        assert {"*.json", "*.txt"} <= set(patterns)
    assert [[p for p in patterns if "safetensors" in p] for patterns in asked] == [
        ["vae/*.safetensors"],
        ["*/*.safetensors"],
        [STAGE_2],
        ["vae/*.safetensors"],
    ]


def test_offline_the_error_lists_every_place(isolated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", "/somewhere")
    with pytest.raises(ModelFolderError) as caught:
        locate_model("Qwen/Qwen-Image")
    message = str(caught.value)
    for part in (
        str(Path("Qwen/Qwen-Image").absolute()),
        "/somewhere/Qwen/Qwen-Image",
        str(isolated),
        "the hub",
        "set DIFF",
    ):
        assert part in message
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("model", ["/no/such/folder", "./absent", "a/b/c"])
def test_a_path_that_is_absent_is_not_looked_for_on_the_hub(model: str) -> None:
    with pytest.raises(ModelFolderError, match="does not exist"):
        locate_model(model)


def test_the_guides_two_commands(tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    root = make_model(tmp_path / "Qwen/Qwen-Image")
    first = locate_model(None, model_id_with_origin_paths=",".join(f"Qwen/Qwen-Image:{p}" for p in STAGE_1))
    assert first.parts == {"text_encoder", "vae"}
    assert first.has("vae") and not first.has("transformer")
    assert first.root == str(root)
    assert first.companion("tokenizer") == root / "tokenizer"
    assert first.folders == ()
    second = locate_model(None, model_id_with_origin_paths=f"Qwen/Qwen-Image:{STAGE_2}")
    assert second.parts == {"transformer"}
    assert len(second.weight_files("transformer")) == 2


def test_the_id_may_be_a_folder_and_stage_2_needs_no_encoders(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "Qwen Image")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(root / part)
    assert locate_model(str(root)).has("transformer")
    source = locate_model(None, model_id_with_origin_paths=f"{root}:{STAGE_2}")
    assert source.root == str(root) and source.has("transformer")


def test_parts_of_two_models(tmp_path: Path, make_model: MakeModel) -> None:
    edit, base = make_model(tmp_path / "edit"), make_model(tmp_path / "base")
    shutil.rmtree(edit / "tokenizer")
    source = locate_model(None, model_id_with_origin_paths=f"{base}:{STAGE_1[0]}, {edit}:{STAGE_2},{base}:vae/")
    assert source.root == str(edit)  # the transformer's: it decides the family
    assert source.folder("text_encoder") == base / "text_encoder"
    assert source.folder("vae") == base / "vae"
    assert source.companion("tokenizer") == base / "tokenizer"


def test_a_pattern_that_matches_nothing_lists_the_files(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    with pytest.raises(ModelFolderError, match=r"transformer/model\*.* matches nothing.*vae/diffusion_pytorch_model"):
        locate_model(None, model_id_with_origin_paths=f"{root}:transformer/model*.safetensors")


def test_a_pattern_that_picks_some_of_the_shards(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    with pytest.raises(ModelFolderError, match="leaves out diffusion_pytorch_model-00002-of-00002"):
        locate_model(None, model_id_with_origin_paths=f"{root}:transformer/*00001*.safetensors")


def test_a_pattern_may_pick_another_variant(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    (root / "vae/diffusion_pytorch_model.fp16.safetensors").write_text("half")
    one = locate_model(None, model_id_with_origin_paths=f"{root}:vae/*fp16.safetensors")
    assert [p.name for p in one.weight_files("vae")] == ["diffusion_pytorch_model.fp16.safetensors"]
    both = locate_model(None, model_id_with_origin_paths=f"{root}:vae/diffusion_pytorch_model*.safetensors")
    assert [p.name for p in both.weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("how", ["pattern", "model"])
def test_a_part_without_config(how: str, tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    (root / "vae/config.json").unlink()
    with pytest.raises(ModelFolderError, match=r"vae has no config.json.*copy config.json"):
        if how == "pattern":
            locate_model(None, model_id_with_origin_paths=f"{root}:vae/*.safetensors")
        else:
            locate_model(str(root)).weight_files("vae")


def test_a_folder_that_is_no_model(tmp_path: Path, make_model: MakeModel) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/cat.png").write_text("")
    with pytest.raises(ModelFolderError, match=r"not a model in diffusers layout.*cat\.png"):
        locate_model(str(tmp_path / "pictures"))
    root = make_model(tmp_path / "m")
    with pytest.raises(ModelFolderError, match="one part"):
        locate_model(str(root / "vae"))
    with pytest.raises(ModelFolderError, match="is a file"):
        locate_model(str(root / "model_index.json"))


def test_pickles_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    (root / "vae/diffusion_pytorch_model.safetensors").rename(root / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="pickle"):
        locate_model(None, model_id_with_origin_paths=f"{root}:vae/*.bin")
    with pytest.raises(ModelFolderError, match="pickle"):
        locate_model(str(root)).weight_files("vae")


def test_model_paths(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    (root / "vae").rename(tmp_path / "my-autoencoder")
    shards = sorted(str(p) for p in (root / "transformer").glob("*.safetensors"))
    paths = json.dumps([str(tmp_path / "my-autoencoder/diffusion_pytorch_model.safetensors"), shards])
    source = locate_model(None, model_paths=paths, tokenizer_path=str(root / "tokenizer"))
    assert source.parts == {"vae", "transformer"}
    assert source.root == str(root)
    assert source.folder("vae") == tmp_path / "my-autoencoder"
    assert source.companion("tokenizer") == root / "tokenizer"
    for bad in ("a.safetensors", "[1]", '["/absent.safetensors"]'):
        with pytest.raises(ModelFolderError, match="--model_paths"):
            locate_model(None, model_paths=bad)


def test_tokenizer_path_by_id(tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    root = make_model(tmp_path / "Qwen/Qwen-Image")
    vae = f"{root}:vae/*.safetensors"
    for text in ("Qwen/Qwen-Image:tokenizer/", "Qwen/Qwen-Image"):
        source = locate_model(None, model_id_with_origin_paths=vae, tokenizer_path=text)
        assert source.companion("tokenizer") == root / "tokenizer"
    with pytest.raises(ModelFolderError, match="matches nothing"):
        locate_model(None, model_id_with_origin_paths=vae, tokenizer_path="Qwen/Qwen-Image:absent/")


def test_a_missing_companion_names_the_flag(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    shutil.rmtree(root / "tokenizer")
    with pytest.raises(ModelFolderError, match="--tokenizer_path"):
        locate_model(str(root)).companion("tokenizer")


def test_nothing_or_too_much_given(tmp_path: Path, make_model: MakeModel) -> None:
    root = make_model(tmp_path / "m")
    with pytest.raises(ModelFolderError, match="no model is given"):
        locate_model(None)
    with pytest.raises(ModelFolderError, match="not both"):
        locate_model(str(root), model_id_with_origin_paths=f"{root}:vae/")
    with pytest.raises(ModelFolderError, match="inside the model"):
        locate_model(None, model_id_with_origin_paths=f"{root}:../vae/*")


def test_two_folders_for_one_part(tmp_path: Path, make_model: MakeModel) -> None:
    a, b = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    with pytest.raises(ModelFolderError, match="two folders are named for the part vae"):
        locate_model(None, model_id_with_origin_paths=f"{a}:vae/,{b}:vae/")


def test_no_torch() -> None:
    code = (
        "import sys, ray_diffsynth.models.locate, ray_diffsynth.models.fingerprint, huggingface_hub; "
        "assert not {'torch', 'transformers', 'diffusers', 'ray'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
