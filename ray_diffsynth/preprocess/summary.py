"""What stage 1 leaves for people: report.json and report.html with speed, quarantine and a contact sheet."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ray_diffsynth.cache.manifest import GroupSpec
from ray_diffsynth.config import PreprocessConfig
from ray_diffsynth.data.metadata import Quarantined
from ray_diffsynth.data.samples import load_inputs
from ray_diffsynth.data.spec import SampleSpec
from ray_diffsynth.data.warnings import DataWarnings, collecting
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.commit import Outcome
from ray_diffsynth.preprocess.group_run import GroupRun
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.preprocess.samples import ScannedRows
from ray_diffsynth.report import PageImage, make_report, thumbnail, write_json, write_page
from ray_diffsynth.storage import join

logger = logging.getLogger(__name__)

REASONS = 50
"""Entries of the quarantine that the report lists; the cache has all."""
SHEET_IMAGES = 12


def write_reports(
    config: PreprocessConfig,
    cache: str,
    spec: SampleSpec,
    outcome: Outcome,
    rows: ScannedRows,
    runs: Sequence[GroupRun],
    warnings: DataWarnings,
    seconds: float,
) -> dict[str, Any]:
    """Write report.json and report.html and print the last line: what is where, and the counts, which it returns."""
    manifest = outcome.manifest
    counts: dict[str, Any] = dict(manifest.counts)
    parameters = {}
    for group, run in zip(manifest.groups, runs, strict=True):
        for name in group.parameters:
            parameters[name] = {"encoded": run.encoded, "reused": run.reused}
    summary: dict[str, Any] = {
        "samples": counts["samples"],
        "quarantined": counts["quarantined"],
        "parameters": parameters,
        "buckets": manifest.buckets,
        "bytes": sum(group.nbytes for group in manifest.groups),
    }
    more: dict[str, Any] = {
        "groups": [group_numbers(group, run) for group, run in zip(manifest.groups, runs, strict=True)],
        "quarantine": quarantine_numbers(outcome.quarantine),
        "warnings": warnings.to_json(),
    }
    report = make_report(counts=counts, seconds=round(seconds, 3), config=config, **summary, **more)
    write_json(cache, report)
    good = outcome.good
    shown = good[np.arange(count := min(SHEET_IMAGES, len(good))) * len(good) // max(count, 1)]
    images = sample_images(rows.samples.reader().take(shown), spec)
    write_page(cache, report, images=images)
    for entry in outcome.quarantine[:10]:
        logger.warning("quarantined %s: %s: %s", entry.sample_id, entry.error, entry.message)
    if len(outcome.quarantine) > 10:
        logger.warning("... and %d more; see %s/quarantine", len(outcome.quarantine) - 10, cache)
    for line in warnings.lines():
        logger.warning("%s", line)
    done = ", ".join(
        f"{name} {count['encoded']} encoded {count['reused']} reused" for name, count in parameters.items()
    )
    print(
        f"cache of {counts['samples']} samples in {cache} "
        f"({counts['total']} rows, {counts['quarantined']} quarantined; {done}; {seconds:.1f} s); "
        f"see {join(cache, 'report.html')}"
    )
    return {**counts, **summary}


def group_numbers(group: GroupSpec, run: GroupRun) -> dict[str, Any]:
    """Of a group (pool): rows encoded and reused, time, rows per second (None where nothing was encoded) and bytes."""
    return {
        "name": group.name,
        "parameters": list(group.parameters),
        "encoded": run.encoded,
        "reused": run.reused,
        "seconds": round(run.seconds, 3),
        "rows_per_second": round(run.encoded / run.seconds, 3) if run.encoded and run.seconds else None,
        "bytes": group.nbytes,
    }


def quarantine_numbers(entries: Sequence[Quarantined]) -> dict[str, Any]:
    """How many for each class of error, and the first ones with their message."""
    by_error = Counter(entry.error for entry in entries)
    first = [
        {"sample_id": e.sample_id, "source": e.source, "error": e.error, "message": e.message}
        for e in entries[:REASONS]
    ]
    return {"by_error": dict(by_error.most_common()), "first": first}


def sample_images(samples: Sequence[Sample], spec: SampleSpec) -> list[PageImage]:
    """The samples as the encoder sees them; of a video the first frame.

    One that cannot be opened (it may have failed in a decode task as well) is left out.
    """
    if not spec.file_params:
        return []
    param = spec.file_params[0]
    images = []
    for sample in samples:
        try:
            bucket = replace(sample.bucket, num_frames=1)  # the first frame, not the whole video
            with collecting():  # warned of already, when it was decoded for the cache
                found = load_inputs(sample.row, bucket, spec, only=(param,))[param]
        except UserError as error:
            logger.debug("%s is not on the contact sheet: %s", sample.sample_id, error)
            continue
        found = found[0] if isinstance(found, list) else found
        image: Image.Image = found if isinstance(found, Image.Image) else Image.fromarray(found[0])
        text = str(sample.row.get(spec.columns.get("prompt", ""), ""))
        images.append(PageImage(thumbnail(image), text, f"{sample.sample_id}, {sample.bucket.name}: {text}"))
    return images
