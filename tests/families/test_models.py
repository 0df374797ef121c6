"""Models that a family cannot take are refused by their configuration files, and a model's own sampling is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import GenerateConfig, PreprocessConfig
from ray_diffsynth.generate.items import family_defaults, plan_items
from ray_diffsynth.generate.painter import Painter
from ray_diffsynth.models.locate import locate_model
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.calling import image_params
from ray_diffsynth.pipelines.core.errors import PipelineError
from ray_diffsynth.pipelines.registry import get_pipeline_class
from ray_diffsynth.plan.prompts import prompts_of
from ray_diffsynth.plan.run_plan import RunPlan
from tests.families.cases import make_image
from tests.training.helpers import make_config

ModelFolder = Callable[[str], Path]


def changed(model_folder: ModelFolder, family: str, folder: Path, file: str, values: Mapping[str, Any]) -> Path:
    """The configuration files of a tiny model, one of them with other values."""
    root = model_folder(family)
    for path in root.rglob("*.json"):
        (folder / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(root))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **values}))
    return folder


def configured(family: str, root: Path) -> BasePipeline:
    return get_pipeline_class(family).configured(locate_model(str(root)))


TRANSFORMER = "transformer/config.json"


@pytest.mark.parametrize(
    ("family", "file", "values", "message"),
    [
        ("wan_i2v", TRANSFORMER, {"pos_embed_seq_len": 514}, "first and a last frame .FLF2V., which is not supported"),
        ("wan", "model_index.json", {"boundary_ratio": 0.9}, "Wan 2.2"),
        ("flux", TRANSFORMER, {"in_channels": 384}, "takes 384 channels, .* 16: FLUX.1 Fill, Canny and Depth"),
        ("flux2", TRANSFORMER, {"guidance_embeds": True}, "FLUX.2-dev, .* use a FLUX.2-klein model"),
    ],
)
def test_a_model_that_the_family_cannot_take(
    family: str, file: str, values: Mapping[str, Any], message: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    configured(family, model_folder(family))
    root = changed(model_folder, family, tmp_path / "model", file, values)
    with pytest.raises(PipelineError, match=message):
        configured(family, root)
    with pytest.raises(PipelineError, match=message):  # both stages, before anything is encoded or loaded
        RunPlan.resolve(PreprocessConfig(model=str(root), family=family, dataset_base_path="d", output_path="o"))
    with pytest.raises(PipelineError, match=message):
        RunPlan.resolve(make_config(root, tmp_path, tmp_path, task="sft", family=family))


@pytest.mark.parametrize(("is_distilled", "steps", "scale"), [(True, 4, 1.0), (False, 50, 4.0)])
def test_klein_samples_as_its_model_wants(
    is_distilled: bool, steps: int, scale: float, model_folder: ModelFolder, tmp_path: Path
) -> None:
    values = {"is_distilled": is_distilled}
    pipe = configured("flux2", changed(model_folder, "flux2", tmp_path / "model", "model_index.json", values))
    assert family_defaults(pipe) == {"num_inference_steps": steps, "cfg_scale": scale}


@pytest.mark.parametrize("task", ["sft", "direct_distill"])
def test_caption_dropout_of_edits_is_refused_in_both_forms(
    task: str, model_folder: ModelFolder, tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match="--caption_dropout does not work here: .*caption and edit_image"):
        RunPlan.resolve(
            make_config(model_folder("qwen_image_edit"), tmp_path, tmp_path, task=task, caption_dropout=0.1)
        )


@pytest.mark.parametrize(
    ("family", "column", "options"),
    [
        ("qwen_image_edit", "edit_image", {"pipeline_settings": {"edit_image_auto_resize": False}}),
        ("wan_i2v", "input_image", {"num_frames": 5}),
    ],
)
def test_generating_from_an_image(
    family: str, column: str, options: dict[str, Any], model_folder: ModelFolder, tmp_path: Path
) -> None:
    root = model_folder(family)
    for name, seed in (("a", 0), ("b", 1)):
        make_image(seed=seed).save(tmp_path / f"{name}.png")
    (tmp_path / "prompts.csv").write_text(f"prompt,{column}\na cat,a.png\na cat,b.png\n")
    config = GenerateConfig(
        model=str(root), prompt_path=str(tmp_path / "prompts.csv"), output_path=str(tmp_path),
        dtype="float32", seeds="3", height=32, width=48,
        num_inference_steps=2, cfg_scale=1.0, **options,
    )  # fmt: skip
    pipe = configured(family, root)
    items = plan_items(config, prompts_of(config, image_params(pipe)), pipe, {})
    paint = Painter(RunPlan.resolve(config))
    one, two = ((tmp_path / paint(item)).read_bytes() for item in items)
    assert one != two, "it is made from its image"
