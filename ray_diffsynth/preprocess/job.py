"""Stage 1 from configuration to committed cache: scan, keys, what is pending, encoding on Ray Data, one commit."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ray_diffsynth.cache.inspection import histogram
from ray_diffsynth.cache.lease import Lease
from ray_diffsynth.cache.manifest import Manifest
from ray_diffsynth.cluster.encoders import EncoderPool, batch_size
from ray_diffsynth.cluster.environment import Environment
from ray_diffsynth.cluster.holder import has_ended, own_place
from ray_diffsynth.cluster.session import ray_session
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.archives.listings import kept_listings
from ray_diffsynth.data.dataset import read_dataset
from ray_diffsynth.data.metadata import Metadata
from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.plan.run_plan import PreprocessPlan, RunPlan
from ray_diffsynth.preprocess.commit import add_row_warnings, check_family_and_version, check_quarantine, commit_cache
from ray_diffsynth.preprocess.dry_run import dry_run
from ray_diffsynth.preprocess.execute import encode_all
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.machines import Machines, machines_of
from ray_diffsynth.preprocess.messages import EncoderSpec
from ray_diffsynth.preprocess.pending import Committed, plan_turns
from ray_diffsynth.preprocess.same_dataset import check_same_dataset
from ray_diffsynth.preprocess.samples import ScannedRows
from ray_diffsynth.preprocess.scan import scan_dataset
from ray_diffsynth.preprocess.scan_cache import forget
from ray_diffsynth.preprocess.summary import write_reports
from ray_diffsynth.progress import Progress
from ray_diffsynth.storage import join

ARCHIVE_LISTINGS = "index/archives"
"""Where a cache keeps what lies in the archives of its dataset."""


def run(config: PreprocessConfig) -> dict[str, Any]:
    """Encode the dataset into `config.output_path`; returns the counts that report.json there holds too."""
    plan = RunPlan.resolve(config)  # every error of configuration is raised here, before Ray starts
    with collecting() as warnings:
        return _run(plan, warnings)


def _run(plan: PreprocessPlan, warnings: DataWarnings) -> dict[str, Any]:
    """`warnings` takes in what happens to the data while it runs."""
    started, config, cache = time.monotonic(), plan.config, plan.output_path
    with ExitStack() as stack:
        archives = stack.enter_context(kept_listings(join(cache, ARCHIVE_LISTINGS)))
        metadata = read_dataset(plan.sample, config.dataset_metadata_path)
        # Taken when Ray can tell who has ended, given back when it is down: nothing of this run writes any more.
        held = stack.enter_context(Lease(cache))
        session = ray_session(config.ray_address, verbose=config.verbose, env=config.env_names)
        environment = stack.enter_context(session)
        if not config.dry_run:  # which writes nothing
            held.acquire(own_place(), has_ended)
        machines = stack.enter_context(machines_of(config, [group.name for group in plan.groups], cache))
        # Not before: an attempt that had the cache until now may just have committed.
        committed = Committed.of(cache)
        check_family_and_version(cache, committed.manifest, plan.family)
        if not config.replace_dataset:
            check_same_dataset(
                *(cache, committed.index, metadata, plan.groups),
                lambda part: _scan(plan, part, machines, environment, remember=False).samples,
            )
        if not config.dry_run:
            archives.save()
        rows = _scan(plan, metadata, machines, environment)
        runs = [
            GroupRun.begin(group, EncoderSpec(plan, group, batch_size(config, group.name)), rows.samples)
            for group in plan.groups
        ]
        if config.dry_run:
            return dry_run(committed, rows, runs, warnings, retry=config.retry_quarantined)
        print("\n".join(histogram(rows.samples.names_of_buckets)), file=sys.stderr)
        check_quarantine(rows, runs, config.max_quarantine)
        turns = plan_turns(
            runs,
            committed,
            rows.samples,
            side_by_side=config.pools is not None,
            retry=config.retry_quarantined,
        )
        for turn in turns:
            _encode(turn, machines.for_encoding(turn), cache, config.cache_codec, environment)
            check_quarantine(rows, runs, config.max_quarantine)
        held.check()
        captions = plan.sample.columns.get("prompt")
        outcome = commit_cache(cache, _draft(plan), rows, runs, caption=captions, check=held.check)
        add_row_warnings(warnings, rows.samples, runs)
    seconds = time.monotonic() - started
    return write_reports(config, cache, plan.sample, outcome, rows, runs, warnings, seconds)


def _scan(
    plan: PreprocessPlan,
    metadata: Metadata,
    machines: Machines,
    environment: Environment | None,
    *,
    remember: bool = True,
) -> ScannedRows:
    """The rows by bucket, in dataset order within each, and those that cannot be used."""
    with Progress("scan", total=len(metadata.table), unit="files") as progress:
        samples, bad = scan_dataset(
            metadata,
            plan.sample,
            plan.output_path,
            process=machines.for_scan,
            environment=environment,
            stamps_here=not machines.up(),
            remember=remember and not plan.config.dry_run,
            on_progress=progress.advance,
        )
    return ScannedRows(samples, [*metadata.rejected, *bad], metadata.total)


def _encode(
    turn: Sequence[GroupRun],
    pools: Mapping[str, EncoderPool],
    cache: str,
    codec: str,
    environment: Environment | None,
) -> None:
    """Encode what is pending of the groups, side by side; the next scan reads again what changed under the run."""
    began = time.monotonic()
    try:
        encode_all(turn, pools, cache=cache, codec=codec, environment=environment)
    finally:
        if changed := {path for run in turn for path in run.changed_sources()}:
            forget(cache, changed)
    for run in turn:
        run.seconds = time.monotonic() - began
        run.shards = ()  # each holds its rows: of a large dataset much memory, while the next group is planned


def _draft(plan: PreprocessPlan) -> Manifest:
    """The manifest as far as it follows from the configuration."""
    return Manifest(
        family=plan.family,
        task=plan.config.task,
        trainable=plan.config.trained,
        parameters=plan.split.parameters,
        groups=(),
        buckets={},
        counts={},
        codec=plan.config.cache_codec,
        dtype=plan.config.dtype,
    )
