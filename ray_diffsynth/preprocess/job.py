"""Stage 1 from configuration to committed cache: scan, keys, what is pending, encoding on Ray Data, one commit."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.cache.inspection import histogram
from ray_diffsynth.cache.lease import lease
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.metadata import Metadata, read_metadata
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.models.locate import ModelSource, locate_configured
from ray_diffsynth.pipelines.core.stages import Stages, check_columns, dataset_spec, plan_stages, settings_of
from ray_diffsynth.pipelines.registry import choose_family, get_pipeline_class
from ray_diffsynth.preprocess.cache_keys import GroupPlan, plan_group
from ray_diffsynth.preprocess.commit import add_row_warnings, check_quarantine, check_same_dataset, commit_cache
from ray_diffsynth.preprocess.dry_run import dry_run
from ray_diffsynth.preprocess.execute import encode_all
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.messages import EncoderSpec
from ray_diffsynth.preprocess.pending import Committed, plan_turns
from ray_diffsynth.preprocess.records import ScannedRows
from ray_diffsynth.preprocess.scan import scan_dataset
from ray_diffsynth.preprocess.scan_cache import forget
from ray_diffsynth.preprocess.summary import write_reports
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_session import ray_session
from ray_diffsynth.resources import Cluster, check_pools, encoder_pools
from ray_diffsynth.storage import absolute
from ray_diffsynth.tasks import get_task


@dataclass(frozen=True)
class Job:
    """What follows from the configuration alone: the model, the split, and the address space of each group."""

    config: PreprocessConfig
    cache: str
    family: str
    source: ModelSource
    sample: SampleSpec
    stages: Stages
    groups: tuple[GroupPlan, ...]

    @classmethod
    def of(cls, config: PreprocessConfig) -> "Job":
        """Resolve model, family and split. Every error of configuration is raised here, before Ray starts."""
        source = locate_configured(config, wanted=())
        family = choose_family(config.family, source)
        pipe = get_pipeline_class(family).configured(source)
        task = get_task(config.task)
        check_columns(pipe, task, config)
        settings = settings_of(pipe, task, config.pipeline_settings)
        sample = dataset_spec(pipe, config, task.columns, keep_size=task.as_sampled)
        stages = plan_stages(pipe, task, config.trained, sample.inputs)
        source = locate_configured(config, wanted=[pipe.parts[name].subfolder for name in stages.stage1_models()])
        pipe.check_files(source, stages.stage1_models())  # before their weights are hashed
        groups = tuple(
            plan_group(
                pipe,
                source,
                group,
                sample_inputs=sample.inputs,
                file_params=sample.file_params,
                dtype=config.dtype,
                settings=settings,
            )
            for group in stages.groups
        )
        check_pools(config, [group.name for group in groups])
        return cls(config, absolute(config.output_path), family, source, sample, stages, groups)

    def encoder(self, group: GroupPlan, batch_size: int) -> EncoderSpec:
        """What the actors of `group` need to know."""
        return EncoderSpec(
            family=self.family,
            source=self.source,
            task=self.config.task,
            trainable=self.config.trained,
            group=group.name,
            parameters=group.group.parameters,
            inputs=group.inputs,
            settings=dict(group.settings),
            sample=self.sample,
            dtype=self.config.dtype,
            batch_size=batch_size,
        )


def run(config: PreprocessConfig) -> dict[str, Any]:
    """Encode the dataset into `config.output_path`; returns the counts that report.json there holds too."""
    job = Job.of(config)
    with collecting() as warnings:
        return _run(job, warnings)


def _run(job: Job, warnings: DataWarnings) -> dict[str, Any]:
    """`warnings` takes in what happens to the data while it runs."""
    started, config = time.monotonic(), job.config
    metadata = _read_metadata(job)
    # A dry run writes nothing, no lease either.
    holding = nullcontext() if config.dry_run else lease(job.cache)
    with holding as held, ray_session(config.ray_address, verbose=config.verbose):
        # Not before: an attempt that had the cache until now may just have committed.
        committed = Committed.of(job.cache)
        ids = metadata.table["sample_id"]
        check_same_dataset(job.cache, committed.manifest, committed.index, job.family, ids)
        pools = encoder_pools(config, [group.name for group in job.groups], Cluster.connected())
        rows = _scan(job, metadata, num_cpus=min(pool.decode_cpus for pool in pools.values()))
        runs = [
            GroupRun.begin(group, pool, job.encoder(group, pool.batch_size), rows.samples)
            for group, pool in ((group, pools[group.name]) for group in job.groups)
        ]
        if config.dry_run:
            return dry_run(committed, rows, runs, warnings, retry=config.retry_quarantined)
        print("\n".join(histogram(Counter(sample.bucket.name for sample in rows.samples))), file=sys.stderr)
        check_quarantine(rows, runs, config.max_quarantine)
        turns = plan_turns(
            runs,
            committed,
            rows.samples,
            side_by_side=config.pools is not None,
            retry=config.retry_quarantined,
        )
        for turn in turns:
            _encode(turn, job.cache, config.cache_codec)
            check_quarantine(rows, runs, config.max_quarantine)
        if held is not None:
            held.check()
        outcome = commit_cache(job.cache, _draft(job), rows, runs, caption=job.sample.columns.get("prompt"))
        add_row_warnings(warnings, rows.samples, runs)
    seconds = time.monotonic() - started
    return write_reports(config, job.cache, job.sample, outcome, rows, runs, warnings, seconds)


def _read_metadata(job: Job) -> Metadata:
    config, columns = job.config, job.sample.columns
    return read_metadata(
        config.dataset_base_path,
        config.dataset_metadata_path,
        file_columns=[columns[param] for param in job.sample.file_params],
        text_columns=[column for param, column in columns.items() if param == "prompt"],
        required=list(columns.values()),
        parsers=job.sample.parsers,
    )


def _scan(job: Job, metadata: Metadata, *, num_cpus: float) -> ScannedRows:
    """The rows by bucket, in dataset order within each, and those that cannot be used."""
    with Progress("scan", total=len(metadata.table), unit="files") as progress:
        samples, bad = scan_dataset(
            metadata,
            job.sample,
            job.cache,
            num_cpus=num_cpus,
            remember=not job.config.dry_run,
            on_progress=progress.advance,
        )
    samples.sort(key=lambda sample: sample.bucket.sort_key)  # stable
    return ScannedRows(samples, [*metadata.rejected, *bad], metadata.total)


def _encode(turn: Sequence[GroupRun], cache: str, codec: str) -> None:
    """Encode what is pending of the groups, side by side; the next scan reads again what changed under the run."""
    began = time.monotonic()
    try:
        encode_all(turn, cache=cache, codec=codec)
    finally:
        if changed := {path for run in turn for path in run.changed_sources()}:
            forget(cache, changed)
    for run in turn:
        run.seconds = time.monotonic() - began
        run.shards = ()  # each holds its rows: of a large dataset much memory, while the next group is planned


def _draft(job: Job) -> Manifest:
    """The manifest as far as it follows from the configuration."""
    return Manifest(
        family=job.family,
        task=job.config.task,
        trainable=job.config.trained,
        parameters=job.stages.parameters,
        groups=(),
        buckets={},
        counts={},
        codec=job.config.cache_codec,
        dtype=job.config.dtype,
    )
