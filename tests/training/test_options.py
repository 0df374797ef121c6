"""What the further options of training do: schedules, optimizers, averages, timesteps, dropout, validation, memory."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from ray_diffsynth.cache.errors import CacheError
from ray_diffsynth.diffusion.randomness import SampleKey
from ray_diffsynth.diffusion.timestep_sampling import TimestepSampling
from ray_diffsynth.errors import ConfigError
from ray_diffsynth.models.lora import read_lora
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.data.captions import drop_captions, is_dropped
from ray_diffsynth.training.data.loader import MicrobatchLoader
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.optim import OptimizerError, base_learning_rate, learning_rate, make_optimizer
from ray_diffsynth.training.quantize import ScaledLinear, quantize
from ray_diffsynth.training.report import memory
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.report.trackers import TrackerError
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.validation import ValidationError, choose_rows
from tests.training.conftest import CacheMaker
from tests.training.data.test_source import Numbers
from tests.training.helpers import Runs, make_config, train_here


def run(model: Path, base: Path, output: Path, **changes: Any) -> TrainResult:
    options = {"max_steps": 3, "log_with": "none", **changes}
    return train_here(make_config(model, base, output, **options))


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(str(output))]


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_learning_rates_are_those_of_diffusers(tmp_path: Path, name: str) -> None:
    from diffusers.optimization import get_scheduler

    config = make_config(tmp_path, tmp_path, tmp_path, lr_scheduler=name, lr_warmup_steps=4, learning_rate=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    rate = learning_rate(config, 20, 0.1)
    for step in range(20):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rate(0) == 0.0
    assert make_config(tmp_path, tmp_path, tmp_path, lr_warmup_steps=4).lr_scheduler == "constant_with_warmup"


class NoDecay(torch.optim.SGD):
    """Takes a learning rate, which it has no default for, and no weight decay."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)


def test_optimizers_by_import_path(tmp_path: Path) -> None:
    def made(**changes: Any) -> torch.optim.Optimizer:
        return make_optimizer([nn.Parameter(torch.zeros(2))], make_config(tmp_path, tmp_path, tmp_path, **changes))

    default = made(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6).param_groups[0]
    assert (default["betas"], default["eps"]) == ((0.8, 0.95), 1e-6)
    assert (made().param_groups[0]["betas"], made().param_groups[0]["eps"]) == ((0.9, 0.999), 1e-8)
    assert made(learning_rate=None).param_groups[0]["lr"] == 1e-4 and made().param_groups[0]["weight_decay"] == 0.01
    other = made(customized_optimizer="torch.optim:SGD", optimizer_arguments={"momentum": 0.5})
    assert type(other) is torch.optim.SGD and other.param_groups[0]["momentum"] == 0.5
    own = made(customized_optimizer="torch.optim:Adadelta", learning_rate=None)  # its own defaults hold
    assert (own.param_groups[0]["lr"], own.param_groups[0]["weight_decay"]) == (1.0, 0)
    config = make_config(tmp_path, tmp_path, tmp_path, customized_optimizer="torch.optim:Adadelta", learning_rate=None)
    assert base_learning_rate(own, config) == 1.0 and learning_rate(config, 5, 1.0)(3) == 1.0
    given = made(customized_optimizer="torch.optim:Adadelta", learning_rate=0.5, weight_decay=0.1).param_groups[0]
    assert (given["lr"], given["weight_decay"]) == (0.5, 0.1)
    here = "tests.training.test_options"
    with pytest.raises(OptimizerError, match="--weight_decay is given, but .*NoDecay takes no weight_decay"):
        made(customized_optimizer=f"{here}:NoDecay", weight_decay=0.1)
    with pytest.raises(OptimizerError, match="--learning_rate is missing: .*NoDecay has no default"):
        made(customized_optimizer=f"{here}:NoDecay", learning_rate=None)
    for path, words in (("torch.optim:Nothing", "Nothing"), ("no_module:X", "no_module"), ("torch:zeros", "zeros")):
        with pytest.raises(OptimizerError, match=words):
            made(customized_optimizer=path)
    with pytest.raises(OptimizerError, match="speed.*--optimizer_arguments"):
        made(customized_optimizer="torch.optim:SGD", optimizer_arguments={"speed": 1})


def test_bad_options_are_named(tmp_path: Path) -> None:
    for changes, words in (
        ({"log_with": "tensorbord"}, "did you mean tensorboard"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"num_workers": "8..1"}, "1..8"),
        ({"fp8_base": True, "use_dora": True}, "DoRA"),
        ({"customized_optimizer": "SGD!"}, "module:Class"),
        ({"gradient_checkpointing_every": 0}, "at least 1"),
        ({"timestep_sampling": "shift", "timestep_shift": 0.0}, "timestep_shift=0.0 is out of range"),
        ({"timestep_sampling": "shift", "timestep_shift": 1e300}, "timestep_shift=1e.300 is out of range"),
        ({"timestep_sampling": "logit_normal", "logit_mean": -1e6}, "logit_mean=-1000000.0 is out of range"),
        ({"timestep_sampling": "logit_normal", "logit_mean": float("nan")}, "logit_mean=nan is out of range"),
        ({"timestep_sampling": "logit_normal", "logit_std": 1e6}, "logit_std=1000000.0 is out of range"),
        ({"timestep_sampling": "mode", "mode_scale": 5.0}, "mode_scale=5.0 is out of range; use -1 to 1.75"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0 is out of range"),
        ({"lr_warmup_steps": 8, "max_steps": 8}, "lr_warmup_steps=8 leaves nothing of max_steps=8"),
        ({"lr_scheduler": "constant_with_warmup"}, "needs lr_warmup_steps"),
        ({"log_with": "none,csv"}, "none stands beside others"),
        (
            {
                "customized_optimizer": "torch.optim:SGD",
                "optimizer_arguments": {"weight_decay": 1},
                "weight_decay": 0.1,
            },
            "weight_decay is given twice",
        ),
        ({"customized_optimizer": "torch.optim:SGD", "optimizer_arguments": {"lr": 1.0}}, "use learning_rate"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_config(tmp_path, tmp_path, tmp_path, **changes)


def test_the_average_lags_behind_and_is_written(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    result = run(tiny_qwen, make_cache(), tmp_path, ema_decay=0.5)
    assert [Path(file).name for file in result.files] == ["step-3.safetensors", "step-3.ema.safetensors"]
    weights, average = (safetensors.torch.load_file(file) for file in result.files)
    key = next(name for name in weights if "lora_B" in name and weights[name].any())
    assert weights.keys() == average.keys() and not torch.equal(weights[key], average[key])
    assert 0 < float(average[key].norm()) < float(weights[key].norm())


@pytest.mark.parametrize("sampling", ["logit_normal", "mode", "shift"])
def test_timestep_samplings_train(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, sampling: str) -> None:
    run(tiny_qwen, make_cache(), tmp_path / "uniform")
    run(tiny_qwen, make_cache(), tmp_path / sampling, timestep_sampling=sampling)
    assert losses(tmp_path / "uniform") != losses(tmp_path / sampling)


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(0, 0, 0, str(number)) for number in range(count)]


def test_captions_are_dropped_by_key() -> None:
    samples = [{"caption": number, "latents": number} for number in range(1000)]
    dropped = drop_captions(samples, keys(1000), 0.1, {"caption": "empty"})
    gone = [number for number, sample in enumerate(dropped) if sample["caption"] == "empty"]
    assert 70 < len(gone) < 130
    assert gone == [number for number, key in enumerate(keys(1000)) if is_dropped(key, 0.1)]
    assert [sample["latents"] for sample in dropped] == list(range(1000))


def test_caption_dropout_in_the_unsplit_task_and_without_an_empty_caption(
    tiny_qwen: Path, images: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    run(tiny_qwen, images, tmp_path / "all", task="sft", caption_dropout=1.0)
    run(tiny_qwen, images, tmp_path / "none", task="sft")
    assert losses(tmp_path / "all") != losses(tmp_path / "none")
    with pytest.raises(CacheError, match="holds no empty caption"):  # this cache was not written by stage 1
        run(tiny_qwen, make_cache(), tmp_path / "cache", caption_dropout=0.5)


def test_a_warm_up_beyond_the_run_is_refused(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--lr_warmup_steps 10 leaves nothing of the run's 10 steps"):
        run(tiny_qwen, make_cache(), tmp_path, max_steps=None, num_epochs=1, lr_warmup_steps=10)


@pytest.mark.parametrize("values", [(20.0, 20.0), (-20.0, 20.0), (20.0, 0.0), (-20.0, 0.0)])
def test_the_widest_logits_stay_in_the_schedule(values: tuple[float, float]) -> None:
    drawn = TimestepSampling("logit_normal", *values)
    assert all(0 <= drawn.position(key) < 1 for key in keys(500))


def test_held_out_samples_are_never_trained_on() -> None:
    source = Numbers(**{"64x64": range(0, 30), "64x128": range(30, 47)})
    held_out = tuple(int(row) for row in choose_rows(9, 47, seed=1))
    assert len(held_out) == 9 and held_out == tuple(int(row) for row in choose_rows(9, 47, seed=1))
    loader = MicrobatchLoader(source, seed=3, batch_size=2, virtual_ranks=3, repeat=2, held_out=held_out)
    order = loader.order(0)
    counted = Counter(order.rows.reshape(-1).tolist())
    assert set(counted) == set(range(47)) - set(held_out)
    assert min(counted.values()) >= 2 and sum(counted.values()) - 2 * (47 - 9) == order.padded
    assert order.steps == loader.steps_per_epoch
    with pytest.raises(ValidationError, match="leaves nothing to train on"):
        choose_rows(47, 47, seed=1)


def test_the_validation_loss_is_fixed_and_logged(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation_samples": 3, "validation_steps": 2, "max_steps": 5, "log_every": 5}
    result = run(tiny_qwen, make_cache(), tmp_path / "a", log_with="csv", **options)
    assert (result.held_out, result.samples) == (3, 10)
    lines = read_metrics(str(tmp_path / "a"))
    assert [line["step"] for line in lines] == [2, 4, 5] and all("validation_loss" in line for line in lines)
    assert lines[-1]["validation_loss"] == result.validation_loss
    # A LoRA that does not move has one validation loss: noise and timesteps are the same each time.
    run(tiny_qwen, make_cache(), tmp_path / "still", **{**options, "learning_rate": 1e-30, "weight_decay": 0.0})
    assert len({line["validation_loss"] for line in read_metrics(str(tmp_path / "still"))}) == 1
    # The batch size changes what is trained together, not the held-out loss.
    run(tiny_qwen, make_cache(), tmp_path / "pairs", batch_size=2, **{**options, "learning_rate": 1e-30})
    found = [read_metrics(str(tmp_path / name))[0]["validation_loss"] for name in ("still", "pairs")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    table = list(csv.DictReader((tmp_path / "a/metrics.csv").open()))
    assert [float(row["loss"]) for row in table] == [line["loss"] for line in lines]


def test_losses_by_sigma_add_up(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(), tmp_path, max_steps=4, batch_size=2)
    for line in read_metrics(str(tmp_path)):
        parts = [value for name, value in line.items() if name.startswith("loss_sigma_")]
        assert 1 <= len(parts) <= 2 and line["workers"] == 1
        assert min(parts) <= line["loss"] + 1e-6 and max(parts) >= line["loss"] - 1e-6


def test_tensorboard_is_the_default(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tiny_qwen, make_cache(), tmp_path, max_steps=2)
    train_here(config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))
    with pytest.raises(TrackerError, match="pip install mlflow|--log_with mlflow"):
        run(tiny_qwen, make_cache(), tmp_path / "x", log_with="mlflow")


def test_every_kth_block_is_checkpointed(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    from ray_diffsynth.diffusion import gradient_checkpoint

    counts = []
    original = gradient_checkpoint.checkpoint
    for every in (1, 2, 3):
        used = 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal used
            used += 1
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(gradient_checkpoint, "checkpoint", counted)
            run(
                tiny_qwen,
                make_cache(),
                tmp_path / str(every),
                max_steps=1,
                use_gradient_checkpointing=True,
                gradient_checkpointing_every=every,
            )
        counts.append(used)
    assert counts == [4, 2, 2]  # two blocks; one forward for the probe, one for the step
    files = {(tmp_path / str(every) / "step-1.safetensors").read_bytes() for every in (1, 2, 3)}
    assert len(files) == 1


def test_eight_bit_weights_are_near_and_give_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight *= torch.logspace(-4, 0, 32)[:, None]  # rows of very different size
    layer.requires_grad_(False)
    x = torch.randn(5, 64, requires_grad=True)
    expected = layer(x)
    holder = nn.Sequential(layer)
    assert quantize(holder) == 1 and isinstance(holder[0], ScaledLinear)
    assert holder[0].weight.element_size() == 1
    restored = holder[0].weight.float() * holder[0].scale
    assert bool(((restored - layer.weight).abs() <= layer.weight.abs() / 16 + holder[0].scale * 2**-9).all())
    found = holder(x)
    assert float((found - expected).norm() / expected.norm()) < 0.05
    found.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 32) @ restored)


def test_training_on_an_eight_bit_base(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(), tmp_path / "fp8", fp8_base=True)
    run(tiny_qwen, make_cache(), tmp_path / "whole")
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)
    assert losses(tmp_path / "fp8") != losses(tmp_path / "whole")


def test_out_of_memory_says_what_to_try_with_numbers(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("ray_diffsynth.training.precision.Precision.backward", full)
    with pytest.raises(
        memory.OutOfMemory, match=r"Tried to allocate 2.00 GiB.*frozen weights 0\.4 MB.*--fp8_base 0\.\d MB"
    ):
        run(tiny_qwen, make_cache(), tmp_path)
    found = memory.Footprint(base=40_000_000_000, linear=19_000_000_000, trained=400_000_000, peak=60_000_000_000)
    text = memory.report(found, make_config(tiny_qwen, tmp_path, tmp_path, batch_size=4), workers=4)
    assert "60.00 GB at the peak of step 1: frozen weights 40.00 GB" in text and "activations 19.60 GB" in text
    assert "--fp8_base 19.00 GB" in text and "--shard_base 30.00 GB" in text
    assert "--batch_size 1 --gradient_accumulation_steps 4 14.70 GB" in text


@pytest.mark.parametrize(
    "changes", [{"use_rslora": True, "lora_alpha": 8.0}, {"use_dora": True}, {"lora_dropout": 0.5}], ids=str
)
def test_kinds_of_lora_go_round(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The file that a run writes starts another one where the first was: the next step's loss is the same."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0}
    run(tiny_qwen, make_cache(), tmp_path / "a", max_steps=3, **changes)
    file = tmp_path / "a/step-3.safetensors"
    for layout in ("family", "diffusers"):
        options = {**changes, **still, "lora_dropout": 0.0, "lora_format": layout, "max_steps": 1}
        run(tiny_qwen, make_cache(), tmp_path / layout, lora_checkpoint=str(file), **options)
        written = tmp_path / layout / "step-1.safetensors"
        first, second = read_lora(str(file))[0], read_lora(str(written))[0]
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7)
        own = layout == "diffusers" or "use_dora" in changes  # diffusers converts no other names of a DoRA
        starts = "transformer." if own else "diffusion_model."
        assert all(key.startswith(starts) for key in safetensors.torch.load_file(written))
    if "use_dora" in changes:
        assert any("lora_magnitude_vector" in key for key in first)
    else:  # fused into the base it has the same effect
        run(tiny_qwen, make_cache(), tmp_path / "fused", preset_lora_path=str(written), max_steps=1, **still)
        assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "diffusers"), rel=1e-5)


def test_a_remote_cache_is_copied_to_the_node(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    import fsspec

    memory_files = fsspec.filesystem("memory")
    memory_files.put(f"{make_cache()}/", "/options-test/cache/", recursive=True)
    options = {"max_steps": 2, "shard_cache": str(tmp_path / "node")}
    run(tiny_qwen, "memory://options-test/cache", tmp_path / "far", **options)  # type: ignore[arg-type]
    run(tiny_qwen, make_cache(), tmp_path / "near", max_steps=2)
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
    assert list((tmp_path / "node").glob("*.copy"))


@pytest.mark.slow
def test_two_workers_share_the_base(runs: Runs, tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    """FSDP2 on two gloo processes: each holds half of the frozen weights, and the LoRA is that of one worker."""
    options: dict[str, Any] = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-3}
    options |= {"validation_samples": 1, "validation_steps": 1}
    run(tiny_qwen, make_cache(), tmp_path / "one", gradient_accumulation_steps=2, **options)
    assert runs(tmp_path / "two", workers=2, shard_base=True, log_with="none", **options) == [0, 0], runs.messages()
    first, second = (safetensors.torch.load_file(tmp_path / name / "epoch-0.safetensors") for name in ("one", "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-5
    plan = RunPlan.resolve(make_config(tiny_qwen, make_cache(), tmp_path, **options))
    whole, _ = build_module(plan, torch.device("cpu"))
    frozen = sum(p.numel() * p.element_size() for p in whole.parameters() if not p.requires_grad)
    held = [json.loads((tmp_path / f"two.meet-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(held) == pytest.approx(frozen, rel=0.02) and max(held) < 0.55 * frozen


def test_eight_bits_without_a_frozen_layer_are_refused(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="--fp8_base finds no frozen linear layer in dit"):
        run(tiny_qwen, make_cache(), tmp_path, fp8_base=True, trainable_models="dit")
