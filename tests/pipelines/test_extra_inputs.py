"""--extra_inputs: further columns reach the units of a pipeline, as images, lists and videos, in both stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.samples import bucket_of, load_inputs
from ray_diffsynth.data.scan import scan_file
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.pipelines.core.columns import dataset_spec
from ray_diffsynth.pipelines.core.stages import plan_stages
from ray_diffsynth.pipelines.core.unit import PipelineUnit
from ray_diffsynth.pipelines.qwen_image.model import model_fn
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.pipelines.wan_i2v import WanImageToVideoPipeline
from ray_diffsynth.tasks import SFT
from ray_diffsynth.training.module import DiffusionTrainingModule
from tests.families.cases import make_image
from tests.video_files import draw_clip


class ControlUnit(PipelineUnit):
    """`control_image` (one, or a list) and `control_scale` -> control_latents (1, C, h, w)."""

    version = 1

    def __init__(self) -> None:
        super().__init__(
            input_params=("control_image", "control_scale"),
            output_params=("control_latents",),
            onload_model_names=("vae",),
        )

    def process(self, pipe: Any, control_image: Any, control_scale: float) -> dict[str, Any]:
        images = control_image if isinstance(control_image, list) else [control_image]
        pixels = torch.cat([pipe.preprocess_image(one) for one in images])
        latents = pipe.encode_images(pixels, tiled=False, tile_size=128, tile_stride=64)
        return {"control_latents": control_scale * latents.mean(0, keepdim=True)}


def model_fn_control(
    *,
    dit: Any,
    latents: Tensor,
    control_latents: Tensor,
    timestep: Tensor,
    prompt_embeds: Tensor,
    prompt_embeds_mask: Tensor | None = None,
) -> Tensor:
    return model_fn(
        dit=dit,
        latents=latents + control_latents,
        timestep=timestep,
        prompt_embeds=prompt_embeds,
        prompt_embeds_mask=prompt_embeds_mask,
    )


class ControlPipeline(QwenImagePipeline):
    """A ControlNet-style pipeline of a user's own: Qwen-Image that sees further images."""

    version = 1
    family: ClassVar[str] = "control"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.units = [*self.units, ControlUnit()]
        self.model_fn = model_fn_control


def config(base: Path, **options: Any) -> PreprocessConfig:
    return PreprocessConfig(model="m", dataset_base_path=str(base), output_path="out", **options)


def test_control_images_through_both_stages(tiny_qwen: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("c", 2)):
        make_image(64, 64, seed=seed).save(tmp_path / f"{name}.png")
    keys = {"data_file_keys": "image,control_image", "extra_inputs": "control_image,control_scale"}
    pipe = ControlPipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)
    pipe.scheduler.set_timesteps(training=True)
    spec = dataset_spec(pipe, config(tmp_path, height=32, width=32, **keys), {})
    assert spec.file_params == ("input_image", "control_image")
    planned = plan_stages(pipe, SFT(), ["dit"], spec.inputs)
    assert set(planned.parameters) == {"input_latents", "prompt_embeds", "control_latents"}, "no image is cached"
    losses = []
    for control in ("b.png", "c.png", ["b.png", "c.png"]):
        row = {"image": "a.png", "prompt": "a red square", "control_image": control, "control_scale": 0.5}
        files = {p: [scan_file(path) for path in spec.paths(row, p)] for p in spec.file_params}
        inputs = load_inputs(row, bucket_of(files, spec), spec)
        key = [SampleKey(0, 0, 0, "a")]
        whole = DiffusionTrainingModule(pipe, SFT(), trained=["dit"], inputs=spec.inputs, split=False)
        split = DiffusionTrainingModule(pipe, SFT(), trained=["dit"], inputs=spec.inputs, split=True)
        with torch.no_grad():
            losses.append(float(whole([inputs], key).loss))
            assert losses[-1] == float(split([whole.encode(inputs)], key).loss)
    assert len(set(losses)) == 3, "each control gives another loss"


@pytest.mark.parametrize("extra", [None, "input_image", "input_image,control_video"])
def test_diffsynths_columns_of_image_to_video(extra: str | None, tmp_path: Path) -> None:
    draw_clip(tmp_path / "a.mp4", 9, height=32, width=48)
    draw_clip(tmp_path / "b.mp4", 9, height=64, width=64)
    options = {"data_file_keys": "video,control_video", "extra_inputs": extra, "num_frames": 5}
    spec = dataset_spec(WanImageToVideoPipeline.skeleton(), config(tmp_path, **options), {})
    row = {"video": "a.mp4", "prompt": "a clip", "control_video": "b.mp4"}
    files = {p: [scan_file(path, animations=True) for path in spec.paths(row, p)] for p in spec.file_params}
    bucket = bucket_of(files, spec)
    assert bucket.name == "32x48x5"
    inputs = load_inputs(row, bucket, spec)
    assert inputs["input_video"].shape == (5, 32, 48, 3) and inputs["input_image"].size == (48, 32)
    if extra and "control_video" in extra:
        assert inputs["control_video"].shape == (5, 32, 48, 3)
