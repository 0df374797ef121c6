"""Ray Data's way out: each encoded shard becomes one Parquet file, whole or not at all.

A retried write task writes the same name with the same bytes. What a manifest does not name yet is found again by a
rerun through its file name (see `catalog.py`), so rows are written at least once and counted once.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from ray_diffsynth.cache.row_warnings import parse_row_warnings
from ray_diffsynth.cache.store import GroupRow, shard_name, write_shard
from ray_diffsynth.cluster.environment import Environment, Shipped
from ray_diffsynth.preprocess.errors import described
from ray_diffsynth.preprocess.messages import give_up, unpack
from ray_diffsynth.preprocess.monitor import OutOfTries, add_counts, attempt_at

logger = logging.getLogger(__name__)


class ShardSink(Shipped, Datasink[list[dict[str, Any]]]):
    """Writes the shards of one group. When all are written, the driver's copy holds what became of each in `results`.

    A result is {"shard": `Shard.to_dict`, or None where nothing was to be written, "transient": …, "warnings": those of
    no single row}. A shard that was given up has none.
    """

    def __init__(
        self,
        cache: str,
        group: str,
        parameters: Sequence[str],
        codec: str,
        monitor: Any = None,
        environment: Environment | None = None,
        tries: int | None = None,
    ) -> None:
        self.environment = environment
        self.tries = tries
        self.cache = cache
        self.group = group
        self.parameters = tuple(parameters)
        self.codec = codec
        self.monitor = monitor
        self.results: list[dict[str, Any]] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[dict[str, Any]]:
        """Write the shards of the blocks, in a task; the result of each that was not given up."""
        written: list[dict[str, Any]] = []
        for block in blocks:
            for item in BlockAccessor.for_block(block).iter_rows(public_row_format=False):
                if item["given_up"]:
                    continue
                try:
                    with attempt_at(self.monitor, item["name"], "write", self.tries):
                        written.append(self._write(item))
                except OutOfTries:
                    continue
                except Exception as error:
                    # Whatever is raised here would only make Ray Data drop the shard.
                    logger.exception("shard %s cannot be written", item["name"])
                    reason = f"{self.group} cannot be written to {self.cache}: {described(error)}"
                    give_up(item, self.monitor, reason)
        return written

    def _write(self, item: Mapping[str, Any]) -> dict[str, Any]:
        rows = [GroupRow(key, values) for key, values in unpack(item["inputs"])]
        failed = json.loads(item["failed"])
        transient = json.loads(item["transient"])
        warnings = json.loads(item["warnings"])
        of_the_run = warnings.pop("", [])  # how this run went, not what these rows are: no part of their file
        name = item["name"]
        if transient:
            # A planned name stands for all planned rows: these would then be taken for done.
            name = shard_name([row["key"] for row in json.loads(item["rows"]) if row["key"] not in transient])
        shard = None
        if rows or failed:
            shard = write_shard(
                self.cache,
                self.group,
                name,
                item["bucket"],
                rows,
                codec=self.codec,
                parameters=self.parameters,
                failed=failed,
                warnings={key: parse_row_warnings(pairs) for key, pairs in warnings.items()},
            )
        if self.monitor is not None:
            nbytes = shard.nbytes if shard is not None else 0
            add_counts(self.monitor, len(rows), len(failed) + len(transient), nbytes)
        return {"shard": shard.to_dict() if shard is not None else None, "transient": transient, "warnings": of_the_run}

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        """Collect the results of all tasks, on the driver."""
        self.results = [item for part in write_result.write_returns for item in part]

    @property
    def supports_distributed_writes(self) -> bool:
        """True: tasks on any machine write, each its own files."""
        return True
