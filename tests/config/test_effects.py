"""No option is ignored: each does something, or is refused or noted where it could not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_diffsynth.config import GenerateConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.config.options import has_effect, options_of
from ray_diffsynth.errors import ConfigError

GIVEN: dict[str, Any] = {"dataset_base_path": "data", "model": "tiny"}
FULL: dict[str, Any] = {"trainable_models": "dit"}
OWN: dict[str, Any] = {"customized_optimizer": "torch.optim:SGD"}
DISTILL: dict[str, Any] = {"task": "direct_distill"}
CHECKPOINTING: dict[str, Any] = {"use_gradient_checkpointing": True}

# Option: (value, configuration in which it does nothing, configuration in which it does something).
REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "adam_beta1": (0.9, OWN, {}),
    "adam_beta2": (0.999, OWN, {}),
    "adam_epsilon": (1e-8, OWN, {}),
    "optimizer_arguments": ({"momentum": 0.9}, {}, OWN),
    "loss_weighting": ("none", DISTILL, {}),
    "timestep_sampling": ("mode", DISTILL, {}),
    "logit_mean": (0.0, {"timestep_sampling": "mode"}, {"timestep_sampling": "logit_normal"}),
    "logit_std": (1.0, {}, {"timestep_sampling": "logit_normal"}),
    "mode_scale": (1.29, {}, {"timestep_sampling": "mode"}),
    "timestep_shift": (3.0, {}, {"timestep_sampling": "shift"}),
    "lora_target_modules": ("to_q", FULL, {}),
    "lora_rank": (32, FULL, {}),
    "lora_alpha": (8.0, FULL, {}),
    "lora_checkpoint": ("a.safetensors", FULL, {}),
    "lora_dropout": (0.1, FULL, {}),
    "use_rslora": (True, FULL, {}),
    "use_dora": (True, FULL, {}),
    "lora_format": ("diffusers", FULL, {}),
    "preset_lora_model": ("dit", {}, {"preset_lora_path": "a.safetensors"}),
    "gradient_checkpointing_every": (1, {}, CHECKPOINTING),
    "shard_base": (True, {"num_workers": 1}, {"num_workers": 2}),
    "validation_steps": (5, {}, {"validation_samples": 2}),
    "sample_steps": (5, {}, {"validation_prompts": "a cat"}),
    "sample_inference_steps": (5, {}, {"validation_prompts": "a cat"}),
    "sample_resources": ({"CPU": 1.0}, {}, {"validation_prompts": "a cat"}),
    "sample_node_labels": ({"stage": "train"}, {}, {"validation_prompts": "a cat"}),
    "shard_cache": ("/tmp", {}, {"dataset_base_path": "s3://a/b"}),
    "shard_cache_gb": (100.0, {}, {"dataset_base_path": "s3://a/b", "shard_cache": "/tmp"}),
}
UNSPLIT: dict[str, Any] = {"task": "sft"}
NOTED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "data_file_keys": ("picture", {}, UNSPLIT),
    "dataset_metadata_path": ("a.csv", {}, UNSPLIT),
    "dataset_split": ("test", {}, UNSPLIT),
    "image_column": ("photo", {}, UNSPLIT),
    "caption_column": ("text", {}, UNSPLIT),
    "column_map": ({"image": "photo"}, {}, UNSPLIT),
    "extra_inputs": ("edit_image", {}, UNSPLIT),
    "height": (64, {"width": 64}, {"width": 64, "validation_prompts": "a cat"}),
    "width": (64, {"height": 64}, {"height": 64, "task": "sft"}),
    "max_pixels": (4096, {"height": 64, "width": 64, "task": "sft"}, UNSPLIT),
    "resolution": ("64", {}, UNSPLIT),
    "num_frames": (5, {}, UNSPLIT),
    "fps": (5.0, {}, UNSPLIT),
    "max_upscale": (2.0, {}, UNSPLIT),
    "max_crop": (0.5, {}, UNSPLIT),
    "max_decode_memory": (2.0, {}, UNSPLIT),
    "tokenizer_path": ("a", {}, {"trainable_models": "text_encoder"}),
    "processor_path": ("a", {}, {"validation_prompts": "a cat"}),
    "min_timestep_boundary": (0.1, DISTILL, {}),
    "max_timestep_boundary": (0.9, DISTILL, {}),
}


def test_each_option_that_needs_something_is_tried() -> None:
    known = options_of(TrainConfig) | options_of(PreprocessConfig) | options_of(GenerateConfig)
    tried = REFUSED.keys() | NOTED.keys() | {"num_workers", "resources"}  # these two: of preprocess
    needing = {
        name for config in (TrainConfig, PreprocessConfig) for name, o in options_of(config).items() if o.effects
    }
    assert tried == needing | {"num_workers"}
    assert all(option.effects for option in known.values() if option.used_as is not None)


def argv(values: dict[str, Any]) -> list[str]:
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_do_nothing_is_refused_however_it_is_given(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, without, with_effect = REFUSED[name]
    assert has_effect(TrainConfig(**{**GIVEN, **with_effect, name: value}), name)
    with pytest.raises(ConfigError, match=f"would have no effect: {name}: ") as error:
        TrainConfig(**{**GIVEN, **without, name: value})
    assert "leave it out" in str(error.value) or "raise num_workers" in str(error.value)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({name: value}))
    for given in (argv({name: value}), ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(SystemExit):
            parse(TrainConfig, [*argv({**GIVEN, **without}), *given], prog="job.py")
        assert f"{name}: " in capsys.readouterr().err
        found = parse(TrainConfig, [*argv({**GIVEN, **with_effect}), *given])
        assert getattr(found, name) == value


@pytest.mark.parametrize("name", NOTED)
def test_what_changes_no_result_is_noted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    value, without, with_effect = NOTED[name]
    parse(TrainConfig, argv({**GIVEN, **without, name: value}))
    assert f"note: --{name} has no effect here: " in capsys.readouterr().err
    parse(TrainConfig, argv({**GIVEN, **with_effect, name: value}))
    assert f"--{name} has no effect" not in capsys.readouterr().err


def test_pools_take_the_place_of_workers(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*argv(GIVEN), "--num_workers", "2", "--resources", '{"CPU": 1}']
    parse(PreprocessConfig, [*given, "--pools", '{"vae": {"batch_size": 2}}'])
    assert {"num_workers", "resources"} == set(_noted(capsys.readouterr().err))
    parse(PreprocessConfig, given)
    assert not _noted(capsys.readouterr().err)


def _noted(text: str) -> list[str]:
    return [line.split("--")[1].split()[0] for line in text.splitlines() if line.startswith("note: ")]


def test_defaults_are_there_where_they_have_an_effect() -> None:
    config = TrainConfig(**GIVEN, timestep_sampling="logit_normal", use_gradient_checkpointing_offload=True)
    assert (config.logit_mean, config.logit_std, config.gradient_checkpointing_every) == (0.0, 1.0, 1)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (config.learning_rate, config.weight_decay, config.lora_rank) == (1e-4, 0.01, 32)
    assert config.mode_scale is None and config.shard_cache_gb is None
    own = TrainConfig(**GIVEN, **OWN)
    assert own.learning_rate is None and own.weight_decay is None and own.adam_beta1 is None
    assert TrainConfig(**GIVEN, **FULL).lora_rank is None
    for found in (config, own):
        assert TrainConfig(**found.to_dict()) == found == dataclasses.replace(found, seed=0)
