"""YAML of options: a value means what stands there, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_diffsynth.config import TrainConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.config.yaml_file import read_options

GIVEN = ["--dataset_base_path", "data", "--model", "tiny"]


def read(text: str, tmp_path: Path) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8-sig")  # with a byte order mark, as some editors write
    return parse(TrainConfig, [*GIVEN, "--config", str(path)], prog="job.py")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("seed: 10", 10),
        ("seed: 0", 0),
        ("seed: +7", 7),
        ("seed: 0x10", 16),
        ("seed: 0o10", 8),
        ("learning_rate: 1e-4", 1e-4),
        ("learning_rate: 1E-4", 1e-4),
        ("learning_rate: .5", 0.5),
        ("learning_rate: 5.", 5.0),
        ("learning_rate: 2", 2.0),
        ("max_steps: null", None),
        ("max_steps: ~", None),
        ("max_steps:", None),
        ("verbose: yes", True),
        ("verbose: off", False),
        ("verbose: True", True),
        ("resolution: 512", "512"),
        ("resolution: 512,1024", "512,1024"),
        ("resolution: 0512", "0512"),
        ("family: no", "no"),
        ("output_path: 010", "010"),
        ("output_path: 2026-01-01", "2026-01-01"),
        ("output_path: 1:30", "1:30"),
        ("output_path: 1e5", "1e5"),
        ("output_path: true", "true"),
        ("num_workers: 1..8", "1..8"),
        ("num_workers: 2", 2),
        ("resources: {GPU: 0.5, CPU: 1e0}", {"GPU": 0.5, "CPU": 1.0}),
        ("pipeline_settings: {tiled: true, text: '010', mode: yes}", {"tiled": True, "text": "010", "mode": "yes"}),
    ],
)
def test_a_value_means_what_stands_there(line: str, value: Any, tmp_path: Path) -> None:
    name = line.partition(":")[0]
    found = getattr(read(line + "\n", tmp_path), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed:", "seed is null"),
        ("lora_dropout: ~", "lora_dropout is null"),
        ("seed: 010", "seed: 010 (line 1) is not clear: a leading zero makes it octal"),
        ("seed: '010'", "seed: 010 (line 1) is not clear"),
        ("seed: -07", "is not clear"),
        ("seed: 1:30", "seed: 1:30 (line 1) is not clear: some readers take it for a number of base 60"),
        ("seed: 1_000", "seed: 1_000 (line 1) is not clear"),
        ("seed: 0b11", "seed: 0b11 (line 1) is not clear"),
        ("seed: yes", "--seed True: expected a whole number"),
        ("seed: 2026-01-01", "--seed 2026-01-01: expected a whole number"),
        ("num_workers: 010", "num_workers: 010 (line 1) is not clear"),
        ("learning_rate: 1:30", "is not clear"),
        ("resources: {GPU: 010}", "resources: GPU: 010 (line 1) is not clear"),
        ("resources:\n  CPU: 1:30", "resources: CPU: 1:30 (line 2) is not clear"),
        ("pipeline_settings: {a: [1, 010]}", "pipeline_settings: a: 010 (line 1) is not clear"),
        ("seed: 1\nmax_steps: 3\nseed: 2", "seed stands there twice (line 3)"),
        ("resources: {GPU: 1, GPU: 2}", "GPU stands there twice"),
    ],
)
def test_what_is_not_clear_is_refused(line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read(line + "\n", tmp_path)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed", "010"], "--seed 010 is not clear"),
        (["--max_steps=1:30"], "--max_steps 1:30 is not clear"),
        (["--resources", '{"GPU": 010}'], "--resources: GPU: 010 (line 1) is not clear"),
        (["--resources.GPU", "010"], "--resources.GPU 010 is not clear"),
    ],
)
def test_flags_too(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, [*GIVEN, *argv], prog="job.py")
    assert said in capsys.readouterr().err


def test_a_mapping_of_a_flag_is_read_alike() -> None:
    config = parse(TrainConfig, [*GIVEN, "--pipeline_settings", "{tiled: true, mode: yes, rate: 1e-4, text: '1:30'}"])
    assert config.pipeline_settings == {"tiled": True, "mode": "yes", "rate": 1e-4, "text": "1:30"}


def test_what_merges_is_not_said_twice() -> None:
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n"
    assert read_options(text, {}) == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}}
