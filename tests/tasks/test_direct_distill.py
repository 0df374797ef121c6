"""Direct distillation: its formula by hand, the family's own sampling, batches of unequal steps, split = unsplit."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ray_diffsynth.data.metadata import read_metadata
from ray_diffsynth.diffusion.flow_match import FlowMatchScheduler
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.pipelines.core.base import BasePipeline
from ray_diffsynth.pipelines.core.stages import plan_stages
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.tasks import DirectDistill, get_task
from ray_diffsynth.tasks.direct_distill import sample
from ray_diffsynth.tasks.registry import TaskError
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import DatasetSource
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.result import TrainResult
from tests.training.helpers import make_config, train_here, write_cache

STEPS = [2, 3, 2, 4, 2, 3]


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(0, 0, 0, f"{i}.png") for i in range(count)]


class Scaled(BasePipeline):
    """A pipeline whose model predicts `factor` times its noisy latents."""

    schedule = "Wan"

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__(torch_dtype=torch.float32)
        self.factor = factor
        self.in_iteration_models = ()
        self.model_fn = self.predicted
        self.scheduler.set_timesteps(1000, training=True)
        self.calls: list[int] = []

    def predicted(self, *, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        assert timestep.shape == (len(latents),)
        self.calls.append(len(latents))
        return self.factor * latents


def rows(count: int, steps: list[int]) -> dict[str, Any]:
    latents = torch.arange(count * 16, dtype=torch.float32).reshape(count, 4, 2, 2) / 16
    seeds = list(range(10, 10 + count))
    return {"input_latents": latents, "seed": seeds, "rand_device": ["cpu"] * count, "num_inference_steps": steps}


def test_formula() -> None:
    """Euler steps of v = x / 2 from the row's noise: x <- x * (1 + (s' - s) / 2)."""
    pipe, batch = Scaled(), rows(3, [2, 5, 2])
    output = get_task("direct_distill:train").loss(pipe, batch, keys(3))
    for index, steps in enumerate(batch["num_inference_steps"]):
        schedule = FlowMatchScheduler("Wan")
        schedule.set_timesteps(steps)
        sigmas = [*schedule.sigmas.tolist(), 0.0]
        x = torch.randn((1, 4, 2, 2), generator=torch.Generator().manual_seed(10 + index))[0]
        for now, then in zip(sigmas, sigmas[1:], strict=False):
            x = x + (then - now) * 0.5 * x
        expected = (x - batch["input_latents"][index]).square().mean()
        assert float(output.per_sample[index]) == pytest.approx(float(expected), rel=1e-5)
    assert float(output.loss) == pytest.approx(float(output.per_sample.mean()))
    assert output.sigma.tolist() == [1.0] * 3
    assert pipe.calls == [2, 2, 1, 1, 1, 1, 1], "rows of equal steps run together"
    assert pipe.scheduler.training and len(pipe.scheduler.timesteps) == 1000, "the training schedule is left alone"


def test_a_row_has_its_own_noise_whatever_the_batch_and_the_epoch() -> None:
    pipe, batch, task = Scaled(), rows(4, [3, 2, 3, 2]), DirectDistill()
    together = task.loss(pipe, batch, keys(4)).per_sample
    for index in range(4):
        single = {name: value[index : index + 1] for name, value in batch.items()}
        alone = task.loss(pipe, single, [SampleKey(0, 7, 1, "another")]).per_sample
        assert torch.equal(alone[0], together[index])
    assert not torch.equal(together, task.loss(pipe, {**batch, "seed": [1, 2, 3, 4]}, keys(4)).per_sample)
    with pytest.raises(ValueError, match="3 keys for 4 samples"):
        task.loss(pipe, batch, keys(3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_noise_of_a_gpu_needs_a_gpu() -> None:
    with pytest.raises(TaskError, match="rand_device says cuda"):
        DirectDistill().loss(Scaled(), {**rows(1, [2]), "rand_device": ["cuda"]}, keys(1))


def test_settings_of_another_task_are_left_out_and_of_none_refused() -> None:
    assert get_task("direct_distill", weighting="none", max_timestep_boundary=0.5) == DirectDistill()
    with pytest.raises(TypeError):
        get_task("direct_distill", weigthing="none")


def write_rows(path: Path, lines: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def test_rows_that_cannot_be_distilled_are_rejected_with_the_reason(tmp_path: Path) -> None:
    good = {"image": "a.png", "prompt": "p", "seed": 3, "rand_device": "cuda:1"}
    good |= {"num_inference_steps": 4, "cfg_scale": 1}
    wrong = {
        "seed": ("x", "'x' is not a whole number from 0"),
        "rand_device": ("tpu", "no device to draw noise on"),
        "num_inference_steps": (0, "not a whole number from 1"),
        "cfg_scale": (4, "the student runs without guidance; write 1"),
    }
    lines = [good, *({**good, "image": f"{name}.png", name: value} for name, (value, _) in wrong.items())]
    lines.append({**good, "image": "float.png", "num_inference_steps": "4.0", "cfg_scale": "1.0"})
    write_rows(tmp_path / "metadata.csv", lines)
    columns = DirectDistill.columns
    found = read_metadata(str(tmp_path), parsers=columns, required=("image", "prompt", *columns))
    kept = list(found.rows())
    assert [row["image"] for row in kept] == ["a.png", "float.png"]
    for row in kept:
        assert (row["seed"], row["rand_device"], row["num_inference_steps"], row["cfg_scale"]) == (3, "cuda", 4, 1.0)
    reasons = {item.sample_id.removesuffix(".png"): item.message for item in found.rejected}
    assert all(text in reasons[name] for name, (_, text) in wrong.items())


@pytest.fixture(scope="module")
def teacher(tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images with the columns of direct_distill, all as text as a csv has them."""
    root = tmp_path_factory.mktemp("teacher")
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)
    lines = []
    for index, steps in enumerate(STEPS):
        image = pipe(f"picture {index}", height=32, width=32 if index < 4 else 48, seed=index, num_inference_steps=5)
        assert isinstance(image, Image.Image)
        image.save(root / f"{index}.png")
        columns = {"seed": index, "rand_device": "cpu", "num_inference_steps": steps, "cfg_scale": 1}
        lines.append({"image": f"{index}.png", "prompt": f"picture {index}", **columns})
    write_rows(root / "metadata.csv", lines)
    return root


def run(model: Path, base: Path, output: Path, **changes: Any) -> TrainResult:
    values: dict[str, Any] = {"task": "direct_distill:train", "learning_rate": 1e-3, **changes}
    return train_here(make_config(model, base, output, **values))


@pytest.fixture(scope="module")
def distill_cache(tiny_qwen: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill_cache")
    plan = RunPlan.resolve(make_config(tiny_qwen, teacher, folder, task="direct_distill"))
    data = open_data(plan)
    assert isinstance(data, DatasetSource)
    return write_cache(plan, data, folder)


def test_the_student_samples_as_the_family_does(tiny_qwen: Path) -> None:
    """The loss compares what `pipe(…, cfg_scale=1)` would make with the row's seed: the same numbers."""
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)
    size = {"height": 32, "width": 48}
    expected = pipe("a cat", seed=5, num_inference_steps=3, cfg_scale=1.0, output_type="latent", **size)
    pipe.scheduler.set_timesteps(1000, training=True)
    with torch.no_grad():
        (embeds,) = pipe.encode_prompts(["a cat"])
        batch: Mapping[str, Any] = {
            "prompt_embeds": embeds, "input_latents": expected, "seed": [5], "rand_device": ["cpu"],
            "num_inference_steps": [3],
        }  # fmt: skip
        latents, _ = sample(pipe, batch, DirectDistill().noise(pipe, batch), 3)
        loss = DirectDistill().loss(pipe, batch, keys(1)).loss
    assert torch.equal(latents, expected)
    assert float(loss) == 0.0


def test_what_the_cache_holds() -> None:
    inputs = ("input_image", "prompt", "height", "width", *DirectDistill.columns)
    stages = plan_stages(QwenImagePipeline.skeleton(), DirectDistill(), ["dit"], inputs)
    groups = {group.name: group.parameters for group in stages.groups}
    assert groups == {
        "vae": ("input_latents",),
        "text_encoder": ("prompt_embeds",),
        "inputs": ("seed", "rand_device", "num_inference_steps"),
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_split_equals_unsplit_bit_for_bit(
    tiny_qwen: Path, teacher: Path, distill_cache: Path, tmp_path: Path, batch_size: int
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "max_steps": 3}
    split = run(tiny_qwen, distill_cache, tmp_path / "split", **options)
    whole = run(tiny_qwen, teacher, tmp_path / "whole", task="direct_distill", **options)
    assert split.steps == whole.steps == 3
    name = f"{'step-3' if split.steps_per_epoch != 3 else 'epoch-0'}.safetensors"
    assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert read_metrics(str(tmp_path / "split"))[-1]["loss"] == read_metrics(str(tmp_path / "whole"))[-1]["loss"]
    trained = load_file(tmp_path / "split" / name)
    assert any(bool(value.any()) for key, value in trained.items() if "lora_B" in key)


def test_the_student_learns_and_checkpointing_changes_no_gradient(
    tiny_qwen: Path, distill_cache: Path, tmp_path: Path
) -> None:
    plan = RunPlan.resolve(make_config(tiny_qwen, distill_cache, tmp_path, task="direct_distill:train"))
    module, _ = build_module(plan, torch.device("cpu"))
    samples = open_data(plan).fetch([0, 1])

    def gradients(module: DiffusionTrainingModule) -> tuple[float, dict[str, torch.Tensor]]:
        module.zero_grad()
        output = module(samples, keys(2))
        output.loss.backward()
        found = {name: p.grad.clone() for name, p in module.trainable().items() if p.grad is not None}
        return float(output.loss.detach()), found

    loss, plain = gradients(module)
    module.settings["use_gradient_checkpointing"] = True
    again, recomputed = gradients(module)
    assert loss == again and plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=0, atol=1e-7)
    module.settings["use_gradient_checkpointing"] = False
    optimizer = torch.optim.AdamW(module.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(gradients(module)[0])
        optimizer.step()
    assert losses[-1] < losses[0]
