"""The job on Ray: every image once over kills and runs, the LoRA's strengths, data that direct_distill trains on."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ray_diffsynth.cluster.session import ClusterError
from ray_diffsynth.config import GenerateConfig
from ray_diffsynth.generate import job, pool
from ray_diffsynth.generate.items import GenerateError, Item
from ray_diffsynth.generate.painter import Painter
from ray_diffsynth.models.lora import add_lora, export_lora, lora_parameters, lora_state
from ray_diffsynth.models.lora_file import LoraError
from ray_diffsynth.pipelines.qwen_image.pipeline import QwenImagePipeline
from ray_diffsynth.plan.run_plan import GeneratePlan
from tests.training.helpers import make_config, train_here

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

PROMPTS = ("a red circle", "ein grüner Kreis", "a blue square")


def config(model: Path, output: Path, **changes: Any) -> GenerateConfig:
    values: dict[str, Any] = {
        "model": str(model), "output_path": str(output), "dtype": "float32", "height": 32, "width": 32,
        "num_inference_steps": 3, "cfg_scale": 2.0, "num_workers": 1, "resources": {"CPU": 1}, **changes,
    }  # fmt: skip
    return GenerateConfig(**values)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS), encoding="utf-8")
    return str(path)


def rows(output: Path) -> list[dict[str, str]]:
    with open(output / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def stamps(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "pictures").iterdir()}


def test_a_killed_run_goes_on_and_makes_every_image_once(
    tiny_qwen: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is interrupted after two images; in the next one an actor dies in the middle of its image."""
    out, once = tmp_path / "out", tmp_path / "once"
    given = config(tiny_qwen, out, prompt_path=prompts, images_per_prompt=2)

    def interrupted(items: Sequence[Item], plan: GeneratePlan, *_: Any) -> dict[str, str]:
        paint = Painter(plan)
        for item in items[:2]:
            paint(item)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(job, "paint_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.run(given)
    first = stamps(out)
    assert len(first) == 2 and not (out / "metadata.csv").exists()

    class Dying(pool.PainterActor):
        def paint(self, item: Item) -> str:
            if not once.exists():
                once.touch()
                os.kill(os.getpid(), 9)
            return super().paint(item)

    monkeypatch.setattr(pool, "PainterActor", Dying)
    counts = job.run(given)
    assert once.exists()
    assert counts == {"pictures": 6, "made": 4, "reused": 2, "failed": 0, "total": 6}
    after = stamps(out)
    assert len(after) == 6 and all(after[name] == stamp for name, stamp in first.items())
    assert job.run(given)["made"] == 0 and stamps(out) == after
    found = rows(out)
    assert [row["prompt"] for row in found] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [row["seed"] for row in found] == [str(seed) for seed in range(6)]
    assert Image.open(out / "grid.png").size[0] > 0
    assert json.loads((out / "report.json").read_text())["counts"]["pictures"] == 6

    # The same image as the pipeline makes in this process.
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, torch_dtype=torch.float32)
    size = {"height": 32, "width": 32, "num_inference_steps": 3, "cfg_scale": 2.0}
    expected = pipe(PROMPTS[0], seed=0, **size)
    assert isinstance(expected, Image.Image)
    assert Image.open(out / found[0]["image"]).tobytes() == expected.tobytes()

    # And a student learns from them, unsplit, without a word about columns.
    options: dict[str, Any] = {"task": "direct_distill", "max_steps": 1, "learning_rate": 1e-3}
    result = train_here(make_config(tiny_qwen, out, tmp_path / "lora", **options))
    assert (result.steps, result.samples) == (1, 6) and result.loss is not None


def test_strengths_failures_and_errors(tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = QwenImagePipeline.from_pretrained(tiny_qwen, models=["dit"], torch_dtype=torch.float32)
    add_lora(pipe.dit, rank=2, alpha=2, target_modules="to_q,to_out.0", seed=0, name="dit")
    for name, parameter in lora_parameters(pipe.dit).items():
        if "lora_B" in name:
            parameter.data.fill_(0.5)
    lora = str(tmp_path / "lora.safetensors")
    export_lora(lora_state(pipe.dit), prefix=pipe.lora_prefix, rank=2, alpha=2, path=lora)
    out = tmp_path / "out"
    given = {"prompt": "a cat", "seeds": "0", "lora": lora, "lora_scale": "0,1,9"}

    class Failing(pool.PainterActor):
        def paint(self, item: Item) -> str:
            if item.lora_scale == 9:
                raise RuntimeError("no memory")
            return super().paint(item)

    with monkeypatch.context() as patched:
        patched.setattr(pool, "PainterActor", Failing)
        with pytest.raises(GenerateError, match="1 of 3 images failed, .*no memory; the same command"):
            job.run(config(tiny_qwen, out, **given))
    assert [row["lora_scale"] for row in rows(out)] == ["0.0", "1.0"]
    without, with_lora = (Image.open(out / row["image"]).tobytes() for row in rows(out))
    assert without != with_lora
    report = json.loads((out / "report.json").read_text())
    assert (
        report["failures"][0]["reason"] == "RuntimeError: no memory" and report["loras"][0]["file"] == Path(lora).name
    )
    assert (out / "report.html").read_text().count("data:image/jpeg") == 2

    other = tmp_path / "other.safetensors"
    state = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(4, 2)}
    export_lora(state, prefix="diffusion_model.", rank=2, alpha=2, path=str(other))
    with pytest.raises(LoraError, match="layers that the dit does not have"):  # of an actor, as it was raised
        job.run(config(tiny_qwen, out, prompt="a cat", lora=str(other)))
    with pytest.raises(LoraError, match="absent.safetensors does not exist"):
        job.run(config(tiny_qwen, out, prompt="a cat", lora="absent.safetensors"))
    with pytest.raises(ClusterError, match="9 actors of 1 CPU"):
        job.run(config(tiny_qwen, tmp_path / "more", prompt="a", seeds="1,2,3,4,5,6,7,8,9", num_workers=9))
