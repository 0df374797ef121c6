"""The loop on the tiny model: the split is exact, resume is exact, and errors come before step 0."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ray_diffsynth.models.lora import LoraError
from ray_diffsynth.plan.run_plan import RunPlan
from ray_diffsynth.training.checkpoint import CheckpointError
from ray_diffsynth.training.data.source import SourceError
from ray_diffsynth.training.errors import TrainingError
from ray_diffsynth.training.report.metrics_log import read_metrics
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.runtime import LocalRuntime
from ray_diffsynth.training.start import Start
from ray_diffsynth.training.trainer import train
from tests.training.conftest import CacheMaker
from tests.training.helpers import make_config

CPU = "cpu"


class StopAt(LocalRuntime):
    """A worker that is asked to end, or dies, after `step` steps."""

    def __init__(self, step: int, *, die: bool = False) -> None:
        super().__init__(CPU, progress=False)
        self._step, self._die = step, die

    def report(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self._step:
            if self._die:
                raise KeyboardInterrupt
            self.request_stop()


def run(model: Path, base: Path, output: Path, runtime: LocalRuntime | None = None, **changes: Any) -> TrainResult:
    return train(
        RunPlan.resolve(make_config(model, base, output, **changes)), runtime or LocalRuntime(CPU, progress=False)
    )


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(str(output))]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_split_equals_unsplit_bit_for_bit(
    tiny_qwen: Path, without_encoders: Path, images: Path, make_cache: CacheMaker, tmp_path: Path, batch_size: int
) -> None:
    """The split is exact, and its second stage needs no encoder: the model folder has no encoder weights at all."""
    split = run(without_encoders, make_cache(), tmp_path / "split", batch_size=batch_size, max_steps=8)
    whole = run(tiny_qwen, images, tmp_path / "whole", task="sft", batch_size=batch_size, max_steps=8)
    assert split.steps == whole.steps == 8
    assert (tmp_path / "split/step-8.safetensors").read_bytes() == (tmp_path / "whole/step-8.safetensors").read_bytes()
    assert losses(tmp_path / "split") == losses(tmp_path / "whole")


def test_loss_falls_and_files_are_named_by_epoch(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    result = run(tiny_qwen, make_cache(), tmp_path, num_epochs=30, batch_size=2, loss_weighting="none")
    assert result.finished
    assert (result.steps_per_epoch, result.padded, result.samples) == (5, 0, 10)
    assert [Path(f).name for f in result.files] == [f"epoch-{e}.safetensors" for e in range(30)]
    loss = losses(tmp_path)
    assert sum(loss[-25:]) < 0.97 * sum(loss[:25])
    keys = safetensors.torch.load_file(tmp_path / "epoch-29.safetensors")
    assert all(key.startswith("diffusion_model.transformer_blocks.") for key in keys)


def test_parameters_without_gradient_are_found(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        result = run(tiny_qwen, make_cache(), tmp_path, max_steps=1)
    assert result.unused == 2  # to_add_out of the last block, A and B
    assert "2 of the trained parameters get no gradient" in caplog.text
    assert "transformer_blocks.1.attn.to_add_out" in caplog.text


@pytest.mark.parametrize("stop", [1, 5, 7])
@pytest.mark.parametrize("die", [False, True])
def test_resume_is_bit_for_bit(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path, stop: int, die: bool) -> None:
    """Ended at the start, on an epoch's boundary and within an epoch; asked to, or killed between two checkpoints."""
    options: dict[str, Any] = {"num_epochs": 3, "batch_size": 2, "max_steps": 12}
    if die:
        options["save_steps"] = 3
    run(tiny_qwen, make_cache(), tmp_path / "whole", **options)
    if die:
        with pytest.raises(KeyboardInterrupt):
            run(tiny_qwen, make_cache(), tmp_path / "parts", StopAt(stop, die=True), **options)
    else:
        first = run(tiny_qwen, make_cache(), tmp_path / "parts", StopAt(stop), **options)
        assert first.steps == stop + 1
    torch.manual_seed(99)  # nothing may hang on the global generator
    second = run(tiny_qwen, make_cache(), tmp_path / "parts", **options)
    assert second.started_at == (stop // 3 * 3 if die else stop + 1)
    names = {path.name for path in (tmp_path / "whole").glob("*.safetensors")}
    assert names == {path.name for path in (tmp_path / "parts").glob("*.safetensors")}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    tensors = "checkpoints/step-00000012/tensors.safetensors"
    assert (tmp_path / "whole" / tensors).read_bytes() == (tmp_path / "parts" / tensors).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_finished_run_does_nothing_and_can_be_extended(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    run(tiny_qwen, make_cache(), tmp_path / "a", max_steps=3)
    again = run(tiny_qwen, make_cache(), tmp_path / "a", max_steps=3)
    assert (again.steps, again.started_at, again.files) == (3, 3, [])
    longer = run(tiny_qwen, make_cache(), tmp_path / "a", max_steps=6)
    assert longer.started_at == 3
    run(tiny_qwen, make_cache(), tmp_path / "b", max_steps=6)
    assert (tmp_path / "a/step-6.safetensors").read_bytes() == (tmp_path / "b/step-6.safetensors").read_bytes()


def test_another_configuration_or_cache_is_refused(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(), tmp_path, max_steps=1)
    with pytest.raises(CheckpointError, match=r"learning_rate: 0.01 there, 0.001 here; lora_rank: 4 there, 8 here"):
        run(tiny_qwen, make_cache(), tmp_path, max_steps=2, learning_rate=1e-3, lora_rank=8)
    with pytest.raises(CheckpointError, match=r"\(data: 10 samples then and now"):
        run(tiny_qwen, make_cache(max_pixels=32 * 32), tmp_path, max_steps=2)


def test_a_refused_command_leaves_the_run_to_the_one_that_began_it(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    cache, out = make_cache(), tmp_path / "out"
    own = {"max_steps": 6, "save_steps": 2}
    first = make_config(tiny_qwen, cache, out, resume="never", **own)
    Start.of(first).begin()
    run(tiny_qwen, cache, out, StopAt(3), **own)
    refused = make_config(tiny_qwen, cache, out, learning_rate=1e-3, **own)
    Start.of(refused).begin()
    with pytest.raises(CheckpointError, match=r"learning_rate: 0.01 there, 0.001 here"):
        run(tiny_qwen, cache, out, learning_rate=1e-3, **own)
    assert Start.of(first).goes_on
    longer = {**own, "max_steps": 8}
    Start.of(make_config(tiny_qwen, cache, out, **longer)).begin()
    run(tiny_qwen, cache, out, **longer)
    assert not Start.of(first).goes_on  # it has become the run of the command that says more


def test_a_cache_of_something_else_is_refused_before_any_weights_are_read(
    without_encoders: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    for weights in (without_encoders / "transformer").glob("*.safetensors"):
        assert weights.exists()
    with pytest.raises(SourceError, match=r"for trained models 'dit', this training for 'text_encoder'; run stage 1"):
        run(without_encoders, make_cache(), tmp_path, trainable_models="text_encoder")
    other = tmp_path / "other"
    other.mkdir()
    manifest = json.loads((make_cache() / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "family": "flux"}))
    with pytest.raises(SourceError, match=r"for family 'flux', this training for 'qwen_image'"):
        run(without_encoders, other, tmp_path)
    (other / "manifest.json").write_text(json.dumps({**manifest, "parameters": ["input_latents"]}))
    with pytest.raises(SourceError, match=r"lacks prompt_embeds.*holds input_latents"):
        run(without_encoders, other, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_targets_that_match_nothing(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"to_qq.*did you mean"):
        run(tiny_qwen, make_cache(), tmp_path, lora_target_modules="to_qq")


def test_accumulation_is_a_larger_batch(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    """Ten virtual ranks with a sample each train what five with two do: the same samples with the same noise."""
    for name, batch_size, virtual_ranks in (("one", 1, 10), ("two", 2, 5)):
        options = {"batch_size": batch_size, "gradient_accumulation_steps": virtual_ranks, "max_steps": 3}
        result = run(tiny_qwen, make_cache(), tmp_path / name, **options)
        assert result.steps_per_epoch == 1
    one, two = (read_metrics(str(tmp_path / name)) for name in ("one", "two"))
    for value in ("loss", "grad_norm"):
        assert [line[value] for line in one] == pytest.approx([line[value] for line in two], rel=1e-4)
    first, second = (safetensors.torch.load_file(tmp_path / name / "epoch-2.safetensors") for name in ("one", "two"))
    # A LoRA B moves by about the learning rate in each step, whatever the gradient's size: compare with that.
    assert max(float((first[name] - second[name]).abs().mean()) for name in first) <= 1e-4


def test_gradient_checkpointing_changes_nothing(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(), tmp_path / "plain", max_steps=3)
    run(tiny_qwen, make_cache(), tmp_path / "less", max_steps=3, use_gradient_checkpointing_offload=True)
    assert (tmp_path / "plain/step-3.safetensors").read_bytes() == (tmp_path / "less/step-3.safetensors").read_bytes()


def test_a_cache_of_another_dtype_is_cast(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(dtype="bfloat16"), tmp_path / "a", max_steps=2)
    run(tiny_qwen, make_cache(), tmp_path / "b", max_steps=2)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=0.02)


def test_bfloat16_with_fp32_lora(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(dtype="bfloat16"), tmp_path, dtype="bfloat16", max_steps=2)
    state = safetensors.torch.load_file(tmp_path / "step-2.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert any(bool(value.any()) for name, value in state.items() if "lora_B" in name)


@pytest.mark.parametrize(
    "changes",
    [{"trainable_models": "text_encoder"}, {"lora_base_model": "text_encoder", "lora_target_modules": "q_proj,v_proj"}],
    ids=["full", "lora"],
)
def test_training_the_text_encoder_moves_its_unit_to_stage_2(
    tiny_qwen: Path, images: Path, make_cache: CacheMaker, tmp_path: Path, changes: dict[str, Any]
) -> None:
    cache = make_cache(**changes)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert sorted(manifest["parameters"]) == ["input_latents", "prompt"]
    run(tiny_qwen, cache, tmp_path / "split", max_steps=3, learning_rate=1e-3, **changes)
    run(tiny_qwen, images, tmp_path / "whole", task="sft", max_steps=3, learning_rate=1e-3, **changes)
    trained = tmp_path / "split/step-3.safetensors"
    assert trained.read_bytes() == (tmp_path / "whole/step-3.safetensors").read_bytes()
    state = safetensors.torch.load_file(trained)
    if "trainable_models" in changes:
        # The file takes the place of the model's own weights.
        from transformers import Qwen2_5_VLForConditionalGeneration as TextEncoder

        before = TextEncoder.from_pretrained(str(tiny_qwen / "text_encoder")).state_dict()
        folder = Path(shutil.copytree(tiny_qwen / "text_encoder", tmp_path / "text_encoder"))
        shutil.copy(trained, folder / "model.safetensors")
        after = TextEncoder.from_pretrained(str(folder)).state_dict()
        assert all(torch.equal(after[name], value) for name, value in state.items())
        assert any("q_proj" in name and not torch.equal(after[name], before[name]) for name in before)
    else:
        assert all(name.startswith("text_encoder.") for name in state)
        assert any(bool(value.any()) for name, value in state.items() if "lora_B" in name)


def test_training_both_a_lora_and_a_whole_model(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    changes = {"trainable_models": "text_encoder", "lora_base_model": "dit"}
    result = run(tiny_qwen, make_cache(**changes), tmp_path, max_steps=1, **changes)
    assert [Path(f).name for f in result.files] == ["step-1.safetensors", "step-1.text_encoder.safetensors"]


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(
    tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"the loss is not finite for .*\.png .*nonfinite-step-"):
        run(tiny_qwen, make_cache(), tmp_path, learning_rate=1e30)
    (dump,) = tmp_path.glob("nonfinite-step-*.json")
    assert json.loads(dump.read_text())["samples"][0]["sample_id"].endswith(".png")


def test_starting_from_a_lora_file(tiny_qwen: Path, make_cache: CacheMaker, tmp_path: Path) -> None:
    run(tiny_qwen, make_cache(), tmp_path / "a", max_steps=2)
    start = str(tmp_path / "a/step-2.safetensors")
    run(tiny_qwen, make_cache(), tmp_path / "b", max_steps=1, lora_checkpoint=start)
    run(tiny_qwen, make_cache(), tmp_path / "c", max_steps=1, preset_lora_path=start)
    files = [tmp_path / name for name in ("a/step-2.safetensors", "b/step-1.safetensors", "c/step-1.safetensors")]
    assert len({file.read_bytes() for file in files}) == 3
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "c"), rel=1e-5)
