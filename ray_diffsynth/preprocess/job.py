"""Stage 1 from configuration to committed cache.

scan -> keys per group -> what the cache has already -> shards -> decode, encode, write on Ray Data -> one commit.
"""

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ray_diffsynth.cache.inspection import histogram
from ray_diffsynth.cache.lease import lease
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.metadata import read_metadata
from ray_diffsynth.data.samples import SampleSpec
from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.models.locate import ModelSource, locate_configured
from ray_diffsynth.pipelines.core.stages import Stages, check_columns, dataset_spec, plan_stages, settings_of
from ray_diffsynth.pipelines.registry import choose_family, get_pipeline_class
from ray_diffsynth.preprocess.cache_keys import GroupPlan, plan_group
from ray_diffsynth.preprocess.catalog import GroupCatalog, committed_state
from ray_diffsynth.preprocess.commit import (
    Outcome,
    add_row_warnings,
    check_quarantine,
    check_same_dataset,
    commit_cache,
)
from ray_diffsynth.preprocess.dry_run import dry_run
from ray_diffsynth.preprocess.execute import encode_all
from ray_diffsynth.preprocess.messages import EncoderSpec
from ray_diffsynth.preprocess.plan import Committed, plan_works
from ray_diffsynth.preprocess.pool import check_pools, pool_sizes
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.preprocess.scan import scan_dataset
from ray_diffsynth.preprocess.scan_cache import forget
from ray_diffsynth.preprocess.summary import contact_sheet, group_numbers, quarantine_numbers
from ray_diffsynth.progress import Progress
from ray_diffsynth.ray_session import ray_session
from ray_diffsynth.report import make_report, write_json, write_page
from ray_diffsynth.storage import absolute, join
from ray_diffsynth.tasks import get_task

logger = logging.getLogger(__name__)


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
    """`warnings` takes in what is said of the data while it runs."""
    started, config = time.monotonic(), job.config
    columns = job.sample.columns
    metadata = read_metadata(
        config.dataset_base_path,
        config.dataset_metadata_path,
        file_columns=[columns[param] for param in job.sample.file_params],
        text_columns=[column for param, column in columns.items() if param == "prompt"],
        required=list(columns.values()),
        parsers=job.sample.parsers,
    )
    # A dry run writes nothing, no lease either.
    holding = nullcontext() if config.dry_run else lease(job.cache)
    with holding as held, ray_session(config.ray_address, verbose=config.verbose):
        # Not before: an attempt that had the cache until now may just have committed.
        committed = Committed(job.cache, *committed_state(job.cache))
        ids = metadata.table["sample_id"]
        check_same_dataset(job.cache, committed.manifest, committed.index, job.family, ids)
        sizes = pool_sizes(config, [group.name for group in job.groups])
        with Progress("scan", total=len(metadata.table), unit="files") as progress:
            samples, bad = scan_dataset(
                metadata,
                job.sample,
                job.cache,
                num_cpus=min(size.decode_cpus for size in sizes.values()),
                remember=not config.dry_run,
                on_progress=progress.advance,
            )
        samples.sort(key=lambda sample: sample.bucket.sort_key)  # stable: dataset order within a bucket
        rejected = [*metadata.rejected, *bad]
        if config.dry_run:
            return dry_run(job, committed, samples, rejected, metadata.total, warnings)
        print("\n".join(histogram(Counter(sample.bucket.name for sample in samples))), file=sys.stderr)
        catalogs: dict[str, GroupCatalog] = {}
        check_quarantine(job, samples, rejected, metadata.total, catalogs)
        encoded: dict[str, int] = {}
        reused: dict[str, int] = {}
        times: dict[str, float] = {}
        for works in plan_works(job, committed, samples, sizes):
            began = time.monotonic()
            try:
                encode_all(works, cache=job.cache, codec=config.cache_codec)
            finally:
                if changed := {path for work in works for path in work.changed_sources()}:
                    forget(job.cache, changed)
            for work in works:
                catalogs[work.spec.group] = work.catalog
                encoded[work.spec.group] = work.encoded
                reused[work.spec.group] = work.reused
                times[work.spec.group] = time.monotonic() - began
                work.shards = ()  # each holds its rows: of a large dataset much memory, while the next group is planned
            check_quarantine(job, samples, rejected, metadata.total, catalogs)
        if held is not None:
            held.check()
        outcome = commit_cache(job, samples, rejected, metadata.total, catalogs)
        add_row_warnings(warnings, job, samples, catalogs)
    return _report(job, outcome, samples, encoded, reused, times, warnings, time.monotonic() - started)


def _report(
    job: Job,
    outcome: Outcome,
    samples: Sequence[Sample],
    encoded: dict[str, int],
    reused: dict[str, int],
    times: dict[str, float],
    warnings: DataWarnings,
    seconds: float,
) -> dict[str, Any]:
    """Write report.json and report.html and print the last line: what is where, and the counts."""
    manifest = outcome.manifest
    counts: dict[str, Any] = dict(manifest.counts)
    parameters = {}
    for spec in manifest.groups:
        for name in spec.parameters:
            parameters[name] = {"encoded": encoded[spec.name], "reused": reused[spec.name]}
    summary: dict[str, Any] = {
        "samples": counts["samples"],
        "quarantined": counts["quarantined"],
        "parameters": parameters,
        "buckets": manifest.buckets,
        "bytes": sum(spec.nbytes for spec in manifest.groups),
    }
    more: dict[str, Any] = {
        "groups": group_numbers(manifest.groups, encoded, reused, times),
        "quarantine": quarantine_numbers(outcome.quarantine),
        "warnings": warnings.to_json(),
    }
    report = make_report(counts=counts, seconds=round(seconds, 3), config=job.config, **summary, **more)
    write_json(job.cache, report)
    bad = {entry.sample_id for entry in outcome.quarantine}
    images = contact_sheet([sample for sample in samples if sample.sample_id not in bad], job.sample)
    write_page(job.cache, report, pictures=images)
    for entry in outcome.quarantine[:10]:
        logger.warning("quarantined %s: %s: %s", entry.sample_id, entry.error, entry.message)
    if len(outcome.quarantine) > 10:
        logger.warning("... and %d more; see %s/quarantine", len(outcome.quarantine) - 10, job.cache)
    for line in warnings.lines():
        logger.warning("%s", line)
    work = ", ".join(
        f"{name} {count['encoded']} encoded {count['reused']} reused" for name, count in parameters.items()
    )
    print(
        f"cache of {counts['samples']} samples in {job.cache} "
        f"({counts['total']} rows, {counts['quarantined']} quarantined; {work}; {seconds:.1f} s); "
        f"see {join(job.cache, 'report.html')}"
    )
    return {**counts, **summary}
