"""The command line: flags, YAML, notes, refusals, exit codes; and the guide's two commands as they stand."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import re
import resource
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_diffsynth.cli import main
from ray_diffsynth.config import GenerateConfig, JobConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.config.diffsynth import NO_EFFECT, REFUSED
from ray_diffsynth.config.flags import parse
from ray_diffsynth.errors import ConfigError, UserError, find_user_error
from ray_diffsynth.progress import Progress
from ray_diffsynth.report import make_report, write_json

ROOT = Path(__file__).resolve().parent.parent
GIVEN = ["--dataset_base_path", "data", "--model", "tiny"]
CONFIGS: list[type[PreprocessConfig] | type[TrainConfig]] = [PreprocessConfig, TrainConfig]

# The two commands of DiffSynth-Studio's guide to split training, without the launcher.
TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)
SHARED = (
    '--max_pixels 1048576 --learning_rate 1e-4 --num_epochs 5 --remove_prefix_in_ckpt "pipe.dit." '
    f'--lora_base_model "dit" --lora_target_modules "{TARGETS}" --lora_rank 32 --use_gradient_checkpointing '
    "--dataset_num_workers 8 --find_unused_parameters "
)
FIRST = (
    "--dataset_base_path data/example_image_dataset --dataset_metadata_path data/example_image_dataset/metadata.csv "
    '--dataset_repeat 1 --model_id_with_origin_paths "Qwen/Qwen-Image:text_encoder/model*.safetensors,'
    'Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors" '
    f'--output_path "./models/train/Qwen-Image-LoRA-splited-cache" {SHARED} --task "sft:data_process"'
)
SECOND = (
    '--dataset_base_path "./models/train/Qwen-Image-LoRA-splited-cache" --dataset_repeat 50 '
    '--model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors" '
    f'--output_path "./models/train/Qwen-Image-LoRA" {SHARED} --task "sft:train"'
)


def words(command: str) -> list[str]:
    return shlex.split(command)


def notes(text: str) -> set[str]:
    return set(re.findall(r"^note: --(\w+) has no effect here: .+", text, re.MULTILINE))


def refusal(config_class: type[JobConfig], argv: list[str], capsys: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(config_class, argv, prog="job.py")
    assert stop.value.code == 2
    error: str = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_the_guides_first_command(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(PreprocessConfig, words(FIRST))
    assert config.dataset_num_workers == 8 and config.trained == ("dit",)
    assert notes(capsys.readouterr().err) == {
        *("dataset_repeat", "learning_rate", "num_epochs", "remove_prefix_in_ckpt", "lora_target_modules"),
        *("lora_rank", "use_gradient_checkpointing", "find_unused_parameters"),
    }


def test_the_guides_second_command(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(TrainConfig, words(SECOND))
    assert config.use_gradient_checkpointing and config.dataset_repeat == 50 and config.learning_rate == 1e-4
    assert config.lora_target_modules == TARGETS
    assert notes(capsys.readouterr().err) == {"max_pixels", "remove_prefix_in_ckpt", "find_unused_parameters"}


def test_bare_and_valued_booleans() -> None:
    flag = "--use_gradient_checkpointing"
    assert parse(TrainConfig, [flag, *GIVEN]).use_gradient_checkpointing
    assert parse(TrainConfig, [*GIVEN, flag]).use_gradient_checkpointing
    assert parse(TrainConfig, [flag, "true", *GIVEN]).use_gradient_checkpointing
    assert not parse(TrainConfig, [flag, "false", *GIVEN]).use_gradient_checkpointing
    assert not parse(TrainConfig, [f"{flag}=false", *GIVEN]).use_gradient_checkpointing


def test_values_of_every_kind() -> None:
    argv = ["--resources", '{"GPU": 1}', "--max_steps", "7", "--lora_alpha=16", "--model_paths", '["a", ["b", "c"]]']
    config = parse(TrainConfig, ["--dataset_base_path", "data", *argv])
    assert config.resources == {"GPU": 1.0} and config.max_steps == 7 and config.lora_alpha == 16.0
    assert config.model_paths == '["a", ["b", "c"]]'
    assert parse(TrainConfig, [*GIVEN, "--resources.CPU", "2"]).resources == {"CPU": 2.0}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*GIVEN, "--learning_rat", "1"], "--learning_rat is not an option; did you mean learning_rate?"),
        ([*GIVEN, "--learning-rate", "1"], "did you mean learning_rate?"),
        ([*GIVEN, "--zzz"], "--zzz is not an option"),
        ([*GIVEN, "--learning_rate", "much"], "--learning_rate much: expected a number"),
        ([*GIVEN, "--max_steps", "1.5"], "--max_steps 1.5: expected a whole number"),
        ([*GIVEN, "--verbose", "maybe"], "--verbose maybe: expected true or false"),
        ([*GIVEN, "--dtype", "bf16"], "did you mean bfloat16?"),
        ([*GIVEN, "--task", "sft:data_process"], "jobs/preprocess.py"),
        (
            [*GIVEN, "a", "stray"],
            "'a' belongs to no option; options begin with --, and a value with spaces needs quotes",
        ),
        ([*GIVEN, "-lr", "1"], "'-lr' belongs to no option"),
        ([*GIVEN, "--resume"], "--resume needs a value"),
        ([*GIVEN, "--resources", '{"GPU": "x"}'], "--resources {'GPU': 'x'}: expected a JSON object"),
        (["--model", "tiny"], "--dataset_base_path is missing: Folder or URL of the data"),
        ([*GIVEN, "--config", "absent.yaml"], "absent.yaml cannot be read"),
        ([*GIVEN, "--config"], "--config needs the path"),
    ],
)
def test_refusals(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refusal(TrainConfig, argv, capsys)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_flags_that_would_change_the_result_are_refused(config_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in REFUSED.items():
        assert reason in refusal(config_class, [*GIVEN, f"--{name}", "1"], capsys)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_flags_without_effect_are_noted(config_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parse(config_class, [*GIVEN, *(f"--{name}" for name in NO_EFFECT)])
    assert notes(capsys.readouterr().err) == set(NO_EFFECT)


def test_what_the_cache_decides_is_noted_only_with_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [*GIVEN, "--height", "64", "--width", "64", "--max_pixels", "4096", "--dataset_metadata_path", "m.csv"]
    parse(TrainConfig, sizes)
    assert notes(capsys.readouterr().err) == {"height", "width", "max_pixels", "dataset_metadata_path"}
    parse(TrainConfig, [*sizes, "--task", "sft"])
    assert notes(capsys.readouterr().err) == {"max_pixels"}  # beside a fixed size
    parse(TrainConfig, [*GIVEN, *sizes[-4:], "--task", "sft"])
    assert notes(capsys.readouterr().err) == set()


def test_what_the_student_decides_is_noted_or_refused_only_for_direct_distill(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flag of DiffSynth-Studio is accepted; an option of ours would be ignored."""
    boundary = [*GIVEN, "--max_timestep_boundary", "0.5"]
    parse(TrainConfig, [*boundary, "--task", "direct_distill"])
    assert notes(capsys.readouterr().err) == {"max_timestep_boundary"}
    weighting = [*GIVEN, "--loss_weighting", "none"]
    error = refusal(TrainConfig, [*weighting, "--task", "direct_distill"], capsys)
    assert "loss_weighting: direct_distill runs every step" in error
    parse(TrainConfig, [*boundary, *weighting[-2:]])
    assert notes(capsys.readouterr().err) == set()


def test_generate_has_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(GenerateConfig, ["--model", "tiny", "--prompt", "a cat", "--lora", "a,b", "--lora_scale", "0,1"])
    assert (config.loras, config.lora_scales, config.output_path) == (("a", "b"), (0.0, 1.0), "./pictures")
    assert "either prompt" in refusal(GenerateConfig, ["--model", "tiny"], capsys)
    parse(GenerateConfig, ["--model", "tiny", "--prompt", "a", "--learning_rate", "1"])
    assert notes(capsys.readouterr().err) == {"learning_rate"}


def test_one_yaml_serves_both_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny\nlearning_rate: 1e-5\ncache_codec: zstd\nresources: {GPU: 1}\nseed: 3\n")
    argv = ["--config", str(path), "--dataset_base_path", "data"]
    train = parse(TrainConfig, argv)
    assert (train.learning_rate, train.seed, train.resources) == (1e-5, 3, {"GPU": 1.0})
    assert notes(capsys.readouterr().err) == {"cache_codec"}
    assert parse(PreprocessConfig, argv).cache_codec == "zstd"
    assert notes(capsys.readouterr().err) == {"learning_rate"}


def test_the_later_of_yaml_and_flag_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 3\n")
    assert parse(TrainConfig, [*GIVEN, "--config", str(path), "--seed", "4"]).seed == 4
    assert parse(TrainConfig, [*GIVEN, "--seed", "4", "--config", str(path)]).seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "learning_rat is not an option; did you mean learning_rate?"),
        ("learning_rate: much\n", "--learning_rate much: expected a number"),
        ("audio_processor_path: a\n", "audio is not supported"),
        ("- a\n", "not a YAML mapping"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_refusals_of_yaml(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message in refusal(TrainConfig, [*GIVEN, "--config", str(path)], capsys)


def test_print_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, [*GIVEN, "--seed", "5", "--print_config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert parse(TrainConfig, ["--config", str(path)]) == parse(TrainConfig, [*GIVEN, "--seed", "5"])
    assert yaml.safe_load(text).keys() == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("job", ["preprocess", "train", "generate"])
def test_help_is_complete_and_quick(job: str, tmp_path: Path) -> None:
    script = ROOT / "jobs" / f"{job}.py"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, str(script), "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0, shown.stderr
    config_class = {"preprocess": PreprocessConfig, "train": TrainConfig, "generate": GenerateConfig}[job]
    for field in dataclasses.fields(config_class):
        help_of = re.search(rf"^  --{field.name} .*?\n?\s+(\w.*)", shown.stdout, re.MULTILINE)
        assert help_of, f"{field.name} has no sentence in --help"
    assert "Further options" not in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    # Time on the processor, since the suite shares few cores; alone it is also the time that passes, about 0.4 s.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


# Runs a script as __main__, and fails if it imported what takes seconds.
_WITHOUT_TORCH = """
import runpy, sys
script = sys.argv[1]
sys.argv = sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    slow = {"torch", "ray", "diffusers", "transformers", "pyarrow"} & set(sys.modules)
    assert not slow, slow
"""


def test_the_pure_modules_load_no_torch() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    quick = next(contract for contract in contracts if contract["id"] == "quick-to-start")
    lines = [f"import {module}" for module in quick["source_modules"]]
    lines += [
        "import sys",
        f"found = set({quick['forbidden_modules']!r}) & set(sys.modules)",
        "assert not found, found",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)


def test_the_drivers_of_training_and_generation_load_no_models_libraries() -> None:
    """They import torch, which Ray Train does too, but not what their workers load models with."""
    lines = ["import ray_diffsynth.training.ray.job, ray_diffsynth.generate.job, sys"]
    lines += ["found = {'diffusers', 'transformers', 'peft'} & set(sys.modules)", "assert not found, found"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, cwd=ROOT)


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> int:
        def run(config: TrainConfig) -> None:
            raise error

        return main(TrainConfig, run, GIVEN)

    assert main(TrainConfig, lambda config: None, GIVEN) == 0
    assert fail(UserError("the picture is broken")) == 1
    assert capsys.readouterr().err == "error: the picture is broken\n"
    assert fail(ConfigError("the batch is too large")) == 2
    assert fail(RuntimeError("a bug")) == 1
    assert "Traceback" in capsys.readouterr().err
    assert fail(KeyboardInterrupt()) == 130
    assert fail(SystemExit(signal.SIGTERM)) == 143, "so Ray ends a job by SIGTERM"
    assert "goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/out/a"), "'/out/a'; check the rights and the free space"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/a"), "No space left on device: '/out/a'"),
        (type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})("x"), "the credentials"),
    ],
)
def test_what_the_machine_refuses_is_told_without_a_traceback(error: Exception, told: str, capsys: Any) -> None:
    def run(config: TrainConfig) -> None:
        raise RuntimeError("a worker failed") from error

    assert main(TrainConfig, run, GIVEN) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and told in shown and "Traceback" not in shown


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for config_class, given in ((TrainConfig, GIVEN), (GenerateConfig, ["--model", "tiny", "--prompt", "a"])):
        error = refusal(config_class, [*given, "--output_path", str(tmp_path / "file")], capsys)
        assert "is a file; give a folder" in error


def test_the_users_error_is_found_in_what_ray_raises() -> None:
    class Remote(Exception):
        def __init__(self, cause: BaseException) -> None:
            self.cause = cause

    class Workers(Exception):
        def __init__(self, failures: dict[int, BaseException]) -> None:
            self.worker_failures = failures

    told = UserError("no such cache")
    assert find_user_error(Workers({0: Remote(told)})) is told
    chained = RuntimeError("outer")
    chained.__cause__ = told
    assert find_user_error(chained) is told
    assert find_user_error(RuntimeError("a bug")) is None


def test_a_submitted_job_may_not_write_into_rays_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert "absolute path" in refusal(TrainConfig, [*GIVEN, "--output_path", "models"], capsys)
    assert parse(TrainConfig, [*GIVEN, "--output_path", str(tmp_path)]).output_path == str(tmp_path)
    assert parse(TrainConfig, [*GIVEN, "--output_path", "s3://a/b"]).output_path == "s3://a/b"


def test_the_report(tmp_path: Path) -> None:
    config = parse(TrainConfig, GIVEN)
    content = make_report(counts={"samples": 3}, seconds=1.5, config=config, loss=float("nan"), where=tmp_path)
    path = write_json(str(tmp_path / "new"), content)
    report = json.loads(Path(path).read_text())
    assert report["counts"] == {"samples": 3} and report["seconds"] == 1.5 and report["loss"] == "nan"
    assert report["config"]["learning_rate"] == 1e-4 and report["where"] == str(tmp_path)
    assert {"python", "torch", "ray", "diffusers"} <= report["versions"].keys()
    assert [file.name for file in Path(path).parent.iterdir()] == ["report.json"]


def test_progress_in_a_log_file() -> None:
    now, stream = 0.0, io.StringIO()
    with Progress("train", 100, unit="samples", initial=20, stream=stream, clock=lambda: now) as progress:
        for _ in range(40):
            now += 1.0
            progress.advance(2, loss=0.5)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "train 40/100  2 samples/s  ETA 0:00:30  loss 0.5"
    assert lines[-1] == "train 100/100  2 samples/s  ETA 0:00:00  loss 0.5"
    assert len(lines) == 5 and all(len(line) < 80 for line in lines)


def test_progress_on_a_terminal_fits_80_columns() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("preprocess", 10, stream=stream) as progress:
        progress.advance(4, note="x" * 200)
        line = progress.line()
    assert len(line) < 80 and "preprocess 4/10" in stream.getvalue()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert max(len(part) for part in re.split(r"[\r\n]", shown)) <= 80


# Options of DiffSynth-Studio's training parsers (diffsynth/diffusion/parsers.py and the families' train.py).
DIFFSYNTH_FLAGS = """
dataset_base_path dataset_metadata_path dataset_repeat dataset_num_workers data_file_keys height width max_pixels
num_frames model_paths model_id_with_origin_paths extra_inputs fp8_models offload_models resume_from_checkpoint
learning_rate num_epochs trainable_models find_unused_parameters weight_decay task output_path remove_prefix_in_ckpt
save_steps lora_base_model lora_target_modules lora_rank lora_checkpoint preset_lora_path preset_lora_model
use_gradient_checkpointing use_gradient_checkpointing_offload gradient_accumulation_steps template_model_id_or_path
enable_lora_hot_loading enable_model_cpu_offload enable_optimizer_cpu_offload cpu_offload_split_threshold tokenizer_path
processor_path zero_cond_t initialize_model_on_cpu max_timestep_boundary min_timestep_boundary audio_processor_path
framewise_decoding tokenizer_1_path tokenizer_2_path align_to_opensource_format quant_options enable_csv_log
enable_tensorboard_log enable_swanlab_log swanlab_project enable_wandb_log wandb_project
"""


def test_every_flag_of_diffsynth_is_known_and_documented() -> None:
    fields = {field.name for cls in CONFIGS for field in dataclasses.fields(cls)}
    document = (ROOT / "docs" / "coming_from_diffsynth.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(?:--)?(\w+)`", document, re.MULTILINE))
    theirs = set(DIFFSYNTH_FLAGS.split())
    assert theirs <= fields | NO_EFFECT.keys() | REFUSED.keys()
    assert not fields & (NO_EFFECT.keys() | REFUSED.keys())
    assert documented == theirs | NO_EFFECT.keys() | REFUSED.keys()
