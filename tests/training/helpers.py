"""Configurations of short runs on the tiny model, and caches written without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ray_diffsynth.cache.commit import commit
from ray_diffsynth.cache.index import QUARANTINE_SCHEMA, index_schema
from ray_diffsynth.cache.manifest import GroupSpec, Manifest
from ray_diffsynth.cache.store import GroupRow, write_shard
from ray_diffsynth.config import TrainConfig
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.plan.run_plan import RunPlan, TrainPlan
from ray_diffsynth.plan.split import Split
from ray_diffsynth.tasks import SFT, task_family
from ray_diffsynth.training.build import build_module
from ray_diffsynth.training.data.source import DatasetSource, shard_sizes
from ray_diffsynth.training.result import TrainResult
from ray_diffsynth.training.runtime import LocalRuntime
from ray_diffsynth.training.trainer import train
from tests.shard_names import stem

ROOT = Path(__file__).resolve().parents[2]
LORA = "to_q,to_k,to_v,to_out.0,to_add_out,img_mlp.net.2"


def make_config(model: Path, base: Path, output: Path, **changes: Any) -> TrainConfig:
    """A short fp32 run; `changes` on top."""
    lora = "trainable_models" not in changes or changes.get("lora_base_model")
    values: dict[str, Any] = {
        "model": str(model),
        "dataset_base_path": str(base),
        "output_path": str(output),
        "dtype": "float32",
        "learning_rate": 1e-2,
        "task": "sft:train",
        **({} if "max_steps" in changes else {"num_epochs": 4}),
        **({"lora_rank": 4, "lora_target_modules": LORA} if lora else {}),
        **changes,
    }
    return TrainConfig(**values)


def unresolved(config: TrainConfig) -> TrainPlan:
    """A plan for what looks at the configuration alone: its model is nowhere."""
    split = Split((), (), (), (), (), (), ())
    weights = {"dit": "of a model that is nowhere"}
    return TrainPlan(
        config=config,
        output_path=config.output_path,
        family="qwen_image",
        source=ModelSource("/nowhere", "nowhere"),
        weights=weights,
        task=SFT(),
        settings={},
        sample=SampleSpec("", {}, ()),
        split=split,
        models=("dit",),
        target_modules={},
    )


def train_here(config: TrainConfig) -> TrainResult:
    """Train in this process, without Ray."""
    return train(RunPlan.resolve(config), LocalRuntime("cpu", progress=False))


def write_cache(plan: TrainPlan, data: DatasetSource, cache: Path) -> Path:
    """Stage 1 without Ray: one row a sample in every group, shards as stage 1 cuts them."""
    config = plan.config
    module, _ = build_module(plan, torch.device("cpu"))
    stages = module.stages
    samples = [module.encode(sample) for sample in data.fetch(range(len(data.sample_ids)))]
    names = [name for name, rows in data.buckets.items() for _ in rows]
    columns: dict[str, list[Any]] = {
        "sample_id": list(data.sample_ids),
        "source": list(data.sample_ids),
        "bucket": names,
    }
    sizes = shard_sizes(data.buckets)
    for group in stages.groups:
        for column in ("key", "file", "row_group", "row"):
            columns[f"{group.name}_{column}"] = []
        for name, rows in data.buckets.items():
            for first in range(rows.start, rows.stop, sizes[name]):
                part = range(first, min(first + sizes[name], rows.stop))
                values = [GroupRow(f"key-{i:03d}", {p: samples[i][p] for p in group.parameters}) for i in part]
                shard = write_shard(
                    str(cache), group.name, stem(f"{name}-{first:03d}"), name, values, codec="planes-zstd"
                )
                for position, row in enumerate(values):
                    row_group, at = shard.locate(position)
                    for column, value in (
                        ("key", row.key),
                        ("file", shard.file),
                        ("row_group", row_group),
                        ("row", at),
                    ):
                        columns[f"{group.name}_{column}"].append(value)
    count = len(samples)
    manifest = Manifest(
        family=plan.family,
        task=f"{task_family(config.task)}:data_process",
        trainable=config.trained,
        parameters=stages.parameters,
        groups=tuple(
            GroupSpec(name=g.name, parameters=g.parameters, fingerprint="test", rows=count) for g in stages.groups
        ),
        buckets={name: len(rows) for name, rows in data.buckets.items()},
        counts={"samples": count, "quarantined": 0, "total": count},
        codec="planes-zstd",
        dtype=config.dtype,
    )
    schema = index_schema(group.name for group in stages.groups)
    commit(str(cache), manifest, pa.table(columns, schema=schema), QUARANTINE_SCHEMA.empty_table())
    return cache


class Runs:
    """Training runs in processes of their own, without Ray; see `run_server`."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.model, self.cache = model, cache
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in close
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.run_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            cwd=ROOT,
            env=environment,
            text=True,
        )

    def __call__(
        self,
        output: Path,
        *,
        workers: int = 1,
        kill: dict[str, int] | None = None,
        term: int | None = None,
        **changes: Any,
    ) -> list[int]:
        """The workers' exit codes, -9 after SIGKILL. The other options are those of `make_config`."""
        config = make_config(self.model, self.cache, output, **changes).to_dict()
        order = {"config": config, "workers": workers, "meet": f"{output}.meet", "kill": kill, "term": term}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return list(json.loads(self._server.stdout.readline()))

    def messages(self) -> str:
        """What they all wrote to stderr."""
        self._messages.seek(0)
        return self._messages.read()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        self._messages.close()
