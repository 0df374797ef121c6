"""One group of encoders on its way through the run: the keys of its rows, what is known of them, and what is left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_diffsynth.cache.store import Shard
from ray_diffsynth.data.media import SourceChanged
from ray_diffsynth.plan.cache_keys import GroupPlan
from ray_diffsynth.preprocess.catalog import GroupCatalog
from ray_diffsynth.preprocess.messages import EncoderSpec
from ray_diffsynth.preprocess.records import Failure, Sample
from ray_diffsynth.preprocess.shards import ShardPlan


@dataclass
class GroupRun:
    """A group of stage-1 units while it is planned, encoded and committed.

    plan: the address space of its rows. encoder: its specification.
    keys: of each sample's row, in the order of the samples; computed once. empty_key: of the row of the empty caption;
    None in a group that no caption alone flows into.
    catalog: what is known of its rows. shards: what is to be encoded. reused: wanted rows that the cache held before.
    encoded: rows written by this run. seconds: how long it was encoded, beside others if they ran at the same time.
    """

    plan: GroupPlan
    encoder: EncoderSpec
    keys: Sequence[str] = ()
    empty_key: str | None = None
    catalog: GroupCatalog = field(default_factory=GroupCatalog)
    shards: Sequence[ShardPlan] = ()
    reused: int = 0
    encoded: int = field(default=0, init=False)
    seconds: float = field(default=0.0, init=False)

    @classmethod
    def begin(cls, plan: GroupPlan, encoder: EncoderSpec, samples: Sequence[Sample]) -> "GroupRun":
        """With the keys of all samples."""
        keys = [plan.key(sample.inputs) for sample in samples]
        return cls(plan, encoder, keys, plan.key({"prompt": ""}) if plan.caption_only else None)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def rows(self) -> int:
        """Rows of the shards."""
        return sum(len(shard.rows) for shard in self.shards)

    def failure(self, number: int) -> Failure | None:
        """Why the sample of this number is not stored; None for one that is, or was not tried."""
        return self.catalog.failure(self.keys[number])

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
        done = {*self.catalog.known(), *self.catalog.transient}
        return [shard for shard in shards if not done.issuperset(shard.keys)]

    def changed_sources(self) -> set[str]:
        """Paths of the files of rows that could not be encoded since a file was not the one that was scanned."""
        spec = self.encoder.plan.sample
        changed = {key for key, reason in self.catalog.transient.items() if reason.error == SourceChanged.__name__}
        rows = [row.row for shard in self.shards if changed for row in shard.rows if row.key in changed]
        params = [param for param in spec.file_params if param in self.plan.inputs]
        return {path for row in rows for param in params for path in spec.paths(row, param)}
