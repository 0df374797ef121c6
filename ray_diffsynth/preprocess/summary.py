"""What stage 1 leaves for people beside the counts: speed per pool, reasons of the quarantine, and a contact sheet."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from ray_diffsynth.cache.manifest import GroupSpec
from ray_diffsynth.data.metadata import Quarantined
from ray_diffsynth.data.samples import SampleSpec, load_inputs
from ray_diffsynth.data.warnings import collecting
from ray_diffsynth.errors import UserError
from ray_diffsynth.preprocess.records import Sample
from ray_diffsynth.report import Picture, thumbnail

logger = logging.getLogger(__name__)

REASONS = 50
"""Entries of the quarantine that the report lists; the cache has all."""
SHEET_IMAGES = 12


def group_numbers(
    groups: Sequence[GroupSpec], encoded: Mapping[str, int], reused: Mapping[str, int], seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Per group (pool): rows encoded and reused, time, rows per second (None where nothing was encoded) and bytes."""
    numbers = []
    for spec in groups:
        done, took = encoded[spec.name], seconds[spec.name]
        numbers.append(
            {
                "name": spec.name,
                "parameters": list(spec.parameters),
                "encoded": done,
                "reused": reused[spec.name],
                "seconds": round(took, 3),
                "rows_per_second": round(done / took, 3) if done and took else None,
                "bytes": spec.nbytes,
            }
        )
    return numbers


def quarantine_numbers(entries: Sequence[Quarantined]) -> dict[str, Any]:
    """How many for each class of error, and the first ones with their message."""
    by_error = Counter(entry.error for entry in entries)
    first = [
        {"sample_id": e.sample_id, "source": e.source, "error": e.error, "message": e.message}
        for e in entries[:REASONS]
    ]
    return {"by_error": dict(by_error.most_common()), "first": first}


def contact_sheet(samples: Sequence[Sample], spec: SampleSpec) -> list[Picture]:
    """Some samples, evenly spread over the sizes, as the encoder sees them; of a video the first frame.

    One that cannot be opened (it may have failed in a decode task as well) is left out.
    """
    if not spec.file_params:
        return []
    param = spec.file_params[0]
    count = min(SHEET_IMAGES, len(samples))
    images = []
    for sample in (samples[i * len(samples) // count] for i in range(count)):
        try:
            bucket = replace(sample.bucket, num_frames=1)  # the first frame, not the whole video
            with collecting():  # said already, by who decoded it for the cache
                found = load_inputs(sample.row, bucket, spec, only=(param,))[param]
        except UserError as error:
            logger.debug("%s is not on the contact sheet: %s", sample.sample_id, error)
            continue
        found = found[0] if isinstance(found, list) else found
        image: Image.Image = found if isinstance(found, Image.Image) else Image.fromarray(found[0])
        text = str(sample.row.get(spec.columns.get("prompt", ""), ""))
        images.append(Picture(thumbnail(image), text, f"{sample.sample_id}, {sample.bucket.name}: {text}"))
    return images
