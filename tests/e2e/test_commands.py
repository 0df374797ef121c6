"""The commands that users run, as processes: DiffSynth-Studio's guide, and `ray job submit` against a running head."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ray_diffsynth.cache.lease import LEASE
from ray_diffsynth.demo.draw import draw_dataset
from ray_diffsynth.training.checkpoint import list_checkpoints
from ray_diffsynth.training.report.metrics_log import read_metrics
from tests.processes import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,"
    "img_mlp.net.2,img_mod.1,txt_mlp.net.2,txt_mod.1"
)
ENCODERS = "Qwen/Qwen-Image:text_encoder/model*.safetensors,Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors"
TRANSFORMER = "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors"
GUIDE = (
    *(
        "--max_pixels",
        "1048576",
        "--learning_rate",
        "1e-4",
        "--num_epochs",
        "5",
        "--remove_prefix_in_ckpt",
        "pipe.dit.",
    ),
    *(
        "--lora_base_model",
        "dit",
        "--lora_target_modules",
        TARGETS,
        "--lora_rank",
        "32",
        "--use_gradient_checkpointing",
    ),
    *("--dataset_num_workers", "8", "--find_unused_parameters"),
)


JOB = [str(Path(sys.executable).with_name("ray")), "job"]


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_the_two_commands_of_diffsynths_guide(tiny_qwen: Path, tmp_path: Path) -> None:
    """As they stand, in a folder with the guide's relative paths; the model id resolves to ./models/<id>."""
    draw_dataset(tmp_path / "data" / "example_image_dataset", 2)
    shutil.copytree(tiny_qwen, tmp_path / "models" / "Qwen" / "Qwen-Image")
    base, cache = "data/example_image_dataset", "./models/train/Qwen-Image-LoRA-splited-cache"
    data = ["--dataset_base_path", base, "--dataset_metadata_path", f"{base}/metadata.csv", "--dataset_repeat", "1"]
    first = [
        *data,
        "--model_id_with_origin_paths",
        ENCODERS,
        "--output_path",
        cache,
        "--task",
        "sft:data_process",
        *GUIDE,
    ]
    said = run([sys.executable, str(ROOT / "jobs" / "preprocess.py"), *first], tmp_path)
    for flag in ("--learning_rate", "--find_unused_parameters", "--remove_prefix_in_ckpt", "--lora_rank"):
        assert flag in said, f"{flag} has no effect in stage 1, and nothing says so"
    second = ["--dataset_base_path", cache, "--dataset_repeat", "50", "--model_id_with_origin_paths", TRANSFORMER]
    second += ["--output_path", "./models/train/Qwen-Image-LoRA-splited", "--task", "sft:train", *GUIDE]
    said = run([sys.executable, str(ROOT / "jobs" / "train.py"), *second], tmp_path)
    assert "--find_unused_parameters" in said and "--remove_prefix_in_ckpt" in said
    files = sorted(path.name for path in (tmp_path / "models/train/Qwen-Image-LoRA-splited").glob("*.safetensors"))
    assert files == [f"epoch-{epoch}.safetensors" for epoch in range(5)]
    lora = load_file(tmp_path / "models/train/Qwen-Image-LoRA-splited" / files[-1])
    assert {tensor.shape[0] for name, tensor in lora.items() if "lora_A" in name} == {32}


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray head with a job server on loopback, with its own ports, token and temporary folder."""
    gcs, dashboard, agent, client, metrics = free_ports(5)
    # Unix socket paths may have 107 characters, so the folder must be near the root.
    folder = Path("/tmp") / f"rds-{secrets.token_hex(4)}"
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    # The job's `python` is found on the head's path.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    ray += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=3"]
    ray += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
    ray += [f"--metrics-export-port={metrics}", "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ray, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        # The dashboard takes a job, the node's agent starts it; as long as the test may last.
        agent_health = f"http://127.0.0.1:{agent}/api/local_raylet_healthz"
        while not (_answers(f"{address}/api/version") and _answers(agent_health)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield Head(address, {**environment, "RAY_ADDRESS": address})
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it is up, and wants the token
    except OSError:
        return False
    return True


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A working folder: what a checkout has for a job, and a family of one's own in a module beside it."""
    folder = tmp_path / "checkout"
    for name in ("jobs", "ray_diffsynth"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    module = "ray_diffsynth.pipelines.qwen_image.pipeline"
    source = f"from {module} import QwenImagePipeline\nclass Mine(QwenImagePipeline): ...\n"
    (folder / "my_submitted_family.py").write_text(source)
    return folder


def test_ray_job_submit(head: Head, tiny_qwen: Path, checkout: Path, tmp_path: Path) -> None:
    """Both stages as one job on a cluster that is there already, from the checkout, with a module of its own; twice."""
    draw_dataset(tmp_path / "data", 4)
    cache, lora = tmp_path / "cache", tmp_path / "lora"
    (checkout / "run.yaml").write_text("train: {lora_target_modules: [to_q, to_k], lora_rank: 4}\nbatch_size: 2\n")
    submit = [*JOB, "submit", "--address", head.address]
    both = ["jobs/pipeline.py", "--config", "run.yaml", "--model", str(tiny_qwen), "--family", "my_submitted_family"]
    both += ["--dataset_base_path", str(tmp_path / "data"), "--cache_path", str(cache), "--output_path", str(lora)]

    def run_both(steps: int) -> str:
        command = [*submit, "--working-dir", ".", "--", "python", *both, "--max_steps", str(steps)]
        return run(command, checkout, head.environment)

    said = run_both(2)  # an epoch
    assert "cache of 4 samples" in said and "succeeded" in said and load_file(lora / "epoch-0.safetensors")
    encoded = [*cache.glob("vae/*.parquet"), *cache.glob("text_encoder/*.parquet")]
    before = {path: path.stat().st_mtime_ns for path in [*encoded, lora / "epoch-0.safetensors"]}
    assert len(before) >= 3
    said = run_both(4)  # goes on: nothing is encoded again, and two steps more are trained
    assert "succeeded" in said and load_file(lora / "epoch-1.safetensors")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    steps = [json.loads(line)["step"] for line in (lora / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_ray_job_stop(head: Head, tiny_qwen: Path, fp32_cache: Path, tmp_path: Path) -> None:
    """A training that is given time saves; what is stopped in any stage leaves its path to the same command."""

    def begin(name: str, output: Path, seconds: int, *options: str | Path) -> None:
        environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(seconds)}})
        command = ["python", str(ROOT / "jobs" / f"{name}.py"), "--model", tiny_qwen, "--output_path", output, *options]
        submit = [*JOB, "submit", "--no-wait", "--submission-id", name, "--runtime-env-json", environment, "--"]
        run([*submit, *map(str, command)], tmp_path, head.environment)

    def stop(name: str, output: Path, when: Callable[[], bool]) -> None:
        while not when():
            status = run([*JOB, "status", name], tmp_path, head.environment)
            assert "failed" not in status and "succeeded" not in status, status
            time.sleep(0.5)
        assert (output / LEASE).exists()
        run([*JOB, "stop", name], tmp_path, head.environment)
        assert f"'{name}' was stopped" in run([*JOB, "status", name], tmp_path, head.environment)

    lora, cache = tmp_path / "lora", tmp_path / "cache"
    options: list[str | Path] = ["--dataset_base_path", fp32_cache, "--dtype", "float32", "--num_epochs", "100000"]
    options += ["--save_steps", "100000", "--lora_target_modules", "to_q", "--log_with", "none"]
    begin("train", lora, 300, *options)
    stop("train", lora, lambda: len(read_metrics(str(lora))) >= 2)
    steps = json.loads((lora / "report.json").read_text())["counts"]["steps"]
    (name,) = list_checkpoints(str(lora))
    assert int(name.removeprefix("step-")) == steps and not (lora / LEASE).exists()

    draw_dataset(tmp_path / "data", 100, height=32, width=32)
    begin("preprocess", cache, 300, "--dataset_base_path", tmp_path / "data")
    stop("preprocess", cache, lambda: any(cache.glob("*/*.parquet")))
    assert not (cache / "manifest.json").exists() and not (cache / LEASE).exists()
