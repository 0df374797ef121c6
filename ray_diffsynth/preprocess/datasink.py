"""Ray Data's way out: each encoded shard becomes one Parquet file, whole or not at all.

A retried write task writes the same name with the same bytes. What a manifest does not name yet is found again by a
rerun through its file name (see `job.py`), so rows are written at least once and counted once.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ray
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from ray_diffsynth.cache.store import GroupRow, Shard, write_shard
from ray_diffsynth.preprocess.encoder import unpack


class Counts(NamedTuple):
    """State of a `Counter`."""

    written: int = 0
    failed: int = 0
    nbytes: int = 0
    encoders: int = 0


@ray.remote(num_cpus=0)
class Counter:
    """Rows written and failed so far, and encoders that came to life, for the driver."""

    def __init__(self) -> None:
        self.written = 0
        self.failed = 0
        self.nbytes = 0
        self.encoders = 0
        self.running: dict[str, Any] = {}

    def loaded(self, actor_id: str, encoder: Any) -> None:
        """An encoder has its models: its actor's id and handle."""
        self.encoders += 1
        self.running[actor_id] = encoder

    def end_encoders(self) -> None:
        """End all encoders. Ray Data leaves one that is just being restarted, which would keep its CPUs and GPUs."""
        for encoder in self.running.values():
            ray.kill(encoder)
        self.running.clear()

    def add(self, written: int, failed: int, nbytes: int) -> None:
        self.written += written
        self.failed += failed
        self.nbytes += nbytes

    def get(self) -> Counts:
        return Counts(self.written, self.failed, self.nbytes, self.encoders)


class ShardSink(Datasink[list[dict[str, Any]]]):
    """Writes the shards of one group. When all are written, the driver's copy holds them in `shards`.

    `fatal` holds the messages of encoders that could not run at all.
    """

    def __init__(self, cache: str, group: str, parameters: Sequence[str], codec: str, counter: Any) -> None:
        self.cache = cache
        self.group = group
        self.parameters = tuple(parameters)
        self.codec = codec
        self.counter = counter
        self.shards: list[Shard] = []
        self.fatal: list[str] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        for block in blocks:
            for item in BlockAccessor.for_block(block).iter_rows(public_row_format=False):
                if item["fatal"]:
                    written.append({"fatal": item["fatal"]})
                    continue
                rows = [GroupRow(key, values) for key, values in unpack(item["inputs"])]
                failed = json.loads(item["failed"])
                shard = write_shard(
                    self.cache,
                    self.group,
                    item["name"],
                    item["bucket"],
                    rows,
                    codec=self.codec,
                    parameters=self.parameters,
                    failed=failed,
                )
                self.counter.add.remote(len(shard.keys), len(failed), shard.nbytes)
                written.append(shard.to_dict())
        return written

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        items = [item for part in write_result.write_returns for item in part]
        self.fatal = [item["fatal"] for item in items if "fatal" in item]
        self.shards = [Shard.from_dict(item) for item in items if "fatal" not in item]

    @property
    def supports_distributed_writes(self) -> bool:
        return True
