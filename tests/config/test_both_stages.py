"""Which option of one command line goes to which stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_diffsynth.config import PreprocessConfig, TrainConfig
from ray_diffsynth.config.both_stages import parse_both

GIVEN = ("--model=m", "--dataset_base_path=images", "--cache_path=cache", "--output_path=lora")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(*words: str) -> tuple[PreprocessConfig, TrainConfig]:
    return parse_both([*GIVEN, *words], prog="jobs/pipeline.py")


def test_the_cache_lies_between_them(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = read("--task", "direct_distill", "--height", "64", "--width", "64", "--lora_rank", "8")
    assert (first.dataset_base_path, first.output_path, first.task) == (
        "images",
        "cache",
        "direct_distill:data_process",
    )
    assert (second.dataset_base_path, second.output_path, second.task) == ("cache", "lora", "direct_distill:train")
    assert first.model == second.model == "m" and second.lora_rank == 8 and first.height == second.height == 64
    assert capsys.readouterr().err == "", "what one of the stages uses is told to have no effect in the other"


def test_what_is_for_one_stage_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text(
        "seed: 3\nbatch_size: 2\n"
        "preprocess: {batch_size: 16, cluster: {node_labels: {stage: encode, spot: true}, num_workers: 2..16}}\n"
        "train: {num_workers: 8, optimizer: {learning_rate: 1e-5}}\ngenerate: {student_steps: 8}\n"
    )
    first, second = read("--config=run.yaml", "--train.batch_size=4", '--train.node_labels={"stage": "train"}')
    assert (first.seed, second.seed) == (3, 3) and (first.batch_size, second.batch_size) == (16, 4)
    assert first.selector == {"stage": "encode", "spot": "true"} and second.selector == {"stage": "train"}
    assert first.worker_range == (2, 16) and second.worker_range == (8, 8) and second.learning_rate == 1e-5
    assert (
        read("--seed", "1", "--train.seed", "2")[0].seed == 1 and read("--seed", "1", "--train.seed", "2")[1].seed == 2
    )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lerning_rate", "3"), "--lerning_rate is no option; did you mean learning_rate"),
        (("--cache_pat", "3"), "--cache_pat is no option; did you mean cache_path"),
        (("--train.num_worker", "3"), "--num_worker is not an option; did you mean num_workers"),
        (("--preprocess.learning_rate", "3"), "learning_rate"),
        (("--task", "sft:train"), "task='sft:train' is one stage of 'sft'; name that"),
        (("--lora_rank", "x"), "--lora_rank x: expected a whole number"),
        (("--config", "bad.yaml"), "--config bad.yaml: train is the name of a job; write options below it"),
    ],
)
def test_a_mistake_in_either_stage_is_told_before_anything_runs(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bad.yaml").write_text("train: 3\n")
    if words[0] == "--preprocess.learning_rate":
        read(*words)
        assert message in capsys.readouterr().err  # a note, as preprocess gives of an option of train
        return
    with pytest.raises(SystemExit) as ended:
        read(*words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_cache_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_both(GIVEN[:2], prog="jobs/pipeline.py")
    assert "--cache_path is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        parse_both(["--help"], prog="jobs/pipeline.py")
    assert ended.value.code == 0 and "--cache_path PATH" in capsys.readouterr().out
