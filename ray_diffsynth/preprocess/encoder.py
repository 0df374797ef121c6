"""The work on one shard: decode its inputs on a CPU task, run its group's units in an actor."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import torch

from ray_diffsynth.cache.schema import rows_from_table, table_from_rows
from ray_diffsynth.data.buckets import Bucket
from ray_diffsynth.data.samples import SampleSpec, load_inputs
from ray_diffsynth.errors import UserError
from ray_diffsynth.models.locate import ModelSource
from ray_diffsynth.pipelines.base import BasePipeline
from ray_diffsynth.pipelines.graph import UnitGroup
from ray_diffsynth.pipelines.registry import get_pipeline_class
from ray_diffsynth.pipelines.stages import plan_stages
from ray_diffsynth.pipelines.unit import make_state, run_units
from ray_diffsynth.preprocess.shards import ShardPlan
from ray_diffsynth.tasks import get_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncoderSpec:
    """All that an actor needs to rebuild its group: names and paths, never weights (Ray's store would hold them)."""

    family: str
    source: ModelSource
    task: str
    trainable: tuple[str, ...]
    group: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    settings: Mapping[str, Any]
    sample: SampleSpec
    dtype: str
    batch_size: int


class NonFiniteError(UserError):
    """An encoder returned NaN or infinity for a sample."""


def shard_row(shard: ShardPlan) -> dict[str, Any]:
    """A shard as a Ray Data row."""
    rows = [
        {"key": row.key, "sample_id": row.sample_id, "row": dict(row.row), "size": row.size.name} for row in shard.rows
    ]
    return {
        "name": shard.name,
        "bucket": shard.bucket,
        "rows": json.dumps(rows),
        "inputs": b"",
        "failed": "{}",
        "fatal": "",
    }


def pack(keys: Sequence[str], rows: Sequence[Mapping[str, Any]], parameters: Sequence[str]) -> bytes:
    """Rows as one Arrow IPC stream: how they travel between tasks (pictures as raw pixels, nothing compressed)."""
    table = table_from_rows(keys, rows, parameters, codec="none")
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    packed: bytes = buffer.getvalue().to_pybytes()
    return packed


def unpack(packed: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(key, parameter -> value) of the rows that `pack` was given."""
    with pa.ipc.open_stream(packed) as stream:
        return rows_from_table(stream.read_all(), codec="none")


class Decoder:
    """CPU task: opens the files of a shard's rows. A row that cannot be decoded becomes an entry of `failed`."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        keys: list[str] = []
        rows: list[dict[str, Any]] = []
        failed: dict[str, list[str]] = {}
        for item in json.loads(shard["rows"]):
            try:
                rows.append(
                    load_inputs(item["row"], Bucket.parse(item["size"]), self.spec.sample, only=self.spec.inputs)
                )
                keys.append(item["key"])
            except UserError as error:
                failed[item["key"]] = [type(error).__name__, str(error)]
        return {**shard, "inputs": pack(keys, rows, self.spec.inputs), "failed": json.dumps(failed)}


class Encoder:
    """Actor: loads the models of one group once and encodes shards."""

    def __init__(self, spec: EncoderSpec, counter: Any = None) -> None:
        self.spec = spec
        self.batch_sizes: dict[str, int] = {}
        pipeline = get_pipeline_class(spec.family)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype: torch.dtype = getattr(torch, spec.dtype)
        task = get_task(spec.task)
        planned = plan_stages(pipeline.skeleton(), task, spec.trainable, spec.sample.inputs)
        models = next(group.models for group in planned.groups if group.name == spec.group)
        self.pipe = pipeline.from_pretrained(spec.source, models=models, device=device, torch_dtype=dtype)
        self.pipe.scheduler.set_timesteps(1000, training=True)
        stages = plan_stages(self.pipe, task, spec.trainable, spec.sample.inputs)
        self.group = next(group for group in stages.groups if group.name == spec.group)
        if counter is not None:
            context = ray.get_runtime_context()
            counter.loaded.remote(context.get_actor_id(), context.current_actor)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Shard with inputs -> shard with the encoded parameters in their place, and what failed added."""
        rows = unpack(shard["inputs"])
        try:
            inputs, size = [values for _, values in rows], self.batch_sizes.get(shard["bucket"], self.spec.batch_size)
            results, self.batch_sizes[shard["bucket"]] = encode(self.pipe, self.group, self.spec.settings, inputs, size)
        except UserError as error:
            # Ray Data would drop the block and go on; the sink reports it, and the driver ends the run.
            return {**shard, "inputs": b"", "fatal": str(error)}
        failed: dict[str, list[str]] = json.loads(shard["failed"])
        good: dict[str, dict[str, Any]] = {}
        for (key, _), result in zip(rows, results, strict=True):
            if isinstance(result, Exception):
                failed[key] = [type(result).__name__, str(result)]
            else:
                good[key] = result
        packed = pack(list(good), list(good.values()), self.group.parameters)
        return {**shard, "inputs": packed, "failed": json.dumps(failed)}


def encode(
    pipe: BasePipeline,
    group: UnitGroup,
    settings: Mapping[str, Any],
    inputs: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> tuple[list[dict[str, Any] | Exception], int]:
    """Parameters of each sample, or why it failed; and the batch size that fits, for the next call.

    Out of memory halves the batch size; at 1 it is the sample's own failure. A batch that fails otherwise is cut into
    halves until the sample that is to blame stands alone.
    """
    results: list[dict[str, Any] | Exception] = []
    fits = 1
    while len(results) < len(inputs):
        batch = inputs[len(results) : len(results) + batch_size]
        try:
            results += _encode_batch(pipe, group, settings, batch)
            fits = max(fits, len(batch))
        except torch.OutOfMemoryError as error:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(batch) == 1:
                results.append(error)
                batch_size = fits  # the sample was to blame, not the size of its batch
                continue
            batch_size = len(batch) // 2
            logger.warning("%s: out of memory with a batch of %d; going on with %d", group.name, len(batch), batch_size)
    return results, batch_size


def _encode_batch(
    pipe: BasePipeline, group: UnitGroup, settings: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any] | Exception]:
    """All samples in one batch. Raises OutOfMemoryError, and UserError for what is the run's own mistake."""
    states = [make_state(group.units, {**settings, **sample}) for sample in inputs]
    try:
        with torch.no_grad():
            states = run_units(group.units, pipe, states)
    except (UserError, torch.OutOfMemoryError):
        raise  # a missing model or input; or the caller takes smaller batches
    except Exception as error:
        if len(inputs) == 1:
            return [error]
        logger.warning("%s: a batch of %d failed (%s); trying its halves", group.name, len(inputs), error)
        middle = len(inputs) // 2
        return [
            result
            for part in (inputs[:middle], inputs[middle:])
            for result in _encode_batch(pipe, group, settings, part)
        ]
    return [_checked(group, state.flat()) for state in states]


def _checked(group: UnitGroup, state: Mapping[str, Any]) -> dict[str, Any] | Exception:
    values = {name: state[name] for name in group.parameters}
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            return NonFiniteError(f"{name} holds NaN or infinity; try --dtype float32, or look at the source")
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
