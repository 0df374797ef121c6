"""What a run does when something goes wrong in a step, at its start or with its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ray_diffsynth.models.lora import add_lora, leave_casts_to_autocast
from ray_diffsynth.plan.run_plan import RunPlan, TrainPlan
from ray_diffsynth.training import trainer
from ray_diffsynth.training.checkpoint import CheckpointError, list_checkpoints, newest_checkpoint
from ray_diffsynth.training.data.loader import MicrobatchLoader
from ray_diffsynth.training.data.opening import open_data
from ray_diffsynth.training.data.source import DatasetSource
from ray_diffsynth.training.ema import Ema
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.module import DiffusionTrainingModule
from ray_diffsynth.training.optim import OptimizerError
from ray_diffsynth.training.optimization import Optimization
from ray_diffsynth.training.precision import Precision
from ray_diffsynth.training.report import memory
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.result import TrainResult
from tests.training.conftest import CacheMaker
from tests.training.helpers import Runs, make_config, train_here, write_cache


def run(model: Path, base: Path, output: Path, **changes: Any) -> TrainResult:
    options = {"max_steps": 3, "log_with": "none", **changes}
    return train_here(make_config(model, base, output, **options))


def poisoned(step: int) -> Callable[[Any], float]:
    """`Optimization.clip` that finds an infinite gradient in the `step`-th step."""
    clip, count = Optimization.clip, 0

    def poison(self: Any) -> float:
        nonlocal count
        count += 1
        if count == step:
            next(iter(self.state.parameters.values())).grad[0] = float("inf")
        return clip(self)

    return poison


def whole(output: Path) -> bool:
    """Whether all files and checkpoints of a run hold finite numbers."""
    return all(
        bool(torch.isfinite(value).all())
        for file in (*output.glob("*.safetensors"), *output.glob("checkpoints/*/*.safetensors"))
        for value in safetensors.torch.load_file(file).values()
    )


def test_a_gradient_that_is_not_finite_stops_before_it_does_harm(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1, "num_epochs": 9}
    run(tiny_qwen, make_cache(), tmp_path / "undisturbed", **options)
    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "clip", poisoned(3))
        last = tmp_path / "out/step-2.safetensors"
        with pytest.raises(
            TrainingError,
            match=rf"step 3: the gradient is not finite.*\.png, .*another --output_path and --lora_checkpoint {last}",
        ):
            run(tiny_qwen, make_cache(), tmp_path / "out", **options)
    assert list_checkpoints(str(tmp_path / "out"))[-1] == "step-00000002" and whole(tmp_path / "out")
    dump = json.loads((tmp_path / "out/nonfinite-step-3.json").read_text())
    assert dump["not_finite"] == "gradient" and len(dump["samples"]) == 4
    # The samples are written as they were read.
    data = open_data(RunPlan.resolve(make_config(tiny_qwen, make_cache(), tmp_path)))
    for sample in dump["samples"]:
        (read,) = data.fetch([list(data.sample_ids).index(sample["sample_id"])])
        kept = safetensors.torch.load_file(tmp_path / "out" / sample["tensors"])
        for name, value in read.items():
            assert torch.equal(kept[f"{sample['lane']}-{sample['position']}/{name}"], value)
    run(tiny_qwen, make_cache(), tmp_path / "out", **options)  # once more, without the fault
    name = "step-3.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_weights_that_are_not_finite_are_never_written(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Optimization.clip

    def overflow(self: Any) -> float:
        next(iter(self.state.parameters.values())).data[0] = float("inf")
        return clip(self)

    monkeypatch.setattr(Optimization, "clip", overflow)
    with pytest.raises(TrainingError, match="step 1: the trained weights are not finite; no file was written"):
        run(tiny_qwen, make_cache(), tmp_path, save_steps=1)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_gradient_scaler_leaves_such_a_step_out_and_its_state_goes_on(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with float16 on a GPU, by a scaler that works on the CPU: weights and average stay, the scale is halved."""
    made = Precision.__init__

    def scaling(self: Precision, device: torch.device, dtype: str) -> None:
        made(self, device, dtype)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    monkeypatch.setattr(Precision, "__init__", scaling)
    options: dict[str, Any] = {"save_steps": 1, "keep_checkpoints": 9, "ema_decay": 0.5, "max_steps": 4}
    with monkeypatch.context() as patched:
        patched.setattr(Optimization, "clip", poisoned(2))
        run(tiny_qwen, make_cache(), tmp_path / "out", **options)
    first, second, third = (
        safetensors.torch.load_file(tmp_path / f"out/checkpoints/step-0000000{step}/tensors.safetensors")
        for step in (1, 2, 3)
    )
    kept = [name for name in first if name.startswith(("trainable/", "ema/"))]
    assert all(torch.equal(first[name], second[name]) for name in kept)
    assert any(not torch.equal(second[name], third[name]) for name in kept if name.startswith("ema/"))
    found = newest_checkpoint(str(tmp_path / "out"))
    assert found is not None and found.numbers["scaler"]["scale"] == 512.0 and whole(tmp_path / "out")
    # From the checkpoint of step 2 the run ends in the same bytes.
    chosen = tmp_path / "again/checkpoints"
    chosen.mkdir(parents=True)
    shutil.copytree(tmp_path / "out/checkpoints/step-00000002", chosen / "step-00000002")
    run(tiny_qwen, make_cache(), tmp_path / "again", **options)
    for name in ("step-4.safetensors", "step-4.ema.safetensors", "checkpoints/step-00000004/tensors.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_average_is_its_formula(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = Ema({"w": weight}, decay=0.25)
    expected = torch.tensor([1.0, 2.0])
    for step in range(1, 5):
        with torch.no_grad():
            weight.copy_(torch.tensor([float(step), -1.0]))
        ema.update(step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(ema.average["w"], expected)
    # And so in a run: B starts at zero.
    run(tiny_qwen, make_cache(), tmp_path, ema_decay=0.5, save_steps=1)
    weights = [safetensors.torch.load_file(tmp_path / f"step-{step}.safetensors") for step in (1, 2, 3)]
    average = safetensors.torch.load_file(tmp_path / "step-3.ema.safetensors")
    for name in (name for name in average if "lora_B" in name):
        value = torch.zeros_like(average[name])
        for step, state in enumerate(weights, start=1):
            decay = min(0.5, (1 + step) / (10 + step))
            value = decay * value + (1 - decay) * state[name]
        torch.testing.assert_close(average[name], value, rtol=1e-5, atol=1e-8)


def test_damaged_checkpoints_alone_are_an_error_and_lose_nothing(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    run(tiny_qwen, make_cache(), tmp_path, save_steps=1)
    for file in tmp_path.glob("checkpoints/*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints.*is damaged.*--resume never"):
        run(tiny_qwen, make_cache(), tmp_path, max_steps=4)
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3]


def test_a_preset_is_known_by_its_content_and_a_start_is_left_behind(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    run(tiny_qwen, make_cache(), tmp_path / "a")
    run(tiny_qwen, make_cache(), tmp_path / "b", learning_rate=0.1)
    preset = tmp_path / "preset.safetensors"
    shutil.copy(tmp_path / "a/step-3.safetensors", preset)
    run(tiny_qwen, make_cache(), tmp_path / "out", preset_lora_path=str(preset), max_steps=1)
    moved = shutil.move(preset, tmp_path / "moved.safetensors")
    assert run(tiny_qwen, make_cache(), tmp_path / "out", preset_lora_path=str(moved), max_steps=2).started_at == 1
    shutil.copy(tmp_path / "b/step-3.safetensors", moved)
    with pytest.raises(CheckpointError, match=r"preset_lora_path: content \w+ there, content \w+ here"):
        run(tiny_qwen, make_cache(), tmp_path / "out", preset_lora_path=str(moved), max_steps=3)

    start = {"lora_checkpoint": str(moved)}
    run(tiny_qwen, make_cache(), tmp_path / "from", max_steps=1, **start)
    moved.unlink()
    assert run(tiny_qwen, make_cache(), tmp_path / "from", max_steps=2, **start).started_at == 1


def test_an_option_that_a_checkpoint_does_not_know_had_its_default(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    def forget(name: str) -> Path:
        """A run of a version that had no option `name` yet, but one that is no more."""
        output = tmp_path / name
        identity = trainer.identity

        def older(plan: TrainPlan, data: Any) -> dict[str, Any]:
            found = identity(plan, data)
            return {"old_option": 7, **{key: value for key, value in found.items() if key != name}}

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(trainer, "identity", older)
            run(tiny_qwen, make_cache(), output, max_steps=1)
        return output

    output = forget("lora_dropout")
    assert run(tiny_qwen, make_cache(), output, max_steps=2).started_at == 1
    with pytest.raises(CheckpointError, match=r"lora_dropout: 0.0 there, 0.5 here"):
        run(tiny_qwen, make_cache(), output, max_steps=3, lora_dropout=0.5)


@pytest.mark.slow
def test_a_sample_of_another_worker_is_named_too(
    runs: Runs, tiny_qwen: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two workers reads latents that are not numbers; both name the sample."""
    plan = RunPlan.resolve(make_config(tiny_qwen, images, tmp_path, task="sft"))
    data = open_data(plan)
    assert isinstance(data, DatasetSource)
    bad = int(MicrobatchLoader(data, seed=0, batch_size=1, virtual_ranks=2, repeat=1).order(0).rows[0, 1, 0])
    encode, count = DiffusionTrainingModule.encode, iter(range(10))

    def encoded(self: DiffusionTrainingModule, sample: Any) -> dict[str, Any]:
        values = encode(self, sample)
        return {**values, "input_latents": values["input_latents"] * (float("nan") if next(count) == bad else 1)}

    monkeypatch.setattr(DiffusionTrainingModule, "encode", encoded)
    poisoned_cache = Runs.__new__(Runs)
    poisoned_cache.__dict__ = {**runs.__dict__, "cache": write_cache(plan, data, tmp_path / "cache")}
    assert poisoned_cache(tmp_path / "out", workers=2, log_with="none") == [1, 1]
    logged = runs.messages().split("step 1: the loss is not finite for ")[1:]
    assert [text.split()[0] for text in logged] == [data.sample_ids[bad]] * 2
    (sample,) = json.loads((tmp_path / "out/nonfinite-step-1.json").read_text())["samples"]
    assert (sample["sample_id"], sample["lane"]) == (data.sample_ids[bad], 1)
    tensors = safetensors.torch.load_file(tmp_path / "out/nonfinite-step-1.worker-1.safetensors")
    assert tensors["1-0/input_latents"].isnan().all() and not tensors["1-0/prompt_embeds"].isnan().any()
    assert not (tmp_path / "out/nonfinite-step-1.worker-0.safetensors").exists()


class Unsaveable(torch.optim.SGD):
    """Keeps what no checkpoint can hold."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["seen"] = {1, 2}
        return super().step(closure)


def test_an_optimizer_that_cannot_be_saved_is_found_at_step_1(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    with pytest.raises(OptimizerError, match="keeps a set as 'seen'"):
        run(tiny_qwen, make_cache(), tmp_path, customized_optimizer="tests.training.test_gone_wrong:Unsaveable")
    assert read_metrics(str(tmp_path)) == []


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("where", "options"),
    [
        ("ray_diffsynth.training.build.add_lora", {}),
        ("ray_diffsynth.training.optimization.make_optimizer", {}),
        ("ray_diffsynth.training.optimization.wrap_ddp", {}),
        ("ray_diffsynth.training.validation.ValidationLoss.loss", {"validation_samples": 1, "validation_steps": 1}),
    ],
)
def test_out_of_memory_is_explained_wherever_it_comes(
    tiny_qwen: Path,
    make_cache: CacheMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(where, full)
    with pytest.raises(memory.OutOfMemory, match=r"Tried to allocate 2.00 GiB.*frozen weights 0\.4 MB.*--fp8_base 0\."):
        run(tiny_qwen, make_cache(), tmp_path, **options)


def test_what_would_save_memory_can_be_given(tmp_path: Path) -> None:
    found = memory.Footprint(base=40_000_000_000, linear=19_000_000_000, trained=400_000_000, peak=0)

    def ways(**changes: Any) -> list[str]:
        config = make_config(tmp_path, tmp_path, tmp_path, **changes)
        names = [way.split()[0].removeprefix("--") for way in memory.savings(found, config, 4)]
        for name in names:
            make_config(tmp_path, tmp_path, tmp_path, **changes, **{name: True})
        return names

    assert ways() == ["fp8_base", "shard_base"]
    assert ways(shard_base=True) == ways(fp8_base=True) == []
    assert ways(use_dora=True) == ["shard_base"]
    assert ways(trainable_models="dit") == ["fp8_base"]


class Attention(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.to_q(x) + self.to_k(x) + self.to_v(x)
        return result


@pytest.mark.parametrize("dora", [False, True])
def test_layers_share_the_input_that_they_save(dora: bool) -> None:
    """Under autocast: the same result and gradients, without a copy of the input for each LoRA layer."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def measured(alone: bool) -> tuple[int, torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = Attention().bfloat16()
        add_lora(model, rank=4, alpha=None, target_modules="to_q,to_k,to_v", seed=0, name="dit", dora=dora)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.add_(0.1)
        if not alone:
            leave_casts_to_autocast(model)
        held: dict[int, torch.Tensor] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            if value.shape == x.shape:
                held[value.data_ptr()] = value  # kept, so that no other takes its place
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            y = model(x.clone().requires_grad_() * 1)
        y.float().square().mean().backward()
        gradients = [p.grad for p in trained if p.grad is not None]
        return sum(value.nbytes for value in held.values()), y.detach(), gradients

    (before, expected, old), (after, found, new) = measured(True), measured(False)
    assert torch.equal(found, expected)
    assert len(old) == len(new) and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    if dora:
        assert before == after
    else:
        assert (before, after) == (3 * x.nbytes, x.nbytes)
