"""What a configuration says of columns and settings reaches somebody, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.buckets import BucketError
from ray_diffsynth.data.samples import PIXEL_TRANSFORMS, bucket_of
from ray_diffsynth.data.scan import SourceFile
from ray_diffsynth.models.locate import locate_model
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.columns import check_columns, dataset_spec
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.core.settings import settings_of
from ray_diffsynth.pipelines.core.stages import check_caption_dropout, plan_stages
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.core.versions import CacheKeyError
from ray_diffsynth.pipelines.flux import FluxPipeline
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.pipelines.qwen_image_edit import QwenImageEditPipeline
from ray_diffsynth.pipelines.qwen_image_edit_plus import QwenImageEditPlusPipeline
from ray_diffsynth.pipelines.shared.image_pipeline import SamplingDefaults
from ray_diffsynth.pipelines.wan.pipeline import WanPipeline
from ray_diffsynth.pipelines.wan_i2v import WanImageToVideoPipeline
from ray_diffsynth.plan.cache_keys import GroupPlan, plan_group
from ray_diffsynth.plan.library_versions import counted_version
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.tasks import SFT, DirectDistill
from ray_diffsynth.training.identity import identity as run_identity
from tests.training.helpers import make_config


def config(**options: Any) -> PreprocessConfig:
    return PreprocessConfig(model="m", dataset_base_path="d", output_path="out", **options)


@pytest.mark.parametrize(
    ("pipeline", "options", "message"),
    [
        (QwenImagePipeline, {"extra_inputs": "blockwise_controlnet_image"}, "blockwise_controlnet_image: nothing of"),
        (QwenImagePipeline, {"extra_inputs": "edit_image"}, "family qwen_image reads it.*task read .*input_image"),
        (WanPipeline, {"extra_inputs": "input_image,control_video"}, "control_video"),
        (QwenImagePipeline, {"data_file_keys": "image,mask"}, "--data_file_keys mask: .* --extra_inputs too"),
    ],
)
def test_a_column_that_nobody_reads_is_refused(
    pipeline: type[BasePipeline], options: dict[str, str], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        check_columns(pipeline.skeleton(), SFT(), config(**options))


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [
        (QwenImagePipeline, {}),
        (QwenImageEditPipeline, {"extra_inputs": "edit_image", "data_file_keys": "image,edit_image"}),
        (WanImageToVideoPipeline, {"extra_inputs": "input_image"}),
        (WanImageToVideoPipeline, {"data_file_keys": "image,video"}),
    ],
)
def test_a_column_that_is_read_passes(pipeline: type[BasePipeline], options: dict[str, str]) -> None:
    check_columns(pipeline.skeleton(), SFT(), config(**options))


def test_columns_of_a_task_and_of_units_that_do_not_declare() -> None:
    pipe, columns = QwenImagePipeline.skeleton(), ",".join(DirectDistill.columns)
    check_columns(pipe, DirectDistill(), config(task="direct_distill:data_process", extra_inputs=columns))
    pipe.units.append(PipelineUnit(take_over=True))
    check_columns(pipe, SFT(), config(extra_inputs="anything"))


def test_both_stages_refuse_it(tiny_qwen: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"extra_inputs": "blockwise_controlnet_image", "dataset_base_path": str(tmp_path)}
    with pytest.raises(PipelineError, match="nothing of the family qwen_image reads it"):
        RunPlan.resolve(PreprocessConfig(model=str(tiny_qwen), output_path=str(tmp_path / "cache"), **given))
    with pytest.raises(PipelineError, match="nothing of the family qwen_image reads it"):
        RunPlan.resolve(
            make_config(tiny_qwen, tmp_path, tmp_path, task="sft", extra_inputs="blockwise_controlnet_image")
        )


# ---------------------------------------------------------------- settings


def test_settings_of_the_family_the_task_and_the_command_line() -> None:
    pipe = FluxPipeline.skeleton()
    assert settings_of(pipe, SFT(), None)["embedded_guidance"] == 1.0
    assert settings_of(pipe, DirectDistill(), None)["embedded_guidance"] == 3.5
    given = settings_of(pipe, DirectDistill(), {"embedded_guidance": 2, "tiled": True, "max_sequence_length": 256})
    assert (given["embedded_guidance"], given["tiled"], given["max_sequence_length"]) == (2.0, True, 256)
    assert settings_of(WanPipeline.skeleton(), SFT(), None)["tile_size"] == 34, "as in __call__"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tilde": True}, "'tilde' is no setting of the family qwen_image; .*tiled"),
        ({"embedded_guidance": 2.0}, "no setting of the family qwen_image"),
        ({"cfg_scale": 4.0}, "no setting"),  # training has no guidance
        ({"tiled": 1}, "tiled is 1; give true or false"),
        ({"tile_size": "64"}, "tile_size is '64'; give a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        settings_of(QwenImagePipeline.skeleton(), SFT(), given)


def test_a_setting_that_nobody_reads_is_refused() -> None:
    with pytest.raises(PipelineError, match="'max_sequence_length' is no setting of the family qwen_image_edit"):
        settings_of(QwenImageEditPipeline.skeleton(), SFT(), {"max_sequence_length": 64})


def groups(model: Path, tmp_path: Path, **options: Any) -> dict[str, GroupPlan]:
    values: dict[str, Any] = {"dataset_base_path": str(tmp_path), "output_path": str(tmp_path / "cache"), **options}
    return {group.name: group for group in RunPlan.resolve(PreprocessConfig(model=str(model), **values)).groups}


def test_settings_are_part_of_the_keys_that_they_decide(tiny_qwen: Path, tmp_path: Path) -> None:
    plain = groups(tiny_qwen, tmp_path)
    tiled = groups(tiny_qwen, tmp_path, pipeline_settings={"tiled": True})
    short = groups(tiny_qwen, tmp_path, pipeline_settings={"max_sequence_length": 8})
    assert plain["vae"].fingerprint != tiled["vae"].fingerprint and tiled["vae"].settings["tiled"] is True
    assert plain["text_encoder"].fingerprint == tiled["text_encoder"].fingerprint != short["text_encoder"].fingerprint


def test_settings_are_part_of_a_runs_identity(tiny_qwen: Path, tmp_path: Path) -> None:
    class Data:
        identity = "data"

    def found(**options: Any) -> dict[str, Any]:
        plan = RunPlan.resolve(make_config(tiny_qwen, tmp_path, tmp_path, task="sft", **options))
        return run_identity(plan, Data())  # type: ignore[arg-type]

    assert found() != found(pipeline_settings={"tiled": True})


def parts_of(pipe: BasePipeline, model: Path, name: str, **settings: Any) -> dict[str, str]:
    """The readable fingerprint of a group."""
    groups = plan_stages(pipe, SFT(), ["dit"], ["input_image", "prompt"]).groups
    plan = plan_group(
        pipe,
        locate_model(str(model)),
        next(group for group in groups if group.name == name),
        sample_inputs=["input_image", "prompt"],
        file_params=["input_image"],
        dtype="float32",
        settings={**pipe.training_settings(), **settings},
    )
    return dict(plan.parts)


def test_what_only_samples_is_in_no_key(tiny_qwen: Path) -> None:
    class Quick(QwenImagePipeline):
        defaults = SamplingDefaults(num_inference_steps=3)
        lora_targets = ("to_q",)

    for name in ("vae", "text_encoder"):
        assert parts_of(Quick.skeleton(), tiny_qwen, name) == parts_of(QwenImagePipeline.skeleton(), tiny_qwen, name)


def test_a_family_that_changes_its_base_states_its_version(tiny_qwen: Path) -> None:
    class Lower(QwenImagePipeline):
        def encode_prompts(self, prompts: Any, **options: Any) -> Any:
            return super().encode_prompts([prompt.lower() for prompt in prompts], **options)

    with pytest.raises(CacheKeyError, match="Lower defines encode_prompts and states no version"):
        parts_of(Lower.skeleton(), tiny_qwen, "text_encoder")
    Lower.version = 1
    assert parts_of(Lower.skeleton(), tiny_qwen, "text_encoder")["pipeline"] != QwenImagePipeline.code_version()
    assert QwenImageEditPipeline.code_version() != QwenImageEditPlusPipeline.code_version()


def test_transforms_templates_and_libraries_are_part_of_the_keys(
    tiny_qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = QwenImagePipeline.skeleton()

    def changed(name: str, **settings: Any) -> set[str]:
        now = parts_of(pipe, tiny_qwen, name, **settings)
        return {part for part in {*now, *before[name]} if now.get(part) != before[name].get(part)}

    before = {name: parts_of(pipe, tiny_qwen, name) for name in ("vae", "text_encoder")}
    assert changed("vae", tiled=True) == {"setting:tiled", "transform:tiling"}
    with monkeypatch.context() as patch:
        patch.setattr("ray_diffsynth.plan.cache_keys.PIXEL_TRANSFORMS", {**PIXEL_TRANSFORMS, "resize": "bicubic/1"})
        assert (changed("vae"), changed("text_encoder")) == ({"transform:resize"}, set())
    with monkeypatch.context() as patch:
        patch.setattr(
            QwenImagePipeline, "prompt_templates", lambda self: {"prompt": "Paint {}", "dropped tokens": "34"}
        )
        assert (changed("vae"), changed("text_encoder")) == (set(), {"template:prompt"})
    with monkeypatch.context() as patch:
        patch.setattr("ray_diffsynth.plan.library_versions.version", lambda name: "99.1.0")
        assert "library:diffusers" in changed("vae") and "library:transformers" in changed("text_encoder")
        assert not any(part.startswith(("unit", "weights")) for part in changed("vae"))
        patch.setattr("ray_diffsynth.plan.library_versions.AGREEING", {"torch": (("2.13", "99.1"),)})
        assert counted_version("torch") == "2.13"


def test_a_tokenizer_counts_by_what_it_does(tiny_qwen: Path, tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(tiny_qwen, root)
    pipe = QwenImagePipeline.skeleton()
    before = parts_of(pipe, root, "text_encoder")
    (root / "tokenizer/README.md").write_text("another text")
    for file in (root / "tokenizer").glob("*.json"):
        content = json.loads(file.read_text())
        if file.name == "tokenizer_config.json":
            content = dict(reversed([*content.items(), ("name_or_path", "elsewhere")]))
        file.write_text(json.dumps(content, indent=7))
    assert parts_of(pipe, root, "text_encoder") == before
    config = root / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "{{ messages }}"}))
    templated = parts_of(pipe, root, "text_encoder")
    assert {name for name in before if before[name] != templated[name]} == {"companion:tokenizer"}
    tokenizer = root / "tokenizer/tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    tokenizer.write_text(json.dumps(content))
    assert parts_of(pipe, root, "text_encoder")["companion:tokenizer"] != templated["companion:tokenizer"]


# ---------------------------------------------------------------- sizes


def file(height: int, width: int, frames: int = 1) -> SourceFile:
    return SourceFile("a", "", width, height, "digest", frames, 16.0 if frames > 1 else 0.0)


def test_an_image_that_is_distilled_keeps_its_size() -> None:
    task, pipe = DirectDistill(), QwenImagePipeline.skeleton()
    assert task.as_sampled and not SFT.as_sampled
    spec = dataset_spec(pipe, config(), {}, keep_size=True)
    assert bucket_of({"input_image": [file(1024, 1024)]}, spec).name == "1024x1024"
    with pytest.raises(BucketError, match=r"1328x1328 .* scaled to 1024x1024.*--height 1328.*--max_pixels 1763584"):
        bucket_of({"input_image": [file(1328, 1328)]}, spec)
    with pytest.raises(BucketError, match="sides are multiples of 16"):
        bucket_of({"input_image": [file(500, 500)]}, spec)
    with pytest.raises(BucketError, match="scaled to 512x512"):
        bucket_of(
            {"input_image": [file(1024, 1024)]}, dataset_spec(pipe, config(height=512, width=512), {}, keep_size=True)
        )
    free = dataset_spec(pipe, config(), {})
    assert bucket_of({"input_image": [file(1328, 1328)]}, free).name == "1024x1024"


def test_a_video_that_is_distilled_keeps_its_frames() -> None:
    def bucket(frames: int, **options: Any) -> str:
        spec = dataset_spec(WanPipeline.skeleton(), config(**options), {}, keep_size=True)
        return bucket_of({"input_video": [file(480, 832, frames)]}, spec).name

    assert bucket(81) == bucket(81, fps=16) == "480x832x81"
    for options in ({"num_frames": 49}, {"fps": 8}):
        with pytest.raises(BucketError, match="has 81 frames at 16 a second .*--num_frames 81 and leave --fps out"):
            bucket(81, **options)


def test_rows_with_different_numbers_of_images_lie_in_different_buckets() -> None:
    spec = dataset_spec(QwenImageEditPlusPipeline.skeleton(), config(), {})
    names = [
        bucket_of({"input_image": [file(64, 64)], "edit_image": [file(96, 96)] * count}, spec).name
        for count in (1, 2, 3)
    ]
    assert names == ["64x64", "64x64+2", "64x64+3"]


# ---------------------------------------------------------------- caption dropout


@pytest.mark.parametrize(
    ("pipeline", "task", "others"),
    [
        (QwenImageEditPipeline, SFT(), "edit_image"),
        (QwenImagePipeline, DirectDistill(), "cfg_scale"),
        (QwenImagePipeline, SFT(), None),
        (FluxPipeline, SFT(), None),
        (WanPipeline, SFT(), None),
    ],
)
@pytest.mark.parametrize("trained", ["dit", "text_encoder"])
def test_caption_dropout_where_one_empty_caption_serves_all(
    pipeline: type[BasePipeline], task: Any, others: str | None, trained: str
) -> None:
    pipe = pipeline.skeleton()
    spec = dataset_spec(pipe, config(), task.columns)
    stages = plan_stages(pipe, task, [trained], spec.inputs)
    if others is None:
        check_caption_dropout(stages, spec.inputs)
        return
    with pytest.raises(PipelineError, match=f"--caption_dropout does not work here: .* {others}"):
        check_caption_dropout(stages, spec.inputs)
