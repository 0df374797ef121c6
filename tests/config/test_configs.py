"""The configurations: defaults, resolved fields, and refusals that name the field and the fix."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ray_diffsynth.config import JobConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.config.options import split_names
from ray_diffsynth.config.task import task_specs
from ray_diffsynth.errors import ConfigError, did_you_mean, nearest

GIVEN: dict[str, Any] = {"dataset_base_path": "data", "model": "tiny"}


def test_defaults_are_diffsynths() -> None:
    config = TrainConfig(**GIVEN)
    assert (config.learning_rate, config.weight_decay, config.lora_rank, config.num_epochs) == (1e-4, 0.01, 32, None)
    assert (config.max_pixels, config.data_file_keys, config.dataset_repeat) == (1024 * 1024, "image,video", 1)
    assert PreprocessConfig(**GIVEN).task == "sft:data_process" and config.task == "sft:train"


def test_lora_goes_on_the_dit_unless_models_are_trained() -> None:
    assert TrainConfig(**GIVEN).lora_base_model == "dit"
    assert TrainConfig(**GIVEN).trained == ("dit",)
    trained = TrainConfig(**GIVEN, trainable_models="text_encoder, dit")
    assert trained.lora_base_model is None and trained.trained == ("text_encoder", "dit")
    both = TrainConfig(**GIVEN, trainable_models="text_encoder.layers.1", lora_base_model="dit")
    assert both.trained == ("text_encoder.layers.1", "dit")
    for whole, model in (("dit", "dit"), ("dit", "dit.blocks.1"), ("text_encoder.layers.1", "text_encoder")):
        with pytest.raises(ConfigError, match=f"trainable_models={whole} and lora_base_model={model} train the same"):
            TrainConfig(**GIVEN, trainable_models=whole, lora_base_model=model)
    assert TrainConfig(**GIVEN, trainable_models="text_encoder", lora_base_model="text_encoder_2").trained


def test_names_in_one_string() -> None:
    config = PreprocessConfig(**GIVEN, data_file_keys="image, mask", extra_inputs="edit_image")
    assert config.file_columns == ("image", "mask") and config.extra_columns == ("edit_image",)
    assert split_names(None) == split_names("") == split_names(" , ") == ()


def test_preset_lora_goes_where_the_lora_is() -> None:
    assert TrainConfig(**GIVEN, preset_lora_path="a", lora_base_model="text_encoder").preset_lora_model == (
        "text_encoder"
    )


def test_offload_implies_checkpointing() -> None:
    assert TrainConfig(**GIVEN, use_gradient_checkpointing_offload=True).use_gradient_checkpointing


def test_a_configuration_is_json_and_makes_itself_again() -> None:
    config = TrainConfig(**GIVEN, resources={"GPU": 1.0}, max_steps=3)
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dataset_base_path": ""}, ["dataset_base_path is empty"]),
        ({"model": None}, ["model is missing", "hub id"]),
        ({"model_id_with_origin_paths": "a:b"}, ["model_id_with_origin_paths", "use one of them"]),
        ({"task": "sft:trian"}, ["sft:trian", "did you mean sft:train"]),
        ({"task": "sft:data_process"}, ["jobs/preprocess.py", "sft and sft:train"]),
        ({"dtype": "bf16"}, ["dtype='bf16'", "did you mean bfloat16"]),
        ({"loss_weighting": "x"}, ["loss_weighting", "bell, none"]),
        ({"height": 64}, ["height=64 and width=None", "both"]),
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"max_steps": 0}, ["max_steps=0", "at least 1"]),
        ({"seed": -1}, ["seed=-1", "at least 0"]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm=nan"]),
        ({"learning_rate": 0.0}, ["learning_rate=0.0", "above 0"]),
        ({"lora_alpha": 0.0}, ["lora_alpha=0.0", "above 0"]),
        ({"resources": {"GPU": -1.0}}, ["resources", "GPU=-1.0"]),
        ({"min_timestep_boundary": 0.5, "max_timestep_boundary": 0.5}, ["min_timestep_boundary=0.5", "0 <= min"]),
        ({"preset_lora_model": "dit"}, ["preset_lora_model", "preset_lora_path"]),
        ({"resume": ""}, ["resume", "auto"]),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{**GIVEN, **fields})
    assert isinstance(error.value, ValueError)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("task", task_specs())
def test_each_task_is_run_by_one_job(task: str) -> None:
    accepted: list[str] = []
    for config_class in (PreprocessConfig, TrainConfig):
        try:
            config_class(**GIVEN, task=task)
            accepted.append(config_class.job)
        except ConfigError:
            continue
    assert accepted == [task_specs()[task].job]


def test_every_field_has_a_type_and_a_default() -> None:
    for config_class in (PreprocessConfig, TrainConfig):
        without = [f.name for f in dataclasses.fields(config_class) if f.default is dataclasses.MISSING]
        assert without == ["dataset_base_path"]
        assert issubclass(config_class, JobConfig)


def test_nearest_names() -> None:
    names = ["learning_rate", "lora_rank", "model"]
    assert nearest("learning-rate", names) == ["learning_rate"]
    assert did_you_mean("lora_rnak", names) == "did you mean lora_rank?"
    assert did_you_mean("zzz", names) == "choose from learning_rate, lora_rank, model"


def test_the_tasks_are_those_that_have_a_loss() -> None:
    from ray_diffsynth.tasks.registry import TASKS as LOSSES

    assert {name.partition(":")[0] for name in task_specs()} == set(LOSSES)


@pytest.mark.parametrize("memory", [0, -1, float("inf"), float("nan")])
def test_a_limit_of_memory_that_lets_nothing_through(memory: float) -> None:
    with pytest.raises(ConfigError, match="max_decode_memory"):
        PreprocessConfig(**GIVEN, max_decode_memory=memory)
