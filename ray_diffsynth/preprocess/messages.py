"""What travels between the tasks of stage 1: the encoder's specification, and a shard as a row of Ray Data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from ray_diffsynth.cache.schema import rows_from_table, table_from_rows
from ray_diffsynth.data.samples import digests_of
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.plan.run_plan import PreprocessPlan
from ray_diffsynth.preprocess.errors import EncoderError
from ray_diffsynth.preprocess.shards import ShardPlan


@dataclass(frozen=True)
class EncoderSpec:
    """All that an actor needs to rebuild its group: names and paths, never weights (Ray's store would hold them)."""

    plan: PreprocessPlan
    group: GroupPlan
    batch_size: int


def shard_row(shard: ShardPlan) -> dict[str, Any]:
    """A shard as a Ray Data row.

    `inputs` are the decoded inputs of its rows, later their encoded parameters. `failed` and `transient` hold the rows
    that cannot be encoded, by key: error class and message. Those of `failed` are remembered; what is in `transient` is
    not the sample's own fault and is tried again by the next run. `warnings` are those of a row, by key: pairs of
    kind and detail; those of the key "" are of no single row and are not stored. `given_up`: a task could not go on and
    reported why to the monitor, or the shard has killed too many processes; the next tasks pass it on as it is.
    """
    rows = [
        {
            "key": row.key,
            "sample_id": row.sample_id,
            "row": dict(row.row),
            "size": row.size.name,
            "digests": {param: digests_of(keys) for param, keys in row.files.items()},
        }
        for row in shard.rows
    ]
    return {
        "name": shard.name,
        "bucket": shard.bucket,
        "rows": json.dumps(rows),
        "inputs": b"",
        "failed": "{}",
        "transient": "{}",
        "warnings": "{}",
        "given_up": False,
    }


def give_up(shard: Mapping[str, Any], monitor: Any, reason: str) -> dict[str, Any]:
    """The shard of a task that cannot go on. The monitor knows why before it moves on; the driver ends the run with it.

    Raises EncoderError without a monitor.
    """
    if monitor is None:
        raise EncoderError(reason)
    ray.get(monitor.report.remote("give_up", reason))
    return {**shard, "inputs": b"", "given_up": True}


def unanswered(shard: Mapping[str, Any]) -> dict[str, Any]:
    """The shard of a task that is not to try it again, since the processes before it died: it gets no result."""
    return {**shard, "inputs": b"", "given_up": True}


def pack(keys: Sequence[str], rows: Sequence[Mapping[str, Any]], parameters: Sequence[str]) -> bytes:
    """Rows as one Arrow IPC stream: how they travel between tasks (images as raw pixels, nothing compressed)."""
    table = table_from_rows(keys, rows, parameters, codec="none")
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    packed: bytes = buffer.getvalue().to_pybytes()
    return packed


def unpack(packed: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(key, parameter -> value) of the rows that `pack` was given. Checksums are for files: here nothing is damaged."""
    with pa.ipc.open_stream(packed) as stream:
        return rows_from_table(stream.read_all(), codec="none", verify=False)
