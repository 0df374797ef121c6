"""Variables of the job's environment: which are sent, what a process keeps, and that every process has them in time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle

from ray_diffsynth.cluster import environment
from ray_diffsynth.cluster.environment import Parcel, Shipped, forwarded, receive
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.config.flags import parse
from ray_diffsynth.demo.draw import draw_dataset
from ray_diffsynth.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_which_variables_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NCCL_SOCKET_IFNAME", "FI_PROVIDER", "TORCH_NCCL_BLOCKING_WAIT", "PYTORCH_CUDA_ALLOC_CONF", "HF_TOKEN")
    names += ("DIFFUSERS_VERBOSITY", "AWS_PROFILE", "WANDB_API_KEY", "MY_OWN")
    for name in names:
        monkeypatch.setenv(name, name.lower())
    sent = forwarded(["MY_OWN"])
    assert {name: sent[name] for name in names} == {name: name.lower() for name in names}
    assert "PATH" not in sent and "MY_OWN" not in forwarded([])


def test_a_variable_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="env: MY_TOKEN is not set where the job runs"):
        forwarded(["MY_TOKEN"])


def test_names_alone_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", "m", "--dataset_base_path", "d"]
    assert parse(PreprocessConfig, [*command, "--env", "MY_TOKEN, OTHER"]).env_names == ("MY_TOKEN", "OTHER")
    with pytest.raises(SystemExit):
        parse(PreprocessConfig, [*command, "--env", "MY_TOKEN=s3cret"])
    told = capsys.readouterr().err
    assert "Ray's dashboard" in told and "export MY_TOKEN" in told and "s3cret" not in told
    with pytest.raises(SystemExit):
        parse(PreprocessConfig, [*command, "--env", "MY-TOKEN"])
    assert "no name of a variable" in capsys.readouterr().err


def test_what_a_process_has_by_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_received", {})
    monkeypatch.setenv("PROBE_OWN", "own")
    for name in ("PROBE_NEW", "PROBE_GONE"):
        monkeypatch.setenv(name, "")  # restored at the end
        del os.environ[name]
    receive({"PROBE_OWN": "theirs", "PROBE_NEW": "1"})
    assert (os.environ["PROBE_OWN"], os.environ["PROBE_NEW"]) == ("own", "1")
    receive({"PROBE_NEW": "2"})  # of the next job of this process
    assert os.environ["PROBE_NEW"] == "2"


def test_nothing_is_imported_before_the_variables_are_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "late_import.py").write_text("class Late:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import late_import  # type: ignore[import-not-found]

    class Fake:
        """Stands for an Environment."""

        def __reduce__(self) -> tuple[Any, ...]:
            return Fake, ()

        def apply(self) -> None:
            assert "late_import" not in sys.modules
            seen.append("applied")

    seen: list[str] = []
    monkeypatch.setattr(Shipped, "seen", seen, raising=False)
    where: Any = Fake()
    content = ray.cloudpickle.dumps(Parcel(where, late_import.Late()))
    del sys.modules["late_import"]
    parcel = ray.cloudpickle.loads(ray.cloudpickle.dumps(ray.cloudpickle.loads(content)))
    assert "late_import" not in sys.modules, "who passes a parcel on has opened it"
    assert type(parcel.value).__name__ == "Late" and "late_import" in sys.modules


LIGHT = (
    "cluster.environment",
    "generate.actor",
    "preprocess.ray_errors",
    "training.ray.backend",
    "training.ray.sampler_actor",
)


def test_the_modules_of_the_actors_are_light() -> None:
    names = ", ".join(f"ray_diffsynth.{name}" for name in LIGHT)
    script = f"import sys, {names}; print([n for n in ('torch', 'diffusers', 'huggingface_hub') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_process_group_is_that_of_ray_train() -> None:
    from ray.train.torch import TorchConfig

    from ray_diffsynth.training.ray.backend import BackendConfig

    mine, theirs = BackendConfig("gloo"), TorchConfig("gloo")
    assert mine.to_dict() == theirs.to_dict() and mine.framework == theirs.framework
    assert mine.train_func_context is theirs.train_func_context and issubclass(mine.backend_cls, theirs.backend_cls)
    assert [name for name in dir(theirs) if not hasattr(mine, name)] == [], "Ray Train's configuration has grown"


_SITE = """
import importlib.abc, json, os, sys, traceback

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "huggingface_hub"):
            by = [frame.filename for frame in traceback.extract_stack() if "importlib" not in frame.filename]
            found = {key: os.environ.get(key) for key in ("TORCH_PROBE", "HF_TOKEN", "MY_PROBE", "AWS_REGION")}
            with open(os.environ["PROBE_FILE"], "a") as file:
                file.write(json.dumps({"pid": os.getpid(), "name": name, "by": by[-20:], **found}) + chr(10))

sys.meta_path.insert(0, Watch())
"""
"""A `sitecustomize` that notes, in each process, what it has when torch or the hub's library is imported."""

PIECES = {
    "HF_TOKEN": ("hf_S3cret", "S3cret"),
    "MY_PROBE": ("S3cret", "N4med"),
    "WANDB_API_KEY": ("w4ndb", "S3cret"),
    "AWS_SECRET_ACCESS_KEY": ("4ws", "S3cret"),
}
"""Halves of values: Ray keeps the command of a driver, which is the very text of _JOBS."""
SECRETS = {name: "".join(halves) for name, halves in PIECES.items()}

_JOBS = (
    f"pieces = {PIECES}"
    + """
import json, os, sys
import psutil, ray
from ray_diffsynth.ray_compat import init_local

model, data, out, folder = sys.argv[1:]
os.environ["AWS_REGION"] = "of the workers"
init_local(folder, {"num_cpus": 3, "log_to_driver": False})
# After Ray has started: its processes do not inherit these.
os.environ.update(TORCH_PROBE="given", AWS_REGION="of the driver")
os.environ.update({name: "".join(halves) for name, halves in pieces.items()})

from ray_diffsynth.config import GenerateConfig, PreprocessConfig, TrainConfig
from ray_diffsynth.generate import job as generate
from ray_diffsynth.preprocess import job as preprocess
from ray_diffsynth.training.ray import job as training

common = dict(model=model, env="MY_PROBE", dtype="float32")
preprocess.run(PreprocessConfig(dataset_base_path=data, output_path=f"{out}/cache", **common))
training.run(TrainConfig(
    dataset_base_path=f"{out}/cache", output_path=f"{out}/lora", max_steps=1, learning_rate=1e-3, lora_rank=2,
    validation_prompts="a cat", sample_steps=2, resources={"CPU": 1}, **common,
))
generate.run(GenerateConfig(
    prompt="a cat", output_path=f"{out}/images", num_inference_steps=2, height=32, width=32, **common
))

state = ray._private.state.state
accessor = state._connect_and_get_accessor()
tables = [*accessor.get_job_table(), *accessor.get_worker_table(), *accessor.get_actor_table(None, None)]
tables += accessor.get_task_events()
gcs = next(child for child in psutil.Process().children(recursive=True) if "gcs_server" in child.name())

def memory(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as content:
        for line in maps:
            span, rights, *_ = line.split()
            if rights.startswith("rw"):
                start, end = (int(part, 16) for part in span.split("-"))
                content.seek(start)
                try:
                    yield content.read(end - start)
                except OSError:
                    continue

def found(text):
    return [text.encode() in b"".join(map(bytes, tables)), any(text.encode() in part for part in memory(gcs.pid))]

secret = {name: found("".join(halves)) for name, halves in pieces.items()}
token = found(os.environ["RAY_AUTH_TOKEN"])[0]  # the server itself knows it
print(json.dumps({"driver": os.getpid(), "token": token, "secret": secret, "known": found("SamplerActor")}))
"""
)


def files_with(text: str, folder: Path) -> list[Path]:
    """The files in a folder, and below it, that hold a text."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if text.encode() in path.read_bytes()]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """One whose path leaves room for the sockets of Ray."""
    folder = Path("/tmp") / f"rds-{secrets.token_hex(4)}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_process_has_the_variables_and_no_table_or_file_holds_them(
    tiny_qwen: Path, tmp_path: Path, short_folder: Path
) -> None:
    site, probe = tmp_path / "site", tmp_path / "probe"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_SITE)
    draw_dataset(tmp_path / "data", 2, height=32, width=32)
    path = os.pathsep.join([str(site), str(ROOT)])
    known = {name: value for name, value in os.environ.items() if name not in ("TORCH_PROBE", *PIECES)}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    output = tmp_path / "output"
    done = subprocess.run(
        [sys.executable, "-c", _JOBS, str(tiny_qwen), str(tmp_path / "data"), str(output), str(short_folder)],
        env={**known, **token, "PYTHONPATH": path, "PROBE_FILE": str(probe), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in probe.read_text().splitlines()]
    # Ray Train's controller, an asynchronous actor beside the driver, makes the process group of the others.
    others = {line["pid"] for line in lines if any("asyncio" in file for file in line["by"])}
    workers = [line for line in lines if line["pid"] not in {told["driver"], *others}]
    assert len(others) <= 1, lines
    # A decoder, an encoder and a writer at least; a training worker, the actor of its images, and one that generates.
    assert len({line["pid"] for line in workers if line["name"] == "torch"}) >= 5, lines
    expected = {"TORCH_PROBE": "given", "AWS_REGION": "of the workers"}
    expected |= {name: SECRETS[name] for name in ("HF_TOKEN", "MY_PROBE")}
    for line in workers:
        assert {name: line[name] for name in expected} == expected, f"{line}\n{lines}"
    assert told["known"] == [True, True], "the tables and the memory that are looked at are not those of the actors"
    assert told["secret"] == {name: [False, False] for name in PIECES}, "Ray's tables hold the value of a variable"
    assert not told["token"], "Ray's tables hold the token"
    for folder, text in ((output, "lora_rank"), (short_folder, "SamplerActor")):
        assert files_with(text, folder), f"what is looked at in {folder} is not what the jobs wrote"
        for value in (*SECRETS.values(), token["RAY_AUTH_TOKEN"]):
            assert files_with(value, folder) == []
    assert not [value for value in (*SECRETS.values(), token["RAY_AUTH_TOKEN"]) if value in done.stdout + done.stderr]
