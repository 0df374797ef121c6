"""An option is one field: what is known of it there shows in --help, the checks, the files and the run's identity."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ray_diffsynth.config import JOBS, GenerateConfig, JobConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.config.flags import parse, read_file
from ray_diffsynth.config.options import (
    Component,
    Effect,
    choices_of,
    components,
    defaults_of,
    identity_of,
    option,
    options_of,
    section_options,
    types_of,
)
from ray_diffsynth.errors import ConfigError

GIVEN: dict[str, Any] = {"dataset_base_path": "data", "model": "tiny"}
FLAGS = ["--dataset_base_path", "data", "--model", "tiny"]


@dataclass(frozen=True, kw_only=True)
class TwinkleConfig(Component):
    """A component that nobody else knows of."""

    section: ClassVar[str] = "twinkle"
    title: ClassVar[str] = "Twinkling"

    twinkle_rate: float | None = option(
        None, least=0.5, used_as=2.0, effects=(Effect(lambda c: c.twinkle, "it needs twinkle; leave it out"),)
    )
    """How often it twinkles, in Hz."""
    twinkle: bool = False
    """Whether it twinkles."""
    twinkle_colour: str = option("red", identity=False, many=",")
    """Comma-separated colours."""

    def check(self) -> None:
        if self.twinkle_colour == "black":
            raise ConfigError("twinkle_colour=black cannot be seen")


@dataclass(frozen=True, kw_only=True)
class TwinklingConfig(TwinkleConfig, TrainConfig):
    """A job that twinkles."""


def test_a_new_option_is_one_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(TwinklingConfig, ["--help"], prog="job")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert "Twinkling:" in shown and "--twinkle_rate X" in shown and "How often it twinkles, in Hz." in shown
    config = parse(TwinklingConfig, [*FLAGS, "--twinkle", "--twinkle_colour", '["red", "blue"]'])
    assert (config.twinkle_rate, config.twinkle_colour) == (2.0, "red,blue")
    assert identity_of(config)["twinkle_rate"] == 2.0 and "twinkle_colour" not in identity_of(config)
    assert "twinkle_rate" not in identity_of(TwinklingConfig(**GIVEN)), "without an effect"
    assert defaults_of(TwinklingConfig)["twinkle_rate"] == 2.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"twinkle": True, "twinkle_rate": 0.1}, "twinkle_rate=0.1 is too small; use at least 0.5"),
        ({"twinkle_rate": 1.0}, "would have no effect: twinkle_rate: it needs twinkle"),
        ({"twinkle_colour": "black"}, "cannot be seen"),
        ({"twinkle_colour": ["a,b"]}, "'a,b' holds ',', which stands between two entries"),
        ({"twinkle_colour": [True]}, "True is neither a text nor a number"),
    ],
)
def test_a_new_option_is_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TwinklingConfig(**GIVEN, **values)


@pytest.mark.parametrize("config_class", JOBS)
def test_every_option_has_a_sentence_a_section_and_an_owner(config_class: type[JobConfig]) -> None:
    sections = section_options(JOBS)
    for name in options_of(config_class):
        assert any(name in names for names in sections.values()) or name in ("student_steps", "grid"), name
    for cls in components(config_class):
        assert cls.__doc__


TABLES = {
    "lr_scheduler": "ray_diffsynth.training.lr_schedules:LR_SCHEDULES",
    "loss_weighting": "ray_diffsynth.diffusion.loss_weighting:LOSS_WEIGHTINGS",
    "timestep_sampling": "ray_diffsynth.diffusion.timestep_sampling:TIMESTEP_SAMPLINGS",
    "log_with": "ray_diffsynth.training.report.trackers:TRACKERS",
}


@pytest.mark.parametrize("name", TABLES)
def test_a_line_in_a_table_is_all_that_a_name_needs(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    assert options_of(TrainConfig)[name].names == TABLES[name]
    module, _, table = TABLES[name].partition(":")
    with pytest.raises(ConfigError, match=f"{name}='zigzag'.* is not known"):
        TrainConfig(**GIVEN, **{name: "zigzag"})
    monkeypatch.setitem(getattr(importlib.import_module(module), table), "zigzag", None)
    assert getattr(TrainConfig(**GIVEN, **{name: "zigzag"}), name) == "zigzag"
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], prog="job")
    assert "zigzag" in capsys.readouterr().out


VALUES: dict[type[JobConfig], dict[str, Any]] = {
    TrainConfig: {
        **{"task": "sft", "output_path": "out", "seed": 3, "height": 64, "width": 32, "extra_inputs": "edit_image"},
        **{"lora_rank": 8, "lora_alpha": 4.0, "learning_rate": 1e-3, "max_steps": 7, "lr_scheduler": "cosine"},
        **{"timestep_sampling": "mode", "mode_scale": 1.0, "use_gradient_checkpointing": True, "num_workers": "1..4"},
        **{"validation_samples": 2, "log_with": "csv", "save_steps": 5, "resources": {"CPU": 1.0}, "dtype": "float32"},
    },
    PreprocessConfig: {"resolution": "512,1024", "pools": {"vae": {"num_gpus": 0.5}}, "max_quarantine": 0.5},
    GenerateConfig: {"seeds": "1,2", "cfg_scale": 4.0, "lora": "a.safetensors", "lora_scale": "0,0.5"},
}


@pytest.mark.parametrize("config_class", JOBS)
@given(data=st.data())
def test_a_nested_file_says_what_a_flat_one_says(config_class: type[JobConfig], data: st.DataObject) -> None:

    values = VALUES[config_class]
    chosen = {name: values[name] for name in data.draw(st.lists(st.sampled_from(sorted(values)), unique=True))}
    chosen |= {"height": 64, "width": 32} if {"height", "width"} & chosen.keys() else {}
    chosen |= {"timestep_sampling": "mode"} if "mode_scale" in chosen else {}
    chosen |= {"lora": "a"} if "lora_scale" in chosen else {}
    sections = section_options(JOBS)
    nested: dict[str, Any] = {}
    for name, value in chosen.items():
        places = [section for section, names in sections.items() if name in names]
        place = data.draw(st.sampled_from([None, *places]))
        (nested if place is None else nested.setdefault(place, {}))[name] = value
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for number, settings in enumerate((chosen, nested)):
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(settings))
            found.append(read_file(config_class, str(path)))
    assert found == [chosen, chosen]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rank: 4\nlora:\n  lora_rank: 4\n", "lora_rank stands there twice, by itself and below lora"),
        ("lora:\n  learning_rate: 1\n", "learning_rate is no option of lora; write it below optimizer, or by itself"),
        ("lora:\n  lora_rnak: 4\n", "lora_rnak is not an option; did you mean lora_rank"),
        ("lora:\n  lora_rank: 010\n", "lora_rank: 010.* is not clear"),
    ],
)
def test_a_nested_file_that_is_wrong(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse(TrainConfig, [*FLAGS, "--config", str(tmp_path / "a.yaml")])
    assert re.search(words, capsys.readouterr().err)


def test_one_nested_file_serves_all_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {model: tiny}\nlora: {lora_rank: 4}\nattached_lora: {lora: a.safetensors}\n")
    assert parse(TrainConfig, [*FLAGS[:2], "--config", str(path)]).lora_rank == 4
    assert "--lora has no effect here: it belongs to jobs/generate.py" in capsys.readouterr().err
    drawn = parse(GenerateConfig, ["--prompt", "x", "--config", str(path)])
    assert (drawn.lora, drawn.model) == ("a.safetensors", "tiny")


@pytest.mark.parametrize("config_class", JOBS)
def test_lists_are_comma_texts(config_class: type[JobConfig], tmp_path: Path) -> None:
    """In YAML, as a flag, and in Python, for every option of several in one text."""
    needed = {"prompt": "x", "model": "m"} if config_class is GenerateConfig else GIVEN
    for name, known in options_of(config_class).items():
        if not known.many:
            continue
        choices = choices_of(config_class, name)
        entries = list(choices[:2]) if choices else ["A", "B"] if name == "env" else ["8", "16"]
        wanted = known.many.join(entries)
        more = {"lora": "a"} if name == "lora_scale" else {}
        if name in ("model_id_with_origin_paths", "lora_checkpoint", "trainable_models", "prompt"):
            continue  # they need others
        base = {**needed, **more}
        assert getattr(config_class(**{**base, name: entries}), name) == wanted
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({**base, name: entries}))
        assert read_file(config_class, str(tmp_path / "a.yaml"))[name] == wanted
    flags = [f"--{key}={value}" for key, value in needed.items()]
    seen = parse(config_class, [*flags, "--seeds" if config_class is GenerateConfig else "--resolution", "[8, 16]"])
    assert getattr(seen, "seeds" if config_class is GenerateConfig else "resolution") == "8,16"


def test_a_text_that_begins_like_a_list_stays_one() -> None:
    config = parse(TrainConfig, [*FLAGS, "--validation_prompts", "[a cat] | a dog"])
    assert config.validation_prompts == "[a cat] | a dog"


def test_a_list_of_paths_is_json() -> None:
    paths = [["a.safetensors", "b.safetensors"], "c.safetensors"]
    config = TrainConfig(dataset_base_path="d", model_paths=paths)  # type: ignore[arg-type]
    assert json.loads(str(config.model_paths)) == paths


def test_the_owner_asks_for_its_part_alone() -> None:
    """A configuration is each of its components, so that a function can take one of them."""
    config = TrainConfig(**GIVEN)
    for cls in components(TrainConfig):
        assert isinstance(config, cls)
    names = [f.name for f in dataclasses.fields(config)]
    assert set(names) == set(types_of(TrainConfig)) and len(names) == len(set(names))


@pytest.mark.parametrize("name", ["max_steps", "lora_rank", "learning_rate"])
def test_null_stands_for_the_default(name: str) -> None:
    assert TrainConfig(**GIVEN, **{name: None}) == TrainConfig(**GIVEN)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_of_frames_is_above_nothing(rate: float) -> None:
    with pytest.raises(ConfigError, match="fps=.* is no rate of frames"):
        PreprocessConfig(**GIVEN, fps=rate)


def test_without_tensorboard_metrics_are_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_diffsynth.config import validation

    assert TrainConfig(**GIVEN).trackers == ("tensorboard",)
    monkeypatch.setattr(validation, "find_spec", lambda name: None)
    assert TrainConfig(**GIVEN).trackers == ("csv",)
    assert TrainConfig(**GIVEN, log_with="tensorboard").trackers == ("tensorboard",), "asked for is asked for"
