"""One group of encoders on its way through the run: the keys of its rows, what is known of them, and what is left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_diffsynth.cache.store import Shard
from ray_diffsynth.data.media import SourceChanged
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.key_columns import Keys, Mask, is_among, packed, reduced, unpacked
from ray_diffsynth.preprocess.messages import EncoderSpec
from ray_diffsynth.preprocess.records import Failure
from ray_diffsynth.preprocess.samples import Samples
from ray_diffsynth.preprocess.shard_plans import ShardPlans
from ray_diffsynth.preprocess.shards import ShardPlan


@dataclass
class GroupRun:
    """A group of stage-1 units while it is planned, encoded and committed.

    plan: the address space of its rows. encoder: its specification.
    keys: of each sample's row, packed, in the order of the samples; computed once. empty_key: of the row of the empty
    caption; None in a group that no caption alone flows into.
    catalog: what is known of its rows. shards: what is to be encoded. reused: wanted rows that the cache held before.
    encoded: rows written by this run. seconds: how long it was encoded, beside others if they ran at the same time.
    """

    plan: GroupPlan
    encoder: EncoderSpec
    keys: Keys = field(default_factory=lambda: packed([]))
    empty_key: str | None = None
    catalog: GroupCatalog = field(default_factory=GroupCatalog)
    shards: Sequence[ShardPlan] = ()
    reused: int = 0
    encoded: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    @classmethod
    def begin(cls, plan: GroupPlan, encoder: EncoderSpec, samples: Samples) -> "GroupRun":
        """With the keys of all samples."""
        keys = packed(plan.key(inputs) for inputs in samples.inputs(plan.inputs))
        return cls(plan, encoder, keys, plan.key({"prompt": ""}) if plan.caption_only else None)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def rows(self) -> int:
        """Rows of the shards."""
        return (
            self.shards.rows if isinstance(self.shards, ShardPlans) else sum(len(shard.rows) for shard in self.shards)
        )

    def failed(self) -> Mask:
        """Which samples are known not to be stored."""
        return self.catalog.failed(self.keys)

    def key(self, number: int) -> str:
        """The key of the row of the sample of this number."""
        return unpacked(self.keys[number : number + 1])[0]

    def add_results(self, results: Sequence[dict[str, Any]]) -> None:
        """Add the results of a pass (`ShardSink.results`) to what is known of the rows."""
        for result in results:
            if result["shard"] is not None:
                shard = Shard.from_dict(result["shard"])
                self.catalog.add(shard)
                self.encoded += len(shard.keys)
            self.catalog.run_warnings.update((kind, detail) for kind, detail in result["warnings"])
            for key, reason in result["transient"].items():
                self.catalog.transient[key] = Failure(*reason)

    def missing(self, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """The shards without a result: of a shard all rows have one, or none."""
        if isinstance(shards, ShardPlans):
            return shards.holding(~self._has_result(shards.keys))
        keys = packed(key for shard in shards for key in shard.keys)
        done = reduced(self._has_result(keys), np.cumsum([len(shard.keys) for shard in shards], dtype=np.int64))
        return [shard for shard, whole in zip(shards, done.tolist(), strict=True) if not whole]

    def _has_result(self, keys: Keys) -> Mask:
        return self.catalog.knows(keys) | is_among(keys, self.catalog.transient)

    def changed_sources(self) -> set[str]:
        """Paths of the files of rows that could not be encoded since a file was not the one that was scanned."""
        spec = self.encoder.plan.sample
        changed = {key for key, reason in self.catalog.transient.items() if reason.error == SourceChanged.__name__}
        if not changed:
            return set()
        shards = self.shards
        some = shards.holding(is_among(shards.keys, changed)) if isinstance(shards, ShardPlans) else shards
        rows = [row.row for shard in some for row in shard.rows if row.key in changed]
        params = [param for param in spec.file_params if param in self.plan.inputs]
        return {path for row in rows for param in params for path in spec.paths(row, param)}
