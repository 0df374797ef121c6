"""Sample images, without the actor: the grid of a step's weights, as PNG and in TensorBoard."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_diffsynth.cluster.nodes import Cluster
from ray_diffsynth.cluster.workers import WorkerGroup
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.models.lora import export_lora
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.report import make_report, render
from ray_diffsynth.training.ray import sampler
from ray_diffsynth.training.report.sample_grids import (
    MAX_GRIDS,
    GridInfo,
    encode_grid,
    is_drawn,
    make_grid,
    sample_grids,
)
from ray_diffsynth.training.report.sample_images import ImageSampler
from ray_diffsynth.training.report.sample_prompts import SamplePrompt
from tests.report.browser import Dom
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config, unresolved


def samples(*prompts: str, **arguments: Any) -> list[SamplePrompt]:
    return [SamplePrompt(prompt, number, tuple(sorted(arguments.items()))) for number, prompt in enumerate(prompts)]


SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2}


def test_images_follow_the_weights(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    config = make_config(tiny_qwen, make_cache(), tmp_path)
    asked = samples("a cat", "a dog", height=64, width=64, num_inference_steps=2)
    sampler = ImageSampler(RunPlan.resolve(config), asked, torch.device("cpu"))
    names = [name for name in dict(sampler.module.named_parameters()) if "lora_B" in name]
    weights = {name: torch.zeros_like(sampler.module.get_parameter(name)) for name in names}
    first, again = (Image.open(sampler.draw(step, weights)).tobytes() for step in (1, 2))
    other = Path(sampler.draw(3, {name: value + 0.5 for name, value in weights.items()}))
    assert first == again != Image.open(other).tobytes()
    assert other == tmp_path / "samples/step-00000003.png" and Image.open(other).size == (128, 64)
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("changes", [{}, {"trainable_models": "dit"}], ids=["lora", "full"])
def test_images_in_bfloat16_of_what_is_trained_in_fp32(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = make_config(tiny_qwen, make_cache(), tmp_path, dtype="bfloat16", log_with="none", **changes)
    sampler = ImageSampler(RunPlan.resolve(config), samples("a cat", **SMALL), torch.device("cpu"))
    weights = {name: p.detach().clone() for name, p in sampler.module.named_parameters() if p.requires_grad}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    first = Image.open(sampler.draw(1, weights)).tobytes()
    generator = torch.Generator().manual_seed(0)
    moved = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    assert Image.open(sampler.draw(2, moved)).tobytes() != first


def test_step_0_is_the_base_model_or_the_lora_that_it_starts_from(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    config, cat = make_config(tiny_qwen, make_cache(), tmp_path / "new"), samples("a cat", **SMALL)
    info = GridInfo.of(config, cat, 0)
    assert not is_drawn(str(tmp_path / "new"), 0, info)
    base = Image.open(ImageSampler(RunPlan.resolve(config), cat, torch.device("cpu")).draw(0, {}))
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)
    plain: Any = pipe("a cat", seed=config.seed, height=32, width=32, num_inference_steps=2)
    assert np.array_equal(np.asarray(base), np.asarray(plain))  # the model as it came
    assert is_drawn(str(tmp_path / "new"), 0, info)
    for other in (samples("a dog", **SMALL), samples("a cat", **{**SMALL, "height": 64})):
        assert not is_drawn(str(tmp_path / "new"), 0, GridInfo.of(config, other, 0))
    events = EventAccumulator(str(tmp_path / "new/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [0]

    width = pipe.dit.config.num_attention_heads * pipe.dit.config.attention_head_dim
    state = {f"transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(4, width) for side in "AB"}
    state["transformer_blocks.0.attn.to_q.lora_B.weight"] = torch.ones(width, 4)
    lora = str(tmp_path / "zorp.safetensors")
    export_lora(state, prefix="transformer.", rank=4, alpha=4, path=lora)
    preset = make_config(tiny_qwen, make_cache(), tmp_path / "preset", preset_lora_path=lora)
    moved = Image.open(ImageSampler(RunPlan.resolve(preset), cat, torch.device("cpu")).draw(0, {}))
    assert not np.array_equal(np.asarray(base), np.asarray(moved))
    (values, _), (started, _) = sample_grids(str(tmp_path / "new"), 99), sample_grids(str(tmp_path / "preset"), 99)
    assert (values[0]["title"], started[0]["title"]) == ("Base model", "Start, with zorp.safetensors")


def test_no_actor_draws_where_the_workers_hold_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "joined_cluster", lambda: Cluster({"a": {"CPU": 2.0, "GPU": 1.0}}))
    config = TrainConfig(model="m", dataset_base_path="c")
    group = WorkerGroup(1, 1, {"CPU": 1.0, "GPU": 0.5}, 1)
    sampling = sampler.Sampling(unresolved(config), samples("a cat"), None)
    assert not sampling.begin(group, lambda: False) and sampling.actor is None
    assert sampling.of_workers == samples("a cat")


def test_a_run_draws_step_0_when_it_begins_and_not_again_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Actor:
        """Stands for SamplerActor and for its handle: nothing here waits for a reply."""

        def __init__(self) -> None:
            self.begin = self.placed = SimpleNamespace(remote=lambda: None)

        def options(self, **resources: object) -> Actor:
            return self

        def remote(self, what: object, start: bool, collector: object) -> Actor:
            asked.append(start)
            return self

    monkeypatch.setattr(sampler, "SamplerActor", Actor())
    monkeypatch.setattr(sampler.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(sampler, "joined_cluster", lambda: Cluster({"a": {"CPU": 2.0}}))
    config = TrainConfig(model="m", dataset_base_path="c", output_path=str(tmp_path))
    group = WorkerGroup(1, 1, {"CPU": 1.0}, 1)

    def begins(prompt: str) -> bool:
        asked.clear()
        sampler.Sampling(unresolved(config), samples(prompt), None).begin(group, lambda: False)
        assert asked in ([True], [False])
        return asked[0] is True

    (tmp_path / "samples").mkdir()
    data = encode_grid(Image.new("RGB", (4, 4)), GridInfo.of(config, samples("a cat"), 0))
    assert begins("a cat")
    (tmp_path / "samples/step-00000000.png").write_bytes(data)
    assert begins("a cat")  # a new run: another model may have drawn it
    checkpoint = tmp_path / "checkpoints/step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    assert not begins("a cat") and begins("a dog")
    (tmp_path / "samples/step-00000000.png").unlink()
    assert begins("a cat")


def test_the_report_shows_the_steps_beside_the_base_model(tmp_path: Path) -> None:
    config = TrainConfig(model="m", dataset_base_path="c", output_path=str(tmp_path))
    (tmp_path / "samples").mkdir()
    sheet = Image.new("RGB", (8, 4))
    for step in range(0, 40, 2):
        (tmp_path / f"samples/step-{step:08d}.png").write_bytes(
            encode_grid(sheet, GridInfo.of(config, samples("ein <Bär>"), step))
        )
    values, images = sample_grids(str(tmp_path), 10**9)
    assert len(values) == len(images) == MAX_GRIDS
    assert [(v["step"], v["title"]) for v in (values[0], values[-1])] == [(0, "Base model"), (38, "Step 38")]
    report = make_report(counts={"steps": 38, "steps_total": 38}, seconds={"total": 1.0}, config=config, samples=values)
    dom = Dom(render(report, images=images))
    assert [image["alt"] for image in dom.all("img")][:1] == ["Sample pictures, Base model; ein <Bär>"]
    assert [a.get("class") for a in dom.all("figure")] == ["start", *[None] * (MAX_GRIDS - 1)]
    assert "Base model Step 4" in dom.text and "always from the same noise: ein <Bär>" in dom.text


def test_a_grid_that_someone_else_left_does_not_end_a_run(tmp_path: Path) -> None:
    config = TrainConfig(model="m", dataset_base_path="c", output_path=str(tmp_path))
    (tmp_path / "samples").mkdir()
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, format="PNG")
    (tmp_path / "samples/step-00000007.png").write_bytes(data.getvalue())
    (tmp_path / "samples/step-00000000.png").write_bytes(b"cut")
    assert not is_drawn(str(tmp_path), 0, GridInfo.of(config, samples("a"), 0))
    values, images = sample_grids(str(tmp_path), 10**9)
    assert [v["title"] for v in values] == ["Step 0", "Step 7"] and images[1].alt == "Sample pictures, Step 7"


def test_a_grid_has_a_place_for_each() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    sheet = make_grid([Image.new("RGB", (4, 6), colour) for colour in colours])
    assert sheet.size == (8, 12)
    assert [sheet.getpixel(at) for at in ((1, 1), (5, 1), (1, 7))] == colours
